"""Exact peak of live tensor bytes.

On the CPU every allocation and every release that torch's allocator makes is recorded (the profiler's
memory events, signed bytes), put in order of time and summed; the peak of the running sum is the peak.
Nothing is sampled and nothing is inferred from the process: temporaries inside one operator count,
malloc's caching and page sizes do not. On CUDA torch's caching allocator keeps the same figure itself.

What this does not see, on the CPU:

- Memory that was allocated while no tracker was open anywhere: its *release* inside a tracker is not an
  event (torch then says "Memory block of unknown size" once). So open the tracker before the forward pass,
  and nest a second one for a phase of it; the older memory is then known.
- Threads that user code starts: the profiler follows the calling thread and the autograd engine working
  for it.
- Memory that other libraries allocate behind torch's back (oneDNN and MKL scratch buffers, NumPy).

Cost: the profiler's first start takes about a second, and an operator under it 2 to 4 times as long (a
training step of 1,024 small blocks, 110,000 events: 0.3 s plain, 1.0 s tracked). Not for timing.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.autograd.profiler import profile

__all__ = ["Usage", "peak_bytes", "reset_rss_peak", "rss_peak", "track"]


class Usage:
    """Live tensor bytes over the span of one :func:`track`, relative to the level at its entry.

    Attributes:
        peak: highest level reached, in bytes; 0 if the level never rose.
        end: level at exit, in bytes: what stayed alive; negative if more was released than allocated.

    Both raise ``RuntimeError`` while the tracker is still open.
    """

    def __init__(self) -> None:
        self._peak = 0
        self._level = 0
        self._open = True

    @property
    def peak(self) -> int:
        """Highest level above the level at entry, in bytes."""
        return self._closed(self._peak)

    @property
    def end(self) -> int:
        """Level at exit above the level at entry, in bytes."""
        return self._closed(self._level)

    def _closed(self, value: int) -> int:
        if self._open:
            raise RuntimeError("This memory tracker is still open: read .peak and .end after its `with` block.")
        return value

    def _add(self, peak: int, end: int) -> None:
        """Append a span whose own highest level was ``peak`` and whose last level was ``end``."""
        self._peak = max(self._peak, self._level + peak)
        self._level += end

    def __repr__(self) -> str:
        if self._open:
            return "Usage(open)"
        return f"Usage(peak={self._peak:,} bytes, end={self._level:+,} bytes)"


class _Meter(Protocol):
    """Measures one span at a time: ``start``, then ``stop`` giving (peak, end) relative to the start."""

    def start(self) -> None: ...

    def stop(self) -> tuple[int, int]: ...


class AllocatorEvents:
    """Spans of CPU memory, by summing the allocator's events."""

    def __init__(self) -> None:
        self._profile: profile | None = None

    def start(self) -> None:
        if torch._C._autograd._profiler_enabled() or torch.autograd.profiler._is_profiler_enabled:
            raise RuntimeError(
                "abyssal.memory cannot measure CPU memory while a torch profiler is running: both "
                "need the same event stream. Stop the profiler first, or read the peak from it."
            )
        session = profile(profile_memory=True, use_kineto=True)
        with _quiet_kineto():
            session.__enter__()
        self._profile = session

    def stop(self) -> tuple[int, int]:
        """End the span; return its peak and its end level, in bytes above the level at its start."""
        return self.stop_split("")[0]

    def stop_split(self, mark: str) -> list[tuple[int, int]]:
        """The same for each part of the span between events whose names begin with `mark`, all above its start."""
        session, self._profile = self._profile, None
        assert session is not None
        with _quiet_kineto():
            session.__exit__(None, None, None)
        if session.kineto_results is None:
            raise RuntimeError("The profiler that abyssal.memory started was stopped by somebody else.")
        # Lists of numbers only: tensors made here would be counted in an enclosing tracker's next span.
        events: list[Any] = [
            event
            for event in session.kineto_results.events()
            if event.name() == "[memory]" or (mark and event.name().startswith(mark))
        ]
        events.sort(key=lambda event: event.start_ns())
        readings, peak, level = [], 0, 0
        for event in events:
            if event.name() != "[memory]":
                readings.append((peak, level))
                peak = level
            elif event.device_type() == torch._C._autograd.DeviceType.CPU:
                level += event.nbytes()
                peak = max(peak, level)
        return [*readings, (peak, level)]


