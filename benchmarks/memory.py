"""Peak activation memory, step time and gradient error of the ways to train a deep residual network.

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --write docs/benchmarks.md          # everything; an hour, on an idle machine
    python benchmarks/memory.py --workload W1 --depths 8,512 --methods plain,checkpoint,"Reverse(1)"

Every measurement runs in a process of its own, with malloc set up for it (see README.md beside this file).
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import abyssal
import report
from abyssal import memory
from workloads import METHODS, WORKLOADS, Method, Workload

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)

MARKER = "memory"
# Timing: keep freed memory in the heap, or the methods that allocate most pay for page faults.
# glibc ignores an mmap threshold above 32 MiB.
_KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}
# Resident set: give every tensor back to the system at once, or it shows malloc's cache.
_RETURN_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ENVIRONMENT = {"time": _KEEP_HEAP, "peak": {}, "rss": _RETURN_HEAP, "error": {}}

WARM_UP = 2  # a reconstructed model checks more in its first step than later

Cell = dict[str, Any]
Results = dict[str, Any]


# ---------------------------------------------------------------- in the measuring process


def stepper(method: Method, workload: Workload, depth: int, model: torch.nn.Module) -> Any:
    """One training step without the optimiser: forward, backward into existing gradient buffers."""
    call = method.on(model, workload)
    x, cotangent = workload.tensors(depth)

    def step() -> None:
        call(x).backward(cotangent)

    return step


def measure_time(workload: Workload, depth: int, methods: list[Method], repeats: int) -> dict[str, Cell]:
    """CPU seconds of this process per step; in each round all methods run once, in random order."""
    model = workload.model(depth)
    steps = {method.name: stepper(method, workload, depth, model) for method in methods}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(steps), len(steps)):
            gc.collect()
            begin = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - begin)
    return {name: {"seconds": values} for name, values in seconds.items()}


def measure_peak(workload: Workload, depth: int, methods: list[Method], _: int) -> dict[str, Cell]:
    """Exact peak of live tensor bytes in one step, above the level before it."""
    results = {}
    for method in methods:
        gc.collect()
        model = workload.model(depth)
        with memory.track():  # so that what a warm-up step leaves behind is known when it is released
            step = stepper(method, workload, depth, model)
            for _ in range(WARM_UP):
                step()
            gc.collect()
            with memory.track() as used:
                step()
        results[method.name] = {"peak": used.peak, "left": used.end}
        del step, model
    return results


def measure_rss(workload: Workload, depth: int, methods: list[Method], _: int) -> dict[str, Cell]:
    """Peak of the resident set in one step, above the level before it. One method to a process."""
    (method,) = methods
    step = stepper(method, workload, depth, workload.model(depth))
    for _ in range(WARM_UP):
        step()
    gc.collect()
    if not memory.reset_rss_peak():
        return {method.name: {}}
    before = memory.rss_peak()
    step()
    after = memory.rss_peak()
    return {method.name: {"rss": after - before}} if before and after else {method.name: {}}


def measure_error(workload: Workload, depth: int, methods: list[Method], _: int) -> dict[str, Cell]:
    """Relative error of the whole parameter gradient against plain backprop of the same dtype."""
    results: dict[str, Cell] = {method.name: {} for method in methods if method.exact_network}
    for dtype in (torch.float64, torch.float32):
        model = workload.model(depth, dtype)
        exact = _gradient(METHODS["plain"], workload, depth, model, dtype)
        for name in results:
            gradient = _gradient(METHODS[name], workload, depth, model, dtype)
            error = (gradient - exact).norm() / exact.norm()
            results[name][str(dtype).removeprefix("torch.")] = error.item()
    return results


def _gradient(method: Method, workload: Workload, depth: int, model: torch.nn.Module, dtype: torch.dtype) -> Tensor:
    parameters = list(model.parameters())
    for p in parameters:
        p.grad.zero_()
    x, cotangent = workload.tensors(depth, dtype)
    method.on(model, workload)(x).backward(cotangent)
    return torch.cat([p.grad.flatten().double() for p in parameters])


MEASURES = {"peak": measure_peak, "time": measure_time, "error": measure_error, "rss": measure_rss}


@app.command(hidden=True)
def child(kind: str, workload: str, depth: int, methods: str, repeats: int) -> None:
    """Measure, and print the result as one line of JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", abyssal.DriftWarning)  # the error is what we measure
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # memcnn
    chosen = [METHODS[name] for name in json.loads(methods)]
    print(json.dumps(MEASURES[kind](WORKLOADS[workload], depth, chosen, repeats)))


