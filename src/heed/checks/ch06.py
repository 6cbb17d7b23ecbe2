"""Chapter 06, masks: the checks of its seven tasks, and `problem`, masked weights by hand.

T queries, the last of the S positions · S keys · D width of queries, keys and values ·
B sequences · H heads.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from heed import masks
from heed.checks import (
    Bug,
    Function,
    Task,
    mutants,
    prop,
    write_the_test,
)
from heed.checks.ch04 import f64
from heed.checks.compare import Wrong, expect, shown

MUTANTS = mutants(__file__)


def bools(rows: list[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


# 06.1


def count_pairs(T: int, S: int, width: int) -> int:
    total = 0
    for i in range(S - T, S):
        total += min(i + 1, width)
    return total


def _counted(f: Function, T: int, S: int, width: int) -> None:
    want = int(masks.table(masks.window(width), 1, 1, T, S).sum())
    expect(f(T, S, width), want, f"T = {T}, S = {S}, width = {width}", 0)


@prop("causal", "A window of all positions hides the future alone. Does a query read itself?")
def count_causal(f: Function, rng: Generator) -> None:
    _counted(f, 1, 1, 1)
    _counted(f, 5, 5, 5)


@prop("a window", "How many keys has a row in the middle, and how many has the first?")
def count_window(f: Function, rng: Generator) -> None:
    _counted(f, 7, 7, 1)
    _counted(f, 7, 7, 3)


@prop("the last T of S", "The first query that you are asked about sits at position S - T.")
def count_last(f: Function, rng: Generator) -> None:
    _counted(f, 1, 7, 7)
    _counted(f, 3, 11, 11)


@prop("both at once", "Some rows may be shorter than the window, some may be full.")
def count_both(f: Function, rng: Generator) -> None:
    for width in range(1, 12):
        _counted(f, 5, 11, width)


@prop("a window wider than the text", "No row has more keys than there are positions.")
def count_wide(f: Function, rng: Generator) -> None:
    _counted(f, 5, 7, 100)


@prop("no table", "With 10^15 keys a table of pairs does not fit anywhere. Count by rows.")
def count_large(f: Function, rng: Generator) -> None:
    S = 10**15
    got = f(3, S, S)
    if got != 3 * S - 3:
        raise Wrong(shown(f"T = 3, S = width = {S}", str(3 * S - 3), str(got)))


COUNT_PAIRS = Task(
    "06.1",
    count_pairs,
    (count_causal, count_window, count_last, count_both, count_wide, count_large),
    MUTANTS["06.1"],
)


# 06.2


def packed(documents: Int[Tensor, "B S"]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (documents[b, i] == documents[b, j])

    return mask


def _packed(f: Function, documents: list[list[int]], T: int, want: list[Any]) -> None:
    B, S = len(documents), len(documents[0])
    mask = f(torch.tensor(documents))
    given = f"documents {documents}" + f", the last {T} queries" * (T < S)
    if not callable(mask):
        raise Wrong(shown(given, "a function of b, h, i, j", f"a {type(mask).__name__}"))
    try:
        got = masks.table(mask, B, 1, T, S)
    except ValueError as error:
        raise Wrong(shown(given, "bools, True = may read", str(error))) from None
    expect(got[:, 0].double(), f64(want), given)


@prop("one document", "A row with a single document is causal, and a query reads itself.")
def packed_alone(f: Function, rng: Generator) -> None:
    _packed(f, [[4, 4, 4]], 3, [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]])


@prop("two documents", "Where does the second document begin, and what may its first token read?")
def packed_two(f: Function, rng: Generator) -> None:
    _packed(f, [[0, 0, 1, 1]], 4, [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]])


@prop("each row its own", "The documents of sequence b are in documents[b].")
def packed_rows(f: Function, rng: Generator) -> None:
    want = [[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]]]
    _packed(f, [[7, 7, 2], [3, 5, 5]], 3, want)


@prop("the last queries alone", "i and j are positions in the text, not rows of a table.")
def packed_last(f: Function, rng: Generator) -> None:
    _packed(f, [[0, 0, 0, 1, 1]], 2, [[[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]])


PACKED = Task(
    "06.2",
    packed,
    (packed_alone, packed_two, packed_rows, packed_last),
    MUTANTS["06.2"],
)


# 06.3


def padded_positions(real: Bool[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    return (real.long().cumsum(dim=1) - 1) * real


def _positions(f: Function, real: list[list[int]], want: list[list[int]]) -> None:
    expect(f(bools(real)), want, f"real = {real}")


@prop("no pads", "Without pads the positions are 0, 1, 2 and so on.")
def no_pads(f: Function, rng: Generator) -> None:
    _positions(f, [[1, 1, 1, 1]], [[0, 1, 2, 3]])


@prop("pads on the left", "Count the real tokens only, the first of them as 0.")
def left_pads(f: Function, rng: Generator) -> None:
    _positions(f, [[0, 0, 1, 1, 1]], [[0, 0, 0, 1, 2]])


@prop("pads on the right", "A pad has position 0 on either side: a table of positions is finite.")
def right_pads(f: Function, rng: Generator) -> None:
    _positions(f, [[1, 1, 1, 0, 0]], [[0, 1, 2, 0, 0]])


@prop("each row its own", "The longest text has no pads, the others have.")
def rows_of_positions(f: Function, rng: Generator) -> None:
    _positions(f, [[1, 1, 1], [0, 1, 1], [0, 0, 0]], [[0, 1, 2], [0, 0, 1], [0, 0, 0]])


@prop("integers", "A table is looked up with integers.")
def whole_positions(f: Function, rng: Generator) -> None:
    kind = getattr(f(bools([[0, 1, 1]])), "dtype", None)
    if kind not in (torch.int64, torch.int32):
        raise Wrong(shown("real = [[0, 1, 1]]", "integers", str(kind)))


PADDED_POSITIONS = Task(
    "06.3",
    padded_positions,
    (no_pads, left_pads, right_pads, rows_of_positions, whole_positions),
    MUTANTS["06.3"],
)


# 06.4


def keeps(table: Bool[Tensor, "T T"], order: Int[Tensor, " T"]) -> bool:
    return bool((table[order][:, order] == table).all())


def _kept(f: Function, table: Tensor, order: list[int], want: bool, name: str) -> None:
    got = f(table, torch.tensor(order))
    if bool(got) != want:
        raise Wrong(shown(f"{name}, order {order}", str(want), str(bool(got))))


def _square(mask: masks.Mask, n: int) -> Tensor:
    return masks.table(mask, 1, 1, n, n)[0, 0]


@prop("no mask", "Everybody reads everybody, in any order.")
def keeps_full(f: Function, rng: Generator) -> None:
    _kept(f, _square(masks.full, 4), [2, 0, 3, 1], True, "no mask")


@prop("causal", "Only the order that moves nothing keeps a triangle.")
def keeps_causal(f: Function, rng: Generator) -> None:
    _kept(f, _square(masks.causal, 4), [0, 1, 2, 3], True, "causal")
    _kept(f, _square(masks.causal, 4), [1, 0, 2, 3], False, "causal")
    _kept(f, _square(masks.causal, 4), [3, 2, 1, 0], False, "causal")


@prop("padding", "Queries and keys are shuffled together: rows and columns, both.")
def keeps_padding(f: Function, rng: Generator) -> None:
    table = _square(masks.padding(torch.tensor([3])), 5)
    _kept(f, table, [2, 0, 1, 4, 3], True, "three tokens, two pads")
    _kept(f, table, [0, 1, 4, 3, 2], False, "three tokens, two pads")
    _kept(f, table.T, [0, 1, 4, 3, 2], False, "pads that may read nothing, though they are read")


@prop("oneself only", "Rows alone would be moved away from their columns.")
def keeps_self(f: Function, rng: Generator) -> None:
    _kept(f, torch.eye(4).bool(), [3, 1, 0, 2], True, "everybody reads oneself")


@prop("who, not how many", "Every position may still have as many readers, and have other ones.")
def keeps_readers(f: Function, rng: Generator) -> None:
    ring = bools([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    _kept(f, ring, [1, 2, 0], True, "each reads the next, in a ring")
    _kept(f, ring, [1, 0, 2], False, "each reads the next, in a ring")


KEEPS = Task(
    "06.4",
    keeps,
    (keeps_full, keeps_causal, keeps_padding, keeps_self, keeps_readers),
    MUTANTS["06.4"],
)


# 06.5


def reach(table: Bool[Tensor, "T T"], layers: int) -> Bool[Tensor, "T T"]:
    once = table | torch.eye(len(table), dtype=torch.bool)  # what comes in stays in
    flow = once
    for _ in range(layers - 1):
        flow = (once.float() @ flow.float()) > 0
    return flow


def _reached(f: Function, table: Tensor, layers: int, want: Tensor, name: str) -> None:
    expect(f(table, layers), want.double(), f"{name}, {layers} layers; 1 where it arrives")


@prop("one layer", "What it may read, and itself: every layer adds to its input.")
def reach_once(f: Function, rng: Generator) -> None:
    _reached(f, bools([[0, 0], [1, 0]]), 1, bools([[1, 0], [1, 1]]), "j < i")


@prop("causal stays causal", "The past of my past is my past.")
def reach_causal(f: Function, rng: Generator) -> None:
    table = _square(masks.causal, 5)
    _reached(f, table, 3, table, "causal")


@prop("windows add up", "Each layer carries information w - 1 positions on.")
def reach_window(f: Function, rng: Generator) -> None:
    for layers, width in ((2, 3), (3, 2), (4, 3)):
        far = masks.window(layers * (width - 1) + 1)
        _reached(f, _square(masks.window(width), 11), layers, _square(far, 11), f"window({width})")


@prop("one way", "If 2 reads 0 and 1 reads 2, then 1 hears of 0. Does 2 hear of 1?")
def reach_one_way(f: Function, rng: Generator) -> None:
    table = bools([[1, 0, 0], [0, 1, 1], [1, 0, 1]])
    _reached(f, table, 2, bools([[1, 0, 0], [1, 1, 1], [1, 0, 1]]), "1 reads 2, 2 reads 0")


REACH = Task(
    "06.5",
    reach,
    (reach_once, reach_causal, reach_window, reach_one_way),
    MUTANTS["06.5"],
)


# 06.6


def find_leaks(model: Callable[[Tensor], Tensor], ids: Int[Tensor, "B T"]) -> list[tuple[int, int]]:
    before, found = model(ids), []
    for s in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, s] = (changed[:, s] + 1) % 11
        moved = (model(changed) != before).flatten(2).any(dim=2).any(dim=0)  # (T)
        found += [(s, t) for t in range(s) if moved[t]]
    return found


def sums(readable: Tensor, size: float = 1.0) -> Callable[[Tensor], Tensor]:
    """A model without secrets: the output at t is a sum of what t may read."""

    def model(ids: Tensor) -> Tensor:
        vectors = torch.stack([ids.double(), ids.double() ** 2], dim=-1)
        return vectors + size * (readable.double().tril(-1) + readable.double().triu(1)) @ vectors

    return model


def _found(f: Function, model: Callable[[Tensor], Tensor], want: set[Any], name: str) -> None:
    ids = (torch.arange(15).view(3, 5) * 4) % 11
    got = f(model, ids)
    try:
        pairs = {(int(s), int(t)) for s, t in got}
    except (TypeError, ValueError):
        raise Wrong(shown(name, "pairs (from, to)", repr(got)[:80])) from None
    if pairs != want:
        raise Wrong(shown(name, str(sorted(want)), str(sorted(pairs))))


def _opened(*pairs: tuple[int, int]) -> Tensor:
    """The causal table of five, with these (from, to) opened."""
    table = _square(masks.causal, 5).clone()
    for s, t in pairs:
        table[t, s] = True
    return table


@prop("a causal model", "A token that moves its own output, or a later one, is no leak.")
def leak_none(f: Function, rng: Generator) -> None:
    _found(f, sums(_opened()), set(), "five tokens, a causal model")


@prop("one step", "The output at 2 moves when the token at 3 is another: from 3 to 2.")
def leak_one(f: Function, rng: Generator) -> None:
    _found(f, sums(_opened((3, 2))), {(3, 2)}, "five tokens, 2 reads 3")


@prop("from anywhere, to anywhere", "Change every position, and compare every output.")
def leak_far(f: Function, rng: Generator) -> None:
    pairs = {(4, 0), (2, 1), (1, 0)}
    _found(f, sums(_opened(*pairs)), pairs, "five tokens, three pairs open")


@prop("a quiet leak", "A leak of 1e-9 is a leak. What is a limit here for?")
def leak_quiet(f: Function, rng: Generator) -> None:
    model = sums(_opened((4, 1)) & ~_opened().tril(-1), size=1e-9)
    _found(f, model, {(4, 1)}, "five tokens, 1 reads 4 with a weight of 1e-9")


@prop(
    "in one text only", "The path may open for some tokens and not for others: use all the texts."
)
def leak_sometimes(f: Function, rng: Generator) -> None:
    def model(ids: Tensor) -> Tensor:
        shown_to = torch.where(
            ids[:, :1] == 9, ids[:, -1:], 0
        )  # only the second text begins with 9
        return sums(_opened())(ids) + shown_to[..., None] * (torch.arange(5) == 1)[:, None]

    _found(f, model, {(4, 1)}, "1 reads 4 in texts that begin with 9; here the second of three")


@prop("what was there stays", "Change a copy: the next change must start from the same text.")
def leak_clean(f: Function, rng: Generator) -> None:
    ids = torch.zeros(1, 5, dtype=torch.int64)
    f.__wrapped__(sums(_opened()), ids)  # type: ignore[attr-defined]
    expect(ids, [[0, 0, 0, 0, 0]], "ids [[0, 0, 0, 0, 0]], after the call:")


FIND_LEAKS = Task(
    "06.6",
    find_leaks,
    (leak_none, leak_one, leak_far, leak_quiet, leak_sometimes, leak_clean),
    MUTANTS["06.6"],
)


# 06.7


def padded_causal(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    real: Bool[Tensor, "B S"],
) -> Float[Tensor, "B H S D"]:
    B, H, S, D = q.shape
    i, j = torch.arange(S)[:, None], torch.arange(S)
    readable = (j <= i) & real[:, None, None, :]  # (B, 1, S, S)
    scores = (q @ k.mT / D**0.5).masked_fill(~readable, -math.inf)
    top = scores.amax(dim=-1, keepdim=True)
    e = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
    total = e.sum(dim=-1, keepdim=True)
    return (e / total.masked_fill(total == 0, 1)) @ v


def padded_row_by_row(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    """The same without a mask: each real query is handed the real keys up to itself."""
    out = v.mean(dim=2, keepdim=True).expand_as(v).clone()  # at pads any number will do
    for b in range(len(real)):
        for t in real[b].nonzero().flatten().tolist():
            keys = real[b, : t + 1].nonzero().flatten()
            scores = (k[b][:, keys] * q[b, :, t : t + 1]).sum(-1) * q.shape[3] ** -0.5
            out[b, :, t] = (scores.softmax(-1)[..., None] * v[b][:, keys]).sum(1)
    return out


def padding_test(implementation: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 7, 5, generator=rng, dtype=torch.float64)
    real = torch.tensor(
        [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]
    ).bool()
    got = implementation(q, k, v, real)
    assert got.isfinite().all(), "a number is missing"
    want = padded_row_by_row(q, k, v, real)
    kept = real[:, None, :, None].expand_as(got)
    assert torch.allclose(got[kept], want[kept], atol=1e-6), "another answer than alone"


PADDING_TEST = write_the_test(
    "06.7",
    padding_test,
    padded_causal,
    padded_row_by_row,
    (
        Bug(
            "the padding mask replaces the causal one",
            "huggingface/candle#3609",
            "With padding given, the future was open. Compare a token with what it gets alone.",
            {"(j <= i) & ": ""},
        ),
        Bug(
            "the pads' queries are hidden, not their keys",
            "hyunwoongko/transformer#40",
            "The padding stood on the wrong axis. Which pads does a real token see, on which side?",
            {"real[:, None, None, :]": "real[:, None, :, None]"},
        ),
        Bug(
            "True is taken for hidden",
            "InseeFrLab/torchTextClassifiers#92",
            "The mask was turned over. Any text with pads shows it, at its real tokens.",
            {"& real": "& ~real"},
        ),
        Bug(
            "hidden after the softmax",
            "huggingface/pytorch-image-models#2236",
            "The weights of what may be read no longer sum to 1. Compare numbers.",
            {
                ".masked_fill(~readable, -math.inf)": "",
                "(e / total.masked_fill(total == 0, 1))": "(e / total * readable)",
            },
        ),
        Bug(
            "heads use the padding of another text",
            "ArrowLuo/CLIP4Clip#22",
            "With one text, one head or equal lengths nobody can tell.",
            {"~readable,": "~readable.repeat(H, 1, 1, 1).view(B, H, S, S),"},
        ),
        Bug(
            "pads at the front are not found",
            "NVIDIA-NeMo/Automodel#3704",
            "Only the pads behind the last token were cut off. Where else can pads be?",
            {"real[:,": "real.flip(1).cummax(1).values.flip(1)[:,"},
        ),
        Bug(
            "a query that may read nothing is NaN",
            "pytorch/pytorch#41508",
            "A pad before all tokens has nothing to read. Any number will do there, but a number.",
            {".masked_fill(top == -math.inf, 0)": "", ".masked_fill(total == 0, 1)": ""},
        ),
    ),
    MUTANTS["06.7"],
)


KINDS: dict[str, tuple[str, masks.Mask]] = {
    "causal": ("causal: j at most i", masks.causal),
    "window": ("a window of 2: oneself and the one before", masks.window(2)),
    "padded": (
        "causal, and token 1 is a pad that nobody reads",
        masks.both(masks.causal, lambda b, h, i, j: j > 0),
    ),
}


@dataclass(frozen=True, repr=False)
class Problem:
    """Four tokens that score one another with ln of whole numbers, a value each, and a mask."""

    random_seed: int
    kind: str
    counts: tuple[tuple[int, ...], ...]
    values: tuple[int, ...]

    @property
    def readable(self) -> list[list[bool]]:
        return _square(KINDS[self.kind][1], 4).tolist()

    @property
    def weights(self) -> list[list[Fraction]]:
        rows = []
        for counts, readable in zip(self.counts, self.readable, strict=True):
            kept = [n if yes else 0 for n, yes in zip(counts, readable, strict=True)]
            rows.append([Fraction(n, sum(kept) or 1) for n in kept])
        return rows

    @property
    def answer(self) -> list[Fraction]:
        """The output of each token."""
        return [
            sum((w * v for w, v in zip(row, self.values, strict=True)), Fraction(0))
            for row in self.weights
        ]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, what may be read, and values, in float64."""
        return f64(self.counts).log(), bools(self.readable), f64(self.values)

    def __repr__(self) -> str:
        lines = [f"Problem {self.random_seed}: four tokens, {KINDS[self.kind][0]}"]
        for i, row in enumerate(self.counts, 1):
            scores = "  ".join(f"ln {n}" for n in row)
            lines.append(
                f"  token {i} scores the four  {scores}   its value is {self.values[i - 1]}"
            )
        return "\n".join([*lines, "Give each token's weights and its output as fractions."])

    def worked(self) -> str:
        """Row by row with this problem's numbers."""
        lines = []
        for i, (counts, readable, row, output) in enumerate(
            zip(self.counts, self.readable, self.weights, self.answer, strict=True), 1
        ):
            kept = [(n, v) for n, v, y in zip(counts, self.values, readable, strict=True) if y]
            if not kept:
                lines.append(f"Token {i} may read nothing: weights 0, 0, 0, 0, output 0")
                continue
            total = sum(n for n, _ in kept)
            mix = " + ".join(f"{n}·{v}" for n, v in kept)
            lines.append(
                f"Token {i}: {' + '.join(str(n) for n, _ in kept)} = {total}."
                f"  Weights {', '.join(map(str, row))}.  Output ({mix})/{total} = {output}"
            )
        return "\n".join(lines)


def problem(random_seed: int) -> Problem:
    """A fresh problem for paper, under one of three masks; every answer is an exact fraction."""
    rng = random.Random(random_seed)
    kind = rng.choice(list(KINDS))
    counts = tuple(tuple(rng.randint(1, 6) for _ in range(4)) for _ in range(4))
    values = tuple(rng.sample(range(10), 4))
    return Problem(random_seed, kind, counts, values)


TASKS = (COUNT_PAIRS, PACKED, PADDED_POSITIONS, KEEPS, REACH, FIND_LEAKS, PADDING_TEST)
