"""How a network's regime depends on depth: slopes, the critical beta, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from abyssal.scaling.phases.cells import Build, Samples, Subject, check_betas, check_run, measure
from abyssal.scaling.phases.crossing import (
    Critical,
    crossing,
    depth_slopes,
    mean_and_error,
    model_means,
    resampled_interval,
    resampled_means,
    resamplings,
    student,
)
from abyssal.scaling.phases.diagram import TOLERANCE, name_regime
from abyssal.sweep.store import Store
from abyssal.util.checks import ascending, one_of, whole
from abyssal.util.progress import Progress
from abyssal.weights.families import Family

__all__ = ["CRITICAL_BETAS", "Regime", "critical_beta", "regime"]

CRITICAL_BETAS = tuple(float(beta) for beta in np.arange(0.05, 1.2001, 0.025).round(6))
Array = np.ndarray


@dataclass(frozen=True)
class Regime:
    """What a network becomes as its depth grows, as far as the depths measured show.

    Attributes:
        name: identity, ode, sde, explosion or collapse (see :meth:`PhaseDiagram.regimes`); empty where nothing moved.
        slope: of log10 |h_L - h_0| / |h_0| in log10 of depth; on the frozen side it is the critical beta minus beta.
        slope_low: lower end of its 95 % interval.
        slope_high: upper end.
        confidence: probability that the slope lies in the band of this name, by the normal law over models;
            it says nothing of larger depths.
        active_slope: the slope of the positive part's size.
        depths: that were measured.
        means: log10 of the metric at each depth.
    """

    name: str
    slope: float
    slope_low: float
    slope_high: float
    confidence: float
    active_slope: float
    depths: tuple[int, ...]
    means: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"{self.name or 'nothing moved'} (confidence {self.confidence:.2f}): slope in depth {self.slope:+.3f} "
            f"[{self.slope_low:+.3f}, {self.slope_high:+.3f}] over depths {', '.join(map(str, self.depths))}"
        )


def regime(
    network: str | Build,
    init: str | Family | None = None,
    beta: float = 0.5,
    hurst: float | None = None,
    *,
    width: int = 40,
    depths: Sequence[int] = (250, 500, 1000),
    models: int = 20,
    inputs: int = 5,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    store: Store | None = None,
    engine: str = "sequential",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Regime:
    """Say what a residual network becomes as depth grows: identity, ODE, SDE, explosion, or collapse.

    Args:
        network: `"res1"`, `"res3"`, or a factory; see :func:`phase_diagram`.
        init: the weights' family; None for a factory.
        beta: branches are scaled by depth^-beta.
        hurst: the Hurst index, for a family that has one.
        width: of the states.
        depths: at least two, increasing.
        models: independent networks at each depth, at least two.
        inputs: for each network.
        seed: of everything.
        tolerance: slopes nearer to 0 than this count as 0.
        store: keeps finished models.
        engine: see :func:`abyssal.sweep.run`.
        jobs: processes.
        progress: called with what is being done, models done and models in all.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
    """
    subject = Subject.of(network, init, None if hurst is None else [hurst], ())
    how = {"store": store, "engine": engine, "jobs": jobs, "progress": progress}
    found = _measured(subject, depths, width, check_betas([beta]), models, inputs, seed, gradients=False, **how)
    slopes = _slopes(found, "hidden", depths)
    ends = resampled_interval(slopes, _resampled_slopes(found, "hidden", depths, models, seed), models)
    slope, low, high = (float(figure[0, 0]) for figure in (slopes, *ends))
    active = float(_slopes(found, "active", depths)[0, 0])
    name = name_regime(slope, active, beta, tolerance)
    means = tuple(float(mean_and_error(model_means(part.values["hidden"]))[0][0, 0]) for part in found)
    confidence = _confidence(slope, (high - low) / 2, models, tolerance) if name else math.nan
    return Regime(name, slope, low, high, confidence, active, tuple(depths), means)


def critical_beta(
    network: str | Build = "res3",
    init: str | Family | None = None,
    hurst: float | Sequence[float] | None = None,
    width: int = 40,
    depths: Sequence[int] = (500, 1000, 2000, 4000),
    *,
    betas: Sequence[float] = CRITICAL_BETAS,
    metric: str = "hidden",
    models: int = 10,
    inputs: int = 4,
    seed: int = 0,
    store: Store | None = None,
    engine: str = "local",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Critical:
    """Return the largest beta at which a metric neither grows nor falls with depth.

    At each beta the slope of the metric's mean logarithm in log depth is fitted over the depths, by least squares; the
    critical beta is where it comes down through 0, interpolated between betas. The interval at 95 % is over models
    (resampled, the same at all depths; see `phases/crossing.py`): it holds the sampling error at these depths,
    and not what larger depths would still change; compare several ranges of depths for that.

    Args:
        network: `"res1"`, `"res3"`, or a factory; see :func:`phase_diagram`.
        init: the weights' family; None is fractional noise, and the only one for a factory.
        hurst: one Hurst index or several.
        width: of the states.
        depths: at least two, increasing.
        betas: increasing; they should enclose the critical one closely enough to interpolate.
        metric: `"hidden"`, or `"gradient"` (about twice the work).
        models: independent networks at each depth, at least two.
        inputs: for each network.
        seed: of everything.
        store: keeps finished models.
        engine: see :func:`abyssal.sweep.run`.
        jobs: processes.
        progress: called with what is being done, models done and models in all.

    Returns:
        One figure per Hurst index.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
    """
    hursts = [hurst] if isinstance(hurst, int | float) else hurst
    subject = Subject.of(network, init, hursts, ())
    grid = check_betas(betas)
    one_of("metric", metric, ("hidden", "gradient"))
    ascending("betas", grid, 2)  # to interpolate between
    given = {"store": store, "engine": engine, "jobs": jobs, "progress": progress}
    found = _measured(subject, depths, width, grid, models, inputs, seed, gradients=metric == "gradient", **given)
    value = crossing(grid, _slopes(found, metric, depths))
    replicas = crossing(grid, _resampled_slopes(found, metric, depths, models, seed))
    low, high = resampled_interval(value, replicas, models)
    shown = ", ".join(f"{depth:,}" for depth in depths)
    how = f"{network_name(subject)}, width {width}: {metric} metric does not depend on depth, over depths {shown}"
    return Critical((None,) if subject.hursts is None else subject.hursts, value, low, high, how)


def _measured(
    subject: Subject,
    depths: Sequence[int],
    width: int,
    betas: tuple[float, ...],
    models: int,
    inputs: int,
    seed: int,
    **how: Any,
) -> list[Samples]:
    """Measure at each depth, once all that was asked for is checked."""
    ascending("depths", [whole("depths", depth) for depth in depths], 2)
    check_run(depths, betas, width, models, inputs, seed, how["engine"], how["jobs"], how["store"])
    whole("models", models, 2)
    return [measure(subject, depth, width, betas, models, inputs, seed, **how) for depth in depths]


def network_name(subject: Subject) -> str:
    """Return network and family in a few words."""
    return f"{subject.network}, {subject.init} weights" if subject.init else subject.network


def _slopes(found: Sequence[Samples], metric: str, depths: Sequence[int]) -> Array:
    """Return the slope at each point. [families, betas]."""
    return depth_slopes(depths, [mean_and_error(model_means(part.values[metric]))[0] for part in found])


def _resampled_slopes(found: Sequence[Samples], metric: str, depths: Sequence[int], models: int, seed: int) -> Array:
    """Return the slopes over resampled models. [resamplings, families, betas].

    A model is taken at all depths or at none, as it has the same inputs at all of them.
    """
    counts = resamplings(models, seed)
    means = [resampled_means(model_means(part.values[metric]), counts) for part in found]
    return depth_slopes(depths, means)


def _confidence(slope: float, half: float, models: int, tolerance: float) -> float:
    """Return the probability that a slope lies in the band that its estimate lies in."""
    if not half > 0:
        return 1.0 if half == 0 else math.nan
    law = NormalDist(slope, half / student(models - 1))
    if slope > tolerance:
        return 1 - law.cdf(tolerance)
    if slope < -tolerance:
        return law.cdf(-tolerance)
    return law.cdf(tolerance) - law.cdf(-tolerance)
