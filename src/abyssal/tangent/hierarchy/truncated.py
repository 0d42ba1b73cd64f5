"""The truncated hierarchy: a closed system of ordinary differential equations for outputs and kernel.

With residuals `r = f - y` the hierarchy is `f' = -K2 r / n` and `K^(p)' = -K^(p+1) r / n`. Held constant at order p,
the highest kernel leaves a closed system. The one below it moves linearly in `R(t) = int_0^t r`, so that the state is
smaller than it looks:

    order 2:  f' = -K2(0) r / n
    order 3:  f' = -K2 r / n,  K2 = K2(0) - K3(0) R / n,                       R' = r
    order 4:  f' = -K2 r / n,  K2' = -(K3(0) - K4(0) R / n) r / n,             R' = r

K3 is contracted in its last argument and K4 in its last, then in its third: neither is symmetric in them.

Source: Huang and Yau, arXiv 1909.08156 (the hierarchy truncated at level p).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["TruncatedHierarchy", "integrate"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TruncatedHierarchy:
    """The system of one order.

    Args:
        samples: n of the loss.
        residual: `f(0) - y`. [N]
        kernels: K2 [N, N]; then K3 and K4, as far as the order goes. The last is held constant.
    """

    samples: int
    residual: Array
    kernels: tuple[Array, ...]

    @property
    def order(self) -> int:
        """Of the highest kernel: 2, 3 or 4."""
        return len(self.kernels) + 1

    def start(self) -> Array:
        """Return the state at time 0: residuals, their integral (order 3 and 4), K2 (order 4), flattened."""
        parts = [self.residual]
        if self.order >= 3:
            parts.append(np.zeros_like(self.residual))
        if self.order == 4:
            parts.append(self.kernels[0].ravel())
        return np.concatenate(parts)

    def residual_and_kernel(self, state: Array) -> tuple[Array, Array]:
        """Return residuals [N] and kernel [N, N] of a state."""
        size = len(self.residual)
        r = state[:size]
        if self.order == 2:
            return r, self.kernels[0]
        if self.order == 3:
            return r, self.kernels[0] - self.kernels[1] @ state[size:] / self.samples
        return r, state[2 * size :].reshape(size, size)

    def velocity(self, time: float, state: Array) -> Array:
        """Return the state's time derivative."""
        r, kernel = self.residual_and_kernel(state)
        parts = [-kernel @ r / self.samples]
        if self.order >= 3:
            parts.append(r)
        if self.order == 4:
            third = self.kernels[1] - self.kernels[2] @ state[len(r) : 2 * len(r)] / self.samples
            parts.append((-third @ r / self.samples).ravel())
        return np.concatenate(parts)


def integrate(
    velocity: Callable[[float, Array], Array], start: Array, times: list[float], rtol: float, atol: float
) -> Iterator[tuple[float, Array | None]]:
    """Integrate by scipy's DOP853 (explicit, adaptive, order 8), ending a step at every wanted time.

    Args:
        velocity: the right-hand side.
        start: the state at time 0.
        times: increasing, from 0 on.
        rtol: tolerance of each step, relative.
        atol: the same, absolute.

    Yields:
        Every wanted time with its state. Where the solution blows up before one, the last time reached with None, and
        nothing more.
    """
    from scipy.integrate import solve_ivp  # here, since it takes long to import

    now, state, step = 0.0, start, None
    for time in times:
        if time > now:
            first = None if step is None else min(step, time - now)
            # To the very end of the interval: scipy interpolates between steps to a lower order than it steps.
            with np.errstate(over="ignore", invalid="ignore"):
                found = solve_ivp(velocity, (now, time), state, "DOP853", rtol=rtol, atol=atol, first_step=first)
            if found.status != 0 or not np.isfinite(found.y[:, -1]).all():
                yield float(found.t[-1]), None
                return
            if len(found.t) > 2:
                step = float(np.diff(found.t[:-1]).max())
            now, state = time, found.y[:, -1]
        yield now, state
