"""How far a residual stack is from its neural ODE, and a bound on it.

**The bound**, after Proposition 1 of Sander, Ablin, Peyré 2022, arXiv 2205.14612 (its abstract announces a
tight bound; the statement and the constants below are derived here, not copied). Let `x(t)` solve
`x' = phi(x, t)` and `x_{n+1} = x_n + h_n phi(x_n, t_n)` with the same start, `e_n = |x_n - x(t_n)|`, and

- `Lambda`: the largest Lipschitz constant of `phi(., t_n)` between `x_n` and `x(t_n)`, over the knots n;
- `M`: the supremum of `|x''| = |d_t phi + d_x phi . phi|` along the trajectory of the ODE.

Taylor's formula with the remainder as an integral gives `x(t_{n+1}) = x(t_n) + h_n phi(x(t_n), t_n) + r_n` with
`|r_n| = |integral (t_{n+1} - t) x''(t) dt| <= h_n^2 M / 2`, for which x' has to be absolutely continuous only, so
that kinks of ReLU and of interpolated weights are allowed. Hence

    e_{n+1} <= (1 + h_n Lambda) e_n + h_n^2 M / 2                                       (step by step)
    e_N <= h M (exp(Lambda T) - 1) / (2 Lambda),   h = max h_n, T = sum h_n              (closed form)

which is `(e^Lambda - 1) / (2 N Lambda) M` for steps of 1/N. The first is an equality where all `r_n` and all
`phi(x_n, t_n) - phi(x(t_n), t_n)` point the same way: `phi(x, t) = Lambda x + M t - Lambda M t^2 / 2`, whose
solution from 0 is `M t^2 / 2`. The closed form is then tight as N grows, and exact at every N for Lambda = 0.

`M` contains the derivative of the weights in depth. Interpolating N weights that jump by O(1) makes it O(N), and
the bound no longer falls with N. Nor need the distance: see the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from abyssal.limits.neural_ode import NeuralOde, import_odeint
from abyssal.nn import Euler, MLPBranch, ResidualStack
from abyssal.report.axes import COLOURS, LIMIT, Plotted, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OdeGap", "RigorousBound", "euler_bound", "ode_gap", "rigorous_bound"]

# Where in each interval |x''| is looked at: its ends and three points between.
_POINTS = 4
_ITERATIONS = 20
_CHUNK = 64  # intervals at a time


@dataclass(frozen=True, eq=False)
class RigorousBound:
    """The bound from constants that are themselves bounds, up to rounding in float64.

    For `phi = W2 tanh(W1 x + b1) + b2` with weights linear in t between knots, spectral norms are convex along
    each interval, so their largest values are at its ends. With `H` hidden units, `S = max |W2| sqrt(H) + |b2|`
    bounds `|phi|`, `X = |x_0| + T S` bounds `|x(t)|`, `Lambda = max |W2_n| |W1_n|`, and with
    `tau = min(sqrt(H), |W1| X + |b1|)`

        M = max over intervals of |W2'| tau + |W2| (|W1'| X + |b1'|) + |b2'| + |W2| |W1| S.

    Attributes:
        lipschitz: Lambda.
        acceleration: M. [batch]
        bound: the closed form. [batch]
    """

    lipschitz: float
    acceleration: Tensor
    bound: Tensor


@dataclass(frozen=True, eq=False)
class OdeGap(Plotted):
    """A residual stack against its neural ODE, in the Euclidean norm of each sample's state.

    Attributes:
        times: of the knots, 0 first. [steps + 1]
        distance: `|x_n - x(t_n)|`. [steps + 1, batch]
        size: `|x_0|`. [batch]
        moved: how far the ODE's solution is from its start at the end. [batch]
        lipschitz: Lambda, estimated: the largest spectral norm of the Jacobians of the residual functions at
            `x_n` and at `x(t_n)`, by 20 power iterations (from below). None for a Heun stack. [batch]
        acceleration: M, estimated: the largest `|x''|` at five points of every interval. None for Heun. [batch]
        bound: the closed form with these constants. None for Heun. [batch]
        stepwise: the step-by-step form with the constants of each step. None for Heun. [steps + 1, batch]
        rigorous: the bound from rigorous constants, for Euler stacks of :class:`abyssal.nn.MLPBranch`; else None.
        solver_error: largest distance between the ODE's solution and that at 100 times the tolerance; the
            solution itself is better. It is part of `distance`.
    """

    times: Tensor
    distance: Tensor
    size: Tensor
    moved: Tensor
    lipschitz: Tensor | None
    acceleration: Tensor | None
    bound: Tensor | None
    stepwise: Tensor | None
    rigorous: RigorousBound | None
    solver_error: float

    def __str__(self) -> str:
        """Show the worst sample's figures."""
        worst = int(self.distance[-1].argmax())
        lines = [
            f"{len(self.times) - 1} steps to time {self.times[-1]:g}, {self.distance.shape[1]} samples; "
            f"the sample that ends farthest from its ODE:",
            f"  measured |x_N - x(T)|        {self.distance[-1, worst]:.3e}"
            f"  ({self.distance[-1, worst] / self.size[worst]:.2e} of |x_0|; "
            f"solver's error below {self.solver_error:.0e})",
        ]
        if self.bound is None or self.stepwise is None or self.lipschitz is None or self.acceleration is None:
            return "\n".join([*lines, "  no bound: it is for Euler stacks"])
        lines += [
            f"  bound, step by step          {self.stepwise[-1, worst]:.3e}  (constants estimated)",
            f"  bound, closed form           {self.bound[worst]:.3e}  (Lambda = {self.lipschitz[worst]:.3g}, "
            f"M = {self.acceleration[worst]:.3g}, estimated)",
        ]
        if self.rigorous is not None:
            lines.append(
                f"  bound, closed form           {self.rigorous.bound[worst]:.3e}  (Lambda = "
                f"{self.rigorous.lipschitz:.3g}, M = {self.rigorous.acceleration[worst]:.3g}, rigorous)"
            )
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Return distance and bound along the depth, for the sample that ends farthest away."""
        figure, (axes,) = new_figure(1)
        worst = int(self.distance[-1].argmax())
        t = self.times[1:].cpu().numpy()
        axes.plot(t, self.distance[1:, worst].cpu().numpy(), color=COLOURS[0], label="measured")
        if self.stepwise is not None:
            axes.plot(t, self.stepwise[1:, worst].cpu().numpy(), color=COLOURS[1], label="bound, step by step")
        if self.bound is not None:
            axes.plot(t[-1:], self.bound[worst : worst + 1].cpu().numpy(), "D", color=LIMIT, label="bound, closed form")
        axes.set(yscale="log", xlabel="time", ylabel="|x_n − x(t_n)|", title=f"{len(t)} steps against the neural ODE")
        axes.legend(frameon=False)
        return figure


def euler_bound(lipschitz: Tensor, acceleration: Tensor, time: float, step: float) -> Tensor:
    """Return `h M (exp(Lambda T) - 1) / (2 Lambda)`, the bound in closed form; `h M T / 2` at Lambda = 0.

    Args:
        lipschitz: Lambda, not negative. [...]
        acceleration: M. [...]
        time: T.
        step: h, the longest step.
    """
    exponent = lipschitz * time
    growth = torch.where(exponent > 0, torch.expm1(exponent) / torch.where(exponent > 0, exponent, 1.0), 1.0)
    return step * time / 2 * acceleration * growth


def ode_gap(stack: ResidualStack, x: Tensor, *args: Any, tolerance: float = 1e-10, **kwargs: Any) -> OdeGap:
    """Measure how far a residual stack is from the neural ODE through its weights, and bound it.

    The ODE is :class:`~abyssal.limits.neural_ode.NeuralOde` of the stack: weights interpolated linearly in depth. In
    float64, on copies. The constants of the bound are estimated where the trajectory goes, for any stack; from
    below, so a bound with estimated constants may fail by the estimate's error where it is tight. For Euler
    stacks of MLPBranch there is a rigorous bound besides, much larger.

    Args:
        stack: see NeuralOde for what it has to be. Residual functions have to treat samples independently.
        x: the first state, its samples along the first dimension. [batch, ...]
        args: passed on to the residual functions.
        tolerance: of the integration, relative.
        kwargs: passed on to the residual functions.

    Returns:
        Distances at every depth, bounds, and the constants in them.

    Raises:
        ImportError: without torchdiffeq (the extra `ode`).
        TypeError: if the stack is none, or x is not floating.
        ValueError: for x without samples or not finite, a bad tolerance, or a stack that has no neural ODE.
    """
    import_odeint()
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x has to be a floating tensor [batch, ...], got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.dim() < 2 or x.shape[0] == 0 or not x.isfinite().all():
        raise ValueError(f"x has to be finite, with samples along its first dimension; got shape {tuple(x.shape)}.")
    if not 0 < tolerance <= 1e-3:
        raise ValueError(f"tolerance has to be positive and at most 1e-3, got {tolerance}.")
    flow = NeuralOde(stack)
    x = x.detach().double()
    path = flow.solve(x, *args, points=_POINTS, tolerance=tolerance, **kwargs)
    exact = path[::_POINTS]
    coarse = flow.solve(x, *args, tolerance=100 * tolerance, **kwargs)
    states = _trajectory(stack, flow, x, args, kwargs)
    distance = (states - exact).flatten(2).norm(dim=-1)
    solver_error = (exact - coarse).flatten(2).norm(dim=-1).max().item()
    common = (flow.times, distance, _norms(x), _norms(exact[-1] - x))
    if not isinstance(stack.scheme, Euler):
        return OdeGap(*common, None, None, None, None, None, solver_error)
    steps = len(stack)
    lipschitz, acceleration = _constants(flow, states, path, args, kwargs)
    sizes = flow.times.diff()
    stepwise = [torch.zeros_like(distance[0])]
    for n in range(steps):
        stepwise.append((1 + sizes[n] * lipschitz[n]) * stepwise[n] + sizes[n] ** 2 / 2 * acceleration[n])
    largest, fastest = lipschitz.amax(dim=0), acceleration.amax(dim=0)
    bound = euler_bound(largest, fastest, flow.times[-1].item(), sizes.max().item())
    rigorous = rigorous_bound(stack, x) if all(type(b) is MLPBranch for b in stack.blocks) and x.dim() == 2 else None
    return OdeGap(*common, largest, fastest, bound, torch.stack(stepwise), rigorous, solver_error)


@torch.no_grad()
def rigorous_bound(stack: ResidualStack, x: Tensor) -> RigorousBound:
    """Return the bound of an Euler stack of MLPBranch from its weights' spectral norms alone.

    Args:
        stack: of MLPBranch.
        x: the first state. [batch, width]

    Raises:
        ValueError: for another kind of residual function or scheme.
    """
    if not isinstance(stack.scheme, Euler) or not all(type(b) is MLPBranch for b in stack.blocks):
        raise ValueError("The rigorous bound is for Euler stacks of abyssal.nn.MLPBranch.")
    blocks: list[MLPBranch] = stack.blocks  # type: ignore[assignment]
    times = NeuralOde(stack).times
    sizes, end = times.diff(), times[-1].item()

    def along(layer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Norms of weight and bias at the ends of each interval, the larger; and of their derivatives."""
        weights = torch.stack([getattr(b, layer).weight.detach().double() for b in blocks])
        biases = [getattr(b, layer).bias for b in blocks]
        zero = weights.new_zeros(weights.shape[1])
        bias = torch.stack([zero if b is None else b.detach().double() for b in biases])
        # The last function stays for the last step; a vector is a matrix of one column.
        weights, bias = (torch.cat([v, v[-1:]]) for v in (weights, bias.unsqueeze(-1)))
        spectral = [torch.linalg.matrix_norm(v, ord=2) for v in (weights, bias)]
        speeds = [torch.linalg.matrix_norm(v.diff(dim=0), ord=2) / sizes for v in (weights, bias)]
        largest = [torch.maximum(norm[1:], norm[:-1]) for norm in spectral]
        return largest[0], largest[1], speeds[0], speeds[1]

    w1, b1, w1_dot, b1_dot = along("inner")
    w2, b2, w2_dot, b2_dot = along("outer")
    full = math.sqrt(blocks[0].inner.weight.shape[0])
    speed = (w2 * full + b2).max()
    reach = x.detach().double().norm(dim=-1) + end * speed  # [batch]
    hidden = torch.minimum(torch.tensor(full, dtype=torch.float64, device=w1.device), w1 * reach[:, None] + b1)
    acceleration = w2_dot * hidden + w2 * (w1_dot * reach[:, None] + b1_dot) + b2_dot + w2 * w1 * speed
    lipschitz = (w1 * w2).max()
    fastest = acceleration.amax(dim=-1)
    return RigorousBound(lipschitz.item(), fastest, euler_bound(lipschitz, fastest, end, sizes.max().item()))


