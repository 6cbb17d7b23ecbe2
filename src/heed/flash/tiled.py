"""Attention a tile at a time: the same numbers, and never a tensor of T x S.

B batch · T queries · S keys · H query heads · G key-value heads · D head width. Names as in
FlashAttention-2 (Dao 2023): q_i is a block of Br queries, k_j and v_j a block of Bc keys and values
(`block` is both), s are scores, p weights before the division, m and l running maximum and sum, o
the output, lse the log-sum-exp, `delta` their D = rowsum(dO * O). Scores carry a factor log2 e, so
that 2**s is e to the score: behind a mask exp underflows, which is slow on a CPU; exp2 is not.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heed import masks
from heed.attention import Bias, check, check_bias
from heed.masks import Mask

LOG2E = math.log2(math.e)
BLOCK = 128


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    mask: Mask = masks.full,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> Float[Tensor, "B H T Dv"]:
    """softmax(q kᵀ / √D + bias) v by tiles of block x block, in memory that grows with T + S.

    What `heed.attention.attention` gives, gradients too; there is no second derivative. A tensor as
    bias gets its gradient; a bias function of numbers that need one is refused.
    """
    check(q, k, v, scale)
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ValueError(f"a tile has a whole number of rows, at least 1, got block={block!r}")
    if bias is not None and not isinstance(bias, Tensor) and torch.is_grad_enabled():
        (B, H, T, _), S = q.shape, k.shape[2]
        b, h, i, j = masks.indices(B, H, T, S, q.device)
        if bias(b[:1], h[:1], i[:1], j[:1]).requires_grad:
            raise ValueError("a bias function with a gradient: give its values, as a tensor")
    return _Attention.apply(q, k, v, bias, mask, scale, block)


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = masks.full,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> tuple[Float[Tensor, "B H T Dv"], Float[Tensor, "B H T"]]:
    """o, and the log-sum-exp of each row of scores: -inf where a query may read nothing."""
    tiles = _Tiles(q, k, mask, bias, scale, block)
    k, v = tiles.fold(k), tiles.fold(v)
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=k.dtype)
    for rows in tiles.rows:
        q_i = tiles.fold(q[:, :, rows]) * tiles.scale
        o_i = q_i.new_zeros(*q_i.shape[:2], v.shape[-1])
        l = q_i.new_zeros(*q_i.shape[:2], 1)  # noqa: E741
        m = torch.full_like(l, torch.finfo(l.dtype).min)  # with -inf, m - m would be NaN
        for columns, s, hidden in tiles.scores(q_i, k, rows):
            v_j = v[:, columns]
            m_old, m = m, torch.maximum(m, s.amax(-1, keepdim=True))
            p = s.sub_(m).exp2_()
            c = (m_old - m).exp2_()  # what was summed under the old maximum shrinks
            l.mul_(c).add_(p.sum(-1, keepdim=True))
            _add_product(o_i.mul_(c), p, v_j, hidden)
        o[:, :, rows] = tiles.unfold(o_i / l.masked_fill(l == 0, 1))
        lse[:, :, rows] = tiles.unfold((m + l.log2()) / LOG2E)[..., 0]
    return o, lse


@torch.no_grad()
def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Mask = masks.full,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and dbias where the bias is a tensor that needs it. Weights are made afresh."""
    tiles = _Tiles(q, k, mask, bias, scale, block)
    dq, k_shape, v_shape = torch.empty_like(q), k.shape, v.shape
    k, v = tiles.fold(k), tiles.fold(v)
    dk, dv, dbias = torch.zeros_like(k), torch.zeros_like(v), None
    if isinstance(tiles.bias, Tensor) and tiles.bias.requires_grad:
        dbias = torch.zeros_like(tiles.bias, dtype=k.dtype)
    lse = lse.masked_fill(lse == -math.inf, math.inf) * LOG2E  # no key: 2**(s - inf) = 0
    for rows in tiles.rows:
        q_i, do_i = tiles.fold(q[:, :, rows]) * tiles.scale, tiles.fold(do[:, :, rows])
        lse_i = tiles.fold(lse[:, :, rows, None])
        delta = (do_i * tiles.fold(o[:, :, rows])).sum(-1, keepdim=True)
        dq_i = torch.zeros_like(q_i)
        for columns, s, hidden in tiles.scores(q_i, k, rows):
            k_j, v_j = k[:, columns], v[:, columns]
            p = s.sub_(lse_i).exp2_()
            ds = (do_i @ v_j.mT).sub_(delta)
            if hidden is not None:
                p.masked_fill_(hidden, 0)
                ds.masked_fill_(hidden, 0)
            ds.mul_(p)
            _add_product(dq_i, ds, k_j, hidden)
            _add_product(dk[:, columns], ds.mT, q_i, hidden)
            _add_product(dv[:, columns], p.mT, do_i, hidden)
            if dbias is not None:
                at = _tile(dbias, rows, columns)
                at.add_(tiles.unfold(ds).sum_to_size(at.shape))  # pairs that share a number
        dq[:, :, rows] = tiles.unfold(dq_i.mul_(tiles.scale / LOG2E))
    dk = dk.div_(LOG2E).view(k_shape).to(q.dtype)  # q_i carried log2 e along
    if isinstance(bias, Tensor) and dbias is not None:
        dbias = dbias.reshape(bias.shape).to(q.dtype)
    return dq, dk, dv.view(v_shape).to(q.dtype), dbias


