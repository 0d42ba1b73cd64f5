"""What an inspection found: every block under every policy, and the best choices of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from abyssal.engine.policy import Policy
from abyssal.planning.measurements import BlockMeasurement, Measurements
from abyssal.util.environment import Environment
from abyssal.weights.regularity import Regularity


@dataclass(frozen=True)
class Choice:
    """The policies with the fewest bytes within a tolerance; a tenth of a step's time counts as 1 % of kept bytes.

    Attributes:
        tolerance: largest relative error of the gradient that was allowed.
        policies: one per block.
        block_bytes: kept for the stream, by block; the exact inputs and residuals at the ends of chains included.
        predicted_error: of the gradient, from the measurements of single blocks.
        step_ratio: predicted time of a training step, as a multiple of activation checkpointing's; nan where
            that is not known.
        measured_error: relative error of the gradient of the whole model under these policies, on the batch; None
            where it was not measured.
    """

    tolerance: float
    policies: tuple[Policy, ...]
    block_bytes: tuple[int, ...]
    predicted_error: float
    step_ratio: float
    measured_error: float | None = None

    @property
    def gradient_error(self) -> float:
        """Relative error of the gradient: as measured, or else as predicted."""
        return self.predicted_error if self.measured_error is None else self.measured_error

    @property
    def is_measured(self) -> bool:
        """Whether the error was measured on the whole model."""
        return self.measured_error is not None

    @property
    def stream_bytes(self) -> int:
        """Kept for the stream by all blocks together."""
        return sum(self.block_bytes)


@dataclass(frozen=True)
class Findings:
    """What `inspect` found.

    Attributes:
        model: the model in words.
        measurements: every block under every policy.
        choices: the best policies for each tolerance, from the loosest to the strictest.
        front: `(bytes, error)` of choices that no other one reckoned beats in both, from the fewest bytes.
        uniform: one policy for all blocks (kept where a block does not allow it): policy to choice.
        kept_bytes: what activation checkpointing keeps of the stream, in its own data type.
        environment: machine, versions, date.
        weights: how the weights change with depth; None where they could not be read as paths.
        notes: what a reader should know of how this came about, e.g. that the weights are random.
        command: the command line that gives it.
    """

    model: str
    measurements: Measurements
    choices: tuple[Choice, ...]
    front: tuple[tuple[int, float], ...]
    uniform: dict[Policy, Choice]
    kept_bytes: int
    environment: Environment
    weights: Regularity | None = None
    notes: tuple[str, ...] = ()
    command: str = ""

    @property
    def blocks(self) -> tuple[BlockMeasurement, ...]:
        """The blocks in the order of the forward pass."""
        return self.measurements.blocks

    @property
    def bf16_bytes(self) -> int:
        """What activation checkpointing would keep if the stream were kept in bfloat16."""
        return self.kept_bytes - sum(block.stream_bytes - _bf16_bytes(block) for block in self.blocks)

    @property
    def reference(self) -> Choice:
        """The choice that verdicts speak of: for 1e-2, or else the tolerance nearest to it."""
        return min(self.choices, key=lambda choice: abs(math.log10(choice.tolerance / 1e-2)))


def _bf16_bytes(block: BlockMeasurement) -> int:
    dtype: torch.dtype = getattr(torch, block.dtype.removeprefix("torch.") or "float32")
    return block.stream_bytes * 2 // dtype.itemsize
