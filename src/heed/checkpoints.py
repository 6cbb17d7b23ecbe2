"""A training run on disk: one file, written whole or not at all, verified before it is used.

It is a plain safetensors file: tensors `model.*`, `optimizer.<slot>.*`, `generator.*`, and in the
header one piece of JSON with the step, the optimizer's settings and the caller's notes. The JSON
starts with a SHA-256 of all bytes of the file, where the 64 places of the digest count as zeros.
The same state makes the same bytes. Nothing is ever unpickled, so a file cannot run code.
"""

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

START = rb'{"__metadata__":{"heed":"{\"sha256\":\"'  # after 8 bytes that hold the header's length
DIGEST = slice(8 + len(START), 8 + len(START) + 64)

Generators = Mapping[str, torch.Generator]


class Checkpoint(NamedTuple):
    """What a file holds. `optimizer` is None, or its class and its groups with parameter names."""

    tensors: dict[str, Tensor]
    step: int
    optimizer: dict[str, Any] | None
    notes: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names start with `name.`, without it."""
        start = f"{name}."
        return {n[len(start) :]: t for n, t in self.tensors.items() if n.startswith(start)}


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    generators: Generators | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write all that the run needs to go on. Until the new file is whole, the old one stays.

    Tied weights are written once. `generators` have names, `notes` are what JSON can hold. For each
    parameter the optimizer may keep a step and tensors of its shape and dtype: SGD, Adam and kin.
    A path has one writer: of two that save to it at once, one may get a FileNotFoundError.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    tensors = {f"model.{name}": weight for name, weight in _weights(model).items()}
    for name, generator in (generators or {}).items():
        tensors[f"generator.{name}"] = generator.get_state()
    about = {"sha256": "0" * 64, "step": step, "optimizer": None, "notes": dict(notes or {})}
    if optimizer is not None:
        slots, about["optimizer"] = _packed(optimizer, model)
        tensors |= {f"optimizer.{name}": slot for name, slot in slots.items()}
    # Copies, because safetensors refuses two tensors that share memory.
    copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    text = json.dumps(about, separators=(",", ":"))
    try:
        data = bytearray(safetensors.torch.save(copies, {"heed": text}))
    except KeyError as error:
        raise ValueError(f"a safetensors file has no place for {error}") from error
    assert data[8 : DIGEST.start] == START
    data[DIGEST] = _digest(data)
    _write(Path(path), data)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    generators: Generators | None = None,
) -> int:
    """Put a checkpoint's weights, optimizer state and generators in place; its step comes back.

    All or nothing: whatever does not fit (a damaged file, another shape, dtype, name or optimizer)
    is a ValueError, and then nothing has changed. What is not asked for is left in the file.
    """
    return restore(read_checkpoint(path), model, optimizer, generators=generators)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """What the file holds, once every byte of it has been verified."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    data = path.read_bytes()
    # The start decides first: a header's length may begin with the byte that begins a pickle.
    if data[8 : DIGEST.start] != START:
        kinds = {b"\x80": "a pickle, which may run code", b"PK": "a zip archive, as of torch.save"}
        kind = next((kind for magic, kind in kinds.items() if data.startswith(magic)), "or damaged")
        raise ValueError(f"{path} is not a checkpoint of this package, {kind}: refused")
    if data[DIGEST] != _digest(data):
        raise ValueError(f"{path} is damaged: the checksum of its {len(data)} bytes is another")
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["heed"])
        tensors = safetensors.torch.load(data)
        return Checkpoint(tensors, about["step"], about["optimizer"], about["notes"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a right checksum and a wrong content: {error}") from error


def restore(
    saved: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    generators: Generators | None = None,
) -> int:
    """`load_checkpoint` for a file that has been read."""
    weights, own = saved.part("model"), _weights(model)
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        raise ValueError(f"the checkpoint lacks the weights {missing}, and has {extra} too many")
    for name, weight in own.items():
        _same_kind(name, weights[name], weight)
    state = None if optimizer is None else _unpacked(saved, optimizer, model)
    states = saved.part("generator")
    for name, generator in (generators or {}).items():
        if name not in states:
            raise ValueError(f"the checkpoint has generators {sorted(states)}, not {name!r}")
        _same_kind(f"generator {name}", states[name], generator.get_state())
        torch.Generator(generator.device).set_state(states[name])  # a rehearsal
    # All is verified. From here on nothing fails.
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state)
    for name, generator in (generators or {}).items():
        generator.set_state(states[name])
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])
    return saved.step


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; what two names share is there once, under its first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if not isinstance(weight, Tensor):
            raise ValueError(f"{name} is no tensor but {type(weight).__name__}")
        first.setdefault(id(weight), (name, weight))
    return dict(first.values())


