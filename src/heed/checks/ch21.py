"""Chapter 21, flash: the checks of its seven tasks, and `problem`, tiles with rescaling for paper.

T queries · S keys · D width of queries and keys · Dv width of values ·
Br rows and Bc columns of a tile · m maximum, l sum and o mix of what has been seen · lse
log-sum-exp of a row.
"""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, expect, normal, several, shown, tensor

MUTANTS = mutants(__file__)
INF = math.inf


def f64(x: object) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _like(got: Any, want: Any, given: str) -> None:
    """expect, for numbers that may be -inf."""
    want, got = f64(want), tensor(got, given)
    if got.shape == want.shape and not torch.equal(got == -INF, want == -INF):
        numbers = ([round(n, 4) for n in x.flatten().tolist()] for x in (want, got))
        raise Wrong(shown(given, *map(str, numbers)))
    expect(got.masked_fill(got == -INF, 0), want.masked_fill(want == -INF, 0), given)


def _summary(got: Any, want: tuple[Any, ...], given: str, names: str = "m l") -> None:
    parts = several(got, len(want), given)
    for name, one, right in zip(names.split(), parts, want, strict=True):
        _like(one, right, f"{given}; {name}")


# 21.1


def join(
    m1: Float[Tensor, " T"],
    l1: Float[Tensor, " T"],
    m2: Float[Tensor, " T"],
    l2: Float[Tensor, " T"],
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    m = torch.maximum(m1, m2)
    top = m.masked_fill(m == -math.inf, 0)
    return m, torch.exp(m1 - top) * l1 + torch.exp(m2 - top) * l2


def _join(f: Function, one: Any, two: Any, want: Any, given: str) -> None:
    (m1, l1), (m2, l2) = one, two
    _summary(f(f64([m1]), f64([l1]), f64([m2]), f64([l2])), ([want[0]], [want[1]]), given)


@prop("equal maxima", "Both sums are measured against the same score. What happens to them?")
def equal_maxima(f: Function, rng: Generator) -> None:
    _join(f, (3.0, 1.5), (3.0, 2.25), (3.0, 3.75), "m = 3 twice, l = 1.5 and 2.25")


@prop(
    "the lower one shrinks",
    "A sum that was measured against a lower maximum is too large now. By which factor?",
)
def lower_shrinks(f: Function, rng: Generator) -> None:
    a, b = (math.log(2), 3.0), (math.log(6), 2.0)
    _join(f, a, b, (math.log(6), 3.0), "m = ln 2, l = 3 and m = ln 6, l = 2")
    _join(f, b, a, (math.log(6), 3.0), "m = ln 6, l = 2 and m = ln 2, l = 3")


@prop("row by row", "Every row has its own maximum, and its own factors.")
def row_by_row(f: Function, rng: Generator) -> None:
    x, y = normal(rng, 5, 3), normal(rng, 5, 4)
    both = torch.cat([x, y], 1)
    parts = [(s.amax(1), (s - s.amax(1, keepdim=True)).exp().sum(1)) for s in (x, y, both)]
    (m1, l1), (m2, l2), want = parts
    _summary(f(m1, l1, m2, l2), want, "five rows of three scores and of four")


@prop("an empty one", "(-inf, 0) says that nothing has been seen. It must change nothing.")
def one_empty(f: Function, rng: Generator) -> None:
    _join(f, (-INF, 0.0), (2.0, 1.5), (2.0, 1.5), "m = -inf, l = 0 and m = 2, l = 1.5")
    _join(f, (2.0, 1.5), (-INF, 0.0), (2.0, 1.5), "m = 2, l = 1.5 and m = -inf, l = 0")


@prop("two empty ones", "What is -inf minus -inf? And what should two empty rows give together?")
def two_empty(f: Function, rng: Generator) -> None:
    _join(f, (-INF, 0.0), (-INF, 0.0), (-INF, 0.0), "m = -inf, l = 0 twice")


@prop("large scores", "No exponent may be above 0: then nothing overflows, whatever the scores.")
def large_maxima(f: Function, rng: Generator) -> None:
    want = (1001.0, 1 + math.exp(-1))
    _join(f, (1000.0, 1.0), (1001.0, 1.0), want, "m = 1000 and 1001, l = 1 twice")
    want = (-1000.0, 1 + math.exp(-1))
    _join(f, (-1000.0, 1.0), (-1001.0, 1.0), want, "m = -1000 and -1001, l = 1 twice")


JOIN = Task(
    "21.1",
    join,
    (equal_maxima, lower_shrinks, row_by_row, one_empty, two_empty, large_maxima),
    MUTANTS["21.1"],
)


# 21.2


def online(chunks: Iterable[Float[Tensor, " _"]]) -> tuple[Tensor, Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)  # noqa: E741
    for s in chunks:
        new = torch.maximum(m, s.max())
        if new > -math.inf:
            l = l * torch.exp(m - new) + torch.exp(s - new).sum()  # noqa: E741
            m = new
    return m, l


@dataclass(frozen=True)
class Chunks:
    """A row of scores that comes in chunks, if `shared` all in one piece of memory."""

    parts: tuple[tuple[float, ...], ...]
    shared: bool

    def __iter__(self) -> Iterator[Tensor]:
        memory = torch.zeros(max(map(len, self.parts), default=0), dtype=torch.float64)
        for part in self.parts:
            memory = memory if self.shared else memory.clone()
            memory[: len(part)] = f64(part)
            yield memory[: len(part)]

    def __repr__(self) -> str:
        return ", then ".join(str([round(x, 4) for x in part]) for part in self.parts) or "nothing"


def _online(f: Function, *parts: Any, shared: bool = False) -> None:
    chunks = Chunks(tuple(tuple(part) for part in parts), shared)
    row = f64([x for part in parts for x in part])
    m = row.max() if len(row) else f64(-INF)
    l = (row - m).exp().sum() if m > -INF else f64(0)  # noqa: E741
    _summary(f(chunks), (m, l), repr(chunks))


@prop("one chunk", "The largest score, and the sum of exponentials measured against it.")
def one_chunk(f: Function, rng: Generator) -> None:
    _online(f, normal(rng, 3).tolist())


@prop("a maximum that stays", "A later chunk is measured against the largest score so far.")
def falling(f: Function, rng: Generator) -> None:
    _online(f, [math.log(4), 0.0], [math.log(2)], [0.0, math.log(3)])


@prop("a maximum that rises", "What has been summed was measured against a lower score.")
def rising(f: Function, rng: Generator) -> None:
    _online(f, [0.0, math.log(2)], [math.log(4), 0.0], [math.log(8)])


@prop("one chunk at a time", "The chunks share a piece of memory: what you keep of one is gone.")
def streamed(f: Function, rng: Generator) -> None:
    _online(f, *normal(rng, 5, 3).tolist(), normal(rng, 2).tolist(), shared=True)


@prop("scores of any size", "exp(1000) is inf and exp(-1000) is 0. Which exponents do not occur?")
def any_size(f: Function, rng: Generator) -> None:
    _online(f, [1000.0, 999.0], [1001.0])
    _online(f, [-1000.0, -999.0], [-1001.0, -998.5])


@prop(
    "a chunk behind the mask",
    "If all scores of a chunk are -inf it holds nothing. -inf minus -inf is not a number.",
)
def masked_chunk(f: Function, rng: Generator) -> None:
    _online(f, [-INF, -INF], [0.0, 0.0, -INF], [-INF])


@prop("nothing at all", "A row without a score has a summary too. It is the neutral one.")
def no_chunk(f: Function, rng: Generator) -> None:
    _online(f, [-INF], [-INF, -INF])
    _online(f)


ONLINE = Task(
    "21.2",
    online,
    (one_chunk, falling, rising, streamed, any_size, masked_chunk, no_chunk),
    MUTANTS["21.2"],
)


# 21.3


def attend_in_chunks(
    q: Float[Tensor, " D"], k: Float[Tensor, "S D"], v: Float[Tensor, "S Dv"], chunk: int
) -> Float[Tensor, " Dv"]:
    m, l, o = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros_like(v[0])  # noqa: E741
    for j in range(0, len(k), chunk):
        s = k[j : j + chunk] @ q / math.sqrt(len(q))
        new = torch.maximum(m, s.max())
        c, p = torch.exp(m - new), torch.exp(s - new)
        l = c * l + p.sum()  # noqa: E741
        o = c * o + p @ v[j : j + chunk]
        m = new
    return o / l


def _attended(f: Function, q: Tensor, k: Tensor, v: Tensor, chunk: int, given: str) -> None:
    want = (k @ q / math.sqrt(len(q))).softmax(0) @ v
    expect(f(q, k, v, chunk), want, given)


def _ladder(*numbers: int) -> tuple[Tensor, Tensor]:
    """A query of width 1 and keys whose scores are the logarithms of these numbers."""
    return f64([1.0]), f64(numbers).log()[:, None]


@prop("one chunk", "All keys in one chunk: the formula, scale and division and all.")
def whole_row(f: Function, rng: Generator) -> None:
    q, k, v = normal(rng, 4), normal(rng, 3, 4), normal(rng, 3, 2)
    _attended(f, q, k, v, 3, "three keys of width 4 in one chunk of 3")


@prop("a maximum that stays", "A later chunk adds to l and to o, measured against the first.")
def mix_stays(f: Function, rng: Generator) -> None:
    v = f64([[8.0], [2.0], [0.0], [4.0]])
    _attended(f, *_ladder(4, 1, 2, 1), v, 2, "scores ln 4, ln 1, ln 2, ln 1 in chunks of 2")


@prop("a maximum that rises", "l and o were measured against a lower score. Both must shrink.")
def mix_rises(f: Function, rng: Generator) -> None:
    v = f64([[8.0], [2.0], [0.0], [4.0]])
    _attended(f, *_ladder(1, 2, 4, 1), v, 2, "scores ln 1, ln 2, ln 4, ln 1 in chunks of 2")


@prop("a last chunk that is not full", "Seven keys in chunks of three: the last has one.")
def ragged(f: Function, rng: Generator) -> None:
    q, k, v = normal(rng, 4), normal(rng, 7, 4), normal(rng, 7, 2)
    for chunk in (3, 1, 5, 100):
        _attended(f, q, k, v, chunk, f"seven keys in chunks of {chunk}")


@prop("scores of any size", "No exponent may be above 0, and no row may weigh nothing.")
def big_scores(f: Function, rng: Generator) -> None:
    k, v = f64([[1.0], [1.001], [0.999], [1.002]]), f64([[1.0], [2.0], [3.0], [4.0]])
    for size in (1000.0, -1000.0):
        _attended(f, f64([size]), k, v, 2, f"scores near {size:.0f} in chunks of 2")


class _Rows(TorchFunctionMode):
    """Notices a tensor with one number for each key."""

    def __init__(self, S: int) -> None:
        super().__init__()
        self.S, self.seen = S, False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.seen |= isinstance(x, Tensor) and x.numel() == self.S
        return out


@prop("never a whole row", "Scores of one chunk, and no more. What can be given up after it?")
def no_row(f: Function, rng: Generator) -> None:
    q, k, v = normal(rng, 3), normal(rng, 61, 3), normal(rng, 61, 2)
    with _Rows(61) as watch:
        f(q, k, v, 4)
    if watch.seen:
        raise Wrong(shown("61 keys in chunks of 4", "4 scores at a time", "61 numbers in a tensor"))


IN_CHUNKS = Task(
    "21.3",
    attend_in_chunks,
    (whole_row, mix_stays, mix_rises, ragged, big_scores, no_row),
    MUTANTS["21.3"],
)


# 21.4


def merge(
    o1: Float[Tensor, "T Dv"],
    lse1: Float[Tensor, " T"],
    o2: Float[Tensor, "T Dv"],
    lse2: Float[Tensor, " T"],
) -> tuple[Float[Tensor, "T Dv"], Float[Tensor, " T"]]:
    m = torch.maximum(lse1, lse2)
    top = m.masked_fill(m == -math.inf, 0)
    a, b = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = a + b
    o = a[:, None] * o1 + b[:, None] * o2
    return o / total.masked_fill(total == 0, 1)[:, None], top + torch.log(total)


def _part(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What attention over these keys alone returns."""
    return s.softmax(-1) @ v, s.logsumexp(-1)


def _merged(f: Function, s: Tensor, v: Tensor, cut: int, given: str) -> None:
    parts = (*_part(s[:, :cut], v[:cut]), *_part(s[:, cut:], v[cut:]))
    _summary(f(*parts), _part(s, v), given, "o lse")


@prop("equal halves", "Two parts that weigh the same: the mean of the outputs. And the lse?")
def equal_halves(f: Function, rng: Generator) -> None:
    o, lse = f64([[2.0, 4.0]]), f64([3.0])
    want = (f64([[1.0, 5.0]]), f64([3.0 + math.log(2)]))
    _summary(f(o, lse, f64([[0.0, 6.0]]), lse), want, "outputs [2, 4] and [0, 6], lse 3", "o lse")


@prop("unequal parts", "exp(lse) is the sum of exponentials that a part stands for: its weight.")
def unequal(f: Function, rng: Generator) -> None:
    o1, o2 = f64([[8.0]]), f64([[2.0]])
    given, want = "outputs 8 and 2, lse ln 1 and ln 2", (f64([[4.0]]), f64([math.log(3)]))
    _summary(f(o1, f64([0.0]), o2, f64([math.log(2)])), want, given, "o lse")


@prop("two halves of the keys", "Every query has its own lse in each of the parts.")
def halves(f: Function, rng: Generator) -> None:
    s, v = 2 * normal(rng, 5, 7), normal(rng, 7, 5)
    _merged(f, s, v, 3, "five queries; three keys, and four")


@prop("an lse of any size", "Only the difference of the two lse may meet exp.")
def any_lse(f: Function, rng: Generator) -> None:
    s, v = normal(rng, 3, 4), normal(rng, 4, 2)
    for shift in (1000.0, -1000.0):
        _merged(f, s + shift, v, 2, f"scores near {shift:.0f}")


@prop(
    "a part without a key",
    "A causal mask may leave a part empty for some queries: o = 0, lse = -inf. It weighs nothing.",
)
def empty_part(f: Function, rng: Generator) -> None:
    o, lse, nothing = normal(rng, 2, 3), normal(rng, 2), torch.zeros(2, 3, dtype=torch.float64)
    none = f64([-INF, -INF])
    _summary(f(o, lse, nothing, none), (o, lse), "the second part is empty", "o lse")
    _summary(f(nothing, none, o, lse), (o, lse), "the first part is empty", "o lse")


@prop("no key in either", "Zero over zero, and -inf minus -inf. What would one empty part give?")
def both_empty(f: Function, rng: Generator) -> None:
    nothing, none = torch.zeros(2, 3, dtype=torch.float64), f64([-INF, -INF])
    _summary(f(nothing, none, nothing, none), (nothing, none), "two empty parts", "o lse")


MERGE = Task(
    "21.4",
    merge,
    (equal_halves, unequal, halves, any_lse, empty_part, both_empty),
    MUTANTS["21.4"],
)


# 21.5


def score_gradient(
    s: Float[Tensor, "Br Bc"],
    lse: Float[Tensor, " Br"],
    v: Float[Tensor, "Bc Dv"],
    o: Float[Tensor, "Br Dv"],
    do: Float[Tensor, "Br Dv"],
) -> Float[Tensor, "Br Bc"]:
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, math.inf)[:, None])
    dp = do @ v.T
    delta = (do * o).sum(-1, keepdim=True)
    return p * (dp - delta)


def _gradient(f: Function, s: Tensor, v: Tensor, do: Tensor, keys: slice, given: str) -> None:
    """A tile of some keys, against autograd through all of them."""
    leaf = s.clone().requires_grad_()
    o = leaf.softmax(-1) @ v
    (want,) = torch.autograd.grad(o, leaf, do)
    got = f(s[:, keys], s.logsumexp(-1), v[keys], o.detach(), do)
    expect(got, want[:, keys], given)


@prop("equal values", "If all values are the same no score matters. What cancels what?")
def equal_values(f: Function, rng: Generator) -> None:
    s, do = normal(rng, 2, 3), normal(rng, 2, 4)
    v = normal(rng, 1, 4).expand(3, 4)
    _gradient(f, s, v, do, slice(3), "two queries, three keys with the same value")


@prop("a tile that is the row", "Weights from s and lse, dP from dO and V, delta from dO and O.")
def whole_rows(f: Function, rng: Generator) -> None:
    s, v, do = normal(rng, 2, 3), normal(rng, 3, 4), normal(rng, 2, 4)
    _gradient(f, s, v, do, slice(3), "two queries, all three keys")


@prop("a part of the row", "The row sum runs over all keys, and the tile sees a few. Who knows it?")
def part_of_row(f: Function, rng: Generator) -> None:
    s, v, do = normal(rng, 2, 7), normal(rng, 7, 4), normal(rng, 2, 4)
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        tile = slice(start, stop)
        _gradient(f, s, v, do, tile, f"two queries, keys {start} to {stop - 1} of seven")


@prop("a square tile", "Three queries, three keys: lse and delta belong to rows, not to columns.")
def square(f: Function, rng: Generator) -> None:
    s, v, do = normal(rng, 3, 7), normal(rng, 7, 3), normal(rng, 3, 3)
    _gradient(f, s, v, do, slice(2, 5), "three queries, keys 2 to 4 of seven")


@prop("scores of any size", "s - lse is at most 0. exp(s) alone may be inf.")
def any_scores(f: Function, rng: Generator) -> None:
    s, v, do = normal(rng, 2, 4), normal(rng, 4, 3), normal(rng, 2, 3)
    for shift in (1000.0, -1000.0):
        _gradient(f, s + shift, v, do, slice(1, 3), f"scores near {shift:.0f}")


@prop("a row without a key", "Its s and lse are -inf, its o is 0. It sends nothing back.")
def dead_row(f: Function, rng: Generator) -> None:
    s, v, do = normal(rng, 2, 3), normal(rng, 3, 4), normal(rng, 2, 4)
    o, lse = _part(s, v)
    s[1], o[1], lse[1] = -INF, 0, -INF
    got = f(s, lse, v, o, do)
    expect(got, score_gradient(s, lse, v, o, do), "the second row may read no key")


GRADIENT = Task(
    "21.5",
    score_gradient,
    (equal_values, whole_rows, part_of_row, square, any_scores, dead_row),
    MUTANTS["21.5"],
)


# 21.6


def moved(T: int, S: int, D: int, Br: int, Bc: int, causal: bool) -> tuple[int, int]:
    read, written = T * D, T * D + T
    for i in range(0, T, Br):
        last = S - T + min(i + Br, T)
        for j in range(0, last if causal else S, Bc):
            read += 2 * D * min(Bc, S - j)
    return read, written


def _counts(f: Function, sizes: tuple[int, ...], causal: bool, read: int, written: int) -> None:
    T, S, D, Br, Bc = sizes
    given = f"T = {T}, S = {S}, D = {D}, tiles of {Br} x {Bc}" + ", causal" * causal
    got = several(f(*sizes, causal), 2, given)
    for name, one, want in zip(("read", "written"), got, (read, written), strict=True):
        if isinstance(one, bool) or not isinstance(one, int | float) or one != want:
            said = f"{one:,}" if isinstance(one, int | float) else f"a {type(one).__name__}"
            raise Wrong(shown(f"{given}; {name}", f"{want:,}", said))


@prop("one tile", "Three matrices in, one out, and the number that each row keeps for later.")
def a_tile(f: Function, rng: Generator) -> None:
    _counts(f, (5, 7, 3, 5, 7), False, 5 * 3 + 2 * 7 * 3, 5 * 3 + 5)


@prop("once for each block of queries", "Queries stay while all keys and values pass. How often?")
def passes(f: Function, rng: Generator) -> None:
    _counts(f, (6, 10, 3, 2, 5), False, 6 * 3 + 3 * 2 * 10 * 3, 6 * 3 + 6)


@prop(
    "lengths that fill no tile", "The last block is smaller. Numbers that are not there are free."
)
def no_full_tile(f: Function, rng: Generator) -> None:
    _counts(f, (7, 11, 3, 2, 4), False, 7 * 3 + 4 * 2 * 11 * 3, 7 * 3 + 7)
    _counts(f, (5, 7, 3, 64, 64), False, 5 * 3 + 2 * 7 * 3, 5 * 3 + 5)


@prop(
    "causal tiles",
    "A tile is read if its last query may read its first key. A mixed tile is read whole.",
)
def causal_tiles(f: Function, rng: Generator) -> None:
    keys = 2 + 4 + 6 + 8  # blocks of two rows, tiles of 2 x 2
    _counts(f, (8, 8, 3, 2, 2), True, 8 * 3 + 2 * keys * 3, 8 * 3 + 8)
    keys = 4 + 4 + 8 + 8
    _counts(f, (8, 8, 3, 2, 4), True, 8 * 3 + 2 * keys * 3, 8 * 3 + 8)
    keys = 4 + 8  # blocks of four rows
    _counts(f, (8, 8, 3, 4, 2), True, 8 * 3 + 2 * keys * 3, 8 * 3 + 8)


@prop("causal, at awkward lengths", "Seven keys in blocks of three: the last block has one.")
def causal_ragged(f: Function, rng: Generator) -> None:
    keys = 3 + 6 + 6 + 7  # blocks that end at rows 2, 4, 6, 7
    _counts(f, (7, 7, 3, 2, 3), True, 7 * 3 + 2 * keys * 3, 7 * 3 + 7)


@prop("causal, with keys before", "The queries are the last T of S positions. Where is the first?")
def causal_before(f: Function, rng: Generator) -> None:
    keys = 8 + 10  # four queries at positions 6 to 9, in blocks of two
    _counts(f, (4, 10, 3, 2, 2), True, 4 * 3 + 2 * keys * 3, 4 * 3 + 4)
    _counts(f, (1, 10, 3, 4, 4), True, 3 + 2 * 10 * 3, 3 + 1)


MOVED = Task(
    "21.6",
    moved,
    (a_tile, passes, no_full_tile, causal_tiles, causal_ragged, causal_before),
    MUTANTS["21.6"],
)


# 21.7


def tiled(
    q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool
) -> tuple[Float[Tensor, "T Dv"], Float[Tensor, " T"]]:
    T, S, outputs, lses = len(q), len(k), [], []
    k, v = (pad(x, (0, 0, 0, -S % block)) for x in (k, v))  # the last tile is filled with zeros
    for a in range(0, T, block):
        q_i = q[a : a + block] / math.sqrt(q.shape[1])
        i = torch.arange(S - T + a, S - T + a + len(q_i))[:, None]
        m = q.new_full((len(q_i), 1), -math.inf)
        l = q.new_zeros(len(q_i), 1)  # noqa: E741
        o = q.new_zeros(len(q_i), v.shape[1])
        for b in range(0, len(k), block):
            j = torch.arange(b, b + block)
            read = (j < S) & ((j <= i) | (not causal))
            s = (q_i @ k[b : b + block].T).masked_fill(~read, -math.inf)
            new = torch.maximum(m, s.amax(1, keepdim=True))
            top = new.masked_fill(new == -math.inf, 0)
            c, p = torch.exp(m - top), torch.exp(s - top)
            l = c * l + p.sum(1, keepdim=True)  # noqa: E741
            o = c * o + p @ v[b : b + block]
            m = new
        outputs.append(o / l.masked_fill(l == 0, 1))
        lses.append((m + torch.log(l))[:, 0])
    return torch.cat(outputs), torch.cat(lses)


def whole(
    q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool
) -> tuple[Float[Tensor, "T Dv"], Float[Tensor, " T"]]:
    """The same by the formula, a row at a time."""
    T, S, outputs, lses = len(q), len(k), [], []
    for t in range(T):
        n = max(0, S - T + t + 1) if causal else S
        s = k[:n] @ q[t] * q.shape[1] ** -0.5
        lses.append(s.logsumexp(0) if n else q.new_tensor(-math.inf))
        outputs.append((s - lses[-1]).exp() @ v[:n] if n else torch.zeros_like(v[0]))
    return torch.stack(outputs), torch.stack(lses)


BUGS = (
    Bug(
        "a small rise is not worth rescaling",
        "meta-pytorch/MSLK#242",
        "How many tiles does a row need before anything can be rescaled? Make the maximum rise.",
        {
            "c, p = torch.exp(m - top), torch.exp(s - top)": (
                "c, p = torch.exp(m - top), torch.exp(s - top)\n"
                "            c = torch.where(top - m > 5.5, c, torch.ones_like(c))"
                ".masked_fill(m == -math.inf, 0)"
            )
        },
    ),
    Bug(
        "the last tile is filled up with keys that score 0",
        "flashinfer-ai/flashinfer#5090",
        "With which number of keys is the last tile not full?",
        {"(j < S) & ": ""},
    ),
    Bug(
        "query i reads keys 0 to i, however many keys came before",
        "NVIDIA/cutlass#2336",
        "Queries are the last T of S positions. With T = S nobody can tell.",
        {"torch.arange(S - T + a, S - T + a + len(q_i))": "torch.arange(a, a + len(q_i))"},
    ),
    Bug(
        "a tile without a key for some row is not a number",
        "flashinfer-ai/flashinfer#4401",
        "With more queries than keys, what may the first queries read?",
        {"new.masked_fill(new == -math.inf, 0)": "new"},
    ),
    Bug(
        "the log-sum-exp in powers of two",
        "pytorch/pytorch#181645",
        "Two things come back. Look at both.",
        {"(m + torch.log(l))[:, 0]": "(m + torch.log(l))[:, 0] / math.log(2)"},
    ),
    Bug(
        "a running maximum that starts at 0",
        "Dao-AILab/flash-attention#2082",
        "Any reference will do until exp underflows. Which scores does a reference of 0 not suit?",
        {
            "m = q.new_full((len(q_i), 1), -math.inf)": "m = q.new_zeros(len(q_i), 1)",
            "lses.append((m + torch.log(l))[:, 0])": (
                "lses.append((m + torch.log(l))[:, 0].masked_fill(l[:, 0] == 0, -math.inf))"
            ),
        },
    ),
    Bug(
        "the maximum of the tile in place of the running one",
        "tile-ai/tilelang#1148",
        "Factors above 1 are harmless until they overflow. Let the scores of a row fall far.",
        {"torch.maximum(m, s.amax(1, keepdim=True))": "s.amax(1, keepdim=True)"},
    ),
    Bug(
        "sums that the next block of queries inherits",
        "flashinfer-ai/flashinfer#5029",
        "One block of queries shows nothing. Take two.",
        {
            "m = q.new_full((len(q_i), 1), -math.inf)": (
                "m = q.new_full((len(q_i), 1), -math.inf) if a == 0 else m[: len(q_i)]"
            ),
            "l = q.new_zeros(len(q_i), 1)": (
                "l = q.new_zeros(len(q_i), 1) if a == 0 else l[: len(q_i)]"
            ),
            "o = q.new_zeros(len(q_i), v.shape[1])": (
                "o = q.new_zeros(len(q_i), v.shape[1]) if a == 0 else o[: len(q_i)]"
            ),
        },
    ),
)


def tiled_test(implementation: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    for T, S, size in ((5, 7, 1), (7, 5, 1), (2, 5, 1e4), (2, 5, -1e4)):
        q = torch.randn(T, 3, generator=rng, dtype=torch.float64).abs()
        k = torch.randn(S, 3, generator=rng, dtype=torch.float64).abs() * size
        v = torch.randn(S, 2, generator=rng, dtype=torch.float64)
        for causal in (False, True):
            i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
            s = (q @ k.T / 3**0.5).masked_fill((j > i) & torch.tensor(causal), -math.inf)
            want = s.softmax(-1).nan_to_num(0) @ v
            o, lse = implementation(q, k, v, 2, causal)
            torch.testing.assert_close(o, want, rtol=0, atol=1e-8)
            torch.testing.assert_close(lse, s.logsumexp(-1), rtol=1e-12, atol=1e-8)


TILED_TEST = write_the_test("21.7", tiled_test, tiled, whole, BUGS, MUTANTS["21.7"])

TASKS = (JOIN, ONLINE, IN_CHUNKS, MERGE, GRADIENT, MOVED, TILED_TEST)


# A problem for paper


@dataclass(frozen=True, repr=False)
class Problem:
    """Three queries and four keys in two tiles; the scores are logarithms of the numbers."""

    numbers: tuple[tuple[int, ...], ...]
    values: tuple[int, ...]

    @property
    def summaries(self) -> list[list[tuple[Fraction, Fraction, Fraction]]]:
        """For each query, exp(m), l and o after each of the two tiles."""
        return [[self._seen(row, n) for n in (2, 4)] for row in self.numbers]

    @property
    def answer(self) -> list[Fraction]:
        return [o / l for _, (_, l, o) in self.summaries]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v for `heed.flash.tiled`, in float64."""
        q = 2 * f64([[self.numbers]]).log()
        return (
            q,
            torch.eye(4, dtype=torch.float64)[None, None],
            f64(self.values)[None, None, :, None],
        )

    def __repr__(self) -> str:
        rows = {f"query {i}": row for i, row in enumerate(self.numbers, 1)} | {
            "values": self.values
        }
        lines = (
            f"{name}:  {n[0]:2} {n[1]:2}  | {n[2]:2} {n[3]:2}".replace("values:", "values: ")
            for name, n in rows.items()
        )
        return (
            "Scores ln n, in two tiles of two keys; below them the values.\n\n"
            + "\n".join(lines)
            + "\n\nWhat are exp(m), l and o of every query after the first tile and after the"
            "\nsecond, by which factor is the first rescaled, and what is the output?"
        )

    def worked(self) -> str:
        """Both tiles of every query, and the division."""
        return "\n\n".join(self._steps(i) for i in range(len(self.numbers)))

    def _seen(self, row: tuple[int, ...], n: int) -> tuple[Fraction, Fraction, Fraction]:
        top = max(row[:n])
        mixed = sum(a * b for a, b in zip(row[:n], self.values, strict=False))
        return Fraction(top), Fraction(sum(row[:n]), top), Fraction(mixed, top)

    def _steps(self, i: int) -> str:
        row, v, ((m, l, o), (top, l2, o2)) = self.numbers[i], self.values, self.summaries[i]
        c = m / top
        first, second = (f"{a}/{m}·{b}" for a, b in zip(row[:2], v[:2], strict=True))
        third, fourth = (f"{a}/{top}·{b}" for a, b in zip(row[2:], v[2:], strict=True))
        return "\n".join(
            [
                f"query {i + 1}",
                f"  tile 1   exp(m) = {m},  l = {row[0]}/{m} + {row[1]}/{m} = {l},"
                f"  o = {first} + {second} = {o}",
                f"  factor   {m}/{top} = {c}",
                f"  tile 2   exp(m) = {top},  l = {c}·{l} + {row[2]}/{top} + {row[3]}/{top} = {l2},"
                f"  o = {c}·{o} + {third} + {fourth} = {o2}",
                f"  output   ({o2}) / ({l2}) = {self.answer[i]}",
            ]
        )


def problem(random_seed: int) -> Problem:
    """Fresh scores and values; for one query the maximum rises, for another it stays."""
    rng = random.Random(f"tiles {random_seed}")
    while True:
        numbers = tuple(tuple(rng.randint(1, 6) for _ in range(4)) for _ in range(3))
        values = tuple(rng.sample(range(10), 4))
        rises = {max(row[2:]) > max(row[:2]) for row in numbers}
        if len(rises) == 2 and all(len(set(row)) > 1 for row in numbers):
            return Problem(numbers, values)
