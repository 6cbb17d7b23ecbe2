"""The loss against torch's, and a loop that does the same to a large batch and to its parts."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from heed.checkpoints import read_checkpoint, save_checkpoint
from heed.gpt import GPT, GPTConfig
from heed.training import cross_entropy, inverse_root, schedule, train

f64 = torch.float64


def problem(B=3, T=7, V=11, dtype=f64, random_seed=0):
    draw = torch.Generator().manual_seed(random_seed)
    logits = torch.randn(B, T, V, dtype=f64, generator=draw).to(dtype)
    targets = torch.randint(V, (B, T), generator=draw)
    targets[0, :4] = -100
    targets[2] = -100
    return logits, targets


def tiny(dtype=f64, dropout=0.0, random_seed=0):
    torch.manual_seed(random_seed)
    config = GPTConfig(vocab_size=13, max_len=9, n_heads=2, d_model=10, dropout=dropout)
    return GPT(config).to(dtype)


def get_batch(draw, B=4, T=7):
    """Some targets do not count, and in every row another number of them."""
    ids = torch.randint(13, (B, T + 1), generator=draw)
    targets = ids[:, 1:].clone()
    asked = torch.randint(1, T, (B, 1), generator=draw)
    targets[torch.arange(T) < asked] = -100
    return ids[:, :-1], targets


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def same(xs, ys, atol=0.0):
    for x, y in zip(xs, ys, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


# The loss


def test_the_loss_and_its_gradient_are_torchs():
    logits, targets = problem()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = cross_entropy(ours, targets)
    want = F.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    got.backward()
    want.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-15)


def test_three_scores_that_are_logarithms_cost_what_fractions_say():
    logits = torch.tensor([1.0, 2.0, 3.0], dtype=f64).log()
    for target, share in enumerate((1 / 6, 2 / 6, 3 / 6)):
        got = cross_entropy(logits, torch.tensor(target)).item()
        assert got == pytest.approx(-math.log(share), abs=1e-15)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)])
def test_targets_may_have_any_number_of_axes(shape):
    logits, targets = torch.randn(*shape, 11, dtype=f64), torch.randint(11, shape)
    want = F.cross_entropy(logits.reshape(-1, 11), targets.reshape(-1))
    torch.testing.assert_close(cross_entropy(logits, targets), want, rtol=0, atol=1e-14)


def test_any_number_can_be_the_one_that_does_not_count():
    logits, targets = problem()
    shown = targets.where(targets != -100, 3)
    kept = (shown != 3)[..., None].expand_as(logits)
    want = cross_entropy(logits[kept].view(-1, 11), shown[shown != 3])
    torch.testing.assert_close(cross_entropy(logits, shown, ignore_index=3), want)


def test_rows_that_do_not_count_have_no_influence_whatever_they_hold():
    logits, targets = problem()
    spoilt = logits.masked_fill((targets == -100)[..., None], torch.nan).requires_grad_()
    loss = cross_entropy(spoilt, targets)
    loss.backward()
    assert loss.item() == cross_entropy(logits, targets).item()
    assert (spoilt.grad[targets == -100] == 0).all() and spoilt.grad.isfinite().all()


def test_scores_of_ten_thousand_are_exact():
    logits = torch.tensor([[1e4, 0.0], [1e4, 1e4]])
    assert cross_entropy(logits, torch.tensor([0, 0])).item() == pytest.approx(math.log(2) / 2)
    assert cross_entropy(logits, torch.tensor([1, 0])).item() == pytest.approx(5000.3465736)
    assert cross_entropy(-logits, torch.tensor([0, 0])).item() == pytest.approx(5000.3465736)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_smoothed_labels_and_their_gradient_are_torchs(share):
    logits, targets = problem()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = cross_entropy(ours, targets, label_smoothing=share)
    flat = theirs.flatten(0, 1), targets.flatten()
    want = F.cross_entropy(*flat, label_smoothing=share)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    got.backward()
    want.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-15)


def test_smoothed_labels_are_a_mixture_of_a_sure_and_an_even_answer():
    logits, targets = problem()
    kept = targets != -100
    answers = 0.7 * F.one_hot(targets[kept], 11).double() + 0.3 / 11
    want = -(answers * logits[kept].log_softmax(-1)).sum(-1).mean()
    got = cross_entropy(logits, targets, label_smoothing=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_no_smoothing_is_the_plain_loss_and_leaves_forbidden_words_alone():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    targets = torch.tensor([1])
    assert cross_entropy(logits, targets, label_smoothing=0.0).item() == pytest.approx(math.log(2))
    assert cross_entropy(logits, targets, label_smoothing=0.1).item() == math.inf


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_smoothing_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=f"{share}"):
        cross_entropy(*problem(), label_smoothing=share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype):
    logits, targets = problem(dtype=dtype)
    got, exact = cross_entropy(logits, targets), cross_entropy(logits.double(), targets)
    assert got.dtype == torch.float32 and abs(got - exact).item() < 1e-6
    assert cross_entropy(logits.double(), targets).dtype == f64


@pytest.mark.parametrize(
    "logits, targets, said",
    [
        (torch.randn(2, 5), torch.tensor([-100, -100]), "none of 2 targets counts"),
        (torch.randn(0, 5), torch.zeros(0).long(), "none of 0 targets"),
        (torch.randn(2, 5), torch.tensor([0, 5]), "from 0 to 5, but there are 5 words"),
        (torch.randn(2, 5), torch.tensor([-1, 4]), "from -1 to 4"),
        (torch.randn(2, 5), torch.tensor([0.0, 1.0]), "float32"),
        (torch.randn(2, 5), torch.tensor([True, False]), "bool"),
        (torch.randn(2, 5), torch.tensor([0, 1, 2]), r"\(2, 5\) and \(3,\)"),
        (torch.randn(2, 5), torch.tensor([[0, 1]]), r"\(1, 2\)"),
        (torch.randn(2, 3, 5), torch.zeros(3, 2).long(), r"\(2, 3, 5\) and \(3, 2\)"),
        (torch.tensor(1.0), torch.tensor(0), r"\(\) and \(\)"),
        (
            torch.ones(2, 5).long(),
            torch.tensor([0, 1]),
            "logits must be floating point, got torch.int64",
        ),
    ],
)
def test_targets_that_cannot_be_are_refused(logits, targets, said, unchecked):
    with pytest.raises(ValueError, match=said):
        cross_entropy(logits, targets)


# The schedule


def test_the_rate_goes_up_a_line_and_down_half_a_cosine():
    rates = [schedule(n, steps=110, warmup=10) for n in range(110)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.55)
    assert rates[35] == pytest.approx(0.1 + 0.9 * (2 + math.sqrt(2)) / 4)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0.1 < rates[-1] < 0.101


def test_the_floor_is_a_share_of_the_peak():
    assert schedule(99, steps=100, warmup=0, floor=0.0) == pytest.approx(0.00025, rel=0.02)
    assert schedule(99, steps=100, warmup=0, floor=1.0) == 1


def test_a_single_step_is_taken_at_the_peak_and_all_steps_may_be_warm_up():
    assert schedule(0, steps=1, warmup=0) == 1
    assert [schedule(n, steps=2, warmup=2) for n in range(2)] == [0.5, 1]


@pytest.mark.parametrize(
    "step, steps, warmup, floor, said",
    [
        (5, 5, 0, 0.1, "step 5 .* 5 steps"),
        (-1, 5, 0, 0.1, "step -1"),
        (0, 5, 6, 0.1, "warm-up of 6"),
        (0, 5, -1, 0.1, "warm-up of -1"),
        (0, 5, 1, 1.5, "1.5"),
        (0, 5, 1, math.nan, "nan"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(step, steps, warmup, floor, said):
    with pytest.raises(ValueError, match=said):
        schedule(step, steps=steps, warmup=warmup, floor=floor)


def test_the_rate_of_2017_goes_up_a_line_and_down_an_inverse_root():
    rates = [inverse_root(n, d_model=16, warmup=4) for n in range(64)]
    assert rates[:4] == pytest.approx([1 / 32, 2 / 32, 3 / 32, 4 / 32])  # a quarter of 1/√4
    assert max(rates) == rates[3]
    assert [rates[n] for n in (8, 15, 63)] == pytest.approx([1 / 12, 1 / 16, 1 / 32])
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))
    # The base model of the paper: width 512, 4,000 steps of warm-up.
    assert inverse_root(3999, d_model=512, warmup=4000) == pytest.approx(6.9877e-4, rel=1e-4)


@pytest.mark.parametrize(
    "step, d_model, warmup, said",
    [(-1, 8, 4, "step -1"), (0, 0, 4, "d_model 0"), (0, 8, 0, "warmup 0"), (0, 8, -3, "-3")],
)
def test_a_rate_of_2017_that_does_not_exist_is_refused(step, d_model, warmup, said):
    with pytest.raises(ValueError, match=said):
        inverse_root(step, d_model=d_model, warmup=warmup)


# The loop


def by_hand(model, steps, lr, random_seed):
    """The same loop, a parameter at a time: AdamW from its paper, clipping and the schedule."""
    draw = torch.Generator().manual_seed(random_seed)
    means, squares, losses = {}, {}, []
    for n in range(1, steps + 1):
        ids, targets = get_batch(draw)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        names, ps = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, ps)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        rate = lr * schedule(n - 1, steps=steps, warmup=steps // 10)
        for name, p, g in zip(names, ps, gradients, strict=True):
            g = g * min(1, 1 / (norm + 1e-6))
            means[name] = 0.9 * means.get(name, 0) + 0.1 * g
            squares[name] = 0.95 * squares.get(name, 0) + 0.05 * g**2
            mean, square = means[name] / (1 - 0.9**n), squares[name] / (1 - 0.95**n)
            decay = 0.1 if p.ndim == 2 else 0.0
            p.data = p.data * (1 - rate * decay) - rate * mean / (square.sqrt() + 1e-8)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("size", [1.0, 30.0])  # gradients below and above the limit of 1
def test_the_loop_is_adamw_with_clipping_and_the_schedule(size):
    ours, hand = tiny(), tiny()
    for model in (ours, hand):
        model.norm.weight.data *= size
    got = train(ours, get_batch, steps=20, lr=1e-2, random_seed=5)
    want = by_hand(hand, steps=20, lr=1e-2, random_seed=5)
    assert got == pytest.approx(want, abs=1e-8)
    same(parameters(ours), parameters(hand), atol=1e-6)


def test_the_losses_go_down_to_those_of_the_task():
    def repeat(draw):  # the same token eight times: only the first is a surprise
        ids = torch.randint(13, (32, 1), generator=draw).expand(32, 8)
        return ids, ids

    losses = train(tiny(torch.float32), repeat, steps=150, lr=1e-2, random_seed=0)
    assert len(losses) == 150
    assert losses[0] == pytest.approx(math.log(13), rel=0.05) and losses[-1] < 0.05


def test_parts_of_unequal_size_give_what_one_large_batch_gives():
    def parts(draw):
        ids, targets = get_batch(draw, B=4 if count[0] % 3 else 1)
        if count[0] % 3 == 2:
            targets = torch.full_like(targets, -100)  # a part in which nothing counts
        count[0] += 1
        return ids, targets

    def whole(draw):
        ids, targets = zip(*(parts(draw) for _ in range(3)), strict=True)
        return torch.cat(ids), torch.cat(targets)

    count, small, large = [0], tiny(), tiny()
    rate = {"steps": 10, "lr": 1e-2, "random_seed": 0}
    got = train(small, parts, **rate, accumulate=3)
    want = train(large, whole, **rate)
    assert got == pytest.approx(want, abs=1e-12)
    same(parameters(small), parameters(large), atol=1e-8)


def test_the_rate_may_be_a_function_of_the_step():
    one, other = tiny(), tiny()
    train(one, get_batch, steps=10, lr=1e-2, random_seed=0)
    rates = [1e-2 * schedule(n, steps=10, warmup=1) for n in range(10)]
    train(other, get_batch, steps=10, lr=lambda n: rates[n], random_seed=0)
    same(parameters(one), parameters(other))


def test_a_rate_of_zero_moves_nothing():
    model = tiny()
    before = parameters(model)
    train(model, get_batch, steps=3, lr=0.0, random_seed=0)
    same(parameters(model), before)


def test_no_steps_give_no_losses():
    assert train(tiny(), get_batch, steps=0, lr=1e-2, random_seed=0) == []


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_seed_decides_everything(dropout):
    runs = []
    for seed, noise in [(1, 0), (1, 99), (2, 0)]:
        model = tiny(dropout=dropout)
        torch.manual_seed(noise)
        losses = train(model, get_batch, steps=5, lr=1e-2, random_seed=seed)
        runs.append((losses, parameters(model)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    same(runs[0][1], runs[1][1])


def test_dropout_is_on_and_noise_does_not_repeat_the_numbers_of_the_data():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.dropout = nn.Embedding(13, 13), nn.Dropout(0.5)

        def forward(self, ids):
            noise.append(torch.rand(64))
            silent.append(self.dropout(torch.ones(64)) == 0)
            return self.table(ids)

    def watched(draw):
        drawn.append(torch.rand(64, generator=draw))
        return get_batch(draw)

    noise, silent, drawn = [], [], []
    train(Noisy().eval(), watched, steps=20, lr=0.0, random_seed=0)
    assert not torch.equal(noise[0], drawn[0])
    assert 0.4 < torch.stack(silent).double().mean() < 0.6
    assert not torch.equal(silent[0], silent[1])


def test_all_that_is_not_a_parameter_is_left_as_it_was():
    model = tiny(dropout=0.3).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    train(model, get_batch, steps=2, lr=1e-2, random_seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_stay():
    model = tiny()
    model.positions.requires_grad_(False)
    before, rest = model.positions.weight.clone(), model.tokens.weight.detach().clone()
    train(model, get_batch, steps=2, lr=1e-2, random_seed=0)
    assert torch.equal(model.positions.weight, before)
    assert not torch.equal(model.tokens.weight, rest)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_no_number_stops_at_its_step_with_the_last_good_weights(bad):
    class Fails(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.gpt, self.step, self.at = tiny(), 0, at

        def forward(self, ids):
            self.step += 1
            return self.gpt(ids) * (bad if self.step == self.at else 1)

    model, good, state = Fails(at=4).eval(), Fails(at=0), torch.get_rng_state()
    rate = {"lr": lambda step: 1e-2, "random_seed": 0}
    with pytest.raises(ValueError, match="step 3: loss nan"):
        train(model, get_batch, steps=9, **rate)
    train(good, get_batch, steps=3, **rate)
    same(parameters(model), parameters(good))
    assert not model.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


class Root(nn.Module):
    """Its value is finite where its slope is not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(13))

    def forward(self, ids):
        return self.w.sqrt().expand(*ids.shape, 13)


