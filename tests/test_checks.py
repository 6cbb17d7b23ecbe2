"""heed.checks: what a check says to right, wrong, broken and missing answers; and the grader."""

import csv
import inspect
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from heed import checks
from heed.checks import check
from heed.checks.__main__ import _python, grade
from heed.checks.compare import Wrong, expect, several

TASKS = checks.tasks()
ORDINARY = [t for t in TASKS.values() if not t.bugs]
MUTANTS = [(t, m) for t in TASKS.values() for m in t.mutants]


def task_id(x):
    return getattr(x, "id", None) or getattr(x, "name", None)


@pytest.mark.parametrize("task", TASKS.values(), ids=task_id)
def test_the_reference_passes_with_any_random_seed(task):
    for random_seed in [0, 1, 2, 3, -1, 10**12]:
        result = check(task.id, task.reference, random_seed)
        assert result.ok, result
        n = len(task.properties)
        assert repr(result) == f"{task.id} passed: {n} of {n} properties"


@pytest.mark.parametrize("task", TASKS.values(), ids=task_id)
def test_a_blank_is_not_started(task):
    def blank(*inputs):
        raise NotImplementedError

    assert repr(check(task.id, blank)) == f"{task.id} not started yet"
    assert repr(check(task.id, lambda *inputs: ...)) == f"{task.id} not started yet"
    assert check(task.id, blank).failed is None and not check(task.id, blank).ok


@pytest.mark.parametrize("task", ORDINARY, ids=task_id)
def test_an_answer_without_return_is_not_started_and_says_why(task):
    said = f"{task.id} not started yet: it returns None. Is a `return` missing?"
    assert repr(check(task.id, lambda *inputs: None)) == said


@pytest.mark.parametrize("task, mutant", MUTANTS, ids=task_id)
def test_every_mutant_is_caught_by_the_property_whose_hint_fits(task, mutant):
    for random_seed in range(3):
        result = check(task.id, task.broken(mutant), random_seed)
        assert result.failed == mutant.caught_by, result


@pytest.mark.parametrize("task", TASKS.values(), ids=task_id)
def test_a_message_is_the_same_each_time(task):
    broken = task.broken(task.mutants[0])
    assert repr(check(task.id, broken)) == repr(check(task.id, broken))


@pytest.mark.parametrize("task", TASKS.values(), ids=task_id)
def test_a_task_has_5_to_15_mutants_and_no_property_that_catches_none(task):
    assert 5 <= len(task.mutants) <= 15
    assert len({m.name for m in task.mutants}) == len(task.mutants)
    if not task.bugs:
        assert {m.caught_by for m in task.mutants} == {p.name for p in task.properties}


@pytest.mark.parametrize("task", TASKS.values(), ids=task_id)
def test_every_property_has_a_hint_of_its_own_that_is_no_code(task):
    hints = [p.hint for p in task.properties]
    assert all(len(h) > 20 for h in hints) and len(set(hints)) == len(hints)
    body = checks._source(task)
    for line in (line.strip() for line in body if "=" in line or "return" in line):
        assert not any(line in h for h in hints), line


def test_six_tasks_or_more_in_a_chapter_and_one_of_them_is_to_write_the_test():
    for chapter in sorted({task[:2] for task in TASKS}):
        found = [t for t in TASKS.values() if t.id.startswith(chapter)]
        assert len(found) >= 6 and sum(bool(t.bugs) for t in found) == 1
        assert [t.id for t in found] == [f"{chapter}.{n}" for n in range(1, len(found) + 1)]


def test_an_unknown_task_and_an_answer_that_is_no_function_are_refused_by_name(unchecked):
    with pytest.raises(ValueError, match=r"no task '04.99'; there are 01.1, 01.2, "):
        check("04.99", print)
    with pytest.raises(TypeError, match="takes a function, got Tensor"):
        check("04.1", torch.zeros(3))


def softer(query, keys, values, temperature):
    scores = keys @ query
    return scores.softmax(0) @ values


