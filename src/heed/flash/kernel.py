"""FlashAttention on a GPU: what `tiled.py` does, by the Triton programs of `programs.py`.

B batch · T queries · S keys · H query heads · G key heads · D head width. Without a GPU they run
under Triton's interpreter: TRITON_INTERPRET=1 in the environment before this file is imported.
"""

import contextvars
import math
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heed import masks
from heed.attention import check
from heed.flash.programs import backward_kv_kernel, backward_q_kernel, forward_kernel, triton
from heed.masks import Mask

INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    mask: Mask = masks.full,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H T D"]:
    """softmax(q kᵀ / √D) v by the kernels: full, causal or a window, and no bias.

    In float32, float16 or bfloat16, up to a width of 256, on a GPU or under Triton's interpreter
    (TRITON_INTERPRET=1 before the import). The same configuration gives the same bits. Descriptors
    want a row's numbers side by side and other strides a multiple of 16 bytes: else, a copy first.
    """
    check(q, k, v, scale)
    D, S = k.shape[3], k.shape[2]
    if mask is masks.full or mask is masks.causal:
        kind, w = ("full" if mask is masks.full else "causal"), S
    elif type(mask) is masks.window:
        kind, w = ("window", mask.width) if mask.width < S else ("causal", S)
    else:
        raise _refusal(f"full, causal and window(w), not the mask {mask}")
    if v.shape[3] != D or D > 256:
        raise _refusal(f"one width of up to 256 for keys and values, not {D} and {v.shape[3]}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise _refusal(f"float32, float16 and bfloat16, not {q.dtype}")
    if INTERPRETED and q.dtype == torch.bfloat16:
        raise _refusal("no bfloat16 under TRITON_INTERPRET: its tl.dot multiplies bit patterns")
    if not INTERPRETED and q.device.type != "cuda":
        raise _refusal(f"a CUDA device, or TRITON_INTERPRET=1 before the import, not {q.device}")
    return flash_forward(q, k, v, kind, w, D**-0.5 if scale is None else scale)[0]


def _refusal(what: str) -> ValueError:
    return ValueError(f"heed.flash.kernel knows {what}; heed.flash.tiled knows the rest")


@torch.library.custom_op("heed::flash_forward", mutates_args=())
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: str, w: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o, and lse to base 2. An operator: torch.compile leaves it whole."""
    (B, H, T, D), S = q.shape, k.shape[2]
    o, lse = room(q, B, T, H, D).transpose(1, 2), room(q, B, H, T, dtype=torch.float32)
    if S == 0:
        return o.zero_(), lse.fill_(-math.inf)
    launch(forward_kernel, T, H, (*map(aligned, (q, k, v)), o, lse), mask, w, scale)
    return o, lse


@flash_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: str, w: int, scale: float) -> tuple:
    B, H, T, D = q.shape
    return room(q, B, T, H, D).transpose(1, 2), room(q, B, H, T, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do: Tensor, _: Any) -> tuple:
    return *flash_backward(do, *ctx.saved_tensors, *ctx.how), None, None, None


flash_forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("heed::flash_backward", mutates_args=())
def flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    mask: str, w: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv: no sum is shared by two programs, so that no run differs from another."""
    dq, dk, dv = (room(x, *x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    (_, H, T, _), (_, G, S, _) = q.shape, k.shape
    if T == 0 or S == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = room(lse, *lse.shape)
    q, k, v, o, do, lse = map(aligned, (q, k, v, o, do, lse))
    launch(backward_q_kernel, T, H, (q, k, v, o, do, dq, lse, delta), mask, w, scale)
    launch(backward_kv_kernel, S, G, (q, k, v, do, dk, dv, lse, delta), mask, w, scale)
    return dq, dk, dv


@flash_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple:
    return tuple(room(x, *x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))


@flash_backward.register_autograd
def _twice(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("heed.flash has no second derivative; heed.attention has")


def room(x: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor, its lines a multiple of 16 bytes apart."""
    dtype = x.dtype if dtype is None else dtype
    step = 16 // dtype.itemsize
    return x.new_empty(*shape[:-1], -(-shape[-1] // step) * step, dtype=dtype)[..., : shape[-1]]


def aligned(x: Tensor) -> Tensor:
    """x itself where descriptors can read it, else a copy that they can."""
    step = 16 // x.element_size()
    fits = all(n > 0 and n % step == 0 for n in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits and x.stride(-1) == 1 else room(x, *x.shape).copy_(x)


def launch(
    kernel: Any, length: int, heads: int, tensors: tuple, mask: str, w: int, scale: float
) -> None:
    """One program for every block of `length` rows or keys of every head."""
    (B, H, T, D), (_, G, S, _) = tensors[0].shape, tensors[1].shape
    strides = [x.stride()[:-1] for x in tensors]
    numbers = B, H, H // G, T, S, w, scale
    shapes = {"MASK": mask, "D": D, "Dp": max(16, triton.next_power_of_2(D))}
    block = "Bc" if kernel is backward_kv_kernel else "Br"

    def run() -> None:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=where)
        )
        tuned(kernel, tensors[0].dtype, mask, D, T.bit_length())[
            lambda meta: (triton.cdiv(length, meta[block]) * B * heads,)
        ](*tensors, *strides, *numbers, **shapes, enable_fp_fusion=False)

    where = tensors[0].device
    if B and length:
        with torch.cuda.device_of(tensors[0]):
            contextvars.copy_context().run(run)  # the allocator is ours for this launch alone


@cache
def tuned(kernel: Any, dtype: torch.dtype, mask: str, D: int, bucket: int) -> Any:
    """The kernel, which tries its configurations when it first meets a bucket of lengths."""
    return triton.autotune(configurations(kernel, dtype, mask, D), key=[])(kernel)


def configurations(kernel: Any, dtype: torch.dtype, mask: str, D: int) -> list[Any]:
    """Tiles, warps and stages to try. None spills on Hopper: `python -m bench.compiled` asks."""
    if INTERPRETED:
        return [triton.Config({"Br": 32, "Bc": 32})]
    width = next(w for w in (64, 128, 256) if w >= D)
    tried = CONFIGURATIONS[kernel.__name__, dtype.itemsize, width]
    if mask == "window":  # three loops want more registers than two
        tried = [c for c in tried if width == 64 or c != (64, 128, 8, 2)]
    return [
        triton.Config({"Br": Br, "Bc": Bc}, num_warps=warps, num_stages=stages)
        for Br, Bc, warps, stages in tried
    ]


# Br, Bc, warps, stages: by kernel, bytes of a number, and width. Float32 has no tensor cores that
# multiply it exactly: its rows lie in registers, and what does not fit there spills.
CONFIGURATIONS = {
    ("forward_kernel", 2, 64): [(128, 128, 8, 3), (128, 64, 4, 3), (256, 64, 8, 2), (64, 64, 4, 3)],
    ("forward_kernel", 2, 128): [
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 2),
    ],
    ("forward_kernel", 2, 256): [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2)],
    ("backward_q_kernel", 2, 64): [(128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)],
    ("backward_q_kernel", 2, 128): [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
    ("backward_q_kernel", 2, 256): [(64, 32, 8, 2)],
    ("backward_kv_kernel", 2, 64): [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2)],
    ("backward_kv_kernel", 2, 128): [(64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2)],
    ("backward_kv_kernel", 2, 256): [(16, 64, 8, 2)],
} | {
    (name, 4, width): [(16, 16, 4, 1)]
    for name in ("forward_kernel", "backward_q_kernel", "backward_kv_kernel")
    for width in (64, 128, 256)
}