def _packed(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors as `slot.parameter`; its class and groups, with parameter names."""
    names, state = {id(p): name for name, p in model.named_parameters()}, optimizer.state_dict()
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [tuple(p.shape) for p in moved if id(p) not in names]
    if strange:
        raise ValueError(f"the optimizer moves parameters that are not the model's: {strange}")
    order, slots = [names[id(p)] for p in moved], {}
    for n, kept in state["state"].items():
        for slot, value in kept.items():
            _fits(f"{slot}.{order[n]}", value, moved[n])
            slots[f"{slot}.{order[n]}"] = value
    groups = [g | {"params": [order[n] for n in g["params"]]} for g in state["param_groups"]]
    return slots, {"class": type(optimizer).__name__, "groups": groups}


def _unpacked(
    saved: Checkpoint, optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` wants, verified."""
    if saved.optimizer is None:
        raise ValueError("the checkpoint has no optimizer")
    was, now = saved.optimizer, _packed(optimizer, model)[1]
    built = [(a["class"], [(sorted(g), g["params"]) for g in a["groups"]]) for a in (was, now)]
    if built[0] != built[1]:
        raise ValueError(f"the checkpoint has the optimizer {built[0]}, not {built[1]}")
    names = [name for group in now["groups"] for name in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for full, value in saved.part("optimizer").items():
        slot, _, name = full.partition(".")
        if name not in names:
            raise ValueError(f"the checkpoint has {full}, but the optimizer does not move {name}")
        _fits(full, value, model.get_parameter(name))
        # A copy: the optimizer would take the tensor itself, and change what has been read.
        state.setdefault(names.index(name), {})[slot] = value.clone()
    groups = []
    for group in was["groups"]:  # JSON has no tuples, and betas are one
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in group.items()}
        groups.append(values | {"params": [names.index(name) for name in group["params"]]})
    return {"state": state, "param_groups": groups}


def _fits(name: str, value: Any, parameter: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"optimizer.{name} is no tensor but {type(value).__name__}")
    if name.startswith("step."):  # a number, always in float32
        parameter = parameter.new_zeros((), dtype=value.dtype)
    _same_kind(f"optimizer.{name}", value, parameter)


def _same_kind(name: str, saved: Tensor, own: Tensor) -> None:
    if (saved.shape, saved.dtype) != (own.shape, own.dtype):
        kinds = [f"{tuple(t.shape)} of {t.dtype}" for t in (saved, own)]
        raise ValueError(f"{name} is {kinds[0]} in the checkpoint, and {kinds[1]} here")


def _digest(data: bytes | bytearray) -> bytes:
    """SHA-256 of every byte, as 64 letters; where they will stand, there are zeros."""
    digest = hashlib.sha256(data[: DIGEST.start] + b"0" * 64)
    digest.update(memoryview(data)[DIGEST.stop :])
    return digest.hexdigest().encode()


def _write(path: Path, data: bytes | bytearray) -> None:
    """The file holds all of the data, or what it held before: at every moment, come what may."""
    path = path.resolve()  # what a link stands for is replaced, not the link
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} is a folder" if path.is_dir() else f"no folder {path.parent}")
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for left in path.parent.iterdir():  # by a process that was killed
        if ours.fullmatch(left.name):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut leaves a name without bytes
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself; Windows cannot be asked
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
