"""What the recording scripts share: a file of runs, written whole or not at all."""

import copy
import datetime
import json
import os
import platform
import re
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"


def path(name: str, device: str = "cpu") -> Path:
    """Where the results of a script lie, by the device that they were measured on."""
    return RESULTS / device / f"{name}.json"


def device() -> str:
    """The folder's name: nvidia-h200, or cpu where there is no GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def save(results: dict, path: Path) -> None:
    """All or nothing: whoever reads the file meanwhile sees the old one or the new one."""
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text(text, "utf8")
    os.replace(new, path)


def load(path: Path, empty: dict) -> dict:
    """What was recorded; a copy of `empty` if there is no file, or one with other settings."""
    found = json.loads(path.read_text("utf8")) if path.exists() else empty
    return copy.deepcopy(found if found["settings"] == empty["settings"] else empty)


def add(path: Path, empty: dict, name: str, start: float, measured: dict) -> dict:
    """Put a run into the file, rounded and stamped; the others in it stay."""
    run = stamp(start) | rounded(measured)
    results = load(path, empty)  # now, and not earlier: another process may have written
    results["runs"][name] = run
    save(results, path)
    return run


def stamp(start: float) -> dict[str, object]:
    """When, on what and with what a run was made; `start` is its time.perf_counter()."""
    threads = torch.get_num_threads()
    own = f"{processor()}, {'one thread' if threads == 1 else f'{threads} threads'}"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else own,
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "commit": commit(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def rounded(x: object) -> object:
    """Five digits: more than a reader needs, and the file stays small."""
    if isinstance(x, dict):
        return {name: rounded(y) for name, y in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(y) for y in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def processor() -> str:
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def commit(root: Path = ROOT) -> str:
    """The commit of the working tree, with a + when something but results differs from it.

    A copy of the tree that carries no git is told by the variable HEED_COMMIT.
    """

    def git(*command: str) -> str:
        call = ["git", "--no-optional-locks", "-C", str(root), *command]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
        return git("rev-parse", "--short=8", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HEED_COMMIT", "unknown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
