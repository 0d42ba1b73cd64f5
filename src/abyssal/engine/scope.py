"""What lives for one backward pass: which cells it visited, and what was measured of them.

A verdict that raises does so from within `.backward()`, before any optimiser step.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from abyssal.certify.errors import Errors, Extremes
from abyssal.certify.recorder import CallRecord, Figures
from abyssal.codec.sample import Sample


class Remembering(Protocol):
    """What remembers something for one backward pass."""

    task: int
    """The backward pass that it remembers something of; -1 for none."""
    record: CallRecord

    def forget(self) -> None:
        """Drop what a backward pass left behind."""


class BackwardPass:
    """One run of the autograd engine, told by its task id; -1 where a tensor is unpacked outside of one."""

    def __init__(self, task: int) -> None:
        """Begin, and ask the engine to be told of the end."""
        self.task = task
        self._visited: list[weakref.ref[Remembering]] = []
        self._errors = Errors()

    @classmethod
    def current(cls) -> BackwardPass:
        """Return the one that this thread is in."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return cls(-1)
        present = None if _local.backward is None else _local.backward()
        if present is None or present.task != task:
            present = cls(task)
            # The engine owns it, through the callback: if the backward pass fails, it goes with it.
            _local.backward = weakref.ref(present)
            torch.autograd.Variable._execution_engine.queue_callback(present.end)
        return present

    def visit(self, cell: Remembering) -> None:
        """Note that `cell` is in use, so that what it remembers is cleared at the end."""
        cell.record.visit()
        if self.task != -1:
            self._visited.append(weakref.ref(cell))

    def measure(
        self, record: CallRecord, what: str, sample: Sample | None, state: Tensor, anchor: Extremes | None = None
    ) -> None:
        """Compare a state with a sample of the true one, as `Errors.measure` does; read at the end."""
        self._errors.measure(record, what, sample, state, anchor)
        if self.task == -1:
            self.end()

    def end(self) -> None:
        """Clear what was remembered, read all measurements and let each model's session judge its own.

        Raises:
            DriftError: see `Session.judge`.
        """
        visited, self._visited = self._visited, []
        for reference in visited:
            if (cell := reference()) is not None and cell.task == self.task:
                cell.forget()
        by_judge: dict[int, list[Figures]] = {}
        for figures in self._errors.read():
            by_judge.setdefault(id(figures.record.judge), []).append(figures)
        for found in by_judge.values():
            found[0].record.judge.judge(found)


class _Local(threading.local):
    backward: weakref.ref[BackwardPass] | None = None


_local = _Local()
