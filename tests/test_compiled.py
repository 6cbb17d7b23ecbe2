"""The kernels compiled for a Hopper GPU, on any x86-64 Linux: three now, the rest in the record."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
pytestmark = pytest.mark.skipif(not HERE, reason="Triton's assembler is there for x86-64 Linux")
ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench/results/sm_90/compiled.json"


def run(code, timeout=200):
    """In a process that compiles: this one interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *code]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def test_the_kernels_compile_for_hopper_without_a_spill():
    code = """
import json
from bench import compiled
rows = {}
for entry in compiled.entries():
    function, dtype, mask, D, *_ = entry
    if (dtype, mask, D) == ("bf16", "causal", 64) and function not in rows:
        row = compiled.read(compiled.compiled(entry))
        rows[function] = row | {"faults": compiled.faults(entry, row)}
print(json.dumps(rows))
"""
    done = run(["-W", "ignore", "-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows.keys() == {"forward_kernel", "backward_q_kernel", "backward_kv_kernel"}
    for function, row in rows.items():
        assert row["faults"] == [] and row["spills"] == row["stack"] == 0, (function, row)
        assert row["HGMMA"] > 0 and row["HMMA"] == 0 and row["UTMALDG"] > 0, (function, row)
        assert 0 < row["registers"] <= 255 and 0 < row["shared"] <= 227 * 1024, (function, row)


def test_the_record_is_of_this_source_complete_and_without_a_fault():
    code = """
import json
from bench import compiled
print(json.dumps([compiled.source(), [compiled.name(e) for e in compiled.entries()]]))
"""
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    source, names = json.loads(done.stdout.splitlines()[-1])
    record = json.loads(RECORD.read_text("utf8"))
    again = "the kernels have changed: python -m bench.compiled"
    assert record["settings"]["source"] == source, again
    assert sorted(record["runs"]) == sorted(names) and len(set(names)) == len(names), again
    for which, row in record["runs"].items():
        assert row["faults"] == [], which
        if "fp32" not in which:
            assert row["spills"] == row["stack"] == 0 and row["HGMMA"] > 0, which
        assert row["shared"] <= 227 * 1024, which


def test_what_it_calls_a_fault():
    code = """
import json
from bench.compiled import faults
half = ("forward_kernel", "bf16", "causal", 64, 64, 64, 4, 2)
exact = ("forward_kernel", "fp32", "causal", 64, 16, 16, 4, 1)
fine = dict(registers=200, stack=0, spills=0, shared=227 * 1024, HGMMA=8, HMMA=0, UTMALDG=3)
cases = [{}, {"spills": 1}, {"stack": 8}, {"HGMMA": 0}, {"UTMALDG": 0}, {"shared": 227 * 1024 + 1}]
print(json.dumps([[faults(e, fine | change) for change in cases] for e in (half, exact)]))
"""
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    half, exact = json.loads(done.stdout.splitlines()[-1])
    spills, wide = ["spills"], ["too much shared memory"]
    assert half == [[], spills, spills, ["no HGMMA"], ["no TMA"], wide]
    assert exact == [[], [], [], [], ["no TMA"], wide]
