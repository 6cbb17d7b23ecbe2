"""Rows of different length: what is kept of each is what a cache for it alone would keep."""

import pytest
import torch
from torch import nn

from heed.blocks import PreNorm
from heed.cache.contiguous import Contiguous
from heed.cache.ragged import Ragged, swappable, twin
from heed.gpt import GPT, GPTConfig, causal

f64 = torch.float64


def caches(n=3, room=12):
    return [Contiguous(2, 1, 2, room, 5, dtype=f64) for _ in range(n)]


def new(T, B=3):
    return torch.randn(2, B, 2, T, 5, dtype=f64)


def test_each_row_keeps_its_own_tokens_and_no_padding():
    counts = [4, 1, 3]
    ragged, alone = Ragged(caches(), counts), caches()
    for step, T in enumerate((4, 1, 1)):
        places = ragged.places(T)
        assert places.shape == (3, T)
        for layer in range(2):
            k, v = new(T)
            padding = torch.arange(T) >= torch.tensor(counts)[:, None]
            if step == 0:
                k = k.masked_fill(padding[:, None, :, None], torch.nan)
            ks, vs = ragged.append(layer, k, v)
            for b, n in enumerate(counts):
                n = n if step == 0 else 1
                want = alone[b].append(layer, k[b : b + 1, :, :n], v[b : b + 1, :, :n])
                assert ks[b].isfinite().all()
                assert torch.equal(ks[b], want[0]) and torch.equal(vs[b], want[1])
        assert [cache.length for cache in ragged.caches] == [n + step for n in counts]
        want = [0, 0, 0] if step == 0 else [n + step - 1 for n in counts]
        assert places[:, 0].tolist() == want


def test_attention_is_asked_row_by_row_and_padding_gets_zeros():
    ragged, drop = Ragged(caches(), [4, 1, 3]), nn.Dropout(0.0)
    q = new(4)[0]
    out = ragged.each(causal)(q, *ragged.append(0, *new(4)), drop)
    assert out.shape == q.shape
    for b, n in enumerate(ragged.counts):
        k, v = (x[0][0, :, :n] for x in (ragged.caches[b].keys, ragged.caches[b].values))
        alone = causal(q[b : b + 1, :, :n], k[None], v[None], drop)
        assert torch.equal(out[b : b + 1, :, :n], alone)
        assert (out[b, :, n:] == 0).all()


def model():
    return GPT(GPTConfig(vocab_size=13, max_len=9, n_heads=2, d_model=10)).double().eval()


def test_a_twin_shares_every_weight_and_has_attention_of_its_own():
    one = model()
    names, functions = list(vars(one)), [block.attn.attend for block in one.blocks]
    two = twin(one, lambda attend: lambda q, k, v, drop: 2 * attend(q, k, v, drop))
    ids = torch.tensor([[1, 2, 3]])
    before = one(ids)
    assert not torch.allclose(two(ids), before)
    assert [block.attn.attend for block in one.blocks] == functions and list(vars(one)) == names
    for (name, a), (other, b) in zip(
        one.state_dict(keep_vars=True).items(), two.state_dict(keep_vars=True).items(), strict=True
    ):
        assert name == other and a is b
    assert two.head.weight is two.tokens.weight and type(two) is GPT and two.config is one.config
    same = twin(one, lambda attend: attend)
    assert torch.equal(same(ids), before)
    one.tokens.weight.data += 1  # trained further
    assert torch.equal(same(ids), one(ids)) and not torch.equal(one(ids), before)
    one.norm.weight = nn.Parameter(torch.full((10,), 2.0, dtype=f64))  # another one altogether
    assert same.norm.weight is one.norm.weight and torch.equal(same(ids), one(ids))
    assert {id(m) for m in one.modules()}.isdisjoint(id(m) for m in two.modules())


def test_modes_and_hooks_are_each_model_s_own():
    one, seen = model(), []
    two = twin(one, lambda attend: attend)
    two.train()
    assert not any(module.training for module in one.modules())
    two.blocks[0].register_forward_hook(lambda *_: seen.append("two"))
    one(torch.tensor([[1]]))
    assert seen == []
    two(torch.tensor([[1]]))
    assert seen == ["two"]


def test_a_part_that_is_there_twice_stays_one():
    block = PreNorm(8, n_heads=2)
    stack = nn.Sequential(block, nn.Identity(), block)
    two = twin(stack, lambda attend: attend)
    assert two[0] is two[2] and two[0] is not block


def test_an_attention_without_a_door_is_refused():
    assert swappable(model()) and not swappable(nn.Linear(2, 2)) and not swappable(lambda ids: ids)
    with pytest.raises(ValueError, match="no part of this Linear has an `attend`"):
        twin(nn.Linear(2, 2), lambda attend: attend)
