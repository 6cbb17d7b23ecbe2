"""Chapter 12, tokens: the checks of its eight tasks, and `problem`, a tokenizer trained by hand.

T tokens of a text · V words of the vocabulary · C width · N texts. Ids below 256 are bytes.
"""

import codecs
import random
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from heed import tokenizers
from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, expect, normal, shown
from heed.tokenizers import BPE

MUTANTS = mutants(__file__)
Pair = tuple[int, int]


def _same(got: Any, want: Any, given: str) -> None:
    """Lists, pairs, bytes and text are compared as they are, whatever type a number has."""
    plain = list(got) if isinstance(got, list | tuple) and isinstance(want, list) else got
    if plain != want:
        raise Wrong(shown(given, repr(want), repr(got)))


def _whole(data: bytes) -> list[bytes]:
    return [data]


def _draw(rng: Generator, letters: bytes, n: int) -> bytes:
    return bytes(letters[i] for i in torch.randint(len(letters), (n,), generator=rng).tolist())


# 12.1


def best_pair(words: list[list[int]], often: list[int]) -> Pair:
    counts: dict[Pair, int] = {}
    for ids, n in zip(words, often, strict=True):
        for pair in pairwise(ids):
            counts[pair] = counts.get(pair, 0) + n
    return min(counts, key=lambda pair: (-counts[pair], pair))


@prop("one word", "Neighbours only: an id and the one after it.")
def one_word(f: Function, rng: Generator) -> None:
    _same(tuple(f([[7, 8, 9, 7, 8]], [1])), (7, 8), "the word 7 8 9 7 8, once")


@prop("how often", "A word that occurs ten times brings each of its pairs ten times.")
def how_often(f: Function, rng: Generator) -> None:
    given = "the words 1 2 (three times), 3 4 (five times), 1 2 5 (once)"
    _same(tuple(f([[1, 2], [3, 4], [1, 2, 5]], [3, 5, 1])), (3, 4), given)


@prop("every pair of a word", "A pair that stands twice in a word counts twice.")
def twice_in_a_word(f: Function, rng: Generator) -> None:
    given = "the words 9 8 1 9 8 2 9 8 (once), 3 4 (twice)"
    _same(tuple(f([[9, 8, 1, 9, 8, 2, 9, 8], [3, 4]], [1, 2])), (9, 8), given)


@prop("a tie", "Of equally frequent pairs: the smallest ids, the first id first.")
def tie(f: Function, rng: Generator) -> None:
    _same(tuple(f([[9, 1], [5, 8], [5, 7]], [2, 2, 2])), (5, 7), "9 1, 5 8 and 5 7, twice each")


@prop("order decides nothing", "9 1 and 1 9 are two pairs.")
def directed(f: Function, rng: Generator) -> None:
    _same(tuple(f([[1, 9], [9, 1], [4, 4]], [2, 3, 4])), (4, 4), "1 9 twice, 9 1 three times, 4 4")


@prop("fresh words", "Compare with a count of your own on a few words.")
def fresh_words(f: Function, rng: Generator) -> None:
    for _ in range(9):
        words = [list(_draw(rng, b"abc", 13)) for _ in range(3)]
        often = torch.randint(1, 6, (3,), generator=rng).tolist()
        every = [p for w, n in zip(words, often, strict=True) for p in list(pairwise(w)) * n]
        want = min(every, key=lambda p: (-every.count(p), p))
        _same(tuple(f(words, often)), want, f"{words} with counts {often}")


BEST_PAIR = Task(
    "12.1",
    best_pair,
    (one_word, how_often, twice_in_a_word, tie, directed, fresh_words),
    MUTANTS["12.1"],
)


# 12.2


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    out: list[int] = []
    for i in ids:
        if out and (out[-1], i) == tuple(pair):
            out[-1] = new
        else:
            out.append(i)
    return out


@prop("one pair", "Two ids go, one comes.")
def one_pair(f: Function, rng: Generator) -> None:
    _same(f([5, 1, 2, 5], (1, 2), 256), [5, 256, 5], "5 1 2 5, pair 1 2")


@prop("every place", "The pair may stand at the beginning, at the end, and more than once.")
def every_place(f: Function, rng: Generator) -> None:
    _same(f([1, 2, 7, 1, 2], (1, 2), 256), [256, 7, 256], "1 2 7 1 2, pair 1 2")


