"""How long every chapter and every solution takes to run again, in a fresh kernel.

    python -m bench.book          all that is not in the file yet; about ten minutes
    python -m bench.book 05       chapter 05 and its solutions, measured again

`seconds` is the wall's, what a reader waits; `work` is what the kernel computed meanwhile, which
does not grow with what else the machine does. The error of a notebook is the number of its faults:
cells that fail, or write to stderr.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from bench import record

RESULTS = record.path("book")
BUDGET = {"chapters": 45.0, "solutions": 15.0}  # seconds of work
LONGER = {"03": 60.0, "11": 60.0, "13": 60.0, "14": 60.0}  # chapters that train
SETTINGS = {"budget": BUDGET, "longer": LONGER, "threads": 1}
EMPTY = {"settings": SETTINGS, "runs": {}}


def notebooks() -> dict[str, Path]:
    """Every notebook that runs, by the name of its run."""
    root = record.ROOT
    places = {"chapters": root / "chapters", "solutions": root / "exercises/solutions"}
    return {
        f"{kind}, {path.stem}": path
        for kind, folder in places.items()
        for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    }


def measure(path: Path, budget: float) -> dict[str, Any]:
    """The stored inputs once more, by the function that `make chapters` runs them with."""
    sys.path.insert(0, str(record.ROOT / "tools"))
    import nbformat
    from nbclient.exceptions import CellExecutionError
    from notebooks import execute, faults

    sys.path.pop(0)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start, before = time.perf_counter(), children()
    try:
        execute(notebook, path.parent)
    except CellExecutionError:
        pass  # it stands in the outputs, and faults sees it
    wall, work = time.perf_counter() - start, children() - before
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    row = {"seconds": wall, "work": work, "share of the budget": work / budget}
    return {"cells": cells, "rows": {path.stem: row | {"error": len(faults(notebook))}}}


def children() -> float:
    """Seconds of work of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="05, or nothing")
    asked = parser.parse_args().numbers
    os.environ["OMP_NUM_THREADS"] = "1"
    done = record.load(RESULTS, EMPTY)["runs"]
    failed, total = [], 0.0
    for name, path in notebooks().items():
        if path.stem[:2] in asked or not asked and name not in done:
            start = time.perf_counter()
            kind = name.partition(",")[0]
            longer = LONGER.get(path.stem[:2]) if kind == "chapters" else None
            run = measure(path, longer or BUDGET[kind])
            done[name] = record.add(RESULTS, EMPTY, name, start, run)
            (row,) = done[name]["rows"].values()
            share, wrong = row["share of the budget"], row["error"]
            print(f"{row['work']:6.1f} s  {share:4.0%}  faults {wrong}  {name}", flush=True)
            failed += [name] if wrong else []
    for kind in BUDGET:
        runs = [run for name, run in done.items() if name.startswith(kind)]
        total = sum(row["work"] for run in runs for row in run["rows"].values())
        print(f"{total:6.1f} s  {len(runs)} {kind}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
