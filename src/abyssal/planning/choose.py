"""Choosing the policies of a whole model: the optimiser's choice, priced by the cost model, and improved there.

The optimiser (`solve.py`) takes blocks for independent. The cost model (`cost.py`) knows what it leaves out, so its
budgets are tightened until that model, too, has them met. Then two searches within the cost model: choices of a simple
shape (kept blocks, one policy, kept or stored blocks), which are often as good and easier to read, and single swaps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import numpy as np

from abyssal.engine.policy import Code, Keep, Policy, Store
from abyssal.planning.cost import CostModel, Estimate
from abyssal.planning.solve import InfeasibleError, Problem, allocate

Policies = dict[str, Policy]

# What a step's time is worth where bytes are to be saved: a tenth of a step, 1 % of what checkpointing keeps.
WORTH_OF_A_STEP = 0.1
_TIGHTENINGS = 8
_GRID = 9  # where a simple shape's parts may begin
_EFFORT = 40_000  # blocks reckoned in the searches: about a second
_WORTH_OF_ACCURACY = 0.03  # of the time, for using none of the tolerance
_WORTH = 0.01  # a relative gain for which a simpler choice is given up


@dataclass(frozen=True)
class Constraints:
    """What a plan is to meet.

    Attributes:
        tolerance: largest relative error of the gradient; None for any.
        memory: largest peak in bytes; None for any.
        bytes_per_second: what time is worth where bytes are minimised, which is without `memory`.
    """

    tolerance: float | None
    memory: float | None
    bytes_per_second: float = 0.0

    def admits(self, estimate: Estimate) -> bool:
        """Whether a choice meets it."""
        return (self.tolerance is None or estimate.error <= self.tolerance) and (
            self.memory is None or estimate.peak_bytes <= self.memory
        )

    def rank(self, estimate: Estimate) -> tuple[float, float]:
        """Return what there should be little of, most important first."""
        if self.memory is None:
            return estimate.stored_bytes + self.bytes_per_second * estimate.seconds, estimate.error
        if self.tolerance is None:
            return estimate.error, estimate.seconds
        # A few per cent of time are given for accuracy: Reverse(0) saves no more against Code, and uses it up.
        return estimate.seconds * (1 + _WORTH_OF_ACCURACY * estimate.error / self.tolerance), estimate.error


@dataclass(frozen=True)
class Assignment:
    """Policies by block, and what they would cost."""

    policies: Policies
    estimate: Estimate


class Chooser:
    """Chooses policies for one model.

    Args:
        costs: the cost model of the network.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.problem, self._options = costs.problem()
        self._names = [block.name for block in costs.measured.blocks]
        self._left = 0
        self.gap = 0.0  # the largest of the optimiser's so far

    def choose(self, constraints: Constraints) -> Assignment:
        """Return the best choice that meets `constraints`, as far as it was found.

        Raises:
            InfeasibleError: if none does.
        """
        self._left = _EFFORT
        best = self._by_optimiser(constraints)
        for policies in self._simple_shapes():
            best = self._better(constraints, best, policies)
        if best is None:
            least = self.least_memory()
            raise InfeasibleError(least.estimate.peak_bytes, least.estimate.error)
        return self.tidied(constraints, self._swapped(constraints, best))

    def least_memory(self) -> Assignment:
        """Return the choice with the lowest peak, whatever its error."""
        lowest: Assignment | None = None
        for policies in [*map(self.costs.with_all, self._palette()), *self._simple_shapes(_EFFORT // 4)]:
            choice = Assignment(policies, self.costs.of(policies))
            if lowest is None or choice.estimate.peak_bytes < lowest.estimate.peak_bytes:
                lowest = choice
        assert lowest is not None
        return lowest

    # ------------------------------------------------------------------ searching

    def _by_optimiser(self, constraints: Constraints) -> Assignment | None:
        tolerance, memory, rate = constraints.tolerance, constraints.memory, constraints.bytes_per_second
        best: Assignment | None = None
        for _ in range(_TIGHTENINGS):
            try:
                rows = self._allocated(self.problem, tolerance, memory, rate)
            except (InfeasibleError, TimeoutError):
                return best
            for arranged in self._arrangements(rows, tolerance, memory, rate):
                best = self._better(constraints, best, self._named(arranged))
            if best is not None:
                return best
            estimate = self.costs.of(self._named(rows))
            if tolerance is not None and constraints.tolerance is not None and estimate.error > constraints.tolerance:
                tolerance *= 0.8 * constraints.tolerance / estimate.error
            if memory is not None and constraints.memory is not None and estimate.peak_bytes > constraints.memory:
                memory -= 1.1 * (estimate.peak_bytes - constraints.memory)
        return best

    def _arrangements(
        self, rows: np.ndarray, tolerance: float | None, memory: float | None, rate: float
    ) -> Iterator[np.ndarray]:
        """Yield the optimiser's choice, and the same with blocks that are stored moved to the end of their kind.

        What is stored last is let go first; and a stored block breaks a chain.
        """
        stored = np.array([not self._options[n][i].recomputes for n, i in enumerate(rows)])
        groups: dict[object, list[int]] = defaultdict(list)
        for n, block in enumerate(self.costs.measured.blocks):
            groups[block.kind, block.shape, block.dtype].append(n)
        allowed, moved = self.problem.exists.copy(), False
        for places in groups.values():
            count = int(stored[places].sum())
            moved |= not stored[places[len(places) - count :]].all()
            for rank, n in enumerate(places):
                is_last = rank >= len(places) - count
                for i, policy in enumerate(self._options[n]):
                    allowed[n, i] &= is_last != policy.recomputes
        if moved and allowed.any(1).all():
            with suppress(InfeasibleError, TimeoutError):
                yield self._allocated(self.problem.only(allowed), tolerance, memory, rate)
        yield rows

    def _allocated(self, problem: Problem, tolerance: float | None, memory: float | None, rate: float) -> np.ndarray:
        found = allocate(problem, tolerance=tolerance, memory=memory, bytes_per_second=rate)
        self.gap = max(self.gap, found.gap)
        return found.choice

    def _named(self, rows: np.ndarray) -> Policies:
        return {name: self._options[n][int(rows[n])] for n, name in enumerate(self._names)}

    def _better(
        self, constraints: Constraints, best: Assignment | None, policies: Policies, worth: float = 0.0
    ) -> Assignment | None:
        self._left -= len(policies)
        choice = Assignment(policies, self.costs.of(policies))
        if not constraints.admits(choice.estimate):
            return best
        if best is None:
            return choice
        (first, second), (first_best, second_best) = constraints.rank(choice.estimate), constraints.rank(best.estimate)
        if first < first_best * (1 - worth) or (first <= first_best and second < second_best * (1 - worth)):
            return choice
        return best

    def _palette(self) -> list[Policy]:
        found = {c.policy: None for block in self.costs.measured.blocks for c in block.candidates}
        return list(found)

    def _simple_shapes(self, effort: int | None = None) -> Iterator[Policies]:
        """Yield kept blocks, then one policy, then kept or stored ones; as many as the effort allows."""
        count = len(self._names)
        grid = sorted({*range(min(4, count + 1)), *np.linspace(0, count, _GRID).astype(int).tolist(), count})
        left = self._left // 2 if effort is None else effort
        for begin in grid:
            for end in reversed([e for e in grid if e > begin]):
                for policy in self._palette():
                    for tail in (Keep(), Store()) if end < count else (Keep(),):
                        left -= count
                        if left < 0:
                            return
                        parts = [Keep()] * begin, [policy] * (end - begin), [tail] * (count - end)
                        yield self.costs.filled(chain.from_iterable(parts))

    def _swapped(self, constraints: Constraints, best: Assignment) -> Assignment:
        """Swap the policy of one block at a time, as long as something is gained and the effort lasts."""
        improved = True
        while improved:
            improved = False
            for n, name in enumerate(self._names):
                for policy in self._options[n]:
                    if self._left < 0:
                        return best
                    if policy != best.policies[name]:
                        swapped = self._better(constraints, best, {**best.policies, name: policy}, _WORTH)
                        assert swapped is not None
                        improved |= swapped is not best
                        best = swapped
        return best

    def tidied(self, constraints: Constraints, choice: Assignment) -> Assignment:
        """Write a choice plainly, where the plainer one costs the same.

        The first coded block of a segment, whose code costs nothing, gets the policy of the next one; the last block
        of a chain, or below a stored one, which keeps its input whatever its policy, is kept.
        """
        policies, estimate = dict(choice.policies), choice.estimate
        for blocks in self.costs.measured.chains:
            for below, above in zip(reversed(blocks), [None, *reversed(blocks[1:])], strict=True):
                first, second = policies[below], Store() if above is None else policies[above]
                both_coded = isinstance(first, Code) and isinstance(second, Code)
                plainer = second if both_coded else Keep()
                if not first.recomputes or first == plainer or not (both_coded or not second.recomputes):
                    continue
                if not self.costs.offers(below, plainer):
                    continue
                trial = {**policies, below: plainer}
                found = self.costs.of(trial)
                same = found.stored_bytes <= estimate.stored_bytes and found.error <= estimate.error * 1.001
                if same and constraints.admits(found):
                    policies, estimate = trial, found
        return Assignment(policies, estimate)