def _add_product(out: Tensor, p: Tensor, x: Tensor, hidden: Tensor | None) -> None:
    """out += p x, where a zero that the mask wrote stays zero: 0 times NaN would be NaN."""
    if hidden is not None and not x.sum().isfinite():
        lost = ~x.isfinite()
        out.masked_fill_((p != 0).to(x.dtype) @ lost.to(x.dtype) > 0, math.nan)
        x = x.masked_fill(lost, 0)
    out.baddbmm_(p, x)


class _Tiles:
    """The tiles of one call: where they are, and the scores in each."""

    def __init__(
        self, q: Tensor, k: Tensor, mask: Mask, bias: Bias | None, scale: float | None, block: int
    ) -> None:
        self.B, self.H, self.T, D = q.shape
        _, self.G, self.S, _ = k.shape
        self.mask, self.bias, self.block = mask, bias, block
        masks.check(mask, self.B, self.H, self.T, self.S)
        if isinstance(bias, Tensor):
            check_bias(bias, self.B, self.H, self.T, self.S, q.dtype)
            self.bias = bias[(None,) * (4 - bias.ndim)]
        self.scale = LOG2E * (D**-0.5 if scale is None else scale)
        self.dtype = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
        self.b, self.h, self.i, self.j = masks.indices(self.B, self.H, self.T, self.S, q.device)
        self.rows = [slice(a, min(a + block, self.T)) for a in range(0, self.T, block)]
        self.buffer = q.new_empty(
            self.B * self.H * min(block, self.T) * min(block, self.S), dtype=self.dtype
        )

    def fold(self, x: Tensor) -> Tensor:
        """(B, H, n, D) to (B G, H/G n, D): query heads that share keys are rows of one matrix."""
        B, H, n, D = x.shape
        return x.reshape(B * self.G, H // self.G * n, D).to(self.dtype)

    def unfold(self, x: Tensor) -> Tensor:
        return x.view(self.B, self.H, x.shape[1] * self.G // self.H, x.shape[2])

    def scores(
        self, q_i: Tensor, k: Tensor, rows: slice
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """For each tile that the mask does not leave empty: its columns, scores, hidden pairs."""
        first, last = (self.S - self.T + row for row in (rows.start, rows.stop - 1))
        some, every = masks.span(self.mask, first, last, self.S)
        for start in some[:: self.block]:
            columns = slice(start, min(start + self.block, some.stop))
            pairs = self.b, self.h, self.i[rows], self.j[columns]
            hidden = None
            if not (every.start <= columns.start and columns.stop <= every.stop):
                hidden = ~masks.ask(self.mask, *pairs)
                if hidden.all():
                    continue
            n = columns.stop - columns.start
            s = self.buffer[: q_i.shape[0] * q_i.shape[1] * n].view(*q_i.shape[:2], n)
            torch.bmm(q_i, k[:, columns].mT, out=s)
            if self.bias is not None:
                self.unfold(s).add_(self._bias(self.bias, pairs, rows, columns), alpha=LOG2E)
            if hidden is not None:
                hidden = hidden.expand_as(self.unfold(s)).reshape(s.shape)
                s.masked_fill_(hidden, -math.inf)
            yield columns, s, hidden

    def _bias(self, bias: Bias, pairs: tuple[Tensor, ...], rows: slice, columns: slice) -> Tensor:
        if isinstance(bias, Tensor):
            return _tile(bias, rows, columns)
        bias = bias(*pairs)
        check_bias(bias, self.B, self.H, rows.stop - rows.start, columns.stop - columns.start)
        return bias


def _tile(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """Part of a bias; an axis of size 1 stands for all its indices."""
    every = slice(None)
    return x[..., rows if x.shape[2] > 1 else every, columns if x.shape[3] > 1 else every]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, *rest: Any) -> Tensor:
        ctx.function, (ctx.mask, ctx.scale, ctx.block) = bias, rest
        o, lse = forward(q, k, v, ctx.mask, bias=bias, scale=ctx.scale, block=ctx.block)
        if isinstance(bias, Tensor):
            ctx.function = None
        ctx.save_for_backward(q, k, v, o, lse, bias if isinstance(bias, Tensor) else None)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("attention by tiles has no second derivative; the formula has one")
        q, k, v, o, lse, bias = ctx.saved_tensors
        options = {"bias": bias if ctx.function is None else ctx.function, "block": ctx.block}
        with torch.autocast(q.device.type, enabled=False):  # it would shorten the products
            grads = backward(do, q, k, v, o, lse, ctx.mask, scale=ctx.scale, **options)
        return *grads, None, None, None
