"""Choosing the policies of a whole model: the optimiser's choice, put to the accounts, and improved there.

The optimiser (`solve.py`) takes blocks for independent. The accounts (`cost.py`) know what it leaves out, so its
budgets are tightened until the accounts are content. Then two searches within the accounts: choices of a simple shape
(kept blocks, one policy, kept or stored blocks), which are often as good and easier to read, and single swaps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from abyssal.engine.policy import Code, Keep, Policy, Store
from abyssal.planning.cost import Account, Accounts
from abyssal.planning.solve import InfeasibleError, allocate

Policies = dict[str, Policy]

_TIGHTENINGS = 8
_GRID = 9  # where a simple shape's parts may begin
_EFFORT = 40_000  # blocks reckoned in the searches: about a second
_WORTH_OF_ACCURACY = 0.03  # of the time, for using none of the tolerance
_WORTH = 0.01  # a relative gain for which a simpler choice is given up


@dataclass(frozen=True)
class Wish:
    """What a plan is to meet.

    Attributes:
        tolerance: largest relative error of the gradient; None for any.
        memory: largest peak in bytes; None for any.
        bytes_per_second: what time is worth where bytes are minimised, which is without `memory`.
    """

    tolerance: float | None
    memory: float | None
    bytes_per_second: float = 0.0

    def admits(self, account: Account) -> bool:
        """Whether a choice meets it."""
        return (self.tolerance is None or account.error <= self.tolerance) and (
            self.memory is None or account.peak_bytes <= self.memory
        )

    def rank(self, account: Account) -> tuple[float, float]:
        """Return what there should be little of, most important first."""
        if self.memory is None:
            return account.stored_bytes + self.bytes_per_second * account.seconds, account.error
        if self.tolerance is None:
            return account.error, account.seconds
        # A few per cent of time are given for accuracy: Reverse(0) saves no more against Code, and uses it up.
        return account.seconds * (1 + _WORTH_OF_ACCURACY * account.error / self.tolerance), account.error


@dataclass(frozen=True)
class Choice:
    """Policies by block, and what they would cost."""

    policies: Policies
    account: Account


class Chooser:
    """Chooses policies for one model.

    Args:
        accounts: of the model.
    """

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.problem, self._options = accounts.problem()
        self._names = [block.name for block in accounts.measured.blocks]
        self._left = 0

    def choose(self, wish: Wish) -> Choice:
        """Return the best choice that meets `wish`, as far as it was found.

        Raises:
            InfeasibleError: if none does.
        """
        self._left = _EFFORT
        best = self._by_optimiser(wish)
        for policies in self._simple_shapes():
            best = self._better(wish, best, policies)
        if best is None:
            least = self.least_memory()
            raise InfeasibleError(least.account.peak_bytes, least.account.error)
        return self.tidied(wish, self._swapped(wish, best))

    def least_memory(self) -> Choice:
        """Return the choice with the lowest peak, whatever its error."""
        names, lowest = self._names, None
        for policies in [*self._uniform(), *self._simple_shapes(_EFFORT // 4)]:
            choice = Choice(policies, self.accounts.of(policies))
            if lowest is None or choice.account.peak_bytes < lowest.account.peak_bytes:
                lowest = choice
        assert lowest is not None, names
        return lowest

    # ------------------------------------------------------------------ searching

    def _by_optimiser(self, wish: Wish) -> Choice | None:
        tolerance, memory, rate = wish.tolerance, wish.memory, wish.bytes_per_second
        best: Choice | None = None
        for _ in range(_TIGHTENINGS):
            try:
                rows = allocate(self.problem, tolerance=tolerance, memory=memory, bytes_per_second=rate)
            except InfeasibleError:
                return best
            for arranged in self._arrangements(rows, tolerance, memory, rate):
                best = self._better(wish, best, self._named(arranged))
            if best is not None:
                return best
            account = self.accounts.of(self._named(rows))
            if tolerance is not None and wish.tolerance is not None and account.error > wish.tolerance:
                tolerance *= 0.8 * wish.tolerance / account.error
            if memory is not None and wish.memory is not None and account.peak_bytes > wish.memory:
                memory -= 1.1 * (account.peak_bytes - wish.memory)
        return best

    def _arrangements(
        self, rows: np.ndarray, tolerance: float | None, memory: float | None, rate: float
    ) -> Iterator[np.ndarray]:
        """Yield the optimiser's choice, and the same with blocks that are stored moved to the end of their kind.

        What is stored last is let go first; and a stored block breaks a chain.
        """
        stored = np.array([not self._options[n][i].recomputes for n, i in enumerate(rows)])
        groups: dict[object, list[int]] = defaultdict(list)
        for n, block in enumerate(self.accounts.measured.blocks):
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
            with suppress(InfeasibleError):
                yield allocate(self.problem.only(allowed), tolerance=tolerance, memory=memory, bytes_per_second=rate)
        yield rows

    def _named(self, rows: np.ndarray) -> Policies:
        return {name: self._options[n][int(rows[n])] for n, name in enumerate(self._names)}

    def _better(self, wish: Wish, best: Choice | None, policies: Policies, worth: float = 0.0) -> Choice | None:
        self._left -= len(policies)
        choice = Choice(policies, self.accounts.of(policies))
        if not wish.admits(choice.account):
            return best
        if best is None:
            return choice
        (first, second), (first_best, second_best) = wish.rank(choice.account), wish.rank(best.account)
        if first < first_best * (1 - worth) or (first <= first_best and second < second_best * (1 - worth)):
            return choice
        return best

    def _palette(self) -> list[Policy]:
        found = {c.policy: None for block in self.accounts.measured.blocks for c in block.candidates}
        return list(found)

    def _filled(self, shape: Mapping[int, Policy]) -> Policies:
        """Return a shape as policies; a block that cannot have its one is kept, or else stored."""
        offers = self.accounts.offers
        choices = ((name, (shape[n], Keep(), Store())) for n, name in enumerate(self._names))
        return {name: next(p for p in wanted if offers(name, p)) for name, wanted in choices}

    def _uniform(self) -> list[Policies]:
        return [self._filled(dict.fromkeys(range(len(self._names)), policy)) for policy in self._palette()]

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
                        middle = {n: policy if n < end else tail for n in range(begin, count)}
                        yield self._filled({**dict.fromkeys(range(begin), Keep()), **middle})

    def _swapped(self, wish: Wish, best: Choice) -> Choice:
        """Swap the policy of one block at a time, as long as something is gained and the effort lasts."""
        improved = True
        while improved:
            improved = False
            for n, name in enumerate(self._names):
                for policy in self._options[n]:
                    if self._left < 0:
                        return best
                    if policy != best.policies[name]:
                        swapped = self._better(wish, best, {**best.policies, name: policy}, _WORTH)
                        assert swapped is not None
                        improved |= swapped is not best
                        best = swapped
        return best

    def tidied(self, wish: Wish, choice: Choice) -> Choice:
        """Write a choice plainly, where the plainer one costs the same.

        The first coded block of a segment, whose code costs nothing, gets the policy of the next one; the last block
        of a chain, or below a stored one, which keeps its input whatever its policy, is kept.
        """
        policies, account = dict(choice.policies), choice.account
        for chain in self.accounts.measured.chains:
            for below, above in zip(reversed(chain), [None, *reversed(chain[1:])], strict=True):
                first, second = policies[below], Store() if above is None else policies[above]
                both_coded = isinstance(first, Code) and isinstance(second, Code)
                plainer = second if both_coded else Keep()
                if not first.recomputes or first == plainer or not (both_coded or not second.recomputes):
                    continue
                if not self.accounts.offers(below, plainer):
                    continue
                trial = {**policies, below: plainer}
                found = self.accounts.of(trial)
                same = found.stored_bytes <= account.stored_bytes and found.error <= account.error * 1.001
                if same and wish.admits(found):
                    policies, account = trial, found
        return Choice(policies, account)
