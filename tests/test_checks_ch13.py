"""heed.checks.ch13: the wrong answers are caught, and the right ones agree with better ones."""

import time

import pytest
import torch
from torch.nn import functional

from heed import counting, generation, gpt, training
from heed.checks import ch13, check, edited

BUGS = ch13.LEAK_TEST.bugs


def task_id(x):
    return getattr(x, "id", None) or getattr(x, "name", None)


@pytest.mark.parametrize("task", ch13.TASKS, ids=task_id)
def test_a_check_takes_less_than_a_second(task):
    check(task.id, task.reference)
    start = time.perf_counter()
    check(task.id, task.reference)
    assert time.perf_counter() - start < 1


def test_the_inputs_and_targets_are_those_of_the_sorting_task():
    ids, targets = gpt.sorting(5, torch.Generator().manual_seed(0))
    texts = torch.cat([ids, targets[:, -1:]], dim=1)
    inputs, mine = ch13.next_word(texts, 9)
    assert inputs.equal(ids) and mine.equal(targets)


def little(**settings):
    return gpt.GPTConfig(vocab_size=11, max_len=7, n_layers=1, n_heads=3, d_model=21, **settings)


def test_block_and_attention_together_are_a_block_of_heed():
    torch.manual_seed(0)
    model = gpt.GPT(little()).double().eval()
    part, x = model.blocks[0], torch.randn(2, 5, 21, dtype=torch.float64)

    def attend(x):
        return ch13.self_attention(x, part.attn.qkv.weight.T, part.attn.out.weight.T, 3)

    gains = part.norm1.weight, part.norm2.weight
    got = ch13.block(x, attend, *gains, part.mlp.up.weight.T, part.mlp.down.weight.T)
    torch.testing.assert_close(got, part(x), rtol=0, atol=1e-12)  # fresh biases are 0


def test_the_loss_is_that_of_heed_and_of_torch():
    logits, targets = torch.randn(2, 5, 7).double(), torch.randint(7, (2, 5))
    targets[0, :3] = -100
    got = ch13.loss(logits, targets)
    torch.testing.assert_close(got, training.cross_entropy(logits, targets))
    torch.testing.assert_close(got, functional.cross_entropy(logits.mT, targets))


def test_the_floor_of_a_chain_is_that_of_all_its_texts_one_by_one():
    p, first = ch13._chain(torch.Generator().manual_seed(0), 3)
    texts = torch.cartesian_prod(*[torch.arange(3)] * 5)
    steps = p[texts[:, :-1], texts[:, 1:]]
    chance = first[texts[:, 0]] * steps.prod(dim=1)
    want = -(chance[:, None] * steps.log()).sum(dim=0)
    torch.testing.assert_close(ch13.chain_floor(p, first, 4), want)


@pytest.mark.parametrize("layers, width", [(1, 21), (3, 6)])
def test_parameters_are_those_that_torch_counts(layers, width):
    config = gpt.GPTConfig(vocab_size=11, max_len=7, n_layers=layers, n_heads=3, d_model=width)
    model = gpt.GPT(config)
    got = ch13.parameters(11, 7, layers, width, 4 * width, True, True)
    assert got == sum(p.numel() for p in model.parameters()) == counting.parameters(config)
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    assert ch13.parameters(11, 7, layers, width, 4 * width, True, False) == got - biases
    assert ch13.parameters(11, 7, layers, width, 4 * width, False, True) == got + 11 * width


def test_the_chances_are_the_softmax_of_heeds_filter():
    logits = torch.randn(2, 3, 7).double()
    for temperature, k in [(0.7, 3), (2.0, 1), (1.0, 7)]:
        want = generation.filter_logits(logits, temperature=temperature, top_k=k).softmax(-1)
        torch.testing.assert_close(ch13.next_probabilities(logits, temperature, k), want)


@pytest.mark.parametrize("build", [ch13.little_gpt, ch13.without_positions])
@pytest.mark.parametrize("std", [0.02, 1.0, 1000.0])
def test_no_score_of_a_right_model_moves_with_a_later_word(build, std):
    model, ids = build(std), torch.randint(13, (2, 7))
    changed = ids.clone()
    changed[:, 4:] = torch.randint(13, (2, 3))
    a, b = model(ids), model(changed)
    limit = 1e-10 * a.abs().max().item()
    torch.testing.assert_close(a[:, :4], b[:, :4], rtol=0, atol=limit)
    assert (a[:, 4:] - b[:, 4:]).abs().max() > limit and a.isfinite().all()


def test_the_last_digits_of_the_second_model_do_move():
    model, ids = ch13.without_positions(1.0), torch.randint(13, (2, 7))
    changed = ids.clone()
    changed[:, 4:] = torch.randint(13, (2, 3))
    assert not model(ids)[:, :4].equal(model(changed)[:, :4])


@pytest.mark.parametrize("bug", BUGS, ids=task_id)
def test_every_bug_leaks_at_any_scale_but_for_the_low_number(bug):
    ids = torch.randint(13, (2, 11), generator=torch.Generator().manual_seed(0))
    for std in (0.02, 1.0, 1000.0):
        model = edited(ch13.little_gpt, bug.edits)(std)
        whole, alone = model(ids), torch.cat([model(text[None]) for text in ids])
        moved = [(whole[:, :t] - model(ids[:, :t])).abs().max() for t in range(1, 11)]
        leaks = max(*moved, (whole - alone).abs().max()) > 1e-6
        assert leaks == (std == 1000 or bug.name != "hidden words score -10,000")


def test_the_chapters_model_passes_the_test_for_leaks():
    def build(std):
        torch.manual_seed(0)
        config = gpt.GPTConfig(vocab_size=13, max_len=17, n_layers=2, n_heads=2, d_model=6)
        model = gpt.GPT(config).double().requires_grad_(False)
        for weight in model.parameters():
            weight.mul_(std / 0.02)
        return model

    ch13.leak_test(build)


def test_a_count_that_is_off_by_one_is_shown_with_both_numbers():
    def off(*numbers):
        return ch13.parameters(*numbers) + 1

    said = repr(check("13.6", off))
    assert "V = 11, S = 7, L = 0, C = 5, F = 13, tied, no biases" in said
    assert "expected  95\n  got       96\n" in said


def test_the_tasks_are_numbered_and_the_last_is_to_write_the_test():
    assert [task.id for task in ch13.TASKS] == [f"13.{n}" for n in range(1, 9)]
    assert [bool(task.bugs) for task in ch13.TASKS] == [False] * 7 + [True]
