"""The networks of the papers: linear, res-1 and res-3, and a small pre-activation network for images.

All are built on :class:`~abyssal.nn.ResidualStack`, so that schemes, `abyssal.reconstruct`, `untie` and `deepen` apply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from abyssal.nn.schemes import Scheme
from abyssal.nn.stack import ResidualStack
from abyssal.util.checks import number, one_of, whole

__all__ = [
    "PreActivationBranch",
    "PreActivationResNet",
    "ReLUBranch",
    "ReLUResNet",
    "linear_resnet",
]

Norm = Literal["batch", "group", "none"]
Activation = Literal["relu", "tanh", "gelu", "silu", "softplus"]
Branch = Literal["res-1", "res-3"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}


def linear_resnet(
    depth: int,
    width: int,
    *,
    std: float = 0.0,
    scheme: Scheme | None = None,
    scale: float | Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> ResidualStack:
    """Build the linear residual network `x[n+1] = (I + A_n/N) x[n]` on states [batch, ..., width].

    Args:
        depth: N, the number of matrices.
        width: of the state.
        std: of the independent normal entries that the matrices start from, times 1/sqrt(width); 0 starts from the
            identity map, for which the paper proves that gradient descent keeps the matrices smooth in depth.
        scheme: as in :class:`ResidualStack`.
        scale: as in :class:`ResidualStack`.
        generator: for the weights, on the CPU; None is torch's own.

    Raises:
        ValueError: for a size below 1 or a negative spread.

    Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, section 3.
    """
    _check_sizes(depth=depth, width=width)
    number("std", std, 0)
    functions = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    with torch.no_grad():
        for function in functions:
            if std:
                function.weight.normal_(0, std / math.sqrt(width), generator=generator)
            else:
                function.weight.zero_()
    return ResidualStack(functions, scheme, scale)


class ReLUBranch(nn.Module):
    """The residual functions `V relu(h)` (res-1) and `V relu(W h)` (res-3), without biases.

    Args:
        width: of the state.
        branch: "res-1" or "res-3".
        generator: for the weights, on the CPU; None is torch's own. Entries are independent, uniform on
            `[-sqrt(3/width), sqrt(3/width)]`: of variance 1/width.

    Raises:
        ValueError: for another branch.

    Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929, whose names these are.
    """

    def __init__(self, width: int, branch: Branch = "res-3", generator: torch.Generator | None = None) -> None:
        super().__init__()
        one_of("branch", branch, get_args(Branch))
        self.inner = _matrix(width, width, generator) if branch == "res-3" else None
        self.outer = _matrix(width, width, generator)

    def forward(self, h: Tensor) -> Tensor:
        """Map [batch, ..., width] to the same shape."""
        return self.outer(torch.relu(h if self.inner is None else self.inner(h)))


class ReLUResNet(nn.Module):
    """The residual network of Marion et al.: `h_0 = A x`, `h <- h + L^-beta f_n(h)`, `out = B h_L`.

    Args:
        in_features: of an input.
        width: of the state.
        depth: L.
        out_features: of the output; the paper's studies at initialisation have 1.
        branch: `f_n`: "res-1" is `V relu(h)`, "res-3" is `V relu(W h)`.
        beta: the exponent: 1/2 is stable for independent weights, 1 for smooth ones.
        scheme: as in :class:`ResidualStack`.
        generator: for the weights, on the CPU; None is torch's own. All are independent, uniform, of variance
            1/fan_in; `abyssal.weights.init` fills those of the stack with other families.

    Attributes:
        stack: the residual part.

    Raises:
        ValueError: for a size below 1, another branch, or an exponent that is not finite.

    Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929, as SCIENCE gives it.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int = 1,
        *,
        branch: Branch = "res-3",
        beta: float = 0.5,
        scheme: Scheme | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features=in_features, width=width, depth=depth, out_features=out_features)
        self.beta = number("beta", beta)
        self.stem = _matrix(in_features, width, generator)
        functions = [ReLUBranch(width, branch, generator) for _ in range(depth)]
        self.stack = ResidualStack(functions, scheme, depth**-self.beta)
        self.head = _matrix(width, out_features, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, ..., in_features] to [batch, ..., out_features]."""
        return self.head(self.stack(self.stem(x)))


class PreActivationBranch(nn.Module):
    """The pre-activation residual function, (norm, activation, 3x3 convolution) twice.

    Args:
        channels: of the state.
        norm: "batch", "group" (groups of 8 channels, or fewer where 8 does not divide), or "none".
        activation: "relu", or a smooth one: "tanh", "gelu", "silu", "softplus".

    Source: He et al. 2016, arXiv 1603.05027.
    """

    def __init__(self, channels: int, norm: Norm = "batch", activation: Activation = "relu") -> None:
        super().__init__()
        one_of("norm", norm, get_args(Norm))
        one_of("activation", activation, _ACTIVATIONS)
        bias = norm == "none"
        self.inner_norm, self.outer_norm = _norm(norm, channels), _norm(norm, channels)
        self.activation = _ACTIVATIONS[activation]()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to the same shape."""
        hidden = self.inner(self.activation(self.inner_norm(x)))
        return self.outer(self.activation(self.outer_norm(hidden)))


