"""Chapter 11, the translator: the checks of its seven tasks, and `problem`, a beam search by hand.

B sentences · T target words · S source words · C width · V words of the language ·
W texts in the beam · N positions of a batch.
"""

import math
import random
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.ch04 import LN, f64
from heed.checks.compare import Wrong, expect, normal, several, shown, tensor

MUTANTS = mutants(__file__)


# 11.1


def shift(targets: list[list[int]]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    T = max(len(words) for words in targets) + 1
    target_in = torch.zeros(len(targets), T, dtype=torch.int64)
    target_out = torch.full((len(targets), T), -100)
    for b, words in enumerate(targets):
        target_in[b, : len(words) + 1] = torch.tensor([1, *words])
        target_out[b, : len(words) + 1] = torch.tensor([*words, 2])
    return target_in, target_out


@prop("room for the end", "Three words and one sign more. How long is a row?")
def room_for_the_end(f: Function, rng: Generator) -> None:
    for name, x in zip(("in", "out"), several(f([[5, 3, 4]]), 2, "[5, 3, 4]"), strict=True):
        expect(list(getattr(x, "shape", ())), [1, 4], f"one target of three words; shape of {name}")


@prop("one step apart", "What does the decoder read before it has to say the first word?")
def one_step_apart(f: Function, rng: Generator) -> None:
    read, say = several(f([[5, 3, 4]]), 2, "[5, 3, 4]")
    expect(read, [[1, 5, 3, 4]], "target 5, 3, 4; what the decoder reads")
    expect(say, [[5, 3, 4, 2]], "target 5, 3, 4; what it has to say")


@prop(
    "shorter targets", "Behind its end a target has nothing to say, and -100 says so to the loss."
)
def shorter_targets(f: Function, rng: Generator) -> None:
    read, say = several(f([[5, 3, 4], [6]]), 2, "[5, 3, 4] and [6]")
    expect(read, [[1, 5, 3, 4], [1, 6, 0, 0]], "targets 5, 3, 4 and 6; what the decoder reads")
    expect(say, [[5, 3, 4, 2], [6, 2, -100, -100]], "targets 5, 3, 4 and 6; what it has to say")


SHIFT = Task("11.1", shift, (room_for_the_end, one_step_apart, shorter_targets), MUTANTS["11.1"])


# 11.2


def smoothed_loss(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], eps: float
) -> Float[Tensor, ""]:
    counts = targets != -100
    logp = logits[counts].log_softmax(dim=1)
    right = logp.gather(1, targets[counts][:, None])[:, 0]
    return -((1 - eps) * right + eps * logp.mean(dim=1)).mean()


@prop("not smoothed", "With a share of 0 this is the plain cross-entropy.")
def not_smoothed(f: Function, rng: Generator) -> None:
    got = f(f64([LN]), torch.tensor([1]), 0.0)
    expect(got, math.log(3), "logits ln 1, ln 2, ln 3, the second is right, share 0")


@prop("a share for all", "Spread the share over all V words, the right one among them.")
def share_for_all(f: Function, rng: Generator) -> None:
    p, eps = torch.tensor([1, 2, 3], dtype=torch.float64) / 6, 0.3
    want = -(0.1 * p[0].log() + 0.8 * p[1].log() + 0.1 * p[2].log())
    expect(f(f64([LN]), torch.tensor([1]), eps), want, "probabilities 1/6, 2/6, 3/6, share 0.3")


@prop("its gradient is p - q", "Let autograd tell you p - q of your loss.")
def gradient_of_smoothed(f: Function, rng: Generator) -> None:
    logits = normal(rng, 1, 5).requires_grad_()
    loss = f(logits, torch.tensor([3]), 0.2)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise Wrong(shown("logits that want a gradient", "a loss that has one", "none"))
    (got,) = torch.autograd.grad(loss, logits)
    q = f64([[0.04, 0.04, 0.04, 0.84, 0.04]])
    expect(got, logits.detach().softmax(1) - q, "five fresh logits, share 0.2; the gradient")


@prop("padding does not count", "Neither half of the loss may see a position whose target is -100.")
def padding_does_not_count(f: Function, rng: Generator) -> None:
    logits, targets = normal(rng, 4, 5), torch.tensor([3, -100, 0, -100])
    want = smoothed_loss(logits[[0, 2]], targets[[0, 2]], 0.1)
    expect(f(logits, targets, 0.1), want, "targets 3, -100, 0, -100; against the two alone")


