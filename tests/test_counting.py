"""Counts against the published sizes, a model built without memory, and torch's own counter."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heed import counting
from heed.gpt import GPT, GPTConfig

XL = GPTConfig(vocab_size=50257, max_len=1024, n_layers=48, n_heads=25, d_model=1600)
ODD = GPTConfig(vocab_size=61, max_len=97, n_layers=3, n_heads=3, d_model=33)


def on_meta(config):
    with torch.device("meta"):
        return GPT(config)


def test_gpt2_has_its_published_sizes():
    assert counting.parameters(GPTConfig.gpt2()) == 124_439_808
    assert counting.parameters(XL) == 1_557_611_200


def test_without_embeddings_gpt2_has_its_published_sizes():
    for config, want in [(GPTConfig.gpt2(), 85_056_000), (XL, 1_475_561_600)]:
        parts = counting.breakdown(config)
        assert parts["total"] - parts["tokens"] - parts["positions"] == want


@pytest.mark.parametrize("config", [GPTConfig.gpt2(), XL, ODD])
def test_parameters_are_those_of_the_model(config):
    assert counting.parameters(config) == sum(p.numel() for p in on_meta(config).parameters())


def test_every_part_is_that_of_the_model():
    counted = dict.fromkeys(("tokens", "positions", "attention", "mlp", "norms"), 0)
    places = {".attn.": "attention", ".mlp.": "mlp", "norm": "norms"}
    for name, p in on_meta(ODD).named_parameters():
        part = next((part for key, part in places.items() if key in name), name.split(".")[0])
        counted[part] += p.numel()
    parts = counting.breakdown(ODD)
    assert parts == counted | {"total": sum(counted.values())}
    L, C, V, S = 3, 33, 61, 97
    assert parts["total"] == 12 * L * C**2 + 13 * L * C + V * C + S * C + 2 * C


def test_flops_of_gpt2_to_the_unit():
    assert counting.flops(GPTConfig.gpt2(), 1024) == 291_648_307_200
    assert counting.flops(XL, 1024) == 3_506_703_564_800


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 97), (5, 13)])
def test_flops_are_those_torch_counts(batch, length):
    ids = torch.zeros(batch, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        GPT(ODD)(ids)
    assert counting.flops(ODD, length, batch) == counter.get_total_flops()


def test_counts_are_integers_however_large():
    huge = GPTConfig(vocab_size=10**6, max_len=10**6, n_layers=10**3, n_heads=1, d_model=10**5)
    assert counting.flops(huge, 10**6, batch=10**3) == 10**3 * (
        24 * 10**6 * 10**3 * 10**10 + 4 * 10**12 * 10**3 * 10**5 + 2 * 10**6 * 10**6 * 10**5
    )


def test_no_token_costs_nothing():
    assert counting.flops(ODD, 0) == 0


def test_any_config_with_these_settings_will_do():
    assert counting.parameters(SimpleNamespace(**vars(ODD))) == counting.parameters(ODD)


@pytest.mark.parametrize(
    "length, batch, said", [(-1, 1, "-1"), (98, 1, "max_len 97, got 98"), (5, 0, "got 0")]
)
def test_lengths_and_batches_that_cannot_be_are_refused(length, batch, said):
    with pytest.raises(ValueError, match=said):
        counting.flops(ODD, length, batch)


@dataclass
class Llama:
    vocab_size: int = 61
    max_len: int = 97
    n_layers: int = 3
    n_heads: int = 3
    n_kv_heads: int = 1


def test_a_setting_too_few_or_too_many_is_refused_by_name():
    few = {name: n for name, n in vars(ODD).items() if name != "n_heads"}
    with pytest.raises(ValueError, match=r"lacks \['n_heads'\], has \[\]"):
        counting.parameters(SimpleNamespace(**few))
    with pytest.raises(ValueError, match=r"lacks \[\], has \['d_ff'\]"):
        counting.parameters(SimpleNamespace(**vars(ODD), d_ff=7))


def test_another_familys_config_is_refused_by_name():
    said = r"Llama is no GPT: lacks \['d_model'\], has \['n_kv_heads'\]"
    for count in (counting.parameters, counting.breakdown, lambda c: counting.flops(c, 5)):
        with pytest.raises(ValueError, match=said):
            count(Llama())


@pytest.mark.parametrize("bad", [0, -3, 2.0, "64", None])
def test_sizes_that_are_no_count_are_refused(bad):
    with pytest.raises(ValueError, match=f"d_model must be a positive integer, got {bad!r}"):
        counting.parameters(SimpleNamespace(**vars(ODD) | {"d_model": bad}))
