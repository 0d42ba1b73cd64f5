"""The command `depth-check`: parse, call the library, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.common import check_folder, command_line, hash_of_file, numbers, one_line_errors, progress_on_stderr
from abyssal.util.checks import positive, whole

if TYPE_CHECKING:
    from torch import nn

    from abyssal.models.batches import Example
    from abyssal.models.load import LoadedModel

__all__ = ["depth_check"]

_STORE = "depth-check.sqlite"


def depth_check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="path.py:build, a function of the depth that returns a module, (module, batch) or (module, batch, "
            "loss); batch may be a function of the step.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html, depth-check.png and depth-check.json.")],
    rule: Annotated[str, typer.Option(help="completep, depth-mup, 1/sqrt(L), gpt2, rezero, ...; none.")] = "none",
    depths: Annotated[str, typer.Option(help="Three or more, separated by commas.")] = "8,16,32,64",
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 4,
    lr: Annotated[float, typer.Option(help="Base learning rate.")] = 1e-3,
    seeds: Annotated[int, typer.Option(help="Networks of each depth.")] = 3,
    base_depth: Annotated[int | None, typer.Option(help="For rules relative to one; the least depth.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    rates: Annotated[
        str | None,
        typer.Option(help="Also train at these base learning rates, separated by commas, and compare the best ones."),
    ] = None,
    train_steps: Annotated[int, typer.Option(help="Steps of those trainings.")] = 100,
    whole_blocks: Annotated[
        bool, typer.Option("--whole-blocks", help="Take each block as one branch where its branches cannot be read.")
    ] = False,
    batch: Annotated[int | None, typer.Option(help="Sequences or images, where the function gives no batch.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each sequence, as above.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width of images, as above.")] = None,
) -> None:
    """Say whether a network's scaling is stable in depth, and whether learning rates carry over to deeper ones.

    Trains networks of several depths for a few steps under a rule, measures how far the residual stream and the
    output move, fits the power of the depth that each follows, and says pass or fail. With --rates it also trains
    each depth at several learning rates and compares the best ones; each training is kept in the folder, so that a
    stopped command goes on where it was. Ends with code 1 where the check does not pass.
    """
    with one_line_errors(lambda: _stopped(out)):
        from abyssal.models.load import load_builder
        from abyssal.scaling.transfer.check import depth_check as look
        from abyssal.scaling.transfer.learning_rate import learning_rate_transfer
        from abyssal.scaling.transfer.page import save
        from abyssal.scaling.transfer.short_runs import check_depths, check_rates, check_seeds, recipe
        from abyssal.sweep import Store
        from abyssal.util.environment import environment

        deep = numbers("--depths", depths, int, "8,16,32,64")
        pace = None if rates is None else numbers("--rates", rates, float, "1e-3,2e-3,4e-3")
        # What the library would refuse, before the file is run and before there is a folder.
        check_depths(deep, 3)
        whole("steps", steps)
        positive("lr", lr)
        check_seeds(seeds)
        recipe(lambda depth: None, deep, rule, base_depth, optimizer, 0.0, None, None, None, False)  # type: ignore[arg-type, return-value]
        if pace is not None:
            check_rates(pace)
            whole("steps", train_steps)
        builder = load_builder(model)
        example = _example(model, builder(min(deep)), batch, tokens, image_size)
        check_folder(out)
        started = environment()

        def build(depth: int) -> nn.Module:
            return builder(depth).model

        common: dict[str, Any] = {
            "rule": rule,
            "batch": example.batch,
            "loss": example.loss,
            "seeds": seeds,
            "base_depth": base_depth,
            "optimizer": optimizer,
            "whole_blocks": whole_blocks,
        }
        with progress_on_stderr("trainings") as progress:
            check = look(build, deep, steps=steps, lr=lr, progress=progress, **common)
            transfer = None
            if pace is not None:
                name = f"{model} {hash_of_file(model)} batch {batch} {tokens} {image_size}"
                with Store(out / _STORE) as store:
                    transfer = learning_rate_transfer(
                        build,
                        deep,
                        pace,
                        steps=train_steps,
                        name=name,
                        store=store,
                        engine="sequential",  # the file's function lives in this process
                        progress=lambda _, done, total: progress("learning rates", done, total),
                        **common,
                    )
        page = save(check, out, command_line("depth-check"), started, f"`{model}`: {example.description}", transfer)
        from rich.console import Console

        for found in (check, transfer):
            if found is not None:
                Console().print(found)
        typer.echo(f"Page with the plots: {page}")
        if not check.passed:
            raise typer.Exit(1)


def _example(model: str, first: LoadedModel, batch: int | None, tokens: int | None, image_size: int | None) -> Example:
    """Return what to train on: the batch that the file brings, or one of the sizes given."""
    sizes = {"--batch": batch, "--tokens": tokens, "--image-size": image_size}
    given = [name for name, value in sizes.items() if value]
    if first.own is not None and given:
        raise ValueError(f"{' and '.join(given)}: {model} brings its own batch; leave it out, or change the file")
    return first.example_batch(batch or 2, tokens, image_size)


def _stopped(out: Path) -> str:
    kept = f"; finished trainings are in {out / _STORE}" if (out / _STORE).exists() else ""
    return f"Stopped{kept}; the same command goes on."
