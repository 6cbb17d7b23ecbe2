"""heed.checks.ch07: its references against heed, torch and transformers; its problems exactly."""

from fractions import Fraction

import pytest
import torch

from heed.attention import attention
from heed.checks import ch07
from heed.multihead import MultiHeadAttention


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_split_heads_is_undone_by_joining():
    x = normal(2, 5, 21)
    heads = ch07.split_heads(x, 7)
    assert torch.equal(torch.cat(list(heads.unbind(1)), dim=-1), x)


def test_the_layer_and_both_fused_references_are_torchs():
    theirs = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    x = normal(2, 5, 12)
    w_qkv, w_o = theirs.in_proj_weight.T.detach(), theirs.out_proj.weight.T.detach()
    want = theirs(x, x, x)[0]
    for right in (ch07.fused_heads, ch07.summed_heads):
        torch.testing.assert_close(right(x, w_qkv, w_o, 3), want, rtol=0, atol=1e-12)
    w_q, w_k, w_v = w_qkv.chunk(3, dim=1)
    torch.testing.assert_close(ch07.multi_head(x, w_q, w_k, w_v, w_o, 3), want, rtol=0, atol=1e-12)


def test_the_terms_of_heads_sum_to_what_heeds_layer_gives():
    layer, seen = MultiHeadAttention(12, n_heads=3).double(), []

    def watched(q, k, v, mask):
        seen.append(attention(q, k, v, mask))
        return seen[-1]

    layer.attend = watched
    x = normal(2, 5, 12)
    out = layer(x)
    terms = ch07.head_terms(seen[0], layer.out.weight.T)
    torch.testing.assert_close(terms.sum(1), out, rtol=0, atol=1e-12)


def test_grouped_attention_is_heeds():
    q, k, v = normal(2, 6, 5, 3), normal(2, 2, 7, 3), normal(2, 2, 7, 4)
    torch.testing.assert_close(ch07.grouped_attention(q, k, v), attention(q, k, v))


def test_costs_are_those_of_a_llama_of_transformers_and_of_published_models():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
    )
    llama = transformers.LlamaForCausalLM(config).half()
    cache = llama(torch.arange(5)[None], use_cache=True).past_key_values
    held = sum(part.keys.nbytes + part.values.nbytes for part in cache.layers)
    counted = sum(p.numel() for n, p in llama.named_parameters() if "self_attn" in n)
    assert ch07.attention_costs(24, 6, 2, 10, 3, 2) == (counted, held // 5)
    assert ch07.attention_costs(8192, 64, 8, 128, 80, 2)[1] == 320 * 1024  # Llama 2 70B
    assert ch07.attention_costs(8192, 64, 64, 128, 80, 2)[1] == 2560 * 1024
    assert ch07.attention_costs(4096, 32, 8, 128, 32, 2)[1] == 128 * 1024  # Llama 3 8B


@pytest.mark.parametrize(("S", "slots", "heads"), [(2, 2, 1), (8, 2, 1), (4, 3, 1), (3, 4, 3)])
def test_the_least_error_is_one_slots_variance_for_each_missing_head(S, slots, heads):
    got = ch07.least_error(ch07._answers(S, slots), heads, S)
    assert abs(got - (slots - heads) * (S - 1) / S) < 1e-12


def test_no_random_flat_leaves_less_than_the_least_error():
    cloud = normal(50, 6) + 3
    least = ch07.least_error(cloud, 1, 4)
    centred = cloud - cloud.mean(0)
    for _ in range(50):
        basis = torch.linalg.qr(normal(6, 3)).Q
        left = centred - centred @ basis @ basis.T
        assert left.square().sum(1).mean() >= least


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_answered_exactly_as_heeds_layer_comes_near(random_seed):
    p = ch07.problem(random_seed)
    assert all(isinstance(x, Fraction) for x in [*p.answer, *p.heads])
    assert max(p.counts(0) + p.counts(1)) <= 12
    x, layer = p.layer()
    want = torch.tensor([float(y) for y in p.answer], dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0, -1], want, rtol=1e-12, atol=1e-12)


def test_problems_are_repeatable_and_fresh():
    assert repr(ch07.problem(5)) == repr(ch07.problem(5))
    assert len({repr(ch07.problem(s)).split("\n", 1)[1] for s in range(200)}) == 200


def test_the_question_keeps_the_answer_to_itself_and_the_worked_text_has_it():
    p = ch07.problem(3)
    assert "two heads of width 1; x3 asks" in repr(p) and "as fractions" in repr(p)
    assert f"({', '.join(map(str, p.answer))})" not in repr(p)
    for x in p.heads + p.answer:
        assert str(x) in p.worked()
