"""What autograd saves of one call, dropped in the forward pass and made again when it is asked for.

While the call runs, a *frame* packs every saved tensor to a place: nothing but an index into the order of saving. The
first place that is unpacked has the call run again with a graph, and whatever this saves is filled in, in the same
order. Non-reentrant checkpointing in torch does the same; this does it in a tenth of the Python, names the block in its
errors, and lets a run that happens anyway fill the places ahead of their turn (:meth:`Frame.fill`).

Ownership. Autograd owns the places and, through the hook that unpacks them, the frame, which knows its places weakly.
What a place was filled with goes when it is unpacked, or with the place when autograd lets go of the saved tensor. All
of it is detached: a graph that led from a place to the node that saved it would keep itself alive.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from abyssal.models.patch import outside_graphs

T = TypeVar("T")

_Kind = tuple[torch.Size, torch.dtype, torch.device]


class _Filled(NamedTuple):
    tensor: Tensor
    version: int  # when it was saved; -1 where there are none


class _Place:
    """What autograd keeps instead of a saved tensor."""

    __slots__ = ("__weakref__", "filled")

    def __init__(self) -> None:
        self.filled: dict[object, _Filled] = {}  # by backward pass


class _Enough(BaseException):
    """All that was saved is there again; not an Exception, which a block's own forward may catch."""


class Frame:
    """The saved tensors of one call.

    Args:
        again: runs the call again, with a graph; what it returns is dropped.
        name: of the block, for errors.
        early_stop: whether a second run may be cut short once everything is filled.
    """

    __slots__ = ("_again", "_early_stop", "_is_complete", "_kinds", "_name", "_places")

    def __init__(self, again: Callable[[], object], name: str, early_stop: bool = True) -> None:
        """Begin with nothing saved."""
        self._again, self._name, self._early_stop = again, name, early_stop
        self._places: list[weakref.ref[_Place]] = []
        self._kinds: list[_Kind] = []
        self._is_complete = False

    def record(self, run: Callable[[], T]) -> T:
        """Return `run()`, the first run of the call, with all that it saves dropped."""
        _keep_out_of_graphs()
        with saved_tensors_hooks(self._pack, self._unpack):
            output = run()
        self._is_complete = True
        return output

    def _pack(self, tensor: Tensor) -> _Place:
        place = _Place()
        self._places.append(weakref.ref(place))
        self._kinds.append((tensor.shape, tensor.dtype, tensor.device))
        return place

    def _unpack(self, place: _Place) -> Tensor:
        key = current_pass()
        filled = place.filled.pop(key, None)
        if filled is None:
            self.fill(key, self._again)
            filled = place.filled.pop(key)
        if key is _OUTSIDE:  # of any backward pass: nothing would ever clear the others
            self.clear(key)
        if filled.version >= 0 and filled.tensor._version != filled.version:
            self._changed(filled.tensor)
        return filled.tensor

    def fill(self, key: object, run: Callable[[], object], early_stop: bool | None = None) -> object:
        """Fill all places by `run`, another run of the call, and return what it returns.

        Args:
            key: the backward pass that it is for, see :func:`current_pass`.
            run: runs the call from the same input. Gradients are on meanwhile.
            early_stop: whether it may be cut short, and None be returned, once everything is there; if not given,
                as the frame was made. Ahead of its turn a run cannot be: its output is what is wanted.

        Raises:
            RuntimeError: if the call saves other tensors than in the first run.
        """
        filling = _Filling(self, key, self._early_stop if early_stop is None else early_stop)
        output = None
        try:
            with torch.enable_grad(), saved_tensors_hooks(filling.pack, _as_it_is):
                output = outside_graphs(run)
        except _Enough as enough:
            if enough.args[0] is not filling:
                raise
        except BaseException:
            self.clear(key)
            raise
        if filling.count < len(self._places):
            self.clear(key)
            self.differs(f"{filling.count} tensors, not {len(self._places)}")
        return output

    def clear(self, key: object) -> None:
        """Drop what is still filled in for a backward pass."""
        for reference in self._places:
            if (place := reference()) is not None:
                place.filled.pop(key, None)

    def differs(self, how: str) -> NoReturn:
        """The second run saves other tensors than the first."""
        raise RuntimeError(
            f"block {self._name!r}: run again in the backward pass, it saves other tensors than in the forward pass: "
            f"{how}. Usually a hook or a context of the forward pass is gone, the block keeps state on its module, "
            "it branches on values, or another kernel was chosen. Give it the policy abyssal.Store(), which does not "
            "run it again; abyssal.testing.check_block says what differs."
        )

    def _changed(self, tensor: Tensor) -> NoReturn:
        raise RuntimeError(
            f"block {self._name!r}: a tensor that it saved for its gradient (shape {tuple(tensor.shape)}) was changed "
            "in place afterwards: by the block itself, which plain autograd refuses as well, or, if it is a "
            "parameter, by an optimiser that steps within the backward pass. The gradients would be wrong."
        )


