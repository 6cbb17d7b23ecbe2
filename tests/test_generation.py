"""The next token, by definition and by counting; and rows that must not notice each other."""

import math

import pytest
import torch
from torch import nn

from heed.cache.contiguous import Contiguous
from heed.cache.paged import Paged, PagedKVCache
from heed.cache.rolling import Rolling
from heed.generation import attending, beam, filter_logits, generate, length_penalty, prefill
from heed.gpt import GPT, Cache, GPTConfig, causal

f64, inf = torch.float64, math.inf


def tiny(dtype=f64, **settings):
    sizes = {"vocab_size": 61, "max_len": 23, "n_layers": 2, "n_heads": 3, "d_model": 33}
    model = GPT(GPTConfig(**sizes | settings)).to(dtype)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=draw, dtype=f64).to(dtype)
    return model.eval()


def text(B=3, T=7, random_seed=1):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(random_seed))


def seeded(n=0):
    return torch.Generator().manual_seed(n)


class Clock(nn.Module):
    """Says the next number, modulo V, and counts how often it is asked."""

    def __init__(self, V=10):
        super().__init__()
        self.V, self.calls = V, 0

    def forward(self, ids):
        self.calls += 1
        return nn.functional.one_hot((ids.long() + 1) % self.V, self.V).double()


# The filter

P = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=f64)  # by rank: 1, 3, 4, 0, 2


def kept(p=P, **settings):
    return (filter_logits(p.log(), **settings) > -inf).nonzero()[:, 0].tolist()


def test_without_settings_nothing_changes():
    logits = torch.randn(2, 3, 5)
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, top_k=5, top_p=1.0), logits)


def test_temperature_divides_the_scores():
    logits = torch.randn(2, 5, dtype=f64)
    assert torch.equal(filter_logits(logits, temperature=0.7), logits / 0.7)


@pytest.mark.parametrize(
    "k, want", [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (99, [0, 1, 2, 3, 4])]
)
def test_the_top_k_stay(k, want):
    assert kept(top_k=k) == want


@pytest.mark.parametrize(
    "p, want",
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.64, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.86, [0, 1, 3, 4]),
        (0.949, [0, 1, 3, 4]),
        (0.951, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_the_fewest_that_hold_the_share_p_stay_with_the_one_that_crosses_it(p, want):
    assert kept(top_p=p) == want


def test_a_token_that_reaches_p_exactly_needs_no_other():
    assert kept(torch.ones(4, dtype=f64), top_p=0.5) == [0, 1]
    assert kept(torch.ones(4, dtype=f64), top_p=0.51) == [0, 1, 2]


def test_temperature_comes_first_then_k_then_p():
    # At temperature 1/2 the shares go with p²: 16, 6.25, 4, 1 and 0.25 of 27.5.
    assert kept(top_p=0.62) == [1, 3]
    assert kept(top_p=0.57, temperature=0.5) == [1]
    # Of the best two, the first alone holds 0.4 / 0.65 = 0.615.
    assert kept(top_p=0.61, top_k=2) == [1]
    assert kept(top_p=0.62, top_k=2) == [1, 3]


def test_what_stays_keeps_its_score_in_every_row():
    logits = torch.randn(3, 4, 31)
    out = filter_logits(logits, temperature=0.7, top_k=7, top_p=0.8)
    stays = out > -inf
    assert torch.equal(out[stays], (logits / 0.7)[stays])
    for b in range(3):
        for t in range(4):
            alone = filter_logits(logits[b, t], temperature=0.7, top_k=7, top_p=0.8)
            assert torch.equal(out[b, t], alone)
            dropped = (logits / 0.7)[b, t][~stays[b, t]]
            assert out[b, t][stays[b, t]].min() >= dropped.max()


def test_of_equal_scores_the_first_in_the_vocabulary_stays_as_for_argmax():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0])
    assert (filter_logits(logits, top_k=2) > -inf).tolist() == [False, True, True, False]
    assert (filter_logits(logits, top_p=0.01) > -inf).tolist() == [False, True, False, False]
    many = torch.randint(3, (500,)).double()
    first = sorted(range(500), key=lambda n: (-many[n].item(), n))[:40]
    assert kept(many.exp(), top_k=40) == sorted(first)


def test_p_of_one_keeps_a_tail_that_rounding_would_lose():
    logits = torch.tensor([0.0, -40.0, -40.0, -50.0])
    assert torch.equal(filter_logits(logits, top_p=1.0), logits)
    flat = torch.zeros(50_000)
    assert (filter_logits(flat, top_p=0.5) > -inf).sum() == 25_000


def test_impossible_tokens_stay_impossible():
    logits = torch.tensor([-inf, 1.0, 0.0, -inf])
    for settings in ({}, {"top_k": 3}, {"top_p": 0.99}, {"temperature": 3.0}):
        assert (filter_logits(logits, **settings) == -inf).tolist() == [True, False, False, True]


