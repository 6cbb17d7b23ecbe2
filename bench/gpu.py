"""All that a GPU has to show, with one command, inside eight minutes.

    python -m bench.gpu                     writes bench/results/<device>/, prints a table last
    python -m bench.gpu --out FOLDER        copies results and the tests' log there, too
    python -m bench.gpu --dry --out FOLDER  everything tiny, on the CPU, kept in FOLDER alone

On a GPU each section is a process of its own with its own time: a crash, a hang or a device that
answers nothing any more costs one section, not the others. The exit status is 1 if anything failed.
In a copy without git HEED_COMMIT may say which commit it is.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import attention, record, training
from bench.attention import Broken, first_line, matmul, settle
from bench.duel import Timer, cuda, duel, error, show, wall
from bench.peers import BACKWARD, BOTH, FORWARD, Cell, ours, paged
from heed.attention import attention as formula
from heed.flash import decode as flash_decode
from heed.gpt import GPT, GPTConfig, loss
from heed.step import Step

GRACE = 10  # what a section may take above its own, to finish what it has begun
KERNEL = "heed.flash.kernel"
# Seconds of every section: eight minutes in all, less what starting Python takes.
SECONDS = {
    "limits": 25,
    "compile": 45,
    "tests": 85,
    "attention": 150,
    "memory": 20,
    "training": 85,
    "decode": 50,
}
EMPTY = {"settings": {"seconds": SECONDS}, "runs": {}}
ATTENTION = {
    "settings": {
        "tokens": 16384,  # batch times positions
        "d_model": 2048,  # heads times width
        "limit": "a product of two random 8192 x 8192 matrices in bfloat16",
        "clock": "CUDA events, L2 flushed before each call",
        "error": attention.EMPTY["settings"]["error"],
    },
    "runs": {},
}
DECODE = {
    "settings": {
        "prompt": 256,
        "limit": "a copy of 2 GiB; share: bytes of the weights a second, over those it moves",
        "clock": "perf_counter around the call and a synchronisation, as who waits for it sees it",
        "error": "of the scores, from float64 on the same weights; of attention, from the formula",
    },
    "runs": {},
}
TRAINING = {"settings": {"optimizer": "fused AdamW", "batch": 16, "rounds": 9}, "runs": {}}


def device(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def timer(dry: bool, calls: int = 3) -> Timer:
    return wall if dry else cuda(calls=calls)


def limit(dry: bool, dtype: str) -> tuple[Callable[[], object], int]:
    return matmul(64 if dry else 8192, dtype, device(dry))


# The sections: each gives what goes into gpu.json. "failed" names what went wrong, "late" what
# there was no time for.


def limits(folder: Path, dry: bool, until: float, without: list[str]) -> dict[str, Any]:
    """How fast this device multiplies and copies."""
    n, dtype = (64, torch.float32) if dry else (8192, torch.bfloat16)
    a, b = (torch.randn(n, n, device=device(dry)).to(dtype) for _ in range(2))
    x = torch.randn(2**16 if dry else 2**30, dtype=dtype, device=device(dry))
    y = torch.empty_like(x)
    cases = {"matmul": lambda: a @ b, "copy": lambda: y.copy_(x)}
    few = slice(0, 64)
    errors = {"matmul": error((a @ b)[few], a[few].double() @ b.double())}
    errors["copy"] = error(y.copy_(x)[few], x[few])
    rows = duel(cases, errors=errors, rounds=9, timer=timer(dry))
    rows["matmul"]["flops per second"] = 2 * n**3 / rows["matmul"]["seconds"]
    rows["copy"]["bytes per second"] = 2 * x.nbytes / rows["copy"]["seconds"]
    show(f"limits: a product of two {n} x {n} matrices; a copy of {x.nbytes >> 20} MiB", rows)
    return {"rows": rows, "failed": {}}


def compiling(folder: Path, dry: bool, until: float, without: list[str]) -> dict[str, Any]:
    """Our kernel in all its configurations, several at a time, into Triton's cache on the disk."""
    jobs = [(128, True), (64, True), (128, False), (64, False)][: 1 if dry else 4]
    failed = {}
    with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as pool:
        began = {job: pool.submit(compiled, *job, dry) for job in jobs}
        for job, future in began.items():
            try:
                print(f"  width {job[0]}, causal {job[1]}: {future.result():.1f} s", flush=True)
            except Exception as problem:
                failed[str(job)] = first_line(problem)
    return {"failed": failed}


