"""One backward pass: which cells it visited, and what was measured, read once at its end.

Reading a measurement on an accelerator waits for it. So each figure stays a 0-d tensor until the end of the
backward pass, where all are read at once; a verdict that raises does so from within `.backward()`, before any
optimiser step.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from abyssal.certify.sample import Sample, has_data, norms

if TYPE_CHECKING:
    from abyssal.engine.cell import Cell
    from abyssal.engine.session import CallRecord


Extremes = tuple[Tensor, Tensor]  # smallest and largest value, 0-d


class _Measurement(NamedTuple):
    """What was compared at one restored state, not read yet."""

    record: CallRecord
    # "input" (restored against true), "output" (recomputed from the true input) or "image" (from the restored one)
    what: str
    sampled: int  # elements
    dtype: torch.dtype
    whole: Extremes | None  # of the restored state
    anchor: Extremes | None  # of the exact state that it was restored from


class _Pending(NamedTuple):
    """Samples that are still to be reduced to their norms."""

    place: int  # among the measurements
    true: Sample
    found: Tensor


# How many pairs of samples wait to be reduced together: enough to be quick, few enough to take no memory.
_BATCH = 32


class Figures(NamedTuple):
    """A measurement that was read."""

    record: CallRecord
    what: str  # "input", "output" or "image"
    error: float | None  # relative error; None if this call was not sampled
    dtype: torch.dtype  # of what was compared
    finite: bool  # whether the whole restored state is
    anchor_is_finite: bool  # whether what it was restored from is: else the network itself overflowed


class BackwardPass:
    """One run of the autograd engine, told by its task id; -1 where a tensor is unpacked outside of one."""

    def __init__(self, task: int) -> None:
        """Begin, and ask the engine to be told of the end."""
        self.task = task
        self._cells: list[weakref.ref[Cell]] = []
        self._measured: list[_Measurement] = []
        self._pending: list[_Pending] = []
        self._norms: list[tuple[list[int], Tensor]] = []  # places, and [places, 2] of error and true norm

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

    def visit(self, cell: Cell) -> None:
        """Note that `cell` is in use, so that what it remembers is cleared at the end."""
        cell.record.visit()
        if self.task != -1:
            self._cells.append(weakref.ref(cell))

    def measure(
        self, record: CallRecord, what: str, sample: Sample | None, state: Tensor, anchor: Extremes | None = None
    ) -> None:
        """Compare a restored input or recomputed output with the sample of the true one; read at the end.

        Args:
            record: whose call it was.
            what: "input", "output" or "image"; see _Measurement.
            sample: of the true tensor; None where the call was not sampled.
            state: what to compare with it. [*stream]
            anchor: extremes of the exact state that a restored one comes from.
        """
        if not has_data(state):
            return
        whole = extremes(state) if what == "input" else None
        if sample is not None:
            self._pending.append(_Pending(len(self._measured), sample, sample.take(state)))
        count = sample.values.numel() if sample is not None else 0
        self._measured.append(_Measurement(record, what, count, state.dtype, whole, anchor))
        if len(self._pending) >= _BATCH:
            self._reduce()
        if self.task == -1:
            self.end()

    def _reduce(self) -> None:
        pending, self._pending = self._pending, []
        for indices, pairs in norms([p.true for p in pending], [p.found for p in pending]):
            self._norms.append(([pending[i].place for i in indices], pairs))

    def end(self) -> None:
        """Clear the cells' caches, read all measurements and let each model's session judge its own.

        Raises:
            DriftError: see `Session.judge`.
        """
        for reference in self._cells:
            if (cell := reference()) is not None and cell._task == self.task:
                cell.forget()
        self._reduce()
        measured, self._measured, self._cells = self._measured, [], []
        reduced, self._norms = self._norms, []
        if not measured:
            return
        by_session: dict[int, list[Figures]] = {}
        for figures in _read(measured, reduced):
            by_session.setdefault(id(figures.record.session), []).append(figures)
        for found in by_session.values():
            found[0].record.session.judge(found)


class _Local(threading.local):
    backward: weakref.ref[BackwardPass] | None = None


_local = _Local()


def extremes(state: Tensor) -> Extremes | None:
    """Return the smallest and the largest value as 0-d tensors, NaN if there is one; None for an empty tensor."""
    if state.numel() == 0 or not has_data(state):
        return None
    state = state.detach()
    low, high = torch.aminmax(torch.view_as_real(state) if state.is_complex() else state)  # far quicker than a norm
    return low, high


def _read(measured: list[_Measurement], reduced: list[tuple[list[int], Tensor]]) -> list[Figures]:
    norms_at: dict[int, list[float]] = {}
    for places, pairs in reduced:
        norms_at.update(zip(places, pairs.tolist(), strict=True))
    known = {id(e): e for m in measured for e in (m.whole, m.anchor) if e is not None}  # chains share their anchor
    flat = _values([extreme for e in known.values() for extreme in e])
    bounds = dict(zip(known, zip(flat[::2], flat[1::2], strict=True), strict=True))
    figures = []
    for i, m in enumerate(measured):
        whole, anchor = bounds.get(id(m.whole)), bounds.get(id(m.anchor))
        error = None
        if i in norms_at:
            wrong, size = norms_at[i]
            if size == 0.0 and anchor is not None:  # a state of zeros: relative to the one it was restored from
                size = max(map(abs, anchor)) * math.sqrt(m.sampled)
            error = 0.0 if wrong == 0.0 else wrong / size if size > 0.0 else math.inf
        figures.append(Figures(m.record, m.what, error, m.dtype, _is_finite(whole), _is_finite(anchor)))
    return figures


def _is_finite(bounds: tuple[float, float] | None) -> bool:
    return bounds is None or all(map(math.isfinite, bounds))


def _values(tensors: list[Tensor]) -> list[Any]:
    """Read many small tensors of one shape, those of one type and device at once."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(i)
    values: list[Any] = [None] * len(tensors)
    for indices in by_kind.values():
        for i, value in zip(indices, torch.stack([tensors[i] for i in indices]).tolist(), strict=True):
            values[i] = value
    return values
