"""The tiles, held against the formula, float64 and torch, and watched while they allocate."""

import math
from collections import Counter

import pytest
import torch
from test_attention import BAD, K, Q, V
from torch.autograd import gradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heed import masks
from heed.attention import attention as by_formula
from heed.flash import tiled
from heed.flash.tiled import attention

f64 = torch.float64
LENGTHS = torch.tensor([9, 0])
TABLE = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
MASKS = {
    "full": masks.full,
    "causal": masks.causal,
    "window": masks.window(3),
    "window of one": masks.window(1),
    "padding": masks.padding(LENGTHS),
    "dense": masks.dense(TABLE),
    "both": masks.both(masks.causal, masks.padding(LENGTHS)),
    "either": masks.either(masks.window(2), masks.padding(torch.tensor([1, 4]))),
    "a predicate": lambda b, h, i, j: (i + 2 * j + h) % 3 > b,
    "nobody": lambda b, h, i, j: (j < 0) & (i < 0),
}


def qkv(B=2, H=4, G=2, T=9, S=9, D=5, Dv=6, dtype=f64, random_seed=0):
    draw = torch.Generator().manual_seed(random_seed)
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, Dv)
    return [torch.randn(s, dtype=f64, generator=draw).to(dtype).requires_grad_() for s in shapes]


def out_and_gradients(function, inputs, *args, do=None, **options):
    """What comes out, and what comes back for every input (the last may be a bias)."""
    q, k, v, *bias = inputs
    if bias:
        options["bias"] = bias[0]
    out = function(q, k, v, *args, **options)
    if do is None:
        do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=f64)
    return [out.detach(), *torch.autograd.grad(out, inputs, do.to(out.dtype))]


def assert_same(ours, theirs, tol=1e-12):
    for have, want in zip(ours, theirs, strict=True):
        assert have.isfinite().all()
        assert have.dtype == want.dtype
        limit = tol * max(1.0, float(want.abs().max())) if want.numel() else 0
        torch.testing.assert_close(have, want, rtol=0, atol=limit)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 9, 64])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_and_every_tile_gives_the_formula_and_its_gradients(name, block):
    inputs = qkv()
    ours = out_and_gradients(attention, inputs, MASKS[name], block=block)
    assert_same(ours, out_and_gradients(by_formula, inputs, MASKS[name]))


@pytest.mark.parametrize("mask", [masks.full, masks.causal, masks.window(3)])
@pytest.mark.parametrize(
    ("T", "S"), [(1, 9), (4, 9), (9, 4), (9, 1), (7, 6), (0, 9), (9, 0), (0, 0)]
)
def test_queries_are_the_last_positions_however_many_there_are(mask, T, S):
    for block in (1, 3, 64):
        inputs = qkv(T=T, S=S)
        ours = out_and_gradients(attention, inputs, mask, block=block)
        assert_same(ours, out_and_gradients(by_formula, inputs, mask))


@pytest.mark.parametrize("length", [1, 65, 97])
@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (6, 1)])
def test_awkward_lengths_and_grouped_heads(length, heads):
    inputs = qkv(H=heads[0], G=heads[1], T=length, S=length, D=11, Dv=7)
    ours = out_and_gradients(attention, inputs, masks.causal, block=32)
    assert_same(ours, out_and_gradients(by_formula, inputs, masks.causal))
    default = out_and_gradients(attention, inputs, masks.causal)
    assert_same(default, ours)


def test_torch_gives_the_same():
    q, k, v = (x.detach() for x in qkv(T=40, S=40))
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_same([attention(q, k, v, masks.causal, block=16)], [theirs])


@pytest.mark.parametrize("mask", [masks.full, masks.causal, MASKS["a predicate"]])
def test_gradients_are_those_of_finite_differences(mask):
    q, k, v = qkv(H=4, G=2, T=4, S=3, D=3, Dv=2)  # T > S: causal leaves a row without a key
    bias = torch.randn(4, 1, 3, dtype=f64, requires_grad=True)
    for block in (2, 64):
        call = lambda q, k, v, bias: attention(q, k, v, mask, bias=bias, block=block)  # noqa: B023, E731
        assert gradcheck(call, (q, k, v, bias), eps=1e-6, atol=1e-7)


def test_a_second_derivative_is_refused_aloud():
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)


