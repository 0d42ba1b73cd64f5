"""What networks become as depth grows: distances to their SDE and ODE, rates, and how often bounds fail.

    python benchmarks/limits.py --quick
    python benchmarks/limits.py --write docs/benchmarks.md

About three minutes of one core for everything; twenty seconds with --quick.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import nn

import abyssal.limits
import report
from abyssal.limits.bounds import check_bounds
from abyssal.limits.gap import OdeGap
from abyssal.limits.law import Slope, kolmogorov_smirnov, moments, wasserstein
from abyssal.limits.networks import norms
from abyssal.limits.strong import strong_errors
from abyssal.nn import ResidualStack, depth_smooth_, residual_mlp

MARKER = "limits"
console = Console(stderr=True)
Row = dict[str, Any]


def law_rows(count: int, depth: int) -> list[Row]:
    """res-3's log ratio at one depth against the exact law of its SDE."""
    rows = []
    for width in (40, 100):
        limit = abyssal.limits.sde("res3", width)
        law = limit.law()
        sample = np.log(norms(depth, width, count, rng=np.random.default_rng(width))[0])
        m, ks, area = moments(sample), kolmogorov_smirnov(sample, law), wasserstein(sample, law)
        mean, variance = limit.law_at_depth(depth)
        rows.append(
            {
                "width": width,
                "depth": depth,
                "count": count,
                **asdict(m),
                "limit": [law.mean, law.variance],
                "to first order in 1/L": [mean, variance],
                "ks": ks.statistic,
                "ks critical": ks.critical,
                "wasserstein": area.distance,
                "wasserstein noise": area.noise,
            }
        )
    return rows


def rate_rows(quick: bool) -> list[Row]:
    """Errors against depth, and the power they follow."""
    rows = []

    def add(what: str, expected: float, depths: Any, errors: Any, standard: Any, fit: Slope, paths: int) -> None:
        row = {"what": what, "expected": expected, "depths": list(depths), "errors": list(errors)}
        rows.append({**row, "standard errors": list(standard), "slope": asdict(fit), "paths": paths})

    models = 8 if quick else 32
    for network in ("res3", "res1"):
        found = abyssal.limits.ode(network, 40, "rbf").compare(models=models)
        title = f"{network}, RBF paths, beta = 1, to the ODE"
        add(title, -1.0, found.depths, found.errors, found.standard_errors, found.slope, models)
    paths = 32 if quick else 128
    plans = [("res1", (16, 32, 64, 128, 256)), ("res3", (64, 128, 256, 512, 1024))]
    for network, depths in plans:
        for strong in strong_errors(network, 40, depths[:3] if quick else depths, paths=paths):
            title = f"{network}, i.i.d., beta = 1/2, to the SDE at {strong.clock}"
            expected = -0.25 if (network, strong.clock) == ("res3", "time 1") else -0.5
            add(title, expected, strong.depths, strong.errors, strong.standard_errors, strong.slope, paths)
    return rows


