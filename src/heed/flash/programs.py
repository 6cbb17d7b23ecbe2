"""The Triton programs of `kernel.py`: `tiled.py` line by line, one program for a block of rows.

Names as there: queries q_i by blocks of Br rows, keys k_j and values v_j by blocks of Bc, scores s
(with a factor of log2 e, so that 2**s is e to the score), weights p before the division, running
maximum m and sum l, output o, log-sum-exp lse (here to base 2), delta for D = rowsum(dO * O).
B batch · T queries · S keys · H query heads, R of them to a key head · G key heads · D head width,
Dp the next power of two · w width of a window. Row r asks as position i = S - T + r.

Tiles come and go by tensor descriptors, which put zeros beyond the last row and the last column. On
Hopper they are its copy engine (TMA), elsewhere plain loads.
"""

# mypy: allow-untyped-defs
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as problem:
    raise ImportError("heed.flash.kernel needs Triton, which exists for Linux alone") from problem

LOG2E = tl.constexpr(math.log2(math.e))
INF = tl.constexpr(math.inf)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf: m - m is 0 here, and NaN there
INTEGERS = {"B", "H", "R", "T", "S", "w"}


def jit(function: Callable) -> Any:
    """triton.jit, one compiled kernel for all sizes; without the shape checks of an import hook."""
    function = inspect.unwrap(function)
    sizes = INTEGERS & inspect.signature(function).parameters.keys()
    return triton.jit(function, do_not_specialize=sorted(sizes))