def test_a_failure_names_the_property_shows_small_numbers_and_gives_the_hint():
    result = check("04.1", softer)
    assert (result.passed, result.total, result.failed) == (3, 6, "cold")
    head, given, expected, got, *hint = repr(result).splitlines()
    assert head == "04.1 stopped at property 4 of 6: cold"
    assert given.startswith("  given     scores [") and given.endswith("temperature 0.001")
    assert expected.startswith("  expected  [") and got.startswith("  got       [")
    assert hint[0].startswith("Hint: A low temperature picks the best key.")


def test_the_same_random_seed_gives_the_same_text_and_another_gives_fresh_numbers():
    assert repr(check("04.1", softer, 5)) == repr(check("04.1", softer, 5))
    assert repr(check("04.1", softer, 5)) != repr(check("04.1", softer, 6))


def test_an_error_in_the_answer_is_told_with_its_line_and_no_traceback():
    def broken(query, keys, values, temperature):
        scores = keys @ query
        return helper(scores) @ values

    said = repr(check("04.1", broken))
    assert "NameError on line 3 of broken: return helper(scores) @ values" in said
    assert "name 'helper' is not defined" in said
    assert "Traceback" not in said and ".py" not in said


def divide(a, b):
    return a / b


def test_an_error_in_a_helper_of_the_reader_is_told_there():
    said = repr(check("04.1", lambda q, k, v, t: divide(1, 0)))
    assert "ZeroDivisionError on line 2 of divide: return a / b\n" in said


def test_an_error_of_a_builtin_is_told_without_a_line():
    assert "TypeError: " in repr(check("04.1", torch.softmax))


def test_writing_into_the_inputs_misleads_nobody():
    def greedy(q, k, v):
        q /= q.shape[-1] ** 0.5
        return (q @ k.mT).softmax(-1) @ v

    assert check("04.5", greedy).ok


def test_expect_looks_at_shapes_before_values_and_shows_the_worst_entry():
    with pytest.raises(Wrong, match=r"expected  shape \(2,\)\ngot       shape \(1, 2\)"):
        expect(torch.ones(1, 2), torch.ones(2), "x")
    want = torch.zeros(3, 5)
    want[1, 2] = 0.25
    with pytest.raises(Wrong, match=r"given     x at \[1, 2\]\nexpected  0.25\ngot       0"):
        expect(torch.zeros(3, 5), want, "x")
    with pytest.raises(Wrong, match="got       nan"):
        expect(float("nan"), 1.0, "x")


def test_expect_takes_numbers_arrays_and_any_dtype_but_no_tricks():
    class Yes(torch.Tensor):
        pass

    expect(0.5, 0.5, "x")
    expect([0.5, 1], [0.5, 1], "x")
    expect(np.ones(3), torch.ones(3), "x")
    expect(torch.ones(3, requires_grad=True) + 1e-7, torch.ones(3).double(), "x")
    for got in ("text", object(), torch.ones(3, dtype=torch.complex64), Yes([1, 1, 1])):
        with pytest.raises(Wrong):
            expect(got, torch.ones(3), "x")


def test_expect_measures_against_the_largest_value_but_at_least_1():
    expect([1e6, 0.5], [1e6, 0.0], "x")
    with pytest.raises(Wrong):
        expect([1e-3], [0.0], "x")


def test_several_counts_what_came_back():
    assert several((1, 2), 2, "x") == (1, 2)
    with pytest.raises(Wrong, match="expected  2 results\ngot       3 of them"):
        several((1, 2, 3), 2, "x")
    with pytest.raises(Wrong, match="got       a int"):
        several(7, 2, "x")


def test_a_test_that_crashes_on_a_bug_rejects_it_but_must_not_crash_on_what_is_right():
    def by_shape(implementation):
        right = TASKS["04.7"].reference
        right(implementation)

    def clumsy(implementation):
        raise KeyError("rows")

    assert check("04.7", by_shape).ok
    result = check("04.7", clumsy)
    assert result.failed == "accepts the reference" and "KeyError on line 2 of clumsy" in repr(
        result
    )


def test_a_test_may_answer_with_false_in_place_of_an_error():
    def honest(implementation):
        try:
            TASKS["05.7"].reference(implementation)
        except AssertionError:
            return False
        return True

    assert check("05.7", honest).ok
    assert (
        check("05.7", lambda implementation: torch.tensor(False)).failed == "accepts the reference"
    )
    assert check("05.7", lambda implementation: None).failed == "rejects: not divided at all"


