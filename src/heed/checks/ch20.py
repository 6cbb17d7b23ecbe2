"""Chapter 20, roofline: the checks of its seven tasks, and `problem`, an operation for paper.

peak in FLOP/s · bandwidth in byte/s · size bytes in a number · n numbers, or the side of a matrix ·
T tokens · H heads · D width of a head.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Generator

from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, several, shown
from heed.roofline import Cost, Machine, attention, matmul

MUTANTS = mutants(__file__)


def _near(got: Any, want: float, given: str) -> None:
    """`want`, to nine digits."""
    if isinstance(got, bool) or not isinstance(got, int | float | Fraction):
        raise Wrong(shown(given, f"{want:.6g}", f"a {type(got).__name__}"))
    if not abs(got - want) <= 1e-9 * abs(want):
        raise Wrong(shown(given, f"{want:.6g}", f"{float(got):.6g}"))


def _exact(got: Any, want: int, given: str) -> None:
    """Exactly `want`, a whole number."""
    if type(got) is not int or got != want:
        said = f"{got:,}" if type(got) is int else f"a {type(got).__name__}, {got!r}"
        raise Wrong(shown(given, f"{want:,}", said))


# 20.1


def least_time(flops: float, moved: float, peak: float, bandwidth: float) -> tuple[float, str]:
    arithmetic = flops / peak
    memory = moved / bandwidth
    if arithmetic == memory:
        return arithmetic, "both"
    return max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory"


def _limit(f: Function, numbers: tuple[int, int, int, int], want: float, limit: str) -> None:
    given = "{} FLOPs on {} bytes, {} FLOP/s, {} byte/s".format(*numbers)
    seconds, said = several(f(*numbers), 2, given)
    _near(seconds, want, given + "; seconds")
    if said != limit:
        raise Wrong(shown(given + "; limit", repr(limit), repr(said)))


@prop("memory limits", "How long do the bytes take, and how long do the FLOPs?")
def by_memory(f: Function, rng: Generator) -> None:
    _limit(f, (3456, 864, 100, 10), 86.4, "memory")


@prop("arithmetic limits", "The slower of the two decides, not always the same one.")
def by_arithmetic(f: Function, rng: Generator) -> None:
    _limit(f, (432_000, 21_600, 100, 10), 4320, "arithmetic")


@prop("at the ridge", "Where both take equally long, both limit. They still overlap.")
def at_ridge(f: Function, rng: Generator) -> None:
    _limit(f, (54_000, 5400, 100, 10), 540, "both")


LEAST = Task("20.1", least_time, (by_memory, by_arithmetic, at_ridge), MUTANTS["20.1"])


# 20.2


def product_intensity(rows: int, inner: int, columns: int, size: int) -> float:
    flops = 2 * rows * inner * columns
    numbers = rows * inner + inner * columns + rows * columns
    return flops / (size * numbers)


def _intensity(f: Function, sides: tuple[int, int, int, int]) -> None:
    want = matmul(*sides).intensity
    _near(f(*sides), float(want), "rows, inner, columns = {}, {}, {} of {} bytes".format(*sides))


@prop("a square product", "Two FLOPs for each multiply-add; two matrices in, one out.")
def square(f: Function, rng: Generator) -> None:
    _intensity(f, (30, 30, 30, 2))


@prop("three sides", "Which of the three matrices has which two sides?")
def three_sides(f: Function, rng: Generator) -> None:
    for sides in ((3, 5, 7, 2), (7, 3, 5, 2), (5, 7, 3, 2)):
        _intensity(f, sides)


@prop("wider numbers", "Four bytes instead of two: the FLOPs are the same.")
def wider(f: Function, rng: Generator) -> None:
    _intensity(f, (3, 5, 7, 4))


PRODUCT = Task("20.2", product_intensity, (square, three_sides, wider), MUTANTS["20.2"])


# 20.3


def best_tile(n: int, room: int) -> tuple[int, int]:
    t = min(n, math.isqrt(room + 1) - 1)
    tiles = -(-n // t)
    return t, 2 * n * n * tiles + n * n


def _counted(n: int, t: int) -> int:
    """Numbers moved, tile by tile, the last ones narrower."""
    heights = [min(t, n - i) for i in range(0, n, t)]
    return sum(n * (h + w) + h * w for h in heights for w in heights)


def _tile(f: Function, n: int, room: int) -> None:
    t = max(t for t in range(1, n + 1) if t == 1 or t * t + 2 * t <= room)
    given = f"n = {n}, room for {room} numbers"
    got = several(f(n, room), 2, given)
    _exact(got[0], t, given + "; side of the tile")
    _exact(got[1], _counted(n, t), given + "; numbers moved")


@prop("room for three", "A tile of one number, one of a column, one of a row: 1 + 2 = 3.")
def room_for_three(f: Function, rng: Generator) -> None:
    _tile(f, 6, 3)


@prop("the widest that fits", "t² + 2t is one less than (t + 1)².")
def widest(f: Function, rng: Generator) -> None:
    for room in (8, 14, 15, 16, 23):
        _tile(f, 12, room)


@prop("narrower at the edge", "Seven rows in tiles of three: three, three and one.")
def edge(f: Function, rng: Generator) -> None:
    _tile(f, 7, 15)
    _tile(f, 10, 24)


@prop("room for everything", "A tile is never wider than the matrix. Then everything moves once.")
def everything(f: Function, rng: Generator) -> None:
    _tile(f, 5, 1000)


@prop("large numbers", "Whole numbers all the way: a float forgets the last digits.")
def large(f: Function, rng: Generator) -> None:
    n, room = 10**7 + 19, 10**9 + 7
    t = math.isqrt(room + 1) - 1
    got = several(f(n, room), 2, "n = 10,000,019")
    _exact(got[1], 2 * n * n * (n // t + (n % t > 0)) + n * n, f"n = {n:,}, room for {room:,}")


TILE = Task("20.3", best_tile, (room_for_three, widest, edge, everything, large), MUTANTS["20.3"])


# 20.4

Chain = Sequence[tuple[int, int]]


def chain_times(
    n: int, size: int, chain: Chain, peak: float, bandwidth: float
) -> tuple[float, float]:
    apart = 0.0
    for flops, extra in chain:
        moved = size * n * (2 + extra)
        apart += max(n * flops / peak, moved / bandwidth)
    flops = sum(flops for flops, _ in chain)
    moved = size * n * (2 + sum(extra for _, extra in chain))
    return apart, max(n * flops / peak, moved / bandwidth)


def _chain(f: Function, n: int, size: int, chain: Chain, peak: int, bandwidth: int) -> None:
    machine = Machine("", peak, bandwidth)
    costs = [Cost(n * flops, size * n * (2 + extra)) for flops, extra in chain]
    total = Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))
    between = 2 * size * n * (len(chain) - 1)  # written by one, read by the next
    given = f"{n} numbers of {size} bytes, {list(chain)}, {peak} FLOP/s, {bandwidth} byte/s"
    got = several(f(n, size, list(chain), peak, bandwidth), 2, given)
    _near(got[0], float(sum(machine.seconds(c) for c in costs)), given + "; apart")
    fused = machine.seconds(Cost(total.flops, total.bytes - between))
    _near(got[1], float(fused), given + "; fused")


@prop("one operation", "Alone it reads n numbers and writes n, apart or fused.")
def one_operation(f: Function, rng: Generator) -> None:
    _chain(f, 10, 2, [(1, 0)], 100, 10)


@prop("two operations", "Fused, what lies between them never leaves the chip.")
def two_operations(f: Function, rng: Generator) -> None:
    _chain(f, 10, 2, [(1, 0), (2, 0)], 100, 10)


@prop("more to read", "A mask or a bias is read as well, in both cases.")
def more_to_read(f: Function, rng: Generator) -> None:
    _chain(f, 10, 4, [(1, 1), (2, 0), (1, 2)], 100, 10)


@prop("dear arithmetic", "Each operation has its own limit. So has the fused one.")
def dear(f: Function, rng: Generator) -> None:
    _chain(f, 10, 2, [(1, 0), (70, 0), (1, 1)], 100, 10)
    _chain(f, 10, 2, [(30, 0), (30, 0)], 100, 10)


FUSED = Task(
    "20.4",
    chain_times,
    (one_operation, two_operations, more_to_read, dear),
    MUTANTS["20.4"],
)


# 20.5


def fill(a: int, b: int, size: int, peak: int, bandwidth: int) -> int:
    need = peak * size * a * b
    gain = 2 * a * b * bandwidth - peak * size * (a + b)
    if gain <= 0:
        return 0
    return -(-need // gain)


def _filled(T: int, a: int, b: int, size: int, peak: int, bandwidth: int) -> bool:
    cost = matmul(T, a, b, size)
    return Fraction(cost.flops) / peak >= Fraction(cost.bytes) / bandwidth


def _fill(f: Function, numbers: tuple[int, int, int, int, int], want: int) -> None:
    given = "a {} x {} matrix of {}-byte numbers, {} FLOP/s, {} byte/s".format(*numbers)
    _exact(f(*numbers), want, given)


@prop("a ridge of one", "At two bytes a number 1/intensity is 1/T + 1/a + 1/b.")
def ridge_one(f: Function, rng: Generator) -> None:
    _fill(f, (4, 4, 2, 10, 10), 2)


@prop("the first such T", "Round so that the ridge is reached, and not nearly.")
def first_T(f: Function, rng: Generator) -> None:
    for numbers in ((30, 70, 2, 100, 10), (64, 48, 4, 70, 9), (17, 19, 1, 31, 4)):
        T = next(T for T in range(1, 10**5) if _filled(T, *numbers))
        _fill(f, numbers, T)


@prop("already there", "One row may be enough: then the answer is 1.")
def already(f: Function, rng: Generator) -> None:
    _fill(f, (50, 50, 2, 1, 10), 1)


@prop("never", "However many rows: the intensity stays below what the matrix alone would give.")
def never(f: Function, rng: Generator) -> None:
    _fill(f, (20, 20, 2, 100, 10), 0)
    _fill(f, (12, 20, 2, 100, 10), 0)


FILL = Task("20.5", fill, (ridge_one, first_T, already, never), MUTANTS["20.5"])


# 20.6


def wall(N: int, H: int, D: int, peak: int, bandwidth: int) -> int:
    by_flops = -(-N // (2 * H * D))
    by_bytes = -(-N * bandwidth // (4 * H * peak)) - D
    return max(1, min(by_flops, by_bytes))


def _later(T: int, N: int, H: int, D: int, peak: int, bandwidth: int) -> bool:
    """By the roofline: does stored attention take at least as long as the matrices?"""
    cost = attention(T, T, D, stored=True)
    pairs = H * max(Fraction(cost.flops) / peak, Fraction(cost.bytes) / bandwidth)
    return pairs >= Fraction(2 * T * N, peak)


def _wall(f: Function, numbers: tuple[int, int, int, int, int]) -> None:
    N, H, D, peak, bandwidth = numbers
    given = f"N = {N:,}, H = {H}, D = {D}, {peak:,} FLOP/s, {bandwidth:,} byte/s"
    first = bisect_left(range(1, 10**6), True, key=lambda T: _later(T, *numbers)) + 1
    _exact(f(*numbers), first, given)


@prop("fast memory", "If the bytes never wait, FLOPs decide: six times the width.")
def fast_memory(f: Function, rng: Generator) -> None:
    _wall(f, (12 * 48**2, 3, 16, 100, 10**6))


@prop("slow memory", "8T² + 8TD bytes a head at the bandwidth, against 2TN FLOPs at the peak.")
def slow_memory(f: Function, rng: Generator) -> None:
    _wall(f, (12 * 4096**2, 32, 128, 989 * 10**9, 3350 * 10**6))
    _wall(f, (12 * 4096**2, 32, 128, 312 * 10**9, 2039 * 10**6))


@prop("another layer", "N is what a token meets in matrices; a Llama's layer is not 12 C².")
def another(f: Function, rng: Generator) -> None:
    _wall(f, (218_103_808, 32, 128, 989 * 10**9, 4800 * 10**6))


@prop("the first such text", "Round so that attention is behind, or level.")
def first_text(f: Function, rng: Generator) -> None:
    for numbers in ((50_000, 3, 7, 90, 7), (10_001, 2, 9, 50, 20), (777, 1, 5, 10, 10)):
        _wall(f, numbers)


@prop("at once", "A text has at least one token.")
def at_once(f: Function, rng: Generator) -> None:
    _wall(f, (100, 4, 64, 1000, 1))


WALL = Task("20.6", wall, (fast_memory, slow_memory, another, first_text, at_once), MUTANTS["20.6"])


# 20.7


def bandwidth(n: int, size: int, reads: int, writes: int, seconds: Sequence[float]) -> float:
    arrays = reads + writes
    moved = n * size * arrays
    total = len(seconds) * moved
    return total / sum(seconds) / 1e9


def mean_bandwidth(n: int, size: int, reads: int, writes: int, seconds: Sequence[float]) -> float:
    """The same: the bytes of one call over the mean time of one."""
    mean = sum(seconds) / len(seconds)
    gigabytes = n * size / 1_000_000_000
    return gigabytes * reads / mean + gigabytes * writes / mean


BUGS = (
    Bug(
        "gigabytes of 1024 cubed",
        "meta-pytorch/torchcomms#140",
        "GB and GiB differ by seven per cent. How exact is your comparison?",
        {"/ 1e9": "/ 1024**3"},
    ),
    Bug(
        "ten times ten to the nine",
        "eegkno/CUDA_by_practice#8",
        "Is the number right, or only one that is proportional to it?",
        {"/ 1e9": "/ 10e9"},
    ),
    Bug(
        "eight bytes, whatever the type",
        "chapel-lang/chapel#24686",
        "Ask about numbers of a size that a careless author would not think of.",
        {"n * size * arrays": "n * 8 * arrays"},
    ),
    Bug(
        "an update counts once",
        "RRZE-HPC/likwid#195",
        "Reading a number and writing it back moves it twice. Choose an operation that writes.",
        {"arrays = reads + writes": "arrays = max(reads, writes)"},
    ),
    Bug(
        "a write counts as two",
        "claudiopica/HiRep#124",
        "One read and one write are two arrays, not three. Which operation would show it?",
        {"arrays = reads + writes": "arrays = reads + 2 * writes"},
    ),
    Bug(
        "rates are added up",
        "meta-pytorch/MSLK#40",
        "Time more than one call. Ten calls are no faster than one.",
        {"return total / sum(seconds) / 1e9": "return sum(moved / s for s in seconds) / 1e9"},
    ),
)


def bandwidth_test(implementation: Any) -> None:
    # Two arrays in and one out, of 250 million numbers of 2 bytes: 1.5 GB a call.
    got = implementation(250_000_000, 2, 2, 1, [1.0, 3.0])
    assert abs(got - 0.75) < 1e-6, f"3 GB in 4 s are 0.75 GB/s, not {got}"


BANDWIDTH_TEST = write_the_test(
    "20.7", bandwidth_test, bandwidth, mean_bandwidth, BUGS, MUTANTS["20.7"]
)


TASKS = (LEAST, PRODUCT, TILE, FUSED, FILL, WALL, BANDWIDTH_TEST)


# A problem for paper


@dataclass(frozen=True, repr=False)
class Problem:
    """An operation on 2-byte numbers, and a machine so slow that paper keeps up."""

    machine: Machine
    operation: str  # as it is asked
    flops_worked: str
    bytes_worked: str
    cost: Cost

    @property
    def answer(self) -> dict[str, Fraction | str]:
        x = Fraction(self.cost.flops) / Fraction(self.machine.flops)
        y = Fraction(self.cost.bytes) / Fraction(self.machine.bandwidth)
        return {
            "intensity": Fraction(self.cost.flops) / Fraction(self.cost.bytes),
            "ridge": Fraction(self.machine.flops) / Fraction(self.machine.bandwidth),
            "least": max(x, y),
            "most": x + y,
            "limit": "both" if x == y else "arithmetic" if x > y else "memory",
        }

    def __repr__(self) -> str:
        m = self.machine
        return (
            f"A machine does {m.flops} FLOP/s and moves {m.bandwidth} bytes a second; numbers have"
            f" 2 bytes.\nIt {self.operation}.\nWhat is the intensity, and what limits it? How long"
            " does it take with perfect overlap,\nand how long without any?"
        )

    def worked(self) -> str:
        m, c, a = self.machine, self.cost, self.answer
        x, y = (Fraction(n) / Fraction(s) for n, s in ((c.flops, m.flops), (c.bytes, m.bandwidth)))
        limits = {"both": "both limit it", "arithmetic": "arithmetic limits it"}
        return "\n".join(
            [
                f"FLOPs        {self.flops_worked} = {c.flops}",
                f"bytes        {self.bytes_worked} = {c.bytes}",
                f"intensity    {c.flops} / {c.bytes} = {a['intensity']}",
                f"ridge        {m.flops} / {m.bandwidth} = {a['ridge']}:"
                f" {limits.get(str(a['limit']), 'memory limits it')}",
                f"arithmetic   {c.flops} / {m.flops} = {_decimal(x)} s",
                f"memory       {c.bytes} / {m.bandwidth} = {_decimal(y)} s",
                f"overlapped   {_decimal(max(x, y))} s",
                f"in turn      {_decimal(x + y)} s",
            ]
        )


def _decimal(x: Fraction) -> str:
    """The speeds divide powers of ten, so every time has an end."""
    return f"{float(x):.10f}".rstrip("0").rstrip(".")


def problem(random_seed: int) -> Problem:
    """A fresh operation on a fresh machine."""
    rng = random.Random(f"roofline {random_seed}")
    machine = Machine("paper", rng.choice((20, 50, 100, 200)), rng.choice((5, 8, 10, 20)))
    kind = rng.choice(("sum", "product", "product", "stored", "not stored"))
    if kind == "sum":
        n = rng.randint(3, 40)
        said = f"adds two vectors of {n} numbers"
        return Problem(machine, said, f"{n}", f"2·3·{n}", Cost(n, 6 * n))
    if kind == "product":
        r, i, c = (rng.randint(2, 30) for _ in range(3))
        said = f"multiplies a {r} x {i} with a {i} x {c} matrix"
        worked = f"2·({r}·{i} + {i}·{c} + {r}·{c})"
        return Problem(machine, said, f"2·{r}·{i}·{c}", worked, matmul(r, i, c))
    T, D = rng.choice((4, 8, 10, 16, 20)), rng.choice((2, 4, 5, 8))
    said = f"computes attention on {T} tokens, one head of width {D}; scores and weights"
    if kind == "stored":
        said += " are stored"
        worked = f"2·(4·{T}·{T} + 4·{T}·{D})"
    else:
        said += " are not"
        worked = f"2·4·{T}·{D}"
    cost = attention(T, T, D, stored=kind == "stored")
    return Problem(machine, said, f"4·{T}·{T}·{D}", worked, cost)
