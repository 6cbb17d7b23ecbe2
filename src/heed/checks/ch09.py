"""Chapter 09, length: the checks of its seven tasks, and `problem`, four pairs stretched by hand.

B texts · T words · V vocabulary · D head width. Frequencies are in radians a position, fastest
first; `trained` is the training length, `factor` how many times longer the texts become.
"""

import math
import random
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from heed import stretch
from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, expect, listed, normal, shown
from heed.positions import frequencies as of_base

MUTANTS = mutants(__file__)


# 09.1


def unfinished(trained: int, base: float, D: int) -> int:
    made = [trained * base ** (-2 * p / D) / (2 * math.pi) for p in range(D // 2)]
    return sum(turns < 1 for turns in made)


@prop("no turn at all", "Five positions are less than one turn, even at one radian a position.")
def no_turn(f: Function, rng: Generator) -> None:
    expect(f(5, 10000.0, 8), 4, "trained on 5 positions, base 10,000, D = 8")


@prop("all turns made", "After a million positions even a slow pair has come round.")
def all_turns(f: Function, rng: Generator) -> None:
    expect(f(1_000_000, 100.0, 8), 0, "trained on 1,000,000 positions, base 100, D = 8")


@prop("Llama 2", "A turn is 2π radians, and the frequencies fall from 1 to nearly 1/base.")
def llama2(f: Function, rng: Generator) -> None:
    expect(f(4096, 10000.0, 128), 18, "trained on 4,096 positions, base 10,000, D = 128")


@prop("fresh numbers", "Compare with a count over positions.frequencies(D, base).")
def fresh_counts(f: Function, rng: Generator) -> None:
    for trained, base, D in ((97, 10000.0, 16), (8192, 500000.0, 128), (2048, 300.0, 26)):
        want = int((stretch.turns(of_base(D, base), trained) < 1).sum())
        expect(f(trained, base, D), want, f"trained {trained}, base {base:g}, D = {D}")


UNFINISHED = Task("09.1", unfinished, (no_turn, all_turns, llama2, fresh_counts), MUTANTS["09.1"])


# 09.2


def ntk_aware(D: int, base: float, factor: float) -> Float[Tensor, " pairs"]:
    raised = base * factor ** (D / (D - 2))
    return raised ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)


@prop("D/2 numbers", "One frequency for each pair of channels.")
def pairs(f: Function, rng: Generator) -> None:
    expect(list(getattr(f(14, 10000.0, 3.0), "shape", ())), [7], "D = 14; the shape")


@prop("a factor of 1", "Nothing to stretch: the frequencies of chapter 08.")
def nothing(f: Function, rng: Generator) -> None:
    expect(f(14, 10000.0, 1.0), of_base(14, 10000.0), "D = 14, base 10,000, factor 1")


@prop("the first pair stays", "Near words need it. Its exponent is 0, whatever the base.")
def first_stays(f: Function, rng: Generator) -> None:
    expect(f(14, 10000.0, 5.0)[0], 1.0, "D = 14, base 10,000, factor 5; the first frequency")


@prop("the last pair slows", "It is interpolated in full. Which base does that, exactly?")
def last_slows(f: Function, rng: Generator) -> None:
    ratio = of_base(14, 10000.0)[-1] / f(14, 10000.0, 5.0)[-1]
    expect(ratio, 5.0, "D = 14, base 10,000, factor 5; how many times slower the last pair is")


@prop("by hand", "Base 81 and factor 8 make base 1296, so each pair is 6 times slower.")
def ntk_by_hand(f: Function, rng: Generator) -> None:
    got = f(8, 81.0, 8.0)
    expect(got[:-1] / got[1:], [6, 6, 6], "D = 8, base 81, factor 8; each pair over the next")


NTK_AWARE = Task(
    "09.2", ntk_aware, (pairs, nothing, first_stays, last_slows, ntk_by_hand), MUTANTS["09.2"]
)


# 09.3


def by_parts(
    frequencies: Float[Tensor, " pairs"],
    factor: float,
    trained: int,
    slow: float = 1.0,
    fast: float = 4.0,
) -> Float[Tensor, " pairs"]:
    turns = trained * frequencies / (2 * math.pi)
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _turning(*turns: float) -> Tensor:
    """Frequencies of pairs that make so many turns in 100 positions."""
    return 2 * math.pi * torch.tensor(turns, dtype=torch.float64) / 100


def _slower(f: Function, turns: tuple[float, ...], *rest: float) -> Tensor:
    """How many times slower f makes pairs of so many turns."""
    before = _turning(*turns)
    got = f(before.clone(), 8.0, 100, *rest)
    if getattr(got, "shape", None) != before.shape:
        raise Wrong(shown(f"{len(turns)} frequencies", f"{len(turns)} of them", f"{got!r}"))
    return before / got


@prop("finished pairs", "A pair of `fast` turns or more has seen all angles: leave it alone.")
def finished(f: Function, rng: Generator) -> None:
    expect(_slower(f, (50.0, 5.0)), [1, 1], "50 and 5 turns, factor 8; times slower")


@prop("unfinished pairs", "Less than `slow` turns: back into the arc that was seen.")
def not_finished(f: Function, rng: Generator) -> None:
    expect(_slower(f, (0.9, 0.01)), [8, 8], "0.9 and 0.01 turns, factor 8; times slower")


@prop("in between", "Mix the two frequencies, by how far the turns are from slow to fast.")
def between(f: Function, rng: Generator) -> None:
    kept = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    expect(1 / _slower(f, (3.0, 2.0)), kept + (1 - kept) / 8, "3 and 2 turns; share of the old")


@prop("other ends", "`slow` and `fast` are arguments, and not 1 and 4 for everybody.")
def other_ends(f: Function, rng: Generator) -> None:
    kept = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    given = "40, 17 and 2 turns, slow 2, fast 32; share of the old"
    expect(1 / _slower(f, (40.0, 17.0, 2.0), 2.0, 32.0), kept + (1 - kept) / 8, given)


@prop("as Llama 3.1", "Fresh numbers: base 500,000, factor 8, 8,192 tokens.")
def as_llama(f: Function, rng: Generator) -> None:
    before = of_base(128, 500000.0)
    want = stretch.by_parts(before, 8.0, 8192)
    given = "Llama 3.1; times slower"
    expect(before / f(before.clone(), 8.0, 8192), before / want, given)


BY_PARTS = Task(
    "09.3",
    by_parts,
    (finished, not_finished, between, other_ends, as_llama),
    MUTANTS["09.3"],
)


# 09.4


def good_up_to(
    before: Float[Tensor, " pairs"], after: Float[Tensor, " pairs"], trained: int
) -> float:
    new = trained * before < 2 * math.pi
    return (trained * before / after)[new].min().item() if new.any() else math.inf


@prop("not stretched", "Frequencies as they were: new angles begin past the training length.")
def as_trained(f: Function, rng: Generator) -> None:
    before = _turning(5.0, 0.5)
    expect(f(before, before.clone(), 100), 100, "5 and 0.5 turns, trained on 100, nothing changed")


@prop("interpolated", "Eight times slower, eight times as far.")
def interpolated(f: Function, rng: Generator) -> None:
    before = _turning(5.0, 0.5)
    expect(f(before, before / 8, 100), 800, "5 and 0.5 turns, trained on 100, all 8 times slower")


@prop("finished pairs do not count", "A pair that came round has no new angles to meet.")
def finished_free(f: Function, rng: Generator) -> None:
    before = _turning(5.0, 0.5)
    after = before / torch.tensor([1.0, 8.0])
    expect(f(before, after, 100), 800, "5 turns left alone, 0.5 turns 8 times slower")


@prop("the first to meet one", "One pair in new territory is enough.")
def first_to_meet(f: Function, rng: Generator) -> None:
    before = _turning(1.5, 0.8, 0.5, 0.2)
    after = before / torch.tensor([1.6, 4.0, 2.0, 8.0])
    given = "1.5, 0.8, 0.5 and 0.2 turns in training, made 1.6, 4, 2 and 8 times slower"
    expect(f(before, after, 100), 200, given)


@prop("all finished", "If every pair has come round, no length is too long: math.inf.")
def all_finished(f: Function, rng: Generator) -> None:
    got = float(f(_turning(5.0, 1.5), _turning(5.0, 1.5), 100))
    if got != math.inf:
        raise Wrong(shown("5 and 1.5 turns, trained on 100", "inf", f"{got:g}"))


GOOD_UP_TO = Task(
    "09.4",
    good_up_to,
    (as_trained, interpolated, finished_free, first_to_meet, all_finished),
    MUTANTS["09.4"],
)


# 09.5


def dynamic_ntk(
    D: int, base: float, trained: int, length: int, factor: float = 1.0
) -> Float[Tensor, " pairs"]:
    now = factor * max(length, trained) / trained - (factor - 1)
    raised = base * now ** (D / (D - 2))
    return raised ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)


