"""tools/exercises.py: what is made of a master, and whether the book's masters keep their word."""

import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest

from heed import checks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # tools/exercises.py imports its neighbour
spec = importlib.util.spec_from_file_location("exercises", ROOT / "tools/exercises.py")
exercises = importlib.util.module_from_spec(spec)
spec.loader.exec_module(exercises)
sys.path.pop(0)

MASTERS = sorted(exercises.MASTERS.glob("[0-9][0-9]_*.md"))
TASKS = checks.tasks()

MASTER = '''\
---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# Exercises

See [chapter 04](../chapters/04_lookup.ipynb), [torch](https://pytorch.org).
Or {download}`n <n.ipynb>`.

+++ {"tags": ["reader"]}

For the reader.

+++ {"tags": ["solution"]}

For the page.

```{code-cell} ipython3
import math
```

## 99.1 Double

:::{dropdown} Hint 1
Think of $a \\times 2$.

And again.
:::
:::{dropdown} Hint 2
Twice.
:::

```{code-cell} ipython3
:tags: [solution]

def double(
    x: float,  # a number
) -> float:
    """2x."""
    # the trick
    y = x + x
    return y


def half(x: float) -> float:
    return x / 2
```

```{code-cell} ipython3
double(math.pi)
```
'''


@pytest.fixture
def master(tmp_path):
    path = tmp_path / "99_double.md"
    path.write_text(MASTER, "utf8")
    return path


def text(notebook):
    return "\n".join(cell.source for cell in notebook.cells)


def test_a_blank_keeps_signature_comments_and_docstring_and_loses_the_body():
    source = MASTER.split(":tags: [solution]\n\n")[1].split("```")[0].rstrip()
    assert exercises.blank(source).split("\n") == [
        "def double(",
        "    x: float,  # a number",
        ") -> float:",
        '    """2x."""',
        "    raise NotImplementedError",
        "",
        "",
        "def half(x: float) -> float:",
        "    raise NotImplementedError",
    ]


def test_the_reader_gets_stubs_hints_that_fold_anywhere_and_no_solution(master):
    notebook = exercises.reader(master)
    assert "the trick" not in text(notebook) and "For the page." not in text(notebook)
    assert "For the reader." in text(notebook)
    assert (
        "<details><summary>Hint 1</summary>\n\nThink of $a \\times 2$.\n\nAnd again.\n\n</details>"
        in text(notebook)
    )
    assert "<details><summary>Hint 2</summary>\n\nTwice.\n\n</details>" in text(notebook)
    assert all(not c.get("outputs") and not c.metadata for c in notebook.cells)


def test_the_solutions_show_the_stub_and_fold_the_answer(master):
    notebook = exercises.solutions(master)
    folded = [i for i, c in enumerate(notebook.cells) if "hide-input" in c.metadata.get("tags", [])]
    (i,) = folded
    assert "the trick" in notebook.cells[i].source
    assert notebook.cells[i].metadata["mystnb"]["code_prompt_show"] == "Show a solution"
    assert notebook.cells[i - 1].source.startswith("```python\ndef double(")
    assert "For the page." in text(notebook) and "For the reader." not in text(notebook)
    assert ":::{dropdown} Hint 1" in text(notebook)


def test_links_of_the_solutions_go_one_folder_further_up_and_addresses_stay(master):
    page = text(exercises.solutions(master))
    assert "(../../chapters/04_lookup.ipynb)" in page and "{download}`n <../n.ipynb>`" in page
    assert "(https://pytorch.org)" in page
    assert "(../chapters/04_lookup.ipynb)" in text(exercises.reader(master))


def test_two_makings_give_the_same_notebook_with_ids_of_its_own(master):
    for make in (exercises.reader, exercises.solutions):
        assert nbformat.writes(make(master)) == nbformat.writes(make(master))
        ids = [cell.id for cell in make(master).cells]
        assert len(set(ids)) == len(ids)
        nbformat.validate(make(master))


