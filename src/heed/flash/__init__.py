"""Attention that never makes the T x S scores: one twin for each kind of device.

`tiled` is plain PyTorch and runs everywhere, `kernel` is Triton and runs on a GPU.

B batch · T queries · S keys · H query heads · G key-value heads · D head width.
"""

from jaxtyping import Float
from torch import Tensor

from heed import masks
from heed.attention import Bias, check
from heed.flash import tiled
from heed.masks import Mask


def which(q: Tensor, k: Tensor, v: Tensor, mask: Mask = masks.full) -> str:
    """Which twin `attention` takes: "kernel" on a CUDA device, "tiled" elsewhere."""
    return "kernel" if q.device.type == "cuda" else "tiled"


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    mask: Mask = masks.full,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    block: int = tiled.BLOCK,
) -> Float[Tensor, "B H T Dv"]:
    """softmax(q kᵀ / √D + bias) v, by the twin that `which` names and by no other.

    The kernel refuses what it does not know with a ValueError; `flash.tiled.attention` knows all of
    it, on any device. `block` is the tile of the tiled twin; the kernel has tiles of its own.
    """
    check(q, k, v, scale)
    if which(q, k, v, mask) == "tiled":
        return tiled.attention(q, k, v, mask, bias=bias, scale=scale, block=block)
    if bias is not None:
        raise ValueError("the kernel adds no bias: take heed.flash.tiled.attention")
    from heed.flash import kernel  # Triton is there for some machines only

    return kernel.attention(q, k, v, mask, scale=scale)
