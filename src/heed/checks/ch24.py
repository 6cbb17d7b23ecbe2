"""Chapter 24, serving: `problem`, a machine, a draft and a page table for paper, and the checks of
its seven tasks.

p of the model and q of the draft, lists of probabilities · a page has `page_len` slots · a step
writes one token of every text in a row.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Generator, randint

from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, several, shown
from heed.roofline import Cost, Machine, Number

MUTANTS = mutants(__file__)


# A problem for paper


@dataclass(frozen=True, repr=False)
class Problem:
    """What a token costs on a slow machine; what becomes of a draft; where three texts lie."""

    machine: Machine
    numbers: int  # weights, of 2 bytes each
    kept: int  # bytes of cache for each token that was read
    prompt: int  # tokens
    rows: int  # texts that are written together,
    read: int  # of so many tokens each
    p: tuple[int, ...]  # of the model, in twelfths
    q: tuple[int, ...]  # of the draft
    drafted: int
    page: int  # slots
    lengths: tuple[int, int, int]  # of texts A, B and C
    more: int  # tokens that A writes when B has ended
    room: int  # slots that each text has if room is reserved

    @property
    def costs(self) -> dict[str, Cost]:
        """Reading the prompt without its attention; one step of all texts, with a FLOP for each
        byte of cache."""
        bytes_of_weights, cache = 2 * self.numbers, self.rows * self.read * self.kept
        return {
            "read": Cost(self.prompt * bytes_of_weights, bytes_of_weights),
            "write": Cost(self.rows * bytes_of_weights + cache, bytes_of_weights + cache),
        }

    @property
    def tables(self) -> dict[str, tuple[int, ...]]:
        """The pages of A and C at the end."""
        a, b, c = (-(-n // self.page) for n in self.lengths)
        grown = -(-(self.lengths[0] + self.more) // self.page)
        free = [*range(a, a + b), *range(a + b + c, a + b + c + grown)]
        return {"A": (*range(a), *free[: grown - a]), "C": tuple(range(a + b, a + b + c))}

    @property
    def answer(self) -> dict[str, Any]:
        """Exact fractions, and tuples of them or of pages."""
        read, write = self.costs["read"], self.costs["write"]
        alpha = Fraction(sum(map(min, self.p, self.q)), 12)
        rest = [max(a - b, 0) for a, b in zip(self.p, self.q, strict=True)]
        a, c = self.lengths[0] + self.more, self.lengths[2]
        slots = self.page * sum(map(len, self.tables.values()))
        return {
            "intensity, read": Fraction(read.flops) / Fraction(read.bytes),
            "intensity, write": Fraction(write.flops) / Fraction(write.bytes),
            "a token read": self.machine.seconds(read) / self.prompt,
            "a token written": self.machine.seconds(write) / self.rows,
            "accepted": alpha,
            "drawn instead": tuple(Fraction(x, sum(rest)) for x in rest),
            "tokens a pass": sum((alpha**i for i in range(self.drafted + 1)), Fraction(0)),
            **self.tables,
            "empty": Fraction(slots - a - c),
            "reserved, empty": Fraction(2 * self.room - a - c),
        }

    def __repr__(self) -> str:
        m, (a, b, c) = self.machine, self.lengths
        return (
            f"1. A machine does {m.flops} FLOP/s and moves {m.bandwidth} bytes a second. A"
            f" model has {self.numbers} weights of\n   2 bytes and keeps {self.kept} bytes of each"
            f" token it has read. It reads a prompt of {self.prompt} tokens\n   (leave out its"
            f" attention). Then it writes a token for each of {self.rows} texts of"
            f" {self.read} tokens,\n   with one FLOP of attention for each byte of cache."
            " Intensity of both? Least time\n   of a token of each?\n"
            f"2. Twelve times p is {_row(self.p)}, and twelve times the draft's q is"
            f" {_row(self.q)}. How often\n   is a drafted token accepted? From what is one drawn"
            f" in its place? How many tokens\n   come from a pass with {self.drafted} drafted"
            " tokens, if each is accepted as often?\n"
            f"3. Pages have {self.page} slots, and a text takes the lowest free ones. A comes with"
            f" {a} tokens, B with {b},\n   C with {c}. B ends, and A writes {self.more} more. Which"
            " pages have A and C, how many of their\n   slots are empty, and how many if each had"
            f" reserved {self.room}?"
        )

    def worked(self) -> str:
        m, answer = self.machine, self.answer
        read, write = self.costs["read"], self.costs["write"]
        times = [(c.flops / m.flops, c.bytes / m.bandwidth) for c in (read, write)]
        least = [
            f"max({c.flops}/{m.flops}, {c.bytes}/{m.bandwidth}) = {_time(Fraction(max(t)))} s"
            f" ({'both' if t[0] == t[1] else 'arithmetic' if t[0] > t[1] else 'memory'})"
            for c, t in zip((read, write), times, strict=True)
        ]
        cache = f"{self.rows}·{self.read}·{self.kept}"
        low = [min(x) for x in zip(self.p, self.q, strict=True)]
        rest = [max(x - y, 0) for x, y in zip(self.p, self.q, strict=True)]
        powers = " + ".join(str(answer["accepted"] ** i) for i in range(self.drafted + 1))
        a, c = self.lengths[0] + self.more, self.lengths[2]
        slots = self.page * sum(map(len, self.tables.values()))
        return "\n".join(
            [
                f"1. read     {self.prompt}·2·{self.numbers} = {read.flops} FLOPs on"
                f" 2·{self.numbers} = {read.bytes} bytes: {answer['intensity, read']} a byte",
                f"            {least[0]}: {_time(answer['a token read'])} s a token",
                f"   write    {self.rows}·2·{self.numbers} + {cache} = {write.flops} FLOPs on"
                f" 2·{self.numbers} + {cache} = {write.bytes}"
                f" bytes: {answer['intensity, write']} a byte",
                f"            {least[1]}: {_time(answer['a token written'])} s a token",
                f"2. accepted ({' + '.join(map(str, low))})/12 = {answer['accepted']}",
                f"   instead  {_row(rest)} over {sum(rest)}: {_row(answer['drawn instead'])}",
                f"   a pass   {powers} = {answer['tokens a pass']}",
                f"3. A        pages {_row(self.tables['A'])}   C   pages {_row(self.tables['C'])}",
                f"   empty    {slots} - {a} - {c} = {slots - a - c};"
                f" reserved 2·{self.room} - {a} - {c} = {2 * self.room - a - c}",
            ]
        )


def _row(x: Iterable[object]) -> str:
    return ", ".join(map(str, x))


def _time(x: Fraction) -> str:
    """As a short decimal, if it is one."""
    short = f"{float(x):.4f}".rstrip("0").rstrip(".")
    return short if Fraction(short) == x else str(x)


def _twelfths(rng: random.Random) -> tuple[int, ...]:
    """Four positive numbers that sum to 12."""
    cuts = sorted(rng.sample(range(1, 12), 3))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, 12], strict=True))


def problem(random_seed: int) -> Problem:
    """A fresh machine, a fresh draft that is sometimes refused, and three fresh texts."""
    rng = random.Random(f"serving {random_seed}")
    peak, bandwidth = rng.choice((100, 200, 500)), rng.choice((10, 20, 25))
    machine = Machine("paper", Fraction(peak), Fraction(bandwidth))
    while True:
        p, q = _twelfths(rng), _twelfths(rng)
        if sum(a > b for a, b in zip(p, q, strict=True)) == 2:
            break
    page = rng.choice((3, 4, 5))
    lengths = (rng.randint(5, 12), rng.randint(5, 12), rng.randint(5, 12))
    return Problem(
        machine,
        numbers=rng.choice((50, 100, 200)),
        kept=rng.choice((2, 4, 8)),
        prompt=rng.choice((10, 20, 40, 50)),
        rows=rng.choice((2, 4, 5)),
        read=rng.choice((10, 20, 25, 50)),
        p=p,
        q=q,
        drafted=rng.choice((2, 3)),
        page=page,
        lengths=lengths,
        more=rng.randint(2 * page, 4 * page),
        room=40,
    )


def _number(got: Any, want: Any, given: str) -> None:
    """`want`: an int or a Fraction to the last digit, a float to nine."""
    if isinstance(got, bool) or not isinstance(got, int | float | Fraction):
        raise Wrong(shown(given, str(want), f"a {type(got).__name__}"))
    exact = isinstance(want, int) or (isinstance(want, Fraction) and not isinstance(got, float))
    if got != want if exact else not abs(got - want) <= 1e-9 * abs(want):
        raise Wrong(shown(given, str(want), str(got)))


def _same(got: Any, want: Any, given: str) -> None:
    if got != want:
        raise Wrong(shown(given, str(want), str(got)))


def _draw(rng: Generator, low: int, high: int) -> int:
    return int(randint(low, high + 1, (), generator=rng))


# 24.1


def decode_step(
    N: int, kappa: int, group: int, B: int, S: int, machine: Machine
) -> tuple[Number, Number, int]:
    flops = B * (2 * N + group * kappa * S)
    moved = 2 * N + B * kappa * S
    seconds = max(flops / machine.flops, moved / machine.bandwidth)
    gain = machine.bandwidth * (2 * N + group * kappa * S) - machine.flops * kappa * S
    ridge = int(-(-2 * N * machine.flops // gain)) if gain > 0 else 0
    return seconds, flops / moved, ridge


def _step(f: Function, numbers: tuple[int, ...], peak: int, bandwidth: int, part: int) -> None:
    """One of the three results; part 2 is found by trying one batch after the other."""
    N, kappa, group, B, S = numbers
    given = "N = {}, kappa = {}, group = {}, B = {}, S = {}".format(*numbers)
    given += f", {peak} FLOP/s, {bandwidth} byte/s; "
    got = several(f(*numbers, Machine("paper", peak, bandwidth)), 3, given)[part]

    def cost(B: int) -> tuple[int, int]:
        return 2 * N * B + B * S * kappa * group, 2 * N + B * S * kappa

    flops, moved = cost(B)
    if part == 0:
        _number(got, max(flops / peak, moved / bandwidth), given + "seconds")
    elif part == 1:
        _number(got, flops / moved, given + "FLOPs a byte")
    else:
        at = [B for B in range(1, 3000) if cost(B)[0] * bandwidth >= cost(B)[1] * peak]
        _number(got, at[0] if at else 0, given + "the batch at the ridge")


@prop("one text, nothing read", "A multiply-add is two FLOPs, and a weight two bytes.")
def nothing_read(f: Function, rng: Generator) -> None:
    for part in (0, 1):
        _step(f, (50, 4, 1, 1, 0), 100, 10, part)


@prop("many texts share the weights", "What is read once for all texts, what once for each?")
def share_the_weights(f: Function, rng: Generator) -> None:
    for part in (0, 1):
        _step(f, (50, 4, 1, 3, 0), 100, 10, part)
        _step(f, (50, 4, 1, 3, 7), 100, 10, part)


@prop("several query heads a key", "How many FLOPs are done with each byte of the cache?")
def grouped(f: Function, rng: Generator) -> None:
    for part in (1, 0):
        _step(f, (50, 4, 4, 3, 7), 100, 10, part)


@prop("arithmetic limits", "The slower of the two shares decides, and they overlap.")
def by_arithmetic(f: Function, rng: Generator) -> None:
    _step(f, (50, 4, 1, 40, 1), 100, 10, 0)


@prop("the first batch at the ridge", "At the ridge is enough; one text less is not.")
def at_the_ridge(f: Function, rng: Generator) -> None:
    _step(f, (50, 4, 1, 1, 0), 100, 10, 2)
    for _ in range(5):
        N, S, group = _draw(rng, 50, 99), _draw(rng, 1, 2), _draw(rng, 1, 3)
        _step(f, (N, 2, group, _draw(rng, 1, 9), S), 90, 7, 2)


@prop("never", "Each text brings its own bytes. What if they take longer than its FLOPs?")
def never(f: Function, rng: Generator) -> None:
    _step(f, (50, 4, 1, 1, 30), 100, 10, 2)
    _step(f, (45, 10, 1, 1, 1), 100, 10, 2)  # the gain is exactly 0


STEP = Task(
    "24.1",
    decode_step,
    (nothing_read, share_the_weights, grouped, by_arithmetic, at_the_ridge, never),
    MUTANTS["24.1"],
)


# 24.2


def lay_out(
    table: list[int], length: int, new: int, page_len: int, free: list[int]
) -> tuple[list[int], list[int], int]:
    needed = -(-(length + new) // page_len)
    table = table + free[: needed - len(table)]
    slots = [table[i // page_len] * page_len + i % page_len for i in range(length, length + new)]
    return slots, table, needed * page_len - length - new


def _lay(f: Function, table: list[int], length: int, new: int, page_len: int) -> None:
    free = [p for p in (8, 3, 0, 6, 1, 7, 2, 5, 4) if p not in table]
    given = f"table {table}, {length} tokens, {new} new, pages of {page_len}, free {free}"
    got = several(f(table, length, new, page_len, free), 3, given)
    after, slots = list(table), []
    for i in range(length, length + new):  # one token after the other
        if i % page_len == 0:
            after.append(free[len(after) - len(table)])
        slots.append(page_len * after[-1] + i % page_len)
    for part, right, name in zip(
        got,
        (slots, after, len(after) * page_len - length - new),
        ("slots", "table", "empty"),
        strict=True,
    ):
        _same(part, right, f"{given}; {name}")


@prop("into the last page", "Where does the last page begin, on the line of all slots?")
def into_the_last(f: Function, rng: Generator) -> None:
    _lay(f, [4, 2], 4, 1, 3)
    _lay(f, [4, 2, 0], 7, 1, 3)


@prop("a new page", "The pages of a text need not be neighbours. Which page comes first in `free`?")
def a_new_page(f: Function, rng: Generator) -> None:
    _lay(f, [4, 2], 4, 4, 3)
    _lay(f, [], 0, 3, 4)


@prop("exactly full", "The last page is full, or becomes full. Is another one needed?")
def exactly_full(f: Function, rng: Generator) -> None:
    _lay(f, [4, 2], 6, 0, 3)
    _lay(f, [4, 2], 5, 1, 3)
    _lay(f, [4, 2], 6, 1, 3)


@prop(
    "several pages", "A long prompt fills more than one page. Go through its positions one by one."
)
def several_pages(f: Function, rng: Generator) -> None:
    _lay(f, [5], 1, 6, 2)
    for _ in range(20):
        page_len, length, new = _draw(rng, 1, 5), _draw(rng, 0, 6), _draw(rng, 0, 6)
        _lay(f, [5, 1, 7, 4, 2, 8][: -(-length // page_len)], length, min(new, 3), page_len)


LAY = Task(
    "24.2", lay_out, (into_the_last, a_new_page, exactly_full, several_pages), MUTANTS["24.2"]
)


# 24.3


def page_pool(n_pages: int) -> tuple[list[int], Function, Function, Function, Function]:
    holders = [0] * n_pages

    def take(n: int) -> list[int]:
        free = [page for page in range(n_pages) if holders[page] == 0]
        if n > len(free):
            raise ValueError(f"{n} pages wanted, {len(free)} are free")
        for page in free[:n]:
            holders[page] = 1
        return free[:n]

    def share(pages: list[int]) -> None:
        if any(holders[page] == 0 for page in pages):
            raise ValueError(f"a free page among {pages}")
        for page in pages:
            holders[page] += 1

    def give_back(pages: list[int]) -> None:
        if any(pages.count(page) > holders[page] for page in pages):
            raise ValueError(f"nobody holds all of {pages}")
        for page in pages:
            holders[page] -= 1

    def write(page: int) -> int:
        if holders[page] == 0:
            raise ValueError(f"page {page} is free")
        if holders[page] == 1:
            return page
        (fresh,) = take(1)
        holders[page] -= 1
        return fresh

    return holders, take, share, give_back, write


class _Pool:
    """The reader's pool, with a record of what was asked of it."""

    def __init__(self, f: Function, n_pages: int) -> None:
        self.said = f"page_pool({n_pages})"
        parts = several(f(n_pages), 5, self.said)
        self.holders, calls = parts[0], parts[1:]
        self.calls = dict(zip(("take", "share", "give_back", "write"), calls, strict=True))
        self.see([0] * n_pages)

    def see(self, want: Any) -> None:
        holders = self.holders
        if not isinstance(holders, list):
            raise Wrong(shown(self.said, "a list of holders", f"a {type(holders).__name__}"))
        _same(holders, want, f"{self.said}; holders")

    def ask(self, name: str, x: Any, want: Any, holders: list[int]) -> None:
        """A call, what comes back, and how many hold each page after it."""
        self.said += f", {name}({x})"
        got = self.calls[name](list(x) if isinstance(x, list) else x)
        if want is not None:
            _same(list(got) if isinstance(got, tuple) else got, want, self.said)
        self.see(holders)

    def refuse(self, name: str, x: Any) -> None:
        """A call that must raise a ValueError and change nothing."""
        before, self.said = list(self.holders), self.said + f", {name}({x})"
        try:
            got = self.calls[name](list(x) if isinstance(x, list) else x)
        except ValueError:
            self.said += " which raised ValueError"
            self.see(before)
        else:
            raise Wrong(shown(self.said, "ValueError", repr(got)))


