"""Copy, reverse, sort, add: one right answer each, so the loss of a perfect model is 0.

A text is a prompt and its answer, `312:123`. The digits of a prompt are drawn evenly and cannot be
predicted: each costs ln 10 nats. The answer follows from the prompt and costs nothing. So only the
answer has targets; those of the prompt are -100, which the loss passes over.

B texts · T tokens. A shape names the part of a text: "prompt" (the colon included), "answer", and
"text" for both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

DIGITS = "0123456789"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Draws prompts and knows their answers."""

    form: str  # a prompt with # for each digit: "##+##:"
    answer_len: int  # tokens
    solve: Callable[[Tensor], Tensor]  # digits of the prompts to answers: (B, digits), (B, answer)

    floor = 0.0  # nats per target: an answer holds no surprise

    @property
    def vocab(self) -> str:
        """The symbol of each id; a digit is its own id, the colon is 10."""
        return DIGITS + ":+" if "+" in self.form else DIGITS + ":"

    @property
    def prompt_len(self) -> int:
        return len(self.form)

    @property
    def prompt_nats(self) -> float:
        """n ln 10 for n digits: the entropy of a whole prompt. No model can go below it."""
        return self.form.count("#") * math.log(10)

    def prompt(self, n: int, generator: torch.Generator) -> Int64[Tensor, "n prompt"]:
        """n prompts, digits even and independent: what generation starts from."""
        _positive("n", n)
        frame = self.encode(self.form.replace("#", "0")).repeat(n, 1)
        frame[:, self._slots] = torch.randint(10, (n, self.form.count("#")), generator=generator)
        return frame

    def answer(self, prompt: Int64[Tensor, "B prompt"]) -> Int64[Tensor, "B answer"]:
        """The right answers."""
        self._check(prompt, (len(prompt), self.prompt_len))
        frame = self.encode(self.form.replace("#", "0"))
        for row in torch.where(self._slots, prompt > 9, prompt != frame).any(1).nonzero()[:1, 0]:
            raise ValueError(f"a prompt looks like {self.form!r}, got {self.decode(prompt[row])!r}")
        return self.solve(prompt[:, self._slots])

    def batch(
        self, n: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "n T"], Int64[Tensor, "n T"]]:
        """Inputs and their next tokens, T = prompt + answer - 1; targets in the prompt are -100."""
        prompt = self.prompt(n, generator)
        ids = torch.cat([prompt, self.answer(prompt)], dim=1)
        targets = ids[:, 1:].clone()
        targets[:, : self.prompt_len - 1] = -100  # the colon is the first to be asked for a digit
        return ids[:, :-1], targets

    def exact(self, ids: Int64[Tensor, "B text"]) -> Bool[Tensor, " B"]:
        """Is the whole answer right? `ids` are prompts and what a model wrote after them."""
        self._check(ids, (len(ids), self.prompt_len + self.answer_len))
        prompt, written = ids[:, : self.prompt_len], ids[:, self.prompt_len :]
        return (written == self.answer(prompt)).all(dim=1)

    def encode(self, text: str) -> Int64[Tensor, " T"]:
        """Ids of the symbols of a text such as "312:"."""
        unknown = sorted(set(text) - set(self.vocab))
        if unknown:
            raise ValueError(f"not in the vocabulary {self.vocab!r}: {unknown}")
        return torch.tensor([self.vocab.index(symbol) for symbol in text], dtype=torch.int64)

    def decode(self, ids: Int64[Tensor, " T"]) -> str:
        """The symbols of one text: "312:123"."""
        self._check(ids, (len(ids),))
        return "".join(self.vocab[i] for i in ids.tolist())

    @property
    def _slots(self) -> Tensor:
        return torch.tensor([symbol == "#" for symbol in self.form])

    def _check(self, ids: Tensor, shape: tuple[int, ...]) -> None:
        if ids.dtype != torch.int64 or ids.shape != shape:
            raise ValueError(f"ids must be int64 {shape}, got {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and not 0 <= ids.min() <= ids.max() < len(self.vocab):
            low, high = ids.min().item(), ids.max().item()
            raise ValueError(f"ids from {low} to {high}, but the vocabulary has {len(self.vocab)}")


def copy(length: int) -> Task:
    """`312:312`."""
    _positive("length", length)
    return Task(form="#" * length + ":", answer_len=length, solve=torch.clone)


def reverse(length: int) -> Task:
    """`312:213`."""
    _positive("length", length)
    return Task(form="#" * length + ":", answer_len=length, solve=lambda digits: digits.flip(1))


def sort(length: int) -> Task:
    """`312:123`, equal digits kept."""
    _positive("length", length)
    return Task(
        form="#" * length + ":", answer_len=length, solve=lambda digits: digits.sort(1).values
    )


def add(length: int) -> Task:
    """`31+92:321`: two numbers of `length` digits and their sum, least significant digit first.

    A carry moves up from the least digit. In this order each digit needs two digits of the prompt
    and the carry of the step before. The usual order asks for the first digit first, and that one
    may depend on all the others (`4999+5001`) before any of them is on paper.
    """
    _positive("length", length)
    return Task(form="+".join(["#" * length] * 2) + ":", answer_len=length + 1, solve=_sum)


def _sum(digits: Tensor) -> Tensor:
    columns = [d.sum(1) for d in digits.unflatten(1, (2, -1)).flip(2).unbind(2)]
    carry, answer = torch.zeros_like(columns[0]), []
    for column in columns:
        answer.append((column + carry) % 10)
        carry = (column + carry) // 10
    return torch.stack([*answer, carry], dim=1)


def _positive(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
