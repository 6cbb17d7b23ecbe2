"""The pool of pages, held against a dictionary of tensors over thousands of random steps."""

from collections import Counter
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from heed import masks
from heed.attention import attention
from heed.cache.paged import Packed, Paged, PagedKVCache, Pages
from heed.gpt import GPT, GPTConfig

f64 = torch.float64
exactly = {"rtol": 0, "atol": 0}
LAYERS, HEADS, WIDTH, PAGES = 2, 2, 3, 9


def pool(page_len=4, n_pages=12, n_layers=LAYERS, dtype=torch.float32):
    made = PagedKVCache(n_layers, HEADS, WIDTH, page_len=page_len, n_pages=n_pages, dtype=dtype)
    poison(made)
    return made


def poison(pool):
    """NaN in every slot that no sequence has filled, stale ones included."""
    for layer in range(pool.n_layers):
        used = torch.zeros(pool.n_pages * pool.page_len, dtype=torch.bool)
        for table in pool.ledger.tables.values():
            for p in range(table.filled[layer]):
                used[table.pages[p // pool.page_len] * pool.page_len + p % pool.page_len] = True
        pool.keys[layer][:, ~used] = torch.nan
        pool.values[layer][:, ~used] = torch.nan


def snapshot(pool):
    book = pool.ledger
    tables = {seq: (list(t.pages), list(t.filled)) for seq, t in book.tables.items()}
    numbers = [x.clone() for x in pool.keys + pool.values]
    return list(book.counts), tables, book.free_pages, numbers


def unchanged(pool, before):
    after = snapshot(pool)
    assert after[:3] == before[:3]
    for x, y in zip(after[3], before[3], strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, **exactly)


class Machine(RuleBasedStateMachine):
    """Any calls in any order. `held` says what each sequence must contain: (2, G, n, D) a layer."""

    @initialize(page_len=st.integers(1, 4))
    def start(self, page_len):
        self.pool, self.held, self.drawn = pool(page_len, PAGES), {}, 0

    def numbers(self, n):
        self.drawn += 1
        draw = torch.Generator().manual_seed(self.drawn)
        return torch.randn(2, HEADS, n, WIDTH, generator=draw)

    def one(self, data):
        return data.draw(st.sampled_from(sorted(self.held)))

    def length(self, seq):
        return min(x.shape[2] for x in self.held[seq])

    @rule()
    def new(self):
        seq = self.pool.new()
        assert seq not in self.held and self.pool.length(seq) == 0
        self.held[seq] = [torch.empty(2, HEADS, 0, WIDTH)] * LAYERS

    def write(self, layer, seqs, counts):
        """Refused only where the pages really are too few."""
        new, before = self.numbers(sum(counts)), snapshot(self.pool)
        roomy = deepcopy(self.pool.ledger)
        roomy.counts += [0] * 99
        roomy.n_pages += 99
        roomy.grow(layer, seqs, counts)
        need = self.pool.free_pages + 99 - roomy.free_pages
        if need > self.pool.free_pages:
            with pytest.raises(ValueError, match=f"{need} pages are needed, "):
                self.pool.write(layer, seqs, counts, *new)
            unchanged(self.pool, before)
            return False
        self.pool.write(layer, seqs, counts, *new)
        for seq, x in zip(seqs, new.split(counts, dim=2), strict=True):
            self.held[seq][layer] = torch.cat([self.held[seq][layer], x], dim=2)
        return True

    @precondition(lambda self: self.held)
    @rule(data=st.data(), n=st.integers(0, 9))
    def step(self, data, n):
        seq = self.one(data)
        for layer in range(LAYERS):
            if not self.write(layer, [seq], [n]):
                break  # layers of different length: as after a step that broke off

    @precondition(lambda self: self.held)
    @rule(data=st.data(), n=st.integers(0, 5), layer=st.integers(0, LAYERS - 1))
    def one_layer(self, data, n, layer):
        self.write(layer, [self.one(data)], [n])

    @precondition(lambda self: len(self.held) > 1)
    @rule(data=st.data())
    def packed_step(self, data):
        some = st.lists(st.sampled_from(sorted(self.held)), min_size=2, max_size=4, unique=True)
        seqs = data.draw(some)
        counts = [data.draw(st.integers(0, 4)) for _ in seqs]
        if all(self.write(layer, seqs, counts) for layer in range(LAYERS)):
            for layer in range(LAYERS):
                k, v = self.pool.pages(layer, seqs, counts)
                assert k.counts.tolist() == counts
                for b, seq in enumerate(seqs):
                    want = self.held[seq][layer]
                    assert k.lengths[b] == want.shape[2]
                    got = torch.stack([k.read(b), v.read(b)])
                    torch.testing.assert_close(got, want, **exactly)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data):
        old = self.one(data)
        free, n = self.pool.free_pages, self.length(old)
        n = data.draw(st.none() | st.integers(0, n))
        seq = self.pool.fork(old, n)
        assert seq not in self.held and self.pool.free_pages == free
        keep = self.length(old) if n is None else n
        self.held[seq] = [x[:, :, :keep] for x in self.held[old]]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def truncate(self, data):
        seq = self.one(data)
        n = data.draw(st.integers(0, self.length(seq)))
        self.pool.truncate(seq, n)
        self.held[seq] = [x[:, :, :n] for x in self.held[seq]]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        seq = self.one(data)
        self.pool.free(seq)
        del self.held[seq]
        before = snapshot(self.pool)
        with pytest.raises(ValueError, match=f"sequence {seq} was never made, or is freed"):
            self.pool.free(seq)
        unchanged(self.pool, before)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), which=st.integers(0, 5))
    def refused(self, data, which):
        seq, p = self.one(data), self.pool
        one, before = self.numbers(1), snapshot(p)
        call, words = [
            (lambda: p.append(seq, LAYERS, *one), "layer 2: the cache has layers 0 to 1"),
            (lambda: p.append(-1, 0, *one), "sequence -1 was never made"),
            (lambda: p.append(seq, 0, *one.double()), "k is torch.float64, the cache keeps"),
            (lambda: p.append(seq, 0, *self.numbers(PAGES * 4 + 1)), "pages are needed"),
            (lambda: p.truncate(seq, self.length(seq) + 1), "cannot keep"),
            (lambda: p.write(0, [seq], [2], *one), r"counts \[2\] of 1 tokens"),
        ][which]
        with pytest.raises(ValueError, match=words):
            call()
        unchanged(p, before)

    @invariant()
    def everything_is_held_and_accounted_for(self):
        if not hasattr(self, "pool"):
            return
        poison(self.pool)
        book = self.pool.ledger
        named = Counter(page for table in book.tables.values() for page in table.pages)
        assert book.counts == [named[page] for page in range(PAGES)]
        assert self.pool.free_pages == PAGES - len(named)
        assert self.pool.nbytes == len(named) * self.pool.page_bytes
        assert set(book.tables) == set(self.held)
        for seq, layers in self.held.items():
            table, longest = book.find(seq), max(x.shape[2] for x in layers)
            assert len(table.pages) * self.pool.page_len - longest < self.pool.page_len
            assert self.pool.length(seq) == self.length(seq)
            for layer, want in enumerate(layers):
                got = torch.stack(self.pool.read(seq, layer))
                torch.testing.assert_close(got, want, **exactly)


