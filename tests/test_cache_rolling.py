"""A buffer of one window: which positions it holds, where, and what it can no longer undo."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed.cache.rolling import Rolling


def numbered(start, stop):
    """Keys and values that say which position they are."""
    x = torch.arange(start, stop, dtype=torch.float32)[None, None, :, None]
    return x, x + 0.5


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=8))
@settings(max_examples=60, deadline=None)
def test_what_comes_back_are_the_window_before_each_chunk_and_the_chunk(window, chunks):
    cache, start = Rolling(1, 1, 1, window, 1), 0
    cache.keys[0].fill_(torch.nan)
    for n in chunks:
        k, v = cache.append(0, *numbered(start, start + n))
        first = max(0, start - window + 1)
        assert k.flatten().tolist() == list(range(first, start + n))
        assert v.flatten().tolist() == [p + 0.5 for p in range(first, start + n)]
        start += n
        assert cache.length == start
        for p in range(max(0, start - window), start):
            assert cache.keys[0][0, 0, p % window].item() == p


@given(st.integers(1, 6), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_cut_is_refused_exactly_where_a_needed_position_is_gone(window, chunks, data):
    """Against a list of what each slot holds."""
    cache, slots, length = Rolling(1, 1, 1, window, 1), {}, 0
    for n in chunks:
        cache.append(0, *numbered(length, length + n))
        slots |= {p % window: p for p in range(length, length + n)}
        length += n
        cut = data.draw(st.integers(0, length))
        needed = range(max(0, cut - window + 1), cut)
        if all(slots.get(p % window) == p for p in needed):
            cache.truncate(cut)
            length = cut
            slots = {i: p for i, p in slots.items() if p < cut}
        else:
            with pytest.raises(ValueError, match=f"back to {cut}: .* needs position {needed[0]}, "):
                cache.truncate(cut)
        assert cache.length == length


def test_one_position_back_can_always_be_cut():
    cache = Rolling(2, 1, 1, 4, 1)
    for start in range(0, 20, 5):
        for layer in range(2):
            cache.append(layer, *numbered(start, start + 5))
    cache.truncate(19)
    with pytest.raises(ValueError, match="needs position 15, and 16 is the oldest left"):
        cache.truncate(18)
    assert cache.append(0, *numbered(19, 20))[0].flatten().tolist() == [16, 17, 18, 19]


def test_memory_does_not_grow_with_the_length_and_a_window_has_a_position():
    cache = Rolling(1, 2, 3, 4, 5)
    held = cache.nbytes
    cache.append(0, *torch.randn(2, 2, 3, 100, 5))
    assert cache.nbytes == held == sum(x.nbytes for x in cache.keys + cache.values)
    with pytest.raises(ValueError, match="window must be a positive integer, got 0"):
        Rolling(1, 2, 3, 0, 5)


def test_mistral_7b_holds_at_most_512_mebibytes():
    cache = Rolling(32, 1, 8, 4096, 128, dtype=torch.float16, device="meta")
    assert cache.nbytes == 512 * 2**20


def test_reading_nothing_brings_nothing_back():
    cache = Rolling(1, 1, 1, 3, 1)
    cache.append(0, *numbered(0, 5))
    cache.truncate(4)
    cache.append(0, *numbered(4, 4))
    with pytest.raises(ValueError, match="needs position 1, and 2 is the oldest left"):
        cache.truncate(3)
