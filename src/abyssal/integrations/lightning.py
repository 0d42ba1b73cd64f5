"""Callbacks for Lightning's `Trainer`: one trains with reconstruction, one records how the tangent kernel moves.

trainer = lightning.Trainer(callbacks=[Reconstruct()])
trainer.fit(module, data)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from abyssal.certify.drift import OnDrift
from abyssal.engine.api import Blocks, certificate, reconstruct, release
from abyssal.engine.policy import Policy
from abyssal.integrations.figures import Figures, is_reconstructed, kernel_figures
from abyssal.tangent.training.record import Drift
from abyssal.tangent.training.recorder import DriftRecorder

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError("abyssal.integrations.lightning needs lightning: pip install 'abyssal[lightning]'") from error

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["KernelDrift", "Reconstruct"]


class Reconstruct(Callback):
    """Reconstruct the module from the start of `fit` to its end, and log what the certificate says.

    A module that is reconstructed already is left as it is if no policy is given here, and stays reconstructed
    afterwards. Checkpoints that Lightning writes have the keys that they have without this callback.

    Logged, per step, are `abyssal/state_error`, the worst relative error of a restored state since the last optimiser
    step (over the micro-batches of `accumulate_grad_batches`); `abyssal/stored_bytes`, what one forward pass keeps for
    the stream; `abyssal/drifted`, how many blocks drifted.

    Args:
        policy: as `abyssal.reconstruct` takes it: one policy, a mapping by block name, or a plan. None is its default.
        attribute: name of the attribute (or dotted path) of the module that holds the network, e.g. "model"; default:
            the whole module.
        blocks: which modules are the blocks; default: found by `abyssal.find_blocks`.
        on_drift: "warn", "raise" or "keep".
        tolerance: relative error of a restored state; None is the default's.
        log: whether to log the figures.

    Raises:
        AttributeError: at the start of `fit`, if the module has no such attribute.
    """

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
        self._policy, self._attribute = policy, attribute
        self._options: dict[str, Any] = {"blocks": blocks, "on_drift": on_drift, "tolerance": tolerance}
        self._log = log
        self._ours = False
        self._figures = Figures()

    def _network(self, pl_module: LightningModule) -> nn.Module:
        return _network(self, pl_module, self._attribute)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reconstruct the network, unless it is and no policy was given."""
        network = self._network(pl_module)
        if self._policy is not None or not is_reconstructed(network):
            reconstruct(network, self._policy, **self._options)
            self._ours = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures of the batch, or, where gradients are accumulated, of those since the last step."""
        if not self._log:
            return
        self._figures.see(certificate(self._network(pl_module)))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            pl_module.log_dict(self._figures.take(), on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the network back as it was, if it was this callback that reconstructed it."""
        self._give_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back here, too: after an exception Lightning tears nothing down."""
        self._give_back(pl_module)

    def _give_back(self, pl_module: LightningModule) -> None:
        if self._ours:
            release(self._network(pl_module))
            self._ours = False


class KernelDrift(Callback):
    """Record how training moves the tangent kernel on a probe set; training itself stays the same to the bit.

        moved = KernelDrift(probe, labels, every=50, attribute="network")
        lightning.Trainer(callbacks=[moved]).fit(module, data)
        print(moved.result())

    Logged at each reading are `abyssal/kernel_distance`, `abyssal/kernel_alignment` and what else it has. The main
    process alone records. Parameters that are sharded over processes (FSDP) are not supported.

    Args:
        x: the probe set, as `abyssal.tangent.DriftRecorder` takes it.
        y: its labels, for the alignment with them.
        every: optimiser steps between readings, or a collection of steps; the first and last are always recorded.
        attribute: name of the attribute (or dotted path) of the module that holds the network; default: the whole
            module, whose `forward` is then what is looked at.
        log: whether to log the figures.
        **options: of `abyssal.tangent.DriftRecorder`.

    Raises:
        AttributeError: at the start of training, if the module has no such attribute.
    """

    def __init__(
        self, x: Any, y: Any = None, *, every: Any = 100, attribute: str = "", log: bool = True, **options: Any
    ) -> None:
        self._options: dict[str, Any] = {"x": x, "y": y, "every": every, **options}
        self._attribute, self._log = attribute, log
        self._recorder: DriftRecorder | None = None
        self._resumed: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded, for Lightning's checkpoint."""
        return {} if self._recorder is None else self._recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._resumed = state_dict

    def result(self) -> Drift:
        """Return what was recorded in the last training.

        Raises:
            ValueError: before any.
        """
        if self._recorder is None:
            raise ValueError("Nothing was recorded: call trainer.fit(...) first.")
        return self._recorder.result()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the kernel that all later ones are compared with, or go on from a checkpoint."""
        if trainer.is_global_zero:
            self._recorder = DriftRecorder(_network(self, pl_module, self._attribute), **self._options)
            if self._resumed:
                self._recorder.load_state_dict(self._resumed)
                self._resumed = {}
            if self._recorder.last_step != trainer.global_step:
                self._recorder.record(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the kernel, if there was a step and it is the one for it."""
        if self._recorder is None or self._recorder.last_step == trainer.global_step:
            return
        reading = self._recorder.after(trainer.global_step)
        if reading is not None and self._log:
            figures = kernel_figures(reading)
            pl_module.log_dict(figures, on_step=True, on_epoch=False, batch_size=1, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last kernel."""
        if self._recorder is not None and self._recorder.last_step != trainer.global_step:
            self._recorder.record(trainer.global_step)


def _network(callback: Callback, pl_module: LightningModule, attribute: str) -> nn.Module:
    """Return the part of a module that a callback is for."""
    try:
        found: nn.Module = pl_module.get_submodule(attribute)
    except AttributeError as error:
        children = ", ".join(name for name, _ in pl_module.named_children())
        raise AttributeError(
            f"{type(callback).__name__}(attribute={attribute!r}): {type(pl_module).__name__} has no such module; it "
            f"has {children or 'none'}."
        ) from error
    return found
