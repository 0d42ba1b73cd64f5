"""One training step of a borrowed model: run under any policies, timed, or with its memory tracked by phases."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function
from torch.utils import _pytree as pytree

from abyssal.certify.certificate import Certificate
from abyssal.engine.api import certificate, reconstruct
from abyssal.engine.policy import Policy
from abyssal.models.call import Loss, scalar_loss
from abyssal.models.state import Loan
from abyssal.planning.probe import needing
from abyssal.profiling import track as memory


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


class TrainingStep:
    """Forward and backward pass of a borrowed model on one batch.

    Args:
        model: what the batch is given to.
        loan: the loan of it; every run starts from the same random state and buffers.
        batch: a mapping of keyword arguments, a tuple or list of positional ones, or one tensor.
        loss: makes a scalar of the model's output; None takes the output's own `loss`.
        blocks: the blocks by name.

    Raises:
        TypeError: for another batch, or an output without a scalar loss.
    """

    def __init__(
        self, model: nn.Module, loan: Loan, batch: Any, loss: Loss | None, blocks: Mapping[str, nn.Module]
    ) -> None:
        self.model, self.loan, self._loss, self.blocks = model, loan, loss, dict(blocks)
        self.args, self.kwargs = arguments(batch)
        self.parameters = [p for p in loan.parameters if p.requires_grad]
        if not self.parameters:
            raise TypeError(f"no parameter of this {type(model).__name__} needs a gradient: there is nothing to plan.")
        self.device = self.parameters[0].device
        self.certificate: Certificate | None = None  # of the last tracked step

    def loss(self) -> Tensor:
        """Run the forward pass and return the loss."""
        return scalar_loss(self.model(*self.args, **self.kwargs), self._loss)

    @contextmanager
    def under(self, policies: Mapping[str, Policy] | None) -> Iterator[None]:
        """Have the model at the start of a step, under `policies` (None: plain), for the `with` block."""
        self.loan.rewind()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if policies is not None:
                    reconstruct(self.model, policies, blocks=list(self.blocks.values()), tolerance=float("inf"))
                yield
        finally:
            self.loan.rewind()

    def gradient(self, policies: Mapping[str, Policy] | None) -> list[Tensor | None]:
        """Return the gradient of every parameter that needs one, under `policies`."""
        with self.under(policies):
            return list(torch.autograd.grad(self.loss(), self.parameters, allow_unused=True))

    def seconds(self, policies: Mapping[str, Policy] | None, repeats: int = 3) -> float:
        """Return the time of a step: the least of some, the first of which (what is learned once) is not counted."""
        found = []
        with self.under(policies), self._gradient_buffers():
            for _ in range(repeats):
                begin = self._now()
                self.loss().backward()
                found.append(self._now() - begin)
        return min(found[1:])

    def tracked(self, policies: Mapping[str, Policy] | None) -> tuple[Usage, list[Tensor | None]]:
        """Return a step's memory above the level before it, gradient buffers allocated, and its gradient."""
        with self.under(policies), self._gradient_buffers():
            phases = _Phases(self.device)
            handles = [phases.follow(name, block) for name, block in self.blocks.items()]
            with phases:
                loss = self.loss()
                phases.begin("between", phases.last_block)
                loss.backward()
                del loss
            for handle in handles:
                handle()
            gradient = [None if p.grad is None else p.grad for p in self.parameters]
            self.certificate = certificate(self.model) if policies is not None else None
        found = phases.found
        return Usage(max(phase.peak for phase in found), tuple(found)), gradient

    @contextmanager
    def _gradient_buffers(self) -> Iterator[None]:
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        try:
            yield
        finally:
            for p in self.parameters:
                p.grad = None

    def _now(self) -> float:
        if self.device.type not in ("cpu", "meta"):
            torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()


_MARK = "abyssal phase "


class _Phases:
    """Memory of a `with` block, split where blocks begin and end.

    On the CPU all allocator events of one profile, with marks between them: a tracker of `abyssal.memory` for each
    phase would have to be opened within the backward pass, which torch's profiler does not survive.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[tuple[str, str]] = [("between", "")]
        self._readings: list[tuple[int, int]] = []  # on CUDA: highest and last level of each phase
        self._profile: profile | None = None
        self.last_block = ""

    def __enter__(self) -> _Phases:
        if self._device.type == "cpu":
            if torch.autograd.profiler._is_profiler_enabled:
                raise RuntimeError("a torch profiler is running, whose event stream is needed to measure memory.")
            self._profile = profile(profile_memory=True, use_kineto=True)
            with memory._quiet_kineto():
                self._profile.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._profile is not None:
            with memory._quiet_kineto():
                self._profile.__exit__(None, None, None)
        else:
            self._read()

    def begin(self, kind: str, block: str) -> None:
        """A phase begins, and the one before it ends."""
        self.last_block = block or self.last_block
        if self._profile is not None:
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
        readings = self._readings if self._profile is None else self._summed()
        return [Phase(*name, *reading) for name, reading in zip(self._names, readings, strict=True)]

    def _summed(self) -> list[tuple[int, int]]:
        assert self._profile is not None and self._profile.kineto_results is not None
        events: list[Any] = [
            e for e in self._profile.kineto_results.events() if e.name() == "[memory]" or _MARK in e.name()
        ]
        readings, peak, level = [], 0, 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() != "[memory]":
                readings.append((peak, level))
                peak = level
            elif event.device_type() == torch._C._autograd.DeviceType.CPU:
                level += event.nbytes()
                peak = max(peak, level)
        return [*readings, (peak, level)]

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


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as positional and keyword arguments, its tensors detached.

    Raises:
        TypeError: if it is neither a mapping, a tuple, a list nor a tensor.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    elif isinstance(batch, tuple | list):
        args = tuple(batch)
    else:
        raise TypeError(
            "batch: expected a dictionary of keyword arguments, a tuple of positional ones or one tensor, which the "
            f"model is called with; got {type(batch).__name__}."
        )
    detached: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    return detached
