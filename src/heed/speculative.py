"""Several tokens for one pass of the model: a cheap draft guesses, the model checks all at once.

The rule is that of Leviathan et al. (2023) and Chen et al. (2023). The draft drew x from q, the
model would have drawn from p. Keep x with probability min(1, p(x) / q(x)), else draw from the rest
(p - q)+, normalised. What is said then has the distribution p, whatever q is:

    P(y) = q(y) min(1, p(y) / q(y)) + P(refused) (p(y) - q(y))+ / sum (p - q)+
    P(refused) = 1 - sum min(p, q) = sum (p - min(p, q)) = sum (p - q)+
    P(y) = min(p(y), q(y)) + (p(y) - q(y))+ = p(y)

So a bad draft costs time and changes nothing.

T tokens · K drafted tokens · N places that the model judges, K + 1 · M tokens said in one pass ·
V words.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from heed.generation import check_eos, check_filter, check_prompts, filter_logits, read, reading


class Counts(NamedTuple):
    passes: int  # how often the model was asked
    drafted: int
    accepted: int  # of these


class Ngram:
    """Drafts without a model: what followed the last n tokens when they last stood in the text."""

    def __init__(self, n: int) -> None:
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a positive integer, got {n!r}")
        self.n = n

    def __call__(self, text: Int[Tensor, "1 T"], n_draft: int) -> Int[Tensor, "1 K"]:
        """n_draft tokens, or none if these n never stood there before. A loop goes round."""
        ids, n = text[0].tolist(), self.n
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                for place in range(start + n, start + n + n_draft):
                    ids.append(ids[place])
                break
        return text.new_tensor([ids[text.shape[1] :]])


@torch.no_grad()
def speculate(
    model: Any,
    draft: Any,
    ids: Int[Tensor, "1 T"],
    n_new: int,
    *,
    n_draft: int = 4,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "1 T+{n_new}"], Counts]:
    """What `generate` says, in fewer passes of the model; and how many.

    At temperature 0 these are the tokens of `generate`, as far as rounding lets one pass over K + 1
    tokens and K + 1 passes agree on the likeliest; otherwise they are other draws from the same
    distribution. `draft` is a model over the same words, or an `Ngram`. Temperature, k and p apply
    to both. Both keep what they have read if they can, and a cache is cut back to what was
    accepted: a rolling cache, which cannot be, refuses with a ValueError. One text at a time,
    because two would accept different numbers of tokens.
    """
    looks_up = isinstance(draft, Ngram)
    _check(ids, n_draft)
    check_filter(temperature, top_k, top_p)
    for reader in [model] if looks_up else [model, draft]:
        check_prompts(reader, ids, n_new, None)
    if temperature == 0:  # nothing is left to chance, and the global generator is left alone
        generator = torch.Generator(ids.device).manual_seed(0)
    end = ids.shape[1] + n_new
    how = (end, temperature, top_k, top_p)
    large, small = _Reader(model, *how), None if looks_up else _Reader(draft, *how)
    text, ended, passes, drafted, accepted = ids, False, 0, 0, 0
    with reading(model, None), reading(draft, None):
        while text.shape[1] < end and not ended:
            n = min(n_draft, end - text.shape[1] - 1)
            guessed, q = (draft(text, n), []) if small is None else small.draw(text, n, generator)
            p = large.chances(torch.cat([text, guessed], dim=1), guessed.shape[1] + 1)
            check_eos(eos, p.shape[1])
            odds = torch.cat(q) if q else F.one_hot(guessed[0].long(), p.shape[1]).to(p)
            said = accept(p, odds, guessed[0], generator)
            passes, drafted = passes + 1, drafted + guessed.shape[1]
            accepted += len(said) - 1
            if eos is not None and (said == eos).any():
                said, ended = said[: int((said == eos).nonzero()[0]) + 1], True
            text = torch.cat([text, said[None]], dim=1)
            for reader in (large, small):  # of what was drafted, only what was said stays read
                if reader is not None:
                    reader.forget(text.shape[1] - 1)
    text = F.pad(text, (0, end - text.shape[1]), value=0 if eos is None else eos)
    return text, Counts(passes, drafted, accepted)


def accept(
    p: Float[Tensor, "N V"],
    q: Float[Tensor, "K V"],
    drafted: Int[Tensor, " K"],
    generator: torch.Generator | None = None,
) -> Int[Tensor, " M"]:
    """The drafted tokens up to the first that is refused, and one more: from the rest, or from p.

    drafted[n] was drawn from q[n]; p[n] is the model's distribution at that place, and p[K] the
    one after all of them.
    """
    K, V = q.shape
    if p.shape != (K + 1, V) or drafted.shape != (K,):
        shapes = f"{tuple(p.shape)}, {tuple(q.shape)} and {tuple(drafted.shape)}"
        raise ValueError(f"p (K + 1, V), q (K, V) and drafted (K,) do not fit: {shapes}")
    at = drafted.long()[:, None]
    wanted, had = (x.gather(1, at)[:, 0] for x in (p[:K], q))
    if not (had > 0).all():
        raise ValueError(f"drafted {drafted.tolist()} with probabilities {had.tolist()}")
    u = torch.rand(K, dtype=p.dtype, device=p.device, generator=generator)
    n = int((u * had < wanted).cumprod(0).sum())
    rest = (p[n] - q[n]).clamp(min=0) if n < K else p[n]
    # Where p and q differ by rounding alone, a refusal can leave nothing: then they are the same.
    rest = rest if rest.sum() > 0 else p[n]
    new = torch.multinomial(rest, 1, generator=generator)
    return torch.cat([drafted[:n], new.to(drafted.dtype)])


def expected(alpha: float | Fraction, n_draft: int) -> float | Fraction:
    """(1 - a^(k+1)) / (1 - a) tokens a pass, if each draft is kept with chance a on its own.

    It is the sum 1 + a + ... + a^k: the model's own token, and every draft that all before it were
    kept for (Leviathan et al. 2023, equation 1). Exact for a Fraction.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a probability, got {alpha}")
    if not isinstance(n_draft, int) or n_draft < 0:
        raise ValueError(f"n_draft must be an integer, 0 or more, got {n_draft!r}")
    return sum((alpha**n for n in range(1, n_draft + 1)), 1 + 0 * alpha)


