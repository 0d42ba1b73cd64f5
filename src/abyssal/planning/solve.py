"""Which option each block gets, under an error tolerance, a memory budget, or both: pure optimisation.

Every block has some options, each with a squared error, stored bytes, seconds, and a transient. Squared errors, bytes
and seconds add up over blocks. The peak of memory does not: while block `n` runs backward, what blocks `0..n` store is
still there, what those above stored is gone, and the block's own transient comes on top. So

    peak = max(head + sum of all stored, max over n of (transient[n] + sum of stored[0..n]))

where `head` is the transient of whatever comes after the last block (logits, loss), and transients include all that is
always there. A knapsack with nested budgets: solved exactly by dynamic programming over the undominated partial sums
where these stay few (up to a dozen blocks), else by Lagrange multipliers for error and memory, found by bisection, a
repair where a nested budget is still broken, and a greedy fill of what the multipliers leave over. Multipliers reach
every point on the convex hull of the trade-off; with many blocks the hull is close to the trade-off itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]

_MOST_LABELS, _MOST_BLOCKS = 1_000, 40  # of the dynamic programme; beyond, it would not be quick
_BISECTIONS = 30
_ROUNDING = 1e-9  # relative; sums in another order differ by less


class InfeasibleError(ValueError):
    """No choice meets the constraints.

    Attributes:
        smallest_peak: of any choice, in bytes.
        smallest_error: of any choice within the memory budget; infinite if there is none.
    """

    def __init__(self, smallest_peak: float, smallest_error: float) -> None:
        super().__init__(f"the smallest peak is {smallest_peak:.0f}, the smallest error within it {smallest_error:g}")
        self.smallest_peak, self.smallest_error = smallest_peak, smallest_error


@dataclass(frozen=True)
class Problem:
    """What can be chosen. An option that a block does not have is infinite in `seconds`.

    Attributes:
        error: squared relative error of the gradient. [blocks, options]
        stored: bytes kept. [blocks, options]
        seconds: time. [blocks, options]
        transient: level of memory in the block's own phases, less what blocks up to it store. [blocks, options]
        head: the same after the last block.
    """

    error: Floats
    stored: Floats
    seconds: Floats
    transient: Floats
    head: float

    @property
    def exists(self) -> NDArray[np.bool_]:
        """Tell which options there are: [blocks, options]."""
        return np.isfinite(self.seconds)

    def only(self, allowed: NDArray[np.bool_]) -> Problem:
        """Return the same with the other options taken away."""
        seconds = np.where(allowed, self.seconds, np.inf)
        return Problem(self.error, self.stored, seconds, self.transient, self.head)

    def _at(self, table: Floats, choice: Choice) -> Floats:
        return table[np.arange(len(choice)), choice]

    def error_of(self, choice: Choice) -> float:
        """Return the relative error of the gradient."""
        return float(np.sqrt(self._at(self.error, choice).sum()))

    def stored_of(self, choice: Choice) -> float:
        """Return the bytes stored by all blocks."""
        return float(self._at(self.stored, choice).sum())

    def seconds_of(self, choice: Choice) -> float:
        """Return the time of all blocks."""
        return float(self._at(self.seconds, choice).sum())

    def peak_of(self, choice: Choice) -> float:
        """Return the peak of memory."""
        return float(self.levels(choice).max())

    def levels(self, choice: Choice) -> Floats:
        """Return memory at each block, and at the head: [blocks + 1]."""
        below = np.cumsum(self._at(self.stored, choice))
        total = below[-1] if len(below) else 0.0
        return np.append(below + self._at(self.transient, choice), total + self.head)


def allocate(
    problem: Problem, *, tolerance: float | None = None, memory: float | None = None, bytes_per_second: float = 0.0
) -> Choice:
    """Choose an option for every block.

    Args:
        problem: the options.
        tolerance: largest relative error of the gradient. Alone, the choice stores the fewest bytes.
        memory: largest peak, in bytes. Alone, the choice is the most accurate one, and the fastest among exact
            ones. With a tolerance, it is the fastest.
        bytes_per_second: what time is worth where bytes are minimised.

    Returns:
        Which option each block gets. [blocks]

    Raises:
        InfeasibleError: if there is none; says what is possible.
    """
    error, peak = np.inf if tolerance is None else tolerance**2, np.inf if memory is None else memory
    # What is minimised; ties are broken by what else one would rather have less of.
    if memory is None:
        worth = problem.stored + bytes_per_second * np.where(problem.exists, problem.seconds, 0.0)
        found = _minimise(problem, _with_ties(worth, problem.seconds), error, peak)
    elif tolerance is None:
        found = _minimise(problem.only(problem.error == 0.0), problem.seconds, np.inf, peak)
        if found is None:
            found = _minimise(problem, _with_ties(problem.error, problem.seconds), np.inf, peak)
    else:
        found = _minimise(problem, problem.seconds, error, peak)
    if found is None:
        raise InfeasibleError(*_possible(problem, peak))
    return found


def _with_ties(first: Floats, second: Floats) -> Floats:
    """Return `first` with a trace of `second`, too small to outweigh a difference that matters."""
    scale = np.nanmax(np.where(np.isfinite(second), second, np.nan), initial=0.0)
    size = np.nanmax(np.where(np.isfinite(first), first, np.nan), initial=0.0)
    return first + 1e-9 * size * second / scale if scale > 0.0 else first


def _possible(problem: Problem, peak: float) -> tuple[float, float]:
    """Return the smallest peak there is, and the smallest error within `peak`."""
    least = problem.peak_of(_least_memory(problem))
    choice = _minimise(problem, _with_ties(problem.error, problem.stored), np.inf, peak) if least <= peak else None
    return least, np.inf if choice is None else problem.error_of(choice)


def _least_memory(problem: Problem) -> Choice:
    """Return the choice with the lowest peak, by bisection over peaks: for a given one, the fewest bytes everywhere."""
    if not len(problem.stored):
        return np.zeros(0, dtype=np.intp)
    stored = np.where(problem.exists, problem.stored, np.inf)
    best = stored.argmin(1)
    low, high = problem.peak_of(stored.argmin(1)) - np.ptp(problem.transient[problem.exists]), problem.peak_of(best)
    for _ in range(_BISECTIONS):
        if high - low <= 1.0:
            break
        middle = (low + high) / 2
        choice = _fewest_bytes(problem, middle)
        if choice is None:
            low = middle
        else:
            best, high = choice, problem.peak_of(choice)
    return best


def _fewest_bytes(problem: Problem, peak: float) -> Choice | None:
    """Return the choice that stores least at every depth and stays within `peak`, or None: optimal block by block."""
    choice, below = [], 0.0
    for stored, transient, exists in zip(problem.stored, problem.transient, problem.exists, strict=True):
        fits = exists & (below + stored + transient <= peak)
        if not fits.any():
            return None
        choice.append(int(np.where(fits, stored, np.inf).argmin()))
        below += stored[choice[-1]]
    return np.array(choice, dtype=np.intp) if below + problem.head <= peak else None


def _minimise(problem: Problem, cost: Floats, error: float, peak: float) -> Choice | None:
    """Return a choice of least `cost` with a squared error of at most `error` and a peak of at most `peak`."""
    if not problem.exists.any(1).all():
        return None
    if len(problem.error) == 0:
        return np.zeros(0, dtype=np.intp) if problem.head <= peak else None
    exact = _by_labels(problem, cost, error, peak) if len(problem.error) <= _MOST_BLOCKS else _TOO_MANY
    return exact if exact is not _TOO_MANY else _by_multipliers(problem, cost, error, peak)


# ------------------------------------------------------------------------------------------- exactly, for few blocks

_TOO_MANY: Any = object()


def _by_labels(problem: Problem, cost: Floats, error: float, peak: float) -> Choice | None:
    """Dynamic programming over the undominated partial sums of (cost, error, bytes)."""
    labels = np.zeros((1, 3))
    steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for n, exists in enumerate(problem.exists):
        options = np.flatnonzero(exists)
        own = np.stack([cost[n, options], problem.error[n, options], problem.stored[n, options]], axis=1)
        if len(labels) * len(options) > 10 * _MOST_LABELS:
            return _TOO_MANY
        sums = (labels[:, None] + own).reshape(-1, 3)
        parent = np.repeat(np.arange(len(labels)), len(options))
        option = np.tile(options, len(labels))
        fits = (sums[:, 1] <= error * (1 + _ROUNDING)) & (sums[:, 2] + problem.transient[n, option] <= peak)
        sums, parent, option = sums[fits], parent[fits], option[fits]
        kept = _undominated(sums, error < np.inf, peak < np.inf)
        if len(kept) > _MOST_LABELS:
            return _TOO_MANY
        labels = sums[kept]
        steps.append((parent[kept], option[kept]))
    fits = labels[:, 2] + problem.head <= peak
    if not fits.any():
        return None
    at = int(np.where(fits, labels[:, 0], np.inf).argmin())
    choice = []
    for parents, chosen in reversed(steps):
        choice.append(chosen[at])
        at = parents[at]
    return np.array(choice[::-1], dtype=np.intp)


def _undominated(sums: Floats, by_error: bool, by_bytes: bool) -> NDArray[np.intp]:
    """Return the rows that no other row beats in cost and in those of error and bytes that are constrained."""
    if not len(sums):
        return np.zeros(0, dtype=np.intp)
    first = sums[:, 1] if by_error else np.zeros(len(sums))
    second = sums[:, 2] if by_bytes else np.zeros(len(sums))
    order = np.lexsort((second, first, sums[:, 0]))
    kept: list[int] = []
    front_first: list[float] = []  # undominated pairs so far, first rising and second falling
    front_second: list[float] = []
    for row, a, b in zip(order.tolist(), first[order].tolist(), second[order].tolist(), strict=True):
        at = int(np.searchsorted(front_first, a, side="right"))
        if at and front_second[at - 1] <= b:
            continue
        kept.append(row)
        if len(kept) > _MOST_LABELS:
            break
        end = at
        while end < len(front_second) and front_second[end] >= b:
            end += 1
        begin = at - 1 if at and front_first[at - 1] == a else at
        front_first[begin:end] = [a]
        front_second[begin:end] = [b]
    return np.array(kept, dtype=np.intp)


# ------------------------------------------------------------------------------------------- with many blocks


def _by_multipliers(problem: Problem, cost: Floats, error: float, peak: float) -> Choice | None:
    """Lagrange multipliers for error and memory, repair of nested budgets, greedy fill."""
    exists = problem.exists
    finite = np.where(exists, cost, np.inf)
    wrong = np.where(exists, problem.error, np.inf)
    stored = np.where(exists, problem.stored, 0.0)
    too_high = np.where(exists, problem.transient, np.inf)

    def best(by_error: float, by_bytes: float) -> Choice:
        with np.errstate(invalid="ignore"):
            total = finite + (by_error * wrong if by_error else 0.0) + by_bytes * stored
        return np.where(exists & np.isfinite(too_high), total, np.inf).argmin(1)

    def for_memory(by_error: float) -> Choice:
        return _bisected(lambda m: best(by_error, m), lambda c: problem.stored_of(c) + problem.head <= peak)

    def meets(choice: Choice) -> bool:
        return problem.error_of(choice) ** 2 <= error

    found = _repaired(problem, cost, _bisected(for_memory, meets), error, peak)
    if found is None and (least := _fewest_bytes(problem, peak)) is not None:
        found = _repaired(problem, cost, least, error, peak)
    return None if found is None else _filled(problem, cost, found, error, peak)


def _bisected(at: Any, holds: Any) -> Choice:
    """Return the choice at the smallest multiplier at which a constraint holds, or at the largest one tried."""
    choice: Choice = at(0.0)
    if holds(choice):
        return choice
    low, high = -60.0, 60.0  # of the multiplier's decimal logarithm
    best: Choice = at(10.0**high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        choice = at(10.0**middle)
        if holds(choice):
            best, high = choice, middle
        else:
            low = middle
    return best


def _slack(problem: Problem, choice: Choice, peak: float) -> tuple[Floats, Floats]:
    """Return room at each block, and room for what it stores in addition: at itself and everything after it."""
    room = peak - problem.levels(choice)
    after = np.minimum.accumulate(room[::-1])[::-1]
    return room[:-1], after[1:]


def _repaired(problem: Problem, cost: Floats, start: Choice, error: float, peak: float) -> Choice | None:
    """Swap options, cheapest first, until every nested budget and the error hold; None if that gets stuck."""
    choice, rows = start.copy(), np.arange(len(start))
    for _ in range(4 * problem.stored.size):
        levels = problem.levels(choice)
        broken = np.flatnonzero(levels > peak)
        over = problem.error_of(choice) ** 2 > error * (1 + _ROUNDING)
        if not len(broken) and not over:
            return choice
        more = cost - cost[rows, choice][:, None]
        less_bytes = problem.stored[rows, choice][:, None] - problem.stored
        less_error = problem.error[rows, choice][:, None] - problem.error
        if len(broken):
            worst = int(broken[0])
            gain = np.where(rows[:, None] <= worst, less_bytes, 0.0)
            if worst < len(rows):
                own = problem.transient[worst, choice[worst]] - problem.transient[worst]
                gain[worst] = less_bytes[worst] + own
            allowed = problem.exists & (gain > 0.0)
            if not over and np.isfinite(error):
                room = error * (1 + _ROUNDING) - problem.error_of(choice) ** 2
                within = allowed & (-less_error <= room)
                allowed = within if within.any() else np.zeros_like(allowed)
        else:
            gain = less_error
            here, after = _slack(problem, choice, peak)
            own_rise = problem.transient - problem.transient[rows, choice][:, None] - less_bytes
            allowed = problem.exists & (gain > 0.0) & (-less_bytes <= after[:, None]) & (own_rise <= here[:, None])
        if not allowed.any():
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(allowed, np.maximum(more, 0.0) / gain, np.inf)
        price = np.where(allowed & (price == 0.0), -gain, price)  # for nothing: the largest gain
        n, c = np.unravel_index(int(price.argmin()), price.shape)
        choice[n] = c
    return None


def _filled(problem: Problem, cost: Floats, start: Choice, error: float, peak: float) -> Choice:
    """Take every swap that lowers the cost and still fits, the best per share of the budgets it takes first."""
    choice, rows = start.copy(), np.arange(len(start))
    span = max(float(np.ptp(problem.stored[problem.exists])), 1.0)
    for _ in range(4 * problem.stored.size):
        gain = np.where(problem.exists, cost[rows, choice][:, None] - cost, 0.0)
        more_bytes = problem.stored - problem.stored[rows, choice][:, None]
        more_error = problem.error - problem.error[rows, choice][:, None]
        room, after = _slack(problem, choice, peak)
        own_rise = problem.transient - problem.transient[rows, choice][:, None] + more_bytes
        left = error * (1 + _ROUNDING) - problem.error_of(choice) ** 2
        with np.errstate(invalid="ignore"):
            fits = (more_bytes <= after[:, None]) & (own_rise <= room[:, None]) & (more_error <= left)
        fits &= problem.exists & (gain > _ROUNDING * np.abs(cost[rows, choice]).max())
        if not fits.any():
            return choice
        share = np.maximum(more_bytes, 0.0) / span
        if np.isfinite(left) and left > 0.0:
            share = share + np.maximum(more_error, 0.0) / left
        n, c = np.unravel_index(int(np.where(fits, gain / (share + 1e-9), -np.inf).argmax()), gain.shape)
        choice[n] = c
    return choice
