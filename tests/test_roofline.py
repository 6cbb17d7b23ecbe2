"""The roofline against a machine simulated block by block, operands weighed in memory, torch's own
counter of operations, and the numbers of the data sheets."""

import math
from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heed.roofline import A100, H100, H200, Cost, Machine, attention, matmul, scores_bytes

PAPER = Machine("paper", Fraction(100), Fraction(10))


def overlapped(machine, cost, blocks):
    """Seconds until a machine with two buffers is done: it loads a block while it computes one."""
    load, work = (Fraction(x) / blocks for x in (cost.bytes, cost.flops))
    load, work = load / machine.bandwidth, work / machine.flops
    loaded, done = Fraction(0), [Fraction(0), Fraction(0)]
    for _ in range(blocks):
        loaded = max(loaded, done[-2]) + load  # the buffer of the block before last is free
        done.append(max(loaded, done[-1]) + work)
    return done[-1]


COSTS = [Cost(f, b) for f, b in ((1000, 40), (40, 1000), (1000, 100), (7, 3), (0, 5), (5, 0))]


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_no_machine_is_faster_than_the_roofline_and_none_needs_to_be_half_as_fast(cost):
    least = PAPER.seconds(cost)
    for blocks in (1, 2, 3, 10, 100):
        assert least <= overlapped(PAPER, cost, blocks) <= 2 * least
    assert overlapped(PAPER, cost, 1) == cost.flops / PAPER.flops + cost.bytes / PAPER.bandwidth
    assert overlapped(PAPER, cost, 1000) <= least * Fraction(1001, 1000)


@pytest.mark.parametrize("cost", [cost for cost in COSTS if cost.flops and cost.bytes], ids=str)
def test_the_attainable_rate_is_flops_over_seconds(cost):
    exact = Cost(Fraction(cost.flops), Fraction(cost.bytes))
    assert PAPER.attainable(exact.intensity) == exact.flops / PAPER.seconds(exact)


def test_the_two_speeds_meet_at_the_ridge():
    assert PAPER.ridge == 10
    assert PAPER.attainable(PAPER.ridge) == 100 == PAPER.attainable(11)
    assert PAPER.attainable(9) == 90
    assert PAPER.attainable(math.inf) == 100
    assert PAPER.attainable(0) == 0


def test_seconds_are_exact_where_the_machine_is():
    assert PAPER.seconds(Cost(1, 3)) == Fraction(3, 10)
    assert type(PAPER.seconds(Cost(1, 0))) is Fraction


@pytest.mark.parametrize(
    "machine, peak, bandwidth, ridge",
    [(A100, 312, 2039, 153), (H100, 989, 3350, 295), (H200, 989, 4800, 206)],
    ids=lambda x: getattr(x, "name", None),
)
def test_the_data_sheets(machine, peak, bandwidth, ridge):
    assert machine.flops == peak * 1e12
    assert machine.bandwidth == bandwidth * 1e9
    assert round(machine.ridge) == ridge


# Costs


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows, inner, columns", [(3, 5, 7), (1, 11, 2), (8, 8, 8)])
def test_a_product_costs_what_torch_counts_and_what_its_tensors_weigh(rows, inner, columns, dtype):
    a = torch.empty(rows, inner, dtype=dtype, device="meta")
    b = torch.empty(inner, columns, dtype=dtype, device="meta")
    with FlopCounterMode(display=False) as counter:
        c = a @ b
    want = Cost(counter.get_total_flops(), a.nbytes + b.nbytes + c.nbytes)
    assert matmul(rows, inner, columns, dtype.itemsize) == want


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_costs_what_torch_counts_and_what_its_tensors_weigh(dtype):
    T, S, D = 5, 11, 3
    q, k, v = (torch.empty(n, D, dtype=dtype, device="meta") for n in (T, S, S))
    with FlopCounterMode(display=False) as counter:
        scores = q @ k.mT
        weights = scores.softmax(-1)
        o = weights @ v
    ends = sum(x.nbytes for x in (q, k, v, o))
    inside = 2 * scores.nbytes + 2 * weights.nbytes
    size = dtype.itemsize
    assert attention(T, S, D, size, stored=False) == Cost(counter.get_total_flops(), ends)
    assert attention(T, S, D, size, stored=True) == Cost(counter.get_total_flops(), ends + inside)
    assert scores_bytes(T, S, size) == scores.nbytes


@pytest.mark.parametrize(
    "n, unit, want",
    [(512, 20, 0.5), (2048, 20, 8), (8192, 20, 128), (32768, 30, 2), (131072, 30, 32)],
)
def test_the_scores_of_one_head_in_half_precision(n, unit, want):
    assert scores_bytes(n, n) / 2**unit == want


def test_stored_attention_never_reaches_half_its_head_width():
    for n in (1, 64, 1024, 2**20):
        assert attention(n, n, 128, stored=True).intensity < 64
        assert attention(n, n, 128, stored=False).intensity == n / 2


def test_a_square_product_has_a_third_of_its_side_in_half_precision():
    assert matmul(3, 3, 3).intensity == 1
    assert matmul(3072, 3072, 3072).intensity == 1024


def test_costs_add_up():
    assert Cost(1, 2) + Cost(3, 5) == Cost(4, 7)
    assert matmul(2, 3, 4) + matmul(2, 4, 5) == Cost(48 + 80, 2 * (6 + 12 + 8 + 8 + 20 + 10))
    with pytest.raises(TypeError):
        Cost(1, 2) + 3


def test_what_moves_nothing_is_infinitely_intense_and_what_does_nothing_is_not():
    assert Cost(1, 0).intensity == math.inf
    assert Cost(0, 1).intensity == 0
    assert Cost(0, 0).intensity == 0


# Bad input


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: Cost(-1, 2), "flops .* -1"),
        (lambda: Cost(1, math.nan), "bytes .* nan"),
        (lambda: Cost(1, math.inf), "bytes .* inf"),
        (lambda: Cost(True, 1), "flops .* True"),
        (lambda: Cost("1", 1), "flops .* '1'"),
        (lambda: Machine("m", 0, 1), "flops .* 0"),
        (lambda: Machine("m", 1, -1.5), "bandwidth .* -1.5"),
        (lambda: Machine("m", 1, math.inf), "bandwidth .* inf"),
        (lambda: Machine("m", math.nan, 1), "flops .* nan"),
        (lambda: PAPER.attainable(-1), "intensity .* -1"),
        (lambda: PAPER.attainable(math.nan), "intensity .* nan"),
        (lambda: matmul(0, 1, 1), "rows .* 0"),
        (lambda: matmul(1, 2.0, 1), "inner .* 2.0"),
        (lambda: matmul(1, 1, True), "columns .* True"),
        (lambda: matmul(1, 1, 1, 0), "size .* 0"),
        (lambda: scores_bytes(-1, 1), "T .* -1"),
        (lambda: attention(1, 0, 1, stored=True), "S .* 0"),
        (lambda: attention(1, 1, 1, 0.5, stored=False), "size .* 0.5"),
    ],
)
def test_what_is_no_count_and_no_speed_is_named(call, said, unchecked):
    with pytest.raises(ValueError, match=said):
        call()


def test_machines_and_costs_are_frozen():
    for thing in (PAPER, Cost(1, 1)):
        with pytest.raises(AttributeError):
            thing.flops = 3
