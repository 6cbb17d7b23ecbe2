"""heed.checks.ch10: its references against heed and torch; its problems exactly."""

from fractions import Fraction

import pytest
import torch

from heed.blocks import PostNorm, PreNorm
from heed.checks import ch10
from heed.layers import MLP, LayerNorm, RMSNorm, SwiGLU, gated_width


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_layer_norm_and_both_references_of_the_test_are_heeds():
    norm, x = LayerNorm(7, eps=0.3).double(), normal(2, 5, 7)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    for right in (ch10.layer_norm, ch10.normed, ch10._theirs):
        got = right(x, norm.weight, norm.bias, 0.3)
        torch.testing.assert_close(got, norm(x), rtol=0, atol=1e-12)


def test_the_backward_pass_is_that_of_finite_differences():
    x, weight, d_y, step = normal(2, 3, 5), normal(5), normal(2, 3, 5), 1e-6
    d_x, d_weight, d_bias = ch10.layer_norm_backward(x, weight, d_y, 0.1)
    moved = x.clone()
    moved[1, 2, 3] += step
    zero = torch.zeros(5, dtype=torch.float64)

    def loss(x, weight, bias):
        return (d_y * ch10.layer_norm(x, weight, bias, 0.1)).sum()

    start = loss(x, weight, zero)
    assert abs((loss(moved, weight, zero) - start) / step - d_x[1, 2, 3]) < 1e-4
    nudge = torch.eye(5, dtype=torch.float64)[3] * step
    assert abs((loss(x, weight + nudge, zero) - start) / step - d_weight[3]) < 1e-4
    assert abs((loss(x, weight, zero + nudge) - start) / step - d_bias[3]) < 1e-4


@pytest.mark.parametrize(("kind", "norm_first"), [(PreNorm, True), (PostNorm, False)])
def test_run_block_is_heeds_block_in_both_orders(kind, norm_first):
    block, x = kind(12, n_heads=3).double(), normal(5, 12)

    def attend(y):
        return block.attn(y[None])[0]

    got = ch10.run_block(x, attend, block.mlp, block.norm1, block.norm2, norm_first)
    torch.testing.assert_close(got, block(x[None])[0], rtol=0, atol=1e-12)


def test_a_folded_norm_and_a_linear_layer_are_what_they_were():
    norm, after, x = LayerNorm(6).double(), torch.nn.Linear(6, 4).double(), normal(3, 6)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    matrix, shift = ch10.fold_norm(norm.weight, norm.bias, after.weight, after.bias)
    plain = LayerNorm(6).double()
    got = torch.nn.functional.linear(plain(x), matrix, shift)
    torch.testing.assert_close(got, after(norm(x)), rtol=0, atol=1e-12)


def test_the_share_apart_and_the_common_share_make_a_right_angle():
    x = normal(7, 5) + 0.5
    common = (x.mean(0).norm() * 7**0.5 / x.norm()).item()
    assert abs(ch10.share_apart(x) ** 2 + common**2 - 1) < 1e-12


def test_matched_widths_are_heeds_and_weigh_at_least_as_much():
    for d_model in range(1, 100):
        for multiple in (1, 8, 256):
            got = ch10.matched_width(d_model, 3, multiple)
            assert got == gated_width(d_model, multiple) and 3 * d_model * got >= 8 * d_model**2
    assert ch10.matched_width(5120, 3, 256) == 13_824
    plain, gated = MLP(96, bias=False), SwiGLU(96, ch10.matched_width(96, 3, 1))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in gated.parameters())


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_answered_exactly_as_heeds_norms_come_near(random_seed):
    p = ch10.problem(random_seed)
    assert p.mean and p.std and p.mean**2 + p.std**2 == p.rms**2
    assert sum(p.x) == 4 * p.mean and sum((x - p.mean) ** 2 for x in p.x) == 4 * p.std**2
    x, d_y = p.tensors()
    for name, norm in (("layer", LayerNorm(4, 1e-15)), ("rms", RMSNorm(4, 1e-15))):
        start = x.clone().requires_grad_()
        got = norm.double()(start)
        got.backward(d_y)
        for value, part in ((got, name), (start.grad, f"d_{name}")):
            assert all(isinstance(n, Fraction) for n in p.answer[part])
            want = torch.tensor([[float(n) for n in p.answer[part]]], dtype=torch.float64)
            torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)


def test_problems_are_repeatable_and_fresh():
    assert repr(ch10.problem(5)) == repr(ch10.problem(5))
    assert len({repr(ch10.problem(s)).split(":", 1)[1] for s in range(200)}) > 195


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch10.problem(3)
    assert "weight 1, eps 0" in repr(p) and "as fractions" in repr(p)
    for part in p.answer.values():
        said = f"({', '.join(map(str, part))})"
        assert said in p.worked() and said not in repr(p)
