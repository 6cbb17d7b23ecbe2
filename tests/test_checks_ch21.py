"""heed.checks.ch21: the wrong answers are caught, and the right ones agree with better ones."""

import math
import time
from fractions import Fraction

import pytest
import torch

from heed import masks
from heed.attention import attention, softmax, weights
from heed.checks import ch21, check
from heed.flash import tiled

f64 = torch.float64


def task_id(x):
    return getattr(x, "id", None) or getattr(x, "name", None)


@pytest.mark.parametrize("task", ch21.TASKS, ids=task_id)
def test_a_check_takes_less_than_a_second(task):
    start = time.perf_counter()
    check(task.id, task.reference)
    assert time.perf_counter() - start < 1


def test_joined_summaries_are_those_of_the_whole_row_in_any_order():
    s = torch.randn(3, 6, dtype=f64)
    parts = [(x.amax(1), (x - x.amax(1, keepdim=True)).exp().sum(1)) for x in s.split(2, 1)]
    whole = s.amax(1), (s - s.amax(1, keepdim=True)).exp().sum(1)
    for a, b, c in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        for got in (
            ch21.join(*ch21.join(*parts[a], *parts[b]), *parts[c]),
            ch21.join(*parts[a], *ch21.join(*parts[b], *parts[c])),
        ):
            for x, y in zip(got, whole, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_a_row_in_chunks_is_the_softmax_of_heed():
    s = torch.randn(11, dtype=f64)
    m, l = ch21.online(s.split(3))  # noqa: E741
    torch.testing.assert_close((s - m).exp() / l, softmax(s), rtol=0, atol=1e-12)


def test_chunks_that_share_memory_are_seen_once_each():
    chunks = ch21.Chunks(((1.0, 2.0), (3.0,)), shared=True)
    assert [x.tolist() for x in chunks] == [[1, 2], [3]]
    assert [x.tolist() for x in list(chunks)] == [[3, 2], [3]]
    fresh = ch21.Chunks(((1.0, 2.0), (3.0,)), shared=False)
    assert [x.tolist() for x in list(fresh)] == [[1, 2], [3]]
    assert repr(fresh) == "[1.0, 2.0], then [3.0]" and repr(ch21.Chunks((), False)) == "nothing"


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_one_query_is_attended_as_heed_does(chunk):
    q, k, v = (torch.randn(n, w, dtype=f64) for n, w in ((1, 5), (7, 5), (7, 2)))
    want = attention(q[None, None], k[None, None], v[None, None])[0, 0, 0]
    got = ch21.attend_in_chunks(q[0], k, v, chunk)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_watch_sees_a_whole_row_and_no_chunk():
    k = torch.randn(61, 3)
    with ch21._Rows(61) as watch:
        k[:4] @ k[0]
    assert not watch.seen
    with ch21._Rows(61) as watch:
        k @ k[0]
    assert watch.seen


def test_merged_outputs_are_those_of_all_keys():
    q, k, v = (torch.randn(1, 1, n, 4, dtype=f64) for n in (5, 9, 9))
    want, lse = tiled.forward(q, k, v, masks.causal)
    mine = masks.dense(masks.table(masks.causal, 1, 1, 5, 9))
    first = tiled.forward(q, k, v, masks.both(mine, lambda b, h, i, j: j < 7))
    second = tiled.forward(q, k, v, masks.both(mine, lambda b, h, i, j: j >= 7))
    o, together = ch21.merge(*(x[0, 0] for x in (*first, *second)))
    torch.testing.assert_close(o, want[0, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(together, lse[0, 0], rtol=0, atol=1e-12)
    assert (second[1][0, 0, :2] == -math.inf).all()  # the first queries end before key 7


def test_tiles_of_score_gradients_give_the_gradients_of_heed():
    q, k, v = (torch.randn(1, 1, n, 4, dtype=f64, requires_grad=True) for n in (5, 7, 7))
    out = attention(q, k, v)
    do = torch.randn_like(out)
    d_q, d_k, _ = torch.autograd.grad(out, (q, k, v), do)
    s = (q @ k.mT / 2)[0, 0].detach()
    lse, o = s.logsumexp(1), out[0, 0].detach()
    tiles = [
        ch21.score_gradient(s[:, c], lse, v[0, 0, c].detach(), o, do[0, 0])
        for c in (slice(0, 3), slice(3, 7))
    ]
    ds = torch.cat(tiles, 1) / 2
    torch.testing.assert_close(ds @ k[0, 0], d_q[0, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(ds.T @ q[0, 0], d_k[0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(5, 7, 2, 3), (7, 7, 3, 2), (1, 9, 4, 4), (6, 11, 64, 3)])
def test_what_moves_is_what_a_loop_over_tiles_reads(sizes, causal):
    T, S, Br, Bc = sizes
    table = masks.table(masks.causal if causal else masks.full, 1, 1, T, S)[0, 0]
    read = 0
    for rows in table.split(Br):
        read += len(rows) * 3
        read += sum(2 * 3 * tile.shape[1] for tile in rows.split(Bc, 1) if tile.any())
    assert ch21.moved(T, S, 3, Br, Bc, causal) == (read, T * 3 + T)


@pytest.mark.parametrize("T, S", [(5, 7), (7, 5), (1, 1), (4, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_both_right_implementations_are_those_of_heed(T, S, causal):
    q, k, v = (torch.randn(n, w, dtype=f64) for n, w in ((T, 3), (S, 3), (S, 2)))
    mask = masks.causal if causal else masks.full
    want, lse = tiled.forward(*(x[None, None] for x in (q, k, v)), mask)
    for implementation in (ch21.tiled, ch21.whole):
        for block in (1, 2, 3, 64):
            o, got = implementation(q, k, v, block, causal)
            torch.testing.assert_close(o, want[0, 0], rtol=0, atol=1e-12)
            torch.testing.assert_close(got, lse[0, 0], rtol=0, atol=1e-12)


def test_minus_infinity_is_expected_where_it_belongs():
    def never_empty(m1, l1, m2, l2):
        m, l = ch21.join(m1, l1, m2, l2)  # noqa: E741
        return m.clamp_min(-1e6), l

    said = repr(check("21.1", never_empty))
    assert "expected  [-inf]\n  got       [-1000000.0]" in said


def test_a_count_that_is_off_by_one_is_shown_with_both_numbers():
    def more(*sizes):
        read, written = ch21.moved(*sizes)
        return read, written + 1

    said = repr(check("21.6", more))
    assert "T = 5, S = 7, D = 3, tiles of 5 x 7; written\n  expected  20\n  got       21" in said


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_what_the_tiles_of_heed_make(random_seed):
    p = ch21.problem(random_seed)
    q, k, v = p.tensors()
    want = torch.tensor([float(x) for x in p.answer], dtype=f64)
    torch.testing.assert_close(
        tiled.attention(q, k, v, block=2).flatten(), want, rtol=0, atol=1e-12
    )
    for row, (first, both) in zip(p.numbers, p.summaries, strict=True):
        exact = Fraction(sum(a * b for a, b in zip(row, p.values, strict=True)), sum(row))
        assert both[2] / both[1] == exact
        assert first == (
            max(row[:2]),
            Fraction(sum(row[:2]), max(row[:2])),
            Fraction(row[0] * p.values[0] + row[1] * p.values[1], max(row[:2])),
        )
        shrink = first[0] / both[0]
        new = Fraction(row[2] + row[3], max(row))
        assert both[1] == shrink * first[1] + new
    assert all(f" = {x}" in p.worked() for x in p.answer)
    again = weights(q, k)[0, 0] @ v[0, 0]
    torch.testing.assert_close(again.flatten(), want, rtol=0, atol=1e-12)


def test_problems_are_repeatable_and_fresh_and_keep_their_answer():
    assert repr(ch21.problem(5)) == repr(ch21.problem(5))
    assert len({repr(ch21.problem(s)) for s in range(200)}) > 150
    p = ch21.problem(3)
    assert str(p.answer[0]) not in repr(p) or "/" not in str(p.answer[0])


def test_the_tasks_are_numbered_and_the_last_is_to_write_the_test():
    assert [task.id for task in ch21.TASKS] == [f"21.{n}" for n in range(1, 8)]
    assert [bool(task.bugs) for task in ch21.TASKS] == [False] * 6 + [True]
