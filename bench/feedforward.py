"""Four feed-forward networks of the same number of parameters, trained alike (chapter 10).

    python -m bench.feedforward                        all of it, about four minutes on one thread
    python -m bench.feedforward SwiGLU --random-seed 2 one run; the others in the file stay

Small causal pre-norm models read the sentences of `heed.tasks.grammar`, whose exact probabilities
are known: `above` is how many nats a word costs more than it costs a perfect reader of the same
text. Only the network inside the block differs. One of the four has no bend at all.

B texts · T words · V vocabulary.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import record
from heed import masks
from heed.blocks import PreNorm
from heed.layers import MLP, LayerNorm, SwiGLU, gelu_tanh
from heed.positions import sinusoids
from heed.tasks.grammar import Grammar
from heed.training import train

RESULTS = Path(__file__).parent / "results/cpu/feedforward.json"
SETTINGS = {
    "d_model": 48,  # 8/3 of it is a whole number: all four weigh 8 x 48 x 48
    "n_heads": 4,
    "n_layers": 2,
    "length": 64,
    "steps": 300,
    "batch": 8,
    "lr": 4e-3,
    "test_texts": 100,
}
SEEDS = (1, 2, 3, 4, 5)
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "no bend": lambda d: MLP(d, activation=nn.Identity(), bias=False),
    "ReLU": lambda d: MLP(d, activation=torch.relu, bias=False),
    "GELU": lambda d: MLP(d, activation=gelu_tanh, bias=False),
    "SwiGLU": lambda d: SwiGLU(d),
}


class Reader(nn.Module):
    """Sinusoids, pre-norm blocks with the network that is asked for, a last norm, a head."""

    def __init__(self, network: str) -> None:
        super().__init__()
        d_model, V = SETTINGS["d_model"], len(language().vocab)
        self.tokens, self.norm = nn.Embedding(V, d_model), LayerNorm(d_model)
        self.blocks = nn.ModuleList(
            PreNorm(d_model, n_heads=SETTINGS["n_heads"]) for _ in range(SETTINGS["n_layers"])
        )
        self.head = nn.Linear(d_model, V, bias=False)
        for block in self.blocks:
            block.mlp = NETWORKS[network](d_model)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + sinusoids(ids.shape[1], SETTINGS["d_model"])
        for block in self.blocks:
            x = block(x, mask=masks.causal)
        return self.head(self.norm(x))


@cache
def language() -> Grammar:
    return Grammar()


@cache
def texts(n: int, random_seed: int) -> Tensor:
    return language().sample(n, SETTINGS["length"] + 1, torch.Generator().manual_seed(random_seed))


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For heed.training.train: drawn from a pool of texts."""
    pool = texts(5000, random_seed=100)
    ids = pool[torch.randint(len(pool), (SETTINGS["batch"],), generator=generator)]
    return ids[:, :-1], ids[:, 1:]


@torch.no_grad()
def above(model: nn.Module) -> float:
    """Nats a word above a perfect reader, on texts that no training has seen."""
    ids = texts(SETTINGS["test_texts"], random_seed=7)
    targets = ids[:, 1:, None]
    cost = -model(ids[:, :-1]).double().log_softmax(-1).gather(2, targets)
    floor = -language().predictive(ids[:, :-1]).gather(2, targets).log()
    return (cost - floor).mean().item()


def measure(network: str, random_seed: int) -> dict[str, float]:
    torch.manual_seed(random_seed)
    model = Reader(network)
    train(model, batch, steps=SETTINGS["steps"], lr=SETTINGS["lr"], random_seed=random_seed)
    weights = sum(p.numel() for p in model.blocks[0].mlp.parameters())
    return {"above": above(model), "parameters": weights}


EMPTY = {"settings": SETTINGS, "runs": {}}


def load(path: Path = RESULTS) -> dict:
    return record.load(path, EMPTY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--random-seed", type=int, action="append", dest="seeds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for random_seed in asked.seeds or SEEDS:
        for network in asked.networks:
            start = time.perf_counter()
            name, measured = f"{network}, seed {random_seed}", measure(network, random_seed)
            run = record.add(RESULTS, EMPTY, name, start, measured)
            print(f"{name}: {run['above']} in {run['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