def test_a_test_that_refuses_what_is_right_hears_its_own_words():
    def picky(implementation):
        raise AssertionError("too wide")

    assert "got       AssertionError: too wide" in repr(check("05.7", picky))


def test_an_edit_must_name_words_that_stand_once_in_the_source():
    with pytest.raises(ValueError, match="'zzz' stands 0 times in divide"):
        checks.edited(divide, {"zzz": "y"})
    with pytest.raises(ValueError, match="'a' stands 2 times in divide"):
        checks.edited(divide, {"a": "y"})
    assert checks.edited(divide, {"a / b": "b / a"})(2, 4) == 2


def test_edited_functions_keep_their_sources_apart():
    minus, times = (checks.edited(divide, {"a / b": other}) for other in ("a - b", "a * b"))
    assert inspect.getsource(minus).splitlines()[1] == "    return a - b"
    assert inspect.getsource(times).splitlines()[1] == "    return a * b"


def test_a_test_may_be_given_something_made_of_the_implementation():
    bugs = (checks.Bug("turned", "a/b#1", "Which is divided by which?", {"a / b": "b / a"}),)

    def halves(implementation):
        assert implementation(1) == 0.5

    task = checks.write_the_test(
        "99.1", halves, divide, lambda a: a / 2, bugs, (), use=lambda f: lambda a: f(a, 2)
    )
    rng = torch.Generator()
    for one in task.properties:
        one.test(halves, rng)
    with pytest.raises(Wrong, match="your test lets it pass"):
        task.properties[2].test(lambda implementation: None, rng)


