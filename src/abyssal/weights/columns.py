"""Reading given weights as paths through depth, a bounded number of columns at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from abyssal.weights.families import check_dtype

__all__ = ["Columns", "Summary", "Weights", "summarise"]

Weights: TypeAlias = Tensor | Sequence[Tensor] | Sequence[nn.Module]
"""Weights of all depths: a tensor [depth, ...], one tensor per depth, or one module per depth."""

MIN_DEPTH = 4
FEW_COLUMNS = 8  # fewer give neither a mean profile nor a spread between columns
_RUN = 128  # increments whose covariance is kept, to tell noise from a path by the exact likelihood
_CHUNK = 8 * 2**20  # bytes of float64 read at once


@dataclass(frozen=True)
class Columns:
    """Every entry of given weights as a path through depth.

    Attributes:
        parts: equally shaped tensors, first depth to last; a part for each parameter that is pooled.
        scales: what a part is divided by; 1 where there is only one.
    """

    parts: tuple[tuple[Tensor, ...], ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, weights: Weights) -> Columns:
        """Read what a caller gave, checking it.

        Raises:
            TypeError: for something else than tensors or modules.
            ValueError: for fewer than 4 depths, no entry, differing shapes, or values that are not finite.
        """
        if isinstance(weights, Tensor):
            if weights.dim() < 1:
                raise ValueError("weights has to be [depth, ...], got a single number.")
            parts = [tuple(weights.detach().unbind(0))]
        else:
            parts = _parts_of(list(weights))
        depth = len(parts[0]) if parts else 0
        if depth < MIN_DEPTH:
            raise ValueError(f"weights of {depth} depths: a path needs at least {MIN_DEPTH}; got {_shape(weights)}.")
        if not any(part[0].numel() for part in parts):
            raise ValueError(f"weights have no entry: {_shape(weights)}.")
        for part in parts:
            check_dtype(part[0].dtype)
            for n, row in enumerate(part):
                if row.shape != part[0].shape:
                    raise ValueError(
                        f"weights at depth {n} have shape {list(row.shape)}, those at depth 0 {list(part[0].shape)}: "
                        "not one path."
                    )
                if row.is_meta:
                    raise ValueError("weights are on the meta device and have no values; load them first.")
                if not torch.isfinite(row).all():
                    raise ValueError(f"weights at depth {n} hold values that are not finite (NaN or infinite).")
        if len(parts) == 1:
            return cls(tuple(parts), (1.0,))
        sizes = [math.sqrt(sum(float(row.double().square().mean()) for row in part) / depth) for part in parts]
        kept = [(part, size) for part, size in zip(parts, sizes, strict=True) if size > 0]
        if not kept:
            raise ValueError("All weights are 0, at every depth.")
        return cls(tuple(part for part, _ in kept), tuple(size for _, size in kept))

    @property
    def depth(self) -> int:
        """Length of a path."""
        return len(self.parts[0])

    @property
    def count(self) -> int:
        """Number of paths."""
        return sum(part[0].numel() for part in self.parts)

    @property
    def shape(self) -> torch.Size:
        """Shape of a depth's entries; flat where several parameters are pooled."""
        return self.parts[0][0].shape if len(self.parts) == 1 else torch.Size([self.count])

    def chunks(self) -> Iterator[Tensor]:
        """Yield the paths in order, a few at a time. [depth, columns of this chunk], float64."""
        width = max(1, _CHUNK // (8 * self.depth))
        for part, scale in zip(self.parts, self.scales, strict=True):
            rows = [row.reshape(-1) for row in part]
            for start in range(0, len(rows[0]), width):
                chunk = torch.stack([row[start : start + width].cpu() for row in rows])
                yield chunk.double() / scale


@dataclass(frozen=True)
class Summary:
    """What one pass over the paths gives, after the mean profile over all columns is taken out.

    Attributes:
        depth: length of a path.
        count: number of paths.
        profile: mean over columns at each depth; 0 where columns are too few to tell it. [depth]
        squares: mean square at each depth. [depth]
        steps: mean square of the increment from each depth to the next. [depth - 1]
        variation: mean over columns of the sum of absolute increments, the profile's included.
        neighbours: mean over columns of the sum of `x[n] x[n+1]`.
        lags: 1, 2, 4, ... up to a quarter of the depth.
        variogram: mean square of `x[n+lag] - x[n]` at each of them.
        values: mean periodogram of the paths at frequencies 1 to depth // 2. [depth // 2]
        increments: that of their increments. [(depth - 1) // 2]
        covariance: mean product of the increments in the same run of at most 128. [run, run]
    """

    depth: int
    count: int
    profile: Tensor
    squares: Tensor
    steps: Tensor
    variation: float
    neighbours: float
    lags: tuple[int, ...]
    variogram: Tensor
    values: Tensor
    increments: Tensor
    covariance: Tensor


def summarise(columns: Columns) -> Summary:
    """Read all paths once and return what the estimators need."""
    depth, count = columns.depth, columns.count
    lags = tuple(2**k for k in range(depth) if 2**k <= max(1, depth // 4))
    # A quantity is a mean over columns of a quadratic form; that of the mean profile is subtracted at the end.
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda x: x**2,
        lambda x: x.diff(dim=0) ** 2,
        lambda x: (x[:-1] * x[1:]).sum(0, keepdim=True),
        lambda x: torch.stack([(x[lag:] - x[:-lag]).square().mean(0) for lag in lags]),
        periodogram,
        lambda x: periodogram(x.diff(dim=0)),
    ]
    run = min(_RUN, depth - 1)
    products: Tensor | float = 0.0
    sums: list[Tensor | float] = [0.0] * len(forms)
    profile: Tensor | float = 0.0
    variation = 0.0
    for chunk in columns.chunks():
        profile = profile + chunk.sum(1)
        products = products + _products(chunk, run)
        variation += float(chunk.diff(dim=0).abs().sum())
        sums = [total + form(chunk).sum(1) for total, form in zip(sums, forms, strict=True)]
    mean = torch.as_tensor(profile) / count
    if count < FEW_COLUMNS:
        mean = torch.zeros_like(mean)
        means = [torch.as_tensor(total) / count for total in sums]
        covariance = torch.as_tensor(products) / count
    else:
        covariance = (torch.as_tensor(products) - count * _products(mean[:, None], run)) / (count - 1)
        means = [
            ((torch.as_tensor(total) - count * form(mean[:, None])[:, 0]) / (count - 1))
            for total, form in zip(sums, forms, strict=True)
        ]
    squares, steps, neighbours, variogram, values, increments = means
    return Summary(
        depth, count, mean, squares, steps, variation / count, float(neighbours), lags, variogram, values, increments,
        covariance,
    )  # fmt: skip


def _products(paths: Tensor, run: int) -> Tensor:
    """Return the sum over columns, and mean over runs, of products of increments. [run, run]."""
    steps = paths.diff(dim=0)
    runs = steps.unfold(0, run, run)  # [runs, columns, run]; what is left over at the end is not used
    flat = runs.reshape(-1, run)
    return flat.T @ flat / len(runs)


def periodogram(paths: Tensor) -> Tensor:
    """Return `|sum_n x[n] exp(-2 pi i j n / N)|^2 / N` at j = 1, ..., N // 2.

    Args:
        paths: [N, columns]

    Returns:
        [N // 2, columns]
    """
    waves = torch.fft.rfft(paths, dim=0)[1:]
    return waves.abs().square() / len(paths)


def _parts_of(given: Sequence[object]) -> list[tuple[Tensor, ...]]:
    if given and all(isinstance(item, Tensor) for item in given):
        return [tuple(item.detach() for item in given if isinstance(item, Tensor))]
    if given and all(isinstance(item, nn.Module) for item in given):
        named = [dict(item.named_parameters()) for item in given if isinstance(item, nn.Module)]
        for n, other in enumerate(named):
            if {k: p.shape for k, p in other.items()} != {k: p.shape for k, p in named[0].items()}:
                raise ValueError(f"Module {n} has other parameters than module 0: not one path.")
        weights = [name for name, p in named[0].items() if p.dim() >= 2]
        if not weights:
            raise ValueError("The modules have no weight of two dimensions or more. Pass one tensor per depth instead.")
        return [tuple(parameters[name].detach() for parameters in named) for name in weights]
    kinds = sorted({type(item).__name__ for item in given}) or ["nothing"]
    raise TypeError(
        f"weights has to be a tensor [depth, ...], one tensor or one module per depth; got {', '.join(kinds)}."
    )


def _shape(weights: Weights) -> str:
    return f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else f"a list of {len(weights)}"
