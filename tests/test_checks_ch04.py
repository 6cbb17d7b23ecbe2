"""heed.checks.ch04: its references against better answers, and its problems against exact ones."""

import math
from fractions import Fraction

import pytest
import torch

from heed import masks
from heed.attention import attention, softmax, weights
from heed.checks import ch04


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_the_soft_dictionary_is_attention_of_one_query_without_the_root():
    q, k, v = normal(3), normal(7, 3), normal(7, 2)
    want = attention(q[None, None, None], k[None, None], v[None, None], scale=1 / 0.3)[0, 0, 0]
    torch.testing.assert_close(ch04.soft_lookup(q, k, v, 0.3), want)


def test_exact_weights_are_what_floating_softmax_comes_near():
    counts, values = [2, 3, 7], [Fraction(1, 3), Fraction(5), Fraction(-2)]
    got, mix = ch04.exact(counts, values, -2)
    w = softmax(-2 * torch.tensor(counts, dtype=torch.float64).log())
    torch.testing.assert_close(torch.tensor([float(x) for x in got], dtype=torch.float64), w)
    assert sum(got) == 1 and all(isinstance(x, Fraction) for x in [*got, mix])
    assert mix == sum(w * v for w, v in zip(got, values, strict=True))


def test_kernel_regression_is_the_formula_summed_by_hand():
    x, xs, ys = [0.3, -1.0], [0.0, 1.0, -2.0], [1.0, 4.0, 9.0]
    want = []
    for a in x:
        bells = [math.exp(-((a - b) ** 2) / (2 * 0.7**2)) for b in xs]
        want.append(sum(b * y for b, y in zip(bells, ys, strict=True)) / sum(bells))
    got = ch04.kernel_regression(*(torch.tensor(a, dtype=torch.float64) for a in (x, xs, ys)), 0.7)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_the_queries_and_keys_of_04_4_make_attention_that_regression():
    x, xs, ys = normal(3), normal(7), normal(7)
    q, k = ch04.as_attention(x, xs, 0.6)
    got = attention(q[None, None], k[None, None], ys[None, None, :, None])[0, 0, :, 0]
    torch.testing.assert_close(got, ch04.kernel_regression(x, xs, ys, 0.6))


def test_attend_and_both_causal_references_are_heeds_attention():
    q, k, v = normal(2, 3, 5, 7), normal(2, 3, 11, 7), normal(2, 3, 11, 13)
    torch.testing.assert_close(ch04.attend(q, k, v), attention(q, k, v))
    for right in (ch04.causal, ch04.causal_row_by_row):
        torch.testing.assert_close(right(q, k, v), attention(q, k, v, masks.causal))


def test_masked_weights_are_heeds_with_dead_rows_and_finite_gradients():
    q, k = normal(2, 3, 5, 7), normal(2, 3, 11, 7)
    readable = torch.rand(2, 3, 5, 11) < 0.3
    readable[0, 0, 0] = False
    scores = (q @ k.mT * 7**-0.5).requires_grad_()
    got = ch04.masked_weights(scores, readable)
    torch.testing.assert_close(got, weights(q, k, masks.dense(readable)))
    (got**2).sum().backward()
    assert scores.grad.isfinite().all() and not scores.grad[0, 0, 0].any()


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_has_exactly_the_answer_that_attention_comes_near(random_seed):
    p = ch04.problem(random_seed)
    assert sum(p.weights) == 1 and all(isinstance(w, Fraction) for w in p.weights)
    # The answer once more, from the definition: n = exp(q·k / 2) with q = 2 ln(bases).
    total, columns = 0, [Fraction(0), Fraction(0)]
    for key, value in zip(p.keys, p.values, strict=True):
        n = math.prod(base for base, one in zip(p.bases, key, strict=True) if one)
        total += n
        columns = [c + n * x for c, x in zip(columns, value, strict=True)]
    assert p.answer == [c / total for c in columns]
    q, k, v = p.tensors()
    assert q.shape == (1, 1, 1, 4) and len(p.keys) in (3, 4)
    want = torch.tensor([[[[float(x) for x in p.answer]]]], dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v), want)


def test_a_problem_is_worth_doing_small_and_repeatable():
    some = [ch04.problem(s) for s in range(200)]
    assert all(len(set(p.weights)) > 1 and max(p.counts) <= 12 for p in some)
    assert all(len(set(p.keys)) == len(p.keys) for p in some)
    assert len({repr(p).split("\n", 1)[1] for p in some}) == 200
    assert repr(ch04.problem(5)) == repr(ch04.problem(5))


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch04.problem(0)
    assert repr(p).splitlines() == [
        "Problem 0: attention for one query, D = 4",
        "  q  = (2 ln 2, 2 ln 2, 2 ln 5, 2 ln 2)",
        "  k1 = (0, 0, 1, 0)   v1 = (3, 9)",
        "  k2 = (0, 0, 0, 0)   v2 = (9, 1)",
        "  k3 = (0, 0, 0, 1)   v3 = (6, 1)",
        "Give the weights and the output as fractions.",
    ]
    assert p.worked().splitlines() == [
        "1. Score.    q·k1 = 2 ln 5, q·k2 = 0, q·k3 = 2 ln 2",
        "2. Divide by √4 = 2.    ln 5, ln 1, ln 2",
        "3. Softmax.  exp gives 5, 1, 2, together 8.  Weights 5/8, 1/8, 2/8",
        "4. Mix.      (5·3 + 1·9 + 2·6)/8 = 9/2,   (5·9 + 1·1 + 2·1)/8 = 6",
    ]
