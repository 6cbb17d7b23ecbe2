"""Masks against their definitions, and against FlexAttention reading the same predicates."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from heed import masks

B, H, T = 2, 3, 5
LENGTHS = torch.tensor([5, 2])
TABLE = torch.rand(B, H, T, T, generator=torch.Generator().manual_seed(0)) < 0.5
SEVEN = {
    "full": masks.full,
    "causal": masks.causal,
    "window": masks.window(2),
    "padding": masks.padding(LENGTHS),
    "dense": masks.dense(TABLE),
    "both": masks.both(masks.causal, masks.padding(LENGTHS)),
    "either": masks.either(masks.window(1), masks.dense(TABLE)),
}


@pytest.mark.parametrize("name", SEVEN)
def test_flex_attention_reads_the_same_predicates(name):
    mask = SEVEN[name]
    theirs = create_mask(lambda b, h, i, j: mask(b, h, i, j), B, H, T, T, device="cpu")
    assert torch.equal(masks.table(mask, B, H, T, T), theirs)


def test_causal_reads_itself_and_the_past():
    want = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    assert torch.equal(masks.table(masks.causal, 1, 1, 3, 3)[0, 0], want)


@pytest.mark.parametrize("T", range(1, 7))
@pytest.mark.parametrize("S", range(1, 7))
def test_queries_are_the_last_positions(T, S):
    table = masks.table(masks.causal, 1, 1, T, S)[0, 0]
    for r in range(T):
        for j in range(S):
            assert table[r, j] == (j <= S - T + r)


def test_a_window_of_w_holds_w_positions_with_its_own():
    counts = masks.table(masks.window(3), 1, 1, 6, 6)[0, 0].sum(-1)
    assert counts.tolist() == [1, 2, 3, 3, 3, 3]


def test_padding_hides_what_lies_beyond_each_length():
    table = masks.table(masks.padding(LENGTHS), B, 1, 1, 5)[:, 0, 0]
    assert table.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (3, 1, 7), (2, 1, 1, 1), (2, 3, 5, 7)])
def test_a_dense_mask_broadcasts_from_the_right(shape):
    table = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(masks.table(masks.dense(table), 2, 3, 5, 7), table.expand(2, 3, 5, 7))


def test_both_and_either_are_intersection_and_union():
    one, two = masks.table(masks.window(2), B, H, T, T), masks.table(masks.dense(TABLE), B, H, T, T)
    pair = masks.window(2), masks.dense(TABLE)
    assert torch.equal(masks.table(masks.both(*pair), B, H, T, T), one & two)
    assert torch.equal(masks.table(masks.either(*pair), B, H, T, T), one | two)


BAD = {
    "window of nothing": (lambda: masks.window(0), "width 0"),
    "negative window": (lambda: masks.window(-3), "width -3"),
    "negative length": (lambda: masks.padding(torch.tensor([3, -1])), "-1"),
    "lengths as floats": (lambda: masks.padding(torch.tensor([3.0])), "float32"),
    "lengths of rank 2": (lambda: masks.padding(torch.tensor([[3]])), r"\(1, 1\)"),
    "integer mask": (lambda: masks.dense(torch.ones(3, 3, dtype=torch.int64)), "int64"),
    "byte mask": (lambda: masks.dense(torch.ones(3, 3, dtype=torch.uint8)), "uint8"),
    "float mask": (lambda: masks.dense(torch.zeros(3, 3)), "float32"),
    "five axes": (lambda: masks.dense(TABLE[None]), r"\(1, 2, 3, 5, 5\)"),
    "one key, many rows": (lambda: masks.dense(TABLE[..., :1]), r"\(2, 3, 5, 1\)"),
    "no axes": (lambda: masks.dense(torch.tensor(True)), r"shape \(\)"),
    "wrong batch": (lambda: masks.table(masks.padding(LENGTHS), 3, 1, 5, 5), "batch of 3"),
    "too wide": (lambda: masks.table(masks.dense(TABLE), 2, 3, 5, 4), r"\(2, 3, 5, 5\)"),
    "transposed": (lambda: masks.table(masks.dense(TABLE[:, :, :2].mT), 2, 3, 2, 5), "fit"),
    "wrong heads": (lambda: masks.table(masks.dense(TABLE), 2, 4, 5, 5), "fit"),
    "inside a pair": (
        lambda: masks.table(masks.both(masks.causal, masks.dense(TABLE)), 1, 3, 5, 5),
        "fit",
    ),
    "answers in floats": (
        lambda: masks.table(lambda b, h, i, j: (j <= i).float(), 1, 1, 2, 2),
        "float32",
    ),
    "negative size": (lambda: masks.table(masks.full, 1, 1, -1, 2), "-1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_refused_by_name(name, unchecked):
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make()


def test_a_bare_tensor_is_not_a_mask(unchecked):
    with pytest.raises(TypeError, match="masks.dense"):
        masks.table(TABLE, B, H, T, T)


BANDS = {
    "full": masks.full,
    "causal": masks.causal,
    "window": masks.window(3),
    "window of one": masks.window(1),
    "padding": masks.padding(torch.tensor([5, 2])),
    "padding beyond": masks.padding(torch.tensor([50, 60])),
    "padding of nothing": masks.padding(torch.tensor([0, 0])),
    "both": masks.both(masks.window(4), masks.padding(torch.tensor([5, 2]))),
    "both, far apart": masks.both(masks.window(1), masks.padding(torch.tensor([1, 2]))),
    "either": masks.either(masks.window(2), masks.padding(torch.tensor([1, 3]))),
    "either, one of them empty": masks.either(masks.padding(torch.tensor([0, 0])), masks.causal),
    "nested": masks.both(masks.either(masks.causal, masks.window(2)), masks.full),
    "dense": masks.dense(TABLE[:, :, :1]),
    "a predicate": lambda b, h, i, j: i == j,
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("S", [1, 5, 9])
def test_a_span_holds_all_keys_that_are_read_and_only_sure_ones_for_sure(name, S):
    mask, T = BANDS[name], 7  # more queries than keys, too
    if name == "dense" and S != 5:
        return
    for first in range(T):
        for last in range(first, T):
            table = masks.table(mask, B, H, T, S)[:, :, first : last + 1]
            some, every = masks.span(mask, S - T + first, S - T + last, S)
            read, sure = table.flatten(0, 2).any(0), table.flatten(0, 2).all(0)
            assert set(read.nonzero().flatten().tolist()) <= set(some) <= set(range(S))
            assert set(every) <= set(sure.nonzero().flatten().tolist())
            if name in ("full", "causal", "window", "window of one", "padding"):
                assert set(read.nonzero().flatten().tolist()) == set(some)
                assert set(every) == set(sure.nonzero().flatten().tolist())


def test_nothing_is_known_of_other_masks():
    assert masks.span(lambda b, h, i, j: i == j, 3, 5, 9) == (range(9), range(0))
    assert masks.span(masks.both(masks.causal, masks.dense(TABLE)), 3, 3, 9)[0] == range(4)


def test_a_tile_of_pairs_is_part_of_the_table():
    b, h, i, j = masks.indices(B, H, 5, 5)
    for mask in SEVEN.values():
        tile = masks.ask(mask, b, h, i[1:3], j[2:5]).expand(B, H, 2, 3)
        assert torch.equal(tile, masks.table(mask, B, H, 5, 5)[:, :, 1:3, 2:5])
