"""heed.interactive: what a quiz and an explorer put on the page, and what they do in a browser."""

import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from heed.attention import attention
from heed.interactive import explorer, lookup_drawing, quiz, right_places

LOOKUP = {
    "query": [1.5, 0.5],
    "keys": [[2, 1], [-1, 1.5], [0.5, -1.5], [-1.5, -1]],
    "values": [1, 4, 6, 9],
    "temperature": 0.8,
}
CHOICE = {
    "q": "How wide is $q \\cdot k$ if `D < 65` is 64?",
    "options": [
        {"t": "64", "why": "That is the variance."},
        {"t": "$\\sqrt{64}$", "ok": True, "why": "Eight."},
        {"t": "1", "why": "Only after the division."},
    ],
}
NUMBER = {
    "q": "The weight of $\\ln 1$?",
    "answer": Fraction(1, 6),
    "tol": 0.001,
    "why": "$1 / (1 + 2 + 3)$.",
    "wrong": [{"answer": 6, "why": "Turn it over."}],
    "hint": "Take exp.",
}
WORDS = {
    "q": "Divide by the ___ of the ___.",
    "words": [["square root", "root"], ["width"]],
    "why": "Then the variance is 1.",
    "hint": "Which power of D?",
}
QUESTIONS = [CHOICE, NUMBER, WORDS]
A = {"t": "a", "ok": True, "why": "w"}


def page(output):
    return output._repr_mimebundle_()["text/html"]


def payload(output):
    return json.loads(output.payload)


def test_an_output_is_the_same_on_every_run_and_its_text_is_one_line():
    a, b = quiz(QUESTIONS, id="ch99"), quiz(QUESTIONS, id="ch99")
    assert a._repr_mimebundle_() == b._repr_mimebundle_()
    assert a._repr_mimebundle_()["text/plain"] == "<quiz: Quiz>"
    assert a.id != quiz(QUESTIONS, id="ch98").id
    assert (
        explorer("lookup", LOOKUP, title="T").id
        != explorer("lookup", LOOKUP | {"query": [1, 1]}, title="T").id
    )


def test_a_page_asks_nothing_of_the_network():
    for output in (quiz(QUESTIONS, id="ch99"), explorer("lookup", LOOKUP, title="T")):
        names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML"}  # no addresses
        assert set(re.findall(r"https?://[\w./-]+", page(output))) <= names
        assert not re.search(r"import\(|fetch\(|XMLHttp|url\((?!data:)", page(output))
        assert all(s.startswith("data:") for s in re.findall(r'\bsrc="([^"]*)', page(output)))


def test_tex_becomes_mathml_code_becomes_code_and_the_rest_is_plain_text():
    first = payload(quiz([CHOICE], id="x"))["questions"][0]
    assert first["q"].startswith("How wide is <math") and first["q"].endswith("is 64?")
    assert "<code>D &lt; 65</code>" in first["q"]
    assert "<msqrt>" in first["options"][1]["t"]
    cheap = {"q": "A <b> costs \\$2 & more", "answer": 1, "why": "w"}
    assert payload(quiz([cheap], id="x"))["questions"][0]["q"] == "A &lt;b&gt; costs $2 &amp; more"
    assert (
        '<mi>ln</mi><mspace width="0.17em"/><mn>1</mn>'
        in payload(quiz([NUMBER], id="x"))["questions"][0]["q"]
    )


def test_nothing_in_the_data_can_end_the_script():
    end = "</script><!--"
    choice = {"q": end, "options": [A | {"t": end}, {"t": "b", "why": end}]}
    words = {"q": "___", "words": [end], "why": "w"}
    script = page(quiz([choice, words], id="x")).split("<script>")[1]
    assert script.count("</script>") == 1 and "<!--" not in script


def test_without_scripts_there_are_the_questions_or_a_picture_with_words():
    still = quiz(QUESTIONS, id="ch99").still
    assert still.count("<li>") == 3 + 3 and "Eight" not in still
    out = explorer("lookup", LOOKUP, title="A <soft> dictionary")
    assert (
        'alt="A &lt;soft&gt; dictionary. Weights: a 0.' in out.still and "Output: 1." in out.still
    )


