"""Chapter 22, kernel: the checks of its seven tasks, and `problem`, a launch for paper.

A kernel is handed to `check` itself. The check launches it under Triton's interpreter, with a GPU
or without, in memory of its own: NaN lies around every tensor, and every address is looked at
before it is read or written.

(M, K) times (K, N) in output tiles of (BM, BN), each summed over tiles of BK: one program a tile.
T queries · S keys · D width · Br queries and Bc keys in a tile.
"""

import inspect
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, no_type_check

import torch
from torch import Generator, Tensor

from heed import attention, masks
from heed.checks import Bug, Function, Task, mutants, prop, write_the_test
from heed.checks.compare import Wrong, expect, normal, several, shown

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter, jit
except ImportError:  # there is none for this system: what needs no kernel works all the same

    class triton:  # type: ignore[no-redef]
        jit = staticmethod(lambda f: f)

    class tl:  # type: ignore[no-redef]
        constexpr = int

    interpreter = None

MUTANTS = mutants(__file__)
GAP = 4096  # numbers of NaN before and behind a tensor


# A kernel under watch


def field(x: Tensor, row: int | None = None) -> Tensor:
    """x in the middle of NaN. The rows of a matrix begin `row` numbers apart."""
    strides = (1,) if x.ndim == 1 else (row or x.shape[1], 1)
    return _placed(x, strides)


def unwritten(*shape: int, row: int | None = None) -> Tensor:
    """A place for results: NaN, so that what a kernel does not write is seen."""
    return field(torch.full(shape, math.nan), row)


