"""heed.checks.ch22: kernels are watched, and the right answers agree with better ones."""

import os
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import torch

from heed import masks
from heed.attention import attention
from heed.checks import ch22, check

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
tl = triton.language


def task_id(x):
    return getattr(x, "id", None) or getattr(x, "name", None)


@pytest.mark.parametrize("task", ch22.TASKS, ids=task_id)
def test_a_check_takes_less_than_a_second_for_each_property(task):
    start = time.perf_counter()
    check(task.id, task.reference)
    assert time.perf_counter() - start < len(task.properties)


# What the watch sees


@triton.jit
def blank(x, y, a, b, n, TILE: tl.constexpr):
    """Not begun."""
    raise NotImplementedError


@triton.jit
def nothing(x, y, a, b, n, TILE: tl.constexpr):
    pass


@triton.jit
def misspelt(x, y, a, b, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x_i = tl.lode(x + i, mask=i < n)
    tl.store(y + i, a * x_i + b, mask=i < n)


@triton.jit
def line(x_i, a, b):
    return a * x_i + b


@triton.jit
def with_a_helper(x, y, a, b, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y + i, line(tl.load(x + i, mask=i < n), a, b), mask=i < n)


@triton.jit
def far_away(x, y, a, b, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y + i * 10**8, a * tl.load(x + i, mask=i < n) + b, mask=i < n)


@triton.jit
def one_too_many(x, y, a, b, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y + i, a * tl.load(x + i, mask=i < n) + b, mask=i <= n)


@triton.jit
def too_few_arguments(x, y, n, TILE: tl.constexpr):
    pass


def not_a_kernel(x, y, a, b, n, TILE):
    y[:] = a * x + b


def test_a_kernel_that_is_not_begun_is_not_started():
    assert repr(check("22.2", blank)) == "22.2 not started yet"


def test_a_kernel_that_writes_nothing_leaves_nan():
    result = check("22.2", nothing)
    assert result.failed == "one tile" and "got       nan" in repr(result)


def test_a_plain_function_is_told_what_it_lacks():
    said = repr(check("22.2", lambda *inputs: 1))
    assert "a kernel: @triton.jit above it" in said
    assert "not started yet" in repr(check("22.2", not_a_kernel))


def test_an_error_in_a_kernel_is_told_with_its_line():
    said = repr(check("22.2", misspelt))
    assert "AttributeError on line 3 of misspelt: x_i = tl.lode(x + i, mask=i < n)" in said
    assert "Traceback" not in said and ".py" not in said


def test_other_arguments_than_asked_for_are_an_error_in_words():
    assert "TypeError" in repr(check("22.2", too_few_arguments))


def test_a_kernel_may_have_helpers():
    assert check("22.2", with_a_helper).ok


def test_an_address_far_outside_is_refused_before_it_is_used():
    said = repr(check("22.2", far_away))
    assert "expected  addresses inside the tensors" in said and "writes far outside" in said


def test_an_address_right_behind_the_end_is_named():
    result = check("22.2", one_too_many)
    assert result.failed == "nothing beyond the end"
    assert "got       writes at y +37, and y has 37 numbers" in repr(result)


def test_a_masked_place_without_a_value_holds_nan_as_it_may_on_a_gpu():
    x, y = ch22.field(torch.ones(5)), ch22.unwritten(8)
    ch22.run(whole_tile, "", (1,), x, y, 5, TILE=8)
    assert y.isnan().tolist() == [False] * 5 + [True] * 3


@triton.jit
def whole_tile(x, y, n, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    tl.store(y + i, tl.load(x + i, mask=i < n))


def test_around_a_field_and_between_its_rows_lies_nan():
    x = torch.arange(6.0).view(2, 3)
    there = ch22.field(x, 5)
    assert torch.equal(there, x) and there.stride() == (5, 1)
    memory = there.as_strided((2 * ch22.GAP + 8,), (1,), 0)
    assert (~memory.isnan()).sum() == 6


def test_a_check_leaves_triton_as_it_was():
    before = [tl.load, tl.sum, tl.core.load, tl.tensor.__add__, ch22.interpreter._patch_lang]
    builder = dict(vars(ch22.interpreter.interpreter_builder))
    check("22.5", ch22.flash_forward)
    check("22.2", misspelt)
    assert before == [
        tl.load,
        tl.sum,
        tl.core.load,
        tl.tensor.__add__,
        ch22.interpreter._patch_lang,
    ]
    del builder["grid_dim"], builder["grid_idx"]
    assert builder.items() <= vars(ch22.interpreter.interpreter_builder).items()


def test_kernels_that_triton_would_compile_are_interpreted_too():
    """As on a machine with a GPU: no variable is set, and @triton.jit makes something else."""
    code = (
        "from heed.checks import ch22, check\n"
        "assert type(ch22.affine).__name__ == 'JITFunction'\n"
        "for task in ch22.TASKS[1:5]:\n"
        "    result = check(task.id, task.reference)\n"
        "    assert result.ok, result\n"
        "assert type(ch22.tl.sum).__name__ == 'JITFunction'\n"
    )
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=settings, timeout=100)


def test_without_triton_a_kernel_task_says_what_is_missing_and_the_others_work(monkeypatch):
    monkeypatch.setattr(ch22, "interpreter", None)
    said = repr(check("22.2", ch22.affine))
    assert "  a kernel needs triton (pip install triton), which is for Linux only\n" in said
    assert check("22.1", ch22.launch).ok and check("22.6", ch22.tiles).ok


def test_the_file_loads_where_there_is_no_triton():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "from heed.checks import ch22, check\n"
        "assert check('22.1', ch22.launch).ok\n"
        "print(check('22.3', ch22.softmax_rows))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100
    )
    assert "a kernel needs triton (pip install triton), which is for Linux only" in done.stdout


