"""What a plan says: policies for the blocks of one model, and what they were measured to cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from abyssal.engine.policy import Policy


class PlanError(ValueError):
    """A wish that cannot be met, or a plan that does not fit a model or cannot be read; says what is possible."""


@dataclass(frozen=True)
class BlockPlan:
    """One block in a plan.

    Attributes:
        name, kind: its name in the model, and its class.
        policy: how its input is to be restored.
        stored_bytes: what it keeps for the backward pass, as measured; all activations where it is stored.
        state_error: relative error of its restored input, as measured; 0.0 where it is exact.
        gradient_share: what it is expected to add to the gradient's relative error; these add up in squares.
        sensitivity: the gradient's relative error per relative error of its state.
        seconds: its forward and backward pass in a training step.
        parameters: names and shapes of its parameters.
        note: what is out of the ordinary, in words.
    """

    name: str
    kind: str
    policy: Policy
    stored_bytes: int
    state_error: float
    gradient_share: float
    sensitivity: float
    seconds: float
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    note: str = ""

    @property
    def bits(self) -> int | None:
        """Bits per element of its code, where it is coded."""
        return None if self.policy.codec is None else self.policy.codec.bits

    @property
    def refinements(self) -> int:
        """Fixed-point steps."""
        return int(getattr(self.policy, "refine", 0))


@dataclass(frozen=True)
class Cost:
    """What one way to train costs; None where it was not measured (plain training that does not fit).

    Attributes:
        stream_bytes: what is kept of the stream for the backward pass.
        peak_bytes: peak of live tensor bytes in a step, above the level before it with gradients allocated.
        seconds: one forward and backward pass.
    """

    stream_bytes: int | None
    peak_bytes: int | None
    seconds: float | None


@dataclass(frozen=True)
class PlanData:
    """Policies for the blocks of one model, and what they were measured to cost.

    Attributes:
        blocks: one entry per block, in the order of the forward pass.
        tolerance, memory: what was asked for: relative error of the gradient, and bytes; None for none.
        gradient_errors: measured relative error of the whole parameter gradient, by batch.
        bf16_error: the model's own error in bfloat16 on the same batch, for comparison; None if not to be had.
        bf16_reason: why not.
        cost: with the plan, as measured.
        checkpointing, plain: the same with every block under `Keep()`, and in plain training.
        peak_set_by: where in the step the peak is.
        batch: the batch in words.
        environment: versions, device, threads.
        notes: what is to be known besides, in words.
    """

    blocks: tuple[BlockPlan, ...]
    tolerance: float | None
    memory: int | None
    gradient_errors: Mapping[str, float]
    bf16_error: float | None
    bf16_reason: str
    cost: Cost
    checkpointing: Cost
    plain: Cost
    peak_set_by: str
    batch: str
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def policies(self) -> dict[str, Policy]:
        """The policies by block."""
        return {block.name: block.policy for block in self.blocks}

    @property
    def sensitivities(self) -> dict[str, float]:
        """By block, the gradient's relative error per relative error of the block's state; add up in squares."""
        return {block.name: block.sensitivity for block in self.blocks}

    @property
    def state_errors(self) -> dict[str, float]:
        """By block, the relative error of its restored input that the plan was verified with."""
        return {block.name: block.state_error for block in self.blocks}

    @property
    def gradient_error(self) -> float:
        """The largest measured relative error of the gradient."""
        return max(self.gradient_errors.values(), default=0.0)

    @property
    def error_in_bf16_units(self) -> float | None:
        """The gradient's error as a multiple of the model's own error in bfloat16; None if that is unknown."""
        return self.gradient_error / self.bf16_error if self.bf16_error else None

    @property
    def stream_bytes(self) -> int:
        """Bytes kept of the stream; without the plan: `checkpointing.stream_bytes`."""
        return self.cost.stream_bytes or 0

    @property
    def peak_bytes(self) -> int:
        """The measured peak; without the plan: `checkpointing.peak_bytes` and `plain.peak_bytes`."""
        return self.cost.peak_bytes or 0

    @property
    def step_seconds(self) -> float:
        """The measured time of a step; without the plan: `checkpointing.seconds` and `plain.seconds`."""
        return self.cost.seconds or 0.0
