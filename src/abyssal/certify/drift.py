"""How far a restored state may be from the true one, and what is said where it is further.

**The default tolerance, 1e-2.** A bfloat16 stream rounds every element by about 2^-9 = 2e-3 of its size in
every block, and the rounding of L blocks adds up to about sqrt(L) times that: 1e-2 at 25 blocks. So 1e-2 is
where restoring a state costs as much accuracy as holding the stream in bfloat16 would; docs/certificate.md has
the measured gradient errors that go with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch

from abyssal.certify.recorder import CallRecord

OnDrift = Literal["warn", "raise", "keep"]
DEFAULT_TOLERANCE = 1e-2
# How much further from the true state a coded one may be than one that was solved for: its error is what the code was
# chosen to have, and bounded; beyond the tolerance an error of solving grows from block to block. On trained networks
# gradients were a quarter (GPT) to a third (ConvNeXt) as far off as coded states: docs/certificate.md.
CODED_ALLOWANCE = 4


class DriftError(RuntimeError):
    """A block's input was restored further from the true one than the tolerance allows."""


class NonFiniteError(DriftError):
    """A restored state has infinite or undefined values, where the forward pass had none."""


class DriftWarning(UserWarning):
    """A block's input was restored further from the true one than the tolerance allows."""


def rounding(dtype: torch.dtype) -> float:
    """Return how far two evaluations of one block at the same input may differ: sqrt(eps), relative.

    They agree to the last bit where the arithmetic is deterministic, and to a few roundings where a device adds
    up in another order. A block that differs by more is random, however small its branch is beside the stream.
    """
    return math.sqrt(torch.finfo(dtype).eps) if dtype.is_floating_point or dtype.is_complex else 0.0


ADVICE = (
    "Give these blocks the policy abyssal.Keep() (abyssal.Store() if random), or call abyssal.reconstruct(..., "
    "on_drift='keep'); print(abyssal.certificate(model)) shows every block."
)


def _cause(record: CallRecord) -> str:
    return f", {record.note}" if record.note == EXPLANATION["output"] else ""


EXPLANATION = {
    "input": "drifted",
    "output": "recomputed output differs from the true one: the block is random or depends on a counter",
}


def describe(worst: Iterable[CallRecord], tolerance: float) -> str:
    """Say which blocks drifted, the worst first."""
    ranked = sorted(worst, key=lambda record: -(record.error or 0.0))
    shown = ", ".join(f"{r.block.name!r} ({r.policy}: {r.error:.1e}{_cause(r)})" for r in ranked[:4])
    more = f" and {len(ranked) - 4} more" if len(ranked) > 4 else ""
    return f"{len(ranked)} block(s) drifted beyond the tolerance of {tolerance:g} (relative): {shown}{more}."
