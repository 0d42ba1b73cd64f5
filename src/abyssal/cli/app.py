"""The command line: parse, call the library, show. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli import depth_check, forecast, inspect, phase, reproduce, sweep, tangent
from abyssal.cli.common import check_folder, command_line, one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

    from abyssal.demo.run import DemoResult

__all__ = ["app"]

app = typer.Typer(
    name="abyssal",
    help="Very deep residual networks in PyTorch: trained without the memory of their depth.",
    epilog="Start with `abyssal demo`: a minute and a half, ends in a table and a page with plots.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes read badly in logs, and would take [demo] for markup
)


app.command()(inspect.inspect)
app.command()(inspect.plan)
app.command()(forecast.forecast)
app.command()(phase.phase)
app.command("depth-check")(depth_check.depth_check)
app.command()(reproduce.reproduce)
app.command()(sweep.sweep)
app.command()(tangent.tangent)


def _version(wanted: bool) -> None:
    if wanted:
        from abyssal.util.environment import installed_version

        typer.echo(f"abyssal {installed_version('abyssal')}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Very deep residual networks in PyTorch: trained without the memory of their depth."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for index.html and results.json; made if it is missing.")] = Path(
        "abyssal-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A small network and short sweeps: seconds, to see that it works.")
    ] = False,
    depth: Annotated[
        int | None, typer.Option(min=2, help="Residual blocks of the trained network (256; 32 with --quick).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data order.")] = 0,
) -> None:
    """Train a residual network on real images three ways, and compare what each way cost.

    Plain backprop, checkpointing of every block, and reconstruction: same weights to start from, same
    batches. Ends with a table (test accuracy, step time, peak activation memory, gradient error) and a
    self-contained page with the same against depth. Runs on the CPU, on one thread; takes about a minute
    and a half. Needs scikit-learn: pip install "abyssal[demo]".
    """
    with one_line_errors():
        check_folder(out)
        from rich.console import Console

        from abyssal.demo.page import save
        from abyssal.demo.run import DemoSettings, run_demo
        from abyssal.util.progress import progress_for

        settings = DemoSettings.quick() if quick else DemoSettings()
        settings = settings.changed(depth=settings.depth if depth is None else depth, seed=seed)
        console = Console()
        with progress_for(console) as progress:
            result = run_demo(settings, progress)
        _show(result, save(result, out, command_line("demo")), console)


def _show(result: DemoResult, page: Path, console: Console) -> None:
    from abyssal.demo.page import conclusion, terminal_table, warning

    console.print()
    console.print(terminal_table(result))
    console.print(conclusion(result), highlight=False)
    if result.drift_warnings:
        console.print(warning(result), style="yellow", highlight=False, markup=False)
    console.print()
    console.print(f"Page with the plots: [bold]{page}[/]", highlight=False, soft_wrap=True)
