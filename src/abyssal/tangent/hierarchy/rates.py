"""How fast the kernel moves: its exact time derivatives under gradient flow, without its tensors.

The flow `theta' = -grad loss` starts as `theta(t) = theta_0 + t theta_1 + t^2 theta_2 / 2 + t^3 theta_3 / 6`, where
`theta_{j+1}` is the j-th derivative of the velocity along the polynomial up to `theta_j`: nested forward-mode
derivatives in one variable. The same derivatives of the kernel along that curve are its rates. Only vectors of the
parameters' size and blocks of the kernel are formed, so that the number of samples is not limited by n^3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from abyssal.tangent.hierarchy.factored import FactoredModel, gram
from abyssal.util.progress import Progress, silent

__all__ = ["Curve", "Loss", "kernel_derivatives", "kernel_of"]

Parameters = dict[str, Tensor]


class Loss:
    """`(1 / 2n) sum_a |f(x_a) - y_a|^2` and its gradient, block of samples by block.

    Args:
        model: the model and its samples.
        y: targets. [n, k]
        block: samples at once.
    """

    def __init__(self, model: FactoredModel, y: Tensor, block: int) -> None:
        self.pure, self.y = model.pure, y
        self.blocks = blocks_of(self.pure.n, block)

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


def kernel_of(model: FactoredModel, parameters: Parameters, block: int, progress: Progress | None = None) -> Tensor:
    """Return the kernel of given parameters, symmetric to the last bit. [N, N]."""
    with torch.no_grad():
        return _in_blocks(
            model,
            block,
            progress or silent,
            lambda a, b: [_block(model, lambda t: parameters, a, b)(torch.zeros(()))],
        )[0]


def blocks_of(n: int, block: int) -> list[slice]:
    """Cut `n` samples into blocks."""
    return [slice(start, min(start + block, n)) for start in range(0, n, block)]


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
    blocks = blocks_of(n, block)
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
