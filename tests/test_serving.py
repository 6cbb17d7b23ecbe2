"""heed.serving: schedules worked by hand, and laws that hold for every queue."""

import random
from fractions import Fraction as F

import pytest
import torch

from heed.batching import Engine
from heed.gpt import GPT, GPTConfig
from heed.serving import (
    Latency,
    Load,
    Request,
    Run,
    Served,
    long_tailed,
    measure,
    percentile,
    poisson,
    simulate,
    slots,
)

POLICIES = ("static", "continuous", "chunked")
ROOM = {"n_pages": 200, "page_len": 4, "max_rows": 2, "max_tokens": 100}


def times(run):
    return [(s.first, s.end) for s in run.served]


# By hand

# a wants three tokens, b one, c two; two rows; a step takes 1 s and 1/4 s for each token.
THREE = [Request(F(0), 2, 3), Request(F(0), 4, 1), Request(F(1), 3, 2)]


def test_a_static_batch_by_hand():
    run = simulate(THREE, "static", Latency(F(1), F(1, 4)), **ROOM)
    # Both prompts as a rectangle, 2 x 4 tokens: 3 s. Two rows for two steps more: 1.5 s each,
    # though b has ended. Then c: 1.75 s for three tokens, 1.25 s for one.
    assert times(run) == [(F(3), F(6)), (F(3), F(3)), (F(31, 4), F(9))]
    assert [step.load for step in run.steps] == [
        Load(8, 2, 2 * (1 + 2 + 3 + 4)),
        Load(2, 2, 2 * 5),
        Load(2, 2, 2 * 6),
        Load(3, 1, 1 + 2 + 3),
        Load(1, 1, 4),
    ]
    assert run.first_token == [3, 3, F(27, 4)] and run.per_token == [F(3, 2), F(5, 4)]
    assert run.makespan == 9 and run.tokens_per_second == F(6, 9)


def test_a_continuous_batch_by_hand():
    run = simulate(THREE, "continuous", Latency(F(1), F(1, 4)), **ROOM)
    # 2 + 4 tokens: 2.5 s, b has ended. c is here and has the row: 1.75 s, in which a waits. Then
    # a and c say a token each in 1.5 s, and a its last one alone.
    assert times(run) == [(F(5, 2), F(7)), (F(5, 2), F(5, 2)), (F(17, 4), F(23, 4))]
    assert [step.load.tokens for step in run.steps] == [6, 3, 2, 1]
    assert [step.load.keys for step in run.steps] == [3 + 10, 6, 3 + 4, 4]
    assert [step.start for step in run.steps] == [0, F(5, 2), F(17, 4), F(23, 4)]


def test_chunks_by_hand():
    room = ROOM | {"max_tokens": 4}
    run = simulate(THREE, "chunked", Latency(F(1), F(1, 4)), **room)
    # Four tokens a step, 2 s: a's two and two of b's; then a's next one, b's last two and nothing
    # of c's, which has no row yet: 1.75 s. Then a's last and three of c's: 2 s; c's last: 1.25 s.
    assert [(step.load.tokens, step.load.rows) for step in run.steps] == [
        (4, 2),
        (3, 2),
        (4, 2),
        (1, 1),
    ]
    assert times(run) == [(F(2), F(23, 4)), (F(15, 4), F(15, 4)), (F(23, 4), F(7))]
    assert [step.waiting for step in run.steps] == [0, 1, 0, 0]


def test_who_comes_to_an_idle_server_is_served_at_once():
    requests = [Request(F(7), 1, 1), Request(F(1), 1, 2)]
    for policy in POLICIES:
        run = simulate(requests, policy, Latency(F(1)), **ROOM)
        assert times(run) == [(F(8), F(8)), (F(2), F(3))]
        assert [step.start for step in run.steps] == [1, 2, 7]


def test_a_shared_beginning_is_read_once():
    requests = [Request(F(0), 9, 1, shared=8), Request(F(5), 10, 1, shared=8)]
    run = simulate(requests, "chunked", Latency(F(0), F(1)), **ROOM)
    assert [step.load.tokens for step in run.steps] == [9, 2]
    assert times(run) == [(9, 9), (11, 11)]
    alone = [request._replace(shared=0) for request in requests]
    run = simulate(alone, "chunked", Latency(F(0), F(1)), **ROOM)
    assert [step.load.tokens for step in run.steps] == [9, 10]


