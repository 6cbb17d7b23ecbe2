"""Counts against published numbers, models built without memory, torch's own counter, and the
tensors that autograd really keeps."""

import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from heed import counting, gpt
from heed.gpt import GPT, GPTConfig
from heed.models.transformer import Transformer, TransformerConfig

XL = GPTConfig(vocab_size=50257, max_len=1024, n_layers=48, n_heads=25, d_model=1600)
ODD = GPTConfig(vocab_size=61, max_len=97, n_layers=3, n_heads=3, d_model=33)
TWO = TransformerConfig(
    n_source=13, n_target=17, max_len=11, n_layers=3, n_heads=3, d_model=18, d_ff=5
)

# Published configurations, with the settings of transformers.
LLAMA = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
LLAMA_2_7B = hf.LlamaConfig(**LLAMA, vocab_size=32_000, intermediate_size=11_008)
LLAMA_2_70B = hf.LlamaConfig(
    vocab_size=32_000,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
LLAMA_3_8B = hf.LlamaConfig(
    **LLAMA, vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8
)
LLAMA_3_70B = hf.LlamaConfig(**LLAMA_2_70B.to_dict() | {"vocab_size": 128_256})
MISTRAL_7B = hf.MistralConfig(
    **LLAMA, vocab_size=32_000, intermediate_size=14_336, num_key_value_heads=8
)
MIXTRAL = hf.MixtralConfig(
    **LLAMA, vocab_size=32_000, intermediate_size=14_336, num_key_value_heads=8
)
T5_BASE = hf.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
MAMBA_130M = hf.MambaConfig(num_hidden_layers=24)
VIT_B16 = hf.ViTConfig(num_labels=1000)


def on_meta(model, config):
    with torch.device("meta"):
        return model(config)


# Parameters


def test_gpt2_has_its_published_sizes():
    assert counting.parameters(GPTConfig.gpt2()) == 124_439_808
    assert counting.parameters(XL) == 1_557_611_200


@pytest.mark.parametrize(
    "config, want",
    [
        (GPTConfig.gpt2(), 85_056_000),
        (XL, 1_475_561_600),
        (hf.BertConfig(), 85_646_592),
        (T5_BASE, 198_229_248),
        (LLAMA_2_7B, 6_476_271_616),
        (LLAMA_3_8B, 6_979_588_096),
        (MISTRAL_7B, 6_979_588_096),
        (MIXTRAL, 46_440_648_704),
        (MAMBA_130M, 90_520_320),
        (hf.DeepseekV3Config(), 669_173_046_272),
    ],
)
def test_without_embeddings_and_head_models_have_their_published_sizes(config, want):
    parts = counting.breakdown(config)
    # A table of T5's buckets stands inside its attention.
    outside = {"tokens", "head", "segments", "positions"} - (
        {"positions"} if config is T5_BASE else set()
    )
    inside = sum(n for part, n in parts.items() if part not in outside | {"total"})
    assert inside == want


@pytest.mark.parametrize("config", [GPTConfig.gpt2(), XL, ODD])
def test_parameters_are_those_of_the_model(config):
    model = on_meta(GPT, config)
    assert counting.parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [TWO, replace(TWO, d_ff=None), replace(TWO, n_layers=1)])
def test_parameters_are_those_of_the_model_of_two_texts(config):
    model = on_meta(Transformer, config)
    assert counting.parameters(config) == sum(p.numel() for p in model.parameters())


def test_every_part_is_that_of_the_model():
    counted = dict.fromkeys(("tokens", "positions", "attention", "mlp", "norms"), 0)
    places = {".attn.": "attention", ".mlp.": "mlp", "norm": "norms"}
    for name, p in on_meta(GPT, ODD).named_parameters():
        part = next((part for key, part in places.items() if key in name), name.split(".")[0])
        counted[part] += p.numel()
    parts = counting.breakdown(ODD)
    assert parts == counted | {"total": sum(counted.values())}
    L, C, V, S = 3, 33, 61, 97
    assert parts["total"] == 12 * L * C**2 + 13 * L * C + V * C + S * C + 2 * C