@prop("short texts", "Up to the training length nothing changes.")
def short_texts(f: Function, rng: Generator) -> None:
    for length in (3, 99, 100):
        expect(f(14, 1e4, 100, length, 2.0), of_base(14), f"trained on 100, a text of {length}")


@prop("a long text", "With factor 1 a text four times as long is stretched by 4.")
def long_text(f: Function, rng: Generator) -> None:
    ratio = of_base(14)[-1] / f(14, 1e4, 100, 400, 1.0)[-1]
    expect(ratio, 4.0, "trained on 100, a text of 400, factor 1; the last pair, times slower")


@prop("the factor", "It says how fast the stretch grows. At the training length it is still 1.")
def with_factor(f: Function, rng: Generator) -> None:
    ratio = of_base(14)[-1] / f(14, 1e4, 100, 400, 3.0)[-1]
    expect(ratio, 10.0, "trained on 100, a text of 400, factor 3; the last pair, times slower")


@prop("no memory", "A short text after a long one is read as if it came first.")
def no_memory(f: Function, rng: Generator) -> None:
    f(14, 1e4, 100, 4000, 2.0)
    expect(f(14, 1e4, 100, 50, 2.0), of_base(14), "a text of 50, after one of 4,000")


@prop("as transformers", "Fresh numbers: D = 64, base 500,000, a text of 50,000.")
def as_transformers(f: Function, rng: Generator) -> None:
    got = f(64, 5e5, 8192, 50_000, 4.0)
    want = stretch.dynamic(of_base(64, 5e5), 50_000, 8192, factor=4.0)
    expect(got / want, torch.ones(32), "D = 64, base 500,000, 50,000 of 8,192; ratio to heed's")


