"""How nbval compares outputs (the root conftest.py): lenient with rounding, and nothing else."""

import pytest
from nbval.plugin import IPyNbCell

Text = IPyNbCell.sanitize.__globals__["Text"]


@pytest.mark.parametrize(
    "stored, run",
    [
        ("loss 1.2344", "loss 1.2345"),
        ("tensor([0.5000, 1e-06])", "tensor([0.5000, 0.0])"),
        ("a  b\n", "a b"),
        ("-inf and nan", "-inf and nan"),
    ],
)
def test_rounding_and_spacing_are_forgiven(stored, run):
    assert Text(stored) == run and not Text(stored) != run


@pytest.mark.parametrize(
    "stored, run",
    [
        ("100 tokens", "101 tokens"),
        ("loss 1.24", "loss 1.25"),
        ("holds", "fails"),
        ("[1.0, 2.0]", "[1.0, 2.0, 3.0]"),
        ("1", "1.0"),
        ("inf", "1.0"),
        ("nan", "inf"),
        ("0.5", "-0.5"),
    ],
)
def test_everything_else_is_a_difference(stored, run):
    assert Text(stored) != run and not Text(stored) == run
