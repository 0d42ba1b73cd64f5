"""Time against peak memory: plans under five budgets, beside plain backprop and checkpointing.

    python benchmarks/pareto.py --quick
    python benchmarks/pareto.py --write docs/benchmarks.md           # an idle machine; about half an hour
    python benchmarks/pareto.py --workload W3 --depths 8 --ours mixtures

The budgets are the rivals' own peaks, and two more: as little as is possible, and midway between checkpointing and
plain backprop (in ratio). Mixtures are made by hand, without a plan: the last blocks run as plain backprop does
(`Store()`), the others are coded or reversed; they check what the plans find.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import abyssal
import memory as measuring
import report
from abyssal.models.find import resolve_blocks
from trained_policies import as_policy
from workloads import METHODS, WORKLOADS, Method, Workload

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)
MARKER = "pareto"
IMAGE = "pareto.png"
RIVALS = ("plain", "checkpoint", "checkpoint-sqrt")
CASES = (("W1", 32), ("W3", 8), ("W1", 128), ("W3", 32))
QUICK = (("W1", 8), ("W3", 4))
SHARES = (0, 0.125, 0.25, 0.5, 0.75, 0.875)  # of the blocks, stored, in the mixtures
QUICK_SHARES = (0, 0.5, 0.875)
TOLERANCE = 1e-2  # of the gradient, for plans
Point = dict[str, str]  # block name to policy, as abyssal writes it; empty for a rival


# ---------------------------------------------------------------- points


def mixtures(names: list[str], shares: tuple[float, ...] = SHARES) -> dict[str, Point]:
    """The last blocks stored, the others under one policy."""
    bases = ["Reverse(0)"] + (["Code(4)"] if hasattr(abyssal, "Code") else [])
    found = {}
    for base in bases:
        for share in shares:
            coded = len(names) - round(share * len(names))
            name = f"{base} + {len(names) - coded} Store()"
            found[name] = dict.fromkeys(names[:coded], base) | dict.fromkeys(names[coded:], "Store()")
    return found


def method(name: str, point: Point) -> Method:
    """A point as something that memory.py can measure."""
    if not point:
        return METHODS[name]

    def prepare(model: nn.Module, _: Workload) -> Any:
        policies = {block: as_policy(policy) for block, policy in point.items()}
        return abyssal.reconstruct(model, policies, blocks=list(model.steps))

    return Method(name, prepare)


def block_names(workload: Workload, depth: int) -> list[str]:
    """Names of the workload's blocks."""
    model = workload.model(depth)
    return list(resolve_blocks(model, list(model.steps)))


# ---------------------------------------------------------------- in the measuring process


def measure_error(workload: Workload, depth: int, methods: list[Method], _: int) -> dict[str, Any]:
    """Relative error of all parameters' gradient in float32."""
    model = workload.model(depth)
    gradients = [measuring._gradient(m, workload, depth, model, torch.float32) for m in [METHODS["plain"], *methods]]
    errors = [((g - gradients[0]).norm() / gradients[0].norm()).item() for g in gradients[1:]]
    return {m.name: {"error": error} for m, error in zip(methods, errors, strict=True)}


class _Fed(nn.Module):
    """The workload with its input as a parameter, since `plan` takes a batch's tensors as data without gradients."""

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__()
        self.model, self.x = model, nn.Parameter(x.detach())

    def forward(self, _: Tensor) -> Tensor:
        return self.model(self.x)


def make_plan(workload: Workload, depth: int, budget: int | None) -> dict[str, Any]:
    """The fastest plan under a budget in bytes of peak (None: the fewest bytes), as a point, and what it promises."""
    model = workload.model(depth)
    x, cotangent = workload.tensors(depth)

    def loss(output: Tensor) -> Tensor:
        value = (output * cotangent).sum()
        value.output = output  # type: ignore[attr-defined]  # as in the step that is timed, it lives through backward
        return value

    nothing = (torch.zeros(1),)
    plan = abyssal.plan(
        _Fed(model, x), nothing, loss=loss, tolerance=TOLERANCE, memory=budget, check=nothing, blocks=list(model.steps)
    )
    point = {block.name.removeprefix("model."): str(block.policy) for block in plan.blocks}
    return {"point": point, "promised": plan.peak_bytes}


MEASURES = {"time": measuring.measure_time, "peak": measuring.measure_peak, "error": measure_error}


