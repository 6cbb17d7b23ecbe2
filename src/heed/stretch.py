"""RoPE past its training length: frequencies in, frequencies out.

A rotary pair turns by `frequency` radians a position, so over T positions it sees the angles from 0
to T · frequency. A pair that finished a turn in training has seen every angle there is. A pair that
did not meets new ones in a longer text; each stretch slows such pairs down, in another way.

pairs: frequencies, fastest first, as `heed.positions.frequencies(d_head, base)` gives them; D is
2 · pairs · s the factor: how many times longer · T training length · B batch · H heads.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def turns(frequencies: Float[Tensor, " pairs"], length: int) -> Float[Tensor, " pairs"]:
    """T · θ / 2π: how many turns each pair makes in `length` positions."""
    _check(frequencies, length=length)
    return length * frequencies / (2 * math.pi)


def interpolated(frequencies: Float[Tensor, " pairs"], factor: float) -> Float[Tensor, " pairs"]:
    """θ / s: position m stands where m / s stood (Chen et al. 2023)."""
    _check(frequencies, factor=factor)
    return frequencies / factor


def ntk(frequencies: Float[Tensor, " pairs"], factor: float) -> Float[Tensor, " pairs"]:
    """θ_p · s^(-2p / (D - 2)): the first pair as it was, the last interpolated (bloc97 2023).

    The same as raising the base b to b · s^(D / (D - 2)).
    """
    _check(frequencies, factor=factor)
    last = len(frequencies) - 1
    if last == 0:
        raise ValueError("one pair cannot be the first, which stays, and the last, which slows")
    if (frequencies.diff() >= 0).any():
        raise ValueError(f"frequencies run from fast to slow, got {frequencies.tolist()}")
    share = torch.arange(last + 1, dtype=frequencies.dtype, device=frequencies.device) / last
    return frequencies * factor**-share


def dynamic(
    frequencies: Float[Tensor, " pairs"], length: int, trained: int, *, factor: float = 1.0
) -> Float[Tensor, " pairs"]:
    """`ntk` by s = factor · length / trained - (factor - 1); up to `trained` nothing changes.

    Of the present length, so that a short text after a long one is read as if it came first. Keys
    in a cache were turned by the frequencies of their day: store them before the rotation.
    """
    _check(frequencies, factor=factor, length=length, trained=trained)
    now = max(length, trained)
    return ntk(frequencies, factor * now / trained - (factor - 1))


def by_parts(
    frequencies: Float[Tensor, " pairs"],
    factor: float,
    trained: int,
    *,
    slow: float = 1.0,
    fast: float = 4.0,
) -> Float[Tensor, " pairs"]:
    """θ for pairs of over `fast` turns, θ / s below `slow` turns, between them a ramp in turns.

    (1 - γ) θ / s + γ θ with γ = (turns - slow) / (fast - slow), held to 0 ... 1: "NTK-by-parts"
    (Peng et al. 2023, section 3.2). With 1 and 4 it is the scaling of Llama 3.1.
    """
    _check_ends(slow, fast)
    _check(frequencies, factor=factor, trained=trained)
    kept = ((turns(frequencies, trained) - slow) / (fast - slow)).clamp(0, 1)
    return _mixed(frequencies, factor, kept)


def yarn(
    frequencies: Float[Tensor, " pairs"],
    factor: float,
    trained: int,
    *,
    slow: float = 1.0,
    fast: float = 32.0,
    whole: bool = True,
) -> Float[Tensor, " pairs"]:
    """`by_parts` as its authors' code has it: a ramp straight in the pair's index, not in turns.

    It runs from the pair of `fast` turns to the pair of `slow` turns, rounded outwards to whole
    pairs if `whole`. Goes with `attention_factor`. Needs a geometric list: stretch it only once.
    """
    _check_ends(slow, fast)
    _check(frequencies, factor=factor, trained=trained)
    pairs = len(frequencies)
    step = _step(frequencies)  # ln of the ratio of two neighbours
    all_turns = turns(frequencies[:1], trained).item()
    start, end = (math.log(all_turns / n) / step for n in (fast, slow))
    if whole:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, 2 * pairs - 1)
    index = torch.arange(pairs, dtype=frequencies.dtype, device=frequencies.device)
    slowed = ((index - start) / (end - start if end != start else 1e-3)).clamp(0, 1)
    return _mixed(frequencies, factor, 1 - slowed)


def attention_factor(factor: float) -> float:
    """0.1 ln s + 1: YaRN multiplies q and k by it, and so the scores by its square."""
    if not 1 <= factor < math.inf:
        raise ValueError(f"the factor must be at least 1 and finite, got {factor}")
    return 0.1 * math.log(factor) + 1


@dataclass(frozen=True, eq=False)
class rotation:  # lower case: it stands where a function stands, `MultiHeadAttention(rotate=...)`
    """Turns channels (p, p + D/2) of q and k by position · frequencies[p], and multiplies by gain.

    `heed.positions.rotate` with frequencies of your own.
    """

    frequencies: Float[Tensor, " pairs"]
    gain: float = 1.0

    def __post_init__(self) -> None:
        _check(self.frequencies)
        if not 0 < self.gain < math.inf:
            raise ValueError(f"the gain must be positive and finite, got {self.gain}")

    def __call__(
        self, x: Float[Tensor, "B H T D"], positions: Int[Tensor, " T"]
    ) -> Float[Tensor, "B H T D"]:
        if x.ndim != 4 or x.shape[3] != 2 * len(self.frequencies):
            want = f"(batch, heads, positions, {2 * len(self.frequencies)})"
            raise ValueError(f"x must be {want}, got {tuple(x.shape)}")
        kind = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has no position 257
        angles = positions[:, None].to(kind) * self.frequencies.to(x.device, kind)
        cos, sin = self.gain * angles.cos(), self.gain * angles.sin()
        a, b = x.chunk(2, dim=3)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3).to(x.dtype)


def _mixed(frequencies: Tensor, factor: float, kept: Tensor) -> Tensor:
    return (1 - kept) * frequencies / factor + kept * frequencies


def _step(frequencies: Tensor) -> float:
    logs = frequencies.double().log()
    steps = -logs.diff()
    if len(logs) < 2 or steps[0] <= 0 or (steps - steps[0]).abs().max() > 1e-5:
        raise ValueError(
            "the ramp needs two or more frequencies, each the same share below the last"
        )
    return steps[0].item()


def _check_ends(slow: float, fast: float) -> None:
    if not 0 < slow < fast < math.inf:
        raise ValueError(f"the ramp runs from slow to more turns than that, got {slow} to {fast}")


def _check(frequencies: Tensor, *, factor: float = 1.0, **lengths: int) -> None:
    if frequencies.ndim != 1 or not frequencies.dtype.is_floating_point or not len(frequencies):
        got = f"{frequencies.dtype} {tuple(frequencies.shape)}"
        raise ValueError(f"frequencies must be a list of floating point numbers, got {got}")
    if not (frequencies.isfinite().all() and (frequencies > 0).all()):
        raise ValueError(f"frequencies must be positive and finite, got {frequencies.tolist()}")
    if not 1 <= factor < math.inf:
        raise ValueError(f"the factor must be at least 1 and finite, got {factor}")
    for name, n in lengths.items():
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")
