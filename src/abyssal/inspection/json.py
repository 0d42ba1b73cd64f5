"""An inspection as plain data, for programs."""

from __future__ import annotations

import math
from typing import Any

from abyssal.inspection.inspection import Choice, Inspection
from abyssal.inspection.rows import out_of_reach, ratio

__all__ = ["as_dict"]


def as_dict(inspection: Inspection) -> dict[str, Any]:
    """Return everything as plain data for JSON; what is not finite becomes None."""
    m = inspection.measurements
    plain: dict[str, Any] = {
        "format": "abyssal-inspection",
        "version": 1,
        "model": inspection.model,
        "batch": m.batch,
        "notes": list(inspection.notes),
        "verdict": list(inspection.verdict),
        "gradient_norm": m.gradient_norm,
        "bf16_error": m.bf16_error,
        "bf16_reason": m.bf16_reason,
        "stream_bytes": {"own_dtype": inspection.kept_bytes, "bf16": inspection.bf16_bytes},
        "seconds": {"plain": m.plain_seconds, "keep": m.keep_seconds},
        "peak_bytes": {"plain": m.plain_peak_bytes, "keep": m.keep_peak_bytes},
        "tolerances": [_choice_dict(inspection, choice) for choice in inspection.choices],
        "weights": None if inspection.weights is None else inspection.weights.to_dict(),
        "blocks": [_block_dict(inspection, i) for i in range(len(inspection.blocks))],
        "environment": {**inspection.environment.to_dict(), "measured_with": dict(m.environment)},
    }
    return _finite(plain)


def _choice_dict(inspection: Inspection, choice: Choice) -> dict[str, Any]:
    bf16 = inspection.measurements.bf16_error
    return {
        "tolerance": choice.tolerance,
        "stream_bytes": choice.stream_bytes,
        "times_smaller_than_own_dtype": ratio(inspection.kept_bytes, choice.stream_bytes),
        "times_smaller_than_bf16": ratio(inspection.bf16_bytes, choice.stream_bytes),
        "gradient_error": {"predicted": choice.predicted_error, "measured": choice.measured_error},
        "gradient_error_in_bf16_errors": None if not bf16 else choice.gradient_error / bf16,
        "step_ratio": choice.step_ratio,
    }


def _block_dict(inspection: Inspection, i: int) -> dict[str, Any]:
    block = inspection.blocks[i]
    return {
        "name": block.name,
        "kind": block.kind,
        "chain": block.chain,
        "calls": block.calls,
        "shape": list(block.shape),
        "dtype": block.dtype,
        "stream_bytes": block.stream_bytes,
        "increment_ratio": block.increment_ratio,
        "contraction": block.contraction,
        "can_be_reversed": not out_of_reach(block),
        "regularity": block.regularity,
        "activation_bytes": block.activation_bytes,
        "best": {
            f"{choice.tolerance:g}": {"policy": str(choice.policies[i]), "stored_bytes": choice.block_bytes[i]}
            for choice in inspection.choices
        },
        "candidates": [
            {
                "policy": str(c.policy),
                "state_error": c.state_error,
                "worst_token_error": c.worst_token_error,
                "gradient_share": c.gradient_share,
                "stored_bytes": c.stored_bytes,
                "seconds": c.seconds,
                "measured": c.measured,
            }
            for c in block.candidates
        ],
        "notes": list(block.notes),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
