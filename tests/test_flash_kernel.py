"""The Triton kernels held against the reference: under the interpreter, or on a GPU."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

pytest.importorskip("triton", reason="Triton exists for Linux alone")

from heed import masks
from heed.attention import attention, softmax
from heed.flash import kernel, tiled
from heed.flash.kernel import flash_backward, flash_forward

interpreter = pytest.mark.skipif(not kernel.INTERPRETED, reason="about Triton's interpreter")
DEVICE = "cpu" if kernel.INTERPRETED else "cuda"
f16, f32, bf16 = torch.float16, torch.float32, torch.bfloat16
FEW = (32, 32, 4, 2)  # Br, Bc, warps, stages


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch):
    """The same small tiles everywhere, so that nothing is tuned; a test may ask for others."""
    monkeypatch.setattr(kernel, "tuned", kernel.tuned.__wrapped__)
    force(monkeypatch, FEW)


def force(monkeypatch, *configurations):
    made = [
        kernel.triton.Config({"Br": Br, "Bc": Bc}, num_warps=warps, num_stages=stages)
        for Br, Bc, warps, stages in configurations
    ]
    monkeypatch.setattr(kernel, "configurations", lambda *asked: made)


def inputs(B=1, H=2, G=1, T=40, S=70, D=32, dtype=f32, random_seed=0):
    draw = torch.Generator().manual_seed(random_seed)
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, D), (B, H, T, D)
    return [torch.randn(shape, generator=draw).to(DEVICE, dtype) for shape in shapes]


def results(function, q, k, v, do, mask=masks.full, **more):
    """o, dq, dk, dv."""
    x = [y.detach().requires_grad_() for y in (q, k, v)]
    o = function(*x, mask, **more)
    return [o.detach(), *torch.autograd.grad(o, x, do)]


def plain(q, k, v, mask, scale, *, first):
    """The formula in the dtype of its inputs, the scale before or after the product."""
    (B, H, T, D), S = q.shape, k.shape[2]
    scale = D**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    scores = (q * scale) @ k.mT if first else (q @ k.mT) * scale
    return softmax(scores.masked_fill(~masks.table(mask, B, H, T, S, q.device), -math.inf)) @ v


def held(q, k, v, do, mask=masks.full, scale=None, times=(2, 3)):
    """Twice the worst error of the plain formula, gradients three times, and two spacings.

    dq and dk are made of differences of numbers as large as do times v: their spacing counts.
    """
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    differences = (do.double() @ values.mT).abs()
    exact = results(attention, *(x.double() for x in (q, k, v, do)), mask, scale=scale)
    ours = results(kernel.attention, q, k, v, do, mask, scale=scale)
    plains = [results(plain, q, k, v, do, mask, scale=scale, first=b) for b in (True, False)]
    for name, got, want, *others in zip(("o", "dq", "dk", "dv"), ours, exact, *plains, strict=True):
        assert got.shape == want.shape and got.dtype == q.dtype and got.device == want.device
        assert got.isfinite().all(), name
        if want.numel():
            error, *worst = ((x.double() - want).abs().max().item() for x in (got, *others))
            size = want.abs().max().item()
            if name in ("dq", "dk") and differences.numel():
                size = max(size, differences.max().item())
            limit = times[name != "o"] * max(worst) + 2 * torch.finfo(q.dtype).eps * size
            assert error <= limit, f"{name}: {error:.1e} > {limit:.1e}"
    return ours


@pytest.mark.parametrize("mask", [masks.full, masks.causal, masks.window(33)])
@pytest.mark.parametrize("dtype", [f32, f16])
def test_the_reference_gives_the_same_and_so_do_its_gradients(mask, dtype):
    held(*inputs(dtype=dtype), mask)


@pytest.mark.parametrize("mask", [masks.full, masks.causal, masks.window(9)])
@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (1, 33), (31, 32), (33, 31), (64, 64), (64, 65), (5, 97)]
)
def test_lengths_that_fill_no_tile_and_lengths_that_do(mask, T, S):
    held(*inputs(H=1, T=T, S=S, D=16), mask)


@pytest.mark.parametrize("w", [1, 31, 32, 33, 64, 65])
@pytest.mark.parametrize(("T", "S"), [(97, 97), (34, 98)])
def test_a_window_ends_inside_a_tile_or_at_its_edge(w, T, S):
    held(*inputs(H=1, T=T, S=S, D=16), masks.window(w))


@pytest.mark.parametrize("D", [1, 3, 32, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [f32, f16])
def test_any_width_up_to_256(D, dtype):
    held(*inputs(H=1, T=20, S=40, D=D, dtype=dtype), masks.causal)


@pytest.mark.parametrize("mask", [masks.causal, masks.window(40)])
def test_grouped_heads_sum_their_gradients_in_the_order_of_the_reference(mask):
    held(*inputs(B=2, H=4, G=2, T=30, S=40, D=16), mask)


def test_programs_take_eight_heads_at_a_time_and_then_the_rest():
    held(*inputs(B=3, H=3, T=33, S=33, D=16), masks.causal)


@pytest.mark.parametrize("mask", [masks.causal, masks.window(8)])
def test_a_query_without_a_key_gets_zeros_and_sends_none_back(mask):
    q, k, v, do = inputs(T=70, S=33)  # the first 37 rows; a whole tile of them, and part of one
    o, dq, _, _ = held(q, k, v, do, mask)
    assert (o[:, :, :37] == 0).all() and (dq[:, :, :37] == 0).all()
    assert (o[:, :, 37:] != 0).any(-1).all()


def test_no_key_no_query_and_no_sequence():
    for sizes in ({"S": 0}, {"T": 0}, {"B": 0}):
        for got in held(*inputs(**sizes)):
            assert (got == 0).all()
    q, k, v, _ = inputs(S=0)
    _, lse = flash_forward(q, k, v, "full", 0, 1.0)
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("mask", [masks.full, masks.causal, masks.window(20)])
def test_the_log_sum_exp_is_that_of_the_tiled_twin_to_base_2(mask):
    q, k, v, _ = inputs(T=50, S=40)
    kind, w = {"window": ("window", 20)}.get(type(mask).__name__, (None, 0))
    kind = kind or mask.__name__
    o, lse = flash_forward(q, k, v, kind, w, 32**-0.5)
    o2, lse2 = tiled.forward(q, k, v, mask)
    torch.testing.assert_close(lse * math.log(2), lse2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(o, o2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_a_scale_is_honoured_zero_and_negative_too(scale):
    held(*inputs(), masks.causal, scale)


@pytest.mark.parametrize("size", [30.0, 3e3, 1e8])
def test_scores_up_to_1e16_stay_finite_and_right(size):
    q, k, v, do = inputs(H=1, T=33, S=40, D=16)
    k[:, :, ::2] *= 1e-3  # close calls and clear ones
    exact = results(attention, *(x.double() for x in (q * size, k * size, v, do)), masks.causal)
    ours = results(kernel.attention, q * size, k * size, v, do, masks.causal)
    scores = (size * q @ (size * k).mT).abs().max().item()
    assert all(x.isfinite().all() for x in ours)
    for got, want in zip(ours, exact, strict=True) if size < 100 else ():
        largest = max(want.abs().max().item(), size)  # dq and dk are sums of terms as large as k
        limit = 4 * torch.finfo(f32).eps * scores * largest
        assert (got.double() - want).abs().max() <= limit
    # Where one key is far above the others it takes all, whatever the size.
    top = (q @ k.mT).masked_fill(~masks.table(masks.causal, 1, 1, 33, 40, q.device), -math.inf)
    first, second = top.topk(2, dim=-1).values.unbind(-1)
    clear = (first - second > 1) & (size > 100)
    taken = v.gather(2, top.argmax(-1)[..., None].expand(-1, -1, -1, 16))
    assert torch.equal(ours[0][clear], taken[clear]) and (size < 100 or clear.any())


def test_products_beyond_what_float16_holds_stay_finite():
    q, k, v, do = inputs(dtype=f16)
    assert all(x.isfinite().all() for x in results(kernel.attention, 300 * q, 300 * k, v, do))


def test_what_hides_behind_the_mask_changes_nothing_not_even_a_bit():
    q, k, v, do = inputs(H=1, T=40, S=40)
    do[:, :, 39:] = 0
    seen = []
    for poison in (0.0, 1e30):
        k[:, :, 39:], v[:, :, 39:] = poison, poison
        o, dq, dk, dv = results(kernel.attention, q, k, v, do, masks.causal)
        seen.append((o[:, :, :39], dq[:, :, :39], dk[:, :, :39], dv[:, :, :39]))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_strided_inputs_and_a_strided_gradient_give_the_same_bits_and_are_left_alone():
    plainly = inputs(B=2, H=2, G=1, T=20, S=24)
    want = results(kernel.attention, *plainly, masks.causal)
    ways = {
        "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every other number": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
        "out of step": lambda x: torch.cat([x, x[..., :1]], 3)[..., :-1],
        "one element late": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
        "columns first": lambda x: x.mT.contiguous().mT,
    }
    for name, way in ways.items():
        strided = [way(x) for x in plainly]
        before = [x.clone() for x in strided]
        got = results(kernel.attention, *strided, masks.causal)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
        assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True)), name


def test_expanded_inputs_and_the_gradient_of_a_sum():
    q, k, v, do = inputs(B=2, H=2, G=2, D=16)
    k, v = k[:1, :1].expand_as(k), v[:1, :1].expand_as(v)
    held(q, k, v, torch.ones((), device=DEVICE).expand_as(do))


def test_only_what_descriptors_cannot_read_is_copied():
    q, *_ = inputs(D=32)
    for fine in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q[..., 4:28], q[:, :, 3:]):
        assert kernel.aligned(fine) is fine
    for not_so in (q.mT, q[..., ::2], q[..., 1:], q[:1].expand(3, -1, -1, -1), q[..., :6].clone()):
        copy = kernel.aligned(not_so)
        assert copy is not not_so and torch.equal(copy, not_so)
        assert all(n % 4 == 0 for n in copy.stride()[:-1]) and copy.stride(-1) == 1


def test_merging_the_heads_of_the_output_copies_nothing():
    q, k, v, _ = inputs(B=2)
    o = kernel.attention(q, k, v).transpose(1, 2)
    assert o.reshape(2, 40, 64).data_ptr() == o.data_ptr()


@pytest.mark.parametrize("configuration", [(16, 64, 4, 2), (64, 16, 4, 1), (128, 32, 8, 2)])
@pytest.mark.parametrize("mask", [masks.full, masks.causal, masks.window(30)])
def test_other_tiles_give_the_same(monkeypatch, configuration, mask):
    force(monkeypatch, configuration)
    held(*inputs(H=2, T=100, S=130, D=16), mask)


def test_two_runs_agree_bit_for_bit():
    x = inputs(H=2, G=1, T=40)
    a, b = (results(kernel.attention, *x, masks.causal) for _ in range(2))
    assert all(torch.equal(y, z) for y, z in zip(a, b, strict=True))


def test_torch_compile_keeps_it_whole(unchecked):
    q, k, v, do = inputs()
    compiled = torch.compile(kernel.attention, fullgraph=True, backend="aot_eager")
    for mask in (masks.causal, masks.window(8)):
        want = results(kernel.attention, q, k, v, do, mask)
        got = results(compiled, q, k, v, do, mask)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_operators_are_registered_as_torch_asks():
    q, k, v, do = inputs(D=20)
    opcheck(flash_forward, (q, k, v, "causal", 0, 0.3))
    o, lse = flash_forward(q, k, v, "causal", 0, 0.3)
    opcheck(flash_backward, (do, q, k, v, o, lse, "causal", 0, 0.3))


def test_a_second_derivative_is_refused():
    q, k, v, _ = (x.requires_grad_() for x in inputs())
    (dq,) = torch.autograd.grad(kernel.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; heed.attention has"):
        dq.sum().backward()


def test_the_allocator_of_others_is_left_alone():
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    q, k, v, do = inputs()
    results(kernel.attention, q, k, v, do)
    assert _allocation._allocator.get() is before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mask": masks.padding(torch.tensor([3]))}, "padding"),
        ({"mask": masks.both(masks.causal, masks.window(3))}, "both"),
        ({"mask": lambda b, h, i, j: j <= i}, "lambda"),
        ({"dtype": torch.float64}, "float64"),
        ({"D": 257}, "257"),
        ({"Dv": 16}, "16"),
    ],
)
def test_what_the_kernel_does_not_know_it_refuses_by_name(unchecked, change, word):
    mask, Dv = change.pop("mask", masks.full), change.pop("Dv", None)
    q, k, v, _ = inputs(**change)
    with pytest.raises(ValueError, match=f"{word}.*heed.flash.tiled"):
        kernel.attention(q, k, v[..., :Dv], mask)


@interpreter
def test_bfloat16_is_refused_under_the_interpreter():
    q, k, v, _ = inputs(dtype=bf16)
    with pytest.raises(ValueError, match="bfloat16 under TRITON_INTERPRET.*heed.flash.tiled"):
        kernel.attention(q, k, v)


def test_bad_arguments_are_refused_as_everywhere(unchecked):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="70 keys but 69 values"):
        kernel.attention(q, k, v[:, :, :69])
    with pytest.raises(ValueError, match="scale must be finite"):
        kernel.attention(q, k, v, scale=math.nan)
    with pytest.raises(TypeError):
        kernel.attention(q, k, v, masks.full, bias=q)


def test_a_cpu_without_the_interpreter_is_refused():
    code = """