def test_a_check_loads_no_other_chapter():
    code = (
        "import sys\n"
        "from heed.checks import check\n"
        "check('04.1', print)\n"
        "assert not {'triton', 'heed.checks.ch05', 'heed.checks.ch22'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_the_table_holds_every_wrong_answer_and_links_every_bug():
    table = checks.table()
    for task in TASKS.values():
        assert f"## {task.id} {task.name}" in table
        for wrong in (*task.mutants, *task.bugs):
            assert f"| {wrong.name} | " in table
        for bug in task.bugs:
            owner, number = bug.source.split("#")
            assert f"https://github.com/{owner}/issues/{number})" in table
    assert "\n".join(line for line in table.splitlines() if "|" in line).count("||") == 0


# The grader


@pytest.mark.parametrize(
    "cell, python",
    [
        ("x = 1 % 2\n", "x = 1 % 2\n"),
        ('s = """\n%d\n"""', 's = """\n%d\n"""'),
        ("%matplotlib inline\nx = 1", "pass\nx = 1"),
        ("if x:\n    !pip list", "if x:\n    pass"),
        ("files = !ls\nx?", "files = None\npass"),
        ("%%time\nx = 1", "x = 1"),
        ("%%bash\nrm x", ""),
    ],
)
def test_commands_of_the_notebook_are_taken_out_of_a_cell(cell, python):
    assert _python(cell) == python


RIGHT = """
import torch
def soft_lookup(query, keys, values, temperature):
    return (keys @ query / temperature).softmax(0) @ values
"""
NOTEBOOKS = {
    "half": [
        RIGHT.replace(" / temperature", ""),
        "from fractions import Fraction\ndef exact(counts, values, sharpness):\n"
        "    raise NotImplementedError",
        "print('x' * 10**7)",
    ],
    "forged": [
        "import heed.checks, heed.checks.ch04, torch\n"
        "def soft_lookup(q, k, v, t): return 0 * v[0]\n"
        "class Yes: ok, passed, total, message = True, 1, 1, 'passed'\n"
        "heed.checks.check = check = lambda *a, **k: Yes()\n"
        "heed.checks.compare.expect = heed.checks.ch04.expect = lambda *a, **k: None\n"
        "torch.Tensor.__le__ = lambda *a: True\n"
        "check('04.1', soft_lookup)",
    ],
    "tampered": [RIGHT, "import sys\nfor m in ('torch', 'json', 'heed'): sys.modules[m] = None"],
    "odd": ["%matplotlib inline\n1 / 0", RIGHT, "import sys\nsys.exit(2)", "len = sum = None\n"
            "import os\nos.chdir('/')\ntorch.set_default_dtype(torch.float64)"],
    "loops": [RIGHT, "while True: pass", "def exact(*a):\n    while True: pass"],
    "greedy": [RIGHT, "x = bytearray(6 * 2**30)"],
    "gone": [RIGHT, "import os\nos._exit(0)"],
}  # fmt: skip


@pytest.fixture(scope="module")
def grades(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    for name, cells in NOTEBOOKS.items():
        code = [{"cell_type": "code", "source": [c]} for c in cells]
        text = [{"cell_type": "markdown", "source": "while True: pass"}]
        (folder / f"{name}.ipynb").write_text(json.dumps({"cells": text + code}), "utf8")
    (folder / "sub").mkdir()
    (folder / "sub" / "cut.ipynb").write_text('{"cells": [ check(\\"04.1\\"', "utf8")
    out = folder / "grades.csv"
    command = [sys.executable, "-m", "heed.checks", "grade", str(folder), "--out", str(out)]
    subprocess.run([*command, "--random-seed", "7", "--seconds", "32"], check=True, timeout=400)
    rows = csv.DictReader(out.read_text("utf8").splitlines())
    return {row["notebook"]: row for row in rows}


@pytest.mark.slow
def test_every_notebook_has_a_row_and_every_task_of_the_chapter_a_column(grades):
    assert set(grades) == {f"{name}.ipynb" for name in NOTEBOOKS} | {"sub/cut.ipynb"}
    tasks = [f"04.{n}" for n in range(1, 8)]
    assert list(grades["half.ipynb"]) == ["notebook", "score", *tasks, "errors", "timed_out"]


@pytest.mark.slow
def test_a_task_gets_the_share_of_its_properties_and_a_blank_nothing(grades):
    row = grades["half.ipynb"]
    assert (row["04.1"], row["04.2"], row["04.3"]) == ("0.50", "", "")
    assert (row["score"], row["errors"], row["timed_out"]) == ("0.50", "", "")


@pytest.mark.slow
def test_to_redefine_check_or_to_patch_heed_and_torch_gains_nothing(grades):
    assert grades["forged.ipynb"]["04.1"] == "0.00"
    assert grades["tampered.ipynb"]["04.1"] == "1.00"


@pytest.mark.slow
def test_cell_errors_stand_apart_from_the_score(grades):
    row = grades["odd.ipynb"]
    assert row["04.1"] == "1.00"
    assert row["errors"] == "cell 1: ZeroDivisionError: division by zero; cell 3: SystemExit: 2"


@pytest.mark.slow
def test_an_endless_cell_and_an_endless_answer_cost_only_themselves(grades):
    row = grades["loops.ipynb"]
    assert (row["04.1"], row["04.2"], row["timed_out"]) == ("1.00", "0.00", "yes")
    assert row["errors"] == "cell 2: more than 8 s; 04.2: more than 8 s"


@pytest.mark.slow
def test_too_much_memory_is_an_error_of_the_cell(grades):
    assert grades["greedy.ipynb"]["errors"] == "cell 2: MemoryError"
    assert grades["greedy.ipynb"]["04.1"] == "1.00"


@pytest.mark.slow
def test_a_notebook_that_ends_its_process_or_is_none_has_a_row_that_says_so(grades):
    assert grades["gone.ipynb"]["errors"] == "the notebook ended its process (exit code 0)"
    assert grades["sub/cut.ipynb"]["errors"].startswith("not a notebook: JSONDecodeError")


def test_a_folder_without_notebooks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no notebooks"):
        grade(tmp_path, 0, 10, 1000)


def test_fractions_are_judged_exactly():
    def nearly(counts, values, sharpness):
        total = sum(Fraction(n) ** sharpness for n in counts)
        weights = [Fraction(n) ** sharpness / total for n in counts]
        mix = sum(float(w) * float(v) for w, v in zip(weights, values, strict=True))
        return weights, mix

    assert check("04.2", nearly).failed == "exact"
