"""Peak memory and gradient error as functions of depth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.demo.methods import METHODS, activation_peak, gradient_error
from abyssal.engine.policy import PaperAdjoint, Reverse
from abyssal.nn import DigitsResNet, residual_mlp
from abyssal.util.progress import NotedProgress, silent

__all__ = ["POLICIES", "ErrorSweep", "MemorySweep", "error_sweep", "memory_sweep", "slope"]

POLICIES = (Reverse(0), PaperAdjoint(), Reverse(1))


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
