"""heed.models.transformer: against torch's, row by row against itself, and against what leaks."""

import pytest
import torch
from torch import nn

from heed import masks
from heed.attention import weights
from heed.checks import leaks
from heed.models.transformer import BEGIN, END, PAD, Transformer, TransformerConfig
from heed.positions import sinusoids
from heed.tasks.pairs import numbers

f64 = torch.float64
SIZES = {"n_source": 11, "n_target": 13, "max_len": 9, "d_model": 12, "n_heads": 4, "d_ff": 17}


def tiny(dtype=f64, **sizes):
    """All parameters drawn afresh: initial norms and biases hide mistakes."""
    model = Transformer(TransformerConfig(**SIZES | sizes)).to(dtype)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=draw, dtype=f64).to(dtype)
    return model


SOURCE = torch.tensor([[3, 4, 10, 5, 6], [7, 3, 0, 0, 0], [9, 9, 9, 3, 0]])
TARGET = torch.tensor([[1, 3, 4, 12], [1, 5, 0, 0], [1, 7, 8, 0]])


@torch.no_grad()
def theirs(model):
    """torch.nn.Transformer with the same blocks and without its two extra norms."""
    c = model.config
    d_ff = 4 * c.d_model if c.d_ff is None else c.d_ff
    blocks = (c.d_model, c.n_heads, c.n_layers, c.n_layers, d_ff)
    other = nn.Transformer(*blocks, dropout=0.0, batch_first=True)
    other = other.to(model.head.weight.dtype)
    pairs = zip(
        [*model.encoder, *model.decoder],
        [*other.encoder.layers, *other.decoder.layers],
        strict=True,
    )
    for a, b in pairs:
        for ours, name in (("attn", "self_attn"), ("cross", "multihead_attn")):
            if hasattr(a, ours):
                x, y = getattr(a, ours), getattr(b, name)
                y.in_proj_weight.copy_(torch.cat([x.q.weight, x.k.weight, x.v.weight]))
                y.in_proj_bias.copy_(torch.cat([x.q.bias, x.k.bias, x.v.bias]))
                y.out_proj.load_state_dict(x.out.state_dict())
        b.linear1.load_state_dict(a.mlp.up.state_dict())
        b.linear2.load_state_dict(a.mlp.down.state_dict())
        for norm in ("norm1", "norm2", "norm3"):
            if hasattr(a, norm):
                getattr(b, norm).load_state_dict(getattr(a, norm).state_dict())
    other.encoder.norm = other.decoder.norm = None
    return other


@pytest.mark.parametrize(
    "sizes", [{}, {"n_layers": 1, "n_heads": 2}, {"n_layers": 3, "d_ff": None}]
)
@pytest.mark.parametrize("dtype, tol", [(f64, 1e-11), (torch.float32, 1e-5)])
def test_it_is_torchs_transformer_without_the_two_extra_norms(sizes, dtype, tol):
    model = tiny(dtype, **sizes)
    other, scale = theirs(model), model.config.d_model**0.5
    with torch.no_grad():
        x = model.source(SOURCE) * scale + sinusoids(5, 12, dtype=dtype)
        y = model.target(TARGET) * scale + sinusoids(4, 12, dtype=dtype)
        ahead = torch.ones(4, 4, dtype=torch.bool).triu(1)
        hidden = {"src_key_padding_mask": SOURCE == 0, "memory_key_padding_mask": SOURCE == 0}
        want = model.head(other(x, y, tgt_mask=ahead, **hidden))
        got = model(SOURCE, TARGET)
        assert (got - want).abs().max() <= tol * max(1, want.abs().max())
        other.encoder.norm = nn.LayerNorm(12).to(dtype)
        extra = model.head(other(x, y, tgt_mask=ahead, **hidden))
        assert (extra - want).abs().max() > 0.01


def test_no_earlier_row_hears_a_later_target_word():
    model = tiny()
    source = SOURCE[:1]
    assert not leaks(lambda ids: model(source.expand(len(ids), -1), ids), TARGET[:1])

    def peeking(ids):
        several = source.expand(len(ids), -1)
        return model.decode(model.encode(several), several, ids, mask=masks.full)

    assert leaks(peeking, TARGET[:1])


def test_a_sentence_in_a_padded_batch_is_as_alone():
    model = tiny()
    together = model(SOURCE, TARGET)
    for b, (S, T) in enumerate(((5, 4), (2, 2), (4, 3))):
        alone = model(SOURCE[b : b + 1, :S], TARGET[b : b + 1, :T])[0]
        torch.testing.assert_close(together[b, :T], alone, atol=1e-10, rtol=0)


def test_order_matters_on_both_sides():
    model, source, target = tiny(), SOURCE[:1], TARGET[:1]
    shuffled = source[:, [1, 0, 2, 3, 4]]
    assert (model(source, target) - model(shuffled, target)).abs().max() > 1e-3
    other = target[:, [0, 2, 1, 3]]
    assert (model(source, target) - model(source, other))[:, -1].abs().max() > 1e-3


