"""The walk without a browser; tests/test_site.py presses its keys on the built page."""

import pytest

from heed.stepper import stepper

STEPS = [("Score", "Compare: $q \\cdot k$."), ("Sum", "Average `v`.")]


def page(output):
    return output._repr_mimebundle_()["text/html"]


def test_without_scripts_the_whole_list_is_there():
    out = page(stepper(STEPS, title="Two steps"))
    still = out[: out.index("<script>")]
    assert "<ol><li><strong>Score.</strong> Compare: <math" in still
    assert "<li><strong>Sum.</strong> Average <code>v</code>.</li></ol>" in still


def test_a_walk_is_the_same_on_every_run():
    a, b = (stepper(STEPS, title="Two steps") for _ in range(2))
    assert page(a) == page(b)
    assert a._repr_mimebundle_()["text/plain"] == "<stepper: Two steps>"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (STEPS[:1], "at least two steps, got 1"),
        ([("", "text"), STEPS[0]], "name and a text"),
        ([("Score", " "), STEPS[1]], "name and a text"),
        ([STEPS[0], STEPS[0]], "one name"),
    ],
)
def test_a_walk_that_goes_nowhere_is_refused(steps, words, unchecked):
    with pytest.raises(ValueError, match=words):
        stepper(steps, title="x")
