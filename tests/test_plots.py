"""Figures are read back: they show what went in, and every reader can tell the lines apart."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from heed import masks, plots
from heed.roofline import H100, Machine


@pytest.fixture(autouse=True)
def styled():
    with plt.rc_context():
        plots.style()
        yield
        plt.close("all")


def fonts(ax):
    ax.figure.canvas.draw()
    texts = [t for t in ax.figure.findobj(Text) if t.get_text() and t.get_visible()]
    return [t.get_fontsize() for t in texts]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def grey(colour):
    r, g, b = (x / 12.92 if x <= 0.04 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


ALL = {
    "mask": lambda: plots.mask(masks.table(masks.causal, 1, 1, 5, 7)[0, 0]),
    "large mask": lambda: plots.mask(torch.ones(64, 64).bool()),
    "weights": lambda: plots.weights(torch.full((3, 5), 0.2), list("abc"), list("vwxyz")),
    "large weights": lambda: plots.weights(torch.full((40, 30), 1 / 30)),
    "wide weights": lambda: plots.weights(torch.full((1, 10), 0.1), ["q"], 10 * ["suitcase"]),
    "long names": lambda: plots.weights(torch.full((8, 9), 0.1), 8 * ["layer 1, head 1"]),
    "lines": lambda: plots.lines([1, 2], {"a": [1, 2], "b": [3, 4]}, xlabel="x", ylabel="y"),
    "losses": lambda: plots.losses({"GPT": [2, 1.3], "none": [2, 1.6]}, floor=1.26),
    "bars": lambda: plots.bars({"one": 0.5, "two": 1.0}, ylabel="error"),
    "roofline": lambda: plots.roofline(H100, {"a product": (2048, 7e14), "a sum": (1 / 6, 5e11)}),
}


@pytest.mark.parametrize("name", ALL)
def test_a_figure_fits_its_page_and_can_be_read(name):
    ax = ALL[name]()
    assert ax.figure.get_size_inches()[0] <= 6.5
    assert ax.figure.get_size_inches()[1] <= 6.5
    assert min(fonts(ax)) >= 9
    assert to_rgb(ax.figure.get_facecolor()) == to_rgb(ax.get_facecolor()) == (1, 1, 1)
    drawn = ax.figure.get_tightbbox(ax.figure.canvas.get_renderer())
    assert drawn.x0 >= -0.05 and drawn.x1 <= ax.figure.get_size_inches()[0] + 0.05


@pytest.mark.parametrize("name", ["lines", "losses", "bars", "roofline"])
def test_no_line_stands_at_the_top_or_on_the_right(name):
    spines = ALL[name]().spines
    assert not spines["top"].get_visible() and not spines["right"].get_visible()


@pytest.mark.parametrize("name", ALL)
def test_a_figure_can_be_drawn_into_axes_that_are_there(name):
    calls = {
        "mask": lambda ax: plots.mask(torch.ones(2, 2).bool(), ax=ax),
        "weights": lambda ax: plots.weights(torch.ones(2, 2), ax=ax),
        "names": lambda ax: plots.weights(torch.ones(1, 2), ["a"], ["b", "c"], ax=ax),
        "lines": lambda ax: plots.lines([1], {"a": [1]}, xlabel="x", ylabel="y", ax=ax),
        "losses": lambda ax: plots.losses([1, 2], ax=ax),
        "bars": lambda ax: plots.bars({"a": 1}, ylabel="y", ax=ax),
        "roofline": lambda ax: plots.roofline(H100, {}, ax=ax),
    }
    ax = plt.subplots()[1]
    assert calls[name.split()[-1]](ax) is ax
    assert len(plt.get_fignums()) == 1


# Tables


def test_a_mask_is_blue_where_a_query_may_read():
    table = torch.rand(5, 7) < 0.5
    ax = plots.mask(table)
    shown = ax.images[0].get_array()
    assert ((shown > 0) == table.numpy()).all()
    colours = {ax.images[0].to_rgba(np.array([[v]]))[0, 0].tobytes() for v in np.unique(shown)}
    assert len(colours) == 2
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")


def test_small_weights_are_written_into_their_cells():
    w = torch.tensor([[1, 0, 0], [1 / 3, 2 / 3, 0]])
    ax = plots.weights(w, ["he", "sat"], ["he", "sat", "down"])
    cells = {t.get_position(): t.get_text() for t in ax.texts}
    assert cells == {
        **{(0, 0): "1", (1, 0): "0", (2, 0): "0"},
        **{(0, 1): "0.33", (1, 1): "0.67", (2, 1): "0"},
    }
    assert [t.get_text() for t in ax.get_xticklabels()] == ["he", "sat", "down"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["he", "sat"]
    assert np.allclose(ax.images[0].get_array(), w)


def test_a_number_can_be_told_from_its_cell():
    ax = plots.weights(torch.linspace(0, 1, 10)[None])
    for text in ax.texts:
        cell = ax.images[0].cmap(ax.images[0].norm(float(text.get_text())))[:3]
        light, dark = sorted((grey(cell), grey(text.get_color())), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, text.get_text()


def test_darker_is_more_in_grey_too():
    ax = plots.weights(torch.linspace(0, 1, 30)[None])
    image = ax.images[0]
    shades = [grey(image.cmap(image.norm(x))[:3]) for x in np.linspace(0, 1, 30)]
    assert all(a > b for a, b in zip(shades, shades[1:], strict=False))


def test_large_weights_have_a_scale_instead_of_numbers():
    ax = plots.weights(torch.full((11, 3), 1 / 3))
    assert not ax.texts and len(ax.figure.axes) == 2
    assert len(ax.get_yticks()) <= 12


# Curves


def test_lines_show_their_numbers_and_differ_in_colour_dashes_and_marker():
    ys = {f"curve {n}": torch.randn(4) for n in range(6)}
    ax = plots.lines([1, 2, 4, 8], ys, xlabel="width", ylabel="variance", level={"theorem": 1})
    *lines, level = ax.lines
    for line, y in zip(lines, ys.values(), strict=True):
        assert np.allclose(line.get_xdata(), [1, 2, 4, 8]) and np.allclose(line.get_ydata(), y)
    looks = [(x.get_color(), str(x._unscaled_dash_pattern), x.get_marker()) for x in lines]
    for kind in zip(*looks, strict=True):
        assert len(set(kind)) == 6
    assert list(level.get_ydata()) == [1, 1]
    assert legend(ax) == [*ys, "theorem"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("width", "variance")


def test_a_line_can_be_seen_on_white():
    for colour in plots.COLOURS:
        assert 1.05 / (grey(colour) + 0.05) >= 2.3, colour


def test_the_second_curve_looks_the_same_whether_or_not_the_first_has_bars():
    looks = []
    for bars in ({}, {"a": [1, 1]}):
        ax = plots.lines([1, 2], {"a": [1, 2], "b": [2, 3]}, bars=bars, xlabel="x", ylabel="y")
        (line,) = (line for line in ax.lines if line.get_label() == "b")
        looks.append((line.get_color(), line.get_linestyle(), line.get_marker()))
    assert looks[0] == looks[1]


def test_bars_around_few_points_are_error_bars_and_around_many_a_band():
    few = plots.lines([1, 2], {"a": [1, 2]}, bars={"a": [0.5, 0.25]}, xlabel="x", ylabel="y")
    ends = few.collections[0].get_segments()
    assert np.allclose(ends, [[[1, 0.5], [1, 1.5]], [[2, 1.75], [2, 2.25]]])
    x = np.arange(50)
    many = plots.lines(x, {"a": x}, bars={"a": np.ones(50)}, xlabel="x", ylabel="y")
    corners = many.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == -1 and corners[:, 1].max() == 50
    assert many.lines[0].get_marker() == ""


def test_a_logarithmic_axis_names_the_widths_that_were_measured():
    ax = plots.lines([16, 64, 512], {"a": [1, 2, 3]}, xlabel="x", ylabel="y", logx=True, logy=True)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["16", "64", "512"]
    assert ax.get_legend() is None  # one curve: the axis says what it is


def test_losses_say_how_far_they_end_above_the_floor():
    noisy = 1.5 + 0.1 * (-1.0) ** torch.arange(200)  # the mean of the last four steps is 1.5
    ys = {"GPT": noisy, "blind": torch.full((3,), 2.0), "cheat": [1.0]}
    ax = plots.losses(ys, floor=1.25)
    assert legend(ax) == [
        "GPT: ends at 1.500, 0.250 above the floor",
        "blind: ends at 2.000, 0.750 above the floor",
        "cheat: ends at 1.000, 0.250 below the floor",
        "floor: 1.250",
    ]
    smooth, raw, *_ = ax.lines
    assert np.allclose(raw.get_ydata(), noisy) and np.allclose(raw.get_xdata(), range(200))
    assert np.allclose(smooth.get_ydata(), 1.5) and np.allclose(smooth.get_xdata(), range(3, 200))
    assert list(ax.lines[-1].get_ydata()) == [1.25, 1.25]


def test_one_list_of_losses_needs_no_name():
    assert legend(plots.losses([3.0, 2.0, 1.0])) == ["loss: ends at 1.000"]


def test_bars_carry_their_numbers():
    ax = plots.bars({"softmax": 0.125, "cosine": 2}, ylabel="error", digits=3)
    assert [bar.get_height() for bar in ax.patches] == [0.125, 2]
    assert [t.get_text() for t in ax.texts] == ["0.125", "2.000"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["softmax", "cosine"]
    assert ax.get_ylabel() == "error"


def test_a_roofline_shows_both_limits_the_ridge_and_every_point():
    points = {f"kernel {n}": (2.0**n, 3.0 * 2**n) for n in range(-3, 3)}
    ax = plots.roofline(Machine("paper", 100, 10), points)
    roof, ridge, *drawn = ax.lines
    x, y = roof.get_data()
    assert np.allclose(y, np.minimum(100, 10 * np.asarray(x))) and 10 in x
    assert min(x) < 2**-3 and max(x) > 10
    assert list(ridge.get_xdata()) == [10, 10]
    for point, (x, y) in zip(drawn, points.values(), strict=True):
        assert (list(point.get_xdata()), list(point.get_ydata())) == ([x], [y])
    assert len({(p.get_color(), p.get_marker()) for p in drawn}) == 6
    assert len({p.get_color() for p in drawn}) == len({p.get_marker() for p in drawn}) == 6
    assert legend(ax) == ["roof of paper", "ridge at 10", *points]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("FLOP per byte", "FLOP/s")


def test_a_roofline_shows_points_above_its_roof_and_far_below():
    ax = plots.roofline(Machine("paper", 100, 10), {"cached": (1, 400), "slow": (1, 0.5)})
    low, high = ax.get_ylim()
    assert low < 0.5 and high > 400


def test_tensors_that_learn_and_half_precision_can_be_shown():
    y = torch.tensor([1.0, 2.0], requires_grad=True)
    ax = plots.lines(torch.tensor([1, 2]), {"a": y.bfloat16()}, xlabel="x", ylabel="y")
    assert list(ax.lines[0].get_ydata()) == [1, 2]


XY = {"xlabel": "x", "ylabel": "y"}


@pytest.mark.parametrize(
    "draw, said",
    [
        (lambda: plots.mask(torch.ones(1, 1, 2, 2).bool()), r"table .* \(1, 1, 2, 2\)"),
        (lambda: plots.weights(torch.ones(2)), r"weights .* \(2,\)"),
        (lambda: plots.weights(torch.tensor([[-0.1]])), "-0.1"),
        (lambda: plots.weights(torch.tensor([[torch.nan]])), "NaN"),
        (lambda: plots.weights(torch.ones(2, 2), ["a"]), "1 names for 2 query positions"),
        (lambda: plots.weights(torch.ones(2, 2), None, list("abc")), "3 names for 2 key positions"),
        (lambda: plots.lines([1, 2], {"a": [1, 2, 3]}, **XY), "a has 3 numbers, x has 2"),
        (lambda: plots.lines([1, 2], {"a": [1, 2]}, bars={"a": [1]}, **XY), "bars of a has 1"),
        (lambda: plots.lines([1], {"a": [1]}, bars={"b": [1]}, **XY), r"without a curve: \['b'\]"),
        (lambda: plots.lines([1], {"a": [np.inf]}, **XY), "a holds NaN or infinity"),
        (lambda: plots.losses([]), "no steps"),
        (lambda: plots.losses([1.0, np.nan]), "loss holds NaN"),
        (lambda: plots.bars({"a": np.nan}, ylabel="y"), "NaN"),
        (lambda: plots.roofline(H100, {"a": (0, 1)}), "a must be .* above 0"),
        (lambda: plots.roofline(H100, {"a": (1, -1)}), "a must be .* above 0"),
        (lambda: plots.roofline(H100, {"a": (1, 2, 3)}), "a must be"),
        (lambda: plots.roofline(H100, {"a": (1, np.inf)}), "a holds NaN or infinity"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_no_empty_figure(draw, said, unchecked):
    with pytest.raises(ValueError, match=said):
        draw()
    assert plt.get_fignums() == []
