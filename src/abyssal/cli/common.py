"""What the commands share: one-line errors, progress, checks of the files to be written, the command line as typed."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from abyssal.util.progress import Progress

__all__ = [
    "ImageSizeOption",
    "JsonOption",
    "ModelArgument",
    "Refused",
    "check_file",
    "check_folder",
    "command_line",
    "hash_of_file",
    "numbers",
    "one_line_errors",
    "print_json",
    "progress_on_stderr",
]

_Number = TypeVar("_Number", int, float)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="hf:DIR (a folder with a config.json), timm:NAME, torchvision:NAME, or path.py:factory, which returns a "
        "module or (module, batch, loss).",
    ),
]


ImageSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Height and width of the images, of a model of images.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]


class Refused(Exception):
    """A wish that cannot be met; its text is all the user sees."""


@contextmanager
def one_line_errors(stopped: Callable[[], str] = lambda: "Stopped; nothing was written.") -> Iterator[None]:
    """End with one line and code 2 whatever goes wrong, and with code 130 and `stopped()` when interrupted."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        typer.echo(stopped(), err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if os.environ.get("ABYSSAL_TRACEBACK"):
            raise
        typer.echo(f"abyssal: {_one_line(error)}", err=True)
        raise typer.Exit(2) from None


def _one_line(error: Exception) -> str:
    """Return what happened; where it was not our own refusal, with the place it happened at."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, Refused) or type(error).__module__.startswith("abyssal"):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, ValueError | TypeError) and Path(frame.filename).is_relative_to(Path(__file__).parents[1]):
        return text
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f"{text[:400]} ({type(error).__name__} in {where}; ABYSSAL_TRACEBACK=1 shows all of it)"


def check_file(option: str, file: Path | None) -> None:
    """Find out before the work, not after it, that a file cannot be written."""
    if file is None:
        return
    if file.is_dir():
        raise Refused(f"{option} {file}: is a folder; give the name of a file")
    if not file.parent.is_dir():
        raise Refused(f"{option} {file}: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise Refused(f"{option} {file}: the folder {file.parent} cannot be written to")


def check_folder(out: Path) -> None:
    """Make the folder of `--out`, and find out before the work that nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".abyssal-probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Refused(f"--out {out}: cannot write there ({error.strerror})") from error


def hash_of_file(model: str) -> str:
    """Return what tells one state of a `path.py:name` model's file from another; nothing for other models."""
    file = Path(model.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


def numbers(option: str, text: str, kind: Callable[[str], _Number], example: str) -> list[_Number]:
    """Read `8,16,32`."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise Refused(f"{option} {text}: expected numbers separated by commas, such as {example}") from None


@contextmanager
def progress_on_stderr(of: str = "") -> Iterator[Progress]:
    """Give a callback `(phase, done, total)` that shows progress on standard error; `of` says what is counted."""
    from rich.console import Console

    from abyssal.util.progress import progress_for

    with progress_for(Console(stderr=True, emoji=False)) as report:  # train.py:train: names no picture
        yield lambda phase, done, total: report(f"{phase}: {of}" if of else phase, done, total)


def print_json(found: Any) -> None:
    """Print what a thing's `to_dict` gives."""
    typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))


def command_line(command: str) -> str:
    """Return what the user typed."""
    return shlex.join(["abyssal", *sys.argv[1:]]) if sys.argv[1:2] == [command] else f"abyssal {command}"
