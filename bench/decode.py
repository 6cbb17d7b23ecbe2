"""Tokens one at a time: caches, the compiled step, and how near they come to the memory's rate.

    python -m bench.decode               what is not in the file yet; some 25 minutes
    python -m bench.decode --only small  records whose name contains this word, measured anew
    python -m bench.decode --quick       tiny sizes, printed and not kept

Three kinds of records. "generate" is a whole greedy call from a prompt of 32: ours beside
transformers' with the same weights. "token" is one new token behind p that have been read; "no
cache" reads all of them again. Its limit is one pass over as many bytes as the model has weights:
memory delivers no token faster. "several" are k tokens in one pass, as a draft is checked. Then
"pages" (attention alone, over pages), "speculative" (`heed.speculative`) and slopes.

An error is the number of new tokens that differ from those of float64 arithmetic with the same
stored weights, or for scores and outputs the relative distance from it. Compiling is not timed; it
takes some ten seconds for each shape, once, and torch keeps the result on the disk.

B texts · T tokens.
"""

import argparse
import copy
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import micro, record, training
from bench.duel import AGAIN, LIMIT, duel, error, show, slope, wall, work
from bench.peers import paged
from heed.attention import attention
from heed.cache.contiguous import Contiguous
from heed.cache.paged import Packed, Paged, PagedKVCache, Pages
from heed.flash import decode as flash_decode
from heed.generation import attending, generate
from heed.gpt import GPT, GPTConfig
from heed.interop import micro as micro_model
from heed.interop import to_hf
from heed.speculative import Counts, Ngram, speculate
from heed.step import Step
from heed.training import train

CACHE, NONE, GATHERED = "heed.gpt's cache", "no cache", "paged, gathered"
STEP, HALF = "heed.step", "heed.step, bfloat16 weights"
PAGE = 16
SIZES = {
    "small": {"n_layers": 4, "d_model": 256, "n_heads": 4, "vocab_size": 512, "max_len": 1088},
    "large": {"n_layers": 12, "d_model": 768, "n_heads": 12, "vocab_size": 50257, "max_len": 1088},
    "tiny": {"n_layers": 1, "d_model": 16, "n_heads": 2, "vocab_size": 31, "max_len": 64},
}
SKIPPED = {("large", 16), ("large", 256)}
LEARNED = {"n_layers": 4, "d_model": 512, "n_heads": 8, "vocab_size": 89, "max_len": 128}
STEPS = 200  # of training for "speculative"
EMPTY: dict[str, Any] = {
    "settings": {
        "sizes": {name: SIZES[name] for name in ("small", "large")},
        "page_len": PAGE,
        "clock": "process_time; with two threads perf_counter",
        "limit": "the sum of a float32 tensor with as many bytes as the weights in float32",
        "left out": "large with a batch of 16 behind 1024 tokens: minutes of prefill",
    },
    "runs": {},
}


def build(size: str) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES[size])).eval()


def prompt(size: str, batch: int, length: int) -> Tensor:
    draw = torch.Generator().manual_seed(length)
    return torch.randint(SIZES[size]["vocab_size"], (batch, length), generator=draw)


def reading(model: GPT) -> tuple[Callable[[], Tensor], int]:
    """One pass over as many bytes as the weights have, and these bytes."""
    n = sum(p.numel() for p in model.parameters()) - model.positions.weight.numel()
    buffer = torch.randn(n)
    return buffer.sum, buffer.nbytes


def quiet(run: Callable[[], Any]) -> Callable[[], Any]:
    """Compiled code wants no_grad, not inference_mode; so all run under no_grad."""

    def call() -> Any:
        with torch.no_grad():
            return run()

    return call