SMOOTHED_LOSS = Task(
    "11.2",
    smoothed_loss,
    (not_smoothed, share_for_all, gradient_of_smoothed, padding_does_not_count),
    MUTANTS["11.2"],
)


# 11.3


def best_under_smoothing(V: int, eps: float) -> tuple[float, float, float]:
    rest = eps / V
    right = 1 - eps + rest
    least = -right * math.log(right) - (V - 1) * rest * math.log(rest)
    return math.log(right / rest), least, -math.log(right)


def _best(f: Function, V: int, eps: float) -> list[float]:
    got = several(f(V, eps), 3, f"V = {V}, share {eps}")
    return [float(tensor(x, f"V = {V}, share {eps}")) for x in got]


@prop("the gap", "At the bottom p = q. A gap of logits is the ln of a ratio of probabilities.")
def the_gap(f: Function, rng: Generator) -> None:
    expect(_best(f, 10, 0.1)[0], math.log(91), "V = 10, share 0.1; right logit less another")


@prop("the floor", "Put p = q into the loss. How many wrong words are there?")
def the_floor(f: Function, rng: Generator) -> None:
    want = -0.91 * math.log(0.91) - 0.09 * math.log(0.01)
    expect(_best(f, 10, 0.1)[1], want, "V = 10, share 0.1; the least smoothed loss")


@prop(
    "the plain loss there", "The plain loss of the right word, at the bottom of the smoothed one."
)
def plain_loss_there(f: Function, rng: Generator) -> None:
    expect(_best(f, 10, 0.1)[2], -math.log(0.91), "V = 10, share 0.1; -ln p of the right word")


@prop("as descent finds it", "Compare with a few thousand steps downhill for another V and share.")
def as_descent_finds(f: Function, rng: Generator) -> None:
    V, eps = 4, 0.4
    q = f64([0.7, 0.1, 0.1, 0.1])
    want = [math.log(7), -(q * q.log()).sum().item(), -math.log(0.7)]
    expect(_best(f, V, eps), want, "V = 4, share 0.4; gap, floor and plain loss")


BEST = Task(
    "11.3",
    best_under_smoothing,
    (the_gap, the_floor, plain_loss_there, as_descent_finds),
    MUTANTS["11.3"],
)


# 11.4


def rate(step: int, d_model: int, warmup: int) -> float:
    s = step + 1
    return d_model**-0.5 * min(s**-0.5, s * warmup**-1.5)


@prop("the first step", "Steps count from 0 here. A first rate of 0 would waste a step.")
def first_rate(f: Function, rng: Generator) -> None:
    expect(f(0, 64, 4), 1 / 64, "step 0, width 64, warm-up 4")


@prop("a straight line", "Twice the step, twice the rate, as long as the warm-up lasts.")
def straight_line(f: Function, rng: Generator) -> None:
    expect([f(i, 64, 4) for i in (1, 2)], [2 / 64, 3 / 64], "steps 1 and 2, width 64, warm-up 4")


@prop("the peak", "The two terms meet at the step that ends the warm-up.")
def the_peak(f: Function, rng: Generator) -> None:
    rates = [f(i, 64, 25) for i in range(60)]
    best = max(range(60), key=rates.__getitem__)
    expect([best, rates[24]], [24, 1 / 40], "width 64, warm-up 25; index and height of the peak")


@prop("down as a root", "Four times the steps, half the rate.")
def down_as_a_root(f: Function, rng: Generator) -> None:
    expect(f(99, 64, 25), 1 / 80, "width 64, warm-up 25, the hundredth step")


@prop("wider, slower", "How does the rate depend on the width?")
def wider_slower(f: Function, rng: Generator) -> None:
    expect(f(24, 256, 25), 1 / 80, "width 256, warm-up 25, the 25th step")


RATE = Task(
    "11.4",
    rate,
    (first_rate, straight_line, the_peak, down_as_a_root, wider_slower),
    MUTANTS["11.4"],
)


# 11.5


