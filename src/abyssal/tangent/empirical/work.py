"""A kernel that has been asked for: what was found out about the model, and how one strip of it is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.tangent.batch import Batch
from abyssal.tangent.empirical.capture import capture
from abyssal.tangent.empirical.cost import Footprint
from abyssal.tangent.empirical.detection import Plan, study
from abyssal.tangent.empirical.fallback import Fallback
from abyssal.tangent.empirical.parts import Direct, Part
from abyssal.tangent.empirical.products import Last, Mode, multiply
from abyssal.tangent.empirical.tiles import Row, Tiling, choose
from abyssal.tangent.modes import exactly
from abyssal.tangent.subject import Output, Subject, refuse_interaction, restored
from abyssal.util.text import parse_bytes

__all__ = ["DEFAULT_BUDGET", "Place", "Work", "length", "prepared", "symmetric"]

DEFAULT_BUDGET = 2**30

# Samples of the first and the second kind, and their outputs.
Place = tuple[slice, slice, slice, slice]


def length(piece: slice) -> int:
    """Return how many indices a slice with a start has."""
    return int(piece.stop - piece.start)


@dataclass
class Work:
    """A kernel to be computed.

    Attributes:
        subject: the model.
        first: samples.
        second: other samples; None for a symmetric kernel.
        which: outputs that count.
        mode: how they are paired.
        plan: how each parameter's gradients are found.
        footprint: what samples take.
        fallback: for the parameters that hooks do not give.
        dtype: of the kernel.
        device: of the kernel.
    """

    subject: Subject
    first: Batch
    second: Batch | None
    which: slice
    mode: Mode
    plan: Plan
    footprint: Footprint
    fallback: Fallback
    dtype: torch.dtype
    device: torch.device

    @property
    def n2(self) -> int | None:
        """Return the number of other samples; None for a symmetric kernel."""
        return None if self.second is None else self.second.n

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the kernel's shape."""
        k = length(self.which)
        return (self.first.n, self.n2 or self.first.n, *{"trace": (), "diagonal": (k,), "full": (k, k)}[self.mode])

    def give_up(self, names: Iterable[str]) -> None:
        """Send parameters to the fallback."""
        self.plan.fallback.update(names)
        formed = sum(self.plan.parameters[name].numel() for name in self.plan.fallback) * self.dtype.itemsize
        parts = {name: parts for name, parts in self.plan.parts.items() if name not in self.plan.fallback}
        self.footprint = Footprint(parts, formed, self.plan.graph, self.dtype.itemsize)

    def peak(self, tiling: Tiling) -> int:
        """Return the bytes of working memory of one process."""
        k = length(self.which)
        alone = self.second is None and tiling.rows >= self.first.n and (tiling.outputs >= k or self.mode != "full")
        return self.footprint.peak(tiling, alone, self.mode)

    def allowed(self, budget: int | float | str | None) -> int:
        """Return the budget in bytes."""
        return DEFAULT_BUDGET if budget is None else parse_bytes(budget)

    def tiling(self, budget: int | float | str | None, jobs: int) -> Tiling:
        """Return the tiling that runs the model least often within a budget.

        Raises:
            ValueError: if none fits; it names the least budget that does.
        """
        allowed, least = self.allowed(budget), self.peak(Tiling(1, 1, 1))
        if budget is None:
            allowed = max(allowed, jobs * least)
        k, n1 = length(self.which), self.first.n
        most = None if jobs == 1 else max(1, -(-n1 // (2 * jobs)))  # strips are unequal: more of them than processes
        found = choose(n1, self.n2, k, self.mode, lambda t: self.peak(t) * jobs <= allowed, most)
        if found is None:
            each = f" for each of {jobs} processes" if jobs > 1 else ""
            raise ValueError(
                f"budget={budget!r} is too small: one sample against another and one output at a time take {least:,} "
                f"bytes of working memory{each}. Give budget={least * jobs} or more"
                + (", or fewer jobs." if jobs > 1 else ".")
            )
        return found

    def pass_over(self, batch: Batch, outputs: slice, deliver: Callable[[str, list[Part]], None]) -> None:
        """Hand over every parameter's gradients, in parts, for a block of samples and outputs."""
        model, plan = self.subject.model, self.plan
        missing, found = capture(model, plan, lambda: self.subject(batch), batch.n, outputs, deliver)
        if not found.isfinite().all():
            bad = int((~found.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(f"The model's outputs are not finite for sample {bad} of a block of {batch.n}.")
        if missing:
            for name, g in self.fallback({n: plan.parameters[n] for n in sorted(missing)}, batch, outputs).items():
                deliver(name, [Direct(g)])

    def strip(self, row: Row) -> Iterator[tuple[Place, Tensor]]:
        """Give the tiles of a strip, one by one."""
        with _differentiable(self.device), restored(self.subject.model):
            mine: dict[str, list[Part]] = {}
            tile, last = self.empty(row.samples, row.samples, row.outputs, row.outputs), Last()

            def receive(name: str, parts: list[Part]) -> None:
                if row.own:
                    tile.add_(multiply(parts, parts, self.mode, self.dtype, last))
                if row.columns:
                    mine[name] = parts

            self.pass_over(self.first[row.samples], row.outputs, receive)
            if row.own:
                yield (row.samples, row.samples, row.outputs, row.outputs), symmetric(tile)
            for columns, outputs in row.columns:
                place = (row.samples, columns, row.outputs, outputs)
                yield place, self.against(mine, place)

    def against(self, mine: dict[str, list[Part]], place: Place) -> Tensor:
        """Return a tile of a block that is there with one that is not."""
        tile, last = self.empty(*place), Last()

        def receive(name: str, parts: list[Part]) -> None:
            if name in mine:  # a parameter that one of the blocks does not use adds nothing
                tile.add_(multiply(mine[name], parts, self.mode, self.dtype, last))

        self.pass_over((self.second or self.first)[place[1]], place[3], receive)
        return tile

    def empty(self, samples: slice, columns: slice, outputs: slice, others: slice) -> Tensor:
        """Return a tile of zeros."""
        sizes = {"trace": (), "diagonal": (length(outputs),), "full": (length(outputs), length(others))}[self.mode]
        return torch.zeros(length(samples), length(columns), *sizes, dtype=self.dtype, device=self.device)


@contextlib.contextmanager
def prepared(
    model: nn.Module,
    x1: Any,
    x2: Any,
    outputs: Any,
    parameters: Sequence[str] | str | None,
    output: Output | None,
    dtype: torch.dtype | None,
) -> Iterator[Work]:
    """Check what was given, run two samples, and find out how each parameter's gradients are found.

    Within, gradients are on, and inference mode and autocast are off.
    """
    subject = Subject(model, parameters, output)
    first = Batch.of(x1, "x1")
    second = None if x2 is None else Batch.of(x2, "x2")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype has to be a floating one, got {dtype}.")
    with _differentiable(subject.device), restored(model):
        # One sample shows where samples lie only to blocks of one sample.
        probe = first[:2] if first.n > 1 or second is None or second.n == 1 else second[:2]
        alone = subject(probe[probe.n - 1 : probe.n]).detach()
        plan, together = study(model, subject.parameters, lambda: subject(probe), probe.n, alone[0])
        refuse_interaction(together, alone)
        which, mode = _outputs(outputs, alone.shape[1])
        dtype = dtype or torch.promote_types(alone.dtype, torch.float32)
        footprint = Footprint(plan.parts, 0, plan.graph, dtype.itemsize)
        work = Work(subject, first, second, which, mode, plan, footprint, Fallback(subject), dtype, alone.device)
        work.give_up(())
        yield work


@contextlib.contextmanager
def _differentiable(device: torch.device) -> Iterator[None]:
    with exactly(device), torch.enable_grad():
        yield


def _outputs(outputs: Any, k: int) -> tuple[slice, Mode]:
    if isinstance(outputs, str) and outputs in ("trace", "full", "diagonal"):
        return slice(0, k), outputs  # type: ignore[return-value]
    if isinstance(outputs, int) and not isinstance(outputs, bool):
        if not -k <= outputs < k:
            raise ValueError(f"outputs={outputs}: the model has {k} outputs for each sample, counted from 0.")
        return slice(outputs % k, outputs % k + 1), "trace"
    raise ValueError(f'outputs has to be "trace", "full", "diagonal" or an index, got {outputs!r}.')


def symmetric(tile: Tensor) -> Tensor:
    """Copy what is above the diagonal to below it: products of a matrix with itself may differ in the last bit."""
    n = len(tile)
    i, j = torch.tril_indices(n, n, -1, device=tile.device)
    upper = tile[j, i]
    tile[i, j] = upper.mT if tile.dim() == 4 else upper
    if tile.dim() == 4:
        d = torch.arange(n, device=tile.device)
        own = tile[d, d]
        tile[d, d] = own.triu() + own.triu(1).mT
    return tile
