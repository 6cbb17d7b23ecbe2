"""step.py against the model itself: other order of the same sums, same tokens."""

import math

import pytest
import torch
from torch import nn

from heed.generation import attending, generate
from heed.gpt import GPT, GPTConfig
from heed.step import INSIDE, OUTSIDE, Step

SHAPE = {"vocab_size": 61, "max_len": 23, "n_layers": 2, "n_heads": 3, "d_model": 21}
ROOM = 19


def gpt(dtype=torch.float64, random_seed=0, **shape):
    """Every weight drawn afresh: norms and biases that are ones and zeros would hide a lot."""
    torch.manual_seed(random_seed)
    model = GPT(GPTConfig(**(SHAPE | shape))).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name and "weight" in name else 0.0
            p.normal_(centre, 0.3)
    return model


def prompts(batch_size, length, random_seed=1):
    draw = torch.Generator().manual_seed(random_seed)
    return torch.randint(61, (batch_size, length), generator=draw)


def step(model, batch_size=1, max_len=ROOM, **options):
    return Step(model, batch_size=batch_size, max_len=max_len, **({"backend": "eager"} | options))


@torch.no_grad()
def logits(model, ids):
    model.eval()
    return model(ids)[:, -1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_step_gives_what_the_model_gives_for_the_whole_text(batch_size):
    model, ids = gpt(), prompts(batch_size, ROOM)
    s = step(model, batch_size)
    got = [s.prefill(ids[:, :5]), *(s(ids[:, i : i + 1]) for i in range(5, ROOM))]
    for n, found in enumerate(got, 5):
        assert found.shape == (batch_size, 61)
        torch.testing.assert_close(found, logits(model, ids[:, :n]), rtol=0, atol=1e-12)


def test_a_text_may_begin_without_a_prompt():
    model, ids = gpt(), prompts(2, 3)
    s = step(model, 2)
    for n in range(3):
        found = s(ids[:, n : n + 1])
        torch.testing.assert_close(found, logits(model, ids[:, : n + 1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size, length", [(1, 1), (1, 9), (3, 4)])
def test_the_tokens_are_those_of_generate(dtype, batch_size, length):
    model, ids = gpt(dtype), prompts(batch_size, length)
    n_new = ROOM + 1 - length  # the last is not read
    got = step(model, batch_size).generate(ids, n_new)
    assert got.equal(generate(model, ids, n_new)) and got.dtype == ids.dtype
    assert step(model, batch_size).generate(ids, 0).equal(ids)


def rounded(model, dtype):
    """The same model with weights that have gone through a narrower type, and sums as before."""
    return model.to(dtype).to(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_stored_in_half_the_bits_it_is_the_model_with_rounded_weights(dtype, batch_size):
    ids = prompts(batch_size, 12)
    s = step(gpt(torch.float32), batch_size, dtype=dtype)
    assert {w.dtype for w in s.weights.values()} == {dtype} and s.cache[0].dtype == torch.float32
    got = [s.prefill(ids[:, :4]), *(s(ids[:, i : i + 1]) for i in range(4, 12))]
    plain = rounded(gpt(torch.float32), dtype)
    for n, found in enumerate(got, 4):
        exact = logits(rounded(gpt(torch.float32), dtype).double(), ids[:, :n])
        own = max(
            (logits(plain, ids[:, :n]).double() - exact).abs().max().item(),
            (logits(plain, ids[:, :n].repeat(2, 1))[:batch_size].double() - exact).abs().max(),
        )
        spacing = torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert (found.double() - exact).abs().max() <= 2 * own + 2 * spacing  # rule T2
    far = (logits(gpt(torch.float32), ids) - got[-1]).abs().max()
    assert far > 1e-3, "rounding that nobody sees tests nothing"


def test_a_model_in_bfloat16_is_summed_in_float32():
    model, ids = gpt(torch.bfloat16), prompts(1, 6)
    s = step(model)
    s.prefill(ids[:, :5])
    found, plain = s(ids[:, 5:]), gpt(torch.bfloat16).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(plain, ids), rtol=0, atol=2e-5)


def test_a_longer_text_before_leaves_no_trace():
    model, ids = gpt(), prompts(2, ROOM)
    s, fresh = step(model, 2), step(model, 2)
    s.prefill(ids[:, 1:])
    s(ids[:, :1])
    for each in (s, fresh):
        each.prefill(ids[:, :3])
    for i in range(3, 6):
        assert s(ids[:, i : i + 1]).equal(fresh(ids[:, i : i + 1]))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_prompt_clears_what_is_not_a_number(batch_size):
    model, ids = gpt(), prompts(batch_size, 8)
    s, poisoned = step(model, batch_size), step(model, batch_size)
    for buffer in poisoned.cache:
        buffer.fill_(math.nan)
    for each in (s, poisoned):
        each.prefill(ids[:, :4])
    for i in range(4, 8):
        found = poisoned(ids[:, i : i + 1])
        assert found.isfinite().all() and found.equal(s(ids[:, i : i + 1]))


def test_tokens_that_are_forgotten_leave_no_trace():
    model, ids = gpt(), prompts(2, ROOM)
    s, fresh = step(model, 2), step(model, 2)
    s.prefill(ids)
    s.truncate(3)
    fresh.prefill(ids[:, :3])
    for i in range(9, 12):
        torch.testing.assert_close(
            s(ids[:, i : i + 1]), fresh(ids[:, i : i + 1]), rtol=0, atol=1e-12
        )
    for n in (-1, 7):
        with pytest.raises(ValueError, match=f"{n} of 6"):
            s.truncate(n)
    s.truncate(0)
    torch.testing.assert_close(s(ids[:, :1]), fresh.prefill(ids[:, :1]), rtol=0, atol=1e-12)


def test_the_weights_are_a_copy():
    model, ids = gpt(), prompts(1, 4)
    before, s = logits(model, ids), step(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    s.prefill(ids[:, :3])
    torch.testing.assert_close(s(ids[:, 3:]), before, rtol=0, atol=1e-12)


def test_a_model_that_trains_is_read_in_eval_mode_and_goes_on_training():
    model, ids = gpt(dropout=0.5).train(), prompts(1, 4)
    s = step(model)
    found = s.prefill(ids[:, :3]), s(ids[:, 3:])
    assert all(module.training for module in model.modules())
    for n, x in enumerate(found, 3):
        assert not x.requires_grad
        torch.testing.assert_close(x, logits(model, ids[:, :n]), rtol=0, atol=1e-12)


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_steps_live_side_by_side_than_the_compiler_keeps_versions():
    for room in range(6, 10):
        model, ids = gpt(random_seed=room, n_layers=1), prompts(1, 4)
        assert step(model, max_len=room).generate(ids, 2).equal(generate(model, ids, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_choose_no_token_are_refused(value):
    model, ids = gpt(), prompts(2, 4)
    s = step(model, 2)
    s.weights["norm.bias"][0], s.weights["norm.weight"][0] = value, 0.0
    s.weights["tokens.weight"][:, 0] = 1.0
    s.prefill(ids)
    with pytest.raises(ValueError, match=f"new token 2 has .*{value}"):
        s.generate(ids, 4)


def test_the_whole_step_is_one_graph_compiled_once():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    s = step(gpt(), backend=backend)
    s.generate(prompts(1, 3), 9)
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_compiled_for_real_it_says_the_same(tmp_path, monkeypatch, batch_size):
    """Needs a C++ compiler, as torch.compile does everywhere.

    Nothing looks again at what the compiled code is handed: ids of another kind are to fit too.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, ids = gpt(torch.float32, n_layers=1), prompts(batch_size, 5)
    s = step(model, batch_size, dtype=torch.bfloat16, backend="inductor")
    exact, plain = (rounded(gpt(torch.float32, n_layers=1), torch.bfloat16) for _ in range(2))
    exact = exact.double()
    s.prefill(ids[:, :2])
    for n in range(2, 5):
        new = ids[:, n : n + 1] if n < 4 else ids[:, n : n + 1].int().contiguous()
        found, right = s(new), logits(exact, ids[:, : n + 1])
        own = (logits(plain, ids[:, : n + 1]).double() - right).abs().max()
        spacing = torch.finfo(torch.float32).eps * right.abs().max()
        assert (found.double() - right).abs().max() <= 2 * own + 2 * spacing


def refusals():
    text = torch.zeros(1, 1, dtype=torch.int64)
    yield "prompt too long", lambda s: s.prefill(text.expand(1, ROOM + 1)), "1 to 19"
    yield "prompt of two texts", lambda s: s.prefill(text.expand(2, 3)), r"1 texts.*\(2, 3\)"
    yield "empty prompt", lambda s: s.prefill(text[:, :0]), r"\(1, 0\)"
    yield "flat prompt", lambda s: s.prefill(text[0]), r"\(1,\)"
    yield "prompt of floats", lambda s: s.prefill(text.float()), "float32"
    yield "prompt beyond the words", lambda s: s.prefill(text + 61), "61"
    yield "token of two texts", lambda s: s(text.expand(2, 1)), r"\(2, 1\)"
    yield "two tokens", lambda s: s(text.expand(1, 2)), r"\(1, 2\)"
    yield "flat token", lambda s: s(text[0]), r"\(1,\)"
    yield "token of floats", lambda s: s(text.float()), "float32"
    yield "token beyond the words", lambda s: s(text + 61), "61"
    yield "negative token", lambda s: s(text - 1), "-1"
    yield "too many new", lambda s: s.generate(text, ROOM + 1), "20 new tokens"
    yield "fewer than none", lambda s: s.generate(text, -1), "-1"


@pytest.mark.parametrize("call, said", [pytest.param(f, m, id=n) for n, f, m in refusals()])
def test_a_refused_call_changes_nothing(call, said, unchecked):
    model, ids = gpt(), prompts(1, 5)
    s = step(model)
    s.prefill(ids[:, :4])
    with pytest.raises(ValueError, match=said):
        call(s)
    torch.testing.assert_close(s(ids[:, 4:]), logits(model, ids), rtol=0, atol=1e-12)


def test_a_full_cache_takes_no_token():
    s, ids = step(gpt(), max_len=3), prompts(1, 3)
    s.prefill(ids)
    with pytest.raises(ValueError, match="room for 3"):
        s(ids[:, :1])
    assert s.length == 3 and s.place.item() == 3


class Untied(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())


@pytest.mark.parametrize(
    "make, options, kind, said",
    [
        (gpt, {"max_len": 24}, ValueError, "23 positions"),
        (gpt, {"max_len": 0}, ValueError, "max_len 0"),
        (gpt, {"batch_size": 0}, ValueError, "batch 0"),
        (gpt, {"dtype": torch.int8}, ValueError, "int8"),
        (gpt, {"dtype": torch.complex64}, ValueError, "complex64"),
        (lambda: gpt().state_dict(), {}, TypeError, "OrderedDict"),
        (lambda: nn.Linear(2, 2), {}, ValueError, "Linear"),
        (lambda: Untied(GPTConfig(**SHAPE)), {}, ValueError, "Untied"),
        (lambda: attending(gpt(), lambda q, k, v, dropout: v), {}, ValueError, "attends"),
    ],
)
def test_what_it_does_not_know_it_refuses(make, options, kind, said, unchecked):
    with pytest.raises(kind, match=said):
        step(make(), **options)


def test_it_knows_every_weight_of_the_model():
    model = gpt()
    inside = {f"blocks.{i}.{name}" for i in range(2) for name in INSIDE}
    assert {name for name, _ in model.named_parameters()} == {*OUTSIDE, *inside}
