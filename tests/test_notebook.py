"""Claims on a page must be able to fail."""

from fractions import Fraction as F

import pytest
import torch

from heed import attention
from heed.notebook import agree, distance, show, witness


def test_a_true_equation_is_witnessed(capsys):
    witness("eq-x", F(1, 3) + F(1, 6), F(1, 2), wrong={"sum of parts": F(2, 9)}, tol=0)
    assert capsys.readouterr().out == "eq-x holds exactly.  sum of parts: off by 0.278\n"


def test_a_false_equation_goes_red():
    with pytest.raises(AssertionError, match="eq-x is RED: off by 0.5"):
        witness("eq-x", 1.0, 1.5, wrong={"other": 3.0})


def test_a_witness_that_cannot_tell_wrong_from_right_is_refused():
    with pytest.raises(AssertionError, match="blind: eq-x also agrees with 'the same'"):
        witness("eq-x", 1.0, 1.0, wrong={"the same": 1.0 + 1e-13})
    with pytest.raises(ValueError, match="at least one wrong"):
        witness("eq-x", 1.0, 1.0, wrong={})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_never_agree_with_a_number(bad):
    with pytest.raises(AssertionError):
        agree({"a": torch.tensor([1.0, bad]), "b": torch.tensor([1.0, 2.0])})
    with pytest.raises(AssertionError):
        witness("eq-x", bad, 1.0, wrong={"zero": 0.0})
    assert distance(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == torch.inf


def test_shapes_are_compared_before_values():
    assert distance(torch.ones(3), torch.ones(3, 1)) == torch.inf
    assert distance([1, 2], [1, 2, 3]) == torch.inf
    assert distance(torch.ones(2), [1, 1]) == 0
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert distance(third, [F(1, 3)]) < 1e-16  # a list is not rounded to float32 on the way


def test_agreement_looks_at_every_pair():
    agree({"a": 1.0, "b": 1.0 + 1e-13})
    with pytest.raises(AssertionError, match="a and c differ by 0.1"):
        agree({"a": 1.0, "b": 1.0, "c": 1.1})
    with pytest.raises(ValueError, match="two versions"):
        agree({"a": 1.0})


def test_show_prints_the_file_that_runs(capsys):
    show(attention.additive)
    out = capsys.readouterr().out
    assert "# heed/attention.py" in out and "torch.tanh(q[:, :, None]" in out
