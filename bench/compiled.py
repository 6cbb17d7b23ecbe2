"""What the kernels of `heed.flash` become on a Hopper GPU, read without one.

    python -m bench.compiled                 every configuration, about seven minutes on one thread
    python -m bench.compiled --only 128      those of one width, and nothing is written
    python -m bench.compiled --print         the table of the recorded file

Triton's wheel carries the assembler and its reader, so that any x86-64 Linux compiles for sm_90.
Faults, with exit status 1: a spill, no matrix instruction of Hopper (HGMMA) or more shared memory
than a block may have. Float32 has no such instruction, and may spill: it is exact, not fast.
Interpreted or compiled is decided where a kernel is decorated: this needs a process of its own,
without TRITON_INTERPRET.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import record
from heed.flash import kernel, programs

RESULTS = Path(__file__).parent / "results/sm_90/compiled.json"
SHARED = 227 * 1024  # bytes that one block may have on sm_90
KERNELS = ("forward_kernel", "backward_q_kernel", "backward_kv_kernel")
MASKS = ("full", "causal", "window")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = ("registers", "stack", "spills", "shared", "HGMMA", "HMMA", "UTMALDG")
Entry = tuple[
    str, str, str, int, int, int, int, int
]  # kernel, dtype, mask, D, Br, Bc, warps, stages


def entries() -> list[Entry]:
    """Every configuration at full width; bf16 for all masks, the others for one."""
    found = [
        (name, dtype, mask, D, *tiles(c))
        for D in (64, 128, 256)
        for dtype in DTYPES
        for name in KERNELS
        for mask in (MASKS if dtype == "bf16" else ("causal",))
        for c in kernel.configurations(getattr(programs, name), DTYPES[dtype], mask, D)
    ]
    return found


def tiles(c: Any) -> tuple[int, int, int, int]:
    return c.kwargs["Br"], c.kwargs["Bc"], c.num_warps, c.num_stages


def compiled(entry: Entry, arch: int = 90) -> Any:
    """The kernel as a launch compiles it: strides and pointers multiples of 16, integers any."""
    name, dtype, mask, D, Br, Bc, warps, stages = entry
    function = getattr(programs, name)
    constants = {"MASK": mask, "D": D, "Dp": triton.next_power_of_2(D), "Br": Br, "Bc": Bc}
    signature: dict[str, Any] = {}
    attributes = {}
    for index, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_strides"):
            lines = argument in ("lse_strides", "delta_strides")
            signature[argument] = ("i32",) * (2 if lines else 3)
            for at in range(len(signature[argument])):
                attributes[index, at] = [["tt.divisibility", 16]]
        elif argument in programs.INTEGERS or argument == "scale":
            signature[argument] = "fp32" if argument == "scale" else "i32"
        else:
            signature[argument] = "*fp32" if argument in ("lse", "delta") else f"*{dtype}"
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def read(built: Any) -> dict[str, int]:
    """Registers, memory and instructions of the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)),
        "shared": built.metadata.shared,
        "HGMMA": code.stdout.count("HGMMA"),
        "HMMA": len(re.findall(r"\bHMMA", code.stdout)),
        "UTMALDG": code.stdout.count("UTMALDG"),
    }


def faults(entry: Entry, row: dict[str, int]) -> list[str]:
    exact = entry[1] == "fp32"
    return [
        what
        for what, wrong in {
            "spills": not exact and (row["spills"] or row["stack"]),
            "no HGMMA": not exact and not row["HGMMA"],
            "no TMA": not row["UTMALDG"],
            "too much shared memory": row["shared"] > SHARED,
        }.items()
        if wrong
    ]


def name(entry: Entry) -> str:
    """forward_kernel, bf16, causal, width 128, tile 128 x 64, 8 warps, 3 stages"""
    function, dtype, mask, D, Br, Bc, warps, stages = entry
    return (
        f"{function}, {dtype}, {mask}, width {D}, tile {Br} x {Bc}, {warps} warps, {stages} stages"
    )


def source() -> str:
    """A hash of what is compiled."""
    text = Path(programs.__file__).read_text("utf8")
    return hashlib.sha256((text + repr(kernel.CONFIGURATIONS)).encode()).hexdigest()


def empty() -> dict[str, Any]:
    settings = {"target": "sm_90", "triton": triton.__version__, "source": source()}
    return {"settings": settings, "runs": {}}


def show(runs: dict[str, Any]) -> None:
    """One line for each, under what `head` printed."""
    for which, row in runs.items():
        numbers = " ".join(f"{row[column]:9d}" for column in COLUMNS)
        print(f"{which:86s} {numbers}  {', '.join(row['faults'])}", flush=True)


def head() -> None:
    print(f"{'':86s} " + " ".join(f"{column:>9s}" for column in COLUMNS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="words that the name of an entry must hold")
    parser.add_argument("--print", action="store_true", help="the recorded table")
    asked = parser.parse_args()
    if asked.print:
        recorded = json.loads(RESULTS.read_text("utf8"))
        print(recorded["settings"])
        head()
        show(recorded["runs"])
        return 0
    if kernel.INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # later versions warn without it
    # An interrupted run goes on where it stopped.
    results, start = record.load(RESULTS, empty()), time.perf_counter()
    bad = 0
    head()
    for entry in entries():
        which = name(entry)
        if asked.only and asked.only not in which:
            continue
        if asked.only or which not in results["runs"]:
            row = read(compiled(entry))
            results["runs"][which] = row | {"faults": faults(entry, row)}
            if not asked.only:
                record.save(results, RESULTS)
        show({which: results["runs"][which]})
        bad += bool(results["runs"][which]["faults"])
    print(f"triton {triton.__version__}: {bad} with a fault, {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