# Right answers, in a second way


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 160, 161])
def test_a_launch_is_that_of_a_loop(n):
    left, programs = n, 0
    while left > 0:
        left, programs = left - 16, programs + 1
    waves = len(range(0, programs, 5))
    assert ch22.launch(n, 16, 5, 2) == (programs, waves, -left, 4 * n)


@pytest.mark.parametrize("window", [None, 1, 5, 16])
@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (3, 23), (23, 3), (16, 32), (17, 33), (33, 17)])
def test_tiles_are_counted_as_in_the_table_of_the_mask(T, S, window):
    mask = masks.causal if window is None else masks.window(window)
    table = masks.table(mask, 1, 1, T, S)[0, 0]
    for Br, Bc in ((4, 4), (8, 3), (3, 8), (64, 64)):
        want = [0, 0, 0]
        for rows in table.split(Br):
            for tile in rows.split(Bc, dim=1):
                want[1 if tile.all() else 2 if tile.any() else 0] += 1
        assert list(ch22.tiles(T, S, Br, Bc, window)) == want


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 33), (33, 5), (17, 17)])
def test_attend_is_attention_in_any_order_of_memory(T, S, causal):
    q, k = torch.randn(2, T, 3, 16).transpose(1, 2), torch.randn(2, 3, 16, S).mT
    v = torch.randn(2, 3, S, 40)[..., 7:23]
    if T * S > 100:
        q, k, v = (x[:1, :1] for x in (q, k, v))
    mask = masks.causal if causal else masks.full
    want = attention(q.double(), k.double(), v.double(), mask)
    got = ch22.launched(ch22.flash_forward)(q, k, v, causal)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(ch22.plain_attend(q, k, v, causal).double(), want)


def test_attend_refuses_what_the_kernel_does_not_know():
    attend = ch22.launched(ch22.flash_forward)
    q = torch.randn(1, 2, 3, 16)
    for bad in (
        (q.double(),) * 3,
        (q[..., :8],) * 3,
        (q, q[:, :1], q[:, :1]),
        (q, q, torch.cat([q, q], -1)),
    ):
        with pytest.raises(ValueError):
            attend(*bad, False)


def test_a_count_that_is_off_by_one_is_shown_with_both_numbers():
    said = repr(check("22.1", lambda *sizes: (4, *ch22.launch(*sizes)[1:])))
    assert "given     n = 48, tile = 16, at_once = 5, size = 4: programs" in said
    assert "expected  3\n  got       4\n" in said
    said = repr(check("22.1", lambda *sizes: (3.0, 1, 0, 0)))
    assert "got       3.0, a float" in said


# Two hundred problems


@pytest.mark.parametrize("random_seed", range(200))
def test_a_problem_is_answered_as_a_loop_over_its_programs_counts(random_seed):
    p = ch22.problem(random_seed)
    read = multiplied = programs = 0
    for top in range(0, p.M, p.BM):
        for left in range(0, p.N, p.BN):
            programs += 1
            for start in range(0, p.K, p.BK):
                inner = min(p.BK, p.K - start)
                read += (min(p.BM, p.M - top) + min(p.BN, p.N - left)) * inner
                multiplied += p.BM * p.BN * p.BK
    assert p.answer["programs"] == programs and p.answer["read"] == read
    assert p.answer["waves"] == len(range(0, programs, p.processors))
    assert p.answer["bytes"] == 4 * (read + p.M * p.N)
    assert p.answer["multiplied"] == multiplied
    assert p.answer["useful"] == Fraction(p.M * p.K * p.N, multiplied)
    for name in ("programs", "waves", "read", "written", "bytes", "multiplied", "useful"):
        assert str(p.answer[name]) in p.worked()


def test_problems_are_repeatable_and_fresh_and_keep_the_answer_to_themselves():
    assert repr(ch22.problem(5)) == repr(ch22.problem(5))
    assert len({repr(ch22.problem(s)) for s in range(200)}) > 150
    p = ch22.problem(5)
    assert str(p.answer["multiplied"]) not in repr(p)


def test_the_tasks_are_numbered_and_the_last_is_to_write_the_test():
    assert [task.id for task in ch22.TASKS] == [f"22.{n}" for n in range(1, 8)]
    assert [bool(task.bugs) for task in ch22.TASKS] == [False] * 6 + [True]