class _Filling:
    """One run that fills a frame's places."""

    __slots__ = ("_early_stop", "_frame", "_key", "count")

    def __init__(self, frame: Frame, key: object, early_stop: bool) -> None:
        self._frame, self._key, self._early_stop = frame, key, early_stop
        self.count = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Fill the next place with a saved tensor, and give the run's own graph the same, detached. [*saved]."""
        frame, number = self._frame, self.count
        self.count += 1
        if number >= len(frame._places):
            if not frame._is_complete:  # it asks for gradients in the middle of its own forward
                raise _Enough(self)
            frame.differs(f"more than {len(frame._places)} tensors")
        version = -1 if tensor.is_inference() else tensor._version
        saved = tensor.detach() if tensor.requires_grad else tensor
        place = frame._places[number]()
        if place is not None:  # else it was let go of already
            kind = (tensor.shape, tensor.dtype, tensor.device)
            if kind != frame._kinds[number]:
                frame.differs(f"number {number + 1} is {_words(kind)}, not {_words(frame._kinds[number])}")
            place.filled[self._key] = _Filled(saved, version)
        if self._early_stop and self.count == len(frame._places):
            raise _Enough(self)
        return saved


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _words(kind: _Kind) -> str:
    shape, dtype, device = kind
    return f"{list(shape)} of {dtype} on {device}"


def _keep_out_of_graphs() -> None:
    """Have the compiler, once it is loaded, not trace the hooks, which it meets where a graph breaks inside a block."""
    skip = getattr(sys.modules.get("torch._dynamo.decorators"), "skip", None)
    while skip is not None and _traced:
        skip(_traced.pop())


_traced: list[Callable[..., Any]] = [Frame._pack, Frame._unpack, _Filling.pack, _as_it_is]

_OUTSIDE = object()


def current_pass() -> object:
    """Return what tells this backward pass from others; the same for all outside of one."""
    if _group is not None and (group := _group()) is not None:  # torch.utils.checkpoint.GraphExecGroup
        return group
    task = torch._C._current_graph_task_id()
    return _OUTSIDE if task == -1 else task


_group: Callable[[], Any] | None = getattr(torch._C, "_get_graph_exec_group", None)


def run_with_frame(
    first: Callable[[], T], again: Callable[[], object], name: str, stream: Tensor, early_stop: bool = True
) -> T:
    """Return `first()` without what it saves, which is made again by `again()` where it is asked for.

    Args:
        first: the call.
        again: the same call once more, at the same input. Whoever gives it puts back what it depends on: random state,
            autocast, modes, buffers. What it returns is dropped.
        name: of the block, for errors.
        stream: what it is called with. [*stream]
        early_stop: whether a second run may be cut short once everything it has to fill is there.

    Raises:
        ValueError: for an ABYSSAL_FRAME in the environment that is neither "ours" nor "torch".
    """
    whose = os.environ.get("ABYSSAL_FRAME")
    if not whose or whose == "ours":
        return Frame(again, name, early_stop).record(first)
    if whose != "torch":
        raise ValueError(f"ABYSSAL_FRAME={whose!r} in the environment: expected ours, or torch for its checkpointing.")
    from torch.utils.checkpoint import checkpoint

    runs = iter([first])
    # It keeps the autocast state of the CPU, and of the device of an argument.
    token = () if stream.device.type == "cpu" else (torch.empty(0, device=stream.device),)
    output = checkpoint(
        lambda *_: next(runs, again)(), *token, use_reentrant=False, preserve_rng_state=False, early_stop=early_stop
    )
    return cast("T", output)