def test_the_logits_that_come_in_are_not_touched():
    logits = torch.randn(2, 5)
    before = logits.clone()
    filter_logits(logits, temperature=0.5, top_k=2, top_p=0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"temperature": -1.0}, "temperature .* -1.0"),
        ({"temperature": math.nan}, "temperature .* nan"),
        ({"temperature": inf}, "temperature .* inf"),
        ({"top_k": 0}, "top_k .* 0"),
        ({"top_k": -3}, "top_k .* -3"),
        ({"top_k": 2.5}, "top_k .* 2.5"),
        ({"top_p": 0.0}, "top_p .* 0.0"),
        ({"top_p": -0.1}, "top_p .* -0.1"),
        ({"top_p": 1.1}, "top_p .* 1.1"),
        ({"top_p": math.nan}, "top_p .* nan"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_both(settings, said, unchecked):
    with pytest.raises(ValueError, match=said):
        filter_logits(torch.randn(5), **settings)
    for n_new in (0, 3):
        with pytest.raises(ValueError, match=said):
            generate(tiny(), text(), n_new, **settings)


def test_temperature_zero_leaves_nothing_to_filter():
    with pytest.raises(ValueError, match="temperature 0"):
        filter_logits(torch.randn(5), temperature=0.0)


BAD_SCORES = [[1.0, math.nan], [1.0, inf], [-inf, -inf], [inf, -inf]]


@pytest.mark.parametrize("row", BAD_SCORES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_say_nothing_never_become_a_token(row, temperature):
    with pytest.raises(ValueError, match="NaN or .inf|all -inf"):
        filter_logits(torch.tensor([[0.0, 1.0], row]))

    def model(ids):
        return torch.tensor([[0.0, 1.0], row])[:, None].expand(2, ids.shape[1], 2)

    with pytest.raises(ValueError, match="NaN or .inf|all -inf"):
        generate(model, torch.zeros(2, 3).long(), 1, temperature=temperature)


def test_a_temperature_that_overflows_is_refused():
    with pytest.raises(ValueError, match="1e-40"):
        filter_logits(torch.tensor([5.0, 1.0]), temperature=1e-40)


# Generating


def test_greedy_takes_the_likeliest_again_and_again():
    model, ids = tiny(), text()
    want = ids
    for _ in range(9):
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, ids, 9), want)
    assert torch.equal(generate(model, ids, 9, top_k=1, temperature=1.0), want)
    assert torch.equal(generate(model, ids, 9, top_k=5, top_p=0.5), want)


def test_with_and_without_a_cache_the_model_says_the_same():
    """The logits of every step, to 1e-10 in float64, and the cache is really used."""

    class Watched(GPT):
        def forward(self, ids, *, cache=None):
            logits = super().forward(ids, cache=cache)
            seen.append((ids.shape[1], logits[:, -1]))
            return logits

    model, runs = tiny(), []
    model.__class__ = Watched
    for use_cache in (True, False):
        seen = []
        settings = {"temperature": 0.8, "top_k": 9, "generator": seeded()}
        out = generate(model, text(), 12, use_cache=use_cache, **settings)
        runs.append((out, *zip(*seen, strict=True)))
    (with_cache, read, cached), (without, reread, uncached) = runs
    assert torch.equal(with_cache, without)
    assert read == (7, *11 * (1,)) and reread == tuple(range(7, 19))
    for a, b in zip(cached, uncached, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 6},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9},
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(settings):
    n, model, ids = 20_000, Clock(), text(B=1, T=2) % 10
    scores = torch.randn(10, generator=seeded(4), dtype=f64)
    model.forward = lambda ids: scores.expand(*ids.shape, 10)
    drawn = generate(model, ids.expand(n, 2), 1, generator=seeded(), **settings)[:, 2]
    expected = n * filter_logits(scores, **settings).softmax(-1)
    found = drawn.bincount(minlength=10)
    possible = expected > 0
    assert (found[~possible] == 0).all()
    chi2 = ((found - expected).square() / expected)[possible].sum().item()
    df = int(possible.sum()) - 1
    assert df >= 2 and chi2 < df + 6 * math.sqrt(2 * df)


