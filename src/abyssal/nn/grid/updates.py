"""Update rules for many cells at once: torch.optim's SGD and Adam, with a learning rate for each cell.

A grid keeps its residual weights as `f V`, with f the square root of the branch's scale (see
:mod:`abyssal.nn.grid.block`). What a rule wants for that is decided once in a step, in `schedule`; the loop over
layers then multiplies by nothing but weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.util.checks import positive

__all__ = ["Adam", "Schedule", "Sgd", "Update"]


@dataclass(frozen=True)
class Schedule:
    """The factors of one step, one for each cell.

    Attributes:
        top: what the gradient by the outputs is multiplied by before it goes down. [cells, 1, 1]
        lift: what the gradient by the last state is multiplied by on top of that, so that a product with it is
            what the rule wants of a residual weight. [cells, 1, 1]
        layers: step size of the residual weights as they are kept. [cells, 1, 1]
        ends: step size of stem and head. [cells, 1, 1]
        floor: what is added to a root of second moments.
    """

    top: Tensor
    lift: Tensor
    layers: Tensor
    ends: Tensor
    floor: float = 0.0


class Update(ABC):
    """What is done with a gradient. Subclasses are frozen and keep no state of their own."""

    @property
    @abstractmethod
    def moments(self) -> int:
        """How many tensors of a parameter's shape the rule keeps."""

    @abstractmethod
    def schedule(self, rates: Tensor, factor: Tensor, step: int) -> Schedule:
        """Return the factors of step 1, 2, ...

        Args:
            rates: learning rates. [cells]
            factor: residual weights are kept multiplied by it. [cells]
            step: from 1.
        """

    @abstractmethod
    def apply(
        self, weight: Tensor, moments: list[Tensor], gradient: Tensor, rate: Tensor, floor: float, work: Tensor
    ) -> None:
        """Change a weight, in place.

        Args:
            weight: [cells, out, in]
            moments: as many as `self.moments`, all of the weight's shape.
            gradient: of the weight's shape; it may be overwritten.
            rate: step size. [cells, 1, 1]
            floor: of the schedule.
            work: of the weight's shape; overwritten.
        """

    def apply_product(
        self,
        weight: Tensor,
        moments: list[Tensor],
        left: Tensor,
        right: Tensor,
        plan: Schedule,
        gradient: Tensor,
        work: Tensor,
    ) -> None:
        """Change a residual weight whose gradient is `left @ right`, in place.

        Args:
            weight: [cells, out, in]
            moments: as for `apply`.
            left: [cells, out, batch]
            right: [cells, batch, in]
            plan: of this step.
            gradient: of the weight's shape; overwritten.
            work: of the weight's shape; overwritten.
        """
        torch.bmm(left, right, out=gradient)
        self.apply(weight, moments, gradient, plan.layers, plan.floor, work)


@dataclass(frozen=True)
class Sgd(Update):
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Args:
        momentum: at least 0 and less than 1; without dampening, not Nesterov's.

    Raises:
        ValueError: for another momentum.
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum has to be at least 0 and less than 1, got {self.momentum}.")

    @property
    def moments(self) -> int:
        """One with momentum, none without."""
        return int(self.momentum > 0)

    def schedule(self, rates: Tensor, factor: Tensor, step: int) -> Schedule:
        """Return the factors; without momentum the learning rates travel down with the gradient, for nothing."""
        one = torch.ones_like(factor)
        if self.momentum:
            return _schedule(one, factor, rates * factor, rates)
        return _schedule(rates, factor**2, one, one)

    def apply(
        self, weight: Tensor, moments: list[Tensor], gradient: Tensor, rate: Tensor, floor: float, work: Tensor
    ) -> None:
        """Take a step."""
        if self.momentum:
            gradient = moments[0].mul_(self.momentum).add_(gradient)
        weight.addcmul_(gradient, rate, value=-1)

    def apply_product(
        self,
        weight: Tensor,
        moments: list[Tensor],
        left: Tensor,
        right: Tensor,
        plan: Schedule,
        gradient: Tensor,
        work: Tensor,
    ) -> None:
        """Take a step; without momentum it is the product itself, added where the weight is."""
        if self.momentum:
            moments[0].baddbmm_(left, right, beta=self.momentum)
            weight.addcmul_(moments[0], plan.layers, value=-1)
        else:
            weight.baddbmm_(left, right, alpha=-1)


@dataclass(frozen=True)
class Adam(Update):
    """Adam, as `torch.optim.Adam`.

    Args:
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.

    Raises:
        ValueError: for decays outside [0, 1), or an eps that is not positive.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas have to be two numbers from 0 to below 1, got {self.betas}.")
        positive("eps", self.eps)

    @property
    def moments(self) -> int:
        """Two."""
        return 2

    def schedule(self, rates: Tensor, factor: Tensor, step: int) -> Schedule:
        """Return the factors, with the corrections for moments that began at 0."""
        first, second = (1 - beta**step for beta in self.betas)
        size = rates * math.sqrt(second) / first
        return _schedule(torch.ones_like(factor), factor, size * factor, size, self.eps * math.sqrt(second))

    def apply(
        self, weight: Tensor, moments: list[Tensor], gradient: Tensor, rate: Tensor, floor: float, work: Tensor
    ) -> None:
        """Take a step."""
        mean, square = moments
        first, second = self.betas
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        torch.sqrt(square, out=work)
        torch.div(mean, work.add_(floor), out=work)
        weight.addcmul_(work, rate, value=-1)


def _schedule(top: Tensor, lift: Tensor, layers: Tensor, ends: Tensor, floor: float = 0.0) -> Schedule:
    top, lift, layers, ends = (t.view(-1, 1, 1) for t in (top, lift, layers, ends))
    return Schedule(top, lift, layers, ends, floor)
