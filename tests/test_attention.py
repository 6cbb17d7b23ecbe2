"""The reference, held against exact fractions, torch, and the inputs that break other libraries."""

import math
from fractions import Fraction

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention

from heed import masks
from heed.attention import additive, attention, softmax, weights

f64 = torch.float64


def qkv(B=2, H=6, G=3, T=5, S=7, D=11, Dv=13, dtype=f64, random_seed=0):
    draw = torch.Generator().manual_seed(random_seed)
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, Dv)
    return [torch.randn(s, dtype=f64, generator=draw).to(dtype) for s in shapes]


def by_loops(q, k, v, mask, scale=None):
    """One pair at a time, in Python floats."""
    (B, H, T, D), (_, G, S, Dv) = q.shape, v.shape
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(B, H, T, Dv, dtype=f64)
    table = masks.table(mask, B, H, T, S)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                keys = [s for s in range(S) if table[b, h, t, s]]
                e = [math.exp(scale * float(q[b, h, t] @ k[b, g, s])) for s in keys]
                for s, x in zip(keys, e, strict=True):
                    out[b, h, t] += x / sum(e) * v[b, g, s]
    return out


@pytest.mark.parametrize("mask", [masks.full, masks.causal, masks.window(2)])
@pytest.mark.parametrize(("T", "S"), [(5, 7), (1, 3), (4, 4), (7, 5)])
def test_every_pair_by_itself_gives_the_same(mask, T, S):
    q, k, v = qkv(T=T, S=S)
    torch.testing.assert_close(
        attention(q, k, v, mask), by_loops(q, k, v, mask), rtol=0, atol=1e-12
    )


def test_logits_that_are_logarithms_give_exact_fractions():
    q, k = torch.ones(1, 1, 1, 1, dtype=f64), torch.tensor([1.0, 2, 3], dtype=f64).log()
    w = weights(q, k.view(1, 1, 3, 1))
    want = [float(Fraction(n, 6)) for n in (1, 2, 3)]
    torch.testing.assert_close(w.flatten(), torch.tensor(want, dtype=f64), rtol=0, atol=1e-15)


def test_the_worked_example_of_three_tokens():
    x = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=f64)[None, None]
    v = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=f64)[None, None]
    want = torch.tensor([[3.0, 4.0], [3.4067, 4.4067], [3.5105, 4.5105]], dtype=f64)
    torch.testing.assert_close(attention(x, x, v)[0, 0], want, rtol=0, atol=5e-5)
    want = torch.tensor([[1.0, 2.0], [2.3395, 3.3395], [3.5105, 4.5105]], dtype=f64)
    torch.testing.assert_close(attention(x, x, v, masks.causal)[0, 0], want, rtol=0, atol=5e-5)


def test_torch_gives_the_same_with_masks_and_grouped_heads():
    q, k, v = qkv(T=7)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, masks.causal), theirs, rtol=0, atol=1e-12)


