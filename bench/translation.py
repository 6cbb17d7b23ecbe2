"""The Transformer against the recurrent translator of chapter 03, at one size (chapter 11).

    python -m bench.translation                        all of it, about fifteen minutes, one thread
    python -m bench.translation dates --random-seed 2  one piece; the others in the file stay
    python -m bench.translation clock
    python -m bench.translation ramp

One block on each side against one recurrent layer on each side, parameters within 5 %, the same
batches, the same smoothed loss. Each has the optimiser that suits it: Adam with the schedule of
2017, or Adam at 0.01 with the ramps of chapter 03.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from bench import record
from heed.models.seq2seq import Seq2Seq, Seq2SeqConfig
from heed.models.transformer import Transformer, TransformerConfig
from heed.tasks.pairs import Pairs, dates, numbers, reversal
from heed.training import cross_entropy, inverse_root

RESULTS = Path(__file__).parent / "results/cpu/translation.json"
SETTINGS = {
    "d_model": 48,
    "d_ff": 96,
    "n_layers": 1,
    "smoothing": 0.1,
    "warmup": 100,
    "batch": 32,
    "stops": [50, 100, 200, 400, 800],
    "test": 512,
    "longer": [8, 16, 20, 24],
    "clock": {"lengths": [16, 64, 256], "words": 2048, "repeats": 7},
    "ramp": {"n_layers": 4, "d_model": 32, "warmup": 200, "steps": 300, "stops": [100, 200, 300]},
}
SEEDS = (0, 1, 2)
TASKS = {"german": numbers("german"), "dates": dates(), "reversal": reversal(4, 16)}
MODELS = ("transformer", "recurrent")


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def transformer(task: Pairs, random_seed: int, max_len: int = 40, **choice: int) -> Transformer:
    sizes = {name: SETTINGS[name] for name in ("d_model", "d_ff", "n_layers")} | choice
    torch.manual_seed(random_seed)
    words = {"n_source": task.n_source, "n_target": task.n_target}
    return Transformer(TransformerConfig(**words, max_len=max_len, **sizes))


def recurrent(task: Pairs, random_seed: int, attention: str = "dot") -> Seq2Seq:
    """Of the even widths the one that is nearest to the Transformer in parameters."""
    goal = size(transformer(task, random_seed))

    def fresh(width: int) -> Seq2Seq:
        torch.manual_seed(random_seed)
        words = {"n_source": task.n_source, "n_target": task.n_target}
        how = {"attention": attention, "bidirectional": True, "d_model": width}
        return Seq2Seq(Seq2SeqConfig(**words, **how))

    return min(map(fresh, range(40, 100, 2)), key=lambda model: abs(size(model) - goal))


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    if isinstance(model, Transformer):  # Vaswani et al. 2017, section 5.3
        return torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    return torch.optim.Adam(model.parameters())


def rate(model: nn.Module, step: int, steps: int) -> float:
    if isinstance(model, Transformer):
        return inverse_root(step, d_model=SETTINGS["d_model"], warmup=SETTINGS["warmup"])
    return 0.01 * min(1, (step + 1) / 50, 2.5 * (1 - step / steps))


def learn(model, task, draw, descend, lr) -> None:
    """One step down the smoothed loss of one batch."""
    source, target_in, target_out = task.batch(SETTINGS["batch"], draw)
    logits = model(source, target_in)
    loss = cross_entropy(logits, target_out, label_smoothing=SETTINGS["smoothing"])
    descend.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    descend.param_groups[0]["lr"] = lr
    descend.step()


def exact(model: nn.Module, task: Pairs) -> float:
    """Share of fresh sources that come out without a mistake, decoded greedily."""
    source, _, right = task.batch(SETTINGS["test"], torch.Generator().manual_seed(99))
    return task.exact(source, model.translate(source, right.shape[1])).double().mean().item()


def curve(task_name: str, kind: str, random_seed: int) -> dict[str, object]:
    """Exact shares along one training, and on reversals longer than any in it."""
    task, steps = TASKS[task_name], SETTINGS["stops"][-1]
    model = {"transformer": transformer, "recurrent": recurrent}[kind](task, random_seed)
    draw, descend, found = torch.Generator().manual_seed(random_seed), optimiser(model), []
    for step in range(steps):
        learn(model, task, draw, descend, rate(model, step, steps))
        if step + 1 in SETTINGS["stops"]:
            found.append(exact(model, task))
    longer = [exact(model, reversal(n)) for n in SETTINGS["longer"]]
    longer = longer if task_name == "reversal" else []
    return {"parameters": size(model), "exact": found, "longer": longer}


def clock() -> dict[str, object]:
    """Milliseconds of one training step, forward and backward, by the length of the sequences.

    A batch holds the same number of words at every length. The median of a few turns.
    """
    s, found = SETTINGS["clock"], {}
    for length in s["lengths"]:
        task = reversal(length)
        batch = task.batch(s["words"] // length, torch.Generator().manual_seed(0))
        models = {
            "transformer": transformer(task, 0, max_len=length + 1),
            "recurrent, dot": recurrent(task, 0),
            "recurrent, additive": recurrent(task, 0, "additive"),
        }
        for name, model in models.items():
            turns = [_turn(model, *batch) for _ in range(s["repeats"] + 1)][1:]
            found.setdefault(name, []).append(1000 * statistics.median(turns))
    return {"milliseconds": found}


def _turn(model: nn.Module, source, target_in, target_out) -> float:
    start = time.perf_counter()
    cross_entropy(model(source, target_in), target_out).backward()
    return time.perf_counter() - start


def ramp(random_seed: int, warm: bool) -> list[float]:
    """Exact shares of a deeper model, with the ramp of 2017 or held at its highest rate instead."""
    s, task = SETTINGS["ramp"], TASKS["german"]
    sizes = {"n_layers": s["n_layers"], "d_model": s["d_model"], "d_ff": 2 * s["d_model"]}
    model = transformer(task, random_seed, **sizes)
    draw, descend, found = torch.Generator().manual_seed(random_seed), optimiser(model), []
    for step in range(s["steps"]):
        now = step if warm else max(step, s["warmup"] - 1)
        learn(
            model, task, draw, descend, inverse_root(now, d_model=s["d_model"], warmup=s["warmup"])
        )
        if step + 1 in s["stops"]:
            found.append(exact(model, task))
    return found


EMPTY = {"settings": SETTINGS, "runs": {}}


def load(path: Path = RESULTS) -> dict:
    return record.load(path, EMPTY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", default=[*TASKS, "ramp", "clock"])
    parser.add_argument("--random-seed", type=int, action="append", dest="seeds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    jobs = {}
    for piece in asked.pieces:
        for n in asked.seeds or SEEDS:
            if piece in TASKS:
                for kind in MODELS:
                    jobs[f"{piece}, {kind}, seed {n}"] = lambda p=piece, k=kind, n=n: curve(p, k, n)
            if piece == "ramp":
                for name, warm in {"with a ramp": True, "without": False}.items():
                    job = lambda n=n, warm=warm: {"exact": ramp(n, warm)}  # noqa: E731
                    jobs[f"ramp, {name}, seed {n}"] = job
    if "clock" in asked.pieces:
        jobs["clock"] = clock
    for name, job in jobs.items():
        start = time.perf_counter()
        print(f"{name}: {record.add(RESULTS, EMPTY, name, start, job())}", flush=True)


if __name__ == "__main__":
    main()
