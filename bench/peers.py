"""The ways to compute one attention that are timed beside each other.

B batch · H heads · n positions · D head width.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from heed import masks
from heed.cache.paged import Pages

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
PRODUCTS = {FORWARD: 2, BACKWARD: 5, BOTH: 7}
LARGEST = {  # more positions would cost minutes or tens of GB
    "cpu": {"heed.attention": 1024, "sdpa math": 2048, "plain": 4096, "heed.flash.kernel": 48},
    "cuda": {"sdpa math": 8192, "plain": 8192},
}
FLEX = {"cpu": 2048, "cuda": 4096}  # compiled for this number of positions alone
WRONG = 0.1  # bfloat16 is off by some thousandths; what is this far off computes something else
DENSE = {"plain", "sdpa math", "heed.attention"}  # they write all n x n scores into memory


@dataclass(frozen=True, kw_only=True)
class Cell:
    direction: str
    n: int
    d_head: int
    causal: bool
    dtype: str
    batch: int
    n_heads: int

    @property
    def name(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.direction}, {self.n} x {self.d_head}, {mask}, {self.dtype}"

    @property
    def flops(self) -> int:
        product = 2 * self.batch * self.n_heads * self.n**2 * self.d_head
        return PRODUCTS[self.direction] * product // (2 if self.causal else 1)

    def tensors(self, device: str) -> list[Tensor]:
        """q, k, v and the gradient that arrives at the output."""
        draw = torch.Generator(device).manual_seed(self.n)
        shape = (self.batch, self.n_heads, self.n, self.d_head)
        return [
            torch.randn(shape, generator=draw, device=device)
            .to(getattr(torch, self.dtype))
            .requires_grad_(i < 3 and self.direction != FORWARD)
            for i in range(4)
        ]


def paged(x: Tensor, page_len: int, scattered: bool) -> Pages:
    """Keys or values (B, H, n, D) in pages: text behind text, or all pages shuffled."""
    B, H, n, D = x.shape
    each = -(-n // page_len)
    draw = torch.Generator().manual_seed(n)
    order = torch.randperm(B * each, generator=draw) if scattered else torch.arange(B * each)
    table = order.view(B, each).to(x.device)
    slots = x.new_empty(H, B * each * page_len, D)
    places = table[:, :, None] * page_len + torch.arange(page_len, device=x.device)
    slots[:, places.flatten(1)[:, :n]] = x.transpose(0, 1)
    lengths = torch.full((B,), n, device=x.device)
    return Pages(slots, table, lengths, page_len, torch.ones_like(lengths))


class LeftOut(Exception):
    """Why a case is not measured; the text goes into the results."""


# Each makes the function that is timed, and may refuse a cell.


def fused(*backends: SDPBackend) -> Callable[[Cell, str], Attend]:
    def make(cell: Cell, device: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not backends:
                return F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal)
            with sdpa_kernel(list(backends)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal)

        return attend

    return make


def plain(cell: Cell, device: str) -> Attend:
    future = torch.ones(cell.n, cell.n, dtype=torch.bool, device=device).triu(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / math.sqrt(q.shape[3])
        if cell.causal:
            scores = scores.masked_fill(future, -math.inf)
        return scores.softmax(-1) @ v

    return attend


def flex(cell: Cell, device: str) -> Attend:
    """PyTorch's FlexAttention, compiled for this cell alone."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not cell.causal or cell.n != FLEX[device]:
        raise LeftOut(f"compiled only for causal attention of {FLEX[device]}, to save time")
    if device == "cpu" and cell.direction != FORWARD:
        raise LeftOut("PyTorch has no backward pass of it for a CPU")
    torch.compiler.reset()  # else the cells before count against a limit of versions
    config.donated_buffer = False  # a backward pass is timed many times over one forward pass
    table = create_block_mask(masks.causal, None, None, cell.n, cell.n, device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=table)


def ours(module: str) -> Callable[[Cell, str], Attend]:
    def make(cell: Cell, device: str) -> Attend:
        attention = import_module(module).attention
        mask = masks.causal if cell.causal else masks.full
        return lambda q, k, v: attention(q, k, v, mask)

    return make


def peers(device: str) -> dict[str, Callable[[Cell, str], Attend]]:
    """The baseline first."""
    written = {"sdpa math": fused(SDPBackend.MATH), "plain": plain, "flex": flex}
    if device == "cuda":
        return {
            "sdpa flash": fused(SDPBackend.FLASH_ATTENTION),
            "heed.flash.kernel": ours("heed.flash.kernel"),
            "sdpa cudnn": fused(SDPBackend.CUDNN_ATTENTION),
            "sdpa efficient": fused(SDPBackend.EFFICIENT_ATTENTION),
        } | written
    found = {"sdpa": fused(), "heed.flash.tiled": ours("heed.flash.tiled")} | written
    found["heed.attention"] = ours("heed.attention")
    if os.environ.get("TRITON_INTERPRET") == "1":  # the kernel, too, at a thousandth of its speed
        found["heed.flash.kernel"] = ours("heed.flash.kernel")
    return found
