"""What the callbacks of all trainers share: when to reconstruct and to record, and the figures that loggers get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from abyssal.certify.drift import OnDrift
from abyssal.certify.recorder import worse
from abyssal.engine.api import Blocks, certificate, reconstruct, release
from abyssal.engine.policy import Policy
from abyssal.tangent.training.record import Drift, Reading
from abyssal.tangent.training.recorder import DriftRecorder

ERROR, STORED, DRIFTED = "abyssal/state_error", "abyssal/stored_bytes", "abyssal/drifted"


class Reconstruction:
    """A network that is reconstructed while it is trained, and what was certified since the last line of the log."""

    _error: float | None
    _stored: int | None
    _drifted: set[str]

    def __init__(
        self,
        policy: Policy | Mapping[str, Policy] | None = None,
        *,
        attribute: str = "",
        blocks: Blocks | None = None,
        on_drift: OnDrift = "warn",
        tolerance: float | None = None,
        log: bool = True,
    ) -> None:
        """Keep the arguments until training begins.

        Args:
            policy: as `abyssal.reconstruct` takes it: one policy, a mapping by block name, or a plan. None is its
                default.
            attribute: name of the attribute (or dotted path) of the model that holds the network, e.g. "model";
                default: the whole model.
            blocks: which modules are the blocks; default: found by `abyssal.find_blocks`.
            on_drift: "warn", "raise" or "keep".
            tolerance: relative error of a restored state; None is the default's.
            log: whether to log the figures.
        """
        self._policy, self._attribute, self._log = policy, attribute, log
        self._options: dict[str, Any] = {"blocks": blocks, "on_drift": on_drift, "tolerance": tolerance}
        self._ours = False
        self._forget()

    def _begin(self, model: nn.Module) -> None:
        """Reconstruct the network, unless it is and no policy was given."""
        network = _part(self, model, self._attribute)
        if self._policy is not None or not _is_reconstructed(network):
            reconstruct(network, self._policy, **self._options)
            self._ours = True

    def _end(self, model: nn.Module) -> None:
        """Give the network back as it was, if it was this callback that reconstructed it."""
        if self._ours:
            release(_part(self, model, self._attribute))
            self._ours = False

    def _see(self, model: nn.Module) -> None:
        """Take in the certificate of one forward and backward pass."""
        if self._log:
            seen = certificate(_part(self, model, self._attribute))
            self._error = worse(self._error, seen.error)
            self._drifted.update(seen.drifted)
            self._stored = max(self._stored or 0, seen.stored_bytes)

    def _take(self) -> dict[str, float]:
        """Return what was seen since the last time, over micro-batches and steps, and begin anew.

        Returns:
            `abyssal/state_error`, the worst relative error of a restored state, left out where none was measured;
            `abyssal/stored_bytes`, the most that one forward pass kept for the stream; `abyssal/drifted`, how many
            blocks drifted beyond the tolerance, be it once. Empty if nothing was seen.
        """
        error, stored, drifted = self._error, self._stored, self._drifted
        self._forget()
        if stored is None:
            return {}
        figures = {STORED: float(stored), DRIFTED: float(len(drifted))}
        return figures if error is None else {ERROR: error, **figures}

    def _forget(self) -> None:
        self._error, self._stored, self._drifted = None, None, set()


class KernelRecording:
    """The drift of a network's tangent kernel while it is trained."""

    _starts_with = "trainer.train()"

    def __init__(
        self, x: Any, y: Any = None, *, every: Any = 100, attribute: str = "", log: bool = True, **options: Any
    ) -> None:
        """Keep the arguments until training begins.

        Args:
            x: the probe set, as `abyssal.tangent.DriftRecorder` takes it: for language models a dictionary of tensors.
            y: its labels, for the alignment with them.
            every: optimiser steps between readings, or a collection of steps; the first and last are always recorded.
            attribute: name of the attribute (or dotted path) of the model that holds the network; default: the whole
                model, whose `forward` is then what is looked at.
            log: whether to log the figures.
            **options: of `abyssal.tangent.DriftRecorder`.
        """
        self._options: dict[str, Any] = {"x": x, "y": y, "every": every, **options}
        self._attribute, self._log = attribute, log
        self._recorder: DriftRecorder | None = None

    def result(self) -> Drift:
        """Return what was recorded in the last training.

        Raises:
            ValueError: before any.
        """
        if self._recorder is None:
            raise ValueError(f"Nothing was recorded: call {self._starts_with} first.")
        return self._recorder.result()

    def _begin(self, model: nn.Module, step: int, resumed: Mapping[str, Any] | None = None) -> None:
        """Record the kernel that all later ones are compared with, or go on from a checkpoint."""
        self._recorder = DriftRecorder(_part(self, model, self._attribute), **self._options)
        if resumed:
            self._recorder.load_state_dict(dict(resumed))
        self._end(step)

    def _after(self, step: int) -> dict[str, float]:
        """Record the kernel, if there was a step and it is the one for it; return what to log."""
        if self._recorder is None or self._recorder.last_step == step:
            return {}
        reading = self._recorder.after(step)
        return _kernel_figures(reading) if reading is not None and self._log else {}

    def _last_figures(self) -> dict[str, float]:
        """Return the last reading, to be logged."""
        return _kernel_figures(self.result().readings[-1]) if self._recorder is not None and self._log else {}

    def _end(self, step: int) -> None:
        """Record the last kernel."""
        if self._recorder is not None and self._recorder.last_step != step:
            self._recorder.record(step)


def _part(callback: object, model: nn.Module, attribute: str) -> nn.Module:
    """Return the part of a model that a callback is for."""
    try:
        found: nn.Module = model.get_submodule(attribute)
    except AttributeError as error:
        children = ", ".join(name for name, _ in model.named_children())
        raise AttributeError(
            f"{type(callback).__name__}(attribute={attribute!r}): {type(model).__name__} has no such module; it "
            f"has {children or 'none'}."
        ) from error
    return found


def _is_reconstructed(model: nn.Module) -> bool:
    try:
        certificate(model)
    except ValueError:
        return False
    return True


def _kernel_figures(reading: Reading) -> dict[str, float]:
    names = ("distance", "alignment", "target_alignment", "effective_rank")
    return {f"abyssal/kernel_{name}": value for name, value in reading.figures().items() if name in names}
