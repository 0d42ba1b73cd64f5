"""The calls of one chain, what is kept of each, and how an input comes back from it.

A chain is a row of calls, each with the very output of the one before it. It holds a private copy of the exact input of
its last call until the next one is appended; then, if the policy reverses, the copy is let go. So each chain keeps one
exact state: the input of its last call. A chain of one call is plain checkpointing, and nothing is ever reconstructed
through an operation that was not seen. What each place keeps, `rules.py` says; how a coded stream is coded and decoded,
`codec/feedback.py`.

Ownership. The autograd graph owns a *link* for each call, through the frame behind each saved tensor; the link owns the
chain; the chain owns its places and knows its links by number only. A place goes when no link at or below it is left, a
chain with its last link. Nothing in a place may be connected to the graph, or the graph would keep itself alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from abyssal.certify.errors import Extremes, extremes
from abyssal.codec.feedback import Coded, Decoded, Handed, Runner, encode, encode_finely, increment
from abyssal.codec.placement import Parked, park
from abyssal.engine.observer import Observer
from abyssal.engine.policy import Keep, Policy
from abyssal.engine.rules import NOTHING, Entry, entered
from abyssal.engine.scope import Scope
from abyssal.models.call import first_tensor
from abyssal.models.replay.call import Call
from abyssal.util.layout import laid_out

Choice = Callable[[Policy, Observer, Tensor, Tensor], Policy]
"""Decides what a call's policy leaves open, given how far the stream is from what the decoder knows, and the stream."""


class Exact:
    """An exact input, private, so that no in-place operation of the caller's or of the block's own can reach it."""

    __slots__ = ("_name", "_version", "state")

    def __init__(self, stream: Tensor, name: str) -> None:
        """Copy it."""
        self.state, self._name = stream.detach().clone(), name
        self._version = self.state._version

    def fetch(self) -> Tensor:
        """Return it. [*stream]."""
        if self.state._version != self._version:
            raise RuntimeError(
                f"the kept input of block {self._name!r} was changed in place, which only this package could "
                "do: please report it. The gradients of this step would have been wrong."
            )
        return self.state


class Place:
    """One call of a chain and what is kept of its input.

    Attributes:
        exact: the input itself, here or on the host; None once it was let go.
        code: of the way to the input from what the decoder knew before.
        runner: what the decoder will know, while the exact input is there.
        entry: what the rules say of the code.
        kept: what a policy of the user's own keeps.
    """

    __slots__ = ("call", "code", "entry", "exact", "kept", "observer", "policy", "runner")

    def __init__(self, call: Call, policy: Policy, observer: Observer) -> None:
        """Begin with nothing kept."""
        self.call, self.policy, self.observer = call, policy, observer
        self.exact: Exact | Parked | None = None
        self.code: Coded | None = None
        self.runner: Runner | None = None
        self.entry: Entry = NOTHING
        self.kept: object = None


class Link:
    """One call's hold on its chain, owned by the graph."""

    __slots__ = ("__weakref__", "chain", "number", "place")

    def __init__(self, chain: Chain, number: int, place: Place) -> None:
        """Hold on to a place, by its number."""
        self.chain, self.number, self.place = chain, number, place

    def __del__(self) -> None:
        """Let go of it: see the module's head."""
        self.chain.release(self.number)

    def rerun(self) -> Any:
        """Run the block again, with a graph, at its restored input, and return its output."""
        return self.chain.rerun(self.number)


