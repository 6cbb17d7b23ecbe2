"""Chapter 13, GPT: the checks of its eight tasks.

B texts · N words in a text · T positions, each asks for the next word · C width of the stream ·
C3 three times that · H heads · D head width · F width of the network · V words one can say ·
S longest text · L layers.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from heed import masks
from heed.attention import attention
from heed.checks import (
    Bug,
    Function,
    Task,
    mutants,
    prop,
    write_the_test,
)
from heed.checks.ch04 import LN, f64
from heed.checks.compare import Wrong, expect, normal, several, tensor

MUTANTS = mutants(__file__)


# 13.1


def next_word(
    texts: Int[Tensor, "B N"], prompt_len: int
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    inputs, targets = texts[:, :-1], texts[:, 1:].clone()
    targets[:, : max(prompt_len - 1, 0)] = -100
    return inputs, targets


TEXT = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])


def _pair(f: Function, texts: Tensor, prompt_len: int, given: str) -> tuple[Tensor, Tensor]:
    inputs, targets = several(f(texts, prompt_len), 2, given)
    return tensor(inputs, given), tensor(targets, given)


@prop("N - 1 questions", "The last word of a text has no next word. How many questions are left?")
def one_fewer(f: Function, rng: Generator) -> None:
    texts = torch.randint(20, (3, 7), generator=rng)
    for name, x in zip(["inputs", "targets"], _pair(f, texts, 2, "B = 3, N = 7"), strict=True):
        expect(list(x.shape), [3, 6], f"texts of shape (3, 7); the shape of the {name}:")


@prop("the next word", "At each position, which word comes next? The target must not be in sight.")
def is_next(f: Function, rng: Generator) -> None:
    targets = _pair(f, TEXT, 2, "one text")[1]
    expect(targets[0, -2:], [15, 16], "the text 10 11 12 13 14 15 16; the last two targets:")


@prop(
    "where the answer starts",
    "The last word of the prompt asks for the first word of the answer. Does that target count?",
)
def answer_starts(f: Function, rng: Generator) -> None:
    given = "the text 10 11 12 13 14 15 16, prompt_len 3; the targets:"
    expect(_pair(f, TEXT, 3, given)[1][0], [-100, -100, 13, 14, 15, 16], given)


@prop("no prompt", "Nothing is hidden now. What does a slice that ends at -1 leave out?")
def no_prompt(f: Function, rng: Generator) -> None:
    for n in (1, 0):
        given = f"the text 10 11 12 13 14 15 16, prompt_len {n}; the targets:"
        expect(_pair(f, TEXT, n, given)[1][0], [11, 12, 13, 14, 15, 16], given)


@prop(
    "the inputs as they were",
    "The inputs are the words as written, the prompt too. A slice is a view: what is written into"
    " the targets stands in the texts as well.",
)
def inputs_stay(f: Function, rng: Generator) -> None:
    given = "the text 10 11 12 13 14 15 16, prompt_len 5; the inputs:"
    expect(_pair(f, TEXT, 5, given)[0][0], [10, 11, 12, 13, 14, 15], given)


@prop("every text", "All texts of the batch have a prompt of the same length.")
def every_text(f: Function, rng: Generator) -> None:
    texts = torch.randint(20, (3, 11), generator=rng)
    expect(_pair(f, texts, 7, "B = 3")[1], next_word(texts, 7)[1], "3 texts of 11; the targets")


NEXT_WORD = Task(
    "13.1",
    next_word,
    (one_fewer, is_next, answer_starts, no_prompt, inputs_stay, every_text),
    MUTANTS["13.1"],
)


# 13.2


def block(
    x: Float[Tensor, "B T C"],
    attend: Callable[[Tensor], Tensor],
    gain1: Float[Tensor, " C"],
    gain2: Float[Tensor, " C"],
    up: Float[Tensor, "C F"],
    down: Float[Tensor, "F C"],
) -> Float[Tensor, "B T C"]:
    def norm(x: Tensor, gain: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return gain * centred / (variance + 1e-5).sqrt()

    x = x + attend(norm(x, gain1))
    hidden = functional.gelu(norm(x, gain2) @ up, approximate="tanh")
    return x + hidden @ down


def _nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _itself(x: Tensor) -> Tensor:
    return x.clone()


def _past(x: Tensor) -> Tensor:
    """The sum of the positions up to each one."""
    return x.cumsum(1)


def _layer(rng: Generator, C: int, F: int) -> list[Tensor]:
    return [normal(rng, C), normal(rng, C), normal(rng, C, F), normal(rng, F, C)]


@prop("two silent branches", "Both branches add nothing. What is left of the stream?")
def silent(f: Function, rng: Generator) -> None:
    x, (gain1, gain2, up, down) = normal(rng, 2, 3, 5), _layer(rng, 5, 7)
    got = f(x, _nothing, gain1, gain2, up, 0 * down)
    expect(got, x, "an attend that returns 0, a down of 0")


@prop(
    "attention reads a normalised copy",
    "Take off the mean of the C entries, divide by the root of their mean square, then the gain.",
)
def normed(f: Function, rng: Generator) -> None:
    x, gain1 = f64([[[1, 3, 5, 7]]]), f64([1, 1, 2, 1])
    root = 5 + 1e-5
    want = x + f64([-3, -1, 2, 3]) / root**0.5
    got = f(x, _itself, gain1, f64([1] * 4), torch.zeros(4, 7).double(), torch.zeros(7, 4).double())
    given = "stream 1, 3, 5, 7, gain1 1, 1, 2, 1, an attend that returns what it reads, a down of 0"
    expect(got, want, given)


@prop("each word by itself", "A mean over several words would carry news from one to the other.")
def words_apart(f: Function, rng: Generator) -> None:
    x, layer = normal(rng, 2, 3, 5), _layer(rng, 5, 7)
    alone = f(x[1:, 2:], _itself, *layer)
    expect(f(x, _itself, *layer)[1:, 2:], alone, "word 2 of text 1 among others, against it alone:")


@prop("a quiet stream", "Add 0.00001 to the variance, under the root: then 0/0 cannot happen.")
def quiet(f: Function, rng: Generator) -> None:
    gain, zero = f64([1] * 4), torch.zeros(4, 4).double()
    for x in (f64([[[2, 2, 2, 2]]]), f64([[[0.001, 0.003, 0.005, 0.007]]])):
        want = x + functional.layer_norm(x, [4])
        expect(
            f(x, _itself, gain, gain, zero, zero), want, f"stream {x[0, 0].tolist()}, a down of 0"
        )


@prop("the bend", "GPT-2 bends with GELU in its tanh form. And which gain belongs to the network?")
def bend(f: Function, rng: Generator) -> None:
    x, layer = normal(rng, 1, 1, 5), _layer(rng, 5, 7)
    expect(f(x, _nothing, *layer), block(x, _nothing, *layer), "an attend that returns 0")


@prop(
    "one after the other",
    "The network reads the stream after attention has written to it, not the stream before.",
)
def in_turn(f: Function, rng: Generator) -> None:
    x, layer = normal(rng, 2, 3, 5), _layer(rng, 5, 7)
    expect(f(x, _past, *layer), block(x, _past, *layer), "an attend that sums over the past")


BLOCK = Task(
    "13.2",
    block,
    (silent, normed, words_apart, quiet, bend, in_turn),
    MUTANTS["13.2"],
)


# 13.3


def self_attention(
    x: Float[Tensor, "B T C"],
    qkv: Float[Tensor, "C C3"],
    out: Float[Tensor, "C C"],
    n_heads: int,
) -> Float[Tensor, "B T C"]:
    B, T, C = x.shape
    D = C // n_heads
    q, k, v = (x @ qkv).view(B, T, 3, n_heads, D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scores = q @ k.mT / D**0.5  # (B, H, T, T)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)
    joined = (weights @ v).transpose(1, 2).reshape(B, T, C)
    return joined @ out


def _projections(rng: Generator, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, out = normal(rng, 4, C, C) / C**0.5
    return q, k, v, out


def _by_heed(x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, H: int) -> Tensor:
    def heads(w: Tensor) -> Tensor:
        return (x @ w).unflatten(2, (H, -1)).transpose(1, 2)

    mixed = attention(heads(q), heads(k), heads(v), masks.causal)
    return mixed.transpose(1, 2).flatten(2) @ out


@prop(
    "one word",
    "The only word there is reads itself. The last C columns of qkv make its value, and out is the"
    " last step.",
)
def one_word(f: Function, rng: Generator) -> None:
    x, (q, k, v, out) = normal(rng, 2, 1, 7), _projections(rng, 7)
    expect(f(x, torch.cat([q, k, v], 1), out, 1), x @ v @ out, "texts of one word, one head")


@prop(
    "a mean of the past",
    "Queries of 0 make all scores equal. Then a word gets the mean of the values up to its own.",
)
def mean_of_past(f: Function, rng: Generator) -> None:
    x, (q, k, v, out) = normal(rng, 1, 3, 7), _projections(rng, 7)
    want = (x @ v).cumsum(1) / torch.arange(1, 4)[:, None] @ out
    expect(f(x, torch.cat([0 * q, k, v], 1), out, 1), want, "queries of 0, three words, one head")


@prop(
    "cut into heads and joined again",
    "With equal scores the number of heads must not matter. In memory the heads of one word stand"
    " side by side; which two axes change places, before and after?",
)
def cut_and_joined(f: Function, rng: Generator) -> None:
    x, (q, k, v, out) = normal(rng, 2, 5, 21), _projections(rng, 21)
    want = (x @ v).cumsum(1) / torch.arange(1, 6)[:, None] @ out
    expect(f(x, torch.cat([0 * q, k, v], 1), out, 3), want, "queries of 0, five words, three heads")


@prop("divided by √D", "A head sees D = C / H entries. Chapter 05: by what are its scores divided?")
def root_of_D(f: Function, rng: Generator) -> None:
    x, (q, _, v, out) = normal(rng, 2, 5, 21), _projections(rng, 21)
    want = _by_heed(x, q, q, v, out, 3)
    expect(f(x, torch.cat([q, q, v], 1), out, 3), want, "keys equal to the queries, three heads")


@prop(
    "who asks", "Row i of the scores belongs to the word that asks, and the softmax runs along it."
)
def who_asks(f: Function, rng: Generator) -> None:
    x, (q, k, v, out) = normal(rng, 2, 5, 21), _projections(rng, 21)
    want = _by_heed(x, q, k, v, out, 3)
    expect(f(x, torch.cat([q, k, v], 1), out, 3), want, "fresh numbers, three heads of width 7")


@prop("low scores", "If every word one may read scores -40,000, who wins against a low fill?")
def low_scores(f: Function, rng: Generator) -> None:
    x, (q, k, v, out) = normal(rng, 1, 3, 7), _projections(rng, 7)
    x[..., 0] = 1
    q[:], k[:] = 0, 0
    q[0], k[0] = 200, -200  # every score is -40,000 √7
    want = (x @ v).cumsum(1) / torch.arange(1, 4)[:, None] @ out
    expect(f(x, torch.cat([q, k, v], 1), out, 1), want, "every score -105,830, three words")


SELF_ATTENTION = Task(
    "13.3",
    self_attention,
    (one_word, mean_of_past, cut_and_joined, root_of_D, who_asks, low_scores),
    MUTANTS["13.3"],
)


# 13.4


def loss(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    counts = targets != -100  # (B, T)
    rows, right = logits[counts], targets[counts]
    chosen = rows.gather(1, right[:, None])[:, 0]
    return (rows.logsumexp(dim=-1) - chosen).mean()


@prop("equal scores", "A model that knows nothing is surprised by ln V at each word, on average.")
def knows_nothing(f: Function, rng: Generator) -> None:
    targets = torch.randint(7, (2, 3), generator=rng)
    got = f(torch.zeros(2, 3, 7).double(), targets)
    expect(got, math.log(7), "six targets, V = 7, every score 0")


@prop(
    "1/6, 2/6, 3/6", "Scores become probabilities over the words; surprise is -ln p of the target."
)
def loss_by_hand(f: Function, rng: Generator) -> None:
    got = f(f64([[LN, LN]]), torch.tensor([[2, 0]]))
    given = "scores ln 1, ln 2, ln 3 twice, targets 2 and 0"
    expect(got, (math.log(2) + math.log(6)) / 2, given)


@prop("-100 does not count", "Average over the targets that count. By how many do you divide?")
def only_what_counts(f: Function, rng: Generator) -> None:
    got = f(f64([[LN, LN, LN]]), torch.tensor([[-100, 2, -100]]))
    expect(got, math.log(2), "scores ln 1, ln 2, ln 3 three times, targets -100, 2, -100")


@prop(
    "each target once",
    "One text has one target, the other has three. Each of the four counts the same.",
)
def each_once(f: Function, rng: Generator) -> None:
    targets = torch.tensor([[-100, -100, 2], [0, 0, 0]])
    got = f(f64([[LN] * 3] * 2), targets)
    given = "scores ln 1, ln 2, ln 3, targets -100, -100, 2 in one text and 0, 0, 0 in the other"
    expect(got, (math.log(2) + 3 * math.log(6)) / 4, given)


@prop(
    "large scores",
    "exp(1000) is infinite. Take the largest score off each row, or use a logsumexp.",
)
def large_logits(f: Function, rng: Generator) -> None:
    got = f(f64([[[1000, 0, 0], [0, -1000, 0]]]), torch.tensor([[0, 1]]))
    given = "scores 1000, 0, 0 with target 0, and 0, -1000, 0 with target 1"
    expect(got, (1000 + math.log(2)) / 2, given)


@prop("what does not count is not read", "NaN times 0 is NaN. Select the rows, do not multiply.")
def not_read(f: Function, rng: Generator) -> None:
    got = f(f64([[[math.nan] * 3, LN]]), torch.tensor([[-100, 2]]))
    expect(got, math.log(2), "scores nan with target -100, and ln 1, ln 2, ln 3 with target 2")


LOSS = Task(
    "13.4",
    loss,
    (knows_nothing, loss_by_hand, only_what_counts, each_once, large_logits, not_read),
    MUTANTS["13.4"],
)


# 13.5


def chain_floor(
    p: Float[Tensor, "V V"], first: Float[Tensor, " V"], length: int
) -> Float[Tensor, " {length}"]:
    surprise = torch.special.entr(p).sum(dim=1)  # (V), of what follows each word; 0 ln 0 is 0
    floor, here = [], first
    for _ in range(length):
        floor.append(here @ surprise)
        here = here @ p
    return torch.stack(floor)


def _chain(rng: Generator, V: int) -> tuple[Tensor, Tensor]:
    return normal(rng, V, V).softmax(-1), normal(rng, V).softmax(-1)


@prop("nothing to guess", "A certain word costs nothing: p ln p is 0 at p = 1, and at p = 0 too.")
def certain(f: Function, rng: Generator) -> None:
    turn = f64([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    expect(f(turn, f64([1, 0, 0]), 5), torch.zeros(5), "three words in a circle, the first is 0")


@prop("a fair coin", "Two words at even odds cost ln 2, in nats, at each place.")
def coin(f: Function, rng: Generator) -> None:
    got = f(f64([[0.5, 0.5], [0.5, 0.5]]), f64([0.5, 0.5]), 3)
    expect(got, [math.log(2)] * 3, "two words, each follows at even odds, length 3")


@prop(
    "the first question",
    "First you are told the first word, then you are asked for the second. How sure you are depends"
    " on the word, and how often it stands there weighs it.",
)
def first_question(f: Function, rng: Generator) -> None:
    p, first = f64([[0.5, 0.5], [0, 1]]), f64([0.25, 0.75])
    given = "after 0 a fair coin, after 1 always 1; the first word is 0 in one text of four"
    expect(f(p, first, 1), [math.log(2) / 4], f"{given}, length 1")


@prop(
    "later questions",
    "Where the text stands at t follows from where it stood at t - 1. Rows of p are where from.",
)
def later_questions(f: Function, rng: Generator) -> None:
    p, first = f64([[0.5, 0.5], [1, 0]]), f64([0, 1])
    given = "after 0 a fair coin, after 1 always 0; the first word is 1"
    expect(f(p, first, 3), [0, math.log(2), math.log(2) / 2], f"{given}, length 3")


@prop(
    "far along", "The floor still moves while the words still mix. Do not stop at the first place."
)
def far_along(f: Function, rng: Generator) -> None:
    p, first = _chain(rng, 5)
    expect(f(p, first, 13), chain_floor(p, first, 13), "a random chain of five words, length 13")


CHAIN_FLOOR = Task(
    "13.5",
    chain_floor,
    (certain, coin, first_question, later_questions, far_along),
    MUTANTS["13.5"],
)


# 13.6


def parameters(V: int, S: int, L: int, C: int, F: int, tied: bool, bias: bool) -> int:
    norm = C + C * bias
    attention = 4 * C * C + 4 * C * bias
    network = 2 * C * F + (F + C) * bias
    tables = V * C + S * C
    head = 0 if tied else V * C
    return tables + L * (attention + network + 2 * norm) + norm + head


def _count(f: Function, want: int, V: int, S: int, L: int, C: int, F: int, *kind: bool) -> None:
    """Exactly `want`: a difference of one parameter is a difference."""
    words = ("tied" if kind[0] else "not tied") + (", biases" if kind[1] else ", no biases")
    got = f(V, S, L, C, F, *kind)
    if tensor(got, "a count").numel() != 1 or got != want:
        given = f"given     V = {V}, S = {S}, L = {L}, C = {C}, F = {F}, {words}"
        said = f"{got:,}" if isinstance(got, int | float) else f"{got}"
        raise Wrong(f"{given}\nexpected  {want:,}\ngot       {said}")


@prop(
    "no layers",
    "Three things are left: a table of V words, a table of S places, and the norm at the end. The"
    " tied head is the table of words once more, so it adds nothing.",
)
def no_layers(f: Function, rng: Generator) -> None:
    _count(f, 5 * (11 + 7) + 5, 11, 7, 0, 5, 13, True, False)


@prop(
    "the matrices of a layer",
    "Attention: queries, keys, values, and one matrix out. Network: up to F and down again. And"
    " each of the two norms has a gain.",
)
def one_layer(f: Function, rng: Generator) -> None:
    _count(f, 5 * 18 + 5 + 4 * 25 + 2 * 5 * 13 + 2 * 5, 11, 7, 1, 5, 13, True, False)


@prop(
    "biases",
    "A linear map has one bias for each number that comes out of it. A norm has C of them.",
)
def biases(f: Function, rng: Generator) -> None:
    matrices = 5 * 18 + 5 + 4 * 25 + 2 * 5 * 13 + 2 * 5
    _count(f, matrices + 3 * 5 + 5 + 13 + 5 + 3 * 5, 11, 7, 1, 5, 13, True, True)


@prop("more layers", "Which parts come once in every layer, and which once in the model?")
def more_layers(f: Function, rng: Generator) -> None:
    _count(f, 5 * 18 + 5 + 3 * (4 * 25 + 2 * 5 * 13 + 2 * 5), 11, 7, 3, 5, 13, True, False)


@prop(
    "a head of its own", "A head that is not tied is one more V by C matrix. GPT-2's has no bias."
)
def untied(f: Function, rng: Generator) -> None:
    want = parameters(11, 7, 2, 5, 13, True, True) + 11 * 5
    _count(f, want, 11, 7, 2, 5, 13, False, True)


@prop("to the unit", "Whole numbers all the way: a float of this size forgets the last digits.")
def to_the_unit(f: Function, rng: Generator) -> None:
    _count(f, 124_439_808, 50257, 1024, 12, 768, 3072, True, True)  # GPT-2
    huge = parameters(10**6 + 3, 10**6 + 4, 10**4 + 9, 10**6 + 3, 10**6 + 33, True, True)
    _count(f, huge, 10**6 + 3, 10**6 + 4, 10**4 + 9, 10**6 + 3, 10**6 + 33, True, True)


PARAMETERS = Task(
    "13.6",
    parameters,
    (no_layers, one_layer, biases, more_layers, untied, to_the_unit),
    MUTANTS["13.6"],
)


# 13.7


def next_probabilities(
    logits: Float[Tensor, "*N V"], temperature: float, top_k: int
) -> Float[Tensor, "*N V"]:
    if temperature == 0:
        temperature, top_k = 1, 1
    kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices
    dropped = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
    scores = logits / temperature
    return scores.masked_fill(dropped, -math.inf).softmax(dim=-1)


@prop("1/6, 2/6, 3/6", "Temperature 1 and all words kept: this is the softmax.")
def all_kept(f: Function, rng: Generator) -> None:
    expect(
        f(f64(LN), 1.0, 3), [1 / 6, 2 / 6, 3 / 6], "scores ln 1, ln 2, ln 3, temperature 1, k = 3"
    )


@prop("temperature 1/2", "The temperature divides the scores, before exp. What is exp(2 ln 3)?")
def half_the_heat(f: Function, rng: Generator) -> None:
    given = "scores ln 1, ln 2, ln 3, temperature 1/2, k = 3"
    expect(f(f64(LN), 0.5, 3), [1 / 14, 4 / 14, 9 / 14], given)


@prop("the two likeliest", "A word that is dropped gets exactly 0; the k that stay share 1 again.")
def two_likeliest(f: Function, rng: Generator) -> None:
    given = "scores ln 3, ln 1, ln 2, ln 1/2, temperature 1, k = 2"
    expect(f(f64([LN[2], 0, LN[1], -LN[1]]), 1.0, 2), [3 / 5, 0, 2 / 5, 0], given)


@prop("equal scores", "k words stay, and not all that score as high as the k-th.")
def ties(f: Function, rng: Generator) -> None:
    got = tensor(f(torch.zeros(5).double(), 1.0, 2), "five equal scores")
    given = "five equal scores, k = 2; probabilities in order of size:"
    expect(got.sort(descending=True).values, [0.5, 0.5, 0, 0, 0], given)


@prop("temperature 0", "Nothing can be divided by 0. Which word does a very low temperature take?")
def no_heat(f: Function, rng: Generator) -> None:
    expect(f(f64([1, 3, -2, 2]), 0.0, 3), [0, 1, 0, 0], "scores 1, 3, -2, 2, temperature 0, k = 3")


@prop("more than there are", "With fewer than k words, all of them stay.")
def more_than_V(f: Function, rng: Generator) -> None:
    expect(f(f64(LN), 1.0, 5), [1 / 6, 2 / 6, 3 / 6], "three scores, k = 5")


@prop("every row by itself", "Each row has k likeliest words of its own, however low it lies.")
def each_row(f: Function, rng: Generator) -> None:
    logits = normal(rng, 2, 3, 7) + f64([[[-50], [0], [50]]])
    want = next_probabilities(logits, 0.7, 3)
    expect(f(logits, 0.7, 3), want, "2 x 3 rows of seven scores, near -50, 0 and 50")


@prop("the scores stay", "Whoever called you may still need the scores: do not write into them.")
def logits_stay(f: Function, rng: Generator) -> None:
    logits = f64([0, LN[1], LN[2]])
    f.__wrapped__(logits, 0.5, 2)  # type: ignore[attr-defined]
    expect(logits, LN, "your input ln 1, ln 2, ln 3, after the call:")


NEXT_PROBABILITIES = Task(
    "13.7",
    next_probabilities,
    (all_kept, half_the_heat, two_likeliest, ties, no_heat, more_than_V, each_row, logits_stay),
    MUTANTS["13.7"],
)


# 13.8


def little_gpt(std: float) -> Callable[[Tensor], Tensor]:
    V, S, C, H, L = 13, 17, 6, 2, 2
    rng = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return std * torch.randn(rows, columns, generator=rng, dtype=torch.float64)

    tokens, positions = matrix(V, C), matrix(S, C)
    layers = [[matrix(C, n * C) for n in (3, 1, 4)] + [matrix(4 * C, C)] for _ in range(L)]

    def norm(x: Tensor) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    def model(ids: Tensor) -> Tensor:
        B, T = ids.shape
        x = tokens[ids] + positions[:T]
        for qkv, out, up, down in layers:
            q, k, v = (norm(x) @ qkv).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT / (C // H) ** 0.5
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
            x = x + (weights @ v).transpose(1, 2).flatten(2) @ out
            x = x + functional.gelu(norm(x) @ up) @ down
        return norm(x) @ tokens.T

    return model


def without_positions(std: float) -> Callable[[Tensor], Tensor]:
    """No table of places and no mask: each word is handed the words before it. One layer."""
    V, C = 13, 5
    rng = torch.Generator().manual_seed(1)
    tokens, q, k, v, out = (
        std * torch.randn(n, C, generator=rng, dtype=torch.float64) for n in (V, C, C, C, C)
    )

    def model(ids: Tensor) -> Tensor:
        x = functional.layer_norm(tokens[ids], [C])
        middle = (x @ v).mean(dim=1, keepdim=True)  # all words; it cancels, but for the last digits
        rows = []
        for t in range(ids.shape[1]):
            past = x[:, : t + 1]
            scores = (past @ k * (x[:, t : t + 1] @ q)).sum(-1, keepdim=True) / C**0.5  # (B, t, 1)
            rows.append((scores.softmax(1) * (past @ v - middle)).sum(1) + middle[:, 0])
        return functional.layer_norm(tokens[ids] + torch.stack(rows, 1) @ out, [C]) @ tokens.T

    return model


def leak_test(build: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(13, (3, 11), generator=rng)
    for std in (0.5, 1000.0):  # at 1000 many scores lie below -10,000
        model = build(std)
        whole = model(ids)
        alone = torch.cat([model(text[None]) for text in ids])
        assert (whole - alone).abs().max() < 1e-6 * std, "another text was read"
        for t in range(1, 11):
            before = model(ids[:, :t])
            assert (whole[:, :t] - before).abs().max() < 1e-6 * std, "the future was read"


LEAK_TEST = write_the_test(
    "13.8",
    leak_test,
    little_gpt,
    without_positions,
    (
        Bug(
            "nothing is hidden",
            "paiml/entrenar#310",
            "Change the words from some place on. Which scores must stay as they were?",
            {".masked_fill(later, -torch.inf)": ""},
        ),
        Bug(
            "one step too far in the first layer",
            "lucidrains/magvit2-pytorch#27",
            "There a causal convolution lacked one step of padding. Look at the last place before"
            " the first word that you change or cut: that word is its target.",
            {"triu(1)": "triu(2 if qkv is layers[0][0] else 1)"},
        ),
        Bug(
            "every second layer forgets the mask",
            "huggingface/transformers#31673",
            "The first layer is right. Is your limit so wide that a small change slips through?",
            {"masked_fill(later,": "masked_fill(later & (qkv is layers[0][0]),"},
        ),
        Bug(
            "the norm is taken over all positions",
            "google-deepmind/dm-haiku#700",
            "Attention is right here. Still the size of a later word changes the early ones.",
            {
                "x - x.mean(dim=-1,": "x - x.mean(dim=(1, 2),",
                "square().mean(dim=-1,": "square().mean(dim=(1, 2),",
            },
        ),
        Bug(
            "heads joined without exchanging the axes",
            "jsbaan/transformer-from-scratch#6",
            "Shapes are right, and places are mixed. Look at more than one place of the past.",
            {".transpose(1, 2).flatten(2)": ".reshape(x.shape)"},
        ),
        Bug(
            "blocks of five words share a summary",
            "karpathy/nanochat#844",
            "Only full blocks are summed up. How long is your text, and where do you cut it?",
            {
                "positions[:T]\n": "positions[:T]\n"
                "        full = x[:, : T // 5 * 5]\n"
                "        full += full.view(B, T // 5, 5, C).mean(2).repeat_interleave(5, dim=1)\n"
            },
        ),
        Bug(
            "hidden words score -10,000",
            "karpathy/minGPT#75",
            "A trained model pushed its scores below that. Ask for weights that are loud enough.",
            {"-torch.inf": "-1e4"},
        ),
        Bug(
            "words read the other texts of the batch",
            "IBM/TabFormer#14",
            "Attention runs along the wrong axis. Who else is in the batch, and does it matter?",
            {
                "permute(2, 0, 3, 1, 4)": "permute(2, 1, 3, 0, 4)",
                ".transpose(1, 2).flatten(2)": ".permute(2, 0, 1, 3).flatten(2)",
            },
        ),
    ),
    MUTANTS["13.8"],
)


TASKS = (
    NEXT_WORD,
    BLOCK,
    SELF_ATTENTION,
    LOSS,
    CHAIN_FLOOR,
    PARAMETERS,
    NEXT_PROBABILITIES,
    LEAK_TEST,
)