# ---------------------------------------------------------------- in the process that the user started


def in_child(kind: str, workload: str, depth: int, methods: list[str], repeats: int) -> dict[str, Cell]:
    """Run one measurement in a process with the right malloc; a failure becomes a note in each cell."""
    command = [
        sys.executable,
        __file__,
        "child",
        kind,
        workload,
        str(depth),
        json.dumps(methods),
        str(repeats),
    ]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT[kind], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        note = f"{kind}: failed with exit status {done.returncode}"
        console.print(f"[red]{workload} N={depth} {methods}: {note}[/red]")
        return {name: {"note": note} for name in methods}
    return json.loads(done.stdout.splitlines()[-1])


def jobs(
    workloads: list[str], depths: list[int] | None, methods: list[str], kinds: list[str], quick: bool
) -> list[tuple[str, str, int, list[str]]]:
    """All measurements to make: (kind, workload, depth, methods), one process each."""
    plan = []
    for name in workloads:
        own = WORKLOADS[name].quick_depths if quick else WORKLOADS[name].depths
        for depth in depths or own:
            plan += [(kind, name, depth, methods) for kind in kinds if kind != "rss"]
            plan += [("rss", name, depth, [method]) for method in methods if "rss" in kinds]
    return plan


def load(path: Path, resume: bool) -> Results:
    """The results so far, or an empty set; results of another machine or commit are not mixed in."""
    here = report.machine()
    if not (resume and path.exists()):
        return {"machine": here, "cells": {}, "done": []}
    results = json.loads(path.read_text())
    passing = {"date", "load at start"}
    differ = [f for f in here if f not in passing and results["machine"].get(f) != here[f]]
    if differ:
        raise SystemExit(f"--resume: {path} was measured with another {', '.join(differ)}; measure anew without it.")
    return results


def run(plan: list[tuple[str, str, int, list[str]]], repeats: int, path: Path, resume: bool) -> Results:
    """Make the measurements; each one is on disk as soon as it is done."""
    results = load(path, resume)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(plan))
        for kind, workload, depth, methods in plan:
            key = f"{kind} {workload} {depth} {' '.join(methods)}"
            progress.update(task, description=f"{workload} N={depth}: {kind}")
            if key not in results["done"]:
                found = in_child(kind, workload, depth, methods, repeats)
                for method, cell in found.items():
                    results["cells"].setdefault(f"{workload} {depth} {method}", {}).update(cell)
                results["done"].append(key)
                report.save(results, path)
            progress.advance(task)
    return results


# ---------------------------------------------------------------- the tables


def grid(results: Results, workload: str, show: Any) -> str:
    """A table of methods by depths; `show(cells of one depth by method, method)` gives an entry."""
    cells: dict[int, dict[str, Cell]] = {}
    for key, cell in results["cells"].items():
        name, depth, method = key.split(" ", 2)
        if name == workload:
            cells.setdefault(int(depth), {})[method] = cell
    present = [method for method in METHODS if any(method in at for at in cells.values())]
    rows = [[method] + [show(cells[depth], method) for depth in sorted(cells)] for method in present]
    rows = [row for row in rows if any(entry != "" for entry in row[1:])]
    return report.table([workload] + [f"N = {depth}" for depth in sorted(cells)], rows) if rows else ""


def megabytes(cells: dict[str, Cell], method: str) -> str:
    """Exact peak, and the resident set's in brackets."""
    cell = cells.get(method, {})
    if "peak" not in cell:
        return ""
    return f"{cell['peak'] / 1e6:.2f}" + (f" ({cell['rss'] / 1e6:.1f})" if "rss" in cell else "")


