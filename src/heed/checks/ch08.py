"""Chapter 08, positions: the checks of its eight tasks, and `problem`, rotations by hand.

B sequences · T queries, the last of the S positions · S keys · C width of the stream · H heads ·
D head width · N rows of a projection.
"""

import random
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from heed import positions
from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import expect, in_brackets, normal

f64 = torch.float64
MUTANTS = mutants(__file__)


# 08.1


def sinusoids(n: int, d_model: int) -> Float[Tensor, "{n} {d_model}"]:
    pair = torch.arange(d_model, dtype=torch.float64) // 2
    angles = torch.arange(n)[:, None] / 10000 ** (2 * pair / d_model)
    table = angles.cos()
    table[:, 0::2] = angles.sin()[:, 0::2]
    return table


@prop("a row for each position", "n rows, and as many columns as the stream is wide.")
def table_shape(f: Function, rng: Generator) -> None:
    expect(torch.tensor(f(7, 10).shape), [7, 10], "n = 7, d_model = 10; the shape")


@prop("position 0", "sin 0 and cos 0, in turns. Which channels are the even ones?")
def row_zero(f: Function, rng: Generator) -> None:
    expect(f(5, 6)[0], [0, 1, 0, 1, 0, 1], "n = 5, d_model = 6; row 0")


@prop("pairs are arrows", "Sine and cosine of one pair have one frequency: squares add up to 1.")
def arrows(f: Function, rng: Generator) -> None:
    squares = f(11, 14).double().unflatten(1, (7, 2)).square().sum(2)
    expect(squares, torch.ones(11, 7), "n = 11, d_model = 14; sin² + cos² of each pair")


@prop("the first pair", "Exponent 0: this hand turns by one radian per position.")
def first_pair(f: Function, rng: Generator) -> None:
    want = positions.sinusoids(5, 6, dtype=f64)[:, :2]
    expect(f(5, 6)[:, :2], want, "n = 5, d_model = 6; channels 0 and 1")


@prop("all frequencies", "The exponent of pair i is 2i over the width, and the base is 10,000.")
def all_frequencies(f: Function, rng: Generator) -> None:
    want = positions.sinusoids(101, 22, dtype=f64)
    expect(f(101, 22), want, "n = 101, d_model = 22", 1e-5)


SINUSOIDS = Task(
    "08.1",
    sinusoids,
    (table_shape, row_zero, arrows, first_pair, all_frequencies),
    MUTANTS["08.1"],
)


# 08.2


