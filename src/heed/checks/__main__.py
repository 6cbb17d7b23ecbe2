"""What teachers need: a mark for every notebook of a folder, and the table of mutants.

    python -m heed.checks table
    python -m heed.checks grade FOLDER --random-seed S --out grades.csv

Each notebook runs in a process of its own, with limits of time and memory, in an empty folder, and
what it prints is thrown away. Then its functions, found by their names, meet checks that are loaded
afresh: it does not help to redefine `check`, nor to patch torch or heed. This guards against
accidents and simple tricks. It is no prison: run strangers' notebooks in a container, offline.
"""

import argparse
import ast
import builtins
import csv
import importlib
import json
import linecache
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from heed import checks

KEPT_MAGICS = ("%%time", "%%timeit", "%%capture", "%%prun")  # the rest of such a cell is Python
CHECKED = re.compile(r"""\bcheck\(\s*\\?["'](\d\d\.\d+)""")


class TooLong(BaseException):
    """The time for one cell or one task is up; not an Exception, so that `except` lets it pass."""


def grade(folder: Path, random_seed: int, seconds: float, memory: int) -> list[dict[str, str]]:
    """One row for each notebook: a share of the properties for each task, and what went wrong."""
    paths = sorted(p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if not paths:
        raise ValueError(f"no notebooks (*.ipynb) in {folder}")
    asked = {t for p in paths for t in CHECKED.findall(p.read_text("utf8", errors="replace"))}
    chapters = {task.split(".")[0] for task in asked}
    wanted = [task for task in checks.tasks() if task.split(".")[0] in chapters]
    rows = []
    for path in paths:
        row = {"notebook": path.relative_to(folder).as_posix()}
        print(row["notebook"], "...", end=" ", flush=True)
        row |= mark(path, wanted, random_seed, seconds, memory)
        print(row["score"] + (f" ({row['errors']})" if row["errors"] else ""), flush=True)
        rows.append(row)
    return rows


def mark(
    path: Path, wanted: list[str], random_seed: int, seconds: float, memory: int
) -> dict[str, str]:
    """The row of one notebook; whatever the notebook does, there is one."""
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as desk:
        report = Path(desk, "report")
        order = {
            "notebook": str(path.resolve()),
            "report": str(report),
            "tasks": wanted,
            "random_seed": random_seed,
            "seconds": seconds / 4,
            "memory": memory,
        }
        code = _run(json.dumps(order), empty, seconds)
        lines = report.read_text("utf8").splitlines() if report.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    shares = {e["task"]: e["share"] for e in events if "task" in e}
    errors = [e["error"] for e in events if "error" in e]
    late = code is None or any(e.get("late") for e in events)
    if code is None:
        errors.append(f"stopped after {seconds:g} s")
    elif not any(e.get("end") for e in events):
        errors.append(f"the notebook ended its process (exit code {code})")
    done = [s for s in shares.values() if s is not None]
    row = {"score": f"{sum(done):.2f}"}
    row |= {t: "" if shares.get(t) is None else f"{shares[t]:.2f}" for t in wanted}
    return row | {"errors": "; ".join(errors), "timed_out": "yes" if late else ""}


def _run(order: str, empty: str, seconds: float) -> int | None:
    """Exit code of the process that runs one notebook, None if it had to be stopped."""
    settings = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "heed.checks", "mark"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=empty,
        env=settings,
        text=True,
        start_new_session=True,
    )
    try:
        process.communicate(order, timeout=seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End the process and what it has started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has ended already
            pass
    process.kill()
    process.wait()


# From here on: inside the process of one notebook.


def mark_here() -> None:
    """Run the notebook named on stdin, then check its functions; a line of JSON for each event."""
    order = json.loads(sys.stdin.read())
    with open(order["report"], "a", encoding="utf8", buffering=1) as report:

        def tell(**event: Any) -> None:
            report.write(json.dumps(event) + "\n")

        things = (builtins, json, math, os, torch, torch.Tensor, torch.nn.functional)
        clean = [(x, dict(vars(x))) for x in things]
        path, modules = list(sys.path), dict(sys.modules)
        _limit_memory(order["memory"])
        try:
            cells = _cells(Path(order["notebook"]))
        except Exception as error:
            tell(error=f"not a notebook: {_said(error)}")
            tell(end=True)
            return
        space = _execute(cells, order["seconds"], tell)
        for thing, names in clean:
            for name, value in names.items():
                if vars(thing).get(name) is not value:
                    setattr(thing, name, value)
            if isinstance(thing, type):  # a method that was added hides the one it inherits
                for name in set(vars(thing)) - set(names):
                    delattr(thing, name)
        sys.path[:] = path
        sys.modules.update(modules)
        for task in order["tasks"]:
            _check(task, space, order, tell)
        tell(end=True)
    os._exit(0)  # whatever the notebook registered for the end of the process does not run


def _cells(path: Path) -> list[str]:
    """The code cells of a notebook."""
    book = json.loads(path.read_text("utf8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in code]


def _execute(cells: list[str], seconds: float, tell: Callable[..., None]) -> dict[str, Any]:
    """The names that the cells leave behind. A cell that fails is reported; the next one runs."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    space = vars(main)
    space["display"] = lambda *things, **how: None
    for n, source in enumerate(cells, 1):
        name = f"<cell {n}>"
        try:
            source = _python(source)
            linecache.cache[name] = (len(source), None, source.splitlines(True), name)
            with _alarm(seconds):
                exec(compile(source, name, "exec"), space)
        except TooLong:
            tell(error=f"cell {n}: more than {seconds:g} s", late=True)
        except BaseException as error:
            tell(error=f"cell {n}: {_said(error)}")
    return space


def _python(source: str) -> str:
    """A cell without the commands that only a notebook knows."""
    first = source.lstrip().split("\n", 1)
    if first[0].startswith("%%"):
        source = first[1] if first[0].startswith(KEPT_MAGICS) and len(first) == 2 else ""
    try:
        ast.parse(source)
    except SyntaxError:
        source = re.sub(r"^([ \t]*)(?:[%!].*|[^#\n]*\?)$", r"\1pass", source, flags=re.M)
        source = re.sub(r"=[ \t]*[%!].*$", "= None", source, flags=re.M)
    return source


def _check(
    task: str, space: dict[str, Any], order: dict[str, Any], tell: Callable[..., None]
) -> None:
    """Check one function with checks that the notebook has not touched."""
    for name in [m for m in sys.modules if m.split(".")[0] == "heed"]:
        del sys.modules[name]
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    share = None
    try:
        fresh = importlib.import_module("heed.checks")
        function = space.get(fresh.find(task).name)
        if callable(function):
            with _alarm(order["seconds"]):
                result = fresh.check(task, function, order["random_seed"])
            if "not started yet" not in result.message:
                share = result.passed / result.total
    except TooLong:
        share = 0.0
        tell(error=f"{task}: more than {order['seconds']:g} s", late=True)
    except BaseException as error:
        share = 0.0
        tell(error=f"{task}: {_said(error)}")
    tell(task=task, share=share)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TooLong when the time is up; a system without SIGALRM has only the outer limit."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # and again, if something swallows it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(megabytes: int) -> None:
    """So much more address space than now; where the system has no such limit, none."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, OSError, ValueError):
        pass


def _said(error: BaseException) -> str:
    words = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {words}".rstrip(": ")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m heed.checks", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table", help="every task's mutants and the property that catches each")
    commands.add_parser("mark")
    order = commands.add_parser("grade", help="mark every notebook of a folder")
    order.add_argument("folder", type=Path)
    order.add_argument("--random-seed", type=int, required=True, help="for fresh numbers")
    order.add_argument("--out", type=Path, required=True, help="a CSV file, one row per notebook")
    order.add_argument(
        "--seconds", type=float, default=120, help="per notebook; a quarter per cell"
    )
    order.add_argument("--memory", type=int, default=4096, help="megabytes per notebook")
    args = parser.parse_args()
    if args.command == "table":
        print(checks.table(), end="")
    elif args.command == "mark":
        mark_here()
    else:
        start = time.time()
        rows = grade(args.folder, args.random_seed, args.seconds, args.memory)
        with args.out.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"{len(rows)} notebooks in {time.time() - start:.0f} s: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
