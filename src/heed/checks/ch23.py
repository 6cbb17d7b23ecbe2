"""Chapter 23, the cache: `problem`, four words for paper, and the checks of its seven tasks.

B texts · T new words · S words so far · G key-value heads · H query heads · D width of a head ·
R width of a latent · E width of a rotary part · C width of the stream · L layers.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heed import masks
from heed.attention import attention
from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, expect, normal, several, shown
from heed.positions import rotate

MUTANTS = mutants(__file__)


# A problem for paper


@dataclass(frozen=True, repr=False)
class Problem:
    """Four words of one head of width 1, whose keys are logarithms; two of them are kept."""

    queries: tuple[int, ...]
    numbers: tuple[int, ...]  # the keys are their logarithms
    values: tuple[int, ...]
    slots: int  # of a rolling cache

    @property
    def answer(self) -> dict[str, Fraction | int]:
        """What positions 2 and 3 get; position 3 in a rolling cache, and its slot there; keys made
        and pairs scored with a cache, and by reading the text so far anew for each word."""
        return {
            "position 2": self._output(2),
            "position 3": self._output(3),
            "rolling": self._output(3, 4 - self.slots),
            "slot": 3 % self.slots,
            "keys, kept": 4,
            "keys, anew": 10,
            "pairs, kept": 10,
            "pairs, anew": 20,
        }

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of all four words for `heed.attention`, each (1, 1, 4, 1) in float64."""
        q, n, v = (
            torch.tensor(x, dtype=torch.float64)[None, None, :, None]
            for x in (self.queries, self.numbers, self.values)
        )
        return q, n.log(), v

    def __repr__(self) -> str:
        rows = {"query": self.queries, "n": self.numbers, "value": self.values}
        lines = (f"{name:9}" + "".join(f"{x:4}" for x in row) for name, row in rows.items())
        return (
            "One head of width 1. A word's key is ln n.\n\n"
            "position    0   1   2   3\n" + "\n".join(lines) + "\n\nKeys and values of positions 0"
            " and 1 are kept. What do positions 2 and 3 get, one after\nthe other? What does"
            f" position 3 get from a rolling cache of {self.slots} slots, and which slot\ndoes its"
            " key take? How many keys are made for four words with a cache, and how many\nby"
            " reading everything anew for each word? How many pairs, if no query reads what\nis"
            " later?"
        )

    def worked(self) -> str:
        """Every weight as a fraction, and the counts."""
        a, first = self.answer, 4 - self.slots
        lost = " and ".join(str(p) for p in range(first))
        noun = "position" if first == 1 else "positions"
        return "\n".join(
            [
                *self._steps(2),
                *self._steps(3),
                f"rolling, {self.slots} slots: 3 mod {self.slots} = {a['slot']},"
                f" {noun} {lost} gone",
                *self._steps(3, first),
                "keys    kept 4,  anew 1 + 2 + 3 + 4 = 10",
                "pairs   kept 1 + 2 + 3 + 4 = 10,  anew 1 + 3 + 6 + 10 = 20",
            ]
        )

    def _counts(self, i: int, first: int) -> list[int]:
        """exp(score) of what position i reads: n to the power of its query."""
        return [self.numbers[j] ** self.queries[i] for j in range(first, i + 1)]

    def _output(self, i: int, first: int = 0) -> Fraction:
        counts = self._counts(i, first)
        mixed = sum(n * v for n, v in zip(counts, self.values[first:], strict=False))
        return Fraction(mixed, sum(counts))

    def _steps(self, i: int, first: int = 0) -> list[str]:
        counts = self._counts(i, first)
        total = sum(counts)
        weights = ", ".join(f"{n}/{total}" for n in counts)
        terms = zip(counts, self.values[first:], strict=False)
        sums = " + ".join(f"{n}·{v}" for n, v in terms)
        return [
            f"position {i}, query {self.queries[i]}: weights {weights}",
            f"            output ({sums}) / {total} = {self._output(i, first)}",
        ]


