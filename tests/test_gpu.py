"""bench/gpu.py: all of it at tiny sizes, on a machine that has as little as a rented one."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from bench import attention, gpu, record
from heed.attention import attention as checked

# What such a machine does not have. Where a module is missing, nobody finds a spec of it.
MISSING = {"beartype", "jupytext", "nbval", "playwright", "nbformat", "nbclient", "IPython"}
BLOCK = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {MISSING!r} else find(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The whole of it, once."""
    blocked, out = tmp_path_factory.mktemp("blocked"), tmp_path_factory.mktemp("out")
    (blocked / "sitecustomize.py").write_text(BLOCK)
    paths = os.pathsep.join([str(blocked), str(record.ROOT / "src")])
    quiet = {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    before = state()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry", "--out", str(out)],
        cwd=record.ROOT,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
    )
    took = time.perf_counter() - start
    assert state() == before, "a dry run wrote results"
    return done, out, took


def state():
    names = ("attention", "training", "decode", "gpu")
    files = [path for name in names for path in record.RESULTS.rglob(f"{name}.json")]
    return {path: path.stat().st_mtime_ns for path in files}


def test_the_modules_are_really_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    code = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('nbval', 'torch')])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["[False,", "True]"]


@pytest.mark.slow
def test_everything_runs_dry_on_a_bare_machine_and_the_table_comes_last(dry):
    done, out, _ = dry
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = done.stdout.partition("==== all well\n")[2].splitlines()
    runs = json.loads((out / "gpu.json").read_text("utf8"))["runs"]
    assert table == runs["table"]["lines"]
    first = [line.split()[0] for line in table]
    assert first[0] == "limits" and first[-1] == "took"
    parts = {"limits", "tests", "forward", "backward", "memory", "training", "decode", "took"}
    assert parts <= set(first)
    assert not any(run.get("failed") or run.get("late") for run in runs.values())


@pytest.mark.slow
def test_a_dry_run_times_the_kernel_beside_the_others_with_their_errors(dry):
    _, out, _ = dry
    runs = json.loads((out / "attention.json").read_text("utf8"))["runs"]
    duels = [run for run in runs.values() if run["kind"] == "duel"]
    assert len(duels) == 4 and {run["direction"] for run in duels} == {"forward", "backward"}
    for run in duels:
        assert {"sdpa", "plain", gpu.KERNEL, "limit", "again"} <= run["rows"].keys()
        for case, row in run["rows"].items():
            assert row["error"] is None if case == "limit" else 0 < row["error"] < 1e-5
    assert sum(run["kind"] == "memory" for run in runs.values()) == 2
    training = json.loads((out / "training.json").read_text("utf8"))["runs"]["float32 eager"]
    assert f"heed.gpt with {gpu.KERNEL}" in training["rows"]


@pytest.mark.slow
def test_a_dry_run_decodes_a_token_and_reads_pages_with_their_errors(dry):
    _, out, _ = dry
    runs = json.loads((out / "decode.json").read_text("utf8"))["runs"]
    assert {run["kind"] for run in runs.values()} == {"token", "pages"}
    ours = {"token": {"heed.gpt with its cache", "heed.step"}}
    ours["pages"] = {"gathered, then sdpa", "one stretch, sdpa", "heed.flash.decode.kernel"}
    for run in runs.values():
        assert run["rows"].keys() == ours[run["kind"]] | {"limit", "again"}
        for case, row in run["rows"].items():
            assert row["error"] is None if case == "limit" else 0 < row["error"] < 1e-5
            assert row["bytes per second"] > 0 and row["share of the limit"] > 0
        assert run["rows"]["limit"]["share of the limit"] == pytest.approx(1)


def test_a_token_reads_its_weights_in_the_time_that_is_measured():
    run = gpu.one_token(1, 64, True)
    weights = 12 * 64**2 + 13 * 64 + 2 * 64 + 61 * 64  # of a block, the last norm, the words
    assert run["bytes"] == 4 * weights
    for case, row in run["rows"].items():
        moved = 2 * 4 * 2**16 if case == "limit" else run["bytes"]
        assert row["bytes per second"] * row["seconds"] == pytest.approx(moved)


@pytest.mark.slow
def test_the_gpu_tests_are_found_on_a_bare_machine(dry):
    _, out, _ = dry
    assert gpu.gpu_tests() and str(record.ROOT / "tests/test_gpu.py") not in gpu.gpu_tests()
    assert "collected" in (out / "gpu_tests.log").read_text("utf8")


@pytest.mark.slow
def test_a_dry_run_is_short(dry):
    assert dry[2] < 120  # alone about 20 s


