"""Which twin answers, and that no other one does so in silence."""

import subprocess
import sys
import types

import pytest
import torch

from heed import flash, masks
from heed.attention import attention as by_formula


def qkv(**options):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 70, 8, generator=draw, **options) for _ in range(3)]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The twin for a GPU answers, as far as `flash` can see; it refuses windows."""
    asked = []

    def kernel(q, k, v, mask, *, scale=None):
        if isinstance(mask, masks.window):
            raise ValueError("a window: take heed.flash.tiled.attention")
        asked.append((mask, scale))
        return "from the kernel"

    fake = types.SimpleNamespace(attention=kernel)
    monkeypatch.setitem(sys.modules, "heed.flash.kernel", fake)
    monkeypatch.setattr(flash, "kernel", fake, raising=False)
    monkeypatch.setattr(flash, "which", lambda q, k, v, mask: "kernel")
    return asked


def test_the_device_alone_says_which_twin_answers(unchecked):
    q, k, v = qkv()
    assert flash.which(q, k, v) == flash.which(q, k, v, masks.causal) == "tiled"
    q, k, v = qkv(dtype=torch.float64, requires_grad=True)
    assert flash.which(q, k, v, lambda b, h, i, j: i == j) == "tiled"
    there = types.SimpleNamespace(device=torch.device("cuda", 1))
    assert flash.which(there, there, there, masks.window(3)) == "kernel"


@pytest.mark.parametrize("mask", [masks.full, masks.causal, masks.window(5)])
def test_without_a_gpu_it_is_the_tiled_one_with_all_its_options(mask):
    q, k, v = qkv(dtype=torch.float64)
    bias = torch.randn(70, 70, dtype=torch.float64)
    want = by_formula(q, k, v, mask, bias=bias, scale=0.3)
    for block in (7, 64):
        ours = flash.attention(q, k, v, mask, bias=bias, scale=0.3, block=block)
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="block=0"):
        flash.attention(q, k, v, mask, block=0)


def test_bad_input_is_refused_before_anybody_asks_for_the_device(unchecked):
    q, k, v = qkv()
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        flash.attention([[1.0]], k, v)
    with pytest.raises(ValueError, match="69 values"):
        flash.attention(q, k, v[:, :, 1:])


def test_on_a_gpu_it_is_the_kernel_and_its_refusals_are_passed_on(on_a_gpu, unchecked):
    q, k, v = qkv()
    assert flash.attention(q, k, v, masks.causal, scale=0.5) == "from the kernel"
    assert on_a_gpu == [(masks.causal, 0.5)]
    with pytest.raises(ValueError, match="flash.tiled"):
        flash.attention(q, k, v, masks.window(3))
    with pytest.raises(ValueError, match="flash.tiled"):
        flash.attention(q, k, v, bias=torch.zeros(70, 70))
    with pytest.raises(ValueError, match="70 keys but 69"):
        flash.attention(q, k, v[:, :, 1:])


def test_the_package_works_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None
import torch
from heed import flash
q = torch.randn(1, 1, 3, 4)
assert flash.attention(q, q, q).shape == q.shape
assert "heed.flash.kernel" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