def compiled(d_head: int, causal: bool, dry: bool) -> float:
    """Seconds to a first gradient."""
    start, where = time.perf_counter(), device(dry)
    cell = Cell(
        direction=BOTH,
        n=32 if dry else 512,
        d_head=d_head,
        causal=causal,
        dtype="float32" if dry else "bfloat16",
        batch=1 if dry else 2,
        n_heads=1 if dry else 2048 // d_head,
    )
    attention.call(ours(KERNEL)(cell, where), cell, cell.tensors(where))()
    settle(where)
    return time.perf_counter() - start


def gpu_tests() -> list[str]:
    """Every file with a test that needs a GPU, those of the kernel first."""
    mark = "pytest.mark" + ".gpu"
    files = sorted((record.ROOT / "tests").glob("test_*.py"), key=lambda x: "flash" not in x.name)
    return [str(file) for file in files if mark in file.read_text("utf8")]


def tests(folder: Path, dry: bool, until: float, without: list[str]) -> dict[str, Any]:
    """pytest -m gpu; where there is no GPU the tests are only found."""
    files = gpu_tests()
    if not files:
        return {"last lines": [], "failed": {"pytest": "no test is marked with gpu"}}
    # Other versions warn of other things, and that is not the question here.
    options = [
        "-vv",
        "-m",
        "gpu",
        "--tb=short",
        "-o",
        "filterwarnings=default",
        "-p",
        "no:cacheprovider",
    ]
    asked = [sys.executable, "-m", "pytest", *options, *(["--collect-only"] * dry), *files]
    paths = [str(record.ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    log, left = folder / "gpu_tests.log", until - time.perf_counter()
    with log.open("w", encoding="utf8") as file:
        try:
            found = subprocess.run(
                asked,
                cwd=record.ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=left,
            )
            failed = {"pytest": f"exit status {found.returncode}"} if found.returncode else {}
        except subprocess.TimeoutExpired:
            failed = {"pytest": f"stopped after {left:.0f} s"}
    lines = log.read_text("utf8").splitlines()
    print("\n".join(lines[-60:]))
    return {"last lines": lines[-8:], "failed": failed}


def attentions(folder: Path, dry: bool, until: float, without: list[str]) -> dict[str, Any]:
    """Forward and backward apart, the middle size first."""
    sizes = (48,) if dry else (4096, 8192, 16384, 2048, 1024)
    tokens, d_model = (48, 64) if dry else (16384, 2048)
    cells = {
        Cell(
            direction=direction,
            n=n,
            d_head=d_head,
            causal=causal,
            dtype="float32" if dry else "bfloat16",
            batch=max(1, tokens // n),
            n_heads=d_model // d_head,
        ): 3 if dry else 9
        for n in sizes
        for d_head in ((64,) if dry else (128, 64))
        for causal in (True, False)
        for direction in (FORWARD, BACKWARD)
    }
    return _measured(folder, dry, until, without, cells, [])


def memory(folder: Path, dry: bool, until: float, without: list[str]) -> dict[str, Any]:
    """Forward and backward together, at two sizes: linear in n, or square?"""
    cells = [
        Cell(
            direction=BOTH,
            n=n,
            d_head=64 if dry else 128,
            causal=True,
            dtype="float32" if dry else "bfloat16",
            batch=1,
            n_heads=1 if dry else 16,
        )
        for n in ((32, 48) if dry else (2048, 8192))
    ]
    return _measured(folder, dry, until, without, {}, cells)


def _measured(
    folder: Path,
    dry: bool,
    until: float,
    without: list[str],
    duels: dict[Cell, int],
    peaks: list[Cell],
) -> dict[str, Any]:
    limits = {d: limit(dry, d) for d in {cell.dtype for cell in duels}}
    lost = attention.measure_all(
        folder / "attention.json",
        ATTENTION,
        device(dry),
        duels,
        peaks,
        timer=timer(dry) if duels else wall,
        limit=limits.__getitem__,
        until=until,
        without=without,
    )
    late = [name for name, reason in lost.items() if reason == attention.LATE]
    failed = {name: reason for name, reason in lost.items() if reason != attention.LATE}
    broken = {case: "broke the device" for case in without}
    return {"late": late, "failed": failed | broken}


def train(folder: Path, dry: bool, until: float, without: list[str]) -> dict[str, Any]:
    """A step of the smallest GPT-2: with two attentions, and transformers' own."""
    shape = asdict(GPTConfig.gpt2())
    shape.pop("dropout")
    if dry:
        shape |= {"n_layers": 1, "d_model": 64, "n_heads": 1, "max_len": 32, "vocab_size": 61}
    settings, where = TRAINING["settings"], device(dry)
    batch, rounds = (2, 3) if dry else (settings["batch"], settings["rounds"])
    flops, T = training.step_flops(shape, batch), shape["max_len"]
    draw = torch.Generator().manual_seed(0)
    data = torch.randint(shape["vocab_size"], (batch, T + 1), generator=draw).to(where)
    ids, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    cell = Cell(
        direction=BOTH,
        n=T,
        d_head=shape["d_model"] // shape["n_heads"],
        causal=True,
        dtype="float32" if dry else "bfloat16",
        batch=batch,
        n_heads=shape["n_heads"],
    )

    def with_kernel() -> torch.nn.Module:
        attend = ours(KERNEL)(cell, where)
        return training.ours(shape, lambda q, k, v, dropout: attend(q, k, v))

    builds = {
        "heed.gpt with PyTorch's fused attention": lambda: training.ours(shape, training.sdpa),
        f"heed.gpt with {KERNEL}": with_kernel,
        "transformers GPT2LMHeadModel": lambda: training.Theirs(shape),
        "heed.gpt": lambda: training.ours(shape),
    }
    kept: dict[str, Any] = {"late": [], "failed": {}}
    longest = 0.0
    for way in ["float32 eager"] if dry else ["bfloat16 eager", "bfloat16 compiled"]:
        start, cases, errors = time.perf_counter(), {}, {}
        for name, build in builds.items():
            began = time.perf_counter()
            if began + longest > until - 10:
                kept["late"].append(f"{way}, {name}")
                continue
            try:
                if KERNEL in name and KERNEL in without:
                    raise RuntimeError("its kernel broke the device before")
                torch.manual_seed(0)
                model = build().to(where)
                forward = training.prepare(model, way, where)
                cost = torch.compile(loss) if way.endswith("compiled") else loss
                errors[name] = training.logits_error(model, forward, ids)
                cases[name] = training.step(model, forward, ids, targets, cost)
                cases[name]()
                settle(where)
            except Exception as problem:
                cases.pop(name, None)
                errors.pop(name, None)
                kept["failed"][f"{way}, {name}"] = first_line(problem)
                settle(where)
            took = time.perf_counter() - began
            longest = max(longest, took)
            print(f"  {way}, {name}: ready after {took:.1f} s", flush=True)
        if not cases:
            continue
        rows = duel(
            cases,
            errors=errors,
            rounds=rounds,
            flops=flops,
            limit=limit(dry, way.split()[0]),
            timer=timer(dry, calls=1),
        )
        for case, row in rows.items():
            if case != "limit":
                row["tokens per second"] = ids.numel() / row["seconds"]
        show(way, rows)
        run = {"shape": shape, "batch": batch, "flops": flops, "rows": rows}
        record.add(folder / "training.json", TRAINING, way, start, run)
    return kept


def waited(run: Callable[[], Any], where: str) -> Callable[[], Any]:
    """A call, and the wait for what it has asked of the device."""

    def call() -> Any:
        with torch.no_grad():
            made = run()
        settle(where)
        return made

    return call


def decoding(folder: Path, dry: bool, until: float, without: list[str]) -> dict[str, Any]:
    """One new token of one text: does it come as fast as its weights can be read?"""
    where, kept = device(dry), {"late": [], "failed": {}}
    # Few wide layers: compiling costs by the layer, reading by the byte.
    sizes = {"1.9 GB": (4, 4096), "7.7 GB": (8, 6144)} if not dry else {"tiny": (1, 64)}
    todo: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {}  # with the seconds it takes
    for name, (n_layers, d_model) in sizes.items():
        todo[f"token, {name}"] = 20, partial(one_token, n_layers, d_model, dry)
    for n in (40,) if dry else (4096, 16384):
        todo[f"pages, {n}"] = 5, partial(paged_attention, n, dry)
    for name, (seconds, call) in todo.items():
        start = time.perf_counter()
        if start > until - seconds and not dry:
            kept["late"].append(name)
            continue
        try:
            run = call()
        except Exception as problem:
            kept["failed"][name] = first_line(problem)
            settle(where)
            continue
        show(f"decode, {name}", run["rows"])
        record.add(folder / "decode.json", DECODE, name, start, run)
        if where == "cuda":
            torch.cuda.empty_cache()
    return kept


def beside_a_copy(
    cases: dict[str, Callable[[], Any]], errors: dict[str, float], n_bytes: int, dry: bool
) -> dict[str, dict[str, Any]]:
    """A duel of cases that read n_bytes each, with a copy of 2 GiB as the limit."""
    where = device(dry)
    x = torch.zeros(2**18 if dry else 2**31, dtype=torch.int8, device=where)
    y = torch.empty_like(x)
    rows = duel(
        {name: waited(run, where) for name, run in cases.items()},
        errors=errors,
        rounds=3 if dry else 15,
        flops=n_bytes,
        limit=(waited(lambda: y.copy_(x), where), 2 * x.nbytes),
        timer=wall,
    )
    for row in rows.values():  # bytes stand where a duel counts FLOPs
        row["bytes per second"] = row.pop("flops per second")
    return rows


def one_token(n_layers: int, d_model: int, dry: bool) -> dict[str, Any]:
    """heed.gpt with its cache; heed.step as it is called, and replayed from a CUDA graph."""
    where, dtype = device(dry), torch.float32 if dry else torch.bfloat16
    n = 8 if dry else DECODE["settings"]["prompt"]
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=61 if dry else 32768,
        max_len=2 * n,
        n_layers=n_layers,
        n_heads=d_model // 64,
        d_model=d_model,
    )
    with torch.device(where):
        model = GPT(config).to(dtype).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, n + 1), generator=draw).to(where)
    text, new = ids[:, :-1], ids[:, -1:].contiguous()
    cache = model.new_cache(1, n + 1)
    step = Step(model, batch_size=1, max_len=n + 1, backend="eager" if dry else "inductor")
    with torch.no_grad():
        model(text, cache=cache)
    step.prefill(text)

    def eager() -> torch.Tensor:
        cache.truncate(n)
        return model(new, cache=cache)[:, -1]

    def compiled() -> torch.Tensor:
        step.truncate(n)
        return step(new)

    cases = {"heed.gpt with its cache": eager, "heed.step": compiled}
    for run in cases.values():  # compiles
        waited(run, where)()
    if not dry:
        graph, advance = torch.cuda.CUDAGraph(), step.advance
        with torch.no_grad(), torch.cuda.graph(graph):
            step.place.fill_(n)
            scores = advance(new)

        def replayed() -> torch.Tensor:
            graph.replay()
            return scores

        cases["heed.step in a CUDA graph"] = replayed
    with torch.no_grad():
        right = model.double()(ids)[:, -1]
    model.to(dtype)  # what was rounded once is rounded to the same
    errors = {name: error(waited(run, where)(), right) for name, run in cases.items()}
    outside = model.positions.weight.nbytes
    n_bytes = sum(p.nbytes for p in model.parameters()) - outside
    rows = beside_a_copy(cases, errors, n_bytes, dry)
    shape = {"n_layers": n_layers, "d_model": d_model, "vocab_size": config.vocab_size}
    return {"kind": "token", "shape": shape, "bytes": n_bytes, "rows": rows}


