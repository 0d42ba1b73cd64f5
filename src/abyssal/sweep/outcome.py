"""What came of a cell: its results, or what went wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.sweep.store import canonical

__all__ = ["Cell", "Failure", "Outcome", "SweepError", "error_of"]

Cell = Mapping[str, Any]
_HEADER = "Traceback (most recent call last):"
_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
_LONGEST = 400


@dataclass(frozen=True)
class Outcome:
    """The result of one cell.

    Attributes:
        parameters: the cell.
        values: its results by name; empty where it failed.
        seconds: CPU time of computing it.
        stored: whether it came out of the store.
        traceback: of the failure; empty where there was none, or a later attempt succeeded.
        tracebacks: of all attempts that failed in this call, in order.
    """

    parameters: Cell
    values: Mapping[str, Any]
    seconds: float = 0.0
    stored: bool = False
    traceback: str = ""
    tracebacks: tuple[str, ...] = ()

    @property
    def error(self) -> str:
        """Type and message of the exception, in one line; empty where there was none."""
        return error_of(self.traceback)


class Failure(Outcome):
    """The outcome of a cell that raised an exception: it has a traceback, and no values."""

    def __str__(self) -> str:
        return f"{canonical(self.parameters)}: {self.error}"


class SweepError(RuntimeError):
    """Some cells of a sweep failed; all others are finished, and in the store where there is one.

    Attributes:
        failures: the cells that failed.
        outcomes: one for each cell of the sweep, in order.
    """

    def __init__(self, failures: Sequence[Failure], outcomes: Sequence[Outcome]) -> None:
        self.failures, self.outcomes = list(failures), list(outcomes)
        shown = "; ".join(str(failure) for failure in self.failures[:3])
        more = f"; and {len(self.failures) - 3} more (see .failures)" if len(self.failures) > 3 else ""
        super().__init__(f"{len(self.failures)} of {len(self.outcomes)} cells failed: {shown}{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        return SweepError, (self.failures, self.outcomes)


def error_of(traceback: str) -> str:
    """Return type and message of the exception that a traceback ends with, the lines of its message joined by " / ".

    Args:
        traceback: as `traceback.format_exc` writes it, chained exceptions too; anything else is taken as a message.
    """
    lines = traceback.strip().splitlines()
    chained = max((n for n, line in enumerate(lines) if line in _CHAINED), default=0)
    # A message may hold a traceback, such as one of another process: the first after the last link is the exception's.
    header = next((n for n in range(chained, len(lines)) if lines[n] == _HEADER), None)
    if header is not None:
        start = next((n for n in range(header + 1, len(lines)) if not lines[n].startswith(" ")), len(lines) - 1)
        message = lines[start:]
    else:  # of a group, the exceptions in which are indented
        message = [line[4:] for line in lines if re.match(r"  \| \S", line)][:1] or lines
    text = " / ".join(line.strip() for line in message if line.strip())
    text = re.sub(r"^_abyssal_sweep_\w+\.", "", text)  # the name that a user's file has as a module
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
