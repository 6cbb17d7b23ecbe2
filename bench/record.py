"""What the recording scripts share: a file of runs, written whole or not at all."""

import copy
import datetime
import json
import os
import platform
import time
from pathlib import Path

import torch


def save(results: dict, path: Path) -> None:
    """All or nothing: whoever reads the file meanwhile sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps(results, indent=1) + "\n", "utf8")
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
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{processor()}, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.perf_counter() - start, 1),
    }


def rounded(x: object) -> object:
    """Four decimals: more than a reader needs, and the file stays small."""
    if isinstance(x, dict):
        return {name: rounded(y) for name, y in x.items()}
    return [rounded(y) for y in x] if isinstance(x, list) else round(x, 4)


def processor() -> str:
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
