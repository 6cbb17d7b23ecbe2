"""Latent attention: absorbed against expanded, cached against whole, and against transformers."""

from functools import partial

import pytest
import torch

from heed import masks
from heed.attention import attention
from heed.cache.contiguous import Contiguous
from heed.cache.paged import Paged, PagedKVCache
from heed.cache.rolling import Rolling
from heed.flash import tiled
from heed.latent import LatentAttention
from heed.positions import rotate

SIZES = {"n_heads": 4, "d_latent": 12, "d_head": 8, "d_rope": 6, "d_value": 10, "d_query": 16}


def layer(**change):
    """In float64, every parameter drawn afresh: norms too."""
    torch.manual_seed(0)
    made = LatentAttention(32, **(SIZES | change)).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, mean=p.ndim == 1, std=0.3)
    return made


def tokens(B=2, T=11, C=32):
    return torch.randn(B, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(made, x):
    """The paper's full formulas, causal, token by token and head by head."""
    H = made.n_heads
    c = made.norm(made.down(x)[..., : made.d_latent])
    k_turn = rotate(made.down(x)[:, None, :, made.d_latent :], torch.arange(x.shape[1]),
                    interleaved=True)[:, 0]  # fmt: skip
    q = made.q(made.q_norm(made.q_down(x)) if made.q_down else x)
    up = made.up(c).chunk(H, dim=2)
    out = torch.zeros(*x.shape[:2], H * made.d_value, dtype=x.dtype)
    for h, (q_h, kv) in enumerate(zip(q.chunk(H, dim=2), up, strict=True)):
        q_turn = rotate(q_h[:, None, :, made.d_head :], torch.arange(x.shape[1]),
                        interleaved=True)[:, 0]  # fmt: skip
        k_h, v_h = kv[..., : made.d_head], kv[..., made.d_head :]
        for t in range(x.shape[1]):
            still = (q_h[:, t, None, : made.d_head] * k_h[:, : t + 1]).sum(-1)
            turned = (q_turn[:, t, None] * k_turn[:, : t + 1]).sum(-1)
            w = ((still + turned) / (made.d_head + made.d_rope) ** 0.5).softmax(-1)
            read = (w[..., None] * v_h[:, : t + 1]).sum(1)
            out[:, t, h * made.d_value : (h + 1) * made.d_value] = read
    return out @ made.out.weight.T


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("change", [{}, {"d_query": None}, {"d_value": None}, {"n_heads": 1}])
def test_both_forms_give_the_equations_of_the_paper(absorbed, change):
    made, x = layer(**change), tokens()
    got = made(x, mask=masks.causal, absorbed=absorbed)
    assert got.shape == x.shape and (got - by_hand(made, x)).abs().max() < 1e-12


@pytest.mark.parametrize("mask", [masks.full, masks.causal, masks.window(3)])
@pytest.mark.parametrize("attend", [attention, tiled.attention])
def test_absorbed_is_expanded_gradients_too(mask, attend):
    made, x = layer(attend=attend), tokens().requires_grad_()
    results = []
    for absorbed in (False, True):
        out = made(x, mask=mask, absorbed=absorbed)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *made.parameters()])])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-10 * max(1, a.abs().max())


def caches(made, B, max_len):
    """Caches of the protocol; d_value = 0: the one vector stands for keys and values."""
    width = made.d_latent + made.d_rope
    sizes = {"d_value": 0, "dtype": torch.float64}
    return {
        "contiguous": Contiguous(1, B, 1, max_len, width, **sizes),
        "rolling": Rolling(1, B, 1, max_len, width, **sizes),
    }


@torch.no_grad()
@pytest.mark.parametrize("which", ["contiguous", "rolling"])
@pytest.mark.parametrize("absorbed", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 5, 1], [10, 1]])
def test_chunk_by_chunk_through_a_cache_is_the_whole_at_once(which, absorbed, chunks):
    made, x = layer(), tokens()
    cache, outs = caches(made, 2, 11)[which], []
    for n, part in enumerate(x.split(chunks, dim=1)):
        keep, places = partial(cache.append, 0), cache.places(part.shape[1])
        form = absorbed[n % len(absorbed)]  # prefill expanded, decode absorbed, in any turn
        outs.append(made(part, mask=masks.causal, keep=keep, places=places, absorbed=form))
    assert cache.length == 11
    assert (torch.cat(outs, 1) - made(x, mask=masks.causal)).abs().max() < 1e-10


@torch.no_grad()
def test_pages_whose_second_half_nobody_fills_do_as_well():
    made, x = layer(), tokens()
    pool = PagedKVCache(1, 1, 18, page_len=4, n_pages=8, dtype=torch.float64)
    cache = Paged(pool, [pool.new(), pool.new()])

    def keep(c, empty):  # this pool has values as wide as its keys: give it the vector twice
        return cache.append(0, c, c)

    outs = [
        made(part, mask=masks.causal, keep=keep, places=cache.places(part.shape[1]), absorbed=True)
        for part in x.split([6, 1, 4], dim=1)
    ]
    assert (torch.cat(outs, 1) - made(x, mask=masks.causal)).abs().max() < 1e-10


