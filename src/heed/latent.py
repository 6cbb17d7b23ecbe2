"""Multi-head latent attention: all keys and values of a token from one small vector (DeepSeek-V2,
Liu et al. 2024, section 2.1; DeepSeek-V3 is the same layer).

A rotation cannot be folded into other weights, so the positions have channels of their own: each
head's query and key are a part that content makes (d_head) and a part that turns (d_rope); the
turning part of the key is one for all heads. Kept per token: latent and turned key, d_latent +
d_rope numbers. Letters of the paper: h is x · c^KV latent · c^Q query latent · W^DKV and W^KR are
the rows of `down` · W^UK and W^UV those of `up`, head by head · W^DQ `q_down` · W^UQ and W^QR `q` ·
W^O `out` · d_h d_head · d_c d_latent · d_h^R d_rope · d_c' d_query.

B batch · T positions · S positions read · C width of the stream · H heads · L d_latent.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed import masks
from heed.attention import attention
from heed.layers import RMSNorm
from heed.masks import Mask
from heed.positions import rotate as turn

Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
neighbours = partial(turn, interleaved=True)


class LatentAttention(nn.Module):
    """out(head_1 ... head_H), head_h = attention([q_h; rot q_h'], [W_UK c; rot k'], W_UV c).

    d_latent   numbers that hold a token's keys and values of all heads; normed before use.
    d_head     width of the part of a query or key that does not turn.
    d_value    width of a head's value, d_head unless given.
    d_rope     width of the part that turns, even.
    d_query    queries come from a latent of their own, normed too; None: straight from x.
    attend     any function that takes (q, k, v, mask, scale=) for `heed.attention.attention`; its
               keys are wider than its values.
    rotate     (x (B, H, T, d_rope), positions) -> the same shape. DeepSeek's pairs are neighbours.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        d_latent: int,
        d_head: int,
        d_rope: int,
        d_value: int | None = None,
        d_query: int | None = None,
        attend: Callable[..., Tensor] = attention,
        rotate: Callable[[Tensor, Tensor], Tensor] = neighbours,
    ) -> None:
        super().__init__()
        d_value = d_head if d_value is None else d_value
        sizes = {"d_model": d_model, "n_heads": n_heads, "d_latent": d_latent, "d_head": d_head}
        sizes |= {"d_rope": d_rope, "d_value": d_value}
        for name, n in (sizes if d_query is None else sizes | {"d_query": d_query}).items():
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name} must be a positive integer, got {n!r}")
        if d_rope % 2:
            raise ValueError(f"d_rope must be even: pairs of channels turn; got {d_rope}")
        self.d_model, self.n_heads, self.d_latent = d_model, n_heads, d_latent
        self.d_head, self.d_rope, self.d_value = d_head, d_rope, d_value
        self.attend, self.rotate = attend, rotate
        self.q_down = None if d_query is None else nn.Linear(d_model, d_query, bias=False)
        self.q_norm = None if d_query is None else RMSNorm(d_query, eps=1e-6)
        self.q = nn.Linear(d_query or d_model, n_heads * (d_head + d_rope), bias=False)
        self.down = nn.Linear(d_model, d_latent + d_rope, bias=False)
        self.norm = RMSNorm(d_latent, eps=1e-6)
        self.up = nn.Linear(d_latent, n_heads * (d_head + d_value), bias=False)
        self.out = nn.Linear(n_heads * d_value, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask = masks.full,
        keep: Keep | None = None,
        places: Int[Tensor, "..."] | None = None,
        absorbed: bool = False,
    ) -> Float[Tensor, "B T C"]:
        """What each position reads. Expanded or absorbed: the same numbers, other products.

        Expanded, every latent is made into H keys and values: cheap when many queries share them.
        Absorbed, W_UK goes to the query and W_UV to the output, and all heads read the latents
        themselves, one key-value head of width L + d_rope: cheap for one new token.

        keep     (c (B, 1, T, L + d_rope), an empty value) -> all that are kept, as in a cache.
        places   where the tokens stand, `cache.places(T)`; 0 to T - 1 unless given. A mask by
                 position asks for the newest tokens at the end, as everywhere.
        """
        self._check(x, keep, places)
        places = torch.arange(x.shape[1], device=x.device) if places is None else places
        q = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q(q).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
        q_still, q_turn = q.split([self.d_head, self.d_rope], dim=3)
        latent, k_turn = self.down(x)[:, None].split([self.d_latent, self.d_rope], dim=3)
        q_turn, k_turn = self._turned(q_turn, places), self._turned(k_turn, places)
        c = torch.cat([self.norm(latent), k_turn], dim=3)  # (B, 1, T, L + d_rope)
        if keep is not None:
            c, _ = keep(c, c[..., :0])
        latent, k_turn = c.split([self.d_latent, self.d_rope], dim=3)  # (B, 1, S, ...)
        up = self.up.weight.unflatten(0, (self.n_heads, -1))  # (H, d_head + d_value, L)
        w_uk, w_uv = up.split([self.d_head, self.d_value], dim=1)
        scale = (self.d_head + self.d_rope) ** -0.5  # of the widths before anything is absorbed
        if absorbed:
            q = torch.cat([q_still @ w_uk, q_turn], dim=3)  # (B, H, T, L + d_rope)
            heads = self.attend(q, c, latent, mask, scale=scale) @ w_uv.mT
        else:
            q = torch.cat([q_still, q_turn], dim=3)
            k = torch.cat([latent @ w_uk.mT, k_turn.expand(-1, self.n_heads, -1, -1)], dim=3)
            heads = self.attend(q, k, latent @ w_uv.mT, mask, scale=scale)
        return self.out(heads.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor, places: Tensor) -> Tensor:
        turned = self.rotate(x, places)
        if turned.shape != x.shape:
            raise ValueError(f"rotate made {tuple(turned.shape)} of {tuple(x.shape)}")
        return turned

    def _check(self, x: Tensor, keep: Keep | None, places: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"x must be (B, T, {self.d_model}), got {tuple(x.shape)}")
        if x.dtype != self.q.weight.dtype:
            raise ValueError(f"x is {x.dtype}, the weights are {self.q.weight.dtype}")
        if keep is not None and places is None:
            raise ValueError("tokens behind others need their places: places=cache.places(T)")
