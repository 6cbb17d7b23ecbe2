"""Chapter 05, scale: the checks of its seven tasks, and `problem`, a backward pass by hand.

T queries · S keys and values · D width of queries and keys · Dv width of values · B sequences ·
H heads. `d_x` is the gradient of the loss with respect to x.
"""

import random
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from heed.attention import attention
from heed.checks import (
    Bug,
    Function,
    Task,
    ch04,
    mutants,
    prop,
    write_the_test,
)
from heed.checks.ch04 import LN, f64
from heed.checks.compare import Wrong, expect, in_brackets, normal, several

SIXTHS = [1 / 6, 2 / 6, 3 / 6]

MUTANTS = mutants(__file__)


# 05.1


def monte_carlo(D: int, n: int, generator: Generator) -> tuple[float, float]:
    q, k = torch.randn(2, n, D, generator=generator, dtype=torch.float64)
    scores = (q * k).sum(dim=-1)
    squares = (scores - scores.mean()) ** 2
    return squares.mean().item(), squares.std().item() / n**0.5


def _spread(D: int) -> float:
    """The standard deviation of (q·k)²: its fourth moment is 3D² + 6D, its second D."""
    return (2 * D**2 + 6 * D) ** 0.5


@prop("two numbers", "The estimate first, then its error bar, both plain numbers.")
def two_numbers(f: Function, rng: Generator) -> None:
    got = several(f(5, 101, rng), 2, "D = 5, n = 101")
    expect([float(x) > 0 for x in got], [1, 1], "D = 5, n = 101; positive?")


@prop("near D", "The variance of n scores, each from a query and a key of its own.")
def near_D(f: Function, rng: Generator) -> None:
    n = 20011
    for D in (1, 2, 5, 11):
        got, want = float(f(D, n, rng)[0]), _spread(D) / n**0.5
        expect(got, D, f"D = {D}, n = {n}; six error bars are {6 * want:.2f}", 6 * want / D)


@prop("the generator decides", "Draw every number from the generator that you were given.")
def from_generator(f: Function, rng: Generator) -> None:
    first, again, other = (f(3, 101, Generator().manual_seed(seed)) for seed in (1, 1, 2))
    expect(again, first, "two generators with one random seed")
    if tuple(first) == tuple(other):
        given = "given     two generators with different random seeds"
        raise Wrong(f"{given}\nexpected  two estimates\ngot       {first[0]:.4g} both times")


@prop(
    "the error bar",
    "You average n squares. How far do single squares spread, and what does averaging do to that?",
)
def error_bar(f: Function, rng: Generator) -> None:
    for n in (5003, 20011):
        got, want = sum(float(f(3, n, rng)[1]) for _ in range(9)) / 9, _spread(3) / n**0.5
        expect(got / want, 1, f"D = 3, n = {n}: your error bar over {want:.3g}", 0.2)


MONTE_CARLO = Task(
    "05.1",
    monte_carlo,
    (two_numbers, near_D, from_generator, error_bar),
    MUTANTS["05.1"],
)


# 05.2


def score_moments(
    D: int, mean_q: float, std_q: float, mean_k: float, std_k: float, correlation: float
) -> tuple[float, float]:
    together = correlation * std_q * std_k
    mean = mean_q * mean_k + together
    variance = (std_q * std_k) ** 2 + together**2
    variance += (mean_q * std_k) ** 2 + (mean_k * std_q) ** 2
    variance += 2 * mean_q * mean_k * together
    return D * mean, D * variance


def _moments(f: Function, D: int, *numbers: float) -> None:
    names = ["mean_q", "std_q", "mean_k", "std_k", "correlation"]
    given = f"D = {D}, " + ", ".join(f"{n} = {x:.3g}" for n, x in zip(names, numbers, strict=True))
    got = several(f(D, *numbers), 2, given)
    expect([float(x) for x in got], score_moments(D, *numbers), f"{given}: mean and variance")


@prop("as in the theorem", "Independent entries of mean 0 and variance 1: variances add up.")
def theorem(f: Function, rng: Generator) -> None:
    _moments(f, 7, 0, 1, 0, 1, 0)


@prop("other spreads", "Twice the entries of q, twice the scores. And the variance?")
def spreads(f: Function, rng: Generator) -> None:
    _moments(f, 5, 0, 2, 0, 3, 0)


