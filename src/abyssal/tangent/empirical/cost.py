"""How much memory and how many operations a kernel takes, before it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abyssal.tangent.empirical.parts import Dense, Direct, OneHot, Outer, Part, Unfolded
from abyssal.tangent.empirical.products import WORKSPACE, Mode, cost
from abyssal.tangent.empirical.tiles import Tiling

__all__ = ["Footprint", "Forecast", "blueprint", "enlarged"]

# Gradients of a layer's size that are alive at once in a backward pass; tanh-GELU written out takes the most seen.
_PASSING = 8


def blueprint(part: Part) -> Part:
    """Return one sample's share of a part with one output, without its values: shapes only."""
    if isinstance(part, Direct):
        return Direct(_bare(part.values))
    left = OneHot(_bare(part.left.ids), part.left.size) if isinstance(part.left, OneHot) else _bare_dense(part.left)
    right = replace(part.right, x=_bare(part.right.x)) if isinstance(part.right, Unfolded) else _bare_dense(part.right)
    return Outer(left, right, 1, part.dependent)


def _bare(values: Tensor) -> Tensor:
    return torch.empty((1, *values.shape[1:]), dtype=values.dtype, device="meta")


def _bare_dense(factor: Dense) -> Dense:
    return Dense(_bare(factor.values))


def enlarged(part: Part, n: int, outputs: int) -> Part:
    """Return a blueprint for more samples and outputs."""

    def dense(factor: Dense, dependent: bool) -> Dense:
        return Dense(factor.values.expand(n, outputs if dependent else 1, -1, -1, -1))

    if isinstance(part, Direct):
        return Direct(part.values.expand(n, outputs, -1))
    side = part.dependent
    if isinstance(part.left, OneHot):
        left: Dense | OneHot = OneHot(part.left.ids.expand(n, -1), part.left.size)
    else:
        left = dense(part.left, side == "left")
    if isinstance(part.right, Unfolded):
        right: Dense | Unfolded = replace(part.right, x=part.right.x.expand(n, *part.right.x.shape[1:]))
    else:
        right = dense(part.right, side == "right")
    return Outer(left, right, outputs, side)


@dataclass(frozen=True)
class Footprint:
    """What a model's samples take.

    Attributes:
        parts: blueprints by parameter.
        fallback: sizes of the parameters that need their gradients formed, in bytes of one gradient.
        graph: bytes that one sample's forward pass keeps for the backward pass.
        itemsize: of the kernel's dtype.
    """

    parts: Mapping[str, Sequence[Part]]
    fallback: int
    graph: int
    itemsize: int

    def held(self, outputs: int, least: int = 1) -> int:
        """Return the bytes of one sample's parts, of parameters that are used at least so often."""
        total = self.fallback * outputs
        for parts in self.parts.values():
            for part in parts if len(parts) >= least else ():
                if isinstance(part, Direct):
                    total += _moving(part) * outputs
                else:
                    times = {"left": 1, "right": 1, part.dependent: outputs}
                    total += part.left.nbytes * times["left"] + part.right.nbytes * times["right"]
        return total

    def peak(self, tiling: Tiling, alone: bool, mode: Mode) -> int:
        """Return the bytes of working memory.

        Args:
            tiling: sizes of blocks.
            alone: whether there is but one block, multiplied with itself: then nothing is kept of a parameter once
                its gradients are there. Else the rows' parts are kept while columns pass by.
            mode: what is paired.
        """
        columns = 0 if alone else tiling.columns
        largest = max((_moving(p) for parts in self.parts.values() for p in parts), default=0)
        passing = self.graph + _PASSING * largest * tiling.outputs + self.held(tiling.outputs, least=2)
        kept = 0 if alone else self.held(tiling.outputs) * tiling.rows
        return kept + max(tiling.rows, columns) * passing + self._working(tiling, columns, mode)

    def _working(self, tiling: Tiling, columns: int, mode: Mode) -> int:
        """Bytes that the product for one parameter takes."""
        largest = 0
        samples = tiling.rows + columns
        pairs = tiling.rows * (columns or tiling.rows)
        pairs *= tiling.outputs ** {"full": 2, "diagonal": 1, "trace": 0}[mode]
        for parts in self.parts.values():
            for part in parts:
                formed = samples * tiling.outputs * part.numel * self.itemsize
                patches = 0
                if isinstance(part, Outer) and isinstance(part.right, Unfolded):
                    patches = samples * part.groups * part.positions * part.right.size * self.itemsize
                largest = max(largest, 2 * min(formed, 2 * WORKSPACE) + patches)
        return largest + 3 * pairs * self.itemsize

    def operations(self, n1: int, n2: int | None, outputs: int, mode: Mode) -> float:
        """Return the operations of all products, roughly."""
        total = 0.0
        for parts in self.parts.values():
            first = [enlarged(p, n1, outputs) for p in parts]
            total += cost(first, first if n2 is None else [enlarged(p, n2, outputs) for p in parts], mode)
        pairs = n1 * (n2 or n1) * outputs ** (2 if mode == "full" else 1)
        return total + 2 * pairs * self.fallback / self.itemsize


def _moving(part: Part) -> int:
    if isinstance(part, Direct):
        return part.values.numel() * part.values.element_size()
    factor = part.left if part.dependent == "left" else part.right
    return factor.nbytes


@dataclass(frozen=True)
class Forecast:
    """What computing a kernel will take.

    Attributes:
        samples: n1 and n2.
        outputs: of one sample, that count.
        shape: of the kernel.
        parameters: that count.
        result_bytes: of the kernel.
        working_bytes: beside the model and the kernel, in each process.
        least_bytes: the least budget that works.
        budget: what was allowed, in bytes, for all processes.
        tiling: sizes of blocks.
        operations: multiplications and additions in products of gradients, and in passes through the model; the second
            as torch's counter has them (matrix products and convolutions).
        fallback: names of parameters whose gradients are formed by torch.func, which is slower.
    """

    samples: tuple[int, int]
    outputs: int
    shape: tuple[int, ...]
    parameters: int
    result_bytes: int
    working_bytes: int
    least_bytes: int
    budget: int
    tiling: Tiling
    operations: tuple[float, float]
    fallback: tuple[str, ...]

    def __str__(self) -> str:
        """Return the figures as a few lines."""
        t = self.tiling
        against = "" if t.rows >= max(self.samples) else f" against {t.columns}"
        lines = [
            f"tangent kernel {list(self.shape)} of {self.parameters:,} parameters: {_size(self.result_bytes)}",
            f"working memory   {_size(self.working_bytes)} (budget {_size(self.budget)}, "
            f"at least {_size(self.least_bytes)})",
            f"blocks           {t.rows} samples{against}, {t.outputs} of {self.outputs} outputs at a time",
            f"operations       {sum(self.operations):.2g}: {self.operations[0]:.2g} in products, "
            f"{self.operations[1]:.2g} in passes through the model",
        ]
        if self.fallback:
            names = ", ".join(self.fallback[:4]) + (", ..." if len(self.fallback) > 4 else "")
            lines.append(f"gradients formed {len(self.fallback)} parameters ({names})")
        return "\n".join(lines)


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
