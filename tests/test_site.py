"""The built site in headless Chromium: offline, readable on a phone, good with a screen reader.

`make pages` runs this after `make book`.
"""

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[1]
SITE = ROOT / "book/_build/html"
AXE = ROOT / "node_modules/axe-core/axe.min.js"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
PAGES = [p for p in PAGES if not p.startswith("_static")]
CHAPTERS = [p for p in PAGES if p.startswith("chapters/")]
FLAGS = """--disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
FLAGS += ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0)
RAW_MATHS = re.compile(r"\\[(\[]|\\(?:frac|sqrt|operatorname|mathbb|begin)\b|\$[^$\s][^$]*\$")


def give_up(reason: str):
    """Skip on a reader's machine; in CI a page that nobody looked at is a failure."""
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    mac = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    path = path or (str(mac) if mac.exists() else None)
    if path is None:
        give_up("no Chromium: apt install chromium, or brew install --cask chromium")
    if not PAGES:
        give_up("no site: make book")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def visit(browser):
    """Open a page with the network cut; after the test nothing may have gone wrong in it."""
    contexts, wrong = [], []

    def route(request):
        if urlsplit(request.request.url).hostname in ("127.0.0.1", "", None):
            return request.continue_()
        wrong.append(f"asks for {request.request.url}")
        request.abort()

    def visit(url, width=1280, scheme="light"):
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        context.route("**/*", route)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
        page.on("console", lambda m: m.type == "error" and wrong.append(f"console: {m.text}"))
        page.goto(url, wait_until="load")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def overflowing(page):
    """Elements that make the page wider than the window, if it is."""
    return page.evaluate("""() => {
        const wide = document.documentElement.clientWidth;
        if (document.documentElement.scrollWidth <= wide) return [];
        return [...document.querySelectorAll("main *")]
            .filter(e => e.getBoundingClientRect().right > wide + 1)
            .map(e => e.tagName + "." + e.className).slice(0, 5);
    }""")


def test_every_chapter_is_on_the_site():
    if not PAGES:
        give_up("no site: make book")
    folders = [ROOT / "chapters", ROOT / "exercises/solutions"]
    books = [p.relative_to(ROOT).with_suffix(".html") for f in folders for p in f.glob("*.ipynb")]
    assert {b.as_posix() for b in books} <= set(PAGES), "add it to book/_toc.yml"


