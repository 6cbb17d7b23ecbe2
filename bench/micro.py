"""Trains the two layers that the package carries: `heed.interop.micro()`, for chapters and tests.

    python -m bench.micro       writes src/heed/micro.safetensors; about a minute on one thread

It reads fresh texts of `heed.tasks.grammar`, whose exact probabilities are known, so that the loss
of the file has a floor to be held against. The file says with which settings it was made.
"""

import argparse
import dataclasses
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from heed.checkpoints import save_checkpoint
from heed.gpt import GPT, GPTConfig
from heed.interop import MICRO, micro
from heed.tasks.grammar import Grammar
from heed.training import train

CONFIG = {"vocab_size": 89, "max_len": 128, "n_layers": 2, "n_heads": 4, "d_model": 64}
SETTINGS = {"steps": 1200, "batch": 8, "lr": 6e-3, "random_seed": 0}


@cache
def language() -> Grammar:
    return Grammar()


def build() -> GPT:
    torch.manual_seed(SETTINGS["random_seed"])
    return GPT(GPTConfig(**CONFIG))


def make(path: Path = MICRO) -> list[float]:
    """Train from the start, write the file; the losses of all steps."""
    english, model, s = language(), build(), SETTINGS

    def batch(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        # Every position is read in training: a text is as long as the model can read.
        ids = english.sample(s["batch"], CONFIG["max_len"] + 1, draw)
        return ids[:, :-1], ids[:, 1:]

    losses = train(model, batch, steps=s["steps"], lr=s["lr"], random_seed=s["random_seed"])
    notes = {"config": dataclasses.asdict(model.config), "settings": s}
    save_checkpoint(path, model, step=s["steps"], notes=notes)
    return losses


def above(model: GPT, n: int = 100) -> tuple[float, float]:
    """Nats a word on n new texts: the model's, and those of a reader who knows the grammar."""
    english = language()
    ids = english.sample(n, model.config.max_len + 1, torch.Generator().manual_seed(7))
    perfect = english.predictive(ids[:, :-1]).log()
    with torch.no_grad():
        found = model(ids[:, :-1]).double().log_softmax(-1)
    got, best = (-x.gather(2, ids[:, 1:, None]).mean().item() for x in (found, perfect))
    return got, best


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    make()
    got, best = above(micro())
    took = time.perf_counter() - start
    print(f"{MICRO.stat().st_size:,} bytes, {got:.4f} nats a word, floor {best:.4f}, {took:.0f} s")


if __name__ == "__main__":
    main()
