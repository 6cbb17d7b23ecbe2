"""One decode step of our GPT, compiled whole: at batch 1 its weights are what takes the time.

The new token of one text takes every weight once, for one multiply-add: the step has only to read.
Two things keep `heed.gpt` from that. A small model waits for Python, which makes dozens of calls in
every layer. And a product of the library, made for matrices, wants its weights in the precision of
its sums, four bytes each in float32.

So here a product is multiply and sum: `(w * x).sum(-1)`. As it stands this is slower, for it writes
all of w * x into memory. But `torch.compile` makes one loop of it, that reads a row of w and writes
one number, and one program of the whole step. Weights stored in bfloat16 become float32 inside that
loop: half the bytes, the same sums. For two texts or more a weight serves several vectors, and the
library's product is the better one (measured: at a batch of 2 six times as fast).

A compiled program has fixed shapes. So the cache has all its room from the start and is written in
place, and every step reads all of it: `max_len` should be no more than you need.

B texts · T tokens of a prompt · V words. Inside: C width of the stream · H heads · S room of the
cache · D head width · K and N numbers that a product takes and gives.
"""

import copy
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

OUTSIDE = ("tokens.weight", "positions.weight", "norm.weight", "norm.bias")
PARTS = ("norm1", "attn.qkv", "attn.out", "norm2", "mlp.up", "mlp.down")
INSIDE = tuple(f"{part}.{kind}" for part in PARTS for kind in ("weight", "bias"))
# All rows of a product read the same norm. Left alone, the compiler computes it again for each of
# them; this says that whatever takes more than 8 operations is computed once and kept. And all
# tensors of a Step are its own and stay as they are: no call need look at them again.
OPTIONS: Any = {
    "realize_opcount_threshold": 8,
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
}


@no_type_check  # a checker of shapes would break the graph
def product(x: Float[Tensor, "B K"], w: Float[Tensor, "N K"]) -> Float[Tensor, "B N"]:
    """x wᵀ. For one text: row by row, multiply and sum."""
    return (w * x).sum(-1)[None] if len(x) == 1 else F.linear(x, w)


@no_type_check
def decode(
    weights: dict[str, Tensor], cache: list[Tensor], place: Tensor, ids: Tensor, eps: float
) -> Tensor:
    """Scores (B, V) of the token after ids (B, 1), which stands at `place`; place moves on by one.

    Weights of the blocks are stacked, layer by layer; so many caches hold keys and values.
    """
    _, B, H, S, D = cache[0].shape
    sums, C = cache[0].dtype, H * D
    filled = torch.arange(S, device=place.device) <= place
    x = weights["tokens.weight"][ids[:, 0]].to(sums) + weights["positions.weight"][place].to(sums)
    for layer, buffer in enumerate(cache):
        w = {name: weights[name][layer].to(sums) for name in INSIDE}
        y = F.layer_norm(x, (C,), w["norm1.weight"], w["norm1.bias"], eps)
        qkv = product(y, w["attn.qkv.weight"]) + w["attn.qkv.bias"]
        q, k, v = qkv.view(B, 3, H, 1, D).unbind(1)
        buffer.index_copy_(3, place, torch.stack([k, v]))
        keys, values = buffer  # (B, H, S, D)
        scores = (q / math.sqrt(D) @ keys.mT).masked_fill(~filled, -math.inf)
        joined = (scores.softmax(-1) @ values).reshape(B, C)
        x = x + product(joined, w["attn.out.weight"]) + w["attn.out.bias"]
        y = F.layer_norm(x, (C,), w["norm2.weight"], w["norm2.bias"], eps)
        y = F.gelu(product(y, w["mlp.up.weight"]) + w["mlp.up.bias"], approximate="tanh")
        x = x + product(y, w["mlp.down.weight"]) + w["mlp.down.bias"]
    place += 1
    x = F.layer_norm(x, (C,), weights["norm.weight"].to(sums), weights["norm.bias"].to(sums), eps)
    return product(x, weights["tokens.weight"].to(sums))


