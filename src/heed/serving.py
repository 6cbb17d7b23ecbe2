"""A server in simulation: the same scheduler as `heed.batching`, and a clock in place of the model.

Requests arrive, wait, are read and answered. A step takes as long as `Latency` says from what it
reads; everything else is what `Scheduler` decides. So a policy can be tried in milliseconds on the
load of a day, with the seconds of your own machine: `measure` some steps, `Latency.fit` them.

A pool that reserves max_len positions for every request is one whose pages are max_len long.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from heed.batching import Engine, Job, Plan, Scheduler
from heed.cache.ledger import Ledger

Number = Any  # a float, or a Fraction where a result is to be exact


class Request(NamedTuple):
    """`new` tokens asked for at a time; of the prompt the first `shared` tokens are everybody's."""

    arrival: Number
    prompt: int
    new: int
    shared: int = 0


class Load(NamedTuple):
    """What one step reads: tokens, of how many requests, and the keys that all queries see."""

    tokens: int
    rows: int
    keys: int


def load(plan: Plan) -> Load:
    """n tokens behind r others see (r + 1) + (r + 2) + ... + (r + n) keys."""
    keys = (n * job.read + n * (n + 1) // 2 for job, n in plan.stretches.items())
    return Load(sum(plan.stretches.values()), len(plan.stretches), sum(keys))


@dataclass(frozen=True)
class Latency:
    """Seconds of a step: base + per_token tokens + per_row rows + per_key keys."""

    base: Number
    per_token: Number = 0
    per_row: Number = 0
    per_key: Number = 0

    def __post_init__(self) -> None:
        found = (self.base, self.per_token, self.per_row, self.per_key)
        if not all(0 <= x < math.inf for x in found):
            raise ValueError(f"time does not run backwards: {found}")

    def __call__(self, load: Load) -> Number:
        tokens, rows, keys = load
        return self.base + self.per_token * tokens + self.per_row * rows + self.per_key * keys

    @classmethod
    def fit(cls, steps: Sequence[tuple[Load, float]]) -> "Latency":
        """Least squares with no coefficient below 0: the best of all sets of columns."""
        if len(steps) < 4:
            raise ValueError(f"four coefficients take at least four steps, got {len(steps)}")
        rows = torch.tensor([[1, *load] for load, _ in steps], dtype=torch.float64)
        taken = torch.tensor([seconds for _, seconds in steps], dtype=torch.float64)
        size = rows.norm(dim=0).clamp(min=1)  # keys count in thousands: columns of equal size
        best, least = torch.zeros(4, dtype=torch.float64), math.inf
        for n in range(1, 5):
            for columns in map(list, itertools.combinations(range(4), n)):
                some = rows[:, columns] / size[columns]
                found = torch.linalg.lstsq(some, taken[:, None], driver="gelsd").solution[:, 0]
                error = (some @ found - taken).square().sum().item()
                if found.min() >= 0 and error < least * (1 - 1e-9):
                    best, least = torch.zeros_like(best), error
                    best[columns] = found / size[columns]
        return cls(*best.tolist())


def measure(
    engine: Engine, clock: Callable[[], float] = time.perf_counter, most: float = math.inf
) -> list[tuple[Load, float]]:
    """Run an engine until all have ended, or `most` steps: what each read, and its seconds."""
    steps: list[tuple[Load, float]] = []
    while len(steps) < most and (engine.scheduler.waiting or engine.scheduler.running):
        start = clock()
        plan = engine.scheduler.plan()
        planned, what = clock() - start, load(plan)
        start = clock()
        engine.read(plan)
        steps.append((what, planned + clock() - start))
    return steps


class Served(NamedTuple):
    """When the first and the last token of a request were said."""

    request: Request
    first: Number
    end: Number


class Step(NamedTuple):
    start: Number
    seconds: Number
    load: Load
    pages: int  # held by running requests; a shared page counts once
    wasted: int  # positions in them that nothing fills
    waiting: int


@dataclass(frozen=True)
class Run:
    served: list[Served]  # in the order of the requests
    steps: list[Step]

    @property
    def first_token(self) -> list[Number]:
        """Seconds from arrival to the first token, request by request."""
        return [s.first - s.request.arrival for s in self.served]

    @property
    def per_token(self) -> list[Number]:
        """Mean seconds between two tokens, of every request that says two or more."""
        return [(s.end - s.first) / (s.request.new - 1) for s in self.served if s.request.new > 1]

    @property
    def makespan(self) -> Number:
        """From the first arrival to the last token."""
        return max(s.end for s in self.served) - min(s.request.arrival for s in self.served)

    @property
    def tokens_per_second(self) -> Number:
        return sum(s.request.new for s in self.served) / self.makespan


def percentile(values: Sequence[Number], p: Number) -> Number:
    """The least value that p percent of all do not exceed."""
    if not values or not 0 < p <= 100:
        raise ValueError(f"a percentile takes values and 0 < p <= 100, got {len(values)} and {p}")
    return sorted(values)[math.ceil(p * len(values) / 100) - 1]


def simulate(
    requests: Sequence[Request],
    policy: str,
    latency: Callable[[Load], Number],
    *,
    n_pages: int,
    page_len: int,
    max_rows: int,
    max_tokens: int,
) -> Run:
    """Serve all requests. A step counts who arrived before it began; nobody waits for a full batch.

    A static batch is computed as a rectangle: as wide as its longest prompt, and a row that has
    ended is read on until the last one ends.
    """
    ledger = Ledger(1, page_len, n_pages)
    s = Scheduler(ledger, max_rows=max_rows, max_tokens=max_tokens, policy=policy)
    for request in requests:
        _check(request)
    line = deque(sorted(range(len(requests)), key=lambda i: requests[i].arrival))
    clock: Number = requests[line[0]].arrival if line else 0
    numbers: dict[Job, int] = {}
    first: dict[Job, Number] = {}
    served: dict[int, Served] = {}
    steps: list[Step] = []
    batch = width = 0
    while line or s.waiting or s.running:
        if not s.waiting and not s.running:
            clock = max(clock, requests[line[0]].arrival)
        while line and requests[line[0]].arrival <= clock:
            i = line.popleft()
            numbers[s.submit(_prompt(i, requests[i]), requests[i].new)] = i
        plan = s.plan()
        what = load(plan)
        if policy == "static":
            batch, width = (len(plan.started), 0) if plan.started else (batch, width)
            n = max(plan.stretches.values())
            what = Load(batch * n, batch, batch * (n * width + n * (n + 1) // 2))
            width += n
        ledger.grow(0, [job.seq for job in plan.stretches], list(plan.stretches.values()))
        tables = [ledger.find(job.seq) for job in s.running]
        pages = len({page for table in tables for page in table.pages})
        wasted = sum(len(table.pages) * page_len - table.length for table in tables)
        steps.append(Step(clock, latency(what), what, pages, wasted, len(s.waiting)))
        clock += steps[-1].seconds
        for job in plan.speakers:
            first.setdefault(job, clock)
        for job in s.commit(plan, dict.fromkeys(plan.speakers, -1)):
            i = numbers[job]
            served[i] = Served(requests[i], first[job], clock)
    return Run([served[i] for i in range(len(requests))], steps)


def poisson(n: int, rate: float, generator: torch.Generator) -> list[float]:
    """Times of n arrivals, `rate` of them per second, each independent of all others."""
    if n < 0 or not 0 < rate < math.inf:
        raise ValueError(f"arrivals take a number and a rate above 0, got {n} and {rate}")
    gaps = torch.empty(n, dtype=torch.float64).exponential_(rate, generator=generator)
    return gaps.cumsum(0).tolist()


def long_tailed(
    n: int, generator: torch.Generator, *, least: int, most: int, alpha: float = 1.0
) -> list[int]:
    """Whole numbers of at least k with probability (least / k)^alpha, cut at `most` (Pareto)."""
    if n < 0 or not 1 <= least <= most or not 0 < alpha < math.inf:
        got = f"{n} of {least} to {most} with alpha {alpha}"
        raise ValueError(f"lengths take 1 <= least <= most and alpha above 0, got {got}")
    u = 1 - torch.rand(n, dtype=torch.float64, generator=generator)  # in (0, 1]
    return (least * u ** (-1 / alpha)).clamp(max=most).floor().long().tolist()


class Slots(NamedTuple):
    """Positions that requests fill, and what is reserved for them."""

    used: int
    contiguous: int
    paged: int


def slots(lengths: Sequence[int], *, max_len: int, page_len: int) -> Slots:
    """A stretch of max_len positions for every request, or pages: less than one page is wasted."""
    if any(not 1 <= n <= max_len for n in lengths) or page_len < 1:
        got = f"{sorted(lengths)[:1]} to {sorted(lengths)[-1:]} of {max_len}, pages of {page_len}"
        raise ValueError(f"lengths must lie in 1 to max_len, pages hold one or more: {got}")
    pages = sum(-(-n // page_len) for n in lengths)
    return Slots(sum(lengths), len(lengths) * max_len, pages * page_len)


def _prompt(i: int, request: Request) -> list[int]:
    """Token -1 is the same for everybody, token i is of request i alone."""
    return [-1] * request.shared + [i] * (request.prompt - request.shared)


def _check(request: Request) -> None:
    sizes = (request.prompt, request.new, request.shared)
    if not all(isinstance(n, int) for n in sizes) or not 0 <= request.shared <= request.prompt:
        raise ValueError(f"prompt, new and shared are whole numbers, shared <= prompt: {request}")
    if not 0 <= request.arrival < math.inf:
        raise ValueError(f"an arrival is a finite time, 0 or later: {request}")