def exact(model: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    """The same stored weights, in float64 arithmetic."""
    return copy.deepcopy(model).to(dtype).double()


def caches(model: GPT, batch: int, room: int) -> dict[str, Callable[[], Any]]:
    c = model.config
    sizes = {"n_kv_heads": c.n_heads, "d_head": c.d_model // c.n_heads}

    def pool() -> Paged:
        pages = batch * -(-room // PAGE)
        made = PagedKVCache(c.n_layers, **sizes, page_len=PAGE, n_pages=pages)
        return Paged(made, [made.new() for _ in range(batch)])

    return {
        CACHE: lambda: model.new_cache(batch, room),
        "contiguous": lambda: Contiguous(c.n_layers, batch, max_len=room, **sizes),
        GATHERED: pool,
    }


# One record each: the fields that name it, and what was measured.


def whole(
    size: str, batch: int, n_prompt: int, n_new: int, rounds: int, threads: int = 1
) -> dict[str, Any]:
    """Greedy calls from a prompt. Several threads need a quiet machine: their clock is the wall."""
    model, ids = build(size), prompt(size, batch, n_prompt)
    room = n_prompt + n_new
    theirs = training.Theirs(SIZES[size]).model.eval()
    theirs.load_state_dict(to_hf(model))
    theirs.generation_config.pad_token_id = 0
    asked = {"max_new_tokens": n_new, "do_sample": False, "use_cache": True}
    cases: dict[str, Callable[[], Tensor]] = {
        f"transformers, {kind} cache": lambda kind=kind: theirs.generate(
            ids, attention_mask=torch.ones_like(ids), cache_implementation=kind, **asked
        )
        for kind in ("dynamic", "static")
    }
    for name, make in caches(model, batch, room).items():
        cases[name] = lambda make=make: generate(model, ids, n_new, cache=make())
    steps = {STEP: torch.float32, HALF: torch.bfloat16}
    for name, dtype in steps.items():
        step = Step(model, batch_size=batch, max_len=room, dtype=dtype)
        cases[name] = lambda step=step: step.generate(ids, n_new)
    if size != "large":
        cases[NONE] = lambda: generate(model, ids, n_new, use_cache=False)
    right = {d: generate(exact(model, d), ids, n_new) for d in (torch.float32, torch.bfloat16)}
    errors = {
        name: float((quiet(run)() != right[steps.get(name, torch.float32)]).sum())
        for name, run in cases.items()
    }
    read, n_bytes = reading(model)
    limit = (lambda: [read() for _ in range(n_new)], n_new)
    rows = duel(
        {name: quiet(run) for name, run in cases.items()},
        errors=errors,
        rounds=rounds,
        flops=n_new,
        limit=limit,
        timer=work if threads == 1 else wall,
    )
    return {"kind": "generate", "new": n_new, "bytes": n_bytes, "rows": per_token(rows, batch)}


def per_token(rows: dict[str, dict[str, Any]], batch: int) -> dict[str, dict[str, Any]]:
    """The duel counts tokens of a text where it would count FLOPs."""
    for row in rows.values():
        row["tokens per second"] = row.pop("flops per second") * batch
    return rows


def token(size: str, batch: int, n_prompt: int, rounds: int) -> dict[str, Any]:
    """One new token behind n_prompt that have been read."""
    model, ids = build(size), prompt(size, batch, n_prompt + 1)
    text, new, room = ids[:, :-1], ids[:, -1:], n_prompt + 1
    cases: dict[str, Callable[[], Tensor]] = {}
    filled = {name: make() for name, make in caches(model, batch, room).items()}
    for name, cache in filled.items():
        with torch.no_grad():
            model(text, cache=cache)

        def again(cache: Any = cache) -> Tensor:
            if cache.length > n_prompt:
                cache.truncate(n_prompt)
            return model(new, cache=cache)[:, -1]

        cases[name] = again
    pool = filled[GATHERED]
    where_it_stands = attending(model, flash_decode.packed)

    def in_place() -> Tensor:
        if pool.length > n_prompt:
            pool.truncate(n_prompt)
        row = where_it_stands(new.T, cache=Packed(pool.pool, pool.seqs, [1] * batch))
        return row[0]

    cases["paged, where it stands"] = in_place
    steps = {STEP: torch.float32, HALF: torch.bfloat16}
    # Compiling twelve layers takes minutes: for short texts of that size see "generate".
    for name, dtype in steps.items() if batch == 1 and (size, n_prompt) not in SKIPPED else ():
        step = Step(model, batch_size=batch, max_len=room, dtype=dtype)
        step.prefill(text)

        def once_more(step: Step = step) -> Tensor:
            step.truncate(n_prompt)
            return step(new)

        cases[name] = once_more
    if size != "large" or n_prompt * batch <= 256:
        cases[NONE] = lambda: model(ids)[:, -1]
    with torch.no_grad():  # of two texts: they are all alike
        right = {d: exact(model, d)(ids[:2])[:, -1] for d in (torch.float32, torch.bfloat16)}
    errors = {
        name: error(quiet(run)()[:2], right[steps.get(name, torch.float32)])
        for name, run in cases.items()
    }
    read, n_bytes = reading(model)
    rows = duel(
        {name: quiet(run) for name, run in cases.items()},
        errors=errors,
        rounds=rounds,
        flops=1,
        limit=(read, 1),
        timer=work,
    )
    return {"kind": "token", "bytes": n_bytes, "rows": per_token(rows, batch)}


def several(size: str, batch: int, n_prompt: int, rounds: int) -> dict[str, Any]:
    """k new tokens in one pass; the ratio is to one."""
    model, ids = build(size), prompt(size, batch, n_prompt + 16)
    cache = model.new_cache(batch, n_prompt + 16)
    with torch.no_grad():
        model(ids[:, :n_prompt], cache=cache)
        right = exact(model)(ids)[:, n_prompt:]
    cases = {}
    for k in (1, 2, 4, 8, 16):

        def check(k: int = k) -> Tensor:
            cache.truncate(n_prompt)
            return model(ids[:, n_prompt : n_prompt + k], cache=cache)

        cases[f"{k} in one pass"] = quiet(check)
    errors = {name: error(run(), right[:, : int(name.split()[0])]) for name, run in cases.items()}
    return {"kind": "several", "rows": duel(cases, errors=errors, rounds=rounds, timer=work)}


def pages(batch: int, n_heads: int, n: int, d_head: int, rounds: int) -> dict[str, Any]:
    """Attention of one token a text over pages that lie anywhere, beside one stretch."""
    draw = torch.Generator().manual_seed(n)
    q = torch.randn(batch, n_heads, 1, d_head, generator=draw)
    k, v = torch.randn(2, batch, n_heads, n, d_head, generator=draw)
    cases: dict[str, Callable[[], Tensor]] = {
        "one stretch": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    }
    for name in ("neighbours", "scattered"):
        handles = [paged(x, PAGE, name == "scattered") for x in (k, v)]
        cases[f"pages, {name}"] = lambda h=handles: flash_decode.plain(q, *h)

        def gathered(handles: list[Pages] = handles) -> Tensor:
            whole = [torch.stack([h.read(b) for b in range(batch)]) for h in handles]
            return torch.nn.functional.scaled_dot_product_attention(q, *whole)

        cases[f"gathered, {name}"] = gathered
    right = attention(q.double(), k.double(), v.double())
    errors = {name: error(quiet(run)(), right) for name, run in cases.items()}
    cases = {name: quiet(run) for name, run in cases.items()}
    rows = duel(cases, errors=errors, rounds=rounds, timer=work)
    shape = {"batch": batch, "n_heads": n_heads, "n": n, "d_head": d_head}
    return {"kind": "pages", "shape": shape, "rows": rows}


@functools.cache
def learned(steps: int, **shape: int) -> GPT:
    """A GPT that has read the Small English for so many steps."""
    torch.manual_seed(0)
    model, english = GPT(GPTConfig(**shape)), micro.language()

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = english.sample(8, min(65, shape["max_len"]), generator)
        return ids[:, :-1], ids[:, 1:]

    train(model, batch, steps=steps, lr=1e-3, random_seed=1)
    return model.eval()


def speculative(
    shape: Mapping[str, int], steps: int, n_new: int, rounds: int, drawn: bool
) -> dict[str, Any]:
    """Texts of a trained model with and without drafts, of the likeliest tokens or drawn.

    A drawn text has no right tokens; its error is that of the likeliest ones, drafted as well.
    """
    model, small = learned(steps, **shape), micro_model()
    starts = micro.language().sample(3, 12, torch.Generator().manual_seed(3)).split(1)
    drafts = {"micro": small} if drawn else {"micro": small, "last 2 words": Ngram(2)}

    def write(draft: Any, n: int, temperature: float) -> tuple[Tensor, list[Counts]]:
        texts, counts = [], []
        for random_seed, ids in enumerate(starts):
            how = {
                "temperature": temperature,
                "generator": torch.Generator().manual_seed(random_seed),
            }
            if draft is None:
                texts.append(generate(model, ids, n_new, **how))
            else:
                text, count = speculate(model, draft, ids, n_new, n_draft=n, **how)
                texts.append(text)
                counts.append(count)
        return torch.cat(texts), counts

    asked = {CACHE: (None, 0)}
    asked |= {f"draft {name}, {n}": (x, n) for name, x in drafts.items() for n in (2, 4, 8)}
    model.double()
    right = write(None, 0, 0.0)[0]
    model.float()
    errors = {name: float((write(*x, 0.0)[0] != right).sum()) for name, x in asked.items()}
    rows = duel(
        {name: lambda x=x: write(*x, float(drawn)) for name, x in asked.items()},
        errors=errors,
        rounds=rounds,
        timer=work,
    )
    for name, x in asked.items():
        if x[0] is not None:
            passes, drafted, accepted = map(sum, zip(*write(*x, float(drawn))[1], strict=True))
            rows[name] |= {"passes": passes, "drafted": drafted, "accepted": accepted}
            rows[name]["tokens a pass"] = n_new * len(starts) / passes
    fields = {"shape": dict(shape), "steps": steps, "new": n_new, "texts": len(starts)}
    return {"kind": "speculative", "drawn": drawn, **fields, "rows": rows}


def slopes(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The exponent of the prompt's length in the time of one token, measured and in theory.

    Theory counts numbers that move: a cached token takes all weights once and two rows of the
    cache for every position; without a cache, every position takes its multiply-adds.
    """
    found = {}
    for size in SIZES:
        for batch in (1, 16):
            members = [
                run
                for run in runs.values()
                if run["kind"] == "token" and (run["size"], run["batch"]) == (size, batch)
            ]
            rows = {}
            c = SIZES[size]
            weights = 12 * c["n_layers"] * c["d_model"] ** 2 + c["vocab_size"] * c["d_model"]
            for case in dict.fromkeys(case for run in members for case in run["rows"]):
                points = sorted(
                    (run["prompt"], run["rows"][case]["seconds"])
                    for run in members
                    if case in run["rows"]
                )
                if len(points) < 2 or case in (LIMIT, AGAIN):
                    continue
                n, seconds = zip(*points, strict=True)
                kept = 2 * c["n_layers"] * c["d_model"]
                stored = weights / 2 if case == HALF else weights
                moved = [stored + batch * kept * x for x in n]
                if case == NONE:
                    moved = [x * (weights + kept * x / 2) for x in n]
                rows[case] = {"time": slope(n, seconds), "in theory": slope(n, moved), "from": n}
            if rows:
                found[f"slope, {size}, batch {batch}"] = {"kind": "slope", "rows": rows}
    return found


def plan(quick: bool) -> dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The records by name: what names them, and the call."""
    found: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {}
    wholes = [("small", 1, 32, 64, 7, 1), ("small", 16, 32, 32, 5, 1), ("large", 1, 32, 16, 5, 1)]
    wholes += [("large", 1, 32, 16, 5, 2)]
    tokens = [("small", b, p, 9) for b in (1, 16) for p in (16, 256, 1024)]
    tokens += [("large", 1, p, 5) for p in (16, 256, 1024)] + [
        ("large", 16, p, 5) for p in (16, 256)
    ]
    checks = [("small", 1, 32, 9), ("large", 1, 32, 5)]
    stretches = [(1, 12, 1024, 64, 9), (16, 4, 1024, 64, 9), (16, 12, 1024, 64, 5)]
    drafts: tuple = (LEARNED, STEPS, 64, 5)
    if quick:
        wholes, tokens = (
            [("tiny", 1, 5, 4, 3, 1)],
            [("tiny", b, p, 3) for b in (1, 16) for p in (5, 9)],
        )
        checks, stretches = [("tiny", 1, 8, 3)], [(2, 2, 37, 8, 3)]
        drafts = (SIZES["tiny"] | {"vocab_size": 89}, 4, 8, 3)
    for cell in wholes:
        fields = dict(zip(("size", "batch", "prompt"), cell, strict=False))
        name = f"generate, {cell[0]}, batch {cell[1]}" + ", two threads" * (cell[5] == 2)
        found[name] = (fields, lambda cell=cell: whole(*cell))
    for kind, run, cells in (("token", token, tokens), ("several", several, checks)):
        for cell in cells:
            fields = dict(zip(("size", "batch", "prompt"), cell, strict=False))
            name = f"{kind}, {cell[0]}, batch {cell[1]}, behind {cell[2]}"
            found[name] = (fields, lambda run=run, cell=cell: run(*cell))
    for cell in stretches:
        name = f"pages, {cell[0]} x {cell[1]} x {cell[2]} x {cell[3]}"
        found[name] = ({}, lambda cell=cell: pages(*cell))
    for drawn, name in ((False, "speculative, likeliest"), (True, "speculative, drawn")):
        found[name] = ({}, lambda drawn=drawn: speculative(*drafts, drawn))
    return found


def measure(path: Path, quick: bool, only: str | None) -> None:
    for name, (fields, call) in plan(quick).items():
        kept = record.load(path, EMPTY)["runs"]
        if only not in name if only else name in kept:
            continue
        start = time.perf_counter()
        torch.set_num_threads(2 if "two threads" in name else 1)
        run = record.add(path, EMPTY, name, start, fields | call())
        stamp = time.perf_counter() - start
        show(name, run["rows"])
        print(f"  took {stamp:.0f} s", flush=True)
    start = time.perf_counter()
    for name, run in slopes(record.load(path, EMPTY)["runs"]).items():
        record.add(path, EMPTY, name, start, run)
        for case, row in run["rows"].items():
            print(f"{name}: n^{row['time']:.2f} (theory {row['in theory']:.2f})  {case}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, kept nowhere")
    parser.add_argument("--only", help="records whose name contains this")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decode.json" if asked.quick else record.path("decode")
        measure(path, asked.quick, asked.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