class Forbids(Root):
    """Its slope is finite where its value is not."""

    def forward(self, ids):
        return self.w.masked_fill(torch.arange(13) > 3, -math.inf).expand(*ids.shape, 13)


@pytest.mark.parametrize(
    "model, said", [(Root(), "loss 2.56.* norm (nan|inf)"), (Forbids(), "loss inf.* norm 0")]
)
def test_the_loss_and_its_gradient_must_both_be_numbers(model, said):
    with pytest.raises(ValueError, match=f"step 0: {said}"):
        train(model, get_batch, steps=1, lr=1e-2, random_seed=0)
    assert (model.w == 0).all()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"steps": -1}, "steps .* -1"),
        ({"lr": -1e-3}, "lr .* -0.001"),
        ({"lr": math.nan}, "lr .* nan"),
        ({"lr": math.inf}, "lr .* inf"),
        ({"lr": lambda step: math.nan if step else 1e-3}, "step 1: the learning rate .* nan"),
        ({"accumulate": 0}, "accumulate 0"),
        (
            {"get_batch": lambda draw: (torch.zeros(2, 3).long(), torch.full((2, 3), -100))},
            "in any",
        ),
        ({"get_batch": lambda draw: (torch.zeros(2, 3).long(), torch.zeros(2, 4).long())}, "2, 4"),
        ({"model": tiny().requires_grad_(False)}, "no parameter"),
    ],
)
def test_a_run_that_cannot_be_is_refused(settings, said, unchecked):
    run = {"model": tiny(), "get_batch": get_batch, "steps": 2, "lr": 1e-3, "random_seed": 0}
    with pytest.raises(ValueError, match=said):
        train(**run | settings)