@prop("means", "Var(XY) = E[X²]E[Y²] - (E[X]E[Y])², and E[X²] is more than the variance.")
def means(f: Function, rng: Generator) -> None:
    _moments(f, 3, 1, 1, 2, 1, 0)


@prop("q = k", "Now every product is a square. What are the mean and the variance of X²?")
def same(f: Function, rng: Generator) -> None:
    _moments(f, 7, 0, 1, 0, 1, 1)


@prop("fresh numbers", "With means and correlation together one more term appears.")
def fresh_moments(f: Function, rng: Generator) -> None:
    a, b, c, d = (normal(rng, 4).abs() + 0.5).tolist()
    _moments(f, 11, a, b, c, d, -0.6)


SCORE_MOMENTS = Task(
    "05.2",
    score_moments,
    (theorem, spreads, means, same, fresh_moments),
    MUTANTS["05.2"],
)


# 05.3


def softmax_jacobian(weights: Float[Tensor, " S"]) -> Float[Tensor, "S S"]:
    return torch.diag(weights) - torch.outer(weights, weights)


@prop("S by S", "Every weight answers to every score.")
def square(f: Function, rng: Generator) -> None:
    expect(list(getattr(f(f64([0.2] * 5)), "shape", ())), [5, 5], "five weights; the shape:")


@prop("rows sum to 0", "Raise all scores by the same amount: no weight moves.")
def rows_sum_to_zero(f: Function, rng: Generator) -> None:
    expect(f(normal(rng, 5).softmax(-1)).sum(-1), torch.zeros(5), "five weights; sums of the rows")


@prop("certainty", "When one weight is 1 the softmax has saturated: which way can it still move?")
def certainty(f: Function, rng: Generator) -> None:
    expect(f(f64([0, 1])), [[0, 0], [0, 0]], "weights 0 and 1")


@prop("1/6, 2/6, 3/6", "Raise one score. Does its own weight grow or shrink? And the others?")
def jacobian_by_hand(f: Function, rng: Generator) -> None:
    want = f64([[5, -2, -3], [-2, 8, -6], [-3, -6, 9]]) / 36
    expect(36 * f(f64(SIXTHS)), 36 * want, "weights 1/6, 2/6, 3/6; 36 times the Jacobian")


@prop("as autograd says", "Compare with torch.autograd.functional.jacobian on scores of your own.")
def as_autograd(f: Function, rng: Generator) -> None:
    scores = normal(rng, 7)
    want = torch.autograd.functional.jacobian(lambda s: s.softmax(-1), scores)
    expect(f(scores.softmax(-1)), want, "seven fresh scores")


SOFTMAX_JACOBIAN = Task(
    "05.3",
    softmax_jacobian,
    (square, rows_sum_to_zero, certainty, jacobian_by_hand, as_autograd),
    MUTANTS["05.3"],
)


# 05.4


def softmax_backward(
    weights: Float[Tensor, "*N S"], d_weights: Float[Tensor, "*N S"]
) -> Float[Tensor, "*N S"]:
    mean = (weights * d_weights).sum(dim=-1, keepdim=True)
    return weights * (d_weights - mean)


@prop("1/6, 2/6, 3/6", "The product of the Jacobian with d_weights, written out for one score.")
def backward_by_hand(f: Function, rng: Generator) -> None:
    got = f(f64(SIXTHS), f64([6, 0, 0]))
    expect(6 * got, [5, -2, -3], "weights 1/6, 2/6, 3/6, d_weights 6, 0, 0; six times d_scores")


@prop("a constant does nothing", "The weights sum to 1, so pulling on all of them moves nothing.")
def constant(f: Function, rng: Generator) -> None:
    got = f(normal(rng, 5).softmax(-1), torch.full((5,), 7.0, dtype=torch.float64))
    expect(got, torch.zeros(5), "d_weights of 7 everywhere")


@prop("every row by itself", "Sum over the keys of one query only, with any number of axes before.")
def rows_apart(f: Function, rng: Generator) -> None:
    w, d = normal(rng, 2, 3, 5).softmax(-1), normal(rng, 2, 3, 5).abs()
    expect(f(w, d)[1, 2], f(w[1, 2], d[1, 2]), "row [1, 2] among others, against that row alone:")


