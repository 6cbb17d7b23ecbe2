"""One small trained model, read in every way there is: the same logits, the same tokens.

It is the file that the package carries, so it is held here too: against the script that made it,
and against the exact floor of the language that it has learned.
"""

import dataclasses
import math
import tomllib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bench import micro
from heed import attention, masks
from heed.batching import Engine
from heed.cache.contiguous import Contiguous
from heed.cache.paged import Packed, Paged, PagedKVCache
from heed.cache.quantised import Quantised
from heed.cache.ragged import Ragged, twin
from heed.cache.rolling import Rolling
from heed.checkpoints import read_checkpoint
from heed.flash import decode, tiled
from heed.generation import attending, generate, prefill
from heed.gpt import causal
from heed.interop import MICRO
from heed.interop import micro as load
from heed.speculative import Ngram, speculate
from heed.step import Step

f64 = torch.float64
L, G, D, ROOM = 2, 4, 16, 128  # layers, heads, width of a head, positions
LENGTHS = (1, 2, 5, 16, 17, 63, 65, 97, 128)  # around a page of 16, a group of 32, a tile of 64


def texts():
    ids = micro.language().sample(len(LENGTHS), max(LENGTHS), torch.Generator().manual_seed(11))
    return [ids[b : b + 1, :n] for b, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model():
    return load().double()


# The formula, from the weights alone


def norm(x, w, name):
    x = x - x.mean(-1, keepdim=True)
    return (
        x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def naive(w, ids):
    """Logits (T, V): e to the power of every score, one head after another, over its own sum."""
    T = ids.shape[1]
    x = w["tokens.weight"][ids[0]] + w["positions.weight"][:T]
    past = torch.ones(T, T, dtype=f64).tril()
    for n in range(L):
        b = f"blocks.{n}"
        y = norm(x, w, f"{b}.norm1") @ w[f"{b}.attn.qkv.weight"].T + w[f"{b}.attn.qkv.bias"]
        heads = []
        for h in range(G):
            q, k, v = (part[:, h * D : (h + 1) * D] for part in y.split(G * D, dim=1))
            e = (q @ k.T / math.sqrt(D)).exp() * past
            heads.append(e @ v / e.sum(1, keepdim=True))
        x = x + torch.cat(heads, 1) @ w[f"{b}.attn.out.weight"].T + w[f"{b}.attn.out.bias"]
        y = norm(x, w, f"{b}.norm2") @ w[f"{b}.mlp.up.weight"].T + w[f"{b}.mlp.up.bias"]
        y = y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ w[f"{b}.mlp.down.weight"].T + w[f"{b}.mlp.down.bias"]
    return norm(x, w, "norm") @ w["tokens.weight"].T


# Implementations: (model, prompts (1, T) each) -> logits of the last positions of each prompt


def each(read):
    return lambda model, prompts: [read(model, ids)[0] for ids in prompts]


def swapped(attend):
    return each(lambda model, ids: attending(model, attend)(ids))


def portions(T):
    """A beginning, some tokens alone, and a rest."""
    first = (T + 1) // 2
    ones = min(5, T - first)
    return [n for n in (first, *ones * (1,), T - first - ones) if n]


def through(new_cache):
    def read(model, ids):
        cache = new_cache(model)
        parts = ids.split(portions(ids.shape[1]), dim=1)
        return torch.cat([model(part, cache=cache) for part in parts], dim=1)

    return each(read)


def pool(pages=60):
    return PagedKVCache(L, G, D, page_len=16, n_pages=pages, dtype=f64)


def paged(model):
    """A sequence whose pages are no neighbours, because another one grew meanwhile."""
    pages = pool()
    mine, other = pages.new(), pages.new()
    for n in range(8):
        for layer in range(L):
            for seq in (mine, other) if n % 2 else (other, mine):
                pages.append(seq, layer, *torch.randn(2, G, 16, D, dtype=f64))
    pages.truncate(mine, 0)
    return Paged(pages, [mine])


def forked(model):
    pages = pool()
    root = pages.new()
    fork = pages.fork(root)
    return Paged(pages, [fork])


def chunked(chunk):
    def read(model, ids):
        return prefill(model, ids, Contiguous(L, 1, G, ROOM, D, dtype=f64), chunk=chunk)[:, None]

    return each(read)


def packed(model, prompts):
    """All prompts in one row of tokens: their first halves, some more, the last one of each."""
    model, pages = attending(model, decode.packed), pool()
    seqs, found = [pages.new() for _ in prompts], [[] for _ in prompts]
    todo = [list(ids.split(portions(ids.shape[1]), dim=1)) for ids in prompts]
    while any(todo):
        now = [(b, parts.pop(0)) for b, parts in enumerate(todo) if parts]
        counts = [part.shape[1] for _, part in now]
        cache = Packed(pages, [seqs[b] for b, _ in now], counts)
        logits = model(torch.cat([part for _, part in now], dim=1), cache=cache)[0]
        for (b, _), some in zip(now, logits.split(counts), strict=True):
            found[b].append(some)
    return [torch.cat(parts) for parts in found]


def ragged(model, prompts):
    """All prompts in one batch, padded on the right with whatever."""
    counts = [ids.shape[1] for ids in prompts]
    cache = Ragged([Contiguous(L, 1, G, ROOM, D, dtype=f64) for _ in prompts], counts)
    ids = torch.full((len(prompts), max(counts)), 7)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: prompt.shape[1]] = prompt[0]
    logits = twin(model, cache.each)(ids, cache=cache)
    return [some[:n] for some, n in zip(logits, counts, strict=True)]


def stepped(model, prompts):
    """The last tokens of each prompt by the step that is compiled elsewhere."""
    step, found = Step(model, batch_size=1, max_len=ROOM, backend="eager"), []
    for ids in prompts:
        first = max(1, ids.shape[1] - 4)
        logits = [step.prefill(ids[:, :first])]
        logits += [step(ids[:, n : n + 1]) for n in range(first, ids.shape[1])]
        found.append(torch.cat(logits))
    return found


SAME = {
    "the model as it is": each(lambda model, ids: model(ids)),
    "heed.attention": swapped(lambda q, k, v, _: attention.attention(q, k, v, masks.causal)),
    "flash.tiled": swapped(lambda q, k, v, _: tiled.attention(q, k, v, masks.causal)),
    "flash.tiled, blocks of 16": swapped(
        lambda q, k, v, _: tiled.attention(q, k, v, masks.causal, block=16)
    ),
    "gpt.Cache": through(lambda model: model.new_cache(1)),
    "cache.Contiguous": through(lambda _: Contiguous(L, 1, G, ROOM, D, dtype=f64)),
    "cache.Rolling": through(lambda _: Rolling(L, 1, G, ROOM, D, dtype=f64)),
    "cache.Paged": through(paged),
    "cache.Paged, a fork": through(forked),
    "prefill at once": chunked(None),
    "prefill by 1": chunked(1),
    "prefill by 24": chunked(24),
    "a packed row": packed,
    "a ragged batch": ragged,
    "step.Step": stepped,
}


def differences(implementations, model, prompts):
    """{implementation: largest difference of logits for each prompt}: the table."""
    wanted = [naive(model.state_dict(), ids) for ids in prompts]
    table = {}
    with torch.no_grad():
        for name, implementation in implementations.items():
            table[name] = []
            for want, got in zip(wanted, implementation(model, prompts), strict=True):
                assert got.isfinite().all() and 1 <= len(got) <= len(want)
                assert got.shape[1] == want.shape[1]
                table[name].append((got - want[-len(got) :]).abs().max().item())
    return table


def test_every_way_to_read_gives_the_logits_of_the_formula(model):
    table = differences(SAME, model, texts())
    for name, row in table.items():
        print(f"{name:>26}  " + "  ".join(f"{x:.0e}" for x in row))
    for name, row in table.items():
        assert len(row) == len(LENGTHS) and max(row) < 1e-10, f"{name}: {row}"


def wrong_scale(q, k, v, _):
    return attention.attention(q, k, v, masks.causal, scale=0.2500001)


def not_itself(q, k, v, _):
    """A cached step that leaves out the token it is about."""
    return causal(q, k, v, _) if q.shape[2] > 1 else causal(q, k[:, :, :-1], v[:, :, :-1], _)


@pytest.mark.parametrize(
    "wrong",
    [
        swapped(wrong_scale),
        lambda model, prompts: through(lambda m: m.new_cache(1))(
            attending(model, not_itself), prompts
        ),
        through(lambda _: Rolling(L, 1, G, 60, D, dtype=f64)),
        lambda model, prompts: packed(
            model, [torch.cat([p[:, :-1], p[:, :1]], 1) for p in prompts]
        ),
        each(lambda model, ids: model(ids.flip(1)).flip(1)),
    ],
    ids=["scale", "not itself", "a window of 60", "another token", "reversed"],
)
def test_the_table_sees_what_is_wrong(wrong, model):
    (row,) = differences({"wrong": wrong}, model, texts()).values()
    assert max(row) > 1e-8


# Eight bits


class Beside:
    """A cache that hands back what it keeps, and beside it what should have been kept."""

    def __init__(self):
        self.kept = Quantised(L, 1, G, ROOM, D, group=32, dtype=f64)
        self.exact = Contiguous(L, 1, G, ROOM, D, dtype=f64)
        self.places = self.kept.places

    def append(self, layer, k, v):
        pair = zip(self.kept.append(layer, k, v), self.exact.append(layer, k, v), strict=True)
        k, v = pair
        return (*k, self.kept.steps(layer)[0]), (*v, self.kept.steps(layer)[1])


def test_eight_bits_stay_within_their_bound_in_every_layer(model):
    """What `cache.quantised` promises of one attention, on the keys and values of this model."""
    worst = []

    def attend(q, k, v, dropout):
        (k, k_exact, k_step), (v, v_exact, v_step) = k, v
        assert ((k - k_exact).abs() <= k_step / 2 * (1 + 1e-9)).all()
        assert ((v - v_exact).abs() <= v_step / 2 * (1 + 1e-9)).all()
        for x, step in ((k_exact, k_step), (v_exact, v_step)):  # no step is wider than it must be
            assert step.max() <= x.abs().max() / 127 * (1 + 1e-9)
        got, want = causal(q, k, v, dropout), causal(q, k_exact, v_exact, dropout)
        e = (q.abs() @ k_step.mT).amax(-1, keepdim=True) / 2 / math.sqrt(D)
        bound = (2 * e).expm1() * v_exact.abs().amax((2, 3), keepdim=True)
        bound = bound + v_step.amax(2, keepdim=True) / 2
        assert ((got - want).abs() <= bound).all()
        worst.append((got - want).abs().max().item())
        return got

    with torch.no_grad():
        for ids in texts():
            cache = Beside()
            other = attending(model, attend)
            parts = ids.split(portions(ids.shape[1]), dim=1)
            got = torch.cat([other(part, cache=cache) for part in parts], dim=1)
            assert (got - model(ids)).abs().max() < 0.2
    assert max(worst) > 1e-4  # it does round


# Tokens


def by_engine(model, prompts, n_new):
    engine = Engine(model, n_pages=30, page_len=16, max_rows=3, max_tokens=40)
    numbers = [engine.submit(ids[0], n_new) for ids in prompts]
    found = engine.run()
    return [found[number] for number in numbers]


def by_rows(model, prompts, n_new):
    counts = torch.tensor([ids.shape[1] for ids in prompts])
    ids = torch.zeros(len(prompts), int(counts.max()), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: prompt.shape[1]] = prompt[0]
    out = generate(model, ids, n_new, lengths=counts)
    return [row[: n + n_new] for row, n in zip(out, counts.tolist(), strict=True)]


def by_fork(model, prompts, n_new):
    found = []
    for ids in prompts:
        pages = pool()
        root = pages.new()
        if ids.shape[1] > 1:
            prefill(model, ids[:, :-1], Paged(pages, [root]))
        forks = Paged(pages, [pages.fork(root) for _ in range(2)])
        out = generate(model, ids.expand(2, -1), n_new, cache=forks)
        assert torch.equal(out[0], out[1])
        found.append(out[0])
    return found


def one_by_one(say):
    return lambda model, prompts, n_new: [say(model, ids, n_new)[0] for ids in prompts]


def first_layer(model):
    """Half of the model drafts for all of it."""
    half = attending(model, causal)
    half.blocks = half.blocks[:1]
    return lambda ids: half(ids)


TOKENS = {
    "without a cache": one_by_one(lambda m, ids, n: generate(m, ids, n, use_cache=False)),
    "generate": one_by_one(generate),
    "GPT.generate": one_by_one(lambda m, ids, n: m.generate(ids, n)),
    "a ragged batch": by_rows,
    "forks of one prompt": by_fork,
    "speculative, by itself": one_by_one(lambda m, ids, n: speculate(m, m, ids, n)[0]),
    "speculative, half drafts": one_by_one(
        lambda m, ids, n: speculate(m, first_layer(m), ids, n)[0]
    ),
    "speculative, n-grams": one_by_one(lambda m, ids, n: speculate(m, Ngram(2), ids, n)[0]),
    "batching.Engine": by_engine,
}


def test_every_way_to_go_on_says_the_same_tokens(model):
    prompts, n_new = [ids for ids in texts() if ids.shape[1] <= 65], 12
    weights, wanted = model.state_dict(), []
    for ids in prompts:
        said = generate(lambda ids: naive(weights, ids)[None], ids, n_new)[0]
        wanted.append(said)
    for name, implementation in TOKENS.items():
        for want, got in zip(wanted, implementation(model, prompts, n_new), strict=True):
            assert torch.equal(got, want), name


# The file


def test_the_file_is_small_and_made_by_the_script_s_settings():
    assert MICRO.stat().st_size < 1_000_000
    saved = read_checkpoint(MICRO)
    assert saved.optimizer is None and saved.step == micro.SETTINGS["steps"]
    assert saved.notes["settings"] == micro.SETTINGS
    assert saved.notes["config"] == dataclasses.asdict(micro.build().config)
    assert load().config == micro.build().config
    assert {x.dtype for x in saved.tensors.values()} == {torch.float32}


def test_the_weights_come_in_bit_for_bit_and_nothing_else_changes():
    state = torch.get_rng_state()
    model = load()
    assert torch.equal(torch.get_rng_state(), state)
    raw = safetensors.torch.load_file(MICRO)  # by the library alone
    own = model.state_dict()
    assert model.head.weight is model.tokens.weight
    own.pop("head.weight")
    assert raw.keys() == {f"model.{name}" for name in own}
    for name, weight in own.items():
        assert torch.equal(raw[f"model.{name}"], weight)
    assert not any(module.training for module in model.modules())


def test_the_file_is_part_of_the_package_that_is_installed():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf8"))
    assert "*.safetensors" in project["tool"]["setuptools"]["package-data"]["heed"]
    assert MICRO.parent == Path(attention.__file__).parent


def test_it_knows_its_language_to_a_fifteenth_of_a_nat():
    got, floor = micro.above(load())
    assert 0 < got - floor < 1 / 15


def test_the_script_writes_the_same_bytes_each_time(tmp_path, monkeypatch):
    monkeypatch.setitem(micro.SETTINGS, "steps", 2)
    losses = [micro.make(tmp_path / name) for name in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    assert a == b and a != MICRO.read_bytes()
    assert read_checkpoint(tmp_path / "a").notes["settings"]["steps"] == 2
