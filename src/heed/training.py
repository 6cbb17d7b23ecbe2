"""The loss a language model goes down, and the loop that takes it there.

Works with any `model(ids) -> logits`. V words · N axes of any number and kind, as a rule (B, T).
AdamW's settings are those of GPT-3 (Brown et al. 2020, appendix B).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
IGNORED = -100


def cross_entropy(
    logits: Float[Tensor, "*N V"], targets: Int[Tensor, "*N"], *, ignore_index: int = IGNORED
) -> Float[Tensor, ""]:
    """Mean of ln Σᵥ exp(logitsᵥ) - logits[target], in nats, over the targets that count.

    A target equal to `ignore_index` does not count. Half precision is averaged in float32.
    """
    kept = _kept(logits, targets, ignore_index)
    # Only the rows that count go on: a NaN in a row that does not is never multiplied by zero.
    rows = logits[kept].to(torch.promote_types(logits.dtype, torch.float32))  # (n, V)
    rows = rows - rows.detach().amax(1, keepdim=True)  # the largest is 0: exp cannot overflow
    chosen = rows.gather(1, targets[kept].long()[:, None])
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


def train(
    model: nn.Module,
    get_batch: Callable[[torch.Generator], Batch],
    *,
    steps: int,
    lr: float | Callable[[int], float],
    random_seed: int,
    accumulate: int = 1,
) -> list[float]:
    """The loss of every step, before it was taken. Changes the model's parameters and nothing else.

    `get_batch(generator)` draws ids and targets; a target of -100 does not count. `lr` is the peak
    of `schedule` with a tenth of the steps as warm-up, or a function of the step that is used as it
    is. A step reads `accumulate` batches as if they were one. The seed decides data and dropout.
    A loss or gradient that is not finite raises ValueError, and the last good weights stay.
    """
    rate = _rate(lr, steps)
    if accumulate < 1:
        raise ValueError(f"a step takes at least one batch, got accumulate {accumulate}")
    draw = torch.Generator().manual_seed(random_seed)
    optimizer, losses = _adamw(model), []
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(random_seed + 1)  # dropout must not repeat the numbers of the data
            model.train()
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
                loss = _gradients(model, [get_batch(draw) for _ in range(accumulate)])
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise ValueError(f"step {step}: loss {loss}, gradient of norm {norm}")
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss)
    finally:
        optimizer.zero_grad()
        for module, mode in modes.items():
            module.training = mode
    return losses


def _gradients(model: nn.Module, batches: list[Batch]) -> float:
    """Mean loss over all targets that count, whatever batch they are in; adds its gradient."""
    counts = [int((targets != IGNORED).sum()) for _, targets in batches]
    if not any(counts):
        raise ValueError(f"no target counts in any of {len(batches)} batches")
    total = 0.0
    for (ids, targets), n in zip(batches, counts, strict=True):
        if n:
            # Not 1 / len(batches): a target in a short batch would weigh more than one in a long.
            part = cross_entropy(model(ids), targets) * (n / sum(counts))
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
