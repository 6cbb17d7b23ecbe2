"""From scores of the next token to text: greedy or drawn, from the top k, from the top p, by beam.

Works with any causal `model(ids) -> logits`. B prompts · T tokens in each · V words.
N axes of any number and kind.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def filter_logits(
    logits: Float[Tensor, "*N V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "*N V"]:
    """logits / temperature, with -inf for every token outside the k likeliest and the top p.

    Temperature comes first, then k, then p. The top p are the fewest likeliest tokens that hold the
    share p of the probability; the token that crosses p is one of them (Holtzman et al. 2020).
    Of tokens with equal scores the first in the vocabulary counts as the likelier one.
    """
    _check_filter(temperature, top_k, top_p)
    if not temperature:
        raise ValueError("temperature 0 takes the likeliest token: there is nothing to draw from")
    logits = logits / temperature
    if logits.isnan().any() or (logits == math.inf).any():
        raise ValueError(f"logits / {temperature} hold NaN or +inf")
    if (logits == -math.inf).all(-1).any():
        raise ValueError(f"a row of logits / {temperature} of {logits.shape[-1]} words is all -inf")
    if top_k is None and top_p is None:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = -math.inf
    if top_p is not None and top_p < 1:  # at 1 rounding must not cost the last token its place
        p = ordered.double().softmax(-1)
        before = p.cumsum(-1) - p
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)


@torch.no_grad()
def generate(
    model: Any,
    ids: Int[Tensor, "B T"],
    n_new: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    generator: torch.Generator | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    use_cache: bool = True,
) -> Int[Tensor, "B T+{n_new}"]:
    """The prompts and n_new tokens after each; temperature 0 takes the likeliest.

    A row that has said `eos` says nothing else: the rest of it is `eos`. With `lengths`, prompt b
    is the first lengths[b] tokens of its row, its new tokens follow these at once, and each row
    comes out as if it were alone. Behind them stands padding: `eos`, or else the row's last id.
    The model reads in eval mode, and is given back in the mode it came in.
    """
    _check_filter(temperature, top_k, top_p)
    ends = _check_prompts(model, ids, n_new, lengths)
    # Rows of one length can share a cache, rows of different lengths cannot. But a causal model
    # never sees what is to its right, so these are read anew, padding and all, and stay exact.
    cached = use_cache and lengths is None and hasattr(model, "new_cache")
    cache = model.new_cache(len(ids), ids.shape[1] + n_new) if cached else None
    text = torch.cat([ids, ids[:, -1:].expand(-1, n_new)], dim=1)
    rows, places = torch.arange(len(ids), device=ids.device), torch.arange(text.shape[1]).to(ids)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    modes = {module: module.training for module in modules}
    try:
        for module in modes:
            module.training = False
        for _ in range(n_new):
            if cache is not None:
                logits = _read(model, text[:, cache.length : ends[0]], cache=cache)[:, -1]
            else:
                padding = places[: ends.max()] >= ends[:, None]
                logits = _read(model, text[:, : ends.max()].masked_fill(padding, 0))
                logits = logits[rows, ends - 1]
            if eos is not None and not 0 <= eos < logits.shape[-1]:
                raise ValueError(f"eos is {eos}, but there are {logits.shape[-1]} words")
            new = _choose(logits, temperature, top_k, top_p, generator).to(ids.dtype)
            text[rows, ends] = new if eos is None else new.masked_fill(ended, eos)
            ends = ends + 1
            ended |= new == eos
            if ended.all():
                break
    finally:
        for module, mode in modes.items():
            module.training = mode
    return text if eos is None else text.masked_fill(places >= ends[:, None], eos)


@torch.no_grad()
def beam(
    score: Callable[[Tensor, Tensor], Tensor],
    start: Int[Tensor, "B T"],
    n_new: int,
    *,
    width: int,
    eos: int | None,
    alpha: float = 0.0,
) -> tuple[Int[Tensor, "B {width} T+{n_new}"], Float[Tensor, "B {width}"]]:
    """The `width` best continuations of each start, best first, and ln p / length_penalty of each.

    `score(ids (N, T), rows (N,))` gives the logits (N, V) of the next word; rows says which start a
    text continues. Every text that is kept is tried with every word. Of these, the endings among
    the best `width` are set aside, and the best `width` of the others go on, until none of them can
    overtake what is set aside, or n_new words are said. Width 1 without alpha is greedy; a width
    that drops nothing finds the best of all. Behind an end stands `eos`. A place that no text
    fills, because there are fewer, has the score -inf.
    """
    _check_beam(start, n_new, width, alpha)
    (B, T), place = start.shape, torch.arange(2 * width, device=start.device)
    filler = start[:, -1:] if eos is None else torch.full_like(start[:, :1], eos)
    text = torch.cat([start, filler.expand(-1, n_new)], 1)[:, None].repeat(1, width, 1)
    sums = text.new_full((B, width), -math.inf, dtype=torch.float64)  # ln p of what is alive
    ended, scores = text, sums
    sums = sums.masked_fill(place[:width] == 0, 0.0)  # one text at first, the start itself
    rows = torch.arange(B, device=start.device)[:, None]
    for n in range(1, n_new + 1):
        # Words only cost, and a longer text is divided by more: this is the best that can come.
        hope = sums / length_penalty(n_new, alpha)
        alive = (sums > -math.inf) & (hope[:, :1] > scores[:, -1:])
        if not alive.any():
            break
        ids = text[alive][:, : T + n - 1]
        logits = filter_logits(_next(score, ids, rows.expand(B, width)[alive], eos).double())
        tried = sums.new_full((*sums.shape, logits.shape[1]), -math.inf)
        tried[alive] = sums[alive][:, None] + logits.log_softmax(-1)
        best, order = tried.flatten(1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, : 2 * width], order[:, : 2 * width]  # at most `width` of them end
        new, word = text[rows, order // logits.shape[1]], order % logits.shape[1]
        new[:, :, T + n - 1] = word
        ends = word == eos if eos is not None else torch.zeros_like(word, dtype=torch.bool)
        found = best.masked_fill(~ends | (place[: best.shape[1]] >= width), -math.inf)
        found = found / length_penalty(n, alpha)
        ended, scores = _best([ended, new], [scores, found], width)
        text, sums = _best([new], [best.masked_fill(ends, -math.inf)], width)
    return _best([ended, text], [scores, sums / length_penalty(n_new, alpha)], width)


def length_penalty(n: int, alpha: float) -> float:
    """((5 + n) / 6)^alpha for a text of n words, its end among them (Wu et al. 2016, eq. 14)."""
    return ((5 + n) / 6) ** alpha


def _best(texts: list[Tensor], scores: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """The best texts of each row, by their scores; of equals the earlier."""
    text = torch.cat(texts, dim=1)
    ordered, order = torch.cat(scores, dim=1).sort(dim=1, descending=True, stable=True)
    rows = torch.arange(len(text), device=text.device)[:, None]
    return text[rows, order[:, :width]], ordered[:, :width]


def _next(score: Any, ids: Tensor, rows: Tensor, eos: int | None) -> Tensor:
    logits = score(ids, rows)
    if logits.ndim != 2 or len(logits) != len(ids):
        shapes = f"{tuple(ids.shape)} gave {tuple(logits.shape)}"
        raise ValueError(f"a score makes (N, T) into (N, V), but ids {shapes}")
    if eos is not None and not 0 <= eos < logits.shape[1]:
        raise ValueError(f"eos is {eos}, but there are {logits.shape[1]} words")
    return logits


def _check_beam(start: Tensor, n_new: int, width: int, alpha: float) -> None:
    _check_prompts(None, start, n_new, None)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a positive integer, got {width!r}")
    if not 0 <= alpha < math.inf:  # below 0 a longer text would be worse still: no bound holds
        raise ValueError(f"alpha must be 0 or more and finite, got {alpha}")


def _read(model: Any, ids: Tensor, **cache: Any) -> Tensor:
    logits = model(ids, **cache)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        shapes = f"{tuple(ids.shape)} gave {tuple(logits.shape)}"
        raise ValueError(f"a model makes (B, T) into (B, T, V), but ids {shapes}")
    return logits


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = filter_logits(logits, temperature=temperature or 1.0, top_k=top_k, top_p=top_p)
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check_filter(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def _check_prompts(model: Any, ids: Tensor, n_new: int, lengths: Tensor | None) -> Tensor:
    """Where each prompt ends, (B)."""
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be integers (B, T), got {ids.dtype} {tuple(ids.shape)}")
    if 0 in ids.shape:
        raise ValueError(f"a prompt holds at least one token, got ids {tuple(ids.shape)}")
    if n_new < 0:
        raise ValueError(f"n_new must not be negative, got {n_new}")
    if lengths is None:
        lengths = ids.new_full((len(ids),), ids.shape[1])
    elif lengths.shape != (len(ids),) or lengths.dtype not in (torch.int64, torch.int32):
        got = f"{lengths.dtype} {tuple(lengths.shape)}"
        raise ValueError(f"lengths must be integers of shape ({len(ids)},), got {got}")
    elif not 1 <= lengths.min() <= lengths.max() <= ids.shape[1]:
        raise ValueError(f"lengths must lie in 1 to {ids.shape[1]}, got {lengths.tolist()}")
    room = getattr(getattr(model, "config", None), "max_len", math.inf)
    need = int(lengths.max()) + n_new - 1  # the last new token is never read
    if need > room:
        raise ValueError(f"{n_new} new tokens take {need} positions, but max_len is {room}")
    return lengths
