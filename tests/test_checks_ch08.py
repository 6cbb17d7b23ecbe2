"""heed.checks.ch08: its references against heed and transformers, its problems exactly."""

from fractions import Fraction

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from heed import positions
from heed.checks import ch08, edited


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_the_reference_sinusoids_are_those_of_heed():
    for n, width in ((1, 2), (13, 6), (300, 64)):
        want = positions.sinusoids(n, width, dtype=torch.float64)
        torch.testing.assert_close(ch08.sinusoids(n, width), want, atol=1e-10, rtol=0)


def test_shifts_compose_and_are_rotations():
    for k, m in ((1, 2), (5, -3), (100, 1000)):
        both = ch08.shift(k, 10) @ ch08.shift(m, 10)
        torch.testing.assert_close(both, ch08.shift(k + m, 10))
    one = ch08.shift(7, 10)
    torch.testing.assert_close(one @ one.T, torch.eye(10, dtype=torch.float64))


@pytest.mark.parametrize(("n", "limit"), [(32, 128), (8, 100), (14, 61)])
def test_the_reference_buckets_are_those_of_t5(n, limit):
    back = torch.arange(-50, 3000)
    want = T5Attention._relative_position_bucket(-back, False, n, limit)
    assert torch.equal(ch08.bucket(back, n, limit), want)


@pytest.mark.parametrize("n_heads", [1, 3, 8, 12, 14, 40])
def test_the_reference_bias_has_blooms_slopes_from_the_query_backwards(n_heads):
    bias = ch08.alibi(n_heads, 1, 7)[:, 0]
    slopes = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)[:, 0, 1].double()
    torch.testing.assert_close(bias, -slopes[:, None] * torch.arange(6, -1, -1), rtol=1e-6, atol=0)


def test_the_reference_rotation_is_that_of_heed_and_so_are_its_two_twins():
    x, at = normal(2, 3, 5, 14), torch.tensor([0, 3, 1, 900, 41])
    want = positions.rotate(x, at)
    torch.testing.assert_close(ch08.rotate(x, at), want)
    torch.testing.assert_close(ch08.rotary(x, at), want)
    turned = [ch08.rotary_again(y, at) for y in (x, x.flip(0))]
    again = [positions.rotate(y, at, interleaved=True) for y in (x, x.flip(0))]
    torch.testing.assert_close(turned, again)


def test_the_reference_halved_is_that_of_heed():
    weight = normal(30, 7)
    assert torch.equal(ch08.halved(weight, 3), positions.halved(weight, 3))


def test_places_are_those_that_transformers_makes_from_a_mask():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    theirs = (real.long().cumsum(-1) - 1).masked_fill(~real, 0)
    assert torch.equal(ch08.places(real), theirs)
    assert ch08.places(real).tolist()[0] == [0, 0, 0, 1, 2]


def test_each_published_bug_keeps_the_shape_and_moves_a_score():
    x, at = normal(1, 3, 5, 14), torch.arange(1000, 1005)
    right = ch08.rotary(x, at)
    for bug in ch08.BUGS:
        wrong = edited(ch08.rotary, bug.edits)(x, at)
        assert wrong.shape == right.shape and wrong.dtype == right.dtype
        assert (wrong @ wrong.mT - right @ right.mT).abs().max() > 0.1 or "ignored" in bug.name


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_the_score_of_a_problem_is_exact_and_depends_on_the_distance_only(random_seed):
    p = ch08.problem(random_seed)
    q, near = p.q, p.turned(p.k, p.n - p.m)
    assert p.answer == q[0] * near[0] + q[1] * near[1]
    assert isinstance(p.answer, Fraction)
    a, b, c = p.triangle
    angle = torch.atan2(torch.tensor(float(b)), torch.tensor(float(a))).double()
    z = complex(*p.q) * complex(*p.k).conjugate()
    z *= torch.polar(torch.tensor(1.0).double(), angle * (p.m - p.n)).item()
    assert abs(z.real - float(p.answer)) < 1e-5
    assert sum(x * x for x in p.turned(p.q, p.m)) == sum(x * x for x in p.q)


def test_problems_are_repeatable_and_fresh():
    assert repr(ch08.problem(5)) == repr(ch08.problem(5))
    assert len({repr(ch08.problem(s)).split("\n", 1)[1] for s in range(200)}) > 195


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it_twice():
    p = ch08.problem(8)
    assert str(p.answer) not in repr(p)
    assert p.worked().count(f"= {p.answer}") == 2
