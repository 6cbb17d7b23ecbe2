"""One protocol, five caches: under the same model all of them give what no cache gives."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heed import cache as caches
from heed import masks
from heed.attention import attention
from heed.cache.contiguous import Contiguous
from heed.cache.paged import Packed, Paged, PagedKVCache
from heed.cache.quantised import Quantised
from heed.cache.rolling import Rolling
from heed.gpt import GPT, GPTConfig
from heed.multihead import MultiHeadAttention
from heed.positions import rotate

f64 = torch.float64
WINDOW, LEN = 5, 17


def contiguous(L, B, G, D, dtype=f64, device=None):
    return Contiguous(L, B, G, LEN, D, dtype=dtype, device=device)


def rolling(L, B, G, D, dtype=f64, device=None):
    return Rolling(L, B, G, WINDOW, D, dtype=dtype, device=device)


def quantised(L, B, G, D, dtype=f64, device=None):
    return Quantised(L, B, G, LEN, D, group=4, dtype=dtype, device=device)


def paged(L, B, G, D, dtype=f64, device=None):
    pages = 2 * B * -(-LEN // 3)
    pool = PagedKVCache(L, G, D, page_len=3, n_pages=pages, dtype=dtype, device=device)
    return Paged(pool, [pool.new() for _ in range(B)])


EXACT = [contiguous, rolling, paged]
ALL = [*EXACT, quantised]


def buffers(cache):
    """Every tensor that it keeps."""
    holder = cache.pool if isinstance(cache, Paged) else cache
    every = [x for x in vars(holder).values() if isinstance(x, list)]
    return [x for tensors in every for x in tensors if isinstance(x, torch.Tensor)]


def poisoned(cache):
    """Unused slots that would ruin everything they touch."""
    for x in buffers(cache):
        x.fill_(torch.nan if x.dtype.is_floating_point else 99)
    return cache


def mask_for(kind):
    return masks.window(WINDOW) if kind is rolling else masks.causal


def attend(mask):
    return lambda q, k, v, dropout: attention(q, k, v, mask)


def drawn(model, random_seed=0):
    """Every parameter drawn afresh: ones and zeros hide a missing weight."""
    draw = torch.Generator().manual_seed(random_seed)
    for p in model.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=draw, dtype=f64)
    return model.double().eval()


def tiny(kind):
    sizes = {"vocab_size": 61, "max_len": LEN, "n_layers": 3, "n_heads": 3, "d_model": 33}
    model = drawn(GPT(GPTConfig(**sizes)))
    for block in model.blocks:
        block.attn.attend = attend(mask_for(kind))
    return model


def text(B=2, T=13, random_seed=1):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(random_seed))


def close(a, b, atol=1e-10):
    assert a.isfinite().all()
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@torch.no_grad()
def in_chunks(model, ids, sizes, cache):
    return torch.cat([model(part, cache=cache) for part in ids.split(sizes, dim=1)], dim=1)


def cut(T, draw):
    """T in chunks of any size, empty ones among them."""
    places = sorted(draw(st.lists(st.integers(0, T), max_size=5)))
    return [b - a for a, b in zip([0, *places], [*places, T], strict=True)]


CHUNKS = [[13], 13 * [1], [12, 1], [1, 12], [5, 1, 4, 3], [4, 0, 9], [6, 7]]


@pytest.mark.parametrize("sizes", CHUNKS, ids=str)
@pytest.mark.parametrize("kind", EXACT)
def test_a_model_does_not_notice_which_cache_it_has(kind, sizes):
    for B in (2, 3):
        model, ids, cache = tiny(kind), text(B), poisoned(kind(3, B, 3, 11))
        close(in_chunks(model, ids, sizes, cache), model(ids))
        assert cache.length == 13


@pytest.mark.parametrize("kind", EXACT)
@given(st.data())
@settings(max_examples=10, deadline=None)
def test_chunks_cuts_and_new_orders_in_any_sequence(kind, data):
    """Against the uncached model on the texts that the rows hold by then."""
    model, B = tiny(kind), 3
    cache, now = poisoned(kind(3, B, 3, 11)), torch.empty(B, 0, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["read", "read", "cut", "reorder"]))
        if action == "read":
            n = data.draw(st.integers(0, LEN - now.shape[1]))
            new = text(B, n, data.draw(st.integers(0, 9)))
            now = torch.cat([now, new], dim=1)
            close(in_chunks(model, new, cut(n, data.draw), cache), model(now)[:, -n or LEN :])
        elif action == "cut":
            oldest = now.shape[1] - 1 if kind is rolling and now.shape[1] > WINDOW else 0
            n = data.draw(st.integers(max(0, oldest), now.shape[1]))
            try:
                cache.truncate(n)
            except ValueError:
                assert kind is rolling  # what it may refuse stands in its own test
            else:
                now = now[:, :n]
        else:
            rows = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
            cache.reorder(rows)
            now = now[rows]
        assert cache.length == now.shape[1]


class Turning(nn.Module):
    """Two layers of grouped heads with rotary positions, and nothing else."""

    def __init__(self, mask):
        super().__init__()
        sizes = {"n_heads": 6, "n_kv_heads": 2, "d_head": 4, "bias": True, "rotate": rotate}
        self.layers = nn.ModuleList(MultiHeadAttention(15, **sizes) for _ in range(2))
        self.mask = mask

    def forward(self, x, cache=None):
        places = None if cache is None else cache.places(x.shape[1])
        for i, layer in enumerate(self.layers):
            keep = None if cache is None else partial(cache.append, i)
            x = x + layer(x, mask=self.mask, keep=keep, places=places)
        return x


@pytest.mark.parametrize("sizes", CHUNKS, ids=str)
@pytest.mark.parametrize("kind", EXACT)
def test_keys_kept_after_rotation_stay_true(kind, sizes):
    model = drawn(Turning(mask_for(kind)))
    x = torch.randn(2, 13, 15, dtype=f64)
    cache = poisoned(kind(2, 2, 2, 4))
    close(in_chunks(model, x, sizes, cache), model(x), 1e-9 * model(x).abs().max().item())


@pytest.mark.parametrize("kind", ALL)
def test_a_text_cut_back_and_reordered_goes_on_as_if_it_had_been_read_so(kind):
    model, ids, other = tiny(kind), text(3), text(3, random_seed=2)
    cache = poisoned(kind(3, 3, 3, 11))
    in_chunks(model, torch.cat([ids[:, :4], other[:, :1]], dim=1), [3, 2], cache)
    cache.truncate(4)
    assert cache.length == 4
    rows = torch.tensor([2, 0, 2])
    cache.reorder(rows)
    mixed = torch.cat([ids[rows, :4], other[:, 4:]], dim=1)
    fresh = poisoned(kind(3, 3, 3, 11))
    want = in_chunks(model, mixed, [3, 1, 9], fresh)[:, 4:]
    if kind is not quantised:
        close(want, model(mixed)[:, 4:])
    close(in_chunks(model, mixed[:, 4:], [9], cache), want)
    cache.truncate(0)
    close(in_chunks(model, ids, [4, 9], cache), in_chunks(model, ids, [4, 9], kind(3, 3, 3, 11)))


@pytest.mark.parametrize("kind", ALL)
def test_half_precision_is_kept_as_it_is(kind):
    cache = kind(1, 2, 3, 4, dtype=torch.bfloat16)
    k, v = cache.append(0, *torch.randn(2, 2, 3, 2, 4, dtype=torch.bfloat16))
    assert k.dtype == v.dtype == torch.bfloat16


def new(B=2, T=2, k=5, v=5, G=3, dtype=f64, device=None):
    make = partial(torch.zeros, dtype=dtype, device=device)
    return make(B, G, T, k), make(B, G, T, v)


BAD = {
    "layer 2": (lambda c: c.append(2, *new()), "layer 2: the cache has layers 0 to 1"),
    "layer -1": (lambda c: c.append(-1, *new()), "layer -1: the cache has layers 0 to 1"),
    "three rows": (lambda c: c.append(0, *new(B=3)), r"k must be \(2, 3, new, 5\), got \(3, 3"),
    "one row": (lambda c: c.append(0, *new(B=1)), r"k must be \(2, 3, new, 5\), got \(1, 3"),
    "one head": (lambda c: c.append(0, *new(G=1)), r"k must be \(2, 3, new, 5\), got \(2, 1"),
    "wide keys": (lambda c: c.append(0, *new(k=6)), r"k must be .*, got \(2, 3, 2, 6\)"),
    "wide values": (lambda c: c.append(0, *new(v=6)), r"v must be .*, got \(2, 3, 2, 6\)"),
    "a value too few": (lambda c: c.append(0, new()[0], new(T=1)[1]), "2 keys but 1 values"),
    "no batch": (lambda c: c.append(0, *new()[0]), r"k must be .*, got \(3, 2, 5\)"),
    "float32": (
        lambda c: c.append(0, *new(dtype=torch.float32)),
        "k is torch.float32, the cache keeps torch.float64",
    ),
    "another device": (lambda c: c.append(0, *new(device="meta")), "k is on meta, the cache on"),
    "cut too far": (lambda c: c.truncate(4), "cannot keep 4 of 3 positions"),
    "cut below 0": (lambda c: c.truncate(-1), "cannot keep -1 of 3 positions"),
    "a cut in between": (lambda c: c.truncate(1.5), "cannot keep 1.5 of 3 positions"),
    "row 2": (
        lambda c: c.reorder(torch.tensor([0, 2])),
        r"rows must be 2 .* below 2, got \[0, 2\]",
    ),
    "row -1": (lambda c: c.reorder(torch.tensor([-1, 0])), r"rows must be .*, got \[-1, 0\]"),
    "one row only": (lambda c: c.reorder(torch.tensor([0])), r"rows must be 2 integers"),
    "half rows": (lambda c: c.reorder(torch.tensor([0.0, 1.0])), "rows must be 2 integers"),
}
FULL = (lambda c: c.append(1, *new(T=LEN)), "20 positions|pages are needed")


@pytest.mark.parametrize(
    ("kind", "bad"),
    [(kind, bad) for kind in ALL for bad in [*BAD.values(), FULL]],
    ids=[f"{kind.__name__}: {bad}" for kind in ALL for bad in [*BAD, "full"]],
)
def test_what_is_refused_changes_nothing(kind, bad, unchecked):
    if kind is rolling and bad is FULL:
        pytest.skip("a rolling cache is never full")
    cache = kind(2, 2, 3, 5)
    for x in buffers(cache):
        x.zero_()
    for layer in range(2):
        cache.append(layer, *torch.randn(2, 2, 3, 3, 5, dtype=f64))
    if kind is paged:  # the pool's other pages are somebody else's
        cache.pool.append(cache.pool.new(), 0, *torch.zeros(2, 3, 3 * 20, 5, dtype=f64))
    before = [x.clone() for x in buffers(cache)]
    call, words = bad
    with pytest.raises(ValueError, match=words):
        call(cache)
    assert cache.length == 3 and cache.places(2).tolist() == [3, 4]
    for x, y in zip(before, buffers(cache), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    k, v = torch.randn(2, 2, 3, 1, 5, dtype=f64)
    assert cache.append(1, k, v)[0].shape == (2, 3, 4, 5)


@pytest.mark.parametrize("make", [Contiguous, Rolling, Quantised])
@pytest.mark.parametrize("name", ["n_layers", "batch_size", "n_kv_heads", "d_head"])
def test_sizes_below_one_are_refused(make, name, unchecked):
    sizes = {"n_layers": 2, "batch_size": 2, "n_kv_heads": 3, "d_head": 5}
    room = {"window" if make is Rolling else "max_len": 8}
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {bad}"):
            make(**sizes | room | {name: bad})


@pytest.mark.parametrize("kind", ALL)
def test_whole_numbers_are_refused(kind):
    with pytest.raises(ValueError, match="floating point, got torch.int64"):
        kind(2, 2, 3, 5, dtype=torch.int64)


@pytest.mark.parametrize("kind", [contiguous, rolling])
def test_bytes_are_those_of_the_tensors(kind):
    cache = kind(2, 3, 4, 5, dtype=torch.float16)
    room = LEN if kind is contiguous else WINDOW
    assert cache.nbytes == sum(x.nbytes for x in buffers(cache)) == 2 * 2 * 3 * 4 * room * 5 * 2


@pytest.mark.parametrize("make", [Contiguous, Rolling, Quantised])
def test_values_may_be_of_another_width_or_of_none(make, unchecked):
    for d_value in (0, 3):
        cache = make(1, 2, 1, 8, 5, d_value=d_value, dtype=f64)
        k, v = torch.randn(2, 1, 6, 5, dtype=f64), torch.randn(2, 1, 6, d_value, dtype=f64)
        for part in (slice(0, 4), slice(4, 6)):
            got_k, got_v = cache.append(0, k[:, :, part], v[:, :, part])
        assert got_k.shape == k.shape and got_v.shape == v.shape
    for bad in (-1, 1.5):
        with pytest.raises(ValueError, match="d_value must be an integer, 0 or more, got"):
            make(1, 2, 1, 8, 5, d_value=bad)


@pytest.mark.parametrize("kind", ALL)
def test_layers_may_be_filled_in_any_order_and_the_slowest_says_how_long_it_is(kind):
    cache, steps = kind(3, 2, 3, 5), torch.randn(3, 3, 2, 2, 3, 1, 5, dtype=f64)
    once = kind(3, 2, 3, 5)
    for t in range(3):
        for layer in (0, 1, 2):
            want = once.append(layer, *steps[t, layer])
    for layer in (2, 0, 1):
        assert cache.length == 0
        for t in range(3):
            got = cache.append(layer, *steps[t, layer])
    assert cache.length == once.length == 3
    got, want = (c.append(2, *steps[0, 0]) for c in (cache, once))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_a_step_that_broke_off_is_undone_by_a_cut(kind):
    """Layer 0 has read the step, layer 1 not yet."""
    cache, steps = kind(2, 2, 3, 5), torch.randn(4, 2, 2, 3, 1, 5, dtype=f64)
    for layer in range(2):
        cache.append(layer, *steps[0])
    cache.append(0, *steps[1])
    assert cache.length == 1
    cache.truncate(1)
    got = [cache.append(layer, *steps[2])[0] for layer in range(2)]
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=0)
    assert got[0].shape[2] == 2


def test_every_cache_has_the_whole_protocol():
    names = {"length", "places", "append", "truncate", "reorder", "nbytes"}
    assert names == {name for name in vars(caches.Cache) if not name.startswith("_")}
    for kind in ALL:
        assert names <= set(dir(kind(1, 1, 1, 1)))
    assert names - {"truncate", "reorder"} <= set(dir(Packed))
