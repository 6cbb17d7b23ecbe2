"""heed.checks.ch06: its references against tables, attention and leaks, its problems too."""

from fractions import Fraction

import pytest
import torch

from heed import masks
from heed.attention import attention, softmax
from heed.checks import ch06, leaks
from heed.checks.leaks import by_change

RNG = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("width", [1, 2, 5, 9, 12])
def test_the_count_is_that_of_the_table(T, S, width):
    table = masks.table(masks.window(width), 1, 1, T, S)
    assert ch06.count_pairs(T, S, width) == table.sum()


def test_packed_documents_are_read_as_if_each_were_alone():
    documents = torch.tensor([[3, 3, 3, 0, 0, 0, 0], [1, 2, 2, 2, 2, 2, 5]])
    q, k, v = torch.randn(3, 2, 2, 7, 5, dtype=torch.float64)
    got = attention(q, k, v, ch06.packed(documents))
    for b, row in enumerate(documents):
        for document in row.unique():
            part = [x[b : b + 1, :, row == document] for x in (q, k, v)]
            want = attention(*part, masks.causal)[0]
            torch.testing.assert_close(got[b, :, row == document], want)


def test_positions_follow_the_tokens_wherever_the_pads_are():
    real = torch.rand(50, 9, generator=RNG) < 0.7
    got = ch06.padded_positions(real)
    for row, positions in zip(real, got, strict=True):
        assert positions[row].tolist() == list(range(row.sum()))
        assert (positions[~row] == 0).all()


@pytest.mark.parametrize("random_seed", range(20))
def test_a_layer_follows_a_shuffle_if_the_mask_keeps_it(random_seed):
    rng = torch.Generator().manual_seed(random_seed)
    x = torch.randn(1, 1, 4, 5, generator=rng, dtype=torch.float64)
    table = torch.rand(4, 4, generator=rng) < 0.5
    if random_seed % 2:
        table = table[:1, :1].expand(4, 4) | torch.eye(4).bool()  # kept by every order
    order = torch.randperm(4, generator=rng)
    out = attention(x, x, x, masks.dense(table))
    shuffled = x[:, :, order]
    moved = attention(shuffled, shuffled, shuffled, masks.dense(table))
    assert ch06.keeps(table, order) == torch.allclose(moved, out[:, :, order], atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_what_reaches_is_what_flows(layers):
    table = torch.rand(6, 6, generator=torch.Generator().manual_seed(layers)) < 0.25
    x = torch.randn(2, 6, 5, dtype=torch.float64)

    def stack(x):
        for _ in range(layers):
            x = x + attention(x[:, None], x[:, None], x[:, None], masks.dense(table))[:, 0]
        return x

    assert torch.equal(by_change(stack, x), ch06.reach(table, layers))


def test_the_finder_finds_what_leaks_finds():
    ids = torch.randint(11, (3, 5), generator=RNG)
    for mask in (masks.causal, masks.full, masks.window(2), lambda b, h, i, j: j == i + 2):
        model = ch06.sums(masks.table(mask, 1, 1, 5, 5)[0, 0])
        assert set(ch06.find_leaks(model, ids)) == set(leaks(model, ids))


def test_both_right_implementations_are_attention_under_the_joined_mask():
    q, k, v = torch.randn(3, 4, 2, 7, 5, dtype=torch.float64)
    real = torch.rand(4, 7, generator=RNG) < 0.6
    want = attention(q, k, v, masks.both(masks.causal, masks.dense(real[:, None, None])))
    kept = real[:, None, :, None].expand_as(want)
    torch.testing.assert_close(ch06.padded_causal(q, k, v, real), want)
    torch.testing.assert_close(ch06.padded_row_by_row(q, k, v, real)[kept], want[kept])


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_attention_in_exact_fractions(random_seed):
    p = ch06.problem(random_seed)
    scores, readable, values = p.tensors()
    weights = softmax(scores.masked_fill(~readable, -torch.inf))
    want = torch.tensor([[float(w) for w in row] for row in p.weights], dtype=torch.float64)
    torch.testing.assert_close(weights, want, atol=1e-15, rtol=0)
    out = torch.tensor([float(x) for x in p.answer], dtype=torch.float64)
    torch.testing.assert_close(weights @ values, out, atol=1e-12, rtol=0)
    for row, yes in zip(p.weights, readable, strict=True):
        assert all(isinstance(w, Fraction) for w in row) and sum(row) == bool(yes.any())


def test_problems_are_repeatable_and_fresh_and_use_every_mask():
    assert repr(ch06.problem(5)) == repr(ch06.problem(5))
    assert len({repr(ch06.problem(s)).split("\n", 1)[1] for s in range(200)}) == 200
    assert {ch06.problem(s).kind for s in range(200)} == {"causal", "window", "padded"}


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = next(ch06.problem(s) for s in range(50) if ch06.problem(s).kind == "padded")
    assert "token 1 is a pad that nobody reads" in repr(p) and "Weights" not in repr(p)
    assert "Token 1 may read nothing: weights 0, 0, 0, 0, output 0" in p.worked()
    for x in p.answer[1:]:
        assert f"= {x}" in p.worked()