@prop("nothing read, nothing back", "A query that may read nothing has weights of 0.")
def nothing_read(f: Function, rng: Generator) -> None:
    expect(f(torch.zeros(1, 3).double(), f64([[1, 2, 3]])), [[0, 0, 0]], "weights 0, 0, 0")


@prop("as autograd says", "Gradients may be negative.")
def backward_as_autograd(f: Function, rng: Generator) -> None:
    scores, d = normal(rng, 2, 3, 7).requires_grad_(), normal(rng, 2, 3, 7)
    w = scores.softmax(-1)
    (want,) = torch.autograd.grad((w * d).sum(), scores)
    expect(f(w.detach(), d), want, "fresh scores, 2 x 3 rows of 7")


@prop("no Jacobian", "S numbers go in and S come out; S x S need never exist.")
def no_jacobian(f: Function, rng: Generator) -> None:
    S = 211
    out = f(normal(rng, S).softmax(-1).requires_grad_(), normal(rng, S).requires_grad_())
    if (most := _largest_kept(out)) > 10 * S:
        limit = f"expected  no tensor much larger than {S} numbers"
        raise Wrong(f"given     {S} weights\n{limit}\ngot       one of {most} numbers")


def _largest_kept(out: Tensor) -> int:
    """Size of the largest tensor that autograd keeps: every product keeps what it was made of."""
    most, nodes = 0, [out.grad_fn]
    for node in nodes:
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        most = max([most, *(x.numel() for x in saved if isinstance(x, Tensor))])
        nodes += [below for below, _ in getattr(node, "next_functions", ()) if below is not None]
    return most


SOFTMAX_BACKWARD = Task(
    "05.4",
    softmax_backward,
    (backward_by_hand, constant, rows_apart, nothing_read, backward_as_autograd, no_jacobian),
    MUTANTS["05.4"],
)


# 05.5


def attention_backward(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    d_out: Float[Tensor, "B H T Dv"],
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H S D"], Float[Tensor, "B H S Dv"]]:
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.mT * scale).softmax(dim=-1)  # (B, H, T, S)
    d_v = weights.mT @ d_out
    d_weights = d_out @ v.mT
    d_scores = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True))
    return d_scores @ k * scale, d_scores.mT @ q * scale, d_v


def _inputs(rng: Generator) -> list[Tensor]:
    B, H, T, S, D, Dv = 2, 3, 5, 7, 11, 13
    shapes = (T, D), (S, D), (S, Dv), (T, Dv)
    return [normal(rng, B, H, *shape) for shape in shapes]


