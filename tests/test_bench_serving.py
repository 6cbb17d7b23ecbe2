"""bench/serving.py: what is served, what counts as an error, what is foretold."""

import pytest
import torch

from bench import record, serving
from heed.batching import Engine


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return serving.make(serving.QUICK)


def test_all_three_say_what_each_request_says_alone(model):
    todo = serving.orders(serving.QUICK, 9, 5)
    want = serving.alone(model, serving.QUICK, todo)
    assert [len(text) for text in want] == [serving.QUICK.prompt + n for n in todo.news]
    assert len(set(todo.news)) > 3
    for run in serving.CASES.values():
        assert serving.differing(run(model, serving.QUICK, todo), want) == 0


def test_a_token_that_is_wrong_or_missing_or_too_much_counts():
    want = [[1, 2, 3], [4, 5]]
    assert serving.differing([[1, 2, 3], [4, 5]], want) == 0
    assert serving.differing([[1, 9, 3], [4]], want) == 2
    assert serving.differing([[1, 2, 3, 4], [9, 9]], want) == 3
    with pytest.raises(ValueError):
        serving.differing([[1, 2, 3]], want)


def test_orders_are_the_same_for_a_seed_and_others_for_another():
    a, b, c = (serving.orders(serving.QUICK, 20, seed) for seed in (1, 1, 2))
    assert torch.equal(a.prompts, b.prompts) and a.news == b.news
    assert not torch.equal(a.prompts, c.prompts) and a.news != c.news
    assert min(a.news) >= serving.QUICK.least and max(a.news) <= serving.QUICK.most


def test_the_clock_of_a_run_with_arrivals_is_that_of_its_steps(model, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(serving.time, "process_time", lambda: next(ticks))
    room = serving.QUICK.room | {"max_rows": 1}
    todo = serving.Work(torch.zeros(2, 5, dtype=torch.int64), [3, 2])
    # A step takes one tick. The second comes while the first is served; then nobody for long.
    times = serving.online(Engine(model, **room), todo, [10.0, 10.5])
    assert times == [(11.0, 13.0), (14.0, 15.0)]
    times = serving.online(Engine(model, **room), todo, [1.0, 30.0])
    assert times == [(2.0, 4.0), (31.0, 32.0)]


def test_a_forecast_from_steps_that_take_what_they_should_is_exact(model, monkeypatch):
    """With a clock that follows the load, nothing is left to guess."""
    now = [0.0]
    read = Engine.read

    def slow(self, plan):
        now[0] += 0.01 + 0.002 * sum(plan.stretches.values())
        return read(self, plan)

    monkeypatch.setattr(Engine, "read", slow)
    monkeypatch.setattr(serving.time, "process_time", lambda: now[0])
    found = serving.measure_forecast(model, serving.QUICK)
    assert found["latency"] == pytest.approx(
        {"base": 0.01, "per_token": 0.002, "per_row": 0.0, "per_key": 0.0}, abs=1e-9
    )
    assert len(found["runs"]) == 2
    for run in found["runs"].values():
        assert run.keys() == {"makespan", "time to first token"}
        for row in run.values():
            assert row["off"] == pytest.approx(0, abs=1e-6) and row["measured"] > 0


def test_steps_are_measured_with_prompts_among_those_that_speak(model):
    """Alone or all at once, a prompt would look cheaper than it is."""
    todo = serving.orders(serving.QUICK, 12, 2)
    steps = [load for load, _ in serving.measured(model, serving.QUICK, todo)]
    assert sum(load.tokens for load in steps) >= sum(todo.news) + 12 * (serving.QUICK.prompt - 1)
    mixed = [load for load in steps if 1 < load.rows < load.tokens < 2 * serving.QUICK.prompt]
    assert len(mixed) >= 3 and any(load.rows == load.tokens == 1 for load in steps)
    assert (steps[0].tokens, steps[0].rows) == (serving.QUICK.prompt, 1), "all came at once"


def test_a_quick_run_keeps_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["serving", "--quick"])
    path = record.path("serving")
    before = path.read_bytes() if path.exists() else None
    assert serving.main() == 0
    out = capsys.readouterr().out
    assert out.count("error  0.0e+00") == 4 and "tokens a second  static" in out
    assert (path.read_bytes() if path.exists() else None) == before


# The recording


def runs():
    return record.load(record.path("serving"), serving.EMPTY)["runs"]


def test_the_record_says_how_it_was_made_and_holds_no_wrong_token():
    found = runs()
    assert found.keys() == {"forecast", "lengths"}
    for run in found.values():
        assert {"date", "device", "versions", "commit", "threads"} <= run.keys()
        assert run["threads"] == 1 and run["room"] == serving.WHOLE.room
    for row in found["lengths"]["rows"].values():
        assert row["error"] == 0 and row["tokens per second"] > 0


def test_in_the_record_the_simulator_foretells_the_engine_within_15_percent():
    for run in runs()["forecast"]["runs"].values():
        assert abs(run["makespan"]["off"]) < 0.15
        assert abs(run["time to first token"]["off"]) < 0.15
        assert len(run["time to first token"]["off, each"]) == serving.WHOLE.forecasts


def test_in_the_record_continuous_batching_says_well_over_twice_the_tokens_of_static():
    rows = runs()["lengths"]["rows"]
    assert rows["static"]["interval"][0] > 2.5  # recorded: 4.3
    assert abs(rows["again"]["ratio"] - 1) < 0.15, "too noisy to be worth keeping"


def test_in_the_record_pages_waste_less_than_one_page_a_request():
    run = runs()["lengths"]
    slots = run["slots"]
    assert 0 <= slots["paged"] - slots["used"] < run["requests"] * run["room"]["page_len"]
    assert slots["contiguous"] > 2 * slots["paged"]
