"""Requests of very different lengths, served three ways, and a simulator that foretells it (24).

    python -m bench.serving            one thread, about ten minutes
    python -m bench.serving --quick    a tiny model, printed and not kept

A GPT of 4 layers of 256 with random weights in float32 says greedy tokens. All prompts are equally
long, so that static batches need no padding; the numbers of new tokens follow a Pareto law, at
least k with probability least / k, cut at `most`: its quantiles, in random order, so that no lucky
draw decides. Three cases:

- "continuous": `heed.batching.Engine`, chunked, pages and all;
- "static": `heed.generation.generate` for as many rows at a time, until the longest has ended;
- "one at a time": `generate`, request by request.

An error is the number of tokens that differ from those of the request alone. Then a second engine
is measured step by step, `heed.serving.Latency` fitted to it, and a run with random arrivals
foretold. Its clock is that of the work: the seconds that the steps have taken so far.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import record
from bench.duel import duel, show
from heed.batching import Engine
from heed.generation import generate
from heed.gpt import GPT, GPTConfig
from heed.serving import Latency, Load, Request, measure, poisson, simulate, slots


class Size(NamedTuple):
    model: dict[str, int]
    room: dict[str, int]  # n_pages, page_len, max_rows, max_tokens
    prompt: int
    least: int
    most: int
    n: int
    rounds: int
    forecasts: int


WHOLE = Size(
    model={"vocab_size": 1024, "n_layers": 4, "n_heads": 4, "d_model": 256},
    room={"n_pages": 512, "page_len": 16, "max_rows": 64, "max_tokens": 128},
    prompt=8,
    least=2,
    most=192,
    n=512,
    rounds=3,
    forecasts=5,
)
QUICK = Size(
    model={"vocab_size": 64, "n_layers": 1, "n_heads": 2, "d_model": 16},
    room={"n_pages": 40, "page_len": 4, "max_rows": 4, "max_tokens": 16},
    prompt=5,
    least=2,
    most=24,
    n=12,
    rounds=3,
    forecasts=1,
)
LOADS = (0.7, 1.5)  # arrivals, as a share of what the engine gets done


class Work(NamedTuple):
    """Prompts and how many tokens each wants."""

    prompts: Tensor  # (n, prompt)
    news: list[int]


def make(size: Size) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(max_len=size.prompt + size.most, **size.model)).eval()


def orders(size: Size, n: int, random_seed: int) -> Work:
    draw = torch.Generator().manual_seed(random_seed)
    prompts = torch.randint(size.model["vocab_size"], (n, size.prompt), generator=draw)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    news = (size.least / u).floor().long().clamp(max=size.most)
    return Work(prompts, news[torch.randperm(n, generator=draw)].tolist())


Answers = list[list[int]]


def alone(model: GPT, size: Size, todo: Work) -> Answers:
    texts = (
        generate(model, ids[None], n)[0] for ids, n in zip(todo.prompts, todo.news, strict=True)
    )
    return [text.tolist() for text in texts]


def static(model: GPT, size: Size, todo: Work) -> Answers:
    found, rows = [], size.room["max_rows"]
    for start in range(0, len(todo.news), rows):
        news = todo.news[start : start + rows]
        texts = generate(model, todo.prompts[start : start + rows], max(news))
        found += [text[: size.prompt + n].tolist() for text, n in zip(texts, news, strict=True)]
    return found


def continuous(model: GPT, size: Size, todo: Work) -> Answers:
    engine = Engine(model, **size.room)
    for ids, n in zip(todo.prompts, todo.news, strict=True):
        engine.submit(ids, n)
    return [text.tolist() for text in engine.run().values()]


Case = Callable[[GPT, Size, Work], Answers]
CASES: dict[str, Case] = {
    "continuous": continuous,
    "static": static,
    "one at a time": alone,
}


def differing(got: Answers, want: Answers) -> int:
    """Tokens that are not what they are alone; a missing one differs."""
    pairs = list(zip(got, want, strict=True))
    wrong = sum(a != b for x, y in pairs for a, b in zip(x, y, strict=False))
    return wrong + sum(abs(len(x) - len(y)) for x, y in pairs)


def fields(size: Size, todo: Work) -> dict[str, Any]:
    law = f"at least k new tokens with probability {size.least} / k, {size.most} at most"
    kept = slots(
        [size.prompt + n - 1 for n in todo.news],
        max_len=size.prompt + size.most,
        page_len=size.room["page_len"],
    )
    rows = size.room["max_rows"]
    batches = [todo.news[i : i + rows] for i in range(0, len(todo.news), rows)]
    lengths = {"law": law, "mean": sum(todo.news) / len(todo.news), "longest": max(todo.news)}
    lengths["longest of a batch, mean"] = sum(map(max, batches)) / len(batches)
    return {
        "model": size.model,
        "room": size.room,
        "requests": len(todo.news),
        "prompt": size.prompt,
        "new tokens": sum(todo.news),
        "lengths": lengths,
        "slots": kept._asdict(),
    }


def warmed(run: Case, model: GPT, size: Size, todo: Work) -> Callable[[], Answers]:
    """A case for a duel, which calls each twice before it counts: of these, a few requests do."""
    few = Work(todo.prompts[:4], todo.news[:4])
    calls = iter([few, few])
    return lambda: run(model, size, next(calls, todo))


def measure_cases(model: GPT, size: Size) -> dict[str, Any]:
    """A duel of the three ways to serve the same requests."""
    todo = orders(size, size.n, 1)
    want = alone(model, size, todo)
    errors = {name: differing(run(model, size, todo), want) for name, run in CASES.items()}
    cases = {name: warmed(run, model, size, todo) for name, run in CASES.items()}
    rows = duel(cases, errors=errors, rounds=size.rounds)
    for row in rows.values():
        row["tokens per second"] = sum(todo.news) / row["seconds"]
    return {"kind": "duel", **fields(size, todo), "rounds": size.rounds, "rows": rows}


def online(engine: Engine, todo: Work, arrivals: Sequence[float]) -> list[tuple[float, float]]:
    """First and last token of every request by the engine's own clock, which counts its steps.

    Where nothing is to be done the clock jumps to the next arrival.
    """
    clock, line = 0.0, list(range(len(arrivals)))
    said: dict[int, list[float]] = {}
    engine.run()
    while line or engine.scheduler.waiting or engine.scheduler.running:
        if not engine.scheduler.waiting and not engine.scheduler.running:
            clock = max(clock, arrivals[line[0]])
        while line and arrivals[line[0]] <= clock:
            i = line.pop(0)
            said[engine.submit(todo.prompts[i], todo.news[i])] = []
        start = time.process_time()
        new = engine.step()
        clock += time.process_time() - start
        for number, _ in new:
            said[number].append(clock)
    return [(times[0], times[-1]) for _, times in sorted(said.items())]


def measure_forecast(model: GPT, size: Size) -> dict[str, Any]:
    """Runs foretold by a Latency fitted to others: makespan, mean time to first token.

    A machine is not as fast from one minute to the next. So steps are measured right before and
    right after what they are to foretell, all of it some times over, and medians are compared.
    """
    before = orders(size, size.n // 2, 2)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(size.forecasts):
        last = measured(model, size, before)
        rate = len(before.news) / sum(seconds for _, seconds in last)  # of such requests a second
        for seed, load in enumerate(LOADS):
            todo = orders(size, size.n // 2, 3 + seed)
            arrivals = poisson(len(todo.news), load * rate, torch.Generator().manual_seed(seed))
            times = online(Engine(model, **size.room), todo, arrivals)
            steps, last = last, measured(model, size, before)
            steps = steps + last
            latency = Latency.fit(steps)
            asked = [Request(t, size.prompt, n) for t, n in zip(arrivals, todo.news, strict=True)]
            told = simulate(asked, "chunked", spread(latency, steps, seed), **size.room)
            waits = [first - t for (first, _), t in zip(times, arrivals, strict=True)]
            pairs = {
                "makespan": (max(end for _, end in times) - arrivals[0], told.makespan),
                "time to first token": (statistics.mean(waits), statistics.mean(told.first_token)),
            }
            for what, pair in pairs.items():
                found.setdefault((f"load {load}", what), []).append(pair)
    runs: dict[str, Any] = {}
    for (load, what), pairs in found.items():
        seen, told = (statistics.median(x) for x in zip(*pairs, strict=True))
        each = sorted(b / a - 1 for a, b in pairs)
        row = {"measured": seen, "foretold": told, "off": told / seen - 1, "off, each": each}
        runs.setdefault(load, {})[what] = row
    return {
        "kind": "forecast",
        **fields(size, before),
        "steps": len(steps),
        "latency": vars(latency),
        "runs": runs,
    }


def spread(
    latency: Latency, steps: list[tuple[Load, float]], random_seed: int
) -> Callable[[Load], float]:
    """The fitted seconds, times what a measured step of its kind took over them: steps of a real
    machine differ, and who comes is likelier to come during a long one."""
    over: dict[bool, list[float]] = {True: [], False: []}
    for load, seconds in steps:
        over[load.tokens > load.rows].append(seconds / latency(load))  # with a prompt, or without
    dice = random.Random(random_seed)
    return lambda load: latency(load) * dice.choice(over[load.tokens > load.rows])


def measured(model: GPT, size: Size, todo: Work) -> list[tuple[Load, float]]:
    """What the steps of an engine read, and how long they took.

    Requests come one by one, some steps apart: a prompt is read beside others that speak, as it is
    in the runs to be foretold. All at once they would make fewer and fuller steps, and a prompt
    would look cheaper than it is.
    """
    engine, steps, dice = Engine(model, **size.room), [], random.Random(0)
    for ids, n in zip(todo.prompts, todo.news, strict=True):
        engine.submit(ids, n)
        steps += measure(engine, time.process_time, dice.randrange(8))
    return steps + measure(engine, time.process_time)


EMPTY = {
    "settings": {
        "threads": 1,
        "clock": "process_time",
        "error": "tokens that differ from those of the request alone",
    },
    "runs": {},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, kept nowhere")
    size = QUICK if parser.parse_args().quick else WHOLE
    torch.set_num_threads(1)
    model = make(size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serving.json" if size is QUICK else record.path("serving")
        start = time.perf_counter()
        run = record.add(path, EMPTY, "forecast", start, measure_forecast(model, size))
        for name, found in run["runs"].items():
            for what, row in found.items():
                print(f"{name}: {what} {row['off']:+.1%} ({row['measured']:.3f} s)")
        start = time.perf_counter()
        run = record.add(path, EMPTY, "lengths", start, measure_cases(model, size))
        show(f"{run['requests']} requests, {run['new tokens']} new tokens", run["rows"])
        for name, row in run["rows"].items():
            print(f"  {row['tokens per second']:9,.0f} tokens a second  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
