"""Rows of different length in one batch, each as if alone: a cache for each row, no mask.

What padding could do, it cannot: it stands behind a row's own tokens, is never kept, and nothing
reads it. The model has to ask its attention row by row for that, so it is read through a twin.

B batch · T new positions, of which a row may use fewer.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F


class Ragged:
    """A cache for each row. The next tokens of row b are the first counts[b]; then, one by one."""

    def __init__(self, caches: Sequence[Any], counts: Sequence[int]) -> None:
        self.caches, self.counts = caches, counts

    def places(self, n: int) -> Int[Tensor, "B T"]:
        return torch.stack([cache.places(n) for cache in self.caches])

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Any], list[Any]]:
        """For each row what its own cache hands back."""
        found = [
            cache.append(layer, k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            for b, (cache, n) in enumerate(zip(self.caches, self.counts, strict=True))
        ]
        return [k for k, _ in found], [v for _, v in found]

    def each(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same attention, row by row: zeros where a row has padding."""

        def attend_each(q: Tensor, k: list[Any], v: list[Any], *rest: Any) -> Tensor:
            rows = [attend(q[b : b + 1, :, :n], k[b], v[b], *rest) for b, n in counts]
            return torch.cat([F.pad(row, (0, 0, 0, q.shape[2] - row.shape[2])) for row in rows])

        counts = list(enumerate(self.counts))
        return attend_each


def twin(model: nn.Module, swap: Callable[[Any], Any]) -> Any:
    """A copy that shares the model's parameters and buffers; each `attend` in it is another."""
    made: dict[Any, nn.Module] = {module: copy.copy(module) for module in model.modules()}
    for module in made.values():
        own = vars(module)
        for name in own.keys() - {"_parameters", "_buffers"}:  # hooks and parts become its own
            if isinstance(own[name], dict):
                own[name] = own[name].copy()
        own["_modules"].update({n: made.get(part) for n, part in module._modules.items()})
        if "attend" in own:
            own["attend"] = swap(own["attend"])
    if not swappable(made[model]):
        raise ValueError(f"no part of this {type(model).__name__} has an `attend` to be another")
    return made[model]


def swappable(model: Any) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any("attend" in vars(module) for module in modules)
