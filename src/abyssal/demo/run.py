"""The demo: one deep residual network, trained three ways on real images, and what each way cost.

Plain backprop, activation checkpointing of every block and reconstruction start from the same weights and see
the same batches. Step times are ratios of interleaved steps, memory is the exact peak of live tensor bytes,
and gradient errors are measured against plain backprop. Nothing here prints; `page` shows the result.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from abyssal.certify.drift import DriftWarning
from abyssal.demo.digits import Digits, load_digits
from abyssal.demo.methods import (
    METHODS,
    ErrorSweep,
    MemorySweep,
    Method,
    activation_peak,
    error_sweep,
    gradient,
    keep_heap,
    memory_sweep,
    relative_error,
    timed_step,
)
from abyssal.engine.api import certificate
from abyssal.nn import DigitsResNet
from abyssal.util.checks import ascending, positive, whole
from abyssal.util.environment import Environment, environment
from abyssal.util.progress import NotedProgress, silent
from abyssal.util.threads import one_thread

__all__ = ["DemoResult", "DemoSettings", "MethodResult", "run_demo"]

SCHEMA = 1
_WARM_UP = 2  # steps until the heap has grown to its size


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs. The defaults take about a minute and a half on two cores of a server.

    Attributes:
        depth: residual blocks of the trained network, at least 2: a single block is no chain.
        width: of its state, and of each block's hidden layer.
        batch: images per step.
        epochs: passes over the training images.
        learning_rate: the highest of a one-cycle schedule for Adam. With a residual scale of 1/depth the same
            one serves every depth.
        seed: of weights and data order.
        memory_depths: where peak memory is measured, on untrained networks otherwise like the trained one.
        error_depths: where gradient errors are measured, in float64.
        error_width: width of those networks.
        error_batch: inputs of those networks.
        error_repeats: networks per depth, whose errors' geometric mean is reported.
        keep_heap: make glibc keep freed memory (see `keep_heap`); without it step times mislead.

    Raises:
        ValueError: if a number is not positive, a depth less than 2, or a sweep has fewer than two depths.
    """

    depth: int = 256
    width: int = 128
    batch: int = 256
    epochs: int = 8
    learning_rate: float = 1e-2
    seed: int = 0
    memory_depths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    error_depths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    error_width: int = 24
    error_batch: int = 16
    error_repeats: int = 1
    keep_heap: bool = True

    def __post_init__(self) -> None:
        for name in ("depth", "width", "batch", "epochs", "learning_rate", "error_width", "error_batch"):
            positive(name, getattr(self, name))
        whole("depth", self.depth, 2)
        for name in ("memory_depths", "error_depths"):
            whole(f"the first of {name}", ascending(name, getattr(self, name), 2)[0], 2)

    def changed(self, **changes: Any) -> DemoSettings:
        """Return these settings with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def quick(cls) -> DemoSettings:
        """Return settings that take a few seconds, to see that everything works; the network still learns."""
        return cls(
            depth=32,
            width=32,
            batch=128,
            epochs=6,
            memory_depths=(8, 16, 32, 64),
            error_depths=(8, 16, 32, 64),
        )


@dataclass(frozen=True)
class MethodResult:
    """What one way to train came to.

    Attributes:
        key: short name.
        label: name for people.
        losses: training loss of each step.
        accuracy: share of the test images classified rightly, at the end.
        step_seconds: processor time of one forward and backward pass: median over steps.
        step_ratio: the same over plain backprop's in the same round: median over rounds.
        step_ratio_quartiles: first and third quartile of those ratios.
        peak_bytes: peak activation memory of one step.
        gradient_error: of the parameter gradient on the trained network against plain backprop, relative.
    """

    key: str
    label: str
    losses: tuple[float, ...]
    accuracy: float
    step_seconds: float
    step_ratio: float
    step_ratio_quartiles: tuple[float, float]
    peak_bytes: int
    gradient_error: float


@dataclass(frozen=True)
class DemoResult:
    """All that the demo measured.

    Attributes:
        settings: what was run.
        environment: on what.
        methods: the three ways, plain backprop first.
        memory: peak memory against depth.
        errors: gradient error against depth.
        parameters: number of the trained network's parameters.
        train_images: number of training images.
        test_images: number of test images.
        movement: `|x[N] - x[0]| / |x[0]|` of the trained network's state on the test images: how much the
            residual blocks do.
        float32_error: relative error of plain backprop's own float32 gradient against float64: the measure of
            what is small.
        state_error: the certificate's largest relative error of a restored state, last training step;
            None if it measured none.
        drift_warnings: what the certificate warned of in training; empty where the network is deep enough.
        stored_bytes: what reconstruction kept for the residual stream, by the certificate.
        threads: threads that torch ran on.
        heap_kept: whether the heap was kept between steps, without which step times mislead.
        seconds: of the whole run, by the clock.
    """

    settings: DemoSettings
    environment: Environment
    methods: tuple[MethodResult, ...]
    memory: MemorySweep
    errors: ErrorSweep
    parameters: int
    train_images: int
    test_images: int
    movement: float
    float32_error: float
    state_error: float | None
    drift_warnings: tuple[str, ...]
    stored_bytes: int
    threads: int
    heap_kept: bool
    seconds: float

    def __getitem__(self, key: str) -> MethodResult:
        """Return one method's result."""
        return next(method for method in self.methods if method.key == key)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return {"schema": SCHEMA, **asdict(self)}


