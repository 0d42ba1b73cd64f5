"""The networks that are measured, and the methods that train them.

A workload is a chain of steps `x -> x + f(x)/N`. All methods of one measurement share the parameters and
their gradient buffers, so that they do the same arithmetic on the same memory.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import abyssal
from abyssal.nn import ConvBranch, MLPBranch, ResidualStack
from report import installed


class AttentionBranch(nn.Module):
    """Pre-norm causal self-attention on [batch, tokens, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.queries_keys_values(self.norm(x))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForwardBranch(nn.Module):
    """Pre-norm GELU network with four times the width inside, on [batch, tokens, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(self.norm(x))))


class TransformerLayer(nn.Module):
    """A whole pre-norm layer as one block: `x -> x + h attention(x)`, then `x -> x + h feed_forward(x)`."""

    def __init__(self, width: int, heads: int, scale: float):
        super().__init__()
        self.attention = AttentionBranch(width, heads)
        self.feed_forward = FeedForwardBranch(width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attention(x), alpha=self.scale)
        return torch.add(x, self.feed_forward(x), alpha=self.scale)


class Layers(nn.Module):
    """A chain of whole layers."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.steps = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Increment(nn.Module):
    """The residual function of one whole step, `f(x) = g(x) - x`, as the two-stream peers want it."""

    def __init__(self, step: nn.Module):
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x) - x


class Scaled(nn.Module):
    """`h f(x)`."""

    def __init__(self, block: nn.Module, scale: float):
        super().__init__()
        self.block, self.scale = block, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.block(x)


@dataclass(frozen=True)
class Workload:
    """A family of networks over depth."""

    name: str
    title: str
    depths: tuple[int, ...]
    quick_depths: tuple[int, ...]
    build: Callable[[int], nn.Module]  # with `.steps`
    shape: Callable[[int], tuple[int, ...]]  # of the state at a depth
    split: int  # dimension that holds the features

    def model(self, depth: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network, weights drawn from seed 0 in float32, gradient buffers allocated."""
        torch.manual_seed(0)
        model = self.build(depth).to(dtype)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return model

    def tensors(self, depth: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The input (a leaf with a gradient buffer, as below a stem) and the output's gradient."""
        generator = torch.Generator().manual_seed(1)
        x, cotangent = (torch.randn(self.shape(depth), generator=generator).to(dtype) for _ in range(2))
        x.requires_grad_()
        x.grad = torch.zeros_like(x)
        return x, cotangent


def _w3_branches(depth: int) -> nn.Module:
    pairs = [(AttentionBranch(128, 4), FeedForwardBranch(128)) for _ in range(depth)]
    return ResidualStack([branch for pair in pairs for branch in pair], scale=1 / depth)


WORKLOADS = {
    w.name: w
    for w in [
        Workload(
            "W1",
            "residual MLP (Linear, tanh, Linear), width 256, batch 256",
            (8, 32, 128, 512),
            (8, 64),
            lambda depth: ResidualStack([MLPBranch(256) for _ in range(depth)]),
            lambda depth: (256, 256),
            1,
        ),
        Workload(
            "W2",
            "residual conv ((GroupNorm, ReLU, 3x3 Conv) twice), 32 channels, 32x32, batch 32 (8 at N=128)",
            (8, 32, 128),
            (4, 8),
            lambda depth: ResidualStack([ConvBranch(32) for _ in range(depth)]),
            lambda depth: (32 if depth < 128 else 8, 32, 32, 32),
            1,
        ),
        Workload(
            "W3",
            "pre-norm transformer, N whole layers as blocks, d = 128, 4 heads, 128 tokens, batch 8",
            (8, 32, 96),
            (4, 8),
            lambda depth: Layers([TransformerLayer(128, 4, 1 / depth) for _ in range(depth)]),
            lambda depth: (8, 128, 128),
            2,
        ),
        Workload(
            "W3b",
            "the same transformer, its 2N residual branches as blocks",
            (8, 32, 96),
            (8,),
            _w3_branches,
            lambda depth: (8, 128, 128),
            2,
        ),
    ]
}

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to train a workload.

    Args:
        name: on the command line and in the tables.
        prepare: from a model, whose modules it may change but not its parameters, the forward pass.
        exact_network: whether it computes the workload's own network (the peers' is another one).
        package: what has to be installed.
    """

    name: str
    prepare: Callable[[nn.Module, Workload], Call]
    exact_network: bool = True
    package: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is None or installed(self.package):
            return None
        return f"{self.package} is not installed (pip install --no-deps {self.package})"

    def on(self, model: nn.Module, workload: Workload) -> Call:
        """The forward pass by this method, on a copy of the modules that shares the parameters."""
        shared = {id(p): p for p in model.parameters()}
        return self.prepare(copy.deepcopy(model, shared), workload)


def _plain(model: nn.Module, _: Workload) -> Call:
    return model


def _checkpoint_each(early_stop: bool) -> Callable[[nn.Module, Workload], Call]:
    def prepare(model: nn.Module, _: Workload) -> Call:
        def call(x: Tensor) -> Tensor:
            for step in model.steps:
                x = checkpoint(step, x, use_reentrant=False, early_stop=early_stop)
            return x

        return call

    return prepare


def _checkpoint_sqrt(model: nn.Module, _: Workload) -> Call:
    steps = list(model.steps)
    length = math.isqrt(len(steps) - 1) + 1
    segments = [nn.Sequential(*steps[n : n + length]) for n in range(0, len(steps), length)]

    def call(x: Tensor) -> Tensor:
        for segment in segments:
            x = checkpoint(segment, x, use_reentrant=False)
        return x

    return call


def _abyssal(policy: Callable[[], abyssal.Policy | None]) -> Callable[[nn.Module, Workload], Call]:
    def prepare(model: nn.Module, _: Workload) -> Call:
        return abyssal.reconstruct(model, policy(), blocks=list(model.steps))

    return prepare


def _functions(model: nn.Module) -> list[nn.Module]:
    """The model's residual functions `h f_n`."""
    if isinstance(model, ResidualStack):
        return [Scaled(step.block, step.scale) for step in model.steps]
    return [Increment(step) for step in model.steps]


