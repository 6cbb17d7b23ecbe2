"""Chapter 07, heads: the checks of its seven tasks, and `problem`, two heads to do by hand.

B sequences · T positions · S keys and values · C width of the stream · H query heads ·
G key-value heads · D width of a head · HD all heads side by side · HD3 queries, keys and values of
all heads side by side · N answers of K numbers.
"""

import math
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
    mutants,
    prop,
    write_the_test,
)
from heed.checks.ch04 import f64
from heed.checks.compare import expect, in_brackets, normal, several
from heed.multihead import MultiHeadAttention

MUTANTS = mutants(__file__)


# 07.1


def split_heads(x: Float[Tensor, "B T HD"], n_heads: int) -> Float[Tensor, "B H T D"]:
    return x.unflatten(2, (n_heads, -1)).transpose(1, 2)


@prop("four axes", "Sequences, heads, positions, channels of a head: in this order.")
def four_axes(f: Function, rng: Generator) -> None:
    got = f(normal(rng, 2, 5, 21), 3)
    given = "x of shape (2, 5, 21), 3 heads; the shape:"
    expect(list(getattr(got, "shape", ())), [2, 3, 5, 7], given)


@prop("positions stay", "Let every number be its position. Then row t of every head is full of t.")
def positions_stay(f: Function, rng: Generator) -> None:
    x = torch.arange(5).double()[None, :, None].expand(1, 5, 6)
    want = torch.arange(5).double()[None, None, :, None].expand(1, 2, 5, 3)
    expect(f(x, 2), want, "every number is its position")


@prop("neighbours together", "Channels 0 to D - 1 belong to head 0, the next D to head 1.")
def neighbours(f: Function, rng: Generator) -> None:
    got = f(torch.arange(6).double()[None, None], 3)
    expect(got, [[[[0, 1]], [[2, 3]], [[4, 5]]]], "one position, channels 0 to 5, three heads")


@prop("sequences stay apart", "The first axis is not touched.")
def sequences_apart(f: Function, rng: Generator) -> None:
    x = normal(rng, 3, 5, 14)
    expect(f(x, 7)[0], f(x[:1], 7)[0], "sequence 0 among three, against it alone:")


SPLIT_HEADS = Task(
    "07.1",
    split_heads,
    (four_axes, positions_stay, neighbours, sequences_apart),
    MUTANTS["07.1"],
)


# 07.2


def multi_head(
    x: Float[Tensor, "B T C"],
    w_q: Float[Tensor, "C HD"],
    w_k: Float[Tensor, "C HD"],
    w_v: Float[Tensor, "C HD"],
    w_o: Float[Tensor, "HD C"],
    n_heads: int,
) -> Float[Tensor, "B T C"]:
    q, k, v = (split_heads(x @ w, n_heads) for w in (w_q, w_k, w_v))
    scores = q @ k.mT / q.shape[3] ** 0.5
    heads = scores.softmax(dim=-1) @ v  # (B, H, T, D)
    joined = heads.transpose(1, 2).flatten(2)
    return joined @ w_o