def run_demo(settings: DemoSettings | None = None, report: NotedProgress = silent) -> DemoResult:
    """Run the demo.

    Runs on one thread (blocks this small gain nothing from more, and processor time is then a fair clock) and
    leaves the global random state and the number of threads as they were.

    Args:
        settings: what to run; None is the full demo.
        report: is told how far it is.

    Raises:
        MissingPackageError: if scikit-learn is not installed.
        ValueError: if a batch is larger than the training set.
    """
    settings = DemoSettings() if settings is None else settings
    begin = time.perf_counter()
    around = environment(("abyssal", "torch", "numpy", "scikit-learn"))
    digits = load_digits()
    if settings.batch > len(digits.train_labels):
        raise ValueError(f"batch: {settings.batch} images, but there are {len(digits.train_labels)} to train on")
    heap_kept = keep_heap() if settings.keep_heap else False
    with one_thread(), torch.random.fork_rng(devices=[]):
        with _drift_warnings() as drift_warnings:
            runners = _train(digits, settings, report)
        with _drift_warnings():  # from here on the errors are measured outright, and networks may be shallow
            methods, state = _examine(runners, digits, settings, report)
            memory = memory_sweep(
                partial(_network, settings), settings.memory_depths, *_sample(digits, settings), report
            )
            width, batch, repeats = settings.error_width, settings.error_batch, settings.error_repeats
            errors = error_sweep(settings.error_depths, width, batch, repeats, settings.seed, report)
        return DemoResult(
            settings=settings,
            environment=around,
            methods=methods,
            memory=memory,
            errors=errors,
            train_images=len(digits.train_labels),
            test_images=len(digits.test_labels),
            threads=torch.get_num_threads(),
            heap_kept=heap_kept,
            seconds=time.perf_counter() - begin,
            drift_warnings=tuple(drift_warnings),
            **state,
        )


def _sample(digits: Digits, settings: DemoSettings) -> tuple[Tensor, Tensor]:
    """Return the batch that memory and gradients are measured on."""
    return digits.train_images[: settings.batch], digits.train_labels[: settings.batch]


