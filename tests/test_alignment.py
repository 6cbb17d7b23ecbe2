"""bench/alignment.py: two models of one size, and a record of every seed with these settings."""

import pytest

from bench import alignment, record


def test_the_two_models_have_one_size_within_five_percent():
    looking, fixed = alignment.models(random_seed=0).values()
    assert looking.config.attention == "general" and fixed.config.attention is None
    assert alignment.size(fixed) / alignment.size(looking) == pytest.approx(1, abs=0.05)


def test_the_record_has_every_seed_and_the_settings_of_the_script():
    record = alignment.load()
    names = ("looking back", "fixed vector")
    assert set(record["runs"]) == {f"{n}, seed {s}" for n in names for s in alignment.SEEDS}
    assert record["lengths"] == list(alignment.LENGTHS)
    for name, run in record["runs"].items():
        assert len(run["exact"]) == len(alignment.LENGTHS) and 0 <= min(run["exact"]), name
        assert run["parameters"] == alignment.size(alignment.models(0)[name.split(",")[0]])


def test_a_record_with_other_settings_is_not_taken(tmp_path):
    old = tmp_path / "alignment.json"
    record.save({"settings": {"steps": 1}, "runs": {"looking back, seed 0": {}}}, old)
    assert alignment.load(old)["runs"] == {}
