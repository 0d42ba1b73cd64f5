"""Live tensor bytes, counted through storages, with the place in the model that allocated each of them.

A dispatch mode sees the results of every operator, in the forward and the backward pass alike. A storage met
for the first time is an allocation; a weak reference tells when it is freed. This works on fake tensors, which
have sizes and lifetimes but no memory, so that a step of a model can be accounted for that does not fit here.

What it does not see: temporaries within one operator (a convolution's reordered weights, a matrix product's
packed operand). They are small beside activations on most networks; docs/forecast.md has measured figures.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.models.patch import Patch

__all__ = ["HOST", "STREAM", "Allocation", "Labelled", "LiveBytes", "Places"]

STREAM = "stream"
HOST = "host"


class Allocation(NamedTuple):
    """One storage.

    Attributes:
        nbytes: its size.
        place: name of the module whose `forward`, or whose part of the backward pass, allocated it; `STREAM` for
            what is kept of a block's input, `HOST` for what stands for host memory.
        operator: what allocated it, e.g. "aten.mm.default".
        phase: "forward", "backward", or "recompute" for a forward pass within the backward pass.
    """

    nbytes: int
    place: str
    operator: str
    phase: str


class Places:
    """Which module of a model is at work: its `forward`, or the autograd nodes that its `forward` made."""

    def __init__(self) -> None:
        """Begin outside of any module."""
        self._stack: list[str] = []
        self.last = ("", "forward")  # where the last allocation was
        self._begins: list[int] = []  # sequence numbers of autograd nodes, ascending ...
        self._names: list[str] = []  # ... and the module that made the nodes from there on

    def clear(self) -> None:
        """Forget the graph of the step before."""
        self._begins.clear()
        self._names.clear()

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Run some code as that of module `name`."""
        self._stack.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._stack.pop()
            self._mark(self._stack[-1] if self._stack else "")

    def _mark(self, name: str) -> None:
        number = torch.autograd._get_sequence_nr()
        if self._begins and self._begins[-1] == number:
            self._names[-1] = name
        else:
            self._begins.append(number)
            self._names.append(name)

    def now(self) -> tuple[str, str]:
        """Return the module at work and the phase."""
        self.last = self._now()
        return self.last

    def _now(self) -> tuple[str, str]:
        node: Any = torch._C._current_autograd_node()  # None outside of the backward pass
        if self._stack:
            return self._stack[-1], "forward" if node is None else "recompute"
        if node is None:
            return "", "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        at = bisect_right(self._begins, node._sequence_nr()) - 1
        return self._names[at] if at >= 0 else "", "backward"


class Labelled(Patch):
    """A module's `forward` that tells `Places` when it is at work."""

    is_released = False  # it goes with the copy of the model that it stands in

    def __init__(self, module: nn.Module, name: str, places: Places) -> None:
        """Stand in for the `forward` of module `name`."""
        super().__init__(module, name)
        self._places = places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        with self._places.within(self.name):
            return self.inner(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that are allocated while the mode is on.

    Args:
        outside: tensors that are there already (parameters, gradients, the batch) and do not count.
        places: says which module is at work.

    Attributes:
        level, peak: live bytes now, and the most there were.
        host_level, host_peak: the same for what `places` says is on the host.
    """

    def __init__(self, outside: Iterable[Tensor], places: Places) -> None:
        super().__init__()
        self._places = places
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._counted: dict[int, Allocation] = {}
        self._events: list[tuple[int, Allocation]] = []  # +1 allocated, -1 freed
        self.level = self.peak = self.host_level = self.host_peak = 0
        self._peak_at = 0  # events up to the peak
        for tensor in outside:
            self._know(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator, and count the storages that are new in its result."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._count(out, func)
        elif isinstance(out, tuple | list):
            for one in out:
                if isinstance(one, Tensor):
                    self._count(one, func)
        return out

    def _know(self, storage: torch.UntypedStorage) -> int:
        key = id(storage)  # the object lives as long as the storage does
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
        return key

    def _count(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            counted = self._counted.get(key)
            if counted is not None and counted.nbytes != storage.nbytes():  # resized
                self._free(key)
                self._allocate(key, counted._replace(nbytes=storage.nbytes()))
            return
        place, phase = self._places.now()
        self._know(storage)
        self._allocate(key, Allocation(storage.nbytes(), place, str(func), phase))

    def _allocate(self, key: int, allocation: Allocation) -> None:
        self._counted[key] = allocation
        if allocation.place == HOST:
            self.host_level += allocation.nbytes
            self.host_peak = max(self.host_peak, self.host_level)
            return
        self._events.append((1, allocation))
        self.level += allocation.nbytes
        if self.level > self.peak:
            self.peak, self._peak_at = self.level, len(self._events)

    def _free(self, key: int) -> None:
        allocation = self._counted.pop(key)
        if allocation.place == HOST:
            self.host_level -= allocation.nbytes
            return
        self._events.append((-1, allocation))
        self.level -= allocation.nbytes

    def _forget(self, key: int) -> None:
        del self._known[key]
        if key in self._counted:
            self._free(key)

    def peak_without(self, is_left_out: Callable[[Allocation], bool]) -> int:
        """Return the highest level that the other allocations reach."""
        level = peak = 0
        for change, allocation in self._events:
            if not is_left_out(allocation):
                level += change * allocation.nbytes
                peak = max(peak, level)
        return peak

    def at_peak(self) -> list[Allocation]:
        """Return what was alive at the peak, in the order of its allocation; the last one made the peak."""
        alive: dict[int, list[Allocation]] = {}
        for change, allocation in self._events[: self._peak_at]:
            same = alive.setdefault(id(allocation), [])
            if change > 0:
                same.append(allocation)
            else:
                same.pop()
        return [allocation for same in alive.values() for allocation in same]