@prop("nothing to merge", "Texts without the pair, of one id and of none stay as they are.")
def nothing(f: Function, rng: Generator) -> None:
    for ids in ([2, 1, 3], [1], []):
        _same(f(ids, (1, 2), 256), ids, f"{ids}, pair 1 2")


@prop("from left to right", "In 3 3 3 the first two are merged; an id is used once.")
def left_to_right(f: Function, rng: Generator) -> None:
    _same(f([3, 3, 3], (3, 3), 256), [256, 3], "3 3 3, pair 3 3")
    _same(f([3] * 6, (3, 3), 256), [256] * 3, "3 3 3 3 3 3, pair 3 3")


@prop("the given list stays", "Return a new list; somebody may still need the old one.")
def not_in_place(f: Function, rng: Generator) -> None:
    ids = [1, 2, 1, 2]
    getattr(f, "__wrapped__", f)(ids, (1, 2), 256)
    _same(ids, [1, 2, 1, 2], "1 2 1 2, after a call")


@prop("fresh ids", "Compare with `bytes.replace` on a text of your own.")
def fresh_ids(f: Function, rng: Generator) -> None:
    data = _draw(rng, b"abc", 101)
    want = list(data.replace(b"ab", b"Z").replace(b"Z", b"\0"))
    _same(f(list(data), (97, 98), 0), want, f"{data!r}, pair 97 98, new id 0")


MERGE = Task(
    "12.2",
    merge,
    (one_pair, every_place, nothing, left_to_right, not_in_place, fresh_ids),
    MUTANTS["12.2"],
)


# 12.3


def encode(merges: list[Pair], data: bytes) -> list[int]:
    rank = {pair: r for r, pair in enumerate(merges)}
    ids = list(data)
    while True:
        found = [rank[pair] for pair in pairwise(ids) if pair in rank]
        if not found:
            return ids
        first = min(found)
        ids = tokenizers.merge(ids, merges[first], 256 + first)


def _bpe(merges: list[Pair]) -> BPE:
    return BPE(merges, split=_whole)


@prop("no merges", "Without merges every byte is a token.")
def no_merges(f: Function, rng: Generator) -> None:
    _same(f([], b"need"), [110, 101, 101, 100], "no merges, b'need'")


@prop("one merge", "Merge number r makes id 256 + r.")
def one_merge(f: Function, rng: Generator) -> None:
    _same(f([(110, 101)], b"need"), [256, 101, 100], "merge 110 101, b'need'")


@prop("merges of merges", "A merge may need what an earlier one has made.")
def merges_of_merges(f: Function, rng: Generator) -> None:
    merges = [(101, 100), (101, 256), (110, 257)]
    _same(f(merges, b"needed"), [258, 256], "merges e d, e ed, n eed; b'needed'")


@prop("not the longest", "A longer token is taken only if the merges lead to it.")
def not_longest(f: Function, rng: Generator) -> None:
    merges = [(97, 98), (98, 99), (97, 257)]  # abc can be made only from a and bc
    _same(f(merges, b"abc"), [256, 99], "merges a b, b c, a bc; b'abc'")


@prop(
    "the order of learning", "Not from left to right: the merge that was learned first goes first."
)
def order(f: Function, rng: Generator) -> None:
    merges = [(98, 99), (97, 98), (99, 100)]
    _same(f(merges, b"abcd"), [97, 256, 100], "merges b c, a b, c d; b'abcd'")


@prop("short texts", "A text of one byte has no pair, and neither has an empty one.")
def short(f: Function, rng: Generator) -> None:
    _same(f([(97, 98)], b"a"), [97], "b'a'")
    _same(f([(97, 98)], b""), [], "b''")


@prop("fresh merges", "Compare with heed.tokenizers.BPE.")
def fresh_merges(f: Function, rng: Generator) -> None:
    bpe = BPE.train(_draw(rng, b"aabbc", 211), 256 + 23, split=_whole)
    data = _draw(rng, b"abc", 53)
    _same(f(bpe.merges, data), bpe.encode(data), f"23 merges that were learned, {data!r}")


ENCODE = Task(
    "12.3",
    encode,
    (no_merges, one_merge, merges_of_merges, not_longest, order, short, fresh_merges),
    MUTANTS["12.3"],
)


# 12.4


def stream(tokens: list[bytes]) -> list[str]:
    texts, held = [], b""
    for token in tokens:
        held += token
        try:
            held.decode()
            end = len(held)
        except UnicodeDecodeError as error:
            end = error.start  # where the unfinished character begins
        texts.append(held[:end].decode())
        held = held[end:]
    return texts


