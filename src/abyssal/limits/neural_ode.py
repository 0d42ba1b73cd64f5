"""The neural ODE of any residual stack: its weights, interpolated linearly in depth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.nn import ResidualStack
from abyssal.util.checks import instance

__all__ = ["NeuralOde", "import_odeint"]


class NeuralOde:
    """`dx/dt = phi(x, t)`, of which a residual stack's forward pass is one discretisation.

    Step n of the stack has size `h_n` and starts at `t_n = h_0 + ... + h_{n-1}`; at that time `phi` is the
    residual function `f_n`. Between `t_n` and `t_{n+1}` it is the same module with weights (and floating
    buffers) on the straight line from `f_n`'s to `f_{n+1}`'s. An Euler stack has no function at its end, so
    `f_{N-1}` stays for the last step; a Heun stack has one. With the default scale 1/N time runs from 0 to 1.

    Everything is computed in float64, on copies: the stack is neither changed nor kept.

    Args:
        stack: residual functions of one type, with parameters and buffers of the same names and shapes,
            deterministic (dropout in `eval()`), steps of positive size.

    Attributes:
        times: the knots. [steps + 1], float64

    Raises:
        TypeError: if it is not a ResidualStack.
        ValueError: if the residual functions cannot be interpolated, or a step is not positive.
    """

    def __init__(self, stack: ResidualStack) -> None:
        instance("stack", stack, ResidualStack, "an abyssal.nn.ResidualStack")
        blocks = stack.blocks
        scale = stack.scale
        sizes = (scale,) * len(stack) if isinstance(scale, float) else scale
        if min(sizes) <= 0:
            raise ValueError(f"Time has to go forward: every step's scale has to be positive, got {min(sizes)}.")
        self._weights = _stacked(blocks)
        device = next(iter(self._weights.values())).device if self._weights else None
        self._template = copy.deepcopy(blocks[0]).double()
        self.times = torch.cat([torch.zeros(1), torch.tensor(sizes)]).double().cumsum(0).to(device)
        self._last = len(blocks) - 1

    def ends(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors at the start and at the end of every interval, by name. [steps, ...] each."""
        after = [min(n + 1, self._last) for n in range(len(self.times) - 1)]
        start = {name: w[: len(after)] for name, w in self._weights.items()}
        return start, {name: w[after] for name, w in self._weights.items()}

    def between(
        self,
        start: dict[str, Tensor],
        end: dict[str, Tensor],
        fraction: Tensor | float,
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return the residual function of tensors on the line between two given ones.

        Args:
            start: tensors by name.
            end: the same.
            fraction: 0 at the start, 1 at the end.
            x: the state. [batch, ...]
            args: passed on to the residual function.
            kwargs: passed on to the residual function.
        """
        tensors = {name: w + fraction * (end[name] - w) for name, w in start.items()}
        return torch.func.functional_call(self._template, tensors, (x, *args), kwargs)

    def velocity(self, interval: int, fraction: Tensor | float, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `phi(x, t)` at `t = t_n + fraction * h_n`.

        Args:
            interval: n.
            fraction: from 0 to 1.
            x: the state. [batch, ...]
            args: passed on to the residual function.
            kwargs: passed on to the residual function.
        """
        after = min(interval + 1, self._last)
        start, end = ({name: w[n] for name, w in self._weights.items()} for n in (interval, after))
        return self.between(start, end, fraction, x, *args, **kwargs)

    @torch.no_grad()
    def solve(self, x: Tensor, *args: Any, points: int = 1, tolerance: float = 1e-10, **kwargs: Any) -> Tensor:
        """Integrate by Dormand and Prince's adaptive method of order 5, stopping at every knot.

        Args:
            x: the first state. [batch, ...]
            args: passed on to the residual function.
            points: states returned per step of the stack.
            tolerance: of each step, relative to the size of the state (root mean square over the batch).
            kwargs: passed on to the residual function.

        Returns:
            The states at `points` equally spaced times in each interval, and the last. [steps * points + 1, batch, ...]

        Raises:
            ImportError: without torchdiffeq.
            ValueError: if the residual functions are random.
        """
        odeint = import_odeint()
        x = x.detach().double()
        if not torch.equal(*(self.velocity(0, 0.0, x, *args, **kwargs) for _ in range(2))):
            raise ValueError("The residual functions give two values for one input. Put the stack in eval() (dropout).")
        size = x.square().mean().sqrt().item() or 1.0
        path = [x]
        # Linear interpolation has a kink at every knot, across which a step would lose the method's order: so every
        # interval is a problem of its own, in its own time from 0 to 1, which is tried in one step first.
        wanted = torch.linspace(0, 1, points + 1, dtype=torch.float64, device=x.device)
        options = {"step_t": wanted[-1:], "first_step": 1.0}
        for n, step in enumerate(self.times.diff()):

            def field(fraction: Tensor, state: Tensor, n: int = n, step: Tensor = step) -> Tensor:
                return step * self.velocity(n, fraction, state, *args, **kwargs)

            found = odeint(
                field, path[-1], wanted, rtol=tolerance, atol=tolerance * size, method="dopri5", options=options
            )
            path += list(found[1:])
        return torch.stack(path)


def import_odeint() -> Callable[..., Tensor]:
    """Return torchdiffeq's `odeint`, or raise ImportError saying what to install."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("Neural ODEs are integrated by torchdiffeq: pip install 'abyssal[ode]'.") from error
    return odeint


def _stacked(blocks: list[nn.Module]) -> dict[str, Tensor]:
    """All blocks' floating parameters and buffers, by name. [blocks, ...] each, float64."""
    kind = type(blocks[0])
    tensors = [{**dict(b.named_parameters()), **dict(b.named_buffers())} for b in blocks]
    shapes = {name: t.shape for name, t in tensors[0].items()}
    for n, (block, own) in enumerate(zip(blocks, tensors, strict=True)):
        if type(block) is not kind or {name: t.shape for name, t in own.items()} != shapes:
            raise ValueError(
                f"Residual function {n} ({type(block).__name__}) differs from residual function 0 ({kind.__name__}) in "
                "type, or in a parameter's name or shape: there is no straight line between them. A neural ODE "
                "needs residual functions of one kind; take a part of the stack that is."
            )
        if not all(math.isfinite(t.detach().double().sum().item()) for t in own.values() if t.is_floating_point()):
            raise ValueError(f"Residual function {n} ({type(block).__name__}) has weights that are not finite.")
    floating = [name for name, t in tensors[0].items() if t.is_floating_point()]
    return {name: torch.stack([own[name].detach().double() for own in tensors]) for name in floating}
