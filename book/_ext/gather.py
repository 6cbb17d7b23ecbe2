"""Directives that gather from all chapters at once.

    {bookmap}          the chapters as boxes, ordered by what each needs
    {mindmap}          branch, leaf, link: made from the chapters' tags
    {equation-index}   every numbered equation with the printed line of its witness
    {folklore-index}   every admonition of class `folklore`

Each leaves a placeholder that is filled when all chapters have been read.
"""

import re
from html import escape

from docutils import nodes
from frontmatter import chapters, link
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

log = logging.getLogger(__name__)
BRANCHES = "recurrence operator mechanism order architecture training efficiency".split()
WITNESS = re.compile(r"""\bwitness\(\s*["'](eq-[\w-]+)["']""")


class gathered(nodes.General, nodes.Element):
    """A placeholder; `what` is the name of the directive."""


class Gather(SphinxDirective):
    def run(self):
        return [gathered(what=self.name)]


class Fill(SphinxPostTransform):
    default_priority = 5  # before references are resolved: what is gathered contains some

    def run(self, **kwargs):
        for node in list(self.document.findall(gathered)):
            made = MAKERS[node["what"]](self.env, self.app.builder)
            for new in made:
                for ref in new.findall(addnodes.pending_xref):
                    ref["refdoc"] = self.env.docname
            node.replace_self(made)


def raw(html: str) -> list[nodes.Node]:
    return [nodes.raw("", html, format="html")]


def columns(found) -> list[list]:
    """Chapters by depth: column 0 needs nothing in the book, column n needs one of column n - 1."""
    known = {c.stem: c for c in found}

    def depth(chapter, above=()):
        if chapter.stem in above:
            raise ValueError(f"chapters that need each other: {' -> '.join(above)}")
        needs = [known[s] for s in chapter.needs if s in known]
        return 1 + max((depth(n, (*above, chapter.stem)) for n in needs), default=-1)

    out: dict[int, list] = {}
    for chapter in found:
        out.setdefault(depth(chapter), []).append(chapter)
    return [out[k] for k in sorted(out)]


def bookmap(env, builder):
    def box(c):
        needs = ", ".join(s[:2] for s in c.needs)
        facts = f"{c.minutes} min · {c.xp} XP" + (f" · needs {needs}" if needs else "")
        return (
            f'<li><a href="{builder.get_relative_uri(env.docname, c.doc)}">'
            f'<span class="box-title">{escape(c.name)}</span>'
            f'<span class="box-question">{escape(c.question)}</span>'
            f'<span class="box-facts">{facts}</span></a></li>'
        )

    lists = ["<ul>" + "".join(map(box, column)) + "</ul>" for column in columns(chapters(env))]
    steps = "".join(f"<li>{boxes}</li>" for boxes in lists)
    return raw(f'<nav aria-label="Map of the chapters"><ol class="bookmap">{steps}</ol></nav>')


def mindmap(env, builder):
    tree: dict[str, dict[str, list]] = {}
    for chapter in chapters(env):
        for branch, leaves in chapter.tags.items():
            if branch not in BRANCHES:
                log.warning(
                    "%s: tag branch %r is not one of %s", chapter.doc, branch, ", ".join(BRANCHES)
                )
            for leaf in leaves:
                tree.setdefault(branch, {}).setdefault(leaf, []).append(chapter)

    def leaf_item(leaf, found):
        first, *more = (
            (builder.get_relative_uri(env.docname, c.doc), c.number, escape(c.name)) for c in found
        )
        extra = "".join(
            f' <a href="{url}" title="{escape(leaf)}: {name}">{number}</a>'
            for url, number, name in more
        )
        return f'<li><a href="{first[0]}">{escape(leaf)} <small>{first[1]}</small></a>{extra}</li>'

    branches = "".join(
        f"<li><span>{branch}</span><ul>"
        + "".join(leaf_item(*item) for item in tree[branch].items())
        + "</ul></li>"
        for branch in BRANCHES
        if branch in tree
    )
    return raw(
        '<nav aria-label="Mind map of the book"><ul class="mindmap">'
        f"<li><span>Attention</span><ul>{branches}</ul></li></ul></nav>"
    )


def witnesses(chapter) -> dict[str, list[str]]:
    """The printed lines of every witness of a chapter, by the label of its equation."""
    out: dict[str, list[str]] = {}
    for cell in chapter.cells:
        labels = list(dict.fromkeys(WITNESS.findall(cell["source"])))
        if cell["cell_type"] != "code" or not labels:
            continue
        printed = "".join("".join(o.get("text", "")) for o in cell["outputs"]).splitlines()
        for label in labels:
            own = [s for s in printed if re.search(rf"(?<![\w-]){label}(?![\w-])", s)]
            out.setdefault(label, []).extend(own)
    return {label: lines for label, lines in out.items() if lines}


def equation_index(env, builder):
    made: list[nodes.Node] = []
    for chapter in chapters(env):
        printed = witnesses(chapter)
        blocks = [m for m in env.get_doctree(chapter.doc).findall(nodes.math_block)]
        blocks = [m for m in blocks if m.get("label")]
        if blocks:
            made.append(nodes.rubric("", "", link(chapter.doc)))
        for block in blocks:
            label = block["label"]
            if label not in printed:
                log.warning("%s: equation %s has no printed witness", chapter.doc, label)
            ref = addnodes.pending_xref(
                refdomain="math", reftype="eq", reftarget=label, refexplicit=False, refwarn=True
            )
            ref += nodes.literal(label, label)
            maths = nodes.math_block(block.astext(), block.astext(), nowrap=True, number=None)
            lines = "\n".join(printed.get(label, ["no witness"]))
            entry = nodes.container(classes=["equation-entry"])
            entry += nodes.paragraph("", "", ref, classes=["equation-number"])
            entry += maths
            entry += nodes.literal_block(lines, lines, language="none")
            made.append(entry)
    return made or [nodes.paragraph("", "No chapter has a numbered equation yet.")]


def folklore_index(env, builder):
    made: list[nodes.Node] = []
    for chapter in chapters(env):
        for box in env.get_doctree(chapter.doc).findall(nodes.admonition):
            if "folklore" not in box["classes"]:
                continue
            if not box["ids"]:
                log.warning("%s: a folklore box needs a :name:", chapter.doc, location=box)
                continue
            title = box.next_node(nodes.title).astext().removeprefix("Folklore corrected: ")
            url = f"{builder.get_relative_uri(env.docname, chapter.doc)}#{box['ids'][0]}"
            entry = nodes.container(classes=["folklore-entry"])
            entry += nodes.rubric("", "", nodes.reference("", title, refuri=url, internal=True))
            entry += next(p for p in box.children if isinstance(p, nodes.paragraph)).deepcopy()
            entry += nodes.paragraph("", "In ", link(chapter.doc))
            made.append(entry)
    return made or [nodes.paragraph("", "No chapter has corrected any folklore yet.")]


MAKERS = {
    "bookmap": bookmap,
    "mindmap": mindmap,
    "equation-index": equation_index,
    "folklore-index": folklore_index,
}


def setup(app):
    app.add_node(gathered)
    for name in MAKERS:
        app.add_directive(name, Gather)
    app.add_post_transform(Fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
