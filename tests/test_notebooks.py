"""tools/notebooks.py: from text to notebook and back, and what it refuses."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools/notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)

TEXT = """\
---
chapter:
  question: Why?
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# Title

```{code-cell} ipython3
:tags: [hide-input]

import math
```

```{code-cell} ipython3
print(math.pi)
```
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "05_scale.md"
    path.write_text(TEXT, "utf8")
    return path


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def ran(notebook, **output):
    for i, cell in enumerate(code(notebook), 1):
        cell.execution_count = i
    if output:
        code(notebook)[-1].outputs = [nbformat.from_dict(output)]
    return notebook


def test_without_an_address_a_notebook_holds_what_the_text_holds(text):
    notebook = notebooks.from_text(text, address="")
    assert [cell.source for cell in code(notebook)] == ["import math", "print(math.pi)"]
    assert notebook.metadata.chapter == {"question": "Why?"}
    assert code(notebook)[0].metadata == {"tags": ["hide-input"]}


def test_with_an_address_the_first_cell_can_install_the_package(text):
    first, second = code(notebooks.from_text(text, address="https://github.com/a/b"))
    assert '%pip install -q "heed @ git+https://github.com/a/b"' in first.source
    assert first.source.endswith("\n\nimport math")
    assert second.source == "print(math.pi)"


def test_two_readings_of_a_text_give_the_same_notebook(text):
    assert notebooks.from_text(text, "") == notebooks.from_text(text, "")


def test_a_changed_cell_tag_or_setting_is_a_difference(text):
    stored = notebooks.from_text(text, "")
    for old, new in [("math.pi", "math.e"), ("hide-input", "hide-cell"), ("Why?", "Who?")]:
        text.write_text(TEXT.replace(old, new), "utf8")
        assert not notebooks.same_inputs(notebooks.from_text(text, ""), stored)
    text.write_text(TEXT, "utf8")
    assert notebooks.same_inputs(notebooks.from_text(text, ""), stored)


def test_a_clean_notebook_has_no_faults(text):
    notebook = notebooks.from_text(text, "")
    ran(notebook, output_type="stream", name="stdout", text="3.14\n")
    assert notebooks.faults(notebook) == []


@pytest.mark.parametrize(
    "output, said",
    [
        ({"output_type": "stream", "name": "stderr", "text": "W: old\n"}, "writes to stderr: W"),
        ({"output_type": "stream", "name": "stdout", "text": "<f at 0x7f00a1b2c3>"}, "an address"),
        ({"output_type": "error", "ename": "KeyError", "evalue": "'q'"}, "error KeyError: 'q'"),
        (
            {"output_type": "stream", "name": "stdout", "text": f"{Path.home()}/x.py"},
            "a home path",
        ),
    ],
)
def test_an_unclean_output_is_named_with_its_cell(text, output, said):
    (fault,) = notebooks.faults(ran(notebooks.from_text(text, ""), **output))
    assert fault.startswith("cell 2: ") and said in fault


def test_a_cell_that_did_not_run_or_ran_out_of_order_is_a_fault(text):
    notebook = notebooks.from_text(text, "")
    assert notebooks.faults(notebook) == ["not run from top to bottom in a fresh kernel"]
    ran(notebook)
    code(notebook)[1].execution_count = 3
    assert notebooks.faults(notebook) == ["not run from top to bottom in a fresh kernel"]


def test_running_an_unknown_chapter_says_which_there_are(text, monkeypatch):
    monkeypatch.setattr(notebooks, "TEXTS", text.parent)
    assert notebooks.run(["99"]) == ["no chapter 99; there are 05_scale"]


@pytest.mark.slow
def test_a_chapter_runs_by_its_number_and_twice_gives_the_same_bytes(text, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "TEXTS", text.parent)
    monkeypatch.setattr(notebooks, "BOOKS", text.parent)
    assert notebooks.run(["05"]) == []
    first = (text.parent / "05_scale.ipynb").read_bytes()
    assert notebooks.run(["05_scale"]) == []
    assert (text.parent / "05_scale.ipynb").read_bytes() == first
    assert b"3.14159" in first
    assert capsys.readouterr().out.count("2 cells") == 2
