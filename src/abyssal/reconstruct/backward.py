"""One backward pass: which cells it visited, and what was measured, read once at its end.

Reading a measurement on an accelerator waits for it. So each figure stays a 0-d tensor until the end of the
backward pass, where all are read at once; a verdict that raises does so from within `.backward()`, before any
optimiser step.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from abyssal.reconstruct.sample import norms

if TYPE_CHECKING:
    from abyssal.reconstruct.certificate import CallRecord
    from abyssal.reconstruct.tape import Cell


class Measurement(NamedTuple):
    """What is to be compared at one restored state."""

    record: CallRecord
    what: str  # "input" (restored against true), "output" (recomputed against true) or "unsampled"
    true: Tensor | None  # sampled true values
    found: Tensor | None  # the same elements of the restored or recomputed tensor
    extremes: tuple[Tensor, Tensor] | None  # smallest and largest value of the whole restored state, 0-d


class Figures(NamedTuple):
    """A measurement that was read."""

    record: CallRecord
    what: str
    error: float  # norm of the sampled error
    true: float  # norm of the sampled true values
    finite: bool  # whether the whole restored state is


class BackwardPass:
    """One run of the autograd engine, told by its task id; -1 where a tensor is unpacked outside of one."""

    def __init__(self, task: int) -> None:
        """Begin, and ask the engine to be told of the end."""
        self.task = task
        self._cells: list[weakref.ref[Cell]] = []
        self._measured: list[Measurement] = []
        self._anchors: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def current(cls) -> BackwardPass:
        """Return the one that this thread is in."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return cls(-1)
        present: BackwardPass | None = getattr(_local, "backward", None)
        if present is None or present.task != task:
            present = _local.backward = cls(task)
            torch.autograd.Variable._execution_engine.queue_callback(present.end)
        return present

    def visit(self, cell: Cell) -> None:
        """Note that `cell` is in use, so that what it remembers is cleared at the end."""
        cell.record.visited()
        if self.task != -1:
            self._cells.append(weakref.ref(cell))

    def anchored(self, record: CallRecord, state: Tensor) -> None:
        """Note an exact state that a chain is restored from: if it is not finite, restoration is not to blame."""
        if record.is_end:
            self._anchors.append(extremes(state))

    def add(self, measurement: Measurement) -> None:
        """Take a measurement, to be read at the end."""
        self._measured.append(measurement)
        if self.task == -1:
            self.end()

    def end(self) -> None:
        """Clear the cells' caches, read all measurements and let each model's session judge its own.

        Raises:
            DriftError: see `Session.judge`.
        """
        if getattr(_local, "backward", None) is self:
            _local.backward = None
        for reference in self._cells:
            if (cell := reference()) is not None and cell._task == self.task:
                cell.forget()
        measured, self._measured, self._cells = self._measured, [], []
        anchors, self._anchors = self._anchors, []
        if not measured:
            return
        anchors_finite = all(_are_finite(anchors))
        by_session: dict[int, list[Figures]] = {}
        for figures in _read(measured):
            by_session.setdefault(id(figures.record.session), []).append(figures)
        for found in by_session.values():
            found[0].record.session.judge(found, anchors_finite)


class _Local(threading.local):
    backward: BackwardPass | None = None


_local = _Local()


def extremes(state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value as 0-d tensors; NaN if there is one (20 times as fast as a norm)."""
    state = state.detach()
    low, high = torch.aminmax(torch.view_as_real(state) if state.is_complex() else state)
    return low, high


def _read(measured: list[Measurement]) -> list[Figures]:
    true = [m.true for m in measured if m.true is not None]
    pairs = iter(norms(true, [m.found for m in measured if m.found is not None]))
    finite = iter(_are_finite([m.extremes for m in measured if m.extremes is not None]))
    figures = []
    for m in measured:
        error, size = next(pairs) if m.true is not None else (0.0, 0.0)
        figures.append(Figures(m.record, m.what, error, size, next(finite) if m.extremes is not None else True))
    return figures


def _are_finite(pairs: list[tuple[Tensor, Tensor]]) -> list[bool]:
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (low, _) in enumerate(pairs):
        by_kind.setdefault((low.device, low.dtype), []).append(i)
    finite = [True] * len(pairs)
    for indices in by_kind.values():
        stacked = torch.stack([extreme for i in indices for extreme in pairs[i]]).view(-1, 2)
        for i, value in zip(indices, stacked.isfinite().all(dim=1).tolist(), strict=True):
            finite[i] = value
    return finite
