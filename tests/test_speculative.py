"""Speculation may only save time: its tokens against exact distributions and plain generation."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch

from heed import speculative
from heed.cache.rolling import Rolling
from heed.generation import attending, filter_logits, generate
from heed.gpt import GPT, GPTConfig, causal
from heed.speculative import Counts, Ngram, accept, expected, speculate

f64, inf = torch.float64, math.inf


def tiny(random_seed=0, **settings):
    sizes = {"vocab_size": 13, "max_len": 40, "n_layers": 2, "n_heads": 2, "d_model": 10}
    model = GPT(GPTConfig(**sizes | settings)).double()
    draw = torch.Generator().manual_seed(random_seed)
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=draw, dtype=f64)
    return model.eval()


def close_to(model, random_seed, scale=0.1):
    """A draft that often says what the model says."""
    draft, draw = tiny(), torch.Generator().manual_seed(random_seed)
    draft.load_state_dict(model.state_dict())
    for p in draft.parameters():
        p.data += scale * torch.randn(p.shape, generator=draw, dtype=f64)
    return draft


def prompt(T=6, random_seed=1, V=13):
    return torch.randint(V, (1, T), generator=seeded(random_seed))


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def table(V, random_seed, temperature=1.0):
    """A model of the next word after each word."""
    scores = 1.5 * torch.randn(V, V, dtype=f64, generator=seeded(random_seed)) / temperature
    return lambda ids: scores[ids]


# The rule


def dyadic(V, random_seed):
    """Chances that are multiples of 1/64, some of them zero: exact as floats."""
    cuts = torch.randint(65, (V - 1,), generator=seeded(random_seed)).sort().values.tolist()
    return [Fraction(b - a, 64) for a, b in zip([0, *cuts], [*cuts, 64], strict=True)]


def asked(monkeypatch, p, q, x, u):
    """What accept does with the draft x when chance says u: None, or the weights it draws from."""
    drawn = []

    def multinomial(weights, n, **_):
        drawn.append(weights)
        return torch.tensor([0])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.tensor([u], dtype=f64))
        patch.setattr(torch, "multinomial", multinomial)
        after = torch.full((len(p),), 7 / 64, dtype=f64)  # told from (p - q)+ by its weights
        pq = [torch.tensor([float(v) for v in r], dtype=f64) for r in (p, q)]
        said = accept(torch.stack([pq[0], after]), pq[1][None], torch.tensor([x]))
    kept = len(said) == 2
    assert not kept or (said[0] == x and torch.equal(drawn[0], after))
    return None if kept else [Fraction(w) for w in drawn[0].tolist()]


@pytest.mark.parametrize("random_seed", range(12))
def test_by_the_rule_the_next_token_has_exactly_the_model_s_distribution(random_seed, monkeypatch):
    """The chance to keep each draft and the weights after a refusal are read off the code."""
    V = 2 + random_seed % 4
    p, q = dyadic(V, random_seed), dyadic(V, 100 + random_seed)
    found = V * [Fraction(0)]
    for x in range(V):
        if not q[x]:
            continue
        keep = min(Fraction(1), p[x] / q[x])
        if keep > 0:
            assert asked(monkeypatch, p, q, x, float(keep) * (1 - 1e-12)) is None
        if keep < 1:
            rest = asked(monkeypatch, p, q, x, float(keep) * (1 + 1e-12))
            for y in range(V):
                found[y] += q[x] * (1 - keep) * rest[y] / sum(rest)
        found[x] += q[x] * keep
    assert found == p


def test_what_differs_by_rounding_alone_leaves_a_rest_to_draw_from(monkeypatch):
    p = torch.tensor([0.5 - 1e-16, 0.5], dtype=f64)
    q = torch.tensor([0.5, 0.5], dtype=f64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([1 - 2**-53], dtype=f64))
    for _ in range(9):
        assert len(accept(torch.stack([p, p]), q[None], torch.tensor([0]))) in (1, 2)


def test_a_place_counts_only_if_all_before_it_were_kept():
    p = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    q = torch.full((3, 3), 1 / 3)
    for drafted, said in (
        ([0, 1, 2], [0, 1, 2, 0]),
        ([0, 1, 0], [0, 1, 2]),
        ([0, 2, 2], [0, 1]),
        ([1, 1, 2], [0]),
    ):
        assert accept(p, q, torch.tensor(drafted)).tolist() == said
    assert accept(p[:1], q[:0], torch.tensor([]).long()).tolist() == [0]


def test_the_rule_refuses_what_cannot_be(unchecked):
    p, q = torch.full((3, 2), 0.5), torch.full((2, 2), 0.5)
    for args in ((p[:2], q, [0, 1]), (p, q, [0]), (p[:, :1], q, [0, 1])):
        with pytest.raises(ValueError, match="do not fit"):
            accept(*args[:2], torch.tensor(args[2]))
    q[1] = torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match=r"drafted \[0, 1\] with probabilities \[0.5, 0.0\]"):
        accept(p, q, torch.tensor([0, 1]))


# The distribution of texts


def limit(df):
    return df + 6 * math.sqrt(2 * df)


def chi_square(found, want):
    """(statistic, degrees of freedom); what is expected less than five times is one cell."""
    cells = [(f, e) for f, e in zip(found, want, strict=True) if e >= 5]
    rest = [(f, e) for f, e in zip(found, want, strict=True) if 0 < e < 5]
    assert all(f == 0 for f, e in zip(found, want, strict=True) if e == 0)
    if rest:
        cells.append(tuple(map(sum, zip(*rest, strict=True))))
    assert len(cells) >= 5
    return sum((f - e) ** 2 / e for f, e in cells), len(cells) - 1


def every_text(model, start, n_new, V, eos=None):
    """All texts of n_new words and their probabilities, by the chain rule."""
    found = {}
    for words in product(range(V), repeat=n_new):
        p = model(torch.tensor([[*start, *words]]))[0, len(start) - 1 : -1].softmax(-1)
        n = n_new
        if eos in words:
            n = words.index(eos) + 1
            words = (*words[:n], *(n_new - n) * [eos])
        found[words] = math.prod(p[t, words[t]].item() for t in range(n))
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return found


@pytest.mark.parametrize("eos", [None, 0])
@pytest.mark.parametrize("kind", ["a table", "a GPT with caches"])
def test_whole_texts_come_as_often_as_the_model_alone_would_say_them(kind, eos):
    one = {"vocab_size": 3, "n_layers": 1, "d_model": 4}
    gpts, tables = (tiny(3, **one), tiny(4, **one)), (table(3, 0), table(3, 1))
    model, draft = tables if kind == "a table" else gpts
    n = 250 if kind == "a table" else 140
    want, draw = every_text(model, [1, 2], 3, 3, eos), seeded(5)
    found = dict.fromkeys(want, 0)
    for _ in range(n):
        how = {"n_draft": 2, "temperature": 1.0, "eos": eos, "generator": draw}
        ids, _ = speculate(model, draft, torch.tensor([[1, 2]]), 3, **how)
        found[tuple(ids[0, 2:].tolist())] += 1
    statistic, df = chi_square(found.values(), [n * p for p in want.values()])
    assert statistic < limit(df)


def steps(draft, n=700, n_draft=2, temperature=1.0, **filters):
    """The same of one long text, by the pairs of neighbours in it, out of five words."""
    model, V = table(5, 0), 5
    how = {"n_draft": n_draft, "temperature": temperature, "generator": seeded(3), **filters}
    ids, counts = speculate(model, draft, torch.tensor([[0]]), n, **how)
    assert counts.passes + counts.accepted == n
    pairs = (V * ids[0, :-1] + ids[0, 1:]).bincount(minlength=V * V).view(V, V)
    logits = filter_logits(model(torch.arange(V)), temperature=temperature, **filters)
    want = pairs.sum(1, keepdim=True) * logits.softmax(-1)
    statistic, df = chi_square(pairs.flatten().tolist(), want.flatten().tolist())
    return statistic, df - (V - 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_draft": 1},
        {"n_draft": 7},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.8},
        {"draft": Ngram(1)},
        {"draft": Ngram(2)},
    ],
    ids=["alone", "one", "seven", "cold", "warm, top 3", "warm, top p", "last word", "last two"],
)
def test_words_come_as_often_as_the_model_alone_would_say_them(settings):
    statistic, df = steps(**{"draft": table(5, 1)} | settings)
    assert statistic < limit(df)


def always(p, q, drafted, generator):
    return torch.cat([drafted, torch.multinomial(p[-1], 1, generator=generator)])


def from_p(p, q, drafted, generator):
    said = accept(p, q, drafted, generator)
    n = len(said) - 1
    return torch.cat([said[:n], torch.multinomial(p[n], 1, generator=generator)])


def q_of_another_temperature(p, q, drafted, generator):
    return accept(p, (3 * q.log()).softmax(-1), drafted, generator)


def too_willing(p, q, drafted, generator):
    return accept(p, q / 2, drafted, generator)


@pytest.mark.parametrize("wrong", [always, from_p, q_of_another_temperature, too_willing])
def test_the_count_sees_a_wrong_rule(wrong, monkeypatch):
    monkeypatch.setattr(speculative, "accept", wrong)
    statistic, df = steps(table(5, 1))
    assert statistic > limit(df)


# Greedy


DRAFTS = {
    "itself": lambda model: model,
    "one that is close": lambda model: close_to(model, 1),
    "a stranger": lambda model: tiny(99),
    "a smaller one": lambda model: tiny(98, n_layers=1, d_model=6),
    "a function": lambda model: lambda ids: model(ids),
    "two words": lambda model: Ngram(2),
    "one word": lambda model: Ngram(1),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("n_draft, n_new", [(1, 8), (3, 17), (4, 33), (9, 4)])
def test_the_likeliest_tokens_are_those_of_plain_generation(name, n_draft, n_new):
    for random_seed in range(2):
        model, ids = tiny(random_seed), prompt(random_seed=random_seed)
        want = generate(model, ids, n_new)
        got, counts = speculate(model, DRAFTS[name](model), ids, n_new, n_draft=n_draft)
        assert got.dtype == ids.dtype and torch.equal(got, want)
        assert 0 <= counts.accepted <= counts.drafted <= n_draft * counts.passes
        assert counts.passes + counts.accepted == n_new
        eos = want[0, -2].item()
        got, _ = speculate(model, DRAFTS[name](model), ids, n_new, n_draft=n_draft, eos=eos)
        assert torch.equal(got, generate(model, ids, n_new, eos=eos))


def test_of_equal_scores_and_through_filters_the_tokens_are_still_the_same():
    def ties(ids):
        return torch.stack([ids % 3, ids % 2, 1 - ids % 2, ids % 3], dim=-1).double()

    for how in ({}, {"top_k": 2}, {"top_p": 0.5, "top_k": 3}):
        want = generate(ties, prompt(V=4), 12, **how)
        assert torch.equal(speculate(ties, table(4, 0), prompt(V=4), 12, **how)[0], want)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_drafts_for_itself_is_always_believed(temperature):
    model = tiny()
    for n_draft, n_new in ((3, 16), (4, 11), (1, 1)):
        how = {"n_draft": n_draft, "temperature": temperature, "generator": seeded()}
        _, counts = speculate(model, model, prompt(), n_new, **how)
        passes = -(-n_new // (n_draft + 1))
        assert counts == Counts(passes, n_new - passes, n_new - passes)


def test_a_draft_that_is_always_wrong_costs_passes_and_nothing_else():
    model = tiny()

    def wrong(ids):
        return torch.nn.functional.one_hot((model(ids).argmax(-1) + 1) % 13, 13).double()

    got, counts = speculate(model, wrong, prompt(), 12, n_draft=3)
    assert torch.equal(got, generate(model, prompt(), 12))
    assert counts == Counts(passes=12, drafted=9 * 3 + 2 + 1, accepted=0)


def test_half_precision_and_short_integers_come_through():
    model, ids = tiny().bfloat16(), prompt().int()
    got, _ = speculate(model, lambda ids: model(ids), ids, 5, n_draft=2)
    assert got.dtype == torch.int32 and got.shape == (1, 11)


# What is read


class Watched(GPT):
    """Each pass with a cache is held against one over the whole text; tokens read are counted."""

    def forward(self, ids, *, cache=None):
        kept, self.log = cache.length, getattr(self, "log", [])
        logits = super().forward(ids, cache=cache)
        self.text = torch.cat([self.text[:, :kept] if kept else ids[:, :0], ids], dim=1)
        want = super().forward(self.text)[:, -ids.shape[1] :]
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-10)
        self.log.append((kept, ids.shape[1]))
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_after_a_refusal_both_caches_forget_what_was_not_said(temperature):
    model, draft = tiny(), close_to(tiny(), 2)
    model.__class__ = draft.__class__ = Watched
    how = {"temperature": temperature, "n_draft": 4, "generator": seeded(1)}
    ids, counts = speculate(model, draft, prompt(), 30, **how)
    assert 0 < counts.accepted < counts.drafted
    # The model reads the prompt and first drafts; then one token more than is drafted, each time.
    assert model.log[0] == (0, 6 + 4) and len(model.log) == counts.passes
    assert all(n == 5 for _, n in model.log[1:-4])
    assert all(n <= 2 for _, n in draft.log[1:])  # after a pass that was kept whole, two
    assert torch.equal(model.text[0, : model.log[-1][0]], ids[0, : model.log[-1][0]])


def windowed(q, k, v, dropout):
    """Each query reads the last 8 positions."""
    T, S = q.shape[2], k.shape[2]
    far = torch.arange(S) <= torch.arange(S - T, S)[:, None] - 8
    late = torch.arange(S) > torch.arange(S - T, S)[:, None]
    scores = (q @ k.mT / math.sqrt(k.shape[3])).masked_fill(far | late, -inf)
    return scores.softmax(-1) @ v


def rolling(random_seed, window=8):
    model = attending(tiny(random_seed), windowed)
    model.new_cache = lambda batch_size, max_len: Rolling(2, 1, 2, window, 5, dtype=f64)
    return model


def test_a_rolling_cache_cannot_be_cut_back_and_says_so():
    model = rolling(0)
    assert torch.equal(speculate(model, model, prompt(), 30)[0], generate(model, prompt(), 30))
    for pair in ((model, tiny(99)), (tiny(99), model)):
        with pytest.raises(ValueError, match="cannot cut .* back"):
            speculate(*pair, prompt(), 30)
    wide = rolling(0, window=40)  # nothing of it is ever written over
    assert torch.equal(speculate(wide, tiny(99), prompt(), 30)[0], generate(model, prompt(), 30))


def test_it_is_less_work_where_the_draft_is_good():
    model = tiny()
    _, counts = speculate(model, close_to(model, 1, scale=0.01), prompt(), 30, n_draft=4)
    assert counts.passes < 15


def test_modes_come_back_and_chance_is_asked_only_if_there_is_any():
    model, draft = tiny(dropout=0.5).train(), tiny(1, dropout=0.5).train()
    want, state = generate(tiny(), prompt(), 9), torch.get_rng_state()
    assert torch.equal(speculate(model, draft, prompt(), 9)[0], want)
    assert model.training and draft.training and torch.equal(torch.get_rng_state(), state)
    how = {"temperature": 1.0}
    a, b, c = (speculate(model, draft, prompt(), 20, generator=seeded(n), **how) for n in (3, 3, 4))
    assert torch.equal(a[0], b[0]) and a[1] == b[1] and not torch.equal(a[0], c[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_text_may_fill_all_positions_and_no_more():
    assert speculate(tiny(), tiny(1), prompt(), 35)[0].shape == (1, 41)
    assert speculate(tiny(), Ngram(1), prompt(), 0)[1] == Counts(0, 0, 0)
    for pair in ((tiny(), tiny(1, max_len=39)), (tiny(max_len=39), tiny(1)), (tiny(), Ngram(2))):
        with pytest.raises(ValueError, match="36 new tokens take 41 positions, but max_len is"):
            speculate(*pair, prompt(), 36)


# Drafts out of the text


@pytest.mark.parametrize(
    "n, text, want",
    [
        (2, [1, 2, 3, 4, 1, 2], [3, 4, 1, 2]),
        (2, [1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2, 4]),  # the last time counts
        (1, [5, 6], []),
        (1, [5, 5], [5, 5, 5, 5]),  # a loop goes round
        (3, [1, 2, 3, 9, 2, 3], []),
        (2, [7], []),
        (2, [7, 7], []),
        (3, [7, 7, 7, 7], [7, 7, 7, 7]),
        (2, [1, 2, 1, 2], [1, 2, 1, 2]),
    ],
)
def test_an_ngram_says_what_followed_the_last_time(n, text, want):
    got = Ngram(n)(torch.tensor([text]), 4)
    assert got.dtype == torch.int64 and got.shape == (1, len(want)) and got[0].tolist() == want


def test_a_text_that_repeats_itself_needs_few_passes():
    def clock(ids):
        return torch.nn.functional.one_hot((ids + 1) % 5, 13).double()

    got, counts = speculate(clock, Ngram(2), torch.tensor([[0]]), 40, n_draft=4)
    assert torch.equal(got, generate(clock, torch.tensor([[0]]), 40))
    assert counts.passes <= 6 + 7 and counts.accepted == counts.drafted


# What to expect


def test_the_expected_number_of_tokens_is_that_of_all_cases():
    for alpha in (Fraction(0), Fraction(1, 3), Fraction(7, 9), Fraction(1)):
        for k in range(6):
            mean = Fraction(0)
            for kept in product((True, False), repeat=k):
                p = math.prod((alpha if x else 1 - alpha for x in kept), start=Fraction(1))
                mean += p * (1 + (kept.index(False) if False in kept else k))
            assert expected(alpha, k) == mean
            if alpha < 1:
                assert expected(alpha, k) == (1 - alpha ** (k + 1)) / (1 - alpha)
    assert expected(0.5, 3) == 1.875


def test_so_many_tokens_come_from_a_pass():
    """p and q that never change are kept with the chance sum min(p, q), each on its own."""
    p, q = (torch.randn(6, dtype=f64, generator=seeded(n)) for n in (0, 1))
    alpha = torch.minimum(p.softmax(0), q.softmax(0)).sum().item()
    n_new, k = 1000, 3
    _, counts = speculate(
        lambda ids: p.expand(*ids.shape, 6),
        lambda ids: q.expand(*ids.shape, 6),
        torch.tensor([[0]]),
        n_new,
        n_draft=k,
        temperature=1.0,
        generator=seeded(1),
    )
    assert 0.3 < alpha < 0.9
    mean = n_new / counts.passes
    assert abs(mean - expected(alpha, k)) < 5 * k / math.sqrt(counts.passes)
    for other in (k - 1, k + 1):
        assert abs(mean - expected(alpha, k)) < abs(mean - expected(alpha, other)) / 2


# What cannot be


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"ids": prompt().expand(2, 6)}, r"one text at a time, got ids \(2, 6\)"),
        ({"ids": prompt()[:, :0]}, r"\(1, 0\)"),
        ({"ids": prompt()[0]}, r"\(6,\)"),
        ({"ids": prompt().double()}, "float64"),
        ({"ids": prompt() + 13}, "vocab_size is 13"),
        ({"n_new": -1}, "n_new .* -1"),
        ({"n_draft": 0}, "n_draft must be a positive integer, got 0"),
        ({"n_draft": 2.0}, "got 2.0"),
        ({"temperature": -1.0}, "temperature .* -1"),
        ({"temperature": math.nan}, "temperature .* nan"),
        ({"top_k": 0}, "top_k .* 0"),
        ({"top_p": 1.5}, "top_p .* 1.5"),
        ({"eos": 13}, "eos is 13, but there are 13 words"),
        ({"eos": -1}, "eos is -1"),
        ({"draft": tiny(vocab_size=12)}, r"\(5, 13\), \(4, 12\)|vocab_size is 12"),
        ({"draft": lambda ids: torch.full((*ids.shape, 13), math.nan)}, "NaN"),
        ({"draft": lambda ids: torch.zeros(1, 13)}, r"\(1, 6\) gave \(1, 13\)"),
        ({"model": lambda ids: torch.full((*ids.shape, 13), -inf)}, "all -inf"),
    ],
)
def test_a_speculation_that_cannot_be_is_refused(settings, said, unchecked):
    call = {"model": tiny(), "draft": tiny(1), "ids": prompt(), "n_new": 8}
    with pytest.raises(ValueError, match=said):
        speculate(**call | settings)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_an_ngram_has_at_least_one_word(n, unchecked):
    with pytest.raises(ValueError, match=f"n must be a positive integer, got {n}"):
        Ngram(n)


@pytest.mark.parametrize("alpha, k, said", [(-0.1, 2, "-0.1"), (1.1, 2, "1.1"), (0.5, -1, "-1")])
def test_expectations_that_cannot_be_are_refused(alpha, k, said, unchecked):
    with pytest.raises(ValueError, match=said):
        expected(alpha, k)


def test_the_windowed_attention_of_these_tests_is_causal_where_nothing_is_far():
    q = torch.randn(1, 2, 5, 4, dtype=f64)
    assert torch.allclose(windowed(q, q, q, None), causal(q, q, q, torch.nn.Dropout(0.0)))
