"""After the build: one small style sheet instead of many, sized pictures, icons cut to those used.

A page that came with 3.8 MB leaves with a tenth of it. Names for screen readers are mended too.
This runs last, because the theme writes its code colours at the very end of a build.
"""

import hashlib
import logging
import posixpath
import re
from pathlib import Path

import tinycss2
from fontTools import subset

logging.getLogger("fontTools").setLevel(logging.WARNING)  # else it tells of every table

ICON_SCRIPT = re.compile(
    r'<script defer(?:="defer")? src="[^"]*scripts/fontawesome\.js[^"]*"></script>'
)
SHEET = re.compile(r'<link (?=[^>]*rel="stylesheet")[^>]*?href="([^"?]+)(?:\?[^"]*)?"[^>]*>\n?')
SCRIPT = re.compile(
    r'<script ((?:data-[\w-]+="[^"]*" )*)'
    r'src="((?!https?:)(?![^"]*documentation_options)[^"]+)"></script>'
)
PICTURE = re.compile(r'<img ([^>]*?)src="([^"]+\.png)"([^>]*?)/?>')
URL = re.compile(r'url\((["\']?)(?!data:|https?:|#)([^)"\']+)\1\)')
IMPORT = re.compile(r"""@import (?:url\()?["']?([^"')]+)["']?\)?;""")
EDIT = re.compile(r"/edit/main/(chapters|exercises)/(?:solutions/)?(\w+)\.ipynb")
WORD = re.compile(r"[A-Za-z_][\w-]*")
NESTED = ("media", "supports", "layer", "container")
NAME = re.compile(r"[.#]([A-Za-z_][\w-]*)")
SPOKEN = [  # names that do not contain the visible text, and content outside every landmark
    (' aria-label="Search"', ""),
    (' aria-label="Toggle hidden content"', ""),
    ('<div role="list" class="citation-list">', '<div class="citation-list">'),
    (
        '<div class="sidebar-primary-items__start',
        '<div role="region" aria-label="Book" class="sidebar-primary-items__start',
    ),
]


def sheet(out: Path, rel: Path) -> str:
    """A style sheet with its imports in it, and its addresses as seen from _static."""
    css = re.sub(r"/\*.*?\*/", "", (out / rel).read_text("utf8"), flags=re.S)
    css = IMPORT.sub(lambda m: sheet(out, rel.parent / m[1]), css)

    def moved(m):
        if m[2].startswith("@"):
            return m[0]
        path = posixpath.normpath((rel.parent / m[2]).as_posix())
        return f"url({posixpath.relpath(path, '_static')})"

    return re.sub(r"\s*\n\s*", "\n", URL.sub(moved, css))


def purge(css: str, words: set[str]) -> str:
    """Drop the rules whose selectors name a class or id that no page or script mentions."""
    out = []
    for node in tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True):
        if node.type == "qualified-rule":
            if kept := used(tinycss2.serialize(node.prelude), words):
                out.append(kept + "{" + tinycss2.serialize(node.content).strip() + "}")
        elif node.type == "at-rule" and node.content and node.lower_at_keyword in NESTED:
            if inner := purge(tinycss2.serialize(node.content), words):
                head = "@" + node.at_keyword + tinycss2.serialize(node.prelude).rstrip()
                out.append(head + "{" + inner + "}")
        elif node.type != "error":
            out.append(node.serialize())
    return "\n".join(out)


def used(prelude: str, words: set[str]) -> str:
    """The selectors of a comma list whose names occur; commas inside brackets do not separate."""
    depth, parts = 0, [""]
    for char in prelude:
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    plain = [re.sub(r"\[[^\]]*\]|:not\([^)]*\)|\\.", "", part) for part in parts]
    kept = [p.strip() for p, q in zip(parts, plain, strict=True) if set(NAME.findall(q)) <= words]
    return ",".join(kept)


def cut_icons(out: Path, css: str) -> None:
    """Keep only the glyphs that the style sheet still names."""
    codes = {int(code, 16) for code in re.findall(r"\\([ef][0-9a-f]{3})", css)}
    codes |= {ord(char) for char in css if 0xE000 <= ord(char) <= 0xF8FF}
    for path in out.glob("_static/vendor/fontawesome/webfonts/fa-*.woff2"):
        options = subset.Options(flavor="woff2", layout_features=[], notdef_outline=True)
        font = subset.load_font(path, options)
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=codes)
        cutter.subset(font)
        subset.save_font(font, path, options)


def png_size(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        head = file.read(24)
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def size_pictures(page: Path, text: str) -> str:
    """Say how large a picture is, so that the text below does not jump when it arrives."""

    def sized(m):
        png = (page.parent / m[2]).resolve()
        if "width=" in m[1] + m[3] or not png.exists():
            return m[0]
        width, height = png_size(png)
        size = f'width="{width}" height="{height}" loading="lazy"'
        return f'<img {m[1]}src="{m[2]}"{m[3]} {size} />'

    return PICTURE.sub(sized, text)


def bundle(out: Path, names: tuple[str, ...], words: set[str]) -> str:
    css = purge("\n".join(sheet(out, Path(name)) for name in names), words)
    cut_icons(out, css)
    name = f"_static/site-{hashlib.sha256(css.encode()).hexdigest()[:8]}.css"
    (out / name).write_text(css, "utf8")
    return name


def lighten(app, error):
    if error or app.builder.name != "html":
        return
    out, words, bundles = Path(app.outdir).resolve(), set(), {}
    pages = sorted(p for p in out.rglob("*.html") if "_static" not in p.parts)
    scripts = [p for p in out.rglob("*.js") if p.name != "fontawesome.js"]
    for path in [*pages, *scripts]:
        words.update(WORD.findall(path.read_text("utf8", errors="ignore")))
    for page in pages:
        text = ICON_SCRIPT.sub("", page.read_text("utf8"))
        for old, new in SPOKEN:
            text = text.replace(old, new)
        text = EDIT.sub(r"/edit/main/\1/md/\2.md", text)  # a notebook is made from its text
        text = SCRIPT.sub(r'<script defer \1src="\2"></script>', text)
        local = [m[1] for m in SHEET.finditer(text)]
        names = tuple((page.parent / s).resolve().relative_to(out).as_posix() for s in local)
        if names not in bundles:
            bundles[names] = bundle(out, names, words)
        up = "../" * (len(page.relative_to(out).parts) - 1)
        head = f'<link rel="stylesheet" href="{up}{bundles[names]}" />\n'
        text = SHEET.sub(head, text, count=1)
        first = text.index(head) + len(head)
        text = text[:first] + SHEET.sub("", text[first:])
        page.write_text(size_pictures(page, text), "utf8")


def setup(app):
    app.connect("build-finished", lighten, priority=990)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