# Half precision


class Watched(nn.Module):
    """Takes down in which type its product came out."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gpt, self.seen = tiny(dtype), set()

    def forward(self, ids):
        logits = self.gpt(ids)
        self.seen.add(logits.dtype)
        return logits


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_products_are_in_bfloat16_and_weights_and_loss_in_float32(autocast):
    model, exact, run = Watched(), tiny(f64), {"steps": 20, "lr": 1e-2, "random_seed": 0}
    got = train(model, get_batch, **run, accumulate=2, autocast=autocast)
    want = train(exact, get_batch, **run, accumulate=2)
    assert model.seen == {autocast or torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert got != want and got == pytest.approx(want, rel=2e-2 if autocast else 1e-4)


def test_the_loss_of_bfloat16_products_is_made_in_float32():
    ids, targets = get_batch(torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logits = tiny(torch.float32)(ids)
    want = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten()).item()
    run = {"steps": 1, "lr": 1e-2, "random_seed": 0, "autocast": torch.bfloat16}
    assert train(tiny(torch.float32), get_batch, **run) == pytest.approx([want], abs=1e-6)


@pytest.mark.parametrize(
    "dtype, autocast, said",
    [
        (torch.float32, torch.float16, "got torch.float16"),
        (torch.float32, torch.float32, "got torch.float32"),
        (f64, torch.bfloat16, "float32, got {torch.float64}"),
        (torch.bfloat16, torch.bfloat16, "float32, got {torch.bfloat16}"),
    ],
)
def test_other_ways_to_mix_types_are_refused(dtype, autocast, said):
    with pytest.raises(ValueError, match=said):
        train(tiny(dtype), get_batch, steps=1, lr=1e-3, random_seed=0, autocast=autocast)


# Stopped and gone on


class Stop(Exception):
    pass


def stopping_at(n):
    """`get_batch` until its call n."""
    calls = [0]

    def draws(draw):
        calls[0] += 1
        if calls[0] > n:
            raise Stop
        return get_batch(draw)

    return draws


RUN = {"steps": 7, "lr": 1e-2, "random_seed": 3, "accumulate": 2}
NOISY = {"dtype": torch.float32, "dropout": 0.3}


def bits(model):
    return [p.detach().view(torch.uint8).tolist() for p in model.parameters()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Losses, weights and the file at the end of a run that nobody stopped."""
    torch.set_num_threads(1)
    model, path = tiny(**NOISY), tmp_path_factory.mktemp("unbroken") / "run"
    losses = train(model, get_batch, **RUN, checkpoint=path)
    return losses, bits(model), path.read_bytes()


