"""A GRU reads, a GRU writes: sequence to sequence with one fixed vector, or with attention.

Fixed vector: the encoder's last state starts the decoder (Sutskever et al. 2014), or is read again
at every step (Cho et al. 2014). Attention: a new context for every step, scored before the step
(additive, Bahdanau et al. 2015) or after it (dot and general, Luong et al. 2015, global attention
without input feeding).

B sentences · S source positions · T target positions · C width of the states · V target words.
Ids: 0 padding, on the right of a source · 1 begin · 2 end · words from 3.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from heed.attention import softmax

PAD, BEGIN, END = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Sizes, who looks back, and what the decoder starts from.

    start: "bridge" a learned tanh(W h + b) of the summary · "copy" the summary itself · "mean" the
    mean of the encoder's states · "zero". `feed`: every step reads the summary, not only the start.
    `bidirectional`: half of the width reads from the right, as Bahdanau's encoder does.
    """

    n_source: int
    n_target: int
    d_embed: int = 16
    d_model: int = 64
    attention: str | None = None  # "additive" | "dot" | "general"
    start: str = "bridge"  # "copy" | "mean" | "zero"
    feed: bool = False
    bidirectional: bool = False

    def __post_init__(self) -> None:
        for name, least in {"n_source": 4, "n_target": 4, "d_embed": 1, "d_model": 1}.items():
            n = getattr(self, name)
            if not isinstance(n, int) or n < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {n!r}")
        if self.attention not in (None, "additive", "dot", "general"):
            raise ValueError(f"attention is None, additive, dot or general, got {self.attention!r}")
        if self.start not in ("bridge", "copy", "mean", "zero"):
            raise ValueError(f"start is bridge, copy, mean or zero, got {self.start!r}")
        if self.feed and self.attention is not None:
            raise ValueError(f"feed repeats the summary; {self.attention!r} brings its own context")
        if self.bidirectional and self.d_model % 2:
            raise ValueError(f"two directions share d_model, so it must be even: {self.d_model}")


class Memory(NamedTuple):
    """What the encoder hands over. Without attention the decoder sees `summary` alone."""

    summary: Float[Tensor, "B C"]  # last state of each direction
    states: Float[Tensor, "B S C"]  # 0 at padding
    keys: Float[Tensor, "B S C"]  # the states as the score compares them, made once
    readable: Bool[Tensor, "B S"]


