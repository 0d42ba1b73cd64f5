"""Where a metric stops depending on depth: critical exponents and slopes, with their uncertainty.

Independent models are the units of every uncertainty here: inputs that share a model are correlated, and so are
betas. Intervals are at 95 %: estimate plus and minus Student's t times the standard deviation of 2,000 resamplings of
the models, enlarged by sqrt(n / (n - 1)), as a resampling of n has that much too little variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from abyssal.util.stats import student

__all__ = [
    "Critical",
    "crossing",
    "depth_slopes",
    "mean_and_error",
    "model_means",
    "resampled_interval",
    "resampled_means",
    "resamplings",
]

RESAMPLINGS = 2000
Array = np.ndarray


@dataclass(frozen=True)
class Critical:
    """Critical exponents, one for each weight family that was looked at.

    Attributes:
        hursts: the families' Hurst indices; None where they have none.
        value: the largest beta at which the level is crossed; nan where the betas given do not enclose it. [families]
        low: lower end of the 95 % interval. [families]
        high: upper end. [families]
        how: what was crossed, in words.
    """

    hursts: tuple[float | None, ...]
    value: Array
    low: Array
    high: Array
    how: str

    def __str__(self) -> str:
        lines = [self.how]
        for hurst, value, low, high in zip(self.hursts, self.value, self.low, self.high, strict=True):
            name = "" if hurst is None else f"H = {hurst:g}: "
            found = (
                "not crossed within the betas given" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"
            )
            lines.append(name + found)
        return "\n".join(lines)


def model_means(samples: Array) -> Array:
    """Return the mean over inputs, the last axis, of those that moved at all; nan where none did.

    Args:
        samples: log10 of a metric; -inf where a state did not move. [models, ..., inputs]

    Returns:
        One number per model. [models, ...]
    """
    moved = samples != -np.inf
    count = moved.sum(-1)
    total = np.where(moved, samples, 0.0).sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mean_and_error(models: Array) -> tuple[Array, Array]:
    """Return the mean over models and its standard error, models that are nan left out; nan where too few are left.

    Args:
        models: one number per model. [models, ...]
    """
    known = ~np.isnan(models)
    count = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, models, 0.0).sum(0) / count
        squares = np.where(known, (models - mean) ** 2, 0.0).sum(0)
        return mean, np.sqrt(squares / (count - 1) / count)


def crossing(betas: Sequence[float] | Array, values: Array, level: float = 0.0) -> Array:
    """Return the largest beta at which values come down through a level, by linear interpolation.

    Args:
        betas: increasing. [betas]
        values: a metric, or its slope in depth, that is below the level at large betas. [..., betas]
        level: what is crossed.

    Returns:
        The crossing; nan where the values are above the level at the largest beta, or below it at all. [...]
    """
    at = np.asarray(betas, dtype=float)
    above = values >= level
    # The last beta above the level; the crossing is between it and the next.
    last = values.shape[-1] - 1 - np.argmax(above[..., ::-1], axis=-1)
    inside = above.any(-1) & ~above[..., -1]
    left = np.minimum(last, len(at) - 2)
    low, high = (np.take_along_axis(values, (left + i)[..., None], -1)[..., 0] for i in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(np.isfinite(low), (low - level) / (low - high), 1.0)
        found = at[left] + part * (at[left + 1] - at[left])
    return np.where(inside & np.isfinite(high), found, np.nan)


def depth_slopes(depths: Sequence[int], means: Sequence[Array]) -> Array:
    """Return the least-squares slope of a metric's logarithm against log10 of depth.

    Args:
        depths: at least two.
        means: log10 of the metric at each depth. [depths][...]
    """
    x = np.log10(np.asarray(depths, dtype=float))
    x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return np.tensordot(x, np.stack(means), axes=1)


def resampled_interval(value: Array, replicas: Array, models: int) -> tuple[Array, Array]:
    """Return a 95 % interval around an estimate from its values on resampled models.

    Args:
        value: the estimate. [...]
        replicas: the same on each resampling; nan ones are left out, if they are no more than a tenth.
            [resamplings, ...]
        models: how many independent models there are, the fewest over depths.

    Returns:
        Lower and upper end; nan where there is no estimate, fewer than two models, or too many nan. [...]
    """
    known = np.isfinite(replicas)
    enough = (known.mean(0) >= 0.9) & (models >= 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        count = known.sum(0)
        centre = np.where(known, replicas, 0.0).sum(0) / count
        spread = np.sqrt(np.where(known, (replicas - centre) ** 2, 0.0).sum(0) / (count - 1))
    if models < 2:
        nothing = np.full_like(value, np.nan)
        return nothing, nothing
    half = np.where(enough, student(models - 1) * spread * math.sqrt(models / (models - 1)), np.nan)
    return value - half, value + half


def resamplings(models: int, seed: int) -> Array:
    """Return which models each resampling has, as counts to weight them by. [resamplings, models]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(models, np.full(models, 1 / models), size=RESAMPLINGS).astype(float)


def resampled_means(models: Array, counts: Array) -> Array:
    """Return the means over each resampling of the models, those that are nan left out.

    Args:
        models: one number per model. [models, ...]
        counts: how often each resampling has each model. [resamplings, models]

    Returns:
        Means; nan where a resampling has no model with a number. [resamplings, ...]
    """
    known = ~np.isnan(models)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.tensordot(counts, np.where(known, models, 0.0), axes=1)
        return total / np.tensordot(counts, known.astype(float), axes=1)
