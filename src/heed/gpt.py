"""A GPT, whole, on two pages: shapes and initialisation as GPT-2's (Radford et al. 2019).

B batch · T positions · S positions read · C width of the stream · H heads · D head width · V words.
It imports torch and nothing of ours. `python -m heed.gpt` trains it to sort digits.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Keep = Callable[[Tensor, Tensor], tuple[Any, Any]] | None


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    vocab_size: int
    max_len: int
    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_len", "n_layers", "n_heads", "d_model"):
            n = getattr(self, name)
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name} must be a positive integer, got {n!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} does not divide into {self.n_heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @classmethod
    def gpt2(cls) -> "GPTConfig":
        """The smallest GPT-2: 124,439,808 parameters."""
        return cls(
            vocab_size=50257, max_len=1024, n_layers=12, n_heads=12, d_model=768, dropout=0.1
        )


def causal(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout) -> Tensor:
    """softmax(Q Kᵀ / √D) V, where a query reads its own position and those before it."""
    T, S = q.shape[2], k.shape[2]  # the queries are the last T of the S positions
    scores = q @ k.mT / math.sqrt(k.shape[3])  # (B, H, T, S)
    i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
    weights = scores.masked_fill(j > i, -math.inf).softmax(dim=-1)
    return dropout(weights) @ v


class Attention(nn.Module):
    """Every position asks all positions up to itself, in H small subspaces at once."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attend = causal  # or a faster function of the same four arguments
        self.n_heads, self.dropout = config.n_heads, nn.Dropout(config.dropout)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Float[Tensor, "B T C"], keep: Keep = None) -> Float[Tensor, "B T C"]:
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if keep is not None:
            k, v = keep(k, v)  # (B, H, S, D)
        joined = self.attend(q, k, v, self.dropout).transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.out(joined))


class MLP(nn.Module):
    """The same two layers at every position: four times wider, a bend, and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, 4 * config.d_model)
        self.down = nn.Linear(4 * config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))


class Block(nn.Module):
    """Two writes to the stream: what others say, then what to make of it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.d_model), Attention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.d_model), MLP(config)

    def forward(self, x: Float[Tensor, "B T C"], keep: Keep = None) -> Float[Tensor, "B T C"]:
        x = x + self.attn(self.norm1(x), keep)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        # The stream is a sum of 2L writes: norm it once more.
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight  # one table reads tokens and writes them
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention | MLP):  # 2L independent writes add up to variance one
            last = module.out if isinstance(module, Attention) else module.down
            nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def forward(self, ids: Int[Tensor, "B T"], *, cache: Any = None) -> Float[Tensor, "B T V"]:
        """Scores of every possible next token, after each position."""
        places = self._places(ids, cache)
        x = self.dropout(self.tokens(ids) + self.positions(places))
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else partial(cache.append, layer))
        return self.head(self.norm(x))

    def _places(self, ids: Tensor, cache: Any) -> Tensor:
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be integers (B, T), got {ids.dtype} {tuple(ids.shape)}")
        c, n = self.config, ids.shape[1]
        places = torch.arange(n, device=ids.device) if cache is None else cache.places(n)
        if n and places.max() >= c.max_len:
            raise ValueError(f"{places.max() + 1} positions, but max_len is {c.max_len}")
        if ids.numel() and not 0 <= ids.min() <= ids.max() < c.vocab_size:
            raise ValueError(f"ids {ids.min()} to {ids.max()}, but vocab_size is {c.vocab_size}")
        return places

    def new_cache(self, batch_size: int, max_len: int | None = None) -> "Cache":
        return Cache(self, batch_size, self.config.max_len if max_len is None else max_len)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "B T"],
        n_new: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B T+{n_new}"]:
        """The prompt and n_new tokens after it; temperature 0 takes the likeliest."""
        if ids.shape[-1] == 0 or n_new < 0 or not 0 <= temperature < math.inf:
            asked = f"{tuple(ids.shape)}, {n_new} new tokens and temperature {temperature}"
            raise ValueError(f"a prompt has tokens, numbers are 0 or more and finite; got {asked}")
        cache, new, mode = self.new_cache(len(ids)), ids, self.training
        self.eval()
        try:
            for _ in range(n_new):
                logits = self(new, cache=cache)[:, -1]
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)
                else:
                    odds = (logits / temperature).softmax(-1)
                    new = torch.multinomial(odds, 1, generator=generator)
                ids = torch.cat([ids, new], dim=1)
        finally:
            self.train(mode)
        return ids


