"""The critical beta of res-3 and res-1 with fractional weights: is it max(1/2, H)?

python benchmarks/critical_beta.py                            # prints the table; writes results/critical_beta.json
python benchmarks/critical_beta.py --write docs/scaling.md    # and replaces the table there
python benchmarks/critical_beta.py --quick                    # seconds, to see that it works

About five minutes of CPU. Killed, it goes on where it was: finished models are in --store.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import report
from abyssal.scaling.phases.critical import CRITICAL_BETAS, critical_beta
from abyssal.scaling.phases.crossing import Critical
from abyssal.sweep import Store
from abyssal.util.progress import progress_for

HURSTS = (0.1, 0.3, 0.5, 0.7, 0.9)
DEPTHS = (500, 1000, 2000, 4000, 8000)
# Narrow networks are cheap and vary more from model to model: more of them.
SUBJECTS = (("res3", 40, 12), ("res1", 4, 48), ("res1", 16, 24), ("res1", 40, 12))
QUICK_DEPTHS = (50, 100, 200)
RESULTS = Path(__file__).parent / "results" / "critical_beta.json"


def measure(store: Store, depths: tuple[int, ...], quick: bool, jobs: int | None) -> list[dict[str, Any]]:
    """Estimates by network and width: over all depths, and over the lower and the upper ones."""
    found = []
    with progress_for(Console(stderr=True)) as show:
        for network, width, models in SUBJECTS:
            if quick and width == 40:
                continue

            def over(some: tuple[int, ...], name: str = f"{network}, width {width}") -> Critical:
                return critical_beta(
                    network,  # noqa: B023 (called before the loop goes on)
                    "fbm",
                    HURSTS,
                    width,  # noqa: B023
                    some,
                    betas=CRITICAL_BETAS[::4] if quick else CRITICAL_BETAS,
                    models=4 if quick else models,  # noqa: B023
                    inputs=4,
                    store=store,
                    jobs=jobs,
                    progress=lambda phase, done, total: show(f"{name}, models of a depth", done, total),
                )

            whole = over(depths)
            parts = [over(depths[:3]), over(depths[-3:])]
            found.append(
                {
                    "network": network,
                    "width": width,
                    "models": 4 if quick else models,
                    "depths": list(depths),
                    "hursts": list(HURSTS),
                    "all": _plain(whole),
                    "parts": [_plain(part) for part in parts],
                }
            )
    return found


def render(results: dict[str, Any]) -> str:
    """The table, and what the figures in it are."""
    depths = results["subjects"][0]["depths"]
    head = ["network, depths compared", *(f"H = {hurst:g}" for hurst in HURSTS)]
    rows = [["max(1/2, H)", *(f"{max(0.5, hurst):g}" for hurst in HURSTS)]]
    for subject in results["subjects"]:
        name = f"{subject['network']}, width {subject['width']}"
        rows.append([f"{name}: {depths[0]:,} to {depths[-1]:,}", *_shown(subject["all"])])
        rows.append([f"{name}: {depths[0]:,} to {depths[2]:,}", *_shown(subject["parts"][0])])
        rows.append([f"{name}: {depths[-3]:,} to {depths[-1]:,}", *_shown(subject["parts"][1])])
    counts = ", ".join(f"{s['models']} ({s['network']}, {s['width']})" for s in results["subjects"])
    about = (
        "Critical beta: the largest beta at which the mean of log10 of |h_L - h_0| / |h_0| does not depend on depth "
        "(slope in log depth 0, by least squares over the depths). In brackets its 95 % interval over models, "
        f"resampled: {counts} independent models of 4 inputs; residual weights are independent at each depth, "
        "inputs the same. The interval does not hold what still larger depths would change: compare the rows of the "
        "smaller and of the larger depths."
    )
    return f"{about}\n\n{report.table(head, rows)}\n\n{report.header(results['machine'])}"


def _shown(estimate: dict[str, list[float | None]]) -> list[str]:
    cells = []
    for value, low, high in zip(estimate["value"], estimate["low"], estimate["high"], strict=True):
        if value is None:
            cells.append("none")
        else:
            cells.append(f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else ""))
    return cells


def _plain(critical: Critical) -> dict[str, list[float | None]]:
    return {
        name: [None if math.isnan(x) else round(float(x), 5) for x in getattr(critical, name)]
        for name in ("value", "low", "high")
    }


def main(
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
    store: Annotated[Path, typer.Option(help="SQLite file of finished models.")] = Path("build/critical_beta.sqlite"),
    results: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = RESULTS,
    jobs: Annotated[int | None, typer.Option(help="Processes; one per core.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small depths and few models.")] = False,
) -> None:
    """Measure, print the table, and write it where asked."""
    store.parent.mkdir(parents=True, exist_ok=True)
    machine = report.machine()
    with Store(store) as cells:
        found = {"machine": machine, "subjects": measure(cells, QUICK_DEPTHS if quick else DEPTHS, quick, jobs)}
    report.save(found, results)
    report.publish(render(found), "critical-beta", write)


if __name__ == "__main__":
    typer.run(main)
