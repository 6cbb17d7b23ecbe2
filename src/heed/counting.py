"""What a GPT costs, as exact integers: arithmetic on shapes, no model needed.

T positions · C width of the stream · V words · L layers; S is the longest text it can read.
n_heads is in no formula: heads cut the width C into pieces, they add nothing to it.
"""

from typing import Any

SETTINGS = {"vocab_size", "max_len", "n_layers", "n_heads", "d_model"}


def parameters(config: Any) -> int:
    """12LC² + 13LC + VC + SC + 2C: every number that is learned, the tied head counted once."""
    return breakdown(config)["total"]


def breakdown(config: Any) -> dict[str, int]:
    """The same by part: tokens, positions, attention, mlp, norms, total.

    A layer's attention is C → 3C and C → C with biases, 4C² + 4C; its MLP C → 4C → C, 8C² + 5C.
    A norm is 2C, two in a layer and one at the end. Together 12LC² + 13LC + VC + SC + 2C.
    """
    V, S, L, C = _sizes(config)
    parts = {
        "tokens": V * C,
        "positions": S * C,
        "attention": L * (4 * C**2 + 4 * C),
        "mlp": L * (8 * C**2 + 5 * C),
        "norms": L * 4 * C + 2 * C,
    }
    return parts | {"total": sum(parts.values())}


def flops(config: Any, length: int, batch: int = 1) -> int:
    """24TLC² + 4T²LC + 2TVC per text: the matrix products of one forward pass.

    A multiply-add counts 2. All T² scores count, those behind the causal mask too, because a dense
    product computes them. Norms, softmax, GELU, biases and sums are left out.
    """
    V, S, L, C = _sizes(config)
    if not 0 <= length <= S:
        raise ValueError(f"length must lie in 0 to max_len {S}, got {length}")
    if batch < 1:
        raise ValueError(f"a batch holds at least one text, got {batch}")
    T = length
    return batch * (24 * T * L * C**2 + 4 * T**2 * L * C + 2 * T * V * C)


def _sizes(config: Any) -> tuple[int, int, int, int]:
    """V, S, L and C of a config that has a GPT's settings and no others."""
    settings = vars(config)
    missing, unknown = SETTINGS - settings.keys(), settings.keys() - SETTINGS - {"dropout"}
    if missing or unknown:
        kind = type(config).__name__
        raise ValueError(f"{kind} is no GPT: lacks {sorted(missing)}, has {sorted(unknown)}")
    for name in SETTINGS:
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise ValueError(f"{name} must be a positive integer, got {settings[name]!r}")
    return config.vocab_size, config.max_len, config.n_layers, config.d_model
