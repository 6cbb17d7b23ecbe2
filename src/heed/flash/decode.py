"""Attention for one new token: one query a sequence, against keys and values that stand in pages.

The keys are split, so that one query keeps many programs busy, and the splits are joined by the
online softmax ("flash decoding", Dao et al. 2023); they are read where they stand, by the table of
their pages (PagedAttention, Kwon et al. 2023). Two twins: `plain` is PyTorch and runs everywhere,
`kernel` is Triton. `packed` is an `attend` for a model whose cache hands back pages.

B sequences · N tokens of a packed row · H query heads · G key-value heads · R query heads to each
of them · S positions of a sequence · D width of a key.
"""

import math
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from heed import flash, masks
from heed.cache.paged import Pages

PAIRS = 2**14  # scores that cost less than a loop over tiles
SHORT = 2**18  # bytes of keys and values that cost less to copy than a product of their own


def attention(
    q: Float[Tensor, "B H 1 D"],
    k: Pages,
    v: Pages,
    *,
    scale: float | None = None,
    splits: int | None = None,
) -> Float[Tensor, "B H 1 Dv"]:
    """softmax(q kᵀ / √D) v over every sequence's own positions: by `kernel` on CUDA, else `plain`.

    A sequence without a position gets zeros. What stands in slots beyond a length is never read.
    """
    twin = kernel if isinstance(q, Tensor) and q.device.type == "cuda" else plain
    return twin(q, k, v, scale=scale, splits=splits)


def packed(
    q: Float[Tensor, "1 H N D"], k: Pages, v: Pages, dropout: nn.Dropout | None = None
) -> Float[Tensor, "1 H N Dv"]:
    """Causal attention of a packed row: counts[b] queries of each sequence b, one after the other.

    Single tokens go through `attention` together; a longer stretch reads its own pages, causally.
    """
    if dropout is not None and dropout.training and dropout.p > 0:
        raise ValueError(f"pages are for reading: dropout {dropout.p} of a model that trains")
    counts, lengths = k.counts.tolist(), k.lengths.tolist()
    if q.ndim != 4 or len(q) != 1 or q.shape[2] != sum(counts):
        raise ValueError(f"q must be (1, H, {sum(counts)}, D) for {counts}, got {tuple(q.shape)}")
    if any(not 0 <= new <= n for new, n in zip(counts, lengths, strict=True)):
        raise ValueError(f"{counts} new positions cannot be the last of {lengths}")
    if set(counts) == {1}:
        return attention(q[0].transpose(0, 1)[:, :, None], k, v)[:, :, 0].transpose(0, 1)[None]
    o = q.new_empty(*q.shape[:3], v.slots.shape[2])
    ends = torch.tensor(counts).cumsum(0).tolist()
    single = [b for b, new in enumerate(counts) if new == 1]
    if single:
        rows = torch.tensor(single, device=q.device)
        places = torch.tensor([ends[b] - 1 for b in single], device=q.device)
        some = (_rows(x, rows) for x in (k, v))
        o[0, :, places] = attention(q[0, :, places].transpose(0, 1)[:, :, None], *some)[
            :, :, 0
        ].transpose(0, 1)
    for b, (new, end) in enumerate(zip(counts, ends, strict=True)):
        if new > 1:
            mine = slice(end - new, end)
            o[:, :, mine] = _stretch(q[:, :, mine], k.read(b)[None], v.read(b)[None])
    return o


def _stretch(q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "1 H N Dv"]:
    """The last positions of one sequence, causally. Few pairs fit into one product."""
    T, S = q.shape[2], k.shape[2]
    if T * S > PAIRS:
        return flash.attention(q, k, v, masks.causal)
    past = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, past, enable_gqa=q.shape[1] > k.shape[1])


def _rows(x: Pages, rows: Tensor) -> Pages:
    return replace(x, table=x.table[rows], lengths=x.lengths[rows], counts=x.counts[rows])


def plain(
    q: Float[Tensor, "B H 1 D"],
    k: Pages,
    v: Pages,
    *,
    scale: float | None = None,
    splits: int | None = None,
) -> Float[Tensor, "B H 1 Dv"]:
    """What `attention` gives, in PyTorch. Not split unless asked: one thread gains nothing.

    Neighbouring pages are read as one view, others are copied; short sequences of about the same
    length are copied together.
    """
    scale = _check(q, k, v, scale, splits)
    (B, H, _, D), G, Dv = q.shape, len(k.slots), v.slots.shape[2]
    queries = q.contiguous().view(B, G, H // G, D)
    none = q.new_empty(0, G, H // G, Dv)
    lengths, o = _lengths(k), [none] * B
    alike: dict[int, list[int]] = {}
    for b, n in enumerate(lengths):
        short = splits is None and 0 < n * G * (D + Dv) * q.element_size() <= SHORT
        alike.setdefault(n.bit_length() if short else -1 - b, []).append(b)
    for rows in alike.values():
        if len(rows) == 1:
            b = rows[0]
            k_, v_ = k.read(b)[None], v.read(b)[None]
            o[b] = _one(queries[b : b + 1], k_, v_, scale, splits or 1)
        else:
            found = _together(queries[rows], k, v, rows, scale)
            for b, row in zip(rows, found.split(1), strict=True):
                o[b] = row
    return torch.cat([none, *o]).view(B, H, 1, Dv)


def _together(
    q: Tensor, k: Pages, v: Pages, rows: list[int], scale: float
) -> Float[Tensor, "B G R Dv"]:
    """Some sequences in one product. Behind the end of one stands its first position, masked."""
    n, table, P = k.lengths[rows][:, None], k.table[rows], k.page_len
    places = torch.arange(int(n.max()), device=q.device)
    real = places < n
    at = places.where(real, 0)
    slots = table.gather(1, at // P) * P + at % P
    k_, v_ = (x.slots.index_select(1, slots.flatten()).unflatten(1, slots.shape) for x in (k, v))
    k_, v_ = k_.transpose(0, 1), v_.transpose(0, 1)
    return F.scaled_dot_product_attention(q, k_, v_, real[:, None, None], scale=scale)


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int) -> Float[Tensor, "1 G R Dv"]:
    """One sequence of n positions, k and v (1, G, n, D)."""
    n = k.shape[2]
    if n == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if splits == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    q_, k_, v_ = (x.to(torch.promote_types(q.dtype, torch.float32)) for x in (q, k, v))
    o, lse = [], []
    for start, stop in pairwise(n * i // splits for i in range(splits + 1)):
        s = q_ * scale @ k_[:, :, start:stop].mT
        o.append(s.softmax(3) @ v_[:, :, start:stop])
        lse.append(s.logsumexp(3, keepdim=True))  # of no position: -inf, no share
    share = torch.stack(lse).softmax(0)  # of each split in the whole sum
    return (share * torch.stack(o)).sum(0).to(q.dtype)


def kernel(
    q: Float[Tensor, "B H 1 D"],
    k: Pages,
    v: Pages,
    *,
    scale: float | None = None,
    splits: int | None = None,
) -> Float[Tensor, "B H 1 Dv"]:
    """What `attention` gives, by the Triton programs, in float32, float16 or bfloat16.

    Tables and lengths are read on the device alone: a CUDA graph may hold this call, and go on with
    what they hold at its replay. So nobody checks them; a length counts as far as its table goes.
    Widths up to 256. Without a GPU: TRITON_INTERPRET=1 before the import.
    """
    from heed.flash import decode_programs as programs  # Triton is there for some machines only

    scale = _check(q, k, v, scale, splits)
    B, H, _, D = q.shape
    (G, _, Dv), n = v.slots.shape, k.table.shape[1]
    if max(D, Dv) > 256 or min(D, Dv) < 1:
        raise _refusal(f"widths from 1 to 256, not {D} and {Dv}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise _refusal(f"float32, float16 and bfloat16, not {q.dtype}")
    if programs.INTERPRETED and q.dtype == torch.bfloat16:
        raise _refusal("no bfloat16 under TRITON_INTERPRET: its tl.dot multiplies bit patterns")
    if not programs.INTERPRETED and q.device.type != "cuda":
        raise _refusal(f"a CUDA device, or TRITON_INTERPRET=1 before the import, not {q.device}")
    if k.slots.stride(2) != 1 or v.slots.stride(2) != 1:
        raise _refusal("slots whose numbers stand side by side; a copy of the pool costs too much")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k.slots, v.slots)):
        raise _refusal("no gradient: decode under torch.no_grad()")
    o = q.new_empty(B, H, 1, Dv)
    if B == 0 or n == 0:
        return o.zero_()
    if splits is None:
        splits = programs.wanted_splits(B * G, n * k.page_len, q.device)
    q, table, lengths = q.contiguous(), k.table.contiguous(), k.lengths.contiguous()
    programs.launch(q, k.slots, v.slots, table, lengths, o, k.page_len, scale, splits)
    return o


def _refusal(what: str) -> ValueError:
    return ValueError(f"heed.flash.decode.kernel knows {what}; heed.flash.decode.plain knows more")


def _check(q: Tensor, k: Pages, v: Pages, scale: float | None, splits: int | None) -> float:
    """The scale; a ValueError that names what does not fit, found without asking the device."""
    for name, x in {"k": k, "v": v}.items():
        if not isinstance(x, Pages):
            raise TypeError(f"{name} must be pages, got {type(x).__name__}")
    if q.ndim != 4 or q.shape[2] != 1 or not q.dtype.is_floating_point:
        raise ValueError(f"q must be floats (B, H, 1, D), got {q.dtype} {tuple(q.shape)}")
    B, H, _, D = q.shape
    for name, x in {"k": k, "v": v}.items():
        if x.slots.ndim != 3 or x.table.ndim != 2 or x.lengths.shape != x.table.shape[:1]:
            shapes = [tuple(y.shape) for y in (x.slots, x.table, x.lengths)]
            raise ValueError(f"{name} must have (G, slots, D), (B, n) and (B,), got {shapes}")
        if len(x.table) != B:
            raise ValueError(f"q has batch {B}, the table of {name} has {len(x.table)} rows")
        if x.slots.dtype != q.dtype:
            raise ValueError(f"q and {name} must share a dtype, got {q.dtype}, {x.slots.dtype}")
        where = {y.device for y in (q, x.slots, x.table, x.lengths)}
        if len(where) > 1:
            raise ValueError(f"q and {name} must share a device, got {sorted(map(str, where))}")
    same = k.table is v.table and k.lengths is v.lengths  # the same objects: no look inside
    if not same and not (torch.equal(k.table, v.table) and torch.equal(k.lengths, v.lengths)):
        raise ValueError("keys and values must stand in the same pages, by tables that agree")
    if k.page_len != v.page_len or k.slots.shape[:2] != v.slots.shape[:2]:
        pools = [(*x.slots.shape[:2], x.page_len) for x in (k, v)]
        raise ValueError(f"heads, slots and page length of keys and values differ: {pools}")
    if k.page_len < 1 or k.slots.shape[1] % k.page_len:
        raise ValueError(f"{k.slots.shape[1]} slots are not whole pages of {k.page_len}")
    if k.slots.shape[2] != D or D == 0:
        raise ValueError(f"q and k must share a width above 0, got {D} and {k.slots.shape[2]}")
    if H == 0 or len(k.slots) == 0 or H % len(k.slots):
        raise ValueError(f"{H} query heads cannot share {len(k.slots)} key-value heads")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if splits is not None and (not isinstance(splits, int) or splits < 1):
        raise ValueError(f"keys are split into 1 part or more, got splits={splits!r}")
    return D**-0.5 if scale is None else scale


def _lengths(k: Pages) -> list[int]:
    """The length of every sequence; it and the pages are looked at before anything is read."""
    last, lengths = k.slots.shape[1] // k.page_len - 1, k.lengths.tolist()
    for b, (pages, n) in enumerate(zip(k.table.tolist(), lengths, strict=True)):
        if not 0 <= n <= len(pages) * k.page_len:
            raise ValueError(f"sequence {b}: length {n} with {len(pages)} pages of {k.page_len}")
        used = pages[: -(-n // k.page_len)]
        if used and not 0 <= min(used) <= max(used) <= last:
            raise ValueError(f"sequence {b} names pages {min(used)} to {max(used)} of 0 to {last}")
    return lengths
