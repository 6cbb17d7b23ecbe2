"""What a model costs, typed in the page: parameters, FLOPs, bytes, days and tokens a second.

The arithmetic runs in the page, in whole numbers of any length. Without scripts a table of known
models stands there, counted by `heed.counting`. A decode step reads every weight once and the
cache of every text; the tables of tokens and positions give a row each, and are left out.

L layers · C width · H query heads · G key-value heads · D width of a head · F feed-forward width ·
V vocabulary · E experts, A of them active · S learned positions · T text length · B texts at once.
"""

from collections.abc import Mapping
from types import SimpleNamespace

from heed import counting, roofline
from heed.interactive import Output, _json

STYLE = """<style>
.ca fieldset{border:0;padding:0;margin:0 0 1rem;min-width:0}
.ca legend{font-size:1rem;font-weight:600;padding:0;margin:0 0 .3rem}
.ca-grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.8rem,1fr));gap:.5rem .8rem}
.ca label{display:block;font-size:.85rem;line-height:1.35;margin:0}
.ca .ca-tick{display:flex;gap:.5rem;align-items:center;min-height:2.25rem}
.ca .ca-tick input{width:1.1rem;height:1.1rem;margin:0;flex:none;accent-color:var(--xp-accent)}
.xp .ca .ca-text input,.ca .ca-list select{font:inherit;font-size:1rem;width:100%;height:2.25rem;
color:inherit;background:transparent;border:1px solid currentColor;border-radius:.35rem}
.ca .ca-list select{padding:0 .3rem;text-overflow:ellipsis}
.ca option{color:CanvasText;background:Canvas}
.xp .ca .ca-text input[aria-invalid=true]{border:2px solid var(--xp-bad)}
.ca-wrong{display:block;color:var(--xp-bad);font-size:.85rem;line-height:1.35}
.ca-said{margin:0 0 .6rem;min-height:3em}
.ca .ca-head{font-weight:600;margin:0}
.ca dl{display:grid;grid-template-columns:11rem minmax(0,1fr);gap:0 1rem;margin:0 0 1rem}
.ca dt,.ca dd{font-weight:400;padding:.35rem 0;border-top:1px solid var(--xp-line);margin:0}
.ca dd b{font-variant-numeric:tabular-nums}
.ca dd span{display:block;font-size:.85rem;line-height:1.4}
@media(max-width:34rem){.ca dl{grid-template-columns:minmax(0,1fr)}
.ca dt{padding-bottom:0}.ca dd{border:0;padding-top:0}}
.xp .ca-scroll{overflow-x:auto}
.xp .ca-scroll table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
.xp .ca-scroll th,.xp .ca-scroll td{padding:.2rem .5rem;text-align:right;border:0;background:none;
color:inherit;border-bottom:1px solid var(--xp-line)}
.xp .ca-scroll td,.xp .ca-scroll th[scope=row]{white-space:nowrap}
.xp .ca-scroll thead th{overflow-wrap:normal}.xp .ca-scroll th:first-child{text-align:left}
</style>"""