def _layer(
    rng: Generator, B: int, T: int, C: int, HD: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w_q, w_k, w_v = (normal(rng, C, HD) for _ in range(3))
    return normal(rng, B, T, C), w_q, w_k, w_v, normal(rng, HD, C)


def _by_loop(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    """One head after the other, each with its own rows of w_o."""
    D = w_q.shape[1] // n_heads
    out = torch.zeros_like(x)
    for h in range(n_heads):
        own = slice(h * D, (h + 1) * D)
        q, k, v = (x[:, None] @ w[:, own] for w in (w_q, w_k, w_v))
        out += attention(q, k, v)[:, 0] @ w_o[own]
    return out


@prop("shape", "What goes back into the stream is as wide as the stream.")
def same_shape(f: Function, rng: Generator) -> None:
    got = f(*_layer(rng, 2, 5, 7, 6), 3)
    given = "x (2, 5, 7), three heads of width 2; the shape:"
    expect(list(getattr(got, "shape", ())), [2, 5, 7], given)


@prop("one head", "With one head nothing is cut: project, attend, project back.")
def one_head(f: Function, rng: Generator) -> None:
    parts = _layer(rng, 1, 5, 7, 6)
    expect(f(*parts, 1), _by_loop(*parts, 1), "one head of width 6")


@prop(
    "words all alike", "Equal words: every mixture is one value. Each position joins its own heads."
)
def words_alike(f: Function, rng: Generator) -> None:
    x, *ws = _layer(rng, 1, 1, 7, 6)
    x = x.expand(1, 5, 7)
    expect(f(x, *ws, 3), x @ ws[2] @ ws[3], "five equal words, three heads")


@prop("every head its own weights", "Cut the projections, not the word; then one table per head.")
def own_weights(f: Function, rng: Generator) -> None:
    parts = _layer(rng, 1, 5, 7, 6)
    expect(f(*parts, 3), _by_loop(*parts, 3), "one sequence, three heads of width 2")


@prop("several sequences", "Sequences do not read each other.")
def several_sequences(f: Function, rng: Generator) -> None:
    parts = _layer(rng, 3, 5, 7, 22)
    expect(f(*parts, 11), _by_loop(*parts, 11), "three sequences, eleven heads of width 2")


MULTI_HEAD = Task(
    "07.2",
    multi_head,
    (same_shape, one_head, words_alike, own_weights, several_sequences),
    MUTANTS["07.2"],
)


# 07.3


def head_terms(
    heads: Float[Tensor, "B H T D"], w_o: Float[Tensor, "HD C"]
) -> Float[Tensor, "B H T C"]:
    blocks = w_o.unflatten(0, (heads.shape[1], heads.shape[3]))  # (H, D, C)
    return heads @ blocks


@prop("a term for each head", "As many terms as heads, each as wide as the stream.")
def term_each(f: Function, rng: Generator) -> None:
    got = f(normal(rng, 2, 3, 5, 7), normal(rng, 21, 11))
    given = "heads (2, 3, 5, 7), w_o (21, 11); the shape:"
    expect(list(getattr(got, "shape", ())), [2, 3, 5, 11], given)


@prop("by hand", "Head 0 meets the first D rows of w_o, head 1 the next D.")
def terms_by_hand(f: Function, rng: Generator) -> None:
    heads, w_o = f64([[[[1, 2]], [[3, 4]]]]), f64([[1], [10], [100], [1000]])
    expect(f(heads, w_o), [[[[21]], [[4300]]]], "heads (1, 2) and (3, 4), w_o 1, 10, 100, 1000")


@prop("a silent head writes nothing", "A head of zeros adds zeros, and the others do not notice.")
def silent(f: Function, rng: Generator) -> None:
    heads, w_o = normal(rng, 1, 3, 5, 2), normal(rng, 6, 7)
    heads[:, 1] = 0
    expect(f(heads, w_o)[:, 1], torch.zeros(1, 5, 7), "head 1 of three is zero; its term")


@prop("they add up", "Their sum is what joining and multiplying gives.")
def add_up(f: Function, rng: Generator) -> None:
    heads, w_o = normal(rng, 2, 3, 5, 7), normal(rng, 21, 11)
    want = heads.transpose(1, 2).flatten(2) @ w_o
    expect(f(heads, w_o).sum(1), want, "the sum of the terms, against join(heads) @ w_o:")


HEAD_TERMS = Task("07.3", head_terms, (term_each, terms_by_hand, silent, add_up), MUTANTS["07.3"])


# 07.4


def grouped_attention(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S Dv"]
) -> Float[Tensor, "B H T Dv"]:
    G = k.shape[1]
    q = q.unflatten(1, (G, -1))  # (B, G, H/G, T, D)
    scores = q @ k[:, :, None].mT / q.shape[4] ** 0.5
    out = scores.softmax(dim=-1) @ v[:, :, None]
    return out.flatten(1, 2)


def _shared(rng: Generator, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(rng, 2, H, 5, 3), normal(rng, 2, G, 7, 3), normal(rng, 2, G, 7, 11)


@prop("a key-value head for each", "G = H: attention as before, head by head.")
def all_heads(f: Function, rng: Generator) -> None:
    parts = _shared(rng, 3, 3)
    expect(f(*parts), attention(*parts), "three query heads, three key-value heads")


@prop("one for all", "G = 1: every query head reads the same keys and values.")
def one_for_all(f: Function, rng: Generator) -> None:
    parts = _shared(rng, 3, 1)
    expect(f(*parts), attention(*parts), "three query heads, one key-value head")


@prop("neighbours share", "Query head h reads key-value head h // (H // G), counted from 0.")
def neighbours_share(f: Function, rng: Generator) -> None:
    q, k = torch.zeros(1, 6, 1, 1).double(), torch.zeros(1, 2, 1, 1).double()
    v = f64([[[[10]], [[20]]]])
    given = "six query heads, two key-value heads with values 10 and 20"
    expect(f(q, k, v).flatten(), [10, 10, 10, 20, 20, 20], given)


@prop("fresh numbers", "Keys and values are shared in the same way.")
def fresh_groups(f: Function, rng: Generator) -> None:
    parts = _shared(rng, 15, 5)
    expect(f(*parts), attention(*parts), "15 query heads, 5 key-value heads")


GROUPED = Task(
    "07.4",
    grouped_attention,
    (all_heads, one_for_all, neighbours_share, fresh_groups),
    MUTANTS["07.4"],
)


# 07.5


def attention_costs(
    d_model: int, n_heads: int, n_kv_heads: int, d_head: int, n_layers: int, bytes_each: int
) -> tuple[int, int]:
    all_queries, all_keys = n_heads * d_head, n_kv_heads * d_head
    in_a_layer = 2 * d_model * all_queries + 2 * d_model * all_keys
    cache = 2 * all_keys
    return n_layers * in_a_layer, n_layers * cache * bytes_each


def _costs(f: Function, name: str, *sizes: int) -> None:
    names = ["d_model", "n_heads", "n_kv_heads", "d_head", "n_layers", "bytes_each"]
    given = ", ".join(f"{n} {x}" for n, x in zip(names, sizes, strict=True))
    got = several(f(*sizes), 2, f"{name}: {given}")
    want = attention_costs(*sizes)
    for n, what in enumerate(["parameters", "bytes of cache per token"]):
        expect(got[n], want[n], f"{name}: {given}; {what}", tol=1e-12)


@prop("every head its own", "Four square matrices a layer, and keys and values in the cache.")
def costs_mha(f: Function, rng: Generator) -> None:
    _costs(f, "GPT-2 small in half precision, no biases", 768, 12, 12, 64, 12, 2)


@prop("bytes", "A number takes 2 bytes in half precision and 4 in single.")
def costs_bytes(f: Function, rng: Generator) -> None:
    _costs(f, "one small layer in single precision", 6, 3, 3, 2, 1, 4)


@prop("shared keys and values", "Which matrices shrink, and which part of the cache?")
def costs_gqa(f: Function, rng: Generator) -> None:
    _costs(f, "Llama 2 70B", 8192, 64, 8, 128, 80, 2)


@prop("heads of any width", "n_heads times d_head need not be d_model.")
def costs_wide(f: Function, rng: Generator) -> None:
    _costs(f, "Gemma 7B", 3072, 16, 16, 256, 28, 2)


COSTS = Task(
    "07.5",
    attention_costs,
    (costs_mha, costs_bytes, costs_gqa, costs_wide),
    MUTANTS["07.5"],
)


# 07.6


def least_error(answers: Float[Tensor, "N K"], n_heads: int, n_words: int) -> float:
    centred = answers - answers.mean(dim=0)
    spread = torch.linalg.svdvals(centred) ** 2
    reached = n_heads * (n_words - 1)
    return spread[reached:].sum().item() / len(answers)


def _answers(n_words: int, n_slots: int) -> Tensor:
    """Every way to fill the slots with one-hot words."""
    places = torch.cartesian_prod(*[torch.arange(n_words)] * n_slots).view(-1, n_slots)
    return torch.eye(n_words, dtype=torch.float64)[places].flatten(1)


@prop("two sources, one head", "The theorem: half of the variance, (S - 1)/S, cannot be reached.")
def bound_one(f: Function, rng: Generator) -> None:
    for S in (2, 5):
        expect(f(_answers(S, 2), 1, S), (S - 1) / S, f"two slots, one head, {S} words")


@prop("heads enough", "As many heads as slots: nothing is left over.")
def bound_none(f: Function, rng: Generator) -> None:
    expect(f(_answers(3, 2), 2, 3), 0.0, "two slots, two heads, three words")
    expect(f(_answers(3, 1), 2, 3), 0.0, "one slot, two heads, three words")


@prop("no head", "With no head the best answer is always the same one: which?")
def bound_zero(f: Function, rng: Generator) -> None:
    expect(f(_answers(5, 2), 0, 5), 2 * 4 / 5, "two slots, no head, five words")


@prop("three slots", "Each head adds S - 1 directions.")
def bound_three(f: Function, rng: Generator) -> None:
    expect(f(_answers(3, 3), 2, 3), 2 / 3, "three slots, two heads, three words")


@prop("any cloud", "The best flat need not pass through zero, and takes the widest directions.")
def bound_any(f: Function, rng: Generator) -> None:
    cloud = normal(rng, 101, 7) * f64([9, 5, 3, 2, 1, 0.5, 0.1]) + 100
    widest = torch.linalg.eigvalsh(torch.cov(cloud.T, correction=0))  # the smallest first
    expect(f(cloud, 2, 3), widest[:3].sum(), "101 answers around 100, two heads, three words")


LEAST_ERROR = Task(
    "07.6",
    least_error,
    (bound_one, bound_none, bound_zero, bound_three, bound_any),
    MUTANTS["07.6"],
)


# 07.7


def fused_heads(
    x: Float[Tensor, "B T C"],
    w_qkv: Float[Tensor, "C HD3"],
    w_o: Float[Tensor, "HD C"],
    n_heads: int,
) -> Float[Tensor, "B T C"]:
    B, T, _ = x.shape
    q, k, v = (x @ w_qkv).chunk(3, dim=2)
    q, k, v = (y.reshape(B, T, n_heads, -1).transpose(1, 2) for y in (q, k, v))
    weights = (q @ k.mT / q.shape[3] ** 0.5).softmax(dim=-1)
    joined = (weights @ v).transpose(1, 2).reshape(B, T, -1)
    return joined @ w_o


def summed_heads(x: Tensor, w_qkv: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    """The same as a sum over heads."""
    w_q, w_k, w_v = w_qkv.chunk(3, dim=1)
    return _by_loop(x, w_q, w_k, w_v, w_o, n_heads)


def layout_test(implementation: Function) -> None:
    rng = torch.Generator().manual_seed(0)
    B, T, C, H, D = 2, 5, 12, 3, 4
    x, w_qkv, w_o = normal(rng, B, T, C), normal(rng, C, 3 * H * D), normal(rng, H * D, C)
    got, want = implementation(x, w_qkv, w_o, H), summed_heads(x, w_qkv, w_o, H)
    assert (got - want).abs().max() < 1e-9


SLICE = (
    "x @ (w_qkv * (torch.arange(len(w_qkv))[:, None] * n_heads // len(w_qkv) =="
    " torch.arange(w_qkv.shape[1]) % len(w_o) * n_heads // len(w_o)))"
)

LAYOUT_TEST = write_the_test(
    "07.7",
    layout_test,
    fused_heads,
    summed_heads,
    (
        Bug(
            "cut without the transpose",
            "reczoo/FuxiCTR#30",
            "The shape is right, and a head gets pieces of a few positions. Use more than one head"
            " and more than one word.",
            {"y.reshape(B, T, n_heads, -1).transpose(1, 2)": "y.reshape(B, n_heads, T, -1)"},
        ),
        Bug(
            "joined without the transpose",
            "jsbaan/transformer-from-scratch#6",
            "The shape is right on the way back too. What does word 0 get from word 1?",
            {"(weights @ v).transpose(1, 2)": "(weights @ v)"},
        ),
        Bug(
            "q, k and v taken head by head",
            "awslabs/slapo#46",
            "Some projects store q, k, v of head 0, then of head 1. Here all queries come first.",
            {
                ".chunk(3, dim=2)": ".view(B, T, n_heads, 3, -1).transpose(2, 3).flatten(3)"
                ".unbind(2)"
            },
        ),
        Bug(
            "keys and values exchanged",
            "tenstorrent/tt-mlir#8958",
            "Let nothing depend on chance: which of the three is mixed, which is compared?",
            {"q, k, v = (x @": "q, v, k = (x @"},
        ),
        Bug(
            "a head reads its slice of the word",
            "pbloem/former#13",
            "Every head must hear every channel. Change one channel and look at all heads.",
            {"x @ w_qkv": SLICE},
        ),
    ),
    MUTANTS["07.7"],
)


@dataclass(frozen=True, repr=False)
class Problem:
    """Three words of width 2, two heads of width 1; the last word asks.

    The scores are logarithms of whole numbers: W_K of a head is (ln a, ln b).
    """

    random_seed: int
    words: tuple[tuple[int, int], ...]
    asks: tuple[tuple[int, int], tuple[int, int]]  # W_Q of each head
    bases: tuple[tuple[int, int], tuple[int, int]]  # e to the power of W_K
    hands: tuple[tuple[int, int], tuple[int, int]]  # W_V
    rows: tuple[tuple[int, int], tuple[int, int]]  # of W_O, one for each head

    def query(self, h: int) -> int:
        return sum(x * w for x, w in zip(self.words[-1], self.asks[h], strict=True))

    def counts(self, h: int) -> list[int]:
        """exp of each score of head h."""
        a, b = self.bases[h]
        return [(a**x * b**y) ** self.query(h) for x, y in self.words]

    def values(self, h: int) -> list[int]:
        return [sum(x * w for x, w in zip(word, self.hands[h], strict=True)) for word in self.words]

    @property
    def heads(self) -> list[Fraction]:
        """What each head answers."""
        return [
            Fraction(
                sum(n * v for n, v in zip(self.counts(h), self.values(h), strict=True)),
                sum(self.counts(h)),
            )
            for h in (0, 1)
        ]

    @property
    def terms(self) -> list[list[Fraction]]:
        """What each head adds to the stream."""
        return [[head * w for w in row] for head, row in zip(self.heads, self.rows, strict=True)]

    @property
    def answer(self) -> list[Fraction]:
        return [sum(column, Fraction(0)) for column in zip(*self.terms, strict=True)]

    def layer(self) -> tuple[Tensor, MultiHeadAttention]:
        """The words, and heed's layer with these matrices: `layer(x)[0, -1]` is the answer."""
        layer = MultiHeadAttention(2, n_heads=2).double()
        keys = [[math.log(b) for b in pair] for pair in self.bases]
        columns = [list(column) for column in zip(*self.rows, strict=True)]
        parts = {layer.q: self.asks, layer.k: keys, layer.v: self.hands, layer.out: columns}
        for part, weight in parts.items():
            part.weight.data = f64(weight)
        return f64([self.words]), layer

    def __repr__(self) -> str:
        names = "   ".join(f"x{i} = {word}" for i, word in enumerate(self.words, 1))
        lines = [f"Problem {self.random_seed}: two heads of width 1; x3 asks", f"  {names}"]
        for h, (a, b) in enumerate(self.bases):
            lines.append(
                f"  head {h + 1}: W_Q = {self.asks[h]}   W_K = (ln {a}, ln {b})"
                f"   W_V = {self.hands[h]}   its row of W_O = {self.rows[h]}"
            )
        return "\n".join([*lines, "Give each head's answer and the output as fractions."])

    def worked(self) -> str:
        """Head by head, with this problem's numbers."""
        lines = []
        for h in (0, 1):
            n, values = self.counts(h), self.values(h)
            total = sum(n)
            mix = " + ".join(f"{a}·{in_brackets(v)}" for a, v in zip(n, values, strict=True))
            lines.append(
                f"{h + 1}. Head {h + 1}: query {self.query(h)}; exp of the scores"
                f" {', '.join(map(str, n))}, together {total}; values"
                f" {', '.join(map(str, values))}.  ({mix})/{total} = {self.heads[h]}"
            )
        shown = [f"({', '.join(map(str, term))})" for term in self.terms]
        lines.append(f"3. W_O.  {shown[0]} + {shown[1]} = ({', '.join(map(str, self.answer))})")
        return "\n".join(lines)


def problem(random_seed: int) -> Problem:
    """Two heads for paper: fractions all the way, and heads that read differently."""
    rng = random.Random(f"heads {random_seed}")
    ones, logs = [(1, 0), (0, 1), (1, 1)], [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)]
    kinds = [*ones, (2, 0), (0, 2), (2, 1), (1, 2)]
    hands = [(a, b) for a in (-3, 0, 2, 5) for b in (-2, 0, 3, 4) if a or b]
    rows = [(a, b) for a in (-1, 0, 1, 2) for b in (-1, 0, 1, 2) if a or b]
    while True:
        two = [(rng.choice(x), rng.choice(x)) for x in (ones, logs, hands, rows)]
        made = Problem(random_seed, tuple(rng.sample(kinds, 3)), *two)
        first, second = made.counts(0), made.counts(1)
        small = max(first + second) <= 12 and made.query(0) and made.query(1)
        if small and min(len(set(first)), len(set(second))) > 1:
            total = Fraction(sum(first), sum(second))
            if first != [n * total for n in second]:
                return made


TASKS = (SPLIT_HEADS, MULTI_HEAD, HEAD_TERMS, GROUPED, COSTS, LEAST_ERROR, LAYOUT_TEST)