@prop("whole characters", "Text that is complete is shown at once, token by token.")
def whole_characters(f: Function, rng: Generator) -> None:
    _same(f([b"need", b"ed", b" it"]), ["need", "ed", " it"], "tokens need, ed, ' it'")


@prop("two halves", "Half a character is no text yet. Show nothing, and keep the bytes.")
def two_halves(f: Function, rng: Generator) -> None:
    _same(f([b"caf", b"\xc3", b"\xa9"]), ["caf", "", "é"], "tokens caf, c3, a9")


@prop("ends in half", "What is complete goes out; only the unfinished tail waits.")
def ends_in_half(f: Function, rng: Generator) -> None:
    _same(f([b"caf\xc3", b"\xa9!"]), ["caf", "é!"], "tokens 'caf' with c3, a9 with '!'")


@prop("four parts", "An emoji has four bytes, and each may be a token.")
def four_parts(f: Function, rng: Generator) -> None:
    parts = [bytes([b]) for b in "🙂".encode()]
    _same(f([*parts, b"ok"]), ["", "", "", "🙂", "ok"], "the four bytes of an emoji, then ok")


@prop("any cut", "Whatever the cuts, the pieces of text make the whole text.")
def any_cut(f: Function, rng: Generator) -> None:
    data = "Σήμερα “heute” आज 今日 🙂🙂 né".encode()
    where = torch.randperm(len(data) - 1, generator=rng)[: 2 * len(data) // 3].sort().values + 1
    tokens = [data[a:b] for a, b in pairwise([0, *where.tolist(), len(data)])]
    decoder = codecs.getincrementaldecoder("utf-8")()
    _same(f(tokens), [decoder.decode(token) for token in tokens], f"{tokens}")


STREAM = Task(
    "12.4",
    stream,
    (whole_characters, two_halves, ends_in_half, four_parts, any_cut),
    MUTANTS["12.4"],
)


# 12.5


def fewest(tokens: list[bytes], data: bytes) -> int:
    least = [0]
    for i in range(1, len(data) + 1):
        ends_here = [t for t in tokens if data[:i].endswith(t)]
        least.append(min(least[i - len(t)] + 1 for t in ends_here))
    return least[-1]


def _tokens(*words: bytes) -> list[bytes]:
    return [bytes([b]) for b in range(97, 105)] + list(words)


@prop("letters", "With single bytes alone, as many tokens as bytes. And none for none.")
def single(f: Function, rng: Generator) -> None:
    expect(f(_tokens(), b"abcde"), 5, "single letters, b'abcde'")
    expect(f(_tokens(b"ab"), b""), 0, "b''")


@prop("one long token", "A token may be as long as the text.")
def one_long(f: Function, rng: Generator) -> None:
    expect(f(_tokens(b"abc"), b"abcabc"), 2, "abc, b'abcabc'")


@prop("not the longest first", "ab cde is two tokens, abc d e three.")
def longest_first(f: Function, rng: Generator) -> None:
    expect(f(_tokens(b"ab", b"abc", b"cde"), b"abcde"), 2, "ab, abc, cde; b'abcde'")


@prop("not the longest last", "The same from the other end.")
def longest_last(f: Function, rng: Generator) -> None:
    expect(f(_tokens(b"de", b"cde", b"abc"), b"abcde"), 2, "de, cde, abc; b'abcde'")


@prop("long texts", "Every beginning of the text once: not every way to cut it.")
def long_text(f: Function, rng: Generator) -> None:
    expect(f(_tokens(b"aa"), b"a" * 41), 21, "aa, forty-one times a")


@prop("fresh tokens", "Compare with all 2^(n-1) ways to cut a short text.")
def fresh_tokens(f: Function, rng: Generator) -> None:
    data = _draw(rng, b"abc", 11)
    tokens = _tokens(data[1:5], data[5:10], data[3:6], data[8:10], _draw(rng, b"abc", 3))
    counts = []
    for cuts in product((False, True), repeat=len(data) - 1):
        at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(data)]
        if {data[a:b] for a, b in pairwise(at)} <= set(tokens):
            counts.append(len(at) - 1)
    expect(f(tokens, data), min(counts), f"{tokens[8:]} and letters, {data!r}")


