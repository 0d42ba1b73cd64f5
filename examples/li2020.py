"""How training moves the tangent kernel: what Li, Luo, Yip, Belfer et al. and Littwin et al. claim, and what comes out.

    .venv/bin/python examples/li2020.py                      # small size, seven minutes of CPU; resumes
    CI=true .venv/bin/python examples/li2020.py              # reduced, under two minutes

Six experiments: (a) the kernel's drift, and sup|K3| and sup|K4|, against width, for the residual network and the fully
connected one; (b) how well the hierarchy cut off at orders 2, 3 and 4 predicts the kernel; (c) the width that keeps the
least eigenvalue above half its start, against the number of samples; (d) fluctuations of the kernel from one random
network to the next, against depth, with and without skips; (e) spectra of residual kernels on the sphere; (f) the loss
against the rate that is promised. They are those of `abyssal reproduce`, which has their settings and their tables.

Sources: arXiv 2007.03714 (a, b, c, f), 1909.08156 (the fully connected network), 2001.10460 (d), 2104.03093 (e).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from abyssal.papers.experiment import Experiment, Finding, Work
from abyssal.papers.experiments.belfer2021 import spectrum as belfer2021_spectrum
from abyssal.papers.experiments.li2020 import convergence as li2020_convergence
from abyssal.papers.experiments.li2020 import drift as li2020_drift
from abyssal.papers.experiments.li2020 import truncation as li2020_truncation
from abyssal.papers.experiments.li2020 import width as li2020_width
from abyssal.papers.experiments.littwin2020 import fluctuations as littwin2020_fluctuations
from abyssal.sweep import Store
from abyssal.util.progress import progress_for

EXPERIMENTS = {
    "a": li2020_drift.EXPERIMENT,
    "b": li2020_truncation.EXPERIMENT,
    "c": li2020_width.EXPERIMENT,
    "d": littwin2020_fluctuations.EXPERIMENT,
    "e": belfer2021_spectrum.EXPERIMENT,
    "f": li2020_convergence.EXPERIMENT,
}


def reduced(letter: str, experiment: Experiment) -> Any:
    """The small size with fewer seeds and less width: still enough to decide most claims."""
    small = experiment.sizes["small"]
    changes: dict[str, dict[str, Any]] = {
        "a": {"widths": (32, 64, 128), "seeds": 16},
        "b": {"widths": (32, 128), "seeds": 8},
        "c": {"samples": (4, 8, 16), "widths": {"resnet": (4, 8, 16, 32), "plain": (4, 8, 16, 32)}, "seeds": 12},
        "d": {"depths": (2, 8, 16, 32, 64), "widths": (24, 48), "networks": 150},
        "e": {"dimensions": (3,), "depths": (2, 8), "degrees": 64, "spike_depths": (2, 8, 32, 128)},
        "f": {"widths": (16, 64), "seeds": 8},
    }
    return replace(small, **changes[letter])


def main(
    size: Annotated[Literal["small", "paper"], typer.Option(help="How much to measure.")] = "small",
    out: Annotated[Path, typer.Option(help="Folder of the figures, and of what resumes them.")] = Path("li2020"),
) -> dict[str, list[Finding]]:
    """Run the six experiments, draw their figures, and say of each claim whether it holds."""
    out.mkdir(parents=True, exist_ok=True)
    table = Table("", "claim", "found", "holds")
    findings: dict[str, list[Finding]] = {}
    with Store(out / "li2020.sqlite") as store, progress_for(Console(stderr=True)) as report:
        for letter, experiment in EXPERIMENTS.items():
            in_ci = os.environ.get("CI") == "true"
            settings = reduced(letter, experiment) if in_ci else experiment.sizes[size]
            work = Work(experiment.name, store, progress=report)
            rows = experiment.run(settings, work)
            findings[letter] = experiment.check(rows, settings)
            figure = experiment.plot(rows, settings)
            figure.savefig(out / f"{letter}-{experiment.name.replace('/', '-')}.png", dpi=120)
            for finding in findings[letter]:
                answer = {True: "yes", False: "[bold red]NO", None: "not decided"}[finding.holds]
                table.add_row(letter, finding.claim, finding.measured, answer)
            table.add_section()
    Console().print(table)
    Console().print(f"Figures are in {out}/.")
    return findings


if __name__ == "__main__":
    typer.run(main)