def shift(k: int, d_model: int) -> Float[Tensor, "{d_model} {d_model}"]:
    angle = k * 10000 ** -(torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    even = torch.arange(0, d_model, 2)
    matrix = torch.zeros(d_model, d_model, dtype=torch.float64)
    matrix[even, even] = matrix[even + 1, even + 1] = angle.cos()
    matrix[even, even + 1] = angle.sin()
    matrix[even + 1, even] = -angle.sin()
    return matrix


def _moved(f: Function, t: int, k: int, C: int) -> None:
    table = positions.sinusoids(t + abs(k) + 1, C, dtype=f64)
    got = f(k, C).double() @ table[t]
    expect(got, table[t + k], f"k = {k}, d_model = {C}; your matrix times row {t}", 1e-5)


@prop("square", "It takes C channels to C channels.")
def shift_square(f: Function, rng: Generator) -> None:
    expect(torch.tensor(f(3, 6).shape), [6, 6], "k = 3, d_model = 6; the shape")


@prop("no step", "A step of 0 leaves every code where it is.")
def no_step(f: Function, rng: Generator) -> None:
    expect(f(0, 6), torch.eye(6), "k = 0, d_model = 6")


@prop(
    "one pair", "sin(a + b) = sin a cos b + cos a sin b. In which order does the table list them?"
)
def one_pair(f: Function, rng: Generator) -> None:
    _moved(f, 2, 1, 2)


@prop("every pair", "Each pair turns by its own angle and does not touch the others.")
def every_pair(f: Function, rng: Generator) -> None:
    _moved(f, 5, 3, 14)


@prop("anywhere, any way", "The same matrix far from the start; and a negative step goes back.")
def anywhere(f: Function, rng: Generator) -> None:
    _moved(f, 1009, 7, 10)
    _moved(f, 23, -7, 10)


SHIFT = Task(
    "08.2", shift, (shift_square, no_step, one_pair, every_pair, anywhere), MUTANTS["08.2"]
)


# 08.3


def bucket(
    back: Int[Tensor, " N"], n_buckets: int = 32, max_distance: int = 128
) -> Int[Tensor, " N"]:
    back = back.clamp(min=0)
    exact = n_buckets // 2
    ratio = torch.tensor(max_distance / exact, dtype=torch.float64)
    share = torch.log(back.double() / exact) / torch.log(ratio)
    far = exact + (share * (n_buckets - exact) + 1e-9).floor()
    return torch.where(back < exact, back, far.clamp(0, n_buckets - 1).long())


def _buckets(f: Function, back: list[int], n: int, limit: int) -> None:
    want = positions.buckets(
        -torch.tensor(back), bidirectional=False, n_buckets=n, max_distance=limit
    )
    given = f"back = {back if len(back) < 9 else 'all distances'}"
    got = f(torch.tensor(back), n, limit)
    expect(got, want, f"{given}, n_buckets = {n}, max_distance = {limit}", 0)


@prop("near", "The first half of the buckets holds one distance each.")
def near(f: Function, rng: Generator) -> None:
    _buckets(f, [0, 1, 2, 7, 15], 32, 128)


@prop(
    "the first shared bucket", "Where the logarithm begins, its share is 0. Which bucket is next?"
)
def first_shared(f: Function, rng: Generator) -> None:
    _buckets(f, [16, 17, 18, 19, 21], 32, 128)


@prop("the last bucket", "Everything from max_distance on shares the last bucket.")
def last_bucket(f: Function, rng: Generator) -> None:
    _buckets(f, [112, 113, 127, 128, 129, 5000], 32, 128)


@prop("keys ahead", "A key ahead of its query has a negative distance back. It is never read.")
def ahead(f: Function, rng: Generator) -> None:
    _buckets(f, [-1, -9, -300], 32, 128)


@prop("other sizes", "Nothing in the rule is tied to 32 and 128.")
def other_sizes(f: Function, rng: Generator) -> None:
    for n, limit in ((10, 101), (14, 61), (32, 1000)):
        _buckets(f, list(range(limit + 50)), n, limit)


@prop("whole powers", "At 16, 32, 64 the quotient of logarithms is whole: mind the last digit.")
def whole_powers(f: Function, rng: Generator) -> None:
    _buckets(f, [15, 16, 31, 32, 63, 64], 16, 128)


BUCKET = Task(
    "08.3",
    bucket,
    (near, first_shared, last_bucket, ahead, other_sizes, whole_powers),
    MUTANTS["08.3"],
)


# 08.4


def alibi(n_heads: int, T: int, S: int) -> Float[Tensor, "{n_heads} {T} {S}"]:
    below = 1
    while 2 * below <= n_heads:
        below *= 2
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    slopes += [2 ** (-4 * h / below) for h in range(1, below + 1, 2)]
    slopes += [2 ** (-4 * h / below) for h in range(below + 1, 2 * below, 2)]
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    return -torch.tensor(slopes[:n_heads], dtype=torch.float64)[:, None, None] * (i - j).abs()


def _alibi(f: Function, H: int, T: int, S: int) -> None:
    distance = (torch.arange(S - T, S)[:, None] - torch.arange(S)).abs()
    want = -positions.alibi_slopes(H).double()[:, None, None] * distance
    past = distance >= torch.arange(S) - torch.arange(S - T, S)[:, None] + 1  # j < i
    got = f(H, T, S)
    given = f"n_heads = {H}, T = {T}, S = {S}"
    expect(torch.tensor(got.shape), [H, T, S], f"{given}; the shape", 0)
    past |= distance == 0
    expect(got * past, want * past, f"{given}; keys up to the query")


@prop("one head", "Its slope is 2 to the power -8. What is far counts less: mind the sign.")
def one_head(f: Function, rng: Generator) -> None:
    _alibi(f, 1, 5, 5)


@prop("eight heads", "1/2, 1/4, ... 1/256: the first head has exponent -8/H, not 0.")
def eight_heads(f: Function, rng: Generator) -> None:
    _alibi(f, 8, 5, 5)


@prop("the last T of S", "The first of T queries stands at position S - T.")
def last_queries(f: Function, rng: Generator) -> None:
    _alibi(f, 2, 1, 7)
    _alibi(f, 4, 3, 7)


@prop("other head counts", "The power of two below, then every second slope of the one above.")
def other_counts(f: Function, rng: Generator) -> None:
    for H in (3, 5, 12, 14):
        _alibi(f, H, 2, 3)


ALIBI = Task("08.4", alibi, (one_head, eight_heads, last_queries, other_counts), MUTANTS["08.4"])


# 08.5


def rotate(
    x: Float[Tensor, "B H T D"], positions: Int[Tensor, " T"], base: float = 10000.0
) -> Float[Tensor, "B H T D"]:
    D = x.shape[3]
    omega = base ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = positions.double()[:, None] * omega
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : D // 2].double(), x[..., D // 2 :].double()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3).to(x.dtype)


def _turned(f: Function, x: Tensor, at: list[int], given: str) -> None:
    expect(f(x, torch.tensor(at)), positions.rotate(x, torch.tensor(at)), given, 1e-5)


@prop("position 0", "A turn by nothing. Is anything added, or are channels exchanged?")
def at_zero(f: Function, rng: Generator) -> None:
    _turned(f, normal(rng, 2, 3, 1, 6), [0], "x (2, 3, 1, 6), positions [0]")


@prop("one pair", "(cos, -sin; sin, cos), one radian per position. Which way does it turn?")
def turn_pair(f: Function, rng: Generator) -> None:
    x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]], dtype=f64)
    _turned(f, x, [0, 1, 2], "x = (1, 0), (1, 0), (0, 1), positions [0, 1, 2]")


