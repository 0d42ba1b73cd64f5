"""One training step of a borrowed model: run under any policies, timed, or with its memory tracked by phases."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from abyssal.certify.certificate import Certificate
from abyssal.engine.api import certificate, reconstruct
from abyssal.engine.policy import Policy
from abyssal.models.call import Loss, arguments, scalar_loss
from abyssal.models.find import Blocks, resolve_blocks
from abyssal.models.state import Loan, borrowed
from abyssal.profiling.phases import Phases, Usage, now


@contextmanager
def training_step(model: nn.Module, batch: Any, loss: Loss | None, blocks: Blocks | None) -> Iterator[TrainingStep]:
    """Give a training step of a model, which is borrowed for the `with` block; see `TrainingStep`.

    Raises:
        NoBlocksError: if no blocks are found and none are given.
        TypeError: for another batch, or an output without a scalar loss.
    """
    core = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    named = resolve_blocks(core, blocks)
    with borrowed(core) as loan:
        yield TrainingStep(core, loan, batch, loss, named)


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
        self.args, self.kwargs = detached(batch)
        self.parameters = [p for p in loan.parameters if p.requires_grad]
        if not self.parameters:
            raise TypeError(f"no parameter of this {type(model).__name__} needs a gradient: there is nothing to plan.")
        self.device = self.parameters[0].device
        self.certificate: Certificate | None = None  # of the last tracked step

    def on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TrainingStep:
        """Return the same step on another batch."""
        other = copy.copy(self)
        other.args, other.kwargs = args, kwargs
        return other

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
                begin = now(self.device)
                self.loss().backward()
                found.append(now(self.device) - begin)
        return min(found[1:])

    def tracked(self, policies: Mapping[str, Policy] | None) -> tuple[Usage, list[Tensor | None]]:
        """Return a step's memory above the level before it, gradient buffers allocated, and its gradient."""
        with self.under(policies), self._gradient_buffers():
            gc.collect()  # what an earlier model has left must not be released during the measurement
            phases = Phases(self.device)
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


def detached(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as positional and keyword arguments, its tensors detached."""
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, Tensor.detach, arguments(batch))
    return found


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def variants(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, _Call]]:
    """Return other batches made of one: its halves, or, of one row, the same in another order."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim > 0]
    if not tensors:
        return []
    rows = tensors[0].shape[0]
    if rows >= 2:
        half = rows // 2

        def part(rng: slice) -> _Call:
            return _mapped(lambda t: t[rng] if t.ndim > 0 and t.shape[0] == rows else t, args, kwargs)

        return [("first half", part(slice(0, half))), ("second half", part(slice(half, rows)))]
    if tensors[0].ndim == 4:
        return [("mirrored", _mapped(lambda t: t.flip(-1) if t.ndim == 4 else t, args, kwargs))]
    length = tensors[0].shape[1] if tensors[0].ndim > 1 else 1
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))

    def shuffled(t: Tensor) -> Tensor:
        return t[:, order.to(t.device)] if t.ndim > 1 and t.shape[:2] == (1, length) else t

    return [("other order", _mapped(shuffled, args, kwargs))] if length > 1 else []


def _mapped(change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    found: _Call = pytree.tree_map_only(Tensor, change, (args, kwargs))
    return found