SHAPES = [(9,), (1, 9), (9, 1), (9, 9), (4, 1, 1), (4, 9, 9), (2, 1, 9, 9), (2, 4, 9, 9), (1,), ()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [2, 64])
def test_a_bias_that_is_a_tensor_is_added_and_gets_its_gradient(shape, block):
    bias = torch.randn(shape, dtype=f64, requires_grad=True)
    inputs = [*qkv(), bias]
    ours = out_and_gradients(attention, inputs, masks.causal, block=block)
    assert ours[-1].shape == shape
    assert_same(ours, out_and_gradients(by_formula, inputs, masks.causal))


def test_a_bias_for_two_queries_and_two_keys_is_cut_into_tiles_of_one():
    inputs = [*qkv(T=2, S=2), torch.randn(2, 2, dtype=f64, requires_grad=True)]
    ours = out_and_gradients(attention, inputs, block=1)
    assert_same(ours, out_and_gradients(by_formula, inputs))


def test_the_gradient_of_an_expanded_or_transposed_bias_is_right():
    small, tall = (torch.randn(s, dtype=f64, requires_grad=True) for s in ((4, 1, 9), (9, 9, 4)))
    for make in (lambda: small.expand(4, 9, 9), lambda: tall.transpose(0, 2)):
        ours = out_and_gradients(lambda *x, **o: attention(*x, bias=make(), block=4), qkv())  # noqa: B023
        theirs = out_and_gradients(lambda *x, **o: by_formula(*x, bias=make()), qkv())  # noqa: B023
        assert_same(ours, theirs)
    leaf = tall if tall.grad is None else tall
    for function in (attention, by_formula):
        leaf.grad = None
        function(*qkv(), bias=leaf.transpose(0, 2)).square().sum().backward()
        first = leaf.grad if function is attention else first
    assert_same([first], [leaf.grad])


def test_a_bias_may_be_a_function_of_the_positions():
    slopes = torch.tensor([0.5, 0.25, 0.125, 2.0], dtype=f64)

    def alibi(b, h, i, j):
        return slopes[h] * (j - i)

    ours = out_and_gradients(attention, qkv(), masks.causal, bias=alibi, block=4)
    assert_same(ours, out_and_gradients(by_formula, qkv(), masks.causal, bias=alibi))


def test_a_bias_of_minus_infinity_leaves_a_row_dead():
    bias = torch.zeros(9, 9, dtype=f64)
    bias[3], bias[5, :4] = -math.inf, -math.inf
    for block in (1, 2, 64):
        ours = out_and_gradients(attention, qkv(), bias=bias, block=block)
        assert_same(ours, out_and_gradients(by_formula, qkv(), bias=bias))
        assert (ours[0][:, :, 3] == 0).all() and (ours[1][:, :, 3] == 0).all()


def test_a_bias_function_that_wants_a_gradient_is_refused_and_not_forgotten():
    slopes = torch.ones(4, dtype=f64, requires_grad=True)

    def learned(b, h, i, j):
        return slopes[h] * (j - i)

    with pytest.raises(ValueError, match="as a tensor"):
        attention(*qkv(), bias=learned)
    with torch.no_grad():
        assert_same([attention(*qkv(), bias=learned)], [by_formula(*qkv(), bias=learned)])


@pytest.mark.parametrize("block", [1, 2, 64])
def test_a_query_that_may_read_nothing_gets_zeros_and_sends_none_back(block):
    mask = masks.both(masks.causal, lambda b, h, i, j: (i % 4 > 0) & (j > 1))
    out, d_q, d_k, d_v = out_and_gradients(attention, qkv(), mask, block=block)
    dead = [0, 1, 4, 8]
    assert (out[:, :, dead] == 0).all() and (d_q[:, :, dead] == 0).all()
    assert (d_k[:, :, :2] == 0).all() and (d_v[:, :, :2] == 0).all()
    assert (out[:, :, 2] != 0).all() and (d_v[:, :, 3] != 0).all()


