"""A callback for Hugging Face's `Trainer`: reconstructs the model while it trains and logs the certificate.

    trainer = Trainer(model, args, train_dataset=data)
    Reconstruct().attach(trainer)
    trainer.train()

Without it, `abyssal.reconstruct(model)` before `Trainer(model, ...)` does the same but for the log.
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
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "abyssal.integrations.transformers needs transformers with accelerate: pip install 'abyssal[hf]'"
    ) from error

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Reconstruct"]


class Reconstruct(TrainerCallback):
    """Reconstruct the model from the first training step to the last, and log what the certificate says.

    A model that is reconstructed already (`abyssal.reconstruct(model, plan)`) is left as it is if no policy is
    given here, and stays reconstructed after training. `TrainingArguments(gradient_checkpointing=True)` is taken
    over with a warning: transformers enables it just before this callback's turn.

    Logged are `abyssal/state_error`, the worst relative error of a restored state since the last line;
    `abyssal/stored_bytes`, what one forward pass keeps for the stream; `abyssal/drifted`, how many blocks drifted.
    Given as `Trainer(callbacks=[...])` they reach the printed lines and `trainer.state.log_history`; reporters
    (TensorBoard, Weights & Biases) come before a user's callbacks, so there use `attach`.

    Args:
        policy: as `abyssal.reconstruct` takes it: one policy, a mapping by block name, or a plan. None is its default.
        blocks: which modules are the blocks; default: found by `abyssal.find_blocks`.
        on_drift: "warn", "raise" or "keep".
        tolerance: relative error of a restored state; None is the default's.
        log: whether to log the figures.
    """

    def __init__(
        self,
        policy: Policy | Mapping[str, Policy] | None = None,
        *,
        blocks: Blocks | None = None,
        on_drift: OnDrift = "warn",
        tolerance: float | None = None,
        log: bool = True,
    ) -> None:
        self._policy = policy
        self._options: dict[str, Any] = {"blocks": blocks, "on_drift": on_drift, "tolerance": tolerance}
        self._log = log
        self._ours = False
        self._figures = Figures()

    def attach(self, trainer: Trainer) -> Reconstruct:
        """Put this callback before all others of `trainer`, so that its figures reach every reporter.

        Returns:
            This callback.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Reconstruct the model, unless it is and no policy was given."""
        if self._policy is not None or not is_reconstructed(model):
            reconstruct(model, self._policy, **self._options)
            self._ours = True

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Take in a micro-batch's certificate."""
        self._see(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Take in the certificate of a step's last micro-batch."""
        self._see(model)

    def _see(self, model: nn.Module) -> None:
        if self._log:
            self._figures.see(certificate(model))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the figures to a line of training that is being logged; lines of evaluation are left alone."""
        if logs is None or "loss" not in logs:
            return
        figures = self._figures.take()
        logs.update(figures)
        if state.log_history:  # the Trainer has put a copy of the line there already
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Give the model back as it was, if it was this callback that reconstructed it."""
        if self._ours:
            release(model)
            self._ours = False
