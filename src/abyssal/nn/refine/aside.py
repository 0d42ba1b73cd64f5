"""Running a model without a trace in what its modules hold beside their tensors.

Some models keep in eval mode what they compute from parameters (LeViT's and TinyViT's attention biases), until their
own `train(True)` lets go of it. A run with modes set by hand would leave it there, to be served for later weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["attributes_kept", "forget_", "graphs_in"]

_TORCHS = frozenset(vars(nn.Module()))  # parameters, buffers, submodules, hooks, mode


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
