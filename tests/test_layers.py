"""Norms, activations and feed-forward networks, held against torch, exact fractions and float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from heed.layers import MLP, LayerNorm, RMSNorm, SwiGLU, gated_width, gelu, gelu_tanh, swish

f64 = torch.float64
NORMS = [LayerNorm, RMSNorm]
BENDS = [gelu, gelu_tanh, swish]


def drawn(module):
    """All parameters random: ones and zeros would hide a weight or a bias that is forgotten."""
    torch.manual_seed(3)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


def theirs(x, norm):
    """torch's own norm with our weights."""
    if isinstance(norm, LayerNorm):
        return F.layer_norm(x, (norm.width,), norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, (norm.width,), norm.weight, norm.eps)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (0, 7), (2, 0, 7)])
def test_a_norm_is_torchs_norm(kind, shape):
    norm, x = drawn(kind(7)).double(), torch.randn(shape, dtype=f64)
    torch.testing.assert_close(norm(x), theirs(x, norm), rtol=0, atol=1e-12)


def test_the_defaults_are_ones_and_zeros_and_the_usual_eps():
    layer, rms = LayerNorm(4), RMSNorm(4)
    assert layer.weight.tolist() == rms.weight.tolist() == [1, 1, 1, 1]
    assert layer.bias.tolist() == [0, 0, 0, 0] and len(list(rms.parameters())) == 1
    assert (layer.eps, rms.eps) == (1e-5, 1e-6)
    assert (repr(layer), repr(RMSNorm(3, 0.5))) == (
        "LayerNorm(4, eps=1e-05)",
        "RMSNorm(3, eps=0.5)",
    )


def test_rows_whose_variance_is_a_perfect_square_come_out_as_fractions():
    x = torch.tensor([[1, 2, 4, 5], [-4, -3, 3, 4]], dtype=f64)  # 10 / 4 no, 50 / 4 no
    x[0] = torch.tensor([1, 1, 5, 5])  # mean 3, variance 4
    x[1] = torch.tensor([1, 7, 1, 7])  # mean 4, variance 9; mean square 25
    want = torch.tensor([[-1, -1, 1, 1], [-1, 1, -1, 1]], dtype=f64)
    torch.testing.assert_close(LayerNorm(4, eps=1e-15).double()(x), want, rtol=0, atol=1e-12)
    got = RMSNorm(4, eps=1e-15).double()(x[1])
    torch.testing.assert_close(got, x[1] / 5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", NORMS)
def test_gradients_are_those_of_finite_differences(kind):
    norm, x = drawn(kind(5)).double(), torch.randn(3, 5, dtype=f64, requires_grad=True)
    x.data[1] = 2.0  # a constant row too
    torch.autograd.gradcheck(norm, x, eps=1e-6, atol=1e-7)
    for p in norm.parameters():
        torch.autograd.gradcheck(lambda _: norm(x.detach()), p, eps=1e-6, atol=1e-7)  # noqa: B023


@pytest.mark.parametrize("kind", NORMS)
def test_a_token_is_normed_alone_whoever_stands_beside_it(kind):
    norm, x = drawn(kind(6)), torch.randn(2, 5, 6)
    other = x.clone()
    other[1, 3] += 1
    assert torch.equal(norm(x)[0], norm(other)[0])
    same = [0, 1, 2, 4]
    assert torch.equal(norm(x)[1, same], norm(other)[1, same])
    assert not torch.equal(norm(x)[1, 3], norm(other)[1, 3])


def test_the_variance_is_taken_in_two_passes():
    """Near 1,000 the mean square and the squared mean share all the digits that float32 has."""
    noise = torch.randn(8, 64)
    for offset, limit in ((1.0, 1e-6), (1e3, 3e-4), (1e5, 3e-2)):
        x = noise + offset
        want = F.layer_norm(x.double(), (64,))
        one_pass = (x - x.mean(-1, keepdim=True)) * (
            x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square() + 1e-5
        ).rsqrt()
        assert (LayerNorm(64)(x) - want).abs().max() < limit
        assert offset == 1 or not (one_pass - want).abs().max() < 30 * limit


def test_a_constant_row_gives_the_bias_and_a_zero_row_stays_finite():
    norm, rms = drawn(LayerNorm(6)), drawn(RMSNorm(6))
    for value in (0.0, 3.0, -1000.0):
        x = torch.full((1, 6), value)
        assert torch.equal(norm(x)[0], norm.bias)
    zero = torch.zeros(1, 6, requires_grad=True)
    assert torch.equal(rms(zero), torch.zeros(1, 6))
    (norm(zero).sum() + rms(zero).sum()).backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_half_precision_is_squared_in_float32(kind, dtype):
    norm = drawn(kind(33)).to(dtype)
    for size in (1.0, 3e4):  # 3e4 squared is beyond float16
        x = (torch.randn(9, 33).clamp(-2, 2) * size).to(dtype)
        got = norm(x)
        assert got.dtype == dtype and got.isfinite().all()
        want = theirs(x.double(), kind(33).double())
        weight = norm.weight.double()
        want = want * weight + (norm.bias.double() if kind is LayerNorm else 0)
        limit = 2 * torch.finfo(dtype).eps * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=limit)


