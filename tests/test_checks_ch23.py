"""heed.checks.ch23: the wrong answers are caught, and the right ones agree with better ones."""

import time
from fractions import Fraction

import pytest
import torch

from heed import counting, masks
from heed.attention import attention
from heed.cache.contiguous import Contiguous
from heed.cache.quantised import rounded
from heed.cache.rolling import Rolling
from heed.checks import ch23, check

f64 = torch.float64


def task_id(x):
    return getattr(x, "id", None) or getattr(x, "name", None)


@pytest.mark.parametrize("task", ch23.TASKS, ids=task_id)
def test_a_check_takes_less_than_a_second(task):
    check(task.id, task.reference)  # the first watch over tensors loads a good part of torch
    start = time.process_time()
    check(task.id, task.reference)
    assert time.process_time() - start < 1


def test_the_small_cache_hands_back_what_heeds_does():
    small, ours = ch23.new_cache(2, 3, 2, 9, 5), Contiguous(2, 3, 2, 9, 5, dtype=f64)
    for n in (4, 0, 1, 4):
        for layer in range(2):
            k, v = torch.randn(2, 3, 2, n, 5, dtype=f64)
            got, want = small(layer, k, v), ours.append(layer, k, v)
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    for append in (small, ours.append):
        with pytest.raises(ValueError, match="room for 9"):
            append(0, k[:, :, :1], v[:, :, :1])


@pytest.mark.parametrize(("p", "n"), [(1, 0), (1, 6), (4, 0), (4, 3)])
def test_keys_and_pairs_are_those_that_passes_have(p, n):
    """Counted pair by pair."""
    kept = anew = 0
    pairs, causal, full = set(), 0, 0
    for length in range(p, p + n + 1):
        table = {(i, j) for i in range(length) for j in range(length)}
        below = {(i, j) for i, j in table if j <= i}
        pairs |= below
        anew, causal, full = anew + length, causal + len(below), full + len(table)
        kept = length
    assert ch23.work(p, n) == (kept, len(pairs), anew, causal, full)
    if p == 1:
        m = n + 1
        assert ch23.work(1, n)[2:4] == (m * (m + 1) // 2, m * (m + 1) * (m + 2) // 6)


def test_bytes_are_those_of_heeds_counting_and_the_length_is_the_first_that_weighs_as_much():
    hf = pytest.importorskip("transformers")
    for config, kind, sizes in (
        (hf.LlamaConfig(), "MHA", (32, 32, 32, 128, 0, 0, 2)),
        (hf.MistralConfig(), "GQA", (32, 32, 8, 128, 0, 0, 2)),
        (hf.DeepseekV3Config(), "MLA", (61, 128, 128, 128, 512, 64, 2)),
    ):
        token, n = ch23.outweighs(kind, *sizes, 10**9 + 7, 3)
        assert token == counting.kv_cache_bytes(config, 1)
        assert 3 * token * (n - 1) < 2 * (10**9 + 7) <= 3 * token * n


def test_slots_are_those_of_heeds_ring_and_so_is_what_can_be_cut_off():
    for W in (2, 5):
        for n in range(14):
            cache = Rolling(1, 1, 1, W, 1)
            cache.keys[0].fill_(-1)
            for p in range(n):
                cache.append(0, *torch.full((2, 1, 1, 1, 1), float(p)))
            place, held, undo = ch23.rolled(n, W)
            assert held == cache.keys[0].flatten().int().tolist() and place == n % W
            if undo < n and n - undo > 1:  # nothing is always there to be cut back to
                with pytest.raises(ValueError, match="cannot cut"):
                    cache.truncate(n - undo - 1)
            cache.truncate(n - undo)


def test_codes_are_those_of_heed_and_the_bound_is_reached():
    x, q = torch.randn(9, 5, dtype=f64) * torch.arange(1, 6), torch.randn(5, dtype=f64)
    for per, axis in (("channel", 0), ("token", 1)):
        codes, steps, bound = ch23.quantise(x, q, per)
        want = rounded(x, axis)
        assert torch.equal(codes, want[0])
        torch.testing.assert_close(steps, want[1])
        off = ((codes * steps - x) @ q).abs()
        assert (off <= bound * (1 + 1e-12)).all()
        worst = steps.expand(9, 5) * (codes.sign() * 0 + 0.5) * q.sign()
        torch.testing.assert_close(worst @ q, bound)


def test_scores_of_latents_are_those_of_the_keys_made_from_them():
    parts = ch23._latent(torch.Generator().manual_seed(0), 3, 5, 2, 7, 11)
    torch.testing.assert_close(ch23.latent_scores(*parts), ch23._expanded(*parts))


def test_both_models_with_a_cache_are_the_model_without():
    matrices = torch.randn(2, 3, 6, 6, dtype=f64) / 2
    x = torch.randn(3, 8, 6, dtype=f64)
    want = ch23.whole(x, matrices)
    for build in (ch23.cached, ch23.in_slots):
        model = build(matrices)
        got = torch.cat([model.read(part) for part in x.split([3, 1, 4], dim=1)], dim=1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_wrong_count_is_shown_with_both_numbers():
    said = repr(check("23.2", lambda p, n: (p + n, 0, 0, 0, 0)))
    assert "a prompt of 1 words, 0 more; pairs with a cache" in said
    assert "expected  1\n  got       0" in said
    said = repr(check("23.2", lambda p, n: (1.0, 1, 1, 1, 1)))
    assert "got       a float, 1.0" in said
    said = repr(check("23.4", lambda n, W: (0, [0] * W, 0)))
    assert "expected  [-1, -1, -1, -1, -1]\n  got       [0, 0, 0, 0, 0]" in said


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_has_the_numbers_of_heeds_attention(random_seed):
    p = ch23.problem(random_seed)
    a, (q, k, v) = p.answer, p.tensors()
    for mask, names in ((masks.causal, {2: "position 2", 3: "position 3"}),
                        (masks.window(p.slots), {3: "rolling"})):  # fmt: skip
        got = attention(q, k, v, mask, scale=1.0).flatten().tolist()
        for i, name in names.items():
            assert got[i] == pytest.approx(float(a[name]), abs=1e-12)
    assert a["slot"] == ch23.rolled(3, p.slots)[0]
    kept, pairs, anew, causal, _ = ch23.work(1, 3)
    assert (a["keys, kept"], a["pairs, kept"]) == (kept, pairs)
    assert (a["keys, anew"], a["pairs, anew"]) == (anew, causal)
    outputs = [line.rsplit(" = ")[-1] for line in p.worked().splitlines() if "output" in line]
    assert [Fraction(x) for x in outputs] == [a["position 2"], a["position 3"], a["rolling"]]


def test_problems_are_repeatable_and_fresh():
    assert repr(ch23.problem(5)) == repr(ch23.problem(5))
    assert len({repr(ch23.problem(s)) for s in range(200)}) > 150


def test_the_tasks_are_numbered_and_the_last_is_to_write_the_test():
    assert [task.id for task in ch23.TASKS] == [f"23.{n}" for n in range(1, 8)]
    assert [bool(task.bugs) for task in ch23.TASKS] == [False] * 6 + [True]
