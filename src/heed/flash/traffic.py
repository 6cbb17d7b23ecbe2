"""Attention on a machine with two memories, where every number that moves is counted.

Slow memory is large: queries, keys, values and results live there. Arithmetic happens in fast
memory, which is small: a tile has to be read into it first, and a result written back.

T queries · S keys · D width of a head · Br rows of queries in a tile · Bc keys in a tile.
One head, no mask. The scale is 1/√D. Moves are counted in numbers, room in bytes.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Memory(TorchDispatchMode):
    """Counts what is `read` from and `written` to slow memory, and what fast memory `held` at most.

    Inside `with memory:` every tensor that an operation makes lies in fast memory until nobody
    refers to it. Tensors from outside, and views of them, do not. `room` is a limit in bytes.
    """

    def __init__(self, room: int | None = None) -> None:
        super().__init__()
        if room is not None and room < 1:
            raise ValueError(f"fast memory needs room for at least a byte, got {room}")
        self.room = room
        self.read = self.written = self.held = self.most = 0
        self._owners: dict[int, int] = {}  # storage: how many tensors look at it
        self._bytes: dict[int, int] = {}

    def put(self, x: Float[Tensor, "rows columns"]) -> "Slow":
        """A copy of x in slow memory."""
        return Slow(x, self)

    def new(self, rows: int, columns: int, like: "Slow") -> "Slow":
        """Room in slow memory, not yet written."""
        return Slow(torch.full((rows, columns), math.nan, dtype=like.x.dtype), self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outside = {_place(x) for x in _tensors(args)} - self._owners.keys()
        made = func(*args, **kwargs or {})
        for x in _tensors((made,)):
            if _place(x) not in outside:
                self._hold(x)
        return made

    def _hold(self, x: Tensor) -> None:
        place = _place(x)
        if place not in self._owners:
            self._owners[place], self._bytes[place] = 0, x.untyped_storage().nbytes()
            self.held += self._bytes[place]
            self.most = max(self.most, self.held)
        self._owners[place] += 1
        weakref.finalize(x, self._drop, place)
        if self.room is not None and self.held > self.room:
            raise ValueError(f"fast memory has room for {self.room} bytes, asked for {self.held}")

    def _drop(self, place: int) -> None:
        self._owners[place] -= 1
        if not self._owners[place]:
            del self._owners[place]
            self.held -= self._bytes.pop(place)


class Slow:
    """A matrix in slow memory. Only whole tiles come and go."""

    def __init__(self, x: Float[Tensor, "rows columns"], memory: Memory) -> None:
        if x.ndim != 2 or not x.dtype.is_floating_point or not x.numel():
            raise ValueError(f"slow memory takes matrices of numbers, got {x.dtype} {_shape(x)}")
        self.x, self.memory, self.shape = x.detach().clone(), memory, x.shape

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        tile = self.x[rows, columns].clone()
        self.memory.read += tile.numel()
        return tile

    def write(self, tile: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        if tile.shape != self.x[rows, columns].shape:
            raise ValueError(f"a tile {_shape(tile)} for {_shape(self.x[rows, columns])}")
        self.x[rows, columns] = tile
        self.memory.written += tile.numel()


def dense(Q: Slow, K: Slow, V: Slow, Br: int, Bc: int) -> tuple[Slow, Slow]:
    """Output and weights, both in slow memory: a product, a softmax over whole rows, a product."""
    T, S, D, rows, columns = _tiles(Q, K, V, Br, Bc)
    memory = Q.memory
    scores, P, O = memory.new(T, S, Q), memory.new(T, S, Q), memory.new(T, D, Q)
    with memory:
        for i in rows:
            q_i = Q.read(i)
            for j in columns:
                scores.write(q_i @ K.read(j).mT / math.sqrt(D), i, j)
        for i in rows:
            P.write(scores.read(i).softmax(-1), i)
        for i in rows:
            O.write(_total(P.read(i, j) @ V.read(j) for j in columns), i)
    return O, P


def tiled(Q: Slow, K: Slow, V: Slow, Br: int, Bc: int) -> tuple[Slow, Slow]:
    """Output and log-sum-exp, with no score in slow memory (Dao 2023, algorithm 1)."""
    T, S, D, rows, columns = _tiles(Q, K, V, Br, Bc)
    memory = Q.memory
    O, lse = memory.new(T, D, Q), memory.new(T, 1, Q)
    with memory:
        for i in rows:
            q_i = Q.read(i)
            m, l, o = q_i[:, :1] * 0 - math.inf, q_i[:, :1] * 0, q_i * 0
            for j in columns:
                s = q_i @ K.read(j).mT / math.sqrt(D)
                top = torch.maximum(m, s.amax(-1, keepdim=True))
                old, p = (m - top).exp(), (s - top).exp()
                m, l, o = top, old * l + p.sum(-1, keepdim=True), old * o + p @ V.read(j)
            O.write(o / l, i)
            lse.write(m + l.log(), i)
    return O, lse


def dense_backward(
    Q: Slow, K: Slow, V: Slow, P: Slow, dO: Slow, Br: int, Bc: int
) -> tuple[Slow, Slow, Slow]:
    """dQ, dK and dV from stored weights (Dao et al. 2022, algorithm 3)."""
    T, S, D, rows, columns = _tiles(Q, K, V, Br, Bc)
    memory = Q.memory
    dP, dS = memory.new(T, S, Q), memory.new(T, S, Q)
    dQ, dK, dV = memory.new(T, D, Q), memory.new(S, D, Q), memory.new(S, D, Q)
    with memory:
        for i in rows:
            do_i = dO.read(i)
            for j in columns:
                dP.write(do_i @ V.read(j).mT, i, j)
        for i in rows:
            p, dp = P.read(i), dP.read(i)
            dS.write(p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(D), i)
        for i in rows:
            dQ.write(_total(dS.read(i, j) @ K.read(j) for j in columns), i)
        for j in columns:
            dK.write(_total(dS.read(i, j).mT @ Q.read(i) for i in rows), j)
            dV.write(_total(P.read(i, j).mT @ dO.read(i) for i in rows), j)
    return dQ, dK, dV


def tiled_backward(
    Q: Slow, K: Slow, V: Slow, O: Slow, lse: Slow, dO: Slow, Br: int, Bc: int
) -> tuple[Slow, Slow, Slow]:
    """dQ, dK and dV from weights made again, in one pass (Dao 2023, algorithm 2).

    Key tiles outside, query tiles inside: a tile of dQ is fetched, added to and put back each time.
    """
    T, S, D, rows, columns = _tiles(Q, K, V, Br, Bc)
    memory = Q.memory
    dQ, dK, dV = memory.put(Q.x * 0), memory.new(S, D, Q), memory.new(S, D, Q)
    delta = _row_sums(O, dO, rows)
    with memory:
        for j in columns:
            k_j, v_j = K.read(j), V.read(j)
            dk_j, dv_j = k_j * 0, v_j * 0
            for i in rows:
                q_i, do_i = Q.read(i), dO.read(i)
                p, ds = _again(q_i, k_j, v_j, do_i, lse.read(i), delta.read(i))
                dv_j = dv_j + p.mT @ do_i
                dk_j = dk_j + ds.mT @ q_i
                dQ.write(dQ.read(i) + ds @ k_j, i)
            dK.write(dk_j, j)
            dV.write(dv_j, j)
    return dQ, dK, dV


def split_backward(
    Q: Slow, K: Slow, V: Slow, O: Slow, lse: Slow, dO: Slow, Br: int, Bc: int
) -> tuple[Slow, Slow, Slow]:
    """The same in two passes, one for dK and dV and one for dQ: each tile is written by one loop.

    The weights are made a third time. In return no two loops ever write to the same place.
    """
    T, S, D, rows, columns = _tiles(Q, K, V, Br, Bc)
    memory = Q.memory
    dQ, dK, dV = memory.new(T, D, Q), memory.new(S, D, Q), memory.new(S, D, Q)
    delta = _row_sums(O, dO, rows)
    with memory:
        for j in columns:
            k_j, v_j = K.read(j), V.read(j)
            dk_j, dv_j = k_j * 0, v_j * 0
            for i in rows:
                q_i, do_i = Q.read(i), dO.read(i)
                p, ds = _again(q_i, k_j, v_j, do_i, lse.read(i), delta.read(i))
                dk_j, dv_j = dk_j + ds.mT @ q_i, dv_j + p.mT @ do_i
            dK.write(dk_j, j)
            dV.write(dv_j, j)
        for i in rows:
            q_i, do_i, lse_i, delta_i = Q.read(i), dO.read(i), lse.read(i), delta.read(i)
            dq_i = q_i * 0
            for j in columns:
                k_j = K.read(j)
                dq_i = dq_i + _again(q_i, k_j, V.read(j), do_i, lse_i, delta_i)[1] @ k_j
            dQ.write(dq_i, i)
    return dQ, dK, dV


def dense_moves(T: int, S: int, D: int, Br: int, Bc: int) -> tuple[int, int]:
    """Numbers that `dense` reads and writes."""
    n = _count(T, Br)
    return T * D + n * 2 * S * D + 2 * T * S, T * D + 2 * T * S


def tiled_moves(T: int, S: int, D: int, Br: int, Bc: int) -> tuple[int, int]:
    """Numbers that `tiled` reads and writes."""
    n = _count(T, Br)
    return T * D + n * 2 * S * D, T * D + T


def dense_backward_moves(T: int, S: int, D: int, Br: int, Bc: int) -> tuple[int, int]:
    """Numbers that `dense_backward` reads and writes."""
    n, c = _count(T, Br), _count(S, Bc)
    return T * D + n * 2 * S * D + c * 2 * T * D + 5 * T * S, T * D + 2 * S * D + 2 * T * S


def tiled_backward_moves(T: int, S: int, D: int, Br: int, Bc: int) -> tuple[int, int]:
    """Numbers that `tiled_backward` reads and writes, the row sums included."""
    c = _count(S, Bc)
    return 2 * T * D + 2 * S * D + c * (3 * T * D + 2 * T), T + 2 * S * D + c * T * D


def split_backward_moves(T: int, S: int, D: int, Br: int, Bc: int) -> tuple[int, int]:
    """Numbers that `split_backward` reads and writes, the row sums included."""
    n, c = _count(T, Br), _count(S, Bc)
    keys_outside = 2 * S * D + c * (2 * T * D + 2 * T)
    queries_outside = 2 * T * D + 2 * T + n * 2 * S * D
    return 2 * T * D + keys_outside + queries_outside, T + T * D + 2 * S * D


def _row_sums(O: Slow, dO: Slow, rows: list[slice]) -> Slow:
    """Σ dO ⊙ O of each row: the paper's D."""
    delta = O.memory.new(O.shape[0], 1, O)
    with O.memory:
        for i in rows:
            delta.write((dO.read(i) * O.read(i)).sum(-1, keepdim=True), i)
    return delta


