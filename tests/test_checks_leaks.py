"""heed.checks.leaks on models that leak in known places, and on models that do not."""

import pytest
import torch
from torch import nn

from heed import masks
from heed.attention import attention
from heed.checks import leaks
from heed.checks.leaks import by_change, by_gradient
from heed.gpt import GPT, GPTConfig

WAYS = [by_change, by_gradient]
IDS = torch.randint(13, (2, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stack(mask, n=1):
    """n layers of attention without weights."""

    def model(x):
        for _ in range(n):
            x = x + attention(x[:, None], x[:, None], x[:, None], mask)[:, 0]
        return x

    return model


def gpt(layers=2):
    torch.manual_seed(0)
    shape = {"n_layers": layers, "n_heads": 2, "d_model": 16}
    return GPT(GPTConfig(vocab_size=13, max_len=11, dropout=0.1, **shape))


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_our_gpt_reads_exactly_the_past_and_leaks_nothing(by, dtype):
    model = gpt().to(dtype).eval()
    assert leaks(model, IDS, by=by) == []
    assert torch.equal(by(model, IDS), torch.ones(7, 7).tril().bool())


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize(
    "mask", [masks.full, masks.causal, masks.window(3), lambda b, h, i, j: j < i]
)
def test_what_flows_through_one_layer_is_its_mask_and_oneself(by, mask):
    want = masks.table(mask, 1, 1, 7, 7)[0, 0] | torch.eye(7).bool()
    assert torch.equal(by(stack(mask), X), want)


@pytest.mark.parametrize("by", WAYS)
def test_what_flows_through_layers_is_the_power_of_the_mask(by):
    assert torch.equal(
        by(stack(masks.window(3), 2), X), masks.table(masks.window(5), 1, 1, 7, 7)[0, 0]
    )
    assert leaks(stack(masks.window(3), 2), X, by=by, mask=masks.window(5)) == []
    assert leaks(stack(masks.window(3), 2), X, by=by, mask=masks.window(4)) == [
        (s, s + 4) for s in range(3)
    ]


@pytest.mark.parametrize("by", WAYS)
def test_one_open_pair_is_found_and_named_from_to(by):
    def peep(b, h, i, j):
        return (j <= i) | ((i == 2) & (j == 5))

    assert leaks(stack(peep), X, by=by) == [(5, 2)]
    # In a second layer, whoever reads 2 hears of 5, and 2 hears of all that 5 has read.
    assert leaks(stack(peep, 2), X, by=by) == [(3, 2), (4, 2), (5, 2), (5, 3), (5, 4)]


@pytest.mark.parametrize("by", WAYS)
def test_a_leak_in_one_text_of_the_batch_is_enough(by):
    second = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
    assert len(leaks(lambda x: x + second * x.flip(1), X, by=by)) == 3


@pytest.mark.parametrize("by", WAYS)
def test_what_the_mask_allows_is_no_leak(by):
    assert leaks(stack(masks.full), X, by=by, mask=masks.full) == []


@pytest.mark.parametrize("by", WAYS)
def test_a_norm_over_positions_leaks_from_everywhere(by):
    assert len(leaks(lambda x: x - x.mean(dim=1, keepdim=True), X, by=by)) == 21


def test_a_count_has_no_gradient_and_is_seen_by_change_alone():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(13, 5)

        def forward(self, ids):
            return self.tokens(ids) + (ids == ids[:, -1:]).sum(dim=1)[:, None, None]

    model = Counts()
    assert leaks(model, IDS, by=by_gradient) == []
    assert {t for _, t in leaks(model, IDS)} == set(range(6))


def test_any_function_of_ids_can_be_asked():
    def running(ids):
        return ids.cumsum(dim=1)[..., None].double()

    assert leaks(running, IDS) == []
    assert len(leaks(lambda ids: running(ids.flip(1)).flip(1), IDS)) == 21


def test_a_constant_sum_does_not_hide_a_gradient():
    flow = by_gradient(lambda x: x.softmax(-1), X)
    assert torch.equal(flow, torch.eye(7).bool())


@pytest.mark.parametrize("by", WAYS)
def test_inputs_and_model_stay_as_they_were(by):
    model, ids = gpt().eval(), IDS.clone()
    before = model(ids).detach()
    leaks(model, ids, by=by)
    assert torch.equal(ids, IDS) and torch.equal(model(ids), before)
    assert all(p.grad is None for p in model.parameters())
    assert not model.tokens._forward_hooks


def test_both_ways_work_under_no_grad():
    with torch.no_grad():
        assert leaks(gpt().eval(), IDS, by=by_gradient) == leaks(gpt().eval(), IDS) == []


def identity(x):
    return x.double()


BAD = {
    "floats of rank 2": (lambda by: leaks(identity, X[0], by=by), r"\(7, 5\)"),
    "ids of rank 3": (lambda by: leaks(identity, IDS[None], by=by), r"\(1, 2, 7\)"),
    "bools": (lambda by: leaks(identity, IDS > 3, by=by), "bool"),
    "one position": (lambda by: leaks(identity, X[:, :1], by=by), r"\(2, 1, 5\)"),
    "no sequences": (lambda by: leaks(identity, X[:0], by=by), r"\(0, 7, 5\)"),
    "all ids the same": (lambda by: leaks(gpt().eval(), 0 * IDS + 3, by=by), "3 to 3"),
    "negative ids": (lambda by: leaks(gpt().eval(), IDS - 20, by=by), "negative"),
    "a position lost": (lambda by: leaks(lambda x: x[:, 1:], X, by=by), r"\(2, 6, 5\)"),
    "a pooled answer": (lambda by: leaks(lambda x: x.mean(1), X, by=by), r"\(2, 5\) came out"),
    "a tuple": (lambda by: leaks(lambda x: (x, x), X, by=by), "tuple"),
    "integers": (lambda by: leaks(lambda x: x.long(), X, by=by), "int64"),
    "NaN": (lambda by: leaks(lambda x: x / 0 * 0, X, by=by), "NaN"),
    "a mask for other sizes": (
        lambda by: leaks(stack(masks.causal), X, by=by, mask=masks.padding(torch.tensor([3, 3]))),
        "batch of 1",
    ),
}


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("name", BAD)
def test_bad_questions_are_refused_by_name(name, by, unchecked):
    ask, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        ask(by)


@pytest.mark.parametrize("by", WAYS)
def test_a_list_is_not_a_tensor(by, unchecked):
    with pytest.raises(TypeError, match="list"):
        leaks(identity, [[1, 2]], by=by)


def test_a_model_with_dropout_on_is_refused():
    with pytest.raises(ValueError, match="model.eval()"):
        leaks(gpt().train(), IDS)


def test_ids_without_an_embedding_have_no_gradient():
    with pytest.raises(ValueError, match="by_change"):
        leaks(lambda ids: ids[..., None].double(), IDS, by=by_gradient)


def test_an_output_cut_off_from_its_inputs_is_refused():
    with pytest.raises(ValueError, match="no_grad"):
        leaks(lambda x: x.detach(), X, by=by_gradient)
