"""Running a model in the midst of its training: by exact gradients, and without a trace.

Whatever a forward pass writes into its module is undone: buffers, attributes, and the parameters that are handed over
in place of a module's own. `torch.func.functional_call` hands them over too, but does not give a module's own back
where the module stands in its parent several times.
"""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_found", "exactly", "forked_randomness", "normal", "without_hooks"]

# What torch keeps in a module beside its tensors: hooks, which come and go in ways of their own.
_HOOKS = frozenset(vars(nn.Module())) - {
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
}
_TENSORS = ("_parameters", "_buffers", "_modules")
_DISTRIBUTED = ("torch.nn.parallel", "torch.distributed")
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_NESTED = 3  # containers within containers that are looked into
_LONG = 4096  # items of a container that is not looked into: a vocabulary, a data set


def forked_randomness(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Put torch's random states on the CPU and on a device back afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute in the types that tensors have, and what can be differentiated, whatever mode the caller is in."""
    known = torch.amp.is_autocast_available(device.type)
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext(),
    ):
        yield


def normal(value: Any) -> Any:
    """Return a tensor that can take part in gradients, for one that was made in `torch.inference_mode()`."""
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value


@contextlib.contextmanager
def as_found(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Run a model within this; afterwards its modules hold what they held before, and as it was.

    It can be nested. Within, buffers and tensors in plain attributes are copies. What a module's own `train()` empties
    is empty: some models keep, in eval mode, what they compute from parameters, and would cut those off.

    Args:
        model: any; its modules may stand in it several times.
        values: tensors that take the place of parameters or buffers within, by any of their names, wherever in the
            model they stand.

    Raises:
        RuntimeError: if values are given for a model with scripted modules, which take none.
    """
    outer = next((active for active in reversed(_active) if active.model is model), None)
    if outer is not None:
        outer.put_back()  # every run starts from what was found at first, whatever was written in between
    found = _Found(model)
    _active.append(found)
    try:
        found.lend(values or {})
        yield
    finally:
        found.put_back()
        _active.remove(found)
        if outer in _active:  # a generator that is thrown away may end after what it ran in
            assert outer is not None
            outer.lend({})


_active: list[_Found] = []  # inmost last


class _Found:
    """What the modules of a model hold."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = list(model.modules())
        self.scripted = [m for m in modules if isinstance(m, torch.jit.ScriptModule)]
        # Wrappers for several devices keep account of their own, in step with what is not written in Python.
        ours = [m for m in modules if not type(m).__module__.startswith(_DISTRIBUTED)]
        self.modules = [m for m in ours if not isinstance(m, torch.jit.ScriptModule)]
        self.attributes = [
            (m, {name: value for name, value in vars(m).items() if name not in _HOOKS}) for m in self.modules
        ]
        self.inside: list[tuple[Any, Any]] = []  # containers, and copies of them
        for _, held in self.attributes:
            for value in held.values():
                self._look_into(value, _NESTED)
        self.values = [(b, b.clone()) for m in self.scripted for b in m.buffers(recurse=False)]

    def _look_into(self, value: Any, depth: int) -> None:
        if type(value) in _CONTAINERS and depth:
            self.inside.append((value, value.copy()))
            if len(value) > _LONG:
                return
            for item in value.values() if isinstance(value, dict) else value:
                self._look_into(item, depth - 1)

    def lend(self, values: Mapping[str, Tensor]) -> None:
        """Put values in the place of parameters and buffers, and copies in that of all else that may be written to."""
        if values and self.scripted:
            raise RuntimeError("A scripted module (torch.jit) takes no parameters from outside.")
        names: dict[str, Tensor] = {}
        if values:
            names.update(self.model.named_parameters(remove_duplicate=False))
            names.update(self.model.named_buffers(remove_duplicate=False))
        given = {id(names[name]): value for name, value in values.items()}
        for m, held in self.attributes:
            if not m.training and type(m).train is not nn.Module.train:
                vars(m).update(_emptied(m, held))
            for name, value in list(vars(m).items()):
                if name in held and isinstance(value, Tensor):
                    vars(m)[name] = _lent(value, given)
            for name, p in m._parameters.items():
                m._parameters[name] = given.get(id(p), p)  # type: ignore[assignment]
            for name, b in m._buffers.items():
                m._buffers[name] = None if b is None else _lent(b, given)

    def put_back(self) -> None:
        """Let modules hold what they held."""
        for container, copy in self.inside:
            if not _same(container, copy):
                container.clear()
                container.update(copy) if isinstance(container, dict | set) else container.extend(copy)
        for m, held in self.attributes:
            now = vars(m)
            for name in [name for name in now if name not in held and name not in _HOOKS]:
                del now[name]
            now.update(held)
        with torch.no_grad():
            for b, value in self.values:
                if not torch.equal(b, value):
                    b.copy_(value)


def _lent(value: Tensor, given: dict[int, Tensor]) -> Tensor:
    """Return what stands for a tensor, the same wherever it is: what is given, or a copy of a constant."""
    constant = not value.requires_grad and not isinstance(value, nn.Parameter) and not nn.parameter.is_lazy(value)
    if constant and id(value) not in given:
        given[id(value)] = value.clone()
    return given.get(id(value), value)


def _same(container: Any, copy: Any) -> bool:
    """Whether the very same objects are in both."""
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        return all(map(operator.is_, container, copy)) and all(map(operator.is_, container.values(), copy.values()))
    return bool(container == copy) if isinstance(container, set) else all(map(operator.is_, container, copy))


def _holds_tensors(value: Any, depth: int = _NESTED) -> bool:
    if type(value) in (*_CONTAINERS, tuple) and depth:
        return any(_holds_tensors(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def _emptied(module: nn.Module, held: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as the module's own `train(True)` leaves them, of those that it takes the tensors out of.

    It is called on a stand-in without submodules, since some write to parameters (merged low-rank updates).
    """
    full = {name: value for name, value in held.items() if name not in _TENSORS and _holds_tensors(value)}
    if not full:
        return {}
    stand_in = object.__new__(type(module))
    vars(stand_in).update(vars(module))
    with torch.no_grad():
        tensors = {
            kind: {name: None if t is None else t.clone() for name, t in getattr(module, kind).items()}
            for kind in ("_parameters", "_buffers")
        }
    copies = {name: value.copy() if type(value) in _CONTAINERS else value for name, value in full.items()}
    vars(stand_in).update(_modules={}, **tensors, **copies)
    with contextlib.suppress(Exception), torch.no_grad():  # it may miss its submodules: what it did before counts
        stand_in.train(True)
    left = vars(stand_in)
    return {name: left[name] for name in full if name in left and not _holds_tensors(left[name])}


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Take gradients at a model's own parameters without calling the hooks that a user registered on them."""
    hooked = [(p, p._backward_hooks) for p in model.parameters() if p._backward_hooks]
    for p, _ in hooked:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in hooked:
            p._backward_hooks = hooks
