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

from abyssal.certify.drift import OnDrift
from abyssal.engine.api import Blocks, certificate, reconstruct, release
from abyssal.engine.policy import Policy
from abyssal.integrations.figures import Figures, is_reconstructed, kernel_figures
from abyssal.tangent.training.record import Drift
from abyssal.tangent.training.recorder import DriftRecorder

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "abyssal.integrations.transformers needs transformers with accelerate: pip install 'abyssal[hf]'"
    ) from error

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["KernelDrift", "Reconstruct"]


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


class KernelDrift(TrainerCallback):
    """Record how training moves the tangent kernel on a probe set; training itself stays the same to the bit.

        moved = KernelDrift({"input_ids": ids}, every=50, output=lambda found: found.logits[:, -1])
        Trainer(model, args, train_dataset=data, callbacks=[moved]).train()
        print(moved.result())

    Logged with the training loss are `abyssal/kernel_distance`, `abyssal/kernel_alignment` and what else the last
    reading has. The main process alone records. Parameters that are sharded over processes (FSDP) are not supported.

    Args:
        x: the probe set, as `abyssal.tangent.DriftRecorder` takes it: for language models a dictionary of tensors.
        y: its labels, for the alignment with them.
        every: training steps between readings, or a collection of steps; the first and last are always recorded.
        log: whether to log the figures.
        **options: of `abyssal.tangent.DriftRecorder`.
    """

    def __init__(self, x: Any, y: Any = None, *, every: Any = 100, log: bool = True, **options: Any) -> None:
        self._options: dict[str, Any] = {"x": x, "y": y, "every": every, **options}
        self._log = log
        self._recorder: DriftRecorder | None = None

    def result(self) -> Drift:
        """Return what was recorded in the last training.

        Raises:
            ValueError: before any.
        """
        if self._recorder is None:
            raise ValueError("Nothing was recorded: call trainer.train() first.")
        return self._recorder.result()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Record the kernel that all later ones are compared with."""
        if state.is_world_process_zero:
            self._recorder = DriftRecorder(model, **self._options)
            self._recorder.record(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the kernel, if it is the step for it."""
        if self._recorder is not None:
            self._recorder.after(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the last reading to a line of training that is being logged."""
        if not self._log or self._recorder is None or logs is None or "loss" not in logs:
            return
        figures = kernel_figures(self._recorder.result().readings[-1])
        logs.update(figures)
        if state.log_history:  # the Trainer has put a copy of the line there already
            state.log_history[-1].update(figures)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the last kernel."""
        if self._recorder is not None and self._recorder.last_step != state.global_step:
            self._recorder.record(state.global_step)