def test_the_generator_decides_and_the_global_one_is_left_alone():
    model, state = tiny(), torch.get_rng_state()
    a, b, c = (generate(model, text(), 9, temperature=1.0, generator=seeded(n)) for n in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_any_function_from_ids_to_logits_will_do():
    ids = torch.tensor([[3, 4], [8, 9]])
    assert generate(Clock(), ids, 3).tolist() == [[3, 4, 5, 6, 7], [8, 9, 0, 1, 2]]
    assert generate(Clock().forward, ids, 1).tolist() == [[3, 4, 5], [8, 9, 0]]
    assert generate(Clock(), ids.int(), 1).dtype == torch.int32


def test_nothing_new_gives_the_prompt():
    assert torch.equal(generate(tiny(), text(), 0), text())


def test_half_precision_is_drawn_from_in_float32():
    """101 / 0.7 - 100 / 0.7 is 1.43. In bfloat16 it is 144 - 143 = 1: odds of 2.7, not 4.2."""
    scores = torch.tensor([100.0, 101.0], dtype=torch.bfloat16)
    drawn = generate(
        lambda ids: scores.expand(*ids.shape, 2),
        text(B=1).expand(5000, 7),
        1,
        temperature=0.7,
        generator=seeded(),
    )
    share = 1 / (1 + math.exp(-1 / 0.7))
    assert abs(drawn[:, -1].double().mean().item() - share) < 5 * math.sqrt(share / 4 / 5000)


def test_double_precision_is_kept():
    scores = torch.tensor([1.0, 1.0 + 1e-12], dtype=f64)
    assert generate(lambda ids: scores.expand(*ids.shape, 2), text() % 2, 1)[
        :, -1
    ].tolist() == 3 * [1]


# Ends


def test_after_its_end_a_row_says_nothing_else():
    ids = torch.tensor([[3, 4], [6, 7], [8, 9], [1, 0]])
    want = [
        [3, 4, 5, 6, 7, 8, 8],
        [6, 7, 8, 8, 8, 8, 8],
        [8, 9, 0, 1, 2, 3, 4],
        [1, 0, 1, 2, 3, 4, 5],
    ]
    assert generate(Clock(), ids, 5, eos=8).tolist() == want


def test_when_all_rows_have_ended_the_model_is_asked_no_more():
    model = Clock()
    ids = torch.tensor([[5, 6], [6, 7]])
    assert generate(model, ids, 6, eos=8).tolist() == [[5, 6, 7, *5 * [8]], [6, 7, *6 * [8]]]
    assert model.calls == 2


def test_a_row_with_an_end_in_its_prompt_goes_on():
    assert generate(Clock(), torch.tensor([[8, 1]]), 3, eos=8).tolist() == [[8, 1, 2, 3, 4]]


def test_an_end_does_not_change_what_comes_before_it():
    model, ids = tiny(), text()
    free = generate(model, ids, 12)
    eos = free[0, 12].item()
    out = generate(model, ids, 12, eos=eos)
    for b in range(3):
        said = free[b, 7:].tolist()
        stop = said.index(eos) if eos in said else 12
        assert out[b, 7:].tolist() == said[:stop] + [eos] * (12 - stop)


# Rows of different length


def padded(rows, filler):
    T = max(map(len, rows))
    return torch.stack([torch.cat([r, r.new_full((T - len(r),), filler)]) for r in rows])


@pytest.mark.parametrize("filler", [0, 60, -100, 10**9])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_among_longer_ones_comes_out_as_if_alone(filler, use_cache):
    model, lengths = tiny(), torch.tensor([4, 1, 7, 2])
    rows = [text(B=4)[b, :n] for b, n in enumerate(lengths)]
    out = generate(model, padded(rows, filler), 9, lengths=lengths, use_cache=use_cache)
    assert out.shape == (4, 16)
    for row, got, n in zip(rows, out, lengths, strict=True):
        assert torch.equal(got[: n + 9], generate(model, row[None], 9)[0])
        assert (got[n + 9 :] == filler).all()


def test_the_logits_of_a_padded_row_are_those_of_the_row_alone():
    model, lengths, steps = tiny(), torch.tensor([4, 1, 7]), 5
    rows = [text()[b, :n] for b, n in enumerate(lengths)]

    def watched(ids):
        logits = model(ids)
        seen.append(logits)
        return logits

    seen = []
    generate(watched, padded(rows, -1), steps, lengths=lengths)
    together = seen
    for b, n in enumerate(lengths.tolist()):
        seen = []
        generate(watched, rows[b][None], steps)
        for i in range(steps):
            close = {"rtol": 0, "atol": 1e-10}
            torch.testing.assert_close(together[i][b, n - 1 + i], seen[i][0, -1], **close)


@pytest.mark.parametrize("eos", [None, 5])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 2.0}, {"temperature": 1.5, "top_k": 9}], ids=str
)
def test_rows_of_different_length_say_the_same_with_and_without_caches(how, eos):
    """The same draws too, the same logits to 1e-10, and each step reads one token a row."""

    class Watched(GPT):
        def forward(self, ids, *, cache=None):
            logits = super().forward(ids, cache=cache)
            seen.append((tuple(ids.shape), logits))
            return logits

    model, lengths, runs = tiny(), torch.tensor([4, 1, 7, 2]), []
    model.__class__ = Watched
    for use_cache in (True, False):
        seen, call = [], {"lengths": lengths, "eos": eos, "generator": seeded(2), **how}
        runs.append((generate(model, text(B=4), 12, use_cache=use_cache, **call), seen))
    (with_caches, cached), (without, uncached) = runs
    assert torch.equal(with_caches, without)
    assert [shape for shape, _ in cached] == [(4, 7)] + (len(uncached) - 1) * [(4, 1)]
    for n, ((_, a), (_, b)) in enumerate(zip(cached, uncached, strict=True)):
        a = a[range(4), lengths - 1] if n == 0 else a[:, -1]
        torch.testing.assert_close(a, b[range(4), lengths - 1 + n], rtol=0, atol=1e-10)


