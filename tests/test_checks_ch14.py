"""heed.checks.ch14: its references against torch and enumeration, its problems against torch."""

import math
from fractions import Fraction

import pytest
import torch

from heed import training
from heed.checks import ch14
from heed.generation import filter_logits


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_reference_optimiser_is_torchs(decay):
    theta, g = normal(5), normal(9, 5)
    how = dict(lr=0.02, betas=(0.9, 0.98), weight_decay=decay)
    got = ch14.adamw(theta, g, 0.02, (0.9, 0.98), decay)
    torch.testing.assert_close(got, ch14.torch_adamw(theta, g, **how), atol=1e-12, rtol=0)


def test_the_two_right_optimisers_of_the_last_task_agree():
    start, steps = [normal(3), normal(2, 2)], [[normal(3), normal(2, 2)] for _ in range(6)]
    ours, theirs = (
        f([w.clone() for w in start], steps, 0.1, 0.2) for f in (ch14.optimize, ch14.by_torch)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("steps", "warmup"), [(50, 10), (7, 0), (9, 3)])
def test_the_rate_is_that_of_the_training_loop(steps, warmup):
    for step in range(steps):
        want = training.schedule(step, steps=steps, warmup=warmup)
        assert ch14.learning_rate(step, steps, warmup, 0.1) == pytest.approx(want, abs=1e-15)


def test_the_clipped_gradients_are_torchs_and_keep_their_direction():
    gradients = [normal(3, 4), normal(5)]
    own = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(own, gradients, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(own, 0.7)
    got = torch.cat([g.flatten() for g in ch14.clip(gradients, 0.7)])
    want = torch.cat([p.grad.flatten() for p in own])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    before = torch.cat([g.flatten() for g in gradients])
    assert torch.cosine_similarity(got, before, dim=0) > 1 - 1e-12
    assert abs(got.norm() - 0.7) < 1e-12


def test_pieces_of_any_length_add_up_to_the_batch_and_empty_ones_do_no_harm():
    words, counts = normal(13, 4), torch.tensor([5, 0, 8])
    means = torch.stack([piece.mean(0) for piece in words.split(counts.tolist())])
    assert means[1].isnan().all()
    torch.testing.assert_close(ch14.accumulate(means, counts), words.mean(0))


def test_dropout_keeps_the_mean_and_has_the_variance_of_the_chapter():
    x = torch.full((200_000,), 3.0, dtype=torch.float64)
    out = ch14.dropout(x, 0.2, True, torch.Generator().manual_seed(0))
    assert abs(out.mean() - 3) < 0.02 and abs(out.var() - 9 / 4) < 0.03
    assert ch14.dropout(x, 0.2, False, torch.Generator()) is x


def test_many_rounds_lead_to_the_nearest_orthogonal_matrix():
    G = normal(4, 6)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(ch14.orthogonal(G, 40), U @ Vh, atol=1e-9, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_the_nucleus_is_that_of_generation(share):
    p = normal(17).softmax(0)
    want = filter_logits(p.log(), top_p=share).softmax(0)
    torch.testing.assert_close(ch14.nucleus(p, share), want)


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_the_answer_to_a_problem_is_where_torch_arrives(random_seed):
    p = ch14.problem(random_seed)
    a, b = p.gradients
    assert 3 * p.root**2 == a * a + 2 * b * b
    assert all(isinstance(x, Fraction) for x in p.answer)
    how = dict(lr=float(p.lr), betas=(0.5, 0.5), eps=0, weight_decay=p.decay)
    one = torch.ones(1, dtype=torch.float64)
    for n in (1, 2):
        gradients = torch.tensor([[a], [b]], dtype=torch.float64)[:n]
        got = ch14.torch_adamw(one, gradients, **how)
        assert math.isclose(got.item(), p.answer[n - 1], abs_tol=1e-12)


def test_problems_are_repeatable_and_fresh_and_keep_their_answer_to_themselves():
    assert repr(ch14.problem(5)) == repr(ch14.problem(5))
    assert len({repr(ch14.problem(s)) for s in range(200)}) > 100
    p = ch14.problem(3)
    assert str(p.answer[1]) not in repr(p) and p.worked().endswith(f"= {p.answer[1]}")
    assert f"= {p.answer[0]}" in p.worked()