Machine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestAnyCallsInAnyOrder = Machine.TestCase


# Under a model


def model(n_layers=3):
    sizes = {"vocab_size": 61, "max_len": 19, "n_layers": n_layers, "n_heads": 2, "d_model": 6}
    made, draw = GPT(GPTConfig(**sizes)), torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=draw, dtype=f64)
    return made.double().eval()


def plainly(q, k, v, dropout):
    """An `attend` that reads pages: one sequence after the other."""
    parts = q.split(k.counts.tolist(), dim=2)
    return torch.cat(
        [
            attention(part, k.read(b)[None], v.read(b)[None], masks.causal)
            for b, part in enumerate(parts)
        ],
        dim=2,
    )


def reading_pages():
    twin = model()
    for block in twin.blocks:
        block.attn.attend = plainly
    return twin


@torch.no_grad()
def test_a_packed_row_of_prompts_and_single_tokens_gives_what_each_gives_alone():
    whole, twin, p = model(), reading_pages(), pool(3, 30, n_layers=3, dtype=f64)
    texts, seqs = torch.randint(61, (4, 17)), [p.new() for _ in range(4)]
    read = dict.fromkeys(seqs, 0)
    rows = {seq: text for seq, text in zip(seqs, texts, strict=True)}
    steps = [{0: 5, 1: 1}, {0: 1, 2: 7, 1: 4}, {3: 1, 0: 1, 2: 1, 1: 0}, {2: 9, 3: 3}]
    for step in steps:
        order, counts = [seqs[i] for i in step], list(step.values())
        new = [rows[s][read[s] : read[s] + n] for s, n in zip(order, counts, strict=True)]
        cache = Packed(p, order, counts)
        assert cache.length == sum(read[s] for s in order)
        got = twin(torch.cat(new)[None], cache=cache)[0].split(counts)
        for seq, n, logits in zip(order, counts, got, strict=True):
            read[seq] += n
            want = whole(rows[seq][None, : read[seq]])[0, read[seq] - n :]
            torch.testing.assert_close(logits, want, rtol=0, atol=1e-10)
        poison(p)
    assert cache.nbytes == sum(-(-read[s] // 3) for s in order) * p.page_bytes


@torch.no_grad()
def test_beams_share_what_they_have_in_common():
    net, p = model(), pool(4, 12, n_layers=3, dtype=f64)
    ids, prompt = torch.randint(61, (3, 11)), torch.randint(61, (1, 6))
    first = p.new()
    net(prompt, cache=Paged(p, [first]))
    beams = Paged(p, [first, p.fork(first), p.fork(first)])
    assert beams.nbytes == p.nbytes == 2 * p.page_bytes  # six positions, three readers, two pages
    ids[:, :6] = prompt
    for t in range(6, 11):
        got = net(ids[:, t : t + 1], cache=beams)[:, 0]
        torch.testing.assert_close(got, net(ids[:, : t + 1])[:, -1], rtol=0, atol=1e-10)
        rows = torch.tensor([2, 0, 2])
        beams.reorder(rows)
        ids[:, : t + 1] = ids[rows, : t + 1]
        poison(p)
    for seq in beams.seqs:
        p.free(seq)
    assert p.free_pages == 12


def test_neighbouring_pages_are_read_where_they_stand_and_others_are_gathered():
    p = pool(n_layers=1)
    a, b = p.new(), p.new()
    k, v = torch.randn(2, HEADS, 7, WIDTH)
    for seq in (a, b):
        p.append(seq, 0, k, v)
    for seq in (a, b):
        got = p.read(seq, 0)
        start = p.ledger.find(seq).pages[0] * 4
        assert got[0].data_ptr() == p.keys[0][:, start:].data_ptr()
        torch.testing.assert_close(torch.stack(got), torch.stack([k, v]), **exactly)
    c = p.fork(a)
    p.append(c, 0, k, v)
    assert p.ledger.find(c).pages[:2] != [0, 1]
    got = p.read(c, 0)[0]
    torch.testing.assert_close(got, torch.cat([k, k], dim=1), **exactly)


def test_a_handle_says_where_everything_stands():
    p = pool(n_layers=1)
    a, b = p.new(), p.new()
    p.append(a, 0, *torch.randn(2, HEADS, 6, WIDTH))
    p.append(b, 0, *torch.randn(2, HEADS, 1, WIDTH))
    k, v = p.pages(0, [a, b], [2, 1])
    assert isinstance(k, Pages) and k.page_len == 4
    assert k.table.dtype == k.lengths.dtype == k.counts.dtype == torch.int64
    first, second = (p.ledger.find(seq).pages for seq in (a, b))
    assert k.table.tolist() == [first, [*second, 0]] == v.table.tolist()
    assert k.lengths.tolist() == [6, 1] and k.counts.tolist() == [2, 1]
    assert k.slots is p.keys[0] and v.slots is p.values[0]


def test_bytes_of_a_page_hold_all_layers_keys_and_values():
    p = pool(dtype=torch.float16)
    assert p.page_bytes == 2 * LAYERS * HEADS * 4 * WIDTH * 2
    assert p.n_pages * p.page_bytes == sum(x.nbytes for x in p.keys + p.values)
    assert p.nbytes == 0


def zeros(n, heads=HEADS, width=WIDTH, **settings):
    return torch.zeros(2, heads, n, width, **settings)


BAD = {
    "three heads": (lambda p: p.append(0, 0, *zeros(1, heads=3)), r"k must be \(2, new, 3\), got"),
    "wide": (lambda p: p.append(0, 0, *zeros(1, width=4)), r"got \(2, 1, 4\)"),
    "flat": (lambda p: p.append(0, 0, *torch.zeros(2, 3)), r"k must be .*, got \(3,\)"),
    "batch": (lambda p: p.append(0, 0, *zeros(1)[:, None]), r"k must be .*, got \(1, 2, 1, 3\)"),
    "values": (lambda p: p.append(0, 0, zeros(1)[0], zeros(2)[0]), "1 keys but 2 values"),
    "dtype": (lambda p: p.append(0, 0, *zeros(1, dtype=f64)), "k is torch.float64, the cache keep"),
    "device": (
        lambda p: p.append(0, 0, *zeros(1, device="meta")),
        "k is on meta, the cache on cpu",
    ),
    "layer": (lambda p: p.append(0, 2, *zeros(1)), "layer 2: the cache has layers 0 to 1"),
    "read layer": (lambda p: p.read(0, -1), "layer -1: the cache has layers 0 to 1"),
    "pages layer": (lambda p: p.pages(2, [0], [1]), "layer 2: the cache has layers 0 to 1"),
    "unknown": (lambda p: p.append(7, 0, *zeros(1)), "sequence 7 was never made, or is freed"),
    "read unknown": (lambda p: p.read(7, 0), "sequence 7 was never made, or is freed already"),
    "length unknown": (lambda p: p.length(7), "sequence 7 was never made, or is freed already"),
    "too new": (lambda p: p.pages(0, [0, 1], [1, 4]), "sequence 1 holds 3 positions: 4 of them"),
    "full": (lambda p: p.write(0, [0, 1], [40, 1], *zeros(41)), "pages are needed, 9 of 12 free"),
    "counts": (lambda p: p.write(0, [0, 1], [1, 1], *zeros(3)), r"counts \[1, 1\] of 3 tokens"),
    "twice": (lambda p: Paged(p, [0, 0]), "each sequence once"),
    "unequal": (lambda p: Paged(p, [0, 1]), r"equal length, please, or Packed: got \[3, 5\]"),
    "nobody": (lambda p: Paged(p, []), "each sequence once"),
    "packed twice": (lambda p: Packed(p, [0, 0], [1, 1]), "each sequence once"),
    "packed unknown": (lambda p: Packed(p, [0, 7], [1, 1]), "sequence 7 was never made"),
    "packed negative": (lambda p: Packed(p, [0, 1], [1, -1]), "counts must not be negative"),
    "packed places": (lambda p: Packed(p, [0, 1], [1, 2]).places(4), r"4 tokens, but the counts"),
    "packed rows": (
        lambda p: Packed(p, [0, 1], [1, 1]).append(0, *zeros(1)[:, None].expand(2, 2, 2, 1, 3)),
        r"k must be \(1, 2, new, 3\), got \(2, 2, 1, 3\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_changes_nothing(name, unchecked):
    p = pool()
    for n in (5, 3):
        seq = p.new()
        for layer in range(LAYERS):
            p.append(seq, layer, *torch.randn(2, HEADS, n, WIDTH))
    before = snapshot(p)
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call(p)
    unchanged(p, before)


def test_a_packed_step_of_which_one_sequence_finds_no_page_writes_none():
    p = pool(n_pages=2, n_layers=1)
    a, b = p.new(), p.new()
    p.write(0, [a, b], [3, 4], *zeros(7))
    before = snapshot(p)
    with pytest.raises(ValueError, match="1 pages are needed, 0 of 2 free"):
        Packed(p, [a, b], [1, 1]).append(0, *zeros(2)[:, None])
    unchanged(p, before)


@pytest.mark.parametrize("name", ["n_layers", "n_kv_heads", "d_head", "page_len", "n_pages"])
def test_sizes_below_one_are_refused(name):
    sizes = {"n_layers": 2, "n_kv_heads": 2, "d_head": 3, "page_len": 4, "n_pages": 5}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
        PagedKVCache(**sizes | {name: 0})
