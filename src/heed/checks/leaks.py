"""Change the future, and the past must not move: the test for leaks, for any model.

    leaks(model, ids)                      # [] or the pairs (from, to) that should not be there
    leaks(model, ids, by=by_gradient)      # the same question, asked of autograd
    by_change(model, ids)                  # all that flows: the mask of the model as a whole

A model maps ids (B, T) or vectors (B, T, C) to an output (B, T, ...), with what it makes of
position t in row t. B sequences · T positions of the output · S positions of the input, as many.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from heed import masks
from heed.masks import Mask

Model = Callable[[Tensor], Tensor]
Flow = Callable[[Model, Tensor], Tensor]


def by_change(model: Model, inputs: Tensor) -> Bool[Tensor, "T S"]:
    """flow[t, s]: the output at t is another, to the last bit, when the input at s is another.

    Each position is changed three times: an id to another one from 0 to the largest of `inputs`,
    a vector to a random one. Sees every path, also one that has no gradient, if the model takes it
    for these inputs. A model that answers the same question in two ways, as dropout does, is
    refused.
    """
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = _output(model, inputs)
        if not torch.equal(before, _output(model, inputs)):
            raise ValueError("two runs differ on the same inputs: is dropout on? Call model.eval()")
        columns = []
        for s in range(inputs.shape[1]):
            moved = torch.zeros(inputs.shape[1], dtype=torch.bool, device=before.device)
            for _ in range(3):
                changed = inputs.clone()
                changed[:, s] = _other(inputs, s, rng)
                moved |= (_output(model, changed) != before).transpose(0, 1).flatten(1).any(1)
            columns.append(moved)
    return torch.stack(columns, dim=1)


def by_gradient(model: Model, inputs: Tensor) -> Bool[Tensor, "T S"]:
    """flow[t, s]: the output at t has a gradient, not exactly 0, with respect to the input at s.

    Of ids there is no gradient; those of the vectors that the model's nn.Embedding makes of them
    stand in. Blind to a path through whole numbers, such as an argmax or a count.
    """
    rng = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        starts, out = _differentiable(model, inputs)
        rows = []
        for t in range(inputs.shape[1]):
            # A plain sum may be constant, as that of a softmax is: ask for random shares.
            shares = torch.randn(out[:, t].shape, generator=rng, dtype=torch.float64).to(out)
            grads = torch.autograd.grad(
                (out[:, t] * shares).sum(), starts, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.stack([(g != 0).any(-1).any(0) for g in grads]).any(0))
    return torch.stack(rows)


def leaks(
    model: Model, inputs: Tensor, *, by: Flow = by_change, mask: Mask = masks.causal
) -> list[tuple[int, int]]:
    """Every (from, to): the input at `from` reaches the output at `to`, and the mask forbids it.

    The mask is that of the whole model. Two layers of window(3) reach as far as window(5).
    """
    T = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.ndim > 1 else 0
    allowed = masks.table(mask, 1, 1, T, T)[0, 0]
    flow = by(model, inputs).cpu()
    return [(s, t) for t, s in (flow & ~allowed).nonzero().tolist()]


def _output(model: Model, inputs: Tensor) -> Tensor:
    """What the model says, if it is of a kind that can be asked about positions."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor, got {type(inputs).__name__}")
    ids = inputs.ndim == 2 and inputs.dtype in (torch.int64, torch.int32)
    if not ids and not (inputs.ndim == 3 and inputs.dtype.is_floating_point):
        kind = f"{inputs.dtype} {tuple(inputs.shape)}"
        raise ValueError(f"inputs must be ids (B, T) or vectors (B, T, C), got {kind}")
    if inputs.numel() == 0 or inputs.shape[1] < 2:
        raise ValueError(f"a leak takes two positions or more, got shape {tuple(inputs.shape)}")
    if ids and not 0 <= inputs.min() < inputs.max():
        low, high = inputs.min().item(), inputs.max().item()
        raise ValueError(f"ids must differ and not be negative, got {low} to {high}")
    out = model(inputs)
    if not isinstance(out, Tensor) or not out.dtype.is_floating_point:
        made = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"a model must answer with one tensor of floats, got {made}")
    if out.ndim < 2 or out.shape[:2] != inputs.shape[:2]:
        raise ValueError(f"{tuple(inputs.shape)} went in, {tuple(out.shape)} came out: (B, T) lost")
    if out.isnan().any():
        raise ValueError("the model answers NaN, which is never the same as before")
    return out


def _other(inputs: Tensor, s: int, rng: torch.Generator) -> Tensor:
    """Something else for position s, drawn for each sequence."""
    now = inputs[:, s]
    if inputs.dtype.is_floating_point:
        noise = torch.randn(now.shape, generator=rng, dtype=torch.float64)
        return now + noise.to(now) * max(1.0, inputs.abs().max().item())
    n = int(inputs.max()) + 1
    return (now + torch.randint(1, n, now.shape, generator=rng).to(now)) % n


def _differentiable(model: Model, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """The vectors at which the gradient is asked for, and the output made from them."""
    if isinstance(inputs, Tensor) and inputs.dtype.is_floating_point:
        start = inputs.detach().clone().requires_grad_()
        out, starts = _output(model, start), [start]
    else:
        starts = []

        def keep(module: nn.Module, arguments: tuple[Tensor, ...], made: Tensor) -> Tensor | None:
            if arguments[0].shape != inputs.shape:  # a table of positions, not of tokens
                return None
            starts.append(made.detach().requires_grad_())
            return starts[-1]

        tables = model.modules() if isinstance(model, nn.Module) else ()
        hooks = [m.register_forward_hook(keep) for m in tables if isinstance(m, nn.Embedding)]
        try:
            out = _output(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if not starts:
            raise ValueError("no nn.Embedding of the model was given the ids: use by_change")
    if not out.requires_grad:
        raise ValueError("the output has no gradient: does the model run under no_grad?")
    return starts, out
