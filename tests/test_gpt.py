"""The GPT on two pages, held against its equations, itself with a cache, and its promises."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from heed import gpt, masks
from heed.attention import attention
from heed.gpt import GPT, GPTConfig

f64 = torch.float64
exactly = {"rtol": 0, "atol": 0}


def tiny(random_seed=0, dtype=f64, **settings):
    """Awkward sizes, and every parameter drawn afresh: ones and zeros hide a missing weight."""
    sizes = {"vocab_size": 61, "max_len": 17, "n_layers": 3, "n_heads": 3, "d_model": 33}
    model = GPT(GPTConfig(**sizes | settings)).to(dtype)
    draw = torch.Generator().manual_seed(random_seed)
    for p in model.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=draw, dtype=f64).to(dtype)
    return model.eval()


def text(B=2, T=13, random_seed=1):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(random_seed))


def close(a, b, atol):
    assert a.isfinite().all()
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# What it computes


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * layer.weight + layer.bias


def by_hand(model, ids):
    """The model again, from its equations and heed's attention."""
    B, T = ids.shape
    x = model.tokens.weight[ids] + model.positions.weight[:T]
    for block in model.blocks:
        qkv = norm(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
        q, k, v = (y.view(B, T, 3, 11).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        y = attention(q, k, v, masks.causal).transpose(1, 2).reshape(B, T, 33)
        x = x + y @ block.attn.out.weight.T + block.attn.out.bias
        y = norm(x, block.norm2) @ block.mlp.up.weight.T + block.mlp.up.bias
        y = y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ block.mlp.down.weight.T + block.mlp.down.bias
    return norm(x, model.norm) @ model.tokens.weight.T


def test_the_file_fits_on_two_pages():
    lines = Path(gpt.__file__).read_text("utf8").splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 220


def test_the_whole_model_is_its_equations():
    model, ids = tiny(), text()
    close(model(ids), by_hand(model, ids), 1e-10)


@pytest.mark.parametrize("width", [1, 11, 64])
def test_scores_are_divided_by_the_root_of_the_head_width(width):
    layer = gpt.Attention(GPTConfig(vocab_size=2, max_len=9, n_heads=2, d_model=2 * width)).to(f64)
    x = torch.randn(2, 9, 2 * width, dtype=f64)
    qkv = layer.qkv(x).chunk(3, dim=-1)
    q, k, v = (y.view(2, 9, 2, width).transpose(1, 2) for y in qkv)
    want = attention(q, k, v, masks.causal, scale=1 / math.sqrt(width))
    close(layer(x), layer.out(want.transpose(1, 2).reshape(x.shape)), 1e-12)


def test_another_attention_fits_in():
    def sdpa(q, k, v, dropout):
        assert dropout.p == 0.25
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model = GPT(GPTConfig(vocab_size=61, max_len=17, d_model=36, dropout=0.25)).eval()
    want = model(text())
    for block in model.blocks:
        block.attn.attend = sdpa
    assert (model(text()) - want).abs().max() < 1e-5
    block.attn.attend = lambda q, k, v, dropout: v
    assert (model(text()) - want).abs().max() > 1e-3


def test_the_past_does_not_move_when_the_future_changes():
    model, ids = tiny(), text()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], **exactly)
    assert (after[:, 7:] != before[:, 7:]).any(-1).all()


def test_every_position_hears_every_earlier_one():
    model, ids = tiny(), text(B=1)
    for j in range(13):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % 61
        assert (model(changed) - model(ids)).abs().amax(-1)[0, j:].min() > 1e-6


def test_a_block_that_writes_nothing_leaves_the_stream_alone():
    block, x = tiny().blocks[0], torch.randn(2, 13, 33, dtype=f64)
    for layer in (block.attn.out, block.mlp.down):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    torch.testing.assert_close(block(x), x, **exactly)


def test_an_empty_text_has_empty_logits():
    assert tiny()(text(T=0)).shape == (2, 0, 61)


# What it is made of


