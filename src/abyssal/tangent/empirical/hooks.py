"""Hooks on the layers that are recognised: what each was given, and the gradients by what it returned."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vmap

from abyssal.tangent.empirical.layers import Rule, rule_for
from abyssal.tangent.empirical.parts import Part
from abyssal.tangent.modes import many_at_once

__all__ = [
    "Call",
    "Receiver",
    "Use",
    "arranged",
    "backward",
    "gradients",
    "named",
    "recorded",
    "ruled",
]

# Runs the model on a batch of samples and gives its outputs. [n, k]
Call = Callable[[], Tensor]

# Called with the index of a use and gradients by its output. [A, ...]
Receive = Callable[[int, Tensor], None]


class Receiver:
    """Where gradients go while a backward pass runs; nowhere at first. Apart from the hooks, since graphs keep it."""

    def __init__(self) -> None:
        self.receive: Receive | None = None


@dataclass
class Use:
    """One call of one recognised layer.

    Attributes:
        key: the layer's name, and how often it had been called before.
        module: the layer.
        rule: how its parameters get their gradients.
        x: its input.
        edge: of autograd's graph, for gradients by its output.
        expanded: whether its output, one row for all samples, was given a row for each.
    """

    key: tuple[str, int]
    module: nn.Module
    rule: Rule
    x: Tensor
    edge: GradientEdge
    expanded: bool


@contextlib.contextmanager
def recorded(
    model: nn.Module, n: int, expand: Callable[[tuple[str, int]], bool]
) -> Iterator[tuple[list[Use], Tensor, Receiver]]:
    """Note every call of a recognised layer.

    Args:
        model: any.
        n: samples in the batch.
        expand: whether a call whose output is one row for all samples is to give each sample a row.

    Yields:
        The uses; what to differentiate by so that all of them are passed; where their gradients then go.
    """
    uses: list[Use] = []
    calls: Counter[str] = Counter()
    spread: set[str] = set()
    receiver = Receiver()
    anchor = torch.zeros((), requires_grad=True)
    handles = []

    def watch(name: str, rule: Rule) -> Callable[..., Tensor | None]:
        """Return the forward hook of one layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            """Note a call, and return its output through a tap; None, which changes nothing, for what has no rule."""
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            again = torch._C._current_graph_task_id() != -1  # a checkpoint runs its inside again in a backward pass
            key = (name, calls[name])
            calls[name] += not again
            if not isinstance(output, Tensor) or len(given) != 1 or output.dim() == 0 or not torch.is_grad_enabled():
                return None
            out = output if output.requires_grad else output.detach().requires_grad_()
            expanded = len(out) == 1 < n and (name in spread if again else expand(key))
            out = out.expand(n, *out.shape[1:]) if expanded else out
            if again:  # what the first run did, without a tap: the graph that gradients pass is the first run's
                return out.clone()
            if expanded:
                spread.add(name)
            uses.append(Use(key, module, rule, given[0].detach(), get_gradient_edge(out), expanded))
            return _Tap.apply(out, anchor, len(uses) - 1, receiver)

        return hook

    for name, module in model.named_modules():
        rule = rule_for(module)
        if rule is not None:
            handles.append(module.register_forward_hook(watch(name, rule), prepend=True, with_kwargs=True))
    try:
        yield uses, anchor, receiver
    finally:
        receiver.receive = None
        for handle in handles:
            handle.remove()


class _Tap(torch.autograd.Function):
    """A copy whose gradient is looked at on its way back.

    A copy, so that whatever the model writes into it in place, the gradient is the layer's own output's. It depends on
    an anchor, so that a backward pass to the anchor passes every tap, and nothing that only parameters need.
    """

    @staticmethod
    def forward(out: Tensor, anchor: Tensor, index: int, receiver: Receiver) -> Tensor:
        return out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.index, ctx.receiver = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.receiver.receive is not None:
            _Deliver.apply(grad, ctx.index, ctx.receiver.receive)
        return grad, None, None, None


class _Deliver(torch.autograd.Function):
    """Hand on a gradient, or those of several outputs at once, which only a function's own rule for vmap can see."""

    @staticmethod
    def forward(grad: Tensor, index: int, receive: Receive) -> Tensor:
        receive(index, grad.detach()[None])
        return grad.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad: Tensor, index: int, receive: Receive
    ) -> tuple[Tensor, None]:
        at = in_dims[0]
        receive(index, (grad.expand(info.batch_size, *grad.shape) if at is None else grad.movedim(at, 0)).detach())
        return grad.new_zeros(()), None


