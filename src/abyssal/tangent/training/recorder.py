"""How far training moves the tangent kernel: its distance from the start, its alignment, its spectrum, step by step."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.models.state import quiet
from abyssal.tangent.batch import Batch
from abyssal.tangent.empirical.ntk import Outputs, ntk
from abyssal.tangent.subject import Output, refuse_inference
from abyssal.tangent.training.alignment import aligned, compare
from abyssal.tangent.training.record import Drift, Reading
from abyssal.tangent.training.spectra import spectrum
from abyssal.util.checks import instance, whole
from abyssal.util.progress import Progress
from abyssal.util.randomness import untouched

__all__ = ["DriftRecorder", "drift"]

Every = int | Collection[int]


class DriftRecorder:
    """Watches the tangent kernel of a model on fixed inputs, in any training loop.

        recorder = DriftRecorder(model, probe)
        recorder.record(0)                      # before training: what all later kernels are compared with
        for step, batch in enumerate(batches, start=1):
            train(model, batch)
            recorder.after(step)                # or recorder.record(step), whenever you like
        print(recorder.result())

    Recording leaves training alone, to the bit: parameters, gradients, buffers, modes, random states and hooks are as
    they were. The kernel is that of the model in eval mode (dropout off, BatchNorm by its running statistics), in its
    own type, whatever mode or autocast training is in. Kept are the first kernel and a few numbers for each reading.

    Args:
        model: any module that `abyssal.tangent.ntk` takes.
        x: the probe set, as `ntk` takes it; it is copied, and moved to where the model is. A few dozen to a few hundred
            samples: a reading costs one `ntk` of it, and n^3 flops for its eigenvalues.
        y: labels of the probe set, for the alignment of the kernel with them: classes [n] (whole numbers from 0; taken
            as one-hot), or targets [n] or [n, k], of which an output's kernel takes its own column.
        outputs: which kernel, as for `ntk`: "trace", "full", "diagonal", or an output's index.
        every: `after` records every so many steps; or a collection of the steps at which it does.
        eigenvalues: whether each reading has them.
        keep_kernels: keep every kernel (n^2 numbers each), not just the first.
        output: as for `ntk`, as are the others.
        parameters: see there.
        dtype: see there.
        budget: see there.
        jobs: see there.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        y: Tensor | Sequence[float] | np.ndarray | None = None,
        *,
        outputs: Outputs = "trace",
        every: Every = 1,
        eigenvalues: bool = True,
        keep_kernels: bool = False,
        output: Output | None = None,
        parameters: Sequence[str] | str | None = None,
        dtype: torch.dtype | None = None,
        budget: str | int | float | None = None,
        jobs: int = 1,
    ) -> None:
        refuse_inference(instance("model", model, nn.Module, "a torch.nn.Module"))
        self.model = _inside(model)
        with torch.inference_mode(False):  # a clone made within could not take part in gradients
            self._probe = Batch.of(x, "x").mapped(torch.clone)
        self._targets = None if y is None else _targets(y, self._probe.n, outputs)
        self._due = _due(every)
        self._outputs, self._eigenvalues, self._keep = outputs, eigenvalues, keep_kernels
        self._options: dict[str, Any] = {
            "output": output, "parameters": parameters, "dtype": dtype, "budget": budget, "jobs": jobs,
        }  # fmt: skip
        self._start: Tensor | None = None
        self._readings: list[Reading] = []
        self._kernels: list[Tensor] = []

    @property
    def last_step(self) -> int | None:
        """The step of the last reading; None before the first."""
        return self._readings[-1].step if self._readings else None

    def due(self, step: int) -> bool:
        """Whether `after` records at this step."""
        return self._due(step)

    def after(self, step: int) -> Reading | None:
        """Record if this step is one of `every`; call it after each training step."""
        return self.record(step) if self.due(step) else None

    def record(self, step: int) -> Reading:
        """Compute the kernel as the model is now, and compare it with the first one.

        Args:
            step: how many training steps there have been; more than at the last reading.

        Returns:
            The reading. Where the kernel has entries that are not finite, as in a training that diverged, its figures
            are nan.

        Raises:
            ValueError: if the step does not follow the last one; and what `ntk` raises about the model and x.
        """
        whole("step", step, 0)
        if self._readings and step <= self._readings[-1].step:
            raise ValueError(f"step {step} was recorded after step {self._readings[-1].step}: steps have to ascend.")
        kernel = self._kernel()
        if self._start is None:
            if not torch.isfinite(kernel).all():
                raise ValueError("The first kernel has entries that are not finite: there is nothing to compare with.")
            if not kernel.any():
                raise ValueError("The first kernel is 0: the outputs depend on no parameter at this start.")
            self._start = kernel
        if kernel.shape != self._start.shape:
            raise ValueError(f"The kernel is {list(kernel.shape)} now; it was {list(self._start.shape)} at the start.")
        if self._keep:
            self._kernels.append(kernel)
        self._readings.append(self._read(step, kernel))
        return self._readings[-1]

    def result(self) -> Drift:
        """Return what was recorded so far.

        Raises:
            ValueError: before the first reading.
        """
        if not self._readings:
            raise ValueError("Nothing was recorded: call recorder.record(0) before training.")
        return Drift(tuple(self._readings), self._outputs, tuple(self._kernels) if self._keep else None)

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded, of plain data and tensors, to go on from in another process."""
        readings = [dataclasses.asdict(reading) for reading in self._readings]
        x = dict(zip(self._probe.names, self._probe.values, strict=True))
        return {"x": x, "start": self._start, "kernels": list(self._kernels), "readings": readings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another recorder with the same probe set recorded.

        Raises:
            ValueError: for another probe set.
        """
        ours, theirs = (torch.utils._pytree.tree_leaves(x) for x in (self.state_dict()["x"], state["x"]))
        if len(ours) != len(theirs) or not all(_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(
                "The state is of a recorder with another probe set x: later kernels do not compare with it."
            )
        self._start = state["start"]
        self._kernels = list(state["kernels"])
        self._readings = [Reading.from_state(reading) for reading in state["readings"]]

    def _kernel(self) -> Tensor:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with untouched([torch.empty(0, device=device)]), quiet(self.model):
            try:
                found = ntk(self.model, self._probe.to(device), outputs=self._outputs, **self._options)
            except ValueError as error:
                if self._start is None or "finite" not in str(error):
                    raise
                return torch.full_like(self._start, math.nan)
        return found.detach().cpu()

    def _read(self, step: int, kernel: Tensor) -> Reading:
        assert self._start is not None
        if not torch.isfinite(kernel).all():
            return Reading(step)
        distance, alignment, centred = compare(kernel, self._start)
        target, centred_target = None, None
        if self._targets is not None:
            target, centred_target = aligned(kernel, _fitted(self._targets, kernel))
        found = None
        if self._eigenvalues:
            found = spectrum(kernel)
        return Reading(step, distance, alignment, centred, target, centred_target, found)


def drift(
    model: nn.Module,
    x: Any,
    trainer_steps: Iterable[Any] | Callable[..., Any],
    *,
    y: Tensor | Sequence[float] | np.ndarray | None = None,
    steps: int | None = None,
    every: Every = 1,
    progress: Progress | None = None,
    **options: Any,
) -> Drift:
    """Train a model by a loop of one's own, and record how its tangent kernel moves.

        def trainer_steps():
            for inputs, targets in loader:
                loss = criterion(model(inputs), targets)
                loss.backward(); optimizer.step(); optimizer.zero_grad(); yield
        print(abyssal.tangent.drift(model, probe, trainer_steps, every=10))

    Args:
        model: that is trained.
        x: the probe set.
        trainer_steps: a generator, a generator function or any iterable that does one training step each time it is
            asked for its next item; or a function that does one training step, with `steps`.
        y: labels of the probe set.
        steps: how many steps; default: as many as `trainer_steps` has.
        every: steps between readings, or a collection of steps. The start and the last step are always recorded.
        progress: called with "training", steps done, and steps in all (0 where that is not known).
        **options: of `DriftRecorder`.

    Returns:
        Distance, alignment and spectrum along training.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """
    loop = _loop(trainer_steps, steps)
    recorder = DriftRecorder(model, x, y, every=every, **options)
    before = _fingerprint(model)
    recorder.record(0)
    step = 0
    for step, _ in enumerate(loop, start=1):
        recorder.after(step)
        if progress is not None:
            progress("training", step, steps or 0)
    if not step:
        raise ValueError("trainer_steps did no step at all: is it a generator that was used up before?")
    if recorder.last_step != step:
        recorder.record(step)
    if _fingerprint(model) == before:
        warnings.warn(
            f"drift: {step} steps changed no parameter of the model. Does every item of trainer_steps do one training "
            "step, on this model?",
            stacklevel=2,
        )
    return recorder.result()


def _loop(trainer_steps: Any, steps: int | None) -> Iterator[Any]:
    if steps is not None:
        whole("steps", steps)
    if inspect.isgeneratorfunction(trainer_steps):
        trainer_steps = trainer_steps()
    if isinstance(trainer_steps, Iterable) and not isinstance(trainer_steps, nn.Module | str):
        return itertools.islice(iter(trainer_steps), steps)
    if not callable(trainer_steps) or isinstance(trainer_steps, nn.Module):
        raise TypeError(
            "trainer_steps has to be a generator (function) or an iterable that does one training step for each item, "
            f"or a function that does one; got a {type(trainer_steps).__name__}."
        )
    if steps is None:
        raise ValueError("trainer_steps is a function that does one training step: say how many, with steps=100.")
    return (trainer_steps() for _ in range(steps))


def _fingerprint(model: nn.Module) -> tuple[float, ...]:
    """Numbers that a training step changes: sums of the parameters and of their squares."""
    with torch.no_grad():
        return tuple(float(f(p.double())) for p in model.parameters() for f in (torch.sum, torch.norm))


def _due(every: Every) -> Callable[[int], bool]:
    if type(every) is int and every >= 1:
        return lambda step: step % every == 0
    if isinstance(every, Collection) and every and all(type(step) is int and step >= 0 for step in every):
        return frozenset(every).__contains__
    raise ValueError(f"every has to be a number of steps of at least 1, or a collection of steps; got {every!r}.")


def _targets(y: Any, count: int, outputs: Outputs) -> Tensor:
    """Return labels as targets in float64, [n, k]."""
    labels: Tensor = torch.as_tensor(y).detach().cpu()
    if labels.ndim not in (1, 2) or len(labels) != count:
        raise ValueError(f"y has to have one label for each of the {count} samples of x, got {list(labels.shape)}.")
    if labels.ndim == 1 and not labels.is_floating_point() and not (labels < 0).any():
        classes = int(labels.max()) + 1
        labels = nn.functional.one_hot(labels.long(), max(classes, outputs + 1 if isinstance(outputs, int) else 0))
    targets = labels.double().reshape(count, -1)
    if isinstance(outputs, int) and targets.shape[1] > 1:
        if outputs >= targets.shape[1]:
            raise ValueError(f"y has {targets.shape[1]} columns, and none for outputs={outputs}.")
        targets = targets[:, [outputs]]
    if not torch.isfinite(targets).all() or not targets.any():
        raise ValueError("y has to be finite and not 0 everywhere.")
    return targets


def _fitted(targets: Tensor, kernel: Tensor) -> Tensor:
    """Give targets as many columns as the kernel has outputs: the probe set may lack the last classes."""
    k = kernel.shape[2] if kernel.ndim > 2 else targets.shape[1]
    if targets.shape[1] > k:
        raise ValueError(f"y has {targets.shape[1]} classes or columns, the model has {k} outputs.")
    return nn.functional.pad(targets, (0, k - targets.shape[1]))


def _inside(model: nn.Module) -> nn.Module:
    """Return the module itself, without what torch.compile or data parallelism wraps it in."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    return bool(a == b)