@contextmanager
def _drift_warnings() -> Iterator[list[str]]:
    """Collect the certificate's warnings, which belong in the result, and let others pass."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DriftWarning)
        yield found
    for warning in caught:
        if issubclass(warning.category, DriftWarning):
            found.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class _Runner:
    """One network in training, in one of the three ways."""

    def __init__(self, model: DigitsResNet, method: Method, lr: float, steps: int) -> None:
        self.model = model
        self.forward = method.prepare(model)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        loss, seconds = timed_step(self.forward, images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # freshly allocated gradients would be timed, too
        self.schedule.step()
        self.losses.append(loss)
        self.seconds.append(seconds)


def _network(settings: DemoSettings, depth: int) -> DigitsResNet:
    torch.manual_seed(settings.seed)
    return DigitsResNet(depth, settings.width)


def _train(digits: Digits, settings: DemoSettings, report: NotedProgress) -> list[_Runner]:
    """Train the three networks side by side: one step of each in turn, the turn's order rotating."""
    model = _network(settings, settings.depth)
    per_epoch = len(digits.train_labels) // settings.batch
    steps = settings.epochs * per_epoch
    runners = [_Runner(copy.deepcopy(model), m, settings.learning_rate, steps) for m in METHODS]
    shuffle = torch.Generator().manual_seed(settings.seed + 1)
    phase = "Training three ways"
    report(phase, 0, steps)
    for done in range(steps):
        if done % per_epoch == 0:
            order = torch.randperm(len(digits.train_labels), generator=shuffle)
        chosen = order[(done % per_epoch) * settings.batch :][: settings.batch]
        images, labels = digits.train_images[chosen], digits.train_labels[chosen]
        for turn in range(len(runners)):
            runners[(done + turn) % len(runners)].step(images, labels)
        report(phase, done + 1, steps, "loss " + " / ".join(f"{r.losses[-1]:.3f}" for r in runners))
    return runners


def _examine(
    runners: list[_Runner], digits: Digits, settings: DemoSettings, report: NotedProgress
) -> tuple[tuple[MethodResult, ...], dict[str, Any]]:
    """Measure the trained networks: accuracy, memory, gradients."""
    phase = "Checking gradients"
    report(phase, 0, len(runners) + 1)
    plain = runners[0].model
    seal = certificate(runners[-1].model)  # of the last training step, before anything else is run
    images, labels = _sample(digits, settings)
    start = {name: value.clone() for name, value in plain.state_dict().items()}

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    exact = gradient(plain, plain, loss, images)
    methods = []
    for done, (method, runner) in enumerate(zip(METHODS, runners, strict=True)):
        accuracy = _accuracy(runner.model, digits)
        # All three gradients at the same point, the network that plain backprop has trained.
        runner.model.load_state_dict(start)
        error = relative_error(gradient(runner.forward, runner.model, loss, images), exact)
        # Prepared anew, so that nothing of an earlier step is let go of during the measurement.
        peak = activation_peak(method.prepare(runner.model), runner.model, images, labels)
        ratios = _ratios(runner.seconds, runners[0].seconds)
        low, high = np.quantile(ratios, (0.25, 0.75))
        methods.append(
            MethodResult(
                key=method.key,
                label=method.label,
                losses=tuple(runner.losses),
                accuracy=accuracy,
                step_seconds=statistics.median(runner.seconds),
                step_ratio=statistics.median(ratios),
                step_ratio_quartiles=(float(low), float(high)),
                peak_bytes=peak,
                gradient_error=error,
            )
        )
        report(phase, done + 1, len(runners) + 1, f"{method.label}: {peak / 1e6:.1f} MB")
    doubled = copy.deepcopy(plain).double()
    float32_error = relative_error(exact, gradient(doubled, doubled, loss, images.double()))
    report(phase, len(runners) + 1, len(runners) + 1)
    return tuple(methods), {
        "parameters": sum(p.numel() for p in plain.parameters()),
        "movement": _movement(plain, digits.test_images),
        "float32_error": float32_error,
        "state_error": seal.error,
        "stored_bytes": seal.stored_bytes,
    }


@torch.no_grad()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    return float((model(digits.test_images).argmax(1) == digits.test_labels).float().mean())


@torch.no_grad()
def _movement(model: DigitsResNet, images: Tensor) -> float:
    first = model.stem(images)
    return relative_error(model.stack(first), first)


def _ratios(seconds: list[float], plain: list[float]) -> list[float]:
    pairs = list(zip(seconds, plain, strict=True))
    return [mine / other for mine, other in pairs[_WARM_UP:] or pairs]