def bound_rows(count: int, gradients: int) -> list[Row]:
    """How often each bound fails, and how loose it is."""
    cases: list[dict[str, Any]] = [
        {"network": "res3", "depth": 100, "width": 40, "delta": 0.05},
        {"network": "res3", "depth": 100, "width": 40, "delta": 0.01},
        {"network": "res3", "depth": 100, "width": 4, "delta": 0.05},
        {"network": "res3", "depth": 1000, "width": 40, "delta": 0.05},
        {"network": "res3", "depth": 100, "width": 16, "delta": 0.05, "distribution": "uniform"},
        {"network": "res1", "depth": 100, "width": 16, "delta": 0.05},
    ]
    rows = []
    for case in cases:
        options = {"gradients": 0 if case["depth"] > 100 or case["delta"] < 0.05 else gradients}
        slow = case["network"] == "res1" or "distribution" in case
        for v in check_bounds(**case, count=count // 5 if slow else count, **options):
            rows.append({**case, **asdict(v), "frequency": v.frequency, "looseness": v.looseness})
    return rows


def smooth(depth: int) -> ResidualStack:
    stack = residual_mlp(depth, 16)
    depth_smooth_(stack.blocks, generator=torch.Generator().manual_seed(0))
    return stack


def rough(depth: int, scale: float) -> ResidualStack:
    stack = residual_mlp(depth, 16, bias=False, scale=scale)
    generator = torch.Generator().manual_seed(0)
    for block in stack.blocks:
        for linear in (block.inner, block.outer):
            nn.init.normal_(linear.weight, std=0.25, generator=generator)
    return stack


def alternating(depth: int) -> ResidualStack:
    """Equal residual functions (tanh is odd) of weights whose sign alternates."""
    first = rough(1, 1.0).blocks[0]
    blocks = [copy.deepcopy(first) for _ in range(depth)]
    for block in blocks[1::2]:
        for p in block.parameters():
            p.data.neg_()
    return ResidualStack(blocks)


def linear_example(depth: int, slope: float = 0.9) -> ResidualStack:
    """`phi = slope x + t - slope t^2 / 2`, whose solution from 0 is t^2 / 2."""
    blocks = []
    for n in range(depth):
        block = nn.Linear(1, 1).double()
        t = n / depth
        block.weight.data.fill_(slope)
        block.bias.data.fill_(t - slope * t**2 / 2)
        blocks.append(block)
    return ResidualStack(blocks)


def gap_rows(quick: bool) -> list[Row]:
    """Measured distances to the neural ODE beside the bounds; means over samples."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    cases = {
        "depth-smooth weights, 1/N": (smooth, x),
        "alternating weights, 1/N": (alternating, x),
        "independent weights, 1/N": (lambda n: rough(n, 1 / n), x),
        "independent weights, 1/sqrt(N)": (lambda n: rough(n, n**-0.5), x),
        "the linear example, 1/N": (linear_example, torch.zeros(1, 1)),
    }
    rows = []
    for name, (build, start) in cases.items():
        for depth in (8, 16) if quick else (8, 32, 128):
            gap: OdeGap = abyssal.limits.ode_gap(build(depth), start, tolerance=1e-7)
            size = 1.0 if start.numel() == 1 else start.norm(dim=-1).mean().item()
            mean = lambda t, size=size: t.mean().item() / size  # noqa: E731
            rows.append(
                {
                    "weights": name,
                    "depth": depth,
                    "measured": mean(gap.distance[-1]),
                    "moved": mean(gap.moved),
                    "step by step": mean(gap.stepwise[-1]),
                    "closed form": mean(gap.bound),
                    "rigorous": mean(gap.rigorous.bound) if gap.rigorous else math.nan,
                    "largest ratio": (gap.distance[-1] / gap.stepwise[-1]).max().item(),
                    "solver error": gap.solver_error / size,
                }
            )
    return rows


def render(facts: dict[str, str], found: dict[str, list[Row]]) -> str:
    """The tables as Markdown."""
    parts = ["## Limits of networks as depth grows", report.header(facts), "### The SDE limit in law", *_laws(found)]
    parts += ["### Rates", *_rates(found), "### Bounds that hold with a stated probability", *_bounds(found)]
    return "\n\n".join([*parts, "### The distance to the neural ODE, and its bound", *_gaps(found)])


def _laws(found: dict[str, list[Row]]) -> list[str]:
    head = ["width, depth, networks", "mean", "1/2 - 1/d", "off", "variance", "2/d", "off", "KS (critical at 1 %)"]
    rows = []
    for r in found["law"]:
        off = [f"{100 * (r[k] / limit - 1):+.2f} %" for k, limit in zip(("mean", "variance"), r["limit"], strict=True)]
        rows.append(
            [
                f"{r['width']}, {r['depth']}, {r['count']}",
                f"{r['mean']:.5f} ± {r['mean_error']:.5f}",
                f"{r['limit'][0]:.5f}",
                off[0],
                f"{r['variance']:.5f} ± {r['variance_error']:.5f}",
                f"{r['limit'][1]:.5f}",
                off[1],
                f"{r['ks']:.4f} ({r['ks critical']:.4f})",
            ]
        )
    about = (
        "log(\\|h_L\\|²/\\|h_0\\|²) of res-3, i.i.d. normal weights, beta = 1/2, drawn exactly in law. At finite depth "
        "the mean is 1/2 - 1/d - (1 + 5/d)(1 - 6/d + 8/d²)/(8L) + O(L⁻²) and the variance "
        "2/d - (d + 34 - 100/d)/(4d²L) + O(L⁻²): at L = 1,000 and d = 40 they are lower by 0.025 % and 0.022 %."
    )
    return [about, report.table(head, rows)]


def _rates(found: dict[str, list[Row]]) -> list[str]:
    rows = []
    for r in found["rates"]:
        s = r["slope"]
        pairs = ", ".join(f"{e:.4f} ({n})" for n, e in zip(r["depths"], r["errors"], strict=True))
        rows.append([r["what"], pairs, f"{r['expected']:g}", f"{s['value']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}"])
    about = (
        "Root mean square over networks of \\|h_L - H\\|/\\|h_0\\| at width 40 (depth in brackets); the power of the "
        "depth by least squares of the logarithms, with a 95 % bootstrap interval over networks."
    )
    return [about, report.table(["network, limit", "error (depth)", "theory", "measured power", "95 %"], rows)]


def _bounds(found: dict[str, list[Row]]) -> list[str]:
    rows = []
    for r in found["bounds"]:
        weights = r.get("distribution", "normal")
        bound = f"{r['high']:.3f}" if r["low"] == 0 else f"{r['low']:.3f} to {r['high']:.3f}"
        what = r["what"].replace("|", "\\|")
        rows.append(
            [
                f"{r['network']}, {weights}, L = {r['depth']}, d = {r['width']}: {what}",
                bound,
                f"{100 * r['promised']:g} %",
                f"{100 * r['frequency']:.2f} % of {r['count']}",
                f"{100 * r['interval'][0]:.2f} to {100 * r['interval'][1]:.2f} %",
                f"{r['looseness']:.2f}",
            ]
        )
    about = (
        "beta = 1/2. *Loose by*: the bound over the measured quantile of the same level. The bounds are ours (Markov, "
        "Cantelli, Chebyshev, from exact moments), not the paper's. The SDE's interval is no bound but the limit's law."
    )
    return [about, report.table(["bound", "value", "may fail", "failed", "95 % interval", "loose by"], rows)]


def _gaps(found: dict[str, list[Row]]) -> list[str]:
    keys = ["measured", "moved", "step by step", "closed form", "rigorous"]
    rows = []
    for r in found["gaps"]:
        figures = ["-" if math.isnan(r[k]) else f"{r[k]:.2e}" for k in keys]
        rows.append([f"{r['weights']}, N = {r['depth']}", *figures, f"{r['largest ratio']:.3f}"])
    about = (
        "Residual MLPs (tanh, width 16, 8 samples), relative to \\|x_0\\|, means over samples: distance of the last "
        "state from the ODE of linearly interpolated weights; how far the ODE moves; the bound step by step and in "
        "closed form with constants estimated along the trajectory; the closed form with rigorous constants; the "
        "largest ratio of distance to the bound step by step at the end, over samples (1 is tight)."
    )
    head = ["weights, depth", "measured", "moved", "bound, steps", "bound, closed", "rigorous", "largest ratio"]
    return [about, report.table(head, rows)]


def main(
    quick: Annotated[bool, typer.Option(help="Fewer networks and depths: half a minute.")] = False,
    count: Annotated[int, typer.Option(help="Networks for the law at one depth, at least 1,000.", min=1000)] = 100_000,
    results: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/limits.json"),
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure, print the tables, and write them where asked."""
    torch.set_num_threads(1)
    facts = report.machine()
    tasks = {
        "law": lambda: law_rows(min(count, 5000) if quick else count, 1000),
        "rates": lambda: rate_rows(quick),
        "bounds": lambda: bound_rows(2000 if quick else 50_000, 500 if quick else 5_000),
        "gaps": lambda: gap_rows(quick),
    }
    found: dict[str, list[Row]] = {}
    for name, task in tasks.items():
        began = time.process_time()
        found[name] = task()
        console.print(f"{name}: {time.process_time() - began:.0f} s of CPU")
    report.save({"machine": facts, **found}, results)
    text = render(facts, found)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    typer.run(main)
