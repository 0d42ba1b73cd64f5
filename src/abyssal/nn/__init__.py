"""Residual networks made for depth: schemes, stacks, and a few models built from them."""

from abyssal.nn.grid.grid import ResidualGrid
from abyssal.nn.lly import DenseBranch, FullyConnectedNTK, LiLuoYipResNet
from abyssal.nn.models import ConvBranch, DigitsResNet, MLPBranch, depth_smooth_, residual_conv, residual_mlp
from abyssal.nn.papers import PreActivationBranch, PreActivationResNet, ReLUBranch, ReLUResNet, linear_resnet
from abyssal.nn.refine.api import Deepened, RefineError, Section, Untied, deepen, refinement, untie
from abyssal.nn.schemes import Euler, EulerStep, Heun, HeunStep, Scheme
from abyssal.nn.stack import ResidualStack

__all__ = [
    "ConvBranch",
    "Deepened",
    "DenseBranch",
    "DigitsResNet",
    "Euler",
    "EulerStep",
    "FullyConnectedNTK",
    "Heun",
    "HeunStep",
    "LiLuoYipResNet",
    "MLPBranch",
    "PreActivationBranch",
    "PreActivationResNet",
    "ReLUBranch",
    "ReLUResNet",
    "RefineError",
    "ResidualGrid",
    "ResidualStack",
    "Scheme",
    "Section",
    "Untied",
    "deepen",
    "depth_smooth_",
    "linear_resnet",
    "refinement",
    "residual_conv",
    "residual_mlp",
    "untie",
]