def test_writing_checkpoints_changes_nothing(unbroken):
    model = tiny(**NOISY)
    assert train(model, get_batch, **RUN) == unbroken[0] and bits(model) == unbroken[1]


@pytest.mark.parametrize(
    "batches", range(15)
)  # between two steps, and between a step's two batches
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(tmp_path, unbroken, batches):
    path = tmp_path / "run"
    file = {"checkpoint": path, "checkpoint_every": 1}
    try:
        train(tiny(**NOISY), stopping_at(batches), **RUN, **file)
    except Stop:
        assert read_checkpoint(path).step == batches // 2
    torch.manual_seed(batches)  # another process starts with another model, and another noise
    model = tiny(**NOISY, random_seed=batches + 1)
    losses = train(model, get_batch, **RUN, **file)
    assert losses == unbroken[0] and bits(model) == unbroken[1]
    assert path.read_bytes() == unbroken[2]


def test_a_run_may_be_stopped_again_and_again(tmp_path, unbroken):
    path, stops = tmp_path / "run", 0
    file = {"checkpoint": path, "checkpoint_every": 3}
    while True:
        model = tiny(**NOISY, random_seed=stops)
        try:
            losses = train(model, stopping_at(7), **RUN, **file)
            break
        except Stop:
            stops += 1
    assert stops == 2 and losses == unbroken[0] and bits(model) == unbroken[1]


