"""Pieces against torch's own modules."""

from types import SimpleNamespace

import pytest
from torch import nn

from heed import pieces


def learned(module):
    return sum(p.numel() for p in module.parameters())


def total(some):
    return sum(p.times * p.numbers for p in some)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_piece_is_torchs_linear(bias):
    piece = pieces.linear("x", 5, 7, 3, bias=bias)
    assert piece.numbers == learned(nn.Linear(5, 7, bias=bias)) and piece.times == 3
    assert piece.products == 35


def test_a_table_is_looked_up_and_norms_are_not_products():
    assert pieces.table("x", 11, 5).numbers == learned(nn.Embedding(11, 5))
    assert pieces.norms(2, 5, bias=True).numbers == learned(nn.LayerNorm(5))
    assert pieces.norms(2, 5).numbers == learned(nn.RMSNorm(5))
    assert not pieces.table("x", 11, 5).products + pieces.norms(2, 5).products


@pytest.mark.parametrize("bias", [False, True])
def test_attention_is_torchs_multi_head_attention(bias):
    want = learned(nn.MultiheadAttention(12, 3, bias=bias))
    assert total(pieces.attention(12, 3, 3, 4, 1, bias=bias)) == want
    assert want == 4 * 144 + (4 * 12 if bias else 0)


def test_shared_heads_and_wider_heads_change_only_their_own_matrices():
    assert total(pieces.attention(12, 3, 1, 4, 2)) == 2 * (2 * 12 * 12 + 2 * 12 * 4)
    assert total(pieces.attention(12, 3, 3, 5, 1)) == 4 * 12 * 15
    some = pieces.attention(12, 3, 1, 5, 1, bias=True, out_bias=False)
    assert total(some) == 12 * 15 * 2 + 15 + 2 * (12 * 5 + 5)


def test_cross_attention_asks_in_one_place_and_reads_in_another():
    places = [p.at for p in pieces.attention(12, 3, 3, 4, 1, holds="source")]
    assert places == ["token", "source", "token", "token x source"]


def test_a_network_with_a_gate_has_a_third_matrix():
    assert total(pieces.mlp(5, 7, 2)) == 2 * 2 * 35
    assert total(pieces.mlp(5, 7, 2, gated=True)) == 2 * 3 * 35
    assert total(pieces.mlp(5, 7, 1, gated=True, bias=True)) == 3 * 35 + 2 * 7 + 5


def test_experts_are_all_learned_and_few_are_visited():
    router, network = pieces.experts(5, 7, 8, 2, 3)
    assert router.numbers == 40 and router.times == 3
    assert (network.numbers, network.times, network.visited) == (105, 24, 6)
    with pytest.raises(ValueError, match="a token cannot visit 9 of 8 experts"):
        pieces.experts(5, 7, 8, 9, 3)


def test_a_tied_head_multiplies_what_is_counted_elsewhere():
    tied, own = pieces.head(11, 5, True), pieces.head(11, 5, False)
    assert (tied.numbers, own.numbers) == (0, 55) and tied.products == own.products == 55


def test_heads_must_share_the_width():
    assert pieces.split(12, 3) == 4
    with pytest.raises(ValueError, match="width 13 does not divide into 3 heads"):
        pieces.split(13, 3)


def test_settings_are_read_or_refused():
    config = SimpleNamespace(model_type="x", n=3, none=None, on=True, text="3")
    assert pieces.sizes(config, "n", "n") == [3, 3]
    assert pieces.size(config, "none", 5) == pieces.size(config, "missing", 5) == 5
    assert pieces.size(SimpleNamespace(n=0), "n", least=0) == 0
    assert pieces.either(config, "none") is None and pieces.either(config, "n") == 3
    assert pieces.flag(config, "on", False) and not pieces.flag(config, "missing", False)
    pieces.refuse(config, "missing", 1)
    pieces.refuse(config, "n", 3)
    for call, said in [
        (lambda: pieces.size(config, "missing"), "a config of x needs missing"),
        (lambda: pieces.size(SimpleNamespace(), "n"), "a config of SimpleNamespace needs n"),
        (lambda: pieces.size(config, "text"), "text must be a positive integer, got '3'"),
        (lambda: pieces.size(config, "on"), "on must be a positive integer, got True"),
        (lambda: pieces.size(SimpleNamespace(n=-1), "n", least=0), "an integer of 0 or more"),
        (lambda: pieces.either(config, "missing"), "needs missing, a number or None"),
        (lambda: pieces.flag(config, "n", True), "n must be True or False, got 3"),
        (lambda: pieces.refuse(config, "n", 1), "n=3 is not counted, only 1"),
        (lambda: pieces.known(config, {"n", "m"}, {"on"}, "GPT"), r"is no GPT: lacks \['m'\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
