"""Which option each block gets, under an error tolerance, a memory budget, or both: an integer programme.

Every block has some options, each with a squared error, stored bytes, seconds, and a transient. Squared errors, bytes
and seconds add up over blocks. The peak of memory does not: while block `n` runs backward, what blocks `0..n` store is
still there, what those above stored is gone, and the block's own transient comes on top. So

    peak = max(head + sum of all stored, max over n of (transient[n] + sum of stored[0..n]))

where `head` is the transient of whatever comes after the last block (logits, loss), and transients include all that is
always there. This is a multiple-choice knapsack with nested budgets (Kellerer, Pferschy, Pisinger: Knapsack Problems,
2004, chapter 11), and solved as they advise: the linear relaxation prices every option; the integer programme is solved
over the core, the options with the lowest prices; and where the gap between both is larger than the price of an option
left out, once more with that. Both by HiGHS. With a thousand blocks the gap is far below 1e-4; with few, the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Picks = NDArray[np.intp]  # of each block, which option

_FEW = 40  # blocks: up to here, the optimum is searched for
_GAPS = (1e-7, 3e-4)  # relative: how far from the optimum the search may end, with few blocks and with many
_TIME_LIMIT = 3.0  # seconds, of one integer programme
_CORES = (30, 300)  # options beside the cheapest of each block
_SLACK = 3e-6  # by how much, relatively, HiGHS may break a constraint (1e-6 in each of the sums)
_ATTEMPTS = 30  # choices that break a constraint by less than that, taken out one by one
_ROUNDING = 1e-9  # relative; sums in another order differ by less
_SOLVED, _INFEASIBLE = 0, 2  # scipy's status


class InfeasibleError(ValueError):
    """No choice meets the constraints.

    Attributes:
        smallest_peak: of any choice, in bytes.
        smallest_error: of any choice within the memory budget; infinite if there is none.
    """

    def __init__(self, smallest_peak: float, smallest_error: float) -> None:
        super().__init__(f"the smallest peak is {smallest_peak:.0f}, the smallest error within it {smallest_error:g}")
        self.smallest_peak, self.smallest_error = smallest_peak, smallest_error


class Solution(NamedTuple):
    """What was found.

    Attributes:
        choice: which option each block gets. [blocks]
        gap: by how much, relatively, the best choice may be better than this one.
    """

    choice: Picks
    gap: float


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

    def _at(self, table: Floats, choice: Picks) -> Floats:
        return table[np.arange(len(choice)), choice]

    def error_of(self, choice: Picks) -> float:
        """Return the relative error of the gradient."""
        return float(np.sqrt(self._at(self.error, choice).sum()))

    def stored_of(self, choice: Picks) -> float:
        """Return the bytes stored by all blocks."""
        return float(self._at(self.stored, choice).sum())

    def seconds_of(self, choice: Picks) -> float:
        """Return the time of all blocks."""
        return float(self._at(self.seconds, choice).sum())

    def peak_of(self, choice: Picks) -> float:
        """Return the peak of memory."""
        return float(self.levels(choice).max())

    def levels(self, choice: Picks) -> Floats:
        """Return memory at each block, and at the head: [blocks + 1]."""
        below = np.cumsum(self._at(self.stored, choice))
        total = below[-1] if len(below) else 0.0
        return np.append(below + self._at(self.transient, choice), total + self.head)


def allocate(
    problem: Problem, *, tolerance: float | None = None, memory: float | None = None, bytes_per_second: float = 0.0
) -> Solution:
    """Choose an option for every block.

    Args:
        problem: the options.
        tolerance: largest relative error of the gradient. Alone, the choice stores the fewest bytes.
        memory: largest peak, in bytes. Alone, the choice is the most accurate one, and the fastest among exact
            ones. With a tolerance, it is the fastest.
        bytes_per_second: what time is worth where bytes are minimised.

    Returns:
        Which option each block gets; where time ran out, the best that was found, and how far it may be off.

    Raises:
        InfeasibleError: if there is none; says what is possible.
        TimeoutError: if none was found, and it is not known whether there is one.
    """
    error, peak = np.inf if tolerance is None else tolerance**2, np.inf if memory is None else memory
    if memory is None:
        seconds = np.where(problem.exists, problem.seconds, 0.0)
        found = _minimise(problem, problem.stored + bytes_per_second * seconds, error, peak)
    elif tolerance is None:
        exact = problem.only(problem.error == 0.0)
        is_exact = _fewest_bytes(exact, peak) is not None
        found = _minimise(exact, problem.seconds, error, peak) if is_exact else _most_accurate(problem, peak)
    else:
        found = _minimise(problem, problem.seconds, error, peak)
    if found is None:
        best = _most_accurate(problem, peak)
        raise InfeasibleError(_smallest_peak(problem), np.inf if best is None else problem.error_of(best.choice))
    return found


def _most_accurate(problem: Problem, peak: float) -> Solution | None:
    """Return the choice with the least error within `peak`.

    Errors spread over many powers of ten, too many for one scale. So first the least bound that all options chosen can
    keep to: the optimum is between that and as many times that as there are blocks.
    """
    bounds = np.unique(problem.error[problem.exists])
    if _fewest_bytes(problem, peak) is None:
        return None
    low, high = -1, len(bounds) - 1
    while high - low > 1:
        middle = (low + high) // 2
        within = _fewest_bytes(problem.only(problem.error <= bounds[middle]), peak)
        low, high = (middle, high) if within is None else (low, middle)
    most = len(problem.error) * bounds[high]
    return _minimise(problem.only(problem.error <= most), problem.error, np.inf, peak)


def _smallest_peak(problem: Problem) -> float:
    """Return the lowest peak of any choice, to a byte: by bisection, since `_fewest_bytes` tells if there is one."""
    if not len(problem.stored):
        return problem.head
    high = problem.peak_of(np.where(problem.exists, problem.stored, np.inf).argmin(1))
    low = high - np.ptp(problem.transient[problem.exists])
    while high - low > 1.0:
        middle = (low + high) / 2
        choice = _fewest_bytes(problem, middle)
        low, high = (middle, high) if choice is None else (low, problem.peak_of(choice))
    return high


def _fewest_bytes(problem: Problem, peak: float) -> Picks | None:
    """Return the choice that stores least at every depth and stays within `peak`, or None: optimal block by block."""
    choice, below = [], 0.0
    for stored, transient, exists in zip(problem.stored, problem.transient, problem.exists, strict=True):
        own = np.where(exists & (below + stored + transient <= peak), stored, np.inf)
        choice.append(int(own.argmin()))
        below += own[choice[-1]]
    return np.array(choice, dtype=np.intp) if below + problem.head <= peak else None


def _minimise(problem: Problem, cost: Floats, error: float, peak: float) -> Solution | None:
    """Return a choice of least `cost` with a squared error of at most `error` and a peak of at most `peak`."""
    if not len(problem.error):
        return Solution(np.zeros(0, dtype=np.intp), 0.0) if problem.head <= peak else None
    error *= 1 + _ROUNDING
    usable = problem.exists & np.isfinite(cost) & (problem.error <= error)
    usable &= (problem.stored + problem.transient <= peak) & ~_dominated(problem, cost, usable)
    if not usable.any(1).all() or problem.head > peak or peak <= 0.0:
        return None
    programme = _Programme(problem, np.argwhere(usable), cost, error, peak)
    for attempt in range(_ATTEMPTS):
        found = programme.solve(1.0)
        if found is None or _meets(problem, found.choice, error, peak):
            return found
        if attempt == 0:  # many may break a constraint by as little
            within = programme.solve(1.0 - _SLACK)
            if within is not None and _meets(problem, within.choice, error, peak):
                return within
        programme.exclude(found.choice)
    raise TimeoutError("whether any choice meets the constraints hangs on the last digits")


def _meets(problem: Problem, choice: Picks, error: float, peak: float) -> bool:
    return problem.error_of(choice) ** 2 <= error * (1 + _ROUNDING) and problem.peak_of(choice) <= peak


def _dominated(problem: Problem, cost: Floats, usable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell which options another one of the same block beats or equals in every respect: [blocks, options]."""
    respects = np.stack([cost, problem.error, problem.stored, problem.stored + problem.transient, problem.seconds])
    no_worse: NDArray[np.bool_] = np.all(respects[:, :, :, None] <= respects[:, :, None, :], axis=0)  # [blocks, by, of]
    earlier = np.triu(np.ones(no_worse.shape[1:], dtype=bool), 1)  # of equals, the first stays
    beats = no_worse & (~np.swapaxes(no_worse, 1, 2) | earlier) & usable[:, :, None]
    dominated: NDArray[np.bool_] = np.any(beats, axis=1)
    return dominated


