"""bench/ablation.py: its recipe against the training loop, its file against what a page says."""

import json
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench import ablation
from heed import training

RECORD = json.loads(ablation.RESULTS.read_text("utf8"))


def test_the_recipe_is_that_of_the_training_loop(monkeypatch):
    monkeypatch.setitem(ablation.SETTINGS, "steps", 20)
    monkeypatch.setitem(ablation.SETTINGS, "n_layers", 2)
    recipe = ablation.Recipe()
    ours, theirs = (ablation.build(recipe, 5).double() for _ in "12")
    got = list(ablation.descend(recipe, 5, ours))

    def get_batch(draw):
        ((ids, targets, _),) = ablation.batches(recipe, draw)
        return ids, targets

    want = training.train(theirs, get_batch, steps=20, lr=recipe.lr, random_seed=5)
    assert got == pytest.approx(want, abs=1e-9)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_accumulated_by_tokens_is_one_batch_with_padding():
    recipe = ablation.Recipe(accumulate="by tokens")
    model = ablation.build(recipe, 1).double()
    parts = ablation.batches(recipe, torch.Generator().manual_seed(3))
    assert [targets.shape for _, targets, _ in parts] == [(8, 24), (8, 4)]
    loss = sum(training.cross_entropy(model(ids), y) * share for ids, y, share in parts)
    ids, targets = torch.zeros(2, 16, 24, dtype=torch.int64)
    targets.fill_(-100)
    for rows, (x, y, _) in zip((slice(0, 8), slice(8, 16)), parts, strict=True):
        ids[rows, : x.shape[1]], targets[rows, : y.shape[1]] = x, y
    torch.testing.assert_close(loss, training.cross_entropy(model(ids), targets))
    wrong = ablation.batches(ablation.Recipe(accumulate="by batches"), torch.Generator())
    assert [share for *_, share in wrong] == [0.5, 0.5] != [share for *_, share in parts]


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_a_step_without_correction_is_a_step_of_the_raw_averages(betas, monkeypatch):
    monkeypatch.setitem(ablation.SETTINGS, "steps", 4)
    raw = ablation.Recipe(correct=False, betas=betas, warmup=False, clip=math.inf, init="torch")
    model = ablation.build(raw, 1).double()
    start = [p.detach().clone() for p in model.parameters()]
    seen: list[list[torch.Tensor]] = []

    def record_gradients(optimizer, *args, **kwargs):
        seen.append([p.grad.clone() for p in model.parameters()])

    hook = register_optimizer_step_pre_hook(record_gradients)
    try:
        list(ablation.descend(raw, 1, model))
    finally:
        hook.remove()
    assert len(seen) == 4
    for n, (theta, p) in enumerate(zip(start, model.parameters(), strict=True)):
        m = v = torch.zeros_like(theta)
        decay = raw.decay if theta.ndim > 1 else 0.0
        for step in range(4):
            g, lr = seen[step][n], ablation.rate(raw, step)
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
            # torch's epsilon stands beside the corrected root
            root = v.sqrt() + 1e-8 * (1 - betas[1] ** (step + 1)) ** 0.5
            theta = theta * (1 - lr * decay) - lr * m / root
        torch.testing.assert_close(p.detach(), theta, atol=1e-9, rtol=0)


def test_a_perfect_reader_is_at_zero_and_a_guesser_far_above():
    assert abs(ablation.above(lambda ids: ablation.language().predictive(ids).log())) < 1e-12
    assert ablation.above(lambda ids: torch.zeros(*ids.shape, 89)) > 3


def test_every_run_differs_from_the_recipe_in_what_its_name_says():
    recipes = list(ablation.RUNS.values())
    assert len(set(recipes)) == len(recipes) and recipes[0] == ablation.Recipe()
    hidden = ablation.optimizers(ablation.RUNS["Muon"], ablation.build(recipes[0], 1))[1]
    assert all(p.ndim == 2 for group in hidden.param_groups for p in group["params"])
    kinds = {p.dtype for p in ablation.build(ablation.RUNS["bf16 weights"], 1).parameters()}
    assert kinds == {torch.bfloat16}
    deep = ablation.build(ablation.RUNS["no depth scaling"], 1).blocks[3].mlp.down.weight
    assert abs(deep.std().item() - 0.02) < 0.001


# The recording


def above(name):
    return [RECORD["runs"][f"{name}, seed {seed}"]["above"] for seed in ablation.SEEDS]


def test_the_record_is_whole_and_says_how_it_was_made():
    assert RECORD["settings"] == ablation.SETTINGS and len(ablation.SEEDS) >= 3
    want = {f"{name}, seed {seed}" for name in ablation.RUNS for seed in ablation.SEEDS}
    assert RECORD["runs"].keys() == want
    for run in RECORD["runs"].values():
        assert run.keys() >= {"date", "device", "versions", "seconds", "above", "losses"}
        assert len(run["losses"]) == 10 and all(map(math.isfinite, [run["above"], *run["losses"]]))


def test_the_record_took_about_twelve_minutes_on_a_busy_machine():
    assert sum(run["seconds"] for run in RECORD["runs"].values()) < 750


@pytest.mark.parametrize(
    "worse",
    [
        "no warm-up",
        "no cosine",
        "no depth scaling",
        "torch's initialisation",
        "dropout 0.2",
        "label smoothing 0.1",
        "beta2 0.999, no bias correction",
    ],
)
def test_what_the_chapter_calls_worse_is_worse_for_every_seed(worse):
    assert min(above(worse)) > max(above("the recipe"))


def test_the_large_damages_are_large():
    best = max(above("the recipe"))
    assert min(above("decay in the gradient")) > best + 1
    assert min(min(above(f"SGD, lr {lr}")) for lr in ("0.1", "1", "3")) > best + 2.5
    assert min(above("a tenth of the lr, bf16 weights")) > max(above("a tenth of the lr")) + 0.05
    assert min(above("accumulated by batches")) > max(above("accumulated by tokens"))
    assert min(above("32 texts")) > 1.5 * max(above("32 texts, dropout 0.2"))


@pytest.mark.parametrize(
    "same", ["no clipping", "no bias correction", "no weight decay", "autocast"]
)
def test_what_the_chapter_calls_no_damage_overlaps_with_the_recipe(same):
    assert min(above(same)) <= max(above("the recipe"))
    assert sum(above(same)) - sum(above("the recipe")) < 3 * 0.01


def test_muon_ends_below_the_recipe_for_every_seed():
    assert max(above("Muon")) < min(above("the recipe"))
