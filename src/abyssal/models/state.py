"""Borrowing a model: run it, patch it, differentiate it, and give it back exactly as it was.

What is put back: every attribute of every module (patches, modes, what a forward pass leaves behind), buffers,
gradients, hooks that step an optimiser, and the random states of torch, NumPy and Python. Parameters are never
written to. Buffers are not written to either: copies stand in for them meanwhile, so that their version counters
do not move and a graph that is alive stays valid.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from abyssal.models.patch import release, stand_ins

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
        self._random = _RandomStates(model)
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


@contextmanager
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


class _RandomStates:
    """Random states of torch (all devices that the model is on), NumPy and Python."""

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        devices = {p.device for p in (*model.parameters(), *model.buffers())}
        self._devices = [(d, _device_module(d).get_rng_state(d)) for d in devices if d.type not in ("cpu", "meta")]
        self._numpy, self._python = numpy.random.get_state(), random.getstate()

    def put(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            _device_module(device).set_rng_state(state, device)
        numpy.random.set_state(self._numpy)
        random.setstate(self._python)


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device)