def test_a_model_whose_attention_cannot_be_asked_row_by_row_rereads_and_is_right():
    class Closed:
        """A model with caches and without parts."""

        def __init__(self):
            self.model, self.config, self.caches = tiny(), tiny().config, 0

        def __call__(self, ids, *, cache=None):
            return self.model(ids, cache=cache)

        def new_cache(self, *sizes):
            self.caches += 1
            return self.model.new_cache(*sizes)

    model, lengths = Closed(), torch.tensor([4, 1, 7])
    assert torch.equal(generate(model, text(), 9), generate(tiny(), text(), 9))
    assert model.caches == 1
    got = generate(model, text(), 9, lengths=lengths)
    assert torch.equal(got, generate(tiny(), text(), 9, lengths=lengths))
    assert model.caches == 1


def test_attention_of_the_model_s_own_stays_its_own_in_rows_of_different_length():
    """A window of three positions, say: the cached rows must not become causal over all."""

    def window(q, k, v, dropout):
        T, S = q.shape[2], k.shape[2]
        i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
        scores = (q @ k.mT / math.sqrt(k.shape[3])).masked_fill((j > i) | (j <= i - 3), -inf)
        return scores.softmax(-1) @ v

    model, lengths = attending(tiny(), window), torch.tensor([4, 1, 7])
    got = generate(model, text(), 9, lengths=lengths)
    assert torch.equal(got, generate(model, text(), 9, lengths=lengths, use_cache=False))
    assert not torch.equal(got, generate(tiny(), text(), 9, lengths=lengths))


def test_what_stands_in_a_slot_that_nobody_has_filled_has_no_influence(monkeypatch):
    def poisoned(self, *args):
        keep(self, *args)
        for buffer in self.buffers:
            buffer.fill_(math.nan)

    keep, lengths = Cache.__init__, torch.tensor([4, 1, 7])
    want = [generate(tiny(), text(), 9, lengths=n) for n in (None, lengths)]
    monkeypatch.setattr(Cache, "__init__", poisoned)
    for n, expected in zip((None, lengths), want, strict=True):
        assert torch.equal(generate(tiny(), text(), 9, lengths=n), expected)


def test_lengths_that_are_all_full_change_nothing():
    model, ids = tiny(), text()
    assert torch.equal(
        generate(model, ids, 5, lengths=torch.tensor([7, 7, 7])), generate(model, ids, 5)
    )


def test_with_an_end_all_that_stands_behind_a_row_is_the_end():
    ids = torch.tensor([[3, 4, 5], [7, 0, 0], [1, 0, 0]])
    out = generate(Clock(), ids, 2, eos=8, lengths=torch.tensor([3, 1, 1]))
    assert out.tolist() == [[3, 4, 5, 6, 7], [7, 8, 8, 8, 8], [1, 2, 3, 8, 8]]


# The model


def test_the_model_reads_in_eval_mode_and_every_part_gets_its_mode_back():
    model = tiny(dropout=0.5).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(generate(model, text(), 5), generate(tiny(), text(), 5))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="eos is 61"):
        generate(model, text(), 5, eos=61)
    assert [module.training for module in model.modules()] == modes


def test_no_gradient_is_recorded():
    seen = []

    def model(ids):
        seen.append(tiny()(ids))
        return seen[-1]

    generate(model, text(), 2)
    assert not any(x.requires_grad for x in seen)