class PreActivationResNet(nn.Module):
    """A small network for images whose depth is free: stem, stages of residual stacks, head.

    Between two stages a strided convolution halves height and width. With one stage and `tied=True` it is a
    discretised neural ODE.

    Args:
        depth: residual functions of each stage.
        channels: of each stage; its length is their number. The widths of the CIFAR networks of He et al. by default.
        tied: whether all residual functions of a stage share their weights; `abyssal.nn.untie` gives them their own.
        scheme: as in :class:`ResidualStack`.
        scale: step size; None is 1 / (number of steps), as the papers have it, 1 is what an unscaled ResNet has.
        norm: of the residual functions: see :class:`PreActivationBranch`.
        activation: of the residual functions, and before the head.
        classes: number of classes.
        image_channels: of the images.

    Raises:
        ValueError: for a size below 1, or an unknown norm or activation.

    Source: the setting of Sander, Ablin, Peyré 2022, arXiv 2205.14612, section 5; sizes are He et al.'s, arXiv
    1512.03385 section 4.2, where the former were not at hand.
    """

    def __init__(
        self,
        depth: int,
        channels: Sequence[int] = (16, 32, 64),
        *,
        tied: bool = False,
        scheme: Scheme | None = None,
        scale: float | None = None,
        norm: Norm = "batch",
        activation: Activation = "relu",
        classes: int = 10,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_sizes(depth=depth, classes=classes, image_channels=image_channels, stages=len(channels))
        _check_sizes(**{f"channels[{n}]": width for n, width in enumerate(channels)})
        self.tied = tied
        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList(
            ResidualStack(_functions(depth, width, tied, norm, activation), scheme, scale) for width in channels
        )
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in pairwise(channels))
        self.norm, self.activation = _norm(norm, channels[-1]), _ACTIVATIONS[activation]()
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map [batch, image_channels, height, width] to logits [batch, classes]."""
        x = self.stages[0](self.stem(images))
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            x = stage(down(x))
        return self.head(self.activation(self.norm(x)).mean((2, 3)))


def _functions(depth: int, channels: int, tied: bool, norm: Norm, activation: Activation) -> list[nn.Module]:
    first = PreActivationBranch(channels, norm, activation)
    return [first, *(first if tied else PreActivationBranch(channels, norm, activation) for _ in range(depth - 1))]


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(1, channels // math.gcd(8, channels)), channels) if norm == "group" else nn.Identity()


def _matrix(fan_in: int, fan_out: int, generator: torch.Generator | None) -> nn.Linear:
    linear = nn.Linear(fan_in, fan_out, bias=False)
    bound = math.sqrt(3 / fan_in)
    with torch.no_grad():
        linear.weight.uniform_(-bound, bound, generator=generator)
    return linear


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        whole(name, size)