SIZES = ("layers", "width", "heads", "kv_heads", "ff", "vocab", "length")
LLAMA = {"gated": 1, "biases": 0, "tied": 0, "positions": 0, "window": 0, "experts": 1, "active": 1}
GPT = LLAMA | {"gated": 0, "biases": 1, "tied": 1, "positions": 1024}
MODELS = {
    "GPT-2 124M": ((12, 768, 12, 12, 3072, 50257, 1024), GPT),
    "GPT-2 XL": ((48, 1600, 25, 25, 6400, 50257, 1024), GPT),
    "Llama 2 7B": ((32, 4096, 32, 32, 11008, 32000, 4096), LLAMA),
    "Llama 2 70B": ((80, 8192, 64, 8, 28672, 32000, 4096), LLAMA),
    "Llama 3 8B": ((32, 4096, 32, 8, 14336, 128256, 8192), LLAMA),
    "Llama 3 70B": ((80, 8192, 64, 8, 28672, 128256, 8192), LLAMA),
    "Mistral 7B": ((32, 4096, 32, 8, 14336, 32000, 8192), LLAMA | {"window": 4096}),
    "Mixtral 8x7B": ((32, 4096, 32, 8, 14336, 32000, 8192), LLAMA | {"experts": 8, "active": 2}),
}
PRESETS = {
    name: dict(zip(SIZES, sizes, strict=True)) | {"head": sizes[1] // sizes[2]} | kind
    for name, (sizes, kind) in MODELS.items()
}
BYTES = {4: "4: float32", 2: "2: bfloat16", 1: "1: 8 bits"}
DEVICES = {roofline.A100: 80, roofline.H100: 80, roofline.H200: 141}  # GB of memory

# Key, kind and label of every field, and what stands in it at first.
FORM = [
    (
        "The model",
        [
            ("model", "list", "model", [*PRESETS, "your own"]),
            ("layers", "text", "layers, L"),
            ("width", "text", "width, C"),
            ("heads", "text", "query heads, H"),
            ("kv_heads", "text", "key-value heads, G"),
            ("head", "text", "head width, D"),
            ("ff", "text", "feed-forward width, F"),
            ("vocab", "text", "vocabulary, V"),
            ("experts", "text", "experts, E"),
            ("active", "text", "active experts, A"),
            ("positions", "text", "learned positions, S"),
            ("window", "text", "window (0: none)"),
            ("gated", "tick", "gated (SwiGLU)"),
            ("biases", "tick", "biases, LayerNorm"),
            ("tied", "tick", "head tied to the embedding"),
        ],
    ),
    (
        "The text",
        [
            ("length", "text", "text length, T"),
            ("batch", "text", "texts at once, B", "1"),
            ("bytes", "list", "bytes a number", list(BYTES.values())),
        ],
    ),
    (
        "The device",
        [("device", "list", "device", [f"{m.name}, {gb} GB" for m, gb in DEVICES.items()])],
    ),
    (
        "The training",
        [
            ("tokens", "text", "tokens to train on", "10,000,000,000"),
            ("devices", "text", "devices", "8"),
            ("use", "text", "utilisation, %", "40"),
        ],
    ),
]


def calculator(*, title: str = "What does a model cost?") -> Output:
    """Choose a model or type its sizes; every number stands beside its formula."""
    data = {
        "presets": list(PRESETS.values()),
        "parts": FORM,
        "bytes": list(BYTES),
        "devices": [
            [m.name, gb, round(m.flops / 1e12, 3), round(m.bandwidth / 1e12, 3)]
            for m, gb in DEVICES.items()
        ],
    }
    return Output("calculator", title, _json(data), f"{STYLE}{_table()}")


def _config(s: Mapping[str, int]) -> SimpleNamespace:
    """The preset under the names that `heed.counting` knows from transformers."""
    if s["biases"]:
        names = {"n_layer": "layers", "n_embd": "width", "n_head": "heads", "vocab_size": "vocab"}
        names |= {"n_positions": "positions", "n_inner": "ff"}
        return SimpleNamespace(model_type="gpt2", **{k: s[v] for k, v in names.items()})
    names = {"num_hidden_layers": "layers", "hidden_size": "width", "num_attention_heads": "heads"}
    names |= {"num_key_value_heads": "kv_heads", "head_dim": "head", "intermediate_size": "ff"}
    names |= {"num_local_experts": "experts", "num_experts_per_tok": "active"}
    kind = "mixtral" if s["experts"] > 1 else "mistral"  # without a window the same as llama
    sizes = {k: s[v] for k, v in names.items()} | {"sliding_window": s["window"] or None}
    return SimpleNamespace(model_type=kind, vocab_size=s["vocab"], **sizes)


def _table() -> str:
    heads = ["model", "parameters", "active", "12LC² + VC is off by", "cache, bytes a token"]
    heads += ["text length", "FLOPs of a forward pass"]
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = ""
    for name, s in PRESETS.items():
        model, T = _config(s), s["length"]
        N = counting.parameters(model)
        off = f"{100 * (counting.rule(model) / N - 1):+.2f} %".replace("-", "−")
        cells = [f"{N:,}", f"{counting.active(model):,}", off]
        cells += [
            f"{n:,}" for n in (counting.kv_cache_bytes(model, 1), T, counting.flops(model, T))
        ]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f'<tr><th scope="row">{name}</th>{row}</tr>'
    return (
        '<div class="ca-scroll" tabindex="0" role="region" aria-label="Known models"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        "<p>The cache holds 2 bytes a number. All scores count, those behind a mask too.</p>"
    )