def test_text_may_fill_all_positions_and_no_more():
    ids = text(T=20)
    for lengths in (None, torch.tensor([20, 3, 4])):
        assert generate(tiny(), ids, 4, lengths=lengths).shape == (3, 24)  # the last is never read
        with pytest.raises(ValueError, match="5 new tokens take 24 positions, but max_len is 23"):
            generate(tiny(), ids, 5, lengths=lengths)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"ids": torch.zeros(2, 0).long()}, r"\(2, 0\)"),
        ({"ids": torch.zeros(0, 2).long()}, r"\(0, 2\)"),
        ({"ids": torch.zeros(3).long()}, r"\(3,\)"),
        ({"ids": torch.zeros(3, 4)}, "float32"),
        ({"ids": text() + 61}, "vocab_size is 61"),
        ({"n_new": -1}, "n_new .* -1"),
        ({"eos": 61}, "eos is 61, but there are 61 words"),
        ({"eos": -1}, "eos is -1"),
        ({"lengths": torch.tensor([7, 0, 3])}, r"1 to 7, got \[7, 0, 3\]"),
        ({"lengths": torch.tensor([7, 8, 3])}, r"1 to 7, got \[7, 8, 3\]"),
        ({"lengths": torch.tensor([7, 3])}, r"shape \(3,\), got torch.int64 \(2,\)"),
        ({"lengths": torch.tensor([7.0, 3.0, 1.0])}, "float32"),
        ({"lengths": torch.tensor([True, True, True])}, "bool"),
        ({"model": lambda ids: torch.randn(3, 61)}, r"\(3, 7\) gave \(3, 61\)"),
        ({"model": lambda ids: torch.randn(3, 6, 61)}, r"\(3, 7\) gave \(3, 6, 61\)"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(settings, said, unchecked):
    call = {"model": tiny(), "ids": text(), "n_new": 2}
    with pytest.raises(ValueError, match=said):
        generate(**call | settings)


# Prompts read ahead


class Counting(GPT):
    """How many tokens it was given, in which portions."""

    def forward(self, ids, *, cache=None):
        self.read = [*getattr(self, "read", []), tuple(ids.shape)]
        return super().forward(ids, cache=cache)


def counting():
    model = tiny()
    model.__class__ = Counting
    return model


def own(model, B=3, room=23):
    return Contiguous(2, B, 3, room, 11, dtype=f64)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("already", [0, 4])
def test_a_prompt_is_read_in_any_portions_with_one_result(chunk, already):
    model, ids = counting(), text(T=already + 7)
    cache = model.new_cache(3, 20)
    if already:
        prefill(model, ids[:, :already], cache)
    model.read = []
    logits = prefill(model, ids[:, already:], cache, chunk=chunk)
    torch.testing.assert_close(logits, tiny()(ids)[:, -1], rtol=0, atol=1e-10)
    assert cache.length == already + 7 and not logits.requires_grad
    sizes = [n for _, n in model.read]
    assert sum(sizes) == 7 and all(n == (chunk or 7) for n in sizes[:-1])
    new = torch.tensor([[3], [4], [5]])
    torch.testing.assert_close(
        model(new, cache=cache), tiny()(torch.cat([ids, new], 1))[:, -1:], rtol=0, atol=1e-10
    )


def test_the_model_reads_ahead_in_eval_mode():
    model = tiny(dropout=0.5).train()
    got = prefill(model, text(), own(model))
    torch.testing.assert_close(got, tiny()(text())[:, -1], rtol=0, atol=1e-10)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"chunk": 0}, "chunk must be a positive integer, got 0"),
        ({"chunk": 2.0}, "got 2.0"),
        ({"ids": text()[:, :0]}, r"\(3, 0\)"),
        ({"ids": text()[0]}, r"\(7,\)"),
        ({"ids": text().double()}, "float64"),
        ({"ids": text() * torch.tensor([1, 1, 1, 1, 1, 1, 99])}, "vocab_size is 61"),
        ({"ids": text(B=2)}, "2 rows|must be"),
        ({"ids": text(T=22)}, "24 positions, but max_len is 23"),
        ({"cache": "small"}, "up to|room|slots"),
    ],
)
@pytest.mark.parametrize("kind", [Cache, Contiguous])
def test_a_refused_reading_leaves_the_cache_as_it_was(kind, settings, said, unchecked):
    model = tiny()
    room = 5 if settings.get("cache") else 23
    cache = model.new_cache(3, room) if kind is Cache else own(model, room=room)
    ids = text(T=2, random_seed=8)
    prefill(model, ids, cache)
    call = {"ids": text(), "chunk": 2} | {k: v for k, v in settings.items() if k != "cache"}
    with pytest.raises(ValueError, match=said):
        prefill(model, cache=cache, **call)
    assert cache.length == 2
    new = torch.tensor([[3], [4], [5]])
    torch.testing.assert_close(
        model(new, cache=cache), model(torch.cat([ids, new], 1))[:, -1:], rtol=0, atol=1e-10
    )


def test_what_cannot_fit_is_refused_before_anything_is_read():
    model, cache = counting(), Rolling(2, 3, 3, 4, 11, dtype=f64)  # which could not be cut back
    with pytest.raises(ValueError, match="24 positions, but max_len is 23"):
        prefill(model, text(T=24), cache, chunk=5)
    assert cache.length == 0 and not hasattr(model, "read")
    prefill(model, text(T=20), cache, chunk=5)
    with pytest.raises(ValueError, match="24 positions, but max_len is 23"):
        prefill(model, text(T=4), cache, chunk=1)
    assert cache.length == 20


