"""What models are made of: matrices, tables, vectors, pairs of tokens; and how a setting is read.

C width of the stream · H query heads · G key-value heads · D width of a head · F width of the
network · V words · E experts.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Piece:
    """`times` equal pieces: in each, numbers that are learned, and multiply-adds at each place."""

    part: str
    numbers: int
    times: int = 1
    products: int = 0
    at: str = "token"  # the places: each token, source, patch or text, or each pair "token x token"
    visited: int | None = None  # of the `times`, those that one place goes through; None: all


@dataclass(frozen=True, kw_only=True)
class Model:
    width: int
    layers: int
    words: int
    pieces: list[Piece]
    cached: int = 0  # numbers a decoder keeps of each token it has read,
    cached_source: int = 0  # of each token of its source,
    state: int = 0  # and whatever the length
    window: int | None = None  # tokens further back are not kept
    longest: int | None = None  # as many positions as a table has rows
    only: int | None = None  # an image always has the same length
    two_texts: bool = False  # reads a source, writes a text


def linear(
    part: str, n_in: int, n_out: int, times: int = 1, *, bias: bool = False, at: str = "token"
) -> Piece:
    return Piece(part, (n_in + bias) * n_out, times, n_in * n_out, at)


def table(part: str, rows: int, width: int) -> Piece:
    """Looked up, so nothing is multiplied."""
    return Piece(part, rows * width)


def norms(times: int, width: int, *, bias: bool = False) -> Piece:
    return Piece("norms", (1 + bias) * width, times)


def attention(
    C: int,
    H: int,
    G: int,
    D: int,
    times: int,
    *,
    bias: bool = False,
    out_bias: bool | None = None,
    asks: str = "token",
    holds: str = "token",
) -> list[Piece]:
    """CHD + 2CGD + HDC, and 2HD multiply-adds for each pair: one score, one weighted value."""
    return [
        linear("attention", C, H * D, times, bias=bias, at=asks),
        linear("attention", C, G * D, 2 * times, bias=bias, at=holds),
        linear("attention", H * D, C, times, bias=bias if out_bias is None else out_bias, at=asks),
        Piece("attention", 0, times, 2 * H * D, f"{asks} x {holds}"),
    ]


def mlp(
    C: int,
    F: int,
    times: int,
    *,
    gated: bool = False,
    bias: bool = False,
    part: str = "mlp",
    at: str = "token",
) -> list[Piece]:
    """2CF, or 3CF with a gate."""
    return [
        linear(part, C, F, (1 + gated) * times, bias=bias, at=at),
        linear(part, F, C, times, bias=bias, at=at),
    ]


def experts(C: int, F: int, E: int, visits: int, layers: int) -> list[Piece]:
    """3CF in each of E experts, of which a router sends every token to a few."""
    if visits > E:
        raise ValueError(f"a token cannot visit {visits} of {E} experts")
    return [
        linear("router", C, E, layers),
        Piece("experts", 3 * C * F, E * layers, 3 * C * F, visited=visits * layers),
    ]


def head(V: int, C: int, tied: bool) -> Piece:
    """Scores for every word; tied, it is the table of tokens once more, and counted there."""
    return Piece("head", 0 if tied else V * C, products=V * C)


def split(C: int, H: int) -> int:
    if C % H:
        raise ValueError(f"width {C} does not divide into {H} heads")
    return C // H


# Settings


def size(config: Any, name: str, default: int | None = None, *, least: int = 1) -> int:
    """A setting that is a count, or the default where the config has None or nothing."""
    n = getattr(config, name, None)
    if n is None and default is None:
        kind = getattr(config, "model_type", None) or type(config).__name__
        raise ValueError(f"a config of {kind} needs {name}")
    n = default if n is None else n
    if not isinstance(n, int) or isinstance(n, bool) or n < least:
        rule = "a positive integer" if least else "an integer of 0 or more"
        raise ValueError(f"{name} must be {rule}, got {n!r}")
    return n


def sizes(config: Any, *names: str) -> list[int]:
    return [size(config, name) for name in names]


def either(config: Any, name: str) -> int | None:
    """A count or None, but said: a config without it would be two different models."""
    if not hasattr(config, name):
        raise ValueError(f"a config of {config.model_type} needs {name}, a number or None")
    return None if getattr(config, name) is None else size(config, name)


def flag(config: Any, name: str, default: bool) -> bool:
    value = getattr(config, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def refuse(config: Any, name: str, counted: Any) -> None:
    value = getattr(config, name, counted)
    if value != counted:
        raise ValueError(f"{name}={value!r} is not counted, only {counted!r}")


def known(config: Any, names: set[str], free: set[str], kind: str) -> None:
    """A config of this book has these settings and no others."""
    settings = vars(config).keys()
    missing, strange = names - settings, settings - names - free
    if missing or strange:
        who = type(config).__name__
        raise ValueError(f"{who} is no {kind}: lacks {sorted(missing)}, has {sorted(strange)}")
