"""What `deepen` has to know of a model's residual branches, and who tells it.

Reading branches belongs to `abyssal.scaling`, which stands above this room. So this room says what it needs, and
`abyssal.scaling` hands in its reader when it is imported, which `import abyssal` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

__all__ = ["Branch", "Reader", "Reading", "branch_reader", "use_branch_reader"]


class Branch(Protocol):
    """One residual branch: dotted names of its block and of the module whose output is added to the stream."""

    @property
    def block(self) -> str:
        """Its block."""

    @property
    def end(self) -> str:
        """The module that ends it."""


class Reading(Protocol):
    """What was read of a model: the names of its blocks, how often blocks are called, and every branch once."""

    @property
    def blocks(self) -> Sequence[str]:
        """Dotted names."""

    @property
    def depth(self) -> int:
        """How often blocks are called."""

    @property
    def branches(self) -> Sequence[Branch]:
        """Every branch once."""

    @property
    def post_norm(self) -> bool:
        """Whether the stream is normalised after each addition."""


class Reader(Protocol):
    """Reads a model by running it on a batch; raises where it cannot."""

    def __call__(self, model: nn.Module, batch: Any = None, *, blocks: Any = None) -> Reading:
        """Read a model."""


_READERS: list[Reader] = []


def use_branch_reader(reader: Reader) -> None:
    """Make `reader` the one that `deepen` asks."""
    _READERS[:] = [reader]


def branch_reader() -> Reader:
    """Return the reader.

    Raises:
        RuntimeError: if none was handed in.
    """
    if not _READERS:
        raise RuntimeError("No reader of residual branches is known: import abyssal, or abyssal.scaling, first.")
    return _READERS[0]
