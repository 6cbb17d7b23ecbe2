"""Norms, bends and feed-forward networks: all that a block does to one token at a time.

Each works on the last axis alone, so nothing here knows of other tokens. LayerNorm (Ba et al.
2016), RMSNorm (Zhang and Sennrich 2019), GELU (Hendrycks and Gimpel 2016), SwiGLU (Shazeer 2020).

C width of the stream.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, of each token by itself.

    Mean and variance (over C, not C - 1) are taken in float32 or better, and the variance in two
    passes: E[x^2] - E[x]^2 loses every digit once the mean is large.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.width, self.eps = _positive("width", width), _checked_eps(eps)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*N C"]) -> Float[Tensor, "*N C"]:
        _check("x", x, self.width)
        wide = x.to(_wider(x, self.weight))
        centred = wide - wide.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 + eps) * weight, of each token by itself: no mean taken off, no bias.

    The squares are taken in float32 or better; those of float16 end at 255^2.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = _positive("width", width), _checked_eps(eps)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*N C"]) -> Float[Tensor, "*N C"]:
        _check("x", x, self.width)
        wide = x.to(_wider(x, self.weight))
        square = wide.square().mean(-1, keepdim=True)
        return (wide * (square + self.eps).rsqrt() * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


def gelu(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """x P(z < x) for a standard normal z: the exact GELU. erfc keeps the digits of the far tail."""
    _check("x", x)
    return x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5))


def gelu_tanh(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): the GELU of GPT-2, within 5e-4 of gelu."""
    _check("x", x)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swish(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """x / (1 + exp(-x)), also called SiLU."""
    _check("x", x)
    return x * torch.sigmoid(x)


class MLP(nn.Module):
    """down(activation(up(x))): the same two matrices at every position, d_ff = 4 d_model between.

    The activation is any function of one tensor, such as gelu_tanh (GPT-2) or torch.relu (2017).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: Activation = gelu_tanh,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.d_model = _positive("d_model", d_model)
        self.d_ff = 4 * d_model if d_ff is None else _positive("d_ff", d_ff)
        self.activation = activation
        self.up = nn.Linear(d_model, self.d_ff, bias=bias)
        self.down = nn.Linear(self.d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*N C"]) -> Float[Tensor, "*N C"]:
        _check("x", x, self.d_model, self.up.weight.dtype)
        return self.down(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    """down(swish(gate(x)) * up(x)), three matrices without bias (Shazeer 2020, equation 6).

    The width d_ff is gated_width(d_model, multiple) unless given.
    """

    def __init__(self, d_model: int, d_ff: int | None = None, *, multiple: int = 1) -> None:
        super().__init__()
        self.d_model = _positive("d_model", d_model)
        if d_ff is not None and multiple != 1:
            raise ValueError(f"d_ff {d_ff} is given: there is no width to round up to {multiple}")
        self.d_ff = gated_width(d_model, multiple) if d_ff is None else _positive("d_ff", d_ff)
        self.gate = nn.Linear(d_model, self.d_ff, bias=False)
        self.up = nn.Linear(d_model, self.d_ff, bias=False)
        self.down = nn.Linear(self.d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*N C"]) -> Float[Tensor, "*N C"]:
        _check("x", x, self.d_model, self.up.weight.dtype)
        return self.down(swish(self.gate(x)) * self.up(x))


def gated_width(d_model: int, multiple: int = 1) -> int:
    """8 d_model / 3, rounded up to a multiple: three matrices this wide weigh 8 d_model^2, as an
    MLP's two do."""
    step = 3 * _positive("multiple", multiple)
    return -(-8 * _positive("d_model", d_model) // step) * multiple


def _wider(x: Tensor, weight: Tensor) -> torch.dtype:
    wide = torch.promote_types(x.dtype, weight.dtype)
    return torch.promote_types(wide, torch.float32)


def _positive(name: str, n: int) -> int:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{name} must be a positive integer, got {n!r}")
    return n


def _checked_eps(eps: float) -> float:
    if not 0 < eps < math.inf:  # with 0 a constant row would be 0 / 0
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return eps


def _check(
    name: str, x: Tensor, width: int | None = None, dtype: torch.dtype | None = None
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if width is not None and x.shape[-1:] != (width,):
        raise ValueError(f"{name} must be {width} wide in its last axis, got {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype}, the weights are {dtype}")
