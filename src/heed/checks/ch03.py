"""Chapter 03, alignment: the checks of its eight tasks, and `problem`, a look back by hand.

T steps of the decoder · S source words · C width of the states · A width of the additive score ·
B sentences · E width of what a step reads besides the context.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from heed.attention import additive
from heed.checks import (
    Bug,
    Function,
    Task,
    mutants,
    prop,
    write_the_test,
)
from heed.checks.ch04 import LN, f64
from heed.checks.compare import Wrong, expect, listed, normal, several, shown, tensor

MUTANTS = mutants(__file__)


# 03.1


def additive_scores(
    queries: Float[Tensor, "T C"],
    states: Float[Tensor, "S C"],
    W: Float[Tensor, "A C"],
    U: Float[Tensor, "A C"],
    w: Float[Tensor, " A"],
) -> Float[Tensor, "T S"]:
    asked, offered = queries @ W.T, states @ U.T  # (T, A), (S, A)
    return torch.tanh(asked[:, None] + offered[None]) @ w


def _network(rng: Generator, T: int = 2, S: int = 3, C: int = 5, A: int = 7) -> list[Tensor]:
    shapes = (T, C), (S, C), (A, C), (A, C), (A,)
    return [normal(rng, *shape) for shape in shapes]


@prop("a number for each pair", "T states of the decoder meet S source words. How many scores?")
def each_pair(f: Function, rng: Generator) -> None:
    expect(list(getattr(f(*_network(rng)), "shape", ())), [2, 3], "T = 2, S = 3; the shape:")


@prop("the decoder is heard", "Scores that differ by a constant give the same weights.")
def is_heard(f: Function, rng: Generator) -> None:
    got = tensor(f(*_network(rng)), "two queries")
    gap = (got[1] - got[0]).tolist()
    if max(gap) - min(gap) < 1e-6:
        want = "a different number for each source word"
        given = "two queries, three source words; row 1 less row 0"
        raise Wrong(shown(given, want, f"{gap[0]:.4g} for all"))


@prop("one pair by hand", "Two products, a sum, a tanh, a product: in this order.")
def one_pair(f: Function, rng: Generator) -> None:
    got = f(f64([[LN[1]]]), f64([[LN[2]]]), f64([[1]]), f64([[1]]), f64([2]))
    given = "query ln 2, state ln 3, W = U = 1, w = 2: twice tanh(ln 6)"
    expect(got, [[2 * 35 / 37]], given)


@prop("who is who", "W belongs to the queries, U to the states.")
def who_is_who(f: Function, rng: Generator) -> None:
    parts = _network(rng)
    expect(f(*parts), additive_scores(*parts), "fresh numbers, T = 2, S = 3, C = 5, A = 7")


@prop("made once", "U h_j does not depend on the step: multiply the states by U once, not T times.")
def made_once(f: Function, rng: Generator) -> None:
    T, S, C, A = 31, 29, 37, 2
    seen: list[int] = []
    with _Watch(seen):
        f(*_network(rng, T, S, C, A))
    most, limit = max(seen, default=0), 2 * (T + S) * C
    if most > limit:
        want = f"no tensor of more than {limit} numbers"
        raise Wrong(shown(f"T = {T}, S = {S}, C = {C}, A = {A}", want, f"one of {most}"))


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of every tensor that is made while it is on; a view makes none."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.seen.append(x.untyped_storage().nbytes() // x.element_size())
        return out


ADDITIVE_SCORES = Task(
    "03.1",
    additive_scores,
    (each_pair, is_heard, one_pair, who_is_who, made_once),
    MUTANTS["03.1"],
)


# 03.2


def read(
    scores: Float[Tensor, "B T S"], states: Float[Tensor, "B S C"], lengths: Int[Tensor, " B"]
) -> Float[Tensor, "B T C"]:
    here = torch.arange(scores.shape[2]) < lengths[:, None]  # (B, S)
    shares = scores.masked_fill(~here[:, None], -math.inf).softmax(dim=-1)
    return shares @ states


@prop("1/6, 2/6, 3/6", "Exponentiate, divide by the sum over the source words, average the states.")
def read_by_hand(f: Function, rng: Generator) -> None:
    got = f(f64([[LN]]), f64([[[6, 0], [0, 6], [6, 6]]]), torch.tensor([3]))
    expect(got, [[[4, 5]]], "scores ln 1, ln 2, ln 3; states (6, 0), (0, 6), (6, 6)")


@prop("every step by itself", "Each step has shares of its own: along which axis do they sum to 1?")
def read_steps(f: Function, rng: Generator) -> None:
    z, h = normal(rng, 2, 3, 5), normal(rng, 2, 5, 7)
    got = f(z, h, torch.tensor([5, 5]))
    expect(got[1, 2], z[1, 2].softmax(0) @ h[1], "B = 2, T = 3, S = 5; step 2 of sentence 1")


@prop("the rest still sums to 1", "Mask before the shares are made, or share out again.")
def rest_sums_to_one(f: Function, rng: Generator) -> None:
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    got = f(normal(rng, 1, 2, 4), ones, torch.tensor([3]))
    expect(got, [[[1], [1]]], "states of 1 everywhere, the last place is padding; the contexts")


@prop("padding is not read", "A padded place must get a share of 0, whatever its score.")
def padding_not_read(f: Function, rng: Generator) -> None:
    z, h = normal(rng, 2, 3, 5), normal(rng, 2, 5, 7)
    lengths = torch.tensor([3, 5])
    got = f(z, h, lengths)
    for b, n in enumerate(lengths.tolist()):
        want = z[b, :, :n].softmax(-1) @ h[b, :n]
        expect(
            got[b], want, f"lengths 3 and 5 in one batch; the sentence of {n}, against itself alone"
        )


@prop(
    "low scores", "All real scores near -20,000 and padding at 0. Which number masks in any case?"
)
def low_scores(f: Function, rng: Generator) -> None:
    got = f(f64([[[*(x - 2e4 for x in LN), 0.0]]]), f64([[[6], [0], [6], [99]]]), torch.tensor([3]))
    expect(got, [[[4]]], "scores ln 1, ln 2, ln 3, all less 20,000, and padding with score 0")


READ = Task(
    "03.2",
    read,
    (read_by_hand, read_steps, rest_sums_to_one, padding_not_read, low_scores),
    MUTANTS["03.2"],
)


# 03.3


def score_gradient(
    scores: Float[Tensor, " S"], states: Float[Tensor, "S C"], d_context: Float[Tensor, " C"]
) -> Float[Tensor, " S"]:
    shares = scores.softmax(dim=0)
    context = shares @ states
    return shares * ((states - context) @ d_context)


@prop("they cancel", "Raise all scores alike: nothing changes. So what is the sum?")
def gradients_cancel(f: Function, rng: Generator) -> None:
    got = f(normal(rng, 5), normal(rng, 5, 3), normal(rng, 3))
    expect(got.sum(), 0, "five fresh states; the sum")


@prop("three states by hand", "The share, times how far the state lies from the context.")
def gradient_by_hand(f: Function, rng: Generator) -> None:
    got = f(f64(LN), f64([[6, 0], [0, 6], [6, 6]]), f64([1, 2]))
    given = "scores ln 1, ln 2, ln 3; states (6, 0), (0, 6), (6, 6); d_context (1, 2)"
    expect(got, [-4 / 3, -2 / 3, 2], given)


@prop("as autograd says", "Gradients may be negative. Compare with autograd on your own numbers.")
def gradient_as_autograd(f: Function, rng: Generator) -> None:
    z, h = normal(rng, 7).requires_grad_(), normal(rng, 7, 3)
    g = normal(rng, 3).abs() * f64([1, -1, 1])
    (want,) = torch.autograd.grad(z.softmax(0) @ h @ g, z)
    expect(f(z.detach(), h, g), want, "seven fresh states of width 3")


@prop("large scores", "exp(1000) is infinite. What may be taken off all scores?")
def large_scores(f: Function, rng: Generator) -> None:
    got = f(f64(LN) + 1000, f64([[6, 0], [0, 6], [6, 6]]), f64([1, 2]))
    expect(got, [-4 / 3, -2 / 3, 2], "the three scores by hand, all of them 1000 higher")


SCORE_GRADIENT = Task(
    "03.3",
    score_gradient,
    (gradients_cancel, gradient_by_hand, gradient_as_autograd, large_scores),
    MUTANTS["03.3"],
)


# 03.4


def queries_and_keys(
    M: Float[Tensor, "C C"], rank: int
) -> tuple[Float[Tensor, "rank C"], Float[Tensor, "rank C"]]:
    u, size, vt = torch.linalg.svd(M)
    Q = (u[:, :rank] * size[:rank]).T
    return Q, vt[:rank]


def _low_rank(rng: Generator, C: int, rank: int) -> Tensor:
    return normal(rng, C, rank) @ normal(rng, rank, C)


@prop("two matrices of r rows", "Each turns a state of width C into r numbers.")
def two_matrices(f: Function, rng: Generator) -> None:
    got = several(f(_low_rank(rng, 5, 2), 2), 2, "C = 5, rank 2")
    for x, name in zip(got, ("Q", "K"), strict=True):
        expect(list(getattr(x, "shape", ())), [2, 5], f"C = 5, rank 2; the shape of {name}:")


@prop("the same scores", "sᵀ M h = (Q s)·(K h) for every s and h. A singular value belongs where?")
def same_scores(f: Function, rng: Generator) -> None:
    M, s, h = _low_rank(rng, 5, 2), normal(rng, 3, 5), normal(rng, 7, 5)
    Q, K = f(M, 2)
    expect((s @ Q.T) @ (h @ K.T).T, s @ M @ h.T, "rank 2, C = 5, three queries, seven states")


@prop("the best of its rank", "If r is too small, keep what is largest.")
def best_rank(f: Function, rng: Generator) -> None:
    M = torch.diag(f64([1, 3, 2]))
    Q, K = f(M, 2)
    expect(Q.T @ K, torch.diag(f64([0, 3, 2])), "M diagonal with 1, 3, 2, and two rows; Qᵀ K")


QUERIES_AND_KEYS = Task(
    "03.4",
    queries_and_keys,
    (two_matrices, same_scores, best_rank),
    MUTANTS["03.4"],
)


# 03.5

Score = Callable[[Tensor, Tensor], Tensor]  # (C), (S, C) to (S)
Cell = Callable[[Tensor, Tensor], Tensor]  # (E + C), (C) to (C)


def look_then_step(
    words: Float[Tensor, "T E"],
    states: Float[Tensor, "S C"],
    start: Float[Tensor, " C"],
    score: Score,
    cell: Cell,
) -> tuple[Float[Tensor, "T S"], Float[Tensor, "T C"]]:
    s, rows, after = start, [], []
    for y in words:
        a = score(s, states).softmax(dim=0)
        c = a @ states
        s = cell(torch.cat([y, c]), s)
        rows.append(a)
        after.append(s)
    return torch.stack(rows), torch.stack(after)


def _decoder(rng: Generator) -> list:
    E, C, S, T = 2, 3, 5, 4
    into, over = normal(rng, C, E + C), normal(rng, C, C)

    def cell(x: Tensor, s: Tensor) -> Tensor:
        if x.shape != (E + C,):
            raise ValueError(f"the cell reads a word and a context, {E} + {C} numbers: {x.shape}")
        return torch.tanh(into @ x + over @ s)

    return [normal(rng, T, E), normal(rng, S, C), normal(rng, C), lambda s, h: h @ s, cell]


@prop(
    "a row and a state for each step", "T rows of weights and T states, the start not among them."
)
def rows_and_states(f: Function, rng: Generator) -> None:
    rows, after = several(f(*_decoder(rng)), 2, "T = 4, S = 5, C = 3")
    expect(list(rows.shape), [4, 5], "T = 4, S = 5; the shape of the weights:")
    expect(list(after.shape), [4, 3], "T = 4, C = 3; the shape of the states:")


@prop("shares", "Each row sums to 1 over the source words.")
def rows_are_shares(f: Function, rng: Generator) -> None:
    expect(f(*_decoder(rng))[0].sum(-1), [1.0] * 4, "four steps; sums of the rows")


@prop("the first row asks with the start", "Bahdanau looks before the step. Which state is there?")
def asks_with_start(f: Function, rng: Generator) -> None:
    words, states, start, score, cell = _decoder(rng)
    want = score(start, states).softmax(0)
    expect(f(words, states, start, score, cell)[0][0], want, "dot scores; the first row")


@prop("the next row asks with the state after", "Which state does the second look use?")
def asks_with_last(f: Function, rng: Generator) -> None:
    parts = _decoder(rng)
    expect(f(*parts)[0][1], look_then_step(*parts)[0][1], "dot scores; the second row")


@prop("the states", "The cell reads the word first, then the context: y, c in this order.")
def states_after(f: Function, rng: Generator) -> None:
    parts = _decoder(rng)
    expect(f(*parts)[1], look_then_step(*parts)[1], "four steps; the states after them")


LOOK_THEN_STEP = Task(
    "03.5",
    look_then_step,
    (rows_and_states, rows_are_shares, asks_with_start, asks_with_last, states_after),
    MUTANTS["03.5"],
)


# 03.6


def map_score(
    weights: Float[Tensor, "T S"], right: Bool[Tensor, "T S"]
) -> tuple[float, float, float]:
    has = right.any(dim=1)
    weights, right = weights[has], right[has]
    mass = (weights * right).sum(dim=1).mean()
    hits = right[torch.arange(len(right)), weights.argmax(dim=1)].double().mean()
    return mass.item(), hits.item(), right.double().mean().item()


def _scored(f: Function, given: Tensor, right: Tensor) -> list[float]:
    return [float(x) for x in several(f(given, right), 3, "a map and the true one")]


SOFT = f64([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
TRUE = torch.tensor([[True, False, False], [False, True, False]])


@prop("mass", "Of each row's weight, what lies on true places? Then the mean over the rows.")
def mass(f: Function, rng: Generator) -> None:
    expect(_scored(f, SOFT, TRUE)[0], 0.4, "rows 0.5 0.3 0.2 (true: 1st), 0.6 0.3 0.1 (true: 2nd)")


@prop("hits", "Is the largest weight of a row on a true place? Yes in the first row only.")
def hits(f: Function, rng: Generator) -> None:
    expect(_scored(f, SOFT, TRUE)[1], 0.5, "rows 0.5 0.3 0.2 (true: 1st), 0.6 0.3 0.1 (true: 2nd)")


@prop("chance", "What would equal weights put on the true places of a row?")
def chance(f: Function, rng: Generator) -> None:
    right = torch.tensor([[True, True, False, False], [False, True, False, False]])
    expect(_scored(f, normal(rng, 2, 4).softmax(-1), right)[2], 3 / 8, "two of 4, then one of 4")


@prop("rows without a source", "A row with no true place can neither hit nor miss. Leave it out.")
def sourceless(f: Function, rng: Generator) -> None:
    right = torch.tensor([[True, False, False], [False] * 3, [False, True, False]])
    given = torch.stack([SOFT[0], f64([1, 0, 0]), SOFT[1]])
    expect(_scored(f, given, right), [0.4, 0.5, 1 / 3], "as above, with an empty row in between")


@prop("several true places", "The mass adds up; a hit is a hit on any of them.")
def several_places(f: Function, rng: Generator) -> None:
    right = torch.tensor([[True, False, True], [True, True, False]])
    expect(_scored(f, SOFT, right), [0.8, 1, 2 / 3], "two true places in each row")


MAP_SCORE = Task(
    "03.6", map_score, (mass, hits, chance, sourceless, several_places), MUTANTS["03.6"]
)


# 03.7


def best_shift(weights: Float[Tensor, "T S"], right: Bool[Tensor, "T S"], most: int) -> int:
    found = {}
    for d in range(-most, most + 1):
        moved = torch.zeros_like(right)
        S = right.shape[1]
        moved[:, max(0, d) : S + min(0, d)] = right[:, max(0, -d) : S + min(0, -d)]
        found[d] = (weights * moved).sum().item()
    return max(found, key=lambda d: (found[d], -abs(d)))


def _shifted(rng: Generator, d: int, T: int = 5, S: int = 11) -> tuple[Tensor, Tensor]:
    """A map that reads d places to the right of the true ones, and the true ones."""
    places = 3 + torch.randperm(S - 6, generator=rng)[:T]
    right = torch.zeros(T, S, dtype=torch.bool)
    right[torch.arange(T), places] = True
    soft = torch.full((T, S), 0.5 / S, dtype=torch.float64)
    soft[torch.arange(T), places + d] += 0.5
    return soft, right


@prop("no shift", "A map that is right is best where it is.")
def no_shift(f: Function, rng: Generator) -> None:
    expect(f(*_shifted(rng, 0), 2), 0, "half of the weight on the true places")


@prop("to the right", "A shift of d means that the model reads d places to the right of the truth.")
def to_the_right(f: Function, rng: Generator) -> None:
    expect(f(*_shifted(rng, 1), 2), 1, "half of the weight one place to the right")


@prop("to the left", "Negative shifts count as well.")
def to_the_left(f: Function, rng: Generator) -> None:
    expect(f(*_shifted(rng, -2), 3), -2, "half of the weight two places to the left")


@prop("no further than most", "Look from -most to most, both included, and no further.")
def no_further(f: Function, rng: Generator) -> None:
    expect(f(*_shifted(rng, 2), 2), 2, "most = 2, half of the weight two places to the right")
    expect(abs(f(*_shifted(rng, 3), 2)) <= 2, 1, "most = 2, the weight is three places away")


@prop("nothing comes round", "What is moved over the edge is gone; it must not return on the left.")
def nothing_round(f: Function, rng: Generator) -> None:
    right = torch.tensor([[False, False, False, True], [True, False, False, False]])
    given = f64([[0.5, 0.1, 0.1, 0.3], [0.2, 0.15, 0.35, 0.3]])
    expect(f(given, right, 1), 0, "true places last and first, rows 0.5 0.1 0.1 0.3, 0.2 0.15 ...")


@prop("a tie", "Of two shifts that are as good take the smaller; a map of equal weights says 0.")
def tie(f: Function, rng: Generator) -> None:
    right = torch.zeros(3, 9, dtype=torch.bool)
    right[:, 4] = True
    expect(f(torch.full((3, 9), 1 / 8, dtype=torch.float64), right, 3), 0, "equal weights")


BEST_SHIFT = Task(
    "03.7",
    best_shift,
    (no_shift, to_the_right, to_the_left, no_further, nothing_round, tie),
    MUTANTS["03.7"],
)


# 03.8


def additive_weights(
    q: Float[Tensor, "B T A"],
    k: Float[Tensor, "B S A"],
    w: Float[Tensor, " A"],
    lengths: Int[Tensor, " B"],
) -> Float[Tensor, "B T S"]:
    scores = torch.tanh(q[:, :, None] + k[:, None]) @ w  # (B, T, S)
    here = torch.arange(k.shape[1]) < lengths[:, None]
    scores = scores.masked_fill(~here[:, None], -math.inf)
    return torch.softmax(scores, dim=2)


def one_sentence_at_a_time(q: Tensor, k: Tensor, w: Tensor, lengths: Tensor) -> Tensor:
    """Unit vectors as values: heed's mixture of them is the weights."""
    out = q.new_zeros(len(q), q.shape[1], k.shape[1])
    for b, n in enumerate(lengths.tolist()):
        eye = torch.eye(n, dtype=q.dtype)
        out[b, :, :n] = additive(q[b : b + 1], k[b : b + 1, :n], eye[None], w)[0]
    return out


