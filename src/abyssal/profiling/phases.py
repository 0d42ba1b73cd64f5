"""Memory of a training step, split where its blocks begin and end; and its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.utils import _pytree as pytree

from abyssal.profiling.track import AllocatorEvents

__all__ = ["Phase", "Phases", "Usage", "needing", "now"]


def now(device: torch.device) -> float:
    """Return the time in seconds, after an accelerator has finished."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def needing(output: Any) -> list[Tensor]:
    """Return the tensors of a block's output that need gradients, each once."""
    tensors = {id(t): t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad}
    return list(tensors.values())


class Phase(NamedTuple):
    """A stretch of a step: up to what level memory rose in it, and where it ended; bytes above the step's start.

    Attributes:
        kind: "forward" or "backward" of a block, or "between": everything else.
        block: its name; of "between", the block before it.
    """

    kind: str
    block: str
    peak: int
    end: int


@dataclass(frozen=True)
class Usage:
    """Memory of one step: its peak, and its phases in order."""

    peak: int
    phases: tuple[Phase, ...]

    @property
    def set_by(self) -> str:
        """Where the peak is, in words."""
        top = max(self.phases, key=lambda phase: phase.peak)
        if top.kind != "between":
            return f"the {top.kind} pass of {top.block}"
        backward = [i for i, phase in enumerate(self.phases) if phase.kind == "backward"]
        where = self.phases.index(top)
        if not backward or where < backward[0]:
            forward = [i for i, phase in enumerate(self.phases) if phase.kind == "forward"]
            before = not forward or where < forward[0]
            return "what comes before the blocks" if before else f"what comes after {top.block} (head and loss)"
        return f"the backward pass of what comes before {top.block}"


_MARK = "abyssal phase "


class Phases:
    """Memory of a `with` block, split where blocks begin and end.

    On the CPU all allocator events of one span, with marks between them: a tracker of `abyssal.memory` for each
    phase would have to be opened within the backward pass, which torch's profiler does not survive.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[tuple[str, str]] = [("between", "")]
        self._readings: list[tuple[int, int]] = []  # highest and last level of each phase
        self._events = AllocatorEvents() if device.type == "cpu" else None
        self.last_block = ""

    def __enter__(self) -> Phases:
        if self._events is not None:
            self._events.start()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._events is not None:
            self._readings = self._events.stop_split(_MARK)
        else:
            self._read()

    def begin(self, kind: str, block: str) -> None:
        """A phase begins, and the one before it ends."""
        self.last_block = block or self.last_block
        if self._events is not None:
            with record_function(f"{_MARK}{len(self._names)}"):
                pass
        else:
            self._read()
        self._names.append((kind, block))

    def _end(self, block: str) -> None:
        """The backward phase of a block ends, unless that of the block below has begun already."""
        if self._names[-1] == ("backward", block):
            self.begin("between", block)

    def _read(self) -> None:
        highest, level = torch.cuda.max_memory_allocated(self._device), torch.cuda.memory_allocated(self._device)
        self._readings.append((highest - self._start, level - self._start))
        torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def found(self) -> list[Phase]:
        """The phases, once the `with` block is over."""
        return [Phase(*name, *reading) for name, reading in zip(self._names, self._readings, strict=True)]

    def follow(self, name: str, block: nn.Module) -> Callable[[], None]:
        """Mark the phases of one block; returns what takes the marks off."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = needing((args, kwargs))
            if inputs and inputs[0].grad_fn is not None:
                torch.autograd.graph.register_multi_grad_hook(inputs[:1], lambda _: self._end(name))
            self.begin("forward", name)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if outputs := needing(output):
                torch.autograd.graph.register_multi_grad_hook(outputs, lambda _: self.begin("backward", name))
            self.begin("between", name)

        handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove
