"""Cases timed in turn, so that whatever the machine does meanwhile hits all of them alike.

A round times every case once, in a fresh random order, the baseline twice. A case's ratio is the
median over rounds of its time over the baseline's in the same round: below 1 is faster. The second
baseline, "again", shows the noise: a difference smaller than its distance from 1 means nothing.

No case has a time without an error, its distance from what it should have computed.
"""

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AGAIN, LIMIT = "again", "limit"
HOW = {
    "cpu": "bytes that PyTorch's CPU allocator handed out, from torch.profiler's memory events",
    "cuda": "torch.cuda.max_memory_allocated above the bytes allocated before the call",
}
Run = Callable[[], object]
Timer = Callable[[Run], float]


def clocked(clock: Callable[[], float]) -> Timer:
    """Seconds of one call by a clock of this machine."""

    def seconds(run: Run) -> float:
        start = clock()
        run()
        return clock() - start

    return seconds


work = clocked(time.process_time)  # this process's work alone: one thread on a shared machine
wall = clocked(time.perf_counter)  # several threads on a quiet machine


def cuda(*, calls: int = 3, flush: int = 2**28) -> Timer:
    """Median seconds of a few calls on the GPU, by its own clock."""
    waste = torch.empty(flush, dtype=torch.int8, device="cuda")
    return queued(
        calls, waste.zero_, lambda: torch.cuda.Event(enable_timing=True), torch.cuda.synchronize
    )


def queued(calls: int, flush: Run, event: Callable[[], Any], wait: Run) -> Timer:
    """Events stand in the device's queue around each call, and are read when it has run dry.

    Before each call the device writes over its cache, so that every call reads its inputs from
    memory; a longer write at first lets the calls queue up behind it, so that the device never
    waits for Python between an event and the call.
    """

    def seconds(run: Run) -> float:
        marks = [(event(), event()) for _ in range(calls)]
        for _ in range(8):
            flush()
        for before, after in marks:
            flush()
            before.record()
            run()
            after.record()
        wait()
        return statistics.median(a.elapsed_time(b) for a, b in marks) / 1000  # milliseconds

    return seconds


def peak(run: Run, device: str) -> int:
    """Most bytes held at one time during a call, above what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()  # its results count, too
    del kept
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text("utf8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def error(got: Tensor, exact: Tensor) -> float:
    """‖got - exact‖ / ‖exact‖, in float64."""
    if got.shape != exact.shape:
        raise ValueError(f"{tuple(got.shape)} cannot be held against {tuple(exact.shape)}")
    size = exact.double().norm().item()
    return (got.double() - exact.double()).norm().item() / (size or 1.0)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of value ~ size^p: the straight line through the logarithms."""
    if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"a slope takes two sizes and positive values, got {sizes} and {values}")
    x, y = [math.log(n) for n in sizes], [math.log(t) for t in values]
    return statistics.linear_regression(x, y).slope


def duel(
    cases: Mapping[str, Run],
    *,
    errors: Mapping[str, float],
    rounds: int,
    flops: float | None = None,
    limit: tuple[Run, float] | None = None,
    timer: Timer = work,
    random_seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Per case: ratio to the first, its 90 % interval, median seconds of one call, the error.

    `flops` is what one call of any case has to compute. `limit` is a call that does nothing but
    arithmetic, with its FLOPs: it runs in the same rounds, and a case's share of the limit is its
    rate over the limit's.
    """
    if rounds < 3 or not cases:
        raise ValueError(f"a duel takes a case and 3 rounds, got {len(cases)} and {rounds}")
    if {AGAIN, LIMIT} & cases.keys():
        raise ValueError(f"{AGAIN} and {LIMIT} are rows of every duel, and no names of cases")
    if errors.keys() != cases.keys() or not all(0 <= e < math.inf for e in errors.values()):
        raise ValueError(f"each of {list(cases)} has an error, finite and above 0; got {errors}")
    if limit and not flops:
        raise ValueError("a share of the limit needs the FLOPs of the cases")
    rng, baseline = random.Random(random_seed), next(iter(cases))
    table = {**cases, **({LIMIT: limit[0]} if limit else {})}
    for run in table.values():  # compiles, fills caches, makes the optimizer's state
        run()
        run()
    table[AGAIN] = cases[baseline]
    taken: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(rounds):
        for name in rng.sample(list(table), len(table)):
            taken[name].append(timer(table[name]))
    rows = {name: _row(times, taken[baseline], rng) for name, times in taken.items()}
    for name, row in rows.items():
        row["error"] = None if name == LIMIT else errors[baseline if name == AGAIN else name]
        if flops:
            row["flops per second"] = (limit[1] if name == LIMIT else flops) / row["seconds"]
    for row in rows.values() if limit else ():
        row["share of the limit"] = row["flops per second"] / rows[LIMIT]["flops per second"]
    return rows


def _row(times: Sequence[float], base: Sequence[float], rng: random.Random) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {
        "ratio": statistics.median(ratios),
        "interval": [medians[50], medians[949]],
        "seconds": statistics.median(times),
    }


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Ratio first, the machine's own milliseconds behind it, and no time without its error."""
    print(title)
    for name, row in rows.items():
        low, high = row["interval"]
        line = f"  {row['ratio']:7.3f}  [{low:.3f}, {high:.3f}]  {row['seconds'] * 1e3:10.3f} ms"
        line += "  error        -" if row["error"] is None else f"  error {row['error']:8.1e}"
        if "flops per second" in row:
            line += f"  {row['flops per second'] / 1e9:9,.1f} GFLOP/s"
        if "share of the limit" in row:
            line += f"  {row['share of the limit']:4.0%}"
        print(f"{line}  {name}", flush=True)