def _momentumnet(model: nn.Module, _: Workload) -> Call:
    functions = [nn.Sequential(f) for f in _functions(model)]
    return importlib.import_module("momentumnet").MomentumNet(functions, gamma=0.9, use_backprop=False)


def _two_streams(call: Call, split: int) -> Call:
    """Give a peer's network two streams of full width, both starting as the input; return their mean."""

    def wrapped(x: Tensor) -> Tensor:
        first, second = call(torch.cat([x, x], dim=split)).chunk(2, dim=split)
        return (first + second) / 2

    return wrapped


def _memcnn(model: nn.Module, workload: Workload) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        memcnn = importlib.import_module("memcnn")
    functions = _functions(model)
    couplings = [
        memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g, split_dim=workload.split))
        for f, g in zip(functions[::2], functions[1::2], strict=True)
    ]
    return _two_streams(nn.Sequential(*couplings), workload.split)


def _revlib(model: nn.Module, workload: Workload) -> Call:
    revlib = importlib.import_module("revlib")
    return _two_streams(revlib.ReversibleSequential(*_functions(model), split_dim=workload.split), workload.split)


METHODS = {
    m.name: m
    for m in [
        Method("plain", _plain),
        Method("checkpoint", _checkpoint_each(early_stop=True)),
        Method("checkpoint-full", _checkpoint_each(early_stop=False)),
        Method("checkpoint-sqrt", _checkpoint_sqrt),
        Method("Keep", _abyssal(abyssal.Keep)),
        Method("Recompute", _abyssal(abyssal.Recompute)),
        Method("default", _abyssal(lambda: None)),
        Method("Code(4)", _abyssal(lambda: abyssal.Code(4))),
        Method("Reverse(0)", _abyssal(lambda: abyssal.Reverse(refine=0))),
        Method("Reverse(1)", _abyssal(lambda: abyssal.Reverse(refine=1))),
        Method("momentumnet", _momentumnet, exact_network=False, package="momentumnet"),
        Method("memcnn", _memcnn, exact_network=False, package="memcnn"),
        Method("revlib", _revlib, exact_network=False, package="revlib"),
    ]
}
