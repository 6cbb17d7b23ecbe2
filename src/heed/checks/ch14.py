"""Chapter 14, training: the checks of its eight tasks, and `problem`, two steps of Adam by hand.

N weights · T steps · M pieces of a batch · V words · R rows · C columns of a matrix.
"""

import math
import random
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.ch04 import f64
from heed.checks.compare import Wrong, expect, in_brackets, normal, several, tensor

MUTANTS = mutants(__file__)


# 14.1


def adamw(
    theta: Float[Tensor, " N"],
    gradients: Float[Tensor, "T N"],
    lr: float,
    betas: tuple[float, float],
    decay: float,
) -> Float[Tensor, " N"]:
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        theta = theta - lr * decay * theta - lr * m_hat / (v_hat.sqrt() + 1e-8)
    return theta


def torch_adamw(theta: Tensor, gradients: Tensor, **how: object) -> Tensor:
    weight = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([weight], **how)  # type: ignore[arg-type]
    for g in gradients:
        weight.grad = g.clone()
        optimizer.step()
    return weight.detach()


@prop("the first step", "What is left of g over the root of g squared?")
def first_step(f: Function, rng: Generator) -> None:
    got = f(f64([1, 1, 1]), f64([[1000, 0.001, -7]]), 0.1, (0.9, 0.999), 0.0)
    expect(got, [0.9, 0.9, 1.1], "weights 1, 1, 1, gradients 1000, 0.001, -7, lr 0.1", 1e-4)


@prop("two steps by hand", "Chapter 14 works this one in fractions, but with a decay.")
def two_steps(f: Function, rng: Generator) -> None:
    got = f(f64([1]), f64([[5], [1]]), 0.1, (0.5, 0.5), 0.0)
    want = [1 - 0.1 - 7 / 90]
    expect(got, want, "weight 1, gradients 5 and 1, both betas 1/2, lr 0.1", 1e-7)


@prop("two betas", "One for the mean of the gradients, another for the mean of their squares.")
def two_betas(f: Function, rng: Generator) -> None:
    how, g = dict(lr=0.1, betas=(0.5, 0.75), weight_decay=0.0), f64([[3], [-1]])
    got = f(f64([1]), g, 0.1, (0.5, 0.75), 0.0)
    expect(got, torch_adamw(f64([1]), g, **how), "gradients 3 and -1, betas 1/2 and 3/4", 1e-7)


@prop("the decay is apart", "This weight has no gradient. How far does the decay alone move it?")
def decay_apart(f: Function, rng: Generator) -> None:
    got = f(f64([3]), f64([[0]]), 0.1, (0.9, 0.999), 0.5)
    expect(got, [2.85], "weight 3, gradient 0, lr 0.1, decay 0.5", 1e-7)


@prop("no gradient, no decay", "0 over 0 is no number: what keeps the denominator above 0?")
def nothing(f: Function, rng: Generator) -> None:
    got = f(f64([2]), f64([[0]]), 0.1, (0.9, 0.999), 0.0)
    expect(got, [2], "weight 2, gradient 0, no decay")


@prop("as torch does", "Many weights and steps: torch.optim.AdamW, whose epsilon is 1e-8.")
def as_torch(f: Function, rng: Generator) -> None:
    theta, g = normal(rng, 7), normal(rng, 11, 7)
    want = torch_adamw(theta, g, lr=0.03, betas=(0.9, 0.95), weight_decay=0.2)
    expect(f(theta, g, 0.03, (0.9, 0.95), 0.2), want, "7 weights, 11 steps, decay 0.2", 1e-9)


ADAMW = Task(
    "14.1",
    adamw,
    (first_step, two_steps, two_betas, nothing, decay_apart, as_torch),
    MUTANTS["14.1"],
)


# 14.2