DYNAMIC_NTK = Task(
    "09.5",
    dynamic_ntk,
    (short_texts, long_text, with_factor, no_memory, as_transformers),
    MUTANTS["09.5"],
)


# 09.6


def above_perfect(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], chances: Float[Tensor, "B T V"]
) -> Float[Tensor, " T"]:
    ours = -logits.log_softmax(dim=-1)
    theirs = -chances.log()
    pick = targets[:, :, None]
    return (ours.gather(2, pick) - theirs.gather(2, pick))[:, :, 0].mean(dim=0)


def _reading(rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    logits, chances = normal(rng, 3, 5, 7), normal(rng, 3, 5, 7).softmax(-1)
    return logits, torch.randint(7, (3, 5), generator=rng), chances


@prop("one number for each position", "Average over the texts, not over the positions.")
def each_position(f: Function, rng: Generator) -> None:
    got = f(*_reading(rng))
    expect(list(getattr(got, "shape", ())), [5], "3 texts of 5 words; the shape")


@prop("a perfect model", "A model with the right chances is not above the perfect reader.")
def perfect_model(f: Function, rng: Generator) -> None:
    _, targets, chances = _reading(rng)
    expect(f(chances.log(), targets, chances), torch.zeros(5), "logits that are ln of the chances")


@prop("logits are not normalised", "The same number added to all logits of a word does nothing.")
def shifted(f: Function, rng: Generator) -> None:
    _, targets, chances = _reading(rng)
    expect(f(chances.log() + 3, targets, chances), torch.zeros(5), "ln of the chances, plus 3")


@prop("one in four", "A word that was certain, and a model that gave it a quarter.")
def quarter(f: Function, rng: Generator) -> None:
    logits = torch.zeros(1, 1, 4, dtype=torch.float64)
    chances = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]], dtype=torch.float64)
    got = f(logits, torch.tensor([[1]]), chances)
    expect(got, [math.log(4)], "four equal logits, a certain word; nats")