class _CachingAllocator:
    """Spans of memory on one CUDA device, by the counters of torch's caching allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entry = 0

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._entry = torch.cuda.memory_allocated(self._device)

    def stop(self) -> tuple[int, int]:
        peak = torch.cuda.max_memory_allocated(self._device)
        end = torch.cuda.memory_allocated(self._device)
        return peak - self._entry, end - self._entry


class _Ledger:
    """The open trackers of this process, by device.

    A nested tracker ends the enclosing one's span and begins a new one, so one event stream serves all, and
    an inner result is ready at once. Invariants: while a device has open trackers its meter is running, and
    all open trackers belong to one thread (Kineto, like CUDA's peak counter, is one per process; two
    sessions at once crash it).
    """

    def __init__(self) -> None:
        self.open: dict[torch.device, tuple[_Meter, list[Usage]]] = {}
        self._owner: int | None = None
        self._lock = threading.Lock()

    def _claim(self) -> None:
        with self._lock:
            if self._owner not in (None, threading.get_ident()):
                raise RuntimeError(
                    "abyssal.memory: another thread of this process has an open tracker, and torch has one "
                    "stream of memory events per process. Measure one thread at a time."
                )
            self._owner = threading.get_ident()

    def _release_claim(self) -> None:
        if not self.open:
            self._owner = None

    def enter(self, device: torch.device, usage: Usage) -> None:
        self._claim()
        try:
            meter, usages = self.open.get(device) or (_meter(device), [])
            if usages:
                self._close_span(meter, usages)
            else:
                gc.collect()  # what earlier code left behind must not be released during the measurement
            meter.start()
            usages.append(usage)
            self.open[device] = (meter, usages)
        finally:
            self._release_claim()

    def leave(self, device: torch.device, usage: Usage) -> None:
        meter, usages = self.open[device]
        try:
            self._close_span(meter, usages)
        finally:
            # By identity: trackers held in an ExitStack may leave in another order than they came.
            usages[:] = [other for other in usages if other is not usage]
            usage._open = False
            if not usages:
                del self.open[device]
            self._release_claim()
        if usages:
            meter.start()

    @staticmethod
    def _close_span(meter: _Meter, usages: list[Usage]) -> None:
        peak, end = meter.stop()
        for usage in usages:
            usage._add(peak, end)


_LEDGER = _Ledger()


@contextmanager
def track(device: torch.device | str = "cpu") -> Iterator[Usage]:
    """Measure the peak of live tensor bytes of the code inside the ``with`` block.

    Trackers nest: open one around a whole step and others around its phases. Reference cycles are collected
    before the outermost begins. See the module's header for what is not seen.

    Args:
        device: whose memory: ``"cpu"`` or a CUDA device. On CUDA the device's peak counter is reset.

    Yields:
        The :class:`Usage`, readable after the block.

    Raises:
        RuntimeError: if another thread has an open tracker; on the CPU, if a torch profiler is running.
        ValueError: for a device that is neither CPU nor CUDA.

    Example:
        >>> with track() as memory:
        ...     kept = torch.empty(1000)
        ...     del kept
        >>> memory.peak, memory.end
        (4000, 0)
    """
    where = _resolve(device)
    usage = Usage()
    _LEDGER.enter(where, usage)
    try:
        yield usage
    finally:
        _LEDGER.leave(where, usage)


def peak_bytes(fn: Callable[..., Any], *args: Any, device: torch.device | str = "cpu", **kwargs: Any) -> int:
    """Peak of live tensor bytes during ``fn(*args, **kwargs)``, above the level before it.

    Args:
        fn: what to measure; its result is still alive when the measurement ends, then dropped.
        args: positional arguments to ``fn``.
        device: whose memory, as in :func:`track`.
        kwargs: keyword arguments to ``fn``.

    Returns:
        The peak in bytes.
    """
    with track(device) as usage:
        result = fn(*args, **kwargs)
    del result
    return usage.peak


def rss_peak() -> int | None:
    """Highest resident set size of this process so far, in bytes (Linux's ``VmHWM``); None elsewhere.

    A cross-check only: it holds the interpreter, the code and malloc's cache as well. Run with
    ``MALLOC_MMAP_THRESHOLD_=65536`` in the environment, or glibc keeps freed tensors resident and the
    figure is up to ten times too high.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def reset_rss_peak() -> bool:
    """Set :func:`rss_peak` back to the present resident set size; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resolve(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    raise ValueError(f"abyssal.memory measures 'cpu' and 'cuda' devices, not {str(device)!r}.")


def _meter(device: torch.device) -> _Meter:
    return AllocatorEvents() if device.type == "cpu" else _CachingAllocator(device)


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep Kineto from printing two lines to stderr for each session; it reads its level when it starts."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        os.environ.pop(name, None)