def test_bfloat16_goes_on_bit_for_bit_too(tmp_path):
    run = RUN | {"autocast": torch.bfloat16}
    whole, parts, path = tiny(**NOISY), tiny(**NOISY), tmp_path / "run"
    losses = train(whole, get_batch, **run)
    with pytest.raises(Stop):
        train(parts, stopping_at(9), **run, checkpoint=path, checkpoint_every=2)
    assert train(parts, get_batch, **run, checkpoint=path) == losses and bits(parts) == bits(whole)


KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
import torch
from test_training import NOISY, bits, get_batch, read_checkpoint, tiny, train
torch.set_num_threads(1)
chance, path = random.Random(0), sys.argv[1]
run = {"steps": 120, "lr": 1e-2, "random_seed": 3}
train(tiny(), get_batch, **run | {"steps": 1})  # torch imports much at the first step
whole = tiny(**NOISY)
start = time.perf_counter()
losses = train(whole, get_batch, **run)
window = (time.perf_counter() - start) / 6

steps, kills = set(), 0
while kills < 40 or not os.path.exists(path):  # the last one may be killed before its first save
    child = os.fork()
    if child == 0:
        train(tiny(**NOISY), get_batch, **run, checkpoint=path, checkpoint_every=1)
        os._exit(0)
    time.sleep(chance.uniform(0.0, window))
    os.kill(child, signal.SIGKILL)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    if os.path.exists(path):
        steps.add(read_checkpoint(path).step)
        if 120 in steps and kills < 40:  # a fast machine starts again
            steps.remove(120)
            os.unlink(path)