def test_a_token_visits_two_of_eight_experts():
    assert counting.active(MIXTRAL) == 12_879_925_248
    assert counting.active(hf.DeepseekV3Config()) == 37_552_282_624
    assert counting.active(LLAMA_3_8B) == counting.parameters(LLAMA_3_8B)
    parts, config = counting.breakdown(MIXTRAL), MIXTRAL
    assert parts["experts"] == 32 * 8 * 3 * 4096 * 14_336
    assert parts["router"] == 32 * 8 * 4096
    config = hf.MixtralConfig(**MIXTRAL.to_dict() | {"num_experts_per_tok": 8})
    assert counting.active(config) == counting.parameters(config)


@pytest.mark.parametrize(
    "config, error",
    [
        (GPTConfig.gpt2(), -0.73),
        (XL, -0.17),
        (GPTConfig(vocab_size=50257, max_len=2048, n_layers=96, n_heads=96, d_model=12288), -0.02),
        (hf.BertConfig(), -1.01),
        (LLAMA_2_7B, -2.45),
        (LLAMA_2_70B, -6.22),
        (LLAMA_3_70B, -7.20),
        (MISTRAL_7B, -9.23),
        (LLAMA_3_8B, -13.23),
        (T5_BASE, -50.83),
        (MIXTRAL, -85.92),
        (MAMBA_130M, 61.45),
    ],
)
def test_the_rule_is_off_by_what_the_family_changes(config, error):
    assert round(100 * (counting.rule(config) / counting.parameters(config) - 1), 2) == error


def test_the_rule_of_a_model_without_words_is_its_layers():
    assert counting.rule(VIT_B16) == 12 * 12 * 768**2


def test_gpt3_has_its_175_billion():
    gpt3 = GPTConfig(vocab_size=50257, max_len=2048, n_layers=96, n_heads=96, d_model=12288)
    assert counting.parameters(gpt3) == 174_604_259_328


# FLOPs


