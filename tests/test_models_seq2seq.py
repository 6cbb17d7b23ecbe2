"""Each variant against its equations, padding that changes nothing, greedy against forced."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from heed.attention import additive, attention
from heed.models.seq2seq import Seq2Seq, Seq2SeqConfig

f64 = torch.float64
KINDS = (None, "additive", "dot", "general")
STARTS = ("bridge", "copy", "mean", "zero")


def tiny(random_seed=0, dtype=f64, **settings):
    """Awkward sizes, and every parameter drawn afresh."""
    sizes = {"n_source": 11, "n_target": 17, "d_embed": 5, "d_model": 6}
    model = Seq2Seq(Seq2SeqConfig(**sizes | settings)).to(dtype)
    draw = torch.Generator().manual_seed(random_seed)
    for p in model.parameters():
        p.data = 0.7 * torch.randn(p.shape, generator=draw, dtype=f64).to(dtype)
    return model


def texts(B=4, S=7, T=9, random_seed=1):
    draw = torch.Generator().manual_seed(random_seed)
    source = torch.randint(3, 11, (B, S), generator=draw)
    target = torch.randint(3, 17, (B, T), generator=draw)
    target[:, 0] = 1
    return source, target


def close(a, b, atol=1e-12):
    assert a.shape == b.shape and a.isfinite().all()
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# What it computes


def gru_step(gru, x, h):
    """torch's GRU cell from its equations, one row of gates after another."""
    pre_x = x @ gru.weight_ih_l0.T + gru.bias_ih_l0
    pre_h = h @ gru.weight_hh_l0.T + gru.bias_hh_l0
    xr, xz, xn = pre_x.chunk(3, -1)
    hr, hz, hn = pre_h.chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return (1 - z) * n + z * h


def by_hand(model, source, target):
    """Logits and weights, a position at a time, from the papers' equations."""
    c, E = model.config, model.source.weight[source]
    h, states = E.new_zeros(len(source), c.d_model), []
    for x in E.unbind(1):
        h = gru_step(model.encoder, x, h)
        states.append(h)
    states = torch.stack(states, 1)
    s = {
        "bridge": lambda: torch.tanh(h @ model.bridge.weight.T + model.bridge.bias),
        "copy": lambda: h,
        "mean": lambda: states.mean(1),
        "zero": lambda: torch.zeros_like(h),
    }[c.start]()
    logits, rows = [], []
    for y in model.target.weight[target].unbind(1):
        if c.attention == "additive":
            keys, query = states @ model.key.weight.T, s @ model.query.weight.T
            context = additive(query[:, None], keys, states, model.score)[:, 0]
            unit = torch.eye(states.shape[1], dtype=f64).expand(len(source), -1, -1)
            rows.append(additive(query[:, None], keys, unit, model.score)[:, 0])
        elif c.feed:
            context = h
        if c.feed or c.attention == "additive":
            s = gru_step(model.decoder, torch.cat([y, context], -1), s)
            read = torch.cat([s, context], -1)
        else:
            s = read = gru_step(model.decoder, y, s)
        if c.attention in ("dot", "general"):
            keys = states @ model.key.weight.T if c.attention == "general" else states
            q, k, v = (x[:, None] for x in (s[:, None], keys, states))
            context = attention(q, k, v, scale=1.0)[:, 0, 0]
            rows.append(((keys @ s[..., None])[..., 0]).softmax(-1))
            read = torch.tanh(torch.cat([context, s], -1) @ model.mix.weight.T)
        logits.append(read @ model.head.weight.T + model.head.bias)
    return torch.stack(logits, 1), torch.stack(rows, 1) if rows else None


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("settings", [{"attention": kind} for kind in KINDS] + [{"feed": True}])
def test_the_logits_and_weights_are_those_of_the_papers_equations(start, settings):
    model, (source, target) = tiny(start=start, **settings), texts()
    logits, rows = by_hand(model, source, target)
    close(model(source, target), logits)
    if rows is not None:
        close(model.align(source, target), rows)


