"""Multi-head attention, held against torch's own layer, a loop over heads, and bad input."""

import pytest
import torch

from heed import masks
from heed.attention import attention, weights
from heed.multihead import MultiHeadAttention

f64 = torch.float64


def layer(d_model=15, **settings):
    torch.manual_seed(7)
    made = MultiHeadAttention(d_model, **{"n_heads": 6, "d_head": 5} | settings).double()
    for p in made.parameters():  # biases too: zeros would hide one that is forgotten
        torch.nn.init.normal_(p)
    return made


def stream(B=2, T=7, C=15):
    return torch.randn(B, T, C, dtype=f64)


def by_a_loop(m, x, source, mask=masks.full):
    """One head at a time, and one output matrix for each: nothing is cut, joined or repeated."""
    D, share = m.d_head, m.n_heads // m.n_kv_heads
    out = torch.zeros_like(x)
    table = masks.table(mask, len(x), m.n_heads, x.shape[1], source.shape[1])
    for h in range(m.n_heads):
        rows, kv = slice(h * D, (h + 1) * D), slice(h // share * D, (h // share + 1) * D)
        q, k, v = (
            y @ p.weight[part].T + (0 if p.bias is None else p.bias[part])
            for y, p, part in ((x, m.q, rows), (source, m.k, kv), (source, m.v, kv))
        )
        scores = (q @ k.mT / D**0.5).masked_fill(~table[:, h], -torch.inf)
        out = out + scores.softmax(-1) @ v @ m.out.weight[:, rows].T
    return out if m.out.bias is None else out + m.out.bias


@pytest.mark.parametrize("n_kv_heads", [None, 6, 3, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [masks.full, masks.causal])
def test_a_loop_over_heads_gives_the_same_sum(n_kv_heads, bias, mask):
    m, x = layer(n_kv_heads=n_kv_heads, bias=bias), stream()
    torch.testing.assert_close(m(x, mask=mask), by_a_loop(m, x, x, mask), rtol=0, atol=1e-11)


def copied(m):
    """torch's layer with the weights of ours."""
    theirs = torch.nn.MultiheadAttention(m.d_model, m.n_heads, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([m.q.weight, m.k.weight, m.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([m.q.bias, m.k.bias, m.v.bias]))
        theirs.out_proj.load_state_dict(m.out.state_dict())
    return theirs


def test_torchs_layer_gives_the_same_with_the_weights_copied():
    m = layer(d_model=30, bias=True)
    x, memory, theirs = stream(C=30), stream(T=11, C=30), copied(m)
    torch.testing.assert_close(m(x), theirs(x, x, x)[0], rtol=0, atol=1e-10)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)  # theirs: True = may NOT read
    want = theirs(x, x, x, attn_mask=hidden)[0]
    torch.testing.assert_close(m(x, mask=masks.causal), want, rtol=0, atol=1e-10)
    want = theirs(x, memory, memory)[0]
    torch.testing.assert_close(m(x, memory), want, rtol=0, atol=1e-10)


def test_a_memory_is_read_with_shared_heads_and_another_length():
    m, x, memory = layer(n_kv_heads=2, bias=True), stream(), stream(T=11)
    got = m(x, memory, mask=masks.padding(torch.tensor([11, 4])))
    want = by_a_loop(m, x, memory, masks.padding(torch.tensor([11, 4])))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    torch.testing.assert_close(m(x, x), m(x), rtol=0, atol=0)


def test_grouped_heads_are_all_heads_with_the_weights_of_a_group_repeated():
    few, all_heads, x = layer(n_kv_heads=2), layer(), stream()
    with torch.no_grad():
        for ours, theirs in ((few.k, all_heads.k), (few.v, all_heads.v)):
            theirs.weight.copy_(
                ours.weight.unflatten(0, (2, 5)).repeat_interleave(3, 0).flatten(0, 1)
            )
        all_heads.q, all_heads.out = few.q, few.out
    torch.testing.assert_close(few(x), all_heads(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("n_heads", [1, 3, 15])
def test_the_number_of_heads_does_not_change_the_number_of_parameters(n_heads):
    for bias in (False, True):
        m = MultiHeadAttention(15, n_heads=n_heads, bias=bias)
        assert sum(p.numel() for p in m.parameters()) == 4 * 15**2 + 60 * bias


def test_sizes_are_what_the_settings_say():
    m = MultiHeadAttention(15, n_heads=6, n_kv_heads=2, d_head=5)
    assert [tuple(p.shape) for p in m.parameters()] == [(30, 15), (10, 15), (10, 15), (15, 30)]
    assert MultiHeadAttention(15, n_heads=5).d_head == 3


def test_another_attention_can_be_handed_in_and_sees_split_heads():
    seen = []

    def watched(q, k, v, mask):
        seen.append((q.shape, k.shape, v.shape, weights(q, k, mask).sum(-1)))
        return attention(q, k, v, mask)

    x = stream()
    m = layer(n_kv_heads=2, attend=watched)
    torch.testing.assert_close(m(x), layer(n_kv_heads=2)(x), rtol=0, atol=0)
    q, k, v, total = seen[0]
    assert (q, k, v) == ((2, 6, 7, 5), (2, 2, 7, 5), (2, 2, 7, 5))
    torch.testing.assert_close(total, torch.ones_like(total))


def test_rotation_is_applied_to_queries_and_keys_with_positions_from_0_and_not_to_values():
    def by_position(x, positions):
        assert positions.tolist() == list(range(7))
        return x * (1 + positions.double())[:, None]

    def stretched(q, k, v, mask):
        factor = torch.arange(1, 8, dtype=f64)[:, None]
        return attention(q * factor, k * factor, v, mask)

    m, x = layer(n_kv_heads=2, rotate=by_position), stream()
    want = layer(n_kv_heads=2, attend=stretched)(x, mask=masks.causal)
    torch.testing.assert_close(m(x, mask=masks.causal), want, rtol=0, atol=1e-12)


def test_what_keep_hands_back_is_read_and_places_say_where_to_turn():
    """The second half of a sequence, after a first half that is kept."""

    def by_position(x, positions):
        return x * (1 + positions.double())[:, None]

    m, x, kept = layer(n_kv_heads=2, rotate=by_position), stream(), []

    def keep(k, v):
        kept.append((k, v))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*kept, strict=True))

    want, places = m(x, mask=masks.causal), torch.arange(7)
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        got = m(x[:, part], mask=masks.causal, keep=keep, places=places[part])
        torch.testing.assert_close(got, want[:, part], rtol=0, atol=1e-11)
    assert [k.shape for k, _ in kept] == [(2, 2, 4, 5), (2, 2, 1, 5), (2, 2, 2, 5)]


def test_places_alone_turn_and_keep_alone_keeps():
    m = layer(rotate=lambda x, positions: x + positions.double()[:, None])
    x = stream()
    assert not torch.equal(m(x, places=torch.arange(7) * 2), m(x))
    torch.testing.assert_close(m(x, places=torch.arange(7, dtype=torch.int32)), m(x))
    seen = []
    got = layer()(x, keep=lambda k, v: seen.append((k, v)) or (k[:, :, :0], v[:, :, :0]))
    assert len(seen) == 1 and (got == 0).all()  # nothing came back: nothing is read


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": lambda k, v: (k, v)}, "with a cache they do not start at 0"),
        ({"places": torch.arange(6)}, r"places must be 7 integers, .* got torch.int64 \(6,\)"),
        ({"places": torch.arange(7)[None]}, r"places must be 7 integers, .* \(1, 7\)"),
        ({"places": torch.arange(7.0)}, "places must be 7 integers, .* got torch.float32"),
    ],
)
def test_positions_that_would_be_guessed_are_refused(settings, words, unchecked):
    with pytest.raises(ValueError, match=words):
        layer(rotate=lambda x, positions: x)(stream(), **settings)


@pytest.mark.parametrize(
    "settings", [{"keep": lambda k, v: (k, v)}, {"places": torch.arange(7)}], ids=["keep", "places"]
)
def test_a_memory_is_not_kept(settings):
    with pytest.raises(ValueError, match="a memory does not grow"):
        layer()(stream(), stream(), **settings)


def test_without_positions_a_shuffled_sequence_gives_the_shuffled_answer():
    m, x, order = layer(), stream(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(m(x[:, order]), m(x)[:, order], rtol=0, atol=1e-11)


def test_gradients_reach_every_weight_and_both_inputs():
    m, x, memory = layer(n_kv_heads=2, bias=True), stream(), stream(T=3)
    x, memory = x.requires_grad_(), memory.requires_grad_()
    m(x, memory).square().sum().backward()
    for name, p in [*m.named_parameters(), ("x", x), ("memory", memory)]:
        if name != "k.bias":  # it adds the same to a whole row of scores: nothing changes
            assert (p.grad != 0).all(), name
    assert m.k.bias.grad.abs().max() < 1e-9


def test_an_empty_sequence_stays_empty():
    assert layer()(stream(T=0)).shape == (2, 0, 15)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_head": None}, "d_model 15 does not divide into 6 heads"),
        ({"n_kv_heads": 4}, "6 query heads cannot share 4 key-value heads"),
        ({"n_kv_heads": 12}, "6 query heads cannot share 12 key-value heads"),
        ({"n_kv_heads": 0}, "n_kv_heads must be a positive integer, got 0"),
        ({"n_heads": -1}, "n_heads must be a positive integer, got -1"),
        ({"d_head": 0}, "d_head must be a positive integer, got 0"),
        ({"d_model": 15.0}, "d_model must be a positive integer, got 15.0"),
    ],
)
def test_impossible_sizes_are_refused_with_the_numbers(settings, words, unchecked):
    with pytest.raises(ValueError, match=words):
        layer(**settings)


