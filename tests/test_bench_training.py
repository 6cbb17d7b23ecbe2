"""bench/training.py: peers of one shape on one batch, and what the file of results may claim."""

import json

import pytest
import torch

from bench import training
from heed.counting import flops
from heed.gpt import GPTConfig

TINY = {"n_layers": 2, "d_model": 20, "n_heads": 4, "max_len": 7, "vocab_size": 11}
RECORD = json.loads(training.RESULTS.read_text("utf8"))


def test_all_peers_have_the_same_weights_to_train_but_for_stacked_biases():
    sizes = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in training.models(TINY).items()
    }
    assert len(set(sizes.values())) == 1, sizes


@pytest.mark.parametrize("name", training.models(TINY))
def test_a_peer_is_causal_and_gives_scores_of_every_word(name):
    model, ids = training.models(TINY)[name].eval(), torch.randint(11, (2, 7))
    before = model(ids)
    assert before.shape == (2, 7, 11)
    ids[:, 4:] = (ids[:, 4:] + 1) % 11
    moved = (model(ids) - before).abs().amax(-1)
    assert moved[:, :4].max() < 1e-6 and moved[:, 4:].min() > 1e-6


def test_the_fused_attention_is_the_same_function():
    written = training.ours(TINY)
    fused = training.ours(TINY, training.sdpa)
    fused.load_state_dict(written.state_dict())
    ids = torch.randint(11, (2, 7))
    assert fused.blocks[0].attn.attend is training.sdpa
    torch.testing.assert_close(fused(ids), written(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["float32 eager", "bfloat16 eager"])
def test_a_step_trains_whichever_the_peer(way):
    ids, targets = torch.randint(11, (4, 7)), torch.randint(11, (4, 7))
    for model in training.models(TINY).values():
        with torch.no_grad():
            before = training.loss(model(ids), targets)
        run = training.step(model, training.prepare(model, way), ids, targets)
        for _ in range(20):
            run()
        with torch.no_grad():
            assert training.loss(model(ids), targets) < before


def test_a_step_takes_three_forward_passes_less_the_half_of_the_scores_that_none_needs():
    config, T, batch = GPTConfig(**TINY), TINY["max_len"], 3
    unneeded = 3 * 2 * T * T * TINY["n_layers"] * TINY["d_model"] * batch
    assert training.step_flops(TINY, batch) == 3 * flops(config, T, batch) - unneeded


def test_the_limit_does_the_flops_it_says():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run, flops = training.limit(5 * 2**31 + 1, torch.float32)
        run()
    assert counter.get_total_flops() == flops == 5 * 2**31


@pytest.mark.parametrize(
    "way, low, high", [("float32 eager", 0, 1e-6), ("bfloat16 eager", 1e-3, 2e-2)]
)
def test_the_error_of_a_model_is_that_of_its_precision(way, low, high):
    for name, model in training.models(TINY).items():
        far = training.logits_error(model, training.prepare(model, way), torch.randint(11, (2, 7)))
        assert low < far < high, name


def test_a_wrong_attention_has_a_large_error():
    model = training.ours(TINY, lambda q, k, v, dropout: v)
    ids = torch.randint(11, (2, 7))
    assert training.logits_error(model, training.prepare(model, "float32 eager"), ids) > 1e-3


def test_a_measurement_names_all_cases():
    rows = training.measure("float32 eager", TINY, 2, 3)
    assert rows.keys() == {*training.models(TINY), "limit", "again"}
    assert all(row["ratio"] > 0 and row["tokens per second"] > 0 for row in rows.values())
    assert all(0 < row["error"] < 1e-6 for name, row in rows.items() if name != "limit")


def test_the_record_is_of_these_settings_and_complete():
    assert RECORD["settings"] == training.SETTINGS and set(RECORD["runs"]) == set(training.WAYS)
    for run in RECORD["runs"].values():
        assert run["rows"].keys() == {*training.models(TINY), "limit", "again"}
        assert {"date", "device", "versions"} <= run.keys()
        assert abs(run["rows"]["again"]["ratio"] - 1) < 0.1, "too noisy to be worth keeping"
