"""Text into numbers and back: characters, bytes, and byte-pair encoding.

Byte-pair encoding (Gage 1994, for words Sennrich et al. 2016) starts from bytes, counts pairs of
neighbours, makes a new token of the most frequent pair, and does so again. Whatever the merges
are, `decode(encode(data))` is the data: every byte is a token itself.

An id below 256 is a byte. Id 256 + r is what merge r made.
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from operator import index

from jaxtyping import Int
from torch import Tensor

Pair = tuple[int, int]
Ids = Iterable[int] | Int[Tensor, " T"]
Split = Callable[[bytes], list[bytes]]

# GPT-2's pattern (Radford et al. 2019, its encoder.py), where every byte above 127 is a letter.
PIECE = re.compile(
    rb"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+"
    rb"|\s+(?!\S)|\s+"
)


def pieces(data: bytes) -> list[bytes]:
    """Words with the space before them, numbers, signs, white space: no token crosses a border."""
    return PIECE.findall(data)


def merge(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """The ids with `new` wherever the pair stands, from left to right: a a a gives new a."""
    out: list[int] = []
    i = 0
    while i < len(ids):
        hit = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
        out.append(new if hit else ids[i])
        i += 2 if hit else 1
    return out


class Characters:
    """One id for each character of a text, in the order of their code points."""

    def __init__(self, text: str) -> None:
        self.symbols = sorted(set(text))
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            raise ValueError(f"characters that are not in the vocabulary: {unknown}")
        return [self._ids[symbol] for symbol in text]

    def decode(self, ids: Ids) -> str:
        return "".join(self.symbols[i] for i in _checked(ids, self.vocab_size))


class Bytes:
    """The 256 bytes as ids: text in UTF-8, and anything else a file can hold."""

    vocab_size = 256

    def encode(self, text: str | bytes) -> list[int]:
        return list(_bytes(text))

    def decode(self, ids: Ids) -> bytes:
        return bytes(_checked(ids, self.vocab_size))


class BPE:
    """Byte-pair encoding with given merges: pairs of ids, the most frequent first.

    `tokens[i]` is what id i stands for, as bytes: perhaps half a character, so `decode` gives
    bytes. For text, `decode(ids).decode()`.
    """

    def __init__(self, merges: Iterable[Pair], split: Split = pieces) -> None:
        self.merges = [(index(a), index(b)) for a, b in merges]
        self.tokens = [bytes([byte]) for byte in range(256)]
        self._ids: dict[Pair, int] = {}
        self._split = split
        for pair in self.merges:
            new = len(self.tokens)
            if not 0 <= min(pair) <= max(pair) < new:
                raise ValueError(f"merge {pair} makes token {new} of ids that are not there yet")
            if pair in self._ids:
                raise ValueError(f"merge {pair} stands twice in the list")
            self._ids[pair] = new
            self.tokens.append(self.tokens[pair[0]] + self.tokens[pair[1]])

    @classmethod
    def train(cls, text: str | bytes, vocab_size: int, split: Split = pieces) -> "BPE":
        """vocab_size - 256 merges of the most frequent pair; of equals, the pair of smallest ids.

        Pairs are counted inside pieces of the text. Overlaps count: a a a holds the pair twice.
        """
        if vocab_size < 256:
            raise ValueError(f"the 256 bytes are tokens already, got vocab_size {vocab_size}")
        words = Counter(_cut(_bytes(text), split))
        return cls(_merges(words, vocab_size - 256), split)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str | bytes) -> list[int]:
        """The merges in the order in which they were learned, in each piece by itself."""
        words = _cut(_bytes(text), self._split)
        known = {word: self._encode(word) for word in set(words)}
        return [i for word in words for i in known[word]]

    def decode(self, ids: Ids) -> bytes:
        return b"".join(self.tokens[i] for i in _checked(ids, self.vocab_size))

    def _encode(self, word: bytes) -> list[int]:
        ids = list(word)
        while len(ids) > 1:
            # Ids grow with the merges, so the earliest merge is the one with the smallest new id.
            pair = min(pairwise(ids), key=lambda pair: self._ids.get(pair, self.vocab_size))
            if pair not in self._ids:
                break
            ids = merge(ids, pair, self._ids[pair])
        return ids


def _merges(words: Counter[bytes], n: int) -> list[Pair]:
    """n merges, learned from words and how often each occurs.

    A merge changes only the words that hold its pair, so they alone are read again. The heap keeps
    old counts too; an entry is out of date where it is not the present count of its pair.
    """
    texts, often = [list(word) for word in words], list(words.values())
    counts: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for w, ids in enumerate(texts):
        for pair in pairwise(ids):
            counts[pair] += often[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while len(merges) < n:
        while heap and -heap[0][0] != counts[heap[0][1]]:
            heapq.heappop(heap)
        if not heap:
            most = 256 + len(merges)
            raise ValueError(f"no pair is left: this text gives {most} tokens, not {256 + n}")
        _, best = heapq.heappop(heap)
        change: Counter[Pair] = Counter()
        for w in where.pop(best):
            before, texts[w] = texts[w], merge(texts[w], best, 256 + len(merges))
            for pair in pairwise(before):
                change[pair] -= often[w]
            for pair in pairwise(texts[w]):
                change[pair] += often[w]
                where[pair].add(w)
        for pair, more in change.items():
            counts[pair] += more
            if more and counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
        merges.append(best)
    return merges


def _bytes(text: str | bytes) -> bytes:
    if not isinstance(text, str | bytes):
        raise TypeError(f"a tokenizer reads str or bytes, got {type(text).__name__}")
    return text.encode() if isinstance(text, str) else text


def _cut(data: bytes, split: Split) -> list[bytes]:
    words = split(data)
    if b"".join(words) != data:
        raise ValueError(f"split lost something: {len(data)} bytes in, {sum(map(len, words))} out")
    return words


def _checked(ids: Ids, vocab_size: int) -> list[int]:
    numbers = [index(i) for i in ids]
    for i in numbers:
        if not 0 <= i < vocab_size:
            raise ValueError(f"id {i} is not in a vocabulary of {vocab_size}")
    return numbers
