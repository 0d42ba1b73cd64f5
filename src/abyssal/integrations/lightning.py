"""A callback for Lightning's `Trainer`: reconstructs the module while it is fitted and logs the certificate.

trainer = lightning.Trainer(callbacks=[Reconstruct()])
trainer.fit(module, data)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from abyssal.integrations.figures import Figures, is_reconstructed
from abyssal.reconstruct.engine import Blocks, certificate, reconstruct, release
from abyssal.reconstruct.policy import Policy
from abyssal.reconstruct.session import OnDrift

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError("abyssal.integrations.lightning needs lightning: pip install 'abyssal[lightning]'") from error

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Reconstruct"]


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
        try:
            found: nn.Module = pl_module.get_submodule(self._attribute)
        except AttributeError as error:
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise AttributeError(
                f"Reconstruct(attribute={self._attribute!r}): {type(pl_module).__name__} has no such module; it has "
                f"{children or 'none'}."
            ) from error
        return found

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
