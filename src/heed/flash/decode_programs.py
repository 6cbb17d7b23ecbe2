"""The Triton programs of `decode.kernel`: one split of one sequence's keys, then the join.

A program has the R queries that share a key-value head, as rows of a tile that is at least 16 high
(the smallest that tl.dot takes). It walks over its split by blocks of Bc keys, finds each key's
slot by the table, and keeps the maximum m, the sum l and the output o of the online softmax.
Names as in `programs.py`; scores carry log2 e, and log-sum-exps are to base 2.
"""

# mypy: allow-untyped-defs
import torch
from torch import Tensor

from heed.flash.programs import INF, LOG2E, LOWEST, jit, tl, triton


@jit
def split_kernel(
    q, k, v, table, lengths, o, lse, k_head, k_slot, v_head, v_slot, n,
    H, R, splits, scale,
    page_len: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, Dp: tl.constexpr, Dvp: tl.constexpr,
    Rp: tl.constexpr, Bc: tl.constexpr,
):  # fmt: skip
    """o and lse of one split, for the R heads of sequence b that read key-value head g."""
    split, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    S = tl.minimum(tl.load(lengths + b), n * page_len).to(tl.int32)
    part = tl.cdiv(tl.cdiv(S, splits), Bc) * Bc
    start = split * part
    stop = tl.minimum(S, start + part)
    r, d, dv = tl.arange(0, Rp), tl.arange(0, Dp), tl.arange(0, Dvp)
    rows = b * H + g * R + r
    q_i = tl.load(
        q + rows[:, None] * D + d[None, :], mask=(r[:, None] < R) & (d[None, :] < D), other=0.0
    )
    k += g.to(tl.int64) * k_head
    v += g.to(tl.int64) * v_head
    o_i = tl.zeros([Rp, Dvp], tl.float32)
    l = tl.zeros([Rp], tl.float32)
    m = tl.full([Rp], LOWEST, tl.float32)
    for first in tl.range(start, stop, Bc):
        j = first + tl.arange(0, Bc)
        there = j < stop
        page = tl.load(table + b * n + j // page_len, mask=there, other=0).to(tl.int64)
        slot = page * page_len + j % page_len
        k_j = tl.load(
            k + slot[:, None] * k_slot + d[None, :],
            mask=there[:, None] & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        s = tl.dot(q_i, k_j.T, input_precision="ieee") * (scale * LOG2E)
        s = tl.where(there[None, :], s, -INF)
        m_old, m = m, tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m[:, None])
        a = tl.exp2(m_old - m)  # what was summed under the old maximum shrinks
        l = l * a + tl.sum(p, 1)
        v_j = tl.load(
            v + slot[:, None] * v_slot + dv[None, :],
            mask=there[:, None] & (dv[None, :] < Dv), other=0.0,
        )  # fmt: skip
        o_i = tl.dot(p.to(v_j.dtype), v_j, o_i * a[:, None], input_precision="ieee")
    empty = l == 0
    l = tl.where(empty, 1.0, l)
    out = rows * splits + split
    tl.store(
        o + out[:, None] * Dv + dv[None, :], o_i / l[:, None],
        mask=(r[:, None] < R) & (dv[None, :] < Dv),
    )  # fmt: skip
    tl.store(lse + out, tl.where(empty, -INF, m + tl.log2(l)), mask=r < R)


@jit
def join_kernel(parts, lse, o, splits, Dv: tl.constexpr, Dvp: tl.constexpr, Sp: tl.constexpr):
    """o of one head: the splits, each by its share 2**(lse - the largest) of the whole sum."""
    row = tl.program_id(0).to(tl.int64)
    i, dv = tl.arange(0, Sp), tl.arange(0, Dvp)
    o_i = tl.zeros([Dvp], tl.float32)
    l = 0.0
    m = LOWEST
    for first in tl.range(0, splits, Sp):
        there = first + i < splits
        z = tl.load(lse + row * splits + first + i, mask=there, other=-INF)
        m_old, m = m, tl.maximum(m, tl.max(z, 0))
        p = tl.exp2(z - m)
        a = tl.exp2(m_old - m)
        l = l * a + tl.sum(p, 0)
        part = tl.load(
            parts + (row * splits + first + i[:, None]) * Dv + dv[None, :],
            mask=there[:, None] & (dv[None, :] < Dv), other=0.0,
        )  # fmt: skip
        o_i = o_i * a + tl.sum(p[:, None] * part, 0)
    o_i = o_i / tl.where(l == 0, 1.0, l)
    tl.store(o + row * Dv + dv, o_i.to(o.dtype.element_ty), mask=dv < Dv)


INTERPRETED = not isinstance(split_kernel, triton.runtime.JITFunction)


def wanted_splits(programs: int, slots: int, device: torch.device) -> int:
    """As many splits as keep every multiprocessor at work twice, none shorter than 256 keys."""
    if device.type != "cuda":
        return 2
    many = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-2 * many // programs), slots // 256))


def meta(q: Tensor, k: Tensor, v: Tensor, page_len: int) -> dict[str, int]:
    """What a compiled program is made for."""
    D, Dv, R = k.shape[2], v.shape[2], q.shape[1] // len(k)
    Bc = 64 if q.element_size() == 2 else 32 if max(D, Dv) <= 64 else 16  # float32: in registers
    return {
        "page_len": page_len, "D": D, "Dv": Dv,
        "Dp": max(16, triton.next_power_of_2(D)), "Dvp": max(16, triton.next_power_of_2(Dv)),
        "Rp": max(16, triton.next_power_of_2(R)), "Bc": Bc,
    }  # fmt: skip


def launch(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, o: Tensor,
    page_len: int, scale: float, splits: int,
) -> None:  # fmt: skip
    (B, H, _, _), G, Dv = q.shape, len(k), v.shape[2]
    parts = q.new_empty(B * H, splits, Dv, dtype=torch.float32)
    lse = q.new_empty(B * H, splits, dtype=torch.float32)
    strides = *k.stride()[:2], *v.stride()[:2]
    made = meta(q, k, v, page_len)
    with torch.cuda.device_of(q):
        split_kernel[splits, G, B](
            q, k, v, table, lengths, parts, lse, *strides, table.shape[1],
            H, H // G, splits, scale, **made, num_warps=4, num_stages=2, enable_fp_fusion=False,
        )  # fmt: skip
        join_kernel[(B * H,)](
            parts, lse, o, splits, Dv=Dv, Dvp=made["Dvp"], Sp=16, enable_fp_fusion=False
        )