def ratio_to(base: str, only_exact: bool = False) -> Any:
    """Median of the round-by-round ratios of step time, and their quartiles; the base's own in seconds."""

    def show(cells: dict[str, Cell], method: str) -> str:
        own, other = (cells.get(name, {}).get("seconds") for name in (method, base))
        if not own or not other or (only_exact and not METHODS[method].exact_network):
            return ""
        ratios = [a / b for a, b in zip(own, other, strict=True)]
        if method == base:
            return f"1 ({statistics.median(own):.3g} s)"
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    return show


def gradient_error(cells: dict[str, Cell], method: str) -> str:
    """Relative error in float64 and float32."""
    cell = cells.get(method, {})
    return f"{cell['float64']:.1e} / {cell['float32']:.1e}" if "float32" in cell and method != "plain" else ""


def render(results: Results) -> str:
    """All tables as Markdown."""
    parts = ["## Memory, time and gradient error", report.header(results["machine"])]
    titles = {name: w.title for name, w in WORKLOADS.items()}
    parts.append("\n".join(f"- {name}: {title}" for name, title in titles.items()))
    sections = [
        ("### Peak activation memory, MB", _ABOUT_PEAK, megabytes),
        ("### Step time, ratio to plain backprop", _ABOUT_TIME, ratio_to("plain")),
        ("### Step time, ratio to checkpointing (its default)", "", ratio_to("checkpoint", only_exact=True)),
        (
            "### Step time, ratio to checkpointing without early stop",
            "",
            ratio_to("checkpoint-full", only_exact=True),
        ),
        ("### Relative error of the parameter gradient, float64 / float32", _ABOUT_ERROR, gradient_error),
    ]
    for title, about, show in sections:
        tables = [grid(results, workload, show) for workload in WORKLOADS]
        parts += [title, *([about] if about else []), *[t for t in tables if t]]
    return "\n\n".join(parts)


_ABOUT_PEAK = (
    "Exact peak of live tensor bytes in one step, above the level before it (parameters, their gradients, "
    "input and output gradient are below it); in brackets, where measured, the same from the resident set. "
    "momentumnet, memcnn and revlib compute another network (two streams of full width, the same functions)."
)
_ABOUT_TIME = (
    "CPU time of the process on one thread; medians of round-by-round ratios from interleaved runs, with "
    "quartiles; heap kept between steps."
)
_ABOUT_ERROR = "Of the same network with the same weights, against plain backprop in the same dtype."


def _names(given: str | None, known: dict[str, Any], what: str) -> list[str]:
    names = [name.strip() for name in given.split(",")] if given else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return names


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Small depths and few rounds: minutes, for CI.")] = False,
    workload: Annotated[str | None, typer.Option(help="Comma-separated: W1,W2,W3,W3b.")] = None,
    depths: Annotated[str | None, typer.Option(help="Comma-separated; default: each workload's own.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; default: all that are installed.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of the timing; 0 is 5 with --quick, else 15.")] = 0,
    measure: Annotated[
        str | None,
        typer.Option(help="Comma-separated: peak,time,error,rss; default: all, no rss if --quick."),
    ] = None,
    results: Annotated[Path, typer.Option("--json", help="Where results go.")] = Path("benchmarks/results/memory.json"),
    section: Annotated[str, typer.Option(help="Which section of that file.")] = MARKER,
    resume: Annotated[bool, typer.Option(help="Keep what is already in the results file.")] = False,
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure, print the tables, and write them where asked."""
    chosen = []
    for name in _names(methods, METHODS, "method"):
        if missing := METHODS[name].missing():
            console.print(f"[yellow]{name} is left out: {missing}[/yellow]")
        else:
            chosen.append(name)
    plan = jobs(
        _names(workload, WORKLOADS, "workload"),
        [int(depth) for depth in depths.split(",")] if depths else None,
        chosen,
        _names(measure or ("peak,time,error" if quick else None), MEASURES, "measurement"),
        quick,
    )
    found = run(plan, repeats or (5 if quick else 15), results, resume)
    text = render(found)
    report.publish(text, section, write)


if __name__ == "__main__":
    # `memory.py --quick` rather than `memory.py main --quick`: `child` is for this script alone.
    if len(sys.argv) < 2 or sys.argv[1] != "child":
        sys.argv.insert(1, "main")
    app()