def test_the_log_sum_exp_is_the_one_of_the_scores_and_minus_infinity_without_a_key():
    q, k, v = (x.detach() for x in qkv(T=9, S=7, G=4))
    scores = q @ k.mT / math.sqrt(5)
    table = masks.table(masks.causal, 2, 4, 9, 7)
    want = scores.masked_fill(~table, -math.inf).logsumexp(-1)
    for block in (1, 3, 64):
        o, lse = tiled.forward(q, k, v, masks.causal, block=block)
        assert (lse[:, :, :2] == -math.inf).all()
        torch.testing.assert_close(lse, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(o, by_formula(q, k, v, masks.causal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", [math.nan, 1e30, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_what_hides_behind_the_mask_changes_nothing_not_even_a_bit(what, dtype):
    later = masks.both(masks.causal, lambda b, h, i, j: j != 5)  # nobody reads 5
    do = torch.randn(2, 4, 9, 6, generator=torch.Generator().manual_seed(2))
    for mask, blocks in {
        later: (1, 2, 4, 64),
        masks.padding(torch.tensor([5, 5])): (2, 64),
    }.items():
        for block in blocks:
            clean = qkv(dtype=dtype)
            dirty = [x.detach().clone() for x in clean]
            for x in dirty[1:]:
                x[:, :, 5] = what
            dirty = [x.requires_grad_() for x in dirty]
            ours = out_and_gradients(attention, dirty, mask, do=do, block=block)
            for have, want in zip(
                ours, out_and_gradients(attention, clean, mask, do=do, block=block), strict=True
            ):
                assert torch.equal(have, want)


@pytest.mark.parametrize("what", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_nobody_before_it_notices_a_spoilt_position(what, block):
    """Causal: output and gradients of 0 to 5 are theirs alone, if nobody asks about 6."""
    clean = qkv()
    dirty = [x.detach().clone() for x in clean]
    for x in dirty:
        x[:, :, 6] = what
    outs = []
    for inputs in (clean, [x.requires_grad_() for x in dirty]):
        out = attention(*inputs, masks.causal, block=block)
        outs.append([out[:, :, :6], *torch.autograd.grad(out[:, :, :6].square().sum(), inputs)])
    for have, want in zip(*reversed(outs), strict=True):
        if have.shape[2] == 6:
            assert torch.equal(have, want)
    if what == 1e30:  # a zero times NaN is NaN for the row that reads itself, but not beyond it
        return
    alone = attention(*dirty, masks.causal, block=block)
    assert alone[:, :, :6].isfinite().all() and not alone[:, :, 6].isfinite().any()


@pytest.mark.parametrize("block", [1, 4, 64])
def test_keys_that_a_spoilt_query_may_not_read_get_clean_gradients(block):
    clean = qkv()
    dirty = [clean[0].detach().clone(), *clean[1:]]
    dirty[0][:, :, 6] = math.nan
    do = torch.randn(2, 4, 9, 6, dtype=f64)
    do[:, :, 6] = 0
    ours, theirs = (
        out_and_gradients(
            attention, [x.requires_grad_() for x in inputs], masks.causal, do=do, block=block
        )
        for inputs in (dirty, clean)
    )
    for have, want in zip(ours, theirs, strict=True):
        assert torch.equal(have[:, :, 7:], want[:, :, 7:])


def test_a_key_that_is_read_and_is_not_finite_is_not_hidden_away():
    q, k, v = qkv()
    v = v.detach().clone()
    v[:, :, 2, 1] = math.nan
    for block in (1, 4, 64):
        out = attention(q, k, v, masks.causal, block=block)
        assert out[:, :, 2:, 1].isnan().all() and out[:, :, :2].isfinite().all()
        assert out[:, :, :, [0, 2, 3, 4, 5]].isfinite().all()


def test_a_maximum_that_rises_in_the_last_tile_shrinks_the_earlier_sums():
    q = torch.ones(1, 1, 1, 1, dtype=f64)
    k = torch.tensor([1.0, 2, 3, 4, 5, 6, 7], dtype=f64).log().view(1, 1, 7, 1)
    v = torch.eye(7, dtype=f64)[None, None]
    want = torch.tensor([n / 28 for n in range(1, 8)], dtype=f64)
    for keys in (k, k.flip(2)):
        out = attention(q, keys, v, block=2).flatten()
        torch.testing.assert_close(out if keys is k else out.flip(0), want, rtol=0, atol=1e-15)
    q, k, v = (x.detach() for x in qkv(T=3))
    k[:, :, -1] = 300 * q[:, ::2, -1]  # far above what the tiles before have seen
    assert_same([attention(q, k, v, block=2)], [by_formula(q, k, v)])


def test_scale_zero_is_the_mean_and_a_negative_scale_is_honoured():
    for scale in (0, 0.0, -2.0, 0.3):
        ours = out_and_gradients(attention, qkv(), masks.causal, scale=scale, block=4)
        assert_same(ours, out_and_gradients(by_formula, qkv(), masks.causal, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [17, 257])
def test_short_types_lose_at_most_twice_what_the_plain_formula_loses(dtype, length):
    inputs = qkv(H=4, G=4, T=length, S=length, D=32, Dv=32, dtype=dtype)
    exact = out_and_gradients(by_formula, [x.double() for x in inputs], masks.causal)

    def plain(q, k, v, mask, turn=lambda x: x):
        hide = ~masks.table(mask, *q.shape[:3], k.shape[2])
        return turn((turn(q @ k.mT) * 32**-0.5).masked_fill(hide, -math.inf).softmax(-1)) @ v

    def other(q, k, v, mask):
        hide = ~masks.table(mask, *q.shape[:3], k.shape[2])
        return ((q * 32**-0.5) @ k.mT).masked_fill(hide, -math.inf).softmax(-1) @ v

    two = [out_and_gradients(f, inputs, masks.causal) for f in (plain, other)]
    for block in (16, 64):
        ours = out_and_gradients(attention, inputs, masks.causal, block=block)
        for n, (have, want, *theirs) in enumerate(zip(ours, exact, *two, strict=True)):
            assert have.dtype == dtype and have.isfinite().all()
            error = (have.double() - want).abs().max()
            worst = max(float((x.double() - want).abs().max()) for x in theirs)
            spacing = torch.finfo(dtype).eps * float(want.abs().max())
            limit = (2 if n == 0 else 3) * worst + 2 * spacing
            assert error <= limit, f"{error:.3g} > {limit:.3g}"


def test_sums_stay_in_float32_under_autocast_too():
    inputs = qkv(B=1, H=1, G=1, T=2, S=5000, D=4, Dv=4, dtype=torch.float32)
    want = out_and_gradients(attention, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(out_and_gradients(attention, inputs), want, strict=True):
            assert torch.equal(x, y)
    q = inputs[0]
    ones = torch.ones(1, 1, 5000, 4, dtype=torch.bfloat16)
    assert (attention(q.bfloat16() * 0, ones, ones) == 1).all()


def test_products_and_scores_beyond_the_range_stay_finite():
    big = torch.full((1, 1, 70, 64), 300.0, dtype=torch.float16)
    assert torch.equal(attention(big, big, big, block=16), big)
    q = torch.full((1, 1, 1, 1), 1e8)
    k = torch.tensor([0.0, -1e8, 1e8, 5.0]).view(1, 1, 4, 1)
    v = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4, 1)
    for block in (1, 2, 3, 64):
        assert float(attention(q, k, v, block=block)) == 3
    tiny = torch.full((1, 1, 3, 2), 1e-40)
    assert (attention(tiny, tiny, tiny, block=2) == tiny).all()


def test_strided_expanded_and_frozen_inputs_give_the_same_and_stay_as_they_were():
    draw = torch.Generator().manual_seed(0)
    for B in (1, 2):
        x = torch.randn(B, 9, 3 * 24, dtype=f64, generator=draw, requires_grad=True)
        start = x.detach().clone()

        def split(x, B=B):
            q, k, v = (y.unflatten(2, (4, 6)).transpose(1, 2) for y in x.chunk(3, -1))
            return q, k[:, ::2], v[:, 1:2].expand(B, 2, 9, 6)

        do = torch.randn(B, 9, 4, 6, dtype=f64, generator=draw).transpose(1, 2)
        one = torch.ones((), dtype=f64).expand(B, 4, 9, 6)
        for mask in (masks.causal, masks.dense(TABLE[:1, 0])):
            for d_out in (do, one):
                for block in (4, 64):
                    grads = [
                        torch.autograd.grad(f(*split(x), mask, **options), x, d_out)[0]
                        for f, options in ((attention, {"block": block}), (by_formula, {}))
                    ]
                    assert_same(grads[:1], grads[1:])
        assert torch.equal(x, start)


def test_nothing_that_is_given_is_written_to():
    inputs = qkv()
    bias = torch.randn(9, 9, dtype=f64)
    do = torch.randn(2, 4, 9, 6, dtype=f64)
    given = [x.detach() for x in inputs] + [bias, do, TABLE, LENGTHS]
    before = [x.clone() for x in given]
    for mask in (masks.dense(TABLE), masks.padding(LENGTHS)):
        out_and_gradients(attention, inputs, mask, bias=bias, do=do, block=4)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("block", [0, -1, 1.5, "64", None, True, 64.0])
def test_a_tile_of_no_rows_is_refused(block, unchecked):
    with pytest.raises(ValueError, match="block="):
        attention(*qkv(), block=block)


@pytest.mark.parametrize("number", BAD, ids=str)
def test_bad_input_is_refused_by_name(number, unchecked):
    call, words = BAD[number]
    with pytest.raises(ValueError, match=words):
        call(attention)


def test_a_list_is_not_a_tensor_and_a_tensor_is_not_a_mask(unchecked):
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        attention([[1.0]], K, V)
    with pytest.raises(TypeError, match="masks.dense"):
        attention(Q, K, V, torch.ones(5, 7, dtype=torch.bool))


class Watch(TorchDispatchMode):
    """Every piece of memory that is taken: the largest, in numbers, and the peak, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest, self.peak, self.living, self.calls = 0, 0, {}, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls[function._schema.name.removeprefix("aten::")] += 1
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        for x in tensors(out):
            storage = x.untyped_storage()
            if storage._cdata not in given:
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes() // x.element_size())
        self.living = {at: x for at, x in self.living.items() if not x[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.living.values()))
        return out


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def watched(function, n, mask=masks.causal, H=2, G=1, D=16, **options):
    inputs = qkv(B=1, H=H, G=G, T=n, S=n, D=D, Dv=D, dtype=torch.float32)
    do = torch.ones(1, H, n, D)
    with Watch() as watch:
        function(*inputs, mask, **options).backward(do)
    return watch


def test_the_watch_sees_what_the_formula_makes():
    assert watched(by_formula, 256).largest == 2 * 256 * 256
    assert watched(by_formula, 512).peak > 3 * watched(by_formula, 256).peak


@pytest.mark.parametrize("mask", [masks.full, masks.causal, lambda b, h, i, j: j <= i])
def test_no_tensor_has_as_many_numbers_as_there_are_pairs(mask):
    for block in (32, 64):
        assert watched(attention, 512, mask, block=block).largest == 2 * 512 * 16  # q is as large
    assert watched(attention, 512, mask).largest <= 2 * tiled.BLOCK**2 < 512 * 512 / 2


def test_no_tensor_as_large_is_made_for_a_bias_a_table_or_a_short_type_either():
    table = masks.dense(torch.ones(512, 512, dtype=torch.bool).tril())
    for bias in (torch.randn(512, 512), lambda b, h, i, j: (j - i).float()):
        assert watched(attention, 512, table, block=32, bias=bias).largest == 2 * 512 * 16
    half = qkv(B=1, H=2, G=1, T=512, S=512, D=16, Dv=16, dtype=torch.bfloat16)
    with Watch() as watch:
        attention(*half, masks.causal, block=32).sum().backward()
    assert watch.largest == 2 * 512 * 16


@pytest.mark.parametrize(("mask", "n"), [(masks.full, 512), (masks.causal, 1024)])
def test_memory_grows_with_the_length_and_not_with_its_square(mask, n):
    small, large = (watched(attention, m, mask, H=1, block=64).peak for m in (n, 4 * n))
    assert 2 < large / small <= 4.4


def test_keys_and_values_of_a_group_are_not_repeated_in_memory():
    q, k, v = (x.detach() for x in qkv(B=1, H=8, G=1, T=512, S=512, D=16, Dv=1))
    with Watch() as watch:
        attention(q, k, v, masks.causal, block=16)
    assert watch.largest == 8 * 512  # the output; eight times the keys would be 16 times as large


def test_tiles_that_a_band_leaves_empty_are_not_computed():
    def products(mask, n, **options):
        return watched(attention, n, mask, block=64, **options).calls["baddbmm_"]

    rows = 8
    every = products(masks.full, 64 * rows)
    assert every == 4 * rows**2  # o, dq, dk and dv, each tile once
    for causal in (masks.causal, lambda b, h, i, j: j <= i, masks.both(masks.full, masks.causal)):
        assert products(causal, 64 * rows) == 4 * rows * (rows + 1) / 2
    short, long = (products(masks.window(64), 64 * n) for n in (rows, 2 * rows))
    assert short <= 4 * 2 * rows and long <= 2 * short + 4
    assert products(masks.padding(torch.tensor([100])), 64 * rows) == 4 * 2 * rows


def test_a_band_is_asked_about_its_edges_alone():
    class Asked(masks.window):
        times = 0

        def __call__(self, b, h, i, j):
            type(self).times += 1
            return super().__call__(b, h, i, j)

    mask = Asked(300)
    with torch.no_grad():
        attention(*qkv(B=1, T=1024, S=1024), mask, block=64)
    assert 16 <= Asked.times <= 3 * 16  # of about 6 x 16 tiles
