"""Progress of long work: bars on a terminal, lines in a log, nothing in a test.

Measuring code takes a `Reporter` and calls it with an `Event`; it neither prints nor knows who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["Event", "LiveProgress", "LogProgress", "Reporter", "progress_for", "silent"]


@dataclass(frozen=True)
class Event:
    """How far one phase of the work is.

    Attributes:
        phase: what is being done, the same text in all events of the phase.
        done: units finished.
        total: units in all.
        note: what the last unit showed, in a few words.
    """

    phase: str
    done: int
    total: int
    note: str = ""


Reporter = Callable[[Event], None]


def silent(event: Event) -> None:
    """Report nothing."""


class _Progress(Protocol):
    def __call__(self, event: Event) -> None: ...


class LiveProgress:
    """One bar per phase, redrawn in place; for terminals."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Move the phase's bar."""
        if event.phase not in self._tasks:
            self._tasks[event.phase] = self._progress.add_task(event.phase, total=event.total, note="")
        self._progress.update(self._tasks[event.phase], completed=event.done, total=event.total, note=event.note)


class LogProgress:
    """A line when a phase begins, at each quarter, and when it ends; for logs and pipes.

    Args:
        console: where the lines go.
        parts: into how many parts a phase is divided.
    """

    def __init__(self, console: Console, parts: int = 4) -> None:
        self._console = console
        self._parts = parts
        self._last: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        """Print a line if another part of the phase is done."""
        part = self._parts * event.done // max(1, event.total)
        if self._last.get(event.phase) == part:
            return
        self._last[event.phase] = part
        note = f"  {event.note}" if event.note else ""
        self._console.print(f"{event.phase}: {event.done}/{event.total}{note}", highlight=False, soft_wrap=True)


@contextmanager
def progress_for(console: Console) -> Iterator[_Progress]:
    """Give the reporter that suits the console: bars where it is a terminal, lines where it is not."""
    if not console.is_terminal:
        yield LogProgress(console)
        return
    wide = console.width >= 100
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=30 if wide else 10),
        TaskProgressColumn(),
        *([TimeElapsedColumn()] if wide else []),
        TextColumn("[dim]{task.fields[note]}"),
    ]
    with Progress(*columns, console=console) as progress:
        yield LiveProgress(progress)