# One broken section must not cost the others.


def section(tmp_path, name="limits"):
    return gpu.section(name, tmp_path, True, time.perf_counter() + 60, [])


def test_a_section_that_raises_is_written_down(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such device")

    monkeypatch.setitem(gpu.RUN, "limits", broken)
    assert section(tmp_path) == 1
    run = record.load(tmp_path / "gpu.json", gpu.EMPTY)["runs"]["limits"]
    assert run["failed"] == {"limits": "RuntimeError: no such device"}


@pytest.mark.parametrize(
    "said, case", [("sdpa cudnn: RuntimeError: x", "sdpa cudnn"), ("AcceleratorError", gpu.KERNEL)]
)
def test_a_dead_device_names_the_case_that_killed_it(tmp_path, monkeypatch, said, case):
    def deadly(*_):
        raise attention.Broken(said)

    monkeypatch.setitem(gpu.RUN, "limits", deadly)
    assert section(tmp_path) == 3
    assert (tmp_path / "broken").read_text() == case


def test_after_a_dead_device_the_section_goes_on_without_the_case(tmp_path, monkeypatch):
    calls = []

    def process(name, folder, dry, seconds, without):
        assert not dry
        calls.append((name, list(without)))
        if name == "attention" and not without:
            (folder / "broken").write_text(gpu.KERNEL)
            return 3
        return 0

    monkeypatch.setattr(gpu, "process", process)
    assert not gpu.everything(tmp_path, False, lambda: None)
    assert [call for call in calls if call[0] == "attention"] == [
        ("attention", []),
        ("attention", [gpu.KERNEL]),
    ]
    assert calls[-1] == ("decode", [gpu.KERNEL])


def test_a_section_in_a_process_of_its_own_leaves_its_run(tmp_path, monkeypatch):
    paths = os.pathsep.join([str(record.ROOT / "src"), str(record.ROOT)])
    monkeypatch.setenv("PYTHONPATH", paths)
    assert gpu.process("limits", tmp_path, True, 60, []) == 0
    run = record.load(tmp_path / "gpu.json", gpu.EMPTY)["runs"]["limits"]
    assert run["failed"] == {} and 0 < run["rows"]["matmul"]["error"] < 1e-6
    assert run["rows"]["copy"]["error"] == 0 and run["rows"]["copy"]["bytes per second"] > 0


@pytest.mark.parametrize(
    "code, reason",
    [("import sys; sys.exit(9)", "exit status 9"), ("import time; time.sleep(60)", "killed after")],
)
def test_a_process_that_dies_or_hangs_is_written_down(tmp_path, monkeypatch, code, reason):
    monkeypatch.setattr(gpu, "GRACE", 0)
    monkeypatch.setattr(gpu, "command", lambda *_: [sys.executable, "-c", code])
    assert gpu.process("memory", tmp_path, True, 0.3 if "sleep" in code else 20, []) != 0
    run = record.load(tmp_path / "gpu.json", gpu.EMPTY)["runs"]["memory"]
    assert run["failed"]["memory"].startswith(reason)
    assert gpu.table(tmp_path)[0].startswith(f"FAILED    memory: memory: {reason}")


def test_all_sections_together_stay_below_eight_minutes():
    assert gpu.SECONDS.keys() == gpu.RUN.keys() and sum(gpu.SECONDS.values()) + gpu.GRACE <= 475


def test_a_line_of_the_table_says_how_many_times_faster_ours_is():
    def row(ratio, rate, error):
        return {
            "ratio": ratio,
            "seconds": 1.0,
            "error": error,
            "flops per second": rate,
            "share of the limit": rate / 8e14,
        }

    rows = {
        "sdpa flash": row(1.0, 3.2e14, 2e-3),
        gpu.KERNEL: row(0.8, 4e14, 1e-3),
        "sdpa cudnn": row(0.6, 5.3e14, 2e-3),
    }
    rows |= {"limit": row(2.0, 8e14, None), "again": row(1.0, 3.2e14, 2e-3)}
    run = {"direction": "forward", "d_head": 128, "causal": True, "n": 4096, "rows": rows}
    line = " ".join(gpu._attention_line(run).split())
    assert line == (
        "forward d128 causal n4096 kernel 400.0 TFLOP/s (50%) error 1.0e-03 (flash 2.0e-03)"
        " 1.25x flash 0.75x cudnn"
    )


@pytest.mark.skipif(not importlib.util.find_spec("beartype"), reason="beartype is not installed")
def test_where_there_is_a_shape_checker_the_tests_use_it():
    with pytest.raises(Exception, match="(?i)type-check"):
        checked("no tensor", None, None)
