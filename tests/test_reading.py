"""The map without a browser; tests/test_site.py points at it on the built page."""

import pytest
import torch

from heed.reading import reading

WEIGHTS = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 0.0]])
WORDS = {"rows": ["sieben", "und", "<end>"], "columns": ["twenty", "seven"]}


def page(output):
    return output._repr_mimebundle_()["text/html"]


def test_without_scripts_the_weights_are_a_table_of_numbers():
    right = torch.tensor([[False, True], [False, False], [False, False]])
    out = page(reading({"trained": WEIGHTS}, **WORDS, right=right, title="German"))
    still = out[: out.index("<script>")]
    assert '<th scope="col">twenty</th><th scope="col">seven</th>' in still
    assert (
        '<tr><th scope="row">sieben</th><td>0.25</td><td class="right">0.75</td></tr>'
        '<tr><th scope="row">und</th><td>1.00</td><td>0.00</td></tr>'
        '<tr><th scope="row">&lt;end&gt;</th><td>0.00</td><td>0.00</td></tr>'
    ) in still


def test_every_map_has_its_name():
    out = page(reading({"head 1": WEIGHTS, "head $h$": WEIGHTS}, **WORDS, title="Heads"))
    assert out.count("<caption>") == 2 and "<caption>head <math" in out


def test_a_map_is_the_same_on_every_run():
    a, b = (reading({"trained": WEIGHTS}, **WORDS, title="German") for _ in range(2))
    assert page(a) == page(b)
    assert a._repr_mimebundle_()["text/plain"] == "<reading: German>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"maps": {}}, "got none"),
        ({"maps": {"a": WEIGHTS.T}}, r"'a' must be \(3, 2\), got \(2, 3\)"),
        ({"maps": {"a": WEIGHTS * 2}}, "sum to 1 or less"),
        ({"maps": {"a": -WEIGHTS}}, "must hold weights"),
        ({"maps": {"a": WEIGHTS * float("nan")}}, "must hold weights"),
        ({"rows": ["a", "b", " "]}, "every row and column is a word, got ' '"),
        ({"columns": ["a"] * 41}, r"1 to 40 rows and columns, got \(3, 41\)"),
        ({"rows": []}, r"got \(0, 2\)"),
        ({"right": torch.ones(2, 2, dtype=torch.bool)}, r"right must be \(3, 2\), got \(2, 2\)"),
    ],
)
def test_a_map_that_cannot_be_drawn_is_refused(change, words, unchecked):
    with pytest.raises(ValueError, match=words):
        reading(**({"maps": {"a": WEIGHTS}, **WORDS, "title": "x"} | change))
