"""Callbacks for Lightning's `Trainer`: one trains with reconstruction, one records how the tangent kernel moves.

trainer = lightning.Trainer(callbacks=[Reconstruct()])
trainer.fit(module, data)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from abyssal.integrations.figures import KernelRecording, Reconstruction

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


class Reconstruct(Reconstruction, Callback):
    """Reconstruct the module from the start of `fit` to its end, and log what the certificate says.

    A module that is reconstructed already is left as it is if no policy is given here, and stays reconstructed
    afterwards. Checkpoints that Lightning writes have the keys that they have without this callback.

    Logged, per step, are `abyssal/state_error`, the worst relative error of a restored state since the last optimiser
    step (over the micro-batches of `accumulate_grad_batches`); `abyssal/stored_bytes`, what one forward pass keeps for
    the stream; `abyssal/drifted`, how many blocks drifted.

    Raises:
        AttributeError: at the start of `fit`, if the module has no such attribute.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reconstruct the network, unless it is and no policy was given."""
        self._begin(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures of the batch, or, where gradients are accumulated, of those since the last step."""
        self._see(pl_module)
        if self._log and ((batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch):
            pl_module.log_dict(self._take(), on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the network back as it was, if it was this callback that reconstructed it."""
        self._end(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back here, too: after an exception Lightning tears nothing down."""
        self._end(pl_module)


class KernelDrift(KernelRecording, Callback):
    """Record how training moves the tangent kernel on a probe set; training itself stays the same to the bit.

        moved = KernelDrift(probe, labels, every=50, attribute="network")
        lightning.Trainer(callbacks=[moved]).fit(module, data)
        print(moved.result())

    Logged at each reading are `abyssal/kernel_distance`, `abyssal/kernel_alignment` and what else it has. The main
    process alone records. Parameters that are sharded over processes (FSDP) are not supported.

    Raises:
        AttributeError: at the start of training, if the module has no such attribute.
    """

    _starts_with = "trainer.fit(...)"
    _resumed: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded, for Lightning's checkpoint."""
        return {} if self._recorder is None else self._recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._resumed = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the kernel that all later ones are compared with, or go on from a checkpoint."""
        if trainer.is_global_zero:
            self._begin(pl_module, trainer.global_step, self._resumed)
            self._resumed = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the kernel, if there was a step and it is the one for it."""
        if figures := self._after(trainer.global_step):
            pl_module.log_dict(figures, on_step=True, on_epoch=False, batch_size=1, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last kernel."""
        self._end(trainer.global_step)
