"""Chapter 01, sequences: the checks of its seven tasks, and `problem`, a recurrence by hand.

T words of a text, n where the text is alone · B texts · C width of a word or a state · E width of
what comes out, or of a word that a state of width C reads · k kernel width. Word t is row t - 1.
"""

import math
import random
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import conv1d, pad

from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, expect, normal

MUTANTS = mutants(__file__)


def f64(x: object) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


# 01.1


def shares(a: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    later = torch.cat([a[1:], torch.ones_like(a[:1])])
    return later.flip(0).cumprod(0).flip(0)


@prop("one for each word", "n words, n derivatives.")
def one_each(f: Function, rng: Generator) -> None:
    expect(list(getattr(f(normal(rng, 5)), "shape", ())), [5], "five factors; the shape:")


@prop("the last word", "The last word is added to the last state as it is.")
def last_word(f: Function, rng: Generator) -> None:
    expect(f(normal(rng, 5))[-1], 1, "five factors; the share of the last word:")


@prop("one half", "Every step later than the word multiplies it once. How many are there?")
def one_half(f: Function, rng: Generator) -> None:
    want = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    expect(
        16 * f(f64([0.5] * 5)), [16 * x for x in want], "a = 1/2 five times; 16 times the shares"
    )


@prop("the first factor", "There is no state before the first word that it could multiply.")
def first_factor(f: Function, rng: Generator) -> None:
    expect(f(f64([7, 2, 3])), [6, 3, 1], "factors 7, 2, 3")


@prop("a step that forgets", "A factor of 0 wipes out all that came before it, and nothing else.")
def forgets(f: Function, rng: Generator) -> None:
    expect(f(f64([2, 3, 0, 5, 2])), [0, 0, 10, 2, 1], "factors 2, 3, 0, 5, 2")


@prop("fresh numbers", "Compare with torch.autograd.grad of a loop over the words.")
def fresh_shares(f: Function, rng: Generator) -> None:
    a = normal(rng, 11)
    expect(f(a), shares(a), "eleven random factors")


SHARES = Task(
    "01.1",
    shares,
    (one_each, last_word, one_half, first_factor, forgets, fresh_shares),
    MUTANTS["01.1"],
)


# 01.2


def field(k: int, dilations: list[int]) -> int:
    return 1 + (k - 1) * sum(dilations)


def _field(f: Function, k: int, dilations: list[int]) -> None:
    expect(f(k, dilations), field(k, dilations), f"width {k}, dilations {dilations}")


@prop("no layer", "Without a layer an output is the word itself.")
def no_layer(f: Function, rng: Generator) -> None:
    _field(f, 3, [])


@prop("one layer", "A kernel of width k touches k places: its own, and k - 1 before it.")
def one_layer(f: Function, rng: Generator) -> None:
    _field(f, 5, [1])


@prop("two layers", "The second layer reads outputs that have already looked back. What is added?")
def two_layers(f: Function, rng: Generator) -> None:
    _field(f, 3, [1, 1])


@prop("one dilated layer", "The places lie d apart. How far back is the last of them?")
def dilated_layer(f: Function, rng: Generator) -> None:
    _field(f, 3, [4])


@prop("any dilations", "They need not double, and may repeat. Walk back layer by layer.")
def any_dilations(f: Function, rng: Generator) -> None:
    _field(f, 2, [2**i for i in range(10)] * 3)
    _field(f, 4, torch.randint(1, 9, (5,), generator=rng).tolist())


FIELD = Task(
    "01.2", field, (no_layer, one_layer, two_layers, dilated_layer, any_dilations), MUTANTS["01.2"]
)


# 01.3


def layers_needed(n: int, k: int, growth: int) -> int:
    layers, reach, dilation = 0, 1, 1
    while reach < n:
        reach += (k - 1) * dilation
        dilation *= growth
        layers += 1
    return layers


def _layers(f: Function, n: int, k: int, growth: int) -> None:
    got = f(n, k, growth)
    expect(got, layers_needed(n, k, growth), f"{n} words, width {k}, dilations 1, {growth}, ...")


@prop("one word", "Word 1 is its own output: nothing has to be carried anywhere.")
def one_word(f: Function, rng: Generator) -> None:
    _layers(f, 1, 3, 2)


@prop("plain layers", "Each reaches k - 1 places further, and 99 are needed: not 100.")
def plain_layers(f: Function, rng: Generator) -> None:
    _layers(f, 100, 3, 1)
    _layers(f, 100, 4, 1)


@prop("a tight fit", "When is the last place reached exactly, and when is one more layer needed?")
def tight(f: Function, rng: Generator) -> None:
    for n in (101, 102):
        _layers(f, n, 3, 1)
    for n in (63, 64):
        _layers(f, n, 3, 2)


@prop("doubling", "Dilations 1, 2, 4, ...: the first layer still has dilation 1.")
def doubling(f: Function, rng: Generator) -> None:
    _layers(f, 100, 3, 2)
    _layers(f, 1000, 2, 2)


@prop(
    "as fast as the width", "Exact powers: is a logarithm in floating point ever a bit too large?"
)
def powers(f: Function, rng: Generator) -> None:
    for n, k in ((243, 3), (244, 3), (125, 5), (1000, 10), (1001, 10)):
        _layers(f, n, k, k)


LAYERS_NEEDED = Task(
    "01.3", layers_needed, (one_word, plain_layers, tight, doubling, powers), MUTANTS["01.3"]
)


# 01.4


def state_jacobian(
    W: Float[Tensor, "C C"],
    U: Float[Tensor, "C E"],
    b: Float[Tensor, " C"],
    x: Float[Tensor, "n E"],
) -> Float[Tensor, "C C"]:
    h = torch.tanh(U @ x[0] + b)
    J = torch.eye(len(b), dtype=b.dtype)
    for word in x[1:]:
        h = torch.tanh(W @ h + U @ word + b)
        J = (1 - h**2)[:, None] * W @ J
    return J


def _cell(rng: Generator, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, U, b and n words: states of width 5, words of width 3."""
    return normal(rng, 5, 5) / 2, normal(rng, 5, 3) / 2, normal(rng, 5) / 2, normal(rng, n, 3)


def _autograd(W: Tensor, U: Tensor, b: Tensor, x: Tensor) -> Tensor:
    def onward(h: Tensor) -> Tensor:
        for word in x[1:]:
            h = torch.tanh(W @ h + U @ word + b)
        return h

    return torch.autograd.functional.jacobian(onward, torch.tanh(U @ x[0] + b))


@prop("one word", "With one word the first state is the last: how does a thing move with itself?")
def first_is_last(f: Function, rng: Generator) -> None:
    expect(f(*_cell(rng, 1)), torch.eye(5), "one word, C = 5")


@prop("nothing to read", "All states are 0, and tanh'(0) = 1: count the factors W.")
def still(f: Function, rng: Generator) -> None:
    W = f64([[0, 2], [1, 0]])
    got = f(W, torch.eye(2).double(), f64([0, 0]), torch.zeros(4, 2).double())
    expect(got, W @ W @ W, "four words of 0, W = [[0, 2], [1, 0]]")


@prop(
    "one step", "The slope of tanh at the state h is 1 - h². Which state, and on which side of W?"
)
def one_step(f: Function, rng: Generator) -> None:
    cell = _cell(rng, 2)
    expect(f(*cell), _autograd(*cell), "two words")


@prop("many steps", "Matrices do not commute: the latest step stands on the left.")
def many_steps(f: Function, rng: Generator) -> None:
    cell = _cell(rng, 7)
    expect(f(*cell), _autograd(*cell), "seven words")


STATE_JACOBIAN = Task(
    "01.4", state_jacobian, (first_is_last, still, one_step, many_steps), MUTANTS["01.4"]
)


# 01.5


def causal_convolution(
    x: Float[Tensor, "B T C"], W: Float[Tensor, "k E C"], dilation: int
) -> Float[Tensor, "B T E"]:
    T, k = x.shape[1], len(W)
    x = pad(x, (0, 0, (k - 1) * dilation, 0))
    start = [(k - 1 - i) * dilation for i in range(k)]
    return sum((x[:, s : s + T] @ W[i].T for i, s in enumerate(start)), torch.zeros(()))


def _by_torch(x: Tensor, W: Tensor, dilation: int) -> Tensor:
    left = (len(W) - 1) * dilation
    return conv1d(pad(x.mT, (left, 0)), W.flip(0).permute(1, 2, 0), dilation=dilation).mT


@prop("shape", "As many outputs as words, each of width E; T, C, E and k all differ.")
def conv_shape(f: Function, rng: Generator) -> None:
    got = f(normal(rng, 2, 11, 3), normal(rng, 4, 5, 3), 2)
    expect(list(getattr(got, "shape", ())), [2, 11, 5], "x (2, 11, 3), W (4, 5, 3), dilation 2")


@prop("its own place", "W[0] belongs to the word in the output's own place.")
def own_place(f: Function, rng: Generator) -> None:
    W = f64([10, 0, 0]).view(3, 1, 1)
    got = f(f64([1, 2, 3, 4]).view(1, 4, 1), W, 1)
    expect(got.flatten(), [10, 20, 30, 40], "words 1, 2, 3, 4, W = 10, 0, 0")


@prop("looking back", "W[i] belongs to the word i places before, and before the first word is 0.")
def looking_back(f: Function, rng: Generator) -> None:
    W = f64([0, 10, 1]).view(3, 1, 1)
    got = f(f64([1, 2, 3, 4]).view(1, 4, 1), W, 1)
    expect(got.flatten(), [0, 10, 21, 32], "words 1, 2, 3, 4, W = 0, 10, 1")


@prop("dilation", "The places lie d apart: i times d back. Does your padding know?")
def dilation(f: Function, rng: Generator) -> None:
    W = f64([0, 10, 1]).view(3, 1, 1)
    got = f(f64([1, 2, 3, 4, 5, 6]).view(1, 6, 1), W, 2)
    expect(got.flatten(), [0, 0, 10, 20, 31, 42], "words 1 to 6, W = 0, 10, 1, dilation 2")


@prop("further than the text", "A kernel may reach beyond the first word, or miss the text.")
def beyond(f: Function, rng: Generator) -> None:
    x, W = normal(rng, 2, 3, 2), normal(rng, 4, 5, 2)
    expect(f(x, W, 7), x @ W[0].T, "three words, width 4, dilation 7")


@prop("fresh numbers", "Each text of a batch is read by itself, with all its channels.")
def fresh_conv(f: Function, rng: Generator) -> None:
    x, W = normal(rng, 3, 13, 2), normal(rng, 3, 5, 2)
    expect(f(x, W, 4), _by_torch(x, W, 4), "three texts of 13 words, width 3, dilation 4")


CAUSAL_CONVOLUTION = Task(
    "01.5",
    causal_convolution,
    (conv_shape, own_place, looking_back, dilation, beyond, fresh_conv),
    MUTANTS["01.5"],
)


# 01.6


def scan(a: Float[Tensor, "n C"], x: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    d = 1
    while d < len(x):
        before = torch.cat([torch.zeros_like(x[:d]), x[:-d]])
        factor = torch.cat([torch.zeros_like(a[:d]), a[:-d]])
        x, a = x + a * before, a * factor
        d *= 2
    return x


def _one_by_one(a: Tensor, x: Tensor) -> Tensor:
    states = [x[0]]
    for t in range(1, len(x)):
        states.append(a[t] * states[-1] + x[t])
    return torch.stack(states)


@prop("one word", "The first state is the first word, whatever its factor says.")
def scan_one(f: Function, rng: Generator) -> None:
    expect(f(f64([[7]]), f64([[3]])), [[3]], "one factor 7, one word 3")


@prop("two words", "The second state is the first, times the second factor, plus x_2.")
def scan_two(f: Function, rng: Generator) -> None:
    expect(f(f64([[7], [2]]), f64([[3], [5]])), [[3], [11]], "factors 7, 2, words 3, 5")


@prop("four words", "After the first round a stretch holds two words. What is its factor?")
def scan_four(f: Function, rng: Generator) -> None:
    got = f(f64([7, 2, 3, 10]).view(4, 1), f64([1, 1, 1, 1]).view(4, 1))
    expect(got.flatten(), [1, 3, 10, 101], "factors 7, 2, 3, 10, words 1, 1, 1, 1")


@prop("a factor of 0", "Whoever divides by a product of factors fails here.")
def scan_zero(f: Function, rng: Generator) -> None:
    got = f(f64([1, 2, 0, 2]).view(4, 1), f64([1, 1, 1, 1]).view(4, 1))
    expect(got.flatten(), [1, 3, 1, 3], "factors 1, 2, 0, 2, words 1, 1, 1, 1")


@prop("any length", "Lengths need not be powers of two, and channels are independent.")
def scan_any(f: Function, rng: Generator) -> None:
    for n in (3, 6, 13):
        a, x = normal(rng, n, 5), normal(rng, n, 5)
        expect(f(a, x), _one_by_one(a, x), f"{n} words of width 5")


@prop(
    "few rounds", "A loop over the words takes n - 1 steps, each after the other. Double instead."
)
def few_rounds(f: Function, rng: Generator) -> None:
    n = 64
    a, x = normal(rng, n, 1).requires_grad_(), normal(rng, n, 1).requires_grad_()
    if (got := _products_in_a_row(f(a, x))) > 3 * math.log2(n):
        want = f"expected  about {math.log2(n):.0f} products, one after the other"
        raise Wrong(f"given     {n} words\n{want}\ngot       {got} of them")


def _products_in_a_row(out: Tensor) -> int:
    """The longest chain of multiplications behind a result."""
    depth: dict = {}
    todo = [out.grad_fn]
    while todo:
        below = [node for node, _ in todo[-1].next_functions if node is not None]  # type: ignore[union-attr]
        if new := [node for node in below if node not in depth]:
            todo += new
            continue
        node = todo.pop()
        product = node.name().startswith(("Mul", "Mm", "Bmm", "Addcmul", "Addmm", "Mv"))  # type: ignore[union-attr]
        depth[node] = product + max((depth[one] for one in below), default=0)
    return depth[out.grad_fn]


SCAN = Task(
    "01.6", scan, (scan_one, scan_two, scan_four, scan_zero, scan_any, few_rounds), MUTANTS["01.6"]
)


# 01.7


def dilated(x: Tensor, W: Tensor, d: int) -> Tensor:
    left, right = (len(W) - 1) * d, 0
    x = pad(x.mT, (left, right), mode="constant")
    return conv1d(x, W.flip(0).permute(1, 2, 0), dilation=d).mT


def place_by_place(x: Tensor, W: Tensor, d: int) -> Tensor:
    """The same, one output after the other, from the definition."""
    rows = []
    for t in range(x.shape[1]):
        seen = [(t - i * d, matrix) for i, matrix in enumerate(W) if i * d <= t]
        terms = [torch.einsum("ec,bc->be", matrix, x[:, s]) for s, matrix in seen]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows, dim=1)


def convolution_test(implementation: Function) -> None:
    for k, d in ((3, 2), (2, 3), (3, 1)):
        W = torch.randn(k, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = torch.randn(1, 12, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        J = torch.autograd.functional.jacobian(lambda x: implementation(x, W, d), x)  # noqa: B023
        bands = [torch.diag(w.expand(12 - i * d), -i * d) for i, w in enumerate(W[:, 0, 0])]
        assert torch.allclose(J[0, :, 0, 0, :, 0], torch.stack(bands).sum(0))


CONVOLUTION_TEST = write_the_test(
    "01.7",
    convolution_test,
    dilated,
    place_by_place,
    (
        Bug(
            "padded on both sides",
            "golbin/WaveNet#5",
            "Lengths are as they should be, and half of what an output sees lies ahead of it.",
            {
                "left, right = (len(W) - 1) * d, 0": "left = (len(W) - 1) * d // 2\n"
                "    right = (len(W) - 1) * d - left"
            },
        ),
        Bug(
            "dilation silently ignored",
            "fastmachinelearning/hls4ml#1508",
            "At which dilation would nobody notice?",
            {"(len(W) - 1) * d,": "len(W) - 1,", "dilation=d": "dilation=1"},
        ),
        Bug(
            "shifted by half the kernel and half the dilation",
            "sjvasquez/web-traffic-forecasting#2",
            "For some widths and dilations the formula is right. Try more than one pair.",
            {
                "left, right = (len(W) - 1) * d, 0": "left = len(W) // 2 + (d - 1) // 2\n"
                "    right = (len(W) - 1) * d - left"
            },
        ),
        Bug(
            "the wrong words grouped together",
            "ibab/tensorflow-wavenet#29",
            "The text was cut into blocks where every d-th word was meant. Look which words count.",
            {
                "    x = pad(": "    if d > 1 and x.shape[1] % d == 0:\n"
                "        x = x.unflatten(1, (d, -1)).transpose(1, 2).flatten(1, 2)\n    x = pad("
            },
        ),
        Bug(
            "filled up by reflection",
            "lucidrains/audiolm-pytorch#166",
            "Before the first word stands a mirror: the first outputs see words that come later.",
            {'"constant"': '"reflect"'},
        ),
    ),
    MUTANTS["01.7"],
)


@dataclass(frozen=True, repr=False)
class Problem:
    """h_t = a h_(t-1) + x_t from h_0 = 0: a scalar RNN without a tanh, in fractions."""

    random_seed: int
    a: Fraction
    words: tuple[int, ...]

    @property
    def states(self) -> list[Fraction]:
        h, states = Fraction(0), []
        for x in self.words:
            h = self.a * h + x
            states.append(h)
        return states

    @property
    def shares(self) -> list[Fraction]:
        """The derivative of the last state with respect to each word."""
        return [self.a**back for back in reversed(range(len(self.words)))]

    @property
    def distance(self) -> int:
        """How many steps it takes until a word counts less than 1/100, or more than 100."""
        limit, steps = 100, 0
        while Fraction(1, limit) <= abs(self.a) ** steps <= limit:
            steps += 1
        return steps

    @property
    def answer(self) -> dict[str, object]:
        return {"state": self.states[-1], "shares": self.shares, "distance": self.distance}

    @property
    def _turn(self) -> str:
        return "less than 1/100 of" if abs(self.a) < 1 else "more than 100 times"

    def __repr__(self) -> str:
        n = len(self.words)
        words = ", ".join(f"x{t} = {x}" for t, x in enumerate(self.words, 1))
        return "\n".join(
            [
                f"Problem {self.random_seed}: h_t = a h_(t-1) + x_t, h_0 = 0, a = {self.a}",
                f"  {words}",
                f"Give h_{n}, its derivative with respect to each word, and the number of steps",
                f"after which a word counts {self._turn} what it did (up to its sign).",
            ]
        )

    def worked(self) -> str:
        """Step by step with this problem's numbers."""
        n, a = len(self.words), self.a
        before = [Fraction(0), *self.states]
        states = [
            f"   h_{t} = {_factor(a)}·{_factor(h)} + {_factor(x)} = {a * h + x}"
            for t, (h, x) in enumerate(zip(before, self.words, strict=False), 1)
        ]
        shares = ", ".join(f"a^{n - t} = {s}" for t, s in enumerate(self.shares, 1))
        near, far = abs(a) ** (self.distance - 1), abs(a) ** self.distance
        return "\n".join(
            [
                "1. States",
                *states,
                f"2. Derivatives of h_{n}, for words 1 to {n}",
                f"   {shares}",
                f"3. Distance: |a|^{self.distance - 1} = {near}, |a|^{self.distance} = {far},"
                f" so {self.distance} steps",
            ]
        )


def _factor(x: Fraction | int) -> str:
    return f"({x})" if x < 0 or Fraction(x).denominator > 1 else f"{x}"


def problem(random_seed: int) -> Problem:
    """A fresh recurrence for paper: every number in it is a fraction."""
    rng = random.Random(random_seed)
    a = Fraction(rng.choice("1/2 -1/2 1/3 -1/3 2/3 -2/3 3/2 2 -2 1/4 3/4".split()))
    words = tuple(rng.randint(-4, 6) for _ in range(rng.choice([3, 4, 5])))
    if len(set(words)) == 1 or not words[0]:
        return Problem(random_seed, a, (*range(1, len(words) + 1),))
    return Problem(random_seed, a, words)


TASKS = (
    SHARES,
    FIELD,
    LAYERS_NEEDED,
    STATE_JACOBIAN,
    CAUSAL_CONVOLUTION,
    SCAN,
    CONVOLUTION_TEST,
)
