"""Chapter 04, lookup: the checks of its seven tasks, and `problem`, a fresh one to do by hand.

T queries · S keys and values · D width of queries and keys · Dv width of values · B sequences ·
H heads. Each task has its reference, its properties in teaching order, then its mutants.
"""

import itertools
import math
import random
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from heed import masks
from heed.attention import attention, weights
from heed.checks import (
    Bug,
    Function,
    Task,
    mutants,
    prop,
    write_the_test,
)
from heed.checks.compare import Wrong, expect, normal, several, tensor

LN = [0.0, math.log(2), math.log(3)]  # as scores: weights of exactly 1/6, 2/6 and 3/6
PAIRS = [[6.0, 0.0], [3.0, 6.0], [2.0, 12.0]]  # mixed with these weights: [3, 8]


def f64(x: object) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


MUTANTS = mutants(__file__)


# 04.1


def soft_lookup(
    query: Float[Tensor, " D"],
    keys: Float[Tensor, "S D"],
    values: Float[Tensor, "S Dv"],
    temperature: float,
) -> Float[Tensor, " Dv"]:
    scores = keys @ query / temperature
    e = torch.exp(scores - scores.max())
    return e / e.sum() @ values


@prop("one key", "With one key nothing competes: what comes back?")
def one_key(f: Function, rng: Generator) -> None:
    query, key, value = normal(rng, 3), normal(rng, 1, 3), normal(rng, 1, 2)
    expect(f(query, key, value, 1.0), value[0], "one key")


@prop("equal scores", "Keys that score the same share alike. Do the shares sum to 1?")
def equal_scores(f: Function, rng: Generator) -> None:
    keys, values = torch.zeros(5, 3, dtype=torch.float64), normal(rng, 5, 2)
    expect(f(normal(rng, 3), keys, values, 1.0), values.mean(0), "five keys that score 0")


@prop("1/6, 2/6, 3/6", "Take exp of ln 1, ln 2 and ln 3: which numbers are these, and their sum?")
def lookup_by_hand(f: Function, rng: Generator) -> None:
    query, keys = f64([LN[1], LN[2]]), f64([[0, 0], [1, 0], [0, 1]])
    given = "scores ln 1, ln 2, ln 3, values (6, 0), (3, 6), (2, 12), temperature 1"
    expect(f(query, keys, f64(PAIRS), 1.0), [3, 8], given)


@prop(
    "cold",
    "A low temperature picks the best key. Does it act on the scores? Does exp overflow? Softmax"
    " stays the same when one number is taken off every score.",
)
def cold(f: Function, rng: Generator) -> None:
    order = torch.randperm(5, generator=rng)
    keys = torch.stack([order - 2.0, *normal(rng, 2, 5)], dim=1)
    values, best = normal(rng, 5, 2), int(order.argmax())
    given = f"scores {(order - 2).tolist()}, temperature 0.001"
    expect(f(f64([1, 0, 0]), keys, values, 0.001), values[best], given)


@prop("hot", "At a huge temperature all scores look alike.")
def hot(f: Function, rng: Generator) -> None:
    values = normal(rng, 5, 2)
    got = f(normal(rng, 3), normal(rng, 5, 3), values, 1e9)
    expect(got, values.mean(0), "temperature 1000000000")


@prop("fresh numbers", "The cases before were made by hand. Which signs do their scores have?")
def fresh_lookup(f: Function, rng: Generator) -> None:
    inputs = normal(rng, 3), normal(rng, 11, 3), normal(rng, 11, 2)
    expect(f(*inputs, 0.7), soft_lookup(*inputs, 0.7), "11 random keys, temperature 0.7")


SOFT_LOOKUP = Task(
    "04.1",
    soft_lookup,
    (one_key, equal_scores, lookup_by_hand, cold, hot, fresh_lookup),
    MUTANTS["04.1"],
)


# 04.2


