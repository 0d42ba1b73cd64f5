"""How the gradient error of reconstruction falls with depth: orders of convergence.

    python benchmarks/gradient_error.py --quick
    python benchmarks/gradient_error.py --write docs/benchmarks.md

Float64, so that rounding stays out of the way. A few minutes for everything.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import abyssal
import report
from abyssal.nn import Euler, Heun, ResidualStack, Scheme, depth_smooth_, residual_mlp

MARKER = "gradient-error"
# At float64's resolution there is no order left to see.
ROUNDING = 1e-13

POLICIES: dict[str, Callable[[], abyssal.Policy]] = {
    "PaperAdjoint()": abyssal.PaperAdjoint,
    "Reverse(0)": lambda: abyssal.Reverse(refine=0),
    "Reverse(1)": lambda: abyssal.Reverse(refine=1),
    "Reverse(2)": lambda: abyssal.Reverse(refine=2),
}
console = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """A family of networks over depth, `x + f_n(x)/N` with a residual MLP of one width and batch.

    Args:
        title: of the table.
        weights: "rough" (i.i.d., variance 1/fan_in), "smooth" (functions of depth, the same variance) or
            "default" (torch's own: i.i.d., a third of that variance, and biases).
        ends: whether there is a linear layer before and one after; the gradient is the whole network's.
    """

    title: str
    scheme: Scheme
    weights: str
    width: int = 24
    batch: int = 16
    ends: bool = False
    policies: tuple[str, ...] = tuple(POLICIES)
    seeds: int | None = None

    def network(self, depth: int, seed: int) -> tuple[nn.Module, ResidualStack]:
        """The network in float64, and the stack in it that is to be reconstructed."""
        torch.manual_seed(seed)
        stack = residual_mlp(depth, self.width, scheme=self.scheme).double()
        if self.weights == "smooth":
            depth_smooth_(stack.blocks)
        elif self.weights == "rough":
            for block in stack.blocks:
                for linear in (block.inner, block.outer):
                    nn.init.normal_(linear.weight, std=self.width**-0.5)
                    nn.init.zeros_(linear.bias)
        if not self.ends:
            return stack, stack
        stem, head = nn.Linear(self.width, self.width).double(), nn.Linear(self.width, 1).double()
        return nn.Sequential(stem, stack, head), stack

    def gradient(self, network: nn.Module, seed: int) -> Tensor:
        """The whole parameter gradient of a random functional of the output. [parameters]"""
        generator = torch.Generator().manual_seed(1000 + seed)
        draw = partial(torch.randn, dtype=torch.float64, generator=generator)
        output = network(draw(self.batch, self.width))
        gradients = torch.autograd.grad(output, list(network.parameters()), draw(output.shape))
        return torch.cat([g.flatten() for g in gradients])

    def errors(self, depth: int, seeds: int) -> dict[str, float]:
        """Relative gradient error of each policy against plain backprop; medians over seeds."""
        found: dict[str, list[float]] = {policy: [] for policy in self.policies}
        for seed in range(self.seeds or seeds):
            network, stack = self.network(depth, seed)
            exact = self.gradient(network, seed)
            for policy in self.policies:
                abyssal.reconstruct(stack, POLICIES[policy](), blocks=list(stack.steps))
                difference = self.gradient(network, seed) - exact
                found[policy].append((difference.norm() / exact.norm()).item())
                abyssal.release(stack)
        return {policy: statistics.median(values) for policy, values in found.items()}


HEUN_POLICIES = ("PaperAdjoint()", "Reverse(1)")
CASES = [
    Case("Euler, rough weights", Euler(), "rough"),
    Case("Euler, depth-smooth weights", Euler(), "smooth"),
    Case("Heun, depth-smooth weights", Heun(), "smooth", policies=HEUN_POLICIES),
    Case("W1 (width 256, batch 256)", Euler(), "default", 256, 256, seeds=1),
    Case("W1 between a stem and a head", Euler(), "default", 256, 256, ends=True, seeds=1),
]


def slope(depths: list[int], errors: list[float]) -> float:
    """Power of N with which the error goes: log-error regressed on log-depth, above rounding."""
    pairs = [(n, e) for n, e in zip(depths, errors, strict=True) if e > ROUNDING]
    if len(pairs) < 2:
        return float("nan")
    n, e = np.log(np.array(pairs)).T
    return float(np.polyfit(n, e, 1)[0])


def render(facts: dict[str, str], depths: list[int], errors: dict[str, dict[str, list[float]]]) -> str:
    """The tables as Markdown."""
    about = (
        "Relative error of the whole parameter gradient against plain backprop, float64, residual MLPs "
        "(width 24, batch 16 where not said), steps scaled by 1/(number of steps), medians over seeds. "
        "*Slope*: the power of the depth N, by regression over all depths with an error above "
        f"{ROUNDING:g}. All residual functions' gradients together are of size N^-1/2, so between a stem "
        "and a head, whose gradients do not shrink, the whole gradient's error falls faster by that much."
    )
    parts = ["## Gradient error against depth", report.header(facts), about]
    for case, rows in errors.items():
        head = [case, *[f"N = {n}" for n in depths], "slope"]
        body = [[name, *[f"{e:.1e}" for e in row], f"{slope(depths, row):.1f}"] for name, row in rows.items()]
        parts.append(report.table(head, body))
    return "\n\n".join(parts)


def main(
    quick: Annotated[bool, typer.Option(help="Depths to 64, one seed: seconds.")] = False,
    depths: Annotated[str, typer.Option(help="Comma-separated.")] = "8,16,32,64,128,256,512",
    seeds: Annotated[int, typer.Option(help="Networks per entry.")] = 5,
    results: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/gradient_error.json"),
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure, print the tables, and write them where asked."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", abyssal.DriftWarning)  # the error is what we measure
    counts = [8, 16, 32, 64] if quick else [int(n) for n in depths.split(",")]
    facts = report.machine()
    errors: dict[str, dict[str, list[float]]] = {}
    for case, n in track([(case, n) for case in CASES for n in counts], "gradient errors", console=console):
        for policy, found in case.errors(n, 1 if quick else seeds).items():
            errors.setdefault(case.title, {}).setdefault(policy, []).append(found)
    report.save({"machine": facts, "depths": counts, "errors": errors}, results)
    text = render(facts, counts, errors)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    typer.run(main)