class Chain:
    """See the module's head.

    Attributes:
        from_below: whether inputs come back from below, and so what policies its calls have.
        places: by number.
    """

    from_below = False

    def __init__(self) -> None:
        """Begin with no call."""
        self.places: dict[int, Place] = {}
        self._linked: set[int] = set()
        self._length = 0
        self._lowest = 0  # below it no link is left
        self._source: Extremes | None = None  # of the exact state at the end

    # ------------------------------------------------------------------ forward

    def append(self, call: Call, stream: Tensor, policy: Policy, observer: Observer, choose: Choice) -> Link:
        """Take note of a call, keep its exact input, code it if its policy says so, and let that of the last one go.

        Args:
            call: the new last one.
            stream: what it is called with: the output of the one before. [*stream]
            policy: of the call.
            observer: of the call.
            choose: decides what the policy leaves open.
        """
        place, exact = Place(call, policy, observer), Exact(stream, call.name)
        place.exact, self._source = exact, None
        if self._length:
            below = self.places[self._length - 1]
            assert isinstance(below.exact, Exact)
            self._encode(place, below, exact.state, below.exact.state, choose)
            self._let_go(below, below.exact.state, exact.state)
        else:
            place.entry = entered(policy, NOTHING)
            self._start(place)
        observer.entered(exact.state, place.policy, 0 if place.code is None else place.code.nbytes)
        number = self._length
        self.places[number], self._length = place, number + 1
        self._linked.add(number)
        return Link(self, number, place)

    def _start(self, place: Place) -> None:
        place.runner = Runner(None, place.entry.group) if place.entry.carries else None

    def _encode(self, place: Place, below: Place, x: Tensor, before: Tensor, choose: Choice) -> None:
        """Code how far the stream is from what the decoder knows.

        Args:
            place: of the call that is entered.
            below: the one before it.
            x: the input of the call. [*stream]
            before: that of the one before. [*stream]
            choose: decides what the policy leaves open.
        """
        runner = below.runner
        d = None if runner is None else increment(x, before, runner)
        if d is not None and place.policy.is_auto:
            place.policy = choose(place.policy, place.observer, d, x)
        place.entry = entry = entered(place.policy, below.entry)
        if d is None:
            self._start(place)
        elif entry.codec is None:
            place.runner = Runner(d, entry.group)
        elif entry.carries:
            place.code, place.runner = encode(entry.codec, d, place.policy.device)
        else:
            place.code = encode_finely(d, entry.group, place.policy.device)

    def _let_go(self, place: Place, x: Tensor, y: Tensor) -> None:
        """The next block was called with this one's output `y`: let the exact input `x` go."""
        kept_bytes = 0
        if type(place.policy).release is not Policy.release:
            place.kept = place.policy.release(x, y)
            kept_bytes = sum(t.nbytes for t in pytree.tree_leaves(place.kept) if isinstance(t, Tensor))
        place.observer.released(x, kept_bytes)
        place.exact = place.runner = None

    def pack(self, place: Place) -> None:
        """The last call is likely to remain it: keep what the decoder starts from in as few bytes as it needs."""
        place.runner = None if place.runner is None else place.runner.packed()

    def keep(self, place: Place, policy: Keep | None = None) -> None:
        """Keep the exact input of the last call: nothing will be appended. What was coded below stays as it is.

        Args:
            place: of the call.
            policy: in the place of the call's own, which may not be one that keeps.
        """
        place.policy = policy or place.policy
        if place.policy.device is not None and isinstance(place.exact, Exact):
            place.exact = park(place.exact.state, place.policy.device)

    def release(self, number: int) -> None:
        """The graph has let go of a call: drop what no other one needs to restore its input from."""
        self._linked.discard(number)
        while self._lowest < self._length and self._lowest not in self._linked:
            del self.places[self._lowest]
            self._lowest += 1

    # ------------------------------------------------------------------ backward

    def rerun(self, number: int) -> Any:
        """Run a block again, with a graph, at its restored input, and return its output."""
        scope, place = Scope.current(), self.places[number]
        x, known = self.restore(number, scope)
        if place.exact is not None:
            place.observer.visited()
        else:
            place.observer.restored(x, self._source, scope.errors)
        needs_output = place.policy.needs_output
        if number == self._lowest:  # nobody below asks
            known = None
        if known is not None and not needs_output:  # the run may stop early
            self._hand_down(place, x, known, None, scope)
            known = None  # its memory may be wanted
        output = place.call.rerun(x)
        g = first_tensor(output)
        if g is not None:
            g = g.detach()
            above = self.places[number + 1].observer if number + 1 < self._length else None
            place.observer.recomputed(g, above, self._source, scope.errors)
            if known is not None:
                with torch.no_grad():
                    self._hand_down(place, x, known, g, scope)
        if scope.task == -1:
            scope.end()
        return output

    def restore(self, number: int, scope: Scope) -> tuple[Tensor, Handed | None]:
        """Return the state to evaluate the gradient at, and what it was restored from (None: it needed nothing).

        The block above has usually just handed down its estimate. Where the backward pass goes in another order, the
        whole segment up to the next known state is restored once, in a loop (chains are deep), and what was restored
        on the way is remembered for its own turn.
        """
        place = self.places[number]
        if place.exact is not None:
            return place.exact.fetch(), None
        if (ready := scope.states.pop(place, None)) is not None:
            return ready, None
        source = number + 1
        while (known := self._known(source, scope)) is None:
            source += 1
        for i in range(source - 1, number, -1):
            passed = self.places[i]
            known = self._decode(i, known)
            x = scope.states.pop(passed, None)
            if x is None:
                x = self._solve(passed, known)
            if scope.task != -1:
                scope.states[passed] = x
            with torch.no_grad():
                known = self._handed(passed, x, known, passed.call(x) if passed.policy.needs_output else None)
        known = self._decode(number, known)
        return self._solve(place, known), known

    def _known(self, number: int, scope: Scope) -> Handed | None:
        """What the block below a call is restored from, if it is at hand; handed over once."""
        place = self.places[number]
        if place.exact is None:
            return scope.handed.pop(place, None)
        exact = place.exact.fetch()
        if self._source is None:
            self._source = extremes(exact)
        runner = place.runner
        if runner is None and place.code is not None:  # kept: the closing code takes the decoder down from here
            runner = Runner(None, 0)
        return Handed(exact, None if runner is None else runner.state(exact))

    def _decode(self, number: int, above: Handed) -> Handed:
        """Take the decoder from the state above to that of a call: see `Handed.runner`."""
        if not self.places[number].entry.carries:
            return Handed(above.state, None)
        return Handed(above.state, above.decoder(self.places[number + 1].code))

    def _solve(self, place: Place, known: Handed) -> Tensor:
        """Restore the input from the output's estimate `known.state` and, where it is coded, its own decoded state."""
        if place.policy.codec is not None and place.code is None:  # the first of its segment: the decoder ends exactly
            assert known.runner is not None
            return laid_out(known.runner.to(known.state.dtype), place.call.strides)
        with torch.no_grad():
            x = place.policy.restore(known.state, self._kept(place, known), place.call)
        return x if x.stride() == place.call.strides else laid_out(x, place.call.strides)

    def _kept(self, place: Place, known: Handed) -> object:
        if place.policy.codec is None:
            return place.kept
        assert known.runner is not None
        return Decoded(known.runner, place.code)

    def _handed(self, place: Place, x: Tensor, known: Handed, g: Tensor | None) -> Handed:
        return Handed.of(place.policy.hand_down(x, known.state, g, self._kept(place, known)), known.runner)

    def _hand_down(self, place: Place, x: Tensor, known: Handed, g: Tensor | None, scope: Scope) -> None:
        if scope.task != -1:  # unpacked outside of a backward pass: nothing would ever clear it
            scope.handed[place] = self._handed(place, x, known, g)
