"""What a block saw in the forward pass besides its arguments, put back for each later evaluation of it.

Random state, autocast state, train/eval modes, buffers, weights and which of them need gradients, and what stands in
for the forwards of modules within. Every re-evaluation starts from what the forward pass started from, and leaves the
world as it found it: dropout draws the same mask, BatchNorm's running statistics move once per step, and an `.eval()`,
or a weight frozen or replaced between forward and backward, changes nothing.
Only what the forward pass of the block really used is kept, so that memory does not grow with depth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from abyssal.codec.sample import has_data
from abyssal.models.patch import StandIn, stand_ins_of, stand_ins_put
from abyssal.models.replay.weights import Weight, check_weights, weights_of, weights_put
from abyssal.util.randomness import TorchRandomState

# Buffers up to this many elements on the CPU are compared by value in every call, since BatchNorm moves no
# version counter. Comparing larger ones costs time, and comparing on an accelerator would synchronise it:
# there, the first call learns which buffers the block changes.
_SMALL_BUFFER = 65_536


class LateBufferChange(RuntimeError):
    """A buffer that the first forward pass left alone was changed by a later one."""


class _Autocast(NamedTuple):
    device_type: str
    enabled: bool
    dtype: torch.dtype
    caches: bool  # the weights that it casts

    @classmethod
    def now(cls, device_type: str) -> _Autocast | None:
        if not torch.amp.is_autocast_available(device_type):
            return None
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        return cls(device_type, enabled, dtype, torch.is_autocast_cache_enabled())


def _default_device() -> torch.device | None:
    """Return where new tensors are made, if a context or `torch.set_default_device` says so."""
    if not torch._C._len_torch_function_stack():
        return None
    contexts = (mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext))
    return next((mode.device for mode in reversed([*contexts])), None)


class _Buffer(NamedTuple):
    owner: nn.Module
    name: str
    found: Tensor  # the object that was registered when the forward pass began
    version: int
    before: Tensor | None  # a copy of its value then; None where a change is only watched for


class BufferWatch:
    """Which buffers of one block its forward pass changes, learned per combination of train/eval modes."""

    def __init__(self) -> None:
        """Begin knowing nothing: the first call compares every buffer by value."""
        self._learned: dict[tuple[bool, ...], set[tuple[int, str]]] = {}

    def before(self, modules: list[nn.Module], modes: tuple[bool, ...]) -> list[_Buffer]:
        """Note every buffer, and copy those that may change."""
        learned = self._learned.get(modes)
        noted = []
        for i, module in enumerate(modules):
            for name, buffer in module._buffers.items():
                if buffer is None or is_lazy(buffer):
                    continue
                copied = learned is None or _is_cheap(buffer) or (i, name) in learned
                before = buffer.detach().clone() if copied else None
                noted.append(_Buffer(module, name, buffer, _version(buffer), before))
        return noted

    def after(self, noted: list[_Buffer], modules: list[nn.Module], modes: tuple[bool, ...]) -> list[_Buffer]:
        """Return those of `noted` that the forward pass changed, and learn them.

        Raises:
            LateBufferChange: if one changed whose value before the call was not copied.
        """
        learned = self._learned.get(modes)
        changed = [b for b in noted if _has_changed(b, known=learned is not None)]
        if noted and (learned is None or changed):
            index = {id(module): i for i, module in enumerate(modules)}
            learned = self._learned.setdefault(modes, set())
            learned.update((index[id(b.owner)], b.name) for b in changed)
        for b in changed:
            if b.before is None:
                raise LateBufferChange(
                    f"buffer {b.name!r} of {type(b.owner).__name__} (shape {tuple(b.found.shape)}) was changed "
                    "by this forward pass and by none before it, so that its value before was not copied and "
                    "the block cannot be recomputed. It is watched from now on: run the step again."
                )
        return changed


def _is_cheap(buffer: Tensor) -> bool:
    return buffer.device.type == "cpu" and buffer.numel() <= _SMALL_BUFFER


def _can_compare(buffer: Tensor) -> bool:
    return buffer.layout is torch.strided and has_data(buffer)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _has_changed(b: _Buffer, known: bool) -> bool:
    now = b.owner._buffers.get(b.name)
    if now is not b.found or _version(b.found) != b.version:
        return now is None or not _can_compare(now) or b.before is None or not _same_value(now, b.before)
    if b.before is None or not _can_compare(b.found):
        return False
    if known and not _is_cheap(b.found):  # it was learned to change; comparing would cost more than assuming so
        return True
    return not _same_value(b.found, b.before)


def _same_value(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


class Surroundings:
    """What one call of a block saw besides its arguments. Create before the call, `settle` after it."""

    __slots__ = (
        "_autocast",
        "_buffers",
        "_device",
        "_inner",
        "_leaving",
        "_modes",
        "_modules",
        "_noted",
        "_random",
        "_stand_ins",
        "_weights",
    )

    def __init__(self, block: nn.Module, stream: Tensor, watch: BufferWatch) -> None:
        """Take note of the present state.

        Args:
            block: the module about to run.
            stream: what it is called with; the random state of its device and of the CPU are taken. [*stream]
            watch: what is known of the block's buffers.
        """
        device = stream.device
        self._modules = _modules_of(block)
        self._modes = tuple(module.training for module in self._modules)
        # Modules that may leave tensors on themselves: torch's own do not, unless a hook does (the old weight_norm).
        self._leaving = [m for m in self._modules if not _is_torchs_own(type(m)) or m._forward_pre_hooks]
        self._noted = watch.before(self._modules, self._modes)
        self._buffers: list[_Buffer] = []
        self._random = TorchRandomState.now([stream]) if has_data(stream) else None
        self._weights: list[Weight] = []
        self._inner = self._modules[1:]
        self._stand_ins = self._stood_in()
        self._autocast = [a for kind in {device.type, "cpu"} if (a := _Autocast.now(kind)) is not None]
        self._device = _default_device()

    def _stood_in(self) -> list[StandIn]:
        return stand_ins_of(self._inner) if any("forward" in m.__dict__ for m in self._inner) else []

    def settle(self, watch: BufferWatch, parameters: bool) -> int:
        """After the forward pass: let go of all that it neither drew nor changed.

        Args:
            watch: what is known of the block's buffers.
            parameters: whether a later run checks that none has changed.

        Returns:
            Bytes kept: random states that were drawn from, and values of buffers that changed.
        """
        self._buffers, self._noted = watch.after(self._noted, self._modules, self._modes), []
        if self._random is not None and self._random.is_present():
            self._random = None
        if parameters:
            self._weights = weights_of(self._modules)
        random = 0 if self._random is None else self._random.nbytes
        return random + sum(b.before.nbytes for b in self._buffers if b.before is not None)

    def run(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], block: str, *, caching: bool
    ) -> Any:
        """Return `function(*args, **kwargs)`, run in these surroundings; the present ones are back afterwards.

        Args:
            function: the block's forward, or another method.
            args: to call it with.
            kwargs: the same.
            block: its name, for errors.
            caching: whether autocast keeps the weights that it casts, if it did then. Not for runs without a graph: a
                weight cast there would sit in the cache without its graph, and a later gradient through it would be
                lost.

        Raises:
            RuntimeError: if a parameter was changed in place since the forward pass.
        """
        check_weights(self._weights, block)
        with _PutBack(self._leaving, self._contexts(caching)):
            return function(*args, **kwargs)

    def _contexts(self, caching: bool) -> list[AbstractContextManager[object]]:
        contexts: list[AbstractContextManager[object]] = []
        if self._random is not None:
            contexts.append(_random_state_put(self._random))
        if self._buffers:
            contexts.append(_buffers_put(self._buffers))
        if any(m.training is not mode for m, mode in zip(self._modules, self._modes, strict=True)):
            contexts.append(_modes_put(self._modules, self._modes))
        if (now := self._stood_in()) != self._stand_ins:
            contexts.append(stand_ins_put(self._stand_ins, now))
        if changed := [w for w in self._weights if w.has_changed]:
            contexts.append(weights_put(changed))
        for a in self._autocast:
            if a.enabled or torch.is_autocast_enabled(a.device_type):
                contexts.append(torch.autocast(a.device_type, a.dtype, a.enabled, a.caches and caching))
        if self._device is not None:
            contexts.append(self._device)
        return contexts


def _modules_of(block: nn.Module) -> list[nn.Module]:
    """All modules of a block, each once; quicker than `nn.Module.modules`, which names them."""
    found = {block: None}
    pending = [block]
    for module in pending:
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                pending.append(child)
    return pending


class _PutBack:
    """Enter some contexts, and leave with the tensors that modules keep as plain attributes as they were.

    A block may leave something of its forward pass on itself (`self.aux_loss = ...`). Each evaluation replaces it
    by a tensor whose graph ends at the restored input.
    """

    __slots__ = ("_before", "_contexts", "_modules", "_stack")

    def __init__(self, modules: list[nn.Module], contexts: list[AbstractContextManager[object]]) -> None:
        self._modules, self._contexts = modules, contexts
        self._stack: ExitStack | None = None

    def __enter__(self) -> None:
        self._before = [(dict(m.__dict__), tuple(map(id, m.__dict__.values()))) for m in self._modules]
        if self._contexts:
            self._stack = ExitStack()
            for context in self._contexts:
                self._stack.enter_context(context)

    def __exit__(self, *exception: Any) -> None:
        try:
            if self._stack is not None:
                self._stack.__exit__(*exception)
        finally:
            for module, (before, ids) in zip(self._modules, self._before, strict=True):
                if tuple(map(id, module.__dict__.values())) != ids:
                    _put_back_tensors(module.__dict__, before)


_known_as_torchs_own: dict[type, bool] = {}


def _is_torchs_own(kind: type) -> bool:
    known = _known_as_torchs_own.get(kind)
    if known is None:
        known = kind.__module__.startswith("torch.nn.modules.")
        if len(_known_as_torchs_own) < 10_000:  # classes made on the fly are not to pile up
            _known_as_torchs_own[kind] = known
    return known


def _put_back_tensors(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in {*now, *before}:
        if isinstance(before.get(name), Tensor):
            now[name] = before[name]
        elif isinstance(now.get(name), Tensor):
            if name in before:
                now[name] = before[name]
            else:
                del now[name]


@contextmanager
def _random_state_put(state: TorchRandomState) -> Iterator[None]:
    present = state.again()
    state.put()
    try:
        yield
    finally:
        present.put()


@contextmanager
def _buffers_put(buffers: list[_Buffer]) -> Iterator[None]:
    # The registered tensors are swapped, not written to: no version counter moves, and a graph that saved
    # one of them stays valid.
    present = [b.owner._buffers[b.name] for b in buffers]
    for b in buffers:
        assert b.before is not None
        b.owner._buffers[b.name] = b.before.clone()
    try:
        yield
    finally:
        for b, tensor in zip(buffers, present, strict=True):
            b.owner._buffers[b.name] = tensor


@contextmanager
def _modes_put(modules: list[nn.Module], modes: tuple[bool, ...]) -> Iterator[None]:
    present = [module.training for module in modules]
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    try:
        yield
    finally:
        for module, mode in zip(modules, present, strict=True):
            module.training = mode


_NOTHING = nullcontext()


def gathered(block: nn.Module) -> AbstractContextManager[None]:
    """Have the parameters of a block that FSDP2 has sharded gathered for the time of one evaluation.

    Only an evaluation out of the backward pass's order finds them sharded. Gathering is a collective
    operation: every rank comes here at the same place of the same program.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return _NOTHING
    sharded = [m for m in block.modules() if isinstance(m, fsdp.FSDPModule) and _is_sharded(m)]
    return _gathered(sharded) if sharded else _NOTHING


@contextmanager
def _gathered(sharded: list[Any]) -> Iterator[None]:
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