@prop("norms", "A rotation keeps the length of every vector.")
def norms(f: Function, rng: Generator) -> None:
    x = normal(rng, 1, 2, 5, 10)
    expect(f(x, torch.arange(5)).norm(dim=3), x.norm(dim=3), "x (1, 2, 5, 10); the norms")


@prop("which channels are a pair", "Half-split: channel p goes with channel p + D/2.")
def which_pair(f: Function, rng: Generator) -> None:
    x = torch.eye(6, dtype=f64)[None, None, [1, 1]]
    touched = f(x, torch.arange(2))[0, 0, 1].abs() > 1e-9
    expect(touched, [0, 1, 0, 0, 1, 0], "x = unit vector 1 of 6, position 1; channels not 0")


@prop("every speed", "Pair p turns by base^(-2p/D) per position.")
def every_speed(f: Function, rng: Generator) -> None:
    x = normal(rng, 2, 3, 7, 14)
    _turned(f, x, list(range(7)), "x (2, 3, 7, 14), positions 0 to 6")
    at = torch.arange(7)
    want = positions.rotate(x, at, base=500.0)
    expect(f(x, at, 500.0), want, "x (2, 3, 7, 14), base 500", 1e-5)


@prop(
    "the positions that are given", "They may start anywhere, and jump: a cache, or a packed batch."
)
def given_positions(f: Function, rng: Generator) -> None:
    _turned(f, normal(rng, 1, 2, 5, 6), [41, 42, 0, 1, 7], "positions [41, 42, 0, 1, 7]")


@prop("half precision", "bfloat16 has no 257. Make the angles in float32 or better.")
def half_precision(f: Function, rng: Generator) -> None:
    x, at = normal(rng, 1, 1, 3, 10).bfloat16(), torch.tensor([257, 1001, 4095])
    got = f(x, at)
    expect(got.dtype == torch.bfloat16, True, "x in bfloat16; is the result?", 0)
    expect(got, positions.rotate(x.double(), at), "x in bfloat16, positions to 4095", 0.03)


ROTATE = Task(
    "08.5",
    rotate,
    (at_zero, turn_pair, norms, which_pair, every_speed, given_positions, half_precision),
    MUTANTS["08.5"],
)


# 08.6