def test_the_result_has_the_dtype_of_the_tokens_and_the_digits_of_the_better_one():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for kind in NORMS:
        assert kind(8)(x).dtype == torch.bfloat16
        assert kind(8).double()(x.double()).dtype == f64


def test_scaling_a_row_changes_nothing_and_shifting_it_nothing_for_layer_norm_only():
    x = torch.randn(3, 7, dtype=f64)
    layer, rms = LayerNorm(7, eps=1e-14).double(), RMSNorm(7, eps=1e-14).double()
    torch.testing.assert_close(layer(40 * x), layer(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x + 40), layer(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(rms(40 * x), rms(x), rtol=0, atol=1e-10)
    assert (rms(x + 40) - rms(x)).abs().max() > 0.1
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(rms(centred), layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_refuses_what_it_cannot_norm(kind, unchecked):
    with pytest.raises(ValueError, match=r"x must be 8 wide in its last axis, got \(2, 7\)"):
        kind(8)(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"8 wide in its last axis, got \(\)"):
        kind(8)(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"8 wide in its last axis, got \(2, 1\)"):
        kind(8)(torch.randn(2, 1))  # would broadcast
    with pytest.raises(ValueError, match="floating point, got torch.int64"):
        kind(8)(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        kind(2)([1.0, 2.0])
    for width in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"width must be a positive integer, got {width}"):
            kind(width)
    for eps in (0.0, -1e-5, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps must be positive and finite"):
            kind(8, eps)


def test_activations_are_torchs():
    x = torch.linspace(-9, 9, 1001, dtype=f64)
    for ours, want in (
        (gelu(x), F.gelu(x)),
        (gelu_tanh(x), F.gelu(x, approximate="tanh")),
        (swish(x), F.silu(x)),
    ):
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-14)


def test_the_two_gelus_differ_by_between_four_and_five_ten_thousandths():
    x = torch.linspace(-9, 9, 10_001, dtype=f64)
    assert 4e-4 < (gelu(x) - gelu_tanh(x)).abs().max() < 5e-4


def test_gelu_keeps_its_digits_in_the_tail():
    for x in (-6.0, -12.0, -30.0):
        tail = x * math.erfc(-x / math.sqrt(2)) / 2
        got = gelu(torch.tensor([x], dtype=f64)).item()
        assert math.isclose(got, tail, rel_tol=1e-12) and got < 0


@pytest.mark.parametrize("bend", BENDS)
def test_activations_have_the_right_slope_and_stay_finite_far_out(bend):
    x = torch.linspace(-4, 4, 9, dtype=f64, requires_grad=True)
    torch.autograd.gradcheck(bend, x, eps=1e-6, atol=1e-7)
    for dtype in (torch.float16, torch.float32):
        far = torch.tensor([-300.0, 0.0, 300.0], dtype=dtype)
        assert bend(far).tolist() == [0, 0, 300] and bend(far).dtype == dtype


@pytest.mark.parametrize("bend", BENDS)
def test_an_activation_refuses_whole_numbers_and_lists(bend, unchecked):
    with pytest.raises(ValueError, match="floating point, got torch.int64"):
        bend(torch.arange(3))
    with pytest.raises(TypeError, match="must be a tensor, got float"):
        bend(1.0)


def test_the_mlp_is_two_matrices_with_a_bend_between_them():
    for activation in (gelu_tanh, torch.relu):
        mlp, x = drawn(MLP(5, 7, activation=activation)).double(), torch.randn(2, 3, 5, dtype=f64)
        hidden = activation(x @ mlp.up.weight.T + mlp.up.bias)
        want = hidden @ mlp.down.weight.T + mlp.down.bias
        torch.testing.assert_close(mlp(x), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(mlp(x)[1, 2], mlp(x[1, 2]), rtol=0, atol=1e-12)
    assert MLP(5).d_ff == 20 and MLP(5).activation is gelu_tanh
    assert [tuple(p.shape) for p in MLP(5, bias=False).parameters()] == [(20, 5), (5, 20)]
    assert len(list(MLP(5).parameters())) == 4


def test_the_gated_network_multiplies_two_roads():
    m, x = drawn(SwiGLU(5, 7)).double(), torch.randn(2, 3, 5, dtype=f64)
    a, b = x @ m.gate.weight.T, x @ m.up.weight.T
    want = (a / (1 + torch.exp(-a)) * b) @ m.down.weight.T
    torch.testing.assert_close(m(x), want, rtol=0, atol=1e-12)
    assert [name for name, _ in m.named_parameters()] == [
        "gate.weight", "up.weight", "down.weight"
    ]  # fmt: skip


def test_the_gated_width_is_the_one_that_llama_published():
    assert gated_width(4096, 256) == 11_008  # 7B
    assert gated_width(5120, 256) == 13_824  # 13B
    assert gated_width(6656, 256) == 17_920  # 33B
    assert gated_width(8192, 256) == 22_016  # 65B
    assert gated_width(64) == 171 and gated_width(3) == 8 and gated_width(1) == 3
    for d in range(1, 200):
        for multiple in (1, 8, 256):
            f = gated_width(d, multiple)
            assert f % multiple == 0 and f >= 8 * d / 3 > f - multiple


def test_at_that_width_three_matrices_weigh_what_two_do():
    count = {kind: sum(p.numel() for p in made.parameters()) for kind, made in (
        ("mlp", MLP(96, bias=False)), ("gated", SwiGLU(96)))}  # fmt: skip
    assert count["mlp"] == count["gated"] == 8 * 96**2
    assert SwiGLU(96, multiple=64).d_ff == 256 and SwiGLU(100, multiple=64).d_ff == 320


def test_feed_forward_networks_refuse_wrong_widths_dtypes_and_sizes(unchecked):
    for made in (MLP(6), SwiGLU(6)):
        with pytest.raises(ValueError, match=r"6 wide in its last axis, got \(2, 5\)"):
            made(torch.randn(2, 5))
        with pytest.raises(ValueError, match="x is torch.float64, the weights are torch.float32"):
            made(torch.randn(2, 6, dtype=f64))
        with pytest.raises(TypeError, match="must be a tensor"):
            made([1.0] * 6)
    for kind in (MLP, SwiGLU):
        with pytest.raises(ValueError, match="d_model must be a positive integer, got 0"):
            kind(0)
        with pytest.raises(ValueError, match="d_ff must be a positive integer, got -3"):
            kind(4, -3)
    with pytest.raises(ValueError, match="d_ff 8 is given"):
        SwiGLU(4, 8, multiple=2)
    for multiple in (0, 1.5):
        with pytest.raises(ValueError, match="multiple must be a positive integer"):
            gated_width(4, multiple)