FEWEST = Task(
    "12.5",
    fewest,
    (single, one_long, longest_first, longest_last, long_text, fresh_tokens),
    MUTANTS["12.5"],
)


# 12.6


def bits_per_byte(
    nats: Float[Tensor, " N"], n_tokens: Int[Tensor, " N"], n_bytes: Int[Tensor, " N"]
) -> float:
    bits = (nats * n_tokens).sum() / torch.tensor(2.0, dtype=torch.float64).log()
    return (bits / n_bytes.sum()).item()


def _bpb(f: Function, nats: list[float], n_tokens: list[int], n_bytes: list[int]) -> None:
    x, t, b = (torch.tensor(numbers) for numbers in (nats, n_tokens, n_bytes))
    want = (
        sum(a * n for a, n in zip(nats, n_tokens, strict=True)) / sum(n_bytes) / 0.693147180559945
    )
    given = f"{n_tokens} tokens at {nats} nats each, {n_bytes} bytes"
    expect(f(x.double(), t, b), want, given)


@prop("bits", "One bit is ln 2 nats: 0.693 nats a token, one token a byte, is one bit.")
def in_bits(f: Function, rng: Generator) -> None:
    _bpb(f, [0.693147180559945], [7], [7])


@prop("tokens and bytes", "The text costs nats times tokens. Share that out over its bytes.")
def tokens_and_bytes(f: Function, rng: Generator) -> None:
    _bpb(f, [1.5], [5], [20])


@prop("several texts", "A long text has more bytes and counts more: sum before you divide.")
def several_texts(f: Function, rng: Generator) -> None:
    _bpb(f, [1.0, 3.0], [90, 10], [300, 20])


@prop("fresh texts", "Any number of texts: sums over all of them, not over the first two.")
def fresh_texts(f: Function, rng: Generator) -> None:
    nats = normal(rng, 7).abs().tolist()
    n_tokens = torch.randint(1, 50, (7,), generator=rng).tolist()
    _bpb(f, nats, n_tokens, [3 * n + i for i, n in enumerate(n_tokens)])


BITS_PER_BYTE = Task(
    "12.6",
    bits_per_byte,
    (in_bits, tokens_and_bytes, several_texts, fresh_texts),
    MUTANTS["12.6"],
)


# 12.7


def tied_gradient(
    ids: Int[Tensor, " T"],
    d_x: Float[Tensor, "T C"],
    h: Float[Tensor, "T C"],
    d_scores: Float[Tensor, "T V"],
) -> Float[Tensor, "V C"]:
    d_table = d_scores.mT @ h
    return d_table.index_add(0, ids, d_x)


def _tied(rng: Generator, ids: list[int], V: int = 7, C: int = 3) -> tuple[Tensor, ...]:
    T = len(ids)
    return torch.tensor(ids), normal(rng, T, C), normal(rng, T, C), normal(rng, T, V)


@prop("a row for each word", "The gradient has the shape of the table.")
def row_each(f: Function, rng: Generator) -> None:
    got = f(*_tied(rng, [5, 1, 0, 4, 2]))
    expect(list(getattr(got, "shape", ())), [7, 3], "T = 5, V = 7, C = 3; the shape:")


@prop("read once", "No scores: the row of a word gets the gradient of the place where it stands.")
def read_once(f: Function, rng: Generator) -> None:
    ids, d_x, h, d_scores = _tied(rng, [5, 1, 0, 4, 2])
    got = f(ids, d_x, h, torch.zeros_like(d_scores))
    expect(got[ids], d_x, "five different words, d_scores zero; the rows read")


@prop("rows nobody reads", "A word that does not stand in the text, and is not scored, stays.")
def nobody_reads(f: Function, rng: Generator) -> None:
    ids, d_x, h, d_scores = _tied(rng, [5, 1, 0, 4, 2])
    got = f(ids, d_x, h, torch.zeros_like(d_scores))
    expect(got[[3, 6]], torch.zeros(2, 3), "words 3 and 6 do not occur, d_scores zero")


@prop("read three times", "A word that stands three times has been used three times.")
def read_thrice(f: Function, rng: Generator) -> None:
    ids, d_x, h, d_scores = _tied(rng, [5, 1, 5, 0, 5])
    got = f(ids, d_x, h, torch.zeros_like(d_scores))
    expect(got[5], d_x[[0, 2, 4]].sum(0), "word 5 at places 0, 2 and 4; its row")


