"""Explorers and quizzes that run in the page: no kernel, no network, the same bytes on every run.

A cell's output holds the data as JSON, a picture or a list for readers without scripts (untrusted
notebooks, print), and the script from `js/`. Text may hold $tex$, which becomes MathML here, and
`code`; everything else in it is plain.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from typing import Any

import torch
from latex2mathml.converter import convert

from heed.attention import softmax

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")  # told apart by colour-blind eyes

STYLE = """
.xp{--xp-accent:var(--pst-color-primary,color-mix(in srgb,#1f6fd6 70%,currentColor));
--xp-good:var(--pst-color-success,color-mix(in srgb,#15803d 75%,currentColor));
--xp-bad:var(--pst-color-danger,color-mix(in srgb,#c62828 75%,currentColor));
--xp-line:color-mix(in srgb,currentColor 28%,transparent);
margin:1rem 0;padding:.9rem 1rem;border:1px solid var(--xp-line);border-radius:.5rem;
max-width:46rem;font-size:1rem;line-height:1.5;box-sizing:border-box;overflow-wrap:anywhere}
html[data-theme=dark] .bd-content div.cell_output .text_html:has(.xp){
background:none;color:inherit;padding:0}
.xp.xp figcaption{font-weight:600;font-style:normal;font-size:1rem;
margin:0 0 .6rem;padding:0;text-align:left}
.xp img.xp-still{max-width:100%;height:auto;background:#fff;border-radius:.25rem}
.xp button{font:inherit;color:inherit;background:none;border:1px solid var(--xp-accent);
border-radius:.35rem;padding:.25rem .8rem;min-height:2.25rem;cursor:pointer}
.xp button:hover{background:color-mix(in srgb,var(--xp-accent) 14%,transparent)}
.xp button[hidden]{display:none}
.xp input[type=text]{font:inherit;color:inherit;background:transparent;min-height:2.25rem;
border:1px solid currentColor;border-radius:.35rem;padding:.25rem .5rem;width:9rem;
box-sizing:border-box}
.xp :focus-visible{outline:3px solid var(--xp-accent);outline-offset:2px}
.xp math{font-size:1.05em}
"""


@dataclass(frozen=True)
class Output:
    """What a cell shows; `still` stands there until the script runs, and stays if it may not."""

    name: str
    title: str
    payload: str
    still: str

    @property
    def id(self) -> str:
        return "xp-" + hashlib.sha256((self.name + self.payload).encode()).hexdigest()[:10]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        script = resources.files("heed").joinpath(f"js/{self.name}.js").read_text("utf8")
        page = (
            f"<style>{STYLE}</style>"
            f'<figure class="xp" id="{self.id}" data-explorer="{self.name}">'
            f"<figcaption>{_rich(self.title)}</figcaption><div>{self.still}</div></figure>"
            f"<script>(function(){{{script}\n"
            f'document.querySelectorAll("#{self.id}").forEach(function(el){{mount(el,{self.payload});}});'
            "})()</script>"
        )
        return {"text/html": page, "text/plain": f"<{self.name}: {self.title}>"}


def explorer(
    name: str, data: Mapping[str, Any], *, title: str, picture: str | None = None
) -> Output:
    """The explorer js/<name>.js with its data; `picture` is an SVG for readers without scripts."""
    if name not in EXPLORERS:
        raise ValueError(f"no explorer {name!r}; there are {', '.join(sorted(EXPLORERS))}")
    full = EXPLORERS[name](data)
    drawn, words = DRAWINGS[name](full)
    code = base64.b64encode((picture or drawn).encode()).decode()
    alt = html.escape(f"{title}. {words}", quote=True)
    still = f'<img class="xp-still" alt="{alt}" src="data:image/svg+xml;base64,{code}">'
    return Output(name, title, _json(full), still)


def _json(data: Any) -> str:
    """JSON that may stand inside <script>."""
    return json.dumps(data, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")


def _rich(text: str) -> str:
    """Plain text to HTML; $tex$ becomes MathML, `code` becomes code, \\$ a dollar."""

    def part(piece: str) -> str:
        if len(piece) > 2 and piece[0] == piece[-1] == "$":
            return _mathml(piece[1:-1])
        if len(piece) > 2 and piece[0] == piece[-1] == "`":
            return f"<code>{html.escape(piece[1:-1], quote=False)}</code>"
        return html.escape(piece.replace("\\$", "$"), quote=False)

    return "".join(part(p) for p in re.split(r"((?<!\\)\$[^$]+\$|`[^`]+`)", text))


def _mathml(tex: str) -> str:
    made = convert(tex)
    if "\\" in made:
        raise ValueError(f"no MathML for ${tex}$")
    # A thin space after ln and its kin, where a name or a number follows.
    return re.sub(
        r"(<m[io]>[A-Za-z]{2,}</m[io]>)(?!<mo)(?=<m)", r'\1<mspace width="0.17em"/>', made
    )


# The explorer of chapter 04: a query and its keys in the plane.


def lookup_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """query (2 numbers), keys (2 to 5 pairs), values (one number each), temperature, scaled."""
    known = {"query", "keys", "values", "temperature", "scaled"}
    if strange := sorted(set(data) - known):
        raise ValueError(f"lookup knows {sorted(known)}, not {strange}")
    if missing := sorted({"query", "keys", "values"} - set(data)):
        raise ValueError(f"lookup needs {missing}")
    query, keys = [float(x) for x in data["query"]], [[float(x) for x in k] for k in data["keys"]]
    values, temperature = [float(x) for x in data["values"]], float(data.get("temperature", 1))
    if not 2 <= len(keys) <= 5 or {len(query), *map(len, keys)} != {2}:
        raise ValueError(f"lookup draws 2 to 5 keys in the plane, got query {query}, keys {keys}")
    if len(values) != len(keys):
        raise ValueError(f"{len(keys)} keys but {len(values)} values")
    numbers = [*query, *(x for k in keys for x in k), *values]
    if not all(map(math.isfinite, numbers)) or not 0.05 <= temperature <= 20:
        raise ValueError(f"numbers must be finite, the temperature in [0.05, 20]: {dict(data)}")
    scaled = bool(data.get("scaled", True))
    return {
        "query": query,
        "keys": keys,
        "values": values,
        "temperature": temperature,
        "scaled": scaled,
    }


def lookup_drawing(data: Mapping[str, Any]) -> tuple[str, str]:
    """The same as a still SVG, and in words."""
    q, k = torch.tensor([[[data["query"]]]]), torch.tensor([[data["keys"]]])
    scores = (q @ k.mT)[0, 0, 0] * (2**-0.5 if data["scaled"] else 1.0)
    w = softmax(scores, temperature=data["temperature"]).tolist()
    out = sum(a * b for a, b in zip(w, data["values"], strict=True))
    reach = max(2, math.ceil(max(abs(x) for p in [data["query"], *data["keys"]] for x in p)))

    def at(p: Sequence[float]) -> tuple[float, float]:
        return 130 + 115 * p[0] / reach, 130 - 115 * p[1] / reach

    x, y = at(data["query"])
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 260" width="560" height="260"'
        ' font-family="sans-serif" font-size="14">',
        '<rect width="560" height="260" fill="#fff"/>',
        '<path d="M15 130H245M130 15V245" stroke="#999" fill="none"/>',
        f'<path d="M130 130L{x:.1f} {y:.1f}" stroke="#222" stroke-width="3"/>',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="#222"/>',
        f'<text x="{x + 11:.1f}" y="{y - 7:.1f}" fill="#222">query</text>',
    ]
    for s, (key, value, weight) in enumerate(zip(data["keys"], data["values"], w, strict=True)):
        (x, y), row, name, bar = at(key), 40 + 36 * s, "abcde"[s], 120 * weight
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="{COLOURS[s]}"/>',
            f'<text x="{x + 12:.1f}" y="{y + 5:.1f}" fill="#222">{name}</text>',
            f'<text x="275" y="{row + 5}" fill="#222">{name}, value {value:g}</text>',
            f'<rect x="375" y="{row - 9}" width="{bar:.1f}" height="18" fill="{COLOURS[s]}"/>',
            f'<text x="{381 + bar:.1f}" y="{row + 5}" fill="#222">{weight:.2f}</text>',
        ]
    parts.append(f'<text x="275" y="235" fill="#222" font-weight="bold">output {out:.2f}</text>')
    said = ", ".join(f"{name} {weight:.2f}" for name, weight in zip("abcde", w, strict=False))
    return "".join(parts) + "</svg>", f"Weights: {said}. Output: {out:.2f}."


EXPLORERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"lookup": lookup_data}
DRAWINGS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str]]] = {"lookup": lookup_drawing}


# Quizzes.


def quiz(questions: Sequence[Mapping[str, Any]], *, id: str) -> Output:
    """Questions that say why: a choice ("options"), a number ("answer") or missing words ("words").

    {"q": ..., "options": [{"t": ..., "ok": True, "why": ...}, {"t": ..., "why": ...}]}
    {"q": ..., "answer": 1/6, "tol": 0.001, "why": ..., "wrong": [{"answer": 6, "why": ...}]}
    {"q": "The ___ of D.", "words": [["root", "square root"]], "why": ...}
    """
    if not re.fullmatch(r"[\w-]+", id):
        raise ValueError(f"the id of a quiz is one word, got {id!r}")
    if not questions:
        raise ValueError("a quiz needs a question")
    ready = [_question(q, f"question {n} of {id}") for n, q in enumerate(questions, 1)]
    return Output("quiz", "Quiz", _json({"id": id, "questions": ready}), _still(ready))


def right_places(questions: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where the right option stands in each choice, from 0, so that a test sees that it varies."""
    return [
        next(i for i, o in enumerate(q["options"]) if o.get("ok"))
        for q in questions
        if "options" in q
    ]


KINDS = {
    "options": {"q", "options"},
    "answer": {"q", "answer", "tol", "why", "wrong", "hint"},
    "words": {"q", "words", "why", "hint"},
}


def _question(q: Mapping[str, Any], where: str) -> dict[str, Any]:
    kinds = [k for k in KINDS if k in q]
    if len(kinds) != 1:
        raise ValueError(f"{where} needs one of {list(KINDS)}, got {list(q)}")
    if strange := sorted(set(q) - KINDS[kinds[0]]):
        raise ValueError(f"{where}: unknown {strange}")
    ready = {"q": _text(q, "q", where)}
    if "hint" in q:
        ready["hint"] = _text(q, "hint", where)
    return ready | {"options": _choice, "answer": _number, "words": _words}[kinds[0]](q, where)


def _text(thing: Mapping[str, Any], name: str, where: str) -> str:
    text = thing.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} needs {name!r} in words, got {text!r}")
    return _rich(text)


def _choice(q: Mapping[str, Any], where: str) -> dict[str, Any]:
    options = q["options"]
    if len(options) < 2:
        raise ValueError(f"{where} needs two options or more, got {len(options)}")
    right = sum(bool(o.get("ok")) for o in options)
    if right != 1:
        raise ValueError(f"{where} needs exactly one right option, got {right}")
    if len({o.get("t") for o in options}) < len(options):
        raise ValueError(f"{where} offers the same option twice")
    ready = []
    for n, o in enumerate(options, 1):
        if strange := sorted(set(o) - {"t", "ok", "why"}):
            raise ValueError(f"{where}, option {n}: unknown {strange}")
        place = f"{where}, option {n},"
        ready.append(
            {"t": _text(o, "t", place), "why": _text(o, "why", place), "ok": bool(o.get("ok"))}
        )
    return {"options": ready}


def _number(q: Mapping[str, Any], where: str) -> dict[str, Any]:
    answer = q["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int | float | Fraction):
        raise ValueError(f"{where} needs a number as its answer, got {answer!r}")
    tol = q.get("tol", 0 if answer == round(answer) else abs(float(answer)) / 200)
    if not math.isfinite(answer) or not 0 <= tol < math.inf:
        raise ValueError(f"{where} needs finite numbers, got {answer} within {tol}")
    wrong = []
    for w in q.get("wrong", []):
        if abs(w["answer"] - answer) <= tol:
            raise ValueError(f"{where}: {w['answer']} would count as right")
        why = _text(w, "why", f"{where}, a wrong answer,")
        wrong.append({"answer": float(w["answer"]), "why": why})
    shown = str(answer) if isinstance(answer, int | Fraction) else f"{answer:g}"
    number = {"answer": float(answer), "tol": float(tol), "shown": shown, "wrong": wrong}
    return number | {"why": _text(q, "why", where)}


def _words(q: Mapping[str, Any], where: str) -> dict[str, Any]:
    words = q["words"]
    if all(isinstance(w, str) for w in words):  # one blank
        words = [words]
    blanks = q["q"].count("___") or 1
    if blanks != len(words):
        raise ValueError(f"{where} has {blanks} blanks (___) and words for {len(words)}")
    for accepted in words:
        if isinstance(accepted, str) or not accepted or not all(a.strip() for a in accepted):
            raise ValueError(f"{where} needs a list of accepted words for a blank, got {accepted}")
    return {"words": [list(accepted) for accepted in words], "why": _text(q, "why", where)}


def _still(ready: list[dict[str, Any]]) -> str:
    """The questions as a list, for readers without scripts."""
    items = []
    for q in ready:
        options = "".join(f"<li>{o['t']}</li>" for o in q.get("options", []))
        items.append(f"<li>{q['q']}" + (f"<ul>{options}</ul>" if options else "") + "</li>")
    return f"<ol>{''.join(items)}</ol>"
