"""The best choice of policies for each tolerance, and what the search for them says of the trade-off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from abyssal.engine.policy import Keep, Policy
from abyssal.inspection.findings import Choice
from abyssal.planning.choose import WORTH_OF_A_STEP, Assignment, Chooser, Constraints
from abyssal.planning.cost import CostModel, Estimate
from abyssal.planning.measurements import Measurements
from abyssal.planning.solve import InfeasibleError
from abyssal.util.progress import Progress

__all__ = ["Best", "ErrorOf", "best_choices"]

_ATTEMPTS, _NEAR = 4, 0.6  # to come within a tolerance, and no further below it than this

ErrorOf = Callable[[Mapping[str, Policy]], float]


class Best(NamedTuple):
    """The best choices; see `Findings`."""

    choices: tuple[Choice, ...]
    front: tuple[tuple[int, float], ...]
    uniform: dict[Policy, Choice]
    kept_bytes: int


def best_choices(
    found: Measurements, tolerances: Sequence[float], progress: Progress, error_of: ErrorOf | None
) -> Best:
    """Choose for each of some tolerances, and measure the errors of what is chosen.

    Args:
        found: what `measure` returned; at least one block.
        tolerances: from the loosest to the strictest.
        progress: told of what is being done.
        error_of: measures the relative error of the gradient under policies by block; None leaves the errors of
            the choices predictions.

    Raises:
        ValueError: if a tolerance cannot be met.
    """
    costs = _Recorded(found)
    chooser = Chooser(costs)
    kept = costs.of(costs.with_all(Keep()))
    worth = WORTH_OF_A_STEP * kept.stored_bytes / kept.seconds if kept.seconds > 0 else 0.0
    choices = []
    for done, tolerance in enumerate(tolerances):
        progress("choosing policies", done, len(tolerances))
        best, error = _best(chooser, tolerance, worth, error_of)
        choices.append(_choice(tolerance, best.policies, best.estimate, kept, error))
    progress("choosing policies", len(tolerances), len(tolerances))
    return Best(tuple(choices), _undominated(costs.seen), _uniform(found, costs, kept), kept.stored_bytes)


class _Recorded(CostModel):
    """Costs that remember what came out, since all that a search tried says something of the trade-off."""

    def __init__(self, measured: Measurements) -> None:
        super().__init__(measured)
        self.seen: set[tuple[int, float]] = set()

    def of(self, policies: Mapping[str, Policy]) -> Estimate:
        """Return what `policies` would cost, and remember its bytes and error."""
        estimate = super().of(policies)
        self.seen.add((estimate.stored_bytes, estimate.error))
        return estimate


def _best(
    chooser: Chooser,
    tolerance: float,
    bytes_per_second: float,
    error_of: ErrorOf | None,
) -> tuple[Assignment, float | None]:
    """Return the best choice and its measured error, which is to be within the tolerance, and not far below it."""
    aim, low, high = tolerance, 0.0, math.inf  # aims that kept within the tolerance, and that did not
    best: tuple[Assignment, float | None] | None = None
    for _ in range(_ATTEMPTS):
        try:
            chosen = chooser.choose(Constraints(aim, None, bytes_per_second))
        except InfeasibleError as error:
            raise ValueError(f"no choice of policies is predicted within a gradient error of {aim:.1e}") from error
        if error_of is None:
            return chosen, None
        measured = error_of(chosen.policies)
        if measured <= tolerance:
            low, best = aim, (chosen, measured)
            if measured >= _NEAR * tolerance or high == math.inf:
                break
            aim = math.sqrt(low * high)
        else:
            high = aim
            if best is None or (best[1] or 0.0) > tolerance:
                best = chosen, measured
            aim = math.sqrt(low * high) if low else aim * max(0.05, 0.8 * tolerance / measured)
    assert best is not None
    return best


def _choice(
    tolerance: float,
    policies: Mapping[str, Policy],
    estimate: Estimate,
    kept: Estimate,
    measured: float | None = None,
) -> Choice:
    return Choice(
        tolerance=tolerance,
        policies=tuple(policies[name] for name in estimate.blocks),
        block_bytes=tuple(block.stored_bytes for block in estimate.blocks.values()),
        predicted_error=estimate.error,
        step_ratio=estimate.seconds / kept.seconds if kept.seconds > 0 else math.nan,
        measured_error=measured,
    )


def _uniform(found: Measurements, costs: _Recorded, kept: Estimate) -> dict[Policy, Choice]:
    uniform = {}
    for policy in dict.fromkeys(c.policy for block in found.blocks for c in block.candidates):
        policies = costs.with_all(policy)
        estimate = costs.of(policies)
        uniform[policy] = _choice(estimate.error, policies, estimate, kept)
    return uniform


def _undominated(points: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Return the points with less error than every point of no more bytes."""
    front: list[tuple[int, float]] = []
    for size, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((size, error))
    return tuple(front)