def test_the_reading_half_from_the_right_is_torchs():
    """The state at a place holds what both readers know there; the summary, both their ends."""
    model, (source, _) = tiny(bidirectional=True), texts()
    memory, x = model.encode(source), model.source(source)
    right = nn.GRU(5, 3, batch_first=True).double()
    names = [n for n, _ in right.named_parameters()]
    right.load_state_dict({n: getattr(model.encoder, n + "_reverse").detach() for n in names})
    states, last = right(x.flip(1))
    close(memory.states[:, :, 3:], states.flip(1))
    close(memory.summary[:, 3:], last[0])
    close(memory.summary[:, :3], memory.states[:, -1, :3])


@pytest.mark.parametrize("settings", [{"attention": kind} for kind in KINDS] + [{"feed": True}])
def test_gradients_are_those_of_finite_differences_and_reach_every_parameter(settings):
    model, (source, target) = tiny(**settings), texts(B=2, S=3, T=4)
    loss = model(source, target).square().mean()
    loss.backward()
    for p in model.parameters():
        assert p.grad.abs().sum() > 0
        step, middle = 1e-6 * torch.randn_like(p), p.data
        p.data = middle + step
        up = model(source, target).square().mean().item()
        p.data = middle - step
        down = model(source, target).square().mean().item()
        p.data = middle
        want = 2 * (p.grad * step).sum().item()
        assert abs(up - down - want) < 1e-5 * abs(want) + 1e-13


def test_no_step_sees_a_later_target_word():
    source, target = texts()
    for kind in KINDS:
        model = tiny(attention=kind)
        changed = target.clone()
        changed[:, 5:] = 3 + (changed[:, 5:] - 2) % 14
        before, after = model(source, target), model(source, changed)
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


def test_without_attention_and_with_a_zero_start_the_source_is_not_seen():
    model, (source, target) = tiny(start="zero"), texts()
    assert torch.equal(model(source, target), model(3 + (source - 2) % 8, target))
    model = tiny(start="zero", feed=True)
    assert not torch.isclose(model(source, target), model(3 + (source - 2) % 8, target)).any()


# Padding


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("settings", [{"attention": kind} for kind in KINDS] + [{"feed": True}])
def test_a_padded_row_is_as_if_alone(start, bidirectional, settings):
    model = tiny(start=start, bidirectional=bidirectional, **settings)
    source, target = texts()
    lengths = [7, 1, 4, 3]
    padded = torch.stack(
        [row.masked_fill(torch.arange(7) >= n, 0) for row, n in zip(source, lengths, strict=True)]
    )
    logits, written = model(padded, target), model.translate(padded, 8)
    for b, n in enumerate(lengths):
        alone = source[b : b + 1, :n]
        close(logits[b : b + 1], model(alone, target[b : b + 1]))
        assert torch.equal(written[b : b + 1], model.translate(alone, 8))
        if model.config.attention:
            weights = model.align(padded, target)[b : b + 1]
            close(weights[..., :n], model.align(alone, target[b : b + 1]))
            assert (weights[..., n:] == 0).all()
    close(model.encode(padded).states * (padded == 0)[..., None], torch.zeros(4, 7, 6, dtype=f64))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_weights_are_shares(kind):
    weights = tiny(attention=kind).align(*texts())
    close(weights.sum(-1), torch.ones(4, 9, dtype=f64))
    assert (weights > 0).all()


# Writing


@pytest.mark.parametrize("settings", [{"attention": kind} for kind in KINDS] + [{"feed": True}])
def test_what_it_writes_is_what_it_finds_likeliest_after_what_it_wrote(settings):
    model, (source, _) = tiny(**settings), texts(B=30)
    written = model.translate(source, 12)
    forced = torch.cat([torch.ones(30, 1, dtype=torch.int64), written[:, :-1]], 1)
    likeliest = model(source, forced).argmax(-1)
    ended = (written == 2).int().cumsum(1) - (written == 2).int() > 0
    assert torch.equal(written, likeliest.masked_fill(ended, 0))
    assert written.shape == (30, 12) and written.dtype == torch.int64


