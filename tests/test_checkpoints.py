"""A checkpoint is whole or it is refused: disks that fill up, kills, flipped bits, pickles."""

import errno
import io
import json
import os
import pickle
import resource
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from heed import checkpoints, training
from heed.checkpoints import load_checkpoint, read_checkpoint, restore, save_checkpoint
from heed.gpt import GPT, GPTConfig


def run(steps=2, random_seed=0, kind=torch.optim.AdamW, dtype=torch.float32, **settings):
    """A tied model and an optimizer that has taken some steps."""
    draw = torch.Generator().manual_seed(random_seed)
    torch.manual_seed(random_seed)
    model = GPT(GPTConfig(vocab_size=7, max_len=5, n_layers=1, n_heads=2, d_model=6)).to(dtype)
    optimizer = kind(model.parameters(), **{"lr": 0.1} | settings)
    go_on(model, optimizer, draw, steps)
    return model, optimizer, draw


def go_on(model, optimizer, draw, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        ids = torch.randint(7, (2, 6), generator=draw)
        training.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()


def bits(tensor):
    """0.0 and -0.0 are equal numbers and different bits; two NaN the other way round."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).numpy())


def state(model, optimizer=None, draw=None):
    """Everything that a load may change."""
    held = {name: bits(x) for name, x in model.state_dict().items()}
    if optimizer is not None:
        known = optimizer.state_dict()
        held["groups"] = repr(known["param_groups"])
        held["slots"] = {
            (n, slot): bits(x) for n, slots in known["state"].items() for slot, x in slots.items()
        }
    return held | ({} if draw is None else {"draw": bits(draw.get_state())})


@contextmanager
def nothing_changes(*things, match):
    before = state(*things)
    with pytest.raises(ValueError, match=match):
        yield
    assert state(*things) == before


def leftovers(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name.endswith(".tmp"))


# There and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_comes_back_bit_for_bit(tmp_path, dtype):
    model, optimizer, draw = run(3, dtype=dtype)
    torch.randn(3, generator=draw)  # a generator keeps the second half of a pair of normals
    save_checkpoint(tmp_path / "run", model, optimizer, step=3, generators={"data": draw})
    saved, now = state(model, optimizer, draw), torch.randn(5, generator=draw)
    fresh = run(1, random_seed=1, dtype=dtype, lr=0.7)
    step = load_checkpoint(tmp_path / "run", *fresh[:2], generators={"data": fresh[2]})
    assert step == 3 and state(*fresh) == saved
    assert torch.equal(torch.randn(5, generator=fresh[2]), now)
    assert os.listdir(tmp_path) == ["run"]


KINDS = [
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.Adam, {"betas": (0.7, 0.9)}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
    (torch.optim.RMSprop, {}),
]


@pytest.mark.parametrize("kind, settings", KINDS)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path, kind, settings):
    model, optimizer, draw = run(2, kind=kind, **settings)
    save_checkpoint(tmp_path / "run", model, optimizer, generators={"data": draw})
    go_on(model, optimizer, draw, 3)
    other = run(0, random_seed=1, kind=kind)
    load_checkpoint(tmp_path / "run", *other[:2], generators={"data": other[2]})
    go_on(*other, 3)
    assert state(*other) == state(model, optimizer, draw)


def test_an_optimizer_that_has_not_started_overwrites_one_that_has(tmp_path):
    save_checkpoint(tmp_path / "run", *run(0)[:2])
    model, optimizer, _ = run(2)
    assert load_checkpoint(tmp_path / "run", model, optimizer) == 0
    assert state(model, optimizer) == state(*run(0)[:2])


def test_what_is_not_asked_for_stays_in_the_file(tmp_path):
    model, optimizer, draw = run(2)
    save_checkpoint(tmp_path / "run", model, optimizer, step=2, generators={"a": draw, "b": draw})
    other = run(1, random_seed=1)
    before = state(*other)
    assert load_checkpoint(tmp_path / "run", other[0]) == 2
    assert state(*other) == before | state(model)  # the optimizer and the generator are as before


class Strange(nn.Module):
    """Numbers that arithmetic would change, in every type."""

    def __init__(self, fill=True):
        super().__init__()
        words = {
            # a NaN with a payload, a signalling one, inf, -inf, -0.0, the smallest subnormal
            torch.float64: (8, [0x7FF8DEADBEEF0001, 0x7FF0000000000001, 0x7FF << 52, 0xFFF << 52]),
            torch.float32: (4, [0x7FC0DEAD, 0x7F800001, 0x7F800000, 0xFF800000]),
            torch.float16: (2, [0x7E2A, 0x7C01, 0x7C00, 0xFC00]),
            torch.bfloat16: (2, [0x7FEA, 0x7F81, 0x7F80, 0xFF80]),
            torch.int64: (8, [2**64 - 1, 2**63]),
            torch.uint8: (1, [255]),
        }
        for dtype, (size, patterns) in words.items():
            raw = b"".join(n.to_bytes(size, "little") for n in [*patterns, 1 << 8 * size - 1, 1])
            x = torch.frombuffer(bytearray(raw), dtype=dtype).clone()
            name = str(dtype).split(".")[1]
            self.register_buffer(f"as_{name}", x if fill else torch.zeros_like(x))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("yes", torch.tensor([fill, False]))
        self.scalar = nn.Parameter(torch.tensor(-0.0 if fill else 1.0))
        self.turned = nn.Parameter((torch.randn if fill else torch.zeros)(3, 4).T)


def test_numbers_that_are_none_survive_in_every_type(tmp_path):
    want, got = Strange(), Strange(fill=False)
    save_checkpoint(tmp_path / "strange", want)
    load_checkpoint(tmp_path / "strange", got)
    assert state(got) == state(want) != state(Strange(fill=False))
    assert got.turned.stride() == want.turned.stride()  # written in order, kept as it lies


def test_the_file_is_safetensors_and_tied_weights_are_in_it_once(tmp_path):
    model, optimizer, draw = run()
    save_checkpoint(tmp_path / "run", model, optimizer, step=2, generators={"data": draw})
    with safetensors.safe_open(tmp_path / "run", framework="pt") as file:
        names = {name for name in file.keys() if name.startswith("model.")}
        about = json.loads(file.metadata()["heed"])
        moments = file.get_tensor("optimizer.exp_avg.tokens.weight")
    assert names == {f"model.{name}" for name, _ in model.named_parameters()}
    assert "model.head.weight" not in names and model.head.weight is model.tokens.weight
    assert torch.equal(moments, optimizer.state[model.tokens.weight]["exp_avg"])
    assert about["step"] == 2 and about["optimizer"]["class"] == "AdamW"


def test_tied_weights_are_tied_after_the_load(tmp_path):
    save_checkpoint(tmp_path / "run", run()[0])
    model, _, draw = run(random_seed=1)
    load_checkpoint(tmp_path / "run", model)
    assert model.head.weight is model.tokens.weight
    go_on(model, torch.optim.SGD(model.parameters(), lr=1.0), draw, 1)
    assert torch.equal(model.head.weight, model.tokens.weight)


def test_two_parameters_in_one_memory_are_no_obstacle(tmp_path):
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight.data = model[0].weight.data
    save_checkpoint(tmp_path / "run", model)
    other = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    load_checkpoint(tmp_path / "run", other)
    assert state(other) == state(model)


def test_the_same_state_makes_the_same_bytes_and_another_makes_others(tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        model, optimizer, draw = run(random_seed=seed)
        save_checkpoint(tmp_path / name, model, optimizer, generators={"data": draw})
    a, b, c = [(tmp_path / name).read_bytes() for name in "abc"]
    assert a == b != c


def test_notes_come_back_exactly(tmp_path):
    notes = {
        "losses": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308],
        "zeros": '"sha256":"' + "0" * 64,
    }
    save_checkpoint(tmp_path / "run", run()[0], notes=notes)
    assert read_checkpoint(tmp_path / "run").notes == notes


def test_both_functions_are_the_training_modules_too():
    assert training.save_checkpoint is save_checkpoint
    assert training.load_checkpoint is load_checkpoint


# Whole or not at all


def wide(value, size=2000):
    """A model whose every number says which save it is from."""
    model = nn.Linear(size, 1)
    for weight in model.parameters():
        nn.init.constant_(weight, value)
    return model


def held(path):
    """Which save the file is from: all of it."""
    saved = read_checkpoint(path)
    (value,) = {x.item() for tensor in saved.tensors.values() for x in tensor.unique()}
    assert value == saved.step
    return saved.step


@contextmanager
def a_disk_with_room_for(n_bytes):
    """The kernel writes what still fits, then fails: as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("old", [True, False])
def test_a_disk_that_is_full_at_any_of_120_bytes_leaves_the_old_file(tmp_path, old):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, wide(2), step=2)
    size = path.stat().st_size
    path.unlink()
    if old:
        save_checkpoint(path, wide(1), step=1)
    places = {*range(20), *range(size - 20, size), *(size * n // 81 for n in range(1, 81))}
    assert len(places) == 120
    for place in sorted(places):
        with a_disk_with_room_for(place), pytest.raises(OSError) as failed:
            save_checkpoint(path, wide(2), step=2)
        assert failed.value.errno == errno.EFBIG
        assert os.listdir(tmp_path) == (["run.safetensors"] if old else [])
        assert not old or held(path) == 1
    with a_disk_with_room_for(size):  # not one byte more
        save_checkpoint(path, wide(2), step=2)
    assert held(path) == 2


KILLED = """
import os, random, signal, sys, time
import torch
sys.path.insert(0, sys.argv[2])
from test_checkpoints import held, leftovers, save_checkpoint, wide
torch.set_num_threads(1)
path, chance = sys.argv[1], random.Random(0)
folder = os.path.dirname(path)
models = [wide(n, 100_000) for n in range(50)]
start = time.perf_counter()
save_checkpoint(path, models[0], step=0)
window = 0.02 + 20 * (time.perf_counter() - start)
seen, left = set(), 0
for kill in range(40):
    child = os.fork()
    if child == 0:
        while True:
            kill = (kill + 1) % 50
            save_checkpoint(path, models[kill], step=kill)
    time.sleep(chance.uniform(0.0, window))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended by itself"
    seen.add(held(path))
    assert len(leftovers(folder)) <= 1
    left += len(leftovers(folder))
save_checkpoint(path, models[1], step=1)
assert held(path) == 1 and os.listdir(folder) == [os.path.basename(path)]
print(len(seen), left)
"""


def test_a_process_killed_at_any_of_40_moments_leaves_a_whole_file(tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), here]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    seen, left = map(int, done.stdout.split())
    # The kills fell into different saves, and some of them into the middle of one.
    assert seen > 2 and left > 2


CALLS = ["open", "os.fsync", "os.replace", "Path.chmod"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_whatever_call_fails_the_old_file_stays_and_nothing_is_left(
    tmp_path, monkeypatch, call, error
):
    path = tmp_path / "run"
    save_checkpoint(path, wide(1), step=1)

    def fails(*args, **kwargs):
        raise error

    owner, _, name = call.rpartition(".")
    owner = getattr(checkpoints, owner) if owner else checkpoints
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(owner, name, fails, raising=bool(owner is not checkpoints))
        save_checkpoint(path, wide(2), step=2)
    assert held(path) == 1 and os.listdir(tmp_path) == ["run"]


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path, monkeypatch
):
    path, seen = tmp_path / "run", []

    def fsync(number):
        mode = os.fstat(number).st_mode
        what = "folder" if stat.S_ISDIR(mode) else f"file of {os.fstat(number).st_size}"
        seen.append((what, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint(path, wide(1, size=10), step=1)  # small: a buffer would hold it back
    assert seen == [(f"file of {path.stat().st_size}", False), ("folder", True)]


def test_permissions_are_kept_and_new_files_get_the_usual_ones(tmp_path):
    path = tmp_path / "run"
    mask = os.umask(0o027)
    try:
        save_checkpoint(path, wide(1), step=1)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        save_checkpoint(path, wide(2), step=2)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604 and held(path) == 2


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "last").symlink_to(tmp_path / "there/run")
    for n in (1, 2):
        save_checkpoint(tmp_path / "last", wide(n), step=n)
        assert (tmp_path / "last").is_symlink() and held(tmp_path / "there/run") == n


def test_what_a_killed_process_left_is_cleared_away_and_only_that(tmp_path):
    left = tmp_path / ".run.0123456789abcdef.tmp"
    others = [
        ".run.tmp",
        ".run.2.0123456789abcdef.tmp",
        "run.0123456789abcdef.tmp",
        ".ron.0123456789abcdef.tmp",
    ]
    for name in [left.name, *others]:
        (tmp_path / name).write_text("x")
    save_checkpoint(tmp_path / "run", wide(1), step=1)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "run"])


