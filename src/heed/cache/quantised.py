"""Keys and values in 8 bits: a whole number from -127 to 127 for every number, and shared steps.

x is kept as round(x / step) with step = max |x| / 127 over the numbers that share it. Rounding
moves x / step by at most 1/2, so what comes back is off by at most half a step. A wide channel
would spoil its neighbours' step. Keys have such channels, values do not: so keys share a step along
a channel (over `group` positions), values along a token (KIVI: Liu et al. 2024). The newest keys,
fewer than a group, have no step yet and stay as they are.

A query q then scores each key wrong by at most e = scale · Σ |q_d| step_d / 2, each weight changes
by a factor between exp(-2e) and exp(2e), and the output by at most (exp(2e) - 1) max |v| + half the
largest step of the values: loose, but it holds.

B batch · T new positions · S positions handed back · G key-value heads · D width of a key ·
Dv width of a value.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.cache import Rows, check_cut, check_rows, check_sizes, weigh


class Quantised(Rows):
    """Room for max_len positions, about a quarter of float32's. Steps are float32 or better.

    A number that a cut (`truncate`) took out of a whole group is rounded again when the group is
    whole again: then half a step of each rounding.
    """

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        max_len: int,
        d_head: int,
        *,
        group: int = 32,
        d_value: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(n_layers, batch_size, n_kv_heads, d_head, d_value, dtype, device)
        check_sizes(max_len=max_len, group=group)
        self.max_len, self.group = max_len, group
        fine = torch.promote_types(dtype, torch.float32)
        whole = max_len // group
        self.key_codes = self.slots(whole * group, self.d_head, torch.int8)
        self.key_steps = self.slots(whole, self.d_head, fine)
        self.newest = self.slots(group, self.d_head)
        self.value_codes = self.slots(max_len, self.d_value, torch.int8)
        self.value_steps = self.slots(max_len, 1, fine)

    def append(
        self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T Dv"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]]:
        """Round what is complete; hand back all, multiplied out again."""
        start, end = self.check(layer, k, v)
        if end > self.max_len:
            raise ValueError(f"{end} positions, but the cache has room for {self.max_len}")
        if not (k.isfinite().all() and v.isfinite().all()):
            raise ValueError("numbers that are not finite cannot share a step")
        old, now = start // self.group, end // self.group  # whole groups
        waiting = torch.cat([self.newest[layer][:, :, : start % self.group], k], dim=2)
        ready = (now - old) * self.group
        groups = waiting[:, :, :ready].unflatten(2, (-1, self.group))
        codes, steps = rounded(groups, dim=3)
        self.key_codes[layer][:, :, old * self.group : now * self.group] = codes.flatten(2, 3)
        self.key_steps[layer][:, :, old:now] = steps.squeeze(3)
        self.newest[layer][:, :, : end % self.group] = waiting[:, :, ready:]
        codes, steps = rounded(v, dim=3)
        self.value_codes[layer][:, :, start:end] = codes
        self.value_steps[layer][:, :, start:end] = steps
        self.filled[layer] = end
        whole, (key_steps, value_steps) = now * self.group, self.steps(layer)
        keys = self.key_codes[layer][:, :, :whole] * key_steps[:, :, :whole]
        values = self.value_codes[layer][:, :, :end] * value_steps
        newest = self.newest[layer][:, :, : end - whole]
        return torch.cat([keys.to(self.dtype), newest], dim=2), values.to(self.dtype)

    def steps(self, layer: int) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S 1"]]:
        """The step of every number held: 0 for keys that wait for their group to be whole."""
        n = self.filled[layer]
        steps = self.key_steps[layer][:, :, : n // self.group].repeat_interleave(self.group, dim=2)
        none = steps.new_zeros((*steps.shape[:2], n % self.group, self.d_head))
        return torch.cat([steps, none], dim=2), self.value_steps[layer][:, :, :n]

    def truncate(self, n: int) -> None:
        check_cut(n, self.length)
        whole, rest = n // self.group, n % self.group
        for layer, filled in enumerate(self.filled):
            if rest and filled // self.group > whole:  # a cut through a group that was whole
                codes = self.key_codes[layer][:, :, whole * self.group : n]
                self.newest[layer][:, :, :rest] = codes * self.key_steps[layer][:, :, whole, None]
        self.filled = [n] * self.n_layers

    def reorder(self, rows: Int[Tensor, " B"]) -> None:
        check_rows(rows, self.batch_size)
        for buffers in self._buffers():
            buffers[:] = [x[rows] for x in buffers]

    @property
    def nbytes(self) -> int:
        return sum(map(weigh, self._buffers()))

    def _buffers(self) -> list[list[Tensor]]:
        steps = [self.key_steps, self.value_steps]
        return [self.key_codes, self.value_codes, self.newest, *steps]


def rounded(x: Float[Tensor, "*N"], dim: int) -> tuple[Int[Tensor, "*N"], Float[Tensor, "*M"]]:
    """Codes in int8, and the steps shared along `dim`: codes * steps is x to half a step."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True)
    steps = (largest / 127).clamp_min(torch.finfo(x.dtype).tiny)  # zeros: any step will do
    return (x / steps).round().to(torch.int8), steps
