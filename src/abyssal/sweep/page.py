"""A sweep of a user's own function: its cells, the table of what came out, a picture, a page."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from abyssal.papers.page import spent
from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, write
from abyssal.report.picture import embedded, save_png
from abyssal.sweep import Cell, FileFunction, Outcome, Store, SweepError, run
from abyssal.sweep.engine import Progress
from abyssal.sweep.picture import draw, label
from abyssal.util.environment import Environment
from abyssal.util.files import PARQUET_HINT, Value, columns_of, write_table

__all__ = ["SweepResult", "outdated", "save", "sweep"]

_MOST_ROWS = 200
_MOST_FAILURES = 5
_SECONDS, _ERROR = "cpu_seconds", "error"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        study: file and function.
        outcomes: one for each cell, in order.
        kept: cells whose results come from an earlier text of the file.
    """

    study: str
    outcomes: tuple[Outcome, ...]
    kept: int = 0

    @cached_property
    def failed(self) -> list[Outcome]:
        """The cells that failed."""
        return [outcome for outcome in self.outcomes if outcome.traceback]

    @cached_property
    def computed(self) -> int:
        """Cells computed now, and not taken from the store; failed ones do not count."""
        return sum(not outcome.stored and not outcome.traceback for outcome in self.outcomes)

    @cached_property
    def parameters(self) -> list[str]:
        """Names of all parameters, those that vary first."""
        names = columns_of([outcome.parameters for outcome in self.outcomes])
        return [*self.varied, *(name for name in names if name not in self.varied)]

    @cached_property
    def varied(self) -> list[str]:
        """Names of parameters with more than one value."""
        cells = [outcome.parameters for outcome in self.outcomes]
        return [name for name in columns_of(cells) if len({json.dumps(cell.get(name)) for cell in cells}) > 1]

    @cached_property
    def results(self) -> dict[str, str]:
        """The columns of results by their names: the same name, but where a parameter has it already."""
        taken = {*self.parameters, _SECONDS, _ERROR}
        names = dict.fromkeys(name for outcome in self.outcomes for name in outcome.values)
        return {name: f"result_{name}" if name in taken else name for name in names}

    @cached_property
    def arrays(self) -> list[str]:
        """Results that are arrays: in the store, and not in the table."""
        return list(
            dict.fromkeys(
                name
                for outcome in self.outcomes
                for name, value in outcome.values.items()
                if isinstance(value, np.ndarray)
            )
        )

    @cached_property
    def rows(self) -> list[dict[str, Value]]:
        """A row for each cell: parameters, results, CPU seconds, and what went wrong."""
        rows = []
        flat = {name: column for name, column in self.results.items() if name not in self.arrays}
        for outcome in self.outcomes:
            row = {name: _flat(outcome.parameters.get(name)) for name in self.parameters}
            row |= {column: _flat(outcome.values.get(name)) for name, column in flat.items()}
            row[_SECONDS] = outcome.seconds
            if self.failed:
                row[_ERROR] = outcome.error or None
            rows.append(row)
        return rows

    @cached_property
    def numbers(self) -> list[str]:
        """The columns of results that hold a number in some cell, and nothing but numbers."""
        rows = self.rows
        found = []
        for column in self.results.values():
            cells = [row.get(column) for row in rows if row.get(column) is not None]
            if cells and all(isinstance(cell, int | float) for cell in cells):
                found.append(column)
        return found


def _flat(value: Any) -> Value:
    """Return a value as one field of a table: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def outdated(function: FileFunction, cells: Sequence[Cell], store: Store) -> int:
    """Return how many cells the store holds from an earlier text of the file alone."""
    others = [version for version in store.versions(function.study) if version != function.version]
    return sum(
        not store.has(function.study, function.version, cell)
        and any(store.has(function.study, version, cell) for version in others)
        for cell in cells
    )


def sweep(
    function: FileFunction,
    cells: Sequence[Cell],
    store: Store,
    *,
    engine: str = "local",
    jobs: int | None = None,
    retries: int = 0,
    keep: bool = False,
    progress: Progress | None = None,
    finished: Callable[[Outcome], None] | None = None,
) -> SweepResult:
    """Compute the cells that the store does not hold yet.

    Args:
        function: of a file; its text is part of the key of a cell.
        cells: the parameters of each.
        store: where results are kept as they come.
        engine: see :func:`abyssal.sweep.run`.
        jobs: processes; None is one per core.
        retries: how often a failing cell is tried again.
        keep: take results that an earlier text of the file gave, the latest first.
        progress: called with the study's name, cells done and cells in all.
        finished: called with each outcome as it is there.
    """
    known: dict[int, Outcome] = {}
    if keep:
        others = [version for version in store.versions(function.study) if version != function.version]
        for i, cell in enumerate(cells):
            if not store.has(function.study, function.version, cell):
                records = (store.get(function.study, version, cell) for version in others)
                record = next((record for record in records if record is not None), None)
                if record is not None:
                    known[i] = Outcome(cell, record.values, record.seconds, stored=True)
    rest = [cell for i, cell in enumerate(cells) if i not in known]
    try:
        found = run(
            rest,
            function,
            study=function.study,
            version=function.version,
            store=store,
            engine=engine,
            jobs=jobs,
            retries=retries,
            progress=progress,
            finished=finished,
        )
    except SweepError as error:
        found = error.outcomes
    others_found = iter(found)
    outcomes = tuple(known[i] if i in known else next(others_found) for i in range(len(cells)))
    return SweepResult(function.study, outcomes, kept=len(known))


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
    heads.append(Headline(spent(sum(outcome.seconds for outcome in result.outcomes)), "of CPU time in all"))
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