def exact(
    counts: list[int], values: list[Fraction], sharpness: int
) -> tuple[list[Fraction], Fraction]:
    powers = [Fraction(n) ** sharpness for n in counts]
    weights = [p / sum(powers) for p in powers]
    return weights, sum((w * v for w, v in zip(weights, values, strict=True)), Fraction(0))


def _about(f: Function, counts: list[int], sharpness: int, weights: str, values: list[int]) -> None:
    """Are the weights these, and the mix of the values, within rounding?"""
    given, want = f"counts {counts}, sharpness {sharpness}", _fractions(weights)
    got = several(f(counts, [Fraction(v) for v in values], sharpness), 2, given)
    expect(_floats(got[0]), _floats(want), f"{given}: weights")
    mix = sum(w * v for w, v in zip(want, values, strict=True))
    expect(_floats([got[1]]), _floats([mix]), f"{given}, values {values}: output")


def _fractions(text: str) -> list[Fraction]:
    return [Fraction(x) for x in text.split()]


def _floats(numbers: list) -> list[float]:
    return [float(x) for x in numbers]


def _small(rng: Generator, n: int, low: int = 1) -> list[int]:
    return torch.randint(low, 10, (n,), generator=rng).tolist()


@prop("1/6, 2/6, 3/6", "exp(ln n) is n. So each weight is a count, divided by what?")
def one_two_three(f: Function, rng: Generator) -> None:
    _about(f, [1, 2, 3], 1, "1/6 1/3 1/2", [6, 3, 8])


@prop("two keys with one score", "Two keys with the same score are still two keys.")
def same_score(f: Function, rng: Generator) -> None:
    _about(f, [2, 1, 2], 1, "2/5 1/5 2/5", _small(rng, 3))


@prop("sharper", "A query twice as long scores 2 ln n. What is exp(2 ln n)? What is the sum now?")
def sharper(f: Function, rng: Generator) -> None:
    _about(f, [1, 2, 3], 2, "1/14 4/14 9/14", _small(rng, 3))


@prop("sharpness 0", "Now every score is 0. What is a count to the power 0?")
def no_sharpness(f: Function, rng: Generator) -> None:
    _about(f, [1, 2, 4], 0, "1/3 1/3 1/3", _small(rng, 3))


@prop("sharpness -1", "exp(-ln n) is 1/n: now the small counts win.")
def negative(f: Function, rng: Generator) -> None:
    _about(f, [1, 2, 3], -1, "6/11 3/11 2/11", _small(rng, 3))


@prop(
    "exact",
    "Right to six digits, but somewhere a Fraction became a float. An int to a negative power is"
    " a float; a Fraction to a negative power stays a Fraction.",
)
def really_exact(f: Function, rng: Generator) -> None:
    counts, values = _small(rng, 5, low=3), [Fraction(n, 7) for n in _small(rng, 5)]
    for sharpness in (1, -3):
        got, mix = f(counts, values, sharpness)
        want, right = exact(counts, values, sharpness)
        for x, y in zip([*got, mix], [*want, right], strict=True):
            if not isinstance(x, Fraction) or x != y:
                given = f"given     counts {counts}, sharpness {sharpness}"
                raise Wrong(f"{given}\nexpected  {y}, a Fraction\ngot       {x}")


EXACT = Task(
    "04.2",
    exact,
    (one_two_three, same_score, sharper, no_sharpness, negative, really_exact),
    MUTANTS["04.2"],
)


# 04.3


def kernel_regression(
    x: Float[Tensor, " T"], xs: Float[Tensor, " S"], ys: Float[Tensor, " S"], width: float
) -> Float[Tensor, " T"]:
    distance = x[:, None] - xs  # (T, S)
    weights = (-(distance**2) / (2 * width**2)).softmax(dim=-1)
    return weights @ ys