def problem(random_seed: int) -> Problem:
    """Four fresh words; what the rolling cache forgets makes a difference."""
    rng = random.Random(f"cache {random_seed}")
    while True:
        queries = tuple(rng.choice((1, 1, 2)) for _ in range(4))
        numbers = tuple(rng.randint(1, 4) for _ in range(4))
        values = tuple(rng.sample(range(10), 4))
        made = Problem(queries, numbers, values, rng.choice((2, 3)))
        if len(set(numbers)) > 2 and made.answer["rolling"] != made.answer["position 3"]:
            return made


# 23.1


def new_cache(L: int, B: int, G: int, room: int, D: int) -> Callable[..., tuple[Tensor, Tensor]]:
    keys, values = torch.zeros(2, L, B, G, room, D, dtype=torch.float64)
    filled = [0] * L

    def append(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, end = filled[layer], filled[layer] + k.shape[2]
        if end > room:
            raise ValueError(f"{end} words, but room for {room}")
        keys[layer, :, :, start:end] = k
        values[layer, :, :, start:end] = v
        filled[layer] = end
        return keys[layer, :, :, :end], values[layer, :, :, :end]

    return append


def _both(append: Function, layer: int, k: Tensor, v: Tensor, given: str) -> tuple[Any, ...]:
    return several(append(layer, k.clone(), v.clone()), 2, given)


def _kept(append: Function, layer: int, k: Tensor, v: Tensor, *sizes: int) -> None:
    """In chunks of these sizes: after each, all that went in must come back."""
    start = 0
    for n in sizes:
        end = start + n
        chunks = f"chunks of {', '.join(map(str, sizes))}: " if len(sizes) > 1 else ""
        given = f"layer {layer}, {chunks}after {end} words"
        got = _both(append, layer, k[:, :, start:end], v[:, :, start:end], given)
        for name, have, want in zip(("keys", "values"), got, (k, v), strict=True):
            expect(have, want[:, :, :end], f"{given}; the {name}")
        start = end


@prop("the first words", "What comes back holds what is filled. Are empty places in it too?")
def first_words(f: Function, rng: Generator) -> None:
    k, v = normal(rng, 2, 2, 3, 5, 7)
    _kept(f(2, 2, 3, 11, 7), 0, k, v, 5)


@prop("behind the old ones", "New words go behind the old ones, and the old ones come back too.")
def behind(f: Function, rng: Generator) -> None:
    k, v = normal(rng, 2, 2, 3, 8, 7)
    _kept(f(2, 2, 3, 11, 7), 1, k, v, 5, 3)


@prop("each layer its own", "A step visits layer 0, then layer 1. How far is each of them filled?")
def own_layer(f: Function, rng: Generator) -> None:
    append, both = f(3, 2, 3, 11, 7), normal(rng, 3, 2, 2, 3, 4, 7)
    for t in range(4):
        for layer, (k, v) in enumerate(both):
            given = f"three layers in turn, one word at a time: layer {layer}, word {t}"
            got = _both(append, layer, k[:, :, t : t + 1], v[:, :, t : t + 1], given)
            expect(got[0], k[:, :, : t + 1], f"{given}; the keys")
            expect(got[1], v[:, :, : t + 1], f"{given}; the values")


@prop("full to the last place", "Room for eleven words holds eleven words.")
def to_the_last(f: Function, rng: Generator) -> None:
    k, v = normal(rng, 2, 2, 3, 11, 7)
    _kept(f(1, 2, 3, 11, 7), 0, k, v, 7, 3, 1)


@prop("no more than there is room for", "A ValueError, please. torch's own error is another one.")
def overfull(f: Function, rng: Generator) -> None:
    append, (k, v) = f(1, 2, 3, 5, 7), normal(rng, 2, 2, 3, 6, 7)
    given = "room for 5 words, 4 of them filled, and 2 more"
    _both(append, 0, k[:, :, :4], v[:, :, :4], given)
    try:
        append(0, k[:, :, 4:].clone(), v[:, :, 4:].clone())
    except ValueError:
        pass
    except Exception as error:
        raise Wrong(shown(given, "a ValueError", f"a {type(error).__name__}")) from None
    else:
        raise Wrong(shown(given, "a ValueError", "no error"))
    got = _both(append, 0, k[:, :, 4:5], v[:, :, 4:5], given)
    expect(got[0], k[:, :, :5], "room for 5 words, 4 filled, 2 refused, then 1; the keys")


NEW_CACHE = Task(
    "23.1",
    new_cache,
    (first_words, behind, own_layer, to_the_last, overfull),
    MUTANTS["23.1"],
)


# 23.2


def work(p: int, n: int) -> tuple[int, int, int, int, int]:
    lengths = range(p, p + n + 1)
    keys_kept = p + n
    pairs_kept = keys_kept * (keys_kept + 1) // 2
    keys_anew = sum(lengths)
    causal = sum(i * (i + 1) // 2 for i in lengths)
    full = sum(i * i for i in lengths)
    return keys_kept, pairs_kept, keys_anew, causal, full


COUNTS = (
    "keys made with a cache",
    "pairs with a cache",
    "keys made anew",
    "pairs anew, causal",
    "pairs anew, all",
)


def _exact(got: Any, want: int, given: str) -> None:
    """Exactly `want`, a whole number."""
    if type(got) is not int or got != want:
        said = f"{got:,}" if type(got) is int else f"a {type(got).__name__}, {got!r}"
        raise Wrong(shown(given, f"{want:,}", said))


def _counted(f: Function, p: int, n: int) -> None:
    """Against sums in closed form."""
    end = p + n
    line, square, cube = (
        (lambda m, d=d: math.comb(m + d - 1, d)) for d in (1, 2, 3)
    )  # 1 + ... m times, of it sums, and of those sums
    keys, causal = square(end) - square(p - 1), cube(end) - cube(p - 1)
    want = (line(end), square(end), keys, causal, 2 * causal - keys)
    given = f"a prompt of {p:,} words, {n:,} more"
    for name, one, right in zip(COUNTS, several(f(p, n), 5, given), want, strict=True):
        _exact(one, right, f"{given}; {name}")


@prop("one word", "One word is read once: one key, one pair, however it is done.")
def one_word(f: Function, rng: Generator) -> None:
    _counted(f, 1, 0)


@prop("a prompt alone", "A prompt is read at once: one pass. Whom does its third word read?")
def prompt_alone(f: Function, rng: Generator) -> None:
    _counted(f, 3, 0)


@prop("word after word", "Three words, one at a time: the passes are 1, 2 and 3 words long.")
def word_after_word(f: Function, rng: Generator) -> None:
    _counted(f, 1, 2)


@prop("a prompt and then words", "How long is the first pass, and how long is the last?")
def prompt_and_words(f: Function, rng: Generator) -> None:
    _counted(f, 3, 2)
    _counted(f, 5, 7)


@prop("large numbers", "These are counts. A float has room for 53 bits.")
def large(f: Function, rng: Generator) -> None:
    _counted(f, 7, 400_002)


WORK = Task(
    "23.2",
    work,
    (one_word, prompt_alone, word_after_word, prompt_and_words, large),
    MUTANTS["23.2"],
)


# 23.3


def outweighs(
    kind: str, L: int, H: int, G: int, D: int, R: int, E: int, size: int, N: int, batch: int
) -> tuple[int, int]:
    numbers = {"MHA": 2 * H * D, "GQA": 2 * G * D, "MQA": 2 * D, "MLA": R + E}[kind]
    token = L * numbers * size
    return token, -(-N * size // (batch * token))


def _bytes(f: Function, kind: str, *sizes: int, want: int) -> None:
    names = ("L", "H", "G", "D", "R", "E", "size", "N", "batch")
    given = kind + ", " + ", ".join(f"{a} = {b:,}" for a, b in zip(names, sizes, strict=True))
    token, length = several(f(kind, *sizes), 2, given)
    _exact(token, want, f"{given}; bytes a token")
    size, N, batch = sizes[6:]
    _exact(length, math.ceil(Fraction(N * size, batch * want)), f"{given}; tokens in each text")


SMALL = (3, 10, 5, 7, 11, 2, 2)  # L, H, G, D, R, E, size


@prop("every head its own", "MHA: a key and a value of width D for each of H heads, in each layer.")
def every_head(f: Function, rng: Generator) -> None:
    _bytes(f, "MHA", *SMALL, 840 * 13, 1, want=3 * 2 * 10 * 7 * 2)


@prop("heads that share", "GQA keeps G keys and values, MQA keeps one. The queries are not kept.")
def sharing(f: Function, rng: Generator) -> None:
    _bytes(f, "GQA", *SMALL, 420 * 13, 1, want=3 * 2 * 5 * 7 * 2)
    _bytes(f, "MQA", *SMALL, 84 * 13, 1, want=3 * 2 * 7 * 2)


@prop("one vector", "MLA keeps the latent and one turned key for all heads. No values beside them.")
def one_vector(f: Function, rng: Generator) -> None:
    _bytes(f, "MLA", *SMALL, 78 * 13, 1, want=3 * (11 + 2) * 2)


@prop("as heavy as the weights", "Weights and cache are numbers of the same size. Round up.")
def as_heavy(f: Function, rng: Generator) -> None:
    for N in (4200, 4201, 420 * 17 - 1):
        _bytes(f, "GQA", *SMALL[:6], 4, N, 1, want=3 * 2 * 5 * 7 * 4)


@prop("a batch", "Each text of a batch has a cache of its own; the weights are read by all.")
def in_a_batch(f: Function, rng: Generator) -> None:
    _bytes(f, "GQA", *SMALL, 100_003, 19, want=3 * 2 * 5 * 7 * 2)


OUTWEIGHS = Task(
    "23.3",
    outweighs,
    (every_head, sharing, one_vector, as_heavy, in_a_batch),
    MUTANTS["23.3"],
)


# 23.4


def rolled(n: int, W: int) -> tuple[int, list[int], int]:
    held = [-1] * W
    for p in range(max(0, n - W), n):
        held[p % W] = p
    undo = n if n <= W else 1
    return n % W, held, undo


def _ring(n: int, W: int) -> tuple[int, list[int]]:
    """Word after word: each takes the place behind the one before it."""
    ring, place = [-1] * W, 0
    for p in range(n):
        ring[place] = p
        place = 0 if place + 1 == W else place + 1
    return place, ring


def _can_undo(n: int, W: int, off: int) -> bool:
    """Whether all that the next word would read is held, after so many are cut off."""
    position, ring = n - off, _ring(n, W)[1]
    return all(p in ring for p in range(max(0, position - W + 1), position))


def _rolls(f: Function, n: int, W: int, undo: bool = False) -> None:
    given = f"{n} words read, {W} slots"
    place, held, off = several(f(n, W), 3, given)
    if undo:
        want = max(m for m in range(min(n, W) + 1) if _can_undo(n, W, m))
        return _exact(off, want, f"{given}; words that can be cut off")
    if not isinstance(held, list) or held != _ring(n, W)[1]:
        raise Wrong(shown(f"{given}; the slots hold", repr(_ring(n, W)[1]), repr(held)))
    return _exact(place, _ring(n, W)[0], f"{given}; the slot of the next word")


@prop("not yet full", "The first words take the first slots; -1 says that a slot is empty.")
def not_yet(f: Function, rng: Generator) -> None:
    for n in (0, 1, 3):
        _rolls(f, n, 5)


@prop("full to the last slot", "Five words in five slots. Where does the next one go?")
def just_full(f: Function, rng: Generator) -> None:
    _rolls(f, 5, 5)


@prop("the oldest goes first", "Word 5 takes the slot of word 0. The others stay where they are.")
def oldest_first(f: Function, rng: Generator) -> None:
    for n in (6, 7, 9, 10):
        _rolls(f, n, 5)


@prop("far along", "p mod W, however often the ring has gone round.")
def far_along(f: Function, rng: Generator) -> None:
    for n, W in ((37, 7), (1001, 13), (44, 11)):
        _rolls(f, n, W)


@prop("what can be cut off", "The next word reads W - 1 words before it. Which are written over?")
def cut_off(f: Function, rng: Generator) -> None:
    for n, W in ((0, 5), (4, 5), (5, 5), (6, 5), (9, 5), (23, 7)):
        _rolls(f, n, W, undo=True)


ROLLED = Task(
    "23.4",
    rolled,
    (not_yet, just_full, oldest_first, far_along, cut_off),
    MUTANTS["23.4"],
)


# 23.5


def quantise(
    x: Float[Tensor, "S D"], q: Float[Tensor, " D"], per: str
) -> tuple[Int8[Tensor, "S D"], Float[Tensor, "..."], Float[Tensor, " S"]]:
    axis = {"channel": 0, "token": 1}[per]
    steps = x.abs().amax(axis, keepdim=True) / 127
    codes = (x / steps.where(steps > 0, 1)).round().to(torch.int8)
    bound = (q.abs() * steps.expand_as(x)).sum(1) / 2
    return codes, steps, bound


def _quantised(f: Function, x: Tensor, per: str, given: str) -> tuple[Tensor, Tensor]:
    codes, steps, _ = several(f(x, torch.ones(x.shape[1]).double(), per), 3, given)
    axis = 0 if per == "channel" else 1
    expect(steps, x.abs().max(axis, keepdim=True).values / 127, f"{given}; the steps")
    return codes, steps


def _uneven(rng: Generator) -> Tensor:
    """Seven tokens of five channels, all of very different size."""
    sizes = _powers(7)[:, None] * _powers(5)
    return normal(rng, 7, 5) * sizes


def _powers(n: int) -> Tensor:
    return 3.0 ** torch.arange(n, dtype=torch.float64)


@prop(
    "a step for each channel", "A channel is a column. What is its largest size, and what is 127?"
)
def by_channel(f: Function, rng: Generator) -> None:
    x = torch.tensor([[127.0, 0.5], [-254.0, 0.25], [64.0, -0.127]]).double()
    _quantised(f, x, "channel", "columns 127, -254, 64 and 0.5, 0.25, -0.127, by channel")
    _quantised(f, _uneven(rng), "channel", "7 tokens, 5 channels, by channel")


@prop("a step for each token", "A token is a row: whose largest size is its step made of?")
def by_token(f: Function, rng: Generator) -> None:
    _quantised(f, _uneven(rng), "token", "7 tokens, 5 channels, by token")


@prop("whole numbers in a byte", "A byte each: torch.int8, which reaches from -128 to 127.")
def in_a_byte(f: Function, rng: Generator) -> None:
    for per in ("channel", "token"):
        codes, _ = _quantised(f, _uneven(rng), per, f"fresh numbers, by {per}")
        kind = getattr(codes, "dtype", type(codes).__name__)
        if kind != torch.int8:
            raise Wrong(shown(f"fresh numbers, by {per}; the codes", "torch.int8", str(kind)))


@prop("half a step", "To the nearest whole number, not towards 0 or down.")
def half_a_step(f: Function, rng: Generator) -> None:
    for per in ("channel", "token"):
        x = _uneven(rng)
        codes, steps = _quantised(f, x, per, f"fresh numbers, by {per}")
        off = ((codes.double() * steps - x).abs() / steps).max().item()
        if off > 0.5 + 1e-9:
            given = f"fresh numbers, by {per}; the largest error in steps"
            raise Wrong(shown(given, "0.5 at most", f"{off:.2f}"))


@prop("nothing but zeros", "A step of 0, and 0/0. What is the code of 0?")
def zeros(f: Function, rng: Generator) -> None:
    x = _uneven(rng)
    x[:, 2], x[3] = 0, 0
    for per in ("channel", "token"):
        given = f"a channel and a token of zeros, by {per}"
        codes, _ = _quantised(f, x, per, given)
        expect(codes[3], torch.zeros(5), f"{given}; the codes of that token")
        expect(codes[:, 2], torch.zeros(7), f"{given}; the codes of that channel")


@prop(
    "how wrong a score can be",
    "Every channel is off by half its step, with the sign that hurts, times the size of q there.",
)
def score_bound(f: Function, rng: Generator) -> None:
    for per, axis in (("channel", 0), ("token", 1)):
        x, q = _uneven(rng), normal(rng, 5)
        steps = x.abs().amax(axis, keepdim=True) / 127
        worst = [sum(q.abs() * row).item() / 2 for row in steps.expand(7, 5)]
        given = f"7 tokens, 5 channels, by {per}; the bounds of the scores"
        expect(several(f(x, q, per), 3, given)[2], worst, given, tol=1e-9)


QUANTISE = Task(
    "23.5",
    quantise,
    (by_channel, by_token, in_a_byte, half_a_step, zeros, score_bound),
    MUTANTS["23.5"],
)


# 23.6


def latent_scores(
    q: Float[Tensor, "H D"],
    q_turned: Float[Tensor, "H E"],
    c: Float[Tensor, "S R"],
    k_turned: Float[Tensor, "S E"],
    up: Float[Tensor, "H D R"],
) -> Float[Tensor, "H S"]:
    absorbed = torch.einsum("hdr,hd->hr", up, q)
    scores = absorbed @ c.T + q_turned @ k_turned.T
    return scores / (q.shape[1] + q_turned.shape[1]) ** 0.5


def _expanded(q: Tensor, q_turned: Tensor, c: Tensor, k_turned: Tensor, up: Tensor) -> Tensor:
    """With keys for every token and head."""
    k = torch.cat([c @ up.mT, k_turned.expand(len(up), -1, -1)], dim=2)  # (H, S, D + E)
    long = torch.cat([q, q_turned], dim=1)[:, :, None]
    return (k @ long)[:, :, 0] / long.shape[1] ** 0.5


class _Largest(TorchDispatchMode):
    """How many numbers the largest new tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = f(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor):
                n = x.untyped_storage().nbytes() // x.element_size()
                self.numbers = max(self.numbers, n)
        return made


def _latent(rng: Generator, H: int, D: int, E: int, S: int, R: int) -> list[Tensor]:
    shapes = ((H, D), (H, E), (S, R), (S, E), (H, D, R))
    return [normal(rng, *shape) for shape in shapes]


@prop("one head, one token", "A latent, a matrix, a key, a query. And the root of D + E.")
def one_token(f: Function, rng: Generator) -> None:
    q, q_turned, c, k_turned, up = _latent(rng, 1, 3, 2, 1, 11)
    given = "one head, one token, nothing turned"
    want = (up[0] @ c[0] @ q[0]) / 5**0.5
    expect(f(q, 0 * q_turned, c, k_turned, up), want[None, None], given)


@prop("the turned part", "It has no matrix: one key of width E, shared by all heads.")
def turned_part(f: Function, rng: Generator) -> None:
    parts = _latent(rng, 3, 5, 2, 7, 11)
    parts[0] = 0 * parts[0]
    want = torch.einsum("he,se->hs", parts[1], parts[3]) / 7**0.5
    expect(f(*parts), want, "three heads, queries of 0 beside the turned part")


@prop("every head its own matrix", "Head h has up[h], and the latents are everybody's.")
def own_matrix(f: Function, rng: Generator) -> None:
    for sizes in ((3, 5, 2, 7, 11), (2, 13, 4, 3, 5)):
        parts = _latent(rng, *sizes)
        expect(f(*parts), _expanded(*parts), "H, D, E, S, R = {}, {}, {}, {}, {}".format(*sizes))


@prop("no key is made", "q · (U c) = (Uᵀ q) · c: which side needs no tensor of H x S x D numbers?")
def no_key(f: Function, rng: Generator) -> None:
    parts = _latent(rng, 3, 23, 2, 101, 5)
    with _Largest() as seen:
        f(*parts)
    if seen.numbers >= 3 * 101 * 23:
        given = "H, D, E, S, R = 3, 23, 2, 101, 5; numbers in the largest tensor"
        raise Wrong(shown(given, f"fewer than {3 * 101 * 23:,}", f"{seen.numbers:,}"))


LATENT = Task("23.6", latent_scores, (one_token, turned_part, own_matrix, no_key), MUTANTS["23.6"])


# 23.7


def whole(x: Float[Tensor, "B T C"], matrices: Float[Tensor, "L 3 C C"]) -> Float[Tensor, "B T C"]:
    """The model without a cache: layers of one head, rotary positions, a residual stream."""
    places = torch.arange(x.shape[1])
    for w_q, w_k, w_v in matrices:
        q, k, v = ((x @ w)[:, None] for w in (w_q, w_k, w_v))
        x = x + attention(rotate(q, places), rotate(k, places), v, masks.causal)[:, 0]
    return x


def cached(matrices: Tensor) -> SimpleNamespace:
    kept: list[Any] = [None] * len(matrices)

    def read(x: Tensor) -> Tensor:
        start = 0 if kept[0] is None else kept[0][0].shape[2]
        places = torch.arange(start, start + x.shape[1])
        for layer, (w_q, w_k, w_v) in enumerate(matrices):
            q, k, v = ((x @ w)[:, None] for w in (w_q, w_k, w_v))
            q, k = rotate(q, places), rotate(k, places)
            if kept[layer] is not None:
                k, v = (torch.cat(two, dim=2) for two in zip(kept[layer], (k, v), strict=True))
            kept[layer] = k, v
            x = x + attention(q, k, v, masks.causal)[:, 0]
        return x

    def truncate(n: int) -> None:
        kept[:] = [(k[:, :, :n], v[:, :, :n]) for k, v in kept]

    def reorder(rows: Tensor) -> None:
        kept[:] = [(k[rows], v[rows]) for k, v in kept]

    return SimpleNamespace(read=read, truncate=truncate, reorder=reorder)


def in_slots(matrices: Tensor) -> SimpleNamespace:
    """Buffers of 99 slots; keys are kept as they are made, and turned when they are read."""
    slots: dict[int, Tensor] = {}
    now = SimpleNamespace(n=0)

    def read(x: Tensor) -> Tensor:
        (B, T, C), start = x.shape, now.n
        places = torch.arange(start + T)
        for layer, (w_q, w_k, w_v) in enumerate(matrices):
            room = slots.setdefault(layer, torch.full((2, B, 99, C), math.nan).double())
            room[:, :, start : start + T] = torch.stack([x @ w_k, x @ w_v])
            k, v = room[:, :, : start + T]
            q = rotate((x @ w_q)[:, None], places[start:])[:, 0]
            scores = q @ rotate(k[:, None], places)[:, 0].mT * C**-0.5
            later = places > places[start:, None]
            odds = scores.masked_fill(later, -math.inf).exp()
            x = x + odds @ v / odds.sum(-1, keepdim=True)
        now.n = start + T
        return x

    def truncate(n: int) -> None:
        now.n = n

    def reorder(rows: Tensor) -> None:
        slots.update({layer: room[:, rows] for layer, room in slots.items()})

    return SimpleNamespace(read=read, truncate=truncate, reorder=reorder)


def cache_test(build: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 3, 6, 6, generator=rng, dtype=torch.float64) / 2
    x, other = torch.randn(2, 3, 11, 6, generator=rng, dtype=torch.float64)
    model = build(matrices)

    def same(new: Tensor, text: Tensor, sizes: list[int]) -> None:
        parts = [model.read(part) for part in new.split(sizes, dim=1)]
        got, want = torch.cat(parts, dim=1), whole(text, matrices)[:, -new.shape[1] :]
        assert (got - want).abs().max() < 1e-9

    same(x, x, [5, 1, 1, 3, 1])
    model.truncate(7)
    same(other[:, 7:], torch.cat([x[:, :7], other[:, 7:]], dim=1), [3, 1])
    model.truncate(6)
    rows = torch.tensor([2, 0, 0])
    model.reorder(rows)
    same(other[:, 6:], torch.cat([x[rows, :6], other[:, 6:]], dim=1), [1, 4])
    model.truncate(0)
    same(other, other, [2, 9])


CACHE_TEST = write_the_test(
    "23.7",
    cache_test,
    cached,
    in_slots,
    (
        Bug(
            "the new words cannot read themselves",
            "harvard-edge/cs249r_book#1953",
            "It handed back what was kept before this step. Hand the text over in more than one"
            " piece, and look at the second.",
            {
                "kept[layer] = k, v\n": "kept[layer] = k, v\n"
                "            if start:\n"
                "                k, v = k[:, :, :start], v[:, :, :start]\n"
            },
        ),
        Bug(
            "positions start at 0 in every step",
            "Blaizzy/mlx-vlm#1983",
            "The first piece is right. Where does the next word stand?",
            {"torch.arange(start, start + x.shape[1])": "torch.arange(x.shape[1])"},
        ),
        Bug(
            "one place too far after the prompt",
            "microsoft/onnxruntime-genai#2354",
            "Every distance to the prompt is one too large, and those among new words are right.",
            {
                "torch.arange(start, start + x.shape[1])": "torch.arange(start, start"
                " + x.shape[1]) + (start > 0)"
            },
        ),
        Bug(
            "upper layers count the new words twice",
            "fla-org/flash-linear-attention#766",
            "Layer 0 had moved the counter on. With pieces of equal length all distances stay"
            " right: hand over pieces of different lengths, to more than one layer.",
            {
                "rotate(q, places), rotate(k, places)": "(rotate(y, places"
                " + (len(places) if layer else 0)) for y in (q, k))"
            },
        ),
        Bug(
            "the mask counts from the top left",
            "hyprstream/hyprstream#1521",
            "Single words are right. When do several new words meet an old text?",
            {
                "v, masks.causal)": "v, masks.causal if len(places) == 1 else masks.dense("
                "torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()))"
            },
        ),
        Bug(
            "kept keys are turned again",
            "NeuraLegion/shainet#110",
            "What was turned by its own place stays true. Hand over a third piece.",
            {"kept[layer] = k, v\n": "kept[layer] = rotate(k, torch.arange(k.shape[2])), v\n"},
        ),
        Bug(
            "one layer overwrites the others",
            "dingodb/DingoCache#116",
            "The names under which keys were kept had no number of the layer in them.",
            {"        return x\n": "        kept[:] = kept[-1:] * len(kept)\n        return x\n"},
        ),
        Bug(
            "a cut forgets to forget",
            "ml-explore/mlx-lm#1109",
            "There a cut did nothing, for some kinds of cache. Cut, and go on with another text.",
            {"    kept[:] = [(k[:, :, :n], v[:, :, :n]) for k, v in kept]": "    pass"},
        ),
        Bug(
            "a cut to nothing keeps everything",
            "huggingface/transformers#47433",
            "0 words was taken for no limit. Which numbers are special in a slice?",
            {"(k[:, :, :n], v[:, :, :n])": "(k[:, :, : n or None], v[:, :, : n or None])"},
        ),
        Bug(
            "rows are not reordered",
            "huggingface/transformers#46612",
            "Beam search goes on with other rows. Ask for an order that is not the old one.",
            {"    kept[:] = [(k[rows], v[rows]) for k, v in kept]": "    pass"},
        ),
    ),
    MUTANTS["23.7"],
)


TASKS = (NEW_CACHE, WORK, OUTWEIGHS, ROLLED, QUANTISE, LATENT, CACHE_TEST)
