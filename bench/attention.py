"""Attention beside its peers: time, error and memory against the number of positions (chapter 22).

    python -m bench.attention            what is not in the file yet; one thread, three minutes
    python -m bench.attention --quick    two tiny sizes, printed and not kept

On a GPU `python -m bench.gpu` runs the same cells, and more of them.

Everything computes softmax(q kᵀ / √D) v of the same random q, k and v. FLOPs are those of the two
products, 4 B H n² D, half of them when causal; a backward pass counts 2.5 times (five products for
two: the scores again, and the gradients of weights, q, k and v). An error is the distance from
float64 arithmetic on the same rounded inputs, in the first and the last head, over the size of the
answer; of a backward pass the worst of dq, dk and dv.

B batch · H heads · n positions · D head width.
"""

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.duel import AGAIN, HOW, LIMIT, Timer, duel, error, peak, show, slope, work
from bench.peers import BOTH, DENSE, FORWARD, LARGEST, WRONG, Attend, Cell, LeftOut, peers
from heed import attention as reference
from heed import masks

LATE = "no time left"


class Broken(Exception):
    """The device answers nothing any more: this process cannot go on."""


def ends(x: Tensor) -> Tensor:
    """The first head of the first text and the last of the last: (1, 2, n, D)."""
    return torch.stack([x[0, 0], x[-1, -1]])[None].detach()


def exact(tensors: list[Tensor], causal: bool, rows: int = 512) -> dict[str, Tensor]:
    """Output and gradients of two heads in float64, a few queries at a time."""
    q, k, v, do = (ends(x).double() for x in tensors)
    n, mask = q.shape[2], masks.causal if causal else masks.full
    out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
    for start in range(0, n, rows):
        some = slice(start, min(start + rows, n))
        seen = slice(0, some.stop if causal else n)
        own = [q[:, :, some], k[:, :, seen], v[:, :, seen]]
        own = [x.clone().requires_grad_() for x in own]
        o = reference.attention(*own, mask)  # the queries are the last of the keys that they see
        grads = torch.autograd.grad(o, own, do[:, :, some])
        out[:, :, some], dq[:, :, some] = o.detach(), grads[0]
        dk[:, :, seen] += grads[1]
        dv[:, :, seen] += grads[2]
    return {"o": out, "dq": dq, "dk": dk, "dv": dv}


def call(attend: Attend, cell: Cell, tensors: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: it gives back o, or dq, dk and dv."""
    q, k, v, do = tensors
    if cell.direction == FORWARD:

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(q, k, v),)

        return run
    if cell.direction == BOTH:
        return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), do)
    o = attend(q, k, v)
    return lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)


def distance(got: tuple[Tensor, ...], right: Mapping[str, Tensor]) -> float:
    names = ("o",) if len(got) == 1 else ("dq", "dk", "dv")
    return max(error(ends(x), right[name]) for name, x in zip(names, got, strict=True))


def settle(device: str) -> None:
    """Waits for the device; one that answers nothing any more is Broken."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as problem:
            raise Broken(first_line(problem)) from problem


def first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:160]}"


