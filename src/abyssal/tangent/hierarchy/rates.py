"""How fast the kernel moves: its exact time derivatives under gradient flow, without its tensors.

The flow `theta' = -grad loss` starts as `theta(t) = theta_0 + t theta_1 + t^2 theta_2 / 2 + t^3 theta_3 / 6`, where
`theta_{j+1}` is the j-th derivative of the velocity along the polynomial up to `theta_j`: nested forward-mode
derivatives in one variable. The same derivatives of the kernel along that curve are its rates. Only vectors of the
parameters' size and blocks of the kernel are formed, so that the number of samples is not limited by n^3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from abyssal.tangent.batch import cut
from abyssal.tangent.hierarchy.factored import FactoredModel, gram
from abyssal.tangent.hierarchy.truncated import Array, integrate
from abyssal.util.progress import Progress

__all__ = ["Curve", "Loss", "kernel_derivatives", "kernel_of"]

Parameters = dict[str, Tensor]


class Loss:
    """`(1 / 2n) sum_a |f(x_a) - y_a|^2`, its gradient and its gradient flow, block of samples by block.

    Args:
        model: the model and its samples.
        y: targets. [n, k]
        block: samples at once.
    """

    def __init__(self, model: FactoredModel, y: Tensor, block: int) -> None:
        self.pure, self.y = model.pure, y
        self.blocks = cut(0, self.pure.n, block)

    def outputs(self, parameters: Parameters) -> Tensor:
        """Return the outputs of all samples. [n, k]."""
        with torch.no_grad():
            return torch.cat([self.pure.batch(parameters, self.pure.samples(block)) for block in self.blocks])

    def velocity(self, parameters: Parameters) -> Parameters:
        """Return minus the gradient, differentiably."""
        total: Parameters = {}
        for block in self.blocks:
            for name, g in torch.func.grad(self._part)(parameters, block).items():
                total[name] = total[name] - g if name in total else -g
        return total

    def flow(
        self, times: list[float], rtol: float, progress: Callable[[float], None]
    ) -> Iterator[tuple[float, Parameters | None]]:
        """Integrate the gradient flow `theta' = -grad loss` from the model's parameters.

        By scipy's DOP853 on all parameters as one vector; the absolute tolerance is `rtol` times their root mean
        square.

        Args:
            times: increasing, from 0 on.
            rtol: tolerance of each step.
            progress: called with the time reached.

        Yields:
            Every wanted time with the parameters; where the flow blows up before one, the last time reached with None.
        """
        parameters = self.pure.parameters
        like = next(iter(parameters.values()))
        start = torch.cat([p.reshape(-1) for p in parameters.values()]).double().cpu().numpy()

        def split(state: Array) -> dict[str, Tensor]:
            vector = torch.from_numpy(np.ascontiguousarray(state)).to(like.device)
            parts = zip(parameters.items(), vector.split([p.numel() for p in parameters.values()]), strict=True)
            return {name: part.view(p.shape).to(p.dtype) for (name, p), part in parts}

        def velocity(time: float, state: Array) -> Array:
            progress(time)
            slope = self.velocity(split(state))
            return torch.cat([slope[name].reshape(-1) for name in parameters]).double().cpu().numpy()

        size = float(np.sqrt(np.mean(start**2))) or 1.0
        for time, state in integrate(velocity, start, times, rtol, rtol * size):
            yield time, None if state is None else split(state)

    def _part(self, parameters: Parameters, block: slice) -> Tensor:
        residual = self.pure.batch(parameters, self.pure.samples(block)) - self.y[block]
        return residual.square().sum() / (2 * self.pure.n)


class Curve:
    """The first terms of the gradient flow's Taylor series in time.

    Args:
        loss: whose flow it is.
        order: number of terms beside the start.

    Attributes:
        terms: `theta_0`, `theta_1`, ..., by name each.
    """

    def __init__(self, loss: Loss, order: int) -> None:
        self.terms = [loss.pure.parameters]
        for found in range(order):
            self.terms.append(derivatives(lambda t: loss.velocity(self.at(t)), found, loss.y)[-1])

    def at(self, t: Tensor) -> Parameters:
        """Return the point at time `t`, differentiably."""
        point = dict(self.terms[0])
        power = t
        for order, term in enumerate(self.terms[1:], start=1):
            for name in point:
                point[name] = point[name] + power * (term[name] / math.factorial(order))
            power = power * t
        return point


def derivatives(function: Callable[[Tensor], Any], order: int, like: Tensor) -> list[Any]:
    """Return a function of time, and its first derivatives, at time 0.

    Args:
        function: takes a scalar tensor to tensors.
        order: of the highest derivative.
        like: whose type and device time has.
    """
    zero, one = like.new_zeros(()), like.new_ones(())

    def nested(level: int) -> Callable[[Tensor], list[Any]]:
        if level == 0:
            return lambda t: [function(t)]
        below = nested(level - 1)

        def value_and_derivatives(t: Tensor) -> list[Any]:
            values, tangents = jvp(below, (t,), (one,))  # type: ignore[misc]
            return [*values, tangents[-1]]

        return value_and_derivatives

    return nested(order)(zero)


def kernel_derivatives(
    model: FactoredModel, curve: Curve, order: int, block: int, progress: Progress
) -> tuple[Tensor, ...]:
    """Return the kernel's derivatives along a curve, from the first to the given order. [N, N] each.

    Args:
        model: the model.
        curve: of at least `order` terms.
        order: of the highest derivative.
        block: samples in a block of the kernel.
        progress: called with the phase, blocks done and blocks in all.
    """
    like = curve.terms[0][next(iter(curve.terms[0]))]
    found = _in_blocks(model, block, progress, lambda a, b: derivatives(_block(model, curve.at, a, b), order, like)[1:])
    return tuple(found)


def kernel_of(model: FactoredModel, parameters: Parameters, block: int, progress: Progress) -> Tensor:
    """Return the kernel of given parameters, symmetric to the last bit. [N, N]."""

    def compute(rows: slice, columns: slice) -> list[Tensor]:
        return [_block(model, lambda t: parameters, rows, columns)(torch.zeros(()))]

    with torch.no_grad():
        return _in_blocks(model, block, progress, compute)[0]


def _block(
    model: FactoredModel, at: Callable[[Tensor], Parameters], rows: slice, columns: slice
) -> Callable[[Tensor], Tensor]:
    """Return the function of time that gives a block of the kernel. [rows, k, columns, k]."""

    def kernel(t: Tensor) -> Tensor:
        parameters = at(t)
        left = model.features(parameters, model.pure.samples(rows))
        right = left if rows == columns else model.features(parameters, model.pure.samples(columns))
        return gram(left, right, model.sites)

    return kernel


def _in_blocks(
    model: FactoredModel, block: int, progress: Progress, compute: Callable[[slice, slice], list[Tensor]]
) -> list[Tensor]:
    """Fill symmetric matrices block by block; only those on and below the diagonal are computed."""
    n, k = model.pure.n, model.pure.k
    blocks = cut(0, n, block)
    pairs = [(a, b) for i, a in enumerate(blocks) for b in blocks[: i + 1]]
    found: list[Tensor] = []
    with model.running():
        for done, (a, b) in enumerate(pairs):
            progress("kernel blocks", done, len(pairs))
            parts = compute(a, b)
            if not found:
                found = [p.new_empty(n, k, n, k) for p in parts]
            for whole, part in zip(found, parts, strict=True):
                if a == b:  # rounding differs between [a, b] and [b, a]
                    part = (part + part.permute(2, 3, 0, 1)) / 2
                whole[a, :, b] = part
                whole[b, :, a] = part.permute(2, 3, 0, 1)
    progress("kernel blocks", len(pairs), len(pairs))
    return [whole.view(n * k, n * k) for whole in found]
