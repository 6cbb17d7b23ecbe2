"""bench/duel.py: ratios of known durations, whatever the clock does."""

import itertools

import pytest

from bench.duel import duel, show


class Clock:
    """A clock that the cases themselves move."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_ratio_is_taken_within_a_round_so_a_slower_machine_cancels_out():
    clock, calls = Clock(), itertools.count()

    def case(seconds):
        def run():
            round = (
                max(0, next(calls) - 6) // 4
            )  # two warm-up calls of three cases, then four a round
            clock.now += seconds * (1 + round)

        return run

    rows = duel({"base": case(2.0), "half": case(1.0), "thrice": case(6.0)}, rounds=9, clock=clock)
    ratios = {name: row["ratio"] for name, row in rows.items()}
    assert ratios == pytest.approx({"base": 1, "half": 0.5, "thrice": 3, "again": 1})
    assert rows["half"]["interval"] == pytest.approx([0.5, 0.5])
    assert rows["base"]["seconds"] == pytest.approx(2.0 * 5)  # the fifth of nine rounds


def test_the_second_baseline_shows_the_noise():
    times = itertools.cycle([1.0, 2.0])
    clock = Clock()

    def noisy():
        clock.now += next(times)

    row = duel({"noisy": noisy}, rounds=11, clock=clock)["again"]
    assert row["interval"][0] < 1 < row["interval"][1] or row["ratio"] in (0.5, 2)


def test_every_case_runs_first_in_some_round():
    order, clock = [], Clock()
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    with pytest.raises(ZeroDivisionError):  # a clock that stands still measures nothing
        duel(cases, rounds=9, clock=clock)
    rounds = [order[n : n + 4] for n in range(6, len(order), 4)]  # after two warm-up calls each
    assert {r[0] for r in rounds} == set("abc") and all(sorted(r) == list("aabc") for r in rounds)


@pytest.mark.parametrize("cases, rounds", [({}, 5), ({"a": print}, 2)])
def test_too_little_is_refused(cases, rounds):
    with pytest.raises(ValueError, match=f"{len(cases)} and {rounds}"):
        duel(cases, rounds=rounds)


def test_a_row_begins_with_its_ratio(capsys):
    show("title", {"a": {"ratio": 1.25, "interval": [1.0, 2.0], "seconds": 3.0}})
    assert capsys.readouterr().out.split() == [
        *("title", "1.250", "[1.000,", "2.000]", "3.000", "s", "a")
    ]
