"""The cells that phase diagrams are made of: one model each, with one weight family, at all betas.

A cell's weights depend on its seed, network, family, depth, width and model number, and not on the betas asked for: the
same model at another beta has the same weights. At another depth it has other residual weights, but the same inputs,
embedding and read-out, so that they do not add to the noise of what is compared over depths.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.scaling.phases.networks import NETWORKS, draw_ends, draw_model, network_named, pass_through
from abyssal.sweep.engine import check_engine, run, seed_of
from abyssal.sweep.outcome import Cell, Outcome
from abyssal.sweep.store import Store
from abyssal.util.checks import ascending, instance, number, whole
from abyssal.weights.families import Family, family

__all__ = ["METRICS", "Build", "Samples", "Subject", "check_betas", "check_run", "measure"]

Build = Callable[[int, float, torch.Generator], nn.Module]
Array = np.ndarray
STUDY = "phase"
VERSION = 1  # raise it when a cell's numbers change, and stores of before are not used
METRICS = ("hidden", "hidden_ratio", "active", "gradient", "gradient_ratio")
_DEFAULT_INIT = "fbm"
_MOST_SCALE = 12  # power of ten; times the weights' norms it stays far from float32's largest number


@dataclass(frozen=True)
class Samples:
    """Measured logarithms to base 10, by metric; -inf where a state did not move.

    Attributes:
        values: by name, of `METRICS`. [models, families, betas, inputs]
        seconds: CPU time that computing them took, also where a store had them.
        computed: cells that were computed now, and not taken from a store.
    """

    values: Mapping[str, Array]
    seconds: float
    computed: int


@dataclass(frozen=True)
class Subject:
    """What is put through its depths: a network, and the weight families to give it.

    Attributes:
        network: `"res1"`, `"res3"`, or the name of a factory.
        init: the families' name; empty for a factory.
        hursts: their Hurst indices; None where they have none.
        families: one for each Hurst index, or one; none for a factory.
        build: the factory.
    """

    network: str
    init: str
    hursts: tuple[float, ...] | None
    families: tuple[Family, ...]
    build: Build | None = None

    @classmethod
    def of(
        cls, network: str | Build, init: str | Family | None, hursts: Sequence[float] | None, default: Sequence[float]
    ) -> Subject:
        """Make sure of what was asked for, as `phase_diagram` takes it; without Hurst indices `default` are taken.

        Raises:
            ValueError, TypeError: for what is unknown, or does not go together.
        """
        if not isinstance(network, str):
            if not callable(network) or isinstance(network, nn.Module):
                raise TypeError(
                    f"network has to be one of {', '.join(NETWORKS)} or a factory build(depth, beta, generator) that "
                    f"returns a module; got {network!r}."
                )
            if init is not None or hursts is not None:
                raise ValueError("A network's factory draws its own weights: leave out init and hursts.")
            return cls(_name_of(network), "", None, (), network)
        network_named(network)
        if isinstance(init, Family):
            if hursts is not None:
                raise ValueError(f"hursts go with the name of a family; {init!r} is one already.")
            return cls(network, repr(init), None, (init,))
        init = _DEFAULT_INIT if init is None else init
        if init not in ("fbm", "fbm_path"):
            if hursts is not None:
                raise ValueError(f"The family {init!r} has no Hurst index, got hursts={list(hursts)!r}.")
            return cls(network, init, None, (family(init),))
        given = tuple(number("hursts", hurst) for hurst in (default if hursts is None else hursts))
        if not given or len(set(given)) < len(given):
            raise ValueError(f"hursts have to be different numbers, at least one; got {list(given)!r}.")
        return cls(network, init, given, tuple(family(init, hurst) for hurst in given))

    def cells(
        self, depth: int, width: int, betas: Sequence[float], models: int, inputs: int, seed: int, gradients: bool
    ) -> list[Cell]:
        """Return the cells, by model, then by family; a factory's by model, then by beta."""
        common = {"network": self.network, "depth": depth, "width": width, "inputs": inputs, "seed": seed}
        common["gradients"] = gradients
        if self.build is not None:
            return [{**common, "model": model, "betas": [beta]} for model in range(models) for beta in betas]
        hursts: Sequence[float | None] = (None,) if self.hursts is None else self.hursts
        return [
            {**common, "init": self.init, "hurst": hurst, "model": model, "betas": list(betas)}
            for model in range(models)
            for hurst in hursts
        ]

    def function(self) -> Callable[[Cell], dict[str, Array]]:
        """Return what measures a cell."""
        if self.build is not None:
            return functools.partial(_measure_factory, self.build)
        if self.hursts is None:
            return functools.partial(_measure, self.families[0])
        return functools.partial(_measure, None)


def measure(
    subject: Subject,
    depth: int,
    width: int,
    betas: Sequence[float],
    models: int,
    inputs: int,
    seed: int,
    *,
    gradients: bool = True,
    **how: Any,
) -> Samples:
    """Measure all cells of a subject at one depth; `how` is passed on to :func:`abyssal.sweep.run`.

    Returns:
        The samples; those of gradients are nan where they were not asked for.

    Raises:
        SweepError: if cells failed.
    """
    cells = subject.cells(depth, width, betas, models, inputs, seed, gradients)
    outcomes = run(cells, subject.function(), study=STUDY, version=VERSION, **how)
    return Samples(
        {name: _gathered(name, outcomes, subject, len(betas), models, inputs) for name in METRICS},
        sum(outcome.seconds for outcome in outcomes),
        sum(not outcome.stored for outcome in outcomes),
    )


