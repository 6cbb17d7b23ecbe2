"""Who reads whom, word by word: a table of weights that a script turns into a map to point at.

Without scripts the weights stand there as a table of numbers: nothing is lost in print.

T words that read · S words that are read.
"""

import html
from collections.abc import Mapping, Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from heed.interactive import Output, _json, _rich

STYLE = """<style>
.xp .rd-scroll{overflow-x:auto;max-width:100%}
.xp table.rd{border-collapse:collapse;font-size:.9rem;margin:.3rem 0;width:auto}
.xp table.rd caption{caption-side:top;text-align:left;color:inherit;padding:.2rem 0}
.xp table.rd th,.xp table.rd td{padding:.1rem .35rem;text-align:center;border:0;background:none;
color:inherit;white-space:nowrap}
.xp table.rd th[scope=row]{text-align:right}
.xp table.rd td.right{outline:1px dashed currentColor;outline-offset:-1px}
.xp table.rd.live td{width:1.7rem;min-width:1.7rem;height:1.7rem;padding:0}
.xp table.rd.live td>i{display:block;margin:auto;background:var(--xp-accent)}
.xp table.rd.live td>span{position:absolute;width:1px;height:1px;overflow:hidden;
clip-path:inset(50%)}
.xp table.rd.live tr.on{background:color-mix(in srgb,var(--xp-accent) 16%,transparent)}
.xp table.rd.live th.read{font-weight:700;text-decoration:underline}
.xp table.rd th{font-weight:400}
.xp table.rd th button{border:0;padding:.1rem .35rem;min-height:1.7rem;font:inherit}
.xp .rd-said{min-height:3em;margin:.4rem 0 0}
</style>"""


def reading(
    maps: Mapping[str, Float[Tensor, "T S"]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    right: Bool[Tensor, "T S"] | None = None,
    title: str,
) -> Output:
    """One map or several, each (T, S) with rows that sum to at most 1; `right` marks true places.

    Point at a word of `rows`, or move to it with the tab key, to see which `columns` it reads.
    """
    if not maps:
        raise ValueError("a reading needs a map, got none")
    size = (len(rows), len(columns))
    if not 1 <= size[0] <= 40 or not 1 <= size[1] <= 40:
        raise ValueError(f"a map has 1 to 40 rows and columns, got {size}")
    for word in (*rows, *columns):
        if not word.strip():
            raise ValueError(f"every row and column is a word, got {word!r}; a space may be '␣'")
    tables = {}
    for name, weights in maps.items():
        _check(name, weights, size)
        tables[name] = [[round(w, 2) for w in row] for row in weights.tolist()]
    if right is not None and tuple(right.shape) != size:
        raise ValueError(f"right must be {size}, got {tuple(right.shape)}")
    true = right.tolist() if right is not None else [[False] * size[1]] * size[0]
    still = "".join(_table(name, table, rows, columns, true) for name, table in tables.items())
    return Output(
        "reading",
        title,
        _json({"names": list(tables), "marked": right is not None}),
        f"{STYLE}{still}",
    )


def _check(name: str, weights: Tensor, size: tuple[int, int]) -> None:
    if tuple(weights.shape) != size:
        raise ValueError(f"the map {name!r} must be {size}, got {tuple(weights.shape)}")
    if not weights.isfinite().all() or weights.min() < 0 or weights.sum(1).max() > 1 + 1e-4:
        raise ValueError(f"the map {name!r} must hold weights, rows that sum to 1 or less")


def _table(
    name: str,
    table: list[list[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    true: list[list[bool]],
) -> str:
    head = "".join(f'<th scope="col">{html.escape(word)}</th>' for word in columns)
    body = ""
    for word, weights, places in zip(rows, table, true, strict=True):
        cells = "".join(
            ('<td class="right">' if place else "<td>") + f"{weight:.2f}</td>"
            for weight, place in zip(weights, places, strict=True)
        )
        body += f'<tr><th scope="row">{html.escape(word)}</th>{cells}</tr>'
    return (
        f'<div class="rd-scroll" tabindex="0" role="region" aria-label="{html.escape(name)}">'
        f'<table class="rd"><caption>{_rich(name)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
