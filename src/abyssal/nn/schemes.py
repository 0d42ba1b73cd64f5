"""Schemes: how a sequence of residual functions becomes a sequence of residual steps.

A residual network discretises `dx/ds = phi(x, s)`: its residual functions `f_n` are samples of `phi` along
the depth `s`, and a scheme is the numerical method that joins them. Each step is a module of its own, with
a `forward` (one step of depth) and a `reverse_step` (one step of reversed depth, the estimate of the input
from which `abyssal.reconstruct` starts).

A new scheme is two small classes: a step, and a frozen dataclass deriving from :class:`Scheme`.

Source: M. E. Sander, P. Ablin, G. Peyré, "Do Residual Neural Networks discretize Neural Ordinary
Differential Equations?", NeurIPS 2022, arXiv 2205.14612 (Heun networks, and the reversed steps).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

__all__ = ["Euler", "EulerStep", "Heun", "HeunStep", "Scheme"]

Branch = Callable[[Tensor], Tensor]


class Scheme(ABC):
    """A numerical method that turns residual functions into residual steps.

    Class attributes:
        order: order of convergence to the ODE as depth grows, for residual functions smooth in depth.
        functions_per_step: how many neighbouring residual functions one step uses.
    """

    order: ClassVar[int]
    functions_per_step: ClassVar[int]

    @final
    def steps(self, blocks: Sequence[nn.Module], scale: float | Sequence[float] | None = None) -> list[nn.Module]:
        """Build the steps of a network.

        Args:
            blocks: the residual functions `f_n` in order, each mapping [batch, ...] to the same shape.
            scale: the step size `h`: one number, or one per step; None is 1 / (number of steps), for which
                the network stays bounded as depth grows.

        Returns:
            The step modules in order, `len(blocks) - functions_per_step + 1` of them.

        Raises:
            TypeError: if a residual function is not a module, or the scale is not a number.
            ValueError: for too few residual functions, or a scale of the wrong length.
        """
        _check_blocks(blocks, self)
        count = len(blocks) - self.functions_per_step + 1
        sizes = _step_sizes(scale, count)
        return [self._step(blocks[n : n + self.functions_per_step], n, h) for n, h in enumerate(sizes)]

    @abstractmethod
    def blocks(self, steps: Sequence[nn.Module]) -> list[nn.Module]:
        """Return the residual functions that `steps`, built by this scheme, were built from, in order."""

    @abstractmethod
    def _step(self, functions: Sequence[nn.Module], index: int, scale: float) -> nn.Module:
        """Build step `index`, of size `scale`, from its `functions_per_step` residual functions."""


class _Step(nn.Module):
    """One step of a scheme, of size `scale`; `index` is the position of its first residual function in the network."""

    def __init__(self, index: int, scale: float) -> None:
        super().__init__()
        self.index = index
        self.scale = scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the next state.

        Args:
            x: the state. [batch, ...]
            args: passed on to the residual functions.
            kwargs: passed on to the residual functions.

        Raises:
            ValueError: if a residual function changes the shape.
        """
        return self._moved(x, self.scale, *self._branches(args, kwargs))

    def reverse_step(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the state that was mapped to `y`: the same step with reversed depth, from `y` by `-h`.

        Args:
            y: the next state. [batch, ...]
            args: as given to `forward`.
            kwargs: as given to `forward`.
        """
        return self._moved(y, -self.scale, *self._branches(args, kwargs)[::-1])

    def extra_repr(self) -> str:
        """Show the step size."""
        return f"scale={self.scale:g}"

    def _branches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Branch]:
        """Return the residual functions in the order of depth; not by `children()`, which has a tied one once."""
        return [partial(_evaluate, n, f, args, kwargs) for n, f in enumerate(self._modules.values(), self.index)]  # type: ignore[arg-type]

    def _moved(self, x: Tensor, h: float, *functions: Branch) -> Tensor:
        """Return the state one step of size `h` away, by functions in the order in which depth is gone through."""
        raise NotImplementedError


class EulerStep(_Step):
    """`x -> x + h f(x)`.

    Its reversed step, `y - h f(y)`, has an error of O(h^2); as a fixed-point iteration it may be repeated from the
    result.

    Args:
        block: the residual function `f`: [batch, ...] to the same shape.
        index: its position in the network, for messages.
        scale: the step size `h`.
    """

    def __init__(self, block: nn.Module, index: int, scale: float) -> None:
        super().__init__(index, scale)
        self.block = block

    def _moved(self, x: Tensor, h: float, *functions: Branch) -> Tensor:
        return torch.add(x, functions[0](x), alpha=h)


class HeunStep(_Step):
    """`x -> x + h/2 (f_n(x) + f_{n+1}(x + h f_n(x)))`.

    Its reversed step is `y - h/2 (f_{n+1}(y) + f_n(y - h f_{n+1}(y)))`. Where the residual functions are smooth in
    depth its error is O(h^4): the leading errors, O(h^3), of a step forward and of one back cancel, as for any method
    of even order.

    Args:
        first: the residual function `f_n`: [batch, ...] to the same shape.
        second: the residual function `f_{n+1}`, which the next step has as its first.
        index: the position `n` in the network, for messages.
        scale: the step size `h`.
    """

    def __init__(self, first: nn.Module, second: nn.Module, index: int, scale: float) -> None:
        super().__init__(index, scale)
        self.first = first
        self.second = second

    def _moved(self, x: Tensor, h: float, *functions: Branch) -> Tensor:
        here = functions[0](x)
        there = functions[1](torch.add(x, here, alpha=h))
        return torch.add(x, here + there, alpha=h / 2)


@final
@dataclass(frozen=True)
class Euler(Scheme):
    """The residual network as everybody knows it: N residual functions, N steps `x + h f_n(x)`."""

    order: ClassVar[int] = 1
    functions_per_step: ClassVar[int] = 1

    def blocks(self, steps: Sequence[nn.Module]) -> list[nn.Module]:
        """Return the residual functions of Euler steps, in order."""
        return [step.get_submodule("block") for step in steps]

    def _step(self, functions: Sequence[nn.Module], index: int, scale: float) -> nn.Module:
        return EulerStep(functions[0], index, scale)


@final
@dataclass(frozen=True)
class Heun(Scheme):
    """Heun's method: N >= 2 residual functions, N - 1 steps `x + h/2 (f_n(x) + f_{n+1}(x + h f_n(x)))`.

    Twice the evaluations of :class:`Euler`. For them the network follows its ODE to second order, and its
    reversed steps recover the input to third; both only where the residual functions are smooth in depth.

    Neighbouring steps share a residual function: `state_dict()` has each shared one under both names
    (`steps.3.second.*` and `steps.4.first.*`, the same tensors, so that a round trip restores them), while
    `parameters()` lists it once. A random residual function (dropout) draws anew in each of its two uses.
    """

    order: ClassVar[int] = 2
    functions_per_step: ClassVar[int] = 2

    def blocks(self, steps: Sequence[nn.Module]) -> list[nn.Module]:
        """Return the residual functions of Heun steps, in order, each shared one once."""
        return [step.get_submodule("first") for step in steps] + [steps[-1].get_submodule("second")]

    def _step(self, functions: Sequence[nn.Module], index: int, scale: float) -> nn.Module:
        return HeunStep(functions[0], functions[1], index, scale)


def _evaluate(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    """Return `f(x)`; without the check, a wrong shape would broadcast in the sum and go unnoticed."""
    out = block(x, *args, **kwargs)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"Residual function {index} ({type(block).__name__}) returned {got} for a state of shape "
            f"{tuple(x.shape)}. A residual function has to return one tensor of its input's shape: put "
            f"layers that change it before or after the ResidualStack, or between two of them."
        )
    return out


def _check_blocks(blocks: Sequence[nn.Module], scheme: Scheme) -> None:
    for n, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            raise TypeError(
                f"Residual function {n} is a {type(block).__name__}, not a torch.nn.Module. Wrap a plain "
                f"function in a module whose forward calls it, so that its parameters are found."
            )
    if len(blocks) < scheme.functions_per_step:
        raise ValueError(
            f"{scheme} needs at least {scheme.functions_per_step} residual function(s), got {len(blocks)}."
        )


def _step_sizes(scale: float | Sequence[float] | None, count: int) -> list[float]:
    if scale is None:
        return [1 / count] * count
    given = list(scale) if isinstance(scale, Sequence) else [scale] * count
    if len(given) != count:
        raise ValueError(f"scale has {len(given)} entries for {count} steps: give one per step, or one number.")
    try:
        sizes = [float(h) for h in given]
    except (TypeError, ValueError):
        raise TypeError(f"scale has to be a number or a sequence of numbers, got {scale!r}.") from None
    if not all(math.isfinite(h) for h in sizes):
        raise ValueError(f"scale has to be finite, got {scale!r}.")
    return sizes
