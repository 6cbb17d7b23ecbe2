"""heed.checks.ch11: its references against the package and torch, its problems too."""

import math
from fractions import Fraction

import pytest
import torch

from heed.checks import ch11
from heed.generation import beam
from heed.tasks.pairs import numbers
from heed.training import inverse_root


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_shifted_targets_are_those_of_the_tasks():
    task = numbers("french")
    texts = task.sample(9, torch.Generator().manual_seed(0))
    _, target_in, target_out = task.tensors(texts)
    ids = [[x for x in row if x > 2] for row in target_out.tolist()]
    got = ch11.shift(ids)
    assert torch.equal(got[0], target_in) and torch.equal(got[1], target_out)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
def test_the_smoothed_loss_is_that_of_torch(eps):
    logits, targets = normal(7, 5), torch.tensor([3, -100, 0, 4, -100, 1, 1])
    want = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=eps)
    torch.testing.assert_close(ch11.smoothed_loss(logits, targets, eps), want)


@pytest.mark.parametrize("V, eps", [(2, 0.5), (5, 0.1), (34, 0.3)])
def test_no_logits_go_below_the_floor_and_the_best_ones_reach_it(V, eps):
    gap, least, plain = ch11.best_under_smoothing(V, eps)
    best = torch.zeros(1, V, dtype=torch.float64)
    best[0, 1] = gap
    right = torch.tensor([1])
    assert abs(ch11.smoothed_loss(best, right, eps).item() - least) < 1e-12
    assert abs(ch11.smoothed_loss(best, right, 0.0).item() - plain) < 1e-12
    for _ in range(50):
        near = best + 0.3 * normal(1, V)
        assert ch11.smoothed_loss(near, right, eps).item() >= least


def test_the_rate_is_the_one_of_heed():
    for step in range(0, 500, 7):
        got, want = ch11.rate(step, 48, 100), inverse_root(step, d_model=48, warmup=100)
        assert abs(got - want) < 1e-15


def test_steps_of_a_beam_make_the_search_of_heed():
    """A language of two words and an end whose chances depend on the last word."""
    logp = normal(3, 3).log_softmax(1)  # rows: after the start or word 0, after 1, after 2
    texts, sums, aside = [[0]], torch.zeros(1, dtype=torch.float64), []
    for _ in range(4):
        filled = 3 - len(texts)
        rows = torch.cat([logp[[t[-1] for t in texts]], logp.new_full((filled, 3), -math.inf)])
        padded = torch.cat([sums, sums.new_full((filled,), -math.inf)])
        alive, ended = ch11.beam_step(padded, rows, 0)
        aside += [(s, [*texts[i], 0]) for i, s in ended if s > -math.inf]
        alive = [x for x in alive if x[2] > -math.inf]
        texts = [[*texts[i], word] for i, word, _ in alive]
        sums = torch.tensor([s for *_, s in alive], dtype=torch.float64)
    aside += list(zip(sums.tolist(), texts, strict=True))
    want = sorted(aside, key=lambda pair: -pair[0])[:3]
    ids, scores = beam(lambda x, _: logp[x[:, -1]], torch.tensor([[0]]), 4, width=3, eos=0)
    assert scores[0].tolist() == pytest.approx([s for s, _ in want], abs=1e-12)
    assert [row[: len(t)] for row, (_, t) in zip(ids[0].tolist(), want, strict=True)] == [
        t for _, t in want
    ]


def test_the_score_of_a_text_is_the_one_that_the_search_reports():
    logp = normal(4, 3)
    ids, scores = beam(
        lambda x, _: logp[x.shape[1] - 1].expand(len(x), 3),
        torch.tensor([[1]]),
        4,
        width=2,
        eos=0,
        alpha=0.6,
    )
    for row, want in zip(ids[0, :, 1:], scores[0], strict=True):
        if 0 in row:
            assert abs(ch11.score_text(logp, row, 0, 0.6) - want.item()) < 1e-12


def test_the_two_decoders_agree():
    y, memory = normal(5, 8), normal(6, 8)
    got, want = ch11.decoder(y, memory, 4), ch11.word_by_word(y, memory, 4)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


# A hundred problems


@pytest.mark.parametrize("random_seed", range(100))
def test_a_problem_has_an_answer_that_greedy_misses_and_a_beam_of_two_finds(random_seed):
    p = ch11.problem(random_seed)
    assert sum(p.texts.values()) == 1 and all(isinstance(x, Fraction) for x in p.texts.values())
    (greedy, low), (wide, high) = p.answer["greedy"], p.answer["width 2"]
    assert low < high == max(p.texts.values()) and p.texts[greedy] == low

    def score(ids, rows):
        said = ["".join(".ab"[i] for i in row[1:]) for row in ids.tolist()]
        rows = [p.tenths[("", "a", "b").index(x)] if len(x) < 2 else (0, 0, 10) for x in said]
        return torch.tensor([(r[2], r[0], r[1]) for r in rows], dtype=torch.float64).log()

    for width, text in ((1, greedy), (2, wide)):
        ids, scores = beam(score, torch.tensor([[9]]), 3, width=width, eos=0)
        found = "".join(".ab"[i] for i in ids[0, 0, 1:]).split(".")[0] + "."
        assert found == text
        assert abs(math.exp(scores[0, 0].item()) - p.chance(text)) < 1e-12


def test_problems_are_repeatable_and_fresh():
    assert repr(ch11.problem(5)) == repr(ch11.problem(5))
    assert len({repr(ch11.problem(s)).split("\n", 1)[1] for s in range(100)}) > 60


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch11.problem(5)
    text, chance = p.answer["width 2"]
    assert text not in repr(p) and text in p.worked() and str(chance) in p.worked()
