"""The form of every chapter: what its text must hold before it is worth running."""

import ast
import re
from pathlib import Path

import jupytext
import pytest
import yaml

from heed.interactive import right_places

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters" / "md").glob("*.md"))
EQUATION = re.compile(r"^\$\$ \((eq-[\w-]+)\)$", re.M)


def cells(path, kind):
    return [cell for cell in jupytext.read(path).cells if cell.cell_type == kind]


def prose(path):
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


def calls(path, name):
    """Every call of a function in the code of a chapter, as syntax trees."""
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
                yield node


each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def test_there_are_chapters():
    assert [path.stem for path in CHAPTERS][:1] == ["00_start"] and len(CHAPTERS) >= 4


@each_chapter
def test_every_numbered_equation_has_a_witness_and_every_witness_an_equation(path):
    numbered = EQUATION.findall(prose(path))
    first = [call.args[0].value for call in calls(path, "witness")]
    witnessed = {label for label in first if label.startswith("eq-")}
    assert len(numbered) == len(set(numbered))
    assert set(numbered) == witnessed and numbered


@each_chapter
def test_every_witness_is_given_a_wrong_version(path):
    for call in calls(path, "witness"):
        (wrong,) = [k.value for k in call.keywords if k.arg == "wrong"]
        assert isinstance(wrong, ast.Dict) and wrong.keys, ast.unparse(call)


@each_chapter
def test_the_book_is_held_against_another_library(path):
    assert any(calls(path, "agree"))


@each_chapter
def test_no_cell_is_excused_from_comparison(path):
    tags = {tag for cell in cells(path, "code") for tag in cell.metadata.get("tags", [])}
    assert tags <= {"hide-input", "hide-output", "hide-cell", "remove-input"}


@each_chapter
def test_code_fits_the_page(path):
    for cell in cells(path, "code"):
        if "remove-input" not in cell.metadata.get("tags", []):  # else its code is not shown
            long = [line for line in cell.source.splitlines() if len(line) > 88]
            assert not long, long


@each_chapter
def test_every_figure_says_what_one_sees(path):
    for cell in cells(path, "code"):
        if "plt.show()" in cell.source:
            assert len(cell.metadata.get("mystnb", {})["image"]["alt"]) > 40, cell.source


@each_chapter
def test_the_head_says_what_the_reader_needs(path):
    head = yaml.safe_load(path.read_text("utf8").split("---")[1])["chapter"]
    assert head["question"].endswith("?") and head["xp"] > 0 and head["minutes"] > 0
    assert set(head["needs"]) <= {path.stem for path in CHAPTERS}
    text = prose(path)
    assert "**In one sentence:**" in text and "**Takeaways**" in text
    assert ":class: folklore" in text


@each_chapter
def test_the_quiz_is_long_enough_and_cannot_be_guessed_by_place(path):
    (call,) = calls(path, "quiz")
    questions = ast.literal_eval(call.args[0])
    places = right_places(questions)
    assert len(questions) >= 4 and len(set(places)) > 1, places
    assert call.keywords[0].value.value == f"ch{path.stem[:2]}"


@pytest.mark.parametrize("path", CHAPTERS[1:], ids=lambda path: path.stem)
def test_every_chapter_has_six_exercises_one_of_them_a_test_to_write(path):
    master = (ROOT / "exercises" / "md" / path.name).read_text("utf8")
    tasks = set(re.findall(r"^## (\d\d\.\d+) ", master, re.M))
    checked = set(re.findall(r'check\("(\d\d\.\d+)"', master))
    assert tasks == checked and len(tasks) >= 6
    assert re.search(r"^## [\d.]+ Write the test", master, re.M)
    assert f"../exercises/solutions/{path.stem}.ipynb" in prose(path)
