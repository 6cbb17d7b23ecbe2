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
        run = training.step(model, way, ids, targets)
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
        training.limit(5 * 2**31, torch.float32)()
    assert counter.get_total_flops() == 5 * 2**31


def test_a_measurement_names_all_cases():
    rows = training.measure("float32 eager", TINY, 2, 3)
    assert rows.keys() == {*training.models(TINY), "limit", "again"}
    assert all(row["ratio"] > 0 and row["tokens per second"] > 0 for row in rows.values())


def test_the_record_is_of_these_settings_and_complete():
    assert RECORD["settings"] == training.SETTINGS and set(RECORD["runs"]) == set(training.WAYS)
    for run in RECORD["runs"].values():
        assert run["rows"].keys() == {*training.models(TINY), "limit", "again"}
        assert {"date", "device", "versions"} <= run.keys()
        assert abs(run["rows"]["again"]["ratio"] - 1) < 0.1, "too noisy to be worth keeping"
