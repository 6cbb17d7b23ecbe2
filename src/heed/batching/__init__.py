"""Many requests, one model, one pool of pages: every step reads what every request needs next.

`Scheduler` plans a step, and `Engine` has the model read it. Pages after Kwon et al. (2023).

T tokens of a prompt · R requests that speak · V words.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.batching.scheduler import Job, Plan, Scheduler
from heed.cache.paged import Packed, PagedKVCache
from heed.flash import decode
from heed.generation import attending, check_eos, check_filter, choose

__all__ = ["Engine", "Job", "Plan", "Scheduler"]


class Engine:
    """Requests in, tokens out: every request says what it would say alone.

    Each step is one row of tokens, the stretches of all requests behind each other. Attention reads
    each stretch's own pages; all other layers treat every token alone and need no telling.
    """

    def __init__(
        self,
        model: Any,
        *,
        n_pages: int,
        page_len: int,
        max_rows: int,
        max_tokens: int,
        policy: str = "chunked",
    ) -> None:
        c, like = model.config, next(model.parameters())
        self.pool = PagedKVCache(
            c.n_layers,
            c.n_heads,
            c.d_model // c.n_heads,
            page_len=page_len,
            n_pages=n_pages,
            dtype=like.dtype,
            device=like.device,
        )
        self.scheduler = Scheduler(
            self.pool.ledger, max_rows=max_rows, max_tokens=max_tokens, policy=policy
        )
        self.model = attending(model, decode.packed).eval()
        self.config, self.device = c, like.device
        self._draws: dict[Job, tuple[float, torch.Generator]] = {}
        self._ended: dict[int, Job] = {}

    def submit(
        self,
        ids: Int[Tensor, " T"],
        n_new: int,
        *,
        eos: int | None = None,
        temperature: float = 0.0,
        random_seed: int | None = None,
    ) -> int:
        """The request's number. It says n_new tokens, or fewer if it says `eos`."""
        V, room = self.config.vocab_size, self.config.max_len
        if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"a prompt is integers (T,), got {ids.dtype} {tuple(ids.shape)}")
        if len(ids) and not 0 <= ids.min() <= ids.max() < V:
            raise ValueError(f"ids {ids.min()} to {ids.max()}, but vocab_size is {V}")
        check_eos(eos, V)
        check_filter(temperature, None, None)
        if temperature and random_seed is None:
            raise ValueError("who draws needs a random_seed: others draw in between")
        if isinstance(n_new, int) and len(ids) + n_new - 1 > room:
            raise ValueError(f"{len(ids)} tokens and {n_new} new ones, but max_len is {room}")
        generator = torch.Generator(self.device)
        if random_seed is not None:
            generator.manual_seed(random_seed)
        job = self.scheduler.submit(ids.tolist(), n_new, eos=eos)
        if temperature:
            self._draws[job] = temperature, generator
        return job.number

    def step(self) -> list[tuple[int, int]]:
        """One pass of the model: who said which token. Nobody, if there is nothing to do."""
        return self.read(self.scheduler.plan())

    @torch.no_grad()
    def read(self, plan: Plan) -> list[tuple[int, int]]:
        """What the scheduler has just planned."""
        if not plan.stretches:
            return []
        jobs, counts = list(plan.stretches), list(plan.stretches.values())
        ids = [id for job, n in plan.stretches.items() for id in job.text[job.read :][:n]]
        try:
            row = torch.tensor([ids], device=self.device)
            logits = self.model(row, cache=Packed(self.pool, [job.seq for job in jobs], counts))[0]
            ends = dict(zip(jobs, accumulate(counts), strict=True))
            said = self._say(plan.speakers, logits[[ends[job] - 1 for job in plan.speakers]])
        except BaseException:  # as if nothing had been read: the step can be taken again
            for job in jobs:
                self.pool.truncate(job.seq, job.read)
            raise
        for job in self.scheduler.commit(plan, said):
            self._ended[job.number] = job
            self._draws.pop(job, None)
        return [(job.number, token) for job, token in said.items()]

    def run(self) -> dict[int, Int[Tensor, " T"]]:
        """Step until nobody waits; prompt and new tokens of all that ended since the last run."""
        while self.scheduler.waiting or self.scheduler.running:
            self.step()
        ended, self._ended = self._ended, {}
        return {n: torch.tensor(job.text) for n, job in sorted(ended.items())}

    def _say(self, jobs: Sequence[Job], logits: Float[Tensor, "R V"]) -> dict[Job, int]:
        if not jobs:
            return {}
        likeliest = choose(logits, 0.0, None, None, None)
        said = dict(zip(jobs, likeliest.tolist(), strict=True))
        for job, row in zip(jobs, logits, strict=True):
            if job in self._draws:
                temperature, generator = self._draws[job]
                said[job] = int(choose(row[None], temperature, None, None, generator))
        return said
