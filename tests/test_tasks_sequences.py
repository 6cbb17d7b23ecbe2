"""Answers against Python's own lists and integers, batches against their definition."""

import itertools
import math

import pytest
import torch

from heed.tasks import sequences
from heed.tasks.sequences import add, copy, reverse, sort

MAKERS = {"copy": copy, "reverse": reverse, "sort": sort, "add": add}


def generator(random_seed=0):
    return torch.Generator().manual_seed(random_seed)


def solved(name, prompt):
    """The answer as text, from the prompt as text."""
    if name == "add":
        a, b = prompt.rstrip(":").split("+")
        return str(int(a) + int(b)).zfill(len(a) + 1)[::-1]
    digits = prompt.rstrip(":")
    return {"copy": digits, "reverse": digits[::-1], "sort": "".join(sorted(digits))}[name]


def every_prompt(name, length):
    digits = ["".join(d) for d in itertools.product("0123456789", repeat=length)]
    return (
        [f"{a}+{b}:" for a in digits for b in digits]
        if name == "add"
        else [f"{a}:" for a in digits]
    )


@pytest.fixture(params=MAKERS)
def name(request):
    return request.param


def test_every_small_prompt_has_the_answer_that_python_gives(name):
    length = 2 if name == "add" else 3
    task = MAKERS[name](length)
    prompts = every_prompt(name, length)
    ids = torch.stack([task.encode(prompt) for prompt in prompts])
    got = [task.decode(row) for row in task.answer(ids)]
    assert got == [solved(name, prompt) for prompt in prompts]


@pytest.mark.parametrize("length", [1, 5, 23])
def test_long_prompts_too(name, length):
    """23 digits do not fit an int64: nothing here may go through one number."""
    task = MAKERS[name](length)
    ids = task.prompt(30, generator())
    assert [task.decode(row) for row in task.answer(ids)] == [
        solved(name, task.decode(row)) for row in ids
    ]


def test_a_sum_is_written_from_its_least_digit_so_that_a_carry_comes_before_it_is_needed():
    task = add(3)
    assert task.decode(task.answer(task.encode("999+001:")[None])[0]) == "0001"
    assert task.decode(task.answer(task.encode("123+045:")[None])[0]) == "8610"


@pytest.mark.parametrize("length", [1, 4, 7])
def test_a_batch_is_a_text_and_its_next_tokens_with_the_prompt_left_out(name, length):
    task = MAKERS[name](length)
    ids, targets = task.batch(11, generator(3))
    prompt = task.prompt(11, generator(3))
    whole = torch.cat([prompt, task.answer(prompt)], dim=1)
    P = task.prompt_len
    assert ids.shape == targets.shape == (11, P + task.answer_len - 1)
    assert ids.dtype == targets.dtype == torch.int64
    assert torch.equal(ids, whole[:, :-1])
    assert (targets[:, : P - 1] == -100).all()
    assert torch.equal(targets[:, P - 1 :], whole[:, P:])
    assert [task.decode(row)[-1] for row in ids[:, :P]] == [":"] * 11


def test_a_batch_is_repeated_by_its_seed(name):
    task = MAKERS[name](6)
    for one, two in zip(task.batch(5, generator(1)), task.batch(5, generator(1)), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(task.batch(5, generator(1))[0], task.batch(5, generator(2))[0])


def test_digits_are_even_and_independent(name):
    """Chi-square of each digit and of each pair of neighbours, fixed seed."""
    task, n = MAKERS[name](2), 20_000
    prompt = task.prompt(n, generator(4))
    columns = [c for c in prompt.unbind(1) if (c < 10).all()]
    assert len(columns) == task.form.count("#")
    for a, b in itertools.pairwise(columns):
        seen = torch.bincount(10 * a + b, minlength=100).double()
        chi = ((seen - n / 100) ** 2 / (n / 100)).sum().item()
        assert chi < 99 + 6 * math.sqrt(2 * 99)


def test_a_perfect_model_has_the_stated_loss(name):
    """Even guesses for the digits of the prompt, certainty in the answer."""
    task = MAKERS[name](2)
    prompts = every_prompt(name, 2)
    assert task.prompt_nats == pytest.approx(math.log(len(prompts)), abs=1e-12)
    ids, targets = task.batch(40, generator())
    logits = torch.full((*ids.shape, len(task.vocab)), -torch.inf, dtype=torch.float64)
    answer = targets != -100
    logits[answer] = logits[answer].scatter(1, targets[answer][:, None], 0.0)
    logits[~answer] = 0.0  # whatever: not counted
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == task.floor == 0


def test_exact_wants_every_digit(name):
    task = MAKERS[name](3)
    prompt = task.prompt(9, generator())
    ids = torch.cat([prompt, task.answer(prompt)], dim=1)
    assert task.exact(ids).all() and task.exact(ids).shape == (9,)
    for j in range(task.answer_len):
        wrong = ids.clone()
        wrong[4, task.prompt_len + j] = (wrong[4, task.prompt_len + j] + 1) % 10
        assert task.exact(wrong).tolist() == [row != 4 for row in range(9)]
    wrong = ids.clone()
    wrong[2, -1] = 10  # a colon is no digit, and no error either: a model may write it
    assert task.exact(wrong).tolist() == [row != 2 for row in range(9)]


def test_the_vocabulary_holds_what_the_task_needs(name):
    task = MAKERS[name](3)
    assert task.vocab == "0123456789:" + "+" * (name == "add")
    text = "120+934:" if name == "add" else "120:"
    assert task.decode(task.encode(text)) == text
    assert task.encode("7").dtype == torch.int64


@pytest.mark.parametrize("length", [0, -3])
def test_no_length_is_refused(name, length):
    with pytest.raises(ValueError, match=f"length.*{length}"):
        MAKERS[name](length)


@pytest.mark.parametrize("n", [0, -3])
def test_no_texts_are_refused(name, n):
    task = MAKERS[name](3)
    for draw in (task.prompt, task.batch):
        with pytest.raises(ValueError, match=f"n .*{n}"):
            draw(n, generator())


def test_unknown_symbols_are_named():
    with pytest.raises(ValueError, match=r"\['\+', 'x'\]"):
        sort(2).encode("1x+")


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (torch.zeros(2, 5), "float32"),
        (torch.zeros(2, 5, dtype=torch.int32), "int32"),
        (torch.zeros(5, dtype=torch.int64), r"\(5,\)"),
        (torch.zeros(2, 7, dtype=torch.int64), r"\(2, 7\)"),
        (torch.tensor([[1, 2, 3, 10, 11]]), "1 to 11"),
        (torch.tensor([[1, 2, -3, 10, 9]]), "-3 to 10"),
    ],
)
def test_ids_that_are_no_ids_are_refused(unchecked, ids, named):
    for question in (sort(4).answer, sequences.copy(2).exact):
        with pytest.raises(ValueError, match=named):
            question(ids)


def test_decode_takes_one_text(unchecked):
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        sort(2).decode(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="-100"):
        sort(2).decode(torch.tensor([1, -100]))


@pytest.mark.parametrize(
    ("task", "ids", "named"),
    [
        (sort(2), [[1, 2, 10], [1, 2, 3]], "'##:', got '123'"),
        (sort(2), [[1, 10, 10]], "'##:', got '1::'"),
        (add(1), [[1, 10, 2, 10]], r"'#\+#:', got '1:2:'"),
        (add(1), [[11, 11, 2, 10]], r"'#\+#:', got '\+\+2:'"),
    ],
)
def test_a_prompt_of_another_form_is_refused(task, ids, named):
    with pytest.raises(ValueError, match=named):
        task.answer(torch.tensor(ids))