class Seq2Seq(nn.Module):
    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config, E, C = config, config.d_embed, config.d_model
        each_step = config.feed or config.attention == "additive"  # a context enters the GRU
        self.source = nn.Embedding(config.n_source, E)
        self.target = nn.Embedding(config.n_target, E)
        half = C // 2 if config.bidirectional else C
        self.encoder = nn.GRU(E, half, batch_first=True, bidirectional=config.bidirectional)
        self.decoder = nn.GRU(E + C if each_step else E, C, batch_first=True)
        if config.start == "bridge":
            self.bridge = nn.Linear(C, C)
        if config.attention in ("additive", "general"):
            self.key = nn.Linear(C, C, bias=False)
        if config.attention == "additive":
            self.query = nn.Linear(C, C, bias=False)
            self.score = nn.Parameter(torch.empty(C).uniform_(-(C**-0.5), C**-0.5))
        if config.attention in ("dot", "general"):
            self.mix = nn.Linear(2 * C, C, bias=False)
        self.head = nn.Linear(2 * C if each_step else C, config.n_target)

    def forward(
        self, source: Int[Tensor, "B S"], target_in: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T V"]:
        """Scores of every next word, given the source and the right words so far."""
        return self.decode(self.encode(source), target_in)

    def encode(self, source: Int[Tensor, "B S"]) -> Memory:
        """Read the source. Padding changes nothing."""
        _check("source", source, self.config.n_source)
        readable = source != PAD
        if not readable[:, :1].all() or (readable[:, 1:] & ~readable[:, :-1]).any():
            raise ValueError(
                "every source begins with a word, and its padding (id 0) is on the right"
            )
        x = self.source(source)
        if readable.all():
            states, last = self.encoder(x)
        else:
            lengths = readable.sum(1).cpu()
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            states, last = self.encoder(packed)
            states, _ = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
        keys = self.key(states) if hasattr(self, "key") else states
        return Memory(torch.cat(last.unbind(), dim=-1), states, keys, readable)

    def decode(self, memory: Memory, target_in: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Teacher forcing: each step is given the right word before it, whatever it would say."""
        features, _, _ = self._forced(memory, target_in)
        return self.head(features)

    def start(self, memory: Memory) -> Float[Tensor, "B C"]:
        """The decoder's state before its first step."""
        if self.config.start == "bridge":
            return torch.tanh(self.bridge(memory.summary))
        if self.config.start == "mean":
            return memory.states.sum(1) / memory.readable.sum(1, keepdim=True)
        return memory.summary if self.config.start == "copy" else torch.zeros_like(memory.summary)

    def align(
        self, source: Int[Tensor, "B S"], target_in: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T S"]:
        """What each target step takes from each source position. Rows sum to 1."""
        _, _, weights = self._forced(self.encode(source), target_in)
        if weights is None:
            raise ValueError("a model without attention has no weights to show")
        return weights

    @torch.no_grad()
    def translate(self, source: Int[Tensor, "B S"], max_len: int) -> Int[Tensor, "B {max_len}"]:
        """The likeliest next word, max_len times over. After a row's end (2) comes padding (0)."""
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, got {max_len}")
        memory = self.encode(source)
        state, written = self.start(memory), source.new_full((len(source), max_len), PAD)
        word, ended = source.new_full((len(source), 1), BEGIN), source.new_zeros(len(source)) > 0
        for t in range(max_len):
            features, state, _ = self._steps(memory, state, word)
            word = self.head(features).argmax(-1).masked_fill(ended[:, None], PAD)
            written[:, t] = word[:, 0]
            ended = ended | (word[:, 0] == END)
            if ended.all():
                break
        return written

    def _forced(self, memory: Memory, target_in: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        _check("target_in", target_in, self.config.n_target)
        if len(target_in) != len(memory.summary):
            raise ValueError(f"{len(memory.summary)} sources but {len(target_in)} targets")
        return self._steps(memory, self.start(memory), target_in)

    def _steps(
        self, memory: Memory, state: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the head reads (B, T, .), the state after the last step, the weights (B, T, S)."""
        x, kind = self.target(ids), self.config.attention
        if kind == "additive":
            return self._look_then_step(memory, state, x)
        if self.config.feed:
            context = memory.summary[:, None].expand(-1, x.shape[1], -1)
            x = torch.cat([x, context], dim=-1)
        out, last = self.decoder(x, state[None].contiguous())
        if kind is None:
            return torch.cat([out, context], -1) if self.config.feed else out, last[0], None
        weights = _shares(out @ memory.keys.mT, memory.readable[:, None])
        both = torch.cat([weights @ memory.states, out], dim=-1)
        return torch.tanh(self.mix(both)), last[0], weights

    def _look_then_step(
        self, memory: Memory, state: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bahdanau: the state *before* a step asks, and the context enters the step."""
        features, rows = [], []
        for word in words.unbind(1):
            scores = torch.tanh(self.query(state)[:, None] + memory.keys) @ self.score  # (B, S)
            weights = _shares(scores, memory.readable)
            context = (weights[:, None] @ memory.states)[:, 0]
            x = torch.cat([word, context], dim=-1)
            state = torch.gru_cell(x, state, *self.decoder.all_weights[0])
            features.append(torch.cat([state, context], dim=-1))
            rows.append(weights)
        return torch.stack(features, 1), state, torch.stack(rows, 1)


def _shares(scores: Tensor, readable: Tensor) -> Tensor:
    return softmax(scores.masked_fill(~readable, -torch.inf))


def _check(name: str, ids: Tensor, n_words: int) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise ValueError(f"{name} must be integers (B, T), got {ids.dtype} {tuple(ids.shape)}")
    if not 0 <= ids.min() <= ids.max() < n_words:
        raise ValueError(
            f"{name} has ids {ids.min()} to {ids.max()}, but there are {n_words} words"
        )
