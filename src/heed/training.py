"""The loss a language model goes down, and the loop that takes it there.

Works with any `model(ids) -> logits`. V words · N axes of any number and kind, as a rule (B, T).
AdamW's settings are those of GPT-3 (Brown et al. 2020, appendix B).
"""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed.checkpoints import Checkpoint, read_checkpoint, restore
from heed.checkpoints import load_checkpoint as load_checkpoint  # to be had from here too
from heed.checkpoints import save_checkpoint as save_checkpoint

Batch = tuple[Tensor, Tensor]
IGNORED = -100


def cross_entropy(
    logits: Float[Tensor, "*N V"],
    targets: Int[Tensor, "*N"],
    *,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean of ln Σᵥ exp(logitsᵥ) - logits[target], in nats, over the targets that count.

    A target equal to `ignore_index` does not count. Half precision is averaged in float32.
    `label_smoothing` ε spreads a share ε of every target evenly over all V words (Szegedy et al.
    2016): (1 - ε) logits[target] + ε mean(logits) stands where logits[target] stood.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label smoothing is a share from 0 to 1, got {label_smoothing}")
    kept = _kept(logits, targets, ignore_index)
    # Only the rows that count go on: a NaN in a row that does not is never multiplied by zero.
    rows = logits[kept].to(torch.promote_types(logits.dtype, torch.float32))  # (n, V)
    rows = rows - rows.detach().amax(1, keepdim=True)  # the largest is 0: exp cannot overflow
    chosen = rows.gather(1, targets[kept].long()[:, None])
    if label_smoothing:  # a forbidden word, score -inf, costs nothing as long as nobody asks for it
        chosen = (1 - label_smoothing) * chosen + label_smoothing * rows.mean(1, keepdim=True)
    return (rows.exp().sum(1, keepdim=True).log() - chosen).mean()


def schedule(step: int, *, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Share of the peak learning rate: up a straight line, then down half a cosine to the floor."""
    if not 0 <= warmup <= steps or not 0 <= step < steps:
        raise ValueError(f"step {step} with a warm-up of {warmup} does not fit {steps} steps")
    if not 0 <= floor <= 1:
        raise ValueError(f"the floor is a share of the peak, got {floor}")
    if step < warmup:
        return (step + 1) / warmup  # not step / warmup: the first step would teach nothing
    done = (step - warmup) / (steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def inverse_root(step: int, *, d_model: int, warmup: int) -> float:
    """d_model^-½ min((step+1)^-½, (step+1) warmup^-1½): a rate, not a share of one.

    Vaswani et al. 2017, equation 3, with steps counted from 0 as everywhere here. The highest rate,
    (d_model warmup)^-½, belongs to step warmup - 1; after it, four times the steps halve the rate.
    """
    if step < 0 or d_model < 1 or warmup < 1:
        given = f"step {step}, d_model {d_model}, warmup {warmup}"
        raise ValueError(f"steps count from 0, widths and warm-ups from 1, got {given}")
    return d_model**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup**-1.5)


def train(
    model: nn.Module,
    get_batch: Callable[[torch.Generator], Batch],
    *,
    steps: int,
    lr: float | Callable[[int], float],
    random_seed: int,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
) -> list[float]:
    """The loss of every step, before it was taken. Changes the model's parameters and nothing else.

    `get_batch(generator)` draws ids and targets; a target of -100 does not count. `lr` is the peak
    of `schedule` with a tenth of the steps as warm-up, or a function of the step that is used as it
    is. A step reads `accumulate` batches as if they were one. The seed decides data and dropout.
    `autocast=torch.bfloat16` runs matrix products in bfloat16; weights and loss stay in float32.
    A loss or gradient that is not finite raises ValueError, and the last good weights stay.

    `checkpoint` names a file. If it is missing, it is written before the first step, then after the
    last and every `checkpoint_every` steps. If it exists, the run goes on from there, bit for bit
    (one machine, one number of threads), and returns all losses from step 0. Made with other
    settings it is refused; functions cannot be compared: `lr` as a function, `get_batch` and the
    model's own settings, dropout for one, must be the same. `get_batch` must keep no state.
    """
    rate = _rate(lr, steps)
    _check(model, accumulate, autocast, checkpoint, checkpoint_every)
    settings = {
        "steps": "any" if callable(lr) else steps,  # the peak's schedule depends on the last step
        "lr": "a function" if callable(lr) else lr,
        "random_seed": random_seed,
        "accumulate": accumulate,
        "autocast": str(autocast),
    }
    draw = torch.Generator().manual_seed(random_seed)
    generators = {"data": draw, "dropout": _noise(model)}
    optimizer = _adamw(model)
    losses: list[float] = []
    modes = {module: module.training for module in model.modules()}

    def save() -> None:
        if checkpoint is not None:
            notes, step = {"settings": settings, "losses": losses}, len(losses)
            save_checkpoint(
                checkpoint, model, optimizer, step=step, generators=generators, notes=notes
            )

    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(random_seed + 1)  # dropout must not repeat the numbers of the data
            if checkpoint is not None and Path(checkpoint).exists():
                saved = _same_run(read_checkpoint(checkpoint), settings, steps)
                restore(saved, model, optimizer, generators=generators)
                losses += saved.notes["losses"]
            else:
                save()  # a full disk shows now, not in an hour
            model.train()
            for step in range(len(losses), steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
                loss = _gradients(model, [get_batch(draw) for _ in range(accumulate)], autocast)
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise ValueError(f"step {step}: loss {loss}, gradient of norm {norm}")
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss)
                if step + 1 == steps or (checkpoint_every and (step + 1) % checkpoint_every == 0):
                    save()
    finally:
        optimizer.zero_grad()
        for module, mode in modes.items():
            module.training = mode
    return losses


def _gradients(model: nn.Module, batches: list[Batch], autocast: torch.dtype | None) -> float:
    """Mean loss over all targets that count, whatever batch they are in; adds its gradient."""
    counts = [int((targets != IGNORED).sum()) for _, targets in batches]
    if not any(counts):
        raise ValueError(f"no target counts in any of {len(batches)} batches")
    total = 0.0
    for (ids, targets), n in zip(batches, counts, strict=True):
        if n:
            with torch.autocast(ids.device.type, autocast) if autocast else nullcontext():
                logits = model(ids)
            # Not 1 / len(batches): a target in a short batch would weigh more than one in a long.
            part = cross_entropy(logits, targets) * (n / sum(counts))
            part.backward()
            total += part.item()
    return total


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    """Matrices decay, biases and norms do not: a norm's weight near 0 would silence a channel."""
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise ValueError("the model has no parameter to train")
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def _noise(model: nn.Module) -> torch.Generator:
    """What dropout draws from on the model's device."""
    device, cuda = next(model.parameters()).device, torch.cuda.default_generators
    return cuda[device.index] if device.type == "cuda" else torch.default_generator


def _same_run(saved: Checkpoint, settings: dict[str, Any], steps: int) -> Checkpoint:
    was = saved.notes.get("settings")
    if was != settings:
        raise ValueError(f"the checkpoint comes from a run with {was}, not {settings}")
    if saved.step > steps:
        raise ValueError(f"the checkpoint has done {saved.step} steps, more than {steps}")
    return saved


def _check(
    model: nn.Module,
    accumulate: int,
    autocast: torch.dtype | None,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int | None,
) -> None:
    if accumulate < 1:
        raise ValueError(f"a step takes at least one batch, got accumulate {accumulate}")
    if autocast not in (None, torch.bfloat16):  # float16 would need its loss scaled
        raise ValueError(f"autocast is torch.bfloat16 or None, got {autocast}")
    kinds = {p.dtype for p in model.parameters()}
    if autocast and kinds != {torch.float32}:
        raise ValueError(f"autocast is for weights in float32, got {kinds}")
    if checkpoint_every is not None and (checkpoint is None or checkpoint_every < 1):
        given = f"checkpoint {checkpoint}, checkpoint_every {checkpoint_every}"
        raise ValueError(f"a file and at least one step between two writes, got {given}")


def _rate(lr: float | Callable[[int], float], steps: int) -> Callable[[int], float]:
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")

    def rate(step: int) -> float:
        now = lr(step) if callable(lr) else lr * schedule(step, steps=steps, warmup=steps // 10)
        if not 0 <= now < math.inf:
            raise ValueError(f"step {step}: the learning rate must be 0 or more, got {now}")
        return now

    if not callable(lr) and not 0 <= lr < math.inf:
        raise ValueError(f"lr must be 0 or more and finite, got {lr}")
    return rate


def _kept(logits: Tensor, targets: Tensor, ignore_index: int) -> Bool[Tensor, "*N"]:
    """Which targets count."""
    if logits.ndim == 0 or logits.shape[:-1] != targets.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logits (..., V) need targets (...), got {shapes}")
    if not logits.dtype.is_floating_point:
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be int64 or int32, got {targets.dtype}")
    kept = targets != ignore_index
    if not kept.any():
        raise ValueError(f"none of {targets.numel()} targets counts (ignore_index {ignore_index})")
    low, high = targets[kept].min().item(), targets[kept].max().item()
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(f"targets from {low} to {high}, but there are {logits.shape[-1]} words")
    return kept