@pytest.mark.parametrize(
    "config, length, want",
    [
        (GPTConfig.gpt2(), 1024, 291_648_307_200),
        (XL, 1024, 3_506_703_564_800),
        (LLAMA_2_7B, 4096, 62_921_270_886_400),
        (LLAMA_3_8B, 8192, 158_140_695_838_720),
        (MISTRAL_7B, 8192, 151_681_065_025_536),
    ],
)
def test_flops_of_published_models_to_the_unit(config, length, want):
    assert counting.flops(config, length) == want


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 97), (5, 13)])
def test_flops_are_those_torch_counts(batch, length):
    ids = torch.zeros(batch, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        GPT(ODD)(ids)
    assert counting.flops(ODD, length, batch) == counter.get_total_flops()


def test_flops_of_two_texts_are_those_torch_counts():
    source, target = torch.full((2, 7), 3), torch.full((2, 11), 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Transformer(TWO)(source, target)
    assert counting.flops(TWO, 11, 2, source=7) == counter.get_total_flops()
    assert counting.flops(TWO, 7) == counting.flops(TWO, 7, source=7)


SMALL = dict(vocab_size=61, hidden_size=24, num_hidden_layers=3, intermediate_size=7)
SMALL |= dict(num_attention_heads=3, pad_token_id=0, bos_token_id=0, eos_token_id=0)
PICTURES = {k: n for k, n in SMALL.items() if k in "hidden_size num_hidden_layers".split()}
FAMILIES = [
    (hf.BertConfig(**SMALL), hf.BertModel),
    (hf.LlamaConfig(**SMALL, num_key_value_heads=1, head_dim=6), hf.LlamaForCausalLM),
    (hf.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=5), hf.MixtralForCausalLM),
    (
        hf.DeepseekV3Config(
            **SMALL,
            **dict(num_key_value_heads=3, moe_intermediate_size=5, n_routed_experts=8),
            **dict(n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1),
            **dict(kv_lora_rank=7, q_lora_rank=9, qk_rope_head_dim=4, qk_nope_head_dim=6),
            v_head_dim=5,
        ),
        hf.DeepseekV3ForCausalLM,
    ),
    (
        hf.T5Config(
            vocab_size=61,
            d_model=24,
            d_kv=5,
            d_ff=7,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=3,
        ),
        hf.T5ForConditionalGeneration,
    ),
    (
        hf.ViTConfig(
            **PICTURES,
            num_attention_heads=3,
            intermediate_size=7,
            image_size=17,
            patch_size=5,
            num_labels=4,
        ),
        hf.ViTForImageClassification,
    ),
]


@pytest.mark.parametrize("config, module", FAMILIES, ids=lambda x: getattr(x, "model_type", ""))
def test_flops_of_every_family_are_those_torch_counts(config, module):
    config._attn_implementation = config._experts_implementation = "eager"
    model, ids = module(config).eval(), torch.full((2, 10), 3)
    for p in model.parameters():  # transformers leaves routers empty
        torch.nn.init.normal_(p)
    source = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if config.model_type == "vit":
            model(pixel_values=torch.randn(2, 3, 17, 17))
        elif config.model_type == "t5":
            source = 7
            model(input_ids=torch.full((2, 7), 3), decoder_input_ids=ids)
        else:
            model(input_ids=ids)
    assert counting.flops(config, 10, 2, source=source) == counter.get_total_flops()


def test_mambas_matrices_are_counted_and_its_recurrence_is_not():
    config = hf.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=3, pad_token_id=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf.MambaForCausalLM(config).eval()(input_ids=torch.full((2, 10), 3))
    by_kind = counter.get_flop_counts()["Global"]
    assert counting.flops(config, 10, 2) == by_kind[torch.ops.aten.mm]
    assert set(map(str, by_kind)) == {"aten.mm", "aten.convolution", "aten.bmm"}


def test_counts_are_integers_however_large():
    huge = GPTConfig(vocab_size=10**6, max_len=10**6, n_layers=10**3, n_heads=1, d_model=10**5)
    assert counting.flops(huge, 10**6, batch=10**3) == 10**3 * (
        24 * 10**6 * 10**3 * 10**10 + 4 * 10**12 * 10**3 * 10**5 + 2 * 10**6 * 10**6 * 10**5
    )


def test_no_token_costs_nothing():
    assert counting.flops(ODD, 0) == counting.kv_cache_bytes(ODD, 0) == 0


# Bytes of the cache


@pytest.mark.parametrize(
    "config, a_token",
    [
        (GPTConfig.gpt2(), 36_864),
        (XL, 307_200),
        (hf.BertConfig(), 0),
        (T5_BASE, 36_864 + 36_864),
        (LLAMA_2_7B, 524_288),
        (LLAMA_2_70B, 320 * 1024),
        (LLAMA_3_8B, 131_072),
        (MISTRAL_7B, 131_072),
        (MIXTRAL, 131_072),
        (hf.DeepseekV3Config(), 70_272),
    ],
)
def test_the_cache_takes_its_published_bytes_for_a_token(config, a_token):
    assert counting.kv_cache_bytes(config, 1) == a_token
    assert counting.kv_cache_bytes(config, 7, batch=3) == 21 * a_token
    assert counting.kv_cache_bytes(config, 7, dtype=torch.float32) == 14 * a_token


def test_the_cache_of_our_gpt_is_the_one_it_fills():
    cache = GPT(ODD).new_cache(2, 13)
    held = sum(b.nbytes for b in cache.buffers)
    assert counting.kv_cache_bytes(ODD, 13, 2, torch.float32) == held


def test_a_window_caps_the_cache():
    full = counting.kv_cache_bytes(MISTRAL_7B, 4096)
    assert full == 512 * 2**20
    for length in (4097, 8192, 10**6):
        assert counting.kv_cache_bytes(MISTRAL_7B, length) == full
    assert counting.kv_cache_bytes(MISTRAL_7B, 4095) < full
    open_ended = hf.MistralConfig(**MISTRAL_7B.to_dict() | {"sliding_window": None})
    assert counting.kv_cache_bytes(open_ended, 8192) == 2 * full


def test_mamba_keeps_the_same_at_any_length():
    for length in (0, 1, 10**6):
        assert counting.kv_cache_bytes(MAMBA_130M, length) == 1_474_560
    assert counting.kv_cache_bytes(MAMBA_130M, 5, 3) == 3 * 1_474_560


def test_two_texts_fill_two_caches():
    assert counting.kv_cache_bytes(T5_BASE, 3, source=10) == 13 * 36_864
    assert counting.kv_cache_bytes(TWO, 0, source=5) == 2 * 3 * 18 * 5 * 2


def test_an_image_fills_no_cache():
    assert counting.kv_cache_bytes(VIT_B16, 197) == 0


# Bytes of training


@pytest.mark.parametrize("mixed", [True, False])
def test_adam_needs_sixteen_bytes_a_parameter(mixed):
    parts = counting.training_bytes(ODD, mixed=mixed)
    assert parts["total"] == 16 * counting.parameters(ODD)
    assert sum(parts.values()) == 2 * parts["total"]


def test_weights_gradients_and_moments_are_those_that_torch_holds():
    model = GPT(ODD)
    adam = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(1, 5, dtype=torch.int64)
    gpt.loss(model(ids), ids).backward()
    adam.step()
    moments = [s[k] for s in adam.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert counting.training_bytes(ODD, mixed=False) == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "moments": sum(m.nbytes for m in moments),
        "total": 16 * counting.parameters(ODD),
    }


class Box:
    def __init__(self, x):
        self.x = x


class Kept:
    """Bytes of the tensors that autograd keeps: every storage once, parameters left out."""

    def __init__(self, model):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.holders, self.bytes, self.most = {}, 0, 0

    def pack(self, x):
        storage, box = x.untyped_storage(), Box(x)
        place, n = storage.data_ptr(), storage.nbytes()
        if place not in self.own:
            self.bytes += 0 if self.holders.get(place) else n
            self.holders[place] = self.holders.get(place, 0) + 1
            self.most = max(self.most, self.bytes)
            weakref.finalize(box, self.drop, place, n)
        return box

    def drop(self, place, n):
        self.holders[place] -= 1
        self.bytes -= 0 if self.holders[place] else n


def kept(config, length, batch, sizes):
    """The most that is kept in a step, and what is kept after its forward pass."""
    model = GPT(config)
    watch = Kept(model)
    ids, targets = (torch.randint(config.vocab_size, (batch, length)) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda box: box.x):
        if sizes is None:
            logits = model(ids)
        else:
            x = model.tokens(ids) + model.positions(torch.arange(length))
            for part in torch.arange(config.n_layers).split(sizes):
                run = torch.nn.Sequential(*[model.blocks[i] for i in part])
                x = checkpoint(run, x, use_reentrant=True)
            logits = model.head(model.norm(x))
        loss = gpt.loss(logits, targets)
        forward = watch.bytes
        loss.backward()
    assert watch.bytes == 0
    return watch.most, forward


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize(
    "batch, length, heads, width, words", [(1, 7, 1, 6, 11), (3, 16, 3, 12, 5)]
)
def test_activations_are_what_autograd_keeps_to_the_byte(
    layers, batch, length, heads, width, words
):
    config = GPTConfig(vocab_size=words, max_len=20, n_layers=layers, n_heads=heads, d_model=width)
    most, forward = kept(config, length, batch, None)
    assert counting.activation_bytes(config, length, batch) == most == forward


@pytest.mark.parametrize(
    "sizes, segments", [([6], 1), ([3, 3], 2), ([1, 1, 2, 2], 4), ([1] * 6, 6)]
)
@pytest.mark.parametrize("words", [11, 997])
def test_checkpoints_leave_what_autograd_keeps_to_the_byte(sizes, segments, words):
    config = GPTConfig(vocab_size=words, max_len=20, n_layers=6, n_heads=2, d_model=6)
    most, forward = kept(config, 7, 3, sizes)
    assert counting.activation_bytes(config, 7, 3, segments=segments) == most
    assert forward < counting.activation_bytes(config, 7, 3)


def test_activations_of_other_models_are_refused(unchecked):
    for config in (TWO, hf.GPT2Config(), LLAMA_2_7B):
        with pytest.raises(ValueError, match="only the activations of our GPT are known"):
            counting.activation_bytes(config, 5)
    with pytest.raises(ValueError, match="dropout=0.1 keeps its masks"):
        counting.activation_bytes(GPTConfig.gpt2(), 5)
    for segments in (0, 4, 1.5, True):
        with pytest.raises(ValueError, match=f"3 layers do not make {segments} segments"):
            counting.activation_bytes(ODD, 5, segments=segments)


# Refused

COUNTS = (counting.flops, counting.kv_cache_bytes, counting.activation_bytes)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "length, batch, said",
    [
        (-1, 1, "length must be an integer of 0 or more, got -1"),
        (98, 1, "length must lie in 0 to 97, the longest text, got 98"),
        (5.0, 1, "length must be an integer of 0 or more, got 5.0"),
        (True, 1, "length must be an integer of 0 or more, got True"),
        (5, 0, "a batch holds at least one text, got 0"),
        (5, -2, "a batch holds at least one text, got -2"),
        (5, 1.5, "a batch holds at least one text, got 1.5"),
        (5, True, "a batch holds at least one text, got True"),
    ],
)
def test_lengths_and_batches_that_cannot_be_are_refused(unchecked, count, length, batch, said):
    with pytest.raises(ValueError, match=said):
        count(ODD, length, batch)


