"""A residual network as a trajectory through depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.nn.schemes import Euler, Scheme
from abyssal.util.checks import instance

__all__ = ["ResidualStack"]


class ResidualStack(nn.Module):
    """The residual network of the papers: residual functions `f_n`, joined by a scheme.

    With the default scheme and scale it computes `x[n+1] = x[n] + f_n(x[n]) / N`. Every step is a module in
    `self.steps` and hands its output tensor to the next one untouched, which is what
    `abyssal.reconstruct(stack)` needs to find one chain over the whole depth.

    Args:
        blocks: the residual functions in order, modules mapping [batch, ...] to the same shape. The same
            module may occur several times (shared weights).
        scheme: how they are joined: :class:`~abyssal.nn.Euler` (default) or :class:`~abyssal.nn.Heun`.
        scale: the step size, one number or one per step; None is 1 / (number of steps).

    Attributes:
        steps: the residual steps, `x[n] -> x[n+1]`.
        scheme: as given.

    Raises:
        TypeError: if a residual function is not a module, or the scale is not a number.
        ValueError: if there are too few residual functions for the scheme, or scales for the steps; at the
            first call, if a residual function changes the shape of its input.

    Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, section 2.
    """

    # For find_blocks, in the manner of Hugging Face: the steps are the blocks, also of a stack within a stack.
    _no_split_modules = ("EulerStep", "HeunStep")

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        scheme: Scheme | None = None,
        scale: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        given = Euler() if scheme is None else scheme
        self.scheme = instance("scheme", given, Scheme, "an abyssal.nn.Scheme such as Euler()")
        self.steps = nn.ModuleList(self.scheme.steps(list(blocks), scale))

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual functions in order."""
        return self.scheme.blocks(list(self.steps))

    @property
    def scale(self) -> float | tuple[float, ...]:
        """The step size: one number where all steps have the same, else one per step."""
        sizes = tuple(float(step.scale) for step in self.steps)  # type: ignore[arg-type]
        return sizes[0] if len(set(sizes)) == 1 else sizes

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the last state.

        Args:
            x: the first state. [batch, ...]
            args: passed on to every residual function.
            kwargs: passed on to every residual function.

        Returns:
            The state after all steps. [batch, ...]
        """
        for step in self.steps:
            x = step(x, *args, **kwargs)
        return x

    def trajectory(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return all states, differentiably.

        The states are stored, all of them: asking for the trajectory costs the memory of the depth.

        Args:
            x: the first state. [batch, ...]
            args: passed on to every residual function.
            kwargs: passed on to every residual function.

        Returns:
            The states, from the first to the last. [steps + 1, batch, ...]
        """
        states = [x]
        for step in self.steps:
            states.append(step(states[-1], *args, **kwargs))
        return torch.stack(states)

    def extra_repr(self) -> str:
        """Show scheme, number of steps and step size."""
        scale = self.scale
        shown = f"{scale:g}" if isinstance(scale, float) else "per step"
        return f"scheme={self.scheme}, steps={len(self.steps)}, scale={shown}"
