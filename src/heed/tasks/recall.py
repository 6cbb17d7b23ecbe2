"""Recall at a distance: one symbol to bring back, and everything else in the text is noise.

A text ends with a question, and only the question has a target. Two ways to ask:

    Marked   d a f C b e ?       which symbol is marked                   found by what it is
    Ago      d a f c b e 3?      which symbol stood three places ago      found by where it is

Symbols are drawn evenly, so guessing is right once in n_symbols; the answer is in the text, so the
loss of a perfect model is 0. B texts · T tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn

Distance = int | Int64[Tensor, " B"] | None


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What the two have in common. `longest` is the largest distance that is asked for."""

    longest: int
    n_symbols: int = 8

    floor = 0.0  # nats per question

    def __post_init__(self) -> None:
        if self.longest < 1 or self.n_symbols < 2:
            got = f"longest {self.longest} and n_symbols {self.n_symbols}"
            raise ValueError(f"a text needs one place and two symbols or more, got {got}")

    @property
    def length(self) -> int:
        """Tokens of a text, the question included."""
        return self.longest + 1

    @property
    def vocab_size(self) -> int:
        raise NotImplementedError

    def batch(
        self, n: int, generator: torch.Generator, distance: Distance = None
    ) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
        """n texts and their targets: the answer at the question, -100 everywhere else.

        `distance` is one for all texts, or one for each; None draws them evenly from 1 to longest.
        """
        if n < 1:
            raise ValueError(f"a batch holds at least one text, got {n}")
        ids, answers = self._ask(self._distances(n, generator, distance), generator)
        targets = torch.full_like(ids, -100)
        targets[:, -1] = answers
        return ids, targets

    @torch.no_grad()
    def accuracy(
        self, model: nn.Module, distance: Distance, *, n: int, generator: torch.Generator
    ) -> float:
        """Share of n questions that `model(ids) -> logits (B, T, V)` answers, at a distance."""
        ids, targets = self.batch(n, generator, distance)
        mode = model.training
        try:
            said = model.eval()(ids)[:, -1].argmax(-1)
        finally:
            model.train(mode)
        return (said == targets[:, -1]).double().mean().item()

    def _ask(self, back: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Texts that ask so far back, and their answers."""
        raise NotImplementedError

    def _distances(self, n: int, generator: torch.Generator, distance: Distance) -> Tensor:
        if distance is None:
            return torch.randint(1, self.longest + 1, (n,), generator=generator)
        back = torch.as_tensor(distance)
        if back.dtype != torch.int64 or back.shape not in ((), (n,)):
            got = f"{back.dtype} {tuple(back.shape)}"
            raise ValueError(f"distance is one integer or int64 of shape ({n},), got {got}")
        if not 1 <= back.min() <= back.max() <= self.longest:
            low, high = back.min().item(), back.max().item()
            raise ValueError(f"distances are 1 to {self.longest}, got {low} to {high}")
        return back.expand(n)

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.n_symbols, (n, self.longest), generator=generator)


class Marked(Recall):
    """One symbol is written in another hand, as id + n_symbols; the last id asks for it."""

    @property
    def vocab_size(self) -> int:
        return 2 * self.n_symbols + 1

    def _ask(self, back: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        text = self._noise(len(back), generator)
        rows, place = torch.arange(len(back)), self.longest - back
        answers = text[rows, place]
        text[rows, place] += self.n_symbols
        question = torch.full((len(back), 1), 2 * self.n_symbols)
        return torch.cat([text, question], 1), answers


class Ago(Recall):
    """The question is a distance, as id n_symbols + distance - 1; any symbol may be asked for."""

    @property
    def vocab_size(self) -> int:
        return self.n_symbols + self.longest

    def _ask(self, back: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        text = self._noise(len(back), generator)
        answers = text[torch.arange(len(back)), self.longest - back]
        return torch.cat([text, self.n_symbols + back[:, None] - 1], 1), answers
