"""heed.checks.ch05: its references against autograd and simulation, its problems against both."""

from fractions import Fraction

import pytest
import torch

from heed.attention import attention
from heed.checks import ch05


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_the_spread_of_squared_scores_is_what_a_large_sample_shows():
    scores = (normal(1_000_000, 3) * normal(1_000_000, 3)).sum(-1)
    assert abs((scores**2).std().item() / ch05._spread(3) - 1) < 0.03


def test_the_error_bar_of_the_reference_covers_the_truth_as_often_as_it_should():
    draws = [ch05.monte_carlo(5, 2003, torch.Generator().manual_seed(s)) for s in range(400)]
    z = torch.tensor([(got - 5) / error for got, error in draws])
    assert abs(z.std().item() - 1) < 0.2 and 0.6 < (z.abs() < 1).float().mean() < 0.76


@pytest.mark.parametrize("numbers", [(0, 1, 0, 1, 1), (1, 2, -1, 0.5, 0.3), (2, 1, 1, 3, -0.8)])
def test_the_moments_are_those_of_a_simulation(numbers):
    mean_q, std_q, mean_k, std_k, rho = numbers
    a, b = normal(2, 400_000, 5)
    q = mean_q + std_q * a
    k = mean_k + std_k * (rho * a + (1 - rho**2) ** 0.5 * b)
    scores = (q * k).sum(-1)
    mean, variance = ch05.score_moments(5, *numbers)
    assert abs(scores.mean().item() - mean) < 6 * (variance / 400_000) ** 0.5
    assert abs(scores.var().item() / variance - 1) < 0.03


def test_the_jacobian_and_its_product_are_those_of_autograd():
    scores, d = normal(7), normal(7)
    want = torch.autograd.functional.jacobian(lambda s: s.softmax(-1), scores)
    torch.testing.assert_close(ch05.softmax_jacobian(scores.softmax(-1)), want)
    torch.testing.assert_close(ch05.softmax_backward(scores.softmax(-1), d), want.T @ d)


def test_the_backward_pass_is_that_of_finite_differences():
    q, k, v, d_out = normal(1, 2, 3, 5), normal(1, 2, 7, 5), normal(1, 2, 7, 2), normal(1, 2, 3, 2)
    for x, got in zip((q, k, v), ch05.attention_backward(q, k, v, d_out), strict=True):
        step = torch.zeros_like(x)
        step[0, 1, 2, 1] = 1e-5
        x += step
        up = (attention(q, k, v) * d_out).sum()
        x -= 2 * step
        down = (attention(q, k, v) * d_out).sum()
        x += step
        assert abs((up - down).item() / 2e-5 - got[0, 1, 2, 1].item()) < 1e-7


def test_the_stable_softmax_is_torchs_and_0_where_torch_has_no_number():
    scores = 1000 * normal(2, 3, 7)
    scores[0, 0, 1:4] = -torch.inf
    scores[1, 1] = -torch.inf
    want = scores.softmax(-1)
    assert want[1, 1].isnan().all()
    torch.testing.assert_close(ch05.stable_softmax(scores), want.nan_to_num(0))


def test_what_a_product_keeps_is_found_and_the_jacobian_is_too_much():
    w, d = normal(31).softmax(-1).requires_grad_(), normal(31).requires_grad_()
    assert ch05._largest_kept(ch05.softmax_backward(w, d)) == 31
    assert ch05._largest_kept(ch05.softmax_jacobian(w) @ d) == 31 * 31


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_goes_back_exactly_as_autograd_comes_near(random_seed):
    p = ch05.problem(random_seed)
    w, mean = p.forward.weights, Fraction(0)
    for weight, value in zip(w, p.forward.values, strict=True):
        mean += weight * sum(d * x for d, x in zip(p.d_out, value, strict=True))
    assert p.d_scores == [a * (d - mean) for a, d in zip(w, p.d_weights, strict=True)]
    assert sum(p.d_scores) == 0 and any(p.d_scores)
    assert all(sum(row) == 0 for row in p.jacobian)
    q, k, v, d_out = p.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    d_q, _, d_v = torch.autograd.grad((attention(q, k, v) * d_out).sum(), leaves)
    for name, got in (("d_q", d_q[0, 0, 0]), ("d_v", d_v[0, 0])):
        exact = p.answer[name]
        rows = exact if isinstance(exact[0], list) else [exact]
        assert all(isinstance(x, Fraction) for row in rows for x in row)
        want = torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(got, want.view(got.shape), atol=1e-12, rtol=1e-9)


def test_problems_are_repeatable_and_fresh():
    assert repr(ch05.problem(5)) == repr(ch05.problem(5))
    assert len({repr(ch05.problem(s)).split("\n", 1)[1] for s in range(200)}) == 200


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch05.problem(3)
    assert "the gradient of the output is d_out = (1, 2)" in repr(p)
    assert "Give d_v, the gradient of the scaled scores, and d_q" in repr(p)
    for x in p.d_scores + p.d_q:
        assert str(x) in p.worked()
