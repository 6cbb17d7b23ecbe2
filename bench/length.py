"""Loss by position past the training length, for every way to tell a word its place (chapter 09).

    python -m bench.length                      all of it, about ten minutes on one thread
    python -m bench.length rope --random-seed 2 one piece; the others in the file stay as they are

Small causal models read the sentences of `heed.tasks.grammar`, whose exact probabilities are known:
`above` is how many nats a word costs more than it costs a perfect reader of the same text. That
reader never looks further back than the sentence, some twenty words, so a text that is longer
than those of the training asks for nothing new. What rises past the training length is the fault
of the positions.

B texts · T words · S keys · H heads · C width · V vocabulary.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import record
from heed import masks, stretch
from heed.attention import attention
from heed.multihead import MultiHeadAttention
from heed.positions import alibi, buckets, frequencies, sinusoids
from heed.tasks.grammar import Grammar
from heed.training import train

RESULTS = Path(__file__).parent / "results/cpu/length.json"
TRAINED, TIMES = 128, 8  # words; how many times longer the longest text of the test is
SETTINGS = {
    "trained": TRAINED,
    "times": TIMES,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "steps": 300,
    "batch": 8,
    "lr": 3e-3,
    "test_texts": 12,
    "tuning_steps": 24,
    "tuning_batch": 1,
    "tuning_lr": 1e-3,
}
SEEDS = (1, 2, 3)


class Reader(nn.Module):
    """A pre-norm Transformer that says nothing about positions unless `places` or `how` does."""

    def __init__(
        self,
        vocab_size: int,
        *,
        places: Callable[[Tensor], Tensor] | None = None,
        d_model: int = 64,
        n_heads: int = 4,
        n_layers: int = 2,
        **how: Callable[..., Tensor],  # rotate or attend, for every layer
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, d_model), places
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(d_model),
                    "attn": MultiHeadAttention(d_model, n_heads=n_heads, **how),
                    "norm2": nn.LayerNorm(d_model),
                    "mlp": nn.Sequential(
                        nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
                    ),
                }
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, ids: Tensor, mask: masks.Mask = masks.causal) -> Tensor:
        x = self.tokens(ids)
        if self.places is not None:
            x = x + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = x + layer.attn(layer.norm1(x), mask=mask)
            x = x + layer.mlp(layer.norm2(x))
        return self.head(self.norm(x))

    def turn_by(self, rotate: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Another rotation of queries and keys from now on: RoPE, stretched."""
        for layer in self.layers:
            layer.attn.rotate = rotate


class DistanceBias(nn.Module):
    """T5's: one learned number for each head and bucket of distances, the same in all layers.

    16 buckets up to distance 32, so that training meets every one of them.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(16, n_heads)
        nn.init.zeros_(self.table.weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask) -> Tensor:
        j = torch.arange(k.shape[2])
        distance = j - j[len(j) - q.shape[2] :, None]
        bucket = buckets(distance, bidirectional=False, n_buckets=16, max_distance=32)
        return attention(q, k, v, mask, bias=self.table(bucket).permute(2, 0, 1))  # (H, T, S)


def reader(scheme: str, random_seed: int, longest: int) -> Reader:
    """A fresh model for one scheme; a learned table has `longest` rows."""
    torch.manual_seed(random_seed)
    new = partial(Reader, len(language().vocab))
    C, H = SETTINGS["d_model"], SETTINGS["n_heads"]
    return {
        "none": new,
        "sinusoidal": lambda: new(places=lambda at: sinusoids(len(at), C)),
        "learned": lambda: new(places=nn.Embedding(longest, C)),
        "T5 bias": lambda: new(attend=DistanceBias(H)),
        "ALiBi": lambda: new(attend=partial(attention, bias=alibi(H))),
        "RoPE": lambda: new(rotate=stretch.rotation(frequencies(C // H))),
    }[scheme]()


SCHEMES = ("none", "sinusoidal", "learned", "T5 bias", "ALiBi", "RoPE")


@cache
def language() -> Grammar:
    return Grammar()


@cache
def texts(n: int, length: int, random_seed: int) -> Tensor:
    return language().sample(n, length, torch.Generator().manual_seed(random_seed))


def batches(length: int, size: int, pool: int = 3000) -> Callable:
    """`get_batch` for heed.training.train: drawn from a pool of fresh texts."""
    ids = texts(pool, length + 1, random_seed=100)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = ids[torch.randint(pool, (size,), generator=generator)]
        return rows[:, :-1], rows[:, 1:]

    return draw


def cost(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) in nats, word by word."""
    return -logits.double().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]


