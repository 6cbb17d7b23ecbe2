"""Every family against transformers' own modules on the meta device: published sizes, random small
ones, and each setting changed one at a time."""

import random
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from heed import counting, families

BUILT = {
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel),
    "bert": (hf.BertConfig, hf.BertModel),
    "t5": (hf.T5Config, hf.T5ForConditionalGeneration),
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM),
    "vit": (hf.ViTConfig, hf.ViTForImageClassification),
    "mamba": (hf.MambaConfig, hf.MambaForCausalLM),
    "deepseek_v3": (hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM),
}
BIG = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
LLAMA_2_13B = dict(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
PUBLISHED = [
    ("gpt2", {}, 124_439_808),
    ("gpt2", dict(n_embd=1024, n_layer=24, n_head=16), 354_823_168),
    ("gpt2", dict(n_embd=1280, n_layer=36, n_head=20), 774_030_080),
    ("gpt2", dict(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),
    ("bert", {}, 109_482_240),
    ("bert", LARGE, 335_141_888),
    ("t5", {}, 60_506_624),
    ("t5", dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12), 222_903_552),
    ("t5", dict(d_model=1024, d_ff=4096, num_layers=24, num_heads=16), 737_668_096),
    ("llama", {}, 6_738_415_616),
    ("llama", LLAMA_2_13B, 13_015_864_320),
    ("llama", BIG | dict(num_key_value_heads=8), 68_976_648_192),
    (
        "llama",
        dict(vocab_size=128_256, intermediate_size=14336, num_key_value_heads=8),
        8_030_261_248,
    ),
    ("llama", BIG | dict(vocab_size=128_256, num_key_value_heads=8), 70_553_706_496),
    ("mistral", {}, 7_241_732_096),
    ("mixtral", dict(vocab_size=32_000), 46_702_792_704),
    ("vit", dict(num_labels=1000), 86_567_656),
    ("mamba", dict(num_hidden_layers=24), 129_135_360),
    ("deepseek_v3", {}, 671_026_404_352),
]


def built(config):
    """The module itself, shapes without memory."""
    with torch.device("meta"):
        return BUILT[config.model_type][1](config)


def learned(config):
    return sum(p.numel() for p in built(config).parameters())


@pytest.mark.parametrize("kind, settings, want", PUBLISHED)
def test_published_models_have_their_size_to_the_unit_and_so_do_the_modules(kind, settings, want):
    config = BUILT[kind][0](**settings)
    assert counting.parameters(config) == want == learned(config)


def test_the_buffers_of_deepseek_are_no_parameters():
    model = built(hf.DeepseekV3Config())
    biases = [b for name, b in model.named_buffers() if "correction_bias" in name]
    assert sum(b.numel() for b in biases) == 14_848
    assert counting.parameters(model.config) + 14_848 == 671_026_419_200


def test_t5_1_1_is_counted_as_published_where_its_config_says_that_the_head_is_not_tied():
    said = dict(d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, vocab_size=32_128)
    said |= dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    assert counting.parameters(SimpleNamespace(model_type="t5", **said)) == 76_961_152
    config = hf.T5Config(**said)  # transformers 5 ties all the same, and says so
    assert config.tie_word_embeddings
    assert counting.parameters(config) == learned(config) == 60_511_616


# Small ones


def small(kind, pick):
    """Settings at random, none a multiple of another where it need not be."""
    H, D, L = pick.choice([1, 3, 5]), 2 * pick.randint(1, 4), pick.randint(1, 3)
    C, F, V = H * D, pick.randint(1, 40), pick.choice([61, 97])
    common = dict(
        vocab_size=V,
        hidden_size=C,
        num_hidden_layers=L,
        num_attention_heads=H,
        intermediate_size=F,
        pad_token_id=0,
    )
    grouped = common | dict(
        num_key_value_heads=pick.choice([1, H]),
        head_dim=pick.choice([D, D + 2]),
        tie_word_embeddings=pick.random() < 0.5,
    )
    yes = pick.random() < 0.5
    settings = {
        "gpt2": dict(vocab_size=V, n_positions=pick.randint(1, 40), n_embd=C, n_layer=L, n_head=H)
        | dict(n_inner=pick.choice([None, F]), tie_word_embeddings=yes)
        | dict(bos_token_id=0, eos_token_id=0),
        "bert": common
        | dict(max_position_embeddings=pick.randint(1, 40), type_vocab_size=pick.randint(1, 4)),
        "t5": dict(vocab_size=V, d_model=C, d_kv=D + 1, d_ff=F, num_layers=L, num_heads=H)
        | dict(num_decoder_layers=pick.choice([None, L + 1]))
        | dict(relative_attention_num_buckets=4 * pick.randint(2, 5))
        | dict(feed_forward_proj=pick.choice(["relu", "gated-gelu", "gated-silu"])),
        "llama": grouped | dict(attention_bias=yes, mlp_bias=pick.random() < 0.5),
        "mistral": grouped | dict(sliding_window=pick.choice([None, 7])),
        "mixtral": grouped | dict(num_local_experts=pick.randint(2, 7)),
        "vit": {k: n for k, n in common.items() if k not in ("vocab_size", "pad_token_id")}
        | dict(image_size=pick.randint(8, 20), patch_size=pick.randint(3, 8), qkv_bias=yes)
        | dict(num_channels=pick.randint(1, 4), num_labels=pick.randint(2, 9)),
        "mamba": dict(vocab_size=V, hidden_size=C, num_hidden_layers=L, pad_token_id=0)
        | dict(state_size=pick.randint(1, 9), conv_kernel=pick.randint(1, 5), use_bias=yes)
        | dict(expand=pick.randint(1, 3), time_step_rank=pick.choice(["auto", 5]))
        | dict(use_conv_bias=pick.random() < 0.5, tie_word_embeddings=pick.random() < 0.5),
        "deepseek_v3": common
        | dict(moe_intermediate_size=pick.randint(1, 9), n_routed_experts=8, n_group=2)
        | dict(topk_group=1, num_experts_per_tok=2, n_shared_experts=pick.randint(1, 3))
        | dict(first_k_dense_replace=pick.randint(0, L + 1), kv_lora_rank=pick.randint(1, 9))
        | dict(q_lora_rank=pick.choice([None, 7]), qk_rope_head_dim=4, qk_nope_head_dim=D + 1)
        | dict(v_head_dim=D + 3, attention_bias=yes, tie_word_embeddings=pick.random() < 0.5)
        | dict(num_key_value_heads=H),
    }
    return settings[kind]


@pytest.mark.parametrize("kind", BUILT)
def test_small_models_of_any_shape_have_the_parameters_of_their_modules(kind):
    for random_seed in range(12):
        config = BUILT[kind][0](**small(kind, random.Random(random_seed)))
        assert counting.parameters(config) == learned(config), config


@pytest.mark.parametrize("kind", BUILT)
def test_a_namespace_with_the_same_settings_counts_the_same(kind):
    config = BUILT[kind][0](**small(kind, random.Random(1)))
    typed = SimpleNamespace(**vars(config), model_type=kind)
    assert counting.breakdown(typed) == counting.breakdown(config)


def changed(value):
    """Other values of one setting; None for what is no number, no choice and no switch."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value]
    return [3] if value is None else []


@pytest.mark.parametrize("kind", BUILT)
def test_every_setting_is_honoured_or_refused_by_name(kind):
    """All settings, those too that this code does not know: each changed alone, built, counted."""
    given = small(kind, random.Random(4))
    make, tried = BUILT[kind][0], 0
    start = counting.parameters(make(**given))
    for name, value in vars(make(**given)).items():
        for other in changed(value):
            if name.startswith("_"):
                continue
            try:
                config = make(**given | {name: other})
                want = learned(config)
            except Exception:  # transformers builds no such model
                continue
            tried += want != start
            try:
                got = counting.parameters(config)
            except ValueError as refused:
                assert name in str(refused)
            else:
                assert got == want, f"{name}: {value} -> {other}"
    assert tried >= 5


# Refused


def llama(**settings):
    sizes = dict(vocab_size=61, hidden_size=12, num_hidden_layers=2, num_attention_heads=3)
    return SimpleNamespace(**dict(model_type="llama", intermediate_size=7) | sizes | settings)


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match="model_type 'qwen2' is not counted, only gpt2, bert"):
        families.model(llama(model_type="qwen2"))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(hidden_size=None), "a config of llama needs hidden_size"),
        (dict(hidden_size=12.0), "hidden_size must be a positive integer, got 12.0"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be a positive integer, got 0"),
        (dict(num_hidden_layers=True), "num_hidden_layers must be a positive integer, got True"),
        (dict(hidden_size=13), "width 13 does not divide into 3 heads"),
        (dict(num_key_value_heads=2), "num_key_value_heads 2 must divide the 3 query heads"),
        (dict(head_dim=-4), "head_dim must be a positive integer, got -4"),
        (dict(attention_bias="no"), "attention_bias must be True or False, got 'no'"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings must be True or False, got 1"),
        (dict(model_type="mistral"), "a config of mistral needs sliding_window, a number or None"),
        (dict(model_type="mixtral"), "a config of mixtral needs num_local_experts"),
        (
            dict(model_type="mixtral", num_local_experts=2, num_experts_per_tok=3),
            "a token cannot visit 3 of 2 experts",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        families.model(llama(**settings))


@pytest.mark.parametrize(
    "kind, setting",
    [
        ("gpt2", dict(add_cross_attention=True)),
        ("bert", dict(add_cross_attention=True)),
        ("bert", dict(is_decoder=True)),
        ("bert", dict(position_embedding_type="relative_key")),
        ("deepseek_v3", dict(moe_layer_freq=2)),
        ("vit", dict(image_size=(8, 16))),
        ("vit", dict(image_size=2)),
    ],
)
def test_what_would_change_the_model_and_is_not_known_is_refused_by_name(kind, setting):
    whole = vars(BUILT[kind][0](**small(kind, random.Random(0))))
    config = SimpleNamespace(**whole | {"model_type": kind, **setting})
    with pytest.raises(ValueError, match=next(iter(setting))):
        families.model(config)


def test_rope_and_dropout_cost_no_parameters():
    settings = small("llama", random.Random(0))
    turned = hf.LlamaConfig(
        **settings, rope_parameters={"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0}
    )
    assert counting.parameters(turned) == counting.parameters(hf.LlamaConfig(**settings))


def test_the_classes_of_a_vit_may_stand_in_a_published_file():
    whole = vars(hf.ViTConfig(**small("vit", random.Random(0)) | {"num_labels": 7}))
    config = SimpleNamespace(**whole, model_type="vit")
    assert not hasattr(config, "num_labels") and len(config.id2label) == 7
    assert counting.breakdown(config)["head"] == 7 * (config.hidden_size + 1)
