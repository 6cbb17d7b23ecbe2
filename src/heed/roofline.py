"""The roofline: how long an operation takes at least, from two counts and two speeds.

A machine computes at `flops` FLOP/s and moves bytes at `bandwidth` byte/s. An operation takes at
least as long as the slower of its two shares (Williams, Waterman and Patterson 2009). Its FLOPs per
byte are its intensity; the intensity at which both shares take equally long is the ridge.

T queries · S keys · D head width · `size` bytes in a number, 2 in half precision.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

Number = int | float | Fraction  # a fraction stays exact


def _is_number(x: object) -> bool:
    return isinstance(x, int | float | Fraction) and not isinstance(x, bool)


@dataclass(frozen=True)
class Cost:
    """Operations, and the bytes that pass between the memory and the arithmetic for them."""

    flops: Number
    bytes: Number

    def __post_init__(self) -> None:
        for name, x in {"flops": self.flops, "bytes": self.bytes}.items():
            if not _is_number(x) or not 0 <= x < math.inf:
                raise ValueError(f"{name} must be a finite number of 0 or more, got {x!r}")

    @property
    def intensity(self) -> Number:
        """FLOPs per byte; infinite if no byte moves."""
        if not self.bytes:
            return math.inf if self.flops else 0
        return self.flops / self.bytes

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other, with nothing kept in between: FLOPs and bytes add up."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Machine:
    """Two speeds: arithmetic in FLOP/s, memory in byte/s. 1e12 byte/s is 1 TB/s, not 1 TiB/s."""

    name: str
    flops: Number
    bandwidth: Number

    def __post_init__(self) -> None:
        for name, x in {"flops": self.flops, "bandwidth": self.bandwidth}.items():
            if not _is_number(x) or not 0 < x < math.inf:
                raise ValueError(f"{name} must be a positive finite number, got {x!r}")

    @property
    def ridge(self) -> Number:
        """FLOPs per byte at which arithmetic and memory take equally long."""
        return self.flops / self.bandwidth

    def attainable(self, intensity: Number) -> Number:
        """min(flops, bandwidth · intensity): the most FLOP/s an operation can reach."""
        if not _is_number(intensity) or not intensity >= 0:
            raise ValueError(f"an intensity is a number of 0 or more, got {intensity!r}")
        return min(self.flops, self.bandwidth * intensity)

    def seconds(self, cost: Cost) -> Number:
        """max(flops / FLOP/s, bytes / byte/s): it takes at least so long, and at most twice that
        if arithmetic and memory each run at full speed, even in turn."""
        return max(cost.flops / self.flops, cost.bytes / self.bandwidth)


# Data sheets of the SXM cards: dense products in bfloat16 or float16, not the doubled figure for
# matrices that are half zeros, and the bandwidth of the card's memory.
A100 = Machine("A100", 312e12, 2.039e12)  # 80 GB
H100 = Machine("H100", 989e12, 3.35e12)
H200 = Machine("H200", 989e12, 4.8e12)


def matmul(rows: int, inner: int, columns: int, size: int = 2) -> Cost:
    """A (rows, inner) by an (inner, columns) matrix: both read once, the product written once."""
    _check(rows=rows, inner=inner, columns=columns, size=size)
    numbers = rows * inner + inner * columns + rows * columns
    return Cost(2 * rows * inner * columns, size * numbers)


def scores_bytes(T: int, S: int, size: int = 2) -> int:
    """T · S · size: the scores of one head of one layer, all pairs."""
    _check(T=T, S=S, size=size)
    return T * S * size


def attention(T: int, S: int, D: int, size: int = 2, *, stored: bool) -> Cost:
    """4TSD FLOPs of one head. Queries, keys, values and the output each pass once.

    `stored`: scores are written and read, weights are written and read, four passes over T · S
    numbers more. The softmax's own operations, a few a pair, are left out, and so is what a scale,
    a mask or dropout would pass again if each were an operation of its own.
    """
    _check(T=T, S=S, D=D, size=size)
    numbers = 2 * T * D + 2 * S * D
    return Cost(4 * T * S * D, size * (numbers + 4 * T * S if stored else numbers))


def _check(**sizes: int) -> None:
    for name, n in sizes.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"{name} must be an integer of 1 or more, got {n!r}")