@pytest.mark.parametrize(
    "question, said",
    [
        ({"q": "x"}, r"1 of ch99 needs one of \['options', 'answer', 'words'\], got \['q'\]"),
        (CHOICE | {"answer": 3}, "needs one of"),
        (CHOICE | {"wy": "x"}, r"question 1 of ch99: unknown \['wy'\]"),
        (CHOICE | {"q": " "}, "needs 'q' in words"),
        (CHOICE | {"options": [A]}, "two options or more, got 1"),
        (CHOICE | {"options": CHOICE["options"][::2]}, "exactly one right option, got 0"),
        (CHOICE | {"options": [A, A | {"t": "8"}]}, "exactly one right option, got 2"),
        (CHOICE | {"options": [A, {"t": "b"}]}, "option 2, needs 'why'"),
        (CHOICE | {"options": [A, {"t": "a", "why": "w"}]}, "the same option twice"),
        (CHOICE | {"options": [A, {"t": "b", "why": "w", "k": 1}]}, r"option 2: unknown \['k'\]"),
        (NUMBER | {"answer": "1/6"}, "needs a number as its answer, got '1/6'"),
        (NUMBER | {"answer": True}, "needs a number"),
        (NUMBER | {"tol": -1}, "within -1"),
        (NUMBER | {"why": None}, "needs 'why'"),
        (NUMBER | {"wrong": [{"answer": 1 / 6, "why": "no"}]}, "would count as right"),
        (NUMBER | {"wrong": [{"answer": 3}]}, "a wrong answer, needs 'why'"),
        (WORDS | {"words": [["root"]]}, r"2 blanks \(___\) and words for 1"),
        (WORDS | {"words": [["root"], []]}, "a list of accepted words"),
        (WORDS | {"words": [["root"], [" "]]}, "a list of accepted words"),
        (CHOICE | {"q": "$\\nosuch{x}$"}, "no MathML for"),
    ],
)
def test_a_question_that_would_mislead_is_refused_by_name(question, said):
    with pytest.raises(ValueError, match=said):
        quiz([question], id="ch99")


def test_an_empty_quiz_and_an_id_of_two_words_are_refused():
    with pytest.raises(ValueError, match="needs a question"):
        quiz([], id="ch99")
    with pytest.raises(ValueError, match="one word"):
        quiz(QUESTIONS, id="chapter 99")


def test_how_near_is_right_is_said_or_follows_from_the_answer():
    def tol(**number):
        made = quiz([{"q": "x", "why": "w"} | number], id="x")
        return payload(made)["questions"][0]["tol"]

    assert tol(answer=8) == 0 and tol(answer=8.0) == 0 and tol(answer=8, tol=1) == 1
    assert tol(answer=0.5) == pytest.approx(0.0025) and tol(
        answer=Fraction(-1, 2)
    ) == pytest.approx(0.0025)
    assert payload(quiz([NUMBER], id="x"))["questions"][0]["shown"] == "1/6"


def test_one_blank_may_be_a_plain_list_and_need_no_mark():
    one = {"q": "What are mixed are the ...", "words": ["values", "value"], "why": "w"}
    assert payload(quiz([one], id="x"))["questions"][0]["words"] == [["values", "value"]]


def test_right_places_tells_where_the_right_options_stand():
    assert right_places([CHOICE, NUMBER, CHOICE | {"options": CHOICE["options"][::-1]}]) == [1, 1]
    assert right_places([CHOICE | {"options": CHOICE["options"][1:]}]) == [0]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"keyes": []}, r"lookup knows .*, not \['keyes'\]"),
        ({"query": [1, 2, 3]}, "in the plane"),
        ({"keys": [[1, 2]], "values": [1]}, "2 to 5 keys"),
        ({"values": [1, 2]}, "4 keys but 2 values"),
        ({"temperature": 0}, "temperature in"),
        ({"query": [float("nan"), 1]}, "finite"),
    ],
)
def test_an_explorer_refuses_data_that_it_cannot_draw(change, said):
    with pytest.raises(ValueError, match=said):
        explorer("lookup", LOOKUP | change, title="T")


def test_an_unknown_explorer_and_missing_data_are_named():
    with pytest.raises(ValueError, match="no explorer 'quiz'; there are lookup"):
        explorer("quiz", {}, title="T")
    with pytest.raises(ValueError, match=r"lookup needs \['keys', 'values'\]"):
        explorer("lookup", {"query": [1, 2]}, title="T")


