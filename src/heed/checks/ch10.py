"""Chapter 10, the block: the checks of its seven tasks, and `problem`, a norm to do by hand.

B sequences · T words · C width of the stream · N width of what follows a norm.
"""

import random
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement
from math import isqrt

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional

from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.ch04 import f64
from heed.checks.compare import Wrong, expect, in_brackets, normal, several, shown, tensor

MUTANTS = mutants(__file__)


# 10.1


def layer_norm(
    x: Float[Tensor, "*B C"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "*B C"]:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight + bias


def _theirs(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


ONES, ZEROS = f64([1, 1, 1, 1]), f64([0, 0, 0, 0])


@prop("by hand", "Mean 4, variance 9. The mean square of what is left, over all four channels.")
def norm_by_hand(f: Function, rng: Generator) -> None:
    x, want = f64([[9, 1, 3, 3]]), f64([[5, -3, -1, -1]]) / 3
    expect(f(x, ONES, ZEROS, 1e-12), want, "(9, 1, 3, 3), weight 1, bias 0, eps 1e-12")


@prop("eps", "Where does eps stand: under the root, or beside it?")
def norm_eps(f: Function, rng: Generator) -> None:
    x, want = f64([[9, 1, 3, 3]]), f64([[5, -3, -1, -1]]) / 4
    expect(f(x, ONES, ZEROS, 7.0), want, "(9, 1, 3, 3), weight 1, bias 0, eps 7")
    given = "four equal numbers, weight 1, bias 0, eps 0.01"
    expect(f(f64([[2, 2, 2, 2]]), ONES, ZEROS, 0.01), [[0, 0, 0, 0]], given)


@prop("weight and bias", "Each channel has its own weight and bias, and they come last.")
def norm_affine(f: Function, rng: Generator) -> None:
    x, weight, bias = f64([[9, 1, 3, 3]]), f64([3, 1, 6, 0]), f64([0, 10, 0, 7])
    given = "(9, 1, 3, 3), weight (3, 1, 6, 0), bias (0, 10, 0, 7)"
    expect(f(x, weight, bias, 1e-12), [[5, 9, -2, 7]], given)


@prop("every word alone", "A word must not hear of its neighbours: which axis is averaged?")
def norm_alone(f: Function, rng: Generator) -> None:
    x, weight, bias = normal(rng, 2, 5, 7), normal(rng, 7), normal(rng, 7)
    given = "two texts of five words, width 7"
    expect(f(x, weight, bias, 1e-5), _theirs(x, weight, bias, 1e-5), given)


@prop("near a thousand", "Mean square less squared mean loses its digits. Take the mean off first.")
def norm_far(f: Function, rng: Generator) -> None:
    x = (normal(rng, 3, 64) + 1000).float()
    weight, bias = torch.ones(64), torch.zeros(64)
    want = _theirs(x.double(), weight.double(), bias.double(), 1e-5)
    expect(f(x, weight, bias, 1e-5), want, "float32 numbers near 1000", tol=1e-3)


LAYER_NORM = Task(
    "10.1",
    layer_norm,
    (norm_by_hand, norm_eps, norm_affine, norm_alone, norm_far),
    MUTANTS["10.1"],
)


# 10.2


def layer_norm_backward(
    x: Float[Tensor, "B T C"], weight: Float[Tensor, " C"], d_y: Float[Tensor, "B T C"], eps: float
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, " C"], Float[Tensor, " C"]]:
    centred = x - x.mean(dim=-1, keepdim=True)
    s = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    hat, g = centred / s, weight * d_y
    d_x = (g - g.mean(dim=-1, keepdim=True) - hat * (g * hat).mean(dim=-1, keepdim=True)) / s
    return d_x, (d_y * hat).sum(dim=(0, 1)), d_y.sum(dim=(0, 1))


def _gradients(x: Tensor, weight: Tensor, d_y: Tensor, eps: float) -> tuple[Tensor, ...]:
    """PyTorch's answer: d_x, d_weight, d_bias."""
    bias = torch.zeros_like(weight)
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    return torch.autograd.grad(_theirs(x, weight, bias, eps), (x, weight, bias), d_y)


def _backward(f: Function, given: str, x: Tensor, weight: Tensor, d_y: Tensor, eps: float) -> None:
    want = _gradients(x, weight, d_y, eps)
    got = several(f(x, weight, d_y, eps), 3, given)
    for n, name in enumerate(["d_bias", "d_weight", "d_x"], 1):  # the easiest first
        expect(got[-n], want[-n], f"{given}; {name}")


@prop(
    "one word by hand", "The bias sees d_y, the weight d_y times x hat; d_x lacks two directions."
)
def back_by_hand(f: Function, rng: Generator) -> None:
    given = "x (9, 1, 3, 3), weight 1, d_y (6, 0, 0, 0)"
    _backward(f, given, f64([[[9, 1, 3, 3]]]), ONES, f64([[[6, 0, 0, 0]]]), 1e-12)


@prop("the weight", "Which gradient meets the weight first: d_x or d_weight?")
def back_weight(f: Function, rng: Generator) -> None:
    given = "x (9, 1, 3, 3), weight (2, 1, 0, -1), d_y (6, 0, 1, 2)"
    weight, d_y = f64([2, 1, 0, -1]), f64([[[6, 0, 1, 2]]])
    _backward(f, given, f64([[[9, 1, 3, 3]]]), weight, d_y, 1e-12)


@prop("eps", "s is the root of variance plus eps, in both places.")
def back_eps(f: Function, rng: Generator) -> None:
    x, d_y = f64([[[9, 1, 3, 3]]]), f64([[[6, 0, 1, 2]]])
    _backward(f, "x (9, 1, 3, 3), d_y (6, 0, 1, 2), eps 7", x, ONES, d_y, 7.0)


@prop("many words", "All words share weight and bias. Their own gradients stay apart.")
def back_many(f: Function, rng: Generator) -> None:
    given = "two texts of five words, width 7"
    x, d_y = normal(rng, 2, 5, 7), normal(rng, 2, 5, 7)
    _backward(f, given, x, normal(rng, 7), d_y, 1e-5)


BACKWARD = Task(
    "10.2",
    layer_norm_backward,
    (back_by_hand, back_weight, back_eps, back_many),
    MUTANTS["10.2"],
)


# 10.3


def run_block(
    x: Float[Tensor, "T C"],
    attend: Function,
    network: Function,
    norm1: Function,
    norm2: Function,
    norm_first: bool,
) -> Float[Tensor, "T C"]:
    if norm_first:
        x = x + attend(norm1(x))
        x = x + network(norm2(x))
    else:
        x = norm1(x + attend(x))
        x = norm2(x + network(x))
    return x


def _silent(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _unit(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


@prop(
    "pre-norm lets the stream pass", "If the branches write nothing, nothing may touch the stream."
)
def block_passes(f: Function, rng: Generator) -> None:
    x = normal(rng, 3, 5)
    got = f(x, _silent, _silent, _unit, _unit, True)
    expect(got, x, "pre-norm, both branches write zeros", tol=1e-12)


@prop("pre-norm, number by number", "Branches read normed copies; the second reads the new stream.")
def block_pre(f: Function, rng: Generator) -> None:
    # x 1: normed 10, attended 12, stream 13; normed 1300, times 3 is 3900, stream 3913.
    calls = (lambda y: y + 2, lambda y: 3 * y, lambda y: 10 * y, lambda y: 100 * y)
    given = "x 1, attend y + 2, network 3 y, norm1 10 y, norm2 100 y, pre-norm"
    expect(f(f64([[1]]), *calls, True), [[3913]], given)


@prop(
    "post-norm, number by number",
    "Add, then norm; the second branch reads what the first norm gave.",
)
def block_post(f: Function, rng: Generator) -> None:
    # x 1: attended 3, sum 4, normed 40; times 3 is 120, sum 160, normed 16000.
    calls = (lambda y: y + 2, lambda y: 3 * y, lambda y: 10 * y, lambda y: 100 * y)
    given = "x 1, attend y + 2, network 3 y, norm1 10 y, norm2 100 y, post-norm"
    expect(f(f64([[1]]), *calls, False), [[16000]], given)


@prop("post-norm ends with a norm", "What leaves a post-norm block has mean 0 and variance 1.")
def block_ends(f: Function, rng: Generator) -> None:
    got = tensor(f(3 * normal(rng, 3, 5), _silent, _unit, _unit, _unit, False), "post-norm")
    expect(got.std(dim=-1, correction=0), [1, 1, 1], "post-norm; deviation of each word", tol=1e-3)


RUN_BLOCK = Task(
    "10.3",
    run_block,
    (block_passes, block_pre, block_ends, block_post),
    MUTANTS["10.3"],
)


# 10.4


def fold_norm(
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    matrix: Float[Tensor, "N C"],
    shift: Float[Tensor, " N"],
) -> tuple[Float[Tensor, "N C"], Float[Tensor, " N"]]:
    return matrix * weight, shift + matrix @ bias


def _folded(f: Function, given: str, *parts: Tensor) -> None:
    weight, bias, matrix, shift = parts
    new_matrix, new_shift = several(f(*parts), 2, given)
    plain = _unit(f64([[9, 1, 3], [0, 2, 7], [1, 1, 4], [-5, 0, 1]]))
    want = functional.linear(plain * weight + bias, matrix, shift)
    new_matrix, new_shift = tensor(new_matrix, given), tensor(new_shift, given)
    if new_matrix.shape != matrix.shape or new_shift.shape != shift.shape:
        shapes = f"shapes {tuple(matrix.shape)} and {tuple(shift.shape)}"
        got = f"shapes {tuple(new_matrix.shape)} and {tuple(new_shift.shape)}"
        raise Wrong(shown(given, shapes, got))
    expect(functional.linear(plain, new_matrix, new_shift), want, f"{given}; what the layer says")


@prop("a plain norm", "Weight 1, bias 0: there is nothing to fold.")
def fold_plain(f: Function, rng: Generator) -> None:
    one, zero = torch.ones(3).double(), torch.zeros(3).double()
    _folded(f, "weight 1, bias 0", one, zero, normal(rng, 2, 3), normal(rng, 2))


@prop("the weight", "Each channel of the norm meets one column of the matrix.")
def fold_weight(f: Function, rng: Generator) -> None:
    weight, zero = f64([2, 3, 5]), torch.zeros(3).double()
    _folded(f, "weight (2, 3, 5), bias 0", weight, zero, normal(rng, 2, 3), normal(rng, 2))
    _folded(f, "as many outputs as channels", weight, zero, normal(rng, 3, 3), normal(rng, 3))


@prop("the bias", "A constant before the matrix is another constant behind it.")
def fold_bias(f: Function, rng: Generator) -> None:
    one, bias = torch.ones(3).double(), f64([1, -2, 4])
    _folded(f, "weight 1, bias (1, -2, 4)", one, bias, normal(rng, 2, 3), normal(rng, 2))


@prop("both", "Does the bias meet the old matrix or the new one?")
def fold_both(f: Function, rng: Generator) -> None:
    parts = normal(rng, 3), normal(rng, 3), normal(rng, 5, 3), normal(rng, 5)
    _folded(f, "random weight and bias, five outputs", *parts)


FOLD = Task("10.4", fold_norm, (fold_plain, fold_weight, fold_bias, fold_both), MUTANTS["10.4"])


# 10.5


def share_apart(x: Float[Tensor, "T C"]) -> float:
    common = x.mean(dim=0, keepdim=True)
    length = x.norm().item()
    return (x - common).norm().item() / length if length else 0.0


@prop("words all alike", "Equal rows: nothing is left when the common row is off.")
def apart_alike(f: Function, rng: Generator) -> None:
    expect(f(f64([[1, 2], [1, 2], [1, 2]])), 0.0, "three times (1, 2)")


@prop("words that cancel", "Rows whose mean is zero have nothing in common.")
def apart_cancel(f: Function, rng: Generator) -> None:
    expect(f(f64([[3, 4], [-3, -4]])), 1.0, "(3, 4) and (-3, -4)")


@prop("by hand", "Lengths of the whole matrix, over all entries together.")
def apart_by_hand(f: Function, rng: Generator) -> None:
    # The mean is (2, 2); (2, 0), (-2, 0) are left: 8 of 24.
    expect(f(f64([[4, 2], [0, 2]])), (8 / 24) ** 0.5, "(4, 2) and (0, 2)")


@prop("size does not matter", "Multiply all words by 1000: the share stays.")
def apart_scale(f: Function, rng: Generator) -> None:
    x = normal(rng, 5, 7) + 1
    expect(f(1000 * x), share_apart(x), "five random words, a thousand times longer")


@prop("nothing at all", "Words of zeros: 0, not 0 / 0.")
def apart_zero(f: Function, rng: Generator) -> None:
    expect(f(torch.zeros(3, 2).double()), 0.0, "three words of zeros")


APART = Task(
    "10.5",
    share_apart,
    (apart_alike, apart_cancel, apart_by_hand, apart_scale, apart_zero),
    MUTANTS["10.5"],
)


# 10.6


def matched_width(d_model: int, n_matrices: int, multiple: int) -> int:
    parts = n_matrices * multiple
    return -(-8 * d_model // parts) * multiple


def _width(f: Function, given: str, *sizes: int) -> None:
    expect(f(*sizes), matched_width(*sizes), f"{given}: {sizes}", tol=0)


@prop("two matrices", "A plain network of two matrices is 4 d_model wide.")
def width_two(f: Function, rng: Generator) -> None:
    _width(f, "two matrices", 768, 2, 1)


@prop(
    "three matrices", "Three matrices of d_model times the width weigh what 8 d_model squared do."
)
def width_three(f: Function, rng: Generator) -> None:
    _width(f, "three matrices, whole", 48, 3, 1)


@prop("rounded up", "To the next multiple above, unless it is one already.")
def width_up(f: Function, rng: Generator) -> None:
    _width(f, "Llama 7B", 4096, 3, 256)
    _width(f, "Llama 13B", 5120, 3, 256)
    _width(f, "a multiple already", 96, 3, 256)


@prop("not a whole number", "8 d_model / 3 need not be whole. Never lighter than the plain one.")
def width_fraction(f: Function, rng: Generator) -> None:
    _width(f, "three matrices", 64, 3, 1)
    _width(f, "three matrices", 50, 3, 1)


@prop("exact", "Whole numbers only: a float has 53 bits.")
def width_exact(f: Function, rng: Generator) -> None:
    got, want = f(3 * 2**60 + 3, 3, 1), 8 * 2**60 + 8
    if not isinstance(got, int) or got != want:
        raise Wrong(shown(f"d_model {3 * 2**60 + 3}, three matrices", str(want), str(got)))


WIDTH = Task(
    "10.6",
    matched_width,
    (width_two, width_three, width_up, width_fraction, width_exact),
    MUTANTS["10.6"],
)


# 10.7


def normed(
    x: Float[Tensor, "B T C"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "B T C"]:
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + eps) ** 0.5 * weight + bias


def norm_test(implementation: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = normal(rng, 2, 5, 4), normal(rng, 4), normal(rng, 4)
    got, want = implementation(x, weight, bias, 0.1), _theirs(x, weight, bias, 0.1)
    assert (got - want).abs().max() < 1e-9


NORM_TEST = write_the_test(
    "10.7",
    norm_test,
    normed,
    _theirs,
    (
        Bug(
            "over the words of a text",
            "jadore801120/attention-is-all-you-need-pytorch#17",
            "The shape is right. Change one word and look at another; and use more than one word.",
            {"mean(-1": "mean(1", "var(-1": "var(1"},
        ),
        Bug(
            "over words and channels together",
            "Qualcomm-AI-research/geometric-algebra-transformer#8",
            "The whole text has mean 0 and variance 1, and no single word has.",
            {"mean(-1": "mean((1, 2)", "var(-1": "var((1, 2)"},
        ),
        Bug(
            "divided by n - 1",
            "harvardnlp/annotated-transformer#119",
            "The wider the rows, the smaller the error: use narrow ones, and a small tolerance.",
            {"correction=0": "correction=1"},
        ),
        Bug(
            "eps beside the root",
            "hkproj/pytorch-transformer#31",
            "With an eps of 1e-5 nobody sees it. Who says that eps must be small?",
            {"(variance + eps) ** 0.5": "(variance**0.5 + eps)"},
        ),
        Bug(
            "squared where a root belongs",
            "131250208/TPlinker-joint-extraction#37",
            "Rows of variance one hide it.",
            {"(variance + eps) ** 0.5": "(variance + eps) ** 2"},
        ),
    ),
    MUTANTS["10.7"],
)


# A norm to do by hand


@cache
def rows() -> list[tuple[int, int, int, int]]:
    """Four whole numbers whose mean, deviation and root mean square are whole, and not zero."""
    found = []
    for row in combinations_with_replacement(range(-9, 16), 4):
        total, square = sum(row), sum(x * x for x in row)
        variance = 4 * square - total**2  # times 16
        if total % 4 == 0 and total and square % 4 == 0 and variance % 16 == 0 and variance:
            if all(isqrt(n) ** 2 == n for n in (square // 4, variance // 16)):
                found.append(row)
    return found


@dataclass(frozen=True, repr=False)
class Problem:
    """One word of width 4 and the gradient of its norm: all answers are fractions."""

    random_seed: int
    x: tuple[int, ...]
    d_y: tuple[int, ...]

    @property
    def mean(self) -> int:
        return sum(self.x) // 4

    @property
    def std(self) -> int:
        return isqrt(sum((x - self.mean) ** 2 for x in self.x) // 4)

    @property
    def rms(self) -> int:
        return isqrt(sum(x * x for x in self.x) // 4)

    def _back(self, hat: list[Fraction], divide_by: int, centre: bool) -> list[Fraction]:
        along = sum((g * h for g, h in zip(self.d_y, hat, strict=True)), Fraction(0)) / 4
        mean = Fraction(sum(self.d_y), 4) if centre else 0
        return [(g - mean - h * along) / divide_by for g, h in zip(self.d_y, hat, strict=True)]

    @property
    def answer(self) -> dict[str, list[Fraction]]:
        """Both norms, and the gradients that come back through them, with weight 1 and eps 0."""
        layer = [Fraction(x - self.mean, self.std) for x in self.x]
        rms = [Fraction(x, self.rms) for x in self.x]
        return {
            "layer": layer,
            "rms": rms,
            "d_layer": self._back(layer, self.std, True),
            "d_rms": self._back(rms, self.rms, False),
        }

    def tensors(self) -> tuple[Tensor, Tensor]:
        return f64([self.x]), f64([self.d_y])

    def __repr__(self) -> str:
        return (
            f"Problem {self.random_seed}: x = {self.x}, dy = {self.d_y}, weight 1, eps 0\n"
            "Give LayerNorm(x) and RMSNorm(x) as fractions, then dx for each of the two."
        )

    def worked(self) -> str:
        """Step by step, with this problem's numbers."""
        a = self.answer
        left = [x - self.mean for x in self.x]
        squares = " + ".join(f"{in_brackets(x)}²" for x in left)
        whole = " + ".join(f"{in_brackets(x)}²" for x in self.x)

        def row(name: str) -> str:
            return f"({', '.join(map(str, a[name]))})"

        along = sum((g * h for g, h in zip(self.d_y, a["layer"], strict=True)), Fraction(0)) / 4
        through = sum((g * h for g, h in zip(self.d_y, a["rms"], strict=True)), Fraction(0)) / 4
        return "\n".join(
            [
                f"1. Mean {sum(self.x)}/4 = {self.mean}; left over ({', '.join(map(str, left))}).",
                f"2. Variance ({squares})/4 = {self.std**2}, root {self.std}."
                f"  LayerNorm(x) = {row('layer')}",
                f"3. Mean square ({whole})/4 = {self.rms**2} = {self.mean}² + {self.std}²,"
                f" root {self.rms}.  RMSNorm(x) = {row('rms')}",
                f"4. Mean of dy {Fraction(sum(self.d_y), 4)}, mean of dy times LayerNorm(x)"
                f" {along}.  (dy - mean - LayerNorm(x)·{in_brackets(along)})/{self.std}"
                f" = {row('d_layer')}",
                f"5. Mean of dy times RMSNorm(x) {through}."
                f"  (dy - RMSNorm(x)·{in_brackets(through)})/{self.rms} = {row('d_rms')}",
            ]
        )


def problem(random_seed: int) -> Problem:
    """A norm for paper: whole mean, deviation and root mean square."""
    rng = random.Random(f"block {random_seed}")
    x = list(rng.choice([row for row in rows() if len(set(row)) > 2]))
    rng.shuffle(x)
    d_y = [rng.choice((-4, -2, 0, 0, 2, 4, 6)) for _ in x]
    while len(set(d_y)) < 2:
        d_y = [rng.choice((-4, -2, 0, 0, 2, 4, 6)) for _ in x]
    return Problem(random_seed, tuple(x), tuple(d_y))


TASKS = (LAYER_NORM, BACKWARD, RUN_BLOCK, FOLD, APART, WIDTH, NORM_TEST)