def test_of_two_writers_at_once_one_is_told_and_the_file_is_whole(tmp_path, monkeypatch):
    path, fsync = tmp_path / "run", os.fsync

    def meanwhile(number):
        monkeypatch.setattr(os, "fsync", fsync)
        save_checkpoint(path, wide(2), step=2)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(FileNotFoundError):
        save_checkpoint(path, wide(1), step=1)
    assert held(path) == 2 and os.listdir(tmp_path) == ["run"]


def test_a_folder_that_may_not_be_written_to_keeps_its_file():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        save_checkpoint(path, wide(1), step=1)
        path.chmod(0o644)
        Path(folder).chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:  # whom nothing is forbidden
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                save_checkpoint(path, wide(2), step=2)
            assert held(path) == 1 and os.listdir(folder) == ["run"]
        finally:
            os.seteuid(user)
            Path(folder).chmod(0o755)


def test_a_place_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
        save_checkpoint(tmp_path, wide(1))
    with pytest.raises(ValueError, match="no folder .*/nowhere"):
        save_checkpoint(tmp_path / "nowhere/run", wide(1))
    with pytest.raises(ValueError, match="step .* -1"):
        save_checkpoint(tmp_path / "run", wide(1), step=-1)
    assert os.listdir(tmp_path) == []


