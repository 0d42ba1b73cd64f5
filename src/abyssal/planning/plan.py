"""Measure, choose, verify: which policy every block of a model gets.

`plan` measures the model once on a real batch (`measure.py`), chooses policies that meet a tolerance for the gradient's
error, a budget for the peak of memory, or both (`choose.py`), and verifies the choice as a whole, by the gradient of
the reconstructed model against the exact one, on this batch and on another. Single blocks' errors add up only
approximately and peaks are predicted to a few per cent, so what does not hold is tightened and tried again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from abyssal.engine.policy import Policy
from abyssal.models.find import Blocks, resolve_blocks

if TYPE_CHECKING:
    from abyssal.planning.step import Loss

Progress = Callable[[str, int, int], None]


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
class Plan:
    """Policies for the blocks of one model, and what they were measured to cost; `print` shows it.

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

    def check_fits(self, model: nn.Module) -> None:
        """Refuse a model that this plan was not made for.

        Args:
            model: the model to reconstruct.

        Raises:
            PlanError: naming the first block that is missing, of another class, or has other parameters.
        """
        self.policies_for(model)

    def policies_for(self, model: nn.Module) -> dict[str, Policy]:
        """Return the policies by the names that blocks have in `model`, which may be wrapped (DDP, torch.compile).

        Raises:
            PlanError: as `check_fits`.
        """
        from abyssal.planning.plan_json import names_in

        return {name: block.policy for name, block in zip(names_in(self, model), self.blocks, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists, for JSON."""
        from abyssal.planning.plan_json import to_dict

        return to_dict(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        from abyssal.planning.plan_json import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            PlanError: if the file holds no plan, a newer version, or an unknown policy.
            OSError: if it cannot be read.
        """
        from abyssal.planning.plan_json import load

        return load(Path(path))

    def __str__(self) -> str:
        """Return the table."""
        from abyssal.planning.plan_table import plan_table

        return plan_table(self)


def plan(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    tolerance: float | None = None,
    memory: int | float | str | None = None,
    check: Any = None,
    blocks: Blocks | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Choose how each block's input is restored, by measurement, and verify the choice end to end.

    The model is left exactly as it was: parameters, gradients, buffers, random state, modes and patches. It is
    measured unpatched, in the mode that it is in, which should be the one it trains in. Takes a few dozen training
    steps' time, in the memory of activation checkpointing.

    Args:
        model: any module with residual blocks.
        batch: a real batch of the size to train with, as the model is called: a mapping of keyword arguments, a tuple
            or list of positional ones, or one tensor.
        loss: makes a scalar of the model's output. Default: the output's `loss`, or a scalar output itself.
        tolerance: largest relative error of the parameter gradient. Alone, the plan stores the fewest bytes. Default
            1e-2, if no budget is given. On the batches of verification 0.7 of it is allowed, so that batches to
            come may differ.
        memory: largest peak, in bytes or as "2GiB": live tensor bytes during forward and backward pass, above the
            level before the step, with gradient buffers allocated already. Alone, the plan is the most accurate one
            that fits, and the fastest if an exact one does. With a tolerance, it is the fastest that meets both.
        check: another batch to verify on. Default: each half of `batch`, or, of one row, its tokens in another order
            or its image mirrored.
        blocks: which modules are the blocks; default: what `abyssal.find_blocks(model)` finds.
        progress: called with what is being done, how many of it are done, and how many there are.

    Returns:
        The plan, for `abyssal.reconstruct(model, plan)`.

    Raises:
        PlanError: if the wish cannot be met; says what is possible.
        NoBlocksError: if no blocks are found and none are given.
        TypeError: for a batch that is none of these, or an output without a scalar loss.
        ValueError: for a tolerance or a budget that is not positive.
    """
    from abyssal.models.state import borrowed
    from abyssal.planning.search import Planner
    from abyssal.planning.step import TrainingStep

    if tolerance is not None and not 0.0 < tolerance < math.inf:
        raise ValueError(f"tolerance: expected a positive relative error such as 1e-2, got {tolerance!r}")
    budget = None if memory is None else _bytes(memory)
    if tolerance is None and budget is None:
        tolerance = 1e-2
    core = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    named = resolve_blocks(core, blocks)
    with borrowed(core) as loan:
        step = TrainingStep(core, loan, batch, loss, named)
        return Planner(step, check, progress or (lambda stage, done, total: None)).plan(tolerance, budget)


def _bytes(memory: int | float | str) -> int:
    from abyssal.util.text import parse_bytes

    found: int = parse_bytes(memory)
    if found <= 0:
        raise ValueError(f"memory: expected a positive number of bytes, or a size such as '2GiB', got {memory!r}")
    return found
