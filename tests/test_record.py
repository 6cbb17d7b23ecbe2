"""bench/record.py: files written whole, runs that say how they were made; bench/book.py."""

import json
import subprocess

import nbformat
import pytest
import torch

from bench import book, record

EMPTY = {"settings": {"steps": 3}, "runs": {}}


def test_a_run_says_when_and_on_what_it_was_made(tmp_path):
    path = tmp_path / "new/x.json"
    record.add(path, EMPTY, "a", 0.0, {"rows": {"b": {"seconds": 0.000123456, "error": None}}})
    run = json.loads(path.read_text("utf8"))["runs"]["a"]
    assert run["rows"] == {"b": {"seconds": 0.00012346, "error": None}}
    assert {"date", "device", "threads", "versions", "commit", "seconds"} <= run.keys()
    assert run["versions"].keys() == {"python", "torch", "triton"} and run["threads"] == 1
    assert run["device"] == (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{record.processor()}, one thread"
    )


def test_the_others_in_the_file_stay_and_other_settings_start_afresh(tmp_path):
    path = tmp_path / "x.json"
    record.add(path, EMPTY, "a", 0.0, {"x": 1})
    record.add(path, EMPTY, "b", 0.0, {"x": 2})
    assert list(record.load(path, EMPTY)["runs"]) == ["a", "b"]
    assert record.load(path, EMPTY | {"settings": {}})["runs"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_json_cannot_say_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    record.save(EMPTY, path)
    with pytest.raises(ValueError, match="JSON"):
        record.save({"settings": {}, "runs": {"a": float("nan")}}, path)
    assert json.loads(path.read_text("utf8")) == EMPTY
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_five_digits_are_kept_of_small_and_large_numbers_and_all_of_a_count():
    got = record.rounded({"a": [1.23456789e-7, (3.14159265, 2)], "n": 124_439_808, "b": True})
    assert got == {"a": [1.2346e-7, [3.1416, 2]], "n": 124_439_808, "b": True}
    assert record.rounded(None) is None and record.rounded("word") == "word"


@pytest.mark.parametrize("name", ["NVIDIA H200", "nvidia  h200 "])
def test_a_device_becomes_the_name_of_a_folder(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert record.device() == "nvidia-h200"
    assert record.path("gpu", record.device()).parts[-3:] == ("results", "nvidia-h200", "gpu.json")


def test_without_a_gpu_the_folder_is_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert record.device() == "cpu" and record.path("a").parts[-2:] == ("cpu", "a.json")


def test_a_changed_tree_has_a_plus_and_new_results_do_not_count_as_a_change(tmp_path):
    def git(*words):
        own = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
        subprocess.run([*own, *words], check=True, capture_output=True)

    def commit():
        record.commit.cache_clear()
        return record.commit(tmp_path)

    try:
        (tmp_path / "bench/results/cpu").mkdir(parents=True)
        (tmp_path / "code.py").write_text("1")
        git("init")
        git("add", ".")
        git("commit", "-m", "first")
        clean = commit()
        assert len(clean) >= 7 and set(clean) <= set("0123456789abcdef")
        (tmp_path / "bench/results/cpu/a.json").write_text("{}")
        assert commit() == clean
        (tmp_path / "code.py").write_text("2")
        assert commit() == clean + "+"
    finally:
        record.commit.cache_clear()


def test_a_copy_without_git_is_told_or_says_that_it_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("HEED_COMMIT", raising=False)
    for want in ("unknown", "02fac83+"):
        record.commit.cache_clear()
        assert record.commit(tmp_path) == want
        monkeypatch.setenv("HEED_COMMIT", "02fac83+")
    record.commit.cache_clear()


# bench/book.py


def test_a_notebook_runs_again_and_its_faults_are_its_error(tmp_path):
    new = nbformat.v4
    cells = ["sum(range(2_000_000))", "1 / 0"]
    path = tmp_path / "99_small.ipynb"
    nbformat.write(new.new_notebook(cells=[new.new_code_cell(x) for x in cells]), path)
    run = book.measure(path, budget=10.0)
    row = run["rows"]["99_small"]
    assert run["cells"] == 2 and row["error"] == 1
    assert 0 < row["work"] < 60 and row["share of the budget"] == row["work"] / 10


def test_every_chapter_and_every_solution_is_measured():
    names = book.notebooks()
    chapters = {path.stem for path in (record.ROOT / "chapters").glob("*.ipynb")}
    assert {f"chapters, {stem}" for stem in chapters} <= names.keys()
    assert any(name.startswith("solutions, 05") for name in names)
    assert {name.partition(",")[0] for name in names} == set(book.BUDGET)
