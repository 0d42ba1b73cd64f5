"""The command `forecast`: parse, call the library, show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.cli.common import ImageSizeOption, JsonOption, ModelArgument, Refused, one_line_errors, print_json

if TYPE_CHECKING:
    import torch

__all__ = ["forecast"]

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def forecast(
    model: ModelArgument,
    batch: Annotated[int, typer.Option(min=1, help="Sequences or images in the batch.")] = 1,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens in each sequence, of a model of tokens.")] = None,
    image_size: ImageSizeOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the parameters: bf16, fp16 or fp32; default: the model's own.")
    ] = None,
    blocks: Annotated[
        list[str] | None, typer.Option(help="Names or globs of the residual blocks; default: what is found.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a training step of a model would take, for every way to keep its residual stream.

    Nothing is allocated and nothing is downloaded: a forward and a backward pass are accounted for on tensors that
    have shapes and no memory, so that an 8B-parameter model takes seconds, here. Bytes are those of the CPU's kernels.
    """
    import shutil

    with one_line_errors(lambda: "Stopped."):
        kind = _dtype(dtype)
        from abyssal.forecasting.forecast import forecast as look
        from abyssal.forecasting.table import forecast_text

        found = look(model, batch_size=batch, tokens=tokens, image_size=image_size, dtype=kind, blocks=blocks or None)
        if as_json:
            print_json(found)
        else:
            typer.echo(forecast_text(found, shutil.get_terminal_size((100, 24)).columns))


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in (*_SHORT, *_SHORT.values()):
        raise Refused(f"--dtype {name}: expected one of {', '.join((*_SHORT, *_SHORT.values()))}")
    import torch

    found: torch.dtype = getattr(torch, _SHORT.get(name, name))
    return found
