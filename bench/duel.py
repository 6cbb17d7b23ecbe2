"""Cases timed in turn, so that whatever the machine does meanwhile hits all of them alike.

A round times every case once, in a fresh random order, the baseline twice. A case's ratio is the
median over rounds of its time over the baseline's in the same round. The second baseline, "again",
shows the noise: a difference smaller than its distance from 1 means nothing.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

AGAIN = "again"


def duel(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    random_seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Per case: ratio to the first, its 90 % interval, and the median seconds of one call.

    `process_time` counts this process's work alone, which fits one thread on a shared machine;
    use `perf_counter` for several threads on a quiet one.
    """
    if rounds < 3 or not cases:
        raise ValueError(f"a duel takes a case and 3 rounds, got {len(cases)} and {rounds}")
    rng, baseline = random.Random(random_seed), next(iter(cases))
    table = {**cases, AGAIN: cases[baseline]}
    for run in cases.values():  # compiles, fills caches, makes the optimizer's state
        run()
        run()
    taken: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(rounds):
        for name in rng.sample(list(table), len(table)):
            start = clock()
            table[name]()
            taken[name].append(clock() - start)
    return {name: _row(times, taken[baseline], rng) for name, times in taken.items()}


def _row(times: Sequence[float], base: Sequence[float], rng: random.Random) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {
        "ratio": statistics.median(ratios),
        "interval": [medians[50], medians[949]],
        "seconds": statistics.median(times),
    }


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Ratio first, the machine's own seconds last."""
    print(title)
    for name, row in rows.items():
        low, high = row["interval"]
        print(f"  {row['ratio']:6.3f}  [{low:.3f}, {high:.3f}]  {row['seconds']:8.3f} s  {name}")
