"""The three ways to train a deep residual network that the demo compares, and what each costs, also by depth."""

from __future__ import annotations

import copy
import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from abyssal.engine.api import reconstruct
from abyssal.engine.policy import PaperAdjoint, Policy, Reverse
from abyssal.nn import DigitsResNet, residual_mlp
from abyssal.profiling import track as memory
from abyssal.util.progress import NotedProgress, silent

__all__ = [
    "METHODS",
    "POLICIES",
    "ErrorSweep",
    "Forward",
    "MemorySweep",
    "Method",
    "activation_peak",
    "error_sweep",
    "gradient",
    "gradient_error",
    "keep_heap",
    "memory_sweep",
    "relative_error",
    "slope",
    "timed_step",
]

Forward = Callable[[Tensor], Tensor]
POLICIES = (Reverse(0), PaperAdjoint(), Reverse(1))
# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


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


@dataclass(frozen=True)
class MemorySweep:
    """Peak activation memory against depth: bytes per depth, by method."""

    depths: tuple[int, ...]
    peak_bytes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ErrorSweep:
    """Relative gradient error against depth, by policy, and the slopes of their logarithms."""

    depths: tuple[int, ...]
    errors: dict[str, tuple[float, ...]]
    slopes: dict[str, float]


def memory_sweep(
    build: Callable[[int], DigitsResNet],
    depths: tuple[int, ...],
    images: Tensor,
    labels: Tensor,
    report: NotedProgress = silent,
) -> MemorySweep:
    """Measure the peak activation memory of one step of each method at each depth.

    Args:
        build: makes a network of a given depth.
        depths: where to measure.
        images: one batch. [batch, 1, height, width]
        labels: [batch]
        report: is told how far it is.
    """
    phase = "Memory by depth"
    peaks: dict[str, list[int]] = {method.key: [] for method in METHODS}
    report(phase, 0, sum(depths))
    for done, depth in enumerate(depths, start=1):
        model = build(depth)
        for method in METHODS:  # reconstruction is the last, and the only one that patches the model
            peaks[method.key].append(activation_peak(method.prepare(model), model, images, labels))
        shown = " / ".join(f"{peaks[method.key][-1] / 1e6:.1f}" for method in METHODS)
        report(phase, sum(depths[:done]), sum(depths), f"{depth} blocks: {shown} MB")
    return MemorySweep(depths, {key: tuple(values) for key, values in peaks.items()})


def error_sweep(
    depths: tuple[int, ...], width: int, batch: int, repeats: int, seed: int, report: NotedProgress = silent
) -> ErrorSweep:
    """Measure gradient errors of `POLICIES` in float64 on `x + f(x) / depth` with independent random weights.

    Args:
        depths: where to measure.
        width: of the state.
        batch: number of inputs.
        repeats: networks per depth; the geometric mean of their errors counts.
        seed: of the first network.
        report: is told how far it is.
    """
    phase = "Gradient error by depth"
    errors: dict[str, list[float]] = {str(policy): [] for policy in POLICIES}
    report(phase, 0, sum(depths))
    for done, depth in enumerate(depths, start=1):
        logs = dict.fromkeys(errors, 0.0)
        for repeat in range(repeats):
            torch.manual_seed(seed + repeat)
            stack = residual_mlp(depth, width).double()
            x, cotangent = torch.randn(2, batch, width, dtype=torch.float64)
            for policy in POLICIES:
                logs[str(policy)] += math.log(gradient_error(stack, policy, x, cotangent)) / repeats
        for name, value in logs.items():
            errors[name].append(math.exp(value))
        shown = " / ".join(f"{values[-1]:.0e}".replace("e-0", "e-") for values in errors.values())
        report(phase, sum(depths[:done]), sum(depths), f"{depth} blocks: {shown}")
    return ErrorSweep(
        depths,
        {name: tuple(values) for name, values in errors.items()},
        {name: slope(depths, values) for name, values in errors.items()},
    )


def slope(depths: Sequence[int], errors: Sequence[float]) -> float:
    """Return the least-squares slope of log error on log depth: minus the order of convergence."""
    fit = statistics.linear_regression([math.log(n) for n in depths], [math.log(e) for e in errors])
    return float(fit.slope)


def keep_heap() -> bool:
    """Make glibc keep freed memory for the rest of this process, so that timing sees the arithmetic alone.

    By default glibc hands large freed blocks back to the system. Plain backprop frees its whole set of activations in
    every step and then pays a page fault for every 4 KB of the next one, up to a third of its time, while checkpointing
    hardly does: checkpointing seems faster than plain backprop, which is an artefact.

    The process stays as large as it once was. Memory that was mapped before the call stays as it is, so call
    it early.

    Returns:
        False where the C library has no `mallopt` (macOS, musl, Windows) or refuses: step times are then
        not to be compared.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, 2**30))
