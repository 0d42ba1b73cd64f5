"""The commands `inspect` and `plan`: parse, call the library, show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.common import (
    ImageSizeOption,
    JsonOption,
    ModelArgument,
    Refused,
    check_file,
    command_line,
    one_line_errors,
    print_json,
    progress_on_stderr,
)

if TYPE_CHECKING:
    from torch import nn

    from abyssal.models.batches import Example
    from abyssal.models.load import LoadedModel

__all__ = ["inspect", "plan"]

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_BATCH = 2  # BatchNorm cannot train on one image where the last stage is a single pixel

_Batch = Annotated[int | None, typer.Option(min=1, help=f"Sequences or images in the batch ({_BATCH}).")]
_Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens in each sequence, of a model of tokens.")]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of random weights and of the made-up batch.")]
_Weights = Annotated[
    Path | None, typer.Option(help="File with a state_dict (torch.save or safetensors) to load into the model.")
]


def inspect(
    model: ModelArgument,
    batch: _Batch = None,
    tokens: _Tokens = None,
    image_size: ImageSizeOption = None,
    tolerance: Annotated[
        list[float] | None,
        typer.Option(help="Allowed relative error of the gradient; repeat it for several (1e-1, 3e-2, 1e-2, 1e-3)."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page with plots here.")] = None,
    weights: _Weights = None,
    seed: _Seed = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what each residual block of a model does, and what can be saved on it.

    Measures, on one made-up batch, how much each block adds to its input, whether it contracts, and what every
    policy would cost on it in gradient error, bytes and time. Ends in a table with the best policies for several
    tolerances; --report adds a page with plots. Nothing is downloaded: models by name get random weights unless
    --weights gives them others.
    """
    with one_line_errors():
        check_file("--report", report)
        subject = _subject(model, batch, tokens, image_size, weights, seed)
        from abyssal.inspection.inspection import TOLERANCES
        from abyssal.inspection.inspection import inspect as look

        with progress_on_stderr() as progress:
            found = look(
                subject.model,
                subject.example.batch,
                loss=subject.example.loss,
                tolerances=tolerance or TOLERANCES,
                progress=progress,
            )
        found = found.with_notes(
            *subject.notes, model=subject.title, batch=subject.batch, command=command_line("inspect")
        )
        if report is not None:
            found.to_html(report)
        if as_json:
            print_json(found)
            return
        from rich.console import Console

        from abyssal.inspection.text import parts

        console = Console()
        for part in parts(found, console.width):
            console.print(part)
        if report is not None:
            console.print(f"Page with the plots: [bold]{report}[/]", highlight=False, soft_wrap=True)


def plan(
    model: ModelArgument,
    tolerance: Annotated[
        float | None, typer.Option(help="Allowed relative error of the gradient, such as 1e-2.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Budget for the peak of a training step, such as 2GiB.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the plan here, for abyssal.reconstruct(model, plan).")
    ] = None,
    batch: _Batch = None,
    tokens: _Tokens = None,
    image_size: ImageSizeOption = None,
    weights: _Weights = None,
    seed: _Seed = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose a policy for every block: the fastest within a gradient error, or the most accurate within a memory.

    Measures one made-up batch, chooses, and verifies the choice end to end on this batch and on another.
    """
    with one_line_errors():
        if (tolerance is None) == (memory is None):
            raise Refused("give --tolerance 1e-2, or --memory 2GiB, and not both")
        check_file("--save", save)
        subject = _subject(model, batch, tokens, image_size, weights, seed)
        from abyssal.planning.search import plan as make_plan

        with progress_on_stderr() as progress:
            found = make_plan(
                subject.model,
                subject.example.batch,
                loss=subject.example.loss,
                tolerance=tolerance,
                memory=memory,
                progress=progress,
            )
        if save is not None:
            found.save(save)
        if as_json:
            print_json(found)
            for note in subject.notes:
                typer.echo(note, err=True)
            return
        typer.echo(str(found))
        for note in subject.notes:
            typer.echo(note)
        if save is not None:
            typer.echo(f"Saved as {save}: abyssal.reconstruct(model, abyssal.Plan.load({str(save)!r}))")


@dataclass(frozen=True)
class _Subject:
    """What is measured: a model, a batch with its loss, and what has to be said of both."""

    model: nn.Module
    example: Example
    title: str
    batch: str  # in words; empty where the shapes say more
    notes: tuple[str, ...]


def _subject(
    spec: str, batch: int | None, tokens: int | None, image_size: int | None, weights: Path | None, seed: int
) -> _Subject:
    if weights is not None and not weights.is_file():
        raise Refused(f"--weights {weights}: there is no such file")
    import torch

    from abyssal.models.load import load_model

    torch.manual_seed(seed)
    loaded = load_model(spec, image_size=image_size)
    _check_shape_options(loaded, batch=batch, tokens=tokens, image_size=image_size)
    source = _load_weights(loaded.model, weights) if weights is not None else _source(loaded, spec, seed)
    example = loaded.example_batch(batch or _BATCH, tokens, image_size, seed)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    title = f"{spec} ({type(loaded.model).__name__}, {parameters:,} parameters)"
    words = "" if loaded.own is not None else example.description
    return _Subject(loaded.model, example, title, words, tuple(note for note in (source, loaded.note) if note))


def _check_shape_options(loaded: LoadedModel, **options: int | None) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if loaded.own is not None and given:
        raise Refused(f"{' and '.join(given)}: {loaded.name} brings its own batch; leave it out, or change the factory")


def _source(loaded: LoadedModel, spec: str, seed: int) -> str:
    """Say where the weights come from, where that is not plain."""
    kind, _, rest = spec.partition(":")
    folder = Path(rest)
    if kind == "hf" and folder.is_dir() and any(file for end in _WEIGHT_FILES for file in folder.glob(end)):
        return ""
    if kind == "hf" and not folder.exists():
        return (
            f"Weights of the local Hugging Face cache; random ones (seed {seed}) if it holds the configuration alone."
        )
    if ".py:" in spec:
        return "Weights as the factory made them; if they are random, this is no evidence for the trained network."
    return (
        f"The weights are RANDOM (seed {seed}): this is no evidence for the same network after training, whose first "
        "blocks often behave quite differently. Give trained ones by --weights FILE."
    )


def _load_weights(model: nn.Module, file: Path) -> str:
    state = _read_state(file)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise Refused(f"--weights {file} does not fit this model: {' '.join(lines)[:300]}") from error
    return f"Weights from {file}."


def _read_state(file: Path) -> dict[str, Any]:
    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Refused(f"--weights {file}: cannot be read as a state_dict ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise Refused(f"--weights {file}: holds a {type(state).__name__}, expected a state_dict")
    return state
