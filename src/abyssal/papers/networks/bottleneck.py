"""The layout of ResNet-50, 101 and 152 in any width: post-activation bottleneck blocks, BatchNorm, nothing scaled.

Names of modules are torchvision's. The stem is the one for small images: one 3x3 convolution, no pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Bottleneck", "BottleneckResNet"]

_EXPANSION = 4


class Bottleneck(nn.Module):
    """`relu(shortcut(x) + bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x)))))))))`.

    Args:
        before: channels of the input.
        width: of the inner convolutions; the output has four times as many.
        stride: of the 3x3 convolution and the shortcut.
    """

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        after = _EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.downsample: nn.Module | None = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, before, height, width] to [batch, after, height / stride, width / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        # A ReLU. Written as torch.relu, abyssal.reconstruct sees that the paper's adjoint cannot invert the block, and
        # keeps its input: the adjoint would never be tried.
        return (self.bn3(self.conv3(out)) + shortcut).clamp(min=0)


class BottleneckResNet(nn.Module):
    """Stages of bottleneck blocks; ResNet-101's are (3, 4, 23, 3) and its width is 64.

    Args:
        layers: blocks of each stage.
        width: inner channels of the first stage; every further one has twice as many.
        image_channels: of the images.
        classes: number of classes.

    Source: He et al. 2016, arXiv 1512.03385, table 1.
    """

    def __init__(self, layers: Sequence[int], width: int, image_channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages, before = [], width
        for n, count in enumerate(layers):
            inner = width * 2**n
            blocks = [Bottleneck(before, inner, stride=1 if n == 0 else 2)]
            before = _EXPANSION * inner
            blocks += [Bottleneck(before, inner) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map [batch, image_channels, height, width] to logits [batch, classes]."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))