@pytest.mark.parametrize("kind", [Cache, Contiguous])
def test_a_talk_goes_on_without_reading_its_past_again(kind):
    model = counting()
    cache = model.new_cache(3, 23) if kind is Cache else own(model)
    first = generate(model, text(), 4, cache=cache)
    assert cache.length == 10 and torch.equal(first, generate(tiny(), text(), 4))
    answered = torch.cat([first, text(T=3, random_seed=9)], 1)
    model.read = []
    second = generate(model, answered, 5, cache=cache)
    assert torch.equal(second, generate(tiny(), answered, 5))
    assert model.read == [(3, 4), *4 * [(3, 1)]]
    cache.truncate(6)  # back into the first question, for another answer to it
    model.read, how = [], {"temperature": 2.0}
    got = generate(model, text(), 4, cache=cache, generator=seeded(), **how)
    assert torch.equal(got, generate(tiny(), text(), 4, generator=seeded(), **how))
    assert model.read == 4 * [(3, 1)]


def test_many_continuations_of_one_prompt_read_it_once():
    model, ids = counting(), text(B=1, T=10)
    pool = PagedKVCache(2, 3, 11, page_len=4, n_pages=20, dtype=f64)
    root = pool.new()
    prefill(model, ids[:, :-1], Paged(pool, [root]))
    before, model.read = pool.free_pages, []
    forks = Paged(pool, [pool.fork(root) for _ in range(5)])
    how = {"temperature": 2.0, "generator": seeded()}
    got = generate(model, ids.expand(5, 10), 6, cache=forks, **how)
    how["generator"] = seeded()
    assert torch.equal(got, generate(tiny(), ids.expand(5, 10), 6, **how))
    assert len({tuple(row.tolist()) for row in got}) > 1
    assert model.read == 6 * [(5, 1)]  # and nine tokens once, before
    # 9 + 6 positions are four pages, two of which are shared.
    assert pool.free_pages == before - 5 * 2


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"lengths": torch.tensor([7, 3, 2])}, "prompts of one length"),
        ({"use_cache": False}, "goes with use_cache"),
        ({"ids": text(T=2)}, "has read 2 tokens of a prompt of 2"),
        ({"ids": text(T=1)}, "has read 2 tokens of a prompt of 1"),
        ({"eos": 61}, "eos is 61"),
        ({"n_new": 18}, "24 positions, but max_len is 23"),
        ({"n_new": 9, "temperature": -1.0}, "temperature"),
    ],
)
def test_a_refused_generation_leaves_the_cache_as_it_was(settings, said):
    model = tiny()
    cache = own(model)
    prefill(model, text()[:, :2], cache)
    with pytest.raises(ValueError, match=said):
        generate(model, **{"ids": text(), "n_new": 4, "cache": cache} | settings)
    assert cache.length == 2
    got = generate(model, text(), 4, cache=cache)
    assert torch.equal(got, generate(model, text(), 4))


def test_a_cache_that_runs_full_is_cut_back_to_where_it_was():
    model = tiny()
    cache = own(model, room=8)
    with pytest.raises(ValueError):
        generate(model, text(), 4, cache=cache)
    assert cache.length == 0 and cache.filled == [0, 0]
    assert torch.equal(generate(model, text(), 2, cache=cache), generate(model, text(), 2))


def test_a_rolling_cache_serves_a_model_with_a_window():
    def window(q, k, v, dropout):
        T, S = q.shape[2], k.shape[2]
        i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
        scores = (q @ k.mT / math.sqrt(k.shape[3])).masked_fill((j > i) | (j <= i - 5), -inf)
        return scores.softmax(-1) @ v

    model, cache = attending(tiny(), window), Rolling(2, 3, 3, 5, 11, dtype=f64)
    want = generate(model, text(), 12, use_cache=False)
    assert torch.equal(generate(model, text(), 12, cache=cache), want)


# Another attention


def test_a_twin_attends_otherwise_and_the_model_does_not_notice():
    model, ids = tiny(), text()
    before = model(ids)

    def plain(q, k, v, dropout):
        scores = (q[..., None, :] * k[..., None, :, :]).sum(-1) / math.sqrt(k.shape[-1])
        late = torch.ones(q.shape[2], k.shape[2]).triu(1 + k.shape[2] - q.shape[2]).bool()
        return scores.masked_fill(late, -inf).softmax(-1) @ v

    other = attending(model, plain)
    torch.testing.assert_close(other(ids), before, rtol=0, atol=1e-10)
    mean = attending(model, lambda q, k, v, dropout: v.mean(2, keepdim=True).expand_as(q))
    assert (mean(ids) - before).abs().max() > 0.1
    assert torch.equal(model(ids), before)
    assert all(block.attn.attend is causal for block in model.blocks)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(generate(other, ids, 9), generate(model, ids, 9))


