"""Residual networks made for depth: schemes, stacks, and a few models built from them."""

from abyssal.nn.lly import DenseBranch, FullyConnectedNTK, LiLuoYipResNet
from abyssal.nn.models import ConvBranch, DigitsResNet, MLPBranch, depth_smooth_, residual_conv, residual_mlp
from abyssal.nn.schemes import Euler, EulerStep, Heun, HeunStep, Scheme
from abyssal.nn.stack import ResidualStack

__all__ = [
    "ConvBranch",
    "DenseBranch",
    "DigitsResNet",
    "Euler",
    "EulerStep",
    "FullyConnectedNTK",
    "Heun",
    "HeunStep",
    "LiLuoYipResNet",
    "MLPBranch",
    "ResidualStack",
    "Scheme",
    "depth_smooth_",
    "residual_conv",
    "residual_mlp",
]
