"""Who holds which page: the bookkeeping of `heed.cache.paged`, in whole numbers and no tensors.

A page is free when no table names it. There is no list of free pages beside the counts, so none
can disagree with them: no page leaks, none is free twice. What is refused is refused before
anything has changed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from heed.cache import check_cut, check_layer, check_sizes


@dataclass
class Table:
    """One sequence: its pages, and how many positions each layer has filled."""

    pages: list[int]
    filled: list[int]

    @property
    def length(self) -> int:
        return min(self.filled)


class Copy(NamedTuple):
    """Page `old` was shared; its first filled[layer] slots go to page `new`."""

    old: int
    new: int
    filled: list[int]


class Ledger:
    """n_pages pages of page_len positions, counted by how many tables name them."""

    def __init__(self, n_layers: int, page_len: int, n_pages: int) -> None:
        check_sizes(n_layers=n_layers, page_len=page_len, n_pages=n_pages)
        self.n_layers, self.page_len, self.n_pages = n_layers, page_len, n_pages
        self.counts = [0] * n_pages
        self.tables: dict[int, Table] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        return self.counts.count(0)

    def pages_of(self, n: int) -> int:
        """How many pages n positions touch."""
        return -(-n // self.page_len)

    def find(self, seq: int) -> Table:
        if seq not in self.tables:
            raise ValueError(f"sequence {seq!r} was never made, or is freed already")
        return self.tables[seq]

    def several(self, seqs: Sequence[int], counts: Sequence[int]) -> list[Table]:
        """Their tables, if each sequence is named once and has a count."""
        if len(seqs) != len(counts) or not seqs or len(set(seqs)) != len(seqs):
            raise ValueError(f"each sequence once, with its count; got {seqs} and {counts}")
        if min(counts) < 0:
            raise ValueError(f"counts must not be negative, got {counts}")
        return [self.find(seq) for seq in seqs]

    def new(self) -> int:
        """An empty sequence. Its number is never given again."""
        return self._add(Table([], [0] * self.n_layers))

    def fork(self, seq: int, n: int | None = None) -> int:
        """A sequence with the same first n positions (all, if None), in the same pages."""
        table = self.find(seq)
        n = table.length if n is None else n
        check_cut(n, table.length)
        pages = table.pages[: self.pages_of(n)]
        for page in pages:
            self.counts[page] += 1
        return self._add(Table(pages, [n] * self.n_layers))

    def truncate(self, seq: int, n: int) -> None:
        """Forget all but the first n positions, and the pages that only the rest needed."""
        table = self.find(seq)
        check_cut(n, table.length)
        keep = self.pages_of(n)
        self._drop(table.pages[keep:])
        table.pages, table.filled = table.pages[:keep], [n] * self.n_layers

    def free(self, seq: int) -> None:
        self._drop(self.find(seq).pages)
        del self.tables[seq]

    def grow(
        self, layer: int, seqs: Sequence[int], counts: Sequence[int]
    ) -> tuple[list[range], list[Copy]]:
        """Room for counts[b] more positions of sequence b in one layer.

        Back come the new positions of each, and what to copy before anything is written: a page
        that others read too. The last of its owners to write has it for itself.
        """
        check_layer(layer, self.n_layers)
        tables = self.several(seqs, counts)
        starts = [table.filled[layer] for table in tables]
        spans = [range(a, a + n) for a, n in zip(starts, counts, strict=True)]
        plan, leaving = [], Counter[int]()
        for table, span in zip(tables, spans, strict=True):
            touched = range(span.start // self.page_len, self.pages_of(span.stop) if span else 0)
            shared = []
            for i in touched[: max(0, len(table.pages) - touched.start)]:
                page = table.pages[i]
                if self.counts[page] - leaving[page] > 1:
                    leaving[page] += 1
                    shared.append(i)
            plan.append((table, shared, max(0, touched.stop - len(table.pages))))
        need = sum(len(shared) + fresh for _, shared, fresh in plan)
        if need > self.free_pages:
            raise ValueError(f"{need} pages are needed, {self.free_pages} of {self.n_pages} free")
        copies = [self._part(table, i) for table, shared, _ in plan for i in shared]
        for table, _, fresh in plan:
            table.pages += self._take(fresh, table.pages[-1] if table.pages else -1)
        for table, span in zip(tables, spans, strict=True):
            table.filled[layer] = span.stop
        return spans, copies

    def _part(self, table: Table, i: int) -> Copy:
        """Give a sequence its own i-th page in place of the shared one."""
        old = table.pages[i]
        (new,) = self._take(1, old)
        self._drop([old])
        table.pages[i] = new
        first = i * self.page_len
        return Copy(old, new, [min(self.page_len, max(0, n - first)) for n in table.filled])

    def _take(self, n: int, last: int) -> list[int]:
        """n free pages, neighbours if possible: those behind page `last`, else the longest run.

        In a run behind somebody else's page they stand in the middle: both have room to grow.
        """
        taken: list[int] = []
        while len(taken) < n:
            more, after = n - len(taken), (taken[-1] if taken else last) + 1
            run = max(self._runs(), key=lambda r: (r.start == after, len(r)))
            slack = max(0, len(run) - more) if run.start not in (0, after) else 0
            part = list(run)[slack // 2 : slack // 2 + more]
            for page in part:
                self.counts[page] += 1
            taken += part
        return taken

    def _runs(self) -> list[range]:
        """The stretches of free pages."""
        runs, stop = [], 0
        for used, group in groupby(self.counts, key=bool):
            start, stop = stop, stop + len(list(group))
            if not used:
                runs.append(range(start, stop))
        return runs

    def _add(self, table: Table) -> int:
        self.tables[self._next] = table
        self._next += 1
        return self._next - 1

    def _drop(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.counts[page] -= 1