for _kind in (_Tap, _Deliver):  # torch looks for the signature at every call
    setattr(_kind.forward, "__signature__", inspect.signature(_kind.forward))  # noqa: B010


def backward(outputs: Tensor, anchor: Tensor, receiver: Receiver, batched: bool, keep: bool = False) -> None:
    """Send the gradients of each output's sum over samples to a receiver.

    Args:
        outputs: [n, A]
        anchor: that all taps depend on.
        receiver: gets them. Each [A, ...]
        batched: all outputs in one pass under vmap; else in a loop, and gradients come when the last pass is over.
        keep: the graph.
    """
    count = outputs.shape[1]
    if not outputs.requires_grad:
        return
    if count == 1:
        torch.autograd.grad(outputs.sum(), anchor, retain_graph=keep, allow_unused=True)
        return
    chosen = torch.eye(count, dtype=outputs.dtype, device=outputs.device)[:, None].expand(-1, len(outputs), -1)
    if batched:

        def once(weights: Tensor) -> Tensor:
            torch.autograd.grad(outputs, anchor, weights, retain_graph=keep, allow_unused=True)
            return weights.new_zeros(())

        with many_at_once():
            vmap(once)(chosen)
        return
    receive, gathered = receiver.receive, dict[int, Tensor]()
    for a, weights in enumerate(chosen):

        def gather(index: int, grad: Tensor, a: int = a) -> None:
            if index not in gathered:
                gathered[index] = grad.new_zeros(count, *grad.shape[1:])
            gathered[index][a] = grad[0]

        receiver.receive = gather
        torch.autograd.grad(outputs, anchor, weights, retain_graph=keep or a + 1 < count, allow_unused=True)
    for index in list(gathered):
        if receive is not None:
            receive(index, gathered.pop(index))


def gradients(outputs: Tensor, weights: Tensor, inputs: Sequence[Any], batched: bool) -> list[Tensor | None]:
    """Return the gradients of each sample's combination of outputs, None for what none depends on. Each [n, ...].

    Args:
        outputs: [n, k]
        weights: of the combination. [k]
        inputs: to differentiate by.
        batched: all samples in one pass under vmap. The graph is kept.
    """
    n = len(outputs)
    if not inputs or not outputs.requires_grad:
        return [None] * len(inputs)
    chosen = torch.eye(n, dtype=outputs.dtype, device=outputs.device)[:, :, None] * weights
    if batched:
        with many_at_once():
            found = torch.autograd.grad(
                outputs, inputs, chosen, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
            return list(found)
    rows = [torch.autograd.grad(outputs, inputs, c, retain_graph=True, allow_unused=True) for c in chosen]
    return [_stacked(found) for found in zip(*rows, strict=True)]


def _stacked(found: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor; zeros where a sample has none and others have."""
    known = [g for g in found if g is not None]
    return torch.stack([torch.zeros_like(known[0]) if g is None else g for g in found]) if known else None


def named(module: nn.Module, parts: Mapping[str, Part], names: Mapping[int, str]) -> Iterator[tuple[str, Part]]:
    """Give a layer's parts by the names of those of its parameters that count."""
    for short, part in parts.items():
        name = names.get(id(getattr(module, short)))
        if name is not None:
            yield name, part


def ruled(use: Use, x: Tensor, deltas: Tensor) -> dict[str, Part] | None:
    """Apply a layer's rule to input [n, ...] and gradients [n, A, ...]; None for what the rule does not know."""
    try:
        return use.rule(use.module, x, deltas)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def arranged(values: Tensor, layout: str, n: int, at: int = 0) -> Tensor | None:
    """Bring samples to dimension `at`, where the layer's own begin; None where they cannot lie as the layout says."""
    size = values.shape[at]
    if layout == "expanded" and size == 1:
        return values.expand(*values.shape[:at], n, *values.shape[at + 1 :])
    if layout in ("first", "expanded"):
        return values if size == n else None
    if layout == "flattened":
        if size % n or values.dim() - at > 3:
            return None
        return values.reshape(*values.shape[:at], n, -1, *values.shape[at + 1 :])
    return values.transpose(at, at + 1) if values.dim() > at + 1 and values.shape[at + 1] == n else None
