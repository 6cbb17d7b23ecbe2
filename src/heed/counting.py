"""What a Transformer costs, as exact integers: arithmetic on a configuration, no model needed.

A configuration is a GPTConfig or TransformerConfig of this book, or any object with a `model_type`
that `heed.families` knows and the settings that transformers gives it.

T positions · C width of the stream · V words · L layers · N parameters · B texts in a batch.
"""

from typing import Any

import torch

from heed import families
from heed.pieces import Model


def parameters(config: Any) -> int:
    """Every number that is learned, a tied head counted once. For a GPT
    12LC² + 13LC + VC + SC + 2C, with S the longest text that it reads."""
    return breakdown(config)["total"]


def breakdown(config: Any) -> dict[str, int]:
    """The same by part: tokens, positions, attention, mlp, norms, ..., total."""
    parts: dict[str, int] = {}
    for piece in families.model(config).pieces:
        parts[piece.part] = parts.get(piece.part, 0) + piece.times * piece.numbers
    return {part: n for part, n in parts.items() if n} | {"total": sum(parts.values())}


def active(config: Any) -> int:
    """The parameters without the experts that one token does not visit; for most models all."""
    idle = 0
    for piece in families.model(config).pieces:
        idle += 0 if piece.visited is None else (piece.times - piece.visited) * piece.numbers
    return parameters(config) - idle


def rule(config: Any) -> int:
    """12LC² + VC, the rule of thumb: right for a large GPT with a tied head, for little else."""
    m = families.model(config)
    return 12 * m.layers * m.width**2 + m.words * m.width


def flops(config: Any, length: int, batch: int = 1, *, source: int | None = None) -> int:
    """2 for each multiply-add of the matrix products of one forward pass. For a GPT
    24TLC² + 4T²LC + 2TVC a text.

    All T² scores count, those behind a mask or a window too, because a dense product computes
    them. Norms, softmax, activations, biases and sums are left out, and so are Mamba's short
    convolution and its recurrence. A model of two texts reads `source` tokens, as many as it
    writes unless given, and a ViT reads its patches and one more.
    """
    m = families.model(config)
    places = _places(m, length, batch, source)
    work = 0
    for piece in m.pieces:
        visited = piece.times if piece.visited is None else piece.visited
        work += 2 * visited * piece.products * places[piece.at]
    return batch * work


def kv_cache_bytes(
    config: Any,
    length: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float16,
    *,
    source: int | None = None,
) -> int:
    """2 · layers · key-value heads · head width · bytes, for each token read so far.

    At most a window of tokens is kept. DeepSeek keeps a latent and one turned key a layer in place
    of keys and values, Mamba a state of constant size, a model of two texts the keys and values of
    the source as well, and an encoder nothing.
    """
    m = families.model(config)
    _places(m, length, batch, source)
    kept = length if m.window is None else min(length, m.window)
    read = (length if source is None else source) if m.two_texts else 0
    return batch * (kept * m.cached + read * m.cached_source + m.state) * _bytes(dtype)


def training_bytes(config: Any, *, mixed: bool = True) -> dict[str, int]:
    """16N, with Adam: what every parameter takes before the first activation.

    Mixed precision: weights and gradients of 2 bytes each, a master copy and two moments of 4
    (Rajbhandari et al. 2020, section 3.1). In float32: weights, gradients and two moments of 4.
    """
    N = parameters(config)
    low = {"weights": 2 * N, "gradients": 2 * N, "master weights": 4 * N}
    parts = (low if mixed else {"weights": 4 * N, "gradients": 4 * N}) | {"moments": 8 * N}
    return parts | {"total": sum(parts.values())}


def activation_bytes(
    config: Any, length: int, batch: int = 1, *, segments: int | None = None
) -> int:
    """BL(T(64C + 16) + 4HT²) + LT² and the ends: what autograd keeps of our GPT in float32.

    To the byte, for `gpt.loss` of a `gpt.GPT` without dropout. In segments of about L / segments
    layers that are computed again, the most that is kept at any time: the stream at the start of
    each, and the layers of one.
    """
    m = families.model(config)
    if not hasattr(config, "max_len") or m.two_texts:
        raise ValueError(f"only the activations of our GPT are known, not of {config!r}")
    if getattr(config, "dropout", 0):
        raise ValueError(f"dropout={config.dropout} keeps its masks as well; count with dropout=0")
    if segments is not None and (type(segments) is not int or not 1 <= segments <= m.layers):
        raise ValueError(f"{m.layers} layers do not make {segments!r} segments")
    _places(m, length, batch, None)
    T, C, rows = length, m.width, batch * length
    stream = 4 * rows * C
    layer = rows * (64 * C + 16) + 4 * batch * config.n_heads * T**2 + T**2
    ids = 8 * rows + 8 * T
    end = 2 * stream + 8 * rows + 4 * rows * m.words + 8 * rows + 4
    if segments is None:
        return m.layers * layer + ids + end
    longest = -(-m.layers // segments)
    again = longest * layer - stream  # the first stream of a segment is kept already
    return segments * stream + ids + max(end, again)


def _places(m: Model, length: int, batch: int, source: int | None) -> dict[str, int]:
    """How many positions, and pairs of them, one text has; all arguments checked."""
    if source is not None and not m.two_texts:
        raise ValueError(f"only a model of two texts has a source, got source={source!r}")
    source = length if source is None else source
    for name, n in {"length": length, "source": source}.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise ValueError(f"{name} must be an integer of 0 or more, got {n!r}")
        if m.longest is not None and n > m.longest:
            raise ValueError(f"{name} must lie in 0 to {m.longest}, the longest text, got {n}")
    if m.only is not None and length != m.only:
        raise ValueError(f"this model reads images of {m.only} positions, got length {length}")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"a batch holds at least one text, got {batch!r}")
    places = {"token": length, "source": source, "patch": length - 1, "text": 1}
    pairs = {"token x token": length**2, "source x source": source**2}
    return places | pairs | {"token x source": length * source}


def _bytes(dtype: torch.dtype) -> int:
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype such as torch.float16, got {dtype!r}")
    return dtype.itemsize
