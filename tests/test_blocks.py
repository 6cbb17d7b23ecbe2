"""Blocks, held against torch's own layers, against the GPT of chapter 13 and against bad input."""

import pytest
import torch
from torch import nn

from heed import masks
from heed.attention import attention
from heed.blocks import Decoder, PostNorm, PreNorm
from heed.gpt import GPT, GPTConfig
from heed.layers import LayerNorm, gelu, gelu_tanh

f64 = torch.float64
BOTH = [PreNorm, PostNorm]


def drawn(module):
    """All parameters random: ones and zeros would hide a weight or a bias that is forgotten."""
    torch.manual_seed(5)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.double().eval()


def stream(B=2, T=7, C=12):
    return torch.randn(B, T, C, dtype=f64)


def copy(ours, theirs):
    """Our weights in torch's names."""
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())


def torchs(block, **settings):
    kind = nn.TransformerDecoderLayer if isinstance(block, Decoder) else nn.TransformerEncoderLayer
    theirs = kind(12, 3, 20, batch_first=True, dropout=0.0, **settings).double().eval()
    copy(block.attn, theirs.self_attn)
    if isinstance(block, Decoder):
        copy(block.cross, theirs.multihead_attn)
        theirs.norm3.load_state_dict(block.norm3.state_dict())
    for ours, name in ((block.mlp.up, "linear1"), (block.mlp.down, "linear2")):
        getattr(theirs, name).load_state_dict(ours.state_dict())
    for name in ("norm1", "norm2"):
        getattr(theirs, name).load_state_dict(getattr(block, name).state_dict())
    return theirs