@pytest.mark.parametrize("scaled", [True, False])
def test_the_still_picture_is_drawn_from_the_data_with_heeds_numbers(scaled):
    full = payload(explorer("lookup", LOOKUP | {"scaled": scaled}, title="T"))
    drawn, words = lookup_drawing(full)
    text = [t.text for t in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    want = heeds(full["query"], full["keys"], full["values"], (2**-0.5 if scaled else 1) / 0.8)
    assert f"output {want:.2f}" in text and words.endswith(f"Output: {want:.2f}.")
    assert text.count("query") == 1 and "d, value 9" in text


def heeds(query, keys, values, scale):
    q, k = (
        torch.tensor([[[query]]], dtype=torch.float64),
        torch.tensor([[keys]], dtype=torch.float64),
    )
    v = torch.tensor(values, dtype=torch.float64)[None, None, :, None]
    return attention(q, k, v, scale=scale).item()


# In a browser

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HTML = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title>
<meta name="viewport" content="width=device-width"><style>:root{{color-scheme:light dark}}
body{{margin:8px;font-family:sans-serif}}</style></head><body><main>{}</main></body></html>"""


AXE = Path(__file__).parents[1] / "node_modules/axe-core/axe.min.js"


def assert_readable(tab):
    """Nothing is wider than the window, smaller than 12 px or wrong for axe."""
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = tab.evaluate(
        """() => [...document.querySelectorAll(".xp *")].filter(e =>
            e.clientWidth && parseFloat(getComputedStyle(e).fontSize) < 12).length"""
    )
    assert small == 0
    if AXE.exists():
        tab.add_script_tag(path=AXE)
        found = tab.evaluate("async () => (await axe.run('figure')).violations")
        assert [v["id"] for v in found] == []


@pytest.fixture(scope="module")
def browser():
    where = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if where is None:
        said = "no Chromium on the path; on Debian: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(said)
        pytest.skip(said)
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=where, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(params=[("light", 900), ("dark", 390)], ids=["light", "dark and narrow"])
def tab(browser, request):
    scheme, width = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    tab, faults = context.new_page(), []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    tab.set_content(
        HTML.format(page(explorer("lookup", LOOKUP, title="T")) + page(quiz(QUESTIONS, id="ch99")))
    )
    tab.evaluate("heard = []; document.addEventListener('heed:answer', e => heard.push(e.detail))")
    yield tab
    assert faults == []
    context.close()


def question(tab, n):
    return tab.locator(".xp-q").nth(n)


def answer(tab, n, *texts):
    for field, text in zip(question(tab, n).locator("input[type=text]").all(), texts, strict=True):
        field.fill(text)
    question(tab, n).locator("button").first.click()
    return question(tab, n).get_by_role("status").inner_text()


@pytest.mark.site
def test_nothing_is_wider_than_the_window(tab):
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.site
def test_text_and_lines_stand_out_from_the_background(tab):
    """WCAG's contrast, measured on what the browser computed: 4.5 for words."""
    tab.evaluate(
        """() => { window.contrast = el => {
            const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const dark = matchMedia('(prefers-color-scheme: dark)').matches;
            const lum = css => {
                c.fillStyle = dark ? '#121212' : '#fff'; c.fillRect(0, 0, 1, 1);
                if (css) { c.fillStyle = css; c.fillRect(0, 0, 1, 1); }
                const [r, g, b] = [...c.getImageData(0, 0, 1, 1).data].map(
                    v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const [a, b] = [lum(getComputedStyle(el).color), lum()].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05); } }"""
    )
    question(tab, 0).get_by_role("radio").nth(0).check()
    question(tab, 0).get_by_role("button", name="Check").click()
    answer(tab, 1, "1/6")
    for words in (
        ".xp figcaption",
        ".xp-ask",
        ".xp-n",
        ".xp-say strong",
        "button",
        "td",
        ".xp-words",
    ):
        for n in range(tab.locator(words).count()):
            assert tab.locator(words).nth(n).evaluate("contrast") >= 4.5, words


@pytest.mark.site
def test_a_choice_says_why_it_is_wrong_lets_one_try_again_and_tells_the_page(tab):
    first = question(tab, 0)
    assert first.locator(".xp-n").inner_text() == "Question 1 of 3"
    assert first.get_attribute("role") == "radiogroup"
    first.get_by_role("button", name="Check").click()
    assert first.get_by_role("status").inner_text() == "Pick one first."
    first.get_by_role("radio").nth(0).check()
    first.get_by_role("button", name="Check").click()
    assert first.get_by_role("status").inner_text() == "Not yet. That is the variance."
    first.get_by_role("radio").nth(1).check()
    first.get_by_role("button", name="Try again").click()
    assert first.get_by_role("status").inner_text() == "Right. Eight."
    assert tab.evaluate("heard") == [
        {"id": "ch99/0", "ok": False, "tries": 1},
        {"id": "ch99/0", "ok": True, "tries": 2},
    ]
    assert tab.locator(".xp-end span").inner_text() == "1 of 3 right, 0 at the first try."


@pytest.mark.site
def test_a_choice_can_be_made_with_the_keyboard_alone(tab):
    question(tab, 0).get_by_role("radio").nth(0).focus()
    for key in ("ArrowDown", "Tab", "Enter"):
        tab.keyboard.press(key)
    assert question(tab, 0).get_by_role("status").inner_text() == "Right. Eight."


@pytest.mark.site
def test_a_number_is_read_however_it_is_written(tab):
    for right in (
        "1/6",
        " 1 / 6 ",
        "0.1667",
        "0,1667",
        "16.67 %",
        "16,67%",
        ".1667",
        "2/12",
        "1.667e-1",
    ):
        assert answer(tab, 1, right).startswith("Right."), right
    for wrong in ("1/7", "0.18", "0.1680", "0.1655", "-1/6", "−0,1667", "1667"):
        assert answer(tab, 1, wrong) == "Not yet. Take exp.", wrong
    assert answer(tab, 1, "6") == "Not yet. Turn it over."
    tries = tab.evaluate("heard.length")
    for nothing in ("a sixth", "1/0", "1/2/3", "--1", "", "   "):
        assert answer(tab, 1, nothing).startswith("Write "), nothing
    assert tab.evaluate("heard.length") == tries


@pytest.mark.site
def test_thousands_may_be_grouped(tab):
    read = lambda text: tab.evaluate("t => heedQuiz.numbers(t)", text)  # noqa: E731
    assert 98304 in read("98,304") and 98304 in read("98.304") and 98304 in read("98 304")
    assert (
        read("1,5") == [1.5]
        and 1234567.5 in read("1,234,567.5")
        and 1234567.5 in read("1.234.567,5")
    )


@pytest.mark.site
def test_missing_words_forgive_case_hyphens_and_a_full_stop(tab):
    assert answer(tab, 2, "Root", "depth") == "Not yet. Word 2 does not fit. Which power of D?"
    assert answer(tab, 2, "x", "y") == "Not yet. Which power of D?"
    assert answer(tab, 2, " Square-Root ", "WIDTH.") == "Right. Then the variance is 1."


@pytest.mark.site
def test_after_two_tries_the_answer_may_be_seen_but_does_not_count(tab):
    show = question(tab, 1).get_by_role("button", name="Show the answer")
    answer(tab, 1, "6")
    assert not show.is_visible()
    answer(tab, 1, "7")
    show.click()
    assert question(tab, 1).locator("input").input_value() == "1/6"
    assert question(tab, 1).get_by_role("status").inner_text().startswith("The answer: 1/6.")
    assert not any(e["ok"] for e in tab.evaluate("heard"))


@pytest.mark.site
def test_one_may_start_over(tab):
    answer(tab, 1, "6")
    answer(tab, 2, "root", "width")
    assert tab.locator(".xp-end span").inner_text() == "1 of 3 right, 1 at the first try."
    tab.get_by_role("button", name="Start over").click()
    assert question(tab, 1).locator("input").input_value() == ""
    assert tab.locator(".xp-end span").inner_text() == "0 of 3 right."
    assert not tab.get_by_role("button", name="Start over").is_visible()
    answer(tab, 1, "1/6")
    assert tab.locator(".xp-end span").inner_text() == "1 of 3 right, 1 at the first try."


@pytest.mark.site
def test_the_explorer_computes_what_heed_computes(tab):
    for _ in range(50):
        D, S = (int(n) for n in torch.randint(1, 7, (2,)))
        query, keys = torch.randn(D).tolist(), (3 * torch.randn(S, D)).tolist()
        values, temperature = torch.randn(S).tolist(), 0.05 + 3 * torch.rand(()).item()
        for scaled in (True, False):
            got = tab.evaluate(
                "([q, k, v, t, s]) => { const h = heedLookup, w = h.softmax(h.scores(q, k, s), t);"
                " return [h.output(w, v), w.reduce((a, b) => a + b)] }",
                [query, keys, values, temperature, scaled],
            )
            want = heeds(query, keys, values, (D**-0.5 if scaled else 1) / temperature)
            assert got == pytest.approx([want, 1], abs=1e-6)


def shown(tab):
    """query and keys from the handles; weights and output from the page, as text."""
    hands = [h.get_attribute("aria-valuetext") for h in tab.locator(".xp-hand").all()]
    points = [[float(x) for x in re.findall(r"-?[\d.]+", h)] for h in hands]
    weights = [float(w) for w in tab.locator("td.xp-bar b").all_inner_texts()]
    out = float(tab.locator(".xp-look svg text").last.text_content().split()[1])
    return points[-1], points[:-1], weights, out


@pytest.mark.site
def test_dragging_a_key_moves_it_and_the_numbers_follow(tab):
    key, query = tab.locator(".xp-hand").nth(1), tab.locator(".xp-hand").nth(4)
    a, b = (h.locator("circle").nth(2).bounding_box() for h in (key, query))
    tab.mouse.move(a["x"] + a["width"] / 2, a["y"] + a["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(b["x"] + b["width"] / 2, b["y"] + b["height"] / 2, steps=4)
    tab.mouse.up()
    at, keys, weights, out = shown(tab)
    assert keys[1] == pytest.approx([1.5, 0.5], abs=0.051) and at == [1.5, 0.5]
    assert out == pytest.approx(heeds(at, keys, LOOKUP["values"], 2**-0.5 / 0.8), abs=0.006)
    assert sum(weights) == pytest.approx(1, abs=0.02)
    tab.get_by_role("button", name="Reset").click()
    assert shown(tab)[1] == LOOKUP["keys"]


@pytest.mark.site
def test_arrow_keys_move_a_point_and_reset_brings_it_back(tab):
    hand = tab.get_by_role("slider", name="query")
    hand.focus()
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowDown"):
        tab.keyboard.press(key)
    assert hand.get_attribute("aria-valuetext") == "x 1.70, y 0.00"
    for _ in range(9):
        tab.keyboard.press("ArrowRight")
    assert hand.get_attribute("aria-valuetext") == "x 2.00, y 0.00"  # the edge
    tab.get_by_role("button", name="Reset").click()
    assert hand.get_attribute("aria-valuetext") == "x 1.50, y 0.50"


@pytest.mark.site
def test_temperature_and_scale_change_the_output_and_words_follow(tab):
    box = tab.get_by_label("divide by √2")
    assert box.is_checked()
    box.uncheck()
    at, keys, _, out = shown(tab)
    assert out == pytest.approx(heeds(at, keys, LOOKUP["values"], 1 / 0.8), abs=0.006)
    slider = tab.get_by_label("Temperature")
    slider.focus()
    tab.keyboard.press("End")
    at, keys, weights, out = shown(tab)
    assert out == pytest.approx(heeds(at, keys, LOOKUP["values"], 10**-1.3), abs=0.006)
    tab.wait_for_timeout(600)
    words = tab.locator(".xp-words")
    assert words.get_attribute("aria-live") == "polite"
    assert words.inner_text().endswith(f"The output is {out:.2f}.") and " %" in words.inner_text()


@pytest.mark.site
def test_without_scripts_the_picture_and_the_questions_stay(browser):
    context = browser.new_context(java_script_enabled=False, offline=True)
    tab = context.new_page()
    tab.set_content(
        HTML.format(page(explorer("lookup", LOOKUP, title="T")) + page(quiz(QUESTIONS, id="x")))
    )
    assert tab.get_by_role("img", name="T. Weights: a").is_visible()
    assert tab.get_by_text("How wide is").is_visible() and tab.locator("input").count() == 0
    context.close()