def test_pages_and_their_waste_by_hand():
    run = simulate([Request(0, 5, 5)], "chunked", Latency(1), **ROOM)
    # 5, 6, 7, 8 and 9 positions are filled, in pages of four.
    assert [(step.pages, step.wasted) for step in run.steps] == [
        (2, 3),
        (2, 2),
        (2, 1),
        (2, 0),
        (3, 3),
    ]


def test_reserving_max_len_is_a_pool_whose_pages_are_so_long():
    requests = [Request(0, 3, 6)] * 8
    paged = simulate(
        requests, "chunked", Latency(1), n_pages=16, page_len=4, max_rows=8, max_tokens=99
    )
    long = simulate(
        requests, "chunked", Latency(1), n_pages=2, page_len=32, max_rows=8, max_tokens=99
    )
    assert len({s.end for s in paged.served}) < len({s.end for s in long.served}) == 4
    assert max(step.load.rows for step in long.steps) == 2


# Laws


def random_load(rng, exact=True):
    rows = rng.randint(1, 4)
    room = {"n_pages": rng.randint(4, 30), "page_len": rng.choice([1, 3, 4])}
    room |= {"max_rows": rows, "max_tokens": rng.choice([12, 20, 100])}
    most = min(12, room["n_pages"] * room["page_len"])
    requests = []
    for _ in range(rng.randint(1, 12)):
        new = rng.randint(1, most)
        prompt = rng.randint(1, most - new + 1)
        shared = rng.choice([0, prompt // 2])
        requests.append(Request(F(rng.randint(0, 40), 4), prompt, new, shared))
    terms = [F(rng.randint(1, 9), 4), *(F(rng.randint(0, 3), 8) for _ in range(3))]
    return requests, Latency(*terms), room


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_and_time_does_not_run_backwards(policy, unchecked):
    for seed in range(150):
        requests, latency, room = random_load(random.Random(seed))
        run = simulate(requests, policy, latency, **room)
        assert [s.request for s in run.served] == requests
        clock = min(r.arrival for r in requests)
        idle = F(0)
        for step in run.steps:
            assert step.start >= clock and step.seconds == latency(step.load) > 0
            if step.start > clock:  # idle, until somebody comes
                assert any(r.arrival == step.start for r in requests)
                assert all(s.end <= clock or s.request.arrival >= step.start for s in run.served)
            idle += step.start - clock
            clock = step.start + step.seconds
            assert step.load.rows <= room["max_rows"] and 0 <= step.pages <= room["n_pages"]
            assert 0 <= step.wasted < room["page_len"] * room["max_rows"]
            if policy != "static":
                assert step.load.tokens <= room["max_tokens"]
        assert clock == max(s.end for s in run.served)
        assert run.makespan == idle + sum(step.seconds for step in run.steps)
        ends = {step.start + step.seconds for step in run.steps}
        for s in run.served:
            assert s.request.arrival < s.first <= s.end and {s.first, s.end} <= ends
            assert (s.first == s.end) == (s.request.new == 1)
        if room["n_pages"] * room["page_len"] > 150 and policy != "static":
            # Nobody had to go: every token is read once, but for shared ones and the last.
            read = sum(step.load.tokens for step in run.steps)
            assert read <= sum(r.prompt + r.new - 1 for r in requests)
            assert read >= sum(r.prompt - r.shared + r.new - 1 for r in requests)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mean_number_of_requests_is_their_rate_times_their_mean_stay(policy, unchecked):
    # Little's law, L = lambda W. L is counted from the steps, W from the requests.
    for seed in range(100):
        requests, latency, room = random_load(random.Random(seed))
        run = simulate(requests, policy, latency, **room)
        time = run.makespan
        stays = [s.end - s.request.arrival for s in run.served]
        crowd = F(0)
        for step in run.steps:
            stop = step.start + step.seconds
            present = [
                s for s in run.served if s.request.arrival <= step.start and s.end > step.start
            ]
            crowd += len(present) * step.seconds
            crowd += sum(stop - r.arrival for r in requests if step.start < r.arrival < stop)
            assert step.waiting <= len(present)
        mean, rate = crowd / time, F(len(requests)) / time
        assert mean == rate * sum(stays) / len(stays)


def test_a_row_that_is_filled_at_once_is_never_later_than_one_that_waits_for_the_batch(unchecked):
    # Steps of one second, room for every prompt beside every token: each request reads and speaks
    # from its start on, so it can only gain by starting earlier.
    gained = 0
    for seed in range(200):
        requests, _, room = random_load(random.Random(seed))
        room |= {"max_tokens": 1000, "n_pages": 1000}
        requests = [request._replace(shared=0) for request in requests]
        static, chunked = (
            simulate(requests, p, Latency(F(1)), **room) for p in ("static", "chunked")
        )
        late = [a.end - b.end for a, b in zip(static.served, chunked.served, strict=True)]
        assert min(late) >= 0 and len(chunked.steps) <= len(static.steps) + len(requests)
        gained += sum(late)
    assert gained > 1000


def test_prompts_in_steps_of_their_own_can_cost_more_steps_than_a_static_batch():
    # Every row frees itself alone, so every prompt stops all others for a step.
    room = ROOM | {"max_rows": 4}
    requests = [Request(0, 1 + (i > 3), 1 + i if i < 4 else 2) for i in range(24)]
    steps = {p: len(simulate(requests, p, Latency(1), **room).steps) for p in POLICIES}
    assert steps["chunked"] < steps["static"] < steps["continuous"]


def test_a_single_row_of_equal_requests_waits_as_theory_says(unchecked):
    # M/D/1: arrivals at random, one second of service: the mean wait is rho / (2 (1 - rho)).
    room = ROOM | {"max_rows": 1}
    for rho in (0.3, 0.6):
        arrivals = poisson(10_000, rho, torch.Generator().manual_seed(0))
        run = simulate([Request(t, 1, 1) for t in arrivals], "chunked", Latency(1.0), **room)
        waits = [first - 1 for first in run.first_token]
        assert sum(waits) / len(waits) == pytest.approx(rho / (2 * (1 - rho)), rel=0.07)
        served_at_once = sum(wait < 1e-9 for wait in waits) / len(waits)
        assert served_at_once == pytest.approx(1 - rho, rel=0.03)


# Lengths, arrivals, slots, percentiles


def test_arrivals_come_at_their_rate_and_independently():
    times = poisson(20_000, 4.0, torch.Generator().manual_seed(1))
    assert times == sorted(times) and times[0] > 0
    gaps = torch.tensor(times).diff()
    assert gaps.mean().item() == pytest.approx(1 / 4, rel=0.02)
    assert gaps.std().item() == pytest.approx(1 / 4, rel=0.03)
    assert poisson(0, 1.0, torch.Generator()) == []


def test_long_tailed_lengths_have_the_tail_of_their_law():
    for alpha in (0.7, 1.0, 2.0):
        n = torch.tensor(
            long_tailed(50_000, torch.Generator().manual_seed(2), least=4, most=256, alpha=alpha)
        )
        assert n.min() == 4 and n.max() == 256
        for k in (8, 32, 256):
            want = (4 / k) ** alpha
            sd = (want * (1 - want) / len(n)) ** 0.5
            assert abs((n >= k).double().mean().item() - want) < 5 * sd
    assert long_tailed(3, torch.Generator(), least=7, most=7) == [7, 7, 7]


def test_pages_waste_less_than_one_page_a_sequence():
    lengths = long_tailed(1000, torch.Generator().manual_seed(0), least=3, most=500)
    found = slots(lengths, max_len=512, page_len=16)
    assert found.used == sum(lengths) and found.contiguous == 512_000
    assert 0 <= found.paged - found.used < 16 * 1000
    assert slots([1, 4, 5], max_len=8, page_len=4) == (10, 24, 16)
    assert slots([], max_len=8, page_len=4) == (0, 0, 0)


def test_a_percentile_is_one_of_the_values():
    values = [F(3), F(1), F(2), F(10)]
    assert [percentile(values, p) for p in (1, 25, 26, 50, 75, 76, 100)] == [1, 1, 2, 2, 3, 10, 10]
    assert percentile(range(1, 101), 99) == 99


# The clock


def test_a_fit_finds_the_coefficients_of_steps_that_have_some():
    rng = random.Random(0)
    want = Latency(2e-3, 5e-5, 0.0, 3e-8)
    loads = [
        Load(t, rng.randint(1, t), rng.randint(t, 9999)) for t in rng.choices(range(1, 99), k=60)
    ]
    got = Latency.fit([(x, want(x)) for x in loads])
    for name, size in vars(want).items():
        assert getattr(got, name) == pytest.approx(size, rel=1e-6, abs=1e-12)


def test_a_fit_has_no_coefficient_below_zero_and_is_the_best_of_those():
    rng = random.Random(1)
    loads = [
        Load(t, rng.randint(1, t), rng.randint(t, 99)) for t in rng.choices(range(1, 30), k=40)
    ]
    steps = [(x, max(0.0, 5 - 0.1 * x.tokens + 0.02 * x.keys + rng.gauss(0, 0.1))) for x in loads]
    got = Latency.fit(steps)
    assert got.per_token == 0 and min(vars(got).values()) >= 0

    def loss(latency):
        return sum((latency(x) - seconds) ** 2 for x, seconds in steps)

    for name, size in vars(got).items():
        for other in (size + 1e-3, max(0.0, size - 1e-3)):
            assert loss(got) <= loss(Latency(**vars(got) | {name: other})) + 1e-12


def test_an_engine_is_measured_step_by_step():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, max_len=32, d_model=16, n_heads=2))
    clock = iter(range(1000))
    engine = Engine(model, n_pages=20, page_len=4, max_rows=2, max_tokens=6)
    for n in (3, 7):
        engine.submit(torch.arange(n), 3)
    steps = measure(engine, lambda: next(clock), 1)
    steps += measure(engine, lambda: next(clock), most=0) + measure(engine, lambda: next(clock))
    # 3 and 3 of 7 tokens; then 1 and 4; then 1 and 1; then 1.
    assert [load for load, _ in steps] == [
        Load(6, 2, 6 + 6),
        Load(5, 2, 4 + (4 + 5 + 6 + 7)),
        Load(2, 2, 5 + 8),
        Load(1, 1, 9),
    ]
    assert [seconds for _, seconds in steps] == [2] * 4
    assert [len(ids) for ids in engine.run().values()] == [6, 10]