@pytest.mark.parametrize("bad", ["float16", 2, None, torch.zeros(1)])
def test_a_dtype_that_is_none_is_refused(unchecked, bad):
    with pytest.raises(ValueError, match="dtype must be a torch.dtype such as torch.float16, got"):
        counting.kv_cache_bytes(ODD, 5, dtype=bad)


def test_a_source_is_for_models_of_two_texts():
    for count in (counting.flops, counting.kv_cache_bytes):
        with pytest.raises(ValueError, match="only a model of two texts has a source"):
            count(ODD, 5, source=5)
        with pytest.raises(ValueError, match="source must lie in 0 to 11, the longest text"):
            count(TWO, 5, source=12)
        with pytest.raises(ValueError, match="source must be an integer of 0 or more, got -1"):
            count(TWO, 5, source=-1)


def test_an_image_has_one_length():
    with pytest.raises(ValueError, match="images of 197 positions, got length 196"):
        counting.flops(VIT_B16, 196)


def test_any_config_with_these_settings_will_do():
    assert counting.parameters(SimpleNamespace(**vars(ODD))) == counting.parameters(ODD)
    assert counting.parameters(SimpleNamespace(**vars(TWO))) == counting.parameters(TWO)


@dataclass
class Llama:
    vocab_size: int = 61
    max_len: int = 97
    n_layers: int = 3
    n_heads: int = 3
    n_kv_heads: int = 1


