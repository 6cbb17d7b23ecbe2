"""Arrays in, Axes out: the figures of the book. The one file that imports matplotlib.

Legible in grey and to colour-blind readers: each line has its own colour (Okabe and Ito 2008), its
own dashes and, where points are few, its own marker. T queries · S keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from torch import Tensor

from heed.roofline import Machine

Numbers = Any  # a tensor, an array or a list of numbers
BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
COLOURS = [BLUE, VERMILION, GREEN, BLACK, "#CC79A7", "#56B4E9"]
DASHES = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3))]
MARKERS = ["o", "s", "^", "D", "v", "X"]
FEW = 20  # up to here a point has a marker


def style() -> None:
    """Set what all figures share: 6.2 inches wide, nothing below 9 points, two spines."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.2, 3.2),
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.labelsize": 10,
            "axes.titlesize": 10,
            "font.size": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "legend.handlelength": 3,  # long enough to show the dashes
            "lines.linewidth": 1.8,
            "lines.markersize": 6,
        }
    )


def mask(table: Bool[Tensor | np.ndarray, "T S"], *, ax: Axes | None = None) -> Axes:
    """Who may read whom: a blue cell is a pair that may."""
    cells = _numbers("table", table, 2)
    ax = ax or _board(*cells.shape)
    ax.imshow(0.55 * cells, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(np.arange(0.5, cells.shape[1] - 1), minor=True)
    ax.set_yticks(np.arange(0.5, cells.shape[0] - 1), minor=True)
    ax.grid(which="minor", color="#999999", linewidth=0.5)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(True)
    return _label(ax, cells.shape, None, None)


def weights(
    w: Float[Tensor | np.ndarray, "T S"],
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """What each query (row) takes from each key (column), darker for more; in numbers if small."""
    cells = _numbers("weights", w, 2)
    if cells.size and cells.min() < 0:
        raise ValueError(f"weights are not negative, got {cells.min():.3g}")
    for names, n, kind in zip((queries, keys), cells.shape, ("query", "key"), strict=True):
        if names is not None and len(names) != n:
            raise ValueError(f"{len(names)} names for {n} {kind} positions")
    ax = ax or _board(*cells.shape, *(max(map(len, names or "0")) for names in (queries, keys)))
    top = max(cells.max(initial=0), 1e-12)
    image = ax.imshow(cells, cmap="Blues", vmin=0, vmax=top)
    if max(cells.shape) <= 10:
        for (t, s), x in np.ndenumerate(cells):
            shown = f"{x:.2f}" if 0 < x < 1 else f"{x:g}"
            colour = "white" if x > 0.715 * top else "black"  # both at least 4.5 to 1
            ax.text(s, t, shown, ha="center", va="center", color=colour, fontsize=9)
    else:
        ax.figure.colorbar(image, ax=ax, label="weight", shrink=0.8)
    ax.spines[:].set_visible(False)
    return _label(ax, cells.shape, queries, keys)


def lines(
    x: Numbers,
    curves: Mapping[str, Numbers],
    *,
    xlabel: str,
    ylabel: str,
    bars: Mapping[str, Numbers] | None = None,
    level: Mapping[str, float] | None = None,
    logx: bool = False,
    logy: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Each curve over x. `bars` are half-widths around a curve, a `level` is a line to compare to.

    Half-widths are drawn as error bars where points are few, and as a band where they are many.
    """
    x, level = _numbers("x", x, 1), level or {}
    ys = {name: _numbers(name, y, 1, len(x)) for name, y in curves.items()}
    halves = {name: _numbers(f"bars of {name}", y, 1, len(x)) for name, y in (bars or {}).items()}
    if halves.keys() - ys.keys():
        raise ValueError(f"bars without a curve: {sorted(halves.keys() - ys.keys())}")
    ax, few = ax or plt.subplots()[1], len(x) <= FEW
    for n, (name, y) in enumerate(ys.items()):
        look = _look(n)
        ax.plot(x, y, **look, marker=MARKERS[n % len(MARKERS)] if few else "", label=name)
        if name in halves and few:
            ax.errorbar(x, y, halves[name], fmt="none", ecolor=look["color"], capsize=3)
        elif name in halves:
            low, high = y - halves[name], y + halves[name]
            ax.fill_between(x, low, high, color=look["color"], alpha=0.2)
    for name, height in level.items():
        ax.axhline(height, color="#666666", linewidth=1, linestyle="-", zorder=0, label=name)
    if logx:
        ax.set_xscale("log")
        if few:  # the widths that were measured, not powers of ten between them
            ax.set_xticks(x, [f"{value:g}" for value in x])
            ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel, **({"yscale": "log"} if logy else {}))
    labels = [*curves, *level]
    if len(labels) > 1:  # above the axes, where no curve runs
        columns = max(1, 70 // (max(map(len, labels)) + 9))
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
    return ax


def losses(
    curves: Numbers | Mapping[str, Numbers], floor: float | None = None, *, ax: Axes | None = None
) -> Axes:
    """Training curves against the loss of a perfect model, with the gap that is left in numbers.

    Thin: the loss of each step. Thick: its mean over the last fiftieth of the run.
    """
    named = curves if isinstance(curves, Mapping) else {"loss": curves}
    ys = {name: _numbers(name, y, 1) for name, y in named.items()}
    if not all(map(len, ys.values())):
        raise ValueError(f"a curve has no steps: { {name: len(y) for name, y in ys.items()} }")
    ax = ax or plt.subplots()[1]
    for n, (name, y) in enumerate(ys.items()):
        look = _look(n)
        window = max(1, len(y) // 50)
        smooth = np.convolve(y, np.full(window, 1 / window), mode="valid")
        label, steps = f"{name}: ends at {smooth[-1]:.3f}", np.arange(len(y))
        if floor is not None:
            side = "above" if smooth[-1] >= floor else "below"
            label += f", {abs(smooth[-1] - floor):.3f} {side} the floor"
        ax.plot(steps[window - 1 :], smooth, **look, label=label)
        ax.plot(steps, y, color=look["color"], linewidth=0.6, alpha=0.35)
    if floor is not None:
        ax.axhline(floor, color="black", linewidth=1.2, linestyle="-", label=f"floor: {floor:.3f}")
    ax.set(xlabel="step", ylabel="loss in nats")
    ax.legend(loc="upper right")
    return ax


def bars(
    heights: Mapping[str, float], *, ylabel: str, digits: int = 2, ax: Axes | None = None
) -> Axes:
    """One bar for each name, with its number on top."""
    numbers = _numbers("heights", list(heights.values()), 1)
    ax = ax or plt.subplots()[1]
    drawn = ax.bar(list(heights), numbers, width=0.6, color=BLUE)
    ax.bar_label(drawn, [f"{x:.{digits}f}" for x in numbers], padding=2, fontsize=9)
    ax.set_ylabel(ylabel)
    return ax


def roofline(
    machine: Machine, points: Mapping[str, tuple[float, float]], *, ax: Axes | None = None
) -> Axes:
    """The most FLOP/s for each FLOP per byte, and what was reached: a point for each name.

    The flat roof ends at the left in the slope of the memory; a dotted line marks the ridge.
    """
    at = {name: _numbers(name, point, 1, None) for name, point in points.items()}
    for name, point in at.items():
        if len(point) != 2 or not (point > 0).all():
            raise ValueError(f"{name} must be an intensity and a rate above 0, got {point}")
    ridge, peak = float(machine.ridge), float(machine.flops)
    xs = [ridge, *(x for x, _ in at.values())]
    low, high = min(xs) / 4, max(xs) * 4
    ax = ax or plt.subplots(figsize=(6.2, 3.6))[1]
    roof = [float(machine.attainable(x)) for x in (low, ridge, high)]
    ax.plot([low, ridge, high], roof, color=BLACK, label=f"roof of {machine.name}")
    ax.axvline(ridge, color="#666666", linewidth=1, linestyle=":", label=f"ridge at {ridge:.3g}")
    for n, (name, (x, y)) in enumerate(at.items()):
        look = {**_look(n), "linestyle": "", "marker": MARKERS[n % len(MARKERS)]}
        ax.plot([x], [y], **look, markersize=8, label=name)
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s")
    bottom = min([roof[0], *(y for _, y in at.values())])
    ax.set(xlim=(low, high), ylim=(bottom / 2, 2 * max([peak, *(y for _, y in at.values())])))
    ax.yaxis.set_major_formatter(EngFormatter())
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    labels = [f"roof of {machine.name}", f"ridge at {ridge:.3g}", *at]
    columns = max(1, 70 // (max(map(len, labels)) + 9))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
    return ax


def _board(rows: int, columns: int, beside: int = 2, below: int = 2) -> Axes:
    """Axes for a table and for names of so many letters, in cells of half an inch at most."""
    left, foot = 0.7 + 0.08 * beside, 0.7 + 0.08 * below
    cell = min(0.5, (6.2 - left) / columns, (6.2 - foot) / rows)
    return plt.subplots(figsize=(max(2, columns * cell + left), max(1.6, rows * cell + foot)))[1]


def _label(
    ax: Axes, shape: tuple[int, ...], queries: Sequence[str] | None, keys: Sequence[str] | None
) -> Axes:
    for axis, names, n, kind in (
        (ax.yaxis, queries, shape[0], "query"),
        (ax.xaxis, keys, shape[1], "key"),
    ):
        step = 1 if names is not None else max(1, -(-n // 12))
        axis.set_ticks(range(0, n, step), names)
        axis.set_label_text(kind)
    if keys is not None and max(map(len, keys), default=0) > 4:
        ax.tick_params(axis="x", rotation=60)
    return ax


def _look(n: int) -> dict[str, Any]:
    return {"color": COLOURS[n % len(COLOURS)], "linestyle": DASHES[n % len(DASHES)]}


def _numbers(name: str, x: Numbers, ndim: int, length: int | None = None) -> np.ndarray:
    x = np.asarray(x.detach().cpu().double() if isinstance(x, Tensor) else x, dtype=float)
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {x.shape}")
    if length is not None and len(x) != length:
        raise ValueError(f"{name} has {len(x)} numbers, x has {length}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinity, which no figure can show")
    return x
