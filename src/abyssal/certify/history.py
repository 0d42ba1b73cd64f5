"""The certificate's figures over the steps of a training run."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from abyssal.certify.recorder import CallRecord

LONGEST = 1000  # steps that are remembered: 4 MB at 1,000 blocks


class Step(NamedTuple):
    """What one backward pass found.

    Attributes:
        number: of the forward pass, from 0, counted since `abyssal.reconstruct`.
        error: the largest relative error of a restored state; None if none was measured.
        stored_bytes: kept for the stream in its forward pass.
        drifted: names of the blocks that drifted beyond the tolerance.
        errors: by block, where measured.
    """

    number: int
    error: float | None
    stored_bytes: int
    drifted: tuple[str, ...]
    errors: dict[str, float]


class _Entry(NamedTuple):
    number: int
    stored_bytes: int
    drifted: tuple[str, ...]
    errors: array[float]  # in the order of the names; NaN where none was measured, infinity where it was undefined


class History:
    """The last `LONGEST` steps, oldest first."""

    def __init__(self, names: Sequence[str]) -> None:
        """Begin with none, for the blocks of these names."""
        self._names = {name: i for i, name in enumerate(names)}
        self._entries: deque[_Entry] = deque(maxlen=LONGEST)

    def enter(self, number: int, records: Sequence[CallRecord]) -> None:
        """Enter a forward pass after a backward pass through it; a second backward pass replaces the entry."""
        errors = array("f", [math.nan]) * len(self._names)
        drifted: dict[str, None] = {}
        for record in records:
            if record.drifted:
                drifted[record.block.name] = None
            if (error := record.error) is not None and (place := self._names.get(record.block.name)) is not None:
                known = errors[place]
                error = math.inf if math.isnan(error) else error
                errors[place] = error if math.isnan(known) else max(known, error)
        if self._entries and self._entries[-1].number == number:
            self._entries.pop()
        self._entries.append(_Entry(number, sum(r.stored_bytes for r in records), tuple(drifted), errors))

    def __len__(self) -> int:
        """How many steps are remembered."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Step]:
        """Go through the steps, oldest first."""
        for entry in self._entries:
            errors = {name: entry.errors[i] for name, i in self._names.items() if not math.isnan(entry.errors[i])}
            yield Step(entry.number, max(errors.values(), default=None), entry.stored_bytes, entry.drifted, errors)