def halved(weight: Float[Tensor, "N C"], n_heads: int) -> Float[Tensor, "N C"]:
    N, C = weight.shape
    pairs = weight.view(n_heads, N // n_heads // 2, 2, C)
    return pairs.transpose(1, 2).reshape(N, C)


@prop("one head", "All first channels of the pairs, then all second ones.")
def halved_one(f: Function, rng: Generator) -> None:
    rows = torch.arange(6.0)[:, None]
    expect(f(rows, 1)[:, 0], [0, 2, 4, 1, 3, 5], "rows 0 to 5, one head")


@prop("head by head", "Each head has its own pairs, and its rows stay its own.")
def halved_heads(f: Function, rng: Generator) -> None:
    rows = torch.arange(12.0)[:, None]
    want = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    expect(f(rows, 2)[:, 0], want, "rows 0 to 11, two heads")


@prop("scores", "Rotated by halves, the new weights must score as the old ones did.")
def same_scores(f: Function, rng: Generator) -> None:
    x, at = normal(rng, 1, 5, 7), torch.arange(5)

    def scores(W_q: Tensor, W_k: Tensor, interleaved: bool) -> Tensor:
        q, k = ((x @ W.T).view(1, 5, 3, 10).transpose(1, 2) for W in (W_q, W_k))
        turned = (positions.rotate(y, at, interleaved=interleaved) for y in (q, k))
        return next(turned) @ next(turned).mT

    W_q, W_k = normal(rng, 2, 30, 7)
    want = scores(W_q, W_k, True)
    expect(scores(f(W_q, 3), f(W_k, 3), False), want, "three heads of width 10; the scores")


HALVED = Task("08.6", halved, (halved_one, halved_heads, same_scores), MUTANTS["08.6"])


# 08.7


def places(real: Bool[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    count = real.long().cumsum(dim=1) - 1
    return count.masked_fill(~real, 0)


def _placed(f: Function, rows: list[str], want: list[list[int]]) -> None:
    real = torch.tensor([[mark == "x" for mark in row] for row in rows])
    expect(f(real), want, f"real tokens {rows}", 0)


@prop("no padding", "Positions count from 0.")
def no_padding(f: Function, rng: Generator) -> None:
    _placed(f, ["xxxxx"], [[0, 1, 2, 3, 4]])


@prop("padding on the left", "The first real token is position 0, wherever it stands.")
def left_padding(f: Function, rng: Generator) -> None:
    _placed(f, ["..xxx"], [[0, 0, 0, 1, 2]])


@prop("every row for itself", "Rows of different lengths start at different columns.")
def own_rows(f: Function, rng: Generator) -> None:
    _placed(f, ["xxxx", ".xxx", "...x"], [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0]])


@prop("padding on the right", "Padding gets 0: nothing reads it, but a table needs a valid index.")
def right_padding(f: Function, rng: Generator) -> None:
    _placed(f, ["xxx..", "....."], [[0, 1, 2, 0, 0], [0] * 5])


@prop("long rows", "A thousand positions: integers, please, and no bytes that run over.")
def long_rows(f: Function, rng: Generator) -> None:
    got = f(torch.ones(1, 1009, dtype=torch.bool))
    expect(got[0, -1], 1008, "1,009 real tokens; the last position", 0)
    expect(got.dtype in (torch.int64, torch.int32), True, "are they integers?", 0)


PLACES = Task(
    "08.7",
    places,
    (no_padding, left_padding, own_rows, right_padding, long_rows),
    MUTANTS["08.7"],
)


# 08.8


def rotary(x: Float[Tensor, "B H T D"], at: Int[Tensor, " T"]) -> Float[Tensor, "B H T D"]:
    omega = 10000 ** -(torch.arange(0, x.shape[3], 2).double() / x.shape[3])
    half = at.double()[:, None] * omega  # (T, D/2)
    angle = torch.cat([half, half], dim=-1)
    a, b = x.chunk(2, dim=3)
    return (x * angle.cos() + torch.cat([-b, a], dim=3) * angle.sin()).to(x.dtype)


def rotary_again(x: Float[Tensor, "B H T D"], at: Int[Tensor, " T"]) -> Float[Tensor, "B H T D"]:
    return positions.rotate(x, at, interleaved=True)


def rotation_test(implementation: Function) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 5, 14, dtype=torch.float64)
    at = torch.arange(5)

    def scores(m: int, n: int) -> Tensor:
        return implementation(q, at + m) @ implementation(k, at + n).mT

    assert torch.allclose(scores(0, 0), scores(1001, 1001), atol=1e-6)
    assert not torch.allclose(scores(0, 0), scores(0, 3), atol=1e-3)


BUGS = (
    Bug(
        "positions are ignored",
        "NVIDIA/Megatron-LM#453",
        "Every call counts from 0. Then *nothing* about where a key stands can matter: try it.",
        {"at.double()": "torch.arange(x.shape[2]).double()"},
    ),
    Bug(
        "turned by the number of the head",
        "facebookresearch/xformers#841",
        "Heads are turned, positions are not. What must change when only the keys move on?",
        {"at.double()[:, None]": "torch.arange(x.shape[1]).double()[:, None, None]"},
    ),
    Bug(
        "pairs of one layout, angles of the other",
        "facebookresearch/vjepa2#15",
        "The two channels of a pair turn at different speeds, so it is no rotation any more.",
        {
            "a, b = x.chunk(2, dim=3)": "a, b = x[..., ::2], x[..., 1::2]",
            "torch.cat([-b, a], dim=3)": "torch.stack([-b, a], dim=4).flatten(3)",
        },
    ),
    Bug(
        "angles in bfloat16",
        "EleutherAI/gpt-neox#1003",
        "Near the start nobody notices. Where do the numbers of bfloat16 have gaps?",
        {"at.double()[:, None] * omega": "at.bfloat16()[:, None] * omega.bfloat16()"},
    ),
)

ROTATION_TEST = write_the_test("08.8", rotation_test, rotary, rotary_again, BUGS, MUTANTS["08.8"])


# Problems to do by hand

Pair = tuple[Fraction, Fraction]
TRIANGLES = ((3, 4, 5), (4, 3, 5), (5, 12, 13), (8, 15, 17))


@dataclass(frozen=True, repr=False)
class Problem:
    """A query and a key, and an angle whose cosine and sine are fractions."""

    random_seed: int
    q: tuple[int, int]
    k: tuple[int, int]
    triangle: tuple[int, int, int]
    m: int
    n: int

    def turned(self, x: tuple[int, int], times: int) -> Pair:
        """x, turned so many times by the angle with cosine a/c and sine b/c."""
        a, b, c = self.triangle
        u, v = Fraction(x[0]), Fraction(x[1])
        for _ in range(times):
            u, v = (a * u - b * v) / c, (b * u + a * v) / c
        return u, v

    @property
    def answer(self) -> Fraction:
        q, k = self.turned(self.q, self.m), self.turned(self.k, self.n)
        return q[0] * k[0] + q[1] * k[1]

    def __repr__(self) -> str:
        a, b, c = self.triangle
        return "\n".join(
            [
                f"Problem {self.random_seed}: one query, one key, turned by their positions",
                f"  q = {self.q} at position {self.m}, k = {self.k} at position {self.n}",
                f"  one step turns by the angle with cosine {a}/{c} and sine {b}/{c}",
                "Give their score (not divided by a root) as a fraction. There is a short way.",
            ]
        )

    def worked(self) -> str:
        """The long way and the short way with this problem's numbers."""
        q, k = self.turned(self.q, self.m), self.turned(self.k, self.n)
        near = self.turned(self.k, self.n - self.m)
        return "\n".join(
            [
                f"1. Turn q   {self.m} times: ({q[0]}, {q[1]})",
                f"2. Turn k   {self.n} times: ({k[0]}, {k[1]})",
                f"3. Score    {q[0] * k[0]} + {in_brackets(q[1] * k[1])} = {self.answer}",
                f"The short way: leave q, turn k {self.n - self.m} times: ({near[0]}, {near[1]})",
                f"            {self.q[0]} · {in_brackets(near[0])} + {self.q[1]} ·"
                f" {in_brackets(near[1])} = {self.answer}",
            ]
        )


def problem(random_seed: int) -> Problem:
    """A fresh rotation for paper; the key stands one or two places after the query."""
    draw = random.Random(f"positions {random_seed}")
    small = [x for x in range(-4, 5) if x]
    q = (draw.choice(small), draw.choice(small))
    k = (draw.choice(small), draw.choice(small))
    m = draw.choice((1, 2))
    return Problem(random_seed, q, k, draw.choice(TRIANGLES), m, m + draw.choice((1, 2)))


TASKS = (SINUSOIDS, SHIFT, BUCKET, ALIBI, ROTATE, HALVED, PLACES, ROTATION_TEST)