def _placed(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    extent = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    gap = max(GAP, 2 * extent)
    there = torch.full((extent + 2 * gap,), math.nan, dtype=x.dtype)
    return there.as_strided(x.shape, strides, gap).copy_(x)


def run(f: Function, given: str, grid: tuple[int, ...], *inputs: Any, **sizes: Any) -> None:
    """Launch the reader's kernel on tensors from `field`, and use no address far outside."""
    _launch(f, given, grid, inputs, sizes, strict=False)


def run_strictly(
    f: Function, given: str, grid: tuple[int, ...], *inputs: Any, **sizes: Any
) -> None:
    """The same, and every number that is read or written must be one of a tensor's own."""
    _launch(f, given, grid, inputs, sizes, strict=True)


def _launch(
    f: Function, given: str, grid: tuple[int, ...], inputs: Any, sizes: Any, strict: bool
) -> None:
    if interpreter is None:
        raise ImportError("a kernel needs triton (pip install triton), which is for Linux only")
    kernel = inspect.unwrap(f)
    if not hasattr(kernel, "fn"):
        f(*inputs, *sizes.values())  # a blank says so itself
        raise Wrong(shown("your function", "a kernel: @triton.jit above it", "a plain function"))
    written = inspect.unwrap(kernel.fn)
    names = inspect.signature(written).parameters
    tensors = {n: x for n, x in zip(names, inputs, strict=False) if isinstance(x, Tensor)}
    with (
        warnings.catch_warnings(),
        _interpreted(written.__globals__),
        _watched(tensors, given, strict),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of NaN: the check says it better
        try:
            interpreter.InterpretedFunction(written)[grid](*inputs, **sizes)
        except interpreter.InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, interpreter.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


@contextmanager
def _interpreted(space: dict[str, Any]) -> Iterator[None]:
    """Interpret what Triton would compile: the reader's helpers, and its own (tl.sum and so on).

    Triton teaches its language anew at every call of a helper, which takes most of the time, and
    does not take it back; here it is done once.
    """
    jit.mangle_type(0)  # at a first launch Triton loads the rest of itself
    places = (vars(tl), vars(tl.standard), space)
    compiled = [
        (place, name, value)
        for place in places
        for name, value in place.items()
        if isinstance(value, jit.JITFunction)
    ]
    teach, options = interpreter._patch_lang, interpreter.interpreter_builder.options
    lesson = teach(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    for place, name, value in compiled:
        place[name] = interpreter.InterpretedFunction(value.fn)
    try:
        yield
    finally:
        for place, name, value in compiled:
            place[name] = value
        interpreter.interpreter_builder.options = options
        interpreter._patch_lang = teach
        lesson.restore()


@contextmanager
def _watched(tensors: dict[str, Tensor], given: str, strict: bool) -> Iterator[None]:
    """Look at every address before it is used, and refuse those outside the tensors.

    A masked place for which `other` says nothing holds NaN, as anything may stand there on a GPU.
    """
    own = torch.cat([_addresses(x) for x in tensors.values()])

    def look(verb: str, pointers: Any, mask: Any) -> None:
        at = torch.from_numpy(pointers.data.astype("int64")).flatten()
        at = at[torch.from_numpy(mask.data.astype(bool)).flatten()]
        for address in at[~torch.isin(at, own)].tolist():
            said = f"{verb} far outside"
            for name, x in tensors.items():
                memory = x.untyped_storage()
                if 0 <= address - memory.data_ptr() < memory.nbytes():  # in the NaN around x
                    place = (address - x.data_ptr()) // x.element_size()
                    size = " x ".join(map(str, x.shape))
                    said = f"{verb} at {name} {place:+d}, and {name} has {size} numbers"
                    break
            if strict or said.endswith("outside"):
                raise Wrong(shown(given, "addresses inside the tensors", said))

    def load(pointers: Any, mask: Any, other: Any, *more: Any) -> Any:
        look("reads", pointers, mask)
        got = load_them(pointers, mask, other, *more)
        if other is None and got.data.dtype.kind == "f":
            got.data[~mask.data.astype(bool)] = math.nan
        return got

    def store(pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        look("writes", pointers, mask)
        return store_them(pointers, value, mask, *more)

    builder = interpreter.interpreter_builder
    load_them, store_them = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load, builder.create_masked_store = load, store
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store


def _addresses(x: Tensor) -> Tensor:
    """Where each number of x lies."""
    at = torch.tensor(x.data_ptr())
    for n, stride in zip(x.shape, x.stride(), strict=True):
        at = at[..., None] + torch.arange(n) * stride * x.element_size()
    return at.flatten()


def _tiles(n: int, tile: int) -> int:
    return -(-n // tile)


# 22.1


def launch(n: int, tile: int, at_once: int, size: int) -> tuple[int, int, int, int]:
    programs = -(-n // tile)
    waves = -(-programs // at_once)
    idle = programs * tile - n
    moved = 2 * n * size
    return programs, waves, idle, moved


def _launched(f: Function, n: int, tile: int, at_once: int, size: int, part: int) -> None:
    got = several(f(n, tile, at_once, size), 4, f"n = {n:,}, tile = {tile}")[part]
    want = launch(n, tile, at_once, size)[part]
    if isinstance(got, bool) or not isinstance(got, int) or got != want:
        name = ("programs", "waves", "idle places", "bytes")[part]
        given = f"n = {n:,}, tile = {tile}, at_once = {at_once}, size = {size}: {name}"
        said = f"{got:,}" if isinstance(got, int) else f"{got!r}, a {type(got).__name__}"
        raise Wrong(shown(given, f"{want:,}", said))


@prop("full tiles", "Every program takes one tile. How many tiles hold all the numbers?")
def full_tiles(f: Function, rng: Generator) -> None:
    _launched(f, 48, 16, 5, 4, 0)


@prop("a ragged last tile", "The numbers that are left over need a program too. Round up.")
def ragged_last(f: Function, rng: Generator) -> None:
    _launched(f, 37, 16, 5, 4, 0)
    _launched(f, 1, 16, 5, 4, 0)


@prop("waves", "With 7 programs and room for 5, two wait for a place. Rounding is needed here too.")
def in_waves(f: Function, rng: Generator) -> None:
    _launched(f, 160, 16, 5, 4, 1)
    _launched(f, 97, 16, 5, 4, 1)


@prop("idle places", "All tiles are equally long. Which of their places hold no number?")
def idle_places(f: Function, rng: Generator) -> None:
    _launched(f, 37, 16, 5, 4, 2)
    _launched(f, 48, 16, 5, 4, 2)


@prop("bytes", "A number is read once and written once. A masked place moves nothing.")
def bytes_moved(f: Function, rng: Generator) -> None:
    _launched(f, 37, 16, 5, 4, 3)
    _launched(f, 37, 16, 5, 2, 3)


@prop("beyond the exact floats", "Above 2**53 a division of floats rounds. Stay in whole numbers.")
def very_many(f: Function, rng: Generator) -> None:
    for part in range(4):
        _launched(f, 2**60 + 1, 16, 132, 2, part)


LAUNCH = Task(
    "22.1",
    launch,
    (full_tiles, ragged_last, in_waves, idle_places, bytes_moved, very_many),
    MUTANTS["22.1"],
)


# 22.2


@triton.jit
@no_type_check
def affine(x, y, a, b, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = i < n
    x_i = tl.load(x + i, mask=inside)
    tl.store(y + i, a * x_i + b, mask=inside)


def _affine(f: Function, rng: Generator, n: int, tile: int, launch: Any = run) -> None:
    given = f"{n} numbers, TILE = {tile}, a = 1.5, b = -0.25"
    x, y = normal(rng, n).float(), unwritten(n)
    launch(f, given, (_tiles(n, tile),), field(x), y, 1.5, -0.25, n, TILE=tile)
    expect(y, 1.5 * x.double() - 0.25, given)


@prop(
    "one tile", "A pointer plus the numbers 0 to TILE - 1 is TILE pointers. Load, compute, store."
)
def affine_one(f: Function, rng: Generator) -> None:
    _affine(f, rng, 16, 16)


@prop("several tiles", "Which program is this one, and where does its tile begin?")
def affine_several(f: Function, rng: Generator) -> None:
    _affine(f, rng, 48, 16)


@prop("a ragged last tile", "37 numbers make two full tiles and 5 more. All of them are wanted.")
def affine_ragged(f: Function, rng: Generator) -> None:
    _affine(f, rng, 37, 16)


@prop("another tile", "The length of a tile is an argument. Does a number of yours stand for it?")
def affine_wide(f: Function, rng: Generator) -> None:
    _affine(f, rng, 101, 64)


@prop(
    "nothing beyond the end",
    "A place behind the last number belongs to somebody else. Both the load and the store need to"
    " know which places are yours.",
)
def affine_inside(f: Function, rng: Generator) -> None:
    _affine(f, rng, 37, 16, run_strictly)
    _affine(f, rng, 3, 16, run_strictly)


AFFINE = Task(
    "22.2",
    affine,
    (affine_one, affine_several, affine_ragged, affine_wide, affine_inside),
    MUTANTS["22.2"],
)


# 22.3


@triton.jit
@no_type_check
def softmax_rows(x, y, x_row, y_row, n, TILE: tl.constexpr):
    row = tl.program_id(0)
    j = tl.arange(0, TILE)
    s = tl.load(x + row * x_row + j, mask=j < n, other=float("-inf"))
    top = tl.max(s, axis=0)
    e = tl.exp(s - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(e, axis=0)
    p = e / tl.where(total == 0.0, 1.0, total)
    tl.store(y + row * y_row + j, p, mask=j < n)


def _softmax(
    f: Function, x: Tensor, tile: int, given: str, apart: tuple[int, int], launch: Any = run
) -> None:
    rows, n = x.shape
    x_row, y_row = (n + more for more in apart)
    y = unwritten(rows, n, row=y_row)
    launch(f, given, (rows,), field(x.float(), x_row), y, x_row, y_row, n, TILE=tile)
    expect(y, attention.softmax(x), given)


@prop("one row", "The largest off, exp, the sum, the quotient: all of it on one tile of numbers.")
def softmax_one(f: Function, rng: Generator) -> None:
    _softmax(f, torch.arange(1.0, 17).log()[None].double(), 16, "scores ln 1 to ln 16", (0, 0))


@prop(
    "several rows", "The program's number is the row. A row begins a stride after the one before."
)
def softmax_rows_of_them(f: Function, rng: Generator) -> None:
    _softmax(f, normal(rng, 3, 16), 16, "3 rows of 16", (0, 0))


@prop(
    "a width that fills no tile",
    "What does a place behind the row's end add to the sum? Which score would add nothing?",
)
def softmax_ragged(f: Function, rng: Generator) -> None:
    _softmax(f, normal(rng, 3, 11) - 5, 16, "3 rows of 11 in tiles of 16, all below zero", (0, 0))


@prop("rows that lie apart", "x and y have strides of their own, and none of them need be n.")
def softmax_apart(f: Function, rng: Generator) -> None:
    _softmax(f, normal(rng, 3, 11), 16, "3 rows of 11, in x 13 and in y 18 apart", (2, 7))


@prop("large scores", "exp(100) is more than a float32 holds. Which exp is never above 1?")
def softmax_large(f: Function, rng: Generator) -> None:
    _softmax(f, 8 * torch.round(40 * normal(rng, 3, 13)), 16, "scores in the hundreds", (0, 0))


@prop(
    "a row of minus infinity",
    "Minus infinity less minus infinity is NaN, and so is 0 / 0. Such a row is to be zeros.",
)
def softmax_dead(f: Function, rng: Generator) -> None:
    x = normal(rng, 3, 11)
    x[1] = -math.inf
    x[2, 4] = -math.inf
    _softmax(f, x, 16, "3 rows of 11, the second all -inf", (0, 0))


@prop("a thousand", "Any width up to 1,024 is asked for. The tile's length is an argument.")
def softmax_thousand(f: Function, rng: Generator) -> None:
    _softmax(f, normal(rng, 2, 1000), 1024, "2 rows of 1,000 in tiles of 1,024", (0, 0))


@prop(
    "nothing beyond the row",
    "Behind the end of a row lies the next one, which another program is writing. Mask the store"
    " as the load.",
)
def softmax_inside(f: Function, rng: Generator) -> None:
    _softmax(f, normal(rng, 3, 11), 16, "3 rows of 11, 17 apart", (6, 6), run_strictly)


SOFTMAX = Task(
    "22.3",
    softmax_rows,
    (
        softmax_one,
        softmax_rows_of_them,
        softmax_ragged,
        softmax_apart,
        softmax_large,
        softmax_dead,
        softmax_thousand,
        softmax_inside,
    ),
    MUTANTS["22.3"],
)


# 22.4


@triton.jit
@no_type_check
def matmul(a, b, c, M, N, K, a_row, a_col, b_row, b_col, c_row, c_col, TILE: tl.constexpr):
    i = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
    j = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)
        inside_a = (i < M) & (k[None, :] < K)
        inside_b = (k[:, None] < K) & (j < N)
        a_k = tl.load(a + i * a_row + k[None, :] * a_col, mask=inside_a, other=0.0)
        b_k = tl.load(b + k[:, None] * b_row + j * b_col, mask=inside_b, other=0.0)
        total += tl.dot(a_k, b_k, input_precision="ieee")
    tl.store(c + i * c_row + j * c_col, total, mask=(i < M) & (j < N))


def _matmul(
    f: Function, a: Tensor, b: Tensor, given: str, tile: int = 16, launch: Any = run
) -> None:
    M, K, N = *a.shape, b.shape[1]
    c = unwritten(M, N, row=N + 3)
    grid = _tiles(M, tile), _tiles(N, tile)
    strides = [*a.stride(), *b.stride(), *c.stride()]
    launch(f, given, grid, a, b, c, M, N, K, *strides, TILE=tile)
    expect(c, a.double() @ b.double(), given)


def _matrices(rng: Generator, M: int, K: int, N: int) -> tuple[Tensor, Tensor]:
    return field(normal(rng, M, K).float(), K + 1), field(normal(rng, K, N).float(), N + 2)


@prop("one tile", "Rows of a down, columns of b across: two grids of pointers, one tl.dot.")
def matmul_one(f: Function, rng: Generator) -> None:
    _matmul(f, *_matrices(rng, 16, 16, 16), "(16, 16) times (16, 16), TILE = 16")


@prop("a longer sum", "The inner axis has several tiles. Walk along it, and keep a running sum.")
def matmul_long(f: Function, rng: Generator) -> None:
    _matmul(f, *_matrices(rng, 16, 48, 16), "(16, 48) times (48, 16), TILE = 16")


@prop("many tiles", "The grid has two axes: program_id(0) counts tiles down, program_id(1) across.")
def matmul_many(f: Function, rng: Generator) -> None:
    _matmul(f, *_matrices(rng, 16, 16, 32), "(16, 16) times (16, 32), TILE = 16")


@prop("another tile", "The tile's side is an argument, in the loop as well.")
def matmul_tile(f: Function, rng: Generator) -> None:
    _matmul(f, *_matrices(rng, 32, 64, 32), "(32, 64) times (64, 32), TILE = 32", 32)


@prop(
    "a ragged sum",
    "Behind the last column of a lies NaN here. Zero times NaN is NaN, so both tiles need zeros.",
)
def matmul_sum(f: Function, rng: Generator) -> None:
    _matmul(f, *_matrices(rng, 16, 37, 16), "(16, 37) times (37, 16), TILE = 16")


@prop(
    "ragged rows and columns", "The last tiles hang over both edges of c. All numbers are wanted."
)
def matmul_ragged(f: Function, rng: Generator) -> None:
    _matmul(f, *_matrices(rng, 19, 16, 21), "(19, 16) times (16, 21), TILE = 16")


@prop(
    "strides",
    "Nobody promised that a row is one stretch of memory. Each axis of each matrix has its stride.",
)
def matmul_strides(f: Function, rng: Generator) -> None:
    a, b = field(normal(rng, 21, 5).float(), 13).T, field(normal(rng, 7, 21).float(), 29).T
    _matmul(f, a, b, "(5, 21) times (21, 7), both transposed")


@prop(
    "half precision, float32 sums",
    "A sum of 2,048 in float16 swallows a 1. In which type is the running sum kept, and what does"
    " tl.dot add to?",
)
def matmul_half(f: Function, rng: Generator) -> None:
    a = field(torch.ones(16, 32, dtype=torch.float16))
    b = field(torch.cat([torch.full((16, 16), 128.0), torch.eye(16)]).half())
    _matmul(f, a, b, "float16, ones times sixteen rows of 128 and sixteen of the identity")


@prop("nothing beyond the edge", "Loads and the store: two axes each, and each axis has an end.")
def matmul_inside(f: Function, rng: Generator) -> None:
    sizes = "(5, 21) times (21, 7), TILE = 16"
    _matmul(f, *_matrices(rng, 5, 21, 7), sizes, launch=run_strictly)


MATMUL = Task(
    "22.4",
    matmul,
    (
        matmul_one,
        matmul_long,
        matmul_many,
        matmul_tile,
        matmul_sum,
        matmul_ragged,
        matmul_strides,
        matmul_half,
        matmul_inside,
    ),
    MUTANTS["22.4"],
)


# 22.5


@triton.jit
@no_type_check
def flash_forward(
    q, k, v, out, q_row, k_row, v_row, out_row, T, S, scale,
    D: tl.constexpr, Br: tl.constexpr, Bc: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * Br + tl.arange(0, Br)
    d = tl.arange(0, D)[None, :]
    q_i = tl.load(q + i[:, None] * q_row + d, mask=i[:, None] < T, other=0.0)
    m = tl.full((Br,), float("-inf"), tl.float32)
    l = tl.zeros((Br,), tl.float32)
    o = tl.zeros((Br, D), tl.float32)
    for start in range(0, S, Bc):
        j = start + tl.arange(0, Bc)
        k_j = tl.load(k + j[:, None] * k_row + d, mask=j[:, None] < S, other=0.0)
        v_j = tl.load(v + j[:, None] * v_row + d, mask=j[:, None] < S, other=0.0)
        s = tl.dot(q_i, tl.trans(k_j), input_precision="ieee") * scale
        seen = j[None, :] < S
        if CAUSAL:
            seen = seen & (j[None, :] <= i[:, None] + S - T)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        level = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp(s - level[:, None])
        rescale = tl.exp(m - level)
        l = rescale * l + tl.sum(p, axis=1)
        o = rescale[:, None] * o + tl.dot(p, v_j, input_precision="ieee")
        m = m_new
    o_i = o / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(out + i[:, None] * out_row + d, o_i, mask=i[:, None] < T)


def _flash(
    f: Function,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    given: str,
    Br: int = 16,
    Bc: int = 16,
    launch: Any = run,
    apart: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> None:
    (T, D), S = q.shape, len(k)
    given = f"T = {T}, S = {S}, D = {D}, Br = {Br}, Bc = {Bc}, {given}"
    rows = [D + more for more in apart]
    placed = [field(x.float(), row) for x, row in zip((q, k, v), rows, strict=False)]
    placed.append(unwritten(T, D, row=rows[3]))
    sizes = {"D": D, "Br": Br, "Bc": Bc, "CAUSAL": causal}
    launch(f, given, (_tiles(T, Br),), *placed, *rows, T, S, D**-0.5, **sizes)
    mask = masks.causal if causal else masks.full
    exact = [x.float().double()[None, None] for x in (q, k, v)]
    want = attention.attention(exact[0], exact[1], exact[2], mask)[0, 0]
    expect(placed[3], want, given, tol=2e-4)


def _qkv(rng: Generator, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(rng, T, 16), normal(rng, S, 16), normal(rng, S, 16)


@prop("one tile", "With one tile of keys it is the softmax of a product, times v. Is it scaled?")
def flash_one(f: Function, rng: Generator) -> None:
    _flash(f, *_qkv(rng, 16, 16), False, "full")


@prop(
    "several tiles",
    "Queries are shared out among the programs; each of them walks over all the keys, Bc a step.",
)
def flash_several(f: Function, rng: Generator) -> None:
    q, k, v = _qkv(rng, 32, 64)
    k[32:] /= 10
    _flash(f, q, k, v, False, "scores that are smaller in the second tile", Bc=32)


@prop(
    "a maximum that comes late",
    "When a later tile holds the larger score, what was summed before was measured from a lower"
    " level. Sum and output must both be rescaled.",
)
def flash_late(f: Function, rng: Generator) -> None:
    q, k, v = _qkv(rng, 16, 48)
    k = k + q.mean(0) * torch.linspace(-9, 9, 48)[:, None]
    _flash(f, q.mean(0) + 0.1 * q, k, v, False, "scores that rise with the key")


@prop(
    "scores far from zero",
    "A row whose scores are all about -320 has a softmax like any other. Where does the running"
    " maximum begin?",
)
def flash_far(f: Function, rng: Generator) -> None:
    q, k, v = _qkv(rng, 16, 16)
    q[:, 0], k[:, 0] = 32.0, -40.0
    _flash(f, q, k, v, False, "scores about -320")
    k[:, 0] = 40.0
    _flash(f, q, k, v, False, "scores about 320")


@prop(
    "a ragged last tile",
    "A key beyond the end reads as zeros and scores 0. A weight of exp(0) is not nothing.",
)
def flash_ragged(f: Function, rng: Generator) -> None:
    _flash(f, *_qkv(rng, 5, 21), False, "full")


@prop("causal", "Position i reads the keys up to i, itself included.")
def flash_causal(f: Function, rng: Generator) -> None:
    _flash(f, *_qkv(rng, 19, 19), True, "causal")


@prop("fewer queries than keys", "The queries are the last T of the S positions.")
def flash_fewer(f: Function, rng: Generator) -> None:
    _flash(f, *_qkv(rng, 5, 19), True, "causal")


@prop(
    "a query that may read nothing",
    "With more queries than keys the first of them come before every key: maximum minus infinity,"
    " sum 0. Their output is zeros.",
)
def flash_dead(f: Function, rng: Generator) -> None:
    _flash(f, *_qkv(rng, 19, 5), True, "causal")


@prop("rows that lie apart", "q, k, v and out: four tensors, four strides.")
def flash_apart(f: Function, rng: Generator) -> None:
    _flash(f, *_qkv(rng, 5, 7), False, "strides 17, 19, 23, 29", apart=(1, 3, 7, 13))


@prop("nothing beyond the end", "Three loads and a store. Each has rows that are not there.")
def flash_inside(f: Function, rng: Generator) -> None:
    _flash(f, *_qkv(rng, 5, 19), True, "causal", launch=run_strictly, apart=(1, 3, 7, 13))


FLASH = Task(
    "22.5",
    flash_forward,
    (
        flash_one,
        flash_several,
        flash_late,
        flash_far,
        flash_ragged,
        flash_causal,
        flash_fewer,
        flash_dead,
        flash_apart,
        flash_inside,
    ),
    MUTANTS["22.5"],
)


# 22.6


def tiles(T: int, S: int, Br: int, Bc: int, window: int | None) -> tuple[int, int, int]:
    empty = full = cut = 0
    for first_row in range(0, T, Br):
        low, high = S - T + first_row, S - T + min(first_row + Br, T) - 1
        for left in range(0, S, Bc):
            right = min(left + Bc, S) - 1
            nearest, farthest = low - right, high - left
            if farthest < 0 or (window is not None and nearest >= window):
                empty += 1
            elif nearest >= 0 and (window is None or farthest < window):
                full += 1
            else:
                cut += 1
    return empty, full, cut


def _tiled(f: Function, T: int, S: int, Br: int, Bc: int, window: int | None) -> None:
    given = f"T = {T}, S = {S}, Br = {Br}, Bc = {Bc}, window = {window}: empty, full, cut"
    got = several(f(T, S, Br, Bc, window), 3, given)
    want = tiles(T, S, Br, Bc, window)
    if tuple(got) != want:
        raise Wrong(shown(given, str(want), str(tuple(got))))


@prop(
    "a square of tiles",
    "Four tiles by four: those above the diagonal, those below it, and those that it crosses.",
)
def tiles_square(f: Function, rng: Generator) -> None:
    _tiled(f, 64, 64, 16, 16, None)


@prop(
    "fewer queries than keys", "The last query is the last position: row r of T asks as S - T + r."
)
def tiles_fewer(f: Function, rng: Generator) -> None:
    _tiled(f, 32, 80, 16, 16, None)
    _tiled(f, 1, 80, 16, 16, None)
    _tiled(f, 31, 32, 16, 16, None)


@prop("tiles that are not square", "Compare positions with positions, not tiles with tiles.")
def tiles_oblong(f: Function, rng: Generator) -> None:
    _tiled(f, 64, 64, 32, 8, None)
    _tiled(f, 64, 64, 8, 32, None)


@prop(
    "ragged tiles",
    "Only pairs that exist count. A last tile that hangs over the edge can be full all the same.",
)
def tiles_ragged(f: Function, rng: Generator) -> None:
    _tiled(f, 33, 35, 16, 16, None)
    _tiled(f, 19, 37, 16, 16, None)


@prop("more queries than keys", "The first T - S queries may read nothing: their tiles are empty.")
def tiles_more(f: Function, rng: Generator) -> None:
    _tiled(f, 37, 19, 8, 8, None)


@prop(
    "a window",
    "A window of w reads the position itself and the w - 1 before it. So a tile can be too far in"
    " the past, and can be cut by either edge.",
)
def tiles_window(f: Function, rng: Generator) -> None:
    for window in (1, 7, 16, 20, 24, 33):
        _tiled(f, 43, 59, 16, 8, window)


TILES = Task(
    "22.6",
    tiles,
    (tiles_square, tiles_fewer, tiles_oblong, tiles_ragged, tiles_more, tiles_window),
    MUTANTS["22.6"],
)


# 22.7


def launched(kernel: Function) -> Function:
    """attend(q, k, v, causal), a head at a time, with this kernel."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        attention.check(q, k, v, None)
        if {x.dtype for x in (q, k, v)} != {torch.float32} or q.shape[3] not in (16, 32, 64):
            raise ValueError(f"float32 and a width of 16, 32 or 64, got {q.dtype}, {q.shape[3]}")
        if q.shape[1] != k.shape[1] or v.shape[3] != q.shape[3]:
            raise ValueError("as many key heads as query heads, and values as wide as keys")
        (B, H, T, D), S = q.shape, k.shape[2]
        o = torch.empty(q.shape)
        for b in range(B):
            for h in range(H):
                heads = [_as_it_lies(x[b, h]) for x in (q, k, v)] + [unwritten(T, D)]
                numbers = [*(x.stride(0) for x in heads), T, S, D**-0.5]
                sizes = {"D": D, "Br": 16, "Bc": 16, "CAUSAL": causal}
                run(kernel, "attend", (_tiles(T, 16),), *heads, *numbers, **sizes)
                o[b, h] = heads[3]
        return o

    return attend


def _as_it_lies(x: Tensor) -> Tensor:
    """The rows of x, as far apart as they are; where they overlap, or are not whole, a copy."""
    D = x.shape[1]
    return _placed(x, x.stride() if x.stride(1) == 1 and x.stride(0) >= D else (D, 1))


def plain_attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The same without a kernel, in float64."""
    mask = masks.causal if causal else masks.full
    return attention.attention(q.double(), k.double(), v.double(), mask).float()


BUGS = (
    Bug(
        "keys beyond the end weigh in",
        "flashinfer-ai/flashinfer#5090",
        "At which lengths is the last tile of keys not full?",
        {"seen = j[None, :] < S": "seen = j[None, :] >= 0"},
    ),
    Bug(
        "the last rows are left out",
        "OpenNLPLab/lightning-attention#28",
        "How many programs does the launch need if 16 does not divide T? What if only T // 16 run?",
        {"o_i, mask=i[:, None] < T)": "o_i, mask=i[:, None] < T // Br * Br)"},
    ),
    Bug(
        "causal from the first key",
        "NVIDIA/cutlass#2336",
        "With T = S two ways to align the triangle are the same. Which lengths tell them apart?",
        {"j[None, :] <= i[:, None] + S - T": "j[None, :] <= i[:, None]"},
    ),
    Bug(
        "values at the strides of keys",
        "flagos-ai/FlagAttention#45",
        "The result must not depend on how a tensor lies in memory. Which of yours lies otherwise"
        " than the rest?",
        {"v + j[:, None] * v_row + d": "v + j[:, None] * k_row + d"},
    ),
    Bug(
        "earlier tiles are not rescaled",
        "paiml/aprender#2753",
        "The factor is 1 until a later tile raises the maximum. Do your keys fill more than one"
        " tile?",
        {"rescale = tl.exp(m - level)": "rescale = tl.exp(level - level)"},
    ),
    Bug(
        "the maximum begins at zero",
        "Dao-AILab/flash-attention#2082",
        "It shows where every score of a row lies so far below zero that exp gives 0. Add what"
        " the softmax must not notice.",
        {'m = tl.full((Br,), float("-inf"), tl.float32)': "m = tl.zeros((Br,), tl.float32)"},
    ),
    Bug(
        "NaN for a query that may read nothing",
        "ikawrakow/ik_llama.cpp#2344",
        "Which query of a causal attention has no key at all? It takes more queries than keys.",
        {'tl.where(m_new == float("-inf"), 0.0, m_new)': "m_new"},
    ),
)


def attend_test(attend: Any) -> None:
    torch.manual_seed(0)
    for T, S, causal in ((19, 21, False), (5, 21, True), (21, 5, True)):
        q, k, v = torch.randn(1, 1, T, 16), torch.randn(1, 1, S, 16), torch.randn(1, 1, S, 16)
        q[..., 0], k[..., 0] = 40, -40  # the same for every pair: the softmax must not notice
        k = k.mT.contiguous().mT  # another order in memory
        k = torch.cat([k, k], dim=-1)[..., :16]  # rows twice as far apart
        mask = masks.causal if causal else masks.full
        want = attention.attention(q.double(), k.double(), v.double(), mask)
        off = (attend(q, k, v, causal) - want).abs().max().item()
        assert off < 1e-3, f"T = {T}, S = {S}, causal = {causal}: off by {off:.2g}"


ATTEND_TEST = write_the_test(
    "22.7", attend_test, flash_forward, plain_attend, BUGS, MUTANTS["22.7"], use=launched
)


TASKS = (LAUNCH, AFFINE, SOFTMAX, MATMUL, FLASH, TILES, ATTEND_TEST)


# A problem for paper


@dataclass(frozen=True, repr=False)
class Problem:
    """A matrix product whose sizes no tile divides, on a device with few multiprocessors."""

    M: int
    K: int
    N: int
    BM: int
    BN: int
    BK: int
    processors: int

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.M // self.BM), -(-self.N // self.BN)

    @property
    def answer(self) -> dict[str, int | Fraction]:
        rows, columns = self.grid
        programs, steps = rows * columns, -(-self.K // self.BK)
        read = self.M * self.K * columns + self.K * self.N * rows
        return {
            "programs": programs,
            "waves": -(-programs // self.processors),
            "read": read,
            "written": self.M * self.N,
            "bytes": 4 * (read + self.M * self.N),
            "multiplied": programs * steps * self.BM * self.BN * self.BK,
            "useful": Fraction(
                self.M * self.N * self.K, programs * steps * self.BM * self.BN * self.BK
            ),
        }

    def __repr__(self) -> str:
        return (
            f"A kernel multiplies ({self.M}, {self.K}) by ({self.K}, {self.N}) in float32. A"
            f" program makes a tile of {self.BM} x {self.BN}\nand walks along the inner axis"
            f" {self.BK} at a time; masks keep it from reading or writing\nbeyond the edge. The"
            f" device runs {self.processors} programs at once.\nHow many programs, how many waves,"
            " how many bytes read and written, and what share of\nthe multiplications is useful?"
        )

    def worked(self) -> str:
        rows, columns = self.grid
        steps, a = -(-self.K // self.BK), self.answer
        last = a["programs"] - (a["waves"] - 1) * self.processors
        return "\n".join(
            [
                f"programs      {self.M}/{self.BM} and {self.N}/{self.BN}, rounded up:"
                f" {rows} x {columns} = {a['programs']}",
                f"waves         {a['programs']}/{self.processors}, rounded up: {a['waves']};"
                f" the last one runs {last} of {self.processors}",
                f"read, left    {self.M} x {self.K} = {self.M * self.K} numbers, once for each of"
                f" {columns} tile columns: {self.M * self.K * columns}",
                f"read, right   {self.K} x {self.N} = {self.K * self.N} numbers, once for each of"
                f" {rows} tile rows: {self.K * self.N * rows}",
                f"written       {self.M} x {self.N} = {a['written']}",
                f"bytes         4 x ({a['read']} + {a['written']}) = {a['bytes']}",
                f"multiplied    {a['programs']} programs, {steps} steps each, of"
                f" {self.BM} x {self.BN} x {self.BK}: {a['multiplied']}",
                f"useful        {self.M} x {self.K} x {self.N} = {self.M * self.K * self.N}:"
                f" a share of {a['useful']}",
            ]
        )


def problem(random_seed: int) -> Problem:
    """A fresh launch to count on paper."""
    rng = random.Random(f"launch {random_seed}")

    def ragged(block: int, tiles: int) -> int:
        return rng.randint(block * (tiles - 1) + 1, block * tiles - 1)

    BM, BN, BK = rng.choice((4, 8)), rng.choice((4, 8)), rng.choice((2, 4))
    rows, columns = rng.randint(2, 3), rng.randint(2, 4)
    return Problem(
        M=ragged(BM, rows),
        K=ragged(BK, rng.randint(2, 3)),
        N=ragged(BN, columns),
        BM=BM,
        BN=BN,
        BK=BK,
        processors=rng.choice(
            [p for p in (3, 4, 5, 7) if p < rows * columns and rows * columns % p]
        ),
    )