def test_weights_times_values_is_attention():
    q, k, v = qkv(G=6)
    torch.testing.assert_close(
        weights(q, k, masks.causal) @ v, attention(q, k, v, masks.causal), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("mask", [masks.full, masks.causal])
def test_gradients_are_right_with_dead_rows_and_grouped_heads(mask):
    q, k, v = (x.requires_grad_() for x in qkv(H=4, G=2, T=4, S=3, D=3, Dv=2))  # T > S: dead rows
    assert gradcheck(lambda *x: attention(*x, mask), (q, k, v), eps=1e-6, atol=1e-7)


def test_a_query_that_may_read_nothing_gets_zeros_and_sends_none_back():
    q, k, v = (x.requires_grad_() for x in qkv(B=1, T=5, S=3))
    out = attention(q, k, v, masks.causal)
    out.sum().backward()
    assert (out[:, :, :2] == 0).all() and (q.grad[:, :, :2] == 0).all()
    assert (out[:, :, 2:] != 0).all() and q.grad.isfinite().all()
    dead = attention(q, k, v, masks.dense(torch.zeros(3, dtype=torch.bool)))
    q.grad = None
    dead.sum().backward()
    assert (dead == 0).all() and (q.grad == 0).all()


def test_a_bias_of_minus_infinity_on_every_key_is_a_dead_row_too():
    q, k, v = (x.requires_grad_() for x in qkv(B=1))
    bias = torch.zeros(5, 7, dtype=f64)
    bias[1] = -math.inf
    out = attention(q, k, v, bias=bias)
    out.sum().backward()
    assert (out[:, :, 1] == 0).all() and q.grad.isfinite().all()


def test_what_hides_behind_the_mask_changes_nothing_not_even_a_bit():
    q, k, v = qkv(B=1, T=5, S=5, dtype=torch.float32)
    results = []
    for poison in (0.0, 1e30):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 4], v2[:, :, 4] = poison, poison
        x = [y.clone().requires_grad_() for y in (q, k2, v2)]
        out = attention(*x, masks.window(2))[:, :, :4]
        out.sum().backward()
        results.append([out, *(y.grad for y in x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_constant_added_to_a_row_of_scores_changes_nothing():
    q, k, v = qkv()
    row = torch.arange(5, dtype=f64)[:, None]
    torch.testing.assert_close(attention(q, k, v, bias=row), attention(q, k, v), rtol=0, atol=1e-12)


def test_a_bias_may_be_a_function_of_the_positions():
    q, k, v = qkv()
    near = attention(q, k, v, bias=lambda b, h, i, j: -0.5 * (i - j).abs().to(f64))
    i, j = torch.arange(2, 7)[:, None], torch.arange(7)
    table = -0.5 * (i - j).abs().to(f64)
    torch.testing.assert_close(near, attention(q, k, v, bias=table), rtol=0, atol=0)
    assert (near - attention(q, k, v)).abs().max() > 0.1


def test_scale_zero_is_the_mean_and_a_negative_scale_is_honoured():
    q, k, v = qkv(G=6)
    mean = v.mean(2, keepdim=True).expand(-1, -1, 5, -1)
    torch.testing.assert_close(attention(q, k, v, scale=0.0), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        attention(q, k, v, scale=-1.0), attention(-q, k, v, scale=1.0), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_loses_at_most_twice_what_the_plain_formula_loses(dtype):
    q, k, v = qkv(G=6, T=65, S=65, D=64, Dv=64, dtype=dtype)
    exact = attention(q.double(), k.double(), v.double())
    plain = (q @ k.mT / 8).softmax(-1) @ v
    ours, theirs = ((x.double() - exact).abs().max() for x in (attention(q, k, v), plain))
    assert attention(q, k, v).dtype == dtype
    assert ours <= 2 * theirs + 2 * torch.finfo(dtype).eps


def test_products_beyond_the_range_of_half_precision_stay_finite():
    q = torch.full((1, 1, 1, 64), 300.0, dtype=torch.float16)
    out = attention(q, q, torch.ones(1, 1, 1, 2, dtype=torch.float16))
    assert torch.equal(out, torch.ones_like(out))


def test_five_thousand_equal_scores_in_bfloat16_give_the_mean():
    q, v = torch.zeros(1, 1, 1, 8).bfloat16(), torch.ones(1, 1, 5000, 1).bfloat16()
    out = attention(q, torch.zeros(1, 1, 5000, 8).bfloat16(), v)
    assert out.item() == 1.0


def test_scores_of_ten_to_the_sixteen_pick_their_key():
    q = torch.tensor([[[[1e8]]]], dtype=f64)
    k, v = torch.tensor([1e8, 0.9e8, -1e8], dtype=f64), torch.tensor([5.0, 7, 9], dtype=f64)
    assert attention(q, k.view(1, 1, 3, 1), v.view(1, 1, 3, 1)).item() == 5.0


def test_subnormal_inputs_are_finite_and_right():
    q, k, v = (x * 1e-310 for x in qkv(G=6))
    want = v.mean(2, keepdim=True).expand(-1, -1, 5, -1)
    torch.testing.assert_close(attention(q, k, v), want, rtol=0, atol=1e-320)


def test_no_query_gives_nothing_and_no_key_gives_zeros():
    assert attention(*qkv(T=0)).shape == (2, 6, 0, 13)
    out = attention(*qkv(S=0))
    assert out.shape == (2, 6, 5, 13) and (out == 0).all()


def test_strided_inputs_give_the_same_and_stay_as_they_were():
    q, k, v = qkv()
    before = [x.clone() for x in (q, k, v)]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attention(*strided), attention(q, k, v), rtol=0, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_softmax_is_a_distribution_and_torchs():
    s = torch.randn(3, 5, dtype=f64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(softmax(s), s.softmax(-1), rtol=0, atol=1e-15)
    torch.testing.assert_close(softmax(s, temperature=0.5), (2 * s).softmax(-1), rtol=0, atol=1e-14)
    assert softmax(s + 1000).isfinite().all()


def test_additive_attention_by_loops():
    draw = torch.Generator().manual_seed(0)
    q, k, v, w = (
        torch.randn(s, dtype=f64, generator=draw) for s in ((2, 3, 5), (2, 4, 5), (2, 4, 7), 5)
    )
    want = torch.zeros(2, 3, 7, dtype=f64)
    for b in range(2):
        for t in range(3):
            s = torch.stack([w @ torch.tanh(q[b, t] + k[b, j]) for j in range(4)])
            want[b, t] = s.softmax(0) @ v[b]
    torch.testing.assert_close(additive(q, k, v, w), want, rtol=0, atol=1e-12)
    assert (additive(q, k[:, :0], v[:, :0], w) == 0).all()


Q, K, V = qkv()
BAD = {  # of the formula and of its twins
    1: (lambda attend: attend(Q[0], K, V), r"q .*\(6, 5, 11\)"),
    "1 flat": (lambda attend: attend(Q, K.flatten(), V), r"k .*\(462,\)"),
    "1 five": (lambda attend: attend(Q, K, V[None]), r"v .*\(1, 2, 3, 7, 13\)"),
    2: (lambda attend: attend(Q, K[:, :, :5], V), "5 keys but 7 values"),
    3: (lambda attend: attend(Q[..., :9], K, V), "9 and 11"),
    "3 zero": (lambda attend: attend(Q[..., :0], K[..., :0], V), "0 and 0"),
    4: (lambda attend: attend(Q[:1], K, V), "batch 1.*batch 2"),
    "4 v": (lambda attend: attend(Q, K, V[:1]), "batch 2.*batch 1"),
    5: (lambda attend: attend(Q[:, :4], K, V), "4 query heads cannot share 3"),
    "5 more": (lambda attend: attend(Q[:, :1], K, V), "1 query heads cannot share 3"),
    6: (lambda attend: attend(Q, K, V[:, :1]), "3 key heads but 1 value"),
    7: (lambda attend: attend(Q[:, :0], K, V), "0 query heads"),
    8: (lambda attend: attend(Q.transpose(1, 2), K.transpose(1, 2), V.transpose(1, 2)), "heads"),
    9: (lambda attend: attend(Q.float(), K, V), "float32 and torch.float64"),
    "9 v": (lambda attend: attend(Q, K, V.float()), "float64 and torch.float32"),
    10: (lambda attend: attend(Q.long(), K.long(), V.long()), "int64"),
    "10 complex": (lambda attend: attend(Q + 0j, K + 0j, V + 0j), "complex128"),
    11: (lambda attend: attend(Q, K.to("meta"), V), "cpu and meta"),
    13: (lambda attend: attend(Q, K, V, lambda b, h, i, j: j.int()), "int32"),
    14: (lambda attend: attend(Q, K, V, masks.dense(torch.ones(5, 8).bool())), r"\(5, 8\)"),
    "14 lengths": (lambda attend: attend(Q, K, V, masks.padding(torch.ones(3).int())), "3 lengths"),
    15: (lambda attend: attend(Q, K, V, bias=torch.zeros(5, 7)), "float64, got torch.float32"),
    "15 wide": (lambda attend: attend(Q, K, V, bias=torch.zeros(5, 8, dtype=f64)), r"\(5, 8\)"),
    "15 tall": (
        lambda attend: attend(Q, K, V, bias=torch.zeros(1, 2, 6, 5, 7, dtype=f64)),
        "broadcast",
    ),
    "15 function": (lambda attend: attend(Q, K, V, bias=lambda b, h, i, j: j), "floating"),
    16: (lambda attend: attend(Q, K, V, bias=torch.full((7,), math.nan, dtype=f64)), "NaN"),
    "16 inf": (lambda attend: attend(Q, K, V, bias=torch.full((7,), math.inf, dtype=f64)), "inf"),
    "16 function": (
        lambda attend: attend(Q, K, V, bias=lambda b, h, i, j: (j * math.nan).double()),
        "NaN",
    ),
    17: (lambda attend: attend(Q, K, V, scale=math.nan), "nan"),
}
OTHERS = {
    "17 inf": (lambda: weights(Q, K, scale=math.inf), "inf"),
    98: (lambda: additive(Q[0], K[0], V[0], Q[0, 0, 0]), "batches differ: 6, 3"),
    "98 rank": (lambda: additive(Q, K[0], V[0], Q[0, 0, 0]), "additive needs"),
    "98 width": (lambda: additive(K[0, :, :, :9], K[0], V[0], Q[0, 0, 0]), "9, 11"),
    "98 keys": (lambda: additive(K[0], K[0, :, :2], V[0], Q[0, 0, 0]), "2 keys but 7"),
    "temperature 0": (lambda: softmax(Q, temperature=0.0), "got 0"),
    "temperature nan": (lambda: softmax(Q, temperature=math.nan), "nan"),
    "integer scores": (lambda: softmax(torch.arange(3)), "int64"),
}


@pytest.mark.parametrize("number", BAD, ids=str)
def test_bad_input_is_refused_by_name(number, unchecked):
    call, words = BAD[number]
    with pytest.raises(ValueError, match=words):
        call(attention)


@pytest.mark.parametrize("number", OTHERS, ids=str)
def test_bad_input_of_the_other_functions_is_refused_by_name(number, unchecked):
    call, words = OTHERS[number]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_list_is_not_a_tensor_and_a_tensor_is_not_a_mask(unchecked):
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        attention([[1.0]], K, V)
    with pytest.raises(TypeError, match="masks.dense"):
        attention(Q, K, V, torch.ones(5, 7, dtype=torch.bool))
