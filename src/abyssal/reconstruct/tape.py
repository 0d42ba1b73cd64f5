"""What one call of one block remembers, and how its input is restored on demand.

A *cell* stands for one call of one block. It holds a private copy of the call's exact input until the next
block of the chain is called with this block's very output; then the two cells are linked and, if the policy
reverses, the copy is let go. So each chain keeps one exact state: the input of its last block. A chain of one
block is plain checkpointing, and nothing is ever reconstructed through an operation that was not seen.

Ownership. The autograd graph owns the cell, through the frame that `torch.utils.checkpoint` puts behind each
saved tensor; a cell owns its successor; the tape knows the open ends weakly. A graph that is dropped frees
everything. Nothing in a cell may be connected to the graph, or the graph would keep itself alive.

Identity. An open end is recognised by the storage, shape, strides, offset, dtype and version counter of the
tensor that the block returned. The tape holds a weak reference to the storage, which keeps its address from
being used again but not its memory from being freed.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from abyssal.reconstruct.arguments import OtherArguments, Slot, output_stream
from abyssal.reconstruct.backward import BackwardPass, Extremes, extremes
from abyssal.reconstruct.policy import Policy
from abyssal.reconstruct.sample import Sample
from abyssal.reconstruct.surroundings import Surroundings, gathered

if TYPE_CHECKING:
    from abyssal.reconstruct.engine import PatchedForward
    from abyssal.reconstruct.session import CallRecord


class Cell:
    """One call of one block: see the module's head. Created on entry, owned by the graph."""

    __slots__ = (
        "__weakref__",
        "_anchor",
        "_block",
        "_handed",
        "_kept",
        "_layout",
        "_mutates",
        "_others",
        "_output_sample",
        "_point",
        "_sample",
        "_surroundings",
        "_task",
        "_version",
        "fresh",
        "has_predecessor",
        "held",
        "policy",
        "record",
        "requires_grad",
        "successor",
    )

    def __init__(
        self,
        block: PatchedForward,
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
        self._layout = self.held.stride()
        self._mutates = False
        self._kept: object = None
        self._sample: Sample | None = None  # of the true input
        self._output_sample: Sample | None = None
        self._anchor: Extremes | None = None  # of the exact state that this cell's input is restored from
        self.has_predecessor = False
        self.successor: Cell | None = None
        # Caches of one backward pass, by its id:
        self._task = -1
        self._point: Tensor | None = None  # where the gradient will be evaluated, restored ahead of its turn
        self._handed: Tensor | None = None  # the better estimate, for the block below

    # ------------------------------------------------------------------ forward

    def settle(self, mutated: bool, output: Tensor | None) -> None:
        """After the forward pass of the block: drop what it did not use.

        Args:
            mutated: whether the block changed its input in place.
            output: its output, if the recomputed one is to be compared with it, as long as the exact input is
                kept: the end of a chain has nothing else to tell a block that is random. [*stream]
        """
        assert self.held is not None
        self._mutates = mutated
        # Under somebody else's forward (accelerate's), parameters come and go.
        self._surroundings.settle(self._block.watch, parameters=self._block.before is None)
        self.record.surroundings_bytes = self._surroundings.nbytes
        if output is not None:
            self._output_sample = self.record.sample(output)

    def link(self, successor: Cell) -> None:
        """The next block was called with this one's output: let the exact input go."""
        assert self.held is not None
        assert successor.held is not None
        self.successor = successor
        successor.has_predecessor = True
        self._sample = self.record.release(self.held, self._output_sample)
        self._output_sample = None
        self._kept = self.policy.release(self.held, successor.held)
        self.held = None

    # ------------------------------------------------------------------ backward

    def recompute(self) -> Any:
        """Run the block again, with a graph, at its restored input; called by the checkpoint's unpack hook."""
        backward = BackwardPass.current()
        backward.visit(self)
        self._surroundings.check_parameters(self._block.name)
        s, y = self._restore(backward)
        if self.held is None:
            backward.measure(self.record, "input", self._sample, s, self._anchor)
        hands_down = self.has_predecessor and self.held is None and y is not None
        if hands_down and not self.policy.needs_output:  # the recomputation may stop early
            assert y is not None
            self._remember(backward, handed=self.policy.hand_down(s, y, None))
        stream = s.detach()
        if self.requires_grad:
            stream.requires_grad_(True)
        if self._mutates:
            stream = stream.clone()  # a leaf that needs gradients refuses in-place operations; s stays whole
        args, kwargs = self._others.with_stream(stream, self._block.name)
        with self._surroundings.put_back(autocast=False):
            output = self._block.inner(*args, **kwargs)
        g = output_stream(output)
        if g is not None and self._output_sample is not None:
            backward.measure(self.record, "output", self._output_sample, g.detach())
        if hands_down and self.policy.needs_output:
            assert y is not None and g is not None
            with torch.no_grad():
                self._remember(backward, handed=self.policy.hand_down(s, y, g.detach()))
        return output

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the block at `x` without a graph, as it stood in the forward pass (policy.Evaluation)."""
        g = output_stream(self._evaluate(self._block.inner, x))
        assert g is not None
        return g

    def reverse_step(self, y: Tensor) -> Tensor | None:
        """The block's own estimate of its input from its output, if it offers one (policy.Evaluation)."""
        if not callable(getattr(type(self._block.module), "reverse_step", None)):
            return None
        estimate = output_stream(self._evaluate(self._block.module.reverse_step, y))
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
            with torch.no_grad(), shield, self._surroundings.put_back(autocast=True), gathered(self._block.module):
                return function(*args, **kwargs)
        except Exception as error:
            error.add_note(
                f"abyssal: while block {self._block.name!r} was run without a graph, to restore its input under "
                f"{self.policy}. If its forward needs gradients itself, give it the policy abyssal.Keep()."
            )
            raise

    def _restore(self, backward: BackwardPass) -> tuple[Tensor, Tensor | None]:
        """Return the state to evaluate the gradient at, and the output that it was restored from.

        The block above has usually just handed down its estimate. Where the backward pass goes in another
        order, the whole segment up to the next known state is restored once, in a loop (chains are deep),
        and what was restored on the way is remembered for its own turn.
        """
        if self.held is not None:
            return self._exact(), None
        if (point := self._recall(backward, "_point")) is not None:
            return point, None
        path, above = [self], self.successor
        assert above is not None
        while (y := above._known(backward)) is None:
            path.append(above)
            above = above.successor
            assert above is not None
        if above.held is not None and above._anchor is None:
            above._anchor = extremes(above.held)
        for cell in reversed(path):
            cell._anchor = above._anchor
        for cell in reversed(path[1:]):
            s = cell._recall(backward, "_point")
            if s is None:
                cell._surroundings.check_parameters(cell._block.name)
                s = cell._solve(y)
            cell._remember(backward, point=s)
            with torch.no_grad():
                y = cell.policy.hand_down(s, y, cell(s) if cell.policy.needs_output else None)
        return self._solve(y), y

    def _solve(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            s = self.policy.restore(y, self._kept, self)
            if s.stride() != self._layout:
                s = torch.empty_strided(s.shape, self._layout, dtype=s.dtype, device=s.device).copy_(s)
        return s

    def _exact(self) -> Tensor:
        assert self.held is not None
        if self.held._version != self._version:
            raise RuntimeError(
                f"the kept input of block {self._block.name!r} was changed in place, which only this package could "
                "do: please report it. The gradients of this step would have been wrong."
            )
        return self.held

    def _known(self, backward: BackwardPass) -> Tensor | None:
        """The estimate of this cell's input for the block below, if it is at hand; handed over once."""
        if self.held is not None:
            return self._exact()
        return self._recall(backward, "_handed")

    def _recall(self, backward: BackwardPass, which: str) -> Tensor | None:
        if self._task != backward.task:
            self.forget()
            return None
        value: Tensor | None = getattr(self, which)
        setattr(self, which, None)
        return value

    def _remember(self, backward: BackwardPass, point: Tensor | None = None, handed: Tensor | None = None) -> None:
        if backward.task == -1:  # unpacked outside of a backward pass: nothing would ever clear it
            return
        if self._task != backward.task:
            self.forget()
            self._task = backward.task
            backward.visit(self)
        self._point = self._point if point is None else point
        self._handed = self._handed if handed is None else handed

    def forget(self) -> None:
        """Drop what a backward pass left behind."""
        self._task, self._point, self._handed = -1, None, None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def run(cell: Cell, *_device: Tensor) -> Any:
    """The function that is checkpointed: in the forward pass the real call, later the recomputation.

    Args:
        cell: takes the place of the input among the checkpoint's arguments.
        _device: tells the checkpoint which device's autocast state to keep.
    """
    if cell.fresh is None:
        return cell.recompute()
    (args, kwargs), cell.fresh = cell.fresh, None
    return cell._block.inner(*args, **kwargs)


class _OpenEnd(NamedTuple):
    cell: weakref.ref[Cell]
    storage: StorageWeakRef
    state: tuple[object, ...]


_Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]


class Tape(threading.local):
    """The open ends of this thread: outputs of blocks whose next block has not been called yet."""

    def __init__(self) -> None:
        """Begin with none."""
        self._open: dict[_Key, _OpenEnd] = {}

    def __len__(self) -> int:
        """How many ends are open."""
        return len(self._open)

    def open(self, cell: Cell, output: Tensor) -> None:
        """Remember `output` as the open end of `cell`'s chain."""
        identity = _identify(output)
        if identity is None:
            return
        key, storage, state = identity
        ends = self._open

        def drop(reference: weakref.ref[Cell]) -> None:
            if key in ends and ends[key].cell is reference:
                del ends[key]

        ends[key] = _OpenEnd(weakref.ref(cell, drop), StorageWeakRef(storage), state)

    def match(self, stream: Tensor) -> Cell | None:
        """Return the cell whose output `stream` is, unchanged, and close that end; None if there is none."""
        identity = _identify(stream) if self._open else None
        if identity is None:
            return None
        key, _, state = identity
        end = self._open.get(key)
        if end is None or end.state != state:
            return None
        del self._open[key]
        return end.cell()


def _identify(tensor: Tensor) -> tuple[_Key, torch.UntypedStorage, tuple[object, ...]] | None:
    """Return what tells a tensor's memory, its storage, and what has to be unchanged in it.

    A detached alias is another tensor: its graph ends there, and the blocks above it may change their weights
    before the blocks below it are restored (greedy training).
    """
    if tensor.layout is not torch.strided or tensor.is_inference():
        return None
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # tensors without a storage of their own
        return None
    key = (storage._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))
    graph = (tensor.requires_grad, tensor.is_leaf)
    return key, storage, (tensor._version, tensor.dtype, tensor.is_conj(), tensor.is_neg(), *graph)


TAPE = Tape()
