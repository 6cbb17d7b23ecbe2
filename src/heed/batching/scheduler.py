"""Who reads what in the next step, and whose pages have to go: bookkeeping without a tensor.

A request is a prompt and a number of new tokens. Three policies:

- "static": a batch starts when the one before has ended, last request and all;
- "continuous": who waits starts when a row and pages are free (Yu et al. 2022). New prompts are
  read whole, in a step of their own; in the other steps every row says a token;
- "chunked": every row says a token in every step, and what is left of the step's tokens goes to
  prompts, in pieces (Agrawal et al. 2024).
"""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from heed.cache import check_sizes
from heed.cache.ledger import Ledger

POLICIES = ("static", "continuous", "chunked")


@dataclass(eq=False)
class Job:
    """One request: the first `read` tokens of its text are in the pages of `seq`."""

    number: int
    text: list[Hashable]  # the prompt, and behind it what has been said
    n_prompt: int
    n_new: int
    eos: Hashable = None
    read: int = 0
    seq: int = -1  # its sequence in the ledger, or -1

    @property
    def unread(self) -> int:
        return len(self.text) - self.read

    @property
    def ended(self) -> bool:
        said = len(self.text) - self.n_prompt
        return said == self.n_new or said > 0 and self.eos is not None and self.text[-1] == self.eos


@dataclass(frozen=True)
class Plan:
    """One step: who reads how many tokens. And what had to happen before."""

    stretches: dict[Job, int]
    started: dict[Job, int]  # with how many positions that others had read
    preempted: list[Job]
    evicted: list[Job]

    @property
    def speakers(self) -> list[Job]:
        """Whose text is read to its end: the logits there say the next token."""
        return [job for job, n in self.stretches.items() if n == job.unread]


