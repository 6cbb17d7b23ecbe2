"""Many small attentions, joined: MHA, GQA, MQA and cross-attention in one layer (Vaswani et al.
2017, section 3.2.2; Shazeer 2019; Ainslie et al. 2023).

Every head projects the whole vector x; what is cut into heads is the projection. Query head h reads
key-value head h // (H / G). Weights may be copied from `torch.nn.MultiheadAttention`, whose
`in_proj_weight` holds the rows of q, k and v one after the other.

B batch · T positions · S positions of the memory · C width of the stream · H query heads ·
G key-value heads · D width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed import masks
from heed.attention import attention
from heed.masks import Mask

Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
Rotate = Callable[[Tensor, Tensor], Tensor]
Keep = Callable[[Tensor, Tensor], tuple[Any, Any]]


class MultiHeadAttention(nn.Module):
    """Concat(head_1, ..., head_H) W_O, where head_h = attention(x W_Qh, x W_Kg, x W_Vg).

    n_kv_heads   G = H is multi-head, 1 < G < H grouped-query, G = 1 multi-query attention.
    d_head       d_model / n_heads unless given: a convention that not every model keeps.
    attend       any function of (q, k, v, mask) that stands for `heed.attention.attention`.
    rotate       (x (B, H, T, D), positions (T,)) -> the same shape, on the q and k of
                 self-attention, for positions that turn vectors (chapter 08).
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        bias: bool = False,
        attend: Attend = attention,
        rotate: Rotate | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        sizes = {"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
        for name, n in (sizes if d_head is None else sizes | {"d_head": d_head}).items():
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name} must be a positive integer, got {n!r}")
        if d_head is None and d_model % n_heads:
            raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads: give d_head")
        if n_heads % n_kv_heads:
            raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads")
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.d_head = d_model // n_heads if d_head is None else d_head
        self.attend, self.rotate = attend, rotate
        self.q = nn.Linear(d_model, n_heads * self.d_head, bias=bias)
        self.k = nn.Linear(d_model, n_kv_heads * self.d_head, bias=bias)
        self.v = nn.Linear(d_model, n_kv_heads * self.d_head, bias=bias)
        self.out = nn.Linear(n_heads * self.d_head, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        memory: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask = masks.full,
        keep: Keep | None = None,
        places: Int[Tensor, " T"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """What each position of x reads from x itself, or from the memory if there is one.

        With a cache (chapter 23): `keep(k, v)` is its `append` for this layer, and `places` says
        where x stands in its sequence, for `rotate`. Keys are turned once, before they are kept.
        """
        self._check(x, memory)
        places = self._places(x, memory, keep, places)
        source = x if memory is None else memory
        q, k, v = self._split(self.q(x)), self._split(self.k(source)), self._split(self.v(source))
        if self.rotate is not None:
            q, k = self._turned(q, self.rotate, places), self._turned(k, self.rotate, places)
        if keep is not None:
            k, v = keep(k, v)
        heads = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.out(heads.transpose(1, 2).flatten(2))

    def _places(
        self, x: Tensor, memory: Tensor | None, keep: Keep | None, places: Tensor | None
    ) -> Tensor:
        T = x.shape[1]
        if memory is not None and not (keep is None and places is None):
            raise ValueError("a memory does not grow: keep and places are for self-attention")
        if places is None and keep is not None and self.rotate is not None:
            raise ValueError("rotate needs the places of x: with a cache they do not start at 0")
        if places is None:
            return torch.arange(T, device=x.device)
        if places.shape != (T,) or places.dtype not in (torch.int64, torch.int32):
            got = f"{places.dtype} {tuple(places.shape)}"
            raise ValueError(f"places must be {T} integers, one for each position, got {got}")
        return places

    def _split(self, projected: Tensor) -> Tensor:
        """(B, T, H D) to (B, H, T, D): neighbouring channels belong to one head."""
        return projected.unflatten(2, (-1, self.d_head)).transpose(1, 2)

    def _turned(self, x: Tensor, rotate: Rotate, places: Tensor) -> Tensor:
        turned = rotate(x, places)
        if turned.shape != x.shape:  # some wrong shapes would pass through everything that follows
            raise ValueError(f"rotate made {tuple(turned.shape)} of {tuple(x.shape)}")
        return turned

    def _check(self, x: Tensor, memory: Tensor | None) -> None:
        for name, y in {"x": x, "memory": memory}.items():
            if y is not None and (y.ndim != 3 or y.shape[2] != self.d_model):
                shape = tuple(y.shape)
                raise ValueError(f"{name} must be (B, length, {self.d_model}), got {shape}")
            if y is not None and y.dtype != self.q.weight.dtype:
                raise ValueError(f"{name} is {y.dtype}, the weights are {self.q.weight.dtype}")
        if memory is not None and len(memory) != len(x):
            raise ValueError(f"x has batch {len(x)}, memory has batch {len(memory)}")
        if memory is not None and self.rotate is not None:
            raise ValueError("rotate turns by positions in one sequence; a memory is another one")