def test_building_unknown_exercises_says_which_there_are():
    (said,) = exercises.build(["99"])
    assert said.startswith("no exercises 99; there are 01_sequences, 02_bottleneck")


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book with one master, its notebooks made but not run."""
    for name in ("md", "solutions"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(exercises.notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(exercises.notebooks, "address", lambda: "")
    monkeypatch.setattr(exercises, "READERS", tmp_path)
    monkeypatch.setattr(exercises, "SOLUTIONS", tmp_path / "solutions")
    monkeypatch.setattr(exercises, "MASTERS", tmp_path / "md")
    master = tmp_path / "md" / "99_double.md"
    master.write_text(MASTER, "utf8")
    nbformat.write(exercises.reader(master), tmp_path / "99_double.ipynb")
    solved = exercises.solutions(master)
    for n, cell in enumerate((c for c in solved.cells if c.cell_type == "code"), 1):
        cell.execution_count = n
    nbformat.write(solved, tmp_path / "solutions" / "99_double.ipynb")
    (tmp_path / "mutants.md").write_text(checks.table(), "utf8")
    return tmp_path


def test_check_is_quiet_when_all_is_in_step(book):
    assert exercises.check() == []


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("Twice.", "Two times.", ["reader's notebook", "solutions and the master"]),
        ("y = x + x", "y = 2 * x", ["solutions and the master"]),
        ("For the reader.", "For you.", ["reader's notebook"]),
    ],
)
def test_check_names_what_a_changed_master_has_left_behind(book, old, new, said):
    (book / "md" / "99_double.md").write_text(MASTER.replace(old, new), "utf8")
    found = exercises.check()
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))


def test_check_misses_a_notebook_without_a_master_and_one_that_was_not_built(book):
    (book / "md" / "99_double.md").rename(book / "md" / "98_half.md")
    found = "\n".join(exercises.check())
    for path in ("98_half.ipynb", "99_double.ipynb", "solutions/98_half.ipynb"):
        assert f"{path}: no master, or not built" in found


def test_check_notices_an_old_table_of_mutants_and_a_solution_that_was_not_run(book):
    (book / "mutants.md").write_text(checks.table().replace("04.1", "04.0"), "utf8")
    path = book / "solutions" / "99_double.ipynb"
    path.write_text(path.read_text("utf8").replace('"execution_count": 2', '"execution_count": 9'))
    ran, table = exercises.check()
    assert ran.startswith("solutions of 99_double: not run from top to bottom")
    assert table.startswith("exercises/mutants.md is not current")


# The exercises of the book


def test_everything_that_is_made_from_the_masters_is_current():
    assert exercises.check() == []


def functions(notebook):
    """What the code cells of a notebook leave behind, and what their last lines show."""
    space, shown = {"__name__": "__main__"}, []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        *rest, last = cell.source.strip().split("\n")
        if last.startswith("check("):
            exec("\n".join(rest), space)
            shown.append(repr(eval(last, space)))
        else:
            exec(cell.source, space)
    return space, shown


def of_chapter(master):
    return [t for t in TASKS.values() if t.id.startswith(master.stem[:2])]


@pytest.mark.parametrize("master", MASTERS, ids=lambda p: p.stem)
def test_the_readers_notebook_runs_from_end_to_end_and_nothing_is_started(master):
    _, shown = functions(exercises.reader(master))
    assert shown == [f"{t.id} not started yet" for t in of_chapter(master)]


@pytest.mark.parametrize("master", MASTERS, ids=lambda p: p.stem)
def test_every_solution_passes_with_random_seeds_that_its_author_never_saw(master):
    space, shown = functions(exercises.solutions(master))
    assert [line.split(":")[0] for line in shown] == [f"{t.id} passed" for t in of_chapter(master)]
    for task in of_chapter(master):
        for random_seed in range(1, 4):
            result = checks.check(task.id, space[task.name], random_seed)
            assert result.ok, result


@pytest.mark.parametrize("master", MASTERS, ids=lambda p: p.stem)
def test_every_task_says_how_hard_and_how_long_and_has_two_hints_or_more(master):
    page = master.read_text("utf8")
    for task in of_chapter(master):
        part = page.split(f"## {task.id} ")[1].split("\n## ")[0]
        assert re.search(
            r"^\*Difficulty: (one dot|two dots|three dots) of three\. About \d+ minutes\.\*$",
            part,
            re.M,
        )
        assert part.count(":::{dropdown} Hint") >= 2
        assert f'check("{task.id}", {task.name})' in part


@pytest.mark.parametrize("master", MASTERS, ids=lambda p: p.stem)
def test_no_first_hint_holds_a_line_of_the_solution(master):
    solved = exercises.solutions(master)
    answers = [c.source for c in solved.cells if "hide-input" in c.metadata.get("tags", [])]
    lines = {line.split("#")[0].strip() for a in answers for line in a.split("\n")}
    first = re.findall(r":::\{dropdown\} Hint 1\n(.*?)\n:::", text(solved), re.S)
    assert len(first) == len(of_chapter(master)) == len(answers)
    for hint in first:
        assert "```" not in hint
        assert not [line for line in lines if len(line) > 8 and line in hint]
