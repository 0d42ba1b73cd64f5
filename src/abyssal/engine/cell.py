"""What one call of one block remembers, and how its input is restored on demand.

A *cell* stands for one call of one block. It holds a private copy of the call's exact input until the next
block of the chain is called with this block's very output; then the two cells are linked and, if the policy
reverses, the copy is let go. So each chain keeps one exact state: the input of its last block. A chain of one
block is plain checkpointing, and nothing is ever reconstructed through an operation that was not seen.

Ownership. The autograd graph owns the cell, through the frame that stands behind each saved tensor; a cell owns its
successor; the linker knows the open ends weakly. A graph that is dropped frees
everything. Nothing in a cell may be connected to the graph, or the graph would keep itself alive.

Which calls follow upon each other, `linking.py` knows; how a coded stream is coded and decoded, `codec/feedback.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from abyssal.certify.errors import Extremes, extremes
from abyssal.certify.recorder import CallRecord
from abyssal.codec.feedback import Coded, Decoded, Handed, Runner, encode, encode_finely, increment
from abyssal.codec.placement import Parked
from abyssal.codec.sample import Sample
from abyssal.engine.policy import Keep, Policy
from abyssal.engine.scope import BackwardPass
from abyssal.engine.session import Session
from abyssal.models.arguments import OtherArguments, Slot
from abyssal.models.call import first_tensor
from abyssal.models.surroundings import BufferWatch, Surroundings, gathered
from abyssal.util.layout import laid_out


class Runnable(Protocol):
    """What a cell asks of the block whose call it is."""

    name: str
    module: nn.Module
    session: Session
    watch: BufferWatch
    before: Callable[..., Any] | None

    @property
    def inner(self) -> Callable[..., Any]:
        """The block's own forward."""


