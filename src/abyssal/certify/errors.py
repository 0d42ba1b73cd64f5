"""Errors of one backward pass, measured where a state is restored and read once at the end.

Reading a measurement on an accelerator waits for it. So each figure stays a 0-d tensor until the end of the backward
pass, where all are read at once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abyssal.certify.recorder import CallRecord, Extremes, Figures
from abyssal.codec.sample import Sample, has_data, norms


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


class Errors:
    """What was compared so far, not read yet."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._measured: list[_Measurement] = []
        self._pending: list[_Pending] = []
        self._norms: list[tuple[list[int], Tensor]] = []  # places, and [places, 2] of error and true norm

    def measure(
        self, record: CallRecord, what: str, sample: Sample | None, state: Tensor, anchor: Extremes | None = None
    ) -> None:
        """Compare a restored input or recomputed output with the sample of the true one.

        Args:
            record: whose call it was.
            what: "input", "output" or "image"; see _Measurement.
            sample: of the true tensor; None where the call was not sampled.
            state: what to compare with it. [*stream]
            anchor: extremes of the exact state that a restored one comes from.
        """
        if not has_data(state):
            return
        whole = _extremes(state) if what == "input" else None
        if sample is not None:
            self._pending.append(_Pending(len(self._measured), sample, sample.take(state)))
        count = sample.values.numel() if sample is not None else 0
        self._measured.append(_Measurement(record, what, count, state.dtype, whole, anchor))
        if len(self._pending) >= _BATCH:
            self._reduce()

    def _reduce(self) -> None:
        pending, self._pending = self._pending, []
        for indices, pairs in norms([p.true for p in pending], [p.found for p in pending]):
            self._norms.append(([pending[i].place for i in indices], pairs))

    def read(self) -> list[Figures]:
        """Read all of them, and begin anew."""
        self._reduce()
        measured, self._measured = self._measured, []
        reduced, self._norms = self._norms, []
        return _read(measured, reduced) if measured else []


def extremes(state: Tensor) -> Extremes | None:
    """Return the smallest and the largest value as 0-d tensors, NaN if there is one; None for an empty tensor."""
    return _extremes(state) if has_data(state) else None


def _extremes(state: Tensor) -> Extremes | None:
    if state.numel() == 0:
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