def beam_step(
    sums: Float[Tensor, " W"], logp: Float[Tensor, "W V"], eos: int
) -> tuple[list[tuple[int, int, float]], list[tuple[int, float]]]:
    W, V = logp.shape
    best, order = (sums[:, None] + logp).flatten().sort(descending=True)
    tried = [(i // V, i % V, s) for s, i in zip(best.tolist(), order.tolist(), strict=True)]
    ended = [(i, s) for i, word, s in tried[:W] if word == eos]
    alive = [(i, word, s) for i, word, s in tried if word != eos][:W]
    return alive, ended


def _stepped(f: Function, sums: list, chances: list) -> tuple[list, list]:
    got = several(f(f64(sums).log(), f64(chances).log(), 0), 2, "a beam of 2 and chances")
    return [list(x) for x in got[0]], [list(x) for x in got[1]]


SUMS = [0.5, 0.4]
CHANCES = [[0.3, 0.4, 0.3], [0.8, 0.15, 0.05]]  # 0 is the end


@prop("the best two go on", "Compare all texts with all, not the words of one text.")
def best_go_on(f: Function, rng: Generator) -> None:
    alive, _ = _stepped(f, [0.6, 0.1], [[0.1, 0.5, 0.4], [0.1, 0.8, 0.1]])
    given = "texts 0.6, 0.1; chances 0.1 0.5 0.4 and 0.1 0.8 0.1, 0 is the end; text and word"
    expect([x[:2] for x in alive], [[0, 1], [0, 2]], given)


@prop("their ln p", "The ln p of a longer text is a sum.")
def their_sums(f: Function, rng: Generator) -> None:
    alive, _ = _stepped(f, [0.6, 0.1], [[0.1, 0.5, 0.4], [0.1, 0.8, 0.1]])
    given = "texts 0.6, 0.1; chances 0.1 0.5 0.4 and 0.1 0.8 0.1; ln p of the two"
    expect([x[2] for x in alive], [math.log(0.3), math.log(0.24)], given)


@prop(
    "an end does not go on", "A text that has ended has nothing to add. Who goes on in its place?"
)
def end_does_not_go_on(f: Function, rng: Generator) -> None:
    alive, _ = _stepped(f, SUMS, CHANCES)
    given = "texts 0.5, 0.4; chances 0.3 0.4 0.3 and 0.8 0.15 0.05, 0 is the end; text and word"
    expect([x[:2] for x in alive], [[0, 1], [0, 2]], given)


@prop("an end is set aside", "Which text ended, and with what ln p?")
def end_set_aside(f: Function, rng: Generator) -> None:
    _, ended = _stepped(f, SUMS, CHANCES)
    given = "texts 0.5, 0.4; chances 0.3 0.4 0.3 and 0.8 0.15 0.05; what ended"
    if len(ended) != 1 or len(ended[0]) != 2:
        raise Wrong(shown(given, f"one: [1, {math.log(0.32):.4g}]", f"{ended}"))
    expect(ended[0], [1, math.log(0.32)], given)


@prop("a poor end is dropped", "Only endings among the best W of all that were tried count.")
def poor_end_dropped(f: Function, rng: Generator) -> None:
    _, ended = _stepped(f, [0.6, 0.1], [[0.1, 0.5, 0.4], [0.1, 0.8, 0.1]])
    if ended:
        given = "texts 0.6, 0.1; chances 0.1 0.5 0.4 and 0.1 0.8 0.1; the ends are no. 4 and 5"
        raise Wrong(shown(given, "nothing set aside", f"{ended}"))


BEAM_STEP = Task(
    "11.5",
    beam_step,
    (best_go_on, their_sums, end_does_not_go_on, end_set_aside, poor_end_dropped),
    MUTANTS["11.5"],
)


# 11.6


def score_text(
    logits: Float[Tensor, "T V"], words: Int[Tensor, " T"], eos: int, alpha: float
) -> float:
    n = words.tolist().index(eos) + 1
    logp = logits[:n].log_softmax(dim=1).gather(1, words[:n, None])
    return (logp.sum() / ((5 + n) / 6) ** alpha).item()


def _scored(f: Function, logits: Tensor, words: list[int], alpha: float) -> Tensor:
    return tensor(f(logits, torch.tensor(words), 0, alpha), f"words {words}")


@prop("a sum of ln p", "One factor for each word, the end among them.")
def sum_of_logp(f: Function, rng: Generator) -> None:
    logits = f64([LN, LN])
    want = math.log(3 / 6) + math.log(1 / 6)
    expect(_scored(f, logits, [2, 0], 0.0), want, "logits ln 1, ln 2, ln 3 twice; words 2, end")


@prop("nothing behind the end", "What stands behind the first end is padding.")
def nothing_behind(f: Function, rng: Generator) -> None:
    logits = normal(rng, 5, 3)
    want = _scored(score_text, logits[:2], [2, 0], 0.0)
    expect(_scored(f, logits, [2, 0, 0, 1, 0], 0.0), want, "words 2, end, and three of padding")


@prop("the penalty divides", "A negative number, divided by more, is larger.")
def penalty_divides(f: Function, rng: Generator) -> None:
    logits = torch.zeros(7, 2, dtype=torch.float64)
    want = 7 * math.log(1 / 2) / 2
    expect(_scored(f, logits, [1] * 6 + [0], 1.0), want, "seven words of chance 1/2, alpha 1")


@prop("alpha is a power", "((5 + n) / 6) to the power of alpha.")
def alpha_is_a_power(f: Function, rng: Generator) -> None:
    logits = torch.zeros(49, 2, dtype=torch.float64)
    want = 49 * math.log(1 / 2) / 3
    expect(_scored(f, logits, [1] * 48 + [0], 0.5), want, "49 words of chance 1/2, alpha 1/2")


SCORE_TEXT = Task(
    "11.6",
    score_text,
    (sum_of_logp, nothing_behind, penalty_divides, alpha_is_a_power),
    MUTANTS["11.6"],
)


# 11.7


def decoder(
    y: Float[Tensor, "T C"], memory: Float[Tensor, "S C"], length: int
) -> Float[Tensor, "T C"]:
    T, C = y.shape
    past = torch.ones(T, T, dtype=torch.bool).tril()
    scores = (y @ y.mT / C**0.5).masked_fill(~past, -math.inf)
    y = y + scores.softmax(dim=1) @ y
    y = (y - y.mean(dim=1, keepdim=True)) / y.std(dim=1, keepdim=True)
    real = torch.arange(len(memory)) < length
    scores = (y @ memory.mT / C**0.5).masked_fill(~real, -math.inf)
    return y + scores.softmax(dim=1) @ memory


def word_by_word(y: Tensor, memory: Tensor, length: int) -> Tensor:
    """Each row from its own past alone."""
    rows, C = [], y.shape[1]
    for t in range(len(y)):
        x = y[t] + (y[: t + 1] @ y[t] / C**0.5).softmax(0) @ y[: t + 1]
        x = (x - x.mean()) / x.std()
        rows.append(x + (memory[:length] @ x / C**0.5).softmax(0) @ memory[:length])
    return torch.stack(rows)


def decoder_test(implementation: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    y, memory = normal(rng, 5, 8), normal(rng, 6, 8)
    before = implementation(y, memory, 4)
    for t in range(5):
        other = y.clone()
        other[t] = normal(rng, 8)
        moved = (implementation(other, memory, 4) - before).abs().amax(dim=1) > 1e-9
        assert moved.tolist() == [row >= t for row in range(5)]
    for s in range(6):
        other = memory.clone()
        other[s] = normal(rng, 8)
        moved = (implementation(y, other, 4) - before).abs().amax(dim=1) > 1e-9
        assert moved.tolist() == [s < 4] * 5


DECODER_TEST = write_the_test(
    "11.7",
    decoder_test,
    decoder,
    word_by_word,
    (
        Bug(
            "shares over the target",
            "PetrochukM/PyTorch-NLP#2",
            "Softmax along the wrong axis: the rows of the second attention hear one another.",
            {"return y + scores.softmax(dim=1)": "return y + scores.softmax(dim=0).nan_to_num()"},
        ),
        Bug(
            "normed over the words",
            "OpenNMT/OpenNMT-tf#6",
            "The masks are right, and a later word still gets out. Look at every earlier row.",
            {
                "(y - y.mean(dim=1, keepdim=True)) / y.std(dim=1, keepdim=True)": (
                    "(y - y.mean(dim=0, keepdim=True)) / y.std(dim=0, keepdim=True, correction=0)"
                )
            },
        ),
        Bug(
            "no causal mask",
            "jadore801120/attention-is-all-you-need-pytorch#19",
            "Word accuracy 98 %, translations useless. Change a later word.",
            {"masked_fill(~past, -math.inf)": "masked_fill(~past.any(), -math.inf)"},
        ),
        Bug(
            "the mask is flipped",
            "pytorch/pytorch#29546",
            "The first words read the future and the last ones no past. A word must be heard, too.",
            {".tril()": ".triu()"},
        ),
        Bug(
            "padding of the source is read",
            "NVIDIA/FasterTransformer#270",
            "The same source, padded to another length, gave other words. Change the padding.",
            {"masked_fill(~real, -math.inf)": "masked_fill(~real.any(), -math.inf)"},
        ),
    ),
    MUTANTS["11.7"],
)


# A beam search for paper


@dataclass(frozen=True, repr=False)
class Problem:
    """Texts of a and b, at most two words before the full stop; chances in tenths."""

    random_seed: int
    tenths: tuple[tuple[int, int, int], ...]  # of a, b and the stop: after nothing, a, b

    @property
    def texts(self) -> dict[str, Fraction]:
        """Every text with its probability, the likeliest first."""
        found = {}
        for words in ("", "a", "b", *("".join(x) for x in product("ab", repeat=2))):
            found[words + "."] = self.chance(words + ".")
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def chance(self, text: str) -> Fraction:
        """Of a text or of the beginning of one."""
        p = Fraction(1)
        for n, sign in enumerate(text):
            if n < 2:
                row = self.tenths[("", "a", "b").index(text[:n])]
                p *= Fraction(row["ab.".index(sign)], 10)
        return p

    def beam(self, width: int) -> list[tuple[list[str], list[str], list[str]]]:
        """Of every step: what was tried, the best first; what is set aside; what goes on."""
        steps, alive = [], [""]
        while alive:
            tried = [said + sign for said in alive for sign in ("ab." if len(said) < 2 else ".")]
            tried.sort(key=lambda text: -self.chance(text))
            aside = [text for text in tried[:width] if text.endswith(".")]
            alive = [text for text in tried if not text.endswith(".")][:width]
            steps.append((tried, aside, alive))
        return steps

    def found(self, width: int) -> str:
        aside = [text for _, ended, _ in self.beam(width) for text in ended]
        return max(aside, key=self.chance)

    @property
    def answer(self) -> dict[str, tuple[str, Fraction]]:
        texts = {"greedy": self.found(1), "width 2": self.found(2)}
        return {name: (text, self.chance(text)) for name, text in texts.items()}

    def __repr__(self) -> str:
        lines = [f"Problem {self.random_seed}: texts of a and b with a full stop. In tenths,"]
        for said, row in zip(("nothing", "a", "b"), self.tenths, strict=True):
            lines.append(f"  after {said:8} a {row[0]}, b {row[1]}, stop {row[2]}")
        lines.append("  after two words the stop is certain.")
        lines.append("Which text does greedy decoding write, which a beam of width 2?")
        lines.append("Give both probabilities as fractions. Is there a likelier text?")
        return "\n".join(lines)

    def worked(self) -> str:
        """The beam of width 2 step by step, in hundredths."""

        def listed(texts: list[str]) -> str:
            return ", ".join(f"{text} {100 * self.chance(text)}" for text in texts) or "nothing"

        lines = ["Chances in hundredths. Width 2:"]
        for n, (tried, aside, alive) in enumerate(self.beam(2), 1):
            lines.append(f"{n}. Tried      {listed(tried)}")
            lines.append(f"   Set aside  {listed(aside)};  go on: {listed(alive)}")
        for name, (text, p) in self.answer.items():
            lines.append(f"{name:8} {text:4} {p}")
        best, p = next(iter(self.texts.items()))
        lines.append(
            f"best of all 7 texts: {best} {p}. All chances sum to {sum(self.texts.values())}."
        )
        return "\n".join(lines)


def problem(random_seed: int) -> Problem:
    """A fresh tree in which greedy decoding misses the text that a beam of two finds."""
    rng = random.Random(random_seed)
    while True:
        first, *rest = rows = tuple(_tenths(rng) for _ in range(3))
        best = max(p * max(row) for p, row in zip(first, rest, strict=False))
        if first.index(max(first)) == 2 or best == max(first) * max(rest[first.index(max(first))]):
            continue  # greedy stops at once, or finds the best: most trees, and soon seen
        made = Problem(random_seed, rows)
        steps = [[made.chance(text) for text in tried] for tried, _, _ in made.beam(2)]
        apart = all(len(set(x)) == len(x) for x in (*steps, *rows))  # no ties to argue about
        greedy, wide = (made.chance(made.found(width)) for width in (1, 2))
        if apart and greedy < wide == max(made.texts.values()) and made.found(2) != ".":
            return made


def _tenths(rng: random.Random) -> tuple[int, int, int]:
    low, high = sorted(rng.sample(range(1, 10), 2))
    return low, high - low, 10 - high


TASKS = (SHIFT, SMOOTHED_LOSS, BEST, RATE, BEAM_STEP, SCORE_TEXT, DECODER_TEST)
