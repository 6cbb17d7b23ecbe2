"""transformers' GPT-2 is the judge: the same logits, the same weights back, nothing ignored."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model, LlamaConfig

from heed.gpt import GPT
from heed.interop import HARMLESS, HONOURED, REQUIRED, config_from_hf, from_hf, to_hf

SIZES = {"vocab_size": 61, "n_positions": 33, "n_embd": 33, "n_layer": 3, "n_head": 3}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0}


def theirs(random_seed=0, **settings):
    """Every parameter drawn afresh, norms and biases too."""
    model = GPT2LMHeadModel(GPT2Config(**SIZES | settings)).eval()
    draw = torch.Generator().manual_seed(random_seed)
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=draw)
    return model


def text(B=3, T=33):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def same_logits(model, ours, ids):
    want, got = model(ids).logits, ours(ids)
    assert got.isfinite().all() and got.shape == want.shape
    limit = 1e-5 * max(1, want.abs().max().item())
    assert (got - want).abs().max().item() <= limit


def same_bits(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), name


# Logits


@pytest.mark.parametrize("T", [1, 2, 32, 33])
def test_a_gpt2_with_random_weights_gives_the_same_logits(T):
    same_logits(theirs(), from_hf(theirs()), text(T=T))


@pytest.mark.parametrize(
    "settings",
    [
        {"n_head": 1},
        {"n_head": 33},
        {"n_layer": 1},
        {"vocab_size": 97},
        {"n_inner": 132},
        {"activation_function": "gelu_pytorch_tanh"},
        {"attn_implementation": "eager"},
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
        # no influence on the logits of given weights
        {"initializer_range": 0.3},
        {"use_cache": False},
        {"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 9},
        {"summary_type": "last", "summary_use_proj": False, "summary_first_dropout": 0.5},
        {"summary_activation": "tanh", "summary_proj_to_labels": False, "num_labels": 3},
        {"n_ctx": 33, "task_specific_params": {"text-generation": {"do_sample": True}}},
        {"output_hidden_states": True, "chunk_size_feed_forward": 2},
        {"name_or_path": "somewhere", "architectures": ["GPT2LMHeadModel"]},
    ],
)
def test_settings_that_are_honoured_or_harmless_give_the_same_logits(settings):
    model = theirs(**settings)
    same_logits(model, from_hf(model), text())


def test_the_config_comes_over():
    config = config_from_hf(GPT2Config(**SIZES))
    assert vars(config) == {
        **{"vocab_size": 61, "max_len": 33, "n_layers": 3, "n_heads": 3, "d_model": 33},
        "dropout": 0.1,
    }


# Weights


def test_weights_there_and_back_are_the_same_bits():
    model = theirs()
    for p in model.parameters():  # numbers that arithmetic would not keep
        p.data.view(-1)[:4] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-45])
    back = to_hf(from_hf(model))
    same_bits(back, model.state_dict())
    fresh = theirs(random_seed=5)
    fresh.load_state_dict(back, strict=True)
    same_bits(fresh.state_dict(), model.state_dict())
    assert back["lm_head.weight"] is back["transformer.wte.weight"]


def test_our_weights_in_their_model_give_our_logits():
    model = GPT(config_from_hf(GPT2Config(**SIZES))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    judge = theirs()
    judge.load_state_dict(to_hf(model), strict=True)
    same_logits(judge, model, text())


def test_no_weight_is_shared_with_their_model():
    model = theirs()
    ours, kept = from_hf(model), copy.deepcopy(model.state_dict())
    for p in ours.parameters():
        p.data.zero_()
    same_bits(model.state_dict(), kept)
    taken = to_hf(ours)
    for x in taken.values():
        x.fill_(1)
    assert all((p == 0).all() for p in ours.parameters())


def test_ours_is_tied_learns_and_is_laid_out_as_if_built_here():
    ours = from_hf(theirs())
    assert ours.head.weight is ours.tokens.weight
    for p in ours.parameters():
        assert p.requires_grad and p.is_leaf and p.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype):
    model = theirs().to(dtype)
    ours = from_hf(model)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert {x.dtype for x in to_hf(ours).values()} == {dtype}
    if dtype == torch.float64:
        with torch.no_grad():
            torch.testing.assert_close(ours(text()), model(text()).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_stays(training):
    ours = from_hf(theirs().train(training))
    assert {module.training for module in ours.modules()} == {training}


def test_nothing_is_drawn_on_the_way():
    model, before = theirs(), torch.get_rng_state()
    from_hf(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "sizes, want",
    [({}, 124_439_808), ({"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200)],
)
def test_published_models_have_their_published_sizes(sizes, want):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**sizes))
    ours = from_hf(model)
    assert sum(p.numel() for p in ours.parameters()) == want
    assert {p.device.type for p in ours.parameters()} == {"meta"}


# What is refused

REFUSED = [
    {"activation_function": "gelu"},
    {"activation_function": "relu"},
    {"activation_function": "gelu_10"},
    {"layer_norm_epsilon": 1e-6},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
    {"add_cross_attention": True},
    {"is_encoder_decoder": True},
    {"tie_word_embeddings": False},
    {"n_inner": 131},
    {"n_inner": 33},
    {"embd_pdrop": 0.2},
    {"attn_pdrop": 0.0},
    {"resid_pdrop": 0.3},
    # fields that GPT2Config does not have, or has only when they are set
    {"is_causal": False},
    {"sliding_window": 4},
    {"quantization_config": {"bits": 4}},
    {"tie_last_hidden_states": True},
    {"something_new": 1},
]


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_a_setting_that_we_do_not_have_is_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        config_from_hf(GPT2Config(**SIZES | settings))


def test_a_model_with_such_a_setting_is_refused_too():
    with pytest.raises(ValueError, match="scale_attn_weights must be True, got False"):
        from_hf(theirs(scale_attn_weights=False))


def test_settings_for_single_layers_are_refused():
    config = GPT2Config(**SIZES, per_layer_config={1: {"attn_pdrop": 0.0}})
    with pytest.raises(ValueError, match="_heterogeneity_spec"):
        config_from_hf(config)


@pytest.mark.parametrize("name", sorted({*REQUIRED, *HONOURED}))
def test_a_config_without_a_setting_that_we_read_is_refused(name):
    config = GPT2Config(**SIZES)
    del config.__dict__[name]
    with pytest.raises(ValueError, match=f"missing: .'{name}'"):
        config_from_hf(config)


def test_every_field_of_their_config_has_a_verdict():
    known = [*REQUIRED, *HONOURED, *HARMLESS]
    assert set(vars(GPT2Config())) <= set(known)
    assert len(known) == len(set(known))


def test_another_familys_config_is_refused():
    with pytest.raises(ValueError, match="model_type llama"):
        config_from_hf(LlamaConfig())


@pytest.mark.parametrize(
    "model, said",
    [(GPT2Model, "transformer.wte.weight"), (GPT2DoubleHeadsModel, "multiple_choice_head")],
)
def test_a_model_with_other_weights_is_refused_by_their_names(model, said):
    with pytest.raises(ValueError, match=said):
        from_hf(model(GPT2Config(**SIZES)))


def test_a_head_that_was_untied_by_hand_is_refused():
    model = theirs()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with pytest.raises(ValueError, match="not tied"):
        from_hf(model)


def test_weights_of_two_dtypes_are_refused():
    model = theirs()
    model.transformer.ln_f.double()
    with pytest.raises(ValueError, match="float64"):
        from_hf(model)