@pytest.mark.parametrize(
    ("x", "memory", "words"),
    [
        ((2, 7, 14), None, r"x must be \(B, length, 15\), got \(2, 7, 14\)"),
        ((7, 15), None, r"x must be \(B, length, 15\), got \(7, 15\)"),
        ((2, 7, 15), (2, 3, 14), r"memory must be \(B, length, 15\), got \(2, 3, 14\)"),
        ((2, 7, 15), (1, 3, 15), "x has batch 2, memory has batch 1"),
    ],
)
def test_wrong_shapes_are_refused_with_the_shape(x, memory, words, unchecked):
    with pytest.raises(ValueError, match=words):
        layer()(
            torch.zeros(x, dtype=f64), None if memory is None else torch.zeros(memory, dtype=f64)
        )


def test_numbers_of_another_dtype_and_a_rotated_memory_are_refused():
    with pytest.raises(ValueError, match="x is torch.float32, the weights are torch.float64"):
        layer()(stream().float())
    with pytest.raises(ValueError, match="memory is another one"):
        layer(rotate=lambda x, positions: x)(stream(), stream())
    with pytest.raises(ValueError, match=r"rotate made \(2, 6, 7, 4\) of \(2, 6, 7, 5\)"):
        layer(rotate=lambda x, positions: x[..., :4])(stream())
