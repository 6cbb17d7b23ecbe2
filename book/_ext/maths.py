"""Maths as finished HTML and MathML: KaTeX runs at build time, so a page carries no maths script.

A formula that KaTeX cannot read is a build warning with its place, and the build takes warnings for
errors.
"""

import re
from functools import lru_cache
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

KATEX = Path(__file__).parents[2] / "node_modules/katex"
log = logging.getLogger(__name__)


@lru_cache(1)
def engine():
    from py_mini_racer import MiniRacer

    js = MiniRacer()
    js.eval((KATEX / "dist/katex.min.js").read_text("utf8"))
    return js


@lru_cache(None)
def render(tex, display):
    options = {"displayMode": display, "throwOnError": True, "strict": "ignore"}
    return engine().call("katex.renderToString", tex, options)


def formula(self, node, display):
    try:
        return render(node.astext(), display)
    except Exception as error:  # whatever V8 raises, it is a formula that KaTeX cannot read
        log.warning("KaTeX: %s", str(error).splitlines()[0], location=node, type="katex")
        return f"<code>{self.encode(node.astext())}</code>"


def visit_math(self, node):
    self.body.append(f'<span class="math">{formula(self, node, display=False)}</span>')
    raise nodes.SkipNode


def visit_math_block(self, node):
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    # A wide formula scrolls inside its box, and a box that scrolls must be reachable by keyboard.
    self.body.append(f'<div class="formula" tabindex="0">{formula(self, node, display=True)}</div>')
    self.body.append("</div>\n")
    raise nodes.SkipNode


def copy_katex(app):
    """Put KaTeX's style sheet, its woff2 fonts and its licence into the site."""
    if app.builder.name != "html":
        return
    if not KATEX.exists():
        raise FileNotFoundError(f"{KATEX} is missing: run `make setup`, which calls npm ci")
    target = Path(app.outdir) / "_static/katex"
    (target / "fonts").mkdir(parents=True, exist_ok=True)
    css = (KATEX / "dist/katex.min.css").read_text("utf8")
    css = re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("\w+"\)', "", css)
    (target / "katex.css").write_text(css, "utf8")
    for font in (KATEX / "dist/fonts").glob("*.woff2"):
        (target / "fonts" / font.name).write_bytes(font.read_bytes())
    (target / "LICENSE").write_bytes((KATEX / "LICENSE").read_bytes())


def setup(app):
    app.add_html_math_renderer("maths", (visit_math, None), (visit_math_block, None))
    app.add_css_file("katex/katex.css")
    app.connect("builder-inited", copy_katex)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
