"""Looking at a model before training it: what each residual block does, and what can be saved on it.

`inspect` measures once and answers for several tolerances; its answer prints as tables, and writes a page with plots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from abyssal.engine.policy import Keep, Policy
from abyssal.inspection.choose import ErrorOf, best_choices
from abyssal.inspection.findings import Choice, Findings
from abyssal.inspection.rows import out_of_reach, ratio
from abyssal.planning.cost import CostModel
from abyssal.planning.measure import DEFAULT_CANDIDATES, measure_step
from abyssal.planning.measurements import BlockMeasurement, Measurements
from abyssal.planning.precision import gradient_error
from abyssal.planning.step import training_step
from abyssal.util.environment import environment
from abyssal.util.files import for_json
from abyssal.util.progress import Progress, silent
from abyssal.weights.regularity import Regularity, regularity

__all__ = ["TOLERANCES", "Choice", "Inspection", "inspect", "inspection_of"]

TOLERANCES = (1e-1, 3e-2, 1e-2, 1e-3)
# Of a block and of a candidate: what JSON has of them as they are.
_OF_A_BLOCK = (
    *("name", "kind", "chain", "calls", "dtype", "stream_bytes"),
    *("increment_ratio", "contraction", "regularity", "activation_bytes"),
)
_OF_A_CANDIDATE = ("state_error", "worst_token_error", "gradient_share", "stored_bytes", "seconds", "measured")


class Inspection(Findings):
    """What `inspect` found; `print` shows it."""

    @property
    def verdict(self) -> tuple[str, ...]:
        """What was found, in one or two plain sentences."""
        from abyssal.inspection.text import verdict  # here, as below, since rich takes long to import

        return verdict(self)

    def with_notes(self, *notes: str, model: str = "", batch: str = "", command: str = "") -> Inspection:
        """Return the same, with more notes, and the model, the batch and the command as the caller names them."""
        return replace(
            self,
            measurements=replace(self.measurements, batch=batch or self.measurements.batch),
            notes=(*self.notes, *(note for note in notes if note)),
            model=model or self.model,
            command=command or self.command,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; what is not finite becomes None."""
        m = self.measurements
        plain: dict[str, Any] = {
            "format": "abyssal-inspection",
            "version": 1,
            "model": self.model,
            "batch": m.batch,
            "notes": list(self.notes),
            "verdict": list(self.verdict),
            "gradient_norm": m.gradient_norm,
            "bf16_error": m.bf16_error,
            "bf16_reason": m.bf16_reason,
            "stream_bytes": {"own_dtype": self.kept_bytes, "bf16": self.bf16_bytes},
            "seconds": {"plain": m.plain_seconds, "keep": m.keep_seconds},
            "peak_bytes": {"plain": m.plain_peak_bytes, "keep": m.keep_peak_bytes},
            "tolerances": [self._choice_to_dict(choice) for choice in self.choices],
            "weights": None if self.weights is None else self.weights.to_dict(),
            "blocks": [self._block_to_dict(i, block) for i, block in enumerate(self.blocks)],
            "environment": {**self.environment.to_dict(), "measured_with": dict(m.environment)},
        }
        return for_json(plain)

    def _choice_to_dict(self, choice: Choice) -> dict[str, Any]:
        bf16 = self.measurements.bf16_error
        return {
            "tolerance": choice.tolerance,
            "stream_bytes": choice.stream_bytes,
            "times_smaller_than_own_dtype": ratio(self.kept_bytes, choice.stream_bytes),
            "times_smaller_than_bf16": ratio(self.bf16_bytes, choice.stream_bytes),
            "gradient_error": {"predicted": choice.predicted_error, "measured": choice.measured_error},
            "gradient_error_in_bf16_errors": None if not bf16 else choice.gradient_error / bf16,
            "step_ratio": choice.step_ratio,
        }

    def _block_to_dict(self, i: int, block: BlockMeasurement) -> dict[str, Any]:
        return {
            **{name: getattr(block, name) for name in _OF_A_BLOCK},
            "shape": list(block.shape),
            "can_be_reversed": not out_of_reach(block),
            "best": {
                f"{choice.tolerance:g}": {"policy": str(choice.policies[i]), "stored_bytes": choice.block_bytes[i]}
                for choice in self.choices
            },
            "candidates": [
                {"policy": str(c.policy), **{name: getattr(c, name) for name in _OF_A_CANDIDATE}}
                for c in block.candidates
            ],
            "notes": list(block.notes),
        }

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained page with plots, whole or not at all, and return its path.

        Raises:
            OSError: the page cannot be written there.
        """
        from abyssal.inspection.page import build_page
        from abyssal.report.page import write

        return write(build_page(self), Path(path))

    def __str__(self) -> str:
        from abyssal.inspection.text import as_text

        return as_text(self)


def inspect(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Any] | None = None,
    tolerances: Sequence[float] = TOLERANCES,
    blocks: Any = None,
    progress: Progress | None = None,
) -> Inspection:
    """Measure every residual block of a model on one batch, and say what may be saved on each.

    The model is left as it was: parameters, gradients, buffers, random state and modes.

    Args:
        model: any residual network, in training mode or not; patched by `reconstruct` or not.
        batch: what it is called with: a dict (keyword arguments), a tuple (positional) or a tensor.
        loss: from the model's output to a scalar; by default `output.loss`.
        tolerances: allowed relative errors of the whole parameter gradient, each above 0.
        blocks: as in `reconstruct`; by default what `find_blocks` finds.
        progress: called with a phase, units done and units in all.

    Returns:
        Per block its increment ratio, contraction, regularity in depth, and the policy with the fewest bytes
        for each tolerance; in total stream bytes, the gradient's error, predicted and measured on this batch, and
        step time. `print` it, or use `.to_html(path)` and `.to_dict()`.

    Raises:
        ValueError: `tolerances` is empty or holds something not above 0; the model has no residual blocks or
            cannot be measured on this batch.
    """
    checked, report = _checked(tolerances), progress or silent
    with training_step(model, batch, loss, blocks) as step:
        found = measure_step(step, DEFAULT_CANDIDATES, report)
        exact: list[Any] = []

        def error_of(policies: Mapping[str, Policy]) -> float:
            if not exact:
                exact.extend(step.gradient(CostModel(found).with_all(Keep())))
            return gradient_error(step.gradient(policies), exact)

        parameters = sum(parameter.numel() for parameter in model.parameters())
        words = f"{type(model).__name__}, {parameters:,} parameters"
        inspection = inspection_of(found, checked, words, progress=report, error_of=error_of)
    report("weights against depth", 0, 1)
    weights = _weights(step.model if blocks is None else list(step.blocks.values()))
    report("weights against depth", 1, 1)
    return replace(inspection, weights=weights)


def _weights(model: Any) -> Regularity | None:
    """Read the weights as paths through depth, where there are at least four equal blocks."""
    try:
        return regularity(model)
    except (ValueError, TypeError):
        return None


def inspection_of(
    found: Measurements,
    tolerances: Sequence[float] = TOLERANCES,
    model: str = "",
    *,
    progress: Progress | None = None,
    error_of: ErrorOf | None = None,
) -> Inspection:
    """Return the inspection that measurements give, without measuring the blocks again.

    Args:
        found: what `measure` returned; at least one block.
        tolerances: as in `inspect`.
        model: the model in words.
        progress: as in `inspect`.
        error_of: measures the relative error of the gradient under policies by block; None leaves the errors of
            the choices predictions.

    Raises:
        ValueError: as in `inspect`.
    """
    best = best_choices(found, _checked(tolerances), progress or silent, error_of)
    return Inspection(model=model, measurements=found, environment=environment(), **best._asdict())


def _checked(tolerances: Sequence[float]) -> tuple[float, ...]:
    wanted = tuple(float(tolerance) for tolerance in tolerances)
    if not wanted or not all(0 < tolerance < math.inf for tolerance in wanted):
        raise ValueError(f"tolerances={tolerances!r}: expected one or more numbers above 0, such as 1e-2")
    return tuple(sorted(set(wanted), reverse=True))
