"""Results that can be drawn."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from abyssal.report.axes import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Plotted"]


class Plotted(ABC):
    """A result with a figure."""

    @abstractmethod
    def figure(self) -> Figure:
        """Return what `plot` writes as a matplotlib figure."""

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw it to a file.

        Args:
            path: of the picture; its suffix is the format.

        Returns:
            The path.

        Raises:
            ValueError: for a missing folder or an unknown format.
        """
        return save(self.figure(), path)
