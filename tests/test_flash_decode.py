"""One query a sequence against pages: both twins held against the reference in float64."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton exists for Linux alone")

from heed import masks
from heed.attention import attention, softmax
from heed.cache.paged import Packed, PagedKVCache, Pages
from heed.flash import decode
from heed.flash import decode_programs as programs

DEVICE = "cpu" if programs.INTERPRETED else "cuda"
f16, f32, f64, bf16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
LENGTHS = [37, 0, 70, 1]


def paged(rows, page_len, draw, shuffled=True, spare=2):
    """Each sequence's (G, S, D) keys in pages of a poisoned pool; the handle."""
    needs = [-(-x.shape[1] // page_len) for x in rows]
    total = sum(needs) + spare
    order = torch.randperm(total, generator=draw) if shuffled else torch.arange(total)
    table = torch.zeros(len(rows), max([*needs, 1]), dtype=torch.int64)
    first = rows[0]
    slots = first.new_full((len(first), total * page_len, first.shape[2]), math.nan)
    for b, (x, pages) in enumerate(zip(rows, order[: sum(needs)].split(needs), strict=True)):
        table[b, : len(pages)] = pages
        for n, page in enumerate(pages.tolist()):
            part = x[:, n * page_len : (n + 1) * page_len]
            slots[:, page * page_len : page * page_len + part.shape[1]] = part
    lengths = torch.tensor([x.shape[1] for x in rows])
    return Pages(*(x.to(DEVICE) for x in (slots, table, lengths)), page_len, lengths.to(DEVICE))


def inputs(lengths=LENGTHS, H=4, G=2, D=24, Dv=None, page_len=16, dtype=f32, random_seed=0, **more):
    """q, the pages of k and of v, and k and v themselves, sequence by sequence."""
    draw = torch.Generator().manual_seed(random_seed)

    def rows(width):
        return [torch.randn(G, n, width, generator=draw, dtype=f64).to(dtype) for n in lengths]

    q = torch.randn(len(lengths), H, 1, D, generator=draw, dtype=f64).to(dtype).to(DEVICE)
    k, v = rows(D), rows(D if Dv is None else Dv)
    k_pages = paged(k, page_len, draw, **more)
    v_pages = paged(v, page_len, torch.Generator(), shuffled=False)
    same = k_pages.table.shape[1]
    slots = torch.full((G, k_pages.slots.shape[1], v[0].shape[2]), math.nan, dtype=dtype).to(DEVICE)
    for b, x in enumerate(v):  # the values stand where the keys stand
        j = torch.arange(x.shape[1], device=DEVICE)
        slots[:, k_pages.table[b, j // page_len] * page_len + j % page_len] = x.to(DEVICE)
    assert same == v_pages.table.shape[1]
    return q, k_pages, replace(k_pages, slots=slots), k, v


def exact(q, k, v, scale=None):
    """The reference, one sequence at a time, in float64."""
    rows = zip(q, k, v, strict=True)
    return torch.cat(
        [attention(*(x[None].double().to(q.device) for x in row), scale=scale) for row in rows]
    )


def formula(q, k, v, scale, *, first):
    """The formula in the dtype of its inputs, the scale before or after the product."""
    R, scale = q.shape[0] // k.shape[0], q.shape[2] ** -0.5 if scale is None else scale
    k, v = (x.to(q.device).repeat_interleave(R, dim=0) for x in (k, v))
    return softmax((q * scale) @ k.mT if first else (q @ k.mT) * scale) @ v


def held(twin, q, k_pages, v_pages, k, v, scale=None, splits=None):
    """Twice the worst error of the plain formula and two spacings; in float64 1e-12."""
    want, got = exact(q, k, v, scale), twin(q, k_pages, v_pages, scale=scale, splits=splits)
    assert got.shape == want.shape and got.dtype == q.dtype and got.device == q.device
    assert got.isfinite().all()
    if not want.numel():
        return got
    error, size = (got.double() - want).abs().max().item(), want.abs().max().item()
    if q.dtype == f64:
        limit = 1e-12 * max(1, size)
    else:
        worst = [
            (formula(q_b, k_b, v_b, scale, first=first).double() - want_b).abs().max().item()
            for first in (True, False)
            for q_b, k_b, v_b, want_b in zip(q, k, v, want, strict=True)
            if k_b.shape[1]
        ]
        limit = 2 * max(worst, default=0) + 2 * torch.finfo(q.dtype).eps * size
    assert error <= limit, f"{error:.1e} > {limit:.1e}"
    return got


TWINS = [(decode.plain, f64), (decode.plain, f32), (decode.kernel, f32), (decode.kernel, f16)]
if DEVICE == "cpu":
    TWINS.append((decode.plain, f16))
twins = pytest.mark.parametrize(("twin", "dtype"), TWINS)
pair = pytest.mark.parametrize(("twin", "dtype"), [(decode.plain, f64), (decode.kernel, f32)])


@twins
@pytest.mark.parametrize("splits", [None, 1, 3, 9])
def test_any_number_of_splits_gives_the_reference(twin, dtype, splits):
    got = held(twin, *inputs(dtype=dtype), splits=splits)
    assert (got[1] == 0).all()  # the sequence without a position


@pair
def test_more_splits_than_are_joined_at_a_time(twin, dtype):
    q, k, v, rows, values = inputs([700], H=1, G=1, D=16, dtype=dtype)
    k.slots[:, k.table[0, 690 // 16] * 16 + 690 % 16] = q[0, :, 0]
    rows[0][:, 690] = q[0, :, 0]  # the largest score is in the last split
    held(twin, q, k, v, rows, values, splits=22)


@pair
@pytest.mark.parametrize("page_len", [1, 3, 16, 64])
@pytest.mark.parametrize("shuffled", [True, False])
def test_pages_of_any_length_in_any_order(twin, dtype, page_len, shuffled):
    held(
        twin, *inputs([35, 33, 32, 31], G=1, H=2, page_len=page_len, dtype=dtype, shuffled=shuffled)
    )


@pair
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (3, 40), (64, 64), (40, 3), (128, 96)])
def test_values_may_have_a_width_of_their_own(twin, dtype, D, Dv):
    held(twin, *inputs([50, 20], H=2, G=1, D=D, Dv=Dv, dtype=dtype), splits=2)


@pair
@pytest.mark.parametrize(("H", "G"), [(1, 1), (6, 6), (6, 2), (20, 1)])
def test_query_heads_share_key_heads_as_in_the_reference(twin, dtype, H, G):
    held(twin, *inputs([33, 5], H=H, G=G, D=16, dtype=dtype))


@pair
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_a_scale_is_honoured_zero_and_negative_too(twin, dtype, scale):
    held(twin, *inputs([40, 3], dtype=dtype), scale=scale, splits=2)
    held(twin, *inputs([40, 3], dtype=dtype, shuffled=False), scale=scale, splits=1)


@pair
def test_no_sequence_and_no_position_at_all(twin, dtype):
    assert (held(twin, *inputs([0, 0], dtype=dtype)) == 0).all()
    q, k, v, *_ = inputs([3], dtype=dtype)
    none = [
        replace(x, table=x.table[:0], lengths=x.lengths[:0], counts=x.counts[:0]) for x in (k, v)
    ]
    assert twin(q[:0], *none).shape == (0, 4, 1, 24)


@pair
def test_large_scores_in_some_splits_do_not_drown_or_overflow(twin, dtype):
    q, k, v, rows, values = inputs([300], H=1, G=1, D=16, dtype=dtype)
    j = torch.arange(300, device=DEVICE)
    slots = k.table[0, j // 16] * 16 + j % 16
    for at in (0, 150, 299):  # one key far above all others: it takes all
        far = k.slots.clone()
        far[:, slots[at]] = 60 * q[0, :, 0]
        got = twin(q, replace(k, slots=far), v, scale=10.0, splits=3)
        assert torch.equal(got[0, 0, 0].cpu(), values[0][0, at])


@pair
def test_what_stands_in_unused_slots_changes_no_bit(twin, dtype):
    q, k, v, *_ = inputs(dtype=dtype)
    want = twin(q, k, v, splits=3)
    other = [replace(x, slots=x.slots.nan_to_num(-1e4)) for x in (k, v)]
    assert torch.equal(twin(q, *other, splits=3), want)
    wild = k.table.clone()
    wild[0, 3:], wild[1], wild[3, 1:] = 10**6, -1, 10**9  # behind each last page
    again = twin(q, *(replace(x, table=wild) for x in (k, v)), splits=3)
    assert torch.equal(again, want)


@pytest.mark.parametrize("twin", [decode.plain, decode.kernel])
def test_a_query_of_any_strides_gives_the_same_bits(twin):
    q, k, v, *_ = inputs([20, 40])
    want = twin(q, k, v)
    assert torch.equal(twin(q.transpose(1, 2).contiguous().transpose(1, 2), k, v), want)
    assert torch.equal(twin(q.repeat_interleave(2, dim=3)[..., ::2], k, v), want)


@pytest.mark.parametrize("twin", [decode.plain, decode.kernel])
def test_tables_and_lengths_of_32_bits(twin):
    q, k, v, *_ = inputs([20, 40])
    short = [replace(x, table=x.table.int(), lengths=x.lengths.int()) for x in (k, v)]
    assert torch.equal(twin(q, *short), twin(q, k, v))


def test_attention_takes_the_plain_twin_away_from_a_gpu(monkeypatch):
    q, k, v, *_ = inputs()
    q, k, v = q.cpu(), *(replace(x, slots=x.slots.cpu(), table=x.table.cpu(),
                                 lengths=x.lengths.cpu()) for x in (k, v))  # fmt: skip
    monkeypatch.setattr(decode, "kernel", None)
    assert torch.equal(decode.attention(q, k, v, splits=2), decode.plain(q, k, v, splits=2))


def test_splits_that_are_wanted_keep_the_machine_busy_and_are_not_short(monkeypatch):
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    here = torch.device("cuda", 0)
    assert programs.wanted_splits(12, 4096, here) == 16  # 256 keys each
    assert programs.wanted_splits(12, 10**6, here) == 22  # 264 programs
    assert programs.wanted_splits(500, 10**6, here) == 1
    assert programs.wanted_splits(1, 10, here) == 1


# Packed rows.


def pool_of(lengths, G=2, D=8, page_len=4, dtype=f64):
    """A pool, its sequences, and what they hold, each (G, S, D)."""
    draw = torch.Generator().manual_seed(3)
    pool = PagedKVCache(1, G, D, page_len=page_len, n_pages=60, dtype=dtype)
    pool.keys[0].fill_(math.nan), pool.values[0].fill_(math.nan)
    seqs = [pool.new() for _ in lengths]
    k, v = ([torch.randn(G, n, D, generator=draw, dtype=dtype) for n in lengths] for _ in range(2))
    for seq, x, y in zip(seqs, k, v, strict=True):
        pool.append(seq, 0, x, y)
    return pool, seqs, k, v


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [([9, 20, 5], [1, 1, 1]), ([9, 20, 5], [3, 1, 5]), ([0, 7, 30], [4, 7, 1]), ([6], [2])],
)
def test_a_packed_row_gives_every_sequence_what_it_gets_alone(lengths, counts):
    old = [max(0, n - new) for n, new in zip(lengths, counts, strict=True)]
    pool, seqs, k, v = pool_of(old)
    draw = torch.Generator().manual_seed(4)
    N = sum(counts)
    q, new_k, new_v = (torch.randn(1, h, N, 8, generator=draw, dtype=f64) for h in (4, 2, 2))
    pages = Packed(pool, seqs, counts).append(0, new_k, new_v)
    got = decode.packed(q, *pages)
    assert got.shape == q.shape and got.isfinite().all()
    for x, y, *new in zip(k, v, *(z.split(counts, 2) for z in (q, new_k, new_v, got)), strict=True):
        q_b, k_b, v_b, got_b = new
        whole = torch.cat([x[None], k_b], 2), torch.cat([y[None], v_b], 2)
        assert (got_b - attention(q_b, *whole, masks.causal)).abs().max() < 1e-12


def test_a_sequence_that_brings_nothing_is_left_out():
    pool, seqs, *_ = pool_of([5, 6, 7])
    q = torch.randn(1, 2, 1, 8, dtype=f64)
    pages = pool.pages(0, seqs, [0, 1, 0])
    (alone,) = (attention(q, *(x[None] for x in pool.read(seqs[1], 0))),)
    assert (decode.packed(q, *pages) - alone).abs().max() < 1e-12
    assert decode.packed(q[:, :, :0], *pool.pages(0, seqs, [0, 0, 0])).shape == (1, 2, 0, 8)


def test_packed_refuses_what_does_not_fit(unchecked):
    pool, seqs, *_ = pool_of([5, 6])
    k, v = pool.pages(0, seqs, [1, 2])
    q = torch.randn(1, 2, 3, 8, dtype=f64)
    with pytest.raises(ValueError, match=r"q must be \(1, H, 3, D\).*\(1, 2, 2, 8\)"):
        decode.packed(q[:, :, :2], k, v)
    with pytest.raises(ValueError, match="dropout 0.5"):
        decode.packed(q, k, v, nn.Dropout(0.5))
    assert decode.packed(q, k, v, nn.Dropout(0.5).eval()).shape == q.shape
    wrong = replace(k, lengths=torch.tensor([5, 1]))
    with pytest.raises(ValueError, match=r"\[1, 2\] new positions cannot be the last of \[5, 1\]"):
        decode.packed(q, wrong, v)


# What is refused.


@pytest.mark.parametrize("twin", [decode.plain, decode.kernel])
@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        ({"q": lambda q: q[:, :, [0, 0]]}, ValueError, r"\(B, H, 1, D\).*\(4, 4, 2, 24\)"),
        ({"q": lambda q: q[:2]}, ValueError, "batch 2, the table of k has 4"),
        ({"q": lambda q: q[..., :8]}, ValueError, "width above 0, got 8 and 24"),
        ({"q": lambda q: q[:, :3]}, ValueError, "3 query heads cannot share 2"),
        ({"q": lambda q: q.double()}, ValueError, "dtype, got torch.float64, torch.float32"),
        ({"k": lambda k: k.slots}, TypeError, "k must be pages, got Tensor"),
        ({"v": lambda v: replace(v, page_len=8)}, ValueError, "page length .* differ"),
        ({"v": lambda v: replace(v, table=v.table + 1)}, ValueError, "tables that agree"),
        ({"v": lambda v: replace(v, lengths=v.lengths - 1)}, ValueError, "tables that agree"),
        ({"v": lambda v: replace(v, slots=v.slots[:1])}, ValueError, "heads, slots"),
        ({"k": lambda k: replace(k, lengths=k.lengths[:2])}, ValueError, r"\(B, n\) and \(B,\)"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"splits": 0}, ValueError, "splits=0"),
        ({"splits": 1.5}, ValueError, "splits=1.5"),
    ],
)
def test_bad_arguments_are_refused_by_name(unchecked, twin, change, kind, word):
    q, k, v, *_ = inputs()
    given = {"q": q, "k": k, "v": v}
    for name, make in change.items():
        given[name] = make(given[name]) if callable(make) else make
    with pytest.raises(kind, match=word):
        twin(**given)


def test_slots_that_are_not_whole_pages_are_refused():
    q, k, v, *_ = inputs()
    cut = [replace(x, slots=x.slots[:, :-1]) for x in (k, v)]
    with pytest.raises(ValueError, match="not whole pages of 16"):
        decode.plain(q, *cut)


def test_the_plain_twin_looks_at_tables_and_lengths():
    q, k, v, *_ = inputs()
    q, k, v = q.cpu(), *(replace(x, slots=x.slots.cpu(), table=x.table.cpu(),
                                 lengths=x.lengths.cpu()) for x in (k, v))  # fmt: skip
    for page in (-1, 10**6):
        table = k.table.clone()
        table[0, 1] = page
        bad = [replace(x, table=table) for x in (k, v)]
        with pytest.raises(ValueError, match=f"sequence 0 names pages .*{page}"):
            decode.plain(q, *bad)
    for n in (-1, 10**4):
        lengths = k.lengths.clone()
        lengths[2] = n
        bad = [replace(x, lengths=lengths) for x in (k, v)]
        with pytest.raises(ValueError, match=f"sequence 2: length {n} "):
            decode.plain(q, *bad)


def test_the_kernel_takes_a_length_as_far_as_its_table_goes():
    q, k, v, *_ = inputs([64, 20])
    long = [replace(x, lengths=x.lengths.clamp(min=64) * 10) for x in (k, v)]
    got = decode.kernel(q, *long)
    assert torch.equal(got[0], decode.kernel(q, k, v)[0])


@pytest.mark.parametrize(
    ("change", "word"),
    [({"dtype": f64}, "float64"), ({"D": 257}, "257"), ({"Dv": 257}, "257")],
)
def test_what_the_kernel_does_not_know_it_refuses_by_name(change, word):
    q, k, v, *_ = inputs([20], **change)
    with pytest.raises(ValueError, match=f"{word}.*heed.flash.decode.plain"):
        decode.kernel(q, k, v)


def test_the_kernel_refuses_strange_slots_and_gradients():
    q, k, v, *_ = inputs([20])
    columns = replace(k, slots=k.slots.mT.contiguous().mT)
    with pytest.raises(ValueError, match="side by side"):
        decode.kernel(q, columns, v)
    with pytest.raises(ValueError, match="no gradient"):
        decode.kernel(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert decode.kernel(q, k, v).isfinite().all()


@pytest.mark.skipif(not programs.INTERPRETED, reason="about Triton's interpreter")
def test_bfloat16_is_refused_under_the_interpreter():
    q, k, v, *_ = inputs(dtype=bf16)
    with pytest.raises(ValueError, match="bfloat16 under TRITON_INTERPRET.*decode.plain"):
        decode.kernel(q, k, v)


def test_torch_alone_serves_the_plain_twin_and_a_cpu_the_kernel_not():
    code = """
import sys, torch
from heed.cache.paged import Pages
from heed.flash import decode
assert "triton" not in sys.modules
one = Pages(torch.ones(1, 4, 16), torch.zeros(1, 1).long(), torch.ones(1).long(), 4,
            torch.ones(1).long())
q = torch.ones(1, 1, 1, 16)
print(decode.attention(q, one, one).sum().item())
try:
    decode.kernel(q, one, one)
except ValueError as problem:
    print(problem)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.startswith("16.0"), done.stderr
    assert "a CUDA device, or TRITON_INTERPRET=1" in done.stdout


# On a GPU. Each body runs under the interpreter too, small.


def on_gpu(test):
    missing = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs CUDA")(test))


@on_gpu
@pytest.mark.parametrize("dtype", [bf16, f16, f32])
@pytest.mark.parametrize(("H", "G", "D"), [(12, 12, 64), (32, 8, 128), (16, 1, 256)])
@pytest.mark.parametrize("splits", [None, 1, 5])
def test_gpu_thousands_of_keys(dtype, H, G, D, splits):
    made = inputs([4096, 1, 0, 1000, 2047], H=H, G=G, D=D, dtype=dtype)
    held(decode.kernel, *made, splits=splits)
    q, k, v, *_ = made
    assert torch.equal(decode.attention(q, k, v), decode.kernel(q, k, v))


@on_gpu
def test_gpu_a_graph_goes_on_with_what_tables_and_lengths_hold_at_its_replay():
    q, k, v, *_ = inputs([300, 40, 7], dtype=bf16)
    decode.kernel(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode.kernel(q, k, v)
    graph.replay()
    assert torch.equal(o, decode.kernel(q, k, v))
    k.lengths.copy_(torch.tensor([200, 0, 5], device=DEVICE))
    k.table[0] = k.table[0].flip(0)
    splits = programs.wanted_splits(6, k.table.shape[1] * 16, q.device)
    graph.replay()
    q_ = q.cpu(), *(replace(x, slots=x.slots.cpu(), table=x.table.cpu(), lengths=x.lengths.cpu())
                    for x in (k, v))  # fmt: skip
    want = decode.plain(*q_, splits=splits)
    keep = [1, 2]  # the flipped row reads unused slots of its last page
    torch.testing.assert_close(o[keep].cpu(), want[keep], rtol=2e-2, atol=2e-2)


@on_gpu
def test_gpu_a_packed_row_and_two_runs_agree():
    q, k, v, *_ = inputs([500, 33, 70], H=4, G=2, D=64, dtype=bf16)
    some = [replace(x, counts=torch.tensor([1, 30, 1], device=DEVICE)) for x in (k, v)]
    row = torch.randn(1, 4, 32, 64, device=DEVICE, dtype=bf16)
    a, b = (decode.packed(row, *some) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all()


def test_a_long_stretch_of_a_packed_row_is_read_in_tiles(monkeypatch):
    """Above PAIRS scores; both ways give the causal formula."""
    pool = PagedKVCache(1, 2, 5, page_len=7, n_pages=40, dtype=torch.float64)
    seq = pool.new()
    k, v = torch.randn(2, 2, 150, 5, dtype=torch.float64)
    pool.append(seq, 0, k, v)
    q = torch.randn(1, 4, 143, 5, dtype=torch.float64)
    pages = pool.pages(0, [seq], [143])
    want = attention(q, k[None], v[None], masks.causal)
    tiled = []
    monkeypatch.setattr(decode.flash, "attention", lambda *x: (tiled.append(1), attention(*x))[1])
    for pairs in (0, 143 * 150 - 1, 143 * 150):
        monkeypatch.setattr(decode, "PAIRS", pairs)
        assert torch.allclose(decode.packed(q, *pages), want, rtol=0, atol=1e-12)
    assert len(tiled) == 2


def test_short_texts_side_by_side_read_what_each_reads_alone(monkeypatch):
    pool = PagedKVCache(1, 2, 5, page_len=3, n_pages=60, dtype=torch.float64)
    seqs = [pool.new() for _ in range(9)]
    for n, seq in zip((1, 4, 5, 7, 6, 16, 31, 2, 3), seqs, strict=True):
        pool.append(seq, 0, *torch.randn(2, 2, n, 5, dtype=torch.float64))
    q = torch.randn(9, 4, 1, 5, dtype=torch.float64)
    pages = pool.pages(0, seqs, [1] * 9)
    together = decode.plain(q, *pages)
    monkeypatch.setattr(decode, "SHORT", 0)
    assert torch.allclose(decode.plain(q, *pages), together, rtol=0, atol=1e-12)
    alone = [attention(q[b : b + 1], *(x.read(b)[None] for x in pages)) for b in range(9)]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-12)
