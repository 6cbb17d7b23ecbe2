"""bench/duel.py: ratios of known durations, whatever the clock does; no time without its error."""

import itertools
import math

import pytest
import torch

from bench import duel as harness
from bench.duel import clocked, duel, error, peak, queued, show, slope


class Clock:
    """A clock that the cases themselves move."""

    now = 0.0

    def __call__(self):
        return self.now


def still(*names):
    return dict.fromkeys(names, 0.0)


def test_a_ratio_is_taken_within_a_round_so_a_slower_machine_cancels_out():
    clock, calls = Clock(), itertools.count()

    def case(seconds):
        def run():
            round = max(0, next(calls) - 6) // 4  # twice three cases to warm up, then four a round
            clock.now += seconds * (1 + round)

        return run

    cases = {"base": case(2.0), "half": case(1.0), "thrice": case(6.0)}
    rows = duel(cases, errors=still(*cases), rounds=9, timer=clocked(clock))
    ratios = {name: row["ratio"] for name, row in rows.items()}
    assert ratios == pytest.approx({"base": 1, "half": 0.5, "thrice": 3, "again": 1})
    assert rows["half"]["interval"] == pytest.approx([0.5, 0.5])
    assert rows["base"]["seconds"] == pytest.approx(2.0 * 5)  # the fifth of nine rounds


def test_the_second_baseline_shows_the_noise():
    times = itertools.cycle([1.0, 2.0])
    clock = Clock()

    def noisy():
        clock.now += next(times)

    rows = duel({"noisy": noisy}, errors={"noisy": 0.0}, rounds=11, timer=clocked(clock))
    row = rows["again"]
    assert row["interval"][0] < 1 < row["interval"][1] or row["ratio"] in (0.5, 2)


def test_every_case_runs_first_in_some_round():
    order, clock = [], Clock()
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    with pytest.raises(ZeroDivisionError):  # a clock that stands still measures nothing
        duel(cases, errors=still(*"abc"), rounds=9, timer=clocked(clock))
    rounds = [order[n : n + 4] for n in range(6, len(order), 4)]  # after two warm-up calls each
    assert {r[0] for r in rounds} == set("abc") and all(sorted(r) == list("aabc") for r in rounds)


def timed(seconds, clock):
    def run():
        clock.now += seconds

    return run


def test_rates_and_shares_come_from_the_flops_and_the_times():
    clock = Clock()
    cases = {"slow": timed(4.0, clock), "fast": timed(0.5, clock)}
    rows = duel(
        cases,
        errors={"slow": 1e-3, "fast": 2e-3},
        rounds=3,
        flops=100,
        limit=(timed(2.0, clock), 800),
        timer=clocked(clock),
    )
    rates = {name: row["flops per second"] for name, row in rows.items()}
    assert rates == {"slow": 25, "fast": 200, "limit": 400, "again": 25}
    shares = {name: row["share of the limit"] for name, row in rows.items()}
    assert shares == {"slow": 1 / 16, "fast": 0.5, "limit": 1, "again": 1 / 16}
    errors = {name: row["error"] for name, row in rows.items()}
    assert errors == {"slow": 1e-3, "fast": 2e-3, "limit": None, "again": 1e-3}
    assert rows["fast"]["ratio"] == 1 / 8


@pytest.mark.parametrize("cases, rounds", [({}, 5), ({"a": print}, 2)])
def test_too_little_is_refused(cases, rounds):
    with pytest.raises(ValueError, match=f"{len(cases)} and {rounds}"):
        duel(cases, errors=still(*cases), rounds=rounds)


@pytest.mark.parametrize(
    "errors",
    [{}, {"a": 0.0}, *({"a": 0.0, "b": e} for e in (math.nan, math.inf, -1.0)), still(*"abc")],
)
def test_a_case_without_a_finite_error_is_not_timed(errors):
    def never():
        raise AssertionError("it was timed")

    with pytest.raises(ValueError, match="has an error, finite"):
        duel({"a": never, "b": never}, errors=errors, rounds=3)


