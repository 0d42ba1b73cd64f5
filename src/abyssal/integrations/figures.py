"""The certificate's figures, and the kernel's, as a trainer's logger wants them: a few plain numbers by name."""

from __future__ import annotations

from torch import nn

from abyssal.certify.certificate import Certificate
from abyssal.certify.recorder import worse
from abyssal.engine.api import certificate
from abyssal.tangent.training.record import Reading

ERROR, STORED, DRIFTED = "abyssal/state_error", "abyssal/stored_bytes", "abyssal/drifted"


class Figures:
    """What was certified since the last time it was logged, over micro-batches and steps.

    A drift between two log lines is not lost: the error is the worst since the last line, and a block that
    drifted once since then is counted.
    """

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._begin()

    def _begin(self) -> None:
        self._error: float | None = None
        self._stored: int | None = None
        self._drifted: set[str] = set()

    def see(self, seen: Certificate) -> None:
        """Take in the certificate of one forward and backward pass."""
        self._error = worse(self._error, seen.error)
        self._drifted.update(seen.drifted)
        self._stored = max(self._stored or 0, seen.stored_bytes)

    def take(self) -> dict[str, float]:
        """Return what was seen since the last time, and begin anew.

        Returns:
            `abyssal/state_error`, the worst relative error of a restored state, left out where none was measured;
            `abyssal/stored_bytes`, the most that one forward pass kept for the stream; `abyssal/drifted`, how many
            blocks drifted beyond the tolerance. Empty if nothing was seen.
        """
        error, stored, drifted = self._error, self._stored, self._drifted
        self._begin()
        if stored is None:
            return {}
        figures = {STORED: float(stored), DRIFTED: float(len(drifted))}
        return figures if error is None else {ERROR: error, **figures}


def is_reconstructed(model: nn.Module) -> bool:
    """Whether somebody has called `abyssal.reconstruct` on this model already."""
    try:
        certificate(model)
    except ValueError:
        return False
    return True


def kernel_figures(reading: Reading) -> dict[str, float]:
    """Return a reading of the tangent kernel's drift by the names that loggers get."""
    names = ("distance", "alignment", "target_alignment", "effective_rank")
    return {f"abyssal/kernel_{name}": value for name, value in reading.figures().items() if name in names}