@prop("fresh numbers", "What each word cost, less what it cost the perfect reader.")
def fresh_excess(f: Function, rng: Generator) -> None:
    logits, targets, chances = _reading(rng)
    want = torch.zeros(5, dtype=torch.float64)
    for b in range(3):
        for t in range(5):
            word, row = int(targets[b, t]), logits[b, t].exp()
            want[t] += (chances[b, t, word] * row.sum() / row[word]).log() / 3
    expect(f(logits, targets, chances), want, "3 texts of 5 words")


ABOVE_PERFECT = Task(
    "09.6",
    above_perfect,
    (each_position, perfect_model, shifted, quarter, fresh_excess),
    MUTANTS["09.6"],
)


# 09.7


def llama3_frequencies(
    frequencies: Float[Tensor, " pairs"], factor: float, trained: int
) -> Float[Tensor, " pairs"]:
    turns = trained * frequencies / (2 * math.pi)
    kept = ((turns - 1) / 3).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def by_wavelength(
    frequencies: Float[Tensor, " pairs"], factor: float, trained: int
) -> Float[Tensor, " pairs"]:
    """The same as Llama's own code has it: three cases of the wavelength."""
    out = []
    for theta in frequencies.tolist():
        wave = 2 * math.pi / theta
        smooth = (trained / wave - 1) / 3
        share = 1.0 if wave < trained / 4 else 0.0 if wave > trained else smooth
        out.append(theta * (share + (1 - share) / factor))
    return torch.tensor(out, dtype=frequencies.dtype)


def stretch_test(implementation: Function) -> None:
    turns = torch.tensor([20.0, 5.0, 2.5, 0.8, 0.1], dtype=torch.float64)
    before = 2 * math.pi * turns / 1000
    slower = before / implementation(before, 5.0, 1000)
    want = torch.tensor([1.0, 1.0, 1 / 0.6, 5.0, 5.0], dtype=torch.float64)
    assert (slower - want).abs().max() < 1e-6


STRETCH_TEST = write_the_test(
    "09.7",
    stretch_test,
    llama3_frequencies,
    by_wavelength,
    (
        Bug(
            "not applied at all",
            "felafax/felafax#59",
            "The configuration was read, and nobody used it. What must slow pairs do?",
            {"return kept * frequencies + (1 - kept) * frequencies / factor": "return frequencies"},
        ),
        Bug(
            "the factor applied twice",
            "ggml-org/ggml#835",
            "Once where frequencies are made, once where they are used. How much slower is slow?",
            {"/ factor": "/ factor**2"},
        ),
        Bug(
            "every pair divided",
            "rasbt/LLMs-from-scratch#940",
            "Positions were divided by the factor, so the fast pairs slowed as well.",
            {"kept * frequencies + (1 - kept) * frequencies": "frequencies"},
        ),
        Bug(
            "a factor of 8, whatever is asked",
            "swiss-ai/Megatron-LM#80",
            "For which factor does this bug not show?",
            {"/ factor": "/ 8"},
        ),
        Bug(
            "every position doubled",
            "ml-explore/mlx-lm#1553",
            "A default scale of 2 where 1 belongs. Pairs that should stay do not.",
            {"    return kept": "    frequencies = 2 * frequencies\n    return kept"},
        ),
        Bug(
            "the long length in place of the trained one",
            "NVIDIA/Megatron-LM#1418",
            "Two lengths stand in the configuration. With the longer one more pairs seem finished.",
            {"trained * frequencies": "factor * trained * frequencies"},
        ),
    ),
    MUTANTS["09.7"],
)