def test_a_model_without_a_door_for_another_attention_is_refused():
    with pytest.raises(ValueError, match="no part of this Clock has an `attend`"):
        attending(Clock(), causal)


# Beam search


def tree(chances):
    """A score from a table {what was said: chances of the next word}, the start left out."""

    def score(ids, rows):
        return torch.stack([torch.tensor(chances[tuple(x[1:])], dtype=f64) for x in ids.tolist()])

    return lambda ids, rows: score(ids, rows).log()


def random_tree(V, random_seed):
    """Chances that depend on the whole text so far and on the row."""
    tables = {}

    def score(ids, rows):
        for key in zip(rows.tolist(), map(tuple, ids.tolist()), strict=True):
            if key not in tables:
                draw = seeded(hash((random_seed, *key[1], key[0])) % 2**31)
                tables[key] = 2 * torch.randn(V, generator=draw, dtype=f64)
        keys = zip(rows.tolist(), map(tuple, ids.tolist()), strict=True)
        return torch.stack([tables[key] for key in keys])

    return score


def everything(score, row, start, n_new, V, eos, alpha):
    """Every text that ends or has n_new words, with its score; the best first."""
    found, alive = [], [(start, 0.0)]
    for n in range(1, n_new + 1):
        longer = []
        for said, total in alive:
            p = score(torch.tensor([said]), torch.tensor([row]))[0].log_softmax(0)
            for word in range(V):
                text = ([*said, word], total + p[word].item())
                (found if word == eos else longer).append((*text, n))
        alive = [(said, total) for said, total, _ in longer]
    found += [(said, total, n_new) for said, total in alive]
    scored = [(total / ((5 + n) / 6) ** alpha, said) for said, total, n in found]
    return sorted(scored, key=lambda pair: -pair[0])


def slow_beam(score, row, start, n_new, V, eos, alpha, width):
    """The docstring in lists, one text after the other, that never stops early."""
    aside, alive = [], [(0.0, start)]
    for n in range(1, n_new + 1):
        tried = []
        for total, said in alive:
            p = score(torch.tensor([said]), torch.tensor([row]))[0].log_softmax(0)
            tried += [(total + p[word].item(), [*said, word]) for word in range(V)]
        tried.sort(key=lambda pair: -pair[0])
        aside += [
            (s / ((5 + n) / 6) ** alpha, said) for s, said in tried[:width] if said[-1] == eos
        ]
        alive = [pair for pair in tried if pair[1][-1] != eos][:width]
    aside += [(s / ((5 + n_new) / 6) ** alpha, said) for s, said in alive]
    return sorted(aside, key=lambda pair: -pair[0])[:width]


GREEDY_IS_WRONG = {  # words: 0 the end, 1 a, 2 b
    (): [0, 3 / 5, 2 / 5],
    (1,): [1 / 3, 1 / 3, 1 / 3],
    (2,): [9 / 10, 1 / 20, 1 / 20],
}


def test_the_best_first_word_need_not_begin_the_best_text():
    start, score = torch.tensor([[7]]), tree(GREEDY_IS_WRONG)
    greedy, its_score = beam(score, start, 2, width=1, eos=0)
    assert greedy.tolist() == [[[7, 1, 0]]]
    assert math.exp(its_score.item()) == pytest.approx(1 / 5, abs=1e-12)
    both, scores = beam(score, start, 2, width=2, eos=0)
    assert both.tolist() == [[[7, 2, 0], [7, 1, 0]]]
    assert scores.exp().tolist()[0] == pytest.approx([9 / 25, 1 / 5], abs=1e-12)


def test_the_length_penalty_is_that_of_wu_et_al():
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 1.0) == 2
    assert length_penalty(19, 0.5) == pytest.approx(2, abs=1e-12)
    assert length_penalty(30, 0.0) == 1


def test_with_a_length_penalty_a_longer_text_may_win():
    """ln 1/2 = -0.69 against ln 1/3 = -1.10 over (7/6)^alpha: even at alpha = 3."""
    chances = {(): [1 / 2, 1 / 2], (1,): [2 / 3, 1 / 3]}
    turn = math.log(math.log(3) / math.log(2)) / math.log(7 / 6)  # 2.99
    for alpha, want in ((0.0, [0, 0]), (turn - 0.01, [0, 0]), (turn + 0.01, [1, 0])):
        ids, scores = beam(tree(chances), torch.tensor([[7]]), 2, width=2, eos=0, alpha=alpha)
        assert ids[0, 0, 1:].tolist() == want
        assert scores[0, 0] >= scores[0, 1]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("eos", [2, None])
