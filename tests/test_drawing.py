"""The drawing: its answers are the blocks of heed.blocks, and its judge knows them in a browser."""

import base64
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from test_interactive import HTML, assert_readable, browser  # noqa: F401

from heed.blocks import PostNorm, PreNorm
from heed.drawing import ANSWERS, PARTS, drawing

PRE, POST = ANSWERS["pre-norm"][0], ANSWERS["post-norm"][0]


def page(output):
    return output._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize(("kind", "Block"), [("pre-norm", PreNorm), ("post-norm", PostNorm)])
def test_the_answer_computes_what_the_block_computes(kind, Block):
    block = Block(8, n_heads=2).double()
    norms = iter([block.norm1, block.norm2])
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    boxes, skips, _ = ANSWERS[kind]
    points = [x]  # what runs along the stream at every point
    for n, part in enumerate(boxes, 1):
        if part == "add":
            (start,) = (start for start, end in skips if end == n)
            points.append(points[-1] + points[start])
        else:
            parts = {"attention": block.attn, "feed-forward": block.mlp}
            points.append((next(norms) if part == "norm" else parts[part])(points[-1]))
    torch.testing.assert_close(points[-1], block(x), rtol=0, atol=1e-12)


def words(image):
    svg = base64.b64decode(re.search(r"base64,([\w+/=]+)", image).group(1)).decode()
    return [t.text for t in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if t.text]


@pytest.mark.parametrize("kind", ANSWERS)
def test_without_scripts_the_boxes_are_empty_and_the_answer_is_folded_away(kind):
    out = page(drawing(kind, title="The block"))
    blank, answer = out[: out.index("<script>")].split("<details>")
    assert not set(words(blank)) & set(PARTS)
    assert tuple(w for w in words(answer) if w in PARTS) == ANSWERS[kind][0]
    assert f"From bottom to top: {', '.join(ANSWERS[kind][0])}." in answer
    assert f"Draw a {kind} block." in blank


def test_a_drawing_is_the_same_on_every_run_and_the_two_kinds_differ():
    a, b = (page(drawing("pre-norm", title="The block")) for _ in range(2))
    assert a == b != page(drawing("post-norm", title="The block"))
    assert drawing("pre-norm")._repr_mimebundle_()["text/plain"].startswith("<drawing: ")


def test_another_kind_of_block_is_refused_by_name():
    with pytest.raises(ValueError, match="pre-norm or post-norm, not 'sandwich'"):
        drawing("sandwich")


# In a browser