class Cell:
    """One call of one block: see the module's head. Created on entry, owned by the graph."""

    __slots__ = (
        "__weakref__",
        "_anchor",
        "_block",
        "_checks_output",
        "_code",
        "_handed",
        "_kept",
        "_layout",
        "_mutates",
        "_others",
        "_output_sample",
        "_parked",
        "_point",
        "_runner",
        "_runs",
        "_sample",
        "_surroundings",
        "_version",
        "fresh",
        "has_predecessor",
        "held",
        "policy",
        "record",
        "requires_grad",
        "successor",
        "task",
    )

    def __init__(
        self,
        block: Runnable,
        policy: Policy,
        record: CallRecord,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slot: Slot,
    ) -> None:
        """Take note of the call `block(*args, **kwargs)`, whose stream stands at `slot`."""
        stream = slot.get(args, kwargs)
        self._block, self.policy, self.record = block, policy, record
        self.fresh: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        self._others = OtherArguments(args, kwargs, slot)
        self._surroundings = Surroundings(block.module, stream, block.watch)
        self.requires_grad = stream.requires_grad
        # Private, so that no in-place operation of the caller's or of the block's own can reach it.
        self.held: Tensor | None = stream.detach().clone()
        record.hold(self.held)
        self._version = self.held._version
        self._layout = stream.stride()  # that of `held` is dense
        self._mutates = self._checks_output = False
        self._kept: object = None
        self._parked: Parked | None = None  # takes the place of `held` where that waits on the host
        self._code: Coded | None = None  # of the increment up to this cell's state, from that of the coded one below
        self._runner: Runner | None = None  # while `held` is there
        self._runs = False  # whether there was one
        self._sample: Sample | None = None  # of the true input
        self._output_sample: Sample | None = None
        self._anchor: Extremes | None = None  # of the exact state that this cell's input is restored from
        self.has_predecessor = False
        self.successor: Cell | None = None
        # Caches of one backward pass, by its id:
        self.task = -1
        self._point: Tensor | None = None  # where the gradient will be evaluated, restored ahead of its turn
        self._handed: Handed | None = None  # what the block below begins from

    # ------------------------------------------------------------------ forward

    def enter(self, before: Cell | None) -> None:
        """Link this call to the one whose output it was called with, and code its input if its policy says so."""
        if before is None:
            if self.policy.codec is not None:
                self._take_runner(Runner(None, self.policy.codec.group))
            return
        assert self.held is not None and before.held is not None
        runner = before._runner
        if runner is not None:
            self._code_input(increment(self.held, before.held, runner), runner)
        elif (codec := self.policy.codec) is not None:
            self._take_runner(Runner(None, codec.group))
        before._link(self)

    def _code_input(self, d: Tensor, runner: Runner) -> None:
        """Code how far the stream is from what the decoder knows; see the table in `codec/feedback.py`.

        Args:
            d: that distance, not needed afterwards. [*stream]
            runner: where it is measured from.
        """
        assert self.held is not None
        self.policy = self.record.policy = self._block.session.settled(self.policy, self.record, d, self.held)
        codec, device = self.policy.codec, self.policy.device
        if codec is not None:
            self._code, moved = encode(codec, d, device)
            self._take_runner(moved)
        elif self.policy.keeps_input:
            self._code = encode_finely(d, runner.group, device)
        else:
            self._take_runner(Runner(d, runner.group))
        if self._code is not None:
            self.record.code_bytes = self._code.nbytes

    def _take_runner(self, runner: Runner) -> None:
        self._runner, self._runs = runner, True
        self.record.runner_bytes = runner.nbytes

    def keep(self) -> None:
        """Keep the exact input after all; what was coded below stays as it is."""
        self.policy = self.record.policy = Keep()

    def park(self) -> None:
        """Move a kept input to the host, if its policy says so."""
        if self.policy.keeps_input and self.policy.device is not None and self.held is not None:
            self._parked, self.held = Parked(self.held, torch.device(self.policy.device)), None

    def settle(self, mutated: bool, output: Tensor | None) -> None:
        """After the forward pass of the block: drop what it did not use.

        Args:
            mutated: whether the block changed its input in place.
            output: its output, if the recomputed one is to be compared with it, as long as the exact input is
                kept: the end of a chain has nothing else to tell a block that is random. [*stream]
        """
        assert self.held is not None
        self._mutates = mutated
        self._checks_output = output is not None
        # Under somebody else's forward (accelerate's), parameters come and go.
        self._surroundings.settle(self._block.watch, parameters=self._block.before is None)
        self.record.surroundings_bytes = self._surroundings.nbytes
        if output is not None:
            self._output_sample = self.record.sample(output)
        if self._runner is not None and self._block.session.expects_end(self._block.name):
            self._take_runner(self._runner.packed())

    def _link(self, successor: Cell) -> None:
        """The next block was called with this one's output: let the exact input go."""
        assert self.held is not None
        assert successor.held is not None
        self.successor = successor
        successor.has_predecessor = True
        self._sample = self.record.release(self.held, self._output_sample)
        self._output_sample = None
        self._kept = self.policy.release(self.held, successor.held)
        if self._kept is not None:
            self.record.code_bytes += sum(t.nbytes for t in pytree.tree_leaves(self._kept) if isinstance(t, Tensor))
        self.held = self._runner = None

    def run(self) -> Any:
        """The call itself; in the backward pass, where what it saved is wanted, once more at the restored input."""
        if self.fresh is None:
            return self.recompute()
        (args, kwargs), self.fresh = self.fresh, None
        return self._block.inner(*args, **kwargs)

    # ------------------------------------------------------------------ backward

    def recompute(self) -> Any:
        """Run the block again, with a graph, at its restored input."""
        backward = BackwardPass.current()
        backward.visit(self)
        self._surroundings.check_parameters(self._block.name)
        s, above = self._restore(backward)
        if not self.is_held:
            backward.measure(self.record, "input", self._sample, s, self._anchor)
        hands_down = self.has_predecessor and above is not None
        if hands_down and not self.policy.needs_output:  # the recomputation may stop early
            assert above is not None
            self._remember(backward, handed=self._hand_down(s, above, None))
            above = None  # its memory may be wanted
        stream = s.detach()
        if self.requires_grad:
            stream.requires_grad_(True)
        if self._mutates:
            # A leaf that needs gradients refuses in-place operations; s stays whole.
            stream = laid_out(stream, self._layout, copy=True)
        args, kwargs = self._others.with_stream(stream, self._block.name)
        with self._surroundings.put_back(caching=True):
            output = self._block.inner(*args, **kwargs)
        g = first_tensor(output)
        if g is not None and self._output_sample is not None:
            backward.measure(self.record, "output", self._output_sample, g.detach())
        elif g is not None and self._checks_output and self.successor is not None:
            # Where the block blows an error up, its gradient is further off than its input.
            backward.measure(self.record, "image", self.successor._sample, g.detach(), self._anchor)
        if hands_down and self.policy.needs_output:
            assert above is not None and g is not None
            with torch.no_grad():
                self._remember(backward, handed=self._hand_down(s, above, g.detach()))
        return output

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the block at `x` without a graph, as it stood in the forward pass (policy.Evaluation)."""
        g = first_tensor(self._evaluate(self._block.inner, x))
        assert g is not None
        return g

    def reverse_step(self, y: Tensor) -> Tensor | None:
        """The block's own estimate of its input from its output, if it offers one (policy.Evaluation)."""
        if not callable(getattr(type(self._block.module), "reverse_step", None)):
            return None
        estimate = first_tensor(self._evaluate(self._block.module.reverse_step, y))
        if estimate is None or estimate.shape != y.shape or estimate.dtype != y.dtype:
            found = "nothing" if estimate is None else f"{list(estimate.shape)} of {estimate.dtype}"
            raise RuntimeError(
                f"block {self._block.name!r} has a method reverse_step, by which abyssal.Reverse estimates its input "
                f"from its output, and it returned {found} for an output of shape {list(y.shape)} and {y.dtype}. If "
                "it means something else, rename it or give the block another policy."
            )
        return estimate

    def _evaluate(self, function: Any, x: Tensor) -> Any:
        args, kwargs = self._others.with_stream(x.clone() if self._mutates else x.detach(), self._block.name)
        # A block may switch gradients on for itself; what it saves then is not the checkpoint's to catch.
        shield = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
        try:
            with torch.no_grad(), shield, self._surroundings.put_back(caching=False), gathered(self._block.module):
                return function(*args, **kwargs)
        except Exception as error:
            error.add_note(
                f"abyssal: while block {self._block.name!r} was run without a graph, to restore its input under "
                f"{self.policy}. If its forward needs gradients itself, give it the policy abyssal.Keep()."
            )
            raise

    @property
    def is_held(self) -> bool:
        """Whether the exact input is kept, here or on the host."""
        return self.held is not None or self._parked is not None

    def _restore(self, backward: BackwardPass) -> tuple[Tensor, Handed | None]:
        """Return the state to evaluate the gradient at, and what it was restored from (None: it needed nothing).

        The block above has usually just handed down its estimate. Where the backward pass goes in another
        order, the whole segment up to the next known state is restored once, in a loop (chains are deep),
        and what was restored on the way is remembered for its own turn.
        """
        if self.is_held:
            return laid_out(self._exact(), self._layout), None
        if (point := self._recall(backward, "_point")) is not None:
            return point, None
        path, above = [self], self.successor
        assert above is not None
        while (known := above._known(backward)) is None:
            path.append(above)
            above = above.successor
            assert above is not None
        if above.is_held and above._anchor is None:
            above._anchor = extremes(known.state)
        for cell in reversed(path):
            cell._anchor = above._anchor
            known = cell._decode(known)
            if cell is self:
                break
            s = cell._recall(backward, "_point")
            if s is None:
                cell._surroundings.check_parameters(cell._block.name)
                s = cell._solve(known)
            cell._remember(backward, point=s)
            with torch.no_grad():
                known = cell._hand_down(s, known, cell(s) if cell.policy.needs_output else None)
        return self._solve(known), known

    def _decode(self, above: Handed) -> Handed:
        """Take the decoder from the state above to this cell's: see `Handed.runner`."""
        assert self.successor is not None
        if not self._runs:
            return Handed(above.state, None)
        runner, code = above.decoder(), self.successor._code
        return Handed(above.state, runner if code is None else code.before(runner))

    def _solve(self, known: Handed) -> Tensor:
        """Restore the input from the output's estimate `known.state` and, where it is coded, its own decoded state."""
        if self.policy.codec is not None and self._code is None:  # the first of its segment: the decoder ends exactly
            assert known.runner is not None
            return laid_out(known.runner.to(known.state.dtype), self._layout)
        with torch.no_grad():
            return laid_out(self.policy.restore(known.state, self._kept_for(known), self), self._layout)

    def _kept_for(self, known: Handed) -> object:
        if self.policy.codec is None:
            return self._kept
        assert known.runner is not None
        return Decoded(known.runner, self._code)

    def _hand_down(self, s: Tensor, known: Handed, g: Tensor | None) -> Handed:
        return Handed.of(self.policy.hand_down(s, known.state, g, self._kept_for(known)), known.runner)

    def _exact(self) -> Tensor:
        if self._parked is not None:
            return self._parked.fetch()
        assert self.held is not None
        if self.held._version != self._version:
            raise RuntimeError(
                f"the kept input of block {self._block.name!r} was changed in place, which only this package could "
                "do: please report it. The gradients of this step would have been wrong."
            )
        return self.held

    def _known(self, backward: BackwardPass) -> Handed | None:
        """What the block below is restored from, if it is at hand; handed over once."""
        if not self.is_held:
            return self._recall(backward, "_handed")
        exact = self._exact()
        runner = self._runner
        if runner is None and self._code is not None:  # kept: the closing code takes the decoder down from here
            runner = Runner(None, 0)
        return Handed(exact, None if runner is None else runner.state(exact))

    def _recall(self, backward: BackwardPass, which: str) -> Any:
        if self.task != backward.task:
            self.forget()
            return None
        value = getattr(self, which)
        setattr(self, which, None)
        return value

    def _remember(self, backward: BackwardPass, point: Tensor | None = None, handed: Handed | None = None) -> None:
        if backward.task == -1:  # unpacked outside of a backward pass: nothing would ever clear it
            return
        if self.task != backward.task:
            self.forget()
            self.task = backward.task
            backward.visit(self)
        self._point = self._point if point is None else point
        self._handed = self._handed if handed is None else handed

    def forget(self) -> None:
        """Drop what a backward pass left behind."""
        self.task, self._point, self._handed = -1, None, None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