@prop("take", "The lowest free pages; each has one holder then.")
def take_some(f: Function, rng: Generator) -> None:
    pool = _Pool(f, 4)
    pool.ask("take", 2, [0, 1], [1, 1, 0, 0])
    pool.ask("take", 0, [], [1, 1, 0, 0])
    pool.ask("take", 1, [2], [1, 1, 1, 0])


@prop("share and give back", "A page is free when nobody holds it, and not before.")
def share_some(f: Function, rng: Generator) -> None:
    pool = _Pool(f, 4)
    pool.ask("take", 3, [0, 1, 2], [1, 1, 1, 0])
    pool.ask("share", [0, 1], None, [2, 2, 1, 0])
    pool.ask("give_back", [0, 1, 2], None, [1, 1, 0, 0])
    pool.ask("take", 1, [2], [1, 1, 1, 0])
    pool.ask("give_back", [1, 0], None, [0, 0, 1, 0])


@prop("write alone", "Who is disturbed if the only holder writes?")
def write_alone(f: Function, rng: Generator) -> None:
    pool = _Pool(f, 3)
    pool.ask("take", 2, [0, 1], [1, 1, 0])
    pool.ask("write", 1, 1, [1, 1, 0])


@prop("write a shared page", "The writer gets a page of its own. How many hold the old one then?")
def write_shared(f: Function, rng: Generator) -> None:
    pool = _Pool(f, 4)
    pool.ask("take", 2, [0, 1], [1, 1, 0, 0])
    pool.ask("share", [1], None, [1, 2, 0, 0])
    pool.ask("share", [1], None, [1, 3, 0, 0])
    pool.ask("write", 1, 2, [1, 2, 1, 0])
    pool.ask("write", 1, 3, [1, 1, 1, 1])
    pool.ask("write", 1, 1, [1, 1, 1, 1])


