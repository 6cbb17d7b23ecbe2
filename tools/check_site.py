"""The built site: links lead somewhere, pictures have words, nothing comes from outside.

python tools/check_site.py [FOLDER]
"""

import gzip
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LIMIT = 900_000  # bytes that one page may transfer, with everything it loads, its fonts included
TEXT = (".html", ".css", ".js", ".svg")
CSS_URL = re.compile(r"""(?:url\(|@import\s+)["']?([^)"';]+)""")


class Page(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.ids, self.links, self.loads, self.wordless = set(), [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("script", "img", "iframe", "source", "video", "audio") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.loads.append(a.get("href", ""))
        # The name of the picture file is what stands in for a missing text.
        if tag == "img" and (not a.get("alt") or re.fullmatch(r"\S+\.(png|svg)", a["alt"])):
            self.wordless.append(a.get("src", "")[:60])


def faults(root: Path) -> list[str]:
    pages = {p: Page(p.read_text("utf8")) for p in sorted(root.rglob("*.html"))}
    pages = {p: page for p, page in pages.items() if "_static" not in p.parts}
    bad = [] if pages else [f"no pages in {root}: run make book"]
    for path, page in pages.items():
        here = path.relative_to(root)
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if url in page.loads and parts.scheme != "data":
                    bad.append(f"{here}: loads {url}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                bad.append(f"{here}: {url} is missing")
            elif target in pages and unquote(parts.fragment) not in pages[target].ids | {""}:
                bad.append(f"{here}: {url} has no such anchor")
        bad += [f"{here}: picture without text: {src}" for src in page.wordless]
        if (size := weight(path, page)) > LIMIT:
            bad.append(f"{here}: {size / 1000:.0f} kB to transfer, the limit is {LIMIT / 1000:.0f}")
    for css in root.glob("_static/*.css"):
        for url in CSS_URL.findall(css.read_text("utf8")):
            if urlsplit(url).netloc:
                bad.append(f"{css.relative_to(root)}: loads {url}")
    return bad


def weight(path: Path, page: Page) -> int:
    """At most this many bytes are transferred: text compressed, every font of the style sheet."""
    files = {path}
    for url in page.loads:
        if not urlsplit(url).scheme:
            files.add((path.parent / unquote(urlsplit(url).path)).resolve())
    for css in [f for f in files if f.suffix == ".css" and f.exists()]:
        urls = CSS_URL.findall(css.read_text("utf8"))
        files |= {(css.parent / url).resolve() for url in urls if url.endswith(".woff2")}
    return sum(
        len(gzip.compress(f.read_bytes())) if f.suffix in TEXT else f.stat().st_size
        for f in files
        if f.exists()
    )


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "book/_build/html").resolve()
    bad = faults(root)
    pages = [p for p in root.rglob("*.html") if "_static" not in p.parts]
    sizes = {p: weight(p, Page(p.read_text("utf8"))) for p in pages}
    if sizes:
        worst = max(sizes, key=sizes.__getitem__)
        print(
            f"{len(pages)} pages; the heaviest, {worst.relative_to(root)}, transfers at most "
            f"{sizes[worst] / 1000:.0f} kB, its fonts included"
        )
    print("\n".join(bad) or "links, anchors and pictures are good; nothing comes from outside")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
