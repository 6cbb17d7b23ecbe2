"""Chapter 15, counting: the checks of its eight tasks, and `problem`, a small GPT for paper.

V tokens in the vocabulary · S longest text · L layers · C width of the stream · H query heads ·
G key-value heads · D width of a head · F width of the network · E experts, of which K are visited ·
T tokens of a text.
"""

import random
from dataclasses import dataclass
from typing import Any

from torch import Generator

from heed import gpt
from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, several, shown

MUTANTS = mutants(__file__)


def _exact(got: Any, want: int, given: str) -> None:
    """Exactly `want`: off by one is off."""
    if isinstance(got, bool) or not isinstance(got, int | float) or got != want:
        said = f"{got:,}" if isinstance(got, int | float) else f"a {type(got).__name__}"
        raise Wrong(shown(given, f"{want:,}", said))


# 15.1


def attention_parameters(C: int, H: int, G: int, D: int, bias: bool) -> int:
    matrices = C * H * D + 2 * C * G * D + H * D * C
    return matrices + bias * (H * D + 2 * G * D + C)


@prop("four squares", "With H D = C and as many key heads as query heads, all four are C by C.")
def four_squares(f: Function, rng: Generator) -> None:
    _exact(f(12, 3, 3, 4, False), 4 * 144, "C = 12, H = G = 3, D = 4, no biases")


@prop("shared heads", "G heads make keys and values. Which two matrices are narrower?")
def shared(f: Function, rng: Generator) -> None:
    _exact(f(12, 3, 1, 4, False), 2 * 144 + 2 * 48, "C = 12, H = 3, G = 1, D = 4, no biases")


@prop("wide heads", "H D need not be C. The matrix out takes H D numbers and returns C.")
def wide(f: Function, rng: Generator) -> None:
    _exact(f(12, 3, 3, 7, False), 4 * 12 * 21, "C = 12, H = G = 3, D = 7, no biases")


@prop("biases", "A bias has as many numbers as its matrix gives out: not the same for all four.")
def attention_biases(f: Function, rng: Generator) -> None:
    want = 12 * 21 * 2 + 2 * 12 * 7 + 21 + 2 * 7 + 12
    _exact(f(12, 3, 1, 7, True), want, "C = 12, H = 3, G = 1, D = 7, biases")


ATTENTION = Task(
    "15.1",
    attention_parameters,
    (four_squares, shared, wide, attention_biases),
    MUTANTS["15.1"],
)


# 15.2


def llama_parameters(V: int, L: int, C: int, H: int, G: int, D: int, F: int, tied: bool) -> int:
    attention = 2 * C * H * D + 2 * C * G * D
    layer = attention + 3 * C * F + 2 * C
    tables = V * C if tied else 2 * V * C
    return L * layer + tables + C


@prop("no layers", "A table of V tokens, the same table as head, and one norm at the end.")
def bare(f: Function, rng: Generator) -> None:
    _exact(f(11, 0, 12, 3, 1, 4, 7, True), 11 * 12 + 12, "V = 11, L = 0, C = 12, tied")


@prop("one layer", "Attention, three matrices of the gated network, two norms without a bias.")
def a_layer(f: Function, rng: Generator) -> None:
    want = 11 * 12 + 12 + 2 * 144 + 2 * 48 + 3 * 12 * 7 + 24
    _exact(
        f(11, 1, 12, 3, 1, 4, 7, True), want, "V = 11, L = 1, C = 12, H = 3, G = 1, D = 4, F = 7"
    )


@prop("more layers", "Which parts come once in a layer, and which once in the model?")
def layers(f: Function, rng: Generator) -> None:
    want = 11 * 12 + 12 + 5 * (2 * 144 + 2 * 48 + 3 * 12 * 7 + 24)
    _exact(f(11, 5, 12, 3, 1, 4, 7, True), want, "the same with L = 5")


@prop("two tables", "A head that is not tied is one more V by C matrix.")
def two_tables(f: Function, rng: Generator) -> None:
    want = 2 * 11 * 12 + 12 + 2 * 144 + 2 * 48 + 3 * 12 * 7 + 24
    _exact(f(11, 1, 12, 3, 1, 4, 7, False), want, "V = 11, L = 1, C = 12, not tied")


