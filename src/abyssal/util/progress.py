"""Progress of long work: bars on a terminal, lines in a log, nothing in a test.

Measuring code takes a `Progress` and calls it; it neither prints nor knows who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # rich takes a tenth of a second to import
    from rich import progress as bars
    from rich.console import Console

__all__ = ["LiveProgress", "LogProgress", "NotedProgress", "Progress", "progress_for", "silent"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done (the same text for a whole phase), units finished, and units in all."""


class NotedProgress(Protocol):
    """A `Progress` that also takes what the last unit showed, in a few words."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Say how far a phase is."""


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""


class LiveProgress:
    """One bar per phase, redrawn in place; for terminals."""

    def __init__(self, progress: bars.Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, bars.TaskID] = {}

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Move the phase's bar."""
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total, note="")
        self._progress.update(self._tasks[phase], completed=done, total=total, note=note)


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

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Print a line if another part of the phase is done."""
        part = self._parts * done // max(1, total)
        if self._last.get(phase) == part:
            return
        self._last[phase] = part
        note = f"  {note}" if note else ""
        self._console.print(f"{phase}: {done}/{total}{note}", highlight=False, soft_wrap=True)


@contextmanager
def progress_for(console: Console) -> Iterator[NotedProgress]:
    """Give the progress that suits the console: bars where it is a terminal, lines where it is not."""
    if not console.is_terminal:
        yield LogProgress(console)
        return
    from rich import progress as bars

    wide = console.width >= 100
    columns = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=30 if wide else 10),
        bars.TaskProgressColumn(),
        *([bars.TimeElapsedColumn()] if wide else []),
        bars.TextColumn("[dim]{task.fields[note]}"),
    ]
    with bars.Progress(*columns, console=console) as progress:
        yield LiveProgress(progress)
