"""What the properties of a check are written with: draw numbers, compare, show the difference."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


class Wrong(Exception):
    """What a property found; the text holds the numbers that show it."""


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def expect(got: Any, want: Any, given: str, tol: float = 1e-6) -> None:
    """Raise Wrong unless got is want: the shape, then values within tol x max(1, the largest)."""
    want = torch.as_tensor(want, dtype=torch.float64)
    got = tensor(got, given)
    if got.shape != want.shape:
        raise Wrong(shown(given, f"shape {tuple(want.shape)}", f"shape {tuple(got.shape)}"))
    if not want.numel():
        return
    error = (got - want).abs().nan_to_num(torch.inf)
    if error.max() <= tol * max(1.0, want.abs().max().item()):
        return
    place = ""
    if want.numel() > 6:  # the whole would hide the point: show the worst entry
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), want.shape))
        got, want, place = got[index], want[index], f" at {list(index)}"
    raise Wrong(shown(given + place, _text(want), _text(got)))


def tensor(got: Any, given: str) -> Tensor:
    """What a function returned, as a float64 tensor that knows nothing of gradients."""
    if type(got) is not Tensor:
        try:
            got = torch.as_tensor(got)
        except (TypeError, ValueError, RuntimeError):
            raise Wrong(shown(given, "numbers", f"a {type(got).__name__}")) from None
    if type(got) is not Tensor or got.is_complex():
        raise Wrong(shown(given, "real numbers in a tensor", f"a {type(got).__name__}"))
    return got.detach().cpu().double()


def several(got: Any, n: int, given: str) -> tuple[Any, ...]:
    """The n parts of what a function returned."""
    if not isinstance(got, tuple | list) or len(got) != n:
        has = f"{len(got)} of them" if isinstance(got, tuple | list) else f"a {type(got).__name__}"
        raise Wrong(shown(given, f"{n} results", has))
    return tuple(got)


def shown(given: str, want: str, got: str) -> str:
    return f"given     {given}\nexpected  {want}\ngot       {got}"


def in_brackets(x: Fraction | int) -> str:
    """A number as it stands in a sum: -3 is (-3)."""
    return f"({x})" if x < 0 else f"{x}"


def listed(numbers: Iterable[Fraction]) -> str:
    return ", ".join(map(str, numbers))


def _text(x: Tensor) -> str:
    if x.ndim == 0:
        return f"{x.item() + 0.0:.4g}"
    return "[" + ", ".join(_text(row) for row in x) + "]"
