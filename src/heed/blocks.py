"""Blocks: what a layer of a Transformer writes to the stream, and where its norms stand.

The stream x passes through every block with its shape unchanged. Pre-norm (GPT-2, Llama) norms what
a branch reads; post-norm (Vaswani et al. 2017, BERT) norms the sum. Biases everywhere.

B batch · T positions · S positions of the memory · C width of the stream.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed import masks
from heed.attention import attention
from heed.layers import MLP, Activation, LayerNorm, gelu_tanh
from heed.masks import Mask
from heed.multihead import Attend, MultiHeadAttention


class PreNorm(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): nothing stands on the path of the stream.

    After the last block the model needs one more norm: the stream is a sum that no norm has seen.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        d_ff: int | None = None,
        dropout: float = 0.0,
        activation: Activation = gelu_tanh,
        attend: Attend = attention,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(d_model)
        self.attn = MultiHeadAttention(d_model, n_heads=n_heads, bias=True, attend=attend)
        self.norm2 = LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff, activation=activation)
        self.dropout = _dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B T C"], *, mask: Mask = masks.full
    ) -> Float[Tensor, "B T C"]:
        x = x + self.dropout(self.attn(self.norm1(x), mask=mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class PostNorm(nn.Module):
    """norm1(x + attn(x)), then norm2(x + mlp(x)): the encoder block of 2017."""

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        d_ff: int | None = None,
        dropout: float = 0.0,
        activation: Activation = torch.relu,
        attend: Attend = attention,
    ) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(d_model, n_heads=n_heads, bias=True, attend=attend)
        self.norm1 = LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff, activation=activation)
        self.norm2 = LayerNorm(d_model)
        self.dropout = _dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B T C"], *, mask: Mask = masks.full
    ) -> Float[Tensor, "B T C"]:
        x = self.norm1(x + self.dropout(self.attn(x, mask=mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Decoder(nn.Module):
    """norm1(x + attn(x)), norm2(x + cross(x, memory)), norm3(x + mlp(x)): the decoder of 2017."""

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        d_ff: int | None = None,
        dropout: float = 0.0,
        activation: Activation = torch.relu,
        attend: Attend = attention,
    ) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(d_model, n_heads=n_heads, bias=True, attend=attend)
        self.norm1 = LayerNorm(d_model)
        self.cross = MultiHeadAttention(d_model, n_heads=n_heads, bias=True, attend=attend)
        self.norm2 = LayerNorm(d_model)
        self.mlp = MLP(d_model, d_ff, activation=activation)
        self.norm3 = LayerNorm(d_model)
        self.dropout = _dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        memory: Float[Tensor, "B S C"],
        *,
        mask: Mask = masks.causal,
        memory_mask: Mask = masks.full,
    ) -> Float[Tensor, "B T C"]:
        x = self.norm1(x + self.dropout(self.attn(x, mask=mask)))
        x = self.norm2(x + self.dropout(self.cross(x, memory, mask=memory_mask)))
        return self.norm3(x + self.dropout(self.mlp(x)))


def _dropout(p: float) -> nn.Dropout:
    if not 0 <= p < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {p}")
    return nn.Dropout(p)
