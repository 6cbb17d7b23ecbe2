"""What the site makes of a chapter's front matter: its number, its badges, and its numbered things.

A chapter's number is in its file name: chapters/05_scale.ipynb is chapter 05, and its equations,
theorems and figures are (5.1), (5.2), ... whatever else the site contains.
"""

import json
import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

LEVELS = {"start": "start here", "core": "core", "deep": "deep"}


@dataclass(frozen=True)
class Chapter:
    doc: str  # chapters/05_scale
    number: str  # 05
    title: str  # Scale
    cells: tuple = field(repr=False)  # of the notebook, as stored
    question: str = ""
    summary: str = ""
    level: str = "core"
    minutes: int = 0
    xp: int = 0
    needs: tuple[str, ...] = ()
    tags: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return self.doc.rpartition("/")[2]

    @property
    def name(self) -> str:
        return f"{self.number} · {self.title}"


@lru_cache(None)
def read(path: Path) -> Chapter:
    """The chapter in a notebook; its reading time is counted if the front matter does not say."""
    notebook = json.loads(path.read_text("utf8"))
    cells = [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"]]
    prose = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    lines = sum(c["source"].count("\n") + 1 for c in cells if c["cell_type"] == "code")
    title = re.search(r"^# (.+)$", prose, re.M)
    meta = {"minutes": math.ceil(len(prose.split()) / 200 + lines / 10)}
    meta |= {k: v for k, v in notebook["metadata"].get("chapter", {}).items() if v is not None}
    return Chapter(
        doc=f"chapters/{path.stem}",
        number=path.stem[:2],
        title=title.group(1).strip() if title else path.stem,
        cells=tuple(cells),
        **meta,
    )


def chapters(env) -> list[Chapter]:
    docs = sorted(doc for doc in env.found_docs if re.match(r"chapters/\d\d_", doc))
    return [read(Path(env.doc2path(doc))) for doc in docs]


def link(doc: str, text: str = "", classes=()) -> nodes.Element:
    """A link to a page, by its name, that Sphinx resolves (and warns about if there is no page)."""
    ref = addnodes.pending_xref(
        refdomain="std", reftype="doc", reftarget=f"/{doc}", refexplicit=bool(text), refwarn=True
    )
    ref += nodes.inline(text, text, classes=list(classes))
    return ref


def inline(text: str, *classes: str) -> nodes.inline:
    return nodes.inline(text, text, classes=list(classes))


class Head(SphinxTransform):
    """Put the number before a chapter's title, and its question and badges after it."""

    default_priority = 200

    def apply(self, **kwargs):
        known = {c.stem: c for c in chapters(self.env)}
        chapter = known.get(self.env.docname.rpartition("/")[2])
        title = next(self.document.findall(nodes.title), None)
        if chapter is None or chapter.doc != self.env.docname or title is None:
            return
        title.insert(0, nodes.Text(f"{chapter.number} · "))
        title.parent[1:1] = [*self.badges(chapter, known)]
        self.env.metadata[chapter.doc]["description"] = chapter.summary

    def badges(self, chapter, known):
        yield nodes.raw(
            "",
            f'<div class="chapter-meta" data-chapter="{chapter.doc}" data-xp="{chapter.xp}">',
            format="html",
        )
        if chapter.question:
            yield nodes.paragraph("", chapter.question, classes=["question"])
        line = nodes.paragraph(classes=["badges"])
        level = LEVELS.get(chapter.level, chapter.level)
        line += inline(level, "badge", f"level-{chapter.level}")
        line += inline(f"{chapter.minutes} min", "badge")
        line += inline(f"{chapter.xp} XP", "badge")
        for stem in chapter.needs:
            line += inline("needs ", "badge-label")
            line += link(known[stem].doc) if stem in known else inline(stem)
        yield line
        if leaves := [leaf for branch in chapter.tags.values() for leaf in branch]:
            tags = nodes.paragraph(classes=["tags"])
            tags.extend(inline(leaf, "tag") for leaf in leaves)
            yield tags
        yield nodes.raw("", "</div>", format="html")


def number_by_chapter(app, env):
    """Equations, theorems, figures of chapter 05 are 5.1, 5.2, ...; of its exercises E5.1, ..."""
    for doc, kinds in env.toc_fignumbers.items():
        place = re.match(r"(chapters|exercises)/(?:solutions/)?(\d\d)_", doc)
        if not place:
            continue
        prefix = f"{int(place[2])}" if place[1] == "chapters" else f"E{int(place[2])}"
        for numbers in kinds.values():
            for count, label in enumerate(list(numbers), 1):
                numbers[label] = (prefix, count)
    return []


def describe(app, pagename, templatename, context, doctree):
    """The summary of a chapter is what a search engine shows under its name."""
    if text := app.env.metadata.get(pagename, {}).get("description"):
        context["metatags"] += f'<meta name="description" content="{escape(text)}" />'


def setup(app):
    app.add_transform(Head)
    app.connect("env-get-updated", number_by_chapter, priority=900)
    app.connect("html-page-context", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