def test_the_maps_are_the_weights_that_the_decoder_uses():
    model = tiny()
    maps = model.align(SOURCE, TARGET)
    assert maps.shape == (2, 3, 4, 4, 5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 4, 4, dtype=f64))
    assert maps[:, 1, :, :, 2:].abs().max() == 0
    memory, block = model.encode(SOURCE), model.decoder[0]
    x = model.target(TARGET) * 12**0.5 + sinusoids(4, 12, dtype=f64)
    x = block.norm1(x + block.attn(x, mask=masks.causal))
    q, k = (
        project(y).unflatten(2, (4, 3)).transpose(1, 2)
        for project, y in ((block.cross.q, x), (block.cross.k, memory))
    )
    want = weights(q, k, masks.padding(torch.tensor([5, 2, 4])))
    torch.testing.assert_close(maps[0], want, atol=1e-12, rtol=0)
    assert not block.cross._forward_pre_hooks


def test_translating_is_the_likeliest_word_again_and_again():
    model = tiny()
    got = model.translate(SOURCE, 8)
    for b, row in enumerate(SOURCE):
        said = [BEGIN]
        while len(said) < 9 and said[-1] != END:
            logits = model(row[None, : (row > 0).sum()], torch.tensor([said]))
            said.append(int(logits[0, -1].argmax()))
        assert got[b].tolist() == said[1:] + [PAD] * (9 - len(said))


def test_nothing_is_said_after_the_end():
    model = tiny()
    model.head.weight.data[END] = 0.0
    model.decoder[-1].norm3.weight.data.zero_()
    model.decoder[-1].norm3.bias.data[:] = 1.0
    model.head.weight.data[END] = 9.0
    assert model.translate(SOURCE, 4).tolist() == [[END, PAD, PAD, PAD]] * 3


def test_dropout_works_in_training_and_is_off_when_translating():
    model = tiny(dropout=0.5)
    assert not torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))
    want, state = tiny().translate(SOURCE, 5), torch.get_rng_state()
    assert torch.equal(model.translate(SOURCE, 5), want)
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_embeddings_begin_with_variance_one_after_their_scale():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(n_source=500, n_target=500, max_len=3, d_model=100))
    for table in (model.source, model.target):
        assert abs((table.weight * 10).std().item() - 1) < 0.02


def test_it_has_as_many_parameters_as_the_plan_says():
    C, F, L = 12, 17, 2
    attention, mlp, norm = 4 * C * C + 4 * C, 2 * C * F + F + C, 2 * C
    blocks = L * (attention + mlp + 2 * norm) + L * (2 * attention + mlp + 3 * norm)
    assert sum(p.numel() for p in tiny().parameters()) == blocks + (11 + 13 + 13) * C


def test_a_short_training_learns_what_two_words_mean():
    task = numbers("german", among=range(10))
    torch.manual_seed(0)
    words = {"n_source": task.n_source, "n_target": task.n_target}
    model = Transformer(TransformerConfig(**words, max_len=4, d_model=16, n_layers=1))
    adam, draw = torch.optim.Adam(model.parameters(), lr=0.01), torch.Generator().manual_seed(0)
    for _ in range(60):
        source, target_in, target_out = task.batch(32, draw)
        logits = model(source, target_in).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, target_out.flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    source, _, target_out = task.batch(64, draw)
    assert task.exact(source, model.translate(source, 3)).all()


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"n_source": 3}, "n_source must be an integer of at least 4, got 3"),
        ({"n_target": 4.0}, "n_target must be an integer of at least 4, got 4.0"),
        ({"max_len": 0}, "max_len .* got 0"),
        ({"n_layers": 0}, "n_layers .* got 0"),
        ({"n_heads": 0}, "n_heads .* got 0"),
        ({"d_ff": 0}, "d_ff .* got 0"),
        ({"d_model": 10}, "divide into 4 heads, got 10"),
        ({"d_model": 9}, "even, .* got 9"),
        ({"dropout": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, said, unchecked):
    with pytest.raises(ValueError, match=said):
        TransformerConfig(**SIZES | sizes)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m(SOURCE.double(), TARGET), "source must be integers .* torch.float64"),
        (lambda m: m(SOURCE[0], TARGET), r"source must be integers .* \(5,\)"),
        (lambda m: m(SOURCE, TARGET[:, :0]), r"target_in must be integers .* \(3, 0\)"),
        (lambda m: m(SOURCE + 1, TARGET), "source has ids 1 to 11, but there are 11 words"),
        (lambda m: m(SOURCE, TARGET - 1), "target_in has ids -1 to 11"),
        (lambda m: m(SOURCE.flip(1), TARGET), "padding .* is on the right"),
        (lambda m: m(SOURCE, TARGET[:2]), "3 sources but 2 targets"),
        (
            lambda m: m(SOURCE.repeat(1, 2)[:1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]], TARGET[:1]),
            "10 words, but max_len is 9",
        ),
        (
            lambda m: m.decode(m.encode(SOURCE)[:, :4], SOURCE, TARGET),
            r"is \(3, 5, 12\), got \(3, 4, 12\)",
        ),
        (lambda m: m.translate(SOURCE, 10), "1 to 9, got 10"),
        (lambda m: m.translate(SOURCE, 0), "1 to 9, got 0"),
    ],
)
def test_texts_that_cannot_be_are_refused(call, said, unchecked):
    with pytest.raises(ValueError, match=said):
        call(tiny())