# By hand


def problem(random_seed: int) -> "Problem":
    """Four pairs whose rates are fractions of a turn, to be stretched by a cube."""
    draw = random.Random(random_seed)
    ratio, root = draw.choice([2, 3, 4, 5, 6]), draw.choice([2, 3])
    first = draw.choice([n for n in (3, 4, 5, 6, 7, 8, 9, 10) if n != ratio])
    return Problem(random_seed, first, ratio, root, trained=first * ratio * draw.choice([1, 2, 3]))


@dataclass(frozen=True, repr=False)
class Problem:
    """Pair p turns by 1 / (first · ratio^p) of a turn at each word; the factor is root³."""

    random_seed: int
    first: int
    ratio: int
    root: int
    trained: int

    @property
    def factor(self) -> int:
        return self.root**3

    @property
    def rates(self) -> list[Fraction]:
        """Of a turn, at each word."""
        return [Fraction(1, self.first * self.ratio**p) for p in range(4)]

    @property
    def turns(self) -> list[Fraction]:
        """In a text of the training length."""
        return [self.trained * rate for rate in self.rates]

    @property
    def kept(self) -> list[Fraction]:
        """The share of its old rate that by-parts scaling with 1 and 4 turns leaves a pair."""
        return [min(max((n - 1) / 3, Fraction(0)), Fraction(1)) for n in self.turns]

    @property
    def answer(self) -> dict[str, list[Fraction]]:
        """The new rates, of a turn at each word."""
        s = self.factor
        return {
            "interpolated": [r / s for r in self.rates],
            "NTK-aware": [r / self.root**p for p, r in enumerate(self.rates)],
            "by parts": [
                (1 - g) * r / s + g * r for g, r in zip(self.kept, self.rates, strict=True)
            ],
        }

    @property
    def unfinished(self) -> int:
        return sum(n < 1 for n in self.turns)

    def frequencies(self) -> Tensor:
        """The rates in radians, for heed.stretch."""
        return 2 * math.pi * torch.tensor([float(r) for r in self.rates], dtype=torch.float64)

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"Problem {self.random_seed}: four pairs, trained on {self.trained} words",
                f"  at each word they turn by {listed(self.rates)} of a turn",
                f"  the texts become {self.factor} times longer",
                "How many pairs never finish a turn in training? Give the new rates, as fractions,",
                "interpolated, NTK-aware, and by parts with slow = 1 and fast = 4 turns.",
            ]
        )

    def worked(self) -> str:
        """Each answer with this problem's numbers."""
        far = self.trained * self.factor
        lines = [
            f"1. Turns in {self.trained} words   {listed(self.turns)}:"
            f" {self.unfinished} pairs do not finish one",
            f"2. Interpolated        each rate over {self.factor}:"
            f" {listed(self.answer['interpolated'])}",
            f"3. NTK-aware           over 1, {self.root}, {self.root**2}, {self.root**3}:"
            f" {listed(self.answer['NTK-aware'])}",
            f"4. By parts            kept (turns - 1)/3, from 0 to 1: {listed(self.kept)};"
            f" rates {listed(self.answer['by parts'])}",
            f"5. Turns in {far} words, by parts: "
            + listed([far * r for r in self.answer["by parts"]]),
        ]
        return "\n".join(lines)


TASKS = (
    UNFINISHED,
    NTK_AWARE,
    BY_PARTS,
    GOOD_UP_TO,
    DYNAMIC_NTK,
    ABOVE_PERFECT,
    STRETCH_TEST,
)