@prop("nothing twice", "Before anything is counted: does someone hold each of these pages?")
def nothing_twice(f: Function, rng: Generator) -> None:
    pool = _Pool(f, 3)
    pool.refuse("give_back", [2])
    pool.refuse("share", [2])
    pool.refuse("write", 2)
    pool.refuse("take", 4)
    pool.ask("take", 2, [0, 1], [1, 1, 0])
    pool.ask("give_back", [0], None, [0, 1, 0])
    pool.refuse("give_back", [0])


@prop("a refused call changes nothing", "Look at the whole list first, and only then count.")
def unchanged(f: Function, rng: Generator) -> None:
    pool = _Pool(f, 3)
    pool.ask("take", 2, [0, 1], [1, 1, 0])
    pool.refuse("take", 2)
    pool.refuse("share", [0, 2])
    pool.refuse("give_back", [0, 2])
    pool.ask("take", 1, [2], [1, 1, 1])
    pool.ask("share", [1], None, [1, 2, 1])
    pool.refuse("write", 1)  # no page is free


@prop("one page twice in a list", "How often does a page stand in the list, and how many hold it?")
def twice_in_a_list(f: Function, rng: Generator) -> None:
    pool = _Pool(f, 2)
    pool.ask("take", 1, [0], [1, 0])
    pool.refuse("give_back", [0, 0])
    pool.ask("share", [0, 0], None, [3, 0])
    pool.ask("give_back", [0, 0], None, [1, 0])