# Damaged


@pytest.fixture
def file(tmp_path):
    """A whole checkpoint, and a run of another state that tries to load what becomes of it."""
    model, optimizer, draw = run()
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, model, optimizer, step=2, generators={"data": draw})
    return path, run(1, random_seed=1)


def load(path, things):
    return load_checkpoint(path, *things[:2], generators={"data": things[2]})


def test_60_of_60_flipped_bits_are_seen_and_change_nothing(file):
    path, things = file
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    chance = torch.Generator().manual_seed(0)
    for low, high in [(0, 8), (8, start), (start, len(data))]:  # length, header, tensors
        for place in torch.randint(8 * low, 8 * high, (20,), generator=chance).tolist():
            spoilt = bytearray(data)
            spoilt[place // 8] ^= 1 << place % 8
            path.write_bytes(spoilt)
            with nothing_changes(*things, match="run.safetensors is (damaged|not a checkpoint)"):
                load(path, things)
    path.write_bytes(data)
    assert load(path, things) == 2


def test_every_single_bit_of_a_small_file_is_watched(tmp_path):
    model = nn.Linear(2, 1)
    save_checkpoint(tmp_path / "small", model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = (tmp_path / "small").read_bytes()
    with open(tmp_path / "small", "r+b", buffering=0) as raw:
        for place in range(8 * len(data)):
            whole = data[place // 8]
            os.pwrite(raw.fileno(), bytes([whole ^ 1 << place % 8]), place // 8)
            with pytest.raises(ValueError, match="damaged|not a checkpoint"):
                read_checkpoint(tmp_path / "small")
            os.pwrite(raw.fileno(), bytes([whole]), place // 8)
    read_checkpoint(tmp_path / "small")


def test_a_file_cut_off_anywhere_or_continued_is_refused(file):
    path, things = file
    data = path.read_bytes()
    lengths = {*range(130), *range(len(data) - 10, len(data)), *range(130, len(data), 997)}
    for spoilt in [*(data[:n] for n in sorted(lengths)), data + b"\0", data + b"\n", data + data]:
        path.write_bytes(spoilt)
        with nothing_changes(*things, match="damaged|not a checkpoint"):
            load(path, things)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    model = nn.Linear(2, 1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain")
    with nothing_changes(model, match="plain is not a checkpoint of this package"):
        load_checkpoint(tmp_path / "plain", model)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    model = nn.Linear(2, 1)
    for name, said in [("none", "none is missing"), (".", "not a file"), ("pipe", "not a file")]:
        with nothing_changes(model, match=said):
            load_checkpoint(tmp_path / name, model)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def hostile(marker):
    """Every way in which a pickle comes: bare, in torch's old format, in its zip archive."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps({"model": Payload(marker)}, protocol)
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(
            {"w": torch.ones(2), "x": Payload(marker)}, file, _use_new_zipfile_serialization=zipped
        )
        yield file.getvalue()


def test_the_payload_of_these_tests_is_alive(tmp_path):
    for n, data in enumerate(hostile(tmp_path / "ran")):
        if n <= pickle.HIGHEST_PROTOCOL:
            pickle.loads(data)
        else:
            torch.load(io.BytesIO(data), weights_only=False)
        (tmp_path / "ran").unlink()  # it was there


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt", ".pkl", ""])
def test_a_pickle_is_refused_under_any_suffix_and_nothing_runs(tmp_path, suffix):
    model, optimizer, _ = run()
    for data in hostile(tmp_path / "ran"):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(data)
        with nothing_changes(model, optimizer, match=f"weights{suffix} is not a checkpoint"):
            load_checkpoint(path, model, optimizer)
        assert not (tmp_path / "ran").exists()


def test_pickles_and_archives_are_called_by_their_names(tmp_path):
    for save, said in [(pickle.dump, "a pickle"), (torch.save, "a zip archive")]:
        with open(tmp_path / "weights.safetensors", "wb") as file:
            save({}, file)
        with pytest.raises(ValueError, match=said):
            read_checkpoint(tmp_path / "weights.safetensors")


def test_a_good_file_may_begin_with_the_byte_of_a_pickle(tmp_path):
    for n in range(0, 256, 8):
        save_checkpoint(tmp_path / "run", wide(1), step=1, notes={"a": "x" * n})
        if (tmp_path / "run").read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header of that length")
    assert held(tmp_path / "run") == 1


# Whole, and of something else


def other_shape(model, optimizer, draw):
    model.norm.weight = nn.Parameter(torch.ones(5))


def other_dtype(model, optimizer, draw):
    model.norm.weight.data = model.norm.weight.data.double()


def one_weight_more(model, optimizer, draw):
    model.extra = nn.Linear(2, 2)


def one_weight_less(model, optimizer, draw):
    model.norm.bias = None


def untied(model, optimizer, draw):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


@pytest.mark.parametrize(
    "change, said",
    [
        (other_shape, r"norm.weight is \(6,\) of torch.float32 .* \(5,\) of torch.float32"),
        (other_dtype, "norm.weight is .*float32 in the checkpoint, .*float64 here"),
        (one_weight_more, r"lacks the weights \['extra.bias', 'extra.weight'\]"),
        (one_weight_less, r"has \['norm.bias'\] too many"),
        (untied, r"lacks the weights \['head.weight'\]"),
    ],
)
def test_another_model_is_refused_and_nothing_changes(file, change, said):
    path, (model, optimizer, draw) = file
    change(model, optimizer, draw)
    with nothing_changes(model, optimizer, draw, match=said):
        load_checkpoint(path, model, optimizer, generators={"data": draw})


def parts(model):
    return [p for p in model.parameters() if p.ndim > 1], [
        p for p in model.parameters() if p.ndim < 2
    ]


def grouped(model):
    a, b = parts(model)
    return torch.optim.AdamW([{"params": a}, {"params": b}])


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda model: torch.optim.SGD(model.parameters()), r"AdamW.* not \('SGD'"),
        (lambda model: torch.optim.Adam(model.parameters()), r"AdamW.* not \('Adam'"),
        (grouped, "not .*AdamW"),
        (lambda model: torch.optim.AdamW([*model.parameters()][::-1]), "not .*AdamW"),
        (lambda model: torch.optim.AdamW([*model.parameters()][1:]), "not .*AdamW"),
        (lambda model: torch.optim.AdamW([{"params": model.parameters(), "x": 1}]), "'x'"),
        (
            lambda model: torch.optim.AdamW(nn.Linear(2, 3).parameters()),
            r"not the model's: \[\(3, 2",
        ),
    ],
)
def test_another_optimizer_is_refused_and_nothing_changes(file, build, said):
    path, (model, _, draw) = file
    optimizer = build(model)
    with nothing_changes(model, optimizer, draw, match=said):
        load_checkpoint(path, model, optimizer, generators={"data": draw})


def test_an_optimizer_or_generator_that_is_not_in_the_file_is_refused(tmp_path):
    model, optimizer, draw = run()
    save_checkpoint(tmp_path / "run", model, generators={"data": draw})
    other = run(1, random_seed=1)
    with nothing_changes(*other, match="has no optimizer"):
        load_checkpoint(tmp_path / "run", *other[:2])
    with nothing_changes(*other, match=r"generators \['data'\], not 'noise'"):
        load_checkpoint(tmp_path / "run", other[0], generators={"data": other[2], "noise": draw})


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_that_keeps_something_else_cannot_be_saved(tmp_path, kind):
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1)

    def loss():
        optimizer.zero_grad()
        out = model(torch.ones(4, 3)).square().mean()
        out.backward()
        return out

    optimizer.step(loss)
    with pytest.raises(ValueError, match="optimizer"):
        save_checkpoint(tmp_path / "run", model, optimizer)
    assert os.listdir(tmp_path) == []


def test_a_model_that_safetensors_cannot_hold_is_refused_by_name(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("turn", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="complex128"):
        save_checkpoint(tmp_path / "run", model)

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match="_extra_state is no tensor but dict"):
        save_checkpoint(tmp_path / "run", Extra(2, 2))
    with pytest.raises(TypeError, match="Tensor"):
        save_checkpoint(tmp_path / "run", nn.Linear(2, 2), notes={"loss": torch.ones(())})
    assert os.listdir(tmp_path) == []


# Sealed again by somebody who knows how


def sealed(tensors, about):
    """A file with a right checksum, whatever is in it."""
    text = about if isinstance(about, str) else json.dumps(about, separators=(",", ":"))
    text = '{"sha256":"' + "0" * 64 + '",' + text.removeprefix("{")
    data = bytearray(safetensors.torch.save(tensors, {"heed": text}))
    data[checkpoints.DIGEST] = checkpoints._digest(data)
    return data


WHOLE = {"step": 2, "optimizer": None, "notes": {}}


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"step": 1, "notes": {}},
        '{"step":',
        '{"step":' + "[" * 100_000,
    ],
)
def test_a_right_checksum_does_not_excuse_a_wrong_content(tmp_path, about):
    model = nn.Linear(2, 1)
    (tmp_path / "run").write_bytes(sealed({}, about))
    with nothing_changes(model, match="right checksum and a wrong content"):
        load_checkpoint(tmp_path / "run", model)


def test_tensors_are_checked_one_by_one_before_any_is_used(tmp_path):
    model, optimizer, draw = run()
    save_checkpoint(tmp_path / "run", model, optimizer, step=2, generators={"data": draw})
    good = read_checkpoint(tmp_path / "run")
    about = good._replace(tensors={})._asdict()
    about.pop("tensors")
    changes = {
        "model.norm.bias": (torch.zeros(6).double(), "norm.bias is .*float64"),
        "optimizer.exp_avg.norm.bias": (torch.zeros(7), r"exp_avg.norm.bias is \(7,\)"),
        "optimizer.exp_avg_sq.norm.bias": (torch.zeros(6).half(), "exp_avg_sq.norm.bias is .*16"),
        "optimizer.step.norm.bias": (torch.zeros(6), r"step.norm.bias is \(6,\)"),
        "optimizer.exp_avg.nobody": (torch.zeros(6), "does not move nobody"),
        "generator.data": (torch.zeros(9).byte(), r"generator data is \(9,\)"),
    }
    other = run(1, random_seed=1)
    for name, (tensor, said) in changes.items():
        (tmp_path / "run").write_bytes(sealed(good.tensors | {name: tensor}, about))
        with nothing_changes(*other, match=said):
            load(tmp_path / "run", other)
    spoilt = good.tensors["generator.data"].clone().fill_(255)
    (tmp_path / "run").write_bytes(sealed(good.tensors | {"generator.data": spoilt}, about))
    before = state(*other)
    with pytest.raises(RuntimeError, match="mt19937"):
        load(tmp_path / "run", other)
    assert state(*other) == before
    (tmp_path / "run").write_bytes(sealed(good.tensors, about))
    assert load(tmp_path / "run", other) == 2 and state(*other) == state(model, optimizer, draw)


def test_what_has_been_read_can_be_put_in_place_twice(tmp_path):
    model, optimizer, draw = run()
    save_checkpoint(tmp_path / "run", model, optimizer, step=2, generators={"data": draw})
    want, saved = state(model, optimizer, draw), read_checkpoint(tmp_path / "run")
    for _ in range(2):
        assert restore(saved, model, optimizer, generators={"data": draw}) == 2
        assert state(model, optimizer, draw) == want
        go_on(model, optimizer, draw, 1)
