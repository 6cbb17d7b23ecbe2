"""A configuration in, the pieces of its model out: one function for each family.

A configuration is any object with the settings of its kind: one of transformers, told by its
`model_type`, a namespace typed by hand with the same names, or a config of this book. A setting
that may be missing has transformers' default. What would change a count and is not known here is
refused by name.

C width of the stream · H query heads · G key-value heads · D width of a head · F width of the
network · V words · S longest text · L layers · E experts.
"""

from collections.abc import Callable
from typing import Any

from heed.pieces import (
    Model,
    Piece,
    attention,
    either,
    experts,
    flag,
    head,
    known,
    linear,
    mlp,
    norms,
    refuse,
    size,
    sizes,
    split,
    table,
)


def model(config: Any) -> Model:
    """All the pieces of the model that this configuration describes."""
    kind = getattr(config, "model_type", None)
    if kind is None:
        return _transformer(config) if hasattr(config, "n_source") else _gpt(config)
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not counted, only {', '.join(FAMILIES)}")
    return FAMILIES[kind](config)


# Families: transformers' GPT2LMHeadModel, BertModel, T5ForConditionalGeneration, the ForCausalLM of
# Llama, Mistral, Mixtral, Mamba and DeepseekV3, and ViTForImageClassification.


def _gpt2(config: Any) -> Model:
    refuse(config, "add_cross_attention", False)
    V, S, L, C, H = sizes(config, "vocab_size", "n_positions", "n_layer", "n_embd", "n_head")
    F = size(config, "n_inner", 4 * C)
    return _decoder(V, S, L, C, F, H, tied=flag(config, "tie_word_embeddings", True))


def _gpt(config: Any) -> Model:
    names = {"vocab_size", "max_len", "n_layers", "n_heads", "d_model"}
    known(config, names, {"dropout"}, "GPT")
    V, S, L, C, H = sizes(config, "vocab_size", "max_len", "n_layers", "d_model", "n_heads")
    return _decoder(V, S, L, C, 4 * C, H, tied=True)


def _decoder(V: int, S: int, L: int, C: int, F: int, H: int, *, tied: bool) -> Model:
    """12LC² + 13LC + VC + SC + 2C when F is 4C and the head is the table of tokens."""
    parts = [
        table("tokens", V, C),
        table("positions", S, C),
        *attention(C, H, H, split(C, H), L, bias=True),
        *mlp(C, F, L, bias=True),
        norms(2 * L + 1, C, bias=True),
        head(V, C, tied),
    ]
    return Model(width=C, layers=L, words=V, pieces=parts, cached=2 * L * C, longest=S)


def _transformer(config: Any) -> Model:
    names = {"n_source", "n_target", "max_len", "n_layers", "n_heads", "d_model"}
    known(config, names, {"dropout", "d_ff"}, "Transformer")
    V, S, L, C, H = sizes(config, "n_target", "max_len", "n_layers", "d_model", "n_heads")
    F, D = size(config, "d_ff", 4 * C), split(C, H)
    pieces = [
        table("tokens", size(config, "n_source") + V, C),
        *attention(C, H, H, D, L, bias=True, asks="source", holds="source"),
        *attention(C, H, H, D, L, bias=True),
        *attention(C, H, H, D, L, bias=True, holds="source"),
        *mlp(C, F, L, bias=True, at="source"),
        *mlp(C, F, L, bias=True),
        norms(5 * L, C, bias=True),
        linear("head", C, V),
    ]
    kept = 2 * L * C
    return Model(
        width=C,
        layers=L,
        words=V,
        pieces=pieces,
        cached=kept,
        cached_source=kept,
        longest=S,
        two_texts=True,
    )


def _bert(config: Any) -> Model:
    refuse(config, "add_cross_attention", False)
    refuse(config, "is_decoder", False)
    refuse(config, "position_embedding_type", "absolute")
    V, L, C, F = sizes(
        config, "vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size"
    )
    H, S = sizes(config, "num_attention_heads", "max_position_embeddings")
    pieces = [
        table("tokens", V, C),
        table("positions", S, C),
        table("segments", size(config, "type_vocab_size", 2), C),
        *attention(C, H, H, split(C, H), L, bias=True),
        *mlp(C, F, L, bias=True),
        norms(2 * L + 1, C, bias=True),
        linear("pooler", C, C, bias=True, at="text"),
    ]
    return Model(width=C, layers=L, words=V, pieces=pieces, longest=S)