class _Reader:
    """A model, what it has read, and how its scores become chances."""

    def __init__(
        self, model: Any, room: int, temperature: float, top_k: int | None, top_p: float | None
    ) -> None:
        self.model = model
        self.cache = model.new_cache(1, room) if hasattr(model, "new_cache") else None
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def chances(self, text: Int[Tensor, "1 T"], n: int) -> Float[Tensor, "n V"]:
        """Of the next token after each of the last n positions; in float64."""
        unread = text if self.cache is None else text[:, self.cache.length :]
        logits = read(self.model, unread, self.cache)[0, -n:]
        t = self.temperature or 1.0
        logits = filter_logits(logits.double(), temperature=t, top_k=self.top_k, top_p=self.top_p)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[1]).to(logits)
        return logits.softmax(-1)

    def draw(
        self, text: Int[Tensor, "1 T"], n: int, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, "1 K"], list[Tensor]]:
        """The next n tokens, and what each was drawn from."""
        length, q = text.shape[1], []
        for _ in range(n):
            q.append(self.chances(text, 1))
            new = torch.multinomial(q[-1], 1, generator=generator)
            text = torch.cat([text, new.to(text.dtype)], dim=1)
        return text[:, length:], q

    def forget(self, n: int) -> None:
        if self.cache is not None and self.cache.length > n:
            self.cache.truncate(n)


def _check(ids: Tensor, n_draft: int) -> None:
    if ids.ndim == 2 and len(ids) > 1:
        raise ValueError(f"one text at a time, got ids {tuple(ids.shape)}")
    if not isinstance(n_draft, int) or n_draft < 1:
        raise ValueError(f"n_draft must be a positive integer, got {n_draft!r}")
