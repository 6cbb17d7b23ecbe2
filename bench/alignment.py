"""Share of exact reversals by length, looking back against one fixed vector (chapter 03).

    python -m bench.alignment                    all of it, about four minutes on one thread
    python -m bench.alignment --random-seed 2    one piece; the others in the file stay as they are

Two models of one size within 5 %, one number of steps. Each gets the mix of lengths that suits it:
the longest of two random ones, or one random one, so that the fixed vector sees more short ones.
"""

import argparse
import time
from pathlib import Path

import torch

from bench import record
from heed.models.seq2seq import Seq2Seq, Seq2SeqConfig
from heed.tasks.pairs import reversal
from heed.training import cross_entropy

RESULTS = Path(__file__).parent / "results/cpu/alignment.json"
LENGTHS = (4, 8, 12, 16, 24, 32, 40)
SETTINGS = {"longest": 36, "steps": 900, "batch": 64, "lr": 0.01, "test": 512}
SEEDS = (0, 1, 2)


def size(model: Seq2Seq) -> int:
    return sum(p.numel() for p in model.parameters())


def models(random_seed: int) -> dict[str, Seq2Seq]:
    """The one that looks back, and the fixed vector that is nearest to it in parameters."""

    def fresh(**choice: object) -> Seq2Seq:
        torch.manual_seed(random_seed)
        return Seq2Seq(Seq2SeqConfig(n_source=13, n_target=13, **choice))

    looking = fresh(attention="general", bidirectional=True, d_model=64)
    fixed = min(
        (fresh(d_model=C) for C in range(40, 100, 2)),
        key=lambda model: abs(size(model) - size(looking)),
    )
    return {"looking back": looking, "fixed vector": fixed}


def train(model: Seq2Seq, random_seed: int, draws: int) -> None:
    """Adam, with lengths that grow from 4 to the longest during the first two fifths."""
    s = SETTINGS
    rng = torch.Generator().manual_seed(random_seed)
    descend = torch.optim.Adam(model.parameters())
    for step in range(s["steps"]):
        now = step / s["steps"]
        longest = 4 + int((s["longest"] - 4) * min(1, now / 0.4))
        length = int(torch.randint(4, longest + 1, (draws,), generator=rng).max())
        source, target_in, target_out = reversal(length).batch(s["batch"], rng)
        loss = cross_entropy(model(source, target_in), target_out)
        descend.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        descend.param_groups[0]["lr"] = s["lr"] * min(1, (step + 1) / 50, 2.5 * (1 - now))
        descend.step()


def exact(model: Seq2Seq, length: int) -> float:
    """Share of fresh strings that come out without a mistake."""
    task = reversal(length)
    source, _, right = task.batch(SETTINGS["test"], torch.Generator().manual_seed(99))
    return task.exact(source, model.translate(source, right.shape[1])).double().mean().item()


EMPTY = {"settings": SETTINGS, "lengths": list(LENGTHS), "runs": {}}


def load(path: Path = RESULTS) -> dict:
    return record.load(path, EMPTY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random-seed", type=int, action="append", dest="seeds")
    seeds = parser.parse_args().seeds or SEEDS
    torch.set_num_threads(1)
    for random_seed in seeds:
        for name, model in models(random_seed).items():
            start = time.perf_counter()
            train(model, random_seed, draws=2 if name == "looking back" else 1)
            shares = [exact(model, length) for length in LENGTHS]
            measured, key = (
                {"parameters": size(model), "exact": shares},
                f"{name}, seed {random_seed}",
            )
            run = record.add(RESULTS, EMPTY, key, start, measured)
            print(f"{key}: {run['exact']}, {run['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
