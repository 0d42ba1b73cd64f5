"""Running a model in the midst of its training: by exact gradients, and without a trace in random states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["forked_randomness", "plainly", "without_hooks"]


def forked_randomness(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Put torch's random states on the CPU and on a device back afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


@contextlib.contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Do what `abyssal.paused(model)` does for a model trained by `abyssal.reconstruct`.

    This room does not know that one: a patch is told by what it has.
    """
    sessions = {id(found): found for module in model.modules() if (found := _session(module)) is not None}
    for session in sessions.values():
        session.paused += 1
    try:
        yield
    finally:
        for session in sessions.values():
            session.paused -= 1


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


def _session(module: nn.Module) -> Any:
    """Return what a patched module's `forward` belongs to; None for a plain one."""
    found = module.__dict__.get("forward")
    while found is not None:
        session = getattr(found, "session", None)
        if hasattr(session, "paused"):
            return session
        found = getattr(found, "__dict__", {}).get("__wrapped__")  # accelerate's hooks wrap a `forward` that they find
    return None
