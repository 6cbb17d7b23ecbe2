"""bench/length.py: its measures against the grammar, its file against what a page may rely on."""

import json
import math

import pytest
import torch

from bench import length, record
from heed import masks, stretch
from heed.positions import frequencies

RECORD = json.loads(length.RESULTS.read_text("utf8"))


class Perfect:
    """Answers with the true chances of the next word."""

    def __call__(self, ids, mask=None):
        return length.language().predictive(ids).log()


class Uniform:
    def __call__(self, ids, mask=None):
        return torch.zeros(*ids.shape, 89)


def test_a_perfect_reader_is_at_zero_everywhere_and_a_guesser_far_above():
    for measure in (length.above, length.above_growing):
        got = measure(Perfect(), 8, 5)
        assert len(got) == 4 * length.TIMES and max(map(abs, got)) < 1e-12
    floor = length.perfect(5, 64).mean(0).unflatten(0, (-1, 2)).mean(1)
    want = (math.log(89) - floor).tolist()
    assert length.above(Uniform(), 8, 5) == pytest.approx(want, abs=1e-12)


def test_what_a_perfect_reader_pays_is_on_average_the_floor():
    gap = length.perfect(400, 64).mean(0) - length.language().floor(64)
    assert abs(gap.mean()) < 0.02 and gap.abs().max() < 0.25


@pytest.mark.parametrize("scheme", length.SCHEMES)
def test_every_reader_takes_longer_texts_and_looks_at_nothing_that_comes_later(scheme):
    model = length.reader(scheme, random_seed=1, longest=40)
    ids = length.texts(2, 40, 7)
    changed = ids.clone()
    changed[:, 30:] = 1
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert before.shape == (2, 40, 89)
    torch.testing.assert_close(before[:, :30], after[:, :30])
    assert (before[:, 30:] - after[:, 30:]).abs().max() > 1e-3


def test_the_stretches_are_those_of_heed_and_the_two_halves_make_interpolation():
    theta = frequencies(16)
    ways = length.stretches(theta, 128, 8.0)
    finished = stretch.turns(theta, 128) >= 1
    slow, fast = ways["only unfinished pairs"].frequencies, ways["only finished pairs"].frequencies
    assert torch.equal(torch.where(finished, fast, slow), ways["interpolated"].frequencies)
    assert torch.equal(torch.where(finished, slow, fast), theta)
    assert ways["YaRN"].gain == stretch.attention_factor(8.0) and ways["by parts"].gain == 1


def test_a_dynamic_rotation_knows_how_long_the_text_is():
    x, theta = torch.randn(1, 2, 40, 16), frequencies(16)
    rotate = length.dynamically(theta, 20)
    for n in (7, 20, 40):
        want = stretch.rotation(stretch.dynamic(theta, n, 20))(x[:, :, :n], torch.arange(n))
        assert torch.equal(rotate(x[:, :, :n], torch.arange(n)), want)


def test_a_window_of_the_whole_text_changes_nothing():
    model = length.reader("RoPE", 1, 64)
    assert length.above(model, 8, 3) == length.above(model, 8, 3, mask=masks.window(64))


def test_saving_leaves_one_whole_file_and_other_settings_start_afresh(tmp_path):
    path = tmp_path / "deep/length.json"
    assert length.load(path)["runs"] == {}
    record.save({"settings": length.SETTINGS, "runs": {"a": 1}}, path)
    assert length.load(path)["runs"] == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["length.json"]
    record.save({"settings": {"steps": 1}, "runs": {"a": 1}}, path)
    assert length.load(path) == {"settings": length.SETTINGS, "runs": {}}


# The recording


def test_the_record_is_whole_and_says_how_it_was_made():
    assert RECORD["settings"] == length.SETTINGS
    assert len(length.SEEDS) >= 3
    assert RECORD["runs"].keys() == {f"{s}, seed {n}" for s in length.SCHEMES for n in length.SEEDS}
    for run in RECORD["runs"].values():
        assert run.keys() >= {"date", "device", "versions", "seconds", "curves"}
        for curve in run["curves"].values():
            points = curve if isinstance(curve, list) else [curve]
            assert len(points) in (1, 4 * length.TIMES) and all(map(math.isfinite, points))


def test_the_record_took_about_ten_minutes_on_a_busy_machine_and_not_more():
    assert sum(run["seconds"] for run in RECORD["runs"].values()) < 660


def test_within_the_training_length_neither_window_nor_dynamic_scaling_does_anything():
    for name, run in RECORD["runs"].items():
        curves = run["curves"]
        assert curves["near"][:4] == pytest.approx(curves["as trained"][:4], abs=2e-4)
        if name.startswith("RoPE"):
            assert curves["dynamic"][:4] == pytest.approx(curves["as trained"][:4], abs=2e-4)
