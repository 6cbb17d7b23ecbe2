"""heed.checks.ch03: its references against loops, autograd and the model, its problems exactly."""

from fractions import Fraction

import pytest
import torch

from heed.checks import ch03
from heed.models.seq2seq import Seq2Seq, Seq2SeqConfig


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_the_additive_scores_are_those_of_a_loop_over_pairs():
    q, h, W, U, w = normal(2, 5), normal(3, 5), normal(7, 5), normal(7, 5), normal(7)
    got = ch03.additive_scores(q, h, W, U, w)
    for i in range(2):
        for j in range(3):
            assert abs(got[i, j] - w @ torch.tanh(W @ q[i] + U @ h[j])) < 1e-12


def test_a_padded_batch_reads_what_each_sentence_reads_alone():
    z, h, lengths = normal(3, 2, 5), normal(3, 5, 7), torch.tensor([1, 5, 3])
    got = ch03.read(z, h, lengths)
    for b, n in enumerate(lengths.tolist()):
        shares = torch.softmax(z[b, :, :n], -1)
        torch.testing.assert_close(got[b], shares @ h[b, :n], atol=1e-12, rtol=0)


def test_the_gradient_of_a_score_is_that_of_finite_differences():
    z, h, g = normal(5), normal(5, 3), normal(3)
    got, step = ch03.score_gradient(z, h, g), 1e-5
    for j in range(5):
        e = step * torch.eye(5, dtype=torch.float64)[j]
        up, down = ((z + s * e).softmax(0) @ h @ g for s in (1, -1))
        assert abs((up - down).item() / (2 * step) - got[j].item()) < 1e-9


def test_queries_and_keys_lose_no_more_than_the_singular_values_left_out():
    M = normal(6, 6)
    for rank in (1, 3, 6):
        Q, K = ch03.queries_and_keys(M, rank)
        left_out = torch.linalg.svdvals(M)[rank:].square().sum().sqrt()
        torch.testing.assert_close(torch.linalg.matrix_norm(M - Q.T @ K), left_out)


def test_look_then_step_is_the_additive_decoder_of_heed():
    torch.manual_seed(0)
    sizes = {"n_source": 9, "n_target": 8, "d_embed": 5, "d_model": 6}
    model = Seq2Seq(Seq2SeqConfig(**sizes, attention="additive")).double()
    source, target_in = torch.tensor([[3, 8, 5, 4]]), torch.tensor([[1, 7, 3]])
    with torch.no_grad():
        memory = model.encode(source)
        weights, _ = ch03.look_then_step(
            model.target(target_in[0]),
            memory.states[0],
            model.start(memory)[0],
            lambda s, h: torch.tanh(model.query(s) + model.key(h)) @ model.score,
            lambda x, s: model.decoder(x[None, None], s[None, None])[0][0, 0],
        )
        torch.testing.assert_close(weights, model.align(source, target_in)[0])


def test_a_map_of_equal_weights_scores_what_it_calls_chance():
    right = torch.rand(7, 11) < 0.3
    right[2] = False
    mass, _, chance = ch03.map_score(torch.full((7, 11), 1 / 11, dtype=torch.float64), right)
    assert abs(mass - chance) < 1e-12


@pytest.mark.parametrize("d", [-2, -1, 0, 1, 2])
def test_a_map_that_was_moved_is_found_where_it_was_moved_to(d):
    right = torch.eye(5, 9, dtype=torch.bool).roll(2, 1)
    assert ch03.best_shift(right.double().roll(d, 1), right, 3) == d


def test_the_watch_sees_the_largest_tensor_that_is_made_and_no_view():
    seen: list[int] = []
    x = normal(3, 4)
    with ch03._Watch(seen):
        x.T.expand(9, 4, 3)
        assert max(seen) == 12
        x[:, None] + x[None]
    assert max(seen) == 36


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_exactly_what_autograd_comes_near(random_seed):
    p = ch03.problem(random_seed)
    assert sum(p.weights) == 1 and sum(p.probabilities) == 1 and sum(p.d_scores) == 0
    assert all(isinstance(x, Fraction) for x in p.d_scores) and all(p.d_scores)
    scores, states = p.tensors()
    scores.requires_grad_()
    context = scores.softmax(0) @ states
    logits = torch.tensor(2.0, dtype=torch.float64).log() * context
    loss = -logits.log_softmax(0)[p.right]
    loss.backward()
    for name, got in (
        ("context", context),
        ("probabilities", logits.softmax(0)),
        ("d_scores", scores.grad / torch.tensor(2.0, dtype=torch.float64).log()),
    ):
        want = torch.tensor([float(x) for x in p.answer[name]], dtype=torch.float64)
        torch.testing.assert_close(got.detach(), want, atol=1e-12, rtol=1e-9)


def test_problems_are_repeatable_and_fresh():
    assert repr(ch03.problem(5)) == repr(ch03.problem(5))
    assert len({repr(ch03.problem(s)).split("\n", 1)[1] for s in range(200)}) == 200


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch03.problem(5)
    assert "word 1: score ln 4, state (4, 8)" in repr(p) and "-4/63" not in repr(p)
    for x in p.weights + p.probabilities + p.d_scores:
        assert str(x) in p.worked()
