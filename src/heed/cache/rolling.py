"""The last positions only: position p stands in slot p mod window, where p - window stood.

For models whose attention reads no further back than a window, as Mistral 7B's (Jiang et al. 2023,
section 2): memory no longer grows with the length.

B batch · T new positions · S positions handed back · G key-value heads · D width of a key ·
Dv width of a value.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.cache import Rows, check_cut, check_rows, check_sizes, weigh


class Rolling(Rows):
    """Keys and values of the last `window` positions; `length` counts all that were read."""

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        window: int,
        d_head: int,
        *,
        d_value: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(n_layers, batch_size, n_kv_heads, d_head, d_value, dtype, device)
        check_sizes(window=window)
        self.window = window
        self.keys = self.slots(window, self.d_head)
        self.values = self.slots(window, self.d_value)
        self.oldest = [0] * n_layers  # the first position whose slot is not written over

    def append(
        self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T Dv"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        """The new ones behind the window - 1 before them, in order of position.

        The first of T new queries needs those before it, which the last of them writes over: so
        what comes back is up to window - 1 + T long, and for T > 1 the model's attention cuts the
        window itself (`masks.window`).
        """
        start, end = self.check(layer, k, v)
        old = self._slots(self._needed(start))
        new = range(max(start, end - self.window), end)  # a long chunk leaves only its end
        kept = []
        for buffer, x in ((self.keys[layer], k), (self.values[layer], v)):
            kept.append(torch.cat([buffer[:, :, old], x], dim=2))
            buffer[:, :, self._slots(new)] = x[:, :, new.start - start :]
        self.filled[layer] = end
        self.oldest[layer] = max(self.oldest[layer], end - self.window)
        return kept[0], kept[1]

    def truncate(self, n: int) -> None:
        """Refused where the next query would need a position that was written over."""
        check_cut(n, self.length)
        needed = self._needed(n)
        if needed and needed.start < max(self.oldest):
            lost = f"needs position {needed.start}, and {max(self.oldest)} is the oldest left"
            raise ValueError(f"cannot cut {self.length} back to {n}: what follows {lost}")
        self.filled = [n] * self.n_layers
        self.oldest = [min(oldest, n) for oldest in self.oldest]

    def reorder(self, rows: Int[Tensor, " B"]) -> None:
        check_rows(rows, self.batch_size)
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]

    def _needed(self, position: int) -> range:
        """Which positions before it the query at this position reads."""
        return range(max(0, position - self.window + 1), position)

    def _slots(self, positions: range) -> Int[Tensor, " n"]:
        return torch.arange(positions.start, positions.stop, device=self.device) % self.window

    @property
    def nbytes(self) -> int:
        return weigh(self.keys + self.values)
