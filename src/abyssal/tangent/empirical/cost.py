"""How much memory and how many operations a kernel takes, before it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.tangent.empirical.parts import Outer, Part, Unfolded
from abyssal.tangent.empirical.products import WORKSPACE, Mode, cost
from abyssal.tangent.empirical.tiles import Tiling
from abyssal.util.text import bytes_in_words

__all__ = ["Footprint", "Forecast", "blueprint", "enlarged"]

# Gradients of a layer's size that are alive at once in a backward pass; tanh-GELU written out takes the most seen.
_PASSING = 8


def blueprint(part: Part) -> Part:
    """Return one sample's share of a part with one output, without its values: shapes only."""
    return part.mapped(lambda values, _: torch.empty((1, *values.shape[1:]), dtype=values.dtype, device="meta"))


def enlarged(part: Part, n: int, outputs: int) -> Part:
    """Return a blueprint for more samples and outputs."""

    def grown(values: Tensor, by_output: bool) -> Tensor:
        return values.expand(n, outputs if by_output else values.shape[1], *values.shape[2:])

    return part.mapped(grown)


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
                total += part.by_output.nbytes * outputs
                if isinstance(part, Outer):
                    total += (part.right if part.dependent == "left" else part.left).nbytes
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
        largest = max((p.by_output.nbytes for parts in self.parts.values() for p in parts), default=0)
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
            f"tangent kernel {list(self.shape)} of {self.parameters:,} parameters: {bytes_in_words(self.result_bytes)}",
            f"working memory   {bytes_in_words(self.working_bytes)} (budget {bytes_in_words(self.budget)}, "
            f"at least {bytes_in_words(self.least_bytes)})",
            f"blocks           {t.rows} samples{against}, {t.outputs} of {self.outputs} outputs at a time",
            f"operations       {sum(self.operations):.2g}: {self.operations[0]:.2g} in products, "
            f"{self.operations[1]:.2g} in passes through the model",
        ]
        if self.fallback:
            names = ", ".join(self.fallback[:4]) + (", ..." if len(self.fallback) > 4 else "")
            lines.append(f"gradients formed {len(self.fallback)} parameters ({names})")
        return "\n".join(lines)