@app.command(hidden=True)
def child(kind: str, workload: str, depth: int, given: str, repeats: int) -> None:
    """Measure points, or make a plan; prints one line of JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", abyssal.DriftWarning)  # the error is measured
    if kind == "plan":
        print(json.dumps(make_plan(WORKLOADS[workload], depth, json.loads(given))))
        return
    methods = [method(name, point) for name, point in json.loads(given).items()]
    print(json.dumps(MEASURES[kind](WORKLOADS[workload], depth, methods, repeats)))


# ---------------------------------------------------------------- in the process that the user started


def in_child(kind: str, workload: str, depth: int, given: Any, repeats: int = 0) -> Any:
    """Run one measurement in a process with the right malloc; None, and a line on stderr, where it failed."""
    command = [sys.executable, __file__, "child", kind, workload, str(depth), json.dumps(given), str(repeats)]
    environment = os.environ | measuring.ENVIRONMENT.get(kind, {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        console.print(f"[red]{workload} N={depth}, {kind} of {given}: {told[0]}[/red]", markup=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def budgets(peaks: dict[str, int]) -> dict[str, int | None]:
    """The five budgets, by the name that a plan under each gets."""
    midway = round(math.sqrt(peaks["checkpoint"] * peaks["plain"]))
    return {
        "plan, smallest": None,
        "plan at checkpoint-sqrt's": peaks["checkpoint-sqrt"],
        "plan at checkpoint's": peaks["checkpoint"],
        "plan midway": midway,
        "plan at plain's": peaks["plain"],
    }


def measure_case(workload: str, depth: int, ours: str, repeats: int, quick: bool) -> dict[str, Any]:
    """Everything about one workload and depth."""
    names = block_names(WORKLOADS[workload], depth)
    points: dict[str, Point] = {rival: {} for rival in RIVALS}
    cells: dict[str, dict[str, Any]] = in_child("peak", workload, depth, points)
    promised = {}
    if "plans" in ours and hasattr(abyssal, "plan"):
        for name, budget in budgets({rival: cells[rival]["peak"] for rival in RIVALS}).items():
            if (made := in_child("plan", workload, depth, budget)) is not None:
                points[name] = made["point"]
                promised[name] = {"promised": made["promised"], "budget": budget}
    if "mixtures" in ours:
        points |= mixtures(names, QUICK_SHARES if quick else SHARES)
    own = {name: point for name, point in points.items() if name not in RIVALS}
    for kind in ("peak", "error", "time"):
        what = points if kind == "time" else own
        for name, cell in (in_child(kind, workload, depth, what, repeats) or {}).items():
            cells.setdefault(name, {}).update(cell)
    for name, facts in promised.items():
        cells[name] |= facts
    return {"cells": cells, "points": own}


# ---------------------------------------------------------------- what comes out


def ratios(cells: dict[str, Any], name: str, base: str) -> list[float]:
    """Step time against another point's, round by round."""
    own, other = cells[name].get("seconds"), cells[base].get("seconds")
    return [a / b for a, b in zip(own, other, strict=True)] if own and other else [math.nan]


def verdict(cells: dict[str, Any], rival: str) -> tuple[str, list[float]] | None:
    """Our fastest point that needs no more memory than a rival (or 1 in 1,000 more), and its time against it."""
    room = cells[rival]["peak"] * 1.001
    fitting = [n for n, c in cells.items() if n not in RIVALS and c.get("peak", math.inf) <= room and "seconds" in c]
    if not fitting:
        return None
    best = min(fitting, key=lambda n: statistics.median(ratios(cells, n, rival)))
    return best, ratios(cells, best, rival)


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def render(results: dict[str, Any]) -> str:
    """The tables as Markdown."""
    parts = ["## Time against peak memory", report.header(results["machine"]), _ABOUT, _PICTURE]
    for case, found in results["cases"].items():
        workload, depth = case.split()
        cells = found["cells"]
        rows = []
        for name, cell in sorted(cells.items(), key=lambda item: item[1].get("peak", math.inf)):
            promise = cell.get("promised")
            rows.append(
                [
                    name,
                    f"{cell['peak'] / 1e6:.2f}" if "peak" in cell else "",
                    f"{promise / 1e6:.2f}" if promise else "",
                    _spread(ratios(cells, name, "plain")),
                    "0" if name in RIVALS else f"{cell['error']:.1e}" if "error" in cell else "",
                ]
            )
        head = [f"{workload}, N = {depth}", "peak, MB", "promised", "time / plain", "gradient error"]
        parts.append(report.table(head, rows))
        rows = []
        for rival in RIVALS:
            if (best := verdict(cells, rival)) is None:
                rows.append([rival, "none that fits", "", "", "**no**"])
                continue
            name, times = best
            smaller = f"{cells[name]['peak'] / cells[rival]['peak']:.2f}"
            dominated = "yes" if statistics.median(times) <= 1 else "**no**"
            rows.append([rival, name, smaller, _spread(times), dominated])
        parts.append(report.table(["rival, at its own memory", "ours", "peak / its", "time / its", "dominated"], rows))
    return "\n\n".join(parts)


