"""heed.checks.ch01: its references against loops and autograd, its problems against both."""

from fractions import Fraction

import pytest
import torch

from heed.checks import ch01, check, edited


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def states(a, x):
    """The recurrence, word by word."""
    h, out = torch.zeros_like(x[0]), []
    for factor, word in zip(a, x, strict=True):
        h = factor * h + word
        out.append(h)
    return torch.stack(out)


def test_the_shares_are_the_gradient_of_a_loop():
    for n in (1, 2, 9):
        a, x = normal(n), normal(n).requires_grad_()
        (want,) = torch.autograd.grad(states(a, x)[-1], x)
        torch.testing.assert_close(ch01.shares(a), want)


@pytest.mark.parametrize("k, dilations", [(1, [3]), (3, [1, 1, 1]), (2, [1, 2, 4]), (4, [5, 1])])
def test_the_field_is_as_far_as_a_jacobian_reaches(k, dilations):
    x = normal(1, 60, 1)

    def stack(x):
        for d in dilations:
            x = ch01.causal_convolution(x, torch.ones(k, 1, 1, dtype=torch.float64), d)
        return x[0, -1, 0]

    reached = torch.autograd.functional.jacobian(stack, x)[0, :, 0].nonzero()
    assert ch01.field(k, dilations) == 60 - reached.min().item()


def test_the_layers_needed_are_the_fewest_whose_field_is_long_enough():
    for n in range(1, 130):
        for k, growth in ((2, 1), (3, 2), (3, 3), (4, 2)):
            L = ch01.layers_needed(n, k, growth)
            dilations = [growth**i for i in range(L)]
            assert ch01.field(k, dilations) >= n
            assert L == 0 or ch01.field(k, dilations[:-1]) < n


def test_the_jacobian_of_the_states_is_that_of_finite_differences():
    W, U, b, x = normal(4, 4) / 2, normal(4, 3), normal(4), normal(6, 3)

    def onward(h):
        for word in x[1:]:
            h = torch.tanh(W @ h + U @ word + b)
        return h

    h, J = torch.tanh(U @ x[0] + b), ch01.state_jacobian(W, U, b, x)
    for i, step in enumerate(1e-6 * torch.eye(4, dtype=torch.float64)):
        slope = (onward(h + step) - onward(h - step)) / 2e-6
        torch.testing.assert_close(J[:, i], slope, atol=1e-8, rtol=0)


@pytest.mark.parametrize("k, d, T", [(1, 1, 5), (3, 1, 7), (3, 2, 12), (2, 5, 4), (4, 3, 13)])
def test_three_causal_convolutions_and_the_definition_agree(k, d, T):
    x, W = normal(2, T, 3), normal(k, 5, 3)
    want = torch.zeros(2, T, 5, dtype=torch.float64)
    for t in range(T):
        for i in range(k):
            if t - i * d >= 0:
                want[:, t] += x[:, t - i * d] @ W[i].T
    for convolve in (ch01.causal_convolution, ch01.dilated, ch01.place_by_place, ch01._by_torch):
        torch.testing.assert_close(convolve(x, W, d), want)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 21])
def test_the_scan_is_the_loop_and_keeps_zeros(n):
    a, x = normal(n, 3), normal(n, 3)
    a[n // 2] = 0
    torch.testing.assert_close(ch01.scan(a, x), states(a, x))
    torch.testing.assert_close(ch01._one_by_one(a, x), states(a, x))


def test_products_in_a_row_are_counted_and_not_products_side_by_side():
    a, x = normal(64, 1).requires_grad_(), normal(64, 1)
    assert ch01._products_in_a_row(ch01._one_by_one(a, x)) == 63
    assert ch01._products_in_a_row(ch01.scan(a, x)) == 6
    assert ch01._products_in_a_row(a * a + a * a) == 1


def by_blelloch(a, x):
    """A scan by halves: pairs are joined, scanned, and opened again."""
    if len(x) == 1:
        return x
    if len(x) % 2:
        head = by_blelloch(a[:-1], x[:-1])
        return torch.cat([head, a[-1:] * head[-1:] + x[-1:]])
    odd = by_blelloch(a[1::2] * a[::2], a[1::2] * x[::2] + x[1::2])
    before = torch.cat([torch.zeros_like(odd[:1]), odd[:-1]])
    return torch.stack([a[::2] * before + x[::2], odd], 1).flatten(0, 1)


def test_another_scan_in_few_rounds_passes_too():
    assert check("01.6", by_blelloch).ok


def test_each_bug_gives_the_right_shape_and_wrong_numbers():
    """A bug that changed the length would be found by anybody."""
    x, W = normal(2, 12, 3), normal(4, 5, 3)
    for bug in ch01.CONVOLUTION_TEST.bugs:
        broken = ch01.CONVOLUTION_TEST.right
        got = edited(broken, bug.edits)(x, W, 3)
        assert got.shape == (2, 12, 5), bug.name
        assert not torch.allclose(got, broken(x, W, 3)), bug.name


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_what_a_loop_in_floats_and_autograd_say(random_seed):
    p = ch01.problem(random_seed)
    a, x = float(p.a), torch.tensor(p.words, dtype=torch.float64, requires_grad=True)
    h = states(torch.full_like(x, a), x)
    torch.testing.assert_close(h.tolist(), [float(s) for s in p.states])
    (gradient,) = torch.autograd.grad(h[-1], x)
    torch.testing.assert_close(gradient.tolist(), [float(s) for s in p.shares])
    n = p.distance
    assert abs(p.a) ** n < Fraction(1, 100) or abs(p.a) ** n > 100
    assert Fraction(1, 100) <= abs(p.a) ** (n - 1) <= 100
    assert p.words[0] and abs(p.a) != 1


def test_problems_are_repeatable_and_fresh():
    assert repr(ch01.problem(5)) == repr(ch01.problem(5))
    assert len({repr(ch01.problem(s)).split("\n", 1)[1] for s in range(100)}) > 95


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch01.problem(3)
    assert str(p.states[-1]) == "127/81" and "127/81" not in repr(p)
    assert "h_5 = (-1/3)·(116/27) + 3 = 127/81" in p.worked()
    assert "a^4 = 1/81" in p.worked() and "so 5 steps" in p.worked()
