"""Borrowing a model: run it, patch it, differentiate it, and give it back exactly as it was.

What is put back: every attribute of every module (patches, modes, what a forward pass leaves behind), buffers,
gradients, hooks that step an optimiser, and the random states of torch, NumPy and Python. Parameters are never
written to. Buffers are not written to either: copies stand in for them meanwhile, so that their version counters
do not move and a graph that is alive stays valid.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from abyssal.models.patch import paused, release, stand_ins
from abyssal.util.randomness import RandomState

__all__ = [
    "Loan",
    "as_found",
    "attributes_kept",
    "borrowed",
    "forget_",
    "graphs_in",
    "quiet",
    "without_hooks",
]

# Dictionaries of a module that running or patching it writes to; others (hooks) may be, by handles being removed.
_HELD = (
    *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"),
    *("_backward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
)


class Loan:
    """A model while it is borrowed: unpatched, its gradients empty, its buffers copies.

    Args:
        model: the model to borrow.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take note of everything, and set the model free of patches."""
        self.modules = list(model.modules())
        self.parameters = [p for p in dict.fromkeys(model.parameters()) if not is_lazy(p)]
        self._state = [(m, dict(m.__dict__), _dictionaries(m)) for m in self.modules]
        self._patches = [(p, p.retired) for m in self.modules for p in stand_ins(m)]
        self._gradients = [(p, p.grad) for p in self.parameters]
        self._steppers = [(p, hooks) for p in self.parameters if (hooks := p._post_accumulate_grad_hooks)]
        self._random = RandomState.now([*model.parameters(), *model.buffers()])
        for p in self.parameters:
            p.grad = None
        for p, _ in self._steppers:
            p._post_accumulate_grad_hooks = OrderedDict()
        release(model)
        for m in self.modules:  # block.compile() would run past a forward that we set; its speed is not needed
            if m.__dict__.get("_compiled_call_impl") is not None:
                m._compiled_call_impl = None
            if getattr(m, "gradient_checkpointing", False) is True:
                m.gradient_checkpointing = False  # type: ignore[assignment]
        self._start = [(m, dict(m.__dict__)) for m in self.modules]
        self._copy_buffers()

    def rewind(self) -> None:
        """Put random states, buffers and attributes back to where each training step of this loan starts."""
        for module, attributes in self._start:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        self._copy_buffers()
        self._random.put()

    def _copy_buffers(self) -> None:
        copies: dict[int, Tensor] = {}
        for module, _, held in self._state:
            for name, buffer in held["_buffers"].items():
                if buffer is not None and not is_lazy(buffer):
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.detach().clone()
                    module._buffers[name] = copies[id(buffer)]

    def end(self) -> None:
        """Give the model back."""
        for module, attributes, held in self._state:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, before in held.items():
                _refill(module.__dict__[name], before)
        for patch, retired in self._patches:
            patch.retired = retired
        for p, gradient in self._gradients:
            p.grad = gradient
        for p, hooks in self._steppers:
            p._post_accumulate_grad_hooks = hooks
        self._random.put()


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[Loan]:
    """Borrow `model` for the `with` block, within which gradients are on."""
    loan = Loan(model)
    try:
        with torch.enable_grad():
            yield loan
    finally:
        loan.end()


def _dictionaries(module: nn.Module) -> dict[str, dict[Any, Any]]:
    return {name: dict(module.__dict__[name]) for name in _HELD if isinstance(module.__dict__.get(name), dict)}


def _refill(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    held.clear()
    held.update(before)


# ---------------------------------------------------------------------- running without a trace

_TORCHS = frozenset(vars(nn.Module()))  # parameters, buffers, submodules, hooks, mode
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


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, uncompiled, graphs on, blocks as they are below abyssal.reconstruct; put back afterwards.

    Plain attributes too: what a model keeps in eval mode would be served for later weights.
    """
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        for module, _ in modes:
            module.training = False
        if cache is not None and config is not None:
            config.use_cache = False
        with (
            attributes_kept(model),
            paused(model),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext(),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        if cache is not None and config is not None:
            config.use_cache = cache


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put the plain attributes of all modules back afterwards, and the content of dicts, lists and sets among them."""
    held = [(module, _plain(module)) for module in model.modules()]
    inside = [(v, v.copy()) for _, values in held for v in values.values() if type(v) in (dict, list, set)]
    try:
        yield
    finally:
        for container, content in inside:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for module, values in held:
            for name in _plain(module).keys() - values.keys():
                del module.__dict__[name]
            module.__dict__.update(values)


def forget_(model: nn.Module) -> None:
    """Let modules drop what they keep in eval mode of their weights, which are going to change."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for module, _ in modes:
        if type(module).train is not nn.Module.train and not isinstance(module, torch.jit.ScriptModule):
            module.train(True)
    for module, mode in modes:
        module.training = mode
    for p, flag in flags:
        p.requires_grad_(flag)


def graphs_in(model: nn.Module) -> Iterator[str]:
    """Yield the plain attributes, by dotted name, that hold tensors with a graph."""
    for name, module in model.named_modules():
        for attribute, value in _plain(module).items():
            leaves = tree_leaves(value) if isinstance(value, Tensor | dict | list | tuple) else []
            if any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in leaves):
                yield f"{name}.{attribute}" if name else attribute


def _plain(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    return {name: value for name, value in module.__dict__.items() if name not in _TORCHS}


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