def test_errors_cannot_be_left_away():
    with pytest.raises(TypeError, match="errors"):
        duel({"a": print}, rounds=3)


@pytest.mark.parametrize("name", ["again", "limit"])
def test_the_rows_of_the_duel_itself_are_no_names_for_cases(name):
    with pytest.raises(ValueError, match="no names of cases"):
        duel({name: print}, errors={name: 0.0}, rounds=3)


def test_a_share_needs_the_flops():
    with pytest.raises(ValueError, match="FLOPs"):
        duel({"a": print}, errors={"a": 0.0}, rounds=3, limit=(print, 1))


class Device:
    """A queue that works only when it is waited for, as a GPU does."""

    def __init__(self):
        self.queue, self.now, self.waits = [], 0.0, 0

    def put(self, milliseconds):
        return lambda: self.queue.append(milliseconds)

    def wait(self):
        self.waits += 1
        for job in self.queue:
            if isinstance(job, Event):
                job.time = self.now
            else:
                self.now += job
        self.queue.clear()

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device, self.time = device, None

    def record(self):
        self.device.queue.append(self)

    def elapsed_time(self, later):
        return later.time - self.time


def test_the_time_of_a_gpu_is_that_between_events_without_the_flush():
    device, kinds = Device(), []
    lasts = itertools.cycle([30.0, 10.0, 20.0])

    def run():
        kinds.append(len(device.queue))
        device.put(next(lasts))()

    timer = queued(3, device.put(1000.0), device.event, device.wait)
    assert timer(run) == pytest.approx(0.020)  # the median, in seconds
    assert device.waits == 1 and kinds == [10, 14, 18]  # all queued before anybody waits


def test_an_error_is_relative_and_taken_in_float64():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert error(exact * (1 + 1e-12), exact) == pytest.approx(1e-12, rel=1e-3)
    assert error(torch.ones(4), torch.zeros(4)) == 2
    assert math.isnan(error(torch.tensor([3.0, math.nan]), exact))
    with pytest.raises(ValueError, match=r"\(1, 2\) .* \(2,\)"):
        error(exact[None], exact)


@pytest.mark.parametrize("p", [-1, 0, 1, 2])
def test_a_slope_is_the_exponent(p):
    sizes = [512, 1024, 4096]
    assert slope(sizes, [7 * n**p for n in sizes]) == pytest.approx(p, abs=1e-9)


@pytest.mark.parametrize("sizes, values", [([4], [1]), ([4, 4], [1, 2]), ([2, 4], [0, 1])])
def test_a_slope_of_too_little_is_refused(sizes, values):
    with pytest.raises(ValueError, match="a slope takes"):
        slope(sizes, values)


def test_a_peak_counts_what_lives_at_one_time_and_the_result():
    n, size = 1000, 8000
    held = torch.zeros(n, dtype=torch.float64)

    def passing():
        first = held + 1
        second = first + 1  # two at one time
        del first
        return second + 1  # and two again

    assert 2 * size <= peak(passing, "cpu") < 2.2 * size
    assert peak(lambda: held.add_(1), "cpu") < 0.2 * size


def test_the_timers_of_a_cpu_are_seconds():
    def spin():
        sum(range(200_000))

    assert 0 < harness.work(spin) < 1 and 0 < harness.wall(spin) < 10


def test_a_row_shows_its_error_beside_its_time(capsys):
    row = {"ratio": 1.25, "interval": [1.0, 2.0], "seconds": 0.003, "error": 2e-7}
    limit = row | {"error": None, "flops per second": 5e9, "share of the limit": 1.0}
    show("title", {"a": row, "limit": limit})
    first, *rest = capsys.readouterr().out.splitlines()[1:]
    assert first.split() == [
        *("1.250", "[1.000,", "2.000]", "3.000", "ms", "error", "2.0e-07", "a")
    ]
    assert rest[0].split()[5:] == ["error", "-", "5.0", "GFLOP/s", "100%", "limit"]
