"""One buffer per layer, reserved for max_len positions and filled from the left.

The plainest cache. Every row reserves max_len slots, whether it fills them or not: the price that
pages do away with.

B batch · T new positions · S positions filled · G key-value heads · D width of a key ·
Dv width of a value.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.cache import Rows, check_cut, check_rows, check_sizes, weigh


class Contiguous(Rows):
    """Keys and values of all positions read. A width d_value of 0 keeps keys alone (chapter 23)."""

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        max_len: int,
        d_head: int,
        *,
        d_value: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(n_layers, batch_size, n_kv_heads, d_head, d_value, dtype, device)
        check_sizes(max_len=max_len)
        self.max_len = max_len
        self.keys = self.slots(max_len, self.d_head)
        self.values = self.slots(max_len, self.d_value)

    def append(
        self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T Dv"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        """Write behind the old ones. What comes back is a view: slots not filled are not in it."""
        start, end = self.check(layer, k, v)
        if end > self.max_len:
            raise ValueError(f"{end} positions, but the cache has room for {self.max_len}")
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        self.filled[layer] = end
        return keys[:, :, :end], values[:, :, :end]

    def truncate(self, n: int) -> None:
        check_cut(n, self.length)
        self.filled = [n] * self.n_layers

    def reorder(self, rows: Int[Tensor, " B"]) -> None:
        check_rows(rows, self.batch_size)
        for buffers in (self.keys, self.values):
            for x, n in zip(buffers, self.filled, strict=True):
                x[:, :, :n] = x[rows, :, :n]

    @property
    def nbytes(self) -> int:
        return weigh(self.keys + self.values)
