"""heed.batching: whatever happens meanwhile, every request says what it says alone."""

import copy
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from heed.batching import Engine
from heed.batching.scheduler import POLICIES
from heed.generation import generate
from heed.gpt import GPT, GPTConfig

V = 7


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = None


class Hash(nn.Module):
    """A stand-in for a model: its logits are a hash of all it was given, read out of the pages.

    A key is (token, place), a value (place, token): they stand in the pool like any others.
    """

    def __init__(self, random_seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(random_seed)
        self.table = nn.Parameter(torch.randn(997, V, generator=draw, dtype=torch.float64))
        self.config = SimpleNamespace(vocab_size=V, max_len=40, n_layers=1, n_heads=1, d_model=2)
        self.part = Part()

    def forward(self, ids, cache=None):
        if cache is None:
            return torch.stack([self.table[hashes(row.tolist())] for row in ids])
        places = cache.places(ids.shape[1])
        k = torch.stack([ids[0].double(), places.double()], -1)[None, None]
        keys, values = cache.append(0, k, k.flip(-1))
        rows = []
        for b, new in enumerate(keys.counts.tolist()):
            tokens, at = keys.read(b)[0].T
            assert at.tolist() == list(range(int(keys.lengths[b])))
            assert torch.equal(values.read(b)[0].T, torch.stack([at, tokens]))
            rows += hashes([int(token) for token in tokens])[-new:]
        return self.table[rows][None]


def hashes(tokens):
    """One for each beginning."""
    h, found = 1, []
    for token in tokens:
        h = (31 * h + token + 7) % 997
        found.append(h)
    return found


def tiny(seed=0):
    """A GPT in float64 whose every parameter is random, and which would drop out if it could."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=V, max_len=40, n_layers=2, n_heads=2, d_model=8, dropout=0.2)
    model = GPT(config).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def alone(model, prompt, n_new, how):
    seed = how.get("random_seed")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    kwargs = {name: x for name, x in how.items() if name != "random_seed"}
    text = generate(model, prompt[None], n_new, generator=generator, **kwargs)[0].tolist()
    eos, n = how.get("eos"), len(prompt)
    return text[: text.index(eos, n) + 1] if eos in text[n:] else text


def settings(rng, policy):
    sizes = {"page_len": rng.choice([1, 2, 3, 5]), "n_pages": rng.randint(3, 12)}
    sizes |= {"max_rows": rng.randint(1, 4), "max_tokens": rng.choice([1, 3, 9, 40])}
    return sizes | {"policy": policy}


def request(rng, s):
    room = min(s.ledger.n_pages * s.ledger.page_len, 40 if s.policy == "chunked" else s.max_tokens)
    n_new = rng.randint(1, min(6, room))
    prompt = [rng.randrange(2) for _ in range(rng.randint(1, min(9, room - n_new + 1)))]
    how = {"eos": rng.choice([None, None, 0, 3])}
    if rng.random() < 0.5:
        how |= {"temperature": rng.choice([0.5, 1.5]), "random_seed": rng.randrange(100)}
    return torch.tensor(prompt), n_new, how


def check_pool(engine):
    """Every page is in use, kept or free, and the pool holds what the scheduler thinks."""
    s, pool = engine.scheduler, engine.pool
    tables = {job: pool.ledger.find(job.seq).pages for job in [*s.running, *s.kept]}
    assert {job.seq for job in tables} == set(pool.ledger.tables)
    owners = Counter(page for pages in tables.values() for page in pages)
    assert pool.ledger.counts == [owners[page] for page in range(pool.n_pages)]
    assert all(pool.length(job.seq) == job.read for job in tables)
    used = {page for job in s.running for page in tables[job]}
    cached = {page for job in s.kept for page in tables[job]} - used
    assert len(used) + len(cached) + pool.free_pages == pool.n_pages


def play(model, seed, policy):
    rng = random.Random(seed)
    engine = Engine(model, **settings(rng, policy))
    asked = [request(rng, engine.scheduler) for _ in range(rng.randint(1, 6))]
    want, said, seen = {}, {}, Counter()
    rush = rng.choice([0.2, 0.5, 1.0])
    s = engine.scheduler
    while asked or s.waiting or s.running:
        while asked and (rng.random() < rush or not (s.waiting or s.running)):
            prompt, n_new, how = asked.pop()
            number = engine.submit(prompt, n_new, **how)
            want[number] = alone(model, prompt, n_new, how)
            said[number] = prompt.tolist()
        busy = set(s.running)
        for number, token in engine.step():
            said[number].append(token)
        check_pool(engine)
        seen["preempted"] += len(busy & {*s.waiting})
    found = {number: ids.tolist() for number, ids in engine.run().items()}
    assert found == said == want
    assert engine.step() == [] and engine.run() == {} and not engine._draws
    return seen


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_says_what_it_says_alone_out_of_the_pages(policy, unchecked):
    model = Hash()
    seen = sum((play(model, seed, policy) for seed in range(300)), Counter())
    assert seen["preempted"] > 10, seen


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpt_says_for_every_request_what_generate_says_for_it_alone(policy, unchecked):
    for seed in range(70):
        play(tiny(seed % 7), 1000 + seed, policy)


def engine(model=None, **changed):
    sizes = {"n_pages": 6, "page_len": 4, "max_rows": 3, "max_tokens": 8}
    return Engine(tiny() if model is None else model, **sizes | changed)


def test_all_pages_are_free_or_kept_for_others_when_all_have_ended():
    e = engine()
    e.submit(torch.tensor([1, 2, 3, 4, 5, 6]), 4)
    assert e.pool.free_pages == 6
    e.run()
    assert e.pool.free_pages == 4
    e.submit(torch.tensor([1, 2, 3, 4, 5, 6, 0]), 4)  # the first page is there
    e.step()
    assert e.pool.length(e.scheduler.running[0].seq) == 7
    assert e.pool.free_pages == 3


def test_a_request_may_fill_all_the_positions_of_the_model():
    model, prompt = tiny(), torch.tensor([1])
    e = engine(model, n_pages=10)
    e.submit(prompt, 40)  # the last is said and never read
    assert e.run()[0].tolist() == alone(model, prompt, 40, {})


def test_a_shared_beginning_is_read_once():
    read = []

    class Counting(Hash):
        def forward(self, ids, cache=None):
            read.append(ids.shape[1])
            return super().forward(ids, cache)

    e = engine(Counting(), n_pages=20, max_tokens=40)
    start = torch.arange(V).repeat(2)  # 14 tokens: three whole pages
    for n, last in enumerate((1, 2, 3)):
        e.submit(torch.cat([start, torch.tensor([last])]), 1)
        e.step()
        assert read[-1] == (15 if n == 0 else 3)


def test_the_model_itself_stays_as_it_was_and_its_new_weights_count():
    model = tiny().train()
    e = engine(model)
    prompt = torch.tensor([1, 2, 3])
    for _ in range(2):
        number = e.submit(prompt, 5)
        assert e.run()[number].tolist() == generate(model, prompt[None], 5)[0].tolist()
        assert all(part.training for part in model.modules())
        assert all(block.attn.attend.__module__ == "heed.gpt" for block in model.blocks)
        with torch.no_grad():
            model.tokens.weight.add_(torch.randn(V, 8, dtype=torch.float64))
        e.scheduler.kept.clear()  # what was read with the old weights must not be reused
        e = engine(model)


def test_int32_prompts_and_generators_of_their_own():
    e, prompt = engine(), torch.tensor([1, 2], dtype=torch.int32)
    how = {"temperature": 1.0, "random_seed": 5}
    numbers = [e.submit(prompt, 6, **how) for _ in range(2)]
    found = e.run()
    assert found[numbers[0]].tolist() == found[numbers[1]].tolist()
    assert found[0].tolist() == alone(tiny(), prompt.long(), 6, how)
    assert found[0].dtype == torch.int64


def state(e):
    s, pool = e.scheduler, e.pool
    jobs = [vars(job) for job in [*s.waiting, *s.running, *s.kept]]
    drawn = {job: generator.get_state().tolist() for job, (_, generator) in e._draws.items()}
    # Bit by bit: pages that were never filled may hold NaN.
    slots = [x.view(torch.int64).tolist() for x in pool.keys + pool.values]
    return copy.deepcopy([jobs, vars(pool.ledger), s.submitted]), drawn, slots


BAD = [
    (torch.tensor([[1, 2]]), 1, {}, r"\(1, 2\)"),
    (torch.tensor([1.0]), 1, {}, "float32"),
    (torch.tensor([True]), 1, {}, "bool"),
    (torch.tensor([], dtype=torch.int64), 1, {}, "got 0"),
    (torch.tensor([V]), 1, {}, "vocab_size is 7"),
    (torch.tensor([-1]), 1, {}, "ids -1"),
    (torch.tensor([1]), 0, {}, "got 1 and 0"),
    (torch.tensor([1]), -2, {}, "got 1 and -2"),
    (torch.tensor([1]), 2.0, {}, "2.0"),
    (torch.tensor([1]), 25, {}, "25 new ones take 7 pages, but the pool has 6"),
    (torch.tensor([1]), 41, {}, "max_len is 40"),
    (torch.tensor([1]), 1, {"eos": V}, "eos is 7"),
    (torch.tensor([1]), 1, {"eos": -1}, "eos is -1"),
    (torch.tensor([1]), 1, {"temperature": -1.0, "random_seed": 1}, "temperature"),
    (torch.tensor([1]), 1, {"temperature": float("nan"), "random_seed": 1}, "temperature"),
    (torch.tensor([1]), 1, {"temperature": float("inf"), "random_seed": 1}, "temperature"),
    (torch.tensor([1]), 1, {"temperature": 1.0}, "random_seed"),
]


@pytest.mark.parametrize(("ids", "n_new", "how", "words"), BAD)
def test_a_refused_request_changes_nothing(ids, n_new, how, words, unchecked):
    e = engine()
    e.submit(torch.tensor([1, 2, 3]), 9, temperature=1.0, random_seed=0)
    e.submit(torch.tensor([1, 2, 3, 4, 5, 6]), 9)
    e.step()
    before = state(e)
    with pytest.raises(ValueError, match=words):
        e.submit(ids, n_new, **how)
    assert state(e) == before


def test_a_step_that_fails_can_be_taken_again():
    class Sometimes(Hash):
        fails = ()

        def forward(self, ids, cache=None):
            logits = super().forward(ids, cache)
            if self.fails:
                raise self.fails.pop()
            return logits

    model = Sometimes()
    fails = Sometimes.fails = []
    e = engine(model)
    prompts = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 2, 3, 4, 0])
    for prompt in prompts:
        e.submit(prompt, 6)
        e.step()
    before = state(e)[0]
    for problem in (RuntimeError("no memory"), KeyboardInterrupt()):
        fails.append(problem)
        with pytest.raises(type(problem)):
            e.step()
        check_pool(e)
        assert state(e)[0] == before
    found = e.run()
    assert [found[n].tolist() for n in found] == [alone(Hash(), p, 6, {}) for p in prompts]


def test_logits_that_are_no_numbers_are_never_a_token():
    model = Hash()
    e = engine(model)
    e.submit(torch.tensor([1]), 2)
    with torch.no_grad():
        model.table[hashes([1])] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        e.step()
    assert e.scheduler.running[0].text == [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_pages", 0), ("page_len", -1), ("max_rows", 1.5), ("max_tokens", None), ("policy", "fair")],
)
def test_bad_settings_are_named(name, value, unchecked):
    with pytest.raises(ValueError, match=name):
        engine(**{name: value})
