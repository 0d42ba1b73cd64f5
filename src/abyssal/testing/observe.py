"""One call of each block, watched from inside an otherwise plain forward pass.

A probe takes the place of a block's `forward` on a private copy of the model. At the block's first call it
evaluates the block a few times from the same torch random state and buffers, notes what differs and what
moved, puts everything back, and lets the forward pass go on. So only one block's evaluation is ever held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from abyssal.engine.policy import Reverse
from abyssal.models.arguments import Slot, find_stream, without_caches
from abyssal.models.call import first_tensor
from abyssal.models.patch import Patch
from abyssal.testing.subject import Subject, wide
from abyssal.util.randomness import TorchRandomState, generator_state, outside_state, seed_all

_REFINEMENTS = 3  # state errors after 0, 1 and 2 of them
# Of a block that draws from elsewhere, but whose output did not differ: skipping it with probability 1/2
# stays unseen in 8 trials once in 250 times.
_TRIALS = 8
_FRAMEWORK_ATTRIBUTES = frozenset(nn.Module().__dict__)


class Difference(NamedTuple):
    """How two outputs that should be equal differ."""

    entries: int
    of: int
    largest: float  # absolute
    relative: float  # Euclidean


@dataclass
class Observation:
    """What was seen of one block.

    Attributes:
        kind: its class.
        called: False if the forward pass never came by, or with no tensor.
        shape: what is wrong with the output as the next block's input, in words; empty if nothing is.
        returns_tensor: whether there is a tensor in the output.
        returns: the type of the output, if it is not a bare tensor.
        cached: whether it was handed a key-value cache that is not empty; nothing else was looked at then.
        difference: between evaluations from the same state; None if there is none.
        causes: what moved during a call that recomputation does not put back, in words.
        draws: whether it draws from torch's generators.
        mutates_stream: whether it changes its input in place.
        mutates: other arguments that it changes in place, in words.
        buffers: names of the buffers that it changes.
        attributes: plain attributes that a call changes.
        state_errors: relative error of the input restored by Reverse(0), Reverse(1), ...
    """

    kind: str
    called: bool = False
    returns_tensor: bool = True
    shape: str = ""
    returns: str = ""
    cached: bool = False
    difference: Difference | None = None
    causes: list[str] = field(default_factory=list)
    draws: bool = False
    mutates_stream: bool = False
    mutates: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    state_errors: list[float] = field(default_factory=list)


def observe(subject: Subject) -> dict[str, Observation]:
    """Run one plain forward pass of the subject and return what was seen of each block, by name."""
    model = subject.working_copy()
    probes: dict[str, _Probe] = {}
    for name in subject.block_names:
        module = model.get_submodule(name)
        probes[name] = _Probe(module)
        probes[name].install()
    seed_all(subject.seed)
    args, kwargs, _ = subject.inputs()
    model(*args, **kwargs)
    return {name: probe.seen for name, probe in probes.items()}


class _Probe(Patch):
    """Stands in for a block's `forward`; examines the first call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.seen = Observation(type(module).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, filled, _ = without_caches(args, kwargs, self.module)  # each evaluation would grow them
        self.seen.cached |= bool(filled)
        if not (self.seen.called or self.seen.cached):
            self._examine(args, kwargs)
        return self.__wrapped__(*args, **kwargs)

    def _examine(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        slot = find_stream(args, kwargs, self.__wrapped__)
        if slot is None:
            return
        self.seen.called = True
        call = _Call(self.module, self.__wrapped__, args, kwargs, slot)
        first = _watch_state(call, self.seen)
        _describe_output(first, slot.get(args, kwargs), self.seen)
        self.seen.difference = _repeat(call, first, _TRIALS if self.seen.causes else 1)
        stream = first_tensor(first)
        if stream is not None and not self.seen.shape and self.seen.difference is None:
            self.seen.state_errors = _state_errors(call, slot.get(args, kwargs).detach(), stream.detach())
        call.put_back()


class _Call:
    """One call of a block that can be evaluated again from the same torch random state and buffers."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slot: Slot,
    ) -> None:
        self.module, self.slot = module, slot
        self._forward, self._arguments = forward, (args, kwargs)
        self.tensors = [t for t in pytree.tree_leaves(self._arguments) if isinstance(t, Tensor)]
        self._random = TorchRandomState.now(self.tensors)
        self._buffers = [
            (owner, path, name, buffer, buffer.detach().clone())
            for path, owner in module.named_modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    def put_back(self) -> None:
        """Return to the random state and buffers that the call began with."""
        self._random.put()
        for owner, _, name, found, before in self._buffers:
            if owner._buffers.get(name) is not found or not _equal(found, before):
                owner._buffers[name] = before.clone()

    def evaluate(self, stream: Tensor | None = None, *, function: Callable[..., Any] | None = None) -> Any:
        """Return the block's output for a copy of the arguments, with `stream` in place of theirs."""
        self.put_back()
        args, kwargs = self.copied(stream)
        return pytree.tree_map(_without_graph, (function or self._forward)(*args, **kwargs))

    def copied(self, stream: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a copy of the arguments."""
        args, kwargs = pytree.tree_map(_clone, self._arguments)
        if stream is not None and isinstance(self.slot.key, int):
            args = (*args[: self.slot.key], stream.clone(), *args[self.slot.key + 1 :])
        elif stream is not None:
            kwargs = {**kwargs, self.slot.key: stream.clone()}
        return args, kwargs

    def drew(self) -> bool:
        """Whether torch's random state has moved since the call began."""
        return not self._random.same_as(TorchRandomState.now(self.tensors))

    def changed_buffers(self) -> list[str]:
        """Return the names of the buffers that differ from what the call began with."""
        return [
            f"{path}.{name}" if path else name
            for owner, path, name, _, before in self._buffers
            if (now := owner._buffers.get(name)) is None or not _equal(now, before)
        ]

    # What the library's policies restore with (policy.Evaluation):

    def __call__(self, x: Tensor) -> Tensor:
        output = first_tensor(self.evaluate(x))
        assert output is not None
        return output

    def reverse_step(self, y: Tensor) -> Tensor | None:
        step = getattr(self.module, "reverse_step", None)
        return None if step is None else first_tensor(self.evaluate(y, function=step))


def _watch_state(call: _Call, seen: Observation) -> Any:
    """Evaluate once; note everything that the evaluation moved."""
    call.put_back()
    args, kwargs = call.copied()
    leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
    watched = [(path, t, t.clone(), t._version) for path, t in leaves if isinstance(t, Tensor)]
    outside, attributes = outside_state(), _attributes(call.module)
    output = call._forward(*args, **kwargs)
    seen.draws, seen.buffers = call.drew(), call.changed_buffers()
    stream = call.slot.get(args, kwargs)
    for path, t, before, version in watched:
        if t._version == version and _equal(t, before):
            continue
        if t is stream:
            seen.mutates_stream = True
        else:
            seen.mutates.append(_argument_name(path))
    moved = [name for name, state in outside_state().items() if state != outside[name]]
    seen.causes += [f"{name} moved on during the call: the block draws from it" for name in moved]
    for name, state in _attributes(call.module).items():
        if attributes.get(name) == state:
            continue
        if state.startswith("generator"):
            seen.causes.append(f"its own random generator {name!r} moved on during the call")
        else:
            seen.attributes.append(name)
    return pytree.tree_map(_without_graph, output)


def _attributes(module: nn.Module) -> dict[str, str]:
    """Fingerprints of the plain attributes: numbers, texts, generators, tensors, collections."""
    found = {}
    for path, owner in module.named_modules():
        for name, value in owner.__dict__.items():
            if name not in _FRAMEWORK_ATTRIBUTES and (state := _fingerprint(value)) is not None:
                found[f"{path}.{name}" if path else name] = state
    return found


def _fingerprint(value: object) -> str | None:
    if (state := generator_state(value)) is not None:
        return f"generator {state}"
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if isinstance(value, Tensor):
        return f"tensor {id(value)} {0 if value.is_inference() else value._version}"
    if isinstance(value, list | dict | set):
        return f"of length {len(value)}"
    return None


def _describe_output(output: Any, x: Tensor, seen: Observation) -> None:
    seen.returns = "" if isinstance(output, Tensor) else type(output).__name__
    y = first_tensor(output)
    seen.returns_tensor = y is not None
    if y is None:
        seen.shape = f"returns {seen.returns}, which holds no tensor"
    elif y.shape != x.shape:
        seen.shape = f"changes the stream's shape from {list(x.shape)} to {list(y.shape)}"
    elif y.dtype != x.dtype or y.device != x.device:
        seen.shape = f"changes the stream from {x.dtype} on {x.device} to {y.dtype} on {y.device}"


def _repeat(call: _Call, first: Any, trials: int) -> Difference | None:
    for _ in range(trials):
        difference = _compare(first, call.evaluate())
        if difference is not None:
            return difference
    return None


def _compare(first: Any, second: Any) -> Difference | None:
    a = [t for t in pytree.tree_leaves(first) if isinstance(t, Tensor)]
    b = [t for t in pytree.tree_leaves(second) if isinstance(t, Tensor)]
    if len(a) != len(b) or any(s.shape != t.shape for s, t in zip(a, b, strict=True)):
        return Difference(sum(t.numel() for t in a), sum(t.numel() for t in a), float("inf"), float("inf"))
    if all(map(_equal, a, b)):
        return None
    s, t = (torch.cat([wide(one).flatten().cpu() for one in side]) for side in (a, b))
    error = (s - t).abs()
    relative = float(error.norm() / s.norm().clamp(min=torch.finfo(torch.float64).tiny))
    differing = int((~torch.isclose(s, t, rtol=0.0, atol=0.0, equal_nan=True)).sum())
    if differing == 0:
        return None
    return Difference(differing, sum(t.numel() for t in a), float(error.max()), relative)


def _state_errors(call: _Call, x: Tensor, y: Tensor) -> list[float]:
    """Relative errors of the input as `Reverse(0)`, `Reverse(1)`, ... restore it from the exact output."""
    if not x.is_floating_point() or not float(x.norm()) > 0:
        return []
    errors = []
    with torch.no_grad():
        for k in range(_REFINEMENTS):
            try:
                s = Reverse(k).restore(y, None, call)
            except Exception:  # needs gradients inside, for example; the gradient check will tell
                return []
            errors.append(float((wide(s) - wide(x)).norm() / wide(x).norm()))
    return errors


def _argument_name(path: Any) -> str:
    _, key, *below = path
    name = str(key.idx) if hasattr(key, "idx") else repr(key.key)
    return f"argument {name}{pytree.keystr(below)}"


def _clone(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf if generator_state(leaf) is None else copy.deepcopy(leaf)


def _without_graph(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