@pytest.fixture(params=["pre-norm", "post-norm"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def judge(request):
    """(kind, boxes, skips) -> what the judge says, without the page around it."""
    context = request.getfixturevalue("browser").new_context(offline=True)
    tab = context.new_page()
    tab.set_content(HTML.format(page(drawing("pre-norm"))))

    def judge(kind, boxes, skips=None):
        asked = {"kind": kind, "boxes": ANSWERS[kind][0], "skips": ANSWERS[kind][1], "why": "Yes."}
        return tab.evaluate("a => heedDrawing.judge(...a)", [asked, boxes, skips or asked["skips"]])

    judge.tab = tab
    yield judge
    context.close()


@pytest.fixture(scope="module", params=[("light", 900), ("dark", 390)], ids=["light", "phone"])
def window(request):
    scheme, width = request.param
    context = request.getfixturevalue("browser").new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    yield context.new_page()
    context.close()


@pytest.fixture
def tab(window, kind):
    """A fresh drawing; nothing may go wrong in its page."""
    faults = []
    heard = {
        "pageerror": lambda error: faults.append(str(error)),
        "console": lambda said: faults.append(said.text) if said.type == "error" else None,
    }
    for event, hear in heard.items():
        window.on(event, hear)
    window.set_content(HTML.format(page(drawing(kind, title="The block"))))
    # axe takes a page without a colour for a white one, in the dark too.
    window.add_style_tag(content="body{background:Canvas;color:CanvasText}")
    yield window
    for event, hear in heard.items():
        window.remove_listener(event, hear)
    assert faults == []


def fill(tab, boxes, skips=()):
    for n, part in enumerate(boxes, 1):
        tab.get_by_label(f"Box {n}", exact=True).select_option(part)
    for name, (start, end) in zip(("Lower skip", "Upper skip"), skips, strict=False):
        group = tab.get_by_role("group", name=name)
        group.get_by_label("leaves at").select_option(str(start))
        group.get_by_label("joins at").select_option(str(end))


def check(tab):
    tab.get_by_role("button", name="Check").click()
    return tab.get_by_role("status").inner_text()


@pytest.mark.site
def test_of_all_46656_fillings_one_is_right_and_a_box_that_is_named_is_wrong(judge, kind):
    asked = {"kind": kind, "boxes": ANSWERS[kind][0], "skips": ANSWERS[kind][1], "why": "Yes."}
    right, silent, wrong = judge.tab.evaluate(
        """([asked, parts]) => {
            let right = [], silent = 0, wrong = 0;
            for (let n = 0; n < 6 ** 6; n++) {
                const boxes = asked.boxes.map((_, i) => parts[Math.floor(n / 6 ** i) % 6]);
                const found = heedDrawing.judge(asked, boxes, asked.skips);
                if (found.ok) right.push(boxes);
                if (found.text.length < 4 || /undefined|null/.test(found.text)) silent++;
                if (found.ok === false && found.box && boxes[found.box - 1] === asked.boxes[found.box - 1]) wrong++;
            }
            return [right, silent, wrong];
        }""",  # noqa: E501
        [asked, PARTS],
    )
    assert right == [list(ANSWERS[kind][0])] and silent == 0 and wrong == 0


@pytest.mark.site
def test_of_all_1296_pairs_of_skips_one_is_right(judge, kind):
    asked = {"kind": kind, "boxes": ANSWERS[kind][0], "skips": ANSWERS[kind][1], "why": "Yes."}
    right = judge.tab.evaluate(
        """asked => {
            const right = [];
            for (let n = 0; n < 6 ** 4; n++) {
                const [a, b, c, d] = [0, 1, 2, 3].map(i => Math.floor(n / 6 ** i) % 6);
                const skips = [[a, b + 1], [c, d + 1]];
                if (heedDrawing.judge(asked, asked.boxes, skips).ok) right.push(skips);
            }
            return right;
        }""",
        asked,
    )
    assert right == [[list(skip) for skip in ANSWERS[kind][1]]]


@pytest.mark.site
@pytest.mark.parametrize(
    ("boxes", "skips", "box", "said"),
    [
        (POST, None, 1, "that is post-norm, the 2017 order"),
        (PRE[:3] + POST[3:], None, 4, "you norm the stream itself after adding"),
        (("attention", *PRE[1:3], "norm", "feed-forward", "norm"), None, 0, "needs an add"),
        (("norm", "add", "add", "norm", "feed-forward", "add"), None, 0, "mixes the positions"),
        (PRE[:4] + ("norm", "add"), None, 0, "feed-forward layer is missing"),
        (("attention", "add", "norm", "feed-forward", "add", "add"), None, 0, "a norm before it"),
        (("norm", "softmax", *PRE[2:]), None, 2, "inside attention"),
        (("embedding", *PRE[1:]), None, 1, "before the first block"),
        (PRE[3:] + PRE[:3], None, 2, "attention comes first"),
        (("norm", "norm", "attention", "add", "feed-forward", "add"), None, 2, "two norms"),
        (("add", "norm", "attention", "norm", "feed-forward", "add"), None, 1, "nothing to add"),
        (("norm", "attention", "norm", "add", "feed-forward", "add"), None, 3, "attention made"),
        (PRE[:3] + ("feed-forward", "norm", "add"), None, 4, "reads the bare stream"),
        (("norm", "", *PRE[2:]), None, 2, "Box 2 is still empty"),
        (PRE, ((1, 3), (3, 6)), 0, "lower skip leaves from after the norm"),
        (PRE, ((0, 3), (4, 6)), 0, "upper skip leaves from after the norm"),
        (PRE, ((2, 3), (3, 6)), 0, "leaves from after the layer"),
        (PRE, ((0, 3), (0, 6)), 0, "leaves below the first add"),
        (PRE, ((0, 2), (3, 6)), 0, "box 2, which is attention: only an add"),
        (PRE, ((0, 6), (3, 6)), 0, "the add of the other layer"),
        (PRE, ((4, 3), (3, 6)), 0, "leaves above the add"),
        (PRE, ((0, 3), (None, None)), 0, "Where does the upper skip leave?"),
    ],
)
def test_the_first_mistake_in_a_pre_norm_block_is_named(judge, boxes, skips, box, said):
    found = judge("pre-norm", boxes, skips)
    assert said in found["text"] and found["box"] == box and not found["ok"]


@pytest.mark.site
@pytest.mark.parametrize(
    ("boxes", "skips", "box", "said"),
    [
        (PRE, None, 1, "that is pre-norm, the order of GPT-2"),
        (POST[:3] + PRE[3:], None, 4, "two norms"),
        (("attention", "norm", "add", *POST[3:]), None, 2, "must be added to the stream"),
        (POST[:2] + ("feed-forward", "add", "norm", "norm"), None, 3, "right after the add"),
        (POST, ((0, 2), (2, 5)), 0, "upper skip leaves from before the norm"),
        (POST, ((0, 2), (1, 5)), 0, "leaves below the first add"),
        (POST, ((0, 2), (4, 5)), 0, "leaves from after the layer"),
        (POST, ((1, 2), (3, 5)), 0, "lower skip leaves from after the layer"),
    ],
)
def test_the_first_mistake_in_a_post_norm_block_is_named(judge, boxes, skips, box, said):
    found = judge("post-norm", boxes, skips)
    assert said in found["text"] and found["box"] == box and not found["ok"]


@pytest.mark.site
def test_the_drawing_shows_what_was_chosen_and_says_it(tab, kind):
    boxes, skips, _ = ANSWERS[kind]
    fill(tab, boxes[:5])
    shown = [w for w in tab.locator(".dr-left svg text").all_text_contents() if w in PARTS]
    assert tuple(shown) == boxes[:5]
    assert check(tab) == "Box 6 is still empty."
    fill(tab, boxes, skips)
    label = tab.get_by_role("img").get_attribute("aria-label")
    assert f"box 6 {boxes[5]}, lower skip from a to box {skips[0][1]}, upper" in label
    assert all(path.get_attribute("d") for path in tab.locator(".dr-skip").all())
    assert check(tab).startswith("Right. The block is")
    tab.get_by_role("button", name="Start over").click()
    assert tab.get_by_role("status").inner_text() == ""
    assert check(tab) == "Box 1 is still empty."


@pytest.mark.site
def test_the_way_from_box_to_box_needs_no_mouse(tab, kind):
    boxes, skips, _ = ANSWERS[kind]
    tab.get_by_label("Box 1", exact=True).focus()
    letters = "abcdef"
    typed = [*boxes, letters[skips[0][0]], f"box {skips[0][1]}"]
    for text in [*typed, letters[skips[1][0]], f"box {skips[1][1]}"]:
        tab.keyboard.type(text)
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert tab.get_by_role("status").inner_text().startswith("Right.")


@pytest.mark.site
def test_the_answer_may_be_seen_and_is_right(tab):
    tab.get_by_role("button", name="Show the answer").click()
    assert tab.get_by_role("status").inner_text().startswith("The answer. The block is")
    assert check(tab).startswith("Right.")


@pytest.mark.site
def test_the_page_is_accessible_and_nothing_is_small_or_cut_off(tab, kind):
    fill(tab, ANSWERS[kind][0][:3] + ANSWERS["pre-norm"][0][3:5] + ("softmax",))
    assert check(tab).startswith("Not yet.")
    tab.mouse.move(0, 0)
    assert_readable(tab)


@pytest.mark.site
def test_without_scripts_the_answer_opens(request):
    context = request.getfixturevalue("browser").new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.set_content(HTML.format(page(drawing("pre-norm", title="The block"))))
    answer = tab.get_by_role("img", name="From bottom to top: norm, attention")
    assert not answer.is_visible() and tab.locator("select").count() == 0
    tab.get_by_text("The answer").click()
    assert answer.is_visible()
    context.close()
