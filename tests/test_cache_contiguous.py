"""The plainest cache: what comes back is a view of what was written."""

import pytest
import torch

from heed.cache.contiguous import Contiguous


def test_what_comes_back_is_everything_so_far_and_not_copied():
    cache = Contiguous(2, 1, 3, 8, 5)
    k, v = torch.randn(2, 1, 3, 7, 5)
    cache.append(0, k[:, :, :4], v[:, :, :4])
    got_k, got_v = cache.append(0, k[:, :, 4:], v[:, :, 4:])
    torch.testing.assert_close((got_k, got_v), (k, v), rtol=0, atol=0)
    assert got_k.data_ptr() == cache.keys[0].data_ptr()
    assert cache.filled == [7, 0] and cache.length == 0


def test_a_new_order_copies_what_is_filled_and_keeps_the_buffers():
    cache = Contiguous(1, 3, 1, 4, 2)
    cache.keys[0].fill_(torch.nan)
    k, v = torch.randn(2, 3, 1, 2, 2)
    cache.append(0, k, v)
    where = cache.keys[0].data_ptr()
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.keys[0].data_ptr() == where
    torch.testing.assert_close(cache.keys[0][:, :, :2], k[[1, 1, 0]], rtol=0, atol=0)
    torch.testing.assert_close(cache.values[0][:, :, :2], v[[1, 1, 0]], rtol=0, atol=0)


def test_a_full_cache_says_how_much_it_holds():
    cache = Contiguous(1, 1, 1, 4, 2)
    cache.append(0, *torch.randn(2, 1, 1, 4, 2))
    with pytest.raises(ValueError, match="5 positions, but the cache has room for 4"):
        cache.append(0, *torch.randn(2, 1, 1, 1, 2))
    with pytest.raises(ValueError, match="max_len must be a positive integer, got 0"):
        Contiguous(1, 1, 1, 0, 2)


def test_the_cache_of_llama_2_7b_takes_half_a_mebibyte_a_token():
    cache = Contiguous(32, 1, 32, 3, 128, dtype=torch.float16, device="meta")
    assert cache.nbytes == 3 * 524_288