class _Programme:
    """The integer programme: a variable per option, 0 or 1; and, with a peak, one per block for what is stored so far.

    Args:
        problem: the options.
        options: those that are usable: block and option. [variables, 2]
        cost: what is to be minimised. [blocks, options]
        error, peak: the bounds.
    """

    def __init__(self, problem: Problem, options: NDArray[np.intp], cost: Floats, error: float, peak: float) -> None:
        from scipy import sparse  # here, since it takes long to import

        block, option = options.T
        self._options, self._shape = options, problem.error.shape
        self._gap = _GAPS[len(problem.error) > _FEW]
        count, blocks = len(options), len(problem.error)
        self._cost = cost[block, option]
        least = np.where(problem.exists, cost, np.inf).min(1).sum()
        self._scale = least if least > 1e-3 * self._cost.max() else self._cost.max() or 1.0

        def by_block(values: Any) -> Any:
            return sparse.csr_array((np.broadcast_to(values, count), (block, np.arange(count))), (blocks, count))

        equal, most = [[by_block(1.0)]], []
        self._sums, self._highest = 0, np.zeros(0)
        if np.isfinite(peak):
            self._sums, self._highest = blocks, np.ones(blocks)
            self._highest[-1] = 1.0 - problem.head / peak
            so_far = sparse.eye_array(blocks)
            equal = [
                [by_block(1.0), None],
                [by_block(problem.stored[block, option] / peak), sparse.eye_array(blocks, k=-1) - so_far],
            ]
            most.append([by_block(problem.transient[block, option] / peak), so_far])
        if 0.0 < error < np.inf:
            row = sparse.csr_array(problem.error[None, block, option] / error)
            most.append([row, sparse.csr_array((1, blocks))] if self._sums else [row])
        self._equal = sparse.block_array(equal, format="csc")
        self._most = sparse.block_array(most, format="csc") if most else None

    def exclude(self, choice: Picks) -> None:
        """Take one choice out: of its options, not all at once."""
        from scipy import sparse

        block, option = self._options.T
        chosen = np.append(choice[block] == option, np.zeros(self._sums)) / (len(choice) - 0.5)
        self._most = sparse.vstack([self._most, sparse.csr_array(chosen[None])], format="csc")

    def solve(self, room: float) -> Solution | None:
        """Return the best choice whose sums are at most `room` times their bounds; None if there is none.

        Raises:
            TimeoutError: if none was found in time.
        """
        relaxed = self._run(np.ones(len(self._options), dtype=bool), room, integral=False)
        if relaxed.status == _INFEASIBLE:
            return None
        count = len(self._options)
        solved = relaxed.x is not None  # else nothing is known: the core is everything
        price, bound = (relaxed.lower.marginals[:count], relaxed.fun) if solved else (np.zeros(count), 0.0)
        best, least = None, bound
        for reach in np.sort(price)[[min(self._shape[0] + more, count) - 1 for more in (*_CORES, count)]]:
            core = price <= reach
            found = self._run(core, room, integral=True)
            if found.x is not None and (best is None or found.fun < best[0]):
                best = found.fun, self._options[core][found.x[: core.sum()] > 0.5]
                # An option that was left out costs at least its price more than the relaxation.
                left_out = np.inf if core.all() else least + reach
                proven = found.fun * (1 - (self._gap if found.status == _SOLVED else found.mip_gap))
                bound = max(bound, min(proven, left_out))
            if core.all() or (best is not None and best[0] - bound <= self._gap * best[0]):
                break
        if best is None:
            if found.status == _INFEASIBLE:
                return None
            raise TimeoutError(f"no choice within the constraints was found in {_TIME_LIMIT:g} s")
        cost, chosen = best
        return Solution(chosen[np.argsort(chosen[:, 0]), 1], max(0.0, (cost - bound) / cost) if cost else 0.0)

    def _run(self, core: NDArray[np.bool_], room: float, integral: bool) -> Any:
        """Solve for the options in `core`, integral or relaxed."""
        from scipy.optimize import linprog  # here, since it takes long to import

        columns = np.append(np.flatnonzero(core), len(core) + np.arange(self._sums))
        count, blocks = len(columns) - self._sums, self._shape[0]
        options = {"time_limit": _TIME_LIMIT, "mip_rel_gap": self._gap / 2} if integral else {}
        return linprog(
            np.append(self._cost[core] / self._scale, np.zeros(self._sums)),
            A_ub=None if self._most is None else self._most[:, columns],
            b_ub=None if self._most is None else np.full(self._most.shape[0], room),
            A_eq=self._equal[:, columns],
            b_eq=np.append(np.ones(blocks), np.zeros(self._sums)),
            bounds=np.stack([np.zeros(len(columns)), np.append(np.ones(count), room * self._highest)], axis=1),
            integrality=np.append(np.full(count, int(integral)), np.zeros(self._sums)),
            method="highs",
            options=options,
        )