def later(n):
    return torch.ones(n, n, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("activation, name", [(gelu, "gelu"), (torch.relu, "relu")])
def test_a_block_is_torchs_encoder_layer_with_the_weights_copied(kind, activation, name):
    block, x = drawn(kind(12, n_heads=3, d_ff=20, activation=activation)), stream()
    theirs = torchs(block, activation=name, norm_first=kind is PreNorm)
    torch.testing.assert_close(block(x), theirs(x), rtol=0, atol=1e-10)
    got = block(x, mask=masks.causal)
    torch.testing.assert_close(got, theirs(x, src_mask=later(7)), rtol=0, atol=1e-10)


def test_the_decoder_is_torchs_decoder_layer_with_the_weights_copied():
    block, x, memory = drawn(Decoder(12, n_heads=3, d_ff=20)), stream(), stream(T=5)
    theirs = torchs(block)
    got = block(x, memory)
    torch.testing.assert_close(got, theirs(x, memory, tgt_mask=later(7)), rtol=0, atol=1e-10)
    hidden = torch.arange(5)[None] >= torch.tensor([[5], [2]])
    got = block(x, memory, memory_mask=masks.padding(torch.tensor([5, 2])))
    want = theirs(x, memory, tgt_mask=later(7), memory_key_padding_mask=hidden)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    got = block(x, memory, mask=masks.full)
    torch.testing.assert_close(got, theirs(x, memory), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind, activation", [(PreNorm, gelu_tanh), (PostNorm, torch.relu)])
def test_the_defaults_are_those_of_their_papers(kind, activation):
    block = kind(12, n_heads=3)
    assert block.mlp.activation is activation and block.mlp.d_ff == 48
    assert block.dropout.p == 0 and block.attn.q.bias is not None
    assert Decoder(12, n_heads=3).mlp.activation is torch.relu
    assert sum(p.numel() for p in block.parameters()) == 12 * 12**2 + 13 * 12


class Assembled(nn.Module):
    """The GPT of chapter 13 put together from the floors below."""

    def __init__(self, gpt):
        super().__init__()
        c = gpt.config
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.positions = nn.Embedding(c.max_len, c.d_model)
        self.blocks = nn.ModuleList(
            PreNorm(c.d_model, n_heads=c.n_heads, dropout=c.dropout) for _ in range(c.n_layers)
        )
        self.norm = LayerNorm(c.d_model)
        state = dict(gpt.state_dict())
        state.pop("head.weight")  # tied to the tokens
        for name in list(state):
            if ".attn.qkv." in name:
                for part, value in zip("qkv", state.pop(name).chunk(3), strict=True):
                    state[name.replace("qkv", part)] = value
        self.double().load_state_dict(state)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, mask=masks.causal)
        return self.norm(x) @ self.tokens.weight.T


def test_a_gpt_is_pre_norm_blocks_between_embeddings_and_a_last_norm():
    gpt = drawn(GPT(GPTConfig(vocab_size=61, max_len=9, n_layers=3, n_heads=3, d_model=12)))
    ids = torch.randint(61, (2, 9))
    torch.testing.assert_close(Assembled(gpt)(ids), gpt(ids), rtol=0, atol=1e-10)


def test_the_assembled_gpt_has_the_gradients_of_the_whole_one():
    gpt = drawn(GPT(GPTConfig(vocab_size=61, max_len=9, n_layers=2, n_heads=3, d_model=12)))
    ours, ids = Assembled(gpt), torch.randint(61, (2, 9))
    for model in (gpt, ours):
        model(ids).logsumexp(-1).sum().backward()
    for name in ("tokens", "positions", "norm"):
        got, want = getattr(ours, name).weight.grad, getattr(gpt, name).weight.grad
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_a_pre_norm_block_whose_branches_write_nothing_passes_the_stream_bit_for_bit():
    block, x = drawn(PreNorm(12, n_heads=3)), stream()
    for last in (block.attn.out, block.mlp.down):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    assert torch.equal(block(x), x)
    block = drawn(PostNorm(12, n_heads=3))
    for last in (block.attn.out, block.mlp.down):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    torch.testing.assert_close(block(x), block.norm2(block.norm1(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", BOTH)
def test_gradients_are_those_of_finite_differences(kind):
    block = drawn(kind(4, n_heads=2, d_ff=6, activation=gelu))
    x = torch.randn(1, 3, 4, dtype=f64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: block(x, mask=masks.causal), x, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", BOTH)
def test_dropout_acts_on_what_a_branch_writes_in_training_only(kind):
    block, x = drawn(kind(12, n_heads=3, dropout=0.5)), stream()
    without = drawn(kind(12, n_heads=3))
    assert torch.equal(block(x), without(x))
    block.train()
    first, second = block(x), block(x)
    assert not torch.equal(first, second)
    if kind is PreNorm:  # a write that falls out leaves the stream as it was
        for last in (block.attn.out, block.mlp.down):
            nn.init.zeros_(last.weight)
            nn.init.ones_(last.bias)
        assert set((block(x) - x).round(decimals=9).unique().tolist()) == {0, 2, 4}


@pytest.mark.parametrize("kind", [*BOTH, Decoder])
def test_another_attention_can_be_handed_in(kind):
    calls = []

    def watched(q, k, v, mask):
        calls.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, mask)

    block, x = kind(12, n_heads=3, attend=watched).double(), stream()
    block(x, stream(T=5)) if kind is Decoder else block(x)
    assert calls == ([(7, 7), (7, 5)] if kind is Decoder else [(7, 7)])


@pytest.mark.parametrize("kind", [*BOTH, Decoder])
def test_a_block_refuses_wrong_settings(kind):
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout must lie in"):
            kind(12, n_heads=3, dropout=p)
    with pytest.raises(ValueError, match="12 does not divide into 5 heads"):
        kind(12, n_heads=5)
    with pytest.raises(ValueError, match="d_ff must be a positive integer, got 0"):
        kind(12, n_heads=3, d_ff=0)


def test_a_block_refuses_a_wrong_width_or_dtype(unchecked):
    for kind in BOTH:
        with pytest.raises(ValueError, match="12"):
            kind(12, n_heads=3)(torch.randn(2, 7, 11))
        with pytest.raises(ValueError, match="the weights are torch.float32"):
            kind(12, n_heads=3)(stream())
    with pytest.raises(ValueError, match="memory has batch 1"):
        Decoder(12, n_heads=3)(torch.randn(2, 7, 12), torch.randn(1, 5, 12))
