"""The paper's phase diagram at full size: time, memory, and agreement with exact and earlier figures.

python benchmarks/phase_diagram.py                            # prints the tables; writes results/phase_diagram.json
python benchmarks/phase_diagram.py --write docs/scaling.md    # and replaces the tables there
python benchmarks/phase_diagram.py --quick                    # a small diagram, to see that it works

About two minutes. Wall time is that of this machine as it is now; CPU time divided by the processes is what it would
be with the cores to itself.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import report
from abyssal.scaling.phases.crossing import mean_and_error, model_means
from abyssal.scaling.phases.diagram import BETAS, HURSTS, phase_diagram

RESULTS = Path(__file__).parent / "results" / "phase_diagram.json"
IID_BETAS = (0.5, 0.75, 1.0)
# The mean of log10 |h_L - h_0| / |h_0| that an independent code gave: res-3, depth 1,000, width 40, 5 models.
EARLIER = {0.1: (2.72, -0.152, -0.945, -1.697), 0.5: (3.20, -0.106, -0.904, -1.655), 0.9: (26.96, 3.50, 0.257, -0.622)}
EARLIER_BETAS, EARLIER_MODELS = (0.25, 0.5, 0.75, 1.0), 5


def full_size(jobs: int, quick: bool) -> dict[str, Any]:
    """One diagram in this process and its workers: seconds, and memory at its largest."""
    from joblib.externals.loky import get_reusable_executor

    start = time.perf_counter()
    arguments: dict[str, Any] = {"depth": 100, "betas": BETAS[::7], "hursts": HURSTS[::10]} if quick else {}
    diagram = phase_diagram("res3", "fbm", **arguments, models=5, inputs=10, jobs=jobs)
    wall = time.perf_counter() - start
    get_reusable_executor().shutdown(wait=True)  # children are counted once they have ended
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "depth": diagram.depth,
        "points": [len(diagram.betas), len(diagram.hursts or ()), diagram.models, diagram.inputs],
        "jobs": jobs,
        "wall": wall,
        "cpu": cpu,
        "cells": diagram.seconds,
        "memory": (own.ru_maxrss + jobs * children.ru_maxrss) * unit,
    }


def iid(models: int) -> list[dict[str, Any]]:
    """Measured mean of |h_L|^2 / |h_0|^2 and |h_L - h_0|^2 / |h_0|^2, against the exact one."""
    found = []
    for depth in (10, 100, 1000):
        diagram = phase_diagram("res3", "iid", depth, 40, IID_BETAS, models=models, inputs=4, seed=1)
        for i, beta in enumerate(IID_BETAS):
            exact = (1 + depth ** (-2 * beta) / 2) ** depth
            for name, value in (("hidden_ratio", exact), ("hidden", exact - 1)):
                mean, error = mean_and_error((10 ** (2 * diagram.samples[name][:, 0, i])).mean(-1))
                row = {"metric": name, "exact": value, "mean": float(mean), "error": float(error)}
                found.append({"depth": depth, "beta": beta, **row})
    return found


def fractional(models: int) -> list[dict[str, Any]]:
    """Measured mean of log10 |h_L - h_0| / |h_0| with fractional weights, against an independent code's."""
    found = []
    diagram = phase_diagram("res3", "fbm", 1000, 40, EARLIER_BETAS, list(EARLIER), models=models, inputs=4, seed=1)
    spread = model_means(diagram.samples["hidden"]).std(axis=0, ddof=1)
    for j, (hurst, row) in enumerate(EARLIER.items()):
        for i, earlier in enumerate(row):
            error = float(spread[j, i]) * math.sqrt(1 / models + 1 / EARLIER_MODELS)
            mean = float(diagram.hidden[i, j])
            found.append({"hurst": hurst, "beta": EARLIER_BETAS[i], "earlier": earlier, "mean": mean, "error": error})
    return found


def render(results: dict[str, Any]) -> str:
    """The tables."""
    full = results["full"]
    betas, hursts, models, inputs = full["points"]
    about = f"{betas} betas x {hursts} Hurst indices x {models} models x {inputs} inputs, depth {full['depth']:,}"
    rows = [
        ["wall time, on this machine as it was", f"{full['wall']:.1f} s"],
        [f"CPU time of all processes, divided by {full['jobs']}", f"{full['cpu'] / full['jobs']:.1f} s"],
        ["memory at its largest, all processes", f"{full['memory'] / 1e9:.2f} GB"],
    ]
    parts = [f"Phase diagram, {about}, states and gradients, {full['jobs']} processes of one thread."]
    parts.append(report.table(["what", "measured"], rows))
    names = {"hidden_ratio": "mean of the squared ratio", "hidden": "mean of the squared change"}
    rows = [
        [
            f"{names[row['metric']]}, L = {row['depth']:,}, beta = {row['beta']:g}",
            f"{row['exact']:.5g}",
            f"{row['mean']:.5g} ± {row['error']:.2g}",
            f"{(row['mean'] - row['exact']) / row['error']:+.1f}",
        ]
        for row in results["iid"]
    ]
    parts.append("I.i.d. weights, res-3, width 40, against the exact mean:")
    parts.append(report.table(["what", "exact", "measured", "standard errors"], rows))
    rows = [
        [
            f"H = {row['hurst']:g}, beta = {row['beta']:g}",
            f"{row['earlier']:g}",
            f"{row['mean']:.3f}",
            f"{(row['mean'] - row['earlier']) / row['error']:+.1f}",
        ]
        for row in results["fractional"]
    ]
    parts.append(
        "Fractional weights, res-3, depth 1,000, width 40, mean of log10 of |h_L - h_0| / |h_0|, against an "
        f"independent code's figures from {EARLIER_MODELS} models (the standard error is that of the difference):"
    )
    parts.append(report.table(["what", "independent code", "measured", "standard errors"], rows))
    worst = max(
        np.abs([(row["mean"] - row["exact"]) / row["error"] for row in results["iid"]]).max(),
        np.abs([(row["mean"] - row["earlier"]) / row["error"] for row in results["fractional"]]).max(),
    )
    count = len(results["iid"]) + len(results["fractional"])
    parts.append(f"The largest of these {count} deviations is {worst:.1f} standard errors.")
    return "\n\n".join([*parts, report.header(results["machine"])])


def main(
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
    results: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = RESULTS,
    jobs: Annotated[int, typer.Option(min=2, help="Processes.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="A small diagram and few models.")] = False,
) -> None:
    """Measure, print the tables, and write them where asked."""
    machine = report.machine()
    # In a process of its own, so that its memory and time are its own.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        full = pool.submit(full_size, jobs, quick).result()
    models = (40, 8) if quick else (200, 20)
    found = {"machine": machine, "full": full, "iid": iid(models[0]), "fractional": fractional(models[1])}
    report.save(found, results)
    report.publish(render(found), "phase-diagram", write)


if __name__ == "__main__":
    typer.run(main)
