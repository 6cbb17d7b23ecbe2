"""heed.positions against transformers' own functions, and against what each scheme is for."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert as wav2vec2

from heed import masks
from heed.attention import attention, weights
from heed.positions import (
    alibi,
    alibi_slopes,
    buckets,
    frequencies,
    halved,
    rotate,
    shaw,
    sinusoids,
)

f64 = torch.float64


def normal(*shape, dtype=f64):
    return torch.randn(*shape, dtype=dtype)


# frequencies and sinusoids


def test_frequencies_fall_from_1_by_one_factor_and_never_reach_the_base():
    omega = frequencies(64)
    assert omega[0] == 1 and omega.dtype == f64 and len(omega) == 32
    torch.testing.assert_close(
        omega[1:] / omega[:-1], torch.full((31,), 10000 ** (-1 / 32), dtype=f64)
    )
    assert omega[-1] > 1 / 10000
    assert frequencies(4, 100.0).tolist() == [1.0, 0.1]


def test_sinusoids_are_the_papers_entry_by_entry():
    table = sinusoids(7, 6, dtype=f64)
    for t in range(7):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            assert abs(table[t, 2 * i].item() - math.sin(angle)) < 1e-14
            assert abs(table[t, 2 * i + 1].item() - math.cos(angle)) < 1e-14


def test_both_layouts_are_those_of_transformers():
    paper = torch.empty(60, 32)
    create_sinusoidal_embeddings(60, 32, paper)
    torch.testing.assert_close(sinusoids(60, 32), paper.detach(), atol=1e-5, rtol=0)
    halves = MarianSinusoidalPositionalEmbedding(60, 32).create_weight()
    torch.testing.assert_close(sinusoids(60, 32, interleaved=False), halves, atol=1e-5, rtol=0)


def test_products_of_sinusoids_depend_on_the_distance_and_norms_are_equal():
    table = sinusoids(500, 16, dtype=f64)
    dots = table @ table.T
    for distance in (0, 1, 7, 100):
        along = dots.diagonal(distance)
        assert (along - along[0]).abs().max() < 1e-11
    assert abs(dots[3, 3].item() - 8) < 1e-12


def test_sinusoids_have_the_default_type_unless_one_is_asked_for_and_may_be_none_at_all():
    assert sinusoids(3, 4).dtype == torch.float32
    assert sinusoids(3, 4, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert sinusoids(0, 4).shape == (0, 4)


@pytest.mark.parametrize("width", [0, -2, 7])
def test_a_width_that_has_no_pairs_is_refused(width):
    with pytest.raises(ValueError, match=f"got {width}"):
        frequencies(width)


@pytest.mark.parametrize("base", [0.0, -1.0, math.inf, math.nan])
def test_a_base_that_is_no_base_is_refused(base):
    with pytest.raises(ValueError, match="positive and finite"):
        frequencies(4, base)


def test_a_negative_number_of_positions_is_refused():
    with pytest.raises(ValueError, match="got -1"):
        sinusoids(-1, 4)


# rotate


def test_rotate_is_llamas():
    config = LlamaConfig(hidden_size=20, num_attention_heads=2, head_dim=10)
    x, at = normal(2, 3, 7, 10, dtype=torch.float32), torch.arange(7)
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, at[None])
    want, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(rotate(x, at), want, atol=1e-6, rtol=0)


def test_rotate_interleaved_is_gptjs():
    x, at = normal(2, 3, 7, 10, dtype=torch.float32), torch.arange(7)
    sincos = gptj.create_sinusoidal_positions(7, 10)[None]
    want = gptj.apply_rotary_pos_emb(x.transpose(1, 2), *sincos.chunk(2, dim=-1)).transpose(1, 2)
    torch.testing.assert_close(rotate(x, at, interleaved=True), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_rotate_is_a_turn_in_the_complex_plane(interleaved, base):
    x, at = normal(2, 3, 5, 6), torch.tensor([0, 3, 1, 900, 100_000])
    got = rotate(x, at, base=base, interleaved=interleaved)
    for p in range(3):
        a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + 3)
        z = torch.complex(x[..., a], x[..., b])
        for t, place in enumerate(at.tolist()):
            angle = torch.tensor(place * base ** (-2 * p / 6), dtype=f64)
            turned = z[:, :, t] * torch.polar(torch.tensor(1.0, dtype=f64), angle)
            torch.testing.assert_close(got[:, :, t, a], turned.real, atol=1e-9, rtol=0)
            torch.testing.assert_close(got[:, :, t, b], turned.imag, atol=1e-9, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only_and_norms_are_kept(interleaved):
    q, k = normal(2, 1, 2, 5, 14)
    at = torch.arange(5)

    def scores(start):
        turned = [rotate(x, at + start, interleaved=interleaved) for x in (q, k)]
        return turned[0] @ turned[1].mT

    for start in (1, 1000, 100_000):
        torch.testing.assert_close(scores(start), scores(0), atol=1e-9, rtol=0)
    torch.testing.assert_close(rotate(q, at).norm(dim=3), q.norm(dim=3))
    assert (scores(0) - q @ k.mT).abs().max() > 0.1


def test_rows_may_have_positions_of_their_own():
    x, at = normal(2, 3, 5, 6), torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]])
    together = rotate(x, at)
    for b in range(2):
        torch.testing.assert_close(together[b : b + 1], rotate(x[b : b + 1], at[b]))


def test_one_row_of_positions_for_as_many_sequences_as_positions_is_shared():
    x = normal(4, 1, 4, 6)  # B = T: (T,) must not be read as (B,)
    alone = torch.cat([rotate(row[None], torch.arange(4)) for row in x])
    torch.testing.assert_close(rotate(x, torch.arange(4)), alone)


def test_position_0_and_no_position_change_nothing():
    x = normal(1, 2, 1, 6)
    assert torch.equal(rotate(x, torch.tensor([0])), x)
    assert rotate(x[:, :, :0], torch.arange(0)).shape == (1, 2, 0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_loses_only_what_rounding_the_result_loses(dtype):
    x, at = normal(1, 2, 4, 64).to(dtype), torch.tensor([257, 1001, 4095, 16000])
    got = rotate(x, at)
    assert got.dtype == dtype
    error = (got.double() - rotate(x.double(), at)).abs().max().item()
    assert error < 2 * torch.finfo(dtype).eps * x.abs().max().item() * 2**0.5


def test_a_whole_turn_away_attention_is_the_same():
    q, k, v = normal(3, 1, 2, 6, 8)
    at = torch.arange(6)
    near, far = (attention(rotate(q, a), rotate(k, a), v, masks.causal) for a in (at, at + 977))
    torch.testing.assert_close(near, far, atol=1e-10, rtol=0)


def test_gradients_go_through_a_rotation():
    x = normal(1, 2, 3, 4).requires_grad_()
    for interleaved in (False, True):
        torch.autograd.gradcheck(
            lambda y, i=interleaved: rotate(y, torch.tensor([5, 0, 9]), interleaved=i), x
        )


@pytest.mark.parametrize(
    ("x", "at", "said"),
    [
        ((3, 5, 6), torch.arange(5), r"\(3, 5, 6\)"),
        ((1, 2, 5, 7), torch.arange(5), "got 7"),
        ((1, 2, 5, 6), torch.arange(4), r"got \(4,\) for x of \(1, 2, 5, 6\)"),
        ((2, 2, 5, 6), torch.zeros(3, 5).long(), r"got \(3, 5\)"),
        ((2, 2, 5, 6), torch.zeros(1, 5).long(), r"got \(1, 5\)"),
        ((1, 2, 5, 6), torch.arange(5.0), "float32"),
        ((1, 2, 5, 6), torch.ones(5).bool(), "bool"),
    ],
)
def test_bad_input_to_a_rotation_is_refused_by_name(unchecked, x, at, said):
    with pytest.raises(ValueError, match=said):
        rotate(torch.zeros(x), at)


def test_integers_are_not_rotated(unchecked):
    with pytest.raises(ValueError, match="int64"):
        rotate(torch.zeros(1, 2, 5, 6).long(), torch.arange(5))


# halved


def test_halved_weights_score_half_split_as_the_old_ones_did_interleaved():
    x, at = normal(2, 5, 12), torch.arange(5)
    W_q, W_k = normal(2, 30, 12)

    def scores(q, k, interleaved):
        heads = [(x @ W.T).view(2, 5, 3, 10).transpose(1, 2) for W in (q, k)]
        turned = [rotate(y, at, interleaved=interleaved) for y in heads]
        return turned[0] @ turned[1].mT

    want = scores(W_q, W_k, True)
    torch.testing.assert_close(scores(halved(W_q, 3), halved(W_k, 3), False), want)
    assert (scores(W_q, W_k, False) - want).abs().max() > 1


def test_halved_reorders_a_bias_like_its_weight():
    weight, bias = normal(12, 5), normal(12)
    assert torch.equal(halved(torch.cat([weight, bias[:, None]], 1), 2)[:, 5], halved(bias, 2))


@pytest.mark.parametrize("n_heads", [0, 5, 4])
def test_rows_that_are_no_pairs_in_each_head_are_refused(n_heads):
    with pytest.raises(ValueError, match="12 rows"):
        halved(torch.zeros(12, 3), n_heads)


# Shaw


def test_shaws_bias_is_that_of_wav2vec2_bert():
    q, vectors = normal(2, 3, 7, 4), normal(5, 4)
    module = SimpleNamespace(
        left_max_position_embeddings=2,
        right_max_position_embeddings=2,
        distance_embedding=lambda at: vectors[at],
        scaling=0.5,
    )
    _, want = wav2vec2._apply_relative_key_position_encoding(module, q, q)
    torch.testing.assert_close(shaw(q, vectors, 7), want)


def test_shaws_bias_is_a_vector_added_to_each_key():
    q, k, vectors = normal(1, 2, 3, 4), normal(1, 2, 7, 4), normal(5, 4)
    got = q @ k.mT / 2 + shaw(q, vectors, 7)
    for row, i in enumerate((4, 5, 6)):  # the last three of seven
        for j in range(7):
            key = k[:, :, j] + vectors[max(-2, min(2, j - i)) + 2]
            torch.testing.assert_close(got[:, :, row, j], (q[:, :, row] * key).sum(-1) / 2)


def test_bad_input_to_shaw_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"q must be .* got torch.float64 \(1, 2, 6\)"):
        shaw(normal(1, 2, 6), normal(3, 6), 2)
    with pytest.raises(ValueError, match="got 4 of 6"):
        shaw(normal(1, 1, 2, 6), normal(4, 6), 2)
    with pytest.raises(ValueError, match="2 queries .* 1 keys"):
        shaw(normal(1, 1, 2, 6), normal(3, 6), 1)


# T5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n", "limit"), [(32, 128), (64, 128), (16, 20), (8, 100), (30, 77)])
def test_buckets_are_t5s_at_every_distance(bidirectional, n, limit):
    distance = torch.arange(-20_000, 20_001)
    want = T5Attention._relative_position_bucket(distance, bidirectional, n, limit)
    got = buckets(distance, bidirectional=bidirectional, n_buckets=n, max_distance=limit)
    assert torch.equal(got, want)


def test_buckets_of_any_shape_and_of_a_bias_function():
    numbers = normal(32, 2)

    def bias(b, h, i, j):
        return numbers[buckets(j - i, bidirectional=False), h]

    q, k = normal(2, 1, 2, 6, 4)
    all_at_once = weights(q, k, masks.causal, bias=bias)
    last = weights(q[:, :, -1:], k, masks.causal, bias=bias)  # as with a cache
    torch.testing.assert_close(last, all_at_once[:, :, -1:])


@pytest.mark.parametrize(("both", "n", "limit"), [(True, 3, 128), (True, 2, 128), (False, 32, 16)])
def test_buckets_that_cannot_be_are_refused(both, n, limit):
    with pytest.raises(ValueError, match=f"no {n} buckets up to distance {limit}"):
        buckets(torch.arange(3), bidirectional=both, n_buckets=n, max_distance=limit)


def test_distances_that_are_no_integers_are_refused(unchecked):
    with pytest.raises(ValueError, match="distance must be integers, got torch.float32"):
        buckets(torch.ones(3), bidirectional=True)


# ALiBi


def test_slopes_of_8_heads_are_halves_down_to_1_in_256():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]


@pytest.mark.parametrize("n_heads", [*range(1, 18), 20, 24, 32, 40, 112])
def test_slopes_are_blooms_for_any_number_of_heads(n_heads):
    want = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(n_heads), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n_heads", [4, 6])
def test_alibi_weights_as_bloom_does_whose_bias_differs_by_one_number_a_row(n_heads):
    q, k = normal(2, 2, n_heads, 7, 4)
    bloom = build_alibi_tensor(torch.ones(2, 7), n_heads, f64).view(2, n_heads, 1, 7)
    got = weights(q, k, masks.causal, bias=alibi(n_heads))
    want = weights(q, k, masks.causal, bias=bloom)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_alibi_of_the_last_query_is_its_row_among_all_and_looks_both_ways_alike():
    q, k = normal(2, 1, 8, 5, 4)
    every = weights(q, k, bias=alibi(8))
    torch.testing.assert_close(weights(q[:, :, -1:], k, bias=alibi(8)), every[:, :, -1:])
    bias = alibi(8)(*masks.indices(1, 8, 5, 5)).expand(1, 8, 5, 5)
    assert torch.equal(bias, bias.mT) and (bias <= 0).all()


def test_slopes_for_another_number_of_heads_are_refused():
    q = normal(1, 4, 3, 2)
    for n_heads in (2, 8):
        with pytest.raises(ValueError, match=f"slopes for {n_heads} heads, scores of 4"):
            weights(q, q, bias=alibi(n_heads))
    with pytest.raises(ValueError, match="got 0"):
        alibi(0)