def test_a_row_ends_where_it_says_so_and_the_others_go_on():
    model, (source, _) = tiny(random_seed=7), texts(B=60)
    written = model.translate(source, 12)
    ends = [row.index(2) if 2 in row else 12 for row in written.tolist()]
    assert len(set(ends)) == 3, "a test of ends needs rows that end at different places"
    for row, end in zip(written.tolist(), ends, strict=True):
        assert all(word == 0 for word in row[end + 1 :])
    assert torch.equal(model.translate(source, 3), written[:, :3])


def test_translating_leaves_no_graph_and_no_change():
    model, (source, _) = tiny(attention="additive"), texts()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.translate(source, 5)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


# Sizes and learning


def parameters(**settings):
    return sum(p.numel() for p in tiny(**settings).parameters())


def test_attention_costs_three_matrices_and_a_vector_at_most():
    plain, fed, C = parameters(), parameters(feed=True), 6
    assert parameters(attention="additive") == fed + 2 * C * C + C
    assert parameters(attention="dot") == plain + 2 * C * C
    assert parameters(attention="general") == plain + 3 * C * C
    assert fed == plain + 3 * C * C + 17 * C
    assert plain == parameters(start="copy") + C * C + C


@pytest.mark.parametrize("settings", [{"attention": kind} for kind in KINDS] + [{"feed": True}])
def test_it_learns_eight_pairs_by_heart(settings):
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(n_source=11, n_target=17, d_embed=8, d_model=24, **settings))
    source, target = texts(B=8, T=5)
    right = torch.cat([target[:, 1:], torch.full((8, 1), 2)], 1)
    descend = torch.optim.Adam(model.parameters(), lr=0.02)
    first = None
    for _ in range(100):
        loss = F.cross_entropy(model(source, target).flatten(0, 1), right.flatten())
        first = first or loss.item()
        descend.zero_grad()
        loss.backward()
        descend.step()
    assert abs(first - math.log(17)) < 0.3 and loss < 0.1
    assert torch.equal(model.translate(source, 5), right)


# Nonsense


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"n_source": 3}, "n_source .* got 3"),
        ({"d_model": 0}, "d_model .* got 0"),
        ({"d_embed": 2.5}, "d_embed .* got 2.5"),
        ({"attention": "bilinear"}, "got 'bilinear'"),
        ({"start": "random"}, "got 'random'"),
        ({"feed": True, "attention": "dot"}, "'dot' brings its own"),
        ({"bidirectional": True, "d_model": 7}, "even: 7"),
    ],
)
def test_a_config_that_means_nothing_is_refused(unchecked, settings, match):
    with pytest.raises(ValueError, match=match):
        Seq2SeqConfig(**{"n_source": 11, "n_target": 17} | settings)


@pytest.mark.parametrize(
    ("source", "target", "match"),
    [
        ([[3, 0, 4]], [[1, 3]], "padding .* on the right"),
        ([[0, 0, 0]], [[1, 3]], "begins with a word"),
        ([[3, 11]], [[1, 3]], "source has ids 3 to 11, but there are 11"),
        ([[3, -1]], [[1, 3]], "source has ids -1"),
        ([[3, 4]], [[1, 17]], "target_in has ids 1 to 17"),
        ([[3, 4]], [[1, 3], [1, 3]], "1 sources but 2 targets"),
        ([3, 4], [[1, 3]], r"source must be integers \(B, T\), got torch.int64 \(2,\)"),
        ([[3.0, 4.0]], [[1, 3]], "source must be integers"),
        ([[]], [[1, 3]], "source must be"),
        ([[3, 4]], [[]], "target_in must be"),
    ],
)
def test_ids_that_mean_nothing_are_refused(unchecked, source, target, match):
    for call in (Seq2Seq.__call__, Seq2Seq.align):
        with pytest.raises(ValueError, match=match):
            call(tiny(attention="dot"), torch.tensor(source), torch.tensor(target))


def test_weights_of_a_model_without_attention_are_refused():
    with pytest.raises(ValueError, match="without attention"):
        tiny().align(*texts())


def test_a_translation_of_no_words_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        tiny().translate(texts()[0], 0)
