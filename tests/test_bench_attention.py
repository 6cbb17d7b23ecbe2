"""bench/attention.py and its peers: what is computed, what is counted, what is left out."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import attention, duel, peers, record
from bench.duel import wall
from bench.peers import BACKWARD, BOTH, FORWARD, Cell, LeftOut

CELL = Cell(direction=FORWARD, n=40, d_head=8, causal=True, dtype="float32", batch=2, n_heads=3)
HOW = {"rounds": 3, "timer": wall}


def limit(dtype="float32"):
    return attention.matmul(32, dtype, "cpu")


@pytest.mark.parametrize("causal", [True, False])
def test_the_float64_answer_is_that_of_the_whole_made_a_few_queries_at_a_time(causal):
    tensors = CELL.tensors("cpu")
    q, k, v, do = (attention.ends(x).double().requires_grad_() for x in tensors)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    want = {
        "o": o,
        **dict(zip(["dq", "dk", "dv"], torch.autograd.grad(o, (q, k, v), do), strict=True)),
    }
    got = attention.exact(tensors, causal, rows=7)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-13)


def test_two_heads_stand_for_all():
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4, 1)
    assert attention.ends(x)[0, :, 0, 0].tolist() == [0.0, 20.0]


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
@pytest.mark.parametrize("name", sorted(peers.peers("cpu").keys() - {"flex", "heed.flash.kernel"}))
def test_every_peer_computes_the_same(name, direction):
    for causal in (True, False):
        cell = replace(CELL, direction=direction, causal=causal)
        tensors = cell.tensors("cpu")
        run = attention.call(peers.peers("cpu")[name](cell, "cpu"), cell, tensors)
        for _ in range(2):  # a backward pass can be called again
            got = run()
        assert len(got) == (1 if direction == FORWARD else 3)
        assert attention.distance(got, attention.exact(tensors, causal)) < 2e-6


def test_the_error_of_a_backward_pass_is_that_of_its_worst_gradient():
    right = {name: torch.ones(1, 2, 4, 4) for name in ("o", "dq", "dk", "dv")}
    got = (torch.ones(2, 2, 4, 4), 1.5 * torch.ones(2, 2, 4, 4), 1.1 * torch.ones(2, 2, 4, 4))
    assert attention.distance(got, right) == pytest.approx(0.5)
    assert attention.distance(got[2:], right) == pytest.approx(0.1)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
def test_the_flops_are_those_of_the_products(direction):
    # The plain formula keeps its weights, so its backward pass needs four products for two.
    again = {FORWARD: 0, BACKWARD: 1, BOTH: 1}[direction]
    full = replace(CELL, direction=direction, causal=False)
    run = attention.call(peers.plain(full, "cpu"), full, full.tensors("cpu"))
    with FlopCounterMode(display=False) as counter:
        run()
    product = 2 * 2 * 3 * 40 * 40 * 8
    assert full.flops == counter.get_total_flops() + again * product
    assert replace(full, causal=True).flops * 2 == full.flops


def test_forward_counts_two_products_backward_five_and_both_seven():
    counts = [replace(CELL, direction=d, causal=False).flops for d in (FORWARD, BACKWARD, BOTH)]
    unit = 2 * CELL.batch * CELL.n_heads * CELL.n**2 * CELL.d_head
    assert counts == [2 * unit, 5 * unit, 7 * unit] and counts[1] == 2.5 * counts[0]


def fake(monkeypatch, **more):
    monkeypatch.setattr(attention, "peers", lambda device: {"plain": peers.plain, **more})


def test_a_peer_that_fails_or_refuses_or_is_wrong_is_left_out_with_its_reason(monkeypatch):
    def broken(cell, device):
        raise RuntimeError("no such instruction\nand more")

    def refuses(cell, device):
        raise LeftOut("too large")

    def wrong(cell, device):
        return lambda q, k, v: 1.2 * peers.plain(cell, device)(q, k, v)

    def hollow(cell, device):
        return lambda q, k, v: q * math.nan

    fake(monkeypatch, broken=broken, refuses=refuses, wrong=wrong, hollow=hollow)
    run = attention.measure(CELL, "cpu", limit=limit(), **HOW)
    assert run["rows"].keys() == {"plain", "limit", "again"}
    assert run["left out"] == {
        "broken": "RuntimeError: no such instruction",
        "refuses": "too large",
        "wrong": "wrong: its error is 2.0e-01",
        "hollow": "wrong: its error is nan",
    }
    assert 0 < run["rows"]["plain"]["error"] < 1e-6


def test_a_case_that_broke_the_device_is_not_tried_again(monkeypatch):
    def never(cell, device):
        raise AssertionError("tried")

    fake(monkeypatch, never=never)
    run = attention.measure(CELL, "cpu", limit=limit(), without=["never"], **HOW)
    assert run["left out"]["never"] == "it broke the device in a cell before"


def test_a_dead_device_is_said_with_the_name_of_the_case(monkeypatch):
    def deadly(cell, device):
        raise RuntimeError("an illegal memory access")

    def settle(device):
        if settle.calls:
            raise attention.Broken("dead")
        settle.calls += 1

    settle.calls = 0
    fake(monkeypatch, deadly=deadly)
    monkeypatch.setattr(attention, "settle", settle)
    with pytest.raises(attention.Broken, match="deadly: RuntimeError: an illegal memory access"):
        attention.measure(CELL, "cpu", limit=limit(), **HOW)


def test_one_cell_costs_no_other_and_late_ones_are_named(tmp_path, monkeypatch):
    path, measure = tmp_path / "x.json", attention.measure

    def sometimes(cell, device, **how):
        if cell.n == 20:
            raise RuntimeError("out of memory")
        return measure(cell, device, **how)

    fake(monkeypatch)
    monkeypatch.setattr(attention, "measure", sometimes)
    cells = {replace(CELL, n=n): 3 for n in (10, 20, 40)}
    how = {"timer": wall, "limit": limit}
    lost = attention.measure_all(path, attention.EMPTY, "cpu", cells, [CELL], **how)
    assert lost == {"forward, 20 x 8, causal, float32": "RuntimeError: out of memory"}
    runs = json.loads(path.read_text("utf8"))["runs"]
    names = [f"forward, {n} x 8, causal, float32" for n in (10, 40)]
    assert list(runs) == [*names, f"memory, {names[1]}", "slope, forward, 8, causal, float32"]
    more = {replace(CELL, n=n, causal=False): 3 for n in (10, 40)}
    lost = attention.measure_all(path, attention.EMPTY, "cpu", more, [], until=0.0, **how)
    assert set(lost.values()) == {attention.LATE} and len(lost) == 2


def test_slopes_stand_beside_those_of_theory():
    def cell(n, batch):
        return replace(CELL, n=n, batch=batch)

    def run(n, batch, seconds):
        rows = {"plain": {"seconds": seconds}, "limit": {"seconds": 1.0}, "again": {"seconds": 1.0}}
        fields = attention.asdict(cell(n, batch)) | {"flops": cell(n, batch).flops}
        return {"kind": "duel", **fields, "rows": rows}

    def held(n, peak):
        rows = {"plain": {"peak": peak}, "sdpa": {"peak": n}}
        return {"kind": "memory", **attention.asdict(cell(n, 1)), "rows": rows}

    runs = {"a": run(8, 1, 2.0), "b": run(32, 1, 32.0), "c": held(8, 64), "d": held(32, 1024)}
    (name, found), *rest = attention.slopes(runs).items()
    assert name == "slope, forward, 8, causal, float32" and not rest
    assert found["rows"].keys() == {"plain", "sdpa"} and found["kind"] == "slope"
    plain = found["rows"]["plain"]
    assert plain["time"] == pytest.approx(2) and plain["time in theory"] == pytest.approx(2)
    assert plain["memory"] == pytest.approx(2) and plain["memory in theory"] == 2
    assert found["rows"]["sdpa"]["memory in theory"] == 1 and plain["time from"] == [8, 32]
    # With as many tokens at every size the work grows with n alone.
    (found,) = attention.slopes({"a": run(8, 4, 1.0), "b": run(32, 1, 4.0)}).values()
    assert found["rows"]["plain"]["time in theory"] == pytest.approx(1)


def test_the_limit_does_the_flops_it_says():
    run, flops = attention.matmul(32, "float32", "cpu")
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == flops == 2 * 32**3


def test_memory_of_a_tiled_version_is_below_that_of_the_plain_formula(monkeypatch):
    cell = replace(CELL, n=512, batch=1, n_heads=1)
    some = {name: peers.peers("cpu")[name] for name in ("sdpa", "plain", "heed.flash.tiled")}
    monkeypatch.setattr(attention, "peers", lambda device: some)
    rows = attention.measure_memory(cell, "cpu")["rows"]
    assert rows["plain"]["peak"] >= 2 * 512 * 512 * 4
    assert rows["sdpa"]["peak"] < rows["plain"]["peak"] / 4
    assert rows["heed.flash.tiled"]["peak"] < rows["plain"]["peak"]


def test_a_quick_run_keeps_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attention", "--quick"])
    some = {name: peers.peers("cpu")[name] for name in ("sdpa", "plain")}
    monkeypatch.setattr(attention, "peers", lambda device: some)
    before = record.path("attention").exists()
    assert attention.main() == 0
    out = capsys.readouterr().out
    assert out.count("again") == 10 and "(theory 2)" in out and "limit" in out
    assert record.path("attention").exists() == before


def test_what_is_asked_of_a_cpu_has_no_cell_twice_and_both_precisions():
    cells, memory = attention.plan(quick=False)
    assert {cell.dtype for cell in cells} == {"float32", "bfloat16"}
    assert {cell.n for cell in cells} == {512, 1024, 2048, 4096}
    assert len({cell.name for cell in cells}) == len(cells) and min(cells.values()) >= 3
    assert {cell.n for cell in memory} == {512, 2048, 8192}
    assert all(math.isfinite(cell.flops) for cell in cells)


# The recording


def runs(kind, **fields):
    found = record.load(record.path("attention"), attention.EMPTY)["runs"].values()
    return [r for r in found if r["kind"] == kind and fields.items() <= r.items()]


def test_the_record_has_every_cell_and_says_how_it_was_made():
    cells, memory = attention.plan(quick=False)
    found = record.load(record.path("attention"), attention.EMPTY)["runs"]
    names = {cell.name for cell in cells} | {f"memory, {cell.name}" for cell in memory}
    assert names == {name for name, run in found.items() if run["kind"] != "slope"}
    for run in found.values():
        assert {"date", "device", "versions", "commit", "threads"} <= run.keys()
        assert run["threads"] == 1


def test_no_time_in_the_record_stands_without_its_error():
    for run in runs("duel"):
        assert {"sdpa", "heed.flash.tiled", "limit", "again"} <= run["rows"].keys()
        cases = peers.peers("cpu").keys() - {"heed.flash.kernel"}  # under the interpreter alone
        assert cases - run["rows"].keys() == run["left out"].keys()
        for case, row in run["rows"].items():
            if case != "limit":
                assert 0 < row["error"] < (1e-6 if run["dtype"] == "float32" else 1e-2)
                assert 0 < row["share of the limit"] < 1
        ours, plain = (run["rows"][case]["error"] for case in ("heed.flash.tiled", "plain"))
        assert ours < 2 * plain


@pytest.mark.parametrize("n", [2048, 4096])
def test_in_the_record_tiles_are_three_times_faster_than_the_plain_formula(n):
    (run,) = runs("duel", n=n, direction=FORWARD, causal=True, dtype="float32")
    assert run["rows"]["plain"]["ratio"] > 3 * run["rows"]["heed.flash.tiled"]["ratio"]
    assert abs(run["rows"]["again"]["ratio"] - 1) < 0.1, "too noisy to be worth keeping"


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_in_the_record_the_memory_of_tiles_grows_with_n_and_that_of_the_formula_with_its_square(
    direction,
):
    peaks = {run["n"]: run["rows"] for run in runs("memory", direction=direction)}
    tiled = {n: rows["heed.flash.tiled"]["peak"] for n, rows in peaks.items()}
    assert tiled[8192] < 4.4 * tiled[2048] and tiled[2048] < 4 * peaks[2048]["sdpa"]["peak"]
    (run,) = runs("slope", direction=direction, causal=True, dtype="float32")
    assert abs(run["rows"]["plain"]["memory"] - 2) < 0.1
    assert abs(run["rows"]["heed.flash.tiled"]["memory"] - 1) < 0.4


# On a GPU

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_the_timer_of_a_gpu_sees_the_work_and_not_the_launch():
    timer = duel.cuda(calls=5)
    small, large = (attention.matmul(n, "bfloat16", "cuda")[0] for n in (4096, 8192))
    for run in (small, large):
        timer(run)
    assert 5 < timer(large) / timer(small) < 13  # 8 times the work
    assert timer(lambda: None) < 1e-4


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
def test_a_gpu_runs_ours_and_its_peers_with_small_errors(direction):
    cell = replace(CELL, direction=direction, n=300, d_head=64, dtype="bfloat16")
    run = attention.measure(
        cell, "cuda", rounds=3, timer=duel.cuda(), limit=attention.matmul(512, "bfloat16", "cuda")
    )
    assert {"sdpa flash", "heed.flash.kernel", "plain"} <= run["rows"].keys(), run["left out"]
    plain = run["rows"]["plain"]["error"]
    assert run["rows"]["heed.flash.kernel"]["error"] < 3 * plain < 0.1


@pytest.mark.gpu
@on_a_gpu
def test_the_peak_on_a_gpu_is_that_of_what_lives_at_one_time():
    x = torch.zeros(2**20, device="cuda")
    assert 2 * x.nbytes <= duel.peak(lambda: (x + 1) + 1, "cuda") < 2.1 * x.nbytes
