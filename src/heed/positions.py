"""Where order can enter: added at the input, turned into queries and keys, or added to scores.

B batch · T queries · S keys · C width of the stream · H heads · D head width · N rows of a weight,
or any shape · R rows of Shaw's table · i query · j key.
Positions count from 0. Queries are the last T of the S positions, as everywhere.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor


def frequencies(d_head: int, base: float = 10000.0) -> Float[Tensor, " pairs"]:
    """base^(-2p/D) radians per position for the pairs p = 0 ... D/2 - 1, in float64."""
    if d_head < 2 or d_head % 2:
        raise ValueError(f"pairs need an even width of 2 or more, got {d_head}")
    if not 0 < base < math.inf:
        raise ValueError(f"the base must be positive and finite, got {base}")
    return base ** -(torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)


def sinusoids(
    n: int, d_model: int, *, interleaved: bool = True, dtype: torch.dtype | None = None
) -> Float[Tensor, "{n} {d_model}"]:
    """Row t is sin(t w0), cos(t w0), sin(t w1), cos(t w1), ... (Vaswani et al. 2017, section 3.5).

    Not interleaved: all sines, then all cosines. Added to the stream before the first layer.
    """
    if n < 0:
        raise ValueError(f"the number of positions must not be negative, got {n}")
    angles = torch.arange(n, dtype=torch.float64)[:, None] * frequencies(d_model)
    table = _join(angles.sin(), angles.cos(), interleaved)
    return table.to(torch.get_default_dtype() if dtype is None else dtype)


def rotate(
    x: Float[Tensor, "B H T D"],
    positions: Int[Tensor, "*B T"],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Float[Tensor, "B H T D"]:
    """Each pair of channels, turned by position · frequency (Su et al. 2021, eq. 34): RoPE.

    For queries and keys, in every layer; values stay. Pair p is channels (p, p + D/2) as in
    GPT-NeoX and Llama, or (2p, 2p + 1) as in the paper if interleaved. Angles are float32 or
    better whatever x is: bfloat16 has no 257.
    """
    _check_rotation(x, positions)
    kind = torch.promote_types(x.dtype, torch.float32)
    places = positions if positions.ndim == 1 else positions[:, None]  # every head the same
    angles = places[..., None].to(kind) * frequencies(x.shape[3], base).to(x.device, kind)
    cos, sin = angles.cos(), angles.sin()  # (T, D/2) or (B, 1, T, D/2)
    a, b = x.unflatten(3, (-1, 2)).unbind(4) if interleaved else x.chunk(2, dim=3)
    return _join(a * cos - b * sin, a * sin + b * cos, interleaved).to(x.dtype)


def halved(weight: Float[Tensor, "N *C"], n_heads: int) -> Float[Tensor, "N *C"]:
    """The N rows of a W_Q or W_K made for interleaved pairs, reordered for half-split pairs."""
    if n_heads < 1 or len(weight) % (2 * n_heads):
        raise ValueError(f"{len(weight)} rows are not pairs in each of {n_heads} heads")
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def shaw(
    q: Float[Tensor, "B H T D"], vectors: Float[Tensor, "R D"], n_keys: int
) -> Float[Tensor, "B H T S"]:
    """q_i · a(j - i) / √D, added to the scores: relative keys (Shaw et al. 2018, eq. 4).

    Row r of the 2w + 1 `vectors` is a(r - w); distances beyond w share the last one.
    """
    _check_heads("q", q)
    R, D = vectors.shape
    if R % 2 == 0 or D != q.shape[3]:
        raise ValueError(f"need an odd number of vectors of width {q.shape[3]}, got {R} of {D}")
    T = q.shape[2]
    if n_keys < T:
        raise ValueError(f"the {T} queries are the last of the keys, but there are {n_keys} keys")
    j = torch.arange(n_keys, device=q.device)
    distance = j - j[n_keys - T :, None]  # (T, S)
    near = vectors[distance.clamp(-(R // 2), R // 2) + R // 2]
    return torch.einsum("bhtd,tsd->bhts", q, near) / math.sqrt(D)


def buckets(
    distance: Int[Tensor, "*N"],
    *,
    bidirectional: bool,
    n_buckets: int = 32,
    max_distance: int = 128,
) -> Int[Tensor, "*N"]:
    """Which of T5's n_buckets learned biases stands for the distance j - i (Raffel et al. 2020).

    Small distances have a bucket each, larger ones share ever wider buckets up to max_distance.
    Bidirectional: keys behind and ahead have half of the buckets each; else all ahead are 0.
    """
    _check_integers("distance", distance)
    side = n_buckets // 2 if bidirectional else n_buckets
    if side < 2 or max_distance <= side // 2 or (bidirectional and n_buckets % 2):
        raise ValueError(f"no {n_buckets} buckets up to distance {max_distance}")
    far = distance.abs() if bidirectional else -distance.clamp(max=0)
    starts = torch.tensor(_starts(side, max_distance), device=distance.device)
    index = torch.bucketize(far, starts, right=True)
    return index + side * (distance > 0) if bidirectional else index


@cache
def _starts(side: int, max_distance: int) -> list[int]:
    """The smallest distance of each bucket but the first; in integers, no logarithm rounds."""
    exact = side // 2
    steps = side - exact
    return [*range(1, exact + 1)] + [
        next(
            n
            for n in range(exact, max_distance + 1)
            if n**steps >= exact ** (steps - k) * max_distance**k
        )
        for k in range(1, steps)
    ]


def alibi_slopes(n_heads: int) -> Float[Tensor, " H"]:
    """2^(-8/H), 2^(-16/H), ... 2^-8 for H a power of two (Press et al. 2022, section 3).

    Else those of the power of two below, then every second one of the power of two above.
    """
    if n_heads < 1:
        raise ValueError(f"slopes are for 1 head or more, got {n_heads}")
    below = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    slopes += [2 ** (-4 * h / below) for h in range(1, 2 * (n_heads - below), 2)]
    return torch.tensor(slopes)


@dataclass(frozen=True)
class alibi:  # lower case, because it stands where a function could: `bias=alibi(8)`
    """-slope · |i - j|, added to the score: what is far counts less, at a rate per head."""

    n_heads: int

    def __post_init__(self) -> None:
        alibi_slopes(self.n_heads)

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if h.ndim and h.max() + 1 != self.n_heads:
            raise ValueError(f"slopes for {self.n_heads} heads, scores of {int(h.max()) + 1}")
        return -alibi_slopes(self.n_heads).to(h.device)[h] * (i - j).abs()


def _join(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
    """Two halves of the channels: as neighbours, or one behind the other."""
    return torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)


def _check_heads(name: str, x: Tensor) -> None:
    if x.ndim != 4 or not x.dtype.is_floating_point:
        form = "floats (batch, heads, positions, width)"
        raise ValueError(f"{name} must be {form}, got {x.dtype} {tuple(x.shape)}")


def _check_integers(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be integers, got {x.dtype}")


def _check_rotation(x: Tensor, positions: Tensor) -> None:
    _check_heads("x", x)
    _check_integers("positions", positions)
    if tuple(positions.shape) not in ((x.shape[2],), (x.shape[0], x.shape[2])):
        given = f"{tuple(positions.shape)} for x of {tuple(x.shape)}"
        raise ValueError(f"positions must be (T,) or (B, T), got {given}")