@cache
def perfect(n: int, length: int) -> Tensor:
    """What every word of the test costs a perfect reader."""
    ids = texts(n, length + 1, random_seed=7)
    chances = language().predictive(ids[:, :-1])
    return -chances.gather(2, ids[:, 1:, None])[:, :, 0].log()


@torch.no_grad()
def above(
    model: Reader, trained: int, n: int, *, times: int = TIMES, mask: masks.Mask = masks.causal
) -> list[float]:
    """Nats a word above a perfect reader, averaged over quarters of the training length."""
    ids = texts(n, times * trained + 1, random_seed=7)
    parts = [cost(model(part[:, :-1], mask), part[:, 1:]) for part in ids.split(4)]  # for memory
    gap = torch.cat(parts) - perfect(n, times * trained)
    return gap.mean(0).unflatten(0, (-1, trained // 4)).mean(1).tolist()


def stretches(theta: Tensor, trained: int, factor: float) -> dict[str, stretch.rotation]:
    """RoPE as trained and each way to stretch it."""
    finished = stretch.turns(theta, trained) >= 1
    return {
        "interpolated": stretch.rotation(stretch.interpolated(theta, factor)),
        "NTK-aware": stretch.rotation(stretch.ntk(theta, factor)),
        "by parts": stretch.rotation(stretch.by_parts(theta, factor, trained)),
        "YaRN": stretch.rotation(
            stretch.yarn(theta, factor, trained), stretch.attention_factor(factor)
        ),
        "only unfinished pairs": stretch.rotation(torch.where(finished, theta, theta / factor)),
        "only finished pairs": stretch.rotation(torch.where(finished, theta / factor, theta)),
    }


def dynamically(theta: Tensor, trained: int) -> Callable[[Tensor, Tensor], Tensor]:
    """NTK-aware by the length of the text at hand."""

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        now = stretch.dynamic(theta, len(positions), trained)
        return stretch.rotation(now)(x, positions)

    return rotate


@torch.no_grad()
def above_growing(model: Reader, trained: int, n: int) -> list[float]:
    """`above` for a text that arrives piece by piece, each piece of the training length.

    What depends on the length of a text then depends on how much of it is there.
    """
    ids, floor, gaps = texts(n, TIMES * trained + 1, random_seed=7), perfect(n, TIMES * trained), []
    for end in range(trained, TIMES * trained + 1, trained):
        parts = [cost(model(part[:, :end]), part[:, 1 : end + 1]) for part in ids.split(4)]
        gaps.append((torch.cat(parts) - floor[:, :end])[:, -trained:])
    return torch.cat(gaps, 1).mean(0).unflatten(0, (-1, trained // 4)).mean(1).tolist()


def measure(scheme: str, random_seed: int) -> dict[str, object]:
    """All curves of one model."""
    s = SETTINGS
    longest = TRAINED * TIMES
    model, draw = reader(scheme, random_seed, longest), batches(TRAINED, s["batch"])
    losses = train(model, draw, steps=s["steps"], lr=s["lr"], random_seed=random_seed)
    score = partial(above, trained=TRAINED, n=s["test_texts"])
    curves: dict[str, object] = {
        "as trained": score(model),
        "near": score(model, mask=masks.window(TRAINED)),
    }
    curves["last loss"] = sum(losses[-50:]) / 50
    if scheme != "RoPE":
        return curves
    theta, trained = frequencies(s["d_model"] // s["n_heads"]), dict(model.state_dict())
    trained = {name: x.clone() for name, x in trained.items()}
    ways = stretches(theta, TRAINED, TIMES)
    for name, rotate in ways.items():
        model.turn_by(rotate)
        curves[name] = score(model)
    model.turn_by(dynamically(theta, TRAINED))
    curves["dynamic"] = above_growing(model, TRAINED, s["test_texts"])
    longer = batches(longest, s["tuning_batch"], pool=s["tuning_batch"] * s["tuning_steps"])
    for name in ("as trained", "interpolated", "by parts"):
        model.load_state_dict(trained)
        model.turn_by(ways[name] if name in ways else stretch.rotation(theta))
        train(model, longer, steps=s["tuning_steps"], lr=s["tuning_lr"], random_seed=random_seed)
        curves[f"{name}, tuned"] = score(model)
    return curves


EMPTY = {"settings": SETTINGS, "runs": {}}


def load(path: Path = RESULTS) -> dict:
    return record.load(path, EMPTY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--random-seed", type=int, action="append", dest="seeds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for random_seed in asked.seeds or SEEDS:
        for scheme in asked.schemes:
            start = time.perf_counter()
            name, curves = f"{scheme}, seed {random_seed}", measure(scheme, random_seed)
            run = record.add(RESULTS, EMPTY, name, start, {"curves": curves})
            print(f"{name}: {run['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