@prop("one sample", "Each place asked shares out 1 over the samples. Along which axis do you sum?")
def one_sample(f: Function, rng: Generator) -> None:
    expect(
        f(f64([1, 2.5]), f64([2]), f64([7]), 1.0), [7, 7], "one sample y(2) = 7, asked at 1, 2.5"
    )


@prop("half way", "Two samples at the same distance count alike.")
def half_way(f: Function, rng: Generator) -> None:
    given = "samples y(1) = 10 and y(3) = 20, asked at 2"
    expect(f(f64([2]), f64([1, 3]), f64([10, 20]), 1.0), [15], given)


@prop("one width away", "One width from its centre the bell has fallen to exp(-1/2).")
def one_width_away(f: Function, rng: Generator) -> None:
    given = "samples y(0) = 0 and y(1) = 1, asked at 0, width 1"
    want = math.exp(-0.5) / (1 + math.exp(-0.5))
    expect(f(f64([0]), f64([0, 1]), f64([0, 1]), 1.0), [want], given)


@prop("a narrower bell", "What counts is the distance measured in widths, squared.")
def narrow(f: Function, rng: Generator) -> None:
    given = "samples y(0) = 0 and y(3/2) = 1, asked at 0, width 1/2"
    want = math.exp(-4.5) / (1 + math.exp(-4.5))
    expect(f(f64([0]), f64([0, 1.5]), f64([0, 1]), 0.5), [want], given)


@prop("far away", "Here every bell underflows to 0, and 0/0 is no number. Softmax wants exponents.")
def far_away(f: Function, rng: Generator) -> None:
    given = "samples y(0) = 4 and y(1) = 5, asked at 1000, width 1"
    expect(f(f64([1000]), f64([0, 1]), f64([4, 5]), 1.0), [5], given)


@prop("fresh numbers", "Several places at once: each needs weights of its own.")
def fresh_regression(f: Function, rng: Generator) -> None:
    x, xs, ys = normal(rng, 3), 2 * normal(rng, 7), normal(rng, 7)
    expect(f(x, xs, ys, 0.8), kernel_regression(x, xs, ys, 0.8), "7 samples, asked at 3 places")


KERNEL_REGRESSION = Task(
    "04.3",
    kernel_regression,
    (one_sample, half_way, one_width_away, narrow, far_away, fresh_regression),
    MUTANTS["04.3"],
)


# 04.4


def as_attention(
    x: Float[Tensor, " T"], xs: Float[Tensor, " S"], width: float
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "S D"]]:
    # -(x - xs)²/2 = x·xs - xs²/2 - x²/2; the last term is the same for all keys: softmax drops it
    q = torch.stack([x, torch.full_like(x, -0.5)], dim=-1) * 2**0.5 / width**2
    k = torch.stack([xs, xs**2], dim=-1)
    return q, k


def _reads(f: Function, x: Tensor, xs: Tensor, width: float, given: str) -> Tensor:
    """The weights that heed's attention makes of the reader's queries and keys."""
    q, k = several(f(x, xs, width), 2, given)
    return weights(q[None, None].double(), k[None, None].double())[0, 0].detach()


@prop("one width for both", "T queries and S keys, and a dot product between any two of them.")
def one_width(f: Function, rng: Generator) -> None:
    given = "3 places asked, 5 samples"
    q, k = several(f(normal(rng, 3), normal(rng, 5), 1.0), 2, given)
    shapes = [tuple(getattr(a, "shape", ())) for a in (q, k)]
    if [len(s) for s in shapes] != [2, 2] or shapes[0] != (3, shapes[1][1]) or shapes[1][0] != 5:
        want = "expected  q of shape (3, D) and k of shape (5, D), with one D"
        raise Wrong(f"given     {given}\n{want}\ngot       {shapes[0]} and {shapes[1]}")


