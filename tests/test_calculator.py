"""The calculator: known counts, PyTorch's own count of random sizes, and fields that say no."""

import re
from fractions import Fraction

import pytest
import torch
from test_interactive import HTML, assert_readable, browser  # noqa: F401
from torch import nn

from heed import counting
from heed.calculator import DEVICES, PRESETS, _config, calculator
from heed.roofline import A100, H100, H200, Cost

# Parameters, active, bytes of cache a token (16 bits): models built on PyTorch's meta device.
KNOWN = {
    "GPT-2 124M": (124_439_808, 124_439_808, 36_864),
    "GPT-2 XL": (1_557_611_200, 1_557_611_200, 307_200),
    "Llama 2 7B": (6_738_415_616, 6_738_415_616, 524_288),
    "Llama 2 70B": (68_976_648_192, 68_976_648_192, 327_680),
    "Llama 3 8B": (8_030_261_248, 8_030_261_248, 131_072),
    "Llama 3 70B": (70_553_706_496, 70_553_706_496, 327_680),
    "Mistral 7B": (7_241_732_096, 7_241_732_096, 131_072),
    "Mixtral 8x7B": (46_702_792_704, 12_879_925_248, 131_072),
}
# FLOPs of one forward pass at a length, as PyTorch's counter measures them.
FORWARD = {
    "GPT-2 124M": (1_024, 291_648_307_200),
    "GPT-2 XL": (1_024, 3_506_703_564_800),
    "Llama 2 7B": (4_096, 62_921_270_886_400),
    "Llama 3 8B": (8_192, 158_140_695_838_720),
    "Mistral 7B": (8_192, 151_681_065_025_536),
}


def page(output):
    return output._repr_mimebundle_()["text/html"]


def test_without_scripts_a_table_of_known_models_stands_there():
    still = page(calculator())
    still = still[: still.index("<script>")]
    assert set(KNOWN) == set(PRESETS)
    for name, numbers in KNOWN.items():
        row = still[still.index(f'<th scope="row">{name}</th>') :].split("</tr>")[0]
        assert [f"<td>{n:,}</td>" in row for n in numbers] == [True] * 3, name
        if name in FORWARD:
            assert row.endswith("<td>{:,}</td><td>{:,}</td>".format(*FORWARD[name]))
    assert "−13.23 %" in still  # Llama 3 8B against 12LC² + VC


def test_it_is_the_same_on_every_run_and_bears_its_title():
    a, b = (calculator(title="Costs") for _ in range(2))
    assert page(a) == page(b) and "<figcaption>Costs</figcaption>" in page(a)
    assert a._repr_mimebundle_()["text/plain"] == "<calculator: Costs>"


# In a browser


@pytest.fixture(scope="module", params=[("light", 900), ("dark", 390)], ids=["light", "phone"])
def window(request):
    scheme, width = request.param
    context = request.getfixturevalue("browser").new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    yield context.new_page()
    context.close()


@pytest.fixture
def tab(window):
    """A fresh calculator; nothing may go wrong in its page."""
    faults = []
    heard = {
        "pageerror": lambda error: faults.append(str(error)),
        "console": lambda said: faults.append(said.text) if said.type == "error" else None,
    }
    for event, hear in heard.items():
        window.on(event, hear)
    window.set_content(HTML.format(page(calculator())))
    # axe takes a page without a colour for a white one, in the dark too.
    window.add_style_tag(content="body{background:Canvas;color:CanvasText}")
    yield window
    for event, hear in heard.items():
        window.remove_listener(event, hear)
    assert faults == []


ONE = pytest.mark.parametrize("window", [("light", 900)], indirect=True, ids=["light"])


LABELS = {
    "layers": "layers, L",
    "width": "width, C",
    "heads": "query heads, H",
    "kv_heads": "key-value heads, G",
    "head": "head width, D",
    "ff": "feed-forward width, F",
    "vocab": "vocabulary, V",
    "experts": "experts, E",
    "active": "active experts, A",
    "positions": "learned positions, S",
    "window": "window (0: none)",
    "gated": "gated (SwiGLU)",
    "biases": "biases, LayerNorm",
    "tied": "head tied to the embedding",
    "length": "text length, T",
    "batch": "texts at once, B",
    "tokens": "tokens to train on",
    "devices": "devices",
    "use": "utilisation, %",
}


