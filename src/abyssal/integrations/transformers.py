"""Callbacks for Hugging Face's `Trainer`: one trains with reconstruction, one records how the tangent kernel moves.

    trainer = Trainer(model, args, train_dataset=data)
    Reconstruct().attach(trainer)
    trainer.train()

Without it, `abyssal.reconstruct(model)` before `Trainer(model, ...)` does the same but for the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from abyssal.integrations.figures import KernelRecording, Reconstruction

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "abyssal.integrations.transformers needs transformers with accelerate: pip install 'abyssal[hf]'"
    ) from error

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["KernelDrift", "Reconstruct"]


class Reconstruct(Reconstruction, TrainerCallback):
    """Reconstruct the model from the first training step to the last, and log what the certificate says.

    A model that is reconstructed already (`abyssal.reconstruct(model, plan)`) is left as it is if no policy is
    given here, and stays reconstructed after training. `TrainingArguments(gradient_checkpointing=True)` is taken
    over with a warning: transformers enables it just before this callback's turn.

    Logged are `abyssal/state_error`, the worst relative error of a restored state since the last line;
    `abyssal/stored_bytes`, what one forward pass keeps for the stream; `abyssal/drifted`, how many blocks drifted.
    Given as `Trainer(callbacks=[...])` they reach the printed lines and `trainer.state.log_history`; reporters
    (TensorBoard, Weights & Biases) come before a user's callbacks, so there use `attach`.
    """

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
        self._begin(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Take in the certificate of a micro-batch."""
        self._see(model)

    on_substep_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the figures to a line of training that is being logged; lines of evaluation are left alone."""
        if logs is not None and "loss" in logs:
            _add(self._take(), logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Give the model back as it was, if it was this callback that reconstructed it."""
        self._end(model)


class KernelDrift(KernelRecording, TrainerCallback):
    """Record how training moves the tangent kernel on a probe set; training itself stays the same to the bit.

        moved = KernelDrift({"input_ids": ids}, every=50, output=lambda found: found.logits[:, -1])
        Trainer(model, args, train_dataset=data, callbacks=[moved]).train()
        print(moved.result())

    Logged with the training loss are `abyssal/kernel_distance`, `abyssal/kernel_alignment` and what else the last
    reading has. The main process alone records. Parameters that are sharded over processes (FSDP) are not supported.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Record the kernel that all later ones are compared with."""
        if state.is_world_process_zero:
            self._begin(model, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the kernel, if it is the step for it."""
        self._after(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the last reading to a line of training that is being logged."""
        if logs is not None and "loss" in logs:
            _add(self._last_figures(), logs, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the last kernel."""
        self._end(state.global_step)


def _add(figures: Mapping[str, float], logs: dict[str, float], state: TrainerState) -> None:
    """Add figures to a line that is being logged, and to the copy of it that the Trainer has put into its history."""
    logs.update(figures)
    if state.log_history:
        state.log_history[-1].update(figures)
