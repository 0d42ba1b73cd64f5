"""The command `tangent`: parse, call the library, show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.cli.common import (
    Refused,
    check_folder,
    command_line,
    hash_of_file,
    numbers,
    one_line_errors,
    progress_on_stderr,
)

if TYPE_CHECKING:
    from abyssal.papers.experiment import Work
    from abyssal.papers.tangent_widths import AgainstWidth, Training

__all__ = ["tangent"]

_STORE = "tangent.sqlite"
_PAPERS = "lly"
_WIDTHS = (64, 128, 256, 512)
# Options that only one of the three subjects has.
_ONLY = {
    "depth": {_PAPERS}, "activation": {_PAPERS}, "c-res": {_PAPERS}, "engine": {_PAPERS}, "jobs": {_PAPERS},
    "seeds": {_PAPERS, "family"}, "steps": {"training"}, "lr": {"training"}, "optimizer": {"training"},
    "tokens": {"training"}, "image-size": {"training"},
}  # fmt: skip
_SUBJECTS = {
    _PAPERS: "lly", "family": "path.py:build with --widths", "training": "a model without --widths",
}  # fmt: skip


def tangent(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="lly: the papers' networks, residual beside fully connected; path.py:build with --widths: a function "
            "of the width; or one model: hf:DIR, timm:NAME, torchvision:NAME, path.py:factory.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html, the tables as CSV, and what resumes it.")],
    data: Annotated[
        str | None, typer.Option(help="digits, sphere (lly alone), or own: the batch that comes with the model.")
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Separated by commas; lly: 64,128,256,512.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Networks of each width; 4.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of the kernel; 10, or 16 for one model.")] = None,
    depth: Annotated[int | None, typer.Option(help="lly: layers, the first one counted; 8.")] = None,
    activation: Annotated[str | None, typer.Option(help="lly: tanh, erf or sin; tanh.")] = None,
    c_res: Annotated[float | None, typer.Option(help="lly: strength of the residual branches; 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="One model: steps of training; 20.")] = None,
    lr: Annotated[float | None, typer.Option(help="One model: learning rate; 1e-3.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="One model: adamw or sgd; adamw.")] = None,
    tokens: Annotated[int | None, typer.Option(help="One model: tokens of each sequence.")] = None,
    image_size: Annotated[int | None, typer.Option(help="One model: height and width of images.")] = None,
    engine: Annotated[str | None, typer.Option(help="lly: local (processes), ray, dask, or sequential; local.")] = None,
    jobs: Annotated[int | None, typer.Option(help="lly: processes; one per core.")] = None,
) -> None:
    """Say how far training moves a network's tangent kernel, and how that depends on its width.

    Against width: drift of the kernel along gradient flow, the sizes of K3 and K4, and how well the hierarchy cut off
    at orders 2, 3 and 4 predicts the kernel; for the residual network of Li, Luo and Yip beside the fully connected
    one of Huang and Yau, or for networks of one's own. Of one model: the kernel's spectrum, and its drift along a short
    training. Each finished cell is kept in the folder, so that a stopped command goes on where it was.
    """
    with one_line_errors(lambda: f"Stopped; what is done is in {out / _STORE}, and the same command goes on."):
        wide = None if widths is None else numbers("--widths", widths, int, "64,128,256,512")
        subject = _PAPERS if model == _PAPERS else "training" if wide is None else "family"
        given = {
            "depth": depth, "activation": activation, "c-res": c_res, "engine": engine, "jobs": jobs, "seeds": seeds,
            "steps": steps, "lr": lr, "optimizer": optimizer, "tokens": tokens, "image-size": image_size,
        }  # fmt: skip
        _check_options(subject, given, wide, data, samples)
        count = samples or (16 if subject == "training" else 10)
        if subject == _PAPERS:
            _papers(wide or list(_WIDTHS), data or "digits", count, given, out)
        elif subject == "family":
            _family(model, wide or [], data or "digits", seeds or 4, count, out)
        else:
            _training(model, data or "own", count, given, out)


def _check_options(
    subject: str, given: dict[str, Any], widths: list[int] | None, data: str | None, samples: int | None
) -> None:
    """Refuse what does not go together, before there is a folder or a model."""
    for name, value in given.items():
        if value is not None and subject not in _ONLY.get(name, {subject}):
            wanted = " or ".join(_SUBJECTS[one] for one in _SUBJECTS if one in _ONLY[name])
            raise Refused(f"--{name}: is an option of {wanted}; leave it out for {_SUBJECTS[subject]}")
        if name not in ("activation", "optimizer", "engine", "c-res") and value is not None and not value > 0:
            raise Refused(f"--{name} {value}: expected a positive number")
    if widths is not None and (len(set(widths)) < 2 or min(widths) < 1 or widths != sorted(set(widths))):
        raise Refused("--widths: expected two or more whole numbers, ascending, such as 64,128,256,512")
    known = ("digits", "sphere") if subject == _PAPERS else ("digits", "own")
    if data is not None and data not in known:
        raise Refused(f"--data {data}: expected {' or '.join(known)} for {_SUBJECTS[subject]}")
    if samples is not None and samples < 2:
        raise Refused(f"--samples {samples}: expected at least 2")
    if given["optimizer"] not in (None, "adamw", "sgd"):
        raise Refused(f"--optimizer {given['optimizer']}: expected adamw or sgd")
    if given["activation"] not in (None, "tanh", "erf", "sin"):
        raise Refused(
            f"--activation {given['activation']}: expected tanh, erf or sin: K3 and K4 need two derivatives that are "
            "smooth"
        )


@contextmanager
def _work(out: Path, counted: str = "", **options: Any) -> Iterator[Work]:
    """Give what the networks are computed with: the store in the folder, which is made, and a progress bar."""
    from abyssal.papers.experiment import Work
    from abyssal.sweep import Store

    check_folder(out)
    with Store(out / _STORE) as store, progress_on_stderr(counted) as progress:
        yield Work("tangent", store, progress=progress, **options)


def _papers(widths: list[int], data: str, samples: int, given: dict[str, Any], out: Path) -> None:
    from abyssal.papers.experiments.li2020.drift import Settings
    from abyssal.papers.shared.lly import check_samples
    from abyssal.papers.tangent_page import save
    from abyssal.papers.tangent_widths import of_papers_networks
    from abyssal.sweep.engine import check_engine
    from abyssal.util.environment import environment

    engine = given["engine"] or "local"
    check_engine(engine, given["jobs"])
    check_samples(data, samples)
    c_res = 1.0 if given["c-res"] is None else float(given["c-res"])
    settings = Settings(
        tuple(widths), given["seeds"] or 4, depth=given["depth"] or 8, n=samples, data=data,
        activation=given["activation"] or "tanh", c_res=c_res,
    )  # fmt: skip
    with _work(out, "cells", engine=engine, jobs=given["jobs"]) as work:
        started = environment()
        found = of_papers_networks(settings, work)
    _show(found, save(found, out, command_line("tangent"), started))


def _family(model: str, widths: list[int], data: str, seeds: int, samples: int, out: Path) -> None:
    from abyssal.models.load import load_builder
    from abyssal.papers.tangent_batches import fingerprint
    from abyssal.papers.tangent_page import save
    from abyssal.papers.tangent_widths import Family, of_family
    from abyssal.util.environment import environment

    family = Family(load_builder(model), model, model, data, seeds, samples)
    first = family.model(widths[0], 0)
    known = fingerprint(first.model, *family.problem(first, 0))
    family = replace(family, name=f"{model} {hash_of_file(model)} {known}")
    with _work(out, "networks") as work:
        started = environment()
        found = of_family(family, widths, work)
    _show(found, save(found, out, command_line("tangent"), started))


def _training(model: str, data: str, samples: int, given: dict[str, Any], out: Path) -> None:
    from abyssal.models.load import load_model
    from abyssal.papers.tangent_batches import digits_example, fingerprint, inputs_of
    from abyssal.papers.tangent_page import save_training
    from abyssal.papers.tangent_widths import Recipe, of_training
    from abyssal.util.environment import environment
    from abyssal.util.randomness import seeded

    recipe = Recipe(given["steps"] or 20, given["lr"] or 1e-3, given["optimizer"] or "adamw")
    with seeded(recipe.seed):
        loaded = load_model(model, image_size=given["image-size"])
    if data == "digits":
        like = None if ".py:" in model else inputs_of(loaded.example_batch(1, image_size=given["image-size"]))
        example = digits_example(loaded.model, samples, like)
    else:
        example = loaded.example_batch(samples, given["tokens"], given["image-size"])
    started = environment()
    known = fingerprint(loaded.model, inputs_of(example), example.batch)
    name = f"{model} {hash_of_file(model)} {data} {samples} {given['tokens']} {given['image-size']} {known}"
    with _work(out) as work:
        found = of_training(loaded, name, example, recipe, work)
    page = save_training(found, out, command_line("tangent"), started)
    _show_training(found, page)


def _show(found: AgainstWidth, page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "measured", "holds")
    for finding in found.findings:
        answer = {True: "yes", False: "[bold red]NO[/]", None: "not decided"}[finding.holds]
        table.add_row(finding.claim, finding.measured, answer)
    Console().print(table)
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"{found.seconds:.0f} s of CPU time in all. Page with the plots: {page}")


def _show_training(found: Training, page: Path) -> None:
    shown, total = found.outputs
    typer.echo(
        f"{found.subject.replace('`', '')}: kernel of {found.eigenvalues.shape[1]} samples, {shown} of {total} outputs"
    )
    for step, distance, alignment in zip(found.steps, found.distance, found.alignment, strict=True):
        typer.echo(f"  step {step}: loss {found.losses[step]:.4g}, drift {distance:.2%}, alignment {alignment:.5f}")
    typer.echo(f"Page with the plots: {page}")