def field(tab, name):
    return tab.get_by_label(LABELS[name], exact=True)


def write(tab, s):
    """Type the sizes s into the fields."""
    for name, value in s.items():
        if name in ("gated", "biases", "tied"):
            field(tab, name).set_checked(bool(value))
        elif name == "bytes":
            tab.get_by_label("bytes a number").select_option(index={4: 0, 2: 1, 1: 2}[value])
        else:
            field(tab, name).fill(str(value))


def write_at_once(tab, s):
    """The same, faster: every field changed by a script."""
    texts = {LABELS.get(k, "bytes a number"): v for k, v in s.items()}
    tab.evaluate(
        """texts => document.querySelectorAll(".ca label").forEach(label => {
            if (!(label.textContent in texts)) return;
            const value = texts[label.textContent], input = label.control;
            if (input.type === "checkbox") input.checked = !!value;
            else if (input.tagName === "SELECT") input.selectedIndex = { 4: 0, 2: 1, 1: 2 }[value];
            else input.value = value;
            input.dispatchEvent(new Event("input"));
        })""",
        texts,
    )


def shown(tab):
    """The numbers on the page as integers, the days as a float, and the formulas."""
    got = tab.evaluate(
        "[...document.querySelectorAll('dd')].map(d =>"
        " [d.firstChild.dataset.key, d.firstChild.textContent, d.lastChild.textContent])"
    )
    rounded = {"days", "ratio", "least", "rate"}
    numbers = {k: (float if k in rounded else int)(text.replace(",", "")) for k, text, _ in got}
    return numbers, {k: formula for k, _, formula in got}


def choose(tab, machine):
    (label,) = (f"{m.name}, {gb} GB" for m, gb in DEVICES.items() if m is machine)
    tab.get_by_label("device", exact=True).select_option(label)


def torchs(s):
    """The same numbers from PyTorch's modules, which hold no memory on the meta device."""
    C, F, D, b = s["width"], s["ff"], s["head"], bool(s["biases"])
    with torch.device("meta"):
        norm = nn.LayerNorm(C) if b else nn.RMSNorm(C)
        attention = [nn.Linear(C, n * D, b) for n in (s["heads"], s["kv_heads"], s["kv_heads"])]
        attention.append(nn.Linear(s["heads"] * D, C, b))
        expert = [nn.Linear(C, F, b) for _ in range(1 + s["gated"])] + [nn.Linear(F, C, b)]
        router = [nn.Linear(C, s["experts"], False)] if s["experts"] > 1 else []
        ends = [nn.Embedding(s["vocab"], C), norm] + [nn.Embedding(s["positions"], C)]
        head = nn.Linear(C, s["vocab"], False)

    def size(modules):
        return sum(p.numel() for m in modules for p in m.parameters())

    def matrices(modules):
        return sum(m.weight.numel() for m in modules)

    L, T, E, A = s["layers"], s["length"], s["experts"], s["active"]
    layer = [*attention, *expert * E, *router, norm, norm]
    N = L * size(layer) + size(ends) + (0 if s["tied"] else size([head]))
    active = N - L * (E - A) * size(expert)
    used = L * matrices([*attention, *expert * A, *router]) + matrices([head])
    scores = L * s["heads"] * 2 * (2 * T * T * D)  # q k and weights v, of one text
    forward = s["batch"] * (2 * T * used + scores)
    kept = min(T, s["window"]) if s["window"] else T
    cache = L * 2 * s["kv_heads"] * D * s["bytes"]
    token = 3 * forward // (s["batch"] * T)
    tables = s["positions"] * C + (0 if s["tied"] else s["vocab"] * C)
    unread = tables + L * (E - min(E, A * s["batch"])) * size(expert)
    return {
        "parameters": N,
        "rule": 12 * L * C * C + s["vocab"] * C,
        "active": active,
        "forward": forward,
        "token": token,
        "six": 6 * active,
        "weights": N * s["bytes"],
        "cache_token": cache,
        "cache": cache * kept * s["batch"],
        "trained_weights": 2 * N,
        "gradients": 2 * N,
        "adam": 12 * N,
        "training": 16 * N,
        "all": token * s["tokens"],
        "step": s["batch"] * (2 * used + L * s["heads"] * 2 * (2 * kept * D)),
        "moved": (N - unread) * s["bytes"] + cache * kept * s["batch"],
    }


