"""A kernel in tiles: which samples and outputs are looked at together, so that memory stays within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from abyssal.tangent.batch import cut
from abyssal.tangent.empirical.products import Mode

__all__ = ["Row", "Tiling", "choose", "halves", "rows"]


@dataclass(frozen=True)
class Tiling:
    """Sizes of blocks.

    Attributes:
        rows: samples of the first kind that are kept while the second kind passes by.
        columns: samples of the second kind at a time.
        outputs: outputs at a time.
    """

    rows: int
    columns: int
    outputs: int


@dataclass(frozen=True)
class Row:
    """A strip of the kernel: one block of samples and outputs against others.

    Attributes:
        samples: of the first kind.
        outputs: of theirs.
        own: whether the block is multiplied with itself.
        columns: samples of the second kind and their outputs, block by block.
    """

    samples: slice
    outputs: slice
    own: bool
    columns: tuple[tuple[slice, slice], ...]


def rows(n1: int, n2: int | None, outputs: slice, mode: Mode, tiling: Tiling) -> Iterator[Row]:
    """Give the strips of a kernel, each pair once where it is symmetric.

    Args:
        n1: samples of the first kind.
        n2: of the second; None for a symmetric kernel.
        outputs: that are wanted.
        mode: `"full"` pairs all outputs, the others each with itself.
        tiling: sizes of blocks.
    """
    chunks = cut(outputs.start, outputs.stop, tiling.outputs)
    for index, chunk in enumerate(chunks):
        for block in cut(0, n1, tiling.rows):
            columns: list[tuple[slice, slice]] = []
            for other in range(len(chunks)) if mode == "full" else (index,):
                if n2 is not None:
                    columns += [(c, chunks[other]) for c in cut(0, n2, tiling.columns)]
                elif other == index:
                    columns += [(c, chunk) for c in cut(block.stop, n1, tiling.columns)]
                elif other > index:  # K[i, j, a, b] = K[j, i, b, a]: outputs of earlier chunks are there already
                    columns += [(c, chunks[other]) for c in cut(0, n1, tiling.columns)]
            yield Row(block, chunk, n2 is None, tuple(columns))


def halves(number: int) -> list[int]:
    """Return a number and its halves, rounded up, down to 1."""
    found = [number]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def choose(
    n1: int, n2: int | None, k: int, mode: Mode, fits: Callable[[Tiling], bool], most_rows: int | None = None
) -> Tiling | None:
    """Return the tiling that runs the model least often among those that fit; None where none does.

    Args:
        n1: samples of the first kind.
        n2: of the second; None for a symmetric kernel.
        k: outputs.
        mode: see :func:`rows`.
        fits: whether a tiling is within the budget.
        most_rows: an upper limit on the rows of a block, for the sake of several processes.
    """
    best: tuple[float, Tiling] | None = None
    limit = n1 if most_rows is None else min(n1, most_rows)
    for outputs in halves(k):
        for height in halves(limit):
            for width in {1, -(-height // 8), -(-height // 2), height, n2 or height}:
                tiling = Tiling(height, width, outputs)
                price = _price(n1, n2, k, mode, tiling)
                # Blocks of few samples are paid for in calls rather than in operations: a sample more for each.
                if (best is None or price < best[0]) and fits(tiling):
                    best = (price, tiling)
    return None if best is None else best[1]


def _price(n1: int, n2: int | None, k: int, mode: Mode, tiling: Tiling) -> float:
    """Forward and backward passes, counted by samples, with eight samples' worth for every call."""
    blocks, chunks = -(-n1 // tiling.rows), -(-k // tiling.outputs)
    passed = (blocks * n2) if n2 is not None else (blocks - 1) * n1 / 2
    columns = passed * chunks
    if mode == "full":
        columns = passed * chunks**2 if n2 is not None else passed * chunks + blocks * n1 * chunks * (chunks - 1) / 2
    calls = blocks * chunks + columns / tiling.columns
    return (n1 * chunks + columns + 8 * calls) * (1 + tiling.outputs)