class Step:
    """A `heed.gpt.GPT` that reads prompts as it is, and every token after them by `decode`.

    It keeps its own copy of the weights, in `dtype` (the model's unless named), and a model with
    the same weights for prompts; sums and cache are in float32, or in float64 for a float64 model.
    The first token compiles: some ten seconds.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        stored = _check(model, batch_size, max_len, dtype)
        sums = torch.promote_types(stored, torch.float32)
        self._model = copy.deepcopy(model).to(stored).to(sums).eval()
        given = {name: p.detach() for name, p in self._model.named_parameters()}
        c, like = model.config, given[OUTSIDE[0]]
        stacks = {n: [given[f"blocks.{i}.{n}"] for i in range(c.n_layers)] for n in INSIDE}
        self.weights = {name: given[name].to(stored, copy=True) for name in OUTSIDE}
        self.weights |= {name: torch.stack(s).to(stored) for name, s in stacks.items()}
        shape = (2, batch_size, c.n_heads, max_len, c.d_model // c.n_heads)
        self.cache = [like.new_zeros(shape) for _ in range(c.n_layers)]
        self.place = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._ids = self.place.new_zeros(batch_size, 1)
        self.batch_size, self.max_len, self._eps = batch_size, max_len, model.norm.eps
        self.length = 0
        # The compiler keeps a few versions of one piece of code; each Step brings its own piece.
        own = FunctionType(decode.__code__.replace(), decode.__globals__)
        options = OPTIONS if backend == "inductor" else None
        self._decode = torch.compile(
            own, fullgraph=True, dynamic=False, backend=backend, options=options
        )

    @torch.no_grad()
    def prefill(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        """Forget what was read, let the model read the prompts; scores of the token after them."""
        if ids.ndim != 2 or len(ids) != self.batch_size or not 1 <= ids.shape[1] <= self.max_len:
            room = f"{self.batch_size} texts of 1 to {self.max_len} tokens"
            raise ValueError(f"a prompt is {room}, got ids {tuple(ids.shape)}")
        logits = self._model(ids, cache=self)
        self.length = ids.shape[1]
        self.place.fill_(self.length)
        return logits[:, -1]

    def places(self, n: int) -> Int[Tensor, " T"]:
        """Where n tokens of a prompt stand, for the model: at the beginning."""
        return torch.arange(n, device=self.place.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values of a prompt, for the model."""
        buffer = self.cache[layer].zero_()  # a NaN left from before would outlive a weight of 0
        buffer[:, :, :, : k.shape[2]] = torch.stack([k, v])
        return k, v

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens."""
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot keep {n} of {self.length} tokens")
        self.length = n
        self.place.fill_(n)

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """Read one more token of each text; scores of the token after it."""
        B, V = self.batch_size, len(self.weights["tokens.weight"])
        if ids.shape != (B, 1) or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be integers ({B}, 1), got {ids.dtype} {tuple(ids.shape)}")
        if not 0 <= ids.min() <= ids.max() < V:
            raise ValueError(f"ids {ids.min()} to {ids.max()}, but vocab_size is {V}")
        return self._next(ids)

    def _next(self, ids: Tensor) -> Tensor:
        if self.length == self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens, and all are read")
        self.length += 1
        return self.advance(ids)

    def advance(self, ids: Tensor) -> Tensor:
        """What a call computes, unchecked, all of it on the device: a CUDA graph may hold it."""
        self._ids.copy_(ids)
        return self._decode(self.weights, self.cache, self.place, self._ids, self._eps)

    @torch.no_grad()
    def generate(self, ids: Int[Tensor, "B T"], n_new: int) -> Int[Tensor, "B T+{n_new}"]:
        """The prompts and the n_new likeliest tokens, one after the other."""
        if n_new < 0 or ids.ndim == 2 and ids.shape[1] + n_new - 1 > self.max_len:
            asked = f"{n_new} new tokens after ids {tuple(ids.shape)}"
            raise ValueError(f"{asked} do not fit into the room for {self.max_len}")
        text, best = [ids], [self.cache[0].new_zeros(self.batch_size, 1)]
        for n in range(n_new):
            logits = self.prefill(ids) if n == 0 else self._next(text[-1])
            score, new = logits.max(-1, keepdim=True)
            text.append(new.to(ids.dtype))
            best.append(score)
        if not (scores := torch.cat(best, dim=1)).isfinite().all():  # asked once, not every step
            n = int(scores.isfinite().all(0).long().argmin())
            raise ValueError(
                f"new token {n} has no finite largest score: got {scores[:, n].tolist()}"
            )
        return torch.cat(text, dim=1)


def _check(model: Any, batch_size: int, max_len: int, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which the weights are stored."""
    if not hasattr(model, "named_parameters"):
        raise TypeError(f"a Step takes a heed.gpt.GPT, got {type(model).__name__}")
    names, L = {name for name, _ in model.named_parameters()}, len(getattr(model, "blocks", ()))
    if names != {*OUTSIDE, *(f"blocks.{i}.{name}" for i in range(L) for name in INSIDE)} or not L:
        raise ValueError(f"a Step knows the weights of heed.gpt.GPT, not {type(model).__name__}'s")
    for attend in {block.attn.attend for block in model.blocks}:
        if attend.__module__ != type(model.blocks[0]).__module__:
            raise ValueError(f"a Step attends by heed.gpt.causal, the model by {attend!r}")
    if batch_size < 1 or not 1 <= max_len <= model.config.max_len:
        asked = f"batch {batch_size} and max_len {max_len}"
        raise ValueError(f"{asked}, but the model has {model.config.max_len} positions")
    stored = model.tokens.weight.dtype if dtype is None else dtype
    if stored not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weights are stored in 16, 32 or 64 bits of floating point, not {stored}")
    return stored
