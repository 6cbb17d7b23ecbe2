"""The training recipe of `heed.training.train`, and the same with one thing taken out (chapter 14).

    python -m bench.ablation                        what is not in the file yet; ten minutes in all
    python -m bench.ablation "no warm-up" --random-seed 2    one piece, if it is not there yet

A small, deep GPT reads fresh sentences of `heed.tasks.grammar`, whose exact probabilities are
known: `above` is how many nats a word of new texts costs more than it costs a perfect reader. Every
run keeps the recipe's learning rate unless its name says otherwise, so what is measured is the
damage of a removal, not the best that could be had without the part.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import record
from heed.gpt import GPT, GPTConfig
from heed.tasks.grammar import Grammar
from heed.training import IGNORED, cross_entropy, schedule

RESULTS = Path(__file__).parent / "results/cpu/ablation.json"
SETTINGS = {
    "length": 24,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 6,
    "steps": 150,
    "batch": 16,
    "short": 4,  # words in the short texts of the runs that accumulate
    "pool": 6000,
    "test_texts": 1000,
}
SEEDS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every field is a part that can be taken out; the defaults are those of heed.training."""

    optimizer: str = "adamw"  # or adam (its decay goes through the gradient), sgd, muon
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    correct: bool = True  # the bias of Adam's averages
    warmup: bool = True
    cosine: bool = True
    clip: float = 1.0
    decay: float = 0.1
    init: str = "gpt2"  # or deep (no smaller last matrices), torch (its defaults)
    dropout: float = 0.0
    smoothing: float = 0.0
    precision: str = "float32"  # or autocast, bfloat16 (weights and all)
    texts: int = SETTINGS["pool"]  # how many different ones there are
    accumulate: str = ""  # by tokens, by batches: one batch of long texts and one of short ones


SMALL = {"texts": 32}
TENTH = {"lr": 1e-3}
RUNS = {
    "the recipe": Recipe(),
    "no warm-up": Recipe(warmup=False),
    "no cosine": Recipe(cosine=False),
    "no clipping": Recipe(clip=float("inf")),
    "no bias correction": Recipe(correct=False),
    "beta2 0.999": Recipe(betas=(0.9, 0.999)),
    "beta2 0.999, no bias correction": Recipe(betas=(0.9, 0.999), correct=False),
    "no weight decay": Recipe(decay=0.0),
    "decay in the gradient": Recipe(optimizer="adam"),
    "no depth scaling": Recipe(init="deep"),
    "torch's initialisation": Recipe(init="torch"),
    "SGD, lr 0.1": Recipe(optimizer="sgd", lr=0.1),
    "SGD, lr 1": Recipe(optimizer="sgd", lr=1.0),
    "SGD, lr 3": Recipe(optimizer="sgd", lr=3.0),
    "Muon": Recipe(optimizer="muon"),
    "dropout 0.2": Recipe(dropout=0.2),
    "label smoothing 0.1": Recipe(smoothing=0.1),
    "autocast": Recipe(precision="autocast"),
    "bf16 weights": Recipe(precision="bfloat16"),
    "a tenth of the lr": Recipe(**TENTH),
    "a tenth of the lr, bf16 weights": Recipe(precision="bfloat16", **TENTH),
    "accumulated by tokens": Recipe(accumulate="by tokens"),
    "accumulated by batches": Recipe(accumulate="by batches"),
    "32 texts": Recipe(**SMALL),
    "32 texts, dropout 0.2": Recipe(dropout=0.2, **SMALL),
    "32 texts, no weight decay": Recipe(decay=0.0, **SMALL),
}


@cache
def language() -> Grammar:
    return Grammar()