def loss(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean of -ln p(target), in nats, over the targets that are not -100."""
    if (targets == -100).all():
        raise ValueError("every target is -100: there is nothing to average")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Cache:
    """Keys and values of the positions already read, one buffer per layer, filled from the left."""

    def __init__(self, model: GPT, batch_size: int, max_len: int) -> None:
        if batch_size < 1 or max_len < 1:
            raise ValueError(f"a cache needs room, got batch {batch_size} and length {max_len}")
        c, like = model.config, model.tokens.weight
        shape = (2, batch_size, c.n_heads, max_len, c.d_model // c.n_heads)
        self.buffers = [like.new_empty(shape) for _ in range(c.n_layers)]
        self.filled = [0] * c.n_layers

    @property
    def length(self) -> int:
        return self.filled[-1]

    def places(self, n: int) -> Int[Tensor, " T"]:
        """Where the next n tokens stand."""
        return torch.arange(self.length, self.length + n, device=self.buffers[0].device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the old ones; hand back all that are filled."""
        buffer, start = self.buffers[layer], self.filled[layer]
        end, (rows, room) = start + k.shape[2], (buffer.shape[1], buffer.shape[3])
        if len(k) != rows or end > room:
            raise ValueError(f"{len(k)} rows up to {end}: the cache has {rows} rows of {room}")
        buffer[:, :, :, start:end] = torch.stack([k, v])
        self.filled[layer] = end
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot keep {n} of {self.length} positions")
        self.filled = [n] * len(self.filled)

    def reorder(self, rows: Int[Tensor, " B"]) -> None:
        """Row b continues what row rows[b] has read."""
        n = self.buffers[0].shape[1]
        if rows.dtype != torch.int64 or rows.shape != (n,) or rows.min() < 0 or rows.max() >= n:
            raise ValueError(f"rows must be {n} integers below {n}, got {rows.tolist()}")
        self.buffers = [x[:, rows] for x in self.buffers]


def sorting(n: int, generator: torch.Generator, length: int = 8) -> tuple[Tensor, Tensor]:
    """`3 1 2 : 1 2 3`, inputs and targets. Only the answer counts: a perfect model has loss 0."""
    digits = torch.randint(10, (n, length), generator=generator)
    ids = torch.cat([digits, torch.full((n, 1), 10), digits.sort(dim=1).values], dim=1)
    targets = ids[:, 1:].clone()
    targets[:, :length] = -100
    return ids[:, :-1], targets


def main(steps: int = 1200, peak: float = 3e-3) -> float:
    """Train on sorting, print a sample, return the share of 1,000 new lists that come out right."""
    torch.manual_seed(0)
    draw, start = torch.Generator().manual_seed(1), time.perf_counter()
    model = GPT(GPTConfig(vocab_size=11, max_len=17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95))
    for step in range(steps):
        warm = min(1, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = peak * warm * (1 + math.cos(math.pi * step / steps)) / 2
        ids, targets = sorting(64, draw)
        now = loss(model(ids), targets)
        optimizer.zero_grad()
        now.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            took = time.perf_counter() - start
            print(f"step {step:4}  loss {now.item():.4f} (perfect: 0)  {took:.0f} s")
    asked, targets = sorting(1000, draw)
    answers = model.generate(asked[:, :9], 8)[:, 9:]
    exact = (answers == targets[:, 8:]).all(1).float().mean().item()
    question, answer = asked[0, :8].tolist(), answers[0].tolist()
    print(f"{question} sorted: {answer}\n{exact:.1%} of 1,000 new lists come out right")
    return exact


if __name__ == "__main__":
    main()
