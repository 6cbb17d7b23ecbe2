"""exercises/md/NN_stem.md (a master) to the reader's notebook, the solutions and the kill table.

    python tools/exercises.py build [NAME ...]   write them; the solutions are run
    python tools/exercises.py check              fail if anything is out of step with its master

In a master a code cell tagged `solution` holds the answer: the reader gets its signature and its
docstring. A text cell tagged `solution` or `reader` stands in one of the two notebooks only. Links
are written as from exercises/. NAME is 04 or 04_lookup.
"""

import argparse
import ast
import hashlib
import re
import sys
import time
from pathlib import Path

import nbformat
import notebooks
from nbclient.exceptions import CellExecutionError

from heed import checks

READERS = notebooks.ROOT / "exercises"
MASTERS, SOLUTIONS = READERS / "md", READERS / "solutions"
FOLDED = {"code_prompt_show": "Show a solution", "code_prompt_hide": "Hide the solution"}
LINK = re.compile(r"(\]\((?!https?:)|\{download\}`[^`<]*<)(?=[\w.])")
HINT = re.compile(r"^:::\{dropdown\} (.+)\n((?:.*\n)*?):::$", re.M)


def blank(source: str) -> str:
    """The functions of a cell with their bodies taken out; signatures and docstrings stay."""
    lines = source.split("\n")
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef):
            keep = node.body[0] if ast.get_docstring(node) is not None else None
            start = keep.end_lineno if keep else node.body[0].lineno - 1
            lines[start : node.end_lineno] = ["    raise NotImplementedError"]
    return "\n".join(lines)


def reader(master: Path) -> nbformat.NotebookNode:
    """Stubs and checks, nothing run. Hints fold in any notebook program, so they are HTML here."""
    notebook = _without(master, "solution")
    for cell in notebook.cells:
        if cell.cell_type == "code" and _has(cell, "solution"):
            cell.source = blank(cell.source)
        if cell.cell_type == "markdown":
            cell.source = HINT.sub(r"<details><summary>\1</summary>\n\n\2\n</details>", cell.source)
        cell.metadata = {}
    return _numbered(notebook)


def solutions(master: Path) -> nbformat.NotebookNode:
    """Everything, the answers folded behind their stubs; links go one folder up. Not yet run."""
    notebook, cells = _without(master, "reader"), []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(r"\1../", cell.source)
            cell.metadata = {}
        elif _has(cell, "solution"):
            stub = f"```python\n{blank(cell.source)}\n```"
            cells.append(nbformat.v4.new_markdown_cell(stub))
            cell.metadata = nbformat.from_dict({"tags": ["hide-input"], "mystnb": FOLDED})
        cells.append(cell)
    notebook.cells = cells
    return _numbered(notebook)


def _has(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def _without(master: Path, tag: str) -> nbformat.NotebookNode:
    notebook = notebooks.from_text(master, notebooks.address())
    notebook.metadata.pop("jupytext", None)  # exercises are not paired
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code" or not _has(c, tag)]
    return notebook


def _numbered(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for i, cell in enumerate(notebook.cells):
        cell.id = hashlib.sha256(f"{i}{cell.source}".encode()).hexdigest()[:8]
    return notebook


def build(names: list[str]) -> list[str]:
    masters = sorted(MASTERS.glob("[0-9][0-9]_*.md"))
    if unknown := [n for n in names if not any(n in (m.stem, m.stem[:2]) for m in masters)]:
        return [
            f"no exercises {', '.join(unknown)}; there are {', '.join(m.stem for m in masters)}"
        ]
    bad = []
    SOLUTIONS.mkdir(exist_ok=True)
    for master in masters:
        if names and master.stem not in names and master.stem[:2] not in names:
            continue
        start, solved = time.time(), solutions(master)
        print(f"{master.stem} ...", end=" ", flush=True)
        try:
            notebooks.execute(solved, SOLUTIONS)
        except CellExecutionError as error:
            print("failed", flush=True)
            bad.append(f"{master.stem}: {notebooks.COLOURS.sub('', str(error))}")
            continue
        nbformat.write(reader(master), READERS / f"{master.stem}.ipynb")
        nbformat.write(solved, SOLUTIONS / f"{master.stem}.ipynb")
        print(f"{time.time() - start:.1f} s", flush=True)
        bad += [f"solutions of {master.stem}: {fault}" for fault in notebooks.faults(solved)]
    (READERS / "mutants.md").write_text(checks.table(), "utf8")
    return bad


def check() -> list[str]:
    stems = {folder: {p.stem for p in folder.glob("*.ipynb")} for folder in (READERS, SOLUTIONS)}
    masters = {p.stem: p for p in MASTERS.glob("*.md")}
    bad = []
    for folder, found in stems.items():
        place = folder.relative_to(notebooks.ROOT)
        bad += [f"{place}/{s}.ipynb: no master, or not built" for s in sorted(found ^ set(masters))]
    for stem, master in sorted(masters.items()):
        again = f"run: python tools/exercises.py build {stem[:2]}"
        path = READERS / f"{stem}.ipynb"
        if path.exists() and path.read_text("utf8") != nbformat.writes(reader(master)) + "\n":
            bad.append(f"{stem}: the reader's notebook and the master differ; {again}")
        path = SOLUTIONS / f"{stem}.ipynb"
        if path.exists():
            stored = nbformat.read(path, as_version=4)
            if not notebooks.same_inputs(solutions(master), stored):
                bad.append(f"{stem}: the solutions and the master differ; {again}")
            bad += [f"solutions of {stem}: {fault}" for fault in notebooks.faults(stored)]
    table = READERS / "mutants.md"
    if not table.exists() or table.read_text("utf8") != checks.table():
        bad.append("exercises/mutants.md is not current; run: python tools/exercises.py build")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["build", "check"])
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    bad = build(args.names) if args.what == "build" else check()
    if bad:
        print("\n".join(bad), file=sys.stderr)
    elif args.what == "check":
        print("exercises are in step with their masters")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