def learning_rate(step: int, steps: int, warmup: int, floor: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def _rate(f: Function, step: int, want: float, steps: int = 50, warmup: int = 10) -> None:
    given = f"step {step} of {steps}, warm-up {warmup}, floor 0.1"
    expect(f(step, steps, warmup, 0.1), want, given)


@prop("the first step teaches", "Steps count from 0, and a rate of 0 would waste the first one.")
def first_rate(f: Function, rng: Generator) -> None:
    _rate(f, 0, 0.1)


@prop("a straight line", "After w steps, counted from 0, the rate is full.")
def line(f: Function, rng: Generator) -> None:
    _rate(f, 4, 0.5)
    _rate(f, 9, 1)


@prop("no jump at the top", "The cosine starts where the line ends.")
def top(f: Function, rng: Generator) -> None:
    _rate(f, 10, 1)


@prop("half-way down", "Half-way between the end of the warm-up and the end of the run.")
def half_way(f: Function, rng: Generator) -> None:
    _rate(f, 30, 0.55)


@prop("a cosine", "A quarter of the way down the cosine has lost little: cos(45 degrees).")
def quarter(f: Function, rng: Generator) -> None:
    _rate(f, 20, 0.1 + 0.9 * (1 + 0.5**0.5) / 2)


@prop("no warm-up", "With a warm-up of 0 steps the first rate is the full one.")
def no_warmup(f: Function, rng: Generator) -> None:
    _rate(f, 0, 1, warmup=0)


LEARNING_RATE = Task(
    "14.2",
    learning_rate,
    (first_rate, line, top, half_way, quarter, no_warmup),
    MUTANTS["14.2"],
)


# 14.3


def clip(gradients: list[Tensor], limit: float) -> list[Tensor]:
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    return [g * min(1.0, limit / norm) if norm else g for g in gradients]


def _clipped(f: Function, gradients: list, limit: float, want: list, given: str) -> None:
    got = several(f([f64(g) for g in gradients], limit), len(gradients), given)
    flat = torch.cat([tensor(g, given).flatten() for g in got])
    expect(flat, torch.cat([f64(w).flatten() for w in want]), given)


@prop("one tensor", "Its norm is 5. What must it be multiplied by?")
def one_tensor(f: Function, rng: Generator) -> None:
    _clipped(f, [[3, 4]], 1, [[0.6, 0.8]], "gradient (3, 4), limit 1")


@prop("short ones stay", "Clipping only shortens.")
def short(f: Function, rng: Generator) -> None:
    _clipped(f, [[0.3, 0.4]], 1, [[0.3, 0.4]], "gradient (0.3, 0.4), limit 1")


@prop("all as one vector", "One norm over all tensors, and one factor for all of them.")
def together(f: Function, rng: Generator) -> None:
    want = [[3 / 13, 4 / 13], [12 / 13]]
    _clipped(f, [[3, 4], [12]], 1, want, "gradients (3, 4) and (12), limit 1")


@prop("matrices", "Every number counts, whatever the shape.")
def matrices(f: Function, rng: Generator) -> None:
    want = [[[2, 2], [2, 2]], [3.0]]
    _clipped(f, [[[4, 4], [4, 4]], [6]], 5, want, "a 2 x 2 matrix of 4s and a 6, limit 5")


@prop("all zero", "A norm of 0 divides nothing.")
def all_zero(f: Function, rng: Generator) -> None:
    _clipped(f, [[0, 0]], 1, [[0, 0]], "gradient (0, 0), limit 1")


CLIP = Task("14.3", clip, (one_tensor, short, together, matrices, all_zero), MUTANTS["14.3"])


# 14.4


def accumulate(gradients: Float[Tensor, "M N"], counts: Int[Tensor, " M"]) -> Float[Tensor, " N"]:
    shares = counts / counts.sum()
    kept = torch.where(counts[:, None] > 0, gradients, 0)
    return (shares[:, None] * kept).sum(dim=0)


@prop("equal pieces", "Then it is the plain mean.")
def equal_pieces(f: Function, rng: Generator) -> None:
    expect(f(f64([[1, 2], [3, 6]]), torch.tensor([7, 7])), [2, 4], "two pieces of 7 words")


@prop("three words and one", "The total over all words, divided by all words.")
def three_and_one(f: Function, rng: Generator) -> None:
    expect(f(f64([[1], [5]]), torch.tensor([3, 1])), [2], "means 1 of 3 words, 5 of 1 word")


@prop("as one batch", "Cut a batch of words at any places: nothing may change.")
def as_one(f: Function, rng: Generator) -> None:
    words, counts = normal(rng, 17, 5), torch.tensor([2, 11, 4])
    means = torch.stack([piece.mean(0) for piece in words.split(counts.tolist())])
    expect(f(means, counts), words.mean(0), "17 words in pieces of 2, 11 and 4")


@prop("an empty piece", "The mean over no words is no number, and must not be multiplied by 0.")
def empty_piece(f: Function, rng: Generator) -> None:
    got = f(f64([[math.nan], [5]]), torch.tensor([0, 3]))
    expect(got, [5], "mean nan of 0 words, 5 of 3 words")


ACCUMULATE = Task(
    "14.4", accumulate, (equal_pieces, three_and_one, as_one, empty_piece), MUTANTS["14.4"]
)


# 14.5


def dropout(
    x: Float[Tensor, "*N"], p: float, training: bool, generator: Generator
) -> Float[Tensor, "*N"]:
    if not training:
        return x
    kept = torch.rand(x.shape, generator=generator) >= p
    return x * kept / (1 - p)


@prop("nothing in evaluation", "The mean was kept in training, so there is nothing to make good.")
def evaluation(f: Function, rng: Generator) -> None:
    x = normal(rng, 5, 7)
    expect(f(x, 0.2, False, rng), x, "training False, 5 x 7 numbers")


@prop("the right share", "p is the probability to be dropped.")
def right_share(f: Function, rng: Generator) -> None:
    out = tensor(f(torch.ones(101, 103).double(), 0.2, True, rng), "10,403 ones, p = 0.2")
    expect((out == 0).double().mean(), 0.2, "10,403 ones, p = 0.2; share of zeros", 0.03)


@prop("the mean is kept", "Survivors are divided by the probability to survive.")
def mean_kept(f: Function, rng: Generator) -> None:
    out = tensor(f(torch.full((101, 103), 3.0).double(), 0.2, True, rng), "10,403 threes")
    expect(out[out != 0], torch.full_like(out[out != 0], 3.75), "threes, p = 0.2; the survivors")


@prop("number by number", "Every number is drawn for itself, not every row.")
def each_number(f: Function, rng: Generator) -> None:
    rows = tensor(f(torch.ones(101, 103).double(), 0.5, True, rng), "ones").bool().double()
    spread = max(rows.mean(0).std().item(), rows.mean(1).std().item())
    if spread > 0.15:
        given = "given     101 x 103 ones, p = 0.5"
        want = "expected  about half of every row and of every column"
        raise Wrong(f"{given}\n{want}\ngot       shares that spread by {spread:.2f}")


@prop("the generator decides", "Draw from the generator that you were given.")
def by_generator(f: Function, rng: Generator) -> None:
    x = torch.ones(101).double()
    one, again, other = (f(x, 0.5, True, Generator().manual_seed(s)) for s in (1, 1, 2))
    expect(again, one, "two generators with one random seed")
    if torch.equal(tensor(one, "ones"), tensor(other, "ones")):
        given = "given     two generators with different random seeds"
        raise Wrong(f"{given}\nexpected  two patterns\ngot       one, both times")


DROPOUT = Task(
    "14.5",
    dropout,
    (evaluation, each_number, right_share, mean_kept, by_generator),
    MUTANTS["14.5"],
)


# 14.6


def orthogonal(G: Float[Tensor, "R C"], rounds: int) -> Float[Tensor, "R C"]:
    X = G / G.norm()
    for _ in range(rounds):
        X = 1.5 * X - 0.5 * X @ X.mT @ X
    return X


@prop("one number", "A 1 x 1 matrix is its own singular value, with a sign.")
def one_number(f: Function, rng: Generator) -> None:
    expect(f(f64([[-8]]), 3), [[-1]], "the matrix (-8), 3 rounds")


@prop(
    "one round by hand", "Divide by the root of the sum of squares; then s becomes 3/2 s - 1/2 s³."
)
def one_round(f: Function, rng: Generator) -> None:
    want = torch.diag(f64([1.5 * s - 0.5 * s**3 for s in (0.6, 0.8)]))
    expect(f(f64([[3, 0], [0, 4]]), 1), want, "the diagonal matrix (3, 4), one round")


@prop("the size does not matter", "G and 1000 G have the same directions.")
def any_size(f: Function, rng: Generator) -> None:
    G = normal(rng, 3, 5)
    expect(f(1000 * G, 2), f(G, 2), "1000 G against G, two rounds")


@prop("towards U Vᵀ", "After many rounds all singular values are 1. Use all the rounds.")
def towards(f: Function, rng: Generator) -> None:
    for shape in ((5, 5), (3, 7)):
        U, _, Vh = torch.linalg.svd(normal(rng, *shape), full_matrices=False)
        s = torch.linspace(1, 2, min(shape), dtype=torch.float64)
        expect(f(U * s @ Vh, 20), U @ Vh, f"{shape[0]} x {shape[1]}, values 1 to 2, 20 rounds")


ORTHOGONAL = Task("14.6", orthogonal, (one_number, one_round, any_size, towards), MUTANTS["14.6"])


# 14.7


def nucleus(p: Float[Tensor, " V"], share: float) -> Float[Tensor, " V"]:
    ordered, order = p.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered  # what the likelier words hold
    kept = torch.where(before < share, ordered, 0)
    return torch.zeros_like(p).scatter(0, order, kept / kept.sum())


@prop("sums to 1", "What is left is a distribution again.")
def sums_to_one(f: Function, rng: Generator) -> None:
    got = tensor(f(normal(rng, 11).softmax(0), 0.7), "eleven words")
    expect(got.sum(), 1, "eleven words, share 0.7; the sum")


@prop(
    "the crossing word stays", "The fewest words that hold the share. 0.5 alone does not hold 0.7."
)
def crossing(f: Function, rng: Generator) -> None:
    expect(f(f64([0.5, 0.3, 0.2]), 0.7), [0.625, 0.375, 0], "0.5, 0.3, 0.2, share 0.7")


@prop("never empty", "The likeliest word holds more than the share alone.")
def never_empty(f: Function, rng: Generator) -> None:
    expect(f(f64([0.9, 0.1]), 0.2), [1, 0], "0.9, 0.1, share 0.2")


@prop("places", "Words stay where they stand in the vocabulary.")
def places(f: Function, rng: Generator) -> None:
    expect(f(f64([0.1, 0.6, 0.3]), 0.8), [0, 2 / 3, 1 / 3], "0.1, 0.6, 0.3, share 0.8")


@prop("everything", "A share of 1 keeps every word.")
def everything(f: Function, rng: Generator) -> None:
    p = f64([0.25, 0.25, 0.5])
    expect(f(p, 1.0), p, "0.25, 0.25, 0.5, share 1")


NUCLEUS = Task(
    "14.7", nucleus, (sums_to_one, crossing, never_empty, places, everything), MUTANTS["14.7"]
)


# 14.8


def optimize(
    weights: list[Tensor], gradients: list[list[Tensor]], lr: float, decay: float
) -> list[Tensor]:
    ms, vs, step = [0 * w for w in weights], [0 * w for w in weights], 0
    for now in gradients:
        step += 1
        for n, g in enumerate(now):
            m = ms[n] = 0.9 * ms[n] + 0.1 * g
            v = vs[n] = 0.95 * vs[n] + 0.05 * g**2
            m, v = m / (1 - 0.9**step), v / (1 - 0.95**step)
            weights[n] = (1 - lr * decay) * weights[n] - lr * m / (v.sqrt() + 1e-8)
    return weights


def by_torch(
    weights: list[Tensor], gradients: list[list[Tensor]], lr: float, decay: float
) -> list[Tensor]:
    own = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = torch.optim.AdamW(own, lr=lr, betas=(0.9, 0.95), weight_decay=decay)
    for now in gradients:
        for p, g in zip(own, now, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in own]


def optimizer_test(implementation: Function) -> None:
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(n, generator=draw, dtype=torch.float64) for n in (3, 2)]
    steps = [[torch.randn(n, generator=draw, dtype=torch.float64) for n in (3, 2)] for _ in "12345"]
    want = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = torch.optim.AdamW(want, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    for now in steps:
        for p, g in zip(want, now, strict=True):
            p.grad = g.clone()
        optimizer.step()
    got = implementation([w.clone() for w in start], steps, 0.1, 0.5)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-9


OPTIMIZER_TEST = write_the_test(
    "14.8",
    optimizer_test,
    optimize,
    by_torch,
    (
        Bug(
            "no bias correction",
            "nerfstudio-project/gsplat#770",
            "The averages start at 0. On which step does it show most?",
            {"m, v = m / (1 - 0.9**step), v / (1 - 0.95**step)": "pass"},
        ),
        Bug(
            "the step counter stands still",
            "allenai/OLMo-core#317",
            "Every step is corrected as if it were the first. When does that begin to show?",
            {"step += 1": "step = 1"},
        ),
        Bug(
            "the step counter advances with every weight",
            "flashlight/flashlight#143",
            "With a single weight there is nothing to see.",
            {
                "        step += 1\n": "",
                "n, g in enumerate(now):": "n, g in enumerate(now):\n            step += 1",
            },
        ),
        Bug(
            "the decay in the gradient",
            "nntrainer/nntrainer#3565",
            "Without a decay this one is right.",
            {
                "enumerate(now):": "enumerate(now):\n            g = g + decay * weights[n]",
                "(1 - lr * decay) * ": "",
            },
        ),
    ),
    MUTANTS["14.8"],
)


@dataclass(frozen=True)
class Problem:
    """Two steps of Adam with both betas 1/2, with gradients that leave whole roots."""

    gradients: tuple[int, int]
    lr: Fraction
    decay: int

    @property
    def root(self) -> int:
        """√v̂ of step two: v̂ = (g₁² + 2 g₂²) / 3."""
        a, b = self.gradients
        return math.isqrt((a * a + 2 * b * b) // 3)

    @property
    def answer(self) -> tuple[Fraction, Fraction]:
        """The weight after step one and after step two."""
        (a, b), kept = self.gradients, 1 - self.lr * self.decay
        first = kept - self.lr * (1 if a > 0 else -1)
        return first, kept * first - self.lr * Fraction(a + 2 * b, 3 * self.root)

    def __repr__(self) -> str:
        a, b = self.gradients
        return (
            f"AdamW, both betas 1/2, lr {self.lr}, decay {self.decay}, no epsilon.\n"
            f"  the weight starts at 1; its gradients are {a}, then {b}\n"
            "Give the weight after each step, as a fraction."
        )

    def worked(self) -> str:
        """Both steps with this problem's numbers."""
        (a, b), kept = self.gradients, 1 - self.lr * self.decay
        (first, second), c = self.answer, f"{in_brackets(a)}"
        m2, v2 = Fraction(a + 2 * b, 4), Fraction(a * a + 2 * b * b, 4)
        m_hat, v_hat = m2 / Fraction(3, 4), v2 / Fraction(3, 4)
        return "\n".join(
            [
                f"1. Step one   m̂ = {a}, √v̂ = {abs(a)}: the ratio is {1 if a > 0 else -1}",
                f"2. Weight     {kept}·1 - {self.lr}·{in_brackets(1 if a > 0 else -1)} = {first}",
                f"3. Averages   m = ({c} + 2·{in_brackets(b)})/4 = {m2},"
                f" v = ({c}² + 2·{in_brackets(b)}²)/4 = {v2}",
                f"4. Corrected  over 3/4: m̂ = {m_hat}, v̂ = {v_hat}, √v̂ = {self.root}",
                f"5. Weight     {kept}·{in_brackets(first)} - {self.lr}·"
                f"{in_brackets(m_hat / self.root)} = {second}",
            ]
        )


def problem(random_seed: int) -> Problem:
    """A fresh one, the same for the same random seed."""
    draw = random.Random(random_seed)
    pairs = [
        (a, b)
        for a in range(-30, 31)
        for b in range(-30, 31)
        if a
        and b
        and abs(a) != abs(b)
        and math.isqrt((a * a + 2 * b * b) // 3) ** 2 * 3 == a * a + 2 * b * b
    ]
    return Problem(
        draw.choice(pairs), Fraction(1, draw.choice((5, 10, 20))), draw.choice((0, 1, 2))
    )


TASKS = (ADAMW, LEARNING_RATE, CLIP, ACCUMULATE, DROPOUT, ORTHOGONAL, NUCLEUS, OPTIMIZER_TEST)