def test_a_setting_too_few_or_too_many_is_refused_by_name():
    few = {name: n for name, n in vars(ODD).items() if name != "n_heads"}
    with pytest.raises(ValueError, match=r"is no GPT: lacks \['n_heads'\], has \[\]"):
        counting.parameters(SimpleNamespace(**few))
    with pytest.raises(ValueError, match=r"is no GPT: lacks \[\], has \['d_ff'\]"):
        counting.parameters(SimpleNamespace(**vars(ODD), d_ff=7))
    with pytest.raises(ValueError, match=r"is no Transformer: lacks \[\], has \['tied'\]"):
        counting.parameters(SimpleNamespace(**vars(TWO), tied=True))


def test_another_familys_config_is_refused_by_name():
    said = r"Llama is no GPT: lacks \['d_model'\], has \['n_kv_heads'\]"
    one = (counting.parameters, counting.breakdown, counting.active, counting.rule)
    for count in (*one, lambda c: counting.flops(c, 5), lambda c: counting.kv_cache_bytes(c, 5)):
        with pytest.raises(ValueError, match=said):
            count(Llama())


@pytest.mark.parametrize("bad", [0, -3, 2.0, "64", None, True])
def test_sizes_that_are_no_count_are_refused(bad):
    settings = vars(ODD) | {"d_model": bad}
    said = "needs d_model" if bad is None else f"d_model must be a positive integer, got {bad!r}"
    with pytest.raises(ValueError, match=said):
        counting.parameters(SimpleNamespace(**settings))