def check_betas(betas: Sequence[float]) -> tuple[float, ...]:
    """Return betas as increasing, different, finite numbers, or raise ValueError."""
    return ascending("betas", [number("betas", beta) for beta in betas])


def check_run(
    depths: Sequence[int],
    betas: Sequence[float],
    width: int,
    models: int,
    inputs: int,
    seed: int,
    engine: str,
    jobs: int | None,
    store: Store | None,
) -> None:
    """Raise before any work if a sweep cannot be run as asked for."""
    for depth in depths:
        whole("depth", depth)
        if -min(betas) * math.log10(depth) > _MOST_SCALE:
            raise ValueError(
                f"betas: {min(betas):g} at depth {depth} scales branches by 10^{-min(betas) * math.log10(depth):.0f}; "
                f"at most 10^{_MOST_SCALE} can be computed."
            )
    whole("width", width)
    whole("models", models)
    whole("inputs", inputs)
    whole("seed", seed, 0)
    check_engine(engine, jobs)
    if store is not None:
        instance("store", store, Store, "an abyssal.sweep.Store, such as Store('phase.sqlite')")


def _name_of(build: Build) -> str:
    """Return a name that changes with the factory's code, so that a store never gives another one's results."""
    inner: Any = build
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not hasattr(inner, "__qualname__"):
        inner = type(inner)
    try:
        code = inspect.getsource(inner)
    except (OSError, TypeError):
        code = ""
    code += repr((build.args, build.keywords)) if isinstance(build, functools.partial) else ""
    return f"{inner.__module__}.{inner.__qualname__}@{hashlib.sha256(code.encode()).hexdigest()[:12]}"


def _seeds(cell: Cell) -> tuple[int, int]:
    """Return the seeds of a model's residual weights and of its ends."""
    model = {name: value for name, value in cell.items() if name not in ("betas", "gradients")}
    ends = {name: value for name, value in model.items() if name != "depth"}
    return seed_of(model), seed_of(ends, role="ends")


def _measure(law: Family | None, cell: Cell) -> dict[str, Array]:
    """Measure one model of a named network at all betas."""
    law = family(cell["init"], cell["hurst"]) if law is None else law
    network = network_named(cell["network"])
    model = draw_model(network, law, cell["depth"], cell["width"], cell["inputs"], *_seeds(cell))
    passes = pass_through(network, model, cell["betas"], cell["gradients"])
    values = {
        "hidden": passes.hidden.change,
        "hidden_ratio": passes.hidden.ratio,
        "active": passes.hidden.active,
    }
    if passes.gradient is not None:
        values |= {"gradient": passes.gradient.change, "gradient_ratio": passes.gradient.ratio}
    return {name: value.numpy() for name, value in values.items()}


def _measure_factory(build: Build, cell: Cell) -> dict[str, Array]:
    """Measure one module at one beta by autograd, in float64."""
    (seed, ends_seed), (beta,) = _seeds(cell), cell["betas"]
    generator = torch.Generator()
    ends = draw_ends(cell["width"], cell["inputs"], generator.manual_seed(ends_seed))
    starts, readout = (end.double() for end in ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for a factory that draws from torch's own generator
        module = build(cell["depth"], beta, generator.manual_seed(seed)).to(torch.float64)
        first = starts.T.contiguous().requires_grad_(cell["gradients"])
        last = module(first)
    if last.shape != first.shape:
        raise ValueError(
            f"the network maps [inputs, width] = {list(first.shape)} to {list(last.shape)}: it has to keep the shape."
        )
    values = dict(zip(METRICS, _lengths(first.detach(), last.detach()), strict=False))
    if cell["gradients"]:
        end = readout.expand_as(last)
        (begin,) = torch.autograd.grad(last, first, end)
        values |= dict(zip(METRICS[3:], _lengths(end, begin), strict=False))
    return {name: value[None].numpy() for name, value in values.items()}


def _lengths(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log10 of |end - start| / |start|, |end| / |start| and of the same of the positive parts. [inputs] each."""
    size = start.norm(dim=1)
    positive = end.clamp(min=0).norm(dim=1) / start.clamp(min=0).norm(dim=1)
    return ((end - start).norm(dim=1) / size).log10(), (end.norm(dim=1) / size).log10(), positive.log10()


def _gathered(name: str, outcomes: Sequence[Outcome], subject: Subject, betas: int, models: int, inputs: int) -> Array:
    """Put the cells' arrays of one metric together. [models, families, betas, inputs]."""
    families = max(1, len(subject.families))
    if name not in outcomes[0].values:
        return np.full((models, families, betas, inputs), np.nan)
    return np.stack([outcome.values[name] for outcome in outcomes]).reshape(models, families, betas, inputs)