def heeds(tab, s, machine):
    """The same by the script, with all digits."""
    text = {k: str(v) for k, v in s.items()}
    device = [machine.name, DEVICES[machine], machine.flops / 1e12, machine.bandwidth / 1e12]
    got = tab.evaluate(
        """([text, device]) => {
            const s = Object.fromEntries(Object.entries(text).map(([k, v]) => [k, BigInt(v)]));
            const n = heedCalculator.count(s), one = heedCalculator.serve(s, n, device);
            return [String(one.fit), String(one.even), one.ratio, 1000 * one.least, one.rate];
        }""",
        [text, device],
    )
    return dict(
        zip(("fit", "even", "ratio", "least", "rate"), [*map(int, got[:2]), *got[2:]], strict=True)
    )


def serves(n, s, machine):
    """What one machine serves, from the numbers n that `torchs` counts of the sizes s."""
    room, even = 10**9 * DEVICES[machine] - n["weights"], Fraction(n["weights"], n["cache_token"])
    cost = Cost(n["step"], n["moved"])
    least = machine.seconds(cost)
    return {
        "fit": max(0, room // (n["cache"] // s["batch"])),
        "even": int(even / s["batch"] + Fraction(1, 2)),  # to the nearest
        "ratio": cost.intensity,
        "least": 1000 * least,
        "rate": s["batch"] / least,
    }


def value(formula, s):
    """What a formula in letters comes to: "2BT(LC + VC)" with the sizes s."""
    names = dict(zip("LCHGDFVEASTB", LABELS_OF_LETTERS, strict=True))
    spaced = re.sub(r"(?<=[\dA-Z²)])(?=[A-Z(])", "*", formula.replace("·", "*").replace(" × ", "*"))
    python = spaced.replace("²", "**2").replace("−", "-")
    letters = {letter: s[name] for letter, name in names.items()} | {"W": s["window"]}
    return eval(python, {"__builtins__": {}}, letters | {"N": s.get("N")})


LABELS_OF_LETTERS = (
    "layers width heads kv_heads head ff vocab experts active positions length batch".split()
)
TEXT = {"batch": 1, "bytes": 2, "tokens": 10**10}


@pytest.mark.site
@ONE
def test_every_known_model_has_its_known_numbers(tab):
    for name, (N, active, cache) in KNOWN.items():
        tab.get_by_label("model", exact=True).select_option(name)
        got, _ = shown(tab)
        model, T = _config(PRESETS[name]), PRESETS[name]["length"]
        assert (got["parameters"], got["active"], got["cache_token"]) == (N, active, cache)
        assert got["rule"] == counting.rule(model) and got["forward"] == counting.flops(model, T)
        assert got["cache"] == counting.kv_cache_bytes(model, T)
        if name in FORWARD:
            assert field(tab, "length").input_value() == f"{T:,}"
            assert (T, got["forward"]) == FORWARD[name]
        want = torchs(PRESETS[name] | TEXT)
        assert want == {k: got[k] for k in want}, name
        want = serves(want, PRESETS[name] | TEXT, A100)
        assert want == pytest.approx({k: got[k] for k in want}, rel=0.006), name
    assert tab.get_by_text(
        "1,073,741,824 bytes = 1 GiB"
    ).is_visible()  # Mixtral keeps all 8,192 tokens; Mistral, 4,096 of them:
    tab.get_by_label("model", exact=True).select_option("Mistral 7B")
    assert shown(tab)[0]["cache"] == 512 * 2**20


def random_sizes():
    """Any sizes that a model may have, some of them far beyond 2⁵³ in their products."""

    def pick(low, high):
        return int(torch.randint(low, high + 1, ()))

    kv, head, E = pick(1, 12), 2 * pick(1, 100), pick(1, 9)
    heads = kv * pick(1, 8)
    return {
        "layers": pick(1, 130),
        "width": pick(1, 20_000),
        "heads": heads,
        "kv_heads": kv,
        "head": head,
        "ff": pick(1, 60_000),
        "vocab": pick(1, 300_000),
        "experts": E,
        "active": pick(1, E),
        "positions": pick(0, 1) * 200_000,
        "window": pick(0, 1) * pick(1, 9_000),
        "gated": pick(0, 1),
        "biases": pick(0, 1),
        "tied": pick(0, 1),
        "length": pick(1, 150_000),
        "batch": pick(1, 5_000),
        "bytes": 2 ** pick(0, 2),
        "tokens": pick(1, 10**15),
    }


@pytest.mark.site
@ONE
def test_twenty_typed_models_cost_what_pytorch_counts_and_what_the_formulas_say(tab):
    beyond = 0
    for _ in range(20):
        s = random_sizes()
        write_at_once(tab, s)
        (got, formulas), want = shown(tab), torchs(s)
        assert {k: got[k] for k in want} == want, s
        assert value(formulas["parameters"], s) == want["parameters"], s
        for machine in DEVICES:
            again, serving = heeds(tab, s, machine), serves(want, s, machine)
            assert again == pytest.approx(serving, rel=1e-12), (s, machine)
        assert [again[k] for k in ("fit", "even")] == [serving[k] for k in ("fit", "even")]
        assert value(formulas["rule"].split(",")[0], s) == want["rule"]
        assert value(formulas["forward"].split(";")[0], s) == want["forward"], s
        if s["experts"] > s["active"]:
            assert value(formulas["active"], s | {"N": want["parameters"]}) == want["active"]
        per_number = value(formulas["cache_token"].split(" ×")[0], s)
        assert per_number * s["bytes"] == want["cache_token"]
        assert value(formulas["step"].replace("window", "W").split(":")[0], s) == want["step"], s
        read = value(formulas["moved"].split(" ×")[0], s | {"N": want["parameters"]})
        assert read * s["bytes"] + want["cache"] == want["moved"], s
        beyond += want["forward"] > 2**53
    assert beyond > 10


@pytest.mark.site
@ONE
def test_days_follow_from_devices_their_speed_and_how_busy_they_are(tab):
    write(tab, {"devices": 16, "use": 38.5, "tokens": "2e12"})
    per_token = torchs(PRESETS["GPT-2 124M"] | TEXT)["token"]
    for machine, tflops in ((A100, 312), (H200, 989), (H100, 989)):
        choose(tab, machine)
        want = per_token * 2e12 / (16 * tflops * 1e12 * 0.385) / 86_400
        assert shown(tab)[0]["days"] == pytest.approx(want, rel=0.006)
    assert shown(tab)[1]["days"].startswith("FLOPs ÷ (16 × 989 × 10¹²")
    exact = tab.evaluate("heedCalculator.days(10n ** 24n, 1000n, 312, 40)")
    assert exact == pytest.approx(10**24 / (1000 * 312e12 * 0.4 * 86_400), rel=1e-14)


@pytest.mark.site
@ONE
def test_a_cache_weighs_as_much_as_llama_at_known_lengths(tab):
    tab.get_by_label("model", exact=True).select_option("Llama 3 8B")
    for batch, length in ((1, 122_532), (16, 7_658), (64, 1_915)):
        write(tab, {"batch": batch, "length": length})
        got, _ = shown(tab)
        assert got["even"] == length
        assert got["cache"] == pytest.approx(got["weights"], rel=0.001)


@pytest.mark.site
@ONE
def test_a_decode_step_is_bound_by_the_memory_until_many_short_texts_pass_the_ridge(tab):
    tab.get_by_label("model", exact=True).select_option("Llama 3 8B")
    choose(tab, H100)
    got, formulas = shown(tab)
    read = 2 * (8_030_261_248 - 128_256 * 4096) + 2**30  # half of the tables is not read
    assert got["moved"] == read and got["least"] == pytest.approx(read / 3.35e9, rel=0.006)
    assert got["rate"] == pytest.approx(3.35e12 / read, rel=0.006) and got["ratio"] < 2
    assert got["fit"] == (80 * 10**9 - 16_060_522_496) // 2**30 == 59
    assert formulas["least"] == "bytes ÷ 3.35 × 10¹² a second"
    assert formulas["ratio"].startswith("FLOPs ÷ bytes; below the ridge, 295, ")
    write(tab, {"batch": 4096, "length": 16})
    got, formulas = shown(tab)
    assert got["ratio"] > 295 and formulas["least"] == "FLOPs ÷ 989 × 10¹² a second"
    assert got["least"] == pytest.approx(got["step"] / 989e9, rel=0.006)


@pytest.mark.site
@ONE
def test_a_mixture_reads_as_many_experts_as_its_texts_can_visit(tab):
    tab.get_by_label("model", exact=True).select_option("Mixtral 8x7B")
    tables, cache, expert = 32_000 * 4096, 2**30, 32 * 3 * 4096 * 14_336
    for batch, visited in ((1, 2), (3, 6), (4, 8), (5, 8)):
        write(tab, {"batch": batch})
        got, formulas = shown(tab)
        idle = (8 - visited) * expert
        assert got["moved"] == 2 * (46_702_792_704 - idle - tables) + batch * cache
        said = {1: "are read", 3: "no two texts visit one expert"}.get(
            batch, "all experts are visited"
        )
        assert formulas["moved"].endswith(said)
    choose(tab, A100)
    got, formulas = shown(tab)
    assert got["fit"] == 0 and formulas["fit"] == "the weights alone need more than 80 GB"
    tab.get_by_label("model", exact=True).select_option("Mistral 7B")
    write(tab, {"batch": 1})
    assert shown(tab)[1]["even"].endswith("; the window ends before")
    write(tab, {"batch": 64})
    assert shown(tab)[1]["even"] == "weights ÷ (B × the cache a token)"


@pytest.mark.site
@ONE
def test_memory_that_does_not_fit_is_said(tab):
    tab.get_by_label("model", exact=True).select_option("Llama 2 70B")
    _, formulas = shown(tab)
    assert formulas["training"].endswith("needs 14 devices of 80 GB, more than you have")
    assert formulas["cache"].endswith("needs 2 devices of 80 GB")
    write(tab, {"devices": 14})
    assert shown(tab)[1]["training"].endswith("needs 14 devices of 80 GB")
    choose(tab, H200)
    assert shown(tab)[1]["training"].endswith("needs 8 devices of 141 GB")


@pytest.mark.site
@ONE
@pytest.mark.parametrize("text", ["4096", "4,096", "4 096", "4_096", "4.096e3", " 4096 ", "4096e0"])
def test_a_number_is_read_however_it_is_grouped(tab, text):
    write(tab, {"positions": 0, "length": text})
    want = torchs(PRESETS["GPT-2 124M"] | TEXT | {"length": 4096, "positions": 1})["forward"]
    assert shown(tab)[0]["forward"] == want


@pytest.mark.site
@ONE
@pytest.mark.parametrize(
    ("change", "at", "words"),
    [
        ({"layers": ""}, "layers", "Write a number."),
        ({"layers": "-12"}, "layers", "It cannot be negative."),
        ({"layers": "−12"}, "layers", "It cannot be negative."),
        ({"layers": "0"}, "layers", "At least 1."),
        ({"layers": "twelve"}, "layers", "Write a whole number, such as"),
        ({"layers": "1.5"}, "layers", "Write a whole number, such as"),
        ({"layers": "1.55e1"}, "layers", "Write a whole number, such as"),
        ({"layers": "1,2345"}, "layers", "Write a whole number, such as"),
        ({"tokens": "1e19"}, "tokens", "At most 1e18."),
        ({"tokens": "9e99"}, "tokens", "At most 1e18."),
        ({"width": "770"}, "head", "Width 770 does not divide by 12 heads."),
        ({"heads": "7", "kv_heads": "7"}, "head", "Width 768 does not divide by 7 heads."),
        ({"kv_heads": "5"}, "kv_heads", "12 query heads cannot share 5 equally."),
        ({"kv_heads": "24"}, "kv_heads", "12 query heads cannot share 24 equally."),
        ({"active": "2"}, "active", "There is only 1 expert."),
        ({"experts": "4", "active": "5"}, "active", "There are only 4 experts."),
        ({"length": "1025"}, "length", "The model learned only 1,024 positions."),
        ({"use": "0"}, "use", "More than 0 and at most 100."),
        ({"use": "101"}, "use", "More than 0 and at most 100."),
        ({"use": ""}, "use", "More than 0 and at most 100."),
        ({"use": "-40"}, "use", "More than 0 and at most 100."),
    ],
)
def test_a_bad_size_is_said_beside_its_field_and_no_number_is_shown(tab, change, at, words):
    write(tab, change)
    said = field(tab, at)
    assert said.get_attribute("aria-invalid") == "true"
    beside = tab.locator(f"[id='{said.get_attribute('aria-describedby')}']")
    assert beside.inner_text().startswith(words) and beside.is_visible()
    assert tab.locator("dd").count() == 0
    assert f"“{LABELS[at]}”" in tab.get_by_role("status").inner_text()
    tab.get_by_label("model", exact=True).select_option("Llama 2 7B")
    write(tab, {"tokens": "1e9", "use": "40"})
    assert shown(tab)[0]["parameters"] == 6_738_415_616
    assert tab.locator("[aria-invalid=true]").count() == 0


@pytest.mark.site
@ONE
def test_a_head_of_a_width_of_its_own_needs_no_even_split(tab):
    write(tab, {"width": 770, "head": 64})
    want = torchs(PRESETS["GPT-2 124M"] | TEXT | {"width": 770})["parameters"]
    assert shown(tab)[0]["parameters"] == want


@pytest.mark.site
@ONE
def test_a_changed_size_is_no_longer_the_known_model(tab):
    model = tab.get_by_label("model", exact=True)
    model.select_option("Llama 3 8B")
    write(tab, {"length": 4096})
    assert model.evaluate("e => e.selectedOptions[0].text") == "Llama 3 8B"
    write(tab, {"layers": 16})
    assert model.evaluate("e => e.selectedOptions[0].text") == "your own"
    tab.wait_for_timeout(700)
    said = tab.get_by_role("status").inner_text()
    assert said.startswith("4.54 billion parameters, 64 KiB of cache a token, ")


@pytest.mark.site
def test_the_page_is_accessible_and_nothing_is_small_or_cut_off(tab):
    tab.get_by_label("model", exact=True).select_option("Mixtral 8x7B")
    for change in ({"batch": 10**6}, {"devices": "-1"}):
        write(tab, change)
        cut = tab.evaluate(
            """() => [...document.querySelectorAll("input[type=text], dd, dt, label")]
                .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML)"""
        )
        assert cut == []
        assert_readable(tab)


@pytest.mark.site
def test_without_scripts_the_table_can_be_scrolled_with_the_keyboard(request):
    context = request.getfixturevalue("browser").new_context(
        java_script_enabled=False, viewport={"width": 390, "height": 800}
    )
    tab = context.new_page()
    tab.set_content(HTML.format(page(calculator())))
    assert tab.get_by_role("cell", name="46,702,792,704").is_visible()
    assert tab.locator("input").count() == 0
    tab.keyboard.press("Tab")
    assert tab.get_by_role("region", name="Known models").is_visible()
    context.close()