def test_the_smallest_gpt2_has_its_published_size():
    with torch.device("meta"):
        model = GPT(GPTConfig.gpt2())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_the_head_is_the_token_table_itself():
    model = GPT(GPTConfig(vocab_size=61, max_len=17))
    assert model.head.weight is model.tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert "tokens.weight" in names and "head.weight" not in names
    F.cross_entropy(model(text()).flatten(0, 1), text().flatten()).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model.head.weight is model.tokens.weight


def test_it_starts_as_gpt2_does():
    model = GPT(GPTConfig(vocab_size=997, max_len=499, n_layers=8, d_model=128))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            last = name.endswith(("out.weight", "down.weight"))
            want = 0.02 / math.sqrt(16) if last else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.03), name
            assert abs(p.mean().item()) < 4 * want / math.sqrt(p.numel()), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_its_first_loss_is_that_of_a_blind_guess():
    for vocab_size in (11, 61, 997):
        model = GPT(GPTConfig(vocab_size=vocab_size, max_len=64))
        ids = torch.randint(vocab_size, (32, 65))
        assert gpt.loss(model(ids[:, :-1]), ids[:, 1:]).item() == pytest.approx(
            math.log(vocab_size), rel=0.02
        )


def test_it_learns_one_batch_by_heart():
    model, ids = GPT(GPTConfig(vocab_size=61, max_len=17)), text(B=4, T=17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        now = gpt.loss(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        now.backward()
        optimizer.step()
    assert now.item() < 0.02


# Dropout


def test_dropout_is_silent_in_eval_mode():
    model, ids = tiny(dropout=0.5), text()
    torch.testing.assert_close(model(ids), tiny()(ids), **exactly)


def test_dropout_in_training_is_decided_by_the_seed():
    model, ids, outs = tiny(dropout=0.5).train(), text(), []
    for random_seed in (3, 3, 4):
        torch.manual_seed(random_seed)
        outs.append(model(ids))
    torch.testing.assert_close(outs[0], outs[1], **exactly)
    assert not torch.equal(outs[0], outs[2])


def test_dropout_sits_where_gpt2_has_it():
    """On the embeddings, and in each block on the weights, after `out` and after the MLP."""
    model, shapes = tiny(dropout=0.5).train(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda _, x, y: shapes.append(tuple(y.shape)))
    model(text())
    assert shapes == [(2, 13, 33)] + 3 * [(2, 3, 13, 13), (2, 13, 33), (2, 13, 33)]


# The cache


def poisoned(model, B=2, max_len=None):
    """A cache whose unused slots would ruin everything they touch."""
    cache = model.new_cache(B, max_len)
    for buffer in cache.buffers:
        buffer.fill_(torch.nan)
    return cache


@torch.no_grad()
def in_chunks(model, ids, sizes, cache):
    return torch.cat([model(part, cache=cache) for part in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("sizes", [[13], 13 * [1], [12, 1], [1, 12], [5, 1, 4, 3], [4, 0, 9]])
def test_a_text_read_in_any_chunks_gives_the_same_logits(sizes):
    model, ids = tiny(), text()
    cache = poisoned(model)
    close(in_chunks(model, ids, sizes, cache), model(ids), 1e-10)
    assert cache.length == 13


def test_a_cache_holds_max_len_positions_or_as_many_as_asked():
    model = tiny()
    assert model.new_cache(2).buffers[0].shape == (2, 2, 3, 17, 11)
    ids = text(T=5)
    close(in_chunks(model, ids, [2, 3], poisoned(model, max_len=5)), model(ids), 1e-10)


def test_a_cache_cut_back_goes_on_as_if_it_had_read_no_more():
    model, ids, other = tiny(), text(), text(random_seed=2)
    cache = poisoned(model)
    in_chunks(model, other, [13], cache)
    cache.truncate(4)
    mixed = torch.cat([other[:, :4], ids[:, 4:]], dim=1)
    close(in_chunks(model, ids[:, 4:], [3, 6], cache), model(mixed)[:, 4:], 1e-10)
    cache.truncate(0)
    close(in_chunks(model, ids, [13], cache), model(ids), 1e-10)


def test_reordered_rows_go_on_from_what_their_new_row_has_read():
    model, ids = tiny(), text(B=3)
    cache = poisoned(model, B=3)
    in_chunks(model, ids[:, :6], [6], cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    mixed = torch.cat([ids[rows, :6], ids[:, 6:]], dim=1)
    close(in_chunks(model, ids[:, 6:], [7], cache), model(mixed)[:, 6:], 1e-10)


REFUSED_BY_A_CACHE = {
    "a ninth position": (lambda m, c: m(text(T=4), cache=c), "up to 9: the cache has 2 rows of 8"),
    "three rows": (lambda m, c: m(text(B=3, T=1), cache=c), "3 rows up to 6: the cache has 2"),
    "an unknown word": (lambda m, c: m(text(T=1) + 61, cache=c), "vocab_size is 61"),
    "keeping more than there is": (lambda m, c: c.truncate(6), "6 of 5"),
    "keeping less than nothing": (lambda m, c: c.truncate(-1), "-1 of 5"),
    "a row too many": (lambda m, c: c.reorder(torch.tensor([0, 1, 1])), "2 integers below 2"),
    "a row that is not there": (lambda m, c: c.reorder(torch.tensor([0, 2])), r"\[0, 2\]"),
    "a negative row": (lambda m, c: c.reorder(torch.tensor([-1, 0])), r"\[-1, 0\]"),
    "rows as floats": (lambda m, c: c.reorder(torch.tensor([0.0, 1.0])), "integers"),
    "rows as answers": (lambda m, c: c.reorder(torch.tensor([True, False])), "integers"),
}


@pytest.mark.parametrize("name", REFUSED_BY_A_CACHE)
def test_a_refused_call_leaves_the_cache_as_it_was(name, unchecked):
    model, ids = tiny(), text(T=8)
    cache = poisoned(model, max_len=8)
    in_chunks(model, ids[:, :5], [5], cache)
    held = [buffer.clone() for buffer in cache.buffers]
    call, said = REFUSED_BY_A_CACHE[name]
    with pytest.raises(ValueError, match=said):
        call(model, cache)
    for before, after in zip(held, cache.buffers, strict=True):
        torch.testing.assert_close(after, before, **exactly, equal_nan=True)
    close(in_chunks(model, ids[:, 5:], [3], cache), model(ids)[:, 5:], 1e-10)


def test_a_cache_without_room_is_refused():
    for B, max_len in [(0, 5), (2, 0), (-1, 5)]:
        with pytest.raises(ValueError, match=f"batch {B} and length {max_len}"):
            tiny().new_cache(B, max_len)


# What it refuses


@pytest.mark.parametrize(
    "ids, said",
    [
        (torch.tensor([[3, 61]]), "ids 3 to 61, but vocab_size is 61"),
        (torch.tensor([[3, -1]]), "ids -1 to 3"),
        (torch.tensor([[1.0, 2.0]]), "float32"),
        (torch.tensor([[True]]), "bool"),
        (torch.tensor([1, 2]), r"\(2,\)"),
        (torch.zeros(1, 1, 2).long(), r"\(1, 1, 2\)"),
        (torch.zeros(1, 18).long(), "18 positions, but max_len is 17"),
    ],
)
def test_ids_that_are_no_text_are_refused(ids, said, unchecked):
    with pytest.raises(ValueError, match=said):
        tiny()(ids)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"d_model": 32}, "d_model 32 does not divide into 3 heads"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_layers": -1}, "n_layers .* got -1"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"max_len": 2.5}, "max_len .* 2.5"),
        ({"d_model": 0}, "d_model"),
        ({"dropout": 1.0}, "dropout .* 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": math.nan}, "dropout .* nan"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, said, unchecked):
    sizes = {"vocab_size": 61, "max_len": 17, "n_layers": 3, "n_heads": 3, "d_model": 33}
    with pytest.raises(ValueError, match=said):
        GPTConfig(**sizes | settings)


# Loss and sampling


def test_the_loss_is_the_mean_surprise_of_the_targets_that_count():
    logits, targets = torch.randn(2, 5, 7, dtype=f64), torch.randint(7, (2, 5))
    targets[0, :3] = -100
    p = logits.softmax(-1)
    rows = [(b, t) for b in range(2) for t in range(5) if targets[b, t] != -100]
    want = -sum(math.log(p[b, t, targets[b, t]]) for b, t in rows) / 7
    assert gpt.loss(logits, targets).item() == pytest.approx(want, abs=1e-14)


def test_the_loss_of_half_precision_is_made_in_float32():
    logits, targets = torch.randn(2, 5, 7).bfloat16(), torch.randint(7, (2, 5))
    assert gpt.loss(logits, targets).dtype == torch.float32
    torch.testing.assert_close(gpt.loss(logits, targets), gpt.loss(logits.float(), targets))


def test_a_loss_over_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to average"):
        gpt.loss(torch.randn(2, 5, 7), torch.full((2, 5), -100))


def test_greedy_text_is_the_likeliest_token_again_and_again():
    model, ids = tiny(), text(T=4)
    want = ids
    for _ in range(6):
        want = torch.cat([want, model(want)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, 6), want)
    assert torch.equal(model.generate(ids, 0), ids)


def test_drawn_text_follows_the_softmax_at_its_temperature():
    model, ids, n = tiny(), text(B=1, T=4), 4000
    drawn = model.generate(
        ids.expand(n, 4), 1, temperature=1.5, generator=torch.Generator().manual_seed(0)
    )
    expected = n * (model(ids)[0, -1] / 1.5).softmax(-1)
    found = drawn[:, 4].bincount(minlength=61)
    many = expected >= 5
    chi2 = ((found - expected).square() / expected)[many].sum().item()
    df = int(many.sum())
    assert df > 5 and chi2 < df + 6 * math.sqrt(2 * df)


def test_a_generator_decides_what_is_drawn():
    model, ids = tiny(), text(T=4)
    a, b, c = (
        model.generate(ids, 9, temperature=1.0, generator=torch.Generator().manual_seed(n))
        for n in (3, 3, 4)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_generating_gives_the_mode_back_even_when_it_fails():
    model = tiny(dropout=0.5)
    assert torch.equal(model.train().generate(text(T=4), 6), tiny().generate(text(T=4), 6))
    assert model.training
    with pytest.raises(ValueError, match="max_len is 17"):
        model.generate(text(T=4), 15)
    assert model.training


def test_generating_records_no_gradient():
    model, seen = tiny(), []
    model.head.register_forward_hook(lambda _, x, logits: seen.append(logits.requires_grad))
    model.generate(text(T=4), 3)
    assert seen == 3 * [False]


@pytest.mark.parametrize(
    "T, n_new, temperature, said",
    [
        (0, 1, 0.0, r"\(2, 0\)"),
        (3, -1, 0.0, "-1 new"),
        (3, 1, -1.0, "-1.0"),
        (3, 1, math.nan, "nan"),
    ],
)
def test_generating_from_nothing_or_with_bad_numbers_is_refused(T, n_new, temperature, said):
    with pytest.raises(ValueError, match=said):
        tiny().generate(text(T=T), n_new, temperature=temperature)


# Its task


def test_sorting_asks_for_the_sorted_digits_and_for_nothing_else():
    ids, targets = gpt.sorting(50, torch.Generator().manual_seed(0), length=5)
    assert ids.shape == targets.shape == (50, 10)
    assert (ids[:, 5] == 10).all() and (targets[:, :5] == -100).all()
    assert torch.equal(targets[:, 5:], ids[:, :5].sort(dim=1).values)
    assert torch.equal(targets[:, 5:-1], ids[:, 6:])


@pytest.mark.slow
def test_run_as_a_program_it_learns_to_sort():
    command, one = [sys.executable, "-m", "heed.gpt"], os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, env=one, capture_output=True, text=True, check=True).stdout
    assert float(re.search(r"([\d.]+)% of 1,000", out)[1]) >= 99
