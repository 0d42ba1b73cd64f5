"""The command `sweep`: parse, call the library, show."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.common import Refused, check_folder, command_line, one_line_errors, progress_on_stderr
from abyssal.util.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from abyssal.sweep import Grid, Outcome
    from abyssal.sweep.result import SweepResult

__all__ = ["sweep"]

_LAST = 8  # cells in the table that is redrawn as they are done


def sweep(
    function: Annotated[
        str,
        typer.Argument(
            metavar="PATH.py:FUNCTION",
            help="Called with a cell's parameters by name; returns a number, or a dict of them.",
        ),
    ],
    grid: Annotated[Path, typer.Option(help="TOML with [grid] (lists to cross), [[cells]], [fixed].")],
    out: Annotated[Path, typer.Option(help="Folder for index.html, results.csv, figure.png and sweep.sqlite.")],
    engine: Annotated[str, typer.Option(help="local (processes), ray, dask, or sequential.")] = "local",
    jobs: Annotated[int | None, typer.Option(help="Processes; one per core.")] = None,
    retries: Annotated[int, typer.Option(help="How often a failing cell is tried again.")] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Take results that an earlier text of the file gave, too.")
    ] = False,
) -> None:
    """Call a function of yours over a grid: in parallel, resuming, with a table, a heat map and a page.

    Each cell is saved as it is done: killed, the same command goes on where it was. A cell is computed anew when the
    text of the file has changed. Before each call the generators of Python, numpy and torch are seeded from the cell,
    so every engine gives the same. Ends with code 1 if cells failed.
    """
    with one_line_errors(
        lambda: f"Stopped; finished cells are in {out / 'sweep.sqlite'}, and the same command goes on."
    ):
        from abyssal.sweep import Store, file_function, read_grid
        from abyssal.sweep.engine import check_engine, check_retries
        from abyssal.sweep.page import save
        from abyssal.sweep.result import outdated
        from abyssal.sweep.result import sweep as run
        from abyssal.sweep.user import check_cells
        from abyssal.util.environment import environment

        check_engine(engine, jobs)
        check_retries(retries)
        if not grid.is_file():
            raise Refused(f"--grid {grid}: there is no such file")
        wanted = read_grid(grid)
        called = file_function(function)
        check_cells(called, wanted.cells)
        check_folder(out)
        started = environment()
        with Store(out / "sweep.sqlite") as store:
            if old := outdated(called, wanted.cells, store):
                typer.echo(_of_changed_file(called.path.name, old, keep), err=True)
            with _shown_live(wanted) as (progress, finished):
                result = run(
                    called,
                    wanted.cells,
                    store,
                    engine=engine,
                    jobs=jobs,
                    retries=retries,
                    keep=keep,
                    progress=progress,
                    finished=finished,
                )
        *tables, page = save(result, out, command_line("sweep"), started)
        _show(result, tables, page)
        if result.failed:
            raise typer.Exit(1)


def _of_changed_file(file: str, cells: int, keep: bool) -> str:
    many = "1 cell was" if cells == 1 else f"{cells} cells were"
    end = "their results are kept." if keep else "they are computed again (--keep takes the old results)."
    return f"{file} has changed since {many} computed: {end}"


def _show(result: SweepResult, tables: list[Path], page: Path) -> None:
    from abyssal.util.files import PARQUET_HINT

    stored = len(result.outcomes) - len(result.failed) - result.computed
    typer.echo(
        f"{len(result.outcomes)} cells: {result.computed} computed now, {stored} stored, {len(result.failed)} failed."
    )
    for outcome in result.failed[:3]:
        typer.echo(f"  {dict(outcome.parameters)}: {outcome.error}")
    if len(result.failed) > 3:
        typer.echo(f"  and {len(result.failed) - 3} more; all tracebacks are in sweep.sqlite")
    typer.echo(f"Table: {', '.join(str(path) for path in tables if path.suffix in ('.csv', '.parquet'))}")
    if not any(path.suffix == ".parquet" for path in tables):
        typer.echo(f"There is {PARQUET_HINT}")
    typer.echo(f"Page: {page}")


@contextmanager
def _shown_live(grid: Grid) -> Iterator[tuple[Progress, Callable[[Outcome], None]]]:
    """Give callbacks that show a bar and the last cells on a terminal, and lines where there is none."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        with progress_on_stderr("cells") as progress:
            yield progress, lambda outcome: None
        return
    from rich import progress as bars
    from rich.console import Group
    from rich.live import Live

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    bar = bars.Progress(*columns, console=console)
    task = bar.add_task("cells", total=len(grid.cells))
    last: deque[Outcome] = deque(maxlen=_LAST)
    with Live(bar, console=console, refresh_per_second=8, transient=True) as live:

        def finished(outcome: Outcome) -> None:
            last.append(outcome)
            live.update(Group(_last_cells(last, grid), bar))

        yield lambda phase, done, total: bar.update(task, completed=done, total=total), finished


def _last_cells(outcomes: deque[Outcome], grid: Grid) -> Table:
    """Return the table of the last cells: what is crossed, and what came out."""
    from rich.table import Table

    names = list(grid.axes) or list(grid.cells[0])
    results = list(dict.fromkeys(name for outcome in outcomes for name in outcome.values))[:5]
    table = Table(*names, *results, "s", box=None, padding=(0, 2, 0, 0))
    for outcome in outcomes:
        cells = [_few(outcome.parameters.get(name, "")) for name in names]
        if outcome.traceback:
            found = [f"[red]{outcome.error.partition(':')[0]}", *[""] * (len(results) - 1)][: max(1, len(results))]
        else:
            found = [_few(outcome.values.get(name, "")) for name in results]
        table.add_row(*cells, *found, f"{outcome.seconds:.1f}")
    return table


def _few(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:24]
