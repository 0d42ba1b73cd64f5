"""Figures 1 to 7 of Marion, Fermanian, Biau, Vert: what scale and regularity of the weights do to a deep network.

    .venv/bin/python examples/marion2022.py                      # reduced size, about a minute
    .venv/bin/python examples/marion2022.py --size paper         # the paper's sizes, ten minutes; resumes if killed

Each figure is drawn, and what the paper says of it is checked on the numbers. The experiment itself is
`abyssal reproduce marion2022/init`, which makes a page of it; here its parts are called one by one: measure rows, judge
them, draw them.

Source: arXiv 2206.06929; JMLR 26 (2025).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from abyssal.papers.experiment import Work
from abyssal.papers.experiments.marion2022.init import EXPERIMENT, FIGURES
from abyssal.sweep import Store

Claim = tuple[str, str, str, bool | None]  # figure, what the paper says, what was found, whether it holds
ANSWERS = {True: "yes", False: "[bold red]NO", None: "not decided"}


def main(
    size: Annotated[Literal["small", "paper"], typer.Option(help="How much to draw.")] = "small",
    out: Annotated[Path, typer.Option(help="Folder of the figures, and of what resumes them.")] = Path("marion2022"),
) -> list[Claim]:
    """Draw the figures, and say of each whether it shows what the paper says."""
    settings = EXPERIMENT.sizes["small" if os.environ.get("CI") == "true" else size]
    out.mkdir(parents=True, exist_ok=True)
    with Store(out / "marion2022.sqlite") as store:
        rows = EXPERIMENT.run(settings, Work(EXPERIMENT.name, store, engine="local"))
    for name, heading, height, draw in FIGURES:
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure, rows, settings)
        figure.suptitle(heading)
        figure.savefig(out / f"figure{name}.png", dpi=120)
    claims: list[Claim] = []
    table = Table("figure", "what the paper says", "found", "holds")
    for finding in EXPERIMENT.check(rows, settings):
        figure_name, _, said = finding.claim.removeprefix("figure ").partition(": ")
        claims.append((figure_name, said, finding.measured, finding.holds))
        table.add_row(figure_name, said, finding.measured, ANSWERS[finding.holds])
    Console().print(table)
    Console().print(f"Figures are in {out}/.")
    return claims


if __name__ == "__main__":
    typer.run(main)