import torch
from heed.flash import kernel
q = torch.ones(1, 1, 2, 16)
try:
    kernel.attention(q, q, q)
except ValueError as problem:
    print(problem)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = "src"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100
    )
    assert "a CUDA device, or TRITON_INTERPRET=1" in done.stdout, done.stderr
    assert "heed.flash.tiled" in done.stdout


def test_a_file_without_triton_says_what_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import heed.flash
try:
    import heed.flash.kernel
except ImportError as problem:
    print(problem)
"""
    env = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "heed.flash.kernel needs Triton, which exists for Linux alone"


# On a GPU. Each body runs under the interpreter too, small.


def on_gpu(test):
    missing = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs CUDA")(test))


def numbered(monkeypatch, number, D, dtype):
    """Each kernel runs with the configuration of that number in its own list."""

    def one(asked, *_):
        tried = kernel.CONFIGURATIONS[asked.__name__, dtype.itemsize, max(64, D)]
        Br, Bc, warps, stages = tried[number % len(tried)]
        if not kernel.INTERPRETED:
            return [kernel.triton.Config({"Br": Br, "Bc": Bc}, warps, stages)]
        return [kernel.triton.Config({"Br": Br, "Bc": Bc})]

    monkeypatch.setattr(kernel, "configurations", one)


def grouped_and_strided(D, dtype, mask, n):
    q, k, v, do = inputs(H=4, G=2, T=n, S=n + 40, D=D, dtype=dtype)
    held(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, do)), mask)


def the_same_under(compiled, dtype, n):
    q, k, v, do = inputs(T=n, S=n, D=64, dtype=dtype)
    want = results(kernel.attention, q, k, v, do, masks.causal)
    got = results(compiled, q, k, v, do, masks.causal)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


CASES = [
    (bf16, 64, masks.causal, 4096),
    (bf16, 128, masks.full, 4096),
    (bf16, 96, masks.window(700), 2000),
    (f16, 128, masks.causal, 1000),
    (f32, 64, masks.causal, 1000),
    (f32, 128, masks.full, 1000),
]


@on_gpu
@pytest.mark.parametrize(("dtype", "D", "mask", "n"), CASES)
def test_gpu_lengths_of_thousands(monkeypatch, dtype, D, mask, n):
    numbered(monkeypatch, 0, 128 if D == 96 else D, dtype)
    grouped_and_strided(D, dtype, mask, n)


@on_gpu
@pytest.mark.parametrize(("D", "mask"), [(64, masks.window(200)), (128, masks.causal)])
@pytest.mark.parametrize("number", range(4))
def test_gpu_every_configuration_is_right(monkeypatch, D, mask, number):
    numbered(monkeypatch, number, D, bf16)
    grouped_and_strided(D, bf16, mask, 500)


@on_gpu
def test_gpu_tuning_and_torch_compile_keep_bits(unchecked, monkeypatch):
    monkeypatch.undo()
    the_same_under(torch.compile(kernel.attention, fullgraph=True), bf16, 1000)


@on_gpu
def test_gpu_two_runs_agree_bit_for_bit(monkeypatch):
    numbered(monkeypatch, 0, 128, bf16)
    x = inputs(H=8, G=2, T=3000, S=3000, D=128, dtype=bf16)
    a, b = (results(kernel.attention, *x, masks.causal) for _ in range(2))
    assert all(torch.equal(y, z) for y, z in zip(a, b, strict=True))


@on_gpu
def test_gpu_memory_grows_with_the_length(monkeypatch):
    numbered(monkeypatch, 0, 64, f16)
    peaks = []
    for n in (2048, 8192):
        x = inputs(H=4, G=4, T=n, S=n, D=64, dtype=f16)
        results(kernel.attention, *x, masks.causal)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(kernel.attention, *x, masks.causal)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 4.4 * peaks[0], peaks


@interpreter
def test_the_bodies_of_the_gpu_tests_run_small(unchecked, monkeypatch):
    numbered(monkeypatch, 0, 64, f16)
    grouped_and_strided(64, f16, masks.causal, 100)
    the_same_under(torch.compile(kernel.attention, fullgraph=True, backend="aot_eager"), f16, 40)