def test_a_beam_that_drops_nothing_finds_the_best_of_all(alpha, eos):
    V, n_new, start = 3, 4, torch.tensor([[2, 1], [0, 2]])
    score = random_tree(V, 0)
    ids, scores = beam(score, start, n_new, width=V**n_new, eos=eos, alpha=alpha)
    for row in range(2):
        want = everything(score, row, start[row].tolist(), n_new, V, eos, alpha)
        assert scores[row, : len(want)].tolist() == pytest.approx([s for s, _ in want], abs=1e-12)
        assert (scores[row, len(want) :] == -inf).all()
        for said, (_, text) in zip(ids[row].tolist(), want, strict=False):
            assert said == text + [eos] * (2 + n_new - len(text))


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_stopping_early_changes_nothing(width, alpha):
    start = torch.tensor([[1], [3], [0], [2], [1]])
    for random_seed in range(6):
        score = random_tree(4, random_seed)
        ids, scores = beam(score, start, 6, width=width, eos=0, alpha=alpha)
        for row in range(5):
            want = slow_beam(score, row, start[row].tolist(), 6, 4, 0, alpha, width)
            assert scores[row, : len(want)].tolist() == pytest.approx(
                [s for s, _ in want], abs=1e-12
            )
            assert [x[: len(y)] for x, (_, y) in zip(ids[row].tolist(), want, strict=False)] == [
                text for _, text in want
            ]


def test_a_row_comes_out_of_a_batch_as_if_alone():
    score, start = random_tree(4, 9), torch.tensor([[1], [3], [0]])
    ids, scores = beam(score, start, 5, width=3, eos=0, alpha=0.6)
    for row in range(3):
        alone = beam(
            lambda ids, rows, row=row: score(ids, rows + row),
            start[row : row + 1],
            5,
            width=3,
            eos=0,
            alpha=0.6,
        )
        assert torch.equal(ids[row], alone[0][0]) and torch.equal(scores[row], alone[1][0])


@pytest.mark.parametrize("eos", [None, 8])
def test_one_beam_is_greedy(eos):
    model, ids = tiny(), text()
    greedy = generate(model, ids, 12, eos=eos)
    found, scores = beam(lambda ids, rows: model(ids)[:, -1], ids, 12, width=1, eos=eos)
    assert torch.equal(found[:, 0], greedy)
    p = model(greedy)[:, 6:-1].log_softmax(-1).gather(2, greedy[:, 7:, None])[:, :, 0]
    ends = greedy[:, 7:] == (-1 if eos is None else eos)
    before = ends.cumsum(1) <= ends  # the first end counts too
    torch.testing.assert_close(scores[:, 0], (p * before).sum(1), atol=1e-10, rtol=0)


def test_nobody_asks_about_a_text_that_has_ended_or_lost():
    asked = []

    def score(ids, rows):
        asked.append((ids.shape[0], rows.tolist()))
        ending = torch.tensor([[5.0, 1.0, 0.0], [0.0, 5.0, 1.0]], dtype=f64)
        return ending[rows]

    beam(score, torch.tensor([[1], [1]]), 4, width=2, eos=0)
    assert asked[0] == (2, [0, 1])  # one text a start
    assert asked[1] == (4, [0, 0, 1, 1])
    assert asked[2][1] == [1, 1]  # nothing can overtake the first start's endings


def test_no_new_words_leave_the_start():
    ids, scores = beam(random_tree(4, 0), torch.tensor([[1, 3]]), 0, width=2, eos=0)
    assert ids.tolist() == [[[1, 3], [1, 3]]] and scores.tolist() == [[0, -inf]]


def test_a_language_of_one_word_has_one_text():
    ids, scores = beam(lambda ids, rows: ids[:, :1] * 0.0, text()[:1], 2, width=3, eos=None)
    assert scores.tolist() == [[0, -inf, -inf]] and ids[0, 0, -2:].tolist() == [0, 0]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"start": torch.zeros(2, 3)}, "float32"),
        ({"start": torch.zeros(2, 0).long()}, r"\(2, 0\)"),
        ({"n_new": -1}, "n_new .* -1"),
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"width": 2.0}, "got 2.0"),
        ({"alpha": -0.1}, "alpha must be 0 or more and finite, got -0.1"),
        ({"alpha": math.nan}, "got nan"),
        ({"eos": 4}, "eos is 4, but there are 4 words"),
        ({"score": lambda ids, rows: torch.zeros(len(ids), 3, 4)}, r"\(1, 2\) gave \(1, 3, 4\)"),
        ({"score": lambda ids, rows: torch.zeros(3, 4)}, r"gave \(3, 4\)"),
        ({"score": lambda ids, rows: torch.full((len(ids), 4), math.nan)}, "NaN"),
        ({"score": lambda ids, rows: torch.full((len(ids), 4), -inf)}, "all -inf"),
    ],
)
def test_a_search_that_cannot_be_is_refused(settings, said, unchecked):
    call = {"score": random_tree(4, 0), "start": torch.tensor([[1, 3]]), "n_new": 3}
    with pytest.raises(ValueError, match=said):
        beam(**call | {"width": 2, "eos": 0} | settings)
