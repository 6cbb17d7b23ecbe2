"""Attention as one equation, and the answer that everything faster is held against.

B batch · T queries · S keys · H query heads · G key-value heads · D head width · A score width.
Queries are the last T of the S positions. Query head h reads key-value head h // (H / G).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from heed import masks
from heed.masks import Mask

Bias = Tensor | Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    mask: Mask = masks.full,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """softmax(q kᵀ / √D + bias) v, over the keys that the mask allows (Vaswani et al. 2017, eq. 1).

    A query that may read nothing gets zeros and sends back a gradient of zero. `bias` is a tensor
    that broadcasts to (B, H, T, S), or a function of (b, h, i, j). Half precision is summed in
    float32.
    """
    check(q, k, v, scale)
    w = _weights(q, k, mask, bias, scale)
    return (w @ _per_query_head(v, q).to(w.dtype)).to(q.dtype)


def weights(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    mask: Mask = masks.full,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """softmax(q kᵀ / √D + bias): what each query takes from each key. Rows sum to 1, or to 0."""
    _check(q, k, scale)
    return _weights(q, k, mask, bias, scale).to(q.dtype)


def softmax(scores: Float[Tensor, "*N S"], *, temperature: float = 1.0) -> Float[Tensor, "*N S"]:
    """exp(s / τ) / Σ exp(s / τ) along the last axis. A row of -inf gives zeros, not NaN."""
    if not scores.dtype.is_floating_point:
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if scores.shape[-1] == 0:
        return scores
    top = scores.detach().amax(-1, keepdim=True)  # exp(s - top) <= 1: nothing overflows
    e = torch.exp((scores - top.masked_fill(top == -math.inf, 0)) / temperature)
    total = e.sum(-1, keepdim=True)
    return e / total.masked_fill(total == 0, 1)


def additive(
    q: Float[Tensor, "B T A"],
    k: Float[Tensor, "B S A"],
    v: Float[Tensor, "B S D"],
    w: Float[Tensor, " A"],
) -> Float[Tensor, "B T D"]:
    """Σₛ softmaxₛ(wᵀ tanh(q + kₛ)) vₛ: the score of Bahdanau et al. (2015)."""
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3 or w.ndim != 1:
        shapes = [tuple(x.shape) for x in (q, k, v, w)]
        raise ValueError(f"additive needs (B, T, A), (B, S, A), (B, S, D) and (A), got {shapes}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"batches differ: {q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if not q.shape[2] == k.shape[2] == w.shape[0]:
        raise ValueError(f"score widths differ: {q.shape[2]}, {k.shape[2]} and {w.shape[0]}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"{k.shape[1]} keys but {v.shape[1]} values")
    scores = torch.tanh(q[:, :, None] + k[:, None]) @ w  # (B, T, S)
    return softmax(scores) @ v


def _weights(q: Tensor, k: Tensor, mask: Mask, bias: Bias | None, scale: float | None) -> Tensor:
    B, H, T, D = q.shape
    S = k.shape[2]
    dtype = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    scores = q.to(dtype) @ _per_query_head(k, q).to(dtype).mT  # (B, H, T, S)
    scores = scores * (D**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + _bias(bias, B, H, T, S, q)
    readable = masks.table(mask, B, H, T, S, q.device)
    return softmax(scores.masked_fill(~readable, -math.inf))


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """(B, G, S, D) to (B, H, S, D): neighbouring query heads share one."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _bias(bias: Bias, B: int, H: int, T: int, S: int, q: Tensor) -> Tensor:
    if isinstance(bias, Tensor):
        check_bias(bias, B, H, T, S, q.dtype)
        return bias
    bias = bias(*masks.indices(B, H, T, S, q.device))
    check_bias(bias, B, H, T, S)
    return bias


def check_bias(
    bias: Tensor, B: int, H: int, T: int, S: int, dtype: torch.dtype | None = None
) -> None:
    """A ValueError where a bias, or one tile of it, cannot be added to scores of (B, H, T, S)."""
    if dtype is not None and bias.dtype != dtype:
        raise ValueError(f"the bias must have the dtype of q, {dtype}, got {bias.dtype}")
    if not bias.dtype.is_floating_point:
        raise ValueError(f"a bias is added to scores and must be floating, got {bias.dtype}")
    sizes = zip(bias.shape[::-1], (S, T, H, B), strict=False)
    if bias.ndim > 4 or any(have not in (1, want) for have, want in sizes):
        raise ValueError(f"bias {tuple(bias.shape)} does not broadcast to {B, H, T, S}")
    if bias.numel() and not bias.detach().amax() < math.inf:  # no comparison with NaN holds
        raise ValueError("a bias may hold -inf, but neither NaN nor +inf")


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """A ValueError that names what does not fit; every faster version asks this first."""
    _check(q, k, scale)
    _check_values(k, v)


def _check(q: Tensor, k: Tensor, scale: float | None) -> None:
    for name, x in {"q": q, "k": k}.items():
        _check_one(name, x)
    _check_pair(q, k, "q", "k")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(f"q and k must share a width above 0, got {q.shape[3]} and {k.shape[3]}")
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key-value heads")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def _check_values(k: Tensor, v: Tensor) -> None:
    _check_one("v", v)
    _check_pair(k, v, "k", "v")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads but {v.shape[1]} value heads")
    if k.shape[2] != v.shape[2]:  # torch 2.13 on CPU answers this with numbers from beyond the keys
        raise ValueError(f"{k.shape[2]} keys but {v.shape[2]} values")


def _check_one(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be (batch, heads, positions, width), got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def _check_pair(x: Tensor, y: Tensor, a: str, b: str) -> None:
    if x.dtype != y.dtype:
        raise ValueError(f"{a} and {b} must share a dtype, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"{a} and {b} must share a device, got {x.device} and {y.device}")
    if x.shape[0] != y.shape[0]:  # no broadcasting: a batch of 1 is nearly always a bug
        raise ValueError(f"{a} has batch {x.shape[0]}, {b} has batch {y.shape[0]}")
