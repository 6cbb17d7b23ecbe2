"""What a model keeps of the positions it has read: one protocol, and what every cache checks.

A model asks its cache two things: where the next tokens stand (`places`), and to keep the keys and
values of one layer and hand back all that the new queries may read (`append`). It does not look
inside what comes back, so it does not know which cache it has. Keys are kept after rotation: what
was turned by its own position stays true. A cache is for reading: use it under `torch.no_grad()`.

B batch · T new positions · S positions handed back · G key-value heads · D width of a key ·
Dv width of a value.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Cache(Protocol):
    @property
    def length(self) -> int:
        """How many positions every layer has read."""

    def places(self, n: int) -> Int[Tensor, "..."]:
        """Where the next n tokens stand."""

    def append(
        self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T Dv"]
    ) -> tuple[Any, Any]:
        """Keep these behind the old ones; all that the T new queries may read."""

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""

    def reorder(self, rows: Int[Tensor, " B"]) -> None:
        """Row b continues what row rows[b] has read."""

    @property
    def nbytes(self) -> int:
        """Bytes that nobody else can use: reserved slots count, filled or not."""


class Rows:
    """What the caches of a fixed batch share: sizes, how far each layer is filled, and checks."""

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        d_head: int,
        d_value: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        sizes = {"n_layers": n_layers, "batch_size": batch_size, "n_kv_heads": n_kv_heads}
        check_sizes(**sizes, d_head=d_head)
        if d_value is not None and (not isinstance(d_value, int) or d_value < 0):
            raise ValueError(f"d_value must be an integer, 0 or more, got {d_value!r}")
        check_dtype(dtype)
        self.n_layers, self.batch_size, self.n_kv_heads = n_layers, batch_size, n_kv_heads
        self.d_head, self.d_value = d_head, d_head if d_value is None else d_value
        self.dtype, self.device = dtype, torch.empty(0, device=device).device
        self.filled = [0] * n_layers

    @property
    def length(self) -> int:
        return min(self.filled)

    def places(self, n: int) -> Int[Tensor, " T"]:
        return torch.arange(self.length, self.length + n, device=self.device)

    def slots(self, n: int, width: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """For every layer (B, G, n, width), with whatever stands in that memory."""
        shape = (self.batch_size, self.n_kv_heads, n, width)
        kind = self.dtype if dtype is None else dtype
        return [torch.empty(shape, dtype=kind, device=self.device) for _ in range(self.n_layers)]

    def check(self, layer: int, k: Tensor, v: Tensor) -> tuple[int, int]:
        """From which position to which k and v go, if they fit this cache."""
        check_layer(layer, self.n_layers)
        lead = (self.batch_size, self.n_kv_heads)
        check_new(k, v, lead, (self.d_head, self.d_value), self.dtype, self.device)
        return self.filled[layer], self.filled[layer] + k.shape[-2]


def check_sizes(**sizes: int) -> None:
    for name, n in sizes.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"{name} must be a positive integer, got {n!r}")


def check_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"keys and values are floating point, got {dtype}")


def check_layer(layer: int, n_layers: int) -> None:
    if not isinstance(layer, int) or not 0 <= layer < n_layers:  # -1 would be the last
        raise ValueError(f"layer {layer!r}: the cache has layers 0 to {n_layers - 1}")


def check_cut(n: int, length: int) -> None:
    if not isinstance(n, int) or not 0 <= n <= length:
        raise ValueError(f"cannot keep {n!r} of {length} positions")


def check_rows(rows: Tensor, n: int) -> None:
    good = rows.dtype == torch.int64 and rows.shape == (n,)
    if not good or rows.min() < 0 or rows.max() >= n:
        raise ValueError(f"rows must be {n} integers below {n}, got {rows.tolist()}")


def check_new(
    k: Tensor,
    v: Tensor,
    lead: tuple[int, ...],
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """A ValueError unless k and v are (*lead, new, width) with as many new positions in both."""
    for name, x, width in (("k", k, widths[0]), ("v", v, widths[1])):
        if x.ndim != len(lead) + 2 or (*x.shape[:-2], x.shape[-1]) != (*lead, width):
            want = ", ".join(map(str, (*lead, "new", width)))
            raise ValueError(f"{name} must be ({want}), got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise ValueError(f"{name} is {x.dtype}, the cache keeps {dtype}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, the cache on {device}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"{k.shape[-2]} keys but {v.shape[-2]} values")


def weigh(tensors: Sequence[Tensor]) -> int:
    """Bytes of these tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)
