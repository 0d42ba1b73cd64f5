"""A sweep of a user's own function: its cells, and the table of what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from abyssal.sweep.engine import run
from abyssal.sweep.outcome import Cell, Outcome, SweepError
from abyssal.sweep.store import Store
from abyssal.sweep.user import FileFunction
from abyssal.util.files import Value, columns_of

__all__ = ["SweepResult", "outdated", "sweep"]

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
    return len(_earlier(function, cells, store))


def _earlier(function: FileFunction, cells: Sequence[Cell], store: Store) -> dict[int, Outcome]:
    """Return what the latest of the earlier texts gave, of each cell that the present one has not computed."""
    others = [version for version in store.versions(function.study) if version != function.version]
    found = {}
    for i, cell in enumerate(cells):
        if not store.has(function.study, function.version, cell):
            records = (store.get(function.study, version, cell) for version in others)
            record = next((record for record in records if record is not None), None)
            if record is not None:
                found[i] = Outcome(cell, record.values, record.seconds, stored=True)
    return found


def sweep(
    function: FileFunction, cells: Sequence[Cell], store: Store, *, keep: bool = False, **options: Any
) -> SweepResult:
    """Compute the cells that the store does not hold yet.

    Args:
        function: of a file; its text is part of the key of a cell.
        cells: the parameters of each.
        store: where results are kept as they come.
        keep: take results that an earlier text of the file gave, the latest first.
        **options: of :func:`abyssal.sweep.run`: engine, jobs, retries, and whom to tell.
    """
    known = _earlier(function, cells, store) if keep else {}
    rest = [cell for i, cell in enumerate(cells) if i not in known]
    try:
        found = run(rest, function, study=function.study, version=function.version, store=store, **options)
    except SweepError as error:
        found = error.outcomes
    others_found = iter(found)
    outcomes = tuple(known[i] if i in known else next(others_found) for i in range(len(cells)))
    return SweepResult(function.study, outcomes, kept=len(known))