POOL = Task(
    "24.3",
    page_pool,
    (
        take_some,
        share_some,
        write_alone,
        write_shared,
        nothing_twice,
        unchanged,
        twice_in_a_list,
    ),
    MUTANTS["24.3"],
)


# 24.4


def accept(p: Sequence[Any], q: Sequence[Any], drafted: int, u: Any) -> int:
    keep = min(1, p[drafted] / q[drafted])
    if u < keep:
        return drafted
    left = [max(a - b, 0) for a, b in zip(p, q, strict=True)]
    u = (u - keep) / (1 - keep) * sum(left)
    for token, share in enumerate(left):
        if u < share:
            return token
        u -= share
    return drafted


def _shares(f: Function, p: list[Fraction], q: list[Fraction], x: int) -> list[Fraction]:
    """For a drafted x, which part of all u gives each token: exact, if every step of f is at a
    multiple of 1 / n."""
    over = sum(max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True))
    n = int(12 * q[x] * max(1, 12 * over))
    counts = [0] * len(p)
    for j in range(n):
        u = Fraction(2 * j + 1, 2 * n)
        token = f(p, q, x, u)
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(p):
            given = f"p = {_row(p)}, q = {_row(q)}, drafted {x}, u = {u}"
            raise Wrong(shown(given, f"a token, 0 to {len(p) - 1}", repr(token)))
        counts[token] += 1
    return [Fraction(c, n) for c in counts]


