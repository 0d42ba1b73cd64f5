"""A chain whose states come back from below: some are held, and blocks are run again to get the others.

In the forward pass the schedule for the expected number of blocks says whose inputs are held; the chain's first input
and its last one always are. Backward, a state that is missing is computed from the nearest one below it, and the slots
that are free by then hold states on the way. A backward pass lets go of each held state with its own block, so that
its slot is free for the blocks below.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from abyssal.certify.errors import extremes
from abyssal.codec.feedback import Handed
from abyssal.engine.chain import Chain, Choice, Exact, Link, Place
from abyssal.engine.observer import Observer
from abyssal.engine.policy import Policy, Recompute
from abyssal.engine.schedule import fewest_slots, first_held, held
from abyssal.engine.scope import Scope
from abyssal.models.replay.call import Call


class Foresight:
    """How long the chains are that begin at some block.

    Attributes:
        length: of the last one; before the first, the most there can be.
    """

    __slots__ = ("length",)

    def __init__(self, length: int) -> None:
        """Expect so many blocks."""
        self.length = length


class ChainFromBelow(Chain):
    """See the module's head."""

    from_below = True

    def __init__(self, policy: Recompute, foresight: Foresight) -> None:
        """Begin with no call, and hold what the schedule holds for a chain of the length of the last one."""
        super().__init__()
        self._slots, self._foresight = policy.slots, foresight
        self._holds = set[int]()  # as planned
        self._exact = set[int]()  # what is held now, the chain's first and last input aside
        self._plan(foresight.length)
        foresight.length = 0

    def _plan(self, length: int) -> None:
        self._expected = max(length, 1)
        slots = self._slots or fewest_slots(self._expected)
        self._free, self._holds = slots, held(self._expected, slots)
        for number in self._exact - self._holds:
            self._drop(number)

    # ------------------------------------------------------------------ forward

    def append(self, call: Call, stream: Tensor, policy: Policy, observer: Observer, choose: Choice) -> Link:
        """Take note of a call, and let the input of the last one go, or hold it, as planned: see `Chain.append`."""
        link = super().append(call, stream, policy, observer, choose)
        if link.number and isinstance(link.place.exact, Exact):
            observer.linked(link.place.exact.state)
        return link

    def _let_go(self, place: Place, x: Tensor, y: Tensor) -> None:
        number = self._length - 1
        self._foresight.length = max(self._foresight.length, number + 2)
        if number + 1 >= self._expected:  # longer than the last one
            self._plan(2 * self._expected)
        if number in self._holds:
            self._exact.add(number)
        elif number:
            super()._let_go(place, x, y)

    def _drop(self, number: int) -> None:
        self._exact.discard(number)
        place = self.places[number]
        if isinstance(place.exact, Exact):
            super()._let_go(place, place.exact.state, place.exact.state)

    def release(self, number: int) -> None:
        """The graph has let go of a call: drop the states that no other one needs."""
        self._linked.discard(number)
        if not self._linked:
            self.places.clear()
            self._exact.clear()

    # ------------------------------------------------------------------ backward

    def rerun(self, number: int) -> Any:
        """Run a block again, with a graph, at its recomputed input, and return its output; its state is let go of."""
        try:
            return super().rerun(number)
        finally:  # a run may stop early, which is an exception
            if number and Scope.current().task != -1:
                self._exact.discard(number)
                self.places[number].exact = None

    def restore(self, number: int, scope: Scope) -> tuple[Tensor, Handed | None]:
        """Return the input of a call, run again from the nearest state below it, and nothing to hand down."""
        found = scope.below.setdefault(self, {})
        if (ready := found.pop(number, None)) is not None:
            return ready, None
        at = number
        while (x := self._held(at, found)) is None:
            at -= 1
        if self._source is None:
            self._source = extremes(x)
        while at < number:
            free = max(0, self._free - len(self._exact) - len(found)) if scope.task != -1 else 0
            stop = at + first_held(number + 1 - at, free)
            for i in range(at, stop):
                x = self.places[i].call.advance(x)
            at = stop
            if at < number:
                found[at] = x
        return x, None

    def _held(self, number: int, found: dict[int, Tensor]) -> Tensor | None:
        place = self.places[number]
        return found.get(number) if place.exact is None else place.exact.fetch()
