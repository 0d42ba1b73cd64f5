"""The command `reproduce`: parse, call the library, show."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.common import Refused, check_folder, command_line, one_line_errors, progress_on_stderr
from abyssal.util.text import seconds_in_words

if TYPE_CHECKING:
    from abyssal.papers.experiment import Experiment
    from abyssal.papers.reproduce import Result

__all__ = ["reproduce"]


def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT]...", help="Names, globs such as 'sander2022/*', or all; none lists them."),
    ] = None,
    size: Annotated[str, typer.Option(help="tiny (seconds), small (minutes), or paper (the paper's own).")] = "small",
    out: Annotated[
        Path, typer.Option(help="Folder of index.html, of all tables and figures, and of the store.")
    ] = Path("repro"),
    engine: Annotated[str, typer.Option(help="local (processes), ray, dask, or sequential.")] = "local",
    jobs: Annotated[int | None, typer.Option(help="Processes; one per core.")] = None,
    retries: Annotated[int, typer.Option(help="How often a failing cell is tried again.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute everything anew, whatever is stored.")] = False,
) -> None:
    """Reproduce the papers: what each claims, what comes out here, and whether it holds.

    Without a name it lists all experiments. Results are saved as they are done: killed, the same command goes on where
    it was, and what was run at different times shares one page. Ends with code 1 if an experiment raised an exception.
    """
    with one_line_errors(lambda: f"Stopped; what is done is in {out}, and the same command goes on."):
        from abyssal.papers.experiments import experiments, select
        from abyssal.papers.page import write_page
        from abyssal.papers.reproduce import Settings
        from abyssal.papers.reproduce import reproduce as run
        from abyssal.util.files import PARQUET_HINT

        settings = Settings(size, out, engine, jobs, fresh, retries)
        broken: dict[str, str] = {}
        known = experiments(broken=broken)
        if not names:
            _list(known, settings)
            _tell_broken(broken)
            return
        chosen = [known[name] for name in select(names, list(known))]
        check_folder(out)
        command = command_line("reproduce")

        def tell(result: Result) -> None:
            _show(result)
            write_page(out, known, command)

        results = []
        for experiment in chosen:
            with progress_on_stderr() as progress:  # bars of its own: a terminal has no room for those of all
                results += run([experiment], settings, progress=progress, finished=tell)
        _tell_broken(broken)
        if importlib.util.find_spec("pyarrow") is None:
            typer.echo(f"Tables are CSV: {PARQUET_HINT}")
        typer.echo(_in_all(results))
        typer.echo(f"Page with all experiments: {write_page(out, known, command)}")
        if broken or any(result.status == "failed" for result in results):
            raise typer.Exit(1)


def _tell_broken(broken: Mapping[str, str]) -> None:
    for reason in broken.values():
        typer.echo(f"abyssal: {reason}", err=True)


def _list(known: Mapping[str, Experiment], settings: object) -> None:
    """Print every experiment: paper, claim, minutes, status of its last run."""
    from rich.console import Console
    from rich.table import Table

    from abyssal.papers.page import marked
    from abyssal.papers.reproduce import Settings, read_results

    assert isinstance(settings, Settings)
    if not known:
        raise Refused("there is no experiment in abyssal.papers.experiments")
    results = read_results(settings.out)
    table = Table(box=None, padding=(0, 2, 1, 0), header_style="bold")
    table.add_column("experiment", no_wrap=True)
    table.add_column("paper and claim", ratio=1)
    table.add_column("CPU minutes\nsmall / paper", justify="right", no_wrap=True)
    table.add_column(f"last run in {settings.out}", no_wrap=True)
    for name, experiment in known.items():
        runs = results.get(name, [])
        last = f"{marked(runs[0].verdict)}\n{runs[0].size}, {runs[0].started[:10]}" if runs else "not run"
        minutes = f"{experiment.minutes['small']:g} / {experiment.minutes['paper']:,g}"
        table.add_row(name, f"{experiment.paper}\n{experiment.claim}", minutes, last)
    console = Console()
    # Not to a terminal, lines may be as long as they like.
    Console(width=console.width if console.is_terminal else 140, highlight=False, markup=False).print(table)
    total = sum(experiment.minutes["small"] for experiment in known.values())
    typer.echo(f"All of them at size small: about {total:.0f} CPU minutes. abyssal reproduce all --out {settings.out}")


def _show(result: Result) -> None:
    """Print what came out of one experiment."""
    from abyssal.papers.page import MARKS, marked
    from abyssal.sweep.outcome import error_of

    if result.status == "failed":
        error = error_of(result.traceback.partition("\nCell {")[0])  # its own; those of its cells follow
        typer.echo(f"{result.name}: failed: {error} (all of it: {result.folder / 'traceback.txt'})")
        return
    typer.echo(
        f"{result.name}: {marked(result.verdict)} ({result.size}, {seconds_in_words(result.seconds)} of CPU time)"
    )
    answers = {True: "holds", False: "does not hold", None: "not decided"}
    for finding in result.findings:
        typer.echo(f"  {MARKS[answers[finding.holds]]} {finding.claim}: {finding.measured}")


def _in_all(results: Sequence[Result]) -> str:
    """Return how many of each verdict there are."""
    counts: dict[str, int] = {}
    for result in results:
        counts[result.verdict] = counts.get(result.verdict, 0) + 1
    many = "1 experiment" if len(results) == 1 else f"{len(results)} experiments"
    return f"{many}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + "."