def paged_attention(n: int, dry: bool) -> dict[str, Any]:
    """The kernel that reads pages where they stand, beside pages put together first."""
    where, dtype = device(dry), torch.float32 if dry else torch.bfloat16
    batch, n_kv_heads, n_heads, width = (2, 1, 2, 16) if dry else (8, 8, 32, 128)
    draw = torch.Generator(where).manual_seed(0)
    together = [
        torch.randn(batch, n_kv_heads, n, width, generator=draw, device=where).to(dtype)
        for _ in range(2)
    ]
    q = torch.randn(batch, n_heads, 1, width, generator=draw, device=where).to(dtype)
    k, v = (paged(x, 16, scattered=True) for x in together)

    def read() -> list[torch.Tensor]:
        return [torch.stack([x.read(b) for b in range(batch)]) for x in (k, v)]

    def gathered() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, *read(), enable_gqa=True)

    cases = {
        "gathered, then sdpa": gathered,
        "one stretch, sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
            q, *together, enable_gqa=True
        ),
        "heed.flash.decode.kernel": lambda: flash_decode.kernel(q, k, v),
    }
    right = formula(q.double(), *(x.double() for x in together))
    errors = {name: error(waited(run, where)(), right) for name, run in cases.items()}
    n_bytes = sum(x.nbytes for x in together)
    rows = beside_a_copy(cases, errors, n_bytes, dry)
    shape = {"batch": batch, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": width}
    return {"kind": "pages", "n": n, **shape, "bytes": n_bytes, "rows": rows}


RUN = {
    "limits": limits,
    "compile": compiling,
    "tests": tests,
    "attention": attentions,
    "memory": memory,
    "training": train,
    "decode": decoding,
}


def section(name: str, folder: Path, dry: bool, until: float, without: list[str]) -> int:
    """One section, in this process: 0 all went well, 1 something failed, 3 the device is dead."""
    start, status = time.perf_counter(), 0
    try:
        kept = RUN[name](folder, dry, until, without)
    except Exception as problem:
        kept = {"failed": {name: first_line(problem)}}
        try:
            settle(device(dry))
        except Broken as dead:
            problem = dead
        if isinstance(problem, Broken):
            # In the middle of a duel nobody can say who it was: ours is the one that is new.
            case = str(problem).partition(": ")[0]
            (folder / "broken").write_text(case if case in attention.peers("cuda") else KERNEL)
            status = 3
    print("".join(f"  failed: {what}: {why}\n" for what, why in kept["failed"].items()), end="")
    record.add(folder / "gpu.json", EMPTY, name, start, kept)
    return status or bool(kept["failed"])


# The parent


def command(name: str, folder: Path, dry: bool, until: float, without: list[str]) -> list[str]:
    options = ["--section", name, "--folder", str(folder), "--until", str(until)]
    options += [x for case in without for x in ("--without", case)]
    return [sys.executable, "-m", "bench.gpu", *options, *(["--dry"] * dry)]


def process(name: str, folder: Path, dry: bool, seconds: float, without: list[str]) -> int:
    """A section in a process of its own, killed with its children when its time is over."""
    start = time.perf_counter()
    asked = command(name, folder, dry, time.time() + seconds, without)
    child = subprocess.Popen(asked, cwd=record.ROOT, start_new_session=True)
    try:
        status = child.wait(seconds + GRACE)
        reason = f"exit status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        status, reason = child.wait(), f"killed after {seconds + GRACE:.0f} s"
    written = record.load(folder / "gpu.json", EMPTY)["runs"]
    if status not in (0, 1, 3) or status and name not in written:
        record.add(folder / "gpu.json", EMPTY, name, start, {"failed": {name: reason}})
    return status


def everything(folder: Path, dry: bool, keep: Callable[[], None]) -> bool:
    """All sections one after another; did all go well?"""
    well, without = True, []
    ends = time.perf_counter()
    for name, seconds in SECONDS.items():
        start = time.perf_counter()
        ends += seconds  # what one section leaves, the next may use
        print(f"\n== {name}", flush=True)
        while True:
            left = ends - time.perf_counter()
            if left < 5:
                print("no time left")
                well = False
                break
            if dry:  # a CPU does not die of a kernel
                status = section(name, folder, dry, time.perf_counter() + left, without)
            else:
                status = process(name, folder, dry, left, without)
            well = well and status == 0
            broken = folder / "broken"
            if status != 3 or not broken.exists():
                break
            case = broken.read_text()
            broken.unlink()
            if case in without:
                break
            without.append(case)
            print(f"== {name} once more, without {case}", flush=True)
        print(f"== {name} took {time.perf_counter() - start:.0f} s", flush=True)
        keep()
    return well


def table(folder: Path) -> list[str]:
    """What was measured, one line each."""
    found = {
        name: json.loads((folder / f"{name}.json").read_text("utf8"))["runs"]
        for name in ("gpu", "attention", "training", "decode")
        if (folder / f"{name}.json").exists()
    }
    own, lines = found.get("gpu", {}), []
    if rows := own.get("limits", {}).get("rows"):
        flops, copied = rows["matmul"]["flops per second"], rows["copy"]["bytes per second"]
        lines.append(f"limits    matmul {flops / 1e12:.1f} TFLOP/s  copy {copied / 1e12:.2f} TB/s")
    if "tests" in own:
        lines += [f"tests     {line}" for line in own["tests"].get("last lines", [])[-2:]]
    for run in found.get("attention", {}).values():
        if run["kind"] == "duel":
            lines.append(_attention_line(run))
        elif run["kind"] == "memory":
            peaks = [f"{case} {row['peak'] / 2**20:.1f} MiB" for case, row in run["rows"].items()]
            lines.append(f"memory    n {run['n']}  {'  '.join(peaks)}")
    for name, run in found.get("attention", {}).items():
        if run["kind"] == "slope":
            pairs = [
                f"{case} {row['memory']:.2f} ({row['memory in theory']:.0f})"
                for case, row in run["rows"].items()
                if "memory" in row
            ]
            if pairs:
                lines.append(f"{name}: memory ~ n^ {'  '.join(pairs)}")
    for way, run in found.get("training", {}).items():
        for case, row in run["rows"].items():
            if case not in ("limit", "again"):
                lines.append(
                    f"training  {way}  {row['tokens per second']:,.0f} tokens/s"
                    f"  {row['share of the limit']:.0%} of the limit  x {row['ratio']:.3f}"
                    f"  error {row['error']:.1e}  {case}"
                )
    for name, run in found.get("decode", {}).items():
        for case, row in run["rows"].items():
            if case not in ("limit", "again"):
                lines.append(
                    f"decode    {name}  {row['bytes per second'] / 1e9:.0f} GB/s"
                    f"  {row['share of the limit']:.0%} of the copy rate  x {row['ratio']:.3f}"
                    f"  error {row['error']:.1e}  {case}"
                )
    for name, run in own.items():
        lines += [f"FAILED    {name}: {what}: {why}" for what, why in run.get("failed", {}).items()]
        if run.get("late"):
            lines.append(f"no time   {name}: {len(run['late'])} cells, from {run['late'][0]}")
    took = [f"{name} {run['seconds']:.0f} s" for name, run in own.items() if name in SECONDS]
    return [*lines, f"took      {'  '.join(took)}"]


def _attention_line(run: dict[str, Any]) -> str:
    """Ours, its error and the baseline's, and how many times faster than the others it is."""
    rows, mask = run["rows"], "causal" if run["causal"] else "full"
    first = next(iter(rows))
    best = KERNEL if KERNEL in rows else first
    row = rows[best]
    line = f"{run['direction'][:9]:9} d{run['d_head']:<3} {mask:6} n{run['n']:<5}"
    line += f"  {best.removeprefix('heed.flash.')} {row['flops per second'] / 1e12:.1f} TFLOP/s"
    line += f" ({row['share of the limit']:.0%})  error {row['error']:.1e}"
    line += f" ({first.removeprefix('sdpa ')} {rows[first]['error']:.1e}) "
    for case, other in rows.items():
        if case not in (best, "limit", "again"):
            line += f" {other['ratio'] / row['ratio']:.2f}x {case.removeprefix('sdpa ')} "
    return line.rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for copies of the results")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    for name in ("--section", "--folder", "--until", "--without"):  # the parent to its processes
        action = {"action": "append", "default": []} if name == "--without" else {}
        parser.add_argument(name, help=argparse.SUPPRESS, **action)
    asked = parser.parse_args()
    if asked.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports the kernel
        torch.set_num_threads(1)
    if asked.section:
        until = time.perf_counter() + float(asked.until) - time.time()
        return section(asked.section, Path(asked.folder), asked.dry, until, asked.without)
    if asked.dry and not asked.out:
        parser.error("--dry keeps nothing in the repository: it needs --out")
    if not asked.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --dry tries everything on the CPU")
    targets = [asked.out] if asked.out else []
    targets += [] if asked.dry else [record.RESULTS / record.device()]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)

        def keep() -> None:
            for target in targets:
                target.mkdir(parents=True, exist_ok=True)
                for file in folder.glob("*.json"):
                    shutil.copy(file, target)
            for log in folder.glob("*.log") if asked.out else ():
                shutil.copy(log, asked.out)

        well = everything(folder, asked.dry, keep)
        lines, start = table(folder), time.perf_counter()
        record.add(folder / "gpu.json", EMPTY, "table", start, {"lines": lines})
        keep()
    print("\n==== " + ("all well" if well else "something failed"), *lines, sep="\n")
    return not well


if __name__ == "__main__":
    sys.exit(main())
