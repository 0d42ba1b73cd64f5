"""Quantisers of the increments that `quantisers.py` compares: scales, tables of levels, rotations, rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from abyssal.codec.quantiser import Codec

WEIGHT_OF_SCALE = 16  # bits, bfloat16
CHOSEN = "**abyssal's**"


@dataclass(frozen=True)
class Quantiser:
    """Levels on values divided by a group's scale.

    Args:
        scale: "max", "rms", "mean" (of magnitudes), "signed" (the element of largest magnitude, with its sign) or
            "fit" (the part of the largest magnitude that loses least, searched in each group).
        levels: "even" (2^b cells over [-1, 1], decoded to their centres), "odd" (2^b - 1 levels, zero among them),
            "zero" (2^b levels from -1 in steps of 2^(1-b), zero among them), or "gauss" and "laplace"
            (Lloyd-Max levels for such increments, divided by that scale).
        rotate: whether each group is multiplied by a Hadamard matrix first.
        stochastic: whether a value goes to one of the two nearest levels at random, without bias.
    """

    bits: int
    scale: str
    levels: str
    group: int = 64
    rotate: bool = False
    stochastic: bool = False

    @property
    def rate(self) -> float:
        """Bits per element."""
        return self.bits + WEIGHT_OF_SCALE / self.group

    @property
    def name(self) -> str:
        """What it is called in the tables."""
        kind = NAMES[self.scale, self.levels] if self.levels in ("even", "odd", "zero") else None
        kind = kind or f"Lloyd-Max {'Gauss' if self.levels == 'gauss' else 'Laplace'} / {self.scale}"
        kind += ", rotated" if self.rotate else ""
        return kind + (", stochastic" if self.stochastic else "")

    def __call__(self, d: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What `d` decodes to, and its cell relative to that: (decoded, low, high), all of [*shape]."""
        grouped = nn.functional.pad(d.flatten(), (0, -d.numel() % self.group)).view(-1, self.group)
        if self.rotate:
            grouped = grouped @ hadamard(self.group)
        levels = table(self.scale, self.levels, self.bits, self.group)
        scale = self._fit(grouped, levels) if self.scale == "fit" else scale_of(grouped, self.scale)
        decoded, low, high = self._quantise(grouped, scale, levels, generator)
        if self.rotate:
            decoded = decoded @ hadamard(self.group)
            low, high = torch.full_like(decoded, -math.inf), torch.full_like(decoded, math.inf)
        return tuple(t.flatten()[: d.numel()].view(d.shape) for t in (decoded, low, high))

    def _quantise(self, grouped: Tensor, scale: Tensor, levels: Tensor, generator: torch.Generator) -> tuple:
        values = torch.where(scale != 0, grouped / scale, 0.0)
        borders = (levels[1:] + levels[:-1]) / 2
        index = torch.bucketize(values, borders)
        if self.stochastic:
            below = (torch.bucketize(values, levels) - 1).clamp(0, len(levels) - 2)
            part = (values - levels[below]) / (levels[below + 1] - levels[below])
            index = below + (torch.rand(values.shape, generator=generator) < part)
            edges = torch.cat([levels[:1] - math.inf, levels, levels[-1:] + math.inf])
            low, high = edges[index], edges[index + 2]
        else:
            edges = torch.cat([levels[:1] - math.inf, borders, levels[-1:] + math.inf])
            low, high = edges[index], edges[index + 1]
        level = levels[index]
        low, high = (low - level) * scale, (high - level) * scale
        return level * scale, torch.minimum(low, high), torch.maximum(low, high)

    def _fit(self, grouped: Tensor, levels: Tensor) -> Tensor:
        largest = scale_of(grouped, "max")
        tried = torch.stack([(largest * part).bfloat16().float() for part in torch.linspace(0.25, 1, 16)])
        borders = (levels[1:] + levels[:-1]) / 2
        lost = []
        for scale in tried:
            decoded = levels[torch.bucketize(torch.where(scale != 0, grouped / scale, 0.0), borders)] * scale
            lost.append((grouped - decoded).square().sum(1))
        best = torch.stack(lost).argmin(0)
        return tried.squeeze(-1).gather(0, best[None]).view(-1, 1)


@dataclass(frozen=True)
class Packaged:
    """The codec that abyssal has."""

    bits: int
    group: int = 64
    rotate = False
    name = CHOSEN

    @property
    def rate(self) -> float:
        """Bits per element."""
        return 8 * Codec(self.bits, self.group).nbytes(2**20) / 2**20

    def __call__(self, d: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """As `Quantiser`."""
        codec = Codec(self.bits, self.group)
        encoded, decoded = codec.encode(d)
        return decoded, *codec.cell(encoded)


NAMES = {
    ("max", "even"): "uniform / max",
    ("max", "odd"): "uniform with zero / max",
    ("signed", "zero"): "uniform with zero / signed max",
    ("fit", "even"): "uniform / fitted clip",
    ("mean", "even"): "sign / mean",
}


def scale_of(grouped: Tensor, kind: str) -> Tensor:
    """The scale of each group, as bfloat16 holds it. [groups, 1]"""
    largest = grouped.abs().amax(1, keepdim=True)
    if kind == "rms":
        return grouped.square().mean(1, keepdim=True).sqrt().bfloat16().float()
    if kind == "mean":
        return grouped.abs().mean(1, keepdim=True).bfloat16().float()
    up = ((largest.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)  # away from zero
    if kind == "signed":
        return torch.where(-grouped.amin(1, keepdim=True) == largest, up, -up)  # the extreme becomes -1
    return up


@cache
def table(scale: str, levels: str, bits: int, group: int) -> Tensor:
    """The levels, ascending. [2^bits] or one fewer"""
    half = 2 ** (bits - 1)
    if scale == "mean":
        return torch.tensor([-1.0, 1.0])
    if levels == "even":
        return (torch.arange(-half, half) + 0.5) / half
    if levels == "odd":
        return torch.arange(1 - half, half) / (half - 0.5)
    if levels == "zero":
        return torch.arange(-half, half) / half
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2**20 // group, group, generator=generator)
    if levels == "laplace":
        drawn = torch.empty_like(drawn).exponential_(generator=generator) * drawn.sign()
    factor = scale_of(drawn, scale)
    values, order = (drawn / factor).flatten().double().sort()
    weights = factor.square().expand_as(drawn).flatten()[order].double()
    return lloyd(values, weights, 2**bits).float()


def lloyd(values: Tensor, weights: Tensor, count: int, rounds: int = 300) -> Tensor:
    """Levels that lose least of sorted values (Lloyd 1957, Max 1960), by alternating borders and centroids."""
    zero = torch.zeros(1, dtype=values.dtype)
    mass, moment = torch.cat([zero, weights.cumsum(0)]), torch.cat([zero, (weights * values).cumsum(0)])
    levels = torch.quantile(values[:: max(1, len(values) // 2**16)], (torch.arange(count).double() + 0.5) / count)
    for _ in range(rounds):
        cuts = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        cuts = torch.cat([torch.zeros(1, dtype=cuts.dtype), cuts, torch.tensor([len(values)])])
        inside = mass[cuts[1:]] - mass[cuts[:-1]]
        levels = torch.where(inside > 0, (moment[cuts[1:]] - moment[cuts[:-1]]) / inside.clamp_min(1e-12), levels)
        levels = levels.sort()[0]
    return levels


@cache
def hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix, its own inverse; `size` a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