@prop("scored", "scores = h @ table.T. What is the gradient of a matrix product?")
def only_scored(f: Function, rng: Generator) -> None:
    ids, d_x, h, d_scores = _tied(rng, [5, 1, 5, 0, 5])
    want = torch.stack([(d_scores[:, v, None] * h).sum(0) for v in range(7)])
    expect(f(ids, torch.zeros_like(d_x), h, d_scores), want, "d_x zero")


@prop("as autograd says", "The table is used twice, and its gradient is the sum.")
def as_autograd(f: Function, rng: Generator) -> None:
    ids, _, _, _ = _tied(rng, [5, 1, 5, 0, 5])
    table, W = normal(rng, 7, 3).requires_grad_(), normal(rng, 3, 3)
    x = table[ids]
    h = torch.tanh(x @ W)
    scores = h @ table.mT
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 5, 0, 5, 2]))
    d_x, d_scores, want = torch.autograd.grad(loss, [x, scores, table])
    expect(f(ids, d_x, h.detach(), d_scores), want, "a small model with a tied table")


TIED_GRADIENT = Task(
    "12.7",
    tied_gradient,
    (row_each, read_once, nobody_reads, read_thrice, only_scored, as_autograd),
    MUTANTS["12.7"],
)


# 12.8


def round_trip(merges: list[tuple[bytes, bytes]], text: str) -> tuple[list[bytes], str]:
    tokens = [bytes([byte]) for byte in text.encode()]
    for left, right in merges:
        merged: list[bytes] = []
        for token in tokens:
            if merged and merged[-1] == left and token == right:
                merged[-1] = left + right
            else:
                merged.append(token)
        tokens = merged
    back = b"".join(tokens).decode()
    return tokens, back


def by_rank(merges: list[tuple[bytes, bytes]], text: str) -> tuple[list[bytes], str]:
    """With heed's own tokenizer: the same tokens, found another way."""
    names = {bytes([byte]): byte for byte in range(256)}
    pairs = []
    for new, (left, right) in enumerate(merges, start=256):
        pairs.append((names[left], names[right]))
        names[left + right] = new
    bpe = _bpe(pairs)
    ids = bpe.encode(text)
    return [bpe.tokens[i] for i in ids], bpe.decode(ids).decode()


def tokenizer_test(implementation: Function) -> None:
    merges = [(b"b", b"c"), (b"a", b"b"), (b"c", b"d"), (b"\xc3", b"\xa9")]
    assert implementation(merges, "abcd")[0] == [b"a", b"bc", b"d"]
    for text in ("", "abcd", " ab", "ab .", "Ab\n", "café 🙂"):
        assert implementation(merges, text)[1] == text


TOKENIZER_TEST = write_the_test(
    "12.8",
    tokenizer_test,
    round_trip,
    by_rank,
    (
        Bug(
            "decodes every token by itself",
            "exo-explore/exo#1691",
            "Is there a character of several bytes in your texts whose bytes are several tokens?",
            {
                'b"".join(tokens).decode()': '"".join(t.decode(errors="replace") for t in tokens)',
            },
        ),
        Bug(
            "takes the space before a sign away",
            "huggingface/transformers#40088",
            "Texts are not always spaced like a book. Try ' .' and ' !'.",
            {"return tokens, back": 'return tokens, back.replace(" .", ".").replace(" !", "!")'},
        ),
        Bug(
            "takes one space in front away",
            "huggingface/transformers#46491",
            "Does one of your texts begin with a space?",
            {"return tokens, back": 'return tokens, back.removeprefix(" ")'},
        ),
        Bug(
            "merges from left to right instead of by rank",
            "ztxz16/fastllm#715",
            "The text comes back. Look at the tokens, where two merges want the same byte.",
            {
                "    for left, right in merges:\n        merged: list[bytes] = []": (
                    "    for _ in merges:\n        merged: list[bytes] = []"
                ),
                "merged[-1] == left and token == right": "(merged[-1], token) in merges",
                "merged[-1] = left + right": "merged[-1] += token",
            },
        ),
        Bug(
            "takes the longest token first",
            "joshcarp/llm.go#2",
            "The text comes back. Look at the tokens: is the longest one that fits always right?",
            {
                "    back =": (
                    "    every = {bytes([b]) for b in range(256)} | {a + b for a, b in merges}\n"
                    "    rest, tokens = text.encode(), []\n"
                    "    while rest:\n"
                    "        fits = [t for t in every if rest.startswith(t)]\n"
                    "        tokens.append(max(fits, key=len))\n"
                    "        rest = rest[len(tokens[-1]) :]\n"
                    "    back ="
                ),
            },
        ),
    ),
    MUTANTS["12.8"],
)