def _two(rng: Generator, least: int = 1) -> tuple[list[Fraction], list[Fraction]]:
    """Two different distributions over three tokens, in twelfths."""
    rows: list[list[Fraction]] = []
    while len(rows) < 2:
        cuts = sorted(_draw(rng, 0, 12) for _ in range(2))
        row = [cuts[0], cuts[1] - cuts[0], 12 - cuts[1]]
        if min(row) >= least and [Fraction(x, 12) for x in row] not in rows:
            rows.append([Fraction(x, 12) for x in row])
    return rows[0], rows[1]


def _distribution(f: Function, p: list[Fraction], q: list[Fraction]) -> None:
    given = f"p = {_row(p)}, q = {_row(q)}"
    parts = [(x, _shares(f, p, q, x)) for x in range(len(p)) if q[x]]
    got = [sum(q[x] * shares[token] for x, shares in parts) for token in range(len(p))]
    if got != p:
        raise Wrong(shown(f"{given}; all drafts, all u", _row(p), _row(got)))


NEGLECTS_TWO = [Fraction(n, 12) for n in (5, 4, 3)], [Fraction(n, 12) for n in (1, 2, 9)]
THREE = [Fraction(n, 12) for n in (6, 4, 2)], [Fraction(n, 12) for n in (2, 7, 3)]


@prop("nothing to refuse", "What the model would take at least as often, it can take each time.")
def nothing_to_refuse(f: Function, rng: Generator) -> None:
    p, q = NEGLECTS_TWO
    for a, b, x in ((p, q, 0), (p, q, 1), (p, p, 2)):
        given = f"p = {_row(a)}, q = {_row(b)}, drafted {x}; how often {x} is returned"
        _number(_shares(f, a, b, x)[x], Fraction(1), given)