def test_the_simulator_takes_the_steps_of_the_engine():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, max_len=32, d_model=16, n_heads=2))
    rng = random.Random(3)
    room = {"n_pages": 9, "page_len": 3, "max_rows": 3, "max_tokens": 12}
    for policy in ("continuous", "chunked"):
        engine = Engine(model, policy=policy, **room)
        requests = []
        for i in range(11):
            prompt = rng.randint(1, 8)
            requests.append(Request(0, prompt, rng.randint(1, 12 - prompt)))
            engine.submit(torch.full((prompt,), i), requests[-1].new)
        want = [load for load, _ in measure(engine)]
        run = simulate(requests, policy, Latency(1), **room)
        assert [step.load for step in run.steps] == want


# What it refuses


@pytest.mark.parametrize(
    "request_",
    [
        Request(0, 0, 1),
        Request(0, 1, 0),
        Request(0, 1.5, 1),
        Request(0, 2, 1, 3),
        Request(0, 2, 1, -1),
        Request(-1, 2, 1),
        Request(float("nan"), 2, 1),
        Request(float("inf"), 2, 1),
        Request(0, 700, 200),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(request_, unchecked):
    with pytest.raises(ValueError):
        simulate([Request(0, 1, 1), request_], "chunked", Latency(1), **ROOM)


def test_what_makes_no_sense_is_refused(unchecked):
    g = torch.Generator()
    for call, words in (
        (lambda: Latency(-1.0), "backwards"),
        (lambda: Latency(1.0, float("nan")), "backwards"),
        (lambda: Latency.fit([(Load(1, 1, 1), 1.0)] * 3), "four"),
        (lambda: poisson(3, 0.0, g), "rate"),
        (lambda: poisson(-1, 1.0, g), "rate"),
        (lambda: long_tailed(3, g, least=0, most=4), "least"),
        (lambda: long_tailed(3, g, least=5, most=4), "least"),
        (lambda: long_tailed(3, g, least=1, most=4, alpha=0.0), "alpha"),
        (lambda: percentile([], 50), "percentile"),
        (lambda: percentile([1], 0), "percentile"),
        (lambda: percentile([1], 101), "percentile"),
        (lambda: slots([9], max_len=8, page_len=4), "max_len"),
        (lambda: slots([0], max_len=8, page_len=4), "max_len"),
        (lambda: simulate([], "fair", Latency(1), **ROOM), "policy"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_nobody_comes():
    run = simulate([], "chunked", Latency(1), **ROOM)
    assert run == Run([], [])
    assert Served(Request(0, 1, 1), 1, 1).request.shared == 0