def _gradients(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
    """What autograd sends back through heed's attention."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(leaves[0], leaves[1], leaves[2])
    return torch.autograd.grad((out * d_out).sum(), leaves)


@prop(
    "three gradients", "A gradient has the shape of what it is the gradient of. q, k, v, in order."
)
def three(f: Function, rng: Generator) -> None:
    inputs = _inputs(rng)
    got = several(f(*inputs), 3, "T = 5, S = 7, D = 11, Dv = 13")
    for name, x, like in zip(["d_q", "d_k", "d_v"], got, inputs[:3], strict=True):
        expect(list(getattr(x, "shape", ())), list(like.shape), f"the shape of {name}:")


@prop("d_v", "The output is weights @ v, linear in v. What is the gradient of a matrix product?")
def d_v(f: Function, rng: Generator) -> None:
    inputs = _inputs(rng)
    expect(f(*inputs)[2], _gradients(*inputs)[2], "fresh numbers; d_v")


@prop("values all alike", "With equal values any mix is the same: no score matters. Exercise 05.4.")
def values_alike(f: Function, rng: Generator) -> None:
    q, k, v, d_out = _inputs(rng)
    d_q, d_k, _ = f(q, k, v[:, :, :1].expand_as(v), d_out)
    expect(d_q, torch.zeros_like(q), "seven equal values; d_q")
    expect(d_k, torch.zeros_like(k), "seven equal values; d_k")


@prop("d_q", "scores = q @ k.mT / √D: back through the product, and through the division.")
def d_q(f: Function, rng: Generator) -> None:
    inputs = _inputs(rng)
    expect(f(*inputs)[0], _gradients(*inputs)[0], "fresh numbers; d_q")


@prop("d_k", "As d_q, with the two sides of the product exchanged: which matrix is transposed?")
def d_k(f: Function, rng: Generator) -> None:
    inputs = _inputs(rng)
    expect(f(*inputs)[1], _gradients(*inputs)[1], "fresh numbers; d_k")


@prop("large scores", "The weights are made again here: take the largest score off before exp.")
def large_backward(f: Function, rng: Generator) -> None:
    q, k, v, d_out = _inputs(rng)
    got, want = f(1000 * q, k, v, d_out), _gradients(1000 * q, k, v, d_out)
    for name, x, y in zip(["d_q", "d_k", "d_v"], got, want, strict=True):
        expect(x, y, f"scores near 1000; {name}")


ATTENTION_BACKWARD = Task(
    "05.5",
    attention_backward,
    (three, d_v, values_alike, d_q, d_k, large_backward),
    MUTANTS["05.5"],
)


# 05.6


def stable_softmax(scores: Float[Tensor, "*N S"]) -> Float[Tensor, "*N S"]:
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)  # -inf - -inf is no number
    e = torch.exp(scores - top)
    total = e.sum(dim=-1, keepdim=True)
    return e / total.masked_fill(total == 0, 1)


@prop("1/6, 2/6, 3/6", "exp of each score, divided by the sum.")
def softmax_by_hand(f: Function, rng: Generator) -> None:
    expect(f(f64(LN)), SIXTHS, "scores ln 1, ln 2, ln 3")


@prop("a large score", "exp(2000) is infinite. Which number must be taken off so that none is?")
def large(f: Function, rng: Generator) -> None:
    expect(f(f64([0, 2000, 0])), [0, 1, 0], "scores 0, 2000, 0")


@prop("low scores", "exp(-2000) is 0, and 0/0 is no number. Taking off the same number helps here.")
def low(f: Function, rng: Generator) -> None:
    expect(f(f64(LN) - 2000), SIXTHS, "scores ln 1, ln 2, ln 3, all less 2000")


@prop("every row by itself", "A row of low scores next to a row of high ones: whose maximum?")
def rows(f: Function, rng: Generator) -> None:
    got = f(torch.stack([f64(LN) - 2000, f64(LN) + 2000]))
    expect(got, [SIXTHS, SIXTHS], "one row near -2000, one near 2000")


@prop("a hidden key", "exp of minus infinity is 0, exactly; nothing special is needed.")
def hidden(f: Function, rng: Generator) -> None:
    expect(f(f64([LN[0], -torch.inf, LN[2]])), [0.25, 0, 0.75], "scores ln 1, -inf, ln 3")


@prop("everything hidden", "-inf less -inf is no number, and neither is 0/0. Let such a row be 0.")
def all_hidden(f: Function, rng: Generator) -> None:
    expect(f(f64([-torch.inf] * 3)), [0, 0, 0], "scores -inf, -inf, -inf")


@prop("fresh numbers", "Any number of axes in front.")
def fresh_softmax(f: Function, rng: Generator) -> None:
    scores = normal(rng, 2, 3, 7) + f64([[[-2000], [0], [2000]]])
    expect(f(scores), scores.softmax(-1), "random scores, 2 x 3 rows of 7, at three heights")


STABLE_SOFTMAX = Task(
    "05.6",
    stable_softmax,
    (softmax_by_hand, large, low, rows, hidden, all_hidden, fresh_softmax),
    MUTANTS["05.6"],
)


# 05.7


def scaled_scores(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"]
) -> Float[Tensor, "B H T S"]:
    return q @ k.mT / q.shape[3] ** 0.5


def half_and_half(q: Tensor, k: Tensor) -> Tensor:
    """A fourth root for the queries and a fourth root for the keys."""
    root = q.shape[3] ** -0.25
    return torch.einsum("bhid,bhjd->bhij", q * root, k * root)


def scale_test(implementation: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 211, 7, generator=rng, dtype=torch.float64)  # three heads of 7
    variance = implementation(q, k).var()
    assert 0.8 < variance < 1.25


SCALE_TEST = write_the_test(
    "05.7",
    scale_test,
    scaled_scores,
    half_and_half,
    (
        Bug(
            "not divided at all",
            "mlc-ai/mlc-llm#3426",
            "Entries of variance 1, D of them: how wide are the scores without the root?",
            {" / q.shape[3] ** 0.5": ""},
        ),
        Bug(
            "multiplied by √D",
            "esceptico/perceiver-io#9",
            "The scale was D**-0.5, and then the code divided by it.",
            {"/ q.shape": "* q.shape"},
        ),
        Bug(
            "divided twice",
            "huggingface/transformers#38290",
            "One part scaled the queries, the next part scaled again. Now scores are too narrow.",
            {" ** 0.5": ""},
        ),
        Bug(
            "divided by the root of the number of heads",
            "tenstorrent/tt-metal#56789",
            "For which numbers of heads would this bug not show?",
            {"q.shape[3]": "q.shape[1]"},
        ),
        Bug(
            "divided by the root of the whole width, all heads together",
            "karpathy/ng-video-lecture#6",
            "The best known of all. It needs more than one head to show.",
            {"q.shape[3]": "(q.shape[1] * q.shape[3])"},
        ),
    ),
    MUTANTS["05.7"],
)


@dataclass(frozen=True, repr=False)
class Problem:
    """The forward problem of chapter 04, and a gradient that comes back to its output."""

    forward: ch04.Problem
    d_out: tuple[int, ...]

    @property
    def d_v(self) -> list[list[Fraction]]:
        return [[w * d for d in self.d_out] for w in self.forward.weights]

    @property
    def d_weights(self) -> list[int]:
        return [sum(d * x for d, x in zip(self.d_out, v, strict=True)) for v in self.forward.values]

    @property
    def jacobian(self) -> list[list[Fraction]]:
        w = self.forward.weights
        return [[a * (i == j) - a * b for j, b in enumerate(w)] for i, a in enumerate(w)]

    @property
    def d_scores(self) -> list[Fraction]:
        """The gradient of the scaled scores."""
        return [
            sum((a * d for a, d in zip(row, self.d_weights, strict=True)), Fraction(0))
            for row in self.jacobian
        ]

    @property
    def d_q(self) -> list[Fraction]:
        """Σₛ d_scoresₛ kₛ / √4."""
        return [
            sum((d * x for d, x in zip(self.d_scores, column, strict=True)), Fraction(0)) / 2
            for column in zip(*self.forward.keys, strict=True)
        ]

    @property
    def answer(self) -> dict[str, list]:
        return {"d_v": self.d_v, "d_scores": self.d_scores, "d_q": self.d_q}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and d_out in float64, with a batch and a head axis."""
        return *self.forward.tensors(), f64([[[self.d_out]]])

    def __repr__(self) -> str:
        head, *lines, _ = repr(self.forward).splitlines()
        head = head.replace("one query", "one query, backwards")
        given = f"  the gradient of the output is d_out = {self.d_out}"
        asked = "Give d_v, the gradient of the scaled scores, and d_q, as fractions."
        return "\n".join([head, *lines, given, asked])

    def worked(self) -> str:
        """Back through the four steps with this problem's numbers."""
        n, total = self.forward.counts, sum(self.forward.counts)
        d_weights, weights = self.d_weights, self.forward.weights
        mean = sum(w * d for w, d in zip(weights, d_weights, strict=True))
        rows = ", ".join(f"({', '.join(map(str, row))})" for row in self.d_v)
        scores = ", ".join(
            f"{c}/{total}·({d} - {in_brackets(mean)}) = {s}"
            for c, d, s in zip(n, d_weights, self.d_scores, strict=True)
        )
        return "\n".join(
            [
                f"1. Weights    {', '.join(f'{c}/{total}' for c in n)}, as on the way forward",
                f"2. d_v        weight times d_out: {rows}",
                f"3. d_weights  d_out · v: {', '.join(map(str, d_weights))};"
                f" their mean under the weights is {mean}",
                f"4. d_scores   weight times (d_weight - mean): {scores}",
                f"5. d_q        Σ d_score k / 2: ({', '.join(map(str, self.d_q))})",
            ]
        )


def problem(random_seed: int) -> Problem:
    """A fresh backward pass for paper: every number in it is a fraction."""
    forward, rng = ch04.problem(random_seed), random.Random(f"back {random_seed}")
    while True:
        made = Problem(forward, (rng.randint(-3, 3), rng.randint(-3, 3)))
        if len(set(made.d_weights)) > 1:
            return made


TASKS = (
    MONTE_CARLO,
    SCORE_MOMENTS,
    SOFTMAX_JACOBIAN,
    SOFTMAX_BACKWARD,
    ATTENTION_BACKWARD,
    STABLE_SOFTMAX,
    SCALE_TEST,
)
