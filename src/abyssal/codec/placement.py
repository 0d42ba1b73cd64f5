"""Tensors parked in host memory until the backward pass wants them.

On CUDA the copies run on a stream of their own, to and from pinned memory, beside the computation: parking does not
wait, and fetching one tensor starts the copy of the one that was parked before it, which the backward pass wants
next. On other devices the copies are plain ones. What is on the host already stays where it is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Parked:
    """One tensor, parked on a device; `fetch` gives it back on its own, as often as asked.

    Args:
        tensor: what to park. Nothing else may write to it from now on.
        device: where to park it: "cpu".
    """

    __slots__ = ("__weakref__", "_arriving", "_before", "_device", "_parked", "_there")

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        """Start the copy."""
        self._device = tensor.device
        self._before: weakref.ref[Parked] | None = _local.last
        self._there: torch.cuda.Event | None = None  # the copy to the host has been made
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None  # on its way back
        _local.last = weakref.ref(self)
        if tensor.device == device or tensor.device.type != "cuda":
            self._parked = tensor.to(device)
            return
        side = _side_stream(tensor.device)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        self._parked = torch.empty_like(tensor, device=device, pin_memory=True)
        with torch.cuda.stream(side):
            self._parked.copy_(tensor, non_blocking=True)
            self._there = side.record_event()
        tensor.record_stream(side)  # its memory is not to be used again before it was read

    @property
    def nbytes(self) -> int:
        """Bytes parked."""
        return self._parked.nbytes

    def prefetch(self) -> None:
        """Start the copy back, if that takes time, and do not wait for it."""
        if self._there is None or self._arriving is not None:
            return
        side = _side_stream(self._device)
        with torch.cuda.stream(side):
            side.wait_event(self._there)
            back = torch.empty_like(self._parked, device=self._device, pin_memory=False)
            back.copy_(self._parked, non_blocking=True)
            self._arriving = (back, side.record_event())

    def fetch(self) -> Tensor:
        """Return the tensor on its own device, and start to fetch the one that was parked before it."""
        if self._there is None:
            found = self._parked.to(self._device)
        else:
            self.prefetch()
            assert self._arriving is not None
            (found, arrived), self._arriving = self._arriving, None
            present = torch.cuda.current_stream(self._device)
            present.wait_event(arrived)
            found.record_stream(present)
        before = None if self._before is None else self._before()
        if before is not None:
            before.prefetch()
        return found


class _Local(threading.local):
    last: weakref.ref[Parked] | None = None
    kind: type[Parked] = Parked


def park(tensor: Tensor, device: str) -> Parked:
    """Park a tensor on a device ("cpu"). Nothing else may write to it from now on."""
    return _local.kind(tensor, torch.device(device))


@contextmanager
def parking_as(kind: type[Parked]) -> Iterator[None]:
    """Have what is parked meanwhile, in this thread, be of another kind: one that simulates a device, for example."""
    before, _local.kind = _local.kind, kind
    try:
        yield
    finally:
        _local.kind = before


_local = _Local()
_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