@cache
def texts(n: int, random_seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(random_seed)
    return language().sample(n, SETTINGS["length"] + 1, draw)


def build(recipe: Recipe, random_seed: int) -> GPT:
    s = SETTINGS
    torch.manual_seed(random_seed)
    model = GPT(
        GPTConfig(
            vocab_size=len(language().vocab),
            max_len=s["length"],
            n_layers=s["n_layers"],
            n_heads=s["n_heads"],
            d_model=s["d_model"],
            dropout=recipe.dropout,
        )
    )
    for module in model.modules():
        if recipe.init == "torch" and isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()
    for block in model.blocks if recipe.init == "deep" else ():
        for last in (block.attn.out, block.mlp.down):
            nn.init.normal_(last.weight, std=0.02)
    return model.bfloat16() if recipe.precision == "bfloat16" else model


def batches(recipe: Recipe, draw: torch.Generator) -> list[tuple[Tensor, Tensor, float]]:
    """Ids, targets and the weight of each batch's mean loss, for one step."""
    ids = texts(SETTINGS["pool"], 100)[: recipe.texts]
    ids = ids[torch.randint(len(ids), (SETTINGS["batch"],), generator=draw)]
    if not recipe.accumulate:
        return [(ids[:, :-1], ids[:, 1:], 1.0)]
    long, short = ids.chunk(2)
    parts = [(x[:, :-1], x[:, 1:]) for x in (long, short[:, : SETTINGS["short"] + 1])]
    n = [targets.numel() for _, targets in parts]
    shares = [x / sum(n) for x in n] if recipe.accumulate == "by tokens" else [0.5, 0.5]
    return [(*part, share) for part, share in zip(parts, shares, strict=True)]


def optimizers(recipe: Recipe, model: nn.Module) -> list[torch.optim.Optimizer]:
    """One, or Muon for the matrices of the blocks and AdamW for the rest."""
    flat = [p for p in model.parameters() if p.ndim < 2]
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    tables = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" not in name]
    muon = recipe.optimizer == "muon"
    groups = [
        {"params": tables + ([] if muon else hidden), "weight_decay": recipe.decay},
        {"params": flat, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)]
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    found: list[torch.optim.Optimizer] = [kind(groups, betas=recipe.betas, fused=True)]
    if muon:
        how = {"adjust_lr_fn": "match_rms_adamw"}  # a step as long as AdamW's
        found.append(torch.optim.Muon(hidden, weight_decay=recipe.decay, **how))
    return found


def rate(recipe: Recipe, step: int) -> float:
    steps = SETTINGS["steps"]
    warmup = steps // 10 if recipe.warmup else 0
    floor = 0.1 if recipe.cosine else 1.0
    return recipe.lr * schedule(step, steps=steps, warmup=warmup, floor=floor)


def uncorrected(recipe: Recipe, step: int) -> float:
    """What the two corrections of Adam multiply a step by, turned over."""
    if recipe.correct:
        return 1.0
    first, second = (1 - beta ** (step + 1) for beta in recipe.betas)
    return first / second**0.5


def descend(recipe: Recipe, random_seed: int, model: nn.Module) -> Iterator[float]:
    """Takes the steps one after another; the loss of each, before it was taken."""
    draw = torch.Generator().manual_seed(random_seed)
    learners = optimizers(recipe, model)
    torch.manual_seed(random_seed + 1)  # dropout
    model.train()
    for step in range(SETTINGS["steps"]):
        undo = uncorrected(recipe, step)
        for learner in learners:
            for n, group in enumerate(learner.param_groups):
                group["lr"] = rate(recipe, step) * undo
                if n == 0 and undo != 1:  # the decay is lr times this, and is no part of the bias
                    group["weight_decay"] = recipe.decay / undo
        total = 0.0
        for ids, targets, share in batches(recipe, draw):
            low = recipe.precision == "autocast"
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                logits = model(ids)
            smooth = {"label_smoothing": recipe.smoothing} if recipe.smoothing else {}
            loss = cross_entropy(logits, targets, ignore_index=IGNORED, **smooth) * share
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for learner in learners:
            learner.step()
            learner.zero_grad()
        yield total


@torch.no_grad()
def above(model: Callable[[Tensor], Tensor]) -> float:
    """Nats a word above a perfect reader of the same new texts."""
    ids = texts(SETTINGS["test_texts"], 7)
    chances = language().predictive(ids[:, :-1])
    perfect = -chances.gather(2, ids[:, 1:, None])[:, :, 0].log()
    got = -model(ids[:, :-1]).double().log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    return (got - perfect).mean().item()


def measure(name: str, random_seed: int) -> dict[str, object]:
    """The gap at the end, and the training loss in tenths of the run."""
    model = build(RUNS[name], random_seed)
    losses = torch.tensor(list(descend(RUNS[name], random_seed, model)))
    return {"above": above(model.eval()), "losses": losses.view(10, -1).mean(1).tolist()}


EMPTY = {"settings": SETTINGS, "runs": {}}


def load(path: Path = RESULTS) -> dict:
    return record.load(path, EMPTY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(RUNS))
    parser.add_argument("--random-seed", type=int, action="append", dest="seeds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for random_seed in asked.seeds or SEEDS:
        for name in asked.names:
            key = f"{name}, seed {random_seed}"
            if key in load()["runs"]:
                continue
            start = time.perf_counter()
            run = record.add(RESULTS, EMPTY, key, start, measure(name, random_seed))
            print(f"{key}: {run['above']:.3f} nats above, {run['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
