"""A sweep as files: its table, a picture, a page."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, write
from abyssal.report.picture import embedded, save_png
from abyssal.sweep.outcome import Outcome
from abyssal.sweep.picture import draw, label
from abyssal.sweep.result import SweepResult
from abyssal.util.environment import Environment
from abyssal.util.files import PARQUET_HINT, Value, columns_of, write_table
from abyssal.util.text import seconds_in_words

__all__ = ["save"]

_MOST_ROWS = 200
_MOST_FAILURES = 5


def save(result: SweepResult, out: Path, command: str, environment: Environment) -> list[Path]:
    """Write `results.csv` (and `.parquet`), `figure.png` where there is something to draw, and `index.html`.

    Returns:
        The files, the page last.
    """
    rows = [{name: _writable(value) for name, value in row.items()} for row in result.rows]
    files = write_table(rows, out / "results")
    figure, caption = draw(result)
    picture = out / "figure.png"
    if figure is None:
        picture.unlink(missing_ok=True)
    else:
        files.append(save_png(figure, picture))
    drawn = picture if figure is not None else None
    notes = [] if any(path.suffix == ".parquet" for path in files) else [PARQUET_HINT]
    return [*files, write(_page(result, drawn, caption, notes, command, environment), out / "index.html")]


def _writable(value: Value) -> Value:
    """Return a whole number beyond all floats as a text: a column of Parquet may have to make floats of it."""
    return str(value) if isinstance(value, int) and value.bit_length() > sys.float_info.max_exp else value


def _page(
    result: SweepResult,
    picture: Path | None,
    caption: str,
    notes: Sequence[str],
    command: str,
    environment: Environment,
) -> Page:
    failed = result.failed
    heads = [Headline(f"{len(result.outcomes) - len(failed)} of {len(result.outcomes)}", "cells finished")]
    if failed:
        heads.append(Headline(f"{len(failed)}", "failed; their tracebacks are below"))
    heads.append(Headline(seconds_in_words(sum(outcome.seconds for outcome in result.outcomes)), "of CPU time in all"))
    drawn = None if picture is None else Figure(embedded(picture, caption), caption, whole=True)
    sections = [Section("What came out", () if drawn else (caption,), drawn, _extremes(result))]
    sections += [_failure(outcome) for outcome in failed[:_MOST_FAILURES]]
    return Page(
        title=f"{len(result.outcomes)} cells of {result.study}",
        lead=_lead(result),
        command=command,
        headlines=tuple(heads),
        sections=(*sections, _table(result, notes)),
        facts=environment.facts(),
    )


def _lead(result: SweepResult) -> str:
    varied = ", ".join(f"`{name}`" for name in result.varied) or "nothing"
    first = result.outcomes[0].parameters
    shared = ", ".join(f"`{name} = {first[name]}`" for name in result.parameters if name not in result.varied)
    lead = f"Over {varied}" + (f", with {shared}" if shared else "") + "."
    if result.kept:
        lead += f" {result.kept} cells come from an earlier text of the file, as --keep asked."
    return lead


def _at(row: Mapping[str, Value], names: Sequence[str]) -> str:
    return ", ".join(f"{name} = {_shown(row.get(name))}" for name in names)


def _extremes(result: SweepResult) -> Table | None:
    """Return where each result is least and greatest."""
    rows, lines = result.rows, []
    for column in result.numbers:
        finite = [row for row in rows if _is_finite(row.get(column))]
        if not finite:
            continue
        least, most = (pick(finite, key=lambda row: row[column]) for pick in (min, max))  # type: ignore[arg-type, return-value]
        lost = sum(row.get(column) is not None for row in rows) - len(finite)
        lines.append(
            (
                column,
                _shown(least[column]),
                _at(least, result.varied),
                _shown(most[column]),
                _at(most, result.varied),
                str(lost),
            )
        )
    if not lines:
        return None
    columns = (
        Column("result", numeric=False),
        Column("least"),
        Column("at", numeric=False),
        Column("greatest"),
        Column("at", numeric=False),
        Column("cells not finite"),
    )
    return Table("Where each result is least and greatest", columns, tuple(lines))


def _is_finite(value: Value) -> bool:
    """Whether it is a finite number; whole ones may be beyond all floats."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _failure(outcome: Outcome) -> Section:
    attempts = len(outcome.tracebacks)
    text = f"{attempts} attempts." if attempts > 1 else ""
    cell = ", ".join(f"{name} = {value}" for name, value in outcome.parameters.items())
    return Section(f"Failed: {cell}", (text,) if text else (), code=outcome.traceback.strip())


def _table(result: SweepResult, notes: Sequence[str]) -> Section:
    rows = result.rows
    names = columns_of(rows)
    numeric = [all(not isinstance(row.get(name), str) for row in rows) for name in names]
    cut = "" if len(rows) <= _MOST_ROWS else f"; the first {_MOST_ROWS}, all are in `results.csv`"
    table = Table(
        f"{len(rows):,} cells{cut}",
        tuple(Column(name, numeric=n) for name, n in zip(names, numeric, strict=True)),
        tuple(tuple(_shown(row.get(name)) for name in names) for row in rows[:_MOST_ROWS]),
    )
    text = ["In full in `results.csv`, and with arrays in `sweep.sqlite`."]
    if result.arrays:
        text.append(f"Arrays, in `sweep.sqlite` alone: {', '.join(result.arrays)}.")
    text += [f"{note[0].upper()}{note[1:]}." for note in notes]
    return Section("All cells", tuple(text), table=table)


def _shown(value: Value) -> str:
    return "" if value is None else label(value)
