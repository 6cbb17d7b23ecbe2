"""chapters/md/NN_stem.md (inputs, edited) to chapters/NN_stem.ipynb (inputs and outputs, read).

    python tools/notebooks.py run [NAME ...]   run in a fresh kernel, write the outputs back
    python tools/notebooks.py check            pairs in step, every cell run in order, outputs clean

NAME is 05 or 05_scale; without a name every chapter runs.
"""

import argparse
import hashlib
import re
import sys
import time
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
BOOKS = ROOT / "chapters"
TEXTS = BOOKS / "md"
SETTINGS = ("kernelspec", "chapter", "jupytext")
NOISE = re.compile(r"at 0x[0-9a-f]{6,}|ipykernel_\d+|" + re.escape(str(Path.home())) + "/")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
INSTALL = """\
try:
    import heed  # noqa: F401
except ModuleNotFoundError:
    %pip install -q "heed @ git+{address}"

"""


def address() -> str:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
    return settings["tool"]["heed"]["address"]


def from_text(path: Path, address: str) -> nbformat.NotebookNode:
    """The notebook of a text, without outputs; where there is an address it can install heed."""
    notebook = jupytext.read(path)
    kept = {k: v for k, v in notebook.metadata.items() if k in SETTINGS}
    notebook.metadata = nbformat.from_dict(kept)
    notebook.metadata.jupytext.pop("text_representation", None)  # as jupytext itself leaves it
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if address and code:
        code[0].source = INSTALL.format(address=address) + code[0].source
    for i, cell in enumerate(notebook.cells):  # ids that a second run makes again
        cell.id = hashlib.sha256(f"{i}{cell.source}".encode()).hexdigest()[:8]
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in a fresh kernel, and forget what would differ from machine to machine."""
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        coalesce_streams=True,  # prints come in pieces, by chance
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    notebook.metadata.pop("language_info", None)  # it holds Python's patch version
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with the stored outputs: order, errors, stderr, traces of a machine."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not run from top to bottom in a fresh kernel")
    for i, cell in enumerate(code, 1):
        for output in cell.outputs:
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            wanted = "raises-exception" in cell.metadata.get("tags", [])
            if output.output_type == "error" and not wanted:
                found.append(f"cell {i}: error {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {i}: writes to stderr: {text.strip().splitlines()[-1]}")
            if NOISE.search(text):
                found.append(f"cell {i}: an address, a home path or a process id in the output")
    return found


def same_inputs(a: nbformat.NotebookNode, b: nbformat.NotebookNode) -> bool:
    def inputs(notebook):
        return notebook.metadata, [(c.cell_type, c.source, c.metadata) for c in notebook.cells]

    return inputs(a) == inputs(b)


def run(names: list[str]) -> list[str]:
    texts = sorted(TEXTS.glob("[0-9][0-9]_*.md"))
    unknown = [n for n in names if not any(n in (t.stem, t.stem[:2]) for t in texts)]
    if unknown:
        return [f"no chapter {', '.join(unknown)}; there are {', '.join(t.stem for t in texts)}"]
    chosen = [t for t in texts if not names or t.stem in names or t.stem[:2] in names]
    bad = []
    for text in chosen:
        start, notebook = time.time(), from_text(text, address())
        print(f"{text.stem} ...", end=" ", flush=True)
        try:
            execute(notebook, BOOKS)
        except CellExecutionError as error:
            print("failed", flush=True)
            bad.append(f"{text.stem}: {COLOURS.sub('', str(error))}")
            continue
        nbformat.write(notebook, BOOKS / f"{text.stem}.ipynb")
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        print(f"{cells} cells, {time.time() - start:.1f} s", flush=True)
        bad += [f"{text.stem}: {fault}" for fault in faults(notebook)]
    return bad


def check() -> list[str]:
    texts = {path.stem for path in TEXTS.glob("*.md")}
    books = {path.stem for path in BOOKS.glob("*.ipynb")}
    bad = [f"{stem}: a text without a notebook, or the reverse" for stem in sorted(texts ^ books)]
    for stem in sorted(texts & books):
        stored = nbformat.read(BOOKS / f"{stem}.ipynb", as_version=4)
        if not same_inputs(from_text(TEXTS / f"{stem}.md", address()), stored):
            bad.append(f"{stem}: text and notebook differ; run: make chapter N={stem[:2]}")
        bad += [f"{stem}: {fault}" for fault in faults(stored)]
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "check"])
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    bad = run(args.names) if args.what == "run" else check()
    if bad:
        print("\n".join(bad), file=sys.stderr)
    elif args.what == "check":
        print("text and notebooks are in step; every output is there and clean")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
