"""One backward pass: which cells it visited, and what was measured, read once at its end.

Reading a measurement on an accelerator waits for it. So each figure stays a 0-d tensor until the end of the
backward pass, where all are read at once; a verdict that raises does so from within `.backward()`, before any
optimiser step.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from abyssal.reconstruct.sample import Sample, norms

if TYPE_CHECKING:
    from abyssal.reconstruct.certificate import CallRecord
    from abyssal.reconstruct.tape import Cell


class _Measurement(NamedTuple):
    """What was compared at one restored state, not read yet."""

    record: CallRecord
    what: str  # "input" (restored against true) or "output" (recomputed against true)
    sampled: bool
    dtype: torch.dtype
    norms: Tensor | None  # [2], of the sampled error and of the sampled true values
    extremes: tuple[Tensor, Tensor] | None  # smallest and largest value of the whole restored state, 0-d


class _Pending(NamedTuple):
    """A measurement whose samples are still to be reduced to their norms."""

    place: int
    true: Tensor
    found: Tensor


# How many pairs of samples wait to be reduced together: enough to be quick, few enough to take no memory.
_BATCH = 64


class Figures(NamedTuple):
    """A measurement that was read."""

    record: CallRecord
    what: str  # "input" or "output"
    error: float | None  # relative error; None if this call was not sampled
    true_is_finite: bool  # as far as sampled
    dtype: torch.dtype  # of what was compared
    finite: bool  # whether the whole restored state is


class BackwardPass:
    """One run of the autograd engine, told by its task id; -1 where a tensor is unpacked outside of one."""

    def __init__(self, task: int) -> None:
        """Begin, and ask the engine to be told of the end."""
        self.task = task
        self._cells: list[weakref.ref[Cell]] = []
        self._measured: list[_Measurement] = []
        self._pending: list[_Pending] = []
        self._anchors: list[tuple[Tensor, Tensor]] = []

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
        cell.record.visited()
        if self.task != -1:
            self._cells.append(weakref.ref(cell))

    def anchored(self, record: CallRecord, state: Tensor) -> None:
        """Note an exact state that a chain is restored from: if it is not finite, restoration is not to blame."""
        if record.is_end:
            self._anchors.append(extremes(state))

    def measure(self, record: CallRecord, what: str, sample: Sample | None, state: Tensor) -> None:
        """Compare a restored input or recomputed output with the sample of the true one; read at the end.

        Args:
            record: whose call it was.
            what: "input" or "output".
            sample: of the true tensor; None where the call was not sampled.
            state: what to compare with it. [*stream]
        """
        whole = extremes(state) if what == "input" and state.numel() else None
        if sample is not None:
            self._pending.append(_Pending(len(self._measured), sample.values, sample.take(state)))
        self._measured.append(_Measurement(record, what, sample is not None, state.dtype, None, whole))
        if len(self._pending) >= _BATCH:
            self._reduce()
        if self.task == -1:
            self.end()

    def _reduce(self) -> None:
        pending, self._pending = self._pending, []
        for waiting, pair in zip(pending, norms([p.true for p in pending], [p.found for p in pending]), strict=True):
            self._measured[waiting.place] = self._measured[waiting.place]._replace(norms=pair)

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
    backward: weakref.ref[BackwardPass] | None = None


_local = _Local()


def extremes(state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value as 0-d tensors; NaN if there is one (20 times as fast as a norm)."""
    state = state.detach()
    low, high = torch.aminmax(torch.view_as_real(state) if state.is_complex() else state)
    return low, high


def _read(measured: list[_Measurement]) -> list[Figures]:
    pairs = iter(_read_pairs([m.norms for m in measured if m.norms is not None]))
    finite = iter(_are_finite([m.extremes for m in measured if m.extremes is not None]))
    figures = []
    for m in measured:
        error, size = next(pairs) if m.norms is not None else (0.0, 0.0)
        relative = 0.0 if error == 0.0 else error / size if size > 0.0 else math.inf
        whole = next(finite) if m.extremes is not None else True
        figures.append(Figures(m.record, m.what, relative if m.sampled else None, math.isfinite(size), m.dtype, whole))
    return figures


def _read_pairs(pairs: list[Tensor]) -> list[list[float]]:
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, pair in enumerate(pairs):
        by_kind.setdefault((pair.device, pair.dtype), []).append(i)
    values: list[list[float]] = [[] for _ in pairs]
    for indices in by_kind.values():
        for i, pair in zip(indices, torch.stack([pairs[i] for i in indices]).tolist(), strict=True):
            values[i] = pair
    return values


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