model = tiny(**NOISY, random_seed=1)
assert train(model, get_batch, **run, checkpoint=path) == losses
assert bits(model) == bits(whole)
print(len(steps), os.listdir(os.path.dirname(path)))
"""


def test_a_run_killed_40_times_ends_with_the_weights_of_one_that_was_not(tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), here]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    places, left = done.stdout.split(maxsplit=1)  # the kills fell at many steps
    assert int(places) > 5 and left.strip() == "['run']"


def test_a_finished_run_gives_its_weights_and_losses_again_without_a_step(tmp_path, unbroken):
    (tmp_path / "run").write_bytes(unbroken[2])
    model = tiny(**NOISY, random_seed=1)
    assert train(model, stopping_at(0), **RUN, checkpoint=tmp_path / "run") == unbroken[0]
    assert bits(model) == unbroken[1]


def test_without_a_number_of_steps_only_the_first_and_the_last_state_are_written(tmp_path):
    with pytest.raises(Stop):
        train(tiny(**NOISY), stopping_at(13), **RUN, checkpoint=tmp_path / "run")
    assert read_checkpoint(tmp_path / "run").step == 0


def test_a_run_whose_rate_is_a_function_may_be_made_longer(tmp_path):
    run = {"lr": lambda step: 1e-2 / (step + 1), "random_seed": 0, "checkpoint": tmp_path / "run"}
    whole, parts = tiny(), tiny()
    losses = train(whole, get_batch, **run | {"checkpoint": None}, steps=9)
    assert train(parts, get_batch, **run, steps=4) == losses[:4]
    assert train(parts, get_batch, **run, steps=9) == losses
    same(parameters(parts), parameters(whole))
    with pytest.raises(ValueError, match="has done 9 steps, more than 8"):
        train(parts, get_batch, **run, steps=8)


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 8},
        {"lr": 2e-2},
        {"lr": lambda step: 1e-2},
        {"random_seed": 4},
        {"accumulate": 1},
        {"autocast": torch.bfloat16},
    ],
)
def test_a_checkpoint_made_with_other_settings_is_refused(tmp_path, unbroken, other):
    (tmp_path / "run").write_bytes(unbroken[2])
    model = tiny(**NOISY, random_seed=1).eval()
    before, noise = bits(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"comes from a run with .*'{[*other][0]}'"):
        train(model, stopping_at(0), **RUN | other, checkpoint=tmp_path / "run")
    assert bits(model) == before and (tmp_path / "run").read_bytes() == unbroken[2]
    assert torch.equal(torch.get_rng_state(), noise) and not model.training


def test_a_file_that_no_run_has_made_or_that_is_damaged_is_refused(tmp_path, unbroken):
    model, run = tiny(**NOISY, random_seed=1), RUN | {"checkpoint": tmp_path / "run"}
    before = bits(model)
    save_checkpoint(tmp_path / "run", model)
    with pytest.raises(ValueError, match="from a run with None"):
        train(model, get_batch, **run)
    (tmp_path / "run").write_bytes(unbroken[2][:-1])
    with pytest.raises(ValueError, match="damaged"):
        train(model, get_batch, **run)
    with pytest.raises(ValueError, match="not a file"):
        train(model, get_batch, **run | {"checkpoint": tmp_path})
    assert bits(model) == before


def test_a_place_that_cannot_be_written_to_shows_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        train(tiny(), stopping_at(0), **RUN, checkpoint=tmp_path / "nowhere/run")


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(tmp_path):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt, self.step = tiny(), 0

        def forward(self, ids):
            self.step += 1
            return self.gpt(ids) * (torch.nan if self.step == 6 else 1)

    model, path, run = Fails(), tmp_path / "run", {"lr": lambda step: 1e-2, "random_seed": 0}
    with pytest.raises(ValueError, match="step 5: loss nan"):
        train(model, get_batch, steps=9, **run, checkpoint=path, checkpoint_every=2)
    good = tiny()
    losses = train(good, get_batch, steps=4, **run)
    saved = read_checkpoint(path)
    assert saved.step == 4 and saved.notes["losses"] == losses
    weights = saved.part("model")
    assert all(torch.equal(weights[f"gpt.{name}"], p) for name, p in good.named_parameters())
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"checkpoint_every": 2}, "checkpoint None, checkpoint_every 2"),
        ({"checkpoint": "run", "checkpoint_every": 0}, "checkpoint_every 0"),
    ],
)
def test_writing_nowhere_or_never_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        train(tiny(), stopping_at(0), **RUN, **settings)
