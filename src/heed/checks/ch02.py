"""Chapter 02, the fixed vector: the checks of its seven tasks, and `problem`, digits in one number.

B sentences · T steps · E width of the input · C channels of the state · V symbols · n digits.
A GRU's weights come in PyTorch's order: the rows of r, then z, then n.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import expect, normal, several

HALF = Fraction(1, 2)
f64 = torch.float64

MUTANTS = mutants(__file__)


def numbers(rng: Generator, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=rng)


def pack(digits: list[int], base: int) -> list[Fraction]:
    """The states of the encoder, the start included."""
    states = [HALF]
    for digit in digits:
        states.append((states[-1] + digit) / base)
    return states


# 02.1


def unpack(h: Fraction, n: int, base: int) -> list[int]:
    digits = []
    for _ in range(n):
        digit = math.floor(h * base)
        digits.append(digit)
        h = h * base - digit
    return digits


def _unpack(f: Function, digits: list[int], base: int, given: str) -> None:
    got = f(pack(digits, base)[-1], len(digits), base)
    expect(list(several(got, len(digits), given)), digits[::-1], given)


@prop("one digit", "(1/2 + 3)/10 = 7/20. Which operation undoes the division?")
def one_digit(f: Function, rng: Generator) -> None:
    _unpack(f, [3], 10, "h = 7/20, one digit, base 10")


@prop("312", "After a digit is written, only the rest goes on. And in which order do they come?")
def three_digits(f: Function, rng: Generator) -> None:
    _unpack(f, [3, 1, 2], 10, "h = 427/2000 (312 was read), three digits, base 10")


@prop("other bases", "Ten is nowhere in the derivation.")
def other_bases(f: Function, rng: Generator) -> None:
    for base in (2, 5, 16):
        digits = numbers(rng, 0, base - 1, 7).tolist()
        _unpack(f, digits, base, f"{digits} were read, in base {base}")


@prop("sixty digits", "A float has room for sixteen digits. A Fraction is exact: keep it one.")
def sixty_digits(f: Function, rng: Generator) -> None:
    digits = numbers(rng, 0, 9, 60).tolist()
    _unpack(f, digits, 10, "sixty digits, base 10")


UNPACK = Task("02.1", unpack, (one_digit, three_digits, other_bases, sixty_digits), MUTANTS["02.1"])


# 02.2


def capacity(n_floats: int, bits: int, base: int) -> int:
    codes, n = 2 ** (n_floats * bits), 0
    while base ** (n + 1) <= codes:
        n += 1
    return n


def _capacity(f: Function, n_floats: int, bits: int, base: int) -> None:
    given = f"{n_floats} numbers of {bits} bits, base {base}"
    expect(f(n_floats, bits, base), capacity(n_floats, bits, base), given)


@prop("one byte", "256 codes: enough for the strings of two digits, not for those of three.")
def one_byte(f: Function, rng: Generator) -> None:
    _capacity(f, 1, 8, 10)


@prop("several numbers", "Two numbers of 8 bits: 256 + 256 codes, or 256 times 256?")
def several_numbers(f: Function, rng: Generator) -> None:
    for n_floats, bits in ((2, 8), (3, 5), (64, 32)):
        _capacity(f, n_floats, bits, 10)


@prop("other bases", "How many strings of n symbols are there when each is one of `base`?")
def capacity_bases(f: Function, rng: Generator) -> None:
    for base in (3, 26, 1000):
        _capacity(f, 5, 7, base)


@prop("exactly full", "2**n strings fit into 2**n codes, with none to spare.")
def exactly_full(f: Function, rng: Generator) -> None:
    for base in (2, 4, 8):
        _capacity(f, 3, 4, base)


@prop("no rounding", "Logarithms of whole numbers are rounded; whole numbers need not be.")
def no_rounding(f: Function, rng: Generator) -> None:
    for n_floats, bits, base in ((1, 29 * 15, 2**29), (1, 3 * 31, 8), (5, 23, 2**23)):
        _capacity(f, n_floats, bits, base)
    expect(f(1, 1585, 3**1000), 1, "1 number of 1585 bits, base 3**1000")
    expect(f(1, 1584, 3**1000), 0, "1 number of 1584 bits, base 3**1000")


CAPACITY = Task(
    "02.2",
    capacity,
    (one_byte, several_numbers, capacity_bases, exactly_full, no_rounding),
    MUTANTS["02.2"],
)


# 02.3


def gru_step(
    x: Float[Tensor, "B E"],
    h: Float[Tensor, "B C"],
    W: Float[Tensor, "rows E"],
    U: Float[Tensor, "rows C"],
    a: Float[Tensor, " rows"],
    b: Float[Tensor, " rows"],
    reset_first: bool,
) -> Float[Tensor, "B C"]:
    (W_r, W_z, W_n), (U_r, U_z, U_n) = W.chunk(3), U.chunk(3)
    (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3), b.chunk(3)
    r = torch.sigmoid(x @ W_r.T + a_r + h @ U_r.T + b_r)
    z = torch.sigmoid(x @ W_z.T + a_z + h @ U_z.T + b_z)
    past = (r * h) @ U_n.T + b_n if reset_first else r * (h @ U_n.T + b_n)
    n = torch.tanh(x @ W_n.T + a_n + past)
    return (1 - z) * n + z * h


def _weights(rng: Generator, E: int, C: int) -> list[Tensor]:
    return [normal(rng, *shape) for shape in ((3 * C, E), (3 * C, C), (3 * C,), (3 * C,))]


@prop("by hand", "z = 3/4, r = 1/2, n = tanh(ln 2) = 3/5: how much of the old state is kept?")
def gru_by_hand(f: Function, rng: Generator) -> None:
    none = torch.zeros(3, 1, dtype=f64)
    a = torch.tensor([0, math.log(3), 0], dtype=f64)
    b = torch.tensor([0, 0, 2 * math.log(2)], dtype=f64)
    x, h = torch.zeros(1, 1, dtype=f64), torch.full((1, 1), 0.2, dtype=f64)
    given = "one channel, h = 1/5, z sees ln 3, r sees 0, b_n = 2 ln 2, all else 0"
    expect(f(x, h, none, none, a, b, False), [[0.3]], given)


@prop("an open gate keeps", "Where z is 1 nothing may change; where it is 0 nothing may remain.")
def gru_keeps(f: Function, rng: Generator) -> None:
    W, U, a, b = _weights(rng, 3, 5)
    x, h = normal(rng, 2, 3), normal(rng, 2, 5)
    a[5:10] += 1000
    expect(f(x, h, W, U, a, b, False), h, "update gate at 1: the old state")
    a[5:10] -= 2000
    W[10:], U[10:], b[10:] = 0, 0, 0
    want = a[10:].tanh().expand(2, 5)
    expect(f(x, h, W, U, a, b, False), want, "update gate at 0: the candidate")


@prop("torch", "Each of the four weights reaches all three gates. Is b_n inside the reset gate?")
def gru_of_torch(f: Function, rng: Generator) -> None:
    W, U, a, b = _weights(rng, 3, 5)
    x, h = normal(rng, 2, 3), normal(rng, 2, 5)
    want = torch.gru_cell(x, h, W, U, a, b)
    expect(f(x, h, W, U, a, b, False), want, "E = 3, C = 5, reset_first False: torch.gru_cell")


@prop("as published", "r scales h before U_n mixes the channels. The bias is not scaled then.")
def gru_as_published(f: Function, rng: Generator) -> None:
    W, U, a, b = _weights(rng, 3, 5)
    x, h = normal(rng, 2, 3), normal(rng, 2, 5)
    r = torch.sigmoid(x @ W[:5].T + a[:5] + h @ U[:5].T + b[:5])
    # Let torch's matrix be the unit matrix and its bias 0: then r ⊙ h is all that gets through.
    past = torch.einsum("bc,dc->bd", r * h, U[10:]) + b[10:]
    z = torch.sigmoid(x @ W[5:10].T + a[5:10] + h @ U[5:10].T + b[5:10])
    want = torch.lerp(torch.tanh(x @ W[10:].T + a[10:] + past), h, z)
    expect(f(x, h, W, U, a, b, True), want, "E = 3, C = 5, reset_first True")


GRU_STEP = Task(
    "02.3", gru_step, (gru_keeps, gru_by_hand, gru_of_torch, gru_as_published), MUTANTS["02.3"]
)


# 02.4


def shares(gates: Float[Tensor, "T C"]) -> Float[Tensor, "T+1 C"]:
    rows = [torch.ones_like(gates[0])]
    for z in gates:
        rows = [row * z for row in rows] + [1 - z]
    return torch.stack(rows)


@prop("one step", "The start is kept with z, the first candidate comes in with 1 - z.")
def share_of_one(f: Function, rng: Generator) -> None:
    expect(f(torch.tensor([[0.75]], dtype=f64)), [[0.75], [0.25]], "one gate, z = 3/4")


@prop("shares sum to 1", "A later gate scales everything that came before it, the start as well.")
def shares_sum(f: Function, rng: Generator) -> None:
    got = f(torch.rand(7, 3, generator=rng, dtype=f64))
    expect(got.shape, [8, 3], "7 gates of 3 channels; the shape")
    expect(got.sum(0), torch.ones(3), "7 gates of 3 channels; their sum")


@prop("the state of torch's GRU", "Weigh the start and the candidates with your shares.")
def shares_of_torch(f: Function, rng: Generator) -> None:
    W, U, a, b = _weights(rng, 3, 5)
    h, gates, mixed = normal(rng, 1, 5), [], []
    mixed.append(h[0])
    for x in normal(rng, 7, 1, 3):
        gi, gh = (x @ W.T + a).chunk(3, 1), (h @ U.T + b).chunk(3, 1)
        mixed.append(torch.tanh(gi[2] + torch.sigmoid(gi[0] + gh[0]) * gh[2])[0])
        gates.append(torch.sigmoid(gi[1] + gh[1])[0])
        h = torch.gru_cell(x, h, W, U, a, b)
    got = f(torch.stack(gates))
    expect((got * torch.stack(mixed)).sum(0), h[0], "7 steps of 5 channels; the last state")


@prop("a gate of 0", "Nothing from before such a step is left. Do not divide by a gate.")
def shares_after_zero(f: Function, rng: Generator) -> None:
    gates = torch.tensor([[0.5], [0.0], [0.5]], dtype=f64)
    expect(f(gates), [[0], [0], [0.5], [0.5]], "gates 1/2, 0, 1/2")


SHARES = Task(
    "02.4",
    shares,
    (share_of_one, shares_sum, shares_of_torch, shares_after_zero),
    MUTANTS["02.4"],
)


# 02.5


def bits_carried(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> float:
    V = logits.shape[-1]
    logs = logits.log_softmax(dim=-1)
    chosen = logs.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    gained = (chosen + math.log(V)) / math.log(2)
    return (gained * (targets >= 0)).sum().item() / len(targets)


@prop("a guess carries nothing", "Equal logits are the guess: then bits in and loss are equal.")
def guess_carries_nothing(f: Function, rng: Generator) -> None:
    targets = numbers(rng, 0, 9, 3, 5)
    expect(f(torch.ones(3, 5, 10, dtype=f64), targets), 0, "equal logits, 3 strings of 5 digits")


@prop("a sure answer carries all", "log2 of V for each symbol. Did you add up over the string?")
def sure_carries_all(f: Function, rng: Generator) -> None:
    targets = numbers(rng, 0, 7, 3, 5)
    sure = 200 * nn.functional.one_hot(targets, 8).double()
    expect(f(sure, targets), 15, "sure and right, 3 strings of 5 symbols, 8 of them")


@prop("half sure", "Halves of the probability are one bit each.")
def half_sure(f: Function, rng: Generator) -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=f64).log().expand(1, 4, 4)
    targets = torch.tensor([[0, 1, 2, 3]])
    expect(f(logits, targets), -1, "p = 1/2, 1/4, 1/8, 1/8 for each symbol once: 2-1+2-2+2-3+2-3")


@prop("sure and wrong", "A loss has no floor: one may carry less than nothing.")
def sure_and_wrong(f: Function, rng: Generator) -> None:
    logits = torch.tensor([[[40.0, 0.0]]], dtype=f64)
    expect(f(logits, torch.tensor([[1]])), 1 - 40 / math.log(2), "logits 40 and 0, target 1")


@prop("padding", "A target of -100 is no symbol: it brings no bits and costs none.")
def padding_carries_nothing(f: Function, rng: Generator) -> None:
    logits, targets = normal(rng, 3, 5, 10), numbers(rng, 0, 9, 3, 5)
    targets[0, 2:], targets[2, 4:] = -100, -100
    alone = [
        bits_carried(logits[i : i + 1, :n], targets[i : i + 1, :n])
        for i, n in ((0, 2), (1, 5), (2, 4))
    ]
    expect(f(logits, targets), sum(alone) / 3, "3 strings of 2, 5 and 4 digits, padded with -100")


BITS_CARRIED = Task(
    "02.5",
    bits_carried,
    (
        guess_carries_nothing,
        sure_carries_all,
        half_sure,
        sure_and_wrong,
        padding_carries_nothing,
    ),
    MUTANTS["02.5"],
)


# 02.6

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def greedy(
    step: Step, state: Float[Tensor, "B C"], begin: int, end: int, max_len: int
) -> Int[Tensor, "B {max_len}"]:
    B = len(state)
    word, ended = torch.full((B,), begin), torch.zeros(B, dtype=torch.bool)
    written = torch.zeros(B, max_len, dtype=torch.int64)
    for t in range(max_len):
        logits, state = step(word, state)
        word = logits.argmax(dim=-1)
        written[:, t] = torch.where(ended, 0, word)
        ended = ended | (word == end)
    return written


def _script(rows: list[list[int]], V: int = 9) -> tuple[Step, Tensor]:
    """A decoder that says row b, one word a call, as long as it is given back what it said.

    Its state is (row, calls so far). Given another word than its last, it says 8 from then on.
    """
    table = torch.tensor(rows)

    def step(word: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        row, t = state[:, 0].long(), state[:, 1].long()
        before = torch.where(t > 0, table[row, (t - 1).clamp(min=0)], 1)
        lost = (word != before) | (state[:, 2] > 0)
        said = torch.where(lost, 8, table[row, t.clamp(max=table.shape[1] - 1)])
        logits = nn.functional.one_hot(said, V).double() - 3
        return logits, torch.stack([state[:, 0], state[:, 1] + 1, lost.double()], 1)

    start = torch.zeros(len(rows), 3, dtype=f64)
    start[:, 0] = torch.arange(len(rows))
    return step, start


@prop("one word", "The first word that goes in is the sign for begin.")
def one_word(f: Function, rng: Generator) -> None:
    expect(f(*_script([[5]]), 1, 2, 1), [[5]], "one row that says 5, max_len 1")


@prop("its own words", "What goes in at a step is what came out of the one before, and its state.")
def own_words(f: Function, rng: Generator) -> None:
    rows = numbers(rng, 3, 7, 3, 5).tolist()
    expect(f(*_script(rows), 1, 2, 5), rows, f"rows that say {rows}")


@prop("ends", "After a row's end there are zeros, whatever the decoder goes on to say.")
def ends(f: Function, rng: Generator) -> None:
    rows = [[5, 6, 2, 4, 4], [2, 4, 4, 4, 2], [3, 4, 5, 6, 7]]
    want = [[5, 6, 2, 0, 0], [2, 0, 0, 0, 0], [3, 4, 5, 6, 7]]
    expect(f(*_script(rows), 1, 2, 5), want, f"rows that say {rows}, end = 2")


@prop("max_len", "Short answers are padded up to max_len, long ones are cut.")
def max_len(f: Function, rng: Generator) -> None:
    rows = [[5, 2, 4, 4, 4, 4, 4], [6, 2, 4, 4, 4, 4, 4]]
    expect(f(*_script(rows), 1, 2, 7), [[5, 2, 0, 0, 0, 0, 0], [6, 2] + [0] * 5], f"{rows}, 7")
    expect(f(*_script([[3, 4, 5, 6]]), 1, 2, 2), [[3, 4]], "a row that says 3 4 5 6, max_len 2")


GREEDY = Task("02.6", greedy, (one_word, own_words, ends, max_len), MUTANTS["02.6"])


# 02.7


def last_states(
    gru: nn.GRU, x: Float[Tensor, "B T E"], lengths: Int[Tensor, " B"]
) -> Float[Tensor, "B both"]:
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    states, _ = nn.utils.rnn.pad_packed_sequence(gru(packed)[0], batch_first=True)
    forwards, backwards = states.chunk(2, dim=-1)  # (B, T, C) each
    last = forwards[torch.arange(len(x)), lengths - 1]
    return torch.cat([last, backwards[:, 0]], dim=-1)


def row_by_row(gru: nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """Each sentence alone, without its padding."""
    ends = [gru(row[:n][None])[1] for row, n in zip(x, lengths.tolist(), strict=True)]
    return torch.stack([torch.cat([h[0, 0], h[1, 0]]) for h in ends])


def last_states_test(implementation: Function) -> None:
    torch.manual_seed(0)
    gru = nn.GRU(3, 5, batch_first=True, bidirectional=True).double()
    x, lengths = torch.randn(4, 7, 3, dtype=torch.float64), torch.tensor([2, 6, 1, 4])
    got = implementation(gru, x, lengths)
    for b, n in enumerate(lengths.tolist()):
        _, last = gru(x[b : b + 1, :n])  # (2, 1, C)
        assert torch.allclose(got[b], last[:, 0].flatten(), atol=1e-9)


LAST_STATES_TEST = write_the_test(
    "02.7",
    last_states_test,
    last_states,
    row_by_row,
    (
        Bug(
            "short sentences get zeros",
            "allenai/allennlp#1713",
            "In the last column of a padded batch a short sentence has no state of its own.",
            {"lengths - 1]": "-1]"},
        ),
        Bug(
            "reads on through the padding",
            "NVIDIA/mellotron#71",
            "What stands in the padding must not matter. Is it random in your test?",
            {
                "states, _ = nn.utils.rnn.pad_packed_sequence(gru(packed)[0], batch_first=True)": (
                    "states, _ = gru(x)"
                )
            },
        ),
        Bug(
            "a length is taken for an index",
            "yandexdataschool/Practical_RL#558",
            "The last of n states has index n - 1. A sentence of full length hides nothing here.",
            {"lengths - 1]": "lengths.clamp(max=states.shape[1] - 1)]"},
        ),
        Bug(
            "both directions at the last word",
            "yunjey/pytorch-tutorial#174",
            "At the last word the reader from the right has only begun.",
            {"backwards[:, 0]": "backwards[torch.arange(len(x)), lengths - 1]"},
        ),
        Bug(
            "view mixes the sentences of a batch",
            "facebookresearch/fairseq#239",
            "The shape is right, the numbers are all there. Do they belong to one sentence?",
            {
                "torch.cat([last, backwards[:, 0]], dim=-1)": (
                    "torch.stack([last, backwards[:, 0]]).view(len(x), -1)"
                )
            },
        ),
    ),
    MUTANTS["02.7"],
)


@dataclass(frozen=True, repr=False)
class Problem:
    """A string of digits in some base, to be carried by one number."""

    random_seed: int
    digits: tuple[int, ...]
    base: int

    @property
    def states(self) -> list[Fraction]:
        return pack(list(self.digits), self.base)

    @property
    def answer(self) -> Fraction:
        """The last state."""
        return self.states[-1]

    def __repr__(self) -> str:
        said = " ".join(map(str, self.digits))
        return "\n".join(
            [
                f"Problem {self.random_seed}: one number carries a string, base {self.base}",
                f"  h = 1/2, then h becomes (h + x) / {self.base} for x = {said}",
                "Give all states as fractions. Then write the digits back from the last state.",
            ]
        )

    def worked(self) -> str:
        """Reading, then writing, with this problem's numbers."""
        states, base, lines = self.states, self.base, []
        for x, before, after in zip(self.digits, states, states[1:], strict=False):
            lines.append(f"read {x}    ({before} + {x}) / {base} = {after}")
        for x, before, after in zip(self.digits[::-1], states[::-1], states[-2::-1], strict=False):
            lines.append(f"write {x}   {base} · {before} = {x} + {after}")
        return "\n".join(lines)


def problem(random_seed: int) -> Problem:
    """A fresh string for paper: 3 or 4 digits, not all the same, in a base from 3 to 10."""
    rng = random.Random(random_seed)
    while True:
        base = rng.choice([3, 4, 5, 6, 8, 10])
        digits = tuple(rng.randrange(base) for _ in range(rng.choice([3, 3, 4])))
        if len(set(digits)) > 1 and digits != digits[::-1]:
            return Problem(random_seed, digits, base)


TASKS = (UNPACK, CAPACITY, GRU_STEP, SHARES, BITS_CARRIED, GREEDY, LAST_STATES_TEST)