@prop("published sizes", "Whole numbers all the way: a float of this size forgets the last digits.")
def published(f: Function, rng: Generator) -> None:
    small = (128_256, 32, 4096, 32, 8, 128, 14_336, False)
    _exact(f(*small), 8_030_261_248, "Llama 3 8B")
    _exact(f(32_000, 80, 8192, 64, 8, 128, 28_672, False), 68_976_648_192, "Llama 2 70B")
    odd = (10**6 + 3, 10**4 + 9, 10**5 + 1, 7, 7, 10**4 + 1, 10**6 + 33, True)
    _exact(f(*odd), llama_parameters(*odd), f"V, L, C, H, G, D, F = {odd[:7]}, tied")


LLAMA = Task(
    "15.2",
    llama_parameters,
    (bare, a_layer, layers, two_tables, published),
    MUTANTS["15.2"],
)


# 15.3


def mixture(
    V: int, L: int, C: int, H: int, G: int, D: int, F: int, E: int, K: int
) -> tuple[int, int]:
    shared = L * (2 * C * H * D + 2 * C * G * D + C * E + 2 * C) + 2 * V * C + C
    expert = 3 * C * F
    return shared + L * E * expert, shared + L * K * expert


def _both(f: Function, sizes: tuple[int, ...], total: int, active: int, given: str) -> None:
    got = several(f(*sizes), 2, given)
    _exact(got[0], total, f"{given}; total")
    _exact(got[1], active, f"{given}; active")


@prop("one expert", "One expert, always visited: the two numbers are equal. The router is C by E.")
def one_expert(f: Function, rng: Generator) -> None:
    want = 2 * 11 * 12 + 12 + 2 * (2 * 144 + 2 * 48 + 12 + 24 + 3 * 12 * 7)
    _both(f, (11, 2, 12, 3, 1, 4, 7, 1, 1), want, want, "E = K = 1, L = 2, C = 12, F = 7")


@prop("what is stored", "All E experts are stored, and the router has a column for each.")
def stored(f: Function, rng: Generator) -> None:
    want = 2 * 11 * 12 + 12 + 2 * (2 * 144 + 2 * 48 + 5 * 12 + 24 + 5 * 3 * 12 * 7)
    _exact(several(f(11, 2, 12, 3, 1, 4, 7, 5, 2), 2, "E = 5")[0], want, "E = 5, K = 2; total")


@prop(
    "what is visited",
    "A token goes through K experts in every layer, and through all the rest: router, attention,"
    " norms, tables.",
)
def visited(f: Function, rng: Generator) -> None:
    want = 2 * 11 * 12 + 12 + 2 * (2 * 144 + 2 * 48 + 5 * 12 + 24 + 2 * 3 * 12 * 7)
    _exact(several(f(11, 2, 12, 3, 1, 4, 7, 5, 2), 2, "E = 5")[1], want, "E = 5, K = 2; active")


@prop(
    "Mixtral",
    "Python's whole numbers have no end; those of a tensor or an array stop at 32 or 64 bits.",
)
def mixtral(f: Function, rng: Generator) -> None:
    sizes = (32_000, 32, 4096, 32, 8, 128, 14_336, 8, 2)
    _both(f, sizes, 46_702_792_704, 12_879_925_248, "Mixtral 8x7B")


MIXTURE = Task("15.3", mixture, (one_expert, stored, visited, mixtral), MUTANTS["15.3"])


# 15.4


def cache_bytes(L: int, G: int, D: int, T: int, window: int | None, each: int) -> int:
    kept = T if window is None else min(T, window)
    return 2 * L * G * D * kept * each


@prop("one number each", "One layer, one head of width 1, one token, one byte: a key and a value.")
def two_numbers(f: Function, rng: Generator) -> None:
    _exact(f(1, 1, 1, 1, None, 1), 2, "L = G = D = T = 1, no window, 1 byte a number")


@prop("each size once", "Layers, key-value heads, their width, tokens, bytes: each is a factor.")
def factors(f: Function, rng: Generator) -> None:
    _exact(f(3, 5, 7, 11, None, 2), 2 * 3 * 5 * 7 * 11 * 2, "L = 3, G = 5, D = 7, T = 11, 2 bytes")


@prop("a full window", "A window keeps the last tokens and no more.")
def full_window(f: Function, rng: Generator) -> None:
    _exact(f(3, 5, 7, 11, 4, 2), 2 * 3 * 5 * 7 * 4 * 2, "T = 11 and a window of 4")
    _exact(f(32, 8, 128, 10_000, 4096, 2), 512 * 2**20, "Mistral 7B after 10,000 tokens")


