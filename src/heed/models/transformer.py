"""The translator of Vaswani et al. 2017: an encoder, a decoder that looks back, no recurrence.

Three attentions: the source reads itself, the target reads its own past, the target reads the
source. Blocks are post-norm with ReLU, so no norm follows the last of them. The paper shares one
table among both embeddings and the output; here they are three, for two languages have two
vocabularies.

B sentences · S source positions · T target positions · C width of the stream · H heads ·
L decoder blocks · V target words.
Ids: 0 padding, on the right of a source · 1 begin · 2 end · words from 3.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed import masks
from heed.attention import weights
from heed.blocks import Decoder, PostNorm
from heed.masks import Mask
from heed.positions import sinusoids

PAD, BEGIN, END = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes. `n_layers` blocks on each side; `d_ff` is 4 d_model unless given.

    `max_len` is the longest source, and the longest target with its begin.
    """

    n_source: int
    n_target: int
    max_len: int
    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 64
    d_ff: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        least = {"n_source": 4, "n_target": 4, "max_len": 1, "n_layers": 1, "n_heads": 1}
        for name, low in (
            least | {"d_model": 2} | ({} if self.d_ff is None else {"d_ff": 1})
        ).items():
            n = getattr(self, name)
            if not isinstance(n, int) or n < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {n!r}")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(
                f"d_model must be even, for sine and cosine, and divide into {self.n_heads} heads, "
                f"got {self.d_model}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, C = config, config.d_model
        sizes: dict[str, Any] = {
            "n_heads": config.n_heads,
            "d_ff": config.d_ff,
            "dropout": config.dropout,
        }
        self.source = nn.Embedding(config.n_source, C)
        self.target = nn.Embedding(config.n_target, C)
        self.encoder = nn.ModuleList(PostNorm(C, **sizes) for _ in range(config.n_layers))
        self.decoder = nn.ModuleList(Decoder(C, **sizes) for _ in range(config.n_layers))
        self.head = nn.Linear(C, config.n_target, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        for matrix in (p for p in self.parameters() if p.ndim == 2):
            nn.init.xavier_uniform_(matrix)
        for table in (self.source, self.target):  # times sqrt(C) the entries have variance 1
            nn.init.normal_(table.weight, std=C**-0.5)

    def forward(
        self, source: Int[Tensor, "B S"], target_in: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T V"]:
        """Scores of every next word, given the source and the right words so far."""
        return self.decode(self.encode(source), source, target_in)

    def encode(self, source: Int[Tensor, "B S"]) -> Float[Tensor, "B S C"]:
        """What the decoder may read about every source word. Padding changes nothing."""
        x = self._embed("source", source, self.source)
        real = source != PAD
        if not real[:, 0].all() or (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError(
                "every source begins with a word, and its padding (id 0) is on the right"
            )
        for block in self.encoder:
            x = block(x, mask=_real(source))
        return x

    def decode(
        self,
        memory: Float[Tensor, "B S C"],
        source: Int[Tensor, "B S"],
        target_in: Int[Tensor, "B T"],
        *,
        mask: Mask = masks.causal,
    ) -> Float[Tensor, "B T V"]:
        """All steps at once: each is given the right words before it, whatever it would say."""
        x = self._embed("target_in", target_in, self.target)
        self._check_memory(memory, source, target_in)
        for block in self.decoder:
            x = block(x, memory, mask=mask, memory_mask=_real(source))
        return self.head(x)

    def align(
        self, source: Int[Tensor, "B S"], target_in: Int[Tensor, "B T"]
    ) -> Float[Tensor, "L B H T S"]:
        """What each head of each block takes from each source position. Rows sum to 1."""
        maps: list[Tensor] = []

        def look(cross: Any, asked: tuple[Tensor, ...]) -> None:
            q, k = (
                project(x).unflatten(2, (cross.n_heads, -1)).transpose(1, 2)
                for project, x in zip((cross.q, cross.k), asked, strict=True)
            )
            maps.append(weights(q, k, _real(source)))

        crosses: list[Any] = [block.cross for block in self.decoder]
        hooks = [cross.register_forward_pre_hook(look) for cross in crosses]
        try:
            self(source, target_in)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(maps)

    @torch.no_grad()
    def translate(self, source: Int[Tensor, "B S"], max_len: int) -> Int[Tensor, "B {max_len}"]:
        """The likeliest next word, max_len times over. After a row's end (2) comes padding (0).

        The decoder reads all it has written anew for every word (chapter 23 saves that). Dropout is
        off.
        """
        if not 1 <= max_len <= self.config.max_len:
            raise ValueError(f"max_len must lie in 1 to {self.config.max_len}, got {max_len}")
        training = self.training
        self.eval()
        try:
            memory, ended = self.encode(source), source.new_zeros(len(source)) > 0
            written = source.new_full((len(source), 1 + max_len), PAD)
            written[:, 0] = BEGIN
            for t in range(max_len):
                logits = self.decode(memory, source, written[:, : t + 1])[:, -1]
                word = logits.argmax(-1).masked_fill(ended, PAD)
                written[:, t + 1] = word
                ended = ended | (word == END)
                if ended.all():
                    break
        finally:
            self.train(training)
        return written[:, 1:]

    def _embed(self, name: str, ids: Tensor, table: nn.Embedding) -> Tensor:
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
            raise ValueError(f"{name} must be integers (B, T), got {ids.dtype} {tuple(ids.shape)}")
        if not 0 <= ids.min() <= ids.max() < table.num_embeddings:
            said = f"{name} has ids {ids.min()} to {ids.max()}"
            raise ValueError(f"{said}, but there are {table.num_embeddings} words")
        n, C, most = ids.shape[1], self.config.d_model, self.config.max_len
        if n > most:
            raise ValueError(f"{name} has {n} words, but max_len is {most}")
        x = table(ids) * C**0.5
        return self.dropout(x + sinusoids(n, C, dtype=x.dtype).to(x.device))

    def _check_memory(self, memory: Tensor, source: Tensor, target_in: Tensor) -> None:
        if len(target_in) != len(source):
            raise ValueError(f"{len(source)} sources but {len(target_in)} targets")
        if memory.shape != (*source.shape, self.config.d_model):
            want, got = (*source.shape, self.config.d_model), tuple(memory.shape)
            raise ValueError(f"the memory of this source is {want}, got {got}")


def _real(source: Tensor) -> Mask:
    return masks.padding((source != PAD).sum(1))
