"""Recall: answers against a reader that looks them up by hand, bad input by its numbers."""

import pytest
import torch
from torch import nn

from heed.tasks.recall import Ago, Marked

TASKS = [Marked(longest=7), Ago(longest=7, n_symbols=5)]


def generator(random_seed=0):
    return torch.Generator().manual_seed(random_seed)


def looked_up(task, text):
    """The answer and how far back it stood, read off one text in plain Python."""
    *places, question = text
    n = task.n_symbols
    if isinstance(task, Marked):
        assert question == 2 * n
        ((place, symbol),) = [(i, x) for i, x in enumerate(places) if n <= x < 2 * n]
        return symbol - n, len(places) - place
    back = question - n + 1
    return places[-back], back


class Oracle(nn.Module):
    """Answers every question right, by looking it up."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, ids):
        assert not self.training
        logits = torch.zeros(*ids.shape, self.task.vocab_size)
        for b, text in enumerate(ids.tolist()):
            logits[b, -1, looked_up(self.task, text)[0]] = 1
        return logits


@pytest.fixture(params=TASKS, ids=lambda task: type(task).__name__)
def task(request):
    return request.param


@pytest.mark.parametrize("distance", [1, 3, 7])
def test_the_answer_is_what_a_reader_finds_at_the_distance_that_was_asked_for(task, distance):
    ids, targets = task.batch(50, generator(), distance)
    assert ids.shape == targets.shape == (50, task.length)
    assert 0 <= ids.min() and ids.max() < task.vocab_size
    for text, answer in zip(ids.tolist(), targets[:, -1].tolist(), strict=True):
        assert looked_up(task, text) == (answer, distance)


def test_only_the_question_has_a_target(task):
    _, targets = task.batch(20, generator())
    assert (targets[:, :-1] == -100).all()
    assert 0 <= targets[:, -1].min() and targets[:, -1].max() < task.n_symbols


def test_every_text_may_have_a_distance_of_its_own(task):
    back = torch.tensor([7, 1, 4, 2])
    ids, _ = task.batch(4, generator(), back)
    assert [looked_up(task, text)[1] for text in ids.tolist()] == back.tolist()


def test_distances_and_answers_come_evenly(task):
    ids, targets = task.batch(7000, generator())
    back = torch.tensor([looked_up(task, text)[1] for text in ids.tolist()])
    for x, n in ((back - 1, task.longest), (targets[:, -1], task.n_symbols)):
        counts, mean = torch.bincount(x, minlength=n), 7000 / n
        assert len(counts) == n and ((counts - mean) ** 2 / mean).sum() < n - 1 + 6 * (2 * n) ** 0.5


def test_the_answer_does_not_depend_on_where_it_stood(task):
    """Else a model could guess better than one in n_symbols without looking."""
    for distance in (1, 7):
        answers = task.batch(4000, generator(distance), distance)[1][:, -1]
        share = torch.bincount(answers, minlength=task.n_symbols) / 4000
        assert (share - 1 / task.n_symbols).abs().max() < 0.03


def test_the_seed_decides_the_texts(task):
    first, again, other = (task.batch(9, generator(seed))[0] for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_accuracy_is_1_for_an_oracle_and_chance_for_a_constant_and_keeps_the_mode(task):
    oracle = Oracle(task).train()
    assert task.accuracy(oracle, None, n=40, generator=generator()) == 1 and oracle.training
    constant = nn.Embedding(task.vocab_size, task.vocab_size)
    constant.weight.data.zero_()
    constant.weight.data[:, 1] = 1
    share = task.accuracy(constant, 5, n=4000, generator=generator())
    assert abs(share - 1 / task.n_symbols) < 0.03


@pytest.mark.parametrize(
    "distance, said",
    [
        (0, "distances are 1 to 7, got 0 to 0"),
        (8, "distances are 1 to 7, got 8 to 8"),
        (torch.tensor([1, 9]), "distances are 1 to 7, got 1 to 9"),
        (torch.tensor([1, 2, 3]), r"shape \(2,\), got torch.int64 \(3,\)"),
        (1.5, "one integer or int64"),
    ],
)
def test_a_distance_that_no_text_has_is_refused_with_its_number(task, distance, said, unchecked):
    with pytest.raises(ValueError, match=said):
        task.batch(2, generator(), distance)


def test_sizes_that_make_no_text_are_refused():
    with pytest.raises(ValueError, match="longest 0 and n_symbols 8"):
        Marked(longest=0)
    with pytest.raises(ValueError, match="longest 3 and n_symbols 1"):
        Ago(longest=3, n_symbols=1)
    with pytest.raises(ValueError, match="at least one text, got 0"):
        Ago(longest=3).batch(0, generator())
