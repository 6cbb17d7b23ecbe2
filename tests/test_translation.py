"""bench/translation.py: its pieces, and its file against what the page relies on."""

import json

import torch

from bench import record, translation
from heed.models.transformer import Transformer

RECORD = json.loads(translation.RESULTS.read_text("utf8"))


def test_the_two_models_have_one_size_for_every_task():
    for task in translation.TASKS.values():
        sizes = [
            translation.size(model)
            for model in (translation.transformer(task, 0), translation.recurrent(task, 0))
        ]
        assert abs(sizes[1] / sizes[0] - 1) < 0.05


def test_one_step_moves_the_weights_and_the_seed_decides_where_it_begins():
    task = translation.TASKS["german"]
    for build in (translation.transformer, translation.recurrent):
        model, same, other = build(task, 0), build(task, 0), build(task, 1)
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        assert torch.equal(before, torch.nn.utils.parameters_to_vector(same.parameters()))
        assert not torch.equal(before, torch.nn.utils.parameters_to_vector(other.parameters()))
        draw = torch.Generator().manual_seed(0)
        translation.learn(model, task, draw, translation.optimiser(model), 0.01)
        assert not torch.equal(before, torch.nn.utils.parameters_to_vector(model.parameters()))


def test_the_rates_are_those_of_the_two_papers():
    task = translation.TASKS["dates"]
    one, other = translation.transformer(task, 0), translation.recurrent(task, 0)
    rates = [translation.rate(one, step, 800) for step in range(800)]
    assert max(rates) == rates[99] and abs(rates[99] - (48 * 100) ** -0.5) < 1e-12
    assert isinstance(one, Transformer) and translation.rate(other, 300, 800) == 0.01
    assert translation.rate(other, 799, 800) < 1e-4


def test_other_settings_start_afresh(tmp_path):
    path = tmp_path / "translation.json"
    record.save({"settings": {"warmup": 1}, "runs": {"clock": 1}}, path)
    assert translation.load(path)["runs"] == {}


# The recording


def test_the_record_is_whole_and_says_how_it_was_made():
    assert RECORD["settings"] == translation.SETTINGS
    runs = {"clock"} | {
        f"ramp, {x}, seed {n}" for x in ("with a ramp", "without") for n in range(3)
    }
    for task in translation.TASKS:
        for kind in translation.MODELS:
            runs |= {f"{task}, {kind}, seed {n}" for n in translation.SEEDS}
    assert RECORD["runs"].keys() == runs and len(translation.SEEDS) >= 3
    for run in RECORD["runs"].values():
        assert {"date", "device", "versions", "seconds"} < run.keys()


def test_what_the_page_says_of_the_race_holds_for_every_random_seed():
    runs = RECORD["runs"]
    for n in translation.SEEDS:
        for task in ("dates", "reversal"):
            ours, theirs = (runs[f"{task}, {k}, seed {n}"]["exact"] for k in translation.MODELS)
            assert all(a < b + 0.01 for a, b in zip(ours, theirs, strict=True))
        assert runs[f"reversal, transformer, seed {n}"]["longer"][2:] == [0.0, 0.0]
        assert runs[f"ramp, with a ramp, seed {n}"]["exact"][-1] > 0.9
        assert max(runs[f"ramp, without, seed {n}"]["exact"]) < 0.01
    clock = runs["clock"]["milliseconds"]
    assert clock["recurrent, additive"][-1] > 2 * clock["transformer"][-1]
