"""The command `phase`: parse, call the library, show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.common import check_folder, command_line, one_line_errors, progress_on_stderr

if TYPE_CHECKING:
    from abyssal.scaling.phases.diagram import PhaseDiagram

__all__ = ["phase"]

_GRID = "Numbers separated by commas, or FROM:TO:COUNT"


def phase(
    out: Annotated[Path, typer.Option(help="Folder for index.html, phase.png, phase.csv and phase.sqlite.")],
    network: Annotated[str, typer.Option(help="res3, V relu(W h), or res1, V relu(h).")] = "res3",
    init: Annotated[
        str,
        typer.Option(help="Weights across depth: fbm, fbm_path, iid, normal, rbf, matern12, matern32, matern52."),
    ] = "fbm",
    depth: Annotated[int, typer.Option(help="Residual layers.")] = 1000,
    width: Annotated[int, typer.Option(help="Width of the states.")] = 40,
    betas: Annotated[str | None, typer.Option(help=f"Exponents of the scale. {_GRID}; 70 from 0.2 to 1.3.")] = None,
    hursts: Annotated[str | None, typer.Option(help=f"Hurst indices. {_GRID}; 51 from 0.05 to 0.97.")] = None,
    models: Annotated[int, typer.Option(help="Independent networks of each Hurst index.")] = 5,
    inputs: Annotated[int, typer.Option(help="Inputs of each network.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    engine: Annotated[str, typer.Option(help="local (processes), ray, dask, or sequential.")] = "local",
    jobs: Annotated[int | None, typer.Option(help="Processes; one per core.")] = None,
) -> None:
    """Draw a phase diagram: where a deep residual network freezes, has a limit, or explodes.

    Measures how far states and gradients travel through random networks, over the scale depth^-beta of their branches
    and the regularity of their weights across depth. Each model is saved as it is done: killed, the same command goes
    on where it was. The defaults are the full diagram of Marion et al. (2022); about a minute on two cores.
    """
    with one_line_errors(lambda: f"Stopped; what is done is in {out / 'phase.sqlite'}, and the same command goes on."):
        from abyssal.scaling.phases.cells import Subject, check_betas, check_run
        from abyssal.scaling.phases.diagram import BETAS, HURSTS, phase_diagram
        from abyssal.scaling.phases.page import save
        from abyssal.sweep import Store
        from abyssal.util.environment import environment

        grids = _grid("--betas", betas), _grid("--hursts", hursts)
        # What the library would refuse, before there is a folder.
        Subject.of(network, init, grids[1], HURSTS)
        check_run([depth], check_betas(grids[0] or BETAS), width, models, inputs, seed, engine, jobs, None)
        check_folder(out)
        started = environment()
        with Store(out / "phase.sqlite") as store, progress_on_stderr("models") as progress:
            diagram = phase_diagram(
                network,
                init,
                depth,
                width,
                *grids,
                models=models,
                inputs=inputs,
                seed=seed,
                store=store,
                engine=engine,
                jobs=jobs,
                progress=progress,
            )
        page = save(diagram, out, command_line("phase"), started)
        _show(diagram)
        typer.echo(f"Page with the heat maps: {page}")


def _grid(option: str, text: str | None) -> list[float] | None:
    """Read `0.2,0.5,1` or `0.2:1.3:70`."""
    if text is None:
        return None
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, end, count = text.split(":")
        first, last, steps = float(start), float(end), int(count)
        if steps < 2 or not (math.isfinite(first) and math.isfinite(last)):
            raise ValueError
        return [round(first + (last - first) * i / (steps - 1), 6) for i in range(steps)]
    except ValueError:
        raise ValueError(
            f"{option} {text}: expected numbers such as 0.2,0.5,1 or FROM:TO:COUNT as 0.2:1.3:70"
        ) from None


def _show(diagram: PhaseDiagram) -> None:
    critical = diagram.critical_beta()
    shown = range(0, len(critical.value), max(1, len(critical.value) // 6))
    typer.echo(f"Beta at which states move by their own length at depth {diagram.depth:,} (95 % over models):")
    for j in shown:
        value, low, high = (float(part[j]) for part in (critical.value, critical.low, critical.high))
        hurst = critical.hursts[j]
        name = diagram.init if hurst is None else f"H = {hurst:g}"
        found = "outside the betas given" if math.isnan(value) else f"{value:.3f}"
        found += "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
        typer.echo(f"  {name}: {found}")
    typer.echo(f"{diagram.computed} models computed now, {diagram.seconds:.0f} s of CPU time in all.")
