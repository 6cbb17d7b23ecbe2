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