@prop(
    "as often as it may",
    "Twice as likely in the draft as in the model: kept half the time, and not drawn again.",
)
def as_often(f: Function, rng: Generator) -> None:
    for p, q in (THREE, _two(rng), _two(rng)):
        for x in range(3):
            given = f"p = {_row(p)}, q = {_row(q)}, drafted {x}; how often {x} is returned"
            _number(_shares(f, p, q, x)[x], min(Fraction(1), p[x] / q[x]), given)


@prop("what the draft neglects", "The draft brings some tokens too often already. Which are left?")
def neglected(f: Function, rng: Generator) -> None:
    for p, q in (THREE, _two(rng), _two(rng)):
        for x in range(3):
            for token, share in enumerate(_shares(f, p, q, x)):
                if share and token != x and p[token] <= q[token]:
                    given = f"p = {_row(p)}, q = {_row(q)}, drafted {x}"
                    raise Wrong(shown(given, f"never {token}: q has enough of it", f"{token}"))


@prop(
    "over all drafts: p",
    "In which ratio stand the tokens that are drawn instead? Exactly, and"
    " with all of what is left of u.",
)
def over_all_drafts(f: Function, rng: Generator) -> None:
    _distribution(f, *NEGLECTS_TWO)
    for _ in range(4):
        _distribution(f, *_two(rng))


@prop("probabilities of zero", "Some tokens are impossible, for the model or for the draft.")
def zeros(f: Function, rng: Generator) -> None:
    sure = [[Fraction(int(i == j)) for i in range(3)] for j in range(3)]
    p, _ = THREE
    for a, b in ((p, sure[1]), (sure[0], p), (sure[0], sure[2])):
        _distribution(f, a, b)


ACCEPT = Task(
    "24.4",
    accept,
    (nothing_to_refuse, as_often, neglected, over_all_drafts, zeros),
    MUTANTS["24.4"],
)


# 24.5


def best_draft(
    alpha: Fraction, passes: Sequence[Fraction], draft: Fraction
) -> tuple[int, Fraction, Fraction]:
    best = (0, Fraction(1), 1 / Fraction(passes[0]))
    tokens = Fraction(1)
    for k in range(1, len(passes)):
        tokens += alpha**k
        rate = tokens / (passes[k] + k * draft)
        if rate > best[2]:
            best = (k, tokens, rate)
    return best


def _best(f: Function, alpha: Fraction, passes: list[Fraction], draft: Fraction) -> None:
    given = f"alpha = {alpha}, passes = {_row(passes)}, draft = {draft}"
    got = several(f(alpha, passes, draft), 3, given)
    every = []
    for k, cost in enumerate(passes):
        # all accepted, or the first i were
        tokens = (k + 1) * alpha**k + sum((i + 1) * alpha**i * (1 - alpha) for i in range(k))
        every.append((tokens / (cost + k * draft), -k, tokens))
    rate, k, tokens = max(every)
    for part, want, name in zip(
        got, (-k, tokens, rate), ("drafts", "tokens a pass", "tokens"), strict=True
    ):
        _number(part, want, f"{given}; {name}" + " per unit of cost" * (name == "tokens"))


def _costs(*halves: int) -> list[Fraction]:
    return [Fraction(n, 2) for n in halves]


@prop("one draft at most", "The pass gives a token of its own, whatever becomes of the draft.")
def one_draft(f: Function, rng: Generator) -> None:
    _best(f, Fraction(1, 2), _costs(2, 2), Fraction(0))
    _best(f, Fraction(1, 2), _costs(2, 2), Fraction(1, 4))


@prop("free drafts", "The second draft counts only if the first was accepted too.")
def free_drafts(f: Function, rng: Generator) -> None:
    _best(f, Fraction(1, 2), _costs(2, 2, 2, 2), Fraction(0))
    _best(f, Fraction(2, 3), _costs(4, 4, 4), Fraction(0))


@prop("drafts and passes cost", "Tokens per what? A pass with its drafts costs both.")
def drafts_cost(f: Function, rng: Generator) -> None:
    _best(f, Fraction(3, 4), _costs(2, 2, 2, 2, 2, 2), Fraction(1, 5))
    _best(f, Fraction(3, 4), _costs(2, 3, 4, 5, 6, 20), Fraction(1, 9))


@prop("not worth a draft", "Is no draft at all among the numbers you compare?")
def not_worth(f: Function, rng: Generator) -> None:
    _best(f, Fraction(1, 4), _costs(2, 4, 6), Fraction(1, 2))
    _best(f, Fraction(0), _costs(3, 4, 5), Fraction(1, 7))


