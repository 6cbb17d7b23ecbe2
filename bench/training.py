"""A training step of our GPT beside its peers': transformers' GPT-2 and PyTorch's own layers.

    python -m bench.training                 all four ways, about ten minutes on one thread
    python -m bench.training "float32 eager" one of them; the others in the file stay

On a GPU `python -m bench.gpu` times the same step of GPT-2.

A step is forward, backward and fused AdamW, of the same shape on the same batch. `limit` is one
matrix product with the step's FLOPs: its ratio is the share of the machine's own rate that the
baseline reaches. Compiled means torch.compile, which needs a C++ compiler. The error is that of the
logits before the first step, from a float64 copy of the model.

B texts · T words · C width · D head width.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import record
from bench.duel import duel, error, show
from heed.gpt import GPT, GPTConfig, causal, loss

RESULTS = Path(__file__).parent / "results/cpu/training.json"
SHAPE = {"n_layers": 4, "d_model": 256, "n_heads": 4, "max_len": 256, "vocab_size": 512}
SETTINGS = {"shape": SHAPE, "batch": 8, "optimizer": "fused AdamW", "threads": 1, "rounds": 11}
WAYS = ("float32 eager", "float32 compiled", "bfloat16 eager", "bfloat16 compiled")


def sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout) -> Tensor:
    """PyTorch's fused attention in the place of `heed.gpt.causal`."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout.p, is_causal=True)


def ours(shape: dict[str, int], attend: Callable[..., Tensor] | None = None) -> nn.Module:
    model = GPT(GPTConfig(**shape))
    for block in model.blocks:
        block.attn.attend = attend or block.attn.attend
    return model


class Theirs(nn.Module):
    """transformers' GPT2LMHeadModel, in its fastest setting."""

    def __init__(self, shape: dict[str, int]) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": "n_layers", "n_embd": "d_model", "n_head": "n_heads"}
        sizes |= {"n_positions": "max_len", "vocab_size": "vocab_size"}
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(
            **{theirs: shape[name] for theirs, name in sizes.items()},
            **off,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        self.model = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


class Stock(nn.Module):
    """The same blocks written with nn.TransformerEncoderLayer."""

    def __init__(self, shape: dict[str, int]) -> None:
        super().__init__()
        C, T = shape["d_model"], shape["max_len"]
        layer = nn.TransformerEncoderLayer(
            C, shape["n_heads"], 4 * C, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.tokens, self.positions = nn.Embedding(shape["vocab_size"], C), nn.Embedding(T, C)
        self.body = nn.TransformerEncoder(
            layer, shape["n_layers"], nn.LayerNorm(C), enable_nested_tensor=False
        )
        self.register_buffer("future", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.body(x, mask=self.future, is_causal=True) @ self.tokens.weight.T


def models(shape: dict[str, int]) -> dict[str, nn.Module]:
    """All have the same blocks and one table for words in and out."""
    return {
        "heed.gpt": ours(shape),
        "heed.gpt with PyTorch's fused attention": ours(shape, sdpa),
        "transformers GPT2LMHeadModel": Theirs(shape),
        "nn.TransformerEncoderLayer": Stock(shape),
    }


def step_flops(shape: dict[str, int], batch: int) -> int:
    """6 for every weight and word, and half of the T x T scores: no more than a step must do."""
    L, C, T, V = (shape[name] for name in ("n_layers", "d_model", "max_len", "vocab_size"))
    return (6 * (12 * L * C**2 + V * C) + 6 * L * C * T) * batch * T


def limit(flops: int, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """The same arithmetic as products of large square matrices, and its exact FLOPs."""
    n = 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    times = max(1, round(flops / (2 * n**3)))
    return lambda: [a @ b for _ in range(times)], times * 2 * n**3


def prepare(model: nn.Module, way: str, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """The forward pass: in a lower precision, compiled."""
    dtype, mode = way.split()
    forward = torch.compile(model) if mode == "compiled" else model

    def run(ids: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return forward(ids)

    return run


def logits_error(model: nn.Module, forward: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """How far the first text's logits are from those of the same weights in float64."""
    exact = copy.deepcopy(model).double()
    for block in getattr(exact, "blocks", ()):
        block.attn.attend = causal  # whatever attention the model has
    with torch.no_grad():
        right = exact(ids[:1])
    return error(forward(ids)[:1].detach(), right)


def step(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    ids: Tensor,
    targets: Tensor,
    cost: Callable[[Tensor, Tensor], Tensor] = loss,
) -> Callable[[], object]:
    """One training step as a function to be timed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def run() -> None:
        optimizer.zero_grad()
        cost(forward(ids), targets).backward()
        optimizer.step()

    return run


def measure(way: str, shape: dict[str, int], batch: int, rounds: int) -> dict[str, dict]:
    torch.manual_seed(0)
    data = torch.randint(shape["vocab_size"], (batch, shape["max_len"] + 1))
    ids, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    cases, errors = {}, {}
    for name, model in models(shape).items():
        forward = prepare(model, way)
        errors[name] = logits_error(model, forward, ids)
        cases[name] = step(model, forward, ids, targets)
    flops = step_flops(shape, batch)
    best = limit(flops, getattr(torch, way.split()[0]))
    rows = duel(cases, errors=errors, rounds=rounds, flops=flops, limit=best)
    for row in rows.values():
        row["tokens per second"] = ids.numel() / row["seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", nargs="*", choices=[*WAYS, []], help="all of them unless named")
    torch.set_num_threads(1)
    for way in parser.parse_args().way or WAYS:
        start = time.perf_counter()
        rows = measure(way, SHAPE, SETTINGS["batch"], SETTINGS["rounds"])
        show(way, rows)
        record.add(RESULTS, {"settings": SETTINGS, "runs": {}}, way, start, {"rows": rows})


if __name__ == "__main__":
    main()
