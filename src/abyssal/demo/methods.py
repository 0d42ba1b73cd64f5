"""The three ways to train a deep residual network that the demo compares, and what is measured of each."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from abyssal.engine.api import reconstruct
from abyssal.engine.policy import Policy, Reverse
from abyssal.nn import DigitsResNet
from abyssal.profiling import track as memory

__all__ = [
    "METHODS",
    "Forward",
    "Method",
    "activation_peak",
    "gradient",
    "gradient_error",
    "relative_error",
    "timed_step",
]

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One way to get the gradient of the same network.

    Attributes:
        key: short name, in the results' file.
        label: name for people.
        prepare: takes a network, which it may patch, and returns what to call in place of it.
    """

    key: str
    label: str
    prepare: Callable[[DigitsResNet], Forward]


def _plain(model: DigitsResNet) -> Forward:
    return model


def _checkpointed(model: DigitsResNet) -> Forward:
    """Checkpoint every block with torch's own defaults (early stop on, random state preserved)."""

    def forward(images: Tensor) -> Tensor:
        state = model.stem(images)
        for step in model.stack.steps:
            state = checkpoint(step, state, use_reentrant=False)
        return model.head(state)

    return forward


def _reconstructed(model: DigitsResNet) -> Forward:
    reconstruct(model, Reverse(refine=1))
    return model


METHODS = (
    Method("plain", "plain backprop", _plain),
    Method("checkpoint", "checkpointing", _checkpointed),
    Method("reconstruct", "reconstruction", _reconstructed),
)


def timed_step(forward: Forward, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Run one forward and backward pass.

    Returns:
        The loss, and the seconds of this thread's processor time: on one thread the backward pass runs in
        the caller's, and other work on the machine does not count.
    """
    begin = time.thread_time()
    loss = cross_entropy(forward(images), labels)
    loss.backward()
    return float(loss.detach()), time.thread_time() - begin


def activation_peak(forward: Forward, model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return the highest level of live tensor bytes in one step, above parameters, gradients and data.

    Gradient buffers are allocated beforehand: every method needs the same ones, and they are not activations.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        cross_entropy(forward(images), labels).backward()

    gc.collect()  # what an earlier network leaves behind must not be released during the measurement
    return memory.peak_bytes(step)


def gradient(forward: Forward, model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of `loss(forward(x))` over all parameters, as one vector in float64."""
    model.zero_grad(set_to_none=True)
    loss(forward(x)).backward()
    parts = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return `|value - reference| / |reference|` in the Euclidean norm."""
    return float(torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference))


def gradient_error(stack: nn.Module, policy: Policy, x: Tensor, cotangent: Tensor) -> float:
    """Return the relative error of the parameter gradient under `policy` against plain backprop.

    Args:
        stack: a residual stack; left as it is.
        policy: how inputs are restored.
        x: its input. [batch, width]
        cotangent: the gradient of the loss with respect to its output. [batch, width]
    """

    def loss(output: Tensor) -> Tensor:
        return (output * cotangent).sum()

    exact = gradient(stack, stack, loss, x)
    # The error is what is measured here: nobody needs to be warned of it.
    restored = reconstruct(copy.deepcopy(stack), policy, tolerance=float("inf"))
    return relative_error(gradient(restored, restored, loss, x), exact)
