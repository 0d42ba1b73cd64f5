"""The networks of the neural tangent hierarchy: Li, Luo and Yip's residual one, Huang and Yau's plain one.

Sources: Y. Li, T. Luo, N. K. Yip, arXiv 2007.03714 (SCIENCE's form of its network); J. Huang, H.-T. Yau,
"Dynamics of deep neural networks and neural tangent hierarchy", arXiv 1909.08156, equation 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.nn.stack import ResidualStack
from abyssal.util.checks import number, one_of, positive, whole

__all__ = ["DenseBranch", "FullyConnectedNTK", "LiLuoYipResNet", "second_moment_scale"]

Activation = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "erf": torch.erf,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "sin": torch.sin,
}


class DenseBranch(nn.Module):
    """`x -> sqrt(c_s / m) s(W x)`, with `W` [m, in_features] of standard normal entries.

    Args:
        in_features: length of `x`.
        width: m.
        activation: s, elementwise.
        c_s: the constant that keeps the mean square of a row of m entries at 1.
        generator: for the weight, on the CPU.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        activation: Activation,
        c_s: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.linear = _normal_linear(in_features, width, generator)
        self.activation = activation
        self.gain = math.sqrt(c_s / width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., width]."""
        return self.gain * self.activation(self.linear(x))

    def extra_repr(self) -> str:
        """Show the factor in front of the activation."""
        return f"gain={self.gain:g}"


class _ScalarNetwork(nn.Module):
    """`f(x) = a . body(first(x))`: what the two networks share."""

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        activation: str | Activation = "tanh",
        *,
        c_s: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"in_features": in_features, "width": width, "depth": depth}.items():
            whole(name, value)
        self.in_features, self.width, self.depth = in_features, width, depth
        s = _activation(activation)
        self.c_s = second_moment_scale(s) if c_s is None else positive("c_s", c_s)
        self.first = DenseBranch(in_features, width, s, self.c_s, generator)
        branches = [DenseBranch(width, width, s, self.c_s, generator) for _ in range(depth - 1)]
        self.body = self._join(branches)
        self.output = _normal_linear(width, 1, generator)

    def _join(self, branches: list[DenseBranch]) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of samples [..., in_features]: one number each, [...]."""
        return self.output(self.body(self.first(x))).squeeze(-1)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.in_features}, width={self.width}, depth={self.depth}, c_s={self.c_s:g}"


class LiLuoYipResNet(_ScalarNetwork):
    """The residual network of Li, Luo and Yip: one number for each sample.

    `x^1 = sqrt(c_s/m) s(W^1 x)`, `x^l = x^{l-1} + (c_res/L) sqrt(c_s/m) s(W^l x^{l-1})` for l = 2..L and
    `f(x) = a . x^L`. The entries of all `W^l` and of `a` are standard normal and all of them are trained; there
    are no biases. Samples are meant to have norm 1, for which `|x^1|` is 1 on average: inputs are not divided by
    `sqrt(in_features)`.

    Args:
        in_features: length d of a sample.
        width: m, of every layer.
        depth: L, with layer 1 counted; 1 is a network of one hidden layer without a residual step.
        c_res: the residual branches' strength, divided by L.
        activation: s: "tanh", "erf", "relu", "gelu", "silu", "softplus", "sin", or an elementwise function.
        c_s: None is `1 / E s(z)^2` for standard normal z.
        generator: for the weights, on the CPU; None is torch's own.

    Raises:
        TypeError: if a size is no whole number, or the activation is neither a name nor callable.
        ValueError: for a size below 1, an unknown activation, or a constant that is not finite.

    Source: arXiv 2007.03714, as SCIENCE gives it.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        c_res: float = 1.0,
        activation: str | Activation = "tanh",
        *,
        c_s: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.c_res = number("c_res", c_res)
        super().__init__(in_features, width, depth, activation, c_s=c_s, generator=generator)

    def _join(self, branches: list[DenseBranch]) -> nn.Module:
        if not branches:
            return nn.Identity()
        return ResidualStack(branches, scale=self.c_res / self.depth)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{super().extra_repr()}, c_res={self.c_res:g}"


class FullyConnectedNTK(_ScalarNetwork):
    """The fully connected network of Huang and Yau: one number for each sample.

    `x^l = sqrt(c_s/m) s(W^l x^{l-1})` for l = 1..L with `x^0 = x`, and `f(x) = a . x^L`. The entries of all `W^l`
    and of `a` are standard normal and all of them are trained; there are no biases. The paper's network has
    `c_s = 1`, under which `|x^l|` shrinks layer by layer for tanh; the default keeps it at 1 for samples of
    norm 1, and makes this the counterpart of :class:`LiLuoYipResNet` without its skips.

    Args:
        in_features: length d of a sample.
        width: m, of every layer.
        depth: L, the number of hidden layers.
        activation: s, as in :class:`LiLuoYipResNet`.
        c_s: None is `1 / E s(z)^2` for standard normal z; 1.0 is the paper's.
        generator: for the weights, on the CPU; None is torch's own.

    Raises:
        TypeError: if a size is no whole number, or the activation is neither a name nor callable.
        ValueError: for a size below 1, an unknown activation, or a constant that is not finite.

    Source: arXiv 1909.08156, equation 1.
    """

    def _join(self, branches: list[DenseBranch]) -> nn.Module:
        return nn.Sequential(*branches)


def second_moment_scale(activation: str | Activation) -> float:
    """Return `c_s = 1 / E s(z)^2` for standard normal z.

    By Gauss-Legendre quadrature of 20 points on each unit interval of [-14, 14]: 1e-13 relative for functions that
    are analytic within distance 1 of the real line, except for kinks at whole numbers (ReLU's at 0).

    Args:
        activation: a name, or an elementwise function that grows slower than `exp(z^2 / 4)`.

    Raises:
        TypeError: if it is neither a name nor callable.
        ValueError: for an unknown name, or a function whose mean square is zero or not finite.
    """
    s = _activation(activation)
    points, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(20))
    z = (torch.arange(-14, 14, dtype=torch.float64)[:, None] + (points + 1) / 2).flatten()
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    moment = (s(z).square() * density * (weights / 2).repeat(28)).sum().item()
    if not (math.isfinite(moment) and moment > 0):
        raise ValueError(f"The activation's mean square over a standard normal has to be positive, got {moment}.")
    return 1 / moment


def _normal_linear(in_features: int, out_features: int, generator: torch.Generator | None) -> nn.Linear:
    # skip_init: torch's own initialisation would draw from the global generator first.
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
    nn.init.normal_(linear.weight, generator=generator)
    return linear


def _activation(activation: str | Activation) -> Activation:
    if isinstance(activation, str):
        return _ACTIVATIONS[one_of("activation", activation, _ACTIVATIONS)]
    if not callable(activation) or isinstance(activation, type):
        raise TypeError(f"activation has to be a name or an elementwise function of a tensor, got {activation!r}.")
    return activation
