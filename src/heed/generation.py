"""From scores of the next token to text: greedy or drawn, from the top k, from the top p, by beam.

Works with any causal `model(ids) -> logits`. B prompts · T tokens in each · V words.
N axes of any number and kind.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.cache.ragged import Ragged, swappable, twin


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
    check_filter(temperature, top_k, top_p)
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
    cache: Any = None,
) -> Int[Tensor, "B T+{n_new}"]:
    """The prompts and n_new tokens after each; temperature 0 takes the likeliest.

    A row that has said `eos` says nothing else: the rest of it is `eos`. With `lengths`, prompt b
    is the first lengths[b] tokens of its row, its new tokens follow these at once, and each row
    comes out as if it were alone: no attention mask, no padding on the left. Behind a row stands
    `eos`, or else the row's last id. The model reads in eval mode, and gets its own mode back.

    `cache` has read the first `cache.length` tokens of every row, and these are not read again: a
    turn of a talk goes on where the last one ended, and a prompt that sequences of a paged pool
    share by `fork` is read once for all of them. It is left with all that was said but the last.
    """
    check_filter(temperature, top_k, top_p)
    ends = check_prompts(model, ids, n_new, lengths)
    if cache is not None and (lengths is not None or not use_cache):
        raise ValueError("a cache of your own goes with use_cache and prompts of one length")
    if cache is not None and cache.length >= ids.shape[1]:
        kept = f"the cache has read {cache.length} tokens"
        raise ValueError(f"{kept} of a prompt of {ids.shape[1]}: the last one must be left to read")
    given, ragged = cache, bool(ends.min() < ends.max())
    if use_cache and cache is None and hasattr(model, "new_cache"):
        if not ragged:
            cache = model.new_cache(len(ids), int(ends[0]) + n_new)
        elif swappable(model):
            cache = Ragged([model.new_cache(1, n + n_new) for n in ends.tolist()], ends.tolist())
            model = twin(model, cache.each)
    text = torch.cat([ids, ids[:, -1:].expand(-1, n_new)], dim=1)
    rows, places = torch.arange(len(ids), device=ids.device), torch.arange(text.shape[1]).to(ids)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    with reading(model, given):
        for n in range(n_new):
            if cache is None or (ragged and n == 0):
                # A causal model never sees what is to its right: padding there has no influence.
                padding = places[: ends.max()] >= ends[:, None]
                known = text[:, : ends.max()].masked_fill(padding, 0)
                logits = read(model, known, cache)[rows, ends - 1]
            else:
                unread = text[rows, ends - 1][:, None] if n else text[:, cache.length : ends[0]]
                logits = read(model, unread, cache)[:, -1]
            check_eos(eos, logits.shape[-1])
            new = choose(logits, temperature, top_k, top_p, generator).to(ids.dtype)
            text[rows, ends] = new if eos is None else new.masked_fill(ended, eos)
            ends = ends + 1
            ended |= new == eos
            if ended.all():
                break
    return text if eos is None else text.masked_fill(places >= ends[:, None], eos)


@torch.no_grad()
def prefill(
    model: Any, ids: Int[Tensor, "B T"], cache: Any, *, chunk: int | None = None
) -> Float[Tensor, "B V"]:
    """Read ids into the cache, `chunk` tokens at a time or all at once; the next token's logits.

    Chunks bound what attention keeps at once, and let others have their turn in between (Agrawal
    et al. 2024); what comes back is the same. In eval mode, as `generate`.
    """
    check_prompts(model, ids, 1, None, cache.length)
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be a positive integer, got {chunk!r}")
    with reading(model, cache):
        for part in ids.split(chunk or ids.shape[1], dim=1):
            logits = read(model, part, cache)
    return logits[:, -1]


def attending(model: nn.Module, attend: Callable[..., Tensor]) -> Any:
    """A twin that shares every weight with the model, and whose attention is `attend`.

    `attend` takes what the model's own attention takes: (q, k, v, dropout) in `heed.gpt`, where q
    are the newest of the positions of k, or whatever else a cache hands back instead of k and v.
    The model itself does not change; its weights may, and then the twin's are these.
    """
    return twin(model, lambda _: attend)


@contextmanager
def reading(model: Any, cache: Any) -> Iterator[None]:
    """Eval mode meanwhile. After a refused call the cache has read what it had read before."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    modes = {module: module.training for module in modules}
    start = 0 if cache is None else cache.length
    try:
        for module in modes:
            module.training = False
        yield
    except ValueError:
        if cache is not None:
            cache.truncate(start)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode


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
    check_eos(eos, logits.shape[1])
    return logits


def _check_beam(start: Tensor, n_new: int, width: int, alpha: float) -> None:
    check_prompts(None, start, n_new, None)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a positive integer, got {width!r}")
    if not 0 <= alpha < math.inf:  # below 0 a longer text would be worse still: no bound holds
        raise ValueError(f"alpha must be 0 or more and finite, got {alpha}")


def read(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    logits = model(ids) if cache is None else model(ids, cache=cache)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        shapes = f"{tuple(ids.shape)} gave {tuple(logits.shape)}"
        raise ValueError(f"a model makes (B, T) into (B, T, V), but ids {shapes}")
    return logits


def choose(
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


def check_eos(eos: int | None, n_words: int) -> None:
    if eos is not None and not 0 <= eos < n_words:
        raise ValueError(f"eos is {eos}, but there are {n_words} words")


def check_filter(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def check_prompts(
    model: Any, ids: Tensor, n_new: int, lengths: Tensor | None, kept: int = 0
) -> Tensor:
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
    need = kept + int(lengths.max()) + n_new - 1  # the last new token is never read
    if need > room:
        raise ValueError(f"{n_new} new tokens take {need} positions, but max_len is {room}")
    return lengths