def _again(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """A tile of weights from its log-sum-exp, and the gradient of its unscaled scores."""
    root = math.sqrt(q.shape[1])
    p = (q @ k.mT / root - lse).exp()
    return p, p * (do @ v.mT - delta) / root


def _tiles(
    Q: Slow, K: Slow, V: Slow, Br: int, Bc: int
) -> tuple[int, int, int, list[slice], list[slice]]:
    (T, D), S = Q.shape, K.shape[0]
    if K.shape != V.shape or K.shape[1] != D:
        shapes = [tuple(x.shape) for x in (Q, K, V)]
        raise ValueError(f"queries (T, D) need keys and values (S, D), got {shapes}")
    rows = [slice(n * Br, min(n * Br + Br, T)) for n in range(_count(T, Br))]
    columns = [slice(n * Bc, min(n * Bc + Bc, S)) for n in range(_count(S, Bc))]
    return T, S, D, rows, columns


def _count(n: int, block: int) -> int:
    """Tiles of `block` that n rows take, the last one perhaps not full."""
    if n < 1 or block < 1:
        raise ValueError(f"rows and tiles must be positive, got {n} in tiles of {block}")
    return -(-n // block)


def _total(tiles: Iterable[Tensor]) -> Tensor:
    return reduce(add, tiles)


def _tensors(x: Iterable[Any]) -> Iterator[Tensor]:
    for y in x:
        if isinstance(y, Tensor):
            yield y
        elif isinstance(y, list | tuple):
            yield from _tensors(y)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
