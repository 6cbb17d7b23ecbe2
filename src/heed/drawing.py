"""Draw a Transformer block from memory: empty boxes on a stream that the reader fills in the page.

Without scripts the blank drawing stands there, and the answer behind a click.
"""

import base64
import html

from heed.interactive import Output, _json, _rich

PARTS = ("norm", "attention", "add", "feed-forward", "softmax", "embedding")  # the last two: spare

# Six boxes from bottom to top. A skip leaves at a point, 0 below box 1 and n above box n, and
# joins at a box, counted from 1.
ANSWERS = {
    "pre-norm": (
        ("norm", "attention", "add", "norm", "feed-forward", "add"),
        ((0, 3), (3, 6)),
        "The block is $y = x + \\text{attention}(\\text{norm}(x))$, then "
        "$z = y + \\text{feed-forward}(\\text{norm}(y))$. "
        "Each skip leaves before the norm, so nothing but sums stands on the stream itself.",
    ),
    "post-norm": (
        ("attention", "add", "norm", "feed-forward", "add", "norm"),
        ((0, 2), (3, 5)),
        "The block is $y = \\text{norm}(x + \\text{attention}(x))$, then "
        "$z = \\text{norm}(y + \\text{feed-forward}(y))$. "
        "Every norm stands on the stream itself, and a skip carries what came out of the last one.",
    ),
}

WIDTH, HEIGHT, PITCH, BOTTOM = 176, 440, 62, 406
MIDDLE, HALF = 104, 68  # of a box, across
LANES = 22, 8  # where the lower and the upper skip run


def drawing(kind: str, *, title: str = "Draw the block from memory") -> Output:
    """An empty block to fill; kind is "pre-norm" (GPT-2) or "post-norm" (2017)."""
    if kind not in ANSWERS:
        raise ValueError(f"a block is drawn as {' or '.join(ANSWERS)}, not {kind!r}")
    boxes, skips, why = ANSWERS[kind]
    blank, filled = picture(), picture(boxes, skips)
    task = _rich(f"Draw a {kind} block. The stream runs from the bottom to the top.")
    said = (
        f"From bottom to top: {', '.join(boxes)}. "
        f"The lower skip leaves at {'abcdef'[skips[0][0]]} and joins at box {skips[0][1]}; "
        f"the upper one leaves at {'abcdef'[skips[1][0]]} and joins at box {skips[1][1]}."
    )
    still = (
        f"<p>{task}</p>{_image(blank, 'A line through six empty boxes, from bottom to top.')}"
        f"<details><summary>The answer</summary>{_image(filled, said)}"
        f"<p>{html.escape(said)} {_rich(why)}</p></details>"
    )
    data = {
        "kind": kind,
        "parts": PARTS,
        "boxes": boxes,
        "skips": skips,
        "why": _rich(why),
        "task": task,
        "svg": blank,
        "ys": [_level(i) for i in range(7)],
        "lanes": LANES,
    }
    return Output("drawing", title, _json(data), still)


def picture(boxes: tuple[str, ...] = ("",) * 6, skips: tuple[tuple[int, int], ...] = ()) -> str:
    """The block as an SVG in the colour of the text around it."""
    made = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
        f' height="{HEIGHT}" font-family="sans-serif" font-size="14" fill="none"'
        ' stroke="currentColor" stroke-width="1.5">'
    ]
    for level in range(7):  # the pieces of the stream, then an arrow
        y = _level(level)
        low, high = (y + 13 if level else y + 16), (y - 13 if level < 6 else y - 12)
        made.append(f'<path d="M{MIDDLE} {low}V{high}"/>')
        if level < 6:
            made.append(
                f'<circle cx="{MIDDLE}" cy="{y}" r="3" fill="currentColor"/>'
                + _words(MIDDLE + 9, y + 5, "abcdef"[level], "start")
            )
    made.append(f'<path d="M{MIDDLE - 5} 28l5 -8l5 8"/>')
    made.append(_words(MIDDLE, HEIGHT - 4, "stream in") + _words(MIDDLE, 13, "stream out"))
    for n, part in enumerate(boxes):
        y = _level(n) - PITCH // 2
        made.append(
            f'<rect x="{MIDDLE - HALF}" y="{y - 18}" width="{2 * HALF}" height="36" rx="6"/>'
            + _words(MIDDLE, y + 5, part)
            + _words(MIDDLE - HALF + 7, y + 5, f"{n + 1}", "start")
        )
    for n in range(2):
        d = ""
        if n < len(skips):
            start, box = skips[n]
            x, y = LANES[n], _level(box - 1) - PITCH // 2
            d = f"M{MIDDLE} {_level(start)}H{x}V{y}H{MIDDLE - HALF}m-7 -5l7 5l-7 5"
        made.append(f'<path class="dr-skip" stroke-width="2" d="{d}"/>')
    return "".join(made) + "</svg>"


def _level(point: int) -> int:
    return BOTTOM - PITCH * point


def _words(x: int, y: int, text: str, anchor: str = "middle") -> str:
    return (
        f'<text x="{x}" y="{y}" fill="currentColor" stroke="none" text-anchor="{anchor}">'
        f"{text}</text>"
    )


def _image(svg: str, alt: str) -> str:
    code = base64.b64encode(svg.encode()).decode()
    return f'<img class="xp-still" alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{code}">'