@prop(
    "half way", "Expand (x - xs)². Which term differs from key to key but not from query to query?"
)
def reads_half_way(f: Function, rng: Generator) -> None:
    got = _reads(f, f64([2]), f64([1, 3]), 1.0, "one query")
    expect(got, [[0.5, 0.5]], "samples at 1 and 3, asked at 2: weights")


@prop("one width away", "Attention divides your q·k by √D. What must q·k be before that?")
def reads_one_width_away(f: Function, rng: Generator) -> None:
    got, e = _reads(f, f64([0]), f64([0, 1]), 1.0, "one query"), math.exp(-0.5)
    expect(got, [[1 / (1 + e), e / (1 + e)]], "samples at 0 and 1, asked at 0, width 1: weights")


@prop("a narrower bell", "Half the width makes every score four times as large.")
def reads_narrow(f: Function, rng: Generator) -> None:
    got, e = _reads(f, f64([0]), f64([0, 1]), 0.5, "one query"), math.exp(-2)
    expect(got, [[1 / (1 + e), e / (1 + e)]], "samples at 0 and 1, asked at 0, width 1/2: weights")


@prop("fresh numbers", "So far no place was negative.")
def reads_fresh(f: Function, rng: Generator) -> None:
    x, xs = normal(rng, 3), -normal(rng, 7).abs()
    want = (-((x[:, None] - xs) ** 2) / (2 * 0.8**2)).softmax(-1)
    expect(_reads(f, x, xs, 0.8, "3 places, 7 samples"), want, "3 places, 7 samples: weights")


AS_ATTENTION = Task(
    "04.4",
    as_attention,
    (one_width, reads_half_way, reads_one_width_away, reads_narrow, reads_fresh),
    MUTANTS["04.4"],
)


# 04.5


def attend(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S Dv"]
) -> Float[Tensor, "B H T Dv"]:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ v


def _qkv(rng: Generator, B: int, H: int, T: int, S: int, D: int, Dv: int) -> list[Tensor]:
    return [normal(rng, B, H, T, D), normal(rng, B, H, S, D), normal(rng, B, H, S, Dv)]


@prop("shape", "Each of the T queries brings home Dv numbers, and T, S, D and Dv all differ.")
def shape(f: Function, rng: Generator) -> None:
    got = f(*_qkv(rng, 2, 3, 5, 7, 11, 13))
    if tuple(getattr(got, "shape", ())) != (2, 3, 5, 13):
        sizes = "given     B = 2, H = 3, T = 5, S = 7, D = 11, Dv = 13"
        shape = tuple(getattr(got, "shape", ())) or type(got).__name__
        raise Wrong(f"{sizes}\nexpected  shape (2, 3, 5, 13)\ngot       {shape}")


@prop(
    "weights sum to 1", "If every value is 1, any mix of them is 1. Which axis do weights sum over?"
)
def sums_to_one(f: Function, rng: Generator) -> None:
    q, k, v = _qkv(rng, 2, 3, 5, 7, 11, 13)
    expect(f(q, k, torch.ones_like(v)), torch.ones(2, 3, 5, 13), "every value is 1")


@prop("equal keys share", "Keys that are all the same get the same weight: the answer is a mean.")
def equal_keys(f: Function, rng: Generator) -> None:
    q, k, v = _qkv(rng, 2, 3, 5, 7, 11, 13)
    v = v[:1, :1].expand(2, 3, 7, 13)
    want = v.mean(2, keepdim=True).expand(2, 3, 5, 13)
    expect(f(q, k[:, :, :1].expand_as(k), v), want, "seven equal keys")


