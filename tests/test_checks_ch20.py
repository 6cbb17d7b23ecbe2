"""heed.checks.ch20: the wrong answers are caught, and the right ones agree with better ones."""

import time
from fractions import Fraction

import pytest

from heed import roofline
from heed.checks import ch20, check
from heed.roofline import H100, Cost, Machine


def task_id(x):
    return getattr(x, "id", None) or getattr(x, "name", None)


@pytest.mark.parametrize("task", ch20.TASKS, ids=task_id)
def test_a_check_takes_less_than_a_second(task):
    start = time.perf_counter()
    check(task.id, task.reference)
    assert time.perf_counter() - start < 1


def test_the_least_time_is_that_of_heeds_machine():
    paper = Machine("paper", 100, 10)
    for flops, moved in ((3456, 864), (54_000, 5400), (432_000, 21_600), (1, 0), (0, 1)):
        seconds, limit = ch20.least_time(flops, moved, 100, 10)
        assert seconds == paper.seconds(Cost(flops, moved))
        rho = Cost(flops, moved).intensity
        assert limit == ("both" if rho == 10 else "arithmetic" if rho > 10 else "memory")


def test_the_intensity_is_that_of_heed():
    for sides in ((3, 5, 7, 2), (1, 64, 64, 4), (30, 30, 30, 1)):
        assert ch20.product_intensity(*sides) == roofline.matmul(*sides).intensity


def test_no_wider_tile_fits_and_the_traffic_is_that_of_counting_tiles():
    for n in (1, 5, 12):
        for room in range(3, 300):
            t, moved = ch20.best_tile(n, room)
            assert t * t + 2 * t <= room and (t == n or (t + 1) ** 2 + 2 * (t + 1) > room)
            assert moved == ch20._counted(n, t)


def test_fusing_a_chain_never_takes_longer_and_saves_what_lies_between():
    for chain in ([(1, 0)], [(1, 0), (1, 0)], [(70, 2), (1, 0), (3, 1)]):
        apart, fused = ch20.chain_times(1000, 2, chain, 100, 10)
        assert fused <= apart
        assert (fused == apart) == (len(chain) == 1)
    apart, fused = ch20.chain_times(1000, 2, [(1, 0)] * 5, 10**9, 10)
    assert apart == 5 * fused  # memory alone: five trips, or one


def test_the_batch_is_the_first_that_reaches_the_ridge():
    for numbers in ((30, 70, 2, 100, 10), (64, 48, 4, 70, 9), (17, 19, 1, 31, 4)):
        T = ch20.fill(*numbers)
        assert ch20._filled(T, *numbers)
        assert T == 1 or not ch20._filled(T - 1, *numbers)
    assert ch20.fill(20, 20, 2, 100, 10) == 0
    assert not ch20._filled(10**9, 20, 20, 2, 100, 10)


def test_an_h100_wants_345_tokens_at_once():
    T = ch20.fill(4096, 4096, 2, int(H100.flops), int(H100.bandwidth))
    assert T == 345
    assert roofline.matmul(T, 4096, 4096).intensity >= H100.ridge
    assert roofline.matmul(T - 1, 4096, 4096).intensity < H100.ridge


def test_the_wall_is_the_first_text_at_which_attention_takes_as_long():
    for numbers in ((50_000, 3, 7, 90, 7), (777, 1, 5, 10, 10), (12 * 48**2, 3, 16, 100, 10**6)):
        T = ch20.wall(*numbers)
        assert ch20._later(T, *numbers)
        assert T == 1 or not ch20._later(T - 1, *numbers)


def test_both_ways_to_write_the_bandwidth_agree():
    for numbers in ((10**9, 2, 2, 1, [1.0, 3.0]), (7, 8, 1, 1, [0.5]), (5, 4, 3, 0, [1, 2, 4])):
        assert ch20.bandwidth(*numbers) == pytest.approx(ch20.mean_bandwidth(*numbers), rel=1e-12)
    assert ch20.bandwidth(10**9, 2, 2, 1, [1.0, 3.0]) == 3


def test_a_wrong_count_is_shown_with_both_numbers():
    said = repr(check("20.3", lambda n, room: (1, 2 * n**3)))
    assert "n = 6, room for 3 numbers; numbers moved" in said
    assert "expected  468\n  got       432\n" in said
    assert "got       a float, 345.0" in repr(check("20.5", lambda *numbers: 345.0))
    said = repr(check("20.1", lambda *numbers: (86.4, "Memory")))
    assert "expected  'memory'\n  got       'Memory'\n" in said
    assert "got       a str" in repr(check("20.2", lambda *numbers: "10"))


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_has_the_numbers_of_the_roofline(random_seed):
    p = ch20.problem(random_seed)
    m, c = p.machine, p.cost
    exact = Machine(m.name, Fraction(m.flops), Fraction(m.bandwidth))
    a = p.answer
    assert a["least"] == exact.seconds(c)
    assert a["most"] == c.flops / exact.flops + c.bytes / exact.bandwidth <= 2 * a["least"]
    assert a["intensity"] == Fraction(c.flops, c.bytes) and a["ridge"] == exact.ridge
    assert (a["limit"] == "memory") == (a["intensity"] < a["ridge"])
    lines = dict(line.split(None, 1) for line in p.worked().splitlines())
    for name, want in {"FLOPs": c.flops, "bytes": c.bytes}.items():
        product, _, total = lines[name].rpartition(" = ")
        assert eval(product.replace("·", "*")) == want == int(total)
    worked = p.worked().splitlines()
    for start, want in {"overlapped": a["least"], "in turn": a["most"]}.items():
        (line,) = (line for line in worked if line.startswith(start))
        assert Fraction(line.removeprefix(start).removesuffix(" s").strip()) == want


def test_problems_are_repeatable_and_fresh():
    assert repr(ch20.problem(5)) == repr(ch20.problem(5))
    assert len({repr(ch20.problem(s)) for s in range(200)}) > 150
    kinds = {repr(ch20.problem(s)).split("\nIt ")[1].split()[0] for s in range(50)}
    assert kinds == {"adds", "multiplies", "computes"}


def test_the_question_keeps_the_answer_to_itself():
    p = ch20.problem(7)
    assert max(map(len, repr(p).splitlines())) <= 88
    assert str(p.cost.flops) not in repr(p) and str(p.cost.bytes) not in repr(p)


def test_the_tasks_are_numbered_and_the_last_is_to_write_the_test():
    assert [task.id for task in ch20.TASKS] == [f"20.{n}" for n in range(1, 8)]
    assert [bool(task.bugs) for task in ch20.TASKS] == [False] * 6 + [True]
