"""To and from published weights: GPT-2 as transformers 5 holds it in memory; and our own small one.

transformers is not imported: `from_hf` takes the live model. Every setting is honoured, of no
influence on the logits, or refused by name. The one file that is read is the package's own.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heed.checkpoints import read_checkpoint, restore
from heed.gpt import GPT, GPTConfig

MICRO = Path(__file__).with_name("micro.safetensors")  # written by bench/micro.py

# Settings whose other values mean another model. What stands here is what our GPT does.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
}
HONOURED = {"vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner"}
HONOURED |= {"embd_pdrop", "attn_pdrop", "resid_pdrop"}
# Settings that leave the logits of given weights alone.
HARMLESS = {
    *("transformers_version", "architectures", "dtype", "_name_or_path", "_post_init_done"),
    *("output_hidden_states", "_output_attentions", "return_dict", "use_cache"),
    *("_attn_implementation_internal", "_experts_implementation_internal"),
    *("chunk_size_feed_forward", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params"),
    *("id2label", "label2id", "problem_type", "summary_type", "summary_use_proj"),
    *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("n_ctx", "output_past"),  # left in the files of 2019
}

# Their name, ours, and whether theirs is transposed: a Conv1D keeps the W of x W + b.
LAYER = [
    ("ln_1.weight", "norm1.weight", False),
    ("ln_1.bias", "norm1.bias", False),
    ("attn.c_attn.weight", "attn.qkv.weight", True),
    ("attn.c_attn.bias", "attn.qkv.bias", False),
    ("attn.c_proj.weight", "attn.out.weight", True),
    ("attn.c_proj.bias", "attn.out.bias", False),
    ("ln_2.weight", "norm2.weight", False),
    ("ln_2.bias", "norm2.bias", False),
    ("mlp.c_fc.weight", "mlp.up.weight", True),
    ("mlp.c_fc.bias", "mlp.up.bias", False),
    ("mlp.c_proj.weight", "mlp.down.weight", True),
    ("mlp.c_proj.bias", "mlp.down.bias", False),
]


def config_from_hf(config: Any) -> GPTConfig:
    """Our config for their GPT2Config; ValueError names a setting that we do not have."""
    settings = vars(config)
    if config.model_type != "gpt2":
        raise ValueError(f"this reads gpt2, got a config of model_type {config.model_type}")
    unknown = settings.keys() - REQUIRED.keys() - HONOURED - HARMLESS
    missing = (REQUIRED.keys() | HONOURED) - settings.keys()
    if unknown or missing:
        raise ValueError(f"settings unknown: {sorted(unknown)}, missing: {sorted(missing)}")
    for name, allowed in REQUIRED.items():
        if settings[name] not in allowed:
            choice = " or ".join(map(str, allowed))
            raise ValueError(f"{name} must be {choice}, got {settings[name]}")
    n_inner, n_embd = settings["n_inner"], settings["n_embd"]
    if n_inner not in (None, 4 * n_embd):
        raise ValueError(f"n_inner must be 4 x n_embd = {4 * n_embd}, got {n_inner}")
    dropouts = {name: settings[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(dropouts.values())) > 1:
        raise ValueError(f"our GPT has one dropout for all places, got {dropouts}")
    return GPTConfig(
        vocab_size=settings["vocab_size"],
        max_len=settings["n_positions"],
        n_layers=settings["n_layer"],
        n_heads=settings["n_head"],
        d_model=settings["n_embd"],
        dropout=float(settings["embd_pdrop"]),
    )


def from_hf(model: Any) -> GPT:
    """Our GPT with a copy of the weights of their GPT2LMHeadModel: same dtype, device and mode."""
    config = config_from_hf(model.config)
    theirs, table = model.state_dict(), _names(config.n_layers)
    wrong = theirs.keys() ^ {name for name, _, _ in table}
    if wrong:
        raise ValueError(f"weights that GPT-2 lacks or should have: {sorted(wrong)}")
    if model.lm_head.weight is not model.transformer.wte.weight:
        raise ValueError("lm_head.weight is not tied to transformer.wte.weight")
    kinds = {x.dtype for x in theirs.values()}
    if len(kinds) > 1:
        raise ValueError(f"all weights must have one dtype, got {kinds}")
    with torch.device("meta"):  # no numbers are drawn that are thrown away at once
        ours = GPT(config)
    ours.load_state_dict({a: _copy(theirs[b], turn) for b, a, turn in table}, assign=True)
    ours.head.weight = ours.tokens.weight
    return ours.train(model.training)


def to_hf(model: GPT) -> dict[str, Tensor]:
    """A copy of our weights under the names and in the order of GPT2LMHeadModel.state_dict()."""
    ours = model.state_dict()
    theirs = {b: _copy(ours[a], turn) for b, a, turn in _names(model.config.n_layers)}
    return theirs | {"lm_head.weight": theirs["transformer.wte.weight"]}


def micro() -> GPT:
    """Two layers that have learned the Small English of `heed.tasks.grammar`; in eval mode.

    The file lies beside this one. `bench/micro.py` trains it, in about a minute.
    """
    saved = read_checkpoint(MICRO)
    with torch.random.fork_rng(devices=[]):  # what a new model draws is thrown away at once
        model = GPT(GPTConfig(**saved.notes["config"]))
    restore(saved, model)
    return model.eval()


def _names(n_layers: int) -> list[tuple[str, str, bool]]:
    layers = [
        (f"transformer.h.{n}.{b}", f"blocks.{n}.{a}", turn)
        for n in range(n_layers)
        for b, a, turn in LAYER
    ]
    return [
        ("transformer.wte.weight", "tokens.weight", False),
        ("transformer.wpe.weight", "positions.weight", False),
        *layers,
        ("transformer.ln_f.weight", "norm.weight", False),
        ("transformer.ln_f.bias", "norm.bias", False),
        ("lm_head.weight", "head.weight", False),
    ]


def _copy(x: Tensor, turn: bool) -> Tensor:
    return (x.T if turn else x).detach().clone(memory_format=torch.contiguous_format)
