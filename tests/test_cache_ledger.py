"""The bookkeeping of pages: where new ones are taken, and that all are accounted for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heed.cache.ledger import Copy, Ledger


def ledger(n_pages=12, page_len=4, n_layers=1):
    return Ledger(n_layers, page_len, n_pages)


def grown(book, n, seq=None):
    seq = book.new() if seq is None else seq
    book.grow(0, [seq], [n])
    return seq


def balanced(book):
    named = Counter(page for table in book.tables.values() for page in table.pages)
    assert book.counts == [named[page] for page in range(book.n_pages)]
    for table in book.tables.values():
        assert len(set(table.pages)) == len(table.pages) >= book.pages_of(max(table.filled))


def test_pages_are_taken_when_a_position_needs_one_and_not_before():
    book = ledger()
    seq = grown(book, 0)
    assert book.free_pages == 12
    for n, pages in ((1, 1), (3, 1), (1, 2), (4, 3), (3, 3)):
        grown(book, n, seq)
        assert len(book.find(seq).pages) == pages == 12 - book.free_pages
    spans, copies = book.grow(0, [seq], [2])
    assert spans == [range(12, 14)] and copies == []


def test_a_sequence_grows_into_the_pages_behind_its_own_while_they_are_free():
    book = ledger()
    a, b = grown(book, 8), grown(book, 4)
    assert book.find(a).pages == [0, 1]
    assert book.find(b).pages[0] > 4  # not right behind a
    for _ in range(3):
        grown(book, 4, a)
        grown(book, 4, b)
    for seq in (a, b):
        pages = book.find(seq).pages
        assert pages == list(range(pages[0], pages[0] + len(pages)))


def test_a_long_text_goes_where_it_fits_in_one_piece():
    book = ledger()
    first, second = grown(book, 20), grown(book, 8)  # pages 0 to 4, and two behind
    assert book.find(second).pages == [7, 8]
    third = grown(book, 12)
    assert book.find(third).pages == [9, 10, 11]
    book.free(first)
    assert book.find(grown(book, 28)).pages == [0, 1, 2, 3, 4, 5, 6]
    assert book.free_pages == 0


def test_scattered_pages_serve_too():
    book = ledger()
    seqs = [grown(book, 4) for _ in range(12)]
    for seq in seqs[::2]:
        book.free(seq)
    seq = grown(book, 24)
    assert book.free_pages == 0 and len(set(book.find(seq).pages)) == 6
    balanced(book)


def test_whoever_writes_into_a_shared_page_gets_a_copy_of_what_is_filled():
    book = ledger(n_layers=2)
    a = book.new()
    for layer in range(2):
        book.grow(layer, [a], [6])
    b = book.fork(a)
    assert book.counts[:2] == [2, 2]
    spans, copies = book.grow(0, [b], [1])
    assert spans == [range(6, 7)]
    assert copies == [Copy(1, book.find(b).pages[1], [2, 2])] and copies[0].new not in (0, 1)
    assert book.find(b).pages[0] == 0
    assert book.grow(1, [b], [1])[1] == []  # the second layer finds the page its own
    assert book.grow(0, [a], [1])[1] == []  # and so does the other owner
    balanced(book)


def test_of_two_owners_that_write_at_once_one_copies():
    book = ledger(n_pages=3)
    a = grown(book, 6)
    b = book.fork(a)
    _, copies = book.grow(0, [a, b], [1, 1])
    assert len(copies) == 1 and book.free_pages == 0
    assert book.find(a).pages[1] != book.find(b).pages[1]
    balanced(book)


def test_whoever_writes_nothing_copies_nothing():
    book = ledger()
    a = grown(book, 6)
    b = book.fork(a)
    spans, copies = book.grow(0, [a, b], [0, 0])
    assert spans == [range(6, 6)] * 2 and copies == [] and book.free_pages == 10


def test_a_fork_at_the_end_of_a_page_never_copies():
    book = ledger()
    a = grown(book, 8)
    b = book.fork(a, 4)
    assert book.find(b).pages == [0]
    assert book.grow(0, [a, b], [3, 3])[1] == []


def test_pages_of_one_owner_stay_when_the_other_goes():
    book = ledger()
    a = grown(book, 8)
    b = book.fork(a)
    book.free(a)
    assert book.free_pages == 10 and book.find(b).pages == [0, 1]
    book.free(b)
    assert book.free_pages == 12
    for gone in (a, b, 99, -1):
        with pytest.raises(ValueError, match=f"sequence {gone} was never made, or is freed"):
            book.free(gone)
    assert book.new() not in (a, b)


def test_a_cut_hands_back_the_pages_behind_it():
    book = ledger()
    seq = grown(book, 12)
    for n, free in ((9, 9), (8, 10), (5, 10), (1, 11), (0, 12)):
        book.truncate(seq, n)
        assert book.free_pages == free and book.find(seq).filled == [n]


def snapshot(book):
    tables = {seq: (list(t.pages), list(t.filled)) for seq, t in book.tables.items()}
    return list(book.counts), tables, book.free_pages


BAD = {
    "too many": (lambda b: b.grow(0, [0, 1], [1, 41]), "11 pages are needed, 9 of 12 free"),
    "twice the same": (lambda b: b.grow(0, [0, 0], [1, 1]), r"each sequence once, .* got \[0, 0\]"),
    "none": (lambda b: b.grow(0, [], []), "each sequence once"),
    "a count too few": (lambda b: b.grow(0, [0, 1], [1]), "each sequence once, with its count"),
    "a negative count": (lambda b: b.grow(0, [0, 1], [1, -1]), r"not be negative, got \[1, -1\]"),
    "an unknown one": (lambda b: b.grow(0, [0, 7], [1, 1]), "sequence 7 was never made"),
    "layer 1": (lambda b: b.grow(1, [0], [1]), "layer 1: the cache has layers 0 to 0"),
    "fork too long": (lambda b: b.fork(0, 7), "cannot keep 7 of 6 positions"),
    "fork below 0": (lambda b: b.fork(0, -1), "cannot keep -1 of 6 positions"),
    "cut too far": (lambda b: b.truncate(0, 7), "cannot keep 7 of 6 positions"),
    "cut an unknown one": (lambda b: b.truncate(7, 0), "sequence 7 was never made"),
    "fork an unknown one": (lambda b: b.fork(7), "sequence 7 was never made"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_changes_nothing(name):
    book = ledger()
    a = grown(book, 6)
    grown(book, 3)
    book.fork(a)
    before = snapshot(book)
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call(book)
    assert snapshot(book) == before
    assert book.new() == 3  # no number is lost either


@pytest.mark.parametrize("sizes", [(0, 4, 8), (1, 0, 8), (1, 4, 0), (1, 4, -1), (1, 4, True)])
def test_a_ledger_has_pages_with_places(sizes):
    with pytest.raises(ValueError, match="must be a positive integer"):
        Ledger(*sizes)


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_sequence_wastes_less_than_a_page(page_len, actions):
    book = ledger(page_len=page_len, n_pages=20)
    for which, n in actions:
        seqs = list(book.tables)
        try:
            grown(book, n, seqs[which % len(seqs)] if seqs and which else None)
        except ValueError as e:
            assert "pages are needed" in str(e)
        balanced(book)
        held = sum(table.length for table in book.tables.values())
        waste = (20 - book.free_pages) * page_len - held
        assert 0 <= waste <= len(book.tables) * (page_len - 1)
