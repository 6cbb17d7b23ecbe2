"""Who may read whom: a mask is a question `mask(b, h, i, j) -> bool`, asked about any set of pairs.

b sequence · h head · i position of the query · j position of the key. Queries are the last T of the
S positions, so row r of T asks as position i = S - T + r. The signature is FlexAttention's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def full(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Everybody reads everybody."""
    return j >= 0


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """j <= i: the past and oneself. Not j < i: then the first query could read nothing."""
    return j <= i


@dataclass(frozen=True)
class window:  # lower case: it is used where a function stands, `attention(q, k, v, window(4))`
    """The position itself and the width - 1 before it."""

    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"a window holds at least the position itself, got width {self.width}")

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - self.width)

    def span(self, first: int, last: int, S: int) -> tuple[range, range]:
        some = _cut(first - self.width + 1, last + 1, S)
        return some, _cut(last - self.width + 1, first + 1, S)


@dataclass(frozen=True, eq=False)
class padding:
    """Sequence b holds lengths[b] real positions, from the left; the rest is never read."""

    lengths: Int[Tensor, " B"]

    def __post_init__(self) -> None:
        kind = self.lengths.dtype
        if (
            self.lengths.ndim != 1
            or kind.is_floating_point
            or kind.is_complex
            or kind == torch.bool
        ):
            raise ValueError(
                f"lengths must be integers of shape (B,), got {kind} {tuple(self.lengths.shape)}"
            )
        if (self.lengths < 0).any():
            raise ValueError(f"lengths must not be negative, got {self.lengths.tolist()}")

    def fit(self, B: int, H: int, T: int, S: int) -> None:
        if len(self.lengths) != B:
            raise ValueError(f"{len(self.lengths)} lengths for a batch of {B}")

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < self.lengths[b]

    def span(self, first: int, last: int, S: int) -> tuple[range, range]:
        lengths = self.lengths.tolist() or [0]
        return _cut(0, max(lengths), S), _cut(0, min(lengths), S)


@dataclass(frozen=True, eq=False)
class dense:
    """A table of answers, True = may read, of shape (S), (T, S), (H, T, S) or (B, H, T, S).

    An axis of size 1 stands for all its indices; the keys' axis only where the queries' is 1 too,
    since the table's own T and S say which position its first row is.
    """

    table: Bool[Tensor, "..."]

    def __post_init__(self) -> None:
        if self.table.dtype != torch.bool:
            raise ValueError(f"a dense mask is bool (True = may read), got {self.table.dtype}")
        if not 1 <= self.table.ndim <= 4:
            raise ValueError(f"a dense mask has 1 to 4 axes, got shape {tuple(self.table.shape)}")
        if self.table.shape[-1] == 1 and self.table.ndim > 1 and self.table.shape[-2] > 1:
            raise ValueError(f"spell the keys' axis out, got shape {tuple(self.table.shape)}")

    def fit(self, B: int, H: int, T: int, S: int) -> None:
        for have, want in zip(self.table.shape[::-1], (S, T, H, B), strict=False):
            if have not in (1, want):
                shape = tuple(self.table.shape)
                raise ValueError(f"mask of shape {shape} does not fit (B, H, T, S) = {B, H, T, S}")

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        table = self.table.reshape((1,) * (4 - self.table.ndim) + self.table.shape)
        row = i - (table.shape[3] - table.shape[2])  # the first row of the table is the first query
        index = [
            x if n > 1 else torch.zeros_like(x)
            for x, n in zip((b, h, row, j), table.shape, strict=True)
        ]
        return table[tuple(index)]


@dataclass(frozen=True)
class both:
    """Readable under both masks: their intersection."""

    one: Mask
    two: Mask

    def fit(self, B: int, H: int, T: int, S: int) -> None:
        _fit(self.one, B, H, T, S)
        _fit(self.two, B, H, T, S)

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.one(b, h, i, j) & self.two(b, h, i, j)

    def span(self, first: int, last: int, S: int) -> tuple[range, range]:
        (a, x), (c, y) = (span(mask, first, last, S) for mask in (self.one, self.two))
        return _meet(a, c), _meet(x, y)


@dataclass(frozen=True)
class either(both):
    """Readable under one mask or the other: their union."""

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.one(b, h, i, j) | self.two(b, h, i, j)

    def span(self, first: int, last: int, S: int) -> tuple[range, range]:
        (a, x), (c, y) = (span(mask, first, last, S) for mask in (self.one, self.two))
        hull = range(min(a.start, c.start), max(a.stop, c.stop)) if a and c else a or c
        return hull, max(x, y, key=len)


def table(
    mask: Mask, B: int, H: int, T: int, S: int, device: torch.device | str | None = None
) -> Bool[Tensor, "B H T S"]:
    """The mask's answer about every pair. True = may read."""
    check(mask, B, H, T, S)
    return ask(mask, *indices(B, H, T, S, device)).expand(B, H, T, S)


def check(mask: Mask, B: int, H: int, T: int, S: int) -> None:
    """An error that says why this mask cannot be asked about (B, H, T, S)."""
    if not callable(mask):
        hint = "; wrap a bool tensor in masks.dense" if isinstance(mask, Tensor) else ""
        raise TypeError(
            f"a mask is a predicate (b, h, i, j) -> bool, got {type(mask).__name__}{hint}"
        )
    if min(B, H, T, S) < 0:
        raise ValueError(f"sizes must not be negative, got (B, H, T, S) = {B, H, T, S}")
    _fit(mask, B, H, T, S)


def ask(mask: Mask, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The mask's answer about some pairs, in a shape that broadcasts to theirs."""
    answer = mask(b, h, i, j)
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool:
        kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"a mask must answer with bools (True = may read), got {kind}")
    return answer


def span(mask: Mask, first: int, last: int, S: int) -> tuple[range, range]:
    """Keys among which lie all that a query from first to last may read; keys they all may read.

    Known without a question for masks that are bands. Any other mask: all keys, and none for sure.
    """
    if mask is full:
        return range(S), range(S)
    if mask is causal:
        return _cut(0, last + 1, S), _cut(0, first + 1, S)
    if hasattr(mask, "span"):
        return mask.span(first, last, S)
    return range(S), range(0)


def _cut(start: int, stop: int, S: int) -> range:
    return range(max(0, start), min(max(stop, 0), S))


def _meet(x: range, y: range) -> range:
    return range(max(x.start, y.start), min(x.stop, y.stop))


def indices(
    B: int, H: int, T: int, S: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b, h, i and j of every pair, shaped to broadcast to (B, H, T, S)."""
    b = torch.arange(B, device=device)[:, None, None, None]
    h = torch.arange(H, device=device)[:, None, None]
    i = torch.arange(S - T, S, device=device)[:, None]
    return b, h, i, torch.arange(S, device=device)


def _fit(mask: Mask, B: int, H: int, T: int, S: int) -> None:
    """Masks that hold data know which sizes they were made for."""
    if hasattr(mask, "fit"):
        mask.fit(B, H, T, S)
