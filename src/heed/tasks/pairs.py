"""Reversals, dates and number words: two languages, one right answer, and where each word is from.

Every task knows its exact alignment: which source symbols a target symbol is written from. So a map
that a model learned can be held against the truth. The answer follows from the source, so the loss
of a perfect model is 0.

B pairs · S source symbols · T target symbols, plus one for the end in tensors.
Ids: 0 padding · 1 begin · 2 end · symbols from 3. A symbol is a character, or for number words a
word: "twenty seven", "sieben und zwanzig", "vingt sept".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from itertools import chain

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from heed.tasks.words import Pieces, english, french, german

PAD, BEGIN, END, FIRST = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Draws source texts and knows their translations."""

    draw: Callable[[torch.Generator], str]  # one source text
    solve: Callable[[list[str]], Pieces]  # source symbols to target symbols with their origins
    source_vocab: tuple[str, ...]  # the symbol with id 3 first
    target_vocab: tuple[str, ...]
    space: str  # what stands between symbols in a text: " " for words, "" for characters

    floor = 0.0  # nats per symbol: an answer holds no surprise

    @property
    def n_source(self) -> int:
        """Number of source ids, the three that are no symbols included."""
        return FIRST + len(self.source_vocab)

    @property
    def n_target(self) -> int:
        return FIRST + len(self.target_vocab)

    def answer(self, source_text: str) -> str:
        """The right translation."""
        return self.space.join([symbol for symbol, _ in self._pieces(source_text)])

    def alignment(self, source_text: str, target_text: str) -> Bool[Tensor, "T S"]:
        """Which source symbols a target symbol is written from; no row for the end.

        A symbol that no source symbol stands for ("und", the hyphen of a date) has an empty row.
        """
        if target_text != self.answer(source_text):
            right = self.answer(source_text)
            raise ValueError(f"{source_text!r} is {right!r}, not {target_text!r}")
        pieces, S = self._pieces(source_text), len(self._split(source_text))
        return torch.tensor([[j in origin for j in range(S)] for _, origin in pieces])

    def sample(self, n: int, generator: torch.Generator) -> list[tuple[str, str]]:
        """n source texts and their translations."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        sources = [self.draw(generator) for _ in range(n)]
        return [(source, self.answer(source)) for source in sources]

    def batch(
        self, n: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "n S"], Int64[Tensor, "n T"], Int64[Tensor, "n T"]]:
        """Source, target behind a begin, target before an end (-100 at padding)."""
        return self.tensors(self.sample(n, generator))

    def tensors(
        self, pairs: Sequence[tuple[str, str]]
    ) -> tuple[Int64[Tensor, "B S"], Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
        """The same three for texts of your own."""
        source = self.encode([source for source, _ in pairs])
        targets = [self._ids(target, self.target_vocab) for _, target in pairs]
        return (
            source,
            _padded([[BEGIN, *ids] for ids in targets], PAD),
            _padded([[*ids, END] for ids in targets], -100),
        )

    def encode(self, source_texts: Sequence[str]) -> Int64[Tensor, "B S"]:
        """Ids of source texts, padded on the right."""
        return _padded([self._ids(text, self.source_vocab) for text in source_texts], PAD)

    def decode(self, ids: Int64[Tensor, "B T"]) -> list[str]:
        """Target texts: what stands before the first end, padding left out."""
        return [self._text(row, self.target_vocab) for row in ids.tolist()]

    def exact(
        self, source: Int64[Tensor, "B S"], written: Int64[Tensor, "B T"]
    ) -> Bool[Tensor, " B"]:
        """Is the whole translation right? `written` is what a model wrote, up to its end."""
        if len(source) != len(written):
            raise ValueError(f"{len(source)} sources but {len(written)} translations")
        sources = [self._text(row, self.source_vocab) for row in source.tolist()]
        right = [self._ids(self.answer(text), self.target_vocab) + [END] for text in sources]
        return torch.tensor(
            [row[: len(ids)] == ids for row, ids in zip(written.tolist(), right, strict=True)]
        )

    def _pieces(self, source_text: str) -> Pieces:
        return self.solve(self._split(source_text))

    def _split(self, text: str) -> list[str]:
        return text.split(" ") if self.space else list(text)

    def _ids(self, text: str, vocab: tuple[str, ...]) -> list[int]:
        symbols = self._split(text)
        ids = _numbered(vocab)
        unknown = sorted(set(symbols) - ids.keys())
        if unknown or not symbols:
            raise ValueError(f"{text!r} has symbols that are not in the vocabulary: {unknown}")
        return [ids[symbol] for symbol in symbols]

    def _text(self, row: list[int], vocab: tuple[str, ...]) -> str:
        row = row[: row.index(END)] if END in row else row
        if not all(PAD <= i < FIRST + len(vocab) for i in row):
            raise ValueError(f"ids {row}, but the vocabulary ends at {FIRST + len(vocab) - 1}")
        return self.space.join(vocab[i - FIRST] for i in row if i >= FIRST)


@cache
def _numbered(vocab: tuple[str, ...]) -> dict[str, int]:
    return {symbol: i for i, symbol in enumerate(vocab, FIRST)}


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.int64)


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Evenly from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


# Reversals


def reversal(low: int, high: int | None = None) -> Pairs:
    """`312` to `213`, of `low` to `high` digits (or of `low` alone), each length as likely."""
    high = low if high is None else high
    if not 1 <= low <= high:
        raise ValueError(f"lengths run from low to high, both at least 1, got {low} to {high}")

    def draw(generator: torch.Generator) -> str:
        n = _integer(low, high, generator)
        return "".join(map(str, torch.randint(10, (n,), generator=generator).tolist()))

    digits = tuple("0123456789")
    return Pairs(draw=draw, solve=_reverse, source_vocab=digits, target_vocab=digits, space="")


def _reverse(digits: list[str]) -> Pieces:
    return [(digits[j], {j}) for j in reversed(range(len(digits)))]


# Dates

MONTHS = (
    "January February March April May June July August September October November December"
).split()
FIRST_DAY, LAST_DAY = date(1900, 1, 1), date(2099, 12, 31)


def dates() -> Pairs:
    """`3 May 2021` to `2021-05-03`: every day of the years 1900 to 2099 is as likely."""
    n_days = (LAST_DAY - FIRST_DAY).days

    def draw(generator: torch.Generator) -> str:
        day = FIRST_DAY + timedelta(days=_integer(0, n_days, generator))
        return f"{day.day} {MONTHS[day.month - 1]} {day.year}"

    letters = sorted(set("".join(MONTHS)))
    return Pairs(
        draw=draw,
        solve=_iso_date,
        source_vocab=(" ", *"0123456789", *letters),
        target_vocab=("-", *"0123456789"),
        space="",
    )


def _iso_date(symbols: list[str]) -> Pieces:
    """A digit of the year or of a two-digit day has one origin; one of the month, the whole name.

    The 0 that fills up a one-digit day comes from that digit.
    """
    text = "".join(symbols)
    try:
        day, month, year = text.split(" ")
        when = date(int(year), MONTHS.index(month) + 1, int(day))
    except ValueError as fault:
        raise ValueError(f"a date looks like '3 May 2021', got {text!r}") from fault
    if text != f"{when.day} {month} {when.year}" or not FIRST_DAY <= when <= LAST_DAY:
        raise ValueError(f"a date looks like '3 May 2021', from 1900 to 2099, got {text!r}")
    name = set(range(len(day) + 1, len(day) + 1 + len(month)))
    first = len(text) - 4
    return [
        *((digit, {first + i}) for i, digit in enumerate(year)),
        ("-", set()),
        *((digit, name) for digit in f"{when.month:02}"),
        ("-", set()),
        *((digit, {i if len(day) == 2 else 0}) for i, digit in enumerate(f"{when.day:02}")),
    ]


# Number words


def numbers(language: str, among: Sequence[int] = range(1000)) -> Pairs:
    """`twenty seven` to `sieben und zwanzig` ("german") or `vingt sept` ("french"), 0 to 999.

    `among` says which numbers are drawn, each as likely: leave some out to test on them. The words
    of all thousand are in the vocabulary. German says "ein hundert", French of France "cent".
    """
    say = {"german": german, "french": french}.get(language)
    if say is None:
        raise ValueError(f"number words are there in german and french, got {language!r}")
    numbers = tuple(among)
    if not numbers or not all(0 <= n <= 999 for n in numbers):
        raise ValueError("numbers to draw lie between 0 and 999, and there is at least one")
    known = {tuple(english(n)): n for n in range(1000)}

    def draw(generator: torch.Generator) -> str:
        return " ".join(english(numbers[_integer(0, len(numbers) - 1, generator)]))

    def solve(words: list[str]) -> Pieces:
        if tuple(words) not in known:
            raise ValueError(f"not an English number from 0 to 999: {' '.join(words)!r}")
        return say(known[tuple(words)])

    return Pairs(
        draw=draw,
        solve=solve,
        source_vocab=tuple(dict.fromkeys(chain.from_iterable(known))),
        target_vocab=tuple(dict.fromkeys(word for n in range(1000) for word, _ in say(n))),
        space=" ",
    )