@prop("all accepted", "With acceptance 1 the closed form divides by 0. What does the sum say?")
def all_accepted(f: Function, rng: Generator) -> None:
    _best(f, Fraction(1), _costs(2, 3, 3, 4), Fraction(1, 4))


@prop("the smallest of equals", "Two numbers of drafts are equally good: take the smaller.")
def smallest(f: Function, rng: Generator) -> None:
    _best(f, Fraction(1), _costs(2, 4, 6), Fraction(0))


@prop("any costs", "Compare every number of drafts that `passes` has a cost for.")
def any_costs(f: Function, rng: Generator) -> None:
    for _ in range(20):
        passes = _costs(*(_draw(rng, 2, 4) + k // 2 for k in range(7)))
        _best(f, Fraction(_draw(rng, 1, 12), 12), passes, Fraction(_draw(rng, 0, 4), 9))


DRAFT = Task(
    "24.5",
    best_draft,
    (one_draft, free_drafts, drafts_cost, not_worth, all_accepted, smallest, any_costs),
    MUTANTS["24.5"],
)


# 24.6


def two_schedules(
    lengths: list[int], rows: int
) -> tuple[tuple[int, list[int]], tuple[int, list[int]]]:
    now, static = 0, []
    for i in range(0, len(lengths), rows):
        together = lengths[i : i + rows]
        static += [now + 1] * len(together)
        now += max(together)
    free_at, continuous = [0] * rows, []
    for length in lengths:
        row = free_at.index(min(free_at))
        continuous.append(free_at[row] + 1)
        free_at[row] += length
    return (now, static), (max(free_at), continuous)


def _simulated(lengths: list[int], rows: int, refill: bool) -> tuple[int, list[int]]:
    """Step by step: what runs, what waits."""
    waiting, first, step = list(range(len(lengths))), [0] * len(lengths), 0
    running: list[int] = []
    left = list(lengths)
    while waiting or running:
        if refill or not running:
            while waiting and len(running) < rows:
                running.append(waiting.pop(0))
        step += 1
        for i in running:
            first[i] = first[i] or step
            left[i] -= 1
        running = [i for i in running if left[i]]
    return step, first


def _schedule(f: Function, lengths: list[int], rows: int, both: Iterable[int] = (0, 1)) -> None:
    given = f"lengths {lengths}, {rows} rows; "
    got = several(f(lengths, rows), 2, given + "static, continuous")
    for way in both:
        name = given + ("static", "continuous")[way]
        steps, first = several(got[way], 2, name)
        right, at = _simulated(lengths, rows, way == 1)
        _number(steps, right, name + ", steps")
        _same(
            list(first) if isinstance(first, list | tuple) else first, at, name + ", first tokens"
        )


@prop(
    "room for all", "Everybody starts at once. When is the last one done, when comes a first token?"
)
def room_for_all(f: Function, rng: Generator) -> None:
    _schedule(f, [3, 5, 2], 3)
    _schedule(f, [2], 4)


@prop("one row", "One after the other: who waits for whom?")
def one_row(f: Function, rng: Generator) -> None:
    _schedule(f, [3, 1, 2], 1)


@prop(
    "static waits for the longest", "A batch ends with its longest text, and the next one begins."
)
def waits(f: Function, rng: Generator) -> None:
    _schedule(f, [2, 9, 3, 4, 1], 2, (0,))


@prop("continuous fills a row at once", "A text that ends leaves its row to the next step.")
def fills(f: Function, rng: Generator) -> None:
    _schedule(f, [2, 9, 4, 3, 1], 2, (1,))
    _schedule(f, [5, 1, 1, 1, 6], 2, (1,))


@prop(
    "two rows at once",
    "Play it on paper: two rows become free in one step, and two texts may come in.",
)
def two_at_once(f: Function, rng: Generator) -> None:
    _schedule(f, [2, 2, 3, 3, 1], 2, (1,))
    _schedule(f, [4, 4, 4, 1, 2, 2, 1], 3, (1,))
    for _ in range(15):
        lengths = [_draw(rng, 1, 9) for _ in range(_draw(rng, 1, 12))]
        _schedule(f, lengths, _draw(rng, 1, 4))


SCHEDULES = Task(
    "24.6",
    two_schedules,
    (room_for_all, one_row, waits, fills, two_at_once),
    MUTANTS["24.6"],
)


# 24.7

Rows = list[list[float]]
Answer = tuple[list[int], int]


def verify(p: Rows, q: Rows, drafted: list[int], rng: random.Random) -> Answer:
    tokens: list[int] = []
    for i, x in enumerate(drafted):
        if rng.random() * q[i][x] < p[i][x]:
            tokens.append(x)
            continue
        left = [max(a - b, 0) for a, b in zip(p[i], q[i], strict=True)]
        return tokens + rng.choices(range(len(left)), left), len(tokens)
    return tokens + rng.choices(range(len(p[-1])), p[-1]), len(drafted)


def verify_at_once(p: Rows, q: Rows, drafted: list[int], rng: random.Random) -> Answer:
    """All numbers are drawn first, and the last token from the top of a running sum."""
    drawn = [rng.random() for _ in drafted]
    refused = [
        1 - u > p[i][x] / q[i][x] for i, (u, x) in enumerate(zip(drawn, drafted, strict=True))
    ]
    n = refused.index(True) if any(refused) else len(drafted)
    below = q[n] if n < len(drafted) else [0.0] * len(p[n])
    left = [a - b if a > b else 0.0 for a, b in zip(p[n], below, strict=True)]
    u, token = rng.random() * sum(left), len(left) - 1
    while token > 0 and (u := u - left[token]) >= 0:
        token -= 1
    return [*drafted[:n], token], n


def speculative_test(implementation: Callable[..., Answer]) -> None:
    """Raise AssertionError unless the tokens of every place come as often as p says."""
    p = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.1, 0.7]]
    q = [[0.2, 0.7, 0.1], [0.6, 0.1, 0.3]]
    rng, seen = random.Random(24), [[0, 0, 0] for _ in p]
    for _ in range(2000):
        drafted = [rng.choices(range(3), row)[0] for row in q]
        tokens, kept = implementation(p, q, drafted, rng)
        assert kept == len(tokens) - 1 and tokens[:kept] == drafted[:kept]
        for place, token in zip(seen, tokens, strict=False):
            place[token] += 1
    runs = (2000, 1200, 600)  # 0.6 of the first drafts are accepted, half of the second ones
    for place, row, n in zip(seen, p, runs, strict=True):
        assert abs(sum(place) - n) < 100
        assert all(abs(a / sum(place) - b) < 0.06 for a, b in zip(place, row, strict=True))