@torch.no_grad()
def test_what_is_kept_is_one_vector_a_token_with_its_key_turned_already():
    made, x, kept = layer(), tokens(), []

    def keep(c, empty):
        assert empty.shape == (2, 1, 11, 0)
        kept.append(c)
        return c, empty

    made(x, keep=keep, places=torch.arange(3, 14))
    (c,) = kept
    assert c.shape == (2, 1, 11, 12 + 6)
    latent, turning = made.down(x)[:, None].split([12, 6], dim=3)
    assert torch.equal(c[..., :12], made.norm(latent))
    assert torch.equal(c[..., 12:], rotate(turning, torch.arange(3, 14), interleaved=True))


@torch.no_grad()
def test_only_distances_count():
    made, x = layer(), tokens()

    def keep(c, empty):
        return c, empty

    outs = [
        made(x, mask=masks.causal, keep=keep, places=torch.arange(11) + start, absorbed=True)
        for start in (0, 1000)
    ]
    assert (outs[0] - outs[1]).abs().max() < 1e-10
    spread = made(x, mask=masks.causal, keep=keep, places=2 * torch.arange(11))
    assert (outs[0] - spread).abs().max() > 1e-3


def test_deepseek_v3_keeps_70272_bytes_a_token():
    with torch.device("meta"):
        sizes = {"n_heads": 128, "d_latent": 512, "d_head": 128, "d_rope": 64, "d_query": 1536}
        made = LatentAttention(7168, **sizes)
        cache = Contiguous(61, 1, 1, 1, 512 + 64, d_value=0, dtype=torch.bfloat16)
    assert cache.nbytes == 61 * (made.d_latent + made.d_rope) * 2 == 70_272
    expanded = 61 * 128 * (128 + 64 + 128) * 2  # what it would be with keys and values of all heads
    assert expanded == 4_997_120 and expanded / cache.nbytes > 71
    assert sum(p.numel() for p in made.parameters()) == 187_107_328


@torch.no_grad()
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("d_query", [16, None])
def test_it_is_the_attention_of_transformers_with_the_same_weights(interleave, d_query):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    config = DeepseekV3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=d_query,
        kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=10,
        rope_interleave=interleave, max_position_embeddings=64, num_hidden_layers=1,
    )  # fmt: skip
    config._attn_implementation = "eager"
    other = theirs.DeepseekV3Attention(config, 0).eval()
    made = LatentAttention(
        32, **(SIZES | {"d_query": d_query}), rotate=partial(rotate, interleaved=interleave)
    )
    for p in other.parameters():
        torch.nn.init.normal_(p, mean=p.ndim == 1, std=0.3)
    pairs = {"kv_a_proj_with_mqa": "down", "kv_a_layernorm": "norm", "kv_b_proj": "up"}
    pairs |= {"o_proj": "out"}
    pairs |= {"q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q"} if d_query else {}
    pairs |= {} if d_query else {"q_proj": "q"}
    weights = {f"{pairs[name.split('.')[0]]}.weight": p for name, p in other.named_parameters()}
    made.load_state_dict(weights)  # every weight of theirs, and none of ours is left over
    x = tokens().float()
    table = theirs.DeepseekV3RotaryEmbedding(config)(x, torch.arange(11)[None].expand(2, -1))
    hidden = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    want = other(x, table, hidden)[0]
    for absorbed in (False, True):
        got = made(x, mask=masks.causal, absorbed=absorbed)
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())
    wrong = LatentAttention(
        32, **(SIZES | {"d_query": d_query}), rotate=partial(rotate, interleaved=not interleave)
    )
    wrong.load_state_dict(weights)
    assert (wrong(x, mask=masks.causal) - want).abs().max() > 1e-3  # the trap: other pairs


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_heads": 0}, "n_heads .* got 0"),
        ({"d_latent": 1.5}, "d_latent .* got 1.5"),
        ({"d_query": 0}, "d_query .* got 0"),
        ({"d_rope": 5}, "d_rope must be even.* got 5"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(unchecked, change, word):
    with pytest.raises(ValueError, match=word):
        LatentAttention(32, **(SIZES | change))


def test_tokens_that_do_not_fit_are_refused(unchecked):
    made, x = layer(), tokens()
    with pytest.raises(ValueError, match=r"\(B, T, 32\), got \(2, 11, 31\)"):
        made(x[..., :31])
    with pytest.raises(ValueError, match="float32, the weights are torch.float64"):
        made(x.float())
    with pytest.raises(ValueError, match="need their places"):
        made(x, keep=lambda c, empty: (c, empty))
    with pytest.raises(ValueError, match="rotate made"):
        layer(rotate=lambda y, places: y[..., :1])(x)