def weights_test(implementation: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, w = normal(rng, 2, 3, 5), normal(rng, 2, 4, 5), normal(rng, 5)
    lengths = torch.tensor([4, 2])
    a = implementation(q, k, w, lengths)
    assert torch.allclose(a.sum(dim=2), torch.ones(2, 3, dtype=torch.float64))
    assert a[1, :, 2:].abs().max() == 0
    for b, i in ((0, 0), (0, 1), (1, 2)):
        z = [w @ torch.tanh(q[b, i] + k[b, j]) for j in range(int(lengths[b]))]
        e = torch.stack(z).exp()
        assert torch.allclose(a[b, i, : len(e)], e / e.sum())


WEIGHTS_TEST = write_the_test(
    "03.8",
    weights_test,
    additive_weights,
    one_sentence_at_a_time,
    (
        Bug(
            "softmax along the wrong axis",
            "PetrochukM/PyTorch-NLP#2",
            "Over which axis must the weights sum to 1?",
            {"dim=2": "dim=1"},
        ),
        Bug(
            "all weights 1",
            "DEEP-PolyU/KEQA_WSDM19#2",
            "A softmax over an axis of length 1 gives 1, whatever stands in it.",
            {"torch.softmax(scores, dim=2)": "torch.softmax(scores[..., None], dim=3)[..., 0]"},
        ),
        Bug(
            "padding is read",
            "tensorflow/tensorflow#43941",
            "Give two sentences of different length, and look at the places behind the shorter.",
            {"masked_fill(~here[:, None], -math.inf)": "masked_fill(~here[:, None], 0)"},
        ),
        Bug(
            "no tanh",
            "keon/seq2seq#3",
            "The weights sum to 1 and the padding gets 0. Do different queries get different rows?",
            {"torch.tanh(q[:, :, None] + k[:, None])": "(q[:, :, None] + k[:, None])"},
        ),
        Bug(
            "the source is not looked at",
            "pytorch/tutorials#1098",
            "These weights depend on the query and on the place. On what do they not depend?",
            {"+ k[:, None]": "+ torch.linspace(-1, 1, k.shape[1]).to(q)[:, None]"},
        ),
    ),
    MUTANTS["03.8"],
)


@dataclass(frozen=True, repr=False)
class Problem:
    """A decoder looks back once, and the loss of the next word comes back to its scores.

    Scores are ln of whole numbers, logits are ln 2 times the two numbers of the context.
    """

    random_seed: int
    counts: tuple[int, ...]
    states: tuple[tuple[int, int], ...]
    right: int  # 0 or 1

    @property
    def weights(self) -> list[Fraction]:
        return [Fraction(n, sum(self.counts)) for n in self.counts]

    @property
    def context(self) -> list[Fraction]:
        columns = zip(*self.states, strict=True)
        return [sum(a * x for a, x in zip(self.weights, c, strict=True)) for c in columns]

    @property
    def probabilities(self) -> list[Fraction]:
        low = min(self.context)
        odds = [Fraction(2) ** int(x - low) for x in self.context]
        return [n / sum(odds) for n in odds]

    @property
    def d_context(self) -> list[Fraction]:
        """In units of ln 2."""
        return [p - (d == self.right) for d, p in enumerate(self.probabilities)]

    @property
    def d_scores(self) -> list[Fraction]:
        """In units of ln 2: the weight, times d_context · (state - context)."""
        (g, f), (c, d) = self.d_context, self.context
        return [
            a * (g * (x - c) + f * (y - d))
            for a, (x, y) in zip(self.weights, self.states, strict=True)
        ]

    @property
    def answer(self) -> dict[str, list[Fraction]]:
        names = ("weights", "context", "probabilities", "d_scores")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Scores (S,) and states (S, 2) in float64."""
        return f64([math.log(n) for n in self.counts]), f64(self.states)

    def __repr__(self) -> str:
        lines = [f"Problem {self.random_seed}: a decoder looks back at {len(self.counts)} words"]
        for j, (n, h) in enumerate(zip(self.counts, self.states, strict=True), 1):
            lines.append(f"  word {j}: score ln {n}, state {h}")
        lines.append(f"  logits: ln 2 times the context; word {'AB'[self.right]} of A, B is right")
        lines.append("Give the weights, the context, the probabilities of A and B, and the")
        lines.append("gradient of -ln p(right) at every score in units of ln 2, as fractions.")
        return "\n".join(lines)

    def worked(self) -> str:
        """Forward and back with this problem's numbers."""
        total, c = sum(self.counts), self.context
        mixes = [
            f"({' + '.join(f'{n}·{x}' for n, x in zip(self.counts, column, strict=True))})/{total}"
            for column in zip(*self.states, strict=True)
        ]
        rows = []
        for j, (n, h) in enumerate(zip(self.counts, self.states, strict=True)):
            off = [x - y for x, y in zip(h, c, strict=True)]
            dot = sum(g * x for g, x in zip(self.d_context, off, strict=True))
            gap = f"({off[0]}, {off[1]})"
            rows.append(
                f"   word {j + 1}: {n}/{total} · g·{gap} = {n}/{total} · {dot} = {self.d_scores[j]}"
            )
        return "\n".join(
            [
                f"1. Weights        {', '.join(f'{n}/{total}' for n in self.counts)}",
                f"2. Context        {mixes[0]} = {c[0]},   {mixes[1]} = {c[1]}",
                f"3. Probabilities  odds 2^{c[0]} : 2^{c[1]}, so {listed(self.probabilities)}",
                f"4. g = p - y      {listed(self.d_context)}, times ln 2",
                "5. Scores         weight · g·(state - context), times ln 2:",
                *rows,
                "   Their sum is 0. Downhill raises the scores with a negative gradient.",
            ]
        )


def problem(random_seed: int) -> Problem:
    """A fresh look back for paper: whole numbers in the context, fractions everywhere else."""
    rng = random.Random(random_seed)
    while True:
        n = rng.choice([3, 3, 4])
        counts = tuple(rng.choice([1, 1, 2, 3, 4]) for _ in range(n))
        states = tuple((rng.randint(0, 9), rng.randint(0, 9)) for _ in range(n))
        right, total = rng.randint(0, 1), sum(counts)
        mixed = [sum(c * h[d] for c, h in zip(counts, states, strict=True)) for d in (0, 1)]
        if any(x % total for x in mixed) or abs(mixed[0] - mixed[1]) > 3 * total:
            continue  # a context that is not whole, or odds beyond 8 to 1
        made = Problem(random_seed, counts, states, right)
        if len(set(counts)) > 1 and len(set(states)) == n and all(made.d_scores):
            return made


TASKS = (
    ADDITIVE_SCORES,
    READ,
    SCORE_GRADIENT,
    QUERIES_AND_KEYS,
    LOOK_THEN_STEP,
    MAP_SCORE,
    BEST_SHIFT,
    WEIGHTS_TEST,
)