class Scheduler:
    """First come, first served, over the pages of one ledger; the oldest request never stops.

    Who starts is promised the pages of its whole text, and later one more whenever its text
    outgrows them. If there are too few, what ended requests have left goes first, the least
    recently used first; then the youngest gives up all its pages. When there are pages again, it
    reads again all that it had read and said.
    """

    def __init__(
        self, ledger: Ledger, *, max_rows: int, max_tokens: int, policy: str = "chunked"
    ) -> None:
        check_sizes(max_rows=max_rows, max_tokens=max_tokens)
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
        self.ledger, self.policy = ledger, policy
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # the oldest first
        self.kept: list[Job] = []  # ended, with whole pages left; the least recently used first
        self.submitted = 0

    def submit(self, prompt: Sequence[Hashable], n_new: int, *, eos: Hashable = None) -> Job:
        """Put a request at the end of the line."""
        if not isinstance(n_new, int) or n_new < 1 or not len(prompt):
            got = f"{len(prompt)} and {n_new!r}"
            raise ValueError(f"a request has a prompt and asks for new tokens, got {got}")
        asked, most = f"{len(prompt)} tokens and {n_new} new ones", len(prompt) + n_new - 1
        pages, room = self.ledger.pages_of(most), self.ledger.n_pages  # the last is never read
        if pages > room:
            raise ValueError(f"{asked} take {pages} pages, but the pool has {room}")
        if self.policy != "chunked" and most > self.max_tokens:
            raise ValueError(f"{asked} may be read in one step, but max_tokens={self.max_tokens}")
        job = Job(self.submitted, list(prompt), len(prompt), n_new, eos)
        self.submitted += 1
        self.waiting.append(job)
        return job

    def plan(self) -> Plan:
        """What the next step reads. Whoever reads it fills the pages; then `commit` counts it."""
        plan = Plan({}, {}, [], [])
        self._make_room(plan)
        if not plan.preempted:  # who has to go does not come back in the same step
            self._admit(plan)
        turns = sorted(self.running, key=lambda job: job.unread > 1)  # who speaks comes first
        if self.policy != "chunked":
            turns = self._prompts() or turns
        left = self.max_tokens
        for job in turns:
            if n := min(job.unread, left):
                plan.stretches[job] = n
                left -= n
        return plan

    def commit(self, plan: Plan, said: Mapping[Job, Hashable]) -> list[Job]:
        """The plan has been read, and its speakers have said this; back come those that end."""
        if said.keys() != set(plan.speakers):
            raise ValueError(f"{len(plan.speakers)} requests speak, but {len(said)} tokens came")
        for job, n in plan.stretches.items():
            if job.seq < 0 or self.ledger.find(job.seq).length != job.read + n:
                raise ValueError(f"request {job.number} has not read the {n} tokens of the plan")
        for job, n in plan.stretches.items():
            job.read += n
            job.text += [said[job]] if job in said else []
        ended = [job for job in plan.stretches if job.ended]
        for job in ended:
            self.running.remove(job)
            self._keep(job)
        return ended

    def _make_room(self, plan: Plan) -> None:
        """No more promises than free pages."""
        while self._promised() > self.ledger.free_pages:
            if self.kept:
                plan.evicted.append(self.kept.pop(0))
                self._free(plan.evicted[-1])
            else:
                plan.preempted.append(self.running.pop())
                self._free(plan.preempted[-1])
                self.waiting.appendleft(plan.preempted[-1])

    def _admit(self, plan: Plan) -> None:
        """Start who waits, while there are rows, tokens of this step and pages."""
        if self.policy == "static" and self.running:
            return
        while self.waiting and len(self.running) < self.max_rows:
            job = self.waiting[0]
            donor, shared = self._donor(job)
            tokens = len(job.text) - shared + sum(other.unread for other in self._prompts())
            if self.policy == "chunked":  # a stretch may be as short as one token
                tokens = 1 + sum(other.unread for other in self.running)
            if tokens > self.max_tokens or not self._fits(job, donor, shared):
                break
            job.seq = self.ledger.fork(donor.seq, shared) if donor else self.ledger.new()
            job.read = plan.started[job] = shared
            if donor in self.kept:  # it has been used: it goes last
                self.kept.remove(donor)
                self.kept.append(donor)
            self.running.append(self.waiting.popleft())
            self._make_room(plan)

    def _prompts(self) -> list[Job]:
        return [job for job in self.running if job.unread > 1]

    def _donor(self, job: Job) -> tuple[Job | None, int]:
        """Who has read the longest beginning of this text, in whole pages, and its length.

        The last token is always read: its logits say the next one.
        """
        best, most = None, 0
        for other in (*self.kept, *self.running):
            n, end = 0, min(other.read, len(job.text) - 1)
            while (next := n + self.ledger.page_len) <= end:
                if other.text[n:next] != job.text[n:next]:
                    break
                n = next
            if n > most:
                best, most = other, n
        return best, most

    def _fits(self, job: Job, donor: Job | None, shared: int) -> bool:
        """Are there pages, if all goes that nobody running holds?"""
        first = self._pages(donor)[: self.ledger.pages_of(shared)] if donor else []
        held = {page for other in self.running for page in self._pages(other)} | set(first)
        more = self.ledger.pages_of(len(job.text)) - len(first)
        return len(held) + self._promised() + more <= self.ledger.n_pages

    def _promised(self) -> int:
        """Pages that the texts of the running take beyond those that they hold."""
        need = (self.ledger.pages_of(len(job.text)) - len(self._pages(job)) for job in self.running)
        return sum(need)

    def _pages(self, job: Job) -> list[int]:
        return self.ledger.find(job.seq).pages

    def _keep(self, job: Job) -> None:
        """Leave the whole pages of an ended request to those who begin with the same words."""
        page_len = self.ledger.page_len
        job.read = job.read // page_len * page_len
        self.ledger.truncate(job.seq, job.read)
        pages = self._pages(job)
        if pages and self.ledger.counts[pages[-1]] == 1:
            self.kept.append(job)
        else:  # nothing is left, or somebody else has it all
            self._free(job)

    def _free(self, job: Job) -> None:
        self.ledger.free(job.seq)
        job.seq, job.read = -1, 0