def _vit(config: Any) -> Model:
    L, C, F, H = sizes(
        config, "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"
    )
    image, P = sizes(config, "image_size", "patch_size")
    if image < P:
        raise ValueError(f"image_size {image} is smaller than patch_size {P}")
    if getattr(config, "num_labels", None) is None and hasattr(config, "id2label"):
        classes = len(config.id2label)  # as in a published config.json
    else:
        classes = size(config, "num_labels")
    patches, bias = (image // P) ** 2, flag(config, "qkv_bias", True)
    pieces = [
        linear("patches", size(config, "num_channels", 3) * P**2, C, bias=True, at="patch"),
        table("positions", patches + 1, C),
        table("class token", 1, C),
        *attention(C, H, H, split(C, H), L, bias=bias, out_bias=True),
        *mlp(C, F, L, bias=True),
        norms(2 * L + 1, C, bias=True),
        linear("head", C, classes, bias=True, at="text"),
    ]
    return Model(width=C, layers=L, words=0, pieces=pieces, only=patches + 1)


def _t5(config: Any) -> Model:
    V, L, C, F = sizes(config, "vocab_size", "num_layers", "d_model", "d_ff")
    D, H = sizes(config, "d_kv", "num_heads")
    L_out = size(config, "num_decoder_layers", L)
    bends = getattr(config, "feed_forward_proj", "relu")
    gated = flag(config, "is_gated_act", str(bends).startswith("gated"))
    pieces = [
        table("tokens", V, C),
        # Only the first layer of each side has a table of positions, one number a head and bucket.
        Piece("positions", size(config, "relative_attention_num_buckets", 32) * H, 2),
        *attention(C, H, H, D, L, asks="source", holds="source"),
        *attention(C, H, H, D, L_out),
        *attention(C, H, H, D, L_out, holds="source"),
        *mlp(C, F, L, gated=gated, at="source"),
        *mlp(C, F, L_out, gated=gated),
        norms(2 * L + 3 * L_out + 2, C),
        head(V, C, flag(config, "tie_word_embeddings", True)),
    ]
    kept = 2 * L_out * H * D
    return Model(
        width=C,
        layers=L,
        words=V,
        pieces=pieces,
        cached=kept,
        cached_source=kept,
        two_texts=True,
    )


def _llama(config: Any) -> Model:
    F, bias = size(config, "intermediate_size"), flag(config, "mlp_bias", False)
    L, C = sizes(config, "num_hidden_layers", "hidden_size")
    networks = mlp(C, F, L, gated=True, bias=bias)
    return _grouped(config, networks, bias=flag(config, "attention_bias", False))


def _mistral(config: Any) -> Model:
    F, L, C = sizes(config, "intermediate_size", "num_hidden_layers", "hidden_size")
    return _grouped(config, mlp(C, F, L, gated=True), window=either(config, "sliding_window"))


def _mixtral(config: Any) -> Model:
    F, L, C = sizes(config, "intermediate_size", "num_hidden_layers", "hidden_size")
    E, visits = sizes(config, "num_local_experts", "num_experts_per_tok")
    window = either(config, "sliding_window") if hasattr(config, "sliding_window") else None
    return _grouped(config, experts(C, F, E, visits, L), window=window)


def _grouped(
    config: Any, networks: list[Piece], *, bias: bool = False, window: int | None = None
) -> Model:
    """L(2CHD + 2CGD + 3CF + 2C) + 2VC + C: grouped heads, RMSNorm, positions that are turned."""
    V, L, C, H = sizes(
        config, "vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"
    )
    G = size(config, "num_key_value_heads", H)
    if H % G:
        raise ValueError(f"num_key_value_heads {G} must divide the {H} query heads")
    given = getattr(config, "head_dim", None) is not None
    D = size(config, "head_dim") if given else split(C, H)
    pieces = [
        table("tokens", V, C),
        *attention(C, H, G, D, L, bias=bias),
        *networks,
        norms(2 * L + 1, C),
        head(V, C, flag(config, "tie_word_embeddings", False)),
    ]
    kept = 2 * L * G * D
    return Model(width=C, layers=L, words=V, pieces=pieces, cached=kept, window=window)


def _mamba(config: Any) -> Model:
    V, L, C = sizes(config, "vocab_size", "num_hidden_layers", "hidden_size")
    inner = size(config, "intermediate_size", size(config, "expand", 2) * C)
    N, K = size(config, "state_size", 16), size(config, "conv_kernel", 4)
    bias, rank = flag(config, "use_bias", False), getattr(config, "time_step_rank", "auto")
    R = -(-C // 16) if rank == "auto" else size(config, "time_step_rank")
    pieces = [
        table("tokens", V, C),
        linear("mixer", C, 2 * inner, L, bias=bias),
        Piece("mixer", inner * (K + flag(config, "use_conv_bias", True)), L),  # the short window
        linear("mixer", inner, R + 2 * N, L),
        linear("mixer", R, inner, L, bias=True),
        Piece("mixer", inner * (N + 1), L),  # A and D of the recurrence
        linear("mixer", inner, C, L, bias=bias),
        norms(L + 1, C),
        head(V, C, flag(config, "tie_word_embeddings", True)),
    ]
    return Model(width=C, layers=L, words=V, pieces=pieces, state=L * inner * (N + K))


def _deepseek(config: Any) -> Model:
    refuse(config, "moe_layer_freq", 1)
    V, L, C, H = sizes(
        config, "vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"
    )
    F, F_expert, E = sizes(config, "intermediate_size", "moe_intermediate_size", "n_routed_experts")
    latent, turned, plain, Dv = sizes(
        config, "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"
    )
    dense = min(L, size(config, "first_k_dense_replace", least=0))
    shared = size(config, "n_shared_experts", least=0)
    narrow, D = either(config, "q_lora_rank"), plain + turned
    bias = flag(config, "attention_bias", False)
    if narrow is None:
        queries = [linear("attention", C, H * D, L)]
    else:
        queries = [
            linear("attention", C, narrow, L, bias=bias),
            linear("attention", narrow, H * D, L),
            norms(L, narrow),
        ]
    pieces = [
        table("tokens", V, C),
        *queries,
        linear("attention", C, latent + turned, L, bias=bias),
        linear("attention", latent, H * (plain + Dv), L),
        linear("attention", H * Dv, C, L, bias=bias),
        Piece("attention", 0, L, H * (D + Dv), "token x token"),
        *mlp(C, F, dense, gated=True),
        *mlp(C, F_expert * shared, L - dense, gated=True, part="shared experts"),
        *experts(C, F_expert, E, size(config, "num_experts_per_tok"), L - dense),
        norms(2 * L + 1, C),
        norms(L, latent),
        head(V, C, flag(config, "tie_word_embeddings", False)),
    ]
    return Model(width=C, layers=L, words=V, pieces=pieces, cached=L * (latent + turned))


FAMILIES: dict[str, Callable[[Any], Model]] = {
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "vit": _vit,
    "mamba": _mamba,
    "deepseek_v3": _deepseek,
}