_PICTURE = f"![Step time against peak memory: plans, mixtures and rivals](images/{IMAGE})"
_ABOUT = (
    "Peak: exact peak of live tensor bytes in a step above the level before it. Time: CPU time of the process, one "
    "thread, medians of interleaved rounds with quartiles. Plans are the fastest that `abyssal.plan` finds under a "
    f"budget of peak memory with a gradient error of at most {TOLERANCE:g}; the rivals' gradients are exact. Mixtures "
    "are made by hand. A rival is dominated where one of ours needs at most its memory and its time, by the median; "
    "a ratio whose quartiles lie on both sides of 1 is a draw within this machine's noise."
)


def plot(results: dict[str, Any], folder: Path) -> None:
    """One panel per workload and depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    cases = results["cases"]
    rows = -(-len(cases) // 2)
    figure, grid = plt.subplots(rows, min(2, len(cases)), figsize=(10, 4.2 * rows), squeeze=False, layout="constrained")
    for axes, (case, found) in zip(grid.flat, cases.items(), strict=False):
        workload, depth = case.split()
        cells = found["cells"]
        at = {
            n: (c["peak"] / 1e6, statistics.median(ratios(cells, n, "plain")))
            for n, c in cells.items()
            if "peak" in c and "seconds" in c
        }
        for base, colour in (("Reverse(0)", "#9ecae1"), ("Code(4)", "#a1d99b")):
            line = [at[n] for n in at if n.startswith(base)]
            if line:
                axes.plot(
                    *zip(*line, strict=True), "o-", color=colour, markersize=4, label=f"{base} + Store(), by hand"
                )
        plans = sorted(at[n] for n in at if n.startswith("plan") and n != "plain")
        if plans:
            axes.plot(*zip(*plans, strict=True), "D-", color="#1f3b73", label="abyssal.plan, five budgets")
        for rival, marker in zip(RIVALS, "sXP", strict=True):
            axes.plot(*at[rival], marker, color="#c0392b", markersize=9, label=rival, linestyle="none")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        ticks = [m * 10**e for e in range(4) for m in (1, 1.5, 2, 3, 4, 5, 7)]
        low, high = axes.get_xlim()
        axes.set_xticks([t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high])
        axes.set(title=f"{workload}, N = {depth}", xlabel="peak, MB", ylabel="step time / plain")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].legend(fontsize=8.5, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / IMAGE, dpi=150)
    plt.close(figure)


def _cases(workload: str | None, depths: str | None, quick: bool) -> list[tuple[str, int]]:
    own = [c for c in (QUICK if quick else CASES) if workload is None or c[0] in workload.split(",")]
    if depths is None:
        return own
    return [(name, int(depth)) for name in dict.fromkeys(c[0] for c in own) for depth in depths.split(",")]


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Small depths, few rounds.")] = False,
    workload: Annotated[str | None, typer.Option(help="Comma-separated: W1,W3.")] = None,
    depths: Annotated[str | None, typer.Option(help="Comma-separated; default: each workload's own.")] = None,
    ours: Annotated[str, typer.Option(help="Comma-separated: plans,mixtures.")] = "plans,mixtures",
    repeats: Annotated[int, typer.Option(help="Rounds of the timing; 0 is 3 with --quick, else 15.")] = 0,
    path: Annotated[Path | None, typer.Option("--json", help="Where results go.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep the workloads and depths that the results file has.")] = False,
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure, print the tables, draw, and write where asked."""
    path = path or Path("benchmarks/results", f"pareto{'_quick' if quick else ''}.json")
    results = json.loads(path.read_text()) if resume and path.exists() else {"cases": {}}
    results["machine"] = report.machine()
    for name, depth in _cases(workload, depths, quick):
        if f"{name} {depth}" in results["cases"]:
            continue
        console.print(f"{name} N={depth}")
        results["cases"][f"{name} {depth}"] = measure_case(name, depth, ours, repeats or (3 if quick else 15), quick)
        report.save(results, path)
    text = render(results)
    if write:
        plot(results, write.parent / "images")
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] != "child":
        sys.argv.insert(1, "main")
    app()