@jit
def forward_kernel(
    q, k, v, o, lse, q_strides, k_strides, v_strides, o_strides, lse_strides,
    B, H, R, T, S, w, scale,
    MASK: tl.constexpr, D: tl.constexpr, Dp: tl.constexpr, Br: tl.constexpr, Bc: tl.constexpr,
):  # fmt: skip
    """o_i and lse_i of Br rows of one head."""
    b, h, r = whose_rows(B, H, T, Br)
    q = tiles(q, q_strides, B, H, T, D, [1, 1, Br, Dp])
    k = tiles(k, k_strides, B, H // R, S, D, [1, 1, Bc, Dp])
    v = tiles(v, v_strides, B, H // R, S, D, [1, 1, Bc, Dp])
    q_i = load(q, b, h, r)
    o_i = tl.zeros([Br, Dp], tl.float32)
    l = tl.zeros([Br], tl.float32)
    m = tl.full([Br], LOWEST, tl.float32)
    g, i, c = h // R, S - T + r, scale * LOG2E
    first, whole, part, end = keys_read(i, S, w, MASK, Br, Bc)
    if MASK == "window":
        o_i, l, m = add_keys(o_i, l, m, q_i, k, v, b, g, first, whole, i, S, w, c, MASK)
    o_i, l, m = add_keys(o_i, l, m, q_i, k, v, b, g, whole, part, i, S, w, c, "none")
    o_i, l, m = add_keys(o_i, l, m, q_i, k, v, b, g, part, end, i, S, w, c, MASK)
    empty = l == 0
    l = tl.where(empty, 1.0, l)
    o = tiles(o, o_strides, B, H, T, D, [1, 1, Br, Dp])
    o.store([b, h, r, 0], (o_i / l[:, None]).to(o.dtype).reshape(o.block_shape))
    lse = lines(lse, lse_strides, B, H, T, [1, 1, Br])
    lse.store([b, h, r], tl.where(empty, -INF, m + tl.log2(l)).reshape(lse.block_shape))


@jit
def add_keys(o_i, l, m, q_i, k, v, b, g, start, end, i, S, w, c, MASK: tl.constexpr):
    """The keys from start to end, added to the sums of the rows at the positions from i on."""
    for j in tl.range(start, end, k.block_shape[2]):
        k_j = load(k, b, g, j)
        s = tl.dot(q_i, k_j.T, input_precision="ieee") * c
        s = hide(s, i + down(s), j + across(s), S, w, MASK)
        m_old, m = m, tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m[:, None])
        a = tl.exp2(m_old - m)  # what was summed under the old maximum shrinks
        l = l * a + tl.sum(p, 1)
        v_j = load(v, b, g, j)
        o_i = tl.dot(p.to(v_j.dtype), v_j, o_i * a[:, None], input_precision="ieee")
    return o_i, l, m


@jit
def backward_q_kernel(
    q, k, v, o, do, dq, lse, delta,
    q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, lse_strides, delta_strides,
    B, H, R, T, S, w, scale,
    MASK: tl.constexpr, D: tl.constexpr, Dp: tl.constexpr, Br: tl.constexpr, Bc: tl.constexpr,
):  # fmt: skip
    """dq_i of Br rows of one head; and delta_i, which the other kernel reads."""
    b, h, r = whose_rows(B, H, T, Br)
    q = tiles(q, q_strides, B, H, T, D, [1, 1, Br, Dp])
    k = tiles(k, k_strides, B, H // R, S, D, [1, 1, Bc, Dp])
    v = tiles(v, v_strides, B, H // R, S, D, [1, 1, Bc, Dp])
    o = tiles(o, o_strides, B, H, T, D, [1, 1, Br, Dp])
    do = tiles(do, do_strides, B, H, T, D, [1, 1, Br, Dp])
    lse = lines(lse, lse_strides, B, H, T, [1, 1, Br])
    delta = lines(delta, delta_strides, B, H, T, [1, 1, Br])
    q_i, do_i = load(q, b, h, r), load(do, b, h, r)
    delta_i = tl.sum(load(o, b, h, r).to(tl.float32) * do_i.to(tl.float32), 1)
    delta.store([b, h, r], delta_i.reshape(delta.block_shape))
    lse_i = tl.maximum(load_line(lse, b, h, r), LOWEST)  # a row without a key: p = 0
    dq_i = tl.zeros([Br, Dp], tl.float32)
    g, i, c = h // R, S - T + r, scale * LOG2E
    first, whole, part, end = keys_read(i, S, w, MASK, Br, Bc)
    if MASK == "window":
        dq_i = add_dq(dq_i, q_i, do_i, lse_i, delta_i, k, v, b, g, first, whole, i, S, w, c, MASK)
    dq_i = add_dq(dq_i, q_i, do_i, lse_i, delta_i, k, v, b, g, whole, part, i, S, w, c, "none")
    dq_i = add_dq(dq_i, q_i, do_i, lse_i, delta_i, k, v, b, g, part, end, i, S, w, c, MASK)
    dq = tiles(dq, dq_strides, B, H, T, D, [1, 1, Br, Dp])
    dq.store([b, h, r, 0], (dq_i * scale).to(dq.dtype).reshape(dq.block_shape))


@jit
def add_dq(
    dq_i, q_i, do_i, lse_i, delta_i, k, v, b, g, start, end, i, S, w, c, MASK: tl.constexpr
):  # fmt: skip
    for j in tl.range(start, end, k.block_shape[2]):
        k_j = load(k, b, g, j)
        s = tl.dot(q_i, k_j.T, input_precision="ieee") * c
        s = hide(s, i + down(s), j + across(s), S, w, MASK)
        p = tl.exp2(s - lse_i[:, None])
        v_j = load(v, b, g, j)
        dp = tl.dot(do_i, v_j.T, input_precision="ieee")
        ds = p * (dp - delta_i[:, None])
        dq_i = tl.dot(ds.to(k_j.dtype), k_j, dq_i, input_precision="ieee")
    return dq_i


@jit
def backward_kv_kernel(
    q, k, v, do, dk, dv, lse, delta,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, lse_strides, delta_strides,
    B, H, R, T, S, w, scale,
    MASK: tl.constexpr, D: tl.constexpr, Dp: tl.constexpr, Br: tl.constexpr, Bc: tl.constexpr,
):  # fmt: skip
    """dk_j and dv_j of Bc keys, summed over the R query heads that read them."""
    G = H // R
    j = tl.program_id(0) % tl.cdiv(S, Bc) * Bc
    g = tl.program_id(0) // tl.cdiv(S, Bc)
    b, g = g // G, g % G
    q = tiles(q, q_strides, B, H, T, D, [1, 1, Br, Dp])
    k_j = load(tiles(k, k_strides, B, G, S, D, [1, 1, Bc, Dp]), b, g, j)
    v_j = load(tiles(v, v_strides, B, G, S, D, [1, 1, Bc, Dp]), b, g, j)
    do = tiles(do, do_strides, B, H, T, D, [1, 1, Br, Dp])
    lse = lines(lse, lse_strides, B, H, T, [1, 1, Br])
    delta = lines(delta, delta_strides, B, H, T, [1, 1, Br])
    dk_j = tl.zeros([Bc, Dp], tl.float32)
    dv_j = tl.zeros([Bc, Dp], tl.float32)
    c = scale * LOG2E
    rows = q, do, lse, delta
    first, whole, part, end = rows_reading(j, T, S, w, MASK, Br, Bc)
    if MASK != "full":
        dk_j, dv_j = add_rows(
            dk_j, dv_j, k_j, v_j, rows, b, g, R, first, whole, T, j, S, w, c, MASK
        )
    dk_j, dv_j = add_rows(dk_j, dv_j, k_j, v_j, rows, b, g, R, whole, part, T, j, S, w, c, "none")
    if MASK == "window":
        dk_j, dv_j = add_rows(dk_j, dv_j, k_j, v_j, rows, b, g, R, part, end, T, j, S, w, c, MASK)
    dk = tiles(dk, dk_strides, B, G, S, D, [1, 1, Bc, Dp])
    dv = tiles(dv, dv_strides, B, G, S, D, [1, 1, Bc, Dp])
    dk.store([b, g, j, 0], (dk_j * scale).to(dk.dtype).reshape(dk.block_shape))
    dv.store([b, g, j, 0], dv_j.to(dv.dtype).reshape(dv.block_shape))


@jit
def add_rows(
    dk_j, dv_j, k_j, v_j, rows, b, g, R, start, end, T, j, S, w, c, MASK: tl.constexpr
):  # fmt: skip
    q, do, lse, delta = rows
    blocks = tl.cdiv(tl.maximum(end - start, 0), q.block_shape[2])
    for n in tl.range(0, R * blocks):
        h, r = g * R + n // blocks, start + n % blocks * q.block_shape[2]
        q_i = load(q, b, h, r)
        s = tl.dot(k_j, q_i.T, input_precision="ieee") * c  # keys down, queries across
        s = hide(s, S - T + r + across(s), j + down(s), S, w, MASK)
        lse_i = tl.maximum(load_line(lse, b, h, r), LOWEST)
        p = tl.exp2(s - lse_i[None, :])
        do_i = load(do, b, h, r)
        dv_j = tl.dot(p.to(do_i.dtype), do_i, dv_j, input_precision="ieee")
        dp = tl.dot(v_j, do_i.T, input_precision="ieee")
        delta_i = load_line(delta, b, h, r)
        ds = p * (dp - delta_i[None, :])
        dk_j = tl.dot(ds.to(q_i.dtype), q_i, dk_j, input_precision="ieee")
    return dk_j, dv_j


@jit
def whose_rows(B, H, T, Br: tl.constexpr):
    """The sequence, the head and the first of the rows that this program is for."""
    blocks = tl.cdiv(T, Br)
    n = tl.program_id(0)
    first = n // (8 * blocks) * 8  # eight heads at a time: few enough for the cache
    heads = tl.minimum(B * H - first, 8)
    h = first + n % heads
    r = (blocks - 1 - n % (8 * blocks) // heads) * Br  # last rows first: causal, they read most
    return h // H, h % H, r


@jit
def tiles(x, strides, B, H, n, D, block: tl.constexpr):
    """A (B, H, n, D) tensor, to be read and written by tiles."""
    return tl.make_tensor_descriptor(
        x, [B, H, n, D], [strides[0], strides[1], strides[2], 1], block
    )


@jit
def lines(x, strides, B, H, n, block: tl.constexpr):
    return tl.make_tensor_descriptor(x, [B, H, n], [strides[0], strides[1], 1], block)


@jit
def load(x, b, h, n):
    return x.load([b, h, n, 0]).reshape(x.block_shape[2:])


@jit
def load_line(x, b, h, n):
    return x.load([b, h, n]).reshape(x.block_shape[2:])


@jit
def down(s):
    return tl.arange(0, s.shape[0])[:, None]


@jit
def across(s):
    return tl.arange(0, s.shape[1])[None, :]


@jit
def hide(s, i, j, S, w, MASK: tl.constexpr):
    """The mask. Keys beyond the last one are hidden from every row that there is."""
    if MASK == "full":
        s = tl.where(j < S, s, -INF)
    if MASK == "causal":
        s = tl.where(j <= i, s, -INF)
    if MASK == "window":
        s = tl.where((j <= i) & (j > i - w), s, -INF)
    return s


@jit
def keys_read(i, S, w, MASK: tl.constexpr, Br: tl.constexpr, Bc: tl.constexpr):
    """Br positions from i on read the keys first to end; those whole to part need no mask."""
    first, whole, part, end = 0, 0, S // Bc * Bc, S
    if MASK != "full":
        part, end = tl.minimum(part, (i + 1) // Bc * Bc), tl.minimum(S, i + Br)
    if MASK == "window":
        first = tl.maximum(i - w + 1, 0) // Bc * Bc
        whole = tl.cdiv(tl.maximum(i + Br - w, 0), Bc) * Bc
    return first, whole, tl.maximum(whole, part), end


@jit
def rows_reading(j, T, S, w, MASK: tl.constexpr, Br: tl.constexpr, Bc: tl.constexpr):
    """Bc keys from j on are read by the rows first to end; those whole to part need no mask."""
    r = j - (S - T)  # the row at position j
    first, whole, part, end = 0, 0, T, T
    if MASK != "full":
        first = tl.maximum(r, 0) // Br * Br
        whole = tl.minimum(tl.cdiv(tl.maximum(r + Bc - 1, 0), Br) * Br, T)
    if MASK == "window":
        part = T if r + w >= T else tl.maximum(r + w, 0) // Br * Br
        end = tl.minimum(T, r + Bc - 1 + w)
    return first, whole, tl.maximum(whole, part), end