BUGS = (
    Bug(
        "every draft is accepted",
        "huggingface/transformers#28508",
        "Where the model and its draft disagree, how often must a token be refused?",
        {"rng.random() * q[i][x] < p[i][x]": "True"},
    ),
    Bug(
        "the first draft is not looked at",
        "ohdearquant/lattice#243",
        "The first drafted token can be wrong as well, and so can the only one.",
        {"if rng": "if i == 0 or rng"},
    ),
    Bug(
        "held against the next place",
        "mlx-node/mlx-node#11",
        "Let p differ from place to place.",
        {"< p[i][x]": "< p[i + 1][x]"},
    ),
    Bug(
        "the next place's token instead",
        "openvinotoolkit/openvino.genai#4190",
        "Let p differ from place to place, and count what stands where a draft was refused.",
        {"zip(p[i], q": "zip(p[i + 1], q"},
    ),
    Bug(
        "nothing after the last draft",
        "ohdearquant/lattice#509",
        "All drafts are accepted. How many tokens has the pass given?",
        {"tokens + rng.choices(range(len(p[-1])), p[-1]), len(drafted)": "tokens, len(drafted)"},
    ),
    Bug(
        "refused drafts stay in the cache",
        "ml-explore/mlx-lm#1109",
        "The tokens are not all that comes back.",
        {"left), len(tokens)": "left), len(drafted)"},
    ),
    Bug(
        "two rules at once",
        "alibaba/rtp-llm#1295",
        "Too many drafts are accepted, but not all. Count how often.",
        {"if rng": "if rng.choices(range(len(p[i])), p[i]) == [x] or rng"},
    ),
    Bug(
        "measured against the likeliest",
        "1bit-MONSTER/1bit-MONSTER#637",
        "A draft that likes what the model likes less: p/q is not p/max p.",
        {"* q[i][x]": "* max(p[i])"},
    ),
    Bug(
        "only the refused token is left out",
        "SafeAILab/EAGLE#20",
        "What replaces a refused token? Three tokens are needed to tell, and a clear preference.",
        {
            "max(a - b, 0) for a, b in zip(p[i], q[i], strict=True)": "a * (t != x)"
            " for t, a in enumerate(p[i])"
        },
    ),
    Bug(
        "a softmax of what is left",
        "huggingface/transformers#28508",
        "What replaces a refused token, and what may never replace one?",
        {"max(a - b, 0)": "2.718 ** max(a - b, 0)"},
    ),
    Bug(
        "p is overwritten",
        "vllm-project/vllm-ascend#2881",
        "Who else reads p? The same lists may come again.",
        {"        left =": "        p[i][x] = 0.0\n        left ="},
    ),
)

VERIFY = write_the_test("24.7", speculative_test, verify, verify_at_once, BUGS, MUTANTS["24.7"])

TASKS = (STEP, LAY, POOL, ACCEPT, DRAFT, SCHEDULES, VERIFY)
