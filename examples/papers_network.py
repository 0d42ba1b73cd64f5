"""The papers' residual networks: `x[n+1] = x[n] + f_n(x[n]) / N` and Heun's step, trained without their states.

    .venv/bin/python examples/papers_network.py                 # seconds

Residual functions smooth in depth, float64. The gradient error of going back through depth falls with a power
of the depth N. Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612.
"""

import math
import warnings
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

import abyssal
from abyssal.nn import Euler, Heun, ResidualStack, Scheme, depth_smooth_, residual_mlp

DEPTHS = (8, 32, 128)
POLICIES = (abyssal.PaperAdjoint(), abyssal.Reverse(0), abyssal.Reverse(1), abyssal.Reverse(2))


def network(depth: int, scheme: Scheme) -> ResidualStack:
    """A residual network of width 24 whose weights are smooth functions of depth."""
    torch.manual_seed(0)
    stack = residual_mlp(depth, width=24, scheme=scheme).double()
    depth_smooth_(stack.blocks)
    return stack


def gradient(stack: ResidualStack) -> torch.Tensor:
    """The gradient of the mean square of the last state. [parameters]"""
    x = torch.randn(16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.cat([g.flatten() for g in torch.autograd.grad(stack(x).square().mean(), list(stack.parameters()))])


def main() -> dict[tuple[Scheme, abyssal.Policy], list[float]]:
    """Print and return the gradient errors of every scheme and policy, by depth."""
    warnings.simplefilter("ignore", abyssal.DriftWarning)  # the error is what we measure
    errors: dict[tuple[Scheme, abyssal.Policy], list[float]] = {}
    for scheme, depth in product((Euler(), Heun()), DEPTHS):
        stack = network(depth, scheme)
        exact = gradient(stack)
        for policy in POLICIES:
            abyssal.reconstruct(stack, policy)
            error = (gradient(stack) - exact).norm() / exact.norm()
            errors.setdefault((scheme, policy), []).append(error.item())
            abyssal.release(stack)

    states = network(DEPTHS[-1], Euler()).trajectory(torch.randn(1, 24, dtype=torch.float64))
    print(f"All states at depth {DEPTHS[-1]}: {tuple(states.shape)}; the first has norm {states[0].norm():.2f},")
    print(f"the last {states[-1].norm():.2f}, and the longest step {states.diff(dim=0).norm(dim=-1).max():.3f}.")
    table = Table("scheme", "policy", *[f"N = {n}" for n in DEPTHS], "slope", title="Gradient error")
    for (scheme, policy), row in errors.items():
        slope = math.log(row[-1] / row[-2]) / math.log(DEPTHS[-1] / DEPTHS[-2])
        table.add_row(str(scheme), str(policy), *[f"{error:.1e}" for error in row], f"{slope:.1f}")
    Console().print(table)
    return errors


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors as small as these, threads cost more than they give
    main()