# What takes axe minutes and tells it nothing: the spans of formulas, for which it has no rule, the
# coloured words of code, of which three of a kind are as good as a thousand, and rows of tables.
THIN_OUT = """() => {
    for (const e of document.querySelectorAll(".katex")) e.replaceWith("x");
    for (const e of [...document.querySelectorAll("tbody tr")].slice(60)) e.remove();
    const seen = {};
    for (const e of document.querySelectorAll(".highlight span")) {
        const place = e.closest(".cell_input, .cell_output")?.className;
        const kind = `${e.className} in ${place}`;
        seen[kind] = (seen[kind] || 0) + 1;
        if (seen[kind] > 3) e.remove();
    }
}"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_accessible_in_light_and_dark(visit, address, name):
    page = visit(f"{address}/{name}")
    page.add_script_tag(path=AXE)
    page.add_style_tag(content="* {transition: none !important}")  # colours change at once
    page.evaluate(THIN_OUT)
    for scheme, rules in (("light", "{}"), ("dark", "{runOnly: ['color-contrast']}")):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_selector(f"html[data-theme={scheme}]", timeout=5_000)
        found = page.evaluate(f"async () => (await axe.run({rules})).violations")
        grave = [v for v in found if v["impact"] in ("serious", "critical")]
        said = "\n".join(f"{v['id']}: {n['html'][:300]}" for v in grave for n in v["nodes"][:3])
        assert not grave, f"{scheme}: {said}"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone_and_shows_its_maths(visit, address, name):
    page = visit(f"{address}/{name}", width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, overflowing(page)
    if page.locator("span.math, div.math").count():
        assert page.locator(".katex").count(), "formulas without KaTeX"
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.evaluate(
            "document.fonts.ready.then(() => document.fonts.check('16px KaTeX_Main'))"
        )
    # What KaTeX was given stands in its MathML; what a reader sees must hold no raw TeX.
    seen = page.evaluate("""() => {
        const main = document.querySelector("main").cloneNode(true);
        for (const e of main.querySelectorAll("pre, code, script, .katex, math")) e.remove();
        return main.textContent;
    }""")
    assert RAW_MATHS.findall(seen) == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_says_what_it_asks_of_a_reader_and_remembers_that_it_is_done(
    visit, address, name
):
    page = visit(f"{address}/{name}")
    assert re.fullmatch(r"\d\d · .+", page.locator("article h1").inner_text())
    assert page.locator(".chapter-meta .question").inner_text().endswith("?")
    assert page.locator(".badges .badge").count() == 3
    earned = int(page.locator(".chapter-meta").get_attribute("data-xp"))
    for link in page.locator(".badges a").all():
        assert re.match(r"\d\d_\w+\.html$", link.get_attribute("href"))
    page.locator(".done-button").click()
    assert f"{earned} XP" in page.locator(".book-progress").inner_text()
    page.reload()
    assert "1 of" in page.locator(".book-progress").inner_text()
    assert page.locator(".nav-done").count() == 1
    page.locator(".done-button").click()
    assert "0 of" in page.locator(".book-progress").inner_text()


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_quiz_says_why_and_its_points_survive_a_reload(visit, address, name):
    page = visit(f"{address}/{name}")
    questions = page.locator("[data-explorer=quiz] [role=radiogroup]")
    if not questions.count():
        pytest.skip("no quiz with options on this page")
    question, points = questions.first, page.locator(".book-progress b")
    said = question.locator("[role=status]")
    for option in question.locator("input[type=radio]").all():
        option.check()
        question.locator("button").first.click()
        verdict, reason = re.fullmatch(
            r"(Right|Not yet)\.\s*(.*)", said.inner_text(), re.S
        ).groups()
        assert len(reason.split()) > 1, "an answer without a reason"
        if verdict == "Right":
            break
        assert points.inner_text() == "0 XP"
    else:
        pytest.fail("no option is right")
    earned = points.inner_text()
    assert int(earned.split()[0]) > 0
    page.reload()
    assert points.inner_text() == earned


def test_a_walk_goes_on_with_space_and_says_where_it_is(visit, address):
    page = visit(f"{address}/chapters/04_lookup.html")
    walk = page.locator("[data-explorer=stepper]").first
    steps = walk.locator("ol > li")
    shown = [step.is_visible() for step in steps.all()]
    assert shown[0] and not any(shown[1:])
    walk.focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert steps.nth(1).is_visible() and not steps.nth(0).is_visible()
    assert walk.get_by_text(f"step 2 of {steps.count()}").is_visible()
    walk.get_by_role("button", name="Next").click()
    assert steps.nth(2).is_visible()
    assert walk.locator("[aria-current=step]").inner_text().startswith("3 ")


def test_pointing_at_a_word_says_what_it_reads(visit, address):
    page = visit(f"{address}/chapters/03_alignment.html")
    figure = page.locator("[data-explorer=reading]").first
    row = figure.locator("tbody tr:visible").nth(1)
    row.locator("button").hover()
    said = figure.locator("[role=status]").inner_text()
    word, read, weight = re.match(r"(\S+) reads (.+?) ([01]\.\d\d)", said).groups()
    assert row.locator("button").inner_text() == word
    weights = [float(text) for text in row.locator("td").all_text_contents()]
    heads = figure.locator("thead:visible th").all_inner_texts()
    assert (
        float(weight) == max(weights)
        and heads[weights.index(max(weights))] == read.split(" (place ")[0]
    )
    assert float(figure.locator("td").first.evaluate("e => e.clientWidth")) > 0


@pytest.mark.parametrize("width", [1280, 390])
def test_a_block_can_be_drawn_from_memory(visit, address, width):
    figure = visit(f"{address}/chapters/10_block.html", width).locator("[data-explorer=drawing]")
    figure = figure.filter(has_text="Draw a pre-norm block").first
    parts = ["norm", "attention", "add", "norm", "feed-forward", "add"]
    for n, part in enumerate(parts, 1):
        figure.get_by_label(f"Box {n}", exact=True).select_option(part)
    for name, leaves, joins in (("Lower skip", "1", "3"), ("Upper skip", "3", "6")):
        skip = figure.get_by_role("group", name=name)
        skip.get_by_label("leaves at").select_option(leaves)
        skip.get_by_label("joins at").select_option(joins)
    check, said = figure.get_by_role("button", name="Check"), figure.get_by_role("status")
    check.click()
    assert "lower skip leaves from after the norm" in said.inner_text()
    lower = figure.get_by_role("group", name="Lower skip")
    lower.get_by_label("leaves at").select_option("0")
    check.click()
    assert said.inner_text().startswith("Right.")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_calculator_counts_llama(visit, address, width):
    page = visit(f"{address}/chapters/15_counting.html", width)
    figure = page.locator("[data-explorer=calculator]").first
    figure.get_by_label("model", exact=True).select_option("Llama 3 8B")
    assert figure.locator("[data-key=parameters]").inner_text() == "8,030,261,248"
    heads = figure.get_by_label("key-value heads, G")
    assert heads.evaluate("e => e.offsetWidth >= e.closest('div').offsetWidth - 1")
    heads.fill("5")
    assert figure.get_by_text("32 query heads cannot share 5 equally.").is_visible()
    assert figure.locator("[data-key]").count() == 0


def test_a_chapter_opens_as_a_file_without_a_server(visit):
    if not CHAPTERS:
        give_up("no chapters on the site: make chapters book")
    page = visit((SITE / CHAPTERS[-1]).as_uri())
    assert page.locator("article h1").is_visible()
    page.locator(".done-button").click()
    assert "1 of" in page.locator(".book-progress").inner_text()


def test_the_skip_link_leads_past_the_menu(visit, address):
    page = visit(f"{address}/{(CHAPTERS or PAGES)[0]}")
    page.keyboard.press("Tab")
    assert "Skip" in page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_search_finds_a_word_without_a_network(visit, address):
    page = visit(f"{address}/search.html?q=softmax")
    page.locator("ul.search li a").first.wait_for(timeout=10_000)
    assert page.locator("ul.search li a").count() > 0


def test_the_menu_of_a_phone_opens(visit, address):
    page = visit(f"{address}/{(CHAPTERS or PAGES)[0]}", width=390)
    menu = page.locator(".bd-sidebar-primary .book-progress").first
    assert not menu.is_visible()
    page.locator("button.primary-toggle").first.click()
    menu.wait_for(state="visible", timeout=5_000)
