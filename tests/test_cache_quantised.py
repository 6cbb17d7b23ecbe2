"""Eight bits a number: the bound, held against plain arithmetic on Python's numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed.attention import attention
from heed.cache.quantised import Quantised, rounded

f64 = torch.float64
EASE = 1 + 1e-12  # x / step is itself rounded


def by_hand(numbers):
    """Numbers that share a step, rounded one by one."""
    step = max(abs(x) for x in numbers) / 127
    return [round(x / step) * step if step else 0.0 for x in numbers], step


def filled(k, v, chunks, group=4, **settings):
    cache = Quantised(1, *k.shape[:2], 40, k.shape[3], group=group, dtype=k.dtype, **settings)
    for buffers in cache._buffers():
        buffers[0].fill_(torch.nan if buffers[0].dtype.is_floating_point else 99)
    for a, b in zip(k.split(chunks, 2), v.split(chunks, 2), strict=True):
        got = cache.append(0, a, b)
    return cache, *got


def wild(*shape):
    """Channels and tokens of very different sizes."""
    x = torch.randn(shape, dtype=f64)
    return x * 10 ** torch.randn(shape[-1], dtype=f64) * 10 ** torch.randn(shape[-2], 1, dtype=f64)


CHUNKS = [[14], 14 * [1], [3, 1, 8, 2], [5, 9]]


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_keys_are_rounded_by_channel_and_group_and_values_by_token(chunks):
    k, v = wild(2, 3, 14, 5), wild(2, 3, 14, 5)
    _, got_k, got_v = filled(k, v, chunks)
    for b in range(2):
        for g in range(3):
            for d in range(5):
                for start in (0, 4, 8):
                    want, _ = by_hand(k[b, g, start : start + 4, d].tolist())
                    got = got_k[b, g, start : start + 4, d].tolist()
                    assert got == pytest.approx(want, rel=1e-12)
            for t in range(14):
                want, _ = by_hand(v[b, g, t].tolist())
                assert got_v[b, g, t].tolist() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(got_k[:, :, 12:], k[:, :, 12:], rtol=0, atol=0)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_no_number_is_off_by_more_than_half_a_step(chunks):
    k, v = wild(2, 3, 14, 5), wild(2, 3, 14, 5)
    cache, got_k, got_v = filled(k, v, chunks)
    for x, got, step in zip((k, v), (got_k, got_v), cache.steps(0), strict=True):
        assert step.shape[:3] == x.shape[:3]
        assert ((x - got).abs() <= step / 2 * EASE).all()
        assert ((x - got).abs() > step / 2.5).any()  # and some are nearly off by that
    assert (cache.steps(0)[0][:, :, 12:] == 0).all() and (cache.steps(0)[0][:, :, :12] > 0).all()


def test_what_is_kept_does_not_depend_on_the_chunks():
    k, v = wild(2, 3, 14, 5), wild(2, 3, 14, 5)
    first, *want = filled(k, v, CHUNKS[0])
    for chunks in CHUNKS[1:]:
        _, *got = filled(k, v, chunks)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_any_numbers_come_back_within_half_a_step(numbers):
    x = torch.tensor(numbers, dtype=f64)
    codes, steps = rounded(x, dim=0)
    assert codes.dtype == torch.int8 and codes.abs().max() <= 127
    assert ((codes * steps - x).abs() <= steps / 2 * EASE).all()
    if x.abs().max() > 1e-290:
        assert codes.abs().max() == 127
        assert steps.item() == pytest.approx(max(map(abs, numbers)) / 127)


@pytest.mark.parametrize("numbers", [[0.0, 0.0], [5e-324, 0.0], [1e-310, -3e-309]])
def test_zeros_and_nearly_zeros_stay_so(numbers):
    codes, steps = rounded(torch.tensor(numbers, dtype=f64), dim=0)
    assert (codes * steps).isfinite().all()
    assert ((codes * steps).abs() <= 2.3e-308).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_steps_are_float32_or_better_and_numbers_come_back_in_their_dtype(dtype):
    k, v = wild(2, 3, 14, 5).clamp(-9e3, 9e3).to(dtype), wild(2, 3, 14, 5).clamp(-99, 99).to(dtype)
    cache, got_k, got_v = filled(k, v, [5, 9])
    assert cache.key_steps[0].dtype == cache.value_steps[0].dtype == torch.float32
    for x, got, step in zip((k, v), (got_k, got_v), cache.steps(0), strict=True):
        assert got.dtype == dtype
        spacing = torch.finfo(dtype).eps * x.abs().float() + torch.finfo(dtype).smallest_normal
        assert ((x.float() - got.float()).abs() <= step / 2 * (1 + 1e-4) + spacing).all()


def test_the_output_moves_by_no_more_than_the_docstring_says():
    k, v = wild(2, 3, 14, 5) / 9, wild(2, 3, 14, 5)
    q = torch.randn(2, 3, 1, 5, dtype=f64) / 9
    cache, got_k, got_v = filled(k, v, [14])
    key_steps, value_steps = cache.steps(0)
    e = (q.abs() * key_steps).sum(-1).amax(-1) / 2 / math.sqrt(5)  # (B, G)
    bound = (2 * e).expm1()[..., None] * v.abs().amax(2) + value_steps.amax(2) / 2
    moved = (attention(q, got_k, got_v) - attention(q, k, v)).abs()[:, :, 0]
    assert (moved <= bound).all() and (moved > 0).all()


@pytest.mark.parametrize("n", range(14))
def test_after_a_cut_every_number_has_at_most_two_roundings(n):
    k, v = wild(2, 3, 14, 5), wild(2, 3, 14, 5)
    new_k, new_v = wild(2, 3, 9, 5), wild(2, 3, 9, 5)
    cache, got_k, got_v = filled(k, v, [14])
    before = cache.steps(0)[0][:, :, :n]
    cache.truncate(n)
    again_k, again_v = cache.append(0, new_k[:, :, :0], new_v[:, :, :0])
    torch.testing.assert_close(again_k, got_k[:, :, :n], rtol=0, atol=0)
    torch.testing.assert_close(again_v, got_v[:, :, :n], rtol=0, atol=0)
    got_k, got_v = cache.append(0, new_k, new_v)
    key_steps, value_steps = cache.steps(0)
    off = (got_k - torch.cat([k[:, :, :n], new_k], 2)).abs()
    assert (off[:, :, :n] <= (before + key_steps[:, :, :n]) / 2 * EASE).all()
    assert (off[:, :, n:] <= key_steps[:, :, n:] / 2 * EASE).all()
    whole = n // 4 * 4  # groups that the cut left whole are not touched
    assert (off[:, :, :whole] <= before[:, :, :whole] / 2 * EASE).all()
    off = (got_v - torch.cat([v[:, :, :n], new_v], 2)).abs()
    assert (off <= value_steps / 2 * EASE).all()


def test_it_takes_a_byte_for_a_number_and_the_steps():
    cache = Quantised(1, 1, 1, 4096, 128, group=32)
    codes, newest = 2 * 4096 * 128, 32 * 128 * 4
    assert cache.nbytes == codes + newest + 4 * (4096 // 32 * 128 + 4096)
    assert cache.nbytes < 0.29 * (2 * 4096 * 128 * 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_kept(bad, which):
    pair = [wild(1, 1, 5, 3), wild(1, 1, 5, 3)]
    cache, *want = filled(*pair, [5])
    worse = [x[:, :, :2].clone() for x in pair]
    worse[which][0, 0, 1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        cache.append(0, *worse)
    torch.testing.assert_close(list(cache.append(0, *(x[:, :, :0] for x in pair))), want)


def test_a_group_has_a_position():
    with pytest.raises(ValueError, match="group must be a positive integer, got 0"):
        Quantised(1, 1, 1, 8, 4, group=0)
    with pytest.raises(ValueError, match="41 positions, but the cache has room for 40"):
        filled(wild(1, 1, 41, 2), wild(1, 1, 41, 2), [40, 1])