TASKS = (
    BEST_PAIR,
    MERGE,
    ENCODE,
    STREAM,
    FEWEST,
    BITS_PER_BYTE,
    TIED_GRADIENT,
    TOKENIZER_TEST,
)


# Problems to do by hand

STEMS = ("bead", "deed", "feed", "heal", "heed", "lead", "meal", "need", "read", "seal", "seed")
ENDINGS = ("", "s", "ed", "er")


@dataclass(frozen=True, repr=False)
class Step:
    pair: tuple[str, str]
    count: int
    rivals: tuple[tuple[str, str], ...]  # pairs that are as frequent
    corpus: dict[str, tuple[str, ...]]  # each word in its tokens, after the merge
    tokens: int  # of the whole corpus, after the merge


@dataclass(frozen=True, repr=False)
class Problem:
    """Four merges on five words, by hand. `repr` asks, `worked` answers."""

    words: dict[str, int]
    new: str
    steps: tuple[Step, ...]
    encoded: tuple[str, ...]  # of the new word

    @property
    def letters(self) -> int:
        return sum(len(word) * n for word, n in self.words.items())

    @property
    def answer(self) -> dict[str, Any]:
        return {
            "merges": [step.pair for step in self.steps],
            "tokens": self.steps[-1].tokens,
            "bytes_per_token": Fraction(self.letters, self.steps[-1].tokens),
            "encoded": self.encoded,
        }

    def __repr__(self) -> str:
        listed = ", ".join(f"{word} x{n}" for word, n in self.words.items())
        return (
            f"A corpus of five words, each as often as it says: {listed}.\n"
            "Do four merges. Of equally frequent pairs take the one that comes first: compare the\n"
            "first parts, then the second; letters in the order of the alphabet, then tokens in\n"
            "the order in which they were made. How many tokens is the corpus then, and how many\n"
            f"bytes has one on average? How is {self.new!r} encoded?"
        )

    def worked(self) -> str:
        before, lines = self.letters, [f"{self.letters} letters at the start."]
        for n, step in enumerate(self.steps, start=1):
            said = f"{n}. {' '.join(step.pair)} stands {step.count} times"
            if step.rivals:
                also = ", ".join(" ".join(pair) for pair in step.rivals)
                said += f" (as often as {also}, which come later)"
            corpus = ", ".join(
                f"{' '.join(step.corpus[word])} x{often}" for word, often in self.words.items()
            )
            gone = before - step.tokens
            lines += [f"{said}: {before} - {gone} = {step.tokens} tokens.", f"   {corpus}"]
            before = step.tokens
        share = self.answer["bytes_per_token"]
        lines.append(f"Bytes per token: {self.letters}/{before} = {share}.")
        lines.append(f"{self.new!r}: {' '.join(self.encoded)}.")
        return "\n".join(lines)


def problem(random_seed: int) -> Problem:
    """Five words with counts, four merges, and a sixth word to encode."""
    rng = random.Random(random_seed)
    stems = rng.sample(STEMS, 3)
    every = [stem + ending for stem in stems for ending in ENDINGS]
    *five, new = rng.sample(every, 6)
    words = {word: rng.randint(1, 6) for word in sorted(five)}
    corpus = {word: tuple(word) for word in words}
    known = sorted({letter for word in every for letter in word})
    steps: list[Step] = []
    for _ in range(4):
        counts: Counter[tuple[str, str]] = Counter()
        for word, tokens in corpus.items():
            for pair in pairwise(tokens):
                counts[pair] += words[word]
        most = max(counts.values())
        tied = sorted(
            (p for p in counts if counts[p] == most), key=lambda p: list(map(known.index, p))
        )
        corpus = {word: _joined(tokens, tied[0]) for word, tokens in corpus.items()}
        known.append("".join(tied[0]))
        size = sum(len(tokens) * words[word] for word, tokens in corpus.items())
        steps.append(Step(tied[0], most, tuple(tied[1:]), corpus, size))
    encoded = tuple(new)
    for step in steps:
        encoded = _joined(encoded, step.pair)
    return Problem(words, new, tuple(steps), encoded)


def _joined(tokens: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)