def tried(
    cell: Cell, device: str, without: Collection[str], job: Callable[[Attend], Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the job makes of every case, and the reasons for those that are left out."""
    results, left_out = {}, {}
    for name, make in peers(device).items():
        try:
            most = LARGEST[device].get(name, cell.n)
            if name in without:
                raise LeftOut("it broke the device in a cell before")
            if cell.n > most:
                raise LeftOut(f"measured up to {most} positions")
            results[name] = job(make(cell, device))
        except LeftOut as problem:
            left_out[name] = str(problem)
        except Exception as problem:  # a peer that this machine cannot run costs nobody else
            left_out[name] = first_line(problem)
        try:
            settle(device)
        except Broken as problem:
            raise Broken(f"{name}: {left_out.get(name, problem)}") from problem
    return results, left_out


def measure(
    cell: Cell,
    device: str,
    *,
    rounds: int,
    timer: Timer,
    limit: tuple[Callable[[], object], int],
    without: Collection[str] = (),
) -> dict[str, Any]:
    """A duel of all that can run this cell."""
    tensors = cell.tensors(device)
    right = exact(tensors, cell.causal)

    def job(attend: Attend) -> tuple[Callable, float]:
        run = call(attend, cell, tensors)
        far = distance(run(), right)
        if not far < WRONG:
            raise LeftOut(f"wrong: its error is {far:.1e}")
        return run, far

    found, left_out = tried(cell, device, without, job)
    cases = {name: run for name, (run, _) in found.items()}
    errors = {name: far for name, (_, far) in found.items()}
    rows = duel(cases, errors=errors, rounds=rounds, flops=cell.flops, limit=limit, timer=timer)
    kept = {"kind": "duel", **asdict(cell), "flops": cell.flops, "rounds": rounds}
    return kept | {"rows": rows, "left out": left_out}


def measure_memory(cell: Cell, device: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The peak of every case; where there are gradients, over both passes."""
    tensors = cell.tensors(device)

    def job(attend: Attend) -> int:
        return peak(call(attend, cell, tensors), device)

    peaks, left_out = tried(cell, device, without, job)
    rows = {name: {"peak": most} for name, most in peaks.items()}
    kept = {"kind": "memory", **asdict(cell), "how": HOW[device]}
    return kept | {"rows": rows, "left out": left_out}


def matmul(n: int, dtype: str, device: str) -> tuple[Callable[[], object], int]:
    """The limit: one product of large square random matrices, and its FLOPs."""
    draw = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(n, n, generator=draw, device=device).to(getattr(torch, dtype)) for _ in range(2)
    )
    return lambda: a @ b, 2 * n**3


def slopes(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The exponent of n in time and in memory, measured and in theory, for every series of runs."""
    found: dict[str, dict[str, Any]] = {}
    for quantity, kind, key in (("time", "duel", "seconds"), ("memory", "memory", "peak")):
        series: dict[str, list] = {}
        for run in runs.values():
            if run["kind"] == kind:
                mask = "causal" if run["causal"] else "full"
                name = f"slope, {run['direction']}, {run['d_head']}, {mask}, {run['dtype']}"
                series.setdefault(name, []).append(run)
        for name, members in series.items():
            fields = {f: members[0][f] for f in ("direction", "d_head", "causal", "dtype")}
            for case in dict.fromkeys(case for run in members for case in run["rows"]):
                points = [run for run in members if case in run["rows"]]
                sizes = sorted(run["n"] for run in points)
                if len(sizes) < 2 or case in (LIMIT, AGAIN):
                    continue
                if kind == "duel":
                    theory = slope([run["n"] for run in points], [run["flops"] for run in points])
                else:
                    theory = 2.0 if case in DENSE else 1.0
                values = [run["rows"][case][key] for run in points]
                kept = found.setdefault(name, {"kind": "slope", **fields, "rows": {}})
                kept["rows"].setdefault(case, {}).update({
                    quantity: slope([run["n"] for run in points], values),
                    f"{quantity} in theory": theory,
                    f"{quantity} from": sizes,
                })  # fmt: skip
    return found


def measure_all(
    path: Path,
    empty: dict[str, Any],
    device: str,
    duels: Mapping[Cell, int],
    memory: Collection[Cell],
    *,
    timer: Timer,
    limit: Callable[[str], tuple[Callable[[], object], int]],
    until: float = math.inf,
    without: Collection[str] = (),
) -> dict[str, str]:
    """Every cell that is not in the file yet, and the slopes; the cells that were lost, and why.

    `until` is a time.perf_counter(): after it no new cell begins.
    """
    lost = {}
    for cell, rounds in [*duels.items(), *((cell, 0) for cell in memory)]:
        name = cell.name if rounds else f"memory, {cell.name}"
        start = time.perf_counter()
        if name in record.load(path, empty)["runs"]:
            continue
        if start > until:
            lost[name] = LATE
            continue
        try:
            if rounds:
                how = {"rounds": rounds, "timer": timer, "limit": limit(cell.dtype)}
                run = measure(cell, device, without=without, **how)
            else:
                run = measure_memory(cell, device, without)
        except Broken:
            raise
        except Exception as problem:  # one cell costs no other
            settle(device)
            lost[name] = first_line(problem)
            print(f"{name}: {lost[name]}", flush=True)
            continue
        run = record.add(path, empty, name, start, run)
        show_cell(name, run)
        if device == "cuda":  # what a cell held, the next one needs
            gc.collect()
            torch.cuda.empty_cache()
    start = time.perf_counter()
    for name, run in slopes(record.load(path, empty)["runs"]).items():
        record.add(path, empty, name, start, run)
    return lost


def show_cell(name: str, run: Mapping[str, Any]) -> None:
    if run["kind"] == "duel":
        show(name, run["rows"])
    else:
        peaks = [f"  {row['peak'] / 1e6:9.1f} MB  {case}" for case, row in run["rows"].items()]
        print(name, *peaks, sep="\n")
    for case, reason in run["left out"].items():
        print(f"  left out: {case}: {reason}")
    print(f"  took {run['seconds']} s", flush=True)


def show_slopes(runs: Mapping[str, Mapping[str, Any]]) -> None:
    for name, run in runs.items():
        if run["kind"] == "slope":
            print(name)
            for case, row in run["rows"].items():
                pairs = [
                    f"{x} n^{row[x]:.2f} (theory {row[f'{x} in theory']:.0f})"
                    for x in ("time", "memory")
                    if x in row
                ]
                print(f"  {'  '.join(pairs)}  {case}")


def plan(quick: bool) -> tuple[dict[Cell, int], list[Cell]]:
    """What a CPU is asked: cells with their rounds, and cells whose memory is measured."""
    shape = {"batch": 1, "n_heads": 8, "d_head": 64}
    sizes = {512: 7, 1024: 5, 2048: 5, 4096: 5}
    if quick:
        shape, sizes = {"batch": 1, "n_heads": 2, "d_head": 16}, {32: 3, 48: 3}
    cells = {
        Cell(direction=direction, n=n, causal=causal, dtype=dtype, **shape): rounds
        for direction, causal, dtype, largest in (
            (FORWARD, True, "float32", 4096),
            (FORWARD, True, "bfloat16", 4096),
            (FORWARD, False, "float32", 2048),
            (BOTH, True, "float32", 2048),
            (BOTH, True, "bfloat16", 1024),
        )
        for n, rounds in sizes.items()
        if n <= largest
    }
    memory = [
        Cell(direction=direction, n=n, causal=True, dtype="float32", **shape)
        for direction in (FORWARD, BOTH)
        for n in ([*sizes] if quick else [512, 2048, 8192])
    ]
    return cells, memory


EMPTY = {
    "settings": {
        "threads": 1,
        "clock": "process_time",
        "limit": "a product of two random 1024 x 1024 matrices",
        "error": "of the first and the last head, over the norm of the float64 answer",
    },
    "runs": {},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tiny sizes, kept nowhere")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.json" if quick else record.path("attention")
        limits = {d: matmul(64 if quick else 1024, d, "cpu") for d in ("float32", "bfloat16")}
        how = {"timer": work, "limit": limits.__getitem__}
        lost = measure_all(path, EMPTY, "cpu", *plan(quick), **how)
        show_slopes(record.load(path, EMPTY)["runs"])
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