@prop("a window not yet full", "Three tokens do not fill a window of four.")
def half_window(f: Function, rng: Generator) -> None:
    _exact(f(3, 5, 7, 3, 4, 2), 2 * 3 * 5 * 7 * 3 * 2, "T = 3 and a window of 4")


CACHE = Task("15.4", cache_bytes, (two_numbers, factors, full_window, half_window), MUTANTS["15.4"])


# 15.5


def overtaken(C: int, H: int, G: int, D: int, F: int, causal: bool) -> int:
    matrices = 2 * C * H * D + 2 * C * G * D + 3 * C * F
    if causal:
        return -(-matrices // (H * D)) - 1  # T (T + 1) / 2 pairs
    return -(-matrices // (2 * H * D))


def _dearer(T: int, C: int, H: int, G: int, D: int, F: int, causal: bool) -> bool:
    """By multiplying it all out: are the pairs of T tokens at least as dear as the matrices?"""
    pairs = T * (T + 1) // 2 if causal else T * T
    return 4 * pairs * H * D >= 2 * T * (2 * C * H * D + 2 * C * G * D + 3 * C * F)


def _first(sizes: tuple[int, ...], causal: bool) -> int:
    C, H, G, D, F = sizes
    return next(T for T in range(1, 10**6) if _dearer(T, C, H, G, D, F, causal))


def _crossed(f: Function, sizes: tuple[int, ...], causal: bool) -> None:
    C, H, G, D, F = sizes
    pairs = "T (T + 1) / 2 pairs" if causal else "all pairs"
    given = f"C = {C}, H = {H}, G = {G}, D = {D}, F = {F}, {pairs}"
    _exact(f(*sizes, causal), _first(sizes, causal), given)


@prop("six times the width", "Four squares of attention and eight of the network: the chapter's T.")
def six_C(f: Function, rng: Generator) -> None:
    _exact(f(48, 3, 3, 16, 128, False), 6 * 48, "C = 48, H = G = 3, D = 16, 3F = 8C, all pairs")


@prop("shared heads cost less", "G appears in the matrices. Does it appear in the pairs?")
def shared_pairs(f: Function, rng: Generator) -> None:
    _crossed(f, (48, 6, 2, 8, 128), False)


@prop("wide heads", "A pair costs 2 D multiply-adds in each of H heads, whatever C is.")
def wide_pairs(f: Function, rng: Generator) -> None:
    _crossed(f, (48, 3, 3, 24, 128), False)


@prop("the first such text", "Where the two are never equal, round so that the pairs are ahead.")
def rounded(f: Function, rng: Generator) -> None:
    _crossed(f, (10, 2, 1, 7, 13), False)


@prop(
    "the causal half",
    "Token i meets i tokens, itself among them: 1 + 2 + ... + T pairs, a bit over half of T².",
)
def causal_half(f: Function, rng: Generator) -> None:
    for sizes in ((48, 3, 3, 16, 128), (10, 2, 1, 7, 13), (4, 2, 2, 9, 1)):
        _crossed(f, sizes, True)


OVERTAKEN = Task(
    "15.5",
    overtaken,
    (six_C, shared_pairs, wide_pairs, rounded, causal_half),
    MUTANTS["15.5"],
)


# 15.6


def best_segments(L: int, layer: int, stream: int) -> tuple[int, int]:
    def kept(K: int) -> int:
        return K * stream + -(-L // K) * layer

    best = min(range(1, L + 1), key=kept)
    return best, kept(best)


def _segments(f: Function, L: int, layer: int, stream: int, K: int) -> None:
    given = f"L = {L}, a layer keeps {layer}, a stream {stream}"
    got = several(f(L, layer, stream), 2, given)
    _exact(got[0], K, f"{given}; segments")
    _exact(got[1], K * stream + -(-L // K) * layer, f"{given}; kept at once")


@prop("the square root", "A layer that keeps what its input takes: four layers, two and two.")
def square_root(f: Function, rng: Generator) -> None:
    _segments(f, 4, 1, 1, 2)


@prop("dear streams", "If a stream is dearer than all layers, one segment is enough.")
def dear_streams(f: Function, rng: Generator) -> None:
    _segments(f, 5, 1, 100, 1)


@prop("dear layers", "A Transformer's layer keeps many streams. How many layers may come back?")
def dear_layers(f: Function, rng: Generator) -> None:
    _segments(f, 12, 33, 1, 12)


@prop("uneven segments", "Five layers in three segments: one or two in each. The longest counts.")
def uneven(f: Function, rng: Generator) -> None:
    _segments(f, 5, 3, 2, 3)


@prop("the fewer of two", "Where two numbers of segments keep the same, take the smaller.")
def fewer(f: Function, rng: Generator) -> None:
    _segments(f, 2, 5, 5, 1)


SEGMENTS = Task(
    "15.6",
    best_segments,
    (square_root, dear_streams, dear_layers, uneven, fewer),
    MUTANTS["15.6"],
)


# 15.7


def training_days(
    N: int, L: int, C: int, T: int, tokens: float, devices: int, peak: float, used: float
) -> float:
    work = (6 * N + 12 * L * C * T) * tokens
    return work / (devices * peak * used) / 86_400


def _days(f: Function, numbers: tuple[float, ...], given: str) -> None:
    want, got = training_days(*numbers), f(*numbers)  # type: ignore[arg-type]
    if not isinstance(got, int | float) or not abs(got - want) <= 1e-9 * want:
        said = f"{got:.6g}" if isinstance(got, int | float) else f"a {type(got).__name__}"
        raise Wrong(shown(given, f"{want:.6g}", said))


@prop("one day", "14,400 parameters, 6 FLOPs each, one token, at one FLOP a second: a day.")
def one_day(f: Function, rng: Generator) -> None:
    _days(f, (14_400, 1, 1, 0, 1, 1, 1, 1), "N = 14,400, no pairs, one token, peak 1")


@prop("tokens and devices", "Twice the tokens, twice the days. Twice the devices, half of them.")
def tokens_devices(f: Function, rng: Generator) -> None:
    _days(f, (1000, 2, 3, 0, 7000, 5, 11, 1), "N = 1,000, T = 0, 7,000 tokens, 5 devices, peak 11")


@prop("utilisation", "At 40 % of the peak a run takes longer.")
def at_forty(f: Function, rng: Generator) -> None:
    _days(f, (1000, 2, 3, 0, 7000, 5, 11, 0.4), "the same at 40 % of the peak")


@prop(
    "the pairs",
    "Each of T keys costs a token 4 C FLOPs in each layer on the way there, and as much twice over"
    " on the way back.",
)
def with_pairs(f: Function, rng: Generator) -> None:
    _days(f, (1000, 2, 3, 50, 7000, 5, 11, 0.4), "the same with L = 2, C = 3 and texts of 50")


DAYS = Task("15.7", training_days, (one_day, tokens_devices, at_forty, with_pairs), MUTANTS["15.7"])


# 15.8


def forward_flops(
    V: int, L: int, C: int, H: int, G: int, D: int, F: int, E: int, K: int, tied: bool, T: int
) -> int:
    projections = C * H * D + 2 * C * G * D + H * D * C
    router = C * E if E > 1 else 0
    expert = 3 * C * F
    scores = H * D * T
    values = H * D * T
    layer = projections + router + K * expert + scores + values
    head = V * C
    return 2 * T * (L * layer + head)


def listed_flops(
    V: int, L: int, C: int, H: int, G: int, D: int, F: int, E: int, K: int, tied: bool, T: int
) -> int:
    """The same, as a list of products (rows, width in, width out), each as often as it is made."""
    layer = [(T, C, (H + 2 * G) * D), (T, H * D, C)]
    layer += [(T, C, E)] * (E > 1) + [(T, C, 2 * F), (T, F, C)] * K
    layer += [(T, D, T), (T, T, D)] * H
    products = layer * L + [(T, C, V)]
    return sum(2 * rows * width_in * width_out for rows, width_in, width_out in products)


BUGS = (
    Bug(
        "the head width is C / H",
        "pytorch/torchtitan#1920",
        "In which model is H D not C? Choose one, and count it on paper.",
        {"scores = H * D * T": "scores = C * T", "values = H * D * T": "values = C * T"},
    ),
    Bug(
        "the gate is forgotten",
        "allenai/open-instruct#1096",
        "A gated network has three matrices. Ask for the exact number, or for a difference in F.",
        {"expert = 3 * C * F": "expert = 2 * C * F"},
    ),
    Bug(
        "all experts are multiplied",
        "AI-Hypercomputer/maxtext#678",
        "Change E and not K. What may grow?",
        {"K * expert": "E * expert"},
    ),
    Bug(
        "scores of the key heads only",
        "facebookresearch/xformers#1404",
        "Shared keys are still met by every query head. Choose G smaller than H.",
        {"scores = H * D * T": "scores = G * D * T", "values = H * D * T": "values = G * D * T"},
    ),
    Bug(
        "a tied head is free",
        "pytorch/torchtitan#3225",
        "A shared table is stored once. How often is it multiplied?",
        {"head = V * C": "head = 0 if tied else V * C"},
    ),
    Bug(
        "looking up is multiplying",
        "huggingface/trl#5698",
        "An embedding is a row of a table. Compare a tied model with one that is not.",
        {"head = V * C": "head = V * C if tied else 2 * V * C"},
    ),
)


def flops_test(implementation: Any) -> None:
    V, L, C, H, G, D, F, E, K, T = 11, 2, 10, 4, 2, 3, 7, 5, 2, 6
    layer = 10 * 12 + 2 * 10 * 6 + 12 * 10  # queries, keys and values, out
    layer += 10 * 5 + 2 * 3 * 10 * 7  # router, two gated experts
    layer += 2 * 12 * 6  # scores and values, over twelve numbers of all query heads
    want = 2 * 6 * (2 * layer + 11 * 10)
    for tied in (True, False):
        got = implementation(V, L, C, H, G, D, F, E, K, tied, T)
        assert got == want, f"tied={tied}: {got:,}, not {want:,}"


FLOPS_TEST = write_the_test("15.8", flops_test, forward_flops, listed_flops, BUGS, MUTANTS["15.8"])


TASKS = (ATTENTION, LLAMA, MIXTURE, CACHE, OVERTAKEN, SEGMENTS, DAYS, FLOPS_TEST)


# A problem for paper


@dataclass(frozen=True, repr=False)
class Problem:
    """A GPT of a few dozen parameters that reads a few tokens."""

    config: gpt.GPTConfig
    length: int

    @property
    def parts(self) -> dict[str, int]:
        c = self.config
        V, S, L, C = c.vocab_size, c.max_len, c.n_layers, c.d_model
        return {
            "table of tokens": V * C,
            "table of positions": S * C,
            "queries, keys, values": L * (C + 1) * 3 * C,
            "out": L * (C + 1) * C,
            "up": L * (C + 1) * 4 * C,
            "down": L * (4 * C + 1) * C,
            "norms": (2 * L + 1) * 2 * C,
        }

    @property
    def answer(self) -> dict[str, int]:
        c, T = self.config, self.length
        L, C, V = c.n_layers, c.d_model, c.vocab_size
        return {
            "parameters": sum(self.parts.values()),
            "operations": 2 * T * (12 * L * C**2 + V * C) + 4 * T**2 * L * C,
        }

    def __repr__(self) -> str:
        c = self.config
        layers = "one layer" if c.n_layers == 1 else f"{c.n_layers} layers"
        heads = "one head" if c.n_heads == 1 else f"{c.n_heads} heads"
        return (
            f"A GPT: {layers} of width {c.d_model}, {heads}, {c.vocab_size} tokens in its"
            f" vocabulary, texts of up to {c.max_len}.\nHow many parameters does it have, and how"
            f" many operations does it take to read {self.length} tokens?"
        )

    def worked(self) -> str:
        c, T = self.config, self.length
        L, C, V = c.n_layers, c.d_model, c.vocab_size
        squares, head = 12 * L * C**2, V * C
        lines = [f"{name:22} {n:5}" for name, n in self.parts.items()]
        lines += [f"{'together':22} {self.answer['parameters']:5}", ""]
        lines += [
            f"numbers in products     12·{L}·{C}² + {V}·{C} = {squares + head}",
            f"each, for {T} tokens      2·{T}·{squares + head} = {2 * T * (squares + head)}",
            f"pairs                   {T}² pairs, 4·{C} operations in {L} layer(s):"
            f" {4 * T**2 * L * C}",
            f"together                {self.answer['operations']}",
        ]
        return "\n".join(lines)


def problem(random_seed: int) -> Problem:
    """A fresh model to count on paper."""
    rng = random.Random(f"count {random_seed}")
    heads = rng.choice((1, 1, 2))
    config = gpt.GPTConfig(
        vocab_size=rng.randint(3, 30),
        max_len=rng.randint(4, 20),
        n_layers=rng.randint(1, 3),
        n_heads=heads,
        d_model=heads * rng.choice((2, 3, 5)),
    )
    return Problem(config, rng.randint(2, config.max_len))
