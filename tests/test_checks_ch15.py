"""heed.checks.ch15: the wrong answers are caught, and the right ones agree with better ones."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heed import counting, gpt
from heed.checks import ch15, check
from heed.multihead import MultiHeadAttention


def task_id(x):
    return getattr(x, "id", None) or getattr(x, "name", None)


@pytest.mark.parametrize("task", ch15.TASKS, ids=task_id)
def test_a_check_takes_less_than_a_second(task):
    start = time.perf_counter()
    check(task.id, task.reference)
    assert time.perf_counter() - start < 1


def learned(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("H, G, D, bias", [(6, 2, 4, False), (6, 6, 5, True), (5, 1, 3, True)])
def test_attention_is_that_of_heeds_layer(H, G, D, bias):
    layer = MultiHeadAttention(24, n_heads=H, n_kv_heads=G, d_head=D, bias=bias)
    assert ch15.attention_parameters(24, H, G, D, bias) == learned(layer)


def llama(V, L, C, H, G, D, F, **more):
    sizes = dict(vocab_size=V, num_hidden_layers=L, hidden_size=C, num_attention_heads=H)
    sizes |= dict(num_key_value_heads=G, head_dim=D, intermediate_size=F)
    return SimpleNamespace(**dict(model_type="llama") | sizes | more)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_that_of_heed(tied):
    sizes = (61, 3, 24, 6, 2, 5, 7)
    want = counting.parameters(llama(*sizes, tie_word_embeddings=tied))
    assert ch15.llama_parameters(*sizes, tied) == want


def test_a_mixture_is_that_of_heed():
    sizes = (61, 3, 24, 6, 2, 5, 7)
    config = llama(*sizes, model_type="mixtral", num_local_experts=5, num_experts_per_tok=2)
    want = counting.parameters(config), counting.active(config)
    assert ch15.mixture(*sizes, 5, 2) == want


@pytest.mark.parametrize("window", [None, 4, 100])
def test_the_cache_is_that_of_heed(window):
    config = llama(61, 3, 24, 6, 2, 5, 7, model_type="mistral", sliding_window=window)
    want = counting.kv_cache_bytes(config, 11, dtype=torch.float32)
    assert ch15.cache_bytes(3, 2, 5, 11, window, 4) == want


@pytest.mark.parametrize("causal", [False, True])
def test_the_crossover_is_the_first_text_at_which_the_pairs_are_dearer(causal):
    for sizes in ((48, 3, 3, 16, 128), (10, 2, 1, 7, 13), (768, 12, 12, 64, 2048), (5, 1, 1, 5, 1)):
        T = ch15.overtaken(*sizes, causal)
        assert ch15._dearer(T, *sizes, causal)
        assert T == 1 or not ch15._dearer(T - 1, *sizes, causal)


def test_the_best_segments_are_the_best_of_all():
    for L, layer, stream in ((12, 5, 2), (7, 3, 3), (24, 16, 1), (9, 1, 1)):
        all_of_them = [(K * stream + -(-L // K) * layer, K) for K in range(1, L + 1)]
        assert ch15.best_segments(L, layer, stream) == min(all_of_them)[::-1]


def test_days_are_three_forward_passes_over_the_speed():
    config = gpt.GPTConfig(vocab_size=61, max_len=50, n_layers=3, n_heads=2, d_model=12)
    N, tokens = counting.rule(config), 40 * 1000
    work = 3 * counting.flops(config, 40) * 1000
    days = ch15.training_days(N, 3, 12, 40, tokens, 2, 1e6, 0.5)
    assert days == pytest.approx(work / (2 * 1e6 * 0.5) / 86_400)


@pytest.mark.parametrize("E, K", [(1, 1), (5, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_heed_in_both_ways(E, K, tied):
    sizes = (61, 3, 24, 6, 2, 5, 7)
    more = dict(model_type="mixtral", num_local_experts=E, num_experts_per_tok=K)
    config = llama(*sizes, tie_word_embeddings=tied, **(more if E > 1 else {}))
    want = counting.flops(config, 11)
    assert ch15.forward_flops(*sizes, E, K, tied, 11) == want
    assert ch15.listed_flops(*sizes, E, K, tied, 11) == want


def test_a_count_that_is_off_by_one_is_shown_with_both_numbers():
    said = repr(check("15.1", lambda *numbers: ch15.attention_parameters(*numbers) + 1))
    assert "C = 12, H = G = 3, D = 4, no biases" in said
    assert "expected  576\n  got       577\n" in said


def test_what_is_no_number_is_said():
    assert "got       a str" in repr(check("15.1", lambda *numbers: "576"))
    assert "got       a str" in repr(check("15.7", lambda *numbers: "one"))


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_has_the_numbers_of_a_real_model(random_seed):
    p = ch15.problem(random_seed)
    with torch.device("meta"):
        model = gpt.GPT(p.config)
    assert p.answer["parameters"] == learned(model)
    assert p.answer["operations"] == counting.flops(p.config, p.length)
    assert str(p.answer["parameters"]) in p.worked()
    assert p.worked().endswith(str(p.answer["operations"]))


def test_the_operations_of_a_problem_are_those_torch_counts():
    for random_seed in range(5):
        p = ch15.problem(random_seed)
        ids = torch.zeros(1, p.length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            gpt.GPT(p.config)(ids)
        assert p.answer["operations"] == counter.get_total_flops()


def test_problems_are_repeatable_and_fresh():
    assert repr(ch15.problem(5)) == repr(ch15.problem(5))
    assert len({repr(ch15.problem(s)) for s in range(200)}) > 150


def test_the_question_keeps_the_answer_to_itself():
    p = ch15.problem(3)
    assert str(p.answer["operations"]) not in repr(p)
    assert "How many parameters does it have" in repr(p)


def test_the_tasks_are_numbered_and_the_last_is_to_write_the_test():
    assert [task.id for task in ch15.TASKS] == [f"15.{n}" for n in range(1, 9)]
    assert [bool(task.bugs) for task in ch15.TASKS] == [False] * 7 + [True]
