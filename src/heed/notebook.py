"""What a notebook needs: one start for all, real source on the page, claims that can fail."""

import inspect
import textwrap
import warnings
from collections.abc import Mapping
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch
from IPython import get_ipython
from IPython.display import display
from torch import Tensor

from heed import plots


def setup(random_seed: int = 0) -> None:
    """The same numbers on every machine: one thread, a fixed random seed, four decimals."""
    torch.manual_seed(random_seed)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="IProgress not found")  # no page shows progress bars
    torch.set_printoptions(precision=4, sci_mode=False)
    shell = get_ipython()
    if shell is not None:
        shell.run_line_magic("matplotlib", "inline")
    plots.style()


def show(thing: Any) -> None:
    """Print the source of a function, class or module, as it stands in the package."""
    file = inspect.getmodule(thing).__name__.replace(".", "/") + ".py"  # type: ignore[union-attr]
    source = f"# {file}\n" + textwrap.dedent(inspect.getsource(thing)).rstrip()
    display(
        {"text/markdown": f"```python\n{source}\n```", "text/plain": source},
        raw=True,
    )


def agree(versions: Mapping[str, Any], *, tol: float = 1e-12) -> None:
    """All versions hold the same numbers, within tol of each other; else an AssertionError."""
    if len(versions) < 2:
        raise ValueError(f"agreement takes at least two versions, got {list(versions)}")
    for (a, x), (b, y) in combinations(versions.items(), 2):
        off = distance(x, y)
        if not off <= tol:
            raise AssertionError(f"{a} and {b} differ by {float(off):.3g}, the limit is {tol:g}")
    print(" = ".join(versions) + (f"   (to {tol:g})" if tol else "   (exactly)"))


def witness(
    equation: str, got: Any, want: Any, *, wrong: Mapping[str, Any], tol: float = 1e-12
) -> None:
    """Say that an equation holds, and that this cell would notice if it did not.

    `got` is measured and `want` comes from the equation: tensors, numbers or exact fractions, or
    lists of them. Every `wrong` is a classic mistake in place of `want`; one that lies within `tol`
    of `got` means that the witness is blind, which is an error too.
    """
    if not wrong:
        raise ValueError(f"the witness of {equation} needs at least one wrong version to refuse")
    off = distance(got, want)
    if not off <= tol:
        raise AssertionError(
            f"{equation} is RED: off by {float(off):.3g}, the limit is {tol:.3g}\n"
            f"  got  {got}\n  want {want}"
        )
    gaps = {name: distance(got, other) for name, other in wrong.items()}
    for name, gap in gaps.items():
        if gap <= tol:
            raise AssertionError(f"this witness is blind: {equation} also agrees with '{name}'")
    said = "; ".join(f"{name}: off by {float(gap):.3g}" for name, gap in gaps.items())
    print(f"{equation} holds {f'to {tol:.2g}' if tol else 'exactly'}.  {said}")


def distance(x: Any, y: Any) -> float | Fraction:
    """Largest difference between two collections of numbers, exact where both are exact.

    Collections of different shape, or with a NaN, are infinitely far apart.
    """
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.shape != y.shape:
            return torch.inf
        gaps = (x.detach().double() - y.detach().double()).abs()
        gaps[x == y] = 0  # inf - inf
        return torch.inf if gaps.isnan().any() else gaps.max().item() if gaps.numel() else 0.0
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        if len(x) != len(y):
            return torch.inf
        return max((distance(a, b) for a, b in zip(x, y, strict=True)), default=0)
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        x, y = (
            a if isinstance(a, Tensor) else torch.tensor(_floats(a), dtype=torch.float64)
            for a in (x, y)
        )
        return distance(x, y)
    exact = isinstance(x, int | Fraction) and isinstance(y, int | Fraction)
    gap = abs(x - y) if exact else abs(float(x) - float(y))
    return gap if gap == gap else torch.inf


def _floats(x: Any) -> Any:
    return [_floats(a) for a in x] if isinstance(x, list | tuple) else float(x)