@torch.no_grad()
def _trajectory(
    stack: ResidualStack, flow: NeuralOde, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The stack's states in float64. [steps + 1, batch, ...]."""
    states = [x]
    for n, size in enumerate(flow.times.diff()):
        here = flow.velocity(n, 0.0, states[-1], *args, **kwargs)
        if not isinstance(stack.scheme, Euler):
            here = (here + flow.velocity(n, 1.0, states[-1] + size * here, *args, **kwargs)) / 2
        states.append(states[-1] + size * here)
    return torch.stack(states)


@torch.no_grad()
def _constants(
    flow: NeuralOde, states: Tensor, path: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Lipschitz constant and largest |x''| of every interval, estimated. [steps, batch] each."""
    start, end = flow.ends()
    exact = path[::_POINTS]
    points = torch.stack([path[i : len(path) - _POINTS + i : _POINTS] for i in range(_POINTS + 1)], dim=1)
    random = torch.randn(path[0].shape, generator=torch.Generator().manual_seed(0), dtype=path.dtype).to(path.device)

    def lipschitz(weights: dict[str, Tensor], network: Tensor, ode: Tensor) -> Tensor:
        field = lambda x: flow.between(weights, weights, 0.0, x, *args, **kwargs)  # noqa: E731
        return torch.maximum(*(_spectral_norms(field, x, random) for x in (network, ode)))

    def fastest(first: dict[str, Tensor], last: dict[str, Tensor], size: Tensor, x: Tensor) -> Tensor:
        field = lambda x, u: flow.between(first, last, u, x, *args, **kwargs)  # noqa: E731
        return torch.stack([_norms(acceleration(field, x[i], i / _POINTS, size)) for i in range(_POINTS + 1)]).amax(
            dim=0
        )

    return (
        _over_intervals(lipschitz, start, states[:-1], exact[:-1]),
        _over_intervals(fastest, start, end, flow.times.diff(), points),
    )


def acceleration(field: Callable[[Tensor, Tensor], Tensor], x: Tensor, fraction: float, size: Tensor) -> Tensor:
    """Return `x'' = d_t phi + d_x phi . phi`, the derivative of the velocity along the trajectory.

    Args:
        field: phi within one interval, of the state and of the fraction of the interval.
        x: the state. [batch, ...]
        fraction: from 0 to 1.
        size: the interval's length.
    """
    at = torch.full_like(size, fraction)
    return torch.func.jvp(field, (x, at), (field(x, at), 1 / size))[1]


def _spectral_norms(field: Callable[[Tensor], Tensor], x: Tensor, start: Tensor) -> Tensor:
    """Spectral norms of the Jacobians of a function of each sample, by power iteration, from below. [batch]."""
    back = torch.func.vjp(field, x)[1]
    v, image = start, start
    for _ in range(_ITERATIONS):
        v = v / _norms(v).clamp(min=1e-300).reshape(-1, *[1] * (v.dim() - 1))
        image = torch.func.jvp(field, (x,), (v,))[1]
        (v,) = back(image)
    return _norms(image)


def _over_intervals(function: Callable[..., Tensor], *stacked: Any) -> Tensor:
    """Map a function over the first dimension, many intervals at a time where the modules allow it."""
    try:
        return torch.func.vmap(function, chunk_size=_CHUNK)(*stacked)
    except RuntimeError:  # vmap has no rule for something in the residual function: one interval at a time
        apart = ([tree_map(lambda t, n=n: t[n], one) for one in stacked] for n in range(len(stacked[-1])))
        return torch.stack([function(*given) for given in apart])


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample's state. [batch]."""
    return x.flatten(1).norm(dim=-1)
