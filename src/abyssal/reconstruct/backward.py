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

if TYPE_CHECKING:
    from abyssal.reconstruct.certificate import CallRecord
    from abyssal.reconstruct.tape import Cell


class Measurement(NamedTuple):
    """What was compared at one restored state, as 0-d tensors."""

    record: CallRecord
    what: str  # "input" (restored against true) or "output" (recomputed against true)
    error: Tensor  # norm of the sampled error
    true: Tensor  # norm of the sampled true values
    largest: Tensor  # largest magnitude of the whole restored state, or NaN


class BackwardPass:
    """One run of the autograd engine, told by its task id; -1 where a tensor is unpacked outside of one."""

    def __init__(self, task: int) -> None:
        """Begin, and ask the engine to be told of the end."""
        self.task = task
        self._cells: list[weakref.ref[Cell]] = []
        self._measured: list[Measurement] = []
        self._anchors: list[tuple[CallRecord, Tensor]] = []

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
            self._anchors.append((record, largest_magnitude(state)))

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
        figures = _read([t for m in measured for t in (m.error, m.true, m.largest)])
        finite = all(map(_is_finite, _read([largest for _, largest in anchors])))
        by_session: dict[int, list[tuple[Measurement, float, float, float]]] = {}
        for i, m in enumerate(measured):
            by_session.setdefault(id(m.record.session), []).append((m, *figures[3 * i : 3 * i + 3]))
        for found in by_session.values():
            found[0][0].record.session.judge(found, anchors_finite=finite)


class _Local(threading.local):
    backward: BackwardPass | None = None


_local = _Local()


def largest_magnitude(state: Tensor) -> Tensor:
    """Return the largest magnitude as a 0-d tensor; NaN if there is a NaN."""
    return torch.linalg.vector_norm(state.detach(), ord=float("inf"))


def _read(figures: list[Tensor]) -> list[float]:
    by_device: dict[torch.device, list[int]] = {}
    for i, figure in enumerate(figures):
        by_device.setdefault(figure.device, []).append(i)
    values = [0.0] * len(figures)
    for device, indices in by_device.items():
        kind = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([figures[i].to(kind) for i in indices])
        for i, value in zip(indices, stacked.tolist(), strict=True):
            values[i] = value
    return values


def _is_finite(value: float) -> bool:
    return value - value == 0.0