@prop("divided by √D", "The dot products here are 2 ln 1, 2 ln 2 and 2 ln 3, and D is 4.")
def scaled(f: Function, rng: Generator) -> None:
    q, k = f64([[2 * LN[1], 2 * LN[2], 0, 0]]), f64([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    given = "D = 4, q·k = 2 ln 1, 2 ln 2, 2 ln 3, values (6, 0), (3, 6), (2, 12)"
    expect(f(q[None, None], k[None, None], f64([[PAIRS]])), [[[[3, 8]]]], given)


@prop(
    "heads apart", "A head sees its own queries, keys and values, and nothing of the other heads."
)
def heads_apart(f: Function, rng: Generator) -> None:
    qkv = _qkv(rng, 1, 3, 5, 7, 11, 13)
    alone = f(*(x[:, 1:2] for x in qkv))
    expect(f(*qkv)[:, 1:2], alone, "head 1 among three, against head 1 alone:")


@prop("sequences apart", "A sequence reads itself, and nothing of the rest of the batch.")
def sequences_apart(f: Function, rng: Generator) -> None:
    qkv = _qkv(rng, 2, 1, 5, 7, 11, 13)
    alone = f(*(x[1:] for x in qkv))
    expect(f(*qkv)[1:], alone, "sequence 1 of two, against sequence 1 alone:")


@prop("large scores", "exp(10000) is infinite. Softmax never needs it: take the largest score off.")
def large_scores(f: Function, rng: Generator) -> None:
    k = f64([[0.0, 1], [1, 0]])[None, None]
    got = f(f64([[[[30000.0, 0]]]]), k, f64([[[[4.0], [5]]]]))
    expect(got, [[[[5]]]], "scores 0 and 21213, values 4 and 5")


@prop("fresh numbers", "Everything at once, with scores of both signs.")
def fresh_attend(f: Function, rng: Generator) -> None:
    q, k, v = _qkv(rng, 2, 3, 5, 7, 11, 13)
    expect(f(q, k, v), attention(q, k, v), "random q, k and v")


ATTEND = Task(
    "04.5",
    attend,
    (
        shape,
        sums_to_one,
        equal_keys,
        scaled,
        heads_apart,
        sequences_apart,
        large_scores,
        fresh_attend,
    ),
    MUTANTS["04.5"],
)


# 04.6


def masked_weights(
    scores: Float[Tensor, "*N T S"], readable: Bool[Tensor, "*N T S"]
) -> Float[Tensor, "*N T S"]:
    scores = scores.masked_fill(~readable, -math.inf)
    top = scores.amax(dim=-1, keepdim=True).clamp(min=-1e300)  # -inf - -inf is no number
    e = torch.exp(scores - top)
    total = e.sum(dim=-1, keepdim=True)
    return e / total.masked_fill(total == 0, 1)


@prop("True means readable", "Weights are shared among the readable keys only, and sum to 1 there.")
def true_reads(f: Function, rng: Generator) -> None:
    got = f(f64([LN]), torch.tensor([[True, False, True]]))
    expect(got, [[0.25, 0, 0.75]], "scores ln 1, ln 2, ln 3, the middle one hidden")


@prop("hidden means 0", "Nearly 0 is not 0: what does exp make 0 exactly?")
def hidden_is_zero(f: Function, rng: Generator) -> None:
    got = tensor(f(f64([LN]), torch.tensor([[True, False, True]])), "three scores")[0, 1].item()
    if got != 0:
        given = "given     scores ln 1, ln 2, ln 3, the middle one hidden"
        raise Wrong(f"{given}\nexpected  0 there, exactly\ngot       {got:.3g}")


@prop(
    "low scores", "A hidden key may win against scores lower than your fill. What lies below all?"
)
def low_scores(f: Function, rng: Generator) -> None:
    got = f(f64([[-2e9, -2e9, 5]]), torch.tensor([[True, True, False]]))
    expect(got, [[0.5, 0.5, 0]], "scores -2000000000 twice, a third key hidden")


@prop("nothing to read", "A query with no readable key takes nothing: neither NaN nor a mean.")
def nothing(f: Function, rng: Generator) -> None:
    expect(f(f64([LN]), torch.zeros(1, 3, dtype=torch.bool)), [[0, 0, 0]], "every key hidden")


@prop(
    "no gradient from nothing",
    "NaN made on the way can stay in the gradient, though you replace it.",
)
def nothing_back(f: Function, rng: Generator) -> None:
    scores = f64([LN, LN]).requires_grad_()
    got = f(scores, torch.tensor([[False] * 3, [True] * 3]))
    (back,) = torch.autograd.grad((got * f64([1, 2, 3])).sum(), scores)
    expect(back[0], [0, 0, 0], "a query with every key hidden, its gradient:")


@prop("the scores stay", "Whoever called you may still need the scores: do not write into them.")
def scores_stay(f: Function, rng: Generator) -> None:
    scores = f64([LN])
    f.__wrapped__(scores, torch.tensor([[True, False, True]]))  # type: ignore[attr-defined]
    expect(scores, [LN], "your input, after the call:")


@prop("fresh numbers", "Every query has readable keys of its own.")
def fresh_masked(f: Function, rng: Generator) -> None:
    scores = normal(rng, 2, 3, 5, 7)
    readable = torch.rand(2, 3, 5, 7, generator=rng) < 0.5
    expect(f(scores, readable), masked_weights(scores, readable), "random scores and mask")


MASKED_WEIGHTS = Task(
    "04.6",
    masked_weights,
    (true_reads, hidden_is_zero, low_scores, nothing, nothing_back, scores_stay, fresh_masked),
    MUTANTS["04.6"],
)


# 04.7


def causal(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S Dv"]
) -> Float[Tensor, "B H T Dv"]:
    T, S, D = q.shape[2], k.shape[2], k.shape[3]
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    scores = (q @ k.mT / D**0.5).masked_fill(j > i, -math.inf)  # (B, H, T, S)
    return scores.softmax(dim=-1) @ v


def causal_row_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same without a mask: each query is handed the keys it may read, and no others."""
    T, S = q.shape[2], k.shape[2]
    rows = []
    for t in range(T):
        n = S - T + t + 1
        scores = (k[:, :, :n] * q[:, :, t : t + 1]).sum(-1) * k.shape[3] ** -0.5  # (B, H, n)
        rows.append((scores.softmax(-1)[..., None] * v[:, :, :n]).sum(2))
    return torch.stack(rows, dim=2)


def causal_test(implementation: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    sizes = [(5, 11), (7, 11), (7, 13)]  # five queries, seven keys, seven values
    q, k, v = (torch.randn(2, 3, *s, generator=rng, dtype=torch.float64) for s in sizes)
    for low in (0, 300):  # the second time every score lies far below -10,000
        want = attention(q + low, k - low, v, masks.causal)
        assert torch.allclose(implementation(q + low, k - low, v), want, atol=1e-6)


CAUSAL_TEST = write_the_test(
    "04.7",
    causal_test,
    causal,
    causal_row_by_row,
    (
        Bug(
            "softmax over the queries",
            "labmlai/annotated_deep_learning_paper_implementations#146",
            "Images made with this bug scored as well as without it. What do weights sum to?",
            {"dim=-1": "dim=-2"},
        ),
        Bug(
            "the keys come back, the values are never read",
            "ruvnet/agentic-flow#191",
            "Every example there used one tensor as keys and as values. Do yours differ?",
            {"@ v": "@ k"},
        ),
        Bug(
            "nothing is hidden",
            "huggingface/transformers#48745",
            "Do early queries in your test have later keys to peep at? Look at more than the last.",
            {"j > i": "j < 0"},
        ),
        Bug(
            "a query cannot read itself",
            "pbloem/former#10",
            "Check the diagonal: the key at the query's own position is readable.",
            {"j > i": "j >= i"},
        ),
        Bug(
            "the scores are not divided by √D",
            "mlc-ai/mlc-llm#3426",
            "At which width D would this bug not show?",
            {" / D**0.5": ""},
        ),
        Bug(
            "the first query is taken for position 0",
            "pytorch/pytorch#108108",
            "With as many queries as keys nobody can tell. When do the two differ?",
            {"torch.arange(S - T, S)": "torch.arange(T)"},
        ),
        Bug(
            "hidden keys score -10,000, not minus infinity",
            "huggingface/transformers#15199",
            "A model learned to push all its scores below that. Make such queries and keys.",
            {"-math.inf": "-1e4"},
        ),
    ),
    MUTANTS["04.7"],
)


@dataclass(frozen=True, repr=False)
class Problem:
    """One query and a few keys, D = 4, whose scaled scores are ln of whole numbers.

    The query is 2 (ln a, ln b, ln c, ln d) and the keys are made of 0 and 1.
    """

    random_seed: int
    bases: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> list[int]:
        """exp of each scaled score: the product of the bases where the key has a 1."""
        return [math.prod(b**n for b, n in zip(self.bases, k, strict=True)) for k in self.keys]

    @property
    def weights(self) -> list[Fraction]:
        return [Fraction(n, sum(self.counts)) for n in self.counts]

    @property
    def answer(self) -> list[Fraction]:
        """The output: the mix of the values under the weights."""
        columns = zip(*self.values, strict=True)
        return [sum(w * x for w, x in zip(self.weights, c, strict=True)) for c in columns]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in float64, with a batch and a head axis, as heed.attention takes them."""
        q = [2 * math.log(b) for b in self.bases]
        return f64([[[q]]]), f64([[self.keys]]), f64([[self.values]])

    def __repr__(self) -> str:
        q = ", ".join(f"2 ln {b}" for b in self.bases)
        lines = [f"Problem {self.random_seed}: attention for one query, D = 4", f"  q  = ({q})"]
        for s, (k, v) in enumerate(zip(self.keys, self.values, strict=True), 1):
            lines.append(f"  k{s} = {k}   v{s} = {v}")
        return "\n".join([*lines, "Give the weights and the output as fractions."])

    def worked(self) -> str:
        """The four steps with this problem's numbers."""
        n, total, keys = self.counts, sum(self.counts), range(1, len(self.keys) + 1)
        terms = [
            " + ".join(f"2 ln {b}" for b, one in zip(self.bases, k, strict=True) if one) or "0"
            for k in self.keys
        ]
        scores = ", ".join(f"q·k{s} = {t}" for s, t in zip(keys, terms, strict=True))
        mixes = [
            f"({' + '.join(f'{c}·{x}' for c, x in zip(n, column, strict=True))})/{total} = {y}"
            for column, y in zip(zip(*self.values, strict=True), self.answer, strict=True)
        ]
        return "\n".join(
            [
                f"1. Score.    {scores}",
                f"2. Divide by √4 = 2.    {', '.join(f'ln {c}' for c in n)}",
                f"3. Softmax.  exp gives {', '.join(map(str, n))}, together {total}."
                f"  Weights {', '.join(f'{c}/{total}' for c in n)}",
                f"4. Mix.      {',   '.join(mixes)}",
            ]
        )


def problem(random_seed: int) -> Problem:
    """A fresh problem for paper; its weights are exact fractions and not all the same."""
    rng = random.Random(random_seed)
    while True:
        bases = tuple(rng.choice([2, 2, 3, 3, 4, 5]) for _ in range(4))
        rows = rng.sample(list(itertools.product([0, 1], repeat=4)), rng.choice([3, 3, 4]))
        values = tuple((rng.randint(0, 9), rng.randint(0, 9)) for _ in rows)
        made = Problem(random_seed, bases, tuple(rows), values)
        if max(made.counts) <= 12 and len(set(made.counts)) > 1 and len(set(values)) > 1:
            return made


TASKS = (SOFT_LOOKUP, EXACT, KERNEL_REGRESSION, AS_ATTENTION, ATTEND, MASKED_WEIGHTS, CAUSAL_TEST)
