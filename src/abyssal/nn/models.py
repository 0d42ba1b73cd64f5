"""Small residual networks: those of the benchmarks and of the demo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from abyssal.nn.schemes import Scheme
from abyssal.nn.stack import ResidualStack
from abyssal.util.checks import one_of, whole

__all__ = ["ConvBranch", "DigitsResNet", "MLPBranch", "depth_smooth_", "residual_conv", "residual_mlp"]


class MLPBranch(nn.Module):
    """The residual function `f(x) = W2 tanh(W1 x + b1) + b2`.

    Args:
        width: of the state.
        hidden: of the layer between; None is `width`.
        bias: whether there are `b1` and `b2`.
    """

    def __init__(self, width: int, hidden: int | None = None, bias: bool = True) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        self.inner = nn.Linear(width, hidden, bias=bias)
        self.outer = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, ..., width] to the same shape."""
        return self.outer(torch.tanh(self.inner(x)))


class ConvBranch(nn.Module):
    """The pre-activation residual function, (GroupNorm, ReLU, 3x3 convolution) twice.

    Args:
        channels: of the state.
        groups: of the normalisation; has to divide `channels`.
    """

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.inner_norm = nn.GroupNorm(groups, channels)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.outer_norm = nn.GroupNorm(groups, channels)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to the same shape."""
        hidden = self.inner(torch.relu(self.inner_norm(x)))
        return self.outer(torch.relu(self.outer_norm(hidden)))


def residual_mlp(
    depth: int,
    width: int,
    hidden: int | None = None,
    *,
    bias: bool = True,
    scheme: Scheme | None = None,
    scale: float | Sequence[float] | None = None,
) -> ResidualStack:
    """Build a residual network of :class:`MLPBranch` functions on states [batch, ..., width].

    Args:
        depth: number of residual functions.
        width: of the state.
        hidden: of the layer inside a residual function; None is `width`.
        bias: whether its linear layers have biases.
        scheme: as in :class:`ResidualStack`.
        scale: as in :class:`ResidualStack`.
    """
    return ResidualStack((MLPBranch(width, hidden, bias) for _ in range(depth)), scheme, scale)


def residual_conv(
    depth: int,
    channels: int,
    groups: int = 8,
    *,
    scheme: Scheme | None = None,
    scale: float | Sequence[float] | None = None,
) -> ResidualStack:
    """Build a residual network of :class:`ConvBranch` functions on states [batch, channels, height, width].

    Args:
        depth: number of residual functions.
        channels: of the state.
        groups: of the normalisation.
        scheme: as in :class:`ResidualStack`.
        scale: as in :class:`ResidualStack`.
    """
    return ResidualStack((ConvBranch(channels, groups) for _ in range(depth)), scheme, scale)


class DigitsResNet(nn.Module):
    """An image classifier whose depth is free: stem, residual stack, head.

    Args:
        depth: number of residual functions.
        width: of the state; channels for `branch="conv"`.
        branch: `"mlp"` flattens the image into one vector (fast: a depth of 1,000 trains on a laptop),
            `"conv"` keeps it and averages over positions at the end.
        classes: number of classes.
        image: channels, height and width of the images. The default is scikit-learn's digits.
        scheme: as in :class:`ResidualStack`.
        scale: as in :class:`ResidualStack`.

    Raises:
        ValueError: for an unknown branch.
    """

    def __init__(
        self,
        depth: int,
        width: int = 64,
        *,
        branch: Literal["mlp", "conv"] = "mlp",
        classes: int = 10,
        image: tuple[int, int, int] = (1, 8, 8),
        scheme: Scheme | None = None,
        scale: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if one_of("branch", branch, ("mlp", "conv")) == "mlp":
            self.stem: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image), width))
            self.stack = residual_mlp(depth, width, scheme=scheme, scale=scale)
            self.head: nn.Module = nn.Linear(width, classes)
        else:
            self.stem = nn.Conv2d(image[0], width, 3, padding=1)
            self.stack = residual_conv(depth, width, math.gcd(8, width), scheme=scheme, scale=scale)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images.

        Args:
            images: [batch, channels, height, width]

        Returns:
            Logits. [batch, classes]
        """
        return self.head(self.stack(self.stem(images)))


@torch.no_grad()
def depth_smooth_(
    blocks: Sequence[nn.Module], modes: int = 3, generator: torch.Generator | None = None
) -> Sequence[nn.Module]:
    """Fill the weights of same-shaped blocks with random functions that are smooth in depth, in place.

    Every entry of a weight is an independent `w(s) = sum_k (a_k cos(pi k s) + b_k sin(pi k s))`, k < `modes`,
    with `s` from 0 at the first block to 1 at the last. It has mean 0 and variance 1/fan_in at every depth.
    Biases become 0; other vectors (the gains of normalisations) are left alone.

    Args:
        blocks: modules with the same parameter names and shapes.
        modes: number of Fourier modes; 1 makes all blocks equal.
        generator: for the random numbers, on the CPU.

    Returns:
        The blocks.

    Raises:
        ValueError: if the blocks' parameters differ in name or shape, or there is no mode.
    """
    whole("modes", modes)
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in blocks]
    for n, other in enumerate(shapes):
        if other != shapes[0]:
            raise ValueError(f"Block {n} has parameters {dict(other)}, block 0 has {dict(shapes[0])}: not one path.")
    depth = torch.linspace(0, 1, len(blocks), dtype=torch.float64)
    angles = math.pi * torch.arange(modes, dtype=torch.float64) * depth[:, None]
    waves = torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(modes)  # [blocks, 2 modes], rows of norm 1
    for name, shape in shapes[0].items() if shapes else ():
        parameters = [block.get_parameter(name) for block in blocks]
        if len(shape) >= 2:
            fan_in = math.prod(shape[1:])
            amplitudes = torch.randn(2 * modes, *shape, dtype=torch.float64, generator=generator)
            for p, row in zip(parameters, waves / math.sqrt(fan_in), strict=True):
                p.copy_(torch.tensordot(row, amplitudes, dims=1))
        elif name.rpartition(".")[2] == "bias":
            for p in parameters:
                p.zero_()
    return blocks
