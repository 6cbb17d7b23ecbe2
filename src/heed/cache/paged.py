"""A pool of pages, dealt out as an operating system deals out memory (Kwon et al. 2023).

A sequence owns a table of pages, not a stretch of memory: it wastes less than one page, sequences
with one beginning share its pages, and whoever writes into a shared page copies it first.

B sequences · N tokens of a packed row · T new positions · S positions read · G key-value heads ·
D width of a key.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.cache import check_cut, check_dtype, check_layer, check_new, check_rows, check_sizes
from heed.cache.ledger import Copy, Ledger


@dataclass(frozen=True, eq=False)
class Pages:
    """Keys (or values) of some sequences in one layer, where they stand: nothing is copied.

    Position p of sequence b stands in slot table[b, p // page_len] * page_len + p % page_len.
    """

    slots: Float[Tensor, "G n_slots D"]
    table: Int[Tensor, "B n"]  # page numbers; behind a sequence's last page stands 0
    lengths: Int[Tensor, " B"]  # positions to read, the new ones included
    page_len: int
    counts: Int[Tensor, " B"]  # how many of them are new: the queries

    def read(self, b: int) -> Float[Tensor, "G S D"]:
        """All positions of sequence b, in order; a view where its pages are neighbours."""
        return _gather(self.slots, self.table[b].tolist(), self.page_len, int(self.lengths[b]))


class PagedKVCache:
    """n_pages pages, each for page_len positions of all layers. A refused call changes nothing."""

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        d_head: int,
        *,
        page_len: int,
        n_pages: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_sizes(n_kv_heads=n_kv_heads, d_head=d_head)
        check_dtype(dtype)
        self.ledger = Ledger(n_layers, page_len, n_pages)
        self.n_layers, self.n_kv_heads, self.d_head = n_layers, n_kv_heads, d_head
        self.page_len, self.n_pages = page_len, n_pages
        shape = (n_kv_heads, n_pages * page_len, d_head)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.values = [torch.empty_like(x) for x in self.keys]
        self.dtype, self.device = dtype, self.keys[0].device

    @property
    def free_pages(self) -> int:
        return self.ledger.free_pages

    @property
    def page_bytes(self) -> int:
        numbers = 2 * self.n_layers * self.n_kv_heads * self.page_len * self.d_head
        return numbers * self.keys[0].element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use; a shared page counts once."""
        return (self.n_pages - self.free_pages) * self.page_bytes

    def new(self) -> int:
        """An empty sequence. Its number is never given again."""
        return self.ledger.new()

    def length(self, seq: int) -> int:
        """Positions that every layer holds."""
        return self.ledger.find(seq).length

    def append(
        self, seq: int, layer: int, k: Float[Tensor, "G T D"], v: Float[Tensor, "G T D"]
    ) -> None:
        """Write behind the positions that this layer holds."""
        self._check(layer, k, v)
        self.write(layer, [seq], [k.shape[1]], k, v)

    def write(
        self,
        layer: int,
        seqs: Sequence[int],
        counts: Sequence[int],
        k: Float[Tensor, "G N D"],
        v: Float[Tensor, "G N D"],
    ) -> None:
        """N tokens, counts[b] for sequence b, one sequence after the other: all of them or none."""
        self._check(layer, k, v)
        if sum(counts) != k.shape[1]:
            raise ValueError(f"counts {counts} of {k.shape[1]} tokens")
        spans, copies = self.ledger.grow(layer, seqs, counts)
        for copy in copies:
            self._copy(copy)
        where = [n for seq, span in zip(seqs, spans, strict=True) for n in self._slots(seq, span)]
        index = torch.tensor(where, dtype=torch.int64, device=self.device)
        self.keys[layer][:, index], self.values[layer][:, index] = k, v

    def read(self, seq: int, layer: int) -> tuple[Float[Tensor, "G S D"], Float[Tensor, "G S D"]]:
        """All keys and values of a sequence in a layer; views where its pages are neighbours."""
        check_layer(layer, self.n_layers)
        table = self.ledger.find(seq)
        n, slots = table.filled[layer], (self.keys[layer], self.values[layer])
        k, v = (_gather(x, table.pages, self.page_len, n) for x in slots)
        return k, v

    def pages(self, layer: int, seqs: Sequence[int], counts: Sequence[int]) -> tuple[Pages, Pages]:
        """Handles on the keys and the values, of which counts[b] of sequence b are new."""
        check_layer(layer, self.n_layers)
        tables = self.ledger.several(seqs, counts)
        lengths = [table.filled[layer] for table in tables]
        for seq, n, new in zip(seqs, lengths, counts, strict=True):
            if new > n:
                raise ValueError(f"sequence {seq} holds {n} positions: {new} of them cannot be new")
        used = [t.pages[: self.ledger.pages_of(n)] for t, n in zip(tables, lengths, strict=True)]
        width = max(map(len, used))
        rows = [pages + [0] * (width - len(pages)) for pages in used]
        whole = (rows, lengths, list(counts))
        table, ends, new_ = (torch.tensor(x, dtype=torch.int64, device=self.device) for x in whole)
        k = Pages(self.keys[layer], table, ends, self.page_len, new_)
        return k, replace(k, slots=self.values[layer])

    def truncate(self, seq: int, n: int) -> None:
        """Forget all but the first n positions, and hand back the pages that only those needed."""
        self.ledger.truncate(seq, n)

    def fork(self, seq: int, n: int | None = None) -> int:
        """A sequence with the same first n positions (all, if None). Pages are shared until one of
        the two writes into them."""
        return self.ledger.fork(seq, n)

    def free(self, seq: int) -> None:
        """Hand back the pages that this sequence alone holds."""
        self.ledger.free(seq)

    def _check(self, layer: int, k: Tensor, v: Tensor) -> None:
        check_layer(layer, self.n_layers)
        check_new(k, v, (self.n_kv_heads,), (self.d_head,) * 2, self.dtype, self.device)

    def _slots(self, seq: int, span: range) -> list[int]:
        """Where these positions of a sequence stand."""
        pages, n = self.ledger.find(seq).pages, self.page_len
        return [pages[p // n] * n + p % n for p in span]

    def _copy(self, copy: Copy) -> None:
        for layer, n in enumerate(copy.filled):
            old, new = copy.old * self.page_len, copy.new * self.page_len
            for slots in (self.keys[layer], self.values[layer]):
                slots[:, new : new + n] = slots[:, old : old + n]


class _View:
    """Some sequences of a pool, in the order in which a model sees them."""

    def __init__(self, pool: PagedKVCache, seqs: Sequence[int], counts: Sequence[int]) -> None:
        pool.ledger.several(seqs, counts)
        self.pool, self.seqs = pool, list(seqs)

    def check(self, rows: int, k: Tensor, v: Tensor) -> None:
        p = self.pool
        check_new(k, v, (rows, p.n_kv_heads), (p.d_head, p.d_head), p.dtype, p.device)

    @property
    def nbytes(self) -> int:
        """Bytes of their pages; a shared page counts once."""
        held = {page for seq in self.seqs for page in self.pool.ledger.find(seq).pages}
        return len(held) * self.pool.page_bytes


class Paged(_View):
    """The protocol for sequences of equal length: tensors come back, (B, G, S, D).

    `seqs` are its sequences; `reorder` forks and frees, so afterwards they are others.
    """

    def __init__(self, pool: PagedKVCache, seqs: Sequence[int]) -> None:
        super().__init__(pool, seqs, [0] * len(seqs))
        self.places(0)

    @property
    def length(self) -> int:
        lengths = {self.pool.length(seq) for seq in self.seqs}
        if len(lengths) > 1:
            raise ValueError(f"sequences of equal length, please, or Packed: got {sorted(lengths)}")
        return lengths.pop()

    def places(self, n: int) -> Int[Tensor, " T"]:
        return torch.arange(self.length, self.length + n, device=self.pool.device)

    def append(
        self, layer: int, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S D"]]:
        """Gathered out of the pages; for one sequence in neighbouring pages a view of them."""
        self.check(len(self.seqs), k, v)
        packed = (x.transpose(0, 1).flatten(1, 2) for x in (k, v))  # (G, B T, D)
        self.pool.write(layer, self.seqs, [k.shape[2]] * len(k), *packed)
        rows = [self.pool.read(seq, layer) for seq in self.seqs]
        if len(rows) == 1:
            return rows[0][0][None], rows[0][1][None]
        return torch.stack([k for k, _ in rows]), torch.stack([v for _, v in rows])

    def truncate(self, n: int) -> None:
        check_cut(n, self.length)
        for seq in self.seqs:
            self.pool.truncate(seq, n)

    def reorder(self, rows: Int[Tensor, " B"]) -> None:
        check_rows(rows, len(self.seqs))
        forks = [self.pool.fork(self.seqs[row]) for row in rows.tolist()]
        for seq in self.seqs:
            self.pool.free(seq)
        self.seqs = forks


class Packed(_View):
    """One step of ONE packed row: sequence seqs[b] brings counts[b] tokens, one after the other.

    What comes back are `Pages`, for an `attend` that reads them (`heed.flash.decode.packed`). To
    cut, fork or free a sequence, ask the pool.
    """

    def __init__(self, pool: PagedKVCache, seqs: Sequence[int], counts: Sequence[int]) -> None:
        super().__init__(pool, seqs, counts)
        self.counts = list(counts)

    @property
    def length(self) -> int:
        """Positions of all its sequences together."""
        return sum(map(self.pool.length, self.seqs))

    def places(self, n: int) -> Int[Tensor, " N"]:
        """Where each token stands in its own sequence."""
        if n != sum(self.counts):
            raise ValueError(f"{n} tokens, but the counts are {self.counts}")
        starts = [self.pool.length(seq) for seq in self.seqs]
        spans = zip(starts, self.counts, strict=True)
        places = [p for a, n in spans for p in range(a, a + n)]
        return torch.tensor(places, dtype=torch.int64, device=self.pool.device)

    def append(
        self, layer: int, k: Float[Tensor, "1 G N D"], v: Float[Tensor, "1 G N D"]
    ) -> tuple[Pages, Pages]:
        self.check(1, k, v)
        self.pool.write(layer, self.seqs, self.counts, k[0], v[0])
        return self.pool.pages(layer, self.seqs, self.counts)


def _gather(slots: Tensor, pages: Sequence[int], page_len: int, n: int) -> Tensor:
    """The first n positions of these pages, (G, n, D): a view if they are neighbours."""
    used = pages[: -(-n // page_len)]
    if not used:
        return slots[:, :0]
    if list(used) == list(range(used[0], used[0] + len(used))):
        return slots[:, used[0] * page_len :][:, :n]
    index = torch.tensor(used, device=slots.device)
    return slots.unflatten(1, (-1, page_len)).index_select(1, index).flatten(1, 2)[:, :n]
