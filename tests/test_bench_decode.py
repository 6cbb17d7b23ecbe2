"""bench/decode.py: every kind of record at tiny sizes, and what the file of results may claim."""

import json
import sys

import pytest
import torch

from bench import decode, micro, record
from bench.peers import paged
from heed.generation import generate
from heed.gpt import GPT

TINY = {"n_layers": 1, "d_model": 16, "n_heads": 2, "vocab_size": 31, "max_len": 64}
FILE = record.path("decode")
RECORD = json.loads(FILE.read_text("utf8"))


@pytest.fixture
def eager(monkeypatch):
    """Compiling is tested in test_step.py."""
    monkeypatch.setattr(decode, "Step", lambda model, **how: STEP(model, **how, backend="eager"))


STEP = decode.Step


def test_whole_calls_say_the_same_tokens_whoever_makes_them(eager):
    run = decode.whole("tiny", 2, 5, 4, 3)
    names = {"transformers, dynamic cache", "transformers, static cache", decode.STEP, decode.HALF}
    names |= {decode.CACHE, "contiguous", "paged, gathered", decode.NONE, "limit", "again"}
    assert run["rows"].keys() == names
    for name, row in run["rows"].items():
        assert row["error"] == (None if name == "limit" else 0)
        assert row["tokens per second"] * row["seconds"] == pytest.approx(4 * 2)


def test_a_wrong_token_is_counted(eager, monkeypatch):
    def wrong(*call, use_cache=True, **how):
        text = generate(*call, use_cache=use_cache, **how)
        return text if use_cache else torch.cat([text[:, :-1], (text[:, -1:] + 1) % 31], 1)

    monkeypatch.setattr(decode, "generate", wrong)
    rows = decode.whole("tiny", 3, 5, 4, 3)["rows"]
    assert rows[decode.NONE]["error"] == 3 and rows[decode.CACHE]["error"] == 0


@pytest.mark.parametrize("batch, steps", [(1, {decode.STEP, decode.HALF}), (3, set())])
def test_one_token_comes_with_the_error_of_its_scores(eager, batch, steps):
    rows = decode.token("tiny", batch, 9, 3)["rows"]
    ours = {decode.CACHE, "contiguous", decode.NONE} | steps
    ours |= {"paged, gathered", "paged, where it stands"}
    assert rows.keys() == ours | {"limit", "again"}
    assert all(0 < rows[name]["error"] < 1e-6 for name in ours)


def test_stored_in_bfloat16_it_is_held_against_the_rounded_weights():
    model = decode.build("tiny")
    twin = decode.exact(model, torch.bfloat16)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert b.dtype == torch.float64 and b.equal(a.bfloat16().double())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_limit_reads_each_weight_that_a_token_needs_once():
    model = decode.build("tiny")
    with_biases = 12 * 16**2 + (9 + 4) * 16 + 2 * 16 + 31 * 16
    run, n_bytes = decode.reading(model)
    assert n_bytes == 4 * with_biases and run().ndim == 0


def test_several_tokens_in_one_pass_are_those_of_the_text():
    rows = decode.several("tiny", 2, 7, 3)["rows"]
    assert list(rows)[:5] == [f"{k} in one pass" for k in (1, 2, 4, 8, 16)]
    assert all(0 < row["error"] < 1e-6 for row in rows.values())


def test_pages_lie_scattered_and_are_read_in_order():
    rows = decode.pages(3, 2, 37, 8, 3)["rows"]
    names = {
        f"{how}, {where}" for how in ("pages", "gathered") for where in ("neighbours", "scattered")
    }
    assert rows.keys() == names | {"one stretch", "again"}
    assert all(0 < row["error"] < 1e-6 for row in rows.values())


@pytest.mark.parametrize("scattered", [False, True])
def test_pages_hold_what_they_are_given_and_scattered_ones_lie_apart(scattered):
    x = torch.randn(3, 2, 70, 8)
    pages = paged(x, 16, scattered)
    for b in range(3):
        assert pages.read(b).equal(x[b])
    near = (pages.table.diff(dim=1) == 1).double().mean().item()
    assert near < 0.4 if scattered else near == 1


@pytest.mark.parametrize("drawn", [False, True])
def test_drafts_are_counted_and_change_no_token(drawn):
    shape = TINY | {"vocab_size": 89}
    run = decode.speculative(shape, 4, 8, 3, drawn)
    assert run["steps"] == 4 and run["drawn"] == drawn
    for name, row in run["rows"].items():
        assert row["error"] == 0
        if name.startswith("draft"):
            assert row["tokens a pass"] == 3 * 8 / row["passes"]
            assert row["accepted"] <= row["drafted"]


def test_more_training_reads_better():
    ids = micro.language().sample(8, 33, torch.Generator().manual_seed(5))

    def cost(model: GPT) -> float:
        with torch.no_grad():
            return -model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).mean().item()

    shape = TINY | {"vocab_size": 89}
    model = decode.learned(4, **shape)
    fresh = decode.GPT(model.config)
    assert cost(model) < cost(fresh)


def test_a_slope_is_measured_and_theory_counts_what_moves():
    runs = {}
    for p in (16, 1024):
        rows = {decode.CACHE: {"seconds": 3.0}, decode.NONE: {"seconds": 3.0 * p}}
        runs[str(p)] = {"kind": "token", "size": "large", "batch": 1, "prompt": p, "rows": rows}
    rows = decode.slopes(runs)["slope, large, batch 1"]["rows"]
    assert rows[decode.CACHE]["time"] == pytest.approx(0)
    assert rows[decode.NONE]["time"] == pytest.approx(1)
    assert 0 < rows[decode.CACHE]["in theory"] < 0.1 < 1 < rows[decode.NONE]["in theory"] < 1.1


def test_a_record_is_made_once_unless_it_is_asked_for(tmp_path, monkeypatch):
    calls = []

    def call():
        calls.append(1)
        return {"kind": "several", "rows": {}}

    monkeypatch.setattr(decode, "plan", lambda quick: {"one": ({}, call), "two": ({}, call)})
    path = tmp_path / "decode.json"
    decode.measure(path, True, None)
    decode.measure(path, True, None)
    assert len(calls) == 2
    decode.measure(path, True, "tw")
    assert len(calls) == 3 and record.load(path, decode.EMPTY)["runs"].keys() == {"one", "two"}


def test_a_quick_run_measures_every_kind_and_keeps_nothing(eager, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode", "--quick"])
    before = FILE.stat().st_mtime_ns
    assert decode.main() == 0
    out = capsys.readouterr().out
    for kind in ("generate, tiny", "token, tiny", "several, tiny", "pages", "speculative", "slope"):
        assert kind in out
    assert FILE.stat().st_mtime_ns == before


def test_the_record_is_of_these_settings_and_complete():
    assert RECORD["settings"] == decode.EMPTY["settings"]
    assert decode.plan(False).keys() <= RECORD["runs"].keys()
    for name, run in RECORD["runs"].items():
        assert {"date", "device", "versions"} <= run.keys()
        for case, row in run["rows"].items() if run["kind"] in ("generate", "speculative") else ():
            assert case == "limit" or row["error"] == 0, (name, case)
