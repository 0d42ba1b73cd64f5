"""Gradient flow of many small networks at once, and of their truncated hierarchies.

`abyssal.tangent.Hierarchy` integrates one network by an adaptive method to any tolerance. Here all seeds take equal
steps of Runge-Kutta's fourth-order method, each by its own clock: cheap, and more exact than seeds are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abyssal.papers.networks.lly_batch import Networks

__all__ = ["Flow", "gradient_flow", "truncated_flow"]


@dataclass(frozen=True)
class Flow:
    """Gradient flow of squared loss, `(1/2n) sum (f - y)^2`, looked at now and then.

    Attributes:
        times: of each look and seed. [looks, seeds]
        outputs: f. [looks, seeds, n]
        kernels: [looks, seeds, n, n]
    """

    times: Tensor
    outputs: Tensor
    kernels: Tensor

    def losses(self, y: Tensor) -> Tensor:
        """Return the loss, for targets [n] or [seeds, n]: [looks, seeds]."""
        return (self.outputs - y).square().mean(-1) / 2

    def drift(self) -> Tensor:
        """Return `|K_t - K_0| / |K_0|` in Frobenius norms: [looks, seeds]."""
        start = self.kernels[0]
        return torch.linalg.matrix_norm(self.kernels - start) / torch.linalg.matrix_norm(start)


def gradient_flow(
    networks: Networks,
    x: Tensor,
    y: Tensor,
    times: Tensor,
    step: float = 0.5,
    stop: Callable[[Tensor], bool] = lambda outputs: False,
) -> Flow:
    """Follow the parameters by Runge-Kutta's fourth-order method, and look at outputs and kernels.

    Args:
        networks: left as they are.
        x: samples, [n, in_features] or [seeds, n, in_features].
        y: targets, [n] or [seeds, n].
        times: to look at, ascending from 0. [looks, seeds] or [looks]
        step: the longest step, in units of `n / lambda_max(K_0)` of each seed; the method is stable to 2.78.
        stop: asked after each look, with its outputs [seeds, n], whether it was the last one.

    Raises:
        ValueError: for times that do not ascend from 0, or parameters that stop being finite.
    """
    times = times.to(networks.output.dtype)
    times = times[:, None].expand(-1, len(networks)) if times.ndim == 1 else times
    if bool((times[0] != 0).any()) or bool((times.diff(dim=0) < 0).any()):
        raise ValueError("times have to ascend from 0.")
    networks = replace(networks, weights=[w.clone() for w in networks.weights], output=networks.output.clone())
    y = y.to(networks.output.dtype)
    outputs, kernels = [networks.outputs(x)], [networks.kernel(x)]
    longest = step * x.shape[-2] / torch.linalg.eigvalsh(kernels[0])[:, -1]
    for span in times.diff(dim=0):
        steps = math.ceil(float((span / longest).max()) - 1e-9)
        for _ in range(steps):
            _runge_kutta(networks, x, y, span / steps)
            if not bool(torch.isfinite(networks.output).all()):
                raise ValueError(f"The flow left the finite numbers: steps of {step:g} n / lambda_max are too long.")
        outputs.append(networks.outputs(x))
        kernels.append(networks.kernel(x))
        if stop(outputs[-1]):
            break
    return Flow(times[: len(outputs)], torch.stack(outputs), torch.stack(kernels))


def _runge_kutta(networks: Networks, x: Tensor, y: Tensor, dt: Tensor) -> None:
    """Take one step of the lengths dt [seeds], in place.

    A stage's weights are those of the step's start plus n outer products, which are applied as such: weights are read
    for each stage but written once a step, since at these widths time goes into moving them.
    """
    at, found = networks, []
    for reach in (0.5, 0.5, 1.0, None):
        states, before = at.forward(x)
        q = at.backward(before)
        error = torch.einsum("snm,sm->sn", states[-1], at.output) - y
        force = -(dt[:, None] / x.shape[-2]) * error  # [s, n]
        pushes = [force[..., None] * delta for delta in q]
        move = torch.einsum("sn,snm->sm", force, states[-1])
        found.append((pushes, states, move))
        if reach is not None:
            beside = [(reach * push, h) for push, h in zip(pushes, states, strict=False)]
            at = replace(networks, output=networks.output + reach * move, beside=beside)
    shares = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    for i, weight in enumerate(networks.weights):
        push = torch.cat([share * pushes[i] for share, (pushes, _, _) in zip(shares, found, strict=True)], 1)
        weight.baddbmm_(push.mT, torch.cat([states[i] for _, states, _ in found], 1))
    networks.output += sum(share * move for share, (_, _, move) in zip(shares, found, strict=True))


def truncated_flow(
    start: Tensor, kernels: Sequence[Tensor], y: Tensor, times: Tensor, step: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Follow the hierarchy cut off after the last kernel given, which is held constant.

    Args:
        start: f at the start. [seeds, n]
        kernels: K2, ..., up to the order: [seeds, n, n], [seeds, n, n, n], ...
        y: targets, [n] or [seeds, n].
        times: ascending from 0. [looks, seeds]
        step: the longest step of Runge-Kutta's fourth-order method, in units of `n / lambda_max(K_0)`.

    Returns:
        Outputs [looks, seeds, n] and K2 [looks, seeds, n, n] at the times.
    """
    moving, frozen = [start, *kernels[:-1]], kernels[-1]
    longest = step * start.shape[1] / torch.linalg.eigvalsh(kernels[0])[:, -1]
    outputs, found = [start], [kernels[0]]

    def rates(state: Sequence[Tensor]) -> Iterator[Tensor]:
        error = (state[0] - y) / start.shape[1]
        for above in [*state[1:], frozen]:
            yield -torch.einsum("s...b,sb->s...", above, error)

    for span in times.diff(dim=0):
        steps = max(1, math.ceil(float((span / longest).max()) - 1e-9))
        dt = [(span / steps).view(-1, *[1] * (part.ndim - 1)) for part in moving]
        for _ in range(steps):
            k1 = list(rates(moving))
            k2 = list(rates([m + t / 2 * k for m, t, k in zip(moving, dt, k1, strict=True)]))
            k3 = list(rates([m + t / 2 * k for m, t, k in zip(moving, dt, k2, strict=True)]))
            k4 = list(rates([m + t * k for m, t, k in zip(moving, dt, k3, strict=True)]))
            moving = [m + t / 6 * (a + 2 * b + 2 * c + d)
                      for m, t, a, b, c, d in zip(moving, dt, k1, k2, k3, k4, strict=True)]  # fmt: skip
        outputs.append(moving[0])
        found.append(moving[1] if len(moving) > 1 else frozen)
    return torch.stack(outputs), torch.stack(found)
