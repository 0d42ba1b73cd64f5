"""Finding the residual branches of a block by measurement: what its forward pass adds to the stream.

A block is called once on a real input and its autograd graph is walked back from the output: through sums, and
through what is linear (views, permutations, dropout, products with what does not depend on the stream). Each
path ends at the block's own input, the skip connection, or at the output of a module, the end of a branch.
Multiplying that output multiplies the branch. Where a norm or an activation stands after the sum (post-norm
blocks, post-activation ResNets), the walk goes on from its input. So names play no part, and a forward pass
nobody has seen before is read as well as GPT-2's.

What cannot be read this way: a branch whose last operation is neither linear nor a module's (`x +
torch.tanh(self.linear(x))`), and a skip connection that is not the plain input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.models import anatomy
from abyssal.models.call import first_tensor

__all__ = ["BlockCall", "BlockRecorder", "ModuleCall", "Reading", "is_weight_layer", "read_branches", "stream_of"]

Node = Any  # an autograd node; torch.autograd.graph.Node is what they are, but stubs do not say so everywhere

# Linear in each of their inputs that depends on the stream, where only one does (products) or however many (sums).
_SUMS = frozenset(
    (
        *("Add", "Sub", "Neg", "Clone", "Copy", "CopySlices", "ToCopy", "Alias", "View", "UnsafeView", "ReshapeAlias"),
        *("Permute", "Transpose", "T", "Unsqueeze", "Squeeze", "Expand", "Repeat", "Slice", "Select", "Roll", "Flip"),
        *("ConstantPadNd", "Index", "IndexSelect", "IndexAdd", "IndexPut", "Gather", "Cat", "Stack", "Split"),
        *("SplitWithSizes", "Unbind", "NativeDropout", "AsStrided", "Contiguous", "UnsafeSplit", "Narrow", "Sum"),
    )
)
_PRODUCTS = frozenset(("Mul", "Div", "Addcmul"))


@dataclass(eq=False)
class ModuleCall:
    """One call of a module inside a block."""

    name: str
    module: nn.Module
    order: int
    before: Node | None  # of its first tensor argument
    shape: torch.Size


@dataclass(eq=False)
class BlockCall:
    """One call of a block: its stream, its output, and what was called inside."""

    name: str
    module: nn.Module
    order: int
    stream: Tensor | None = None
    output: Tensor | None = None
    calls: list[ModuleCall] = field(default_factory=list)
    outputs: dict[Node, list[ModuleCall]] = field(default_factory=dict)


@dataclass
class Reading:
    """What the walk through one block found.

    Attributes:
        ends: the calls at the ends of its branches, in order.
        skip: whether the block's input, unchanged, is part of the sum.
        post: whether something that is not linear stands after the sum.
        trouble: the operation at which a path could not be read; None if all could.
        step: the factors of torch.add(x, f, alpha=h) met on the way.
    """

    ends: list[ModuleCall] = field(default_factory=list)
    skip: bool = False
    post: bool = False
    trouble: str | None = None
    step: set[float] = field(default_factory=set)

    def join(self, other: Reading) -> None:
        """Add what another path found."""
        self.ends += [end for end in other.ends if end not in self.ends]
        self.skip |= other.skip
        self.post |= other.post
        self.trouble = self.trouble or other.trouble
        self.step |= other.step


def is_weight_layer(module: nn.Module) -> bool:
    """Whether a module holds a matrix of its own and is no embedding table: Linear, Conv, Conv1D and their kind."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "embed" in type(module).__name__.lower():
        return False
    return any(p.dim() >= 2 for p in module.parameters(recurse=False)) and not module._modules


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor] | None:
    """Return place and value of the residual stream: the first floating-point tensor of a call."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *_by_likelihood(kwargs)]
    for key, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return key, value
    return None


def _by_likelihood(kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from sorted(kwargs.items(), key=lambda item: item[0] != "hidden_states")


class BlockRecorder:
    """Hooks on a block and all modules in it, which record one call after another."""

    def __init__(self, name: str, block: nn.Module, counter: Iterator[int]) -> None:
        """Hook the block; `remove` takes the hooks off again."""
        self.name, self.block, self.counter = name, block, counter
        self.finished: list[BlockCall] = []
        self._open: BlockCall | None = None
        self._handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave, prepend=True),
        ]
        for inner_name, inner in block.named_modules():
            if inner is not block:
                recorder = _Inner(self, inner_name)
                self._handles += [
                    inner.register_forward_pre_hook(recorder.enter, with_kwargs=True),
                    inner.register_forward_hook(recorder.leave),
                ]

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._open = BlockCall(self.name, module, next(self.counter))
        found = stream_of(args, kwargs)
        if found is None:
            return None
        key, stream = found
        # A leaf may not be changed in place, which blocks do (`x += f`): they get a copy, and its node is the start.
        stream = stream.detach().requires_grad_().clone()
        self._open.stream, self._open.outputs[stream.grad_fn] = stream, []
        self._start = stream.grad_fn
        self._value = stream.detach().clone()
        if isinstance(key, int):
            return (*args[:key], stream, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: stream}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, self._open = self._open, None
        if call is None or call.stream is None:
            return
        call.output = first_tensor(output)
        self.finished.append(call)
        self.done(call, self._start, self._value)

    def done(self, call: BlockCall, start: Node, value: Tensor) -> None:
        """Do something with a finished call, while its graph is there."""

    @property
    def open(self) -> BlockCall | None:
        """The call that is under way."""
        return self._open


class _Inner:
    """Records the calls of one module inside a block."""

    def __init__(self, recorder: BlockRecorder, name: str) -> None:
        self.recorder, self.name = recorder, name
        self.entered: list[Node | None] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = stream_of(args, kwargs)
        self.entered.append(None if found is None else found[1].grad_fn)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        before = self.entered.pop() if self.entered else None
        tensor, block = first_tensor(output), self.recorder.open
        if block is None or tensor is None:
            return
        call = ModuleCall(self.name, module, next(self.recorder.counter), before, tensor.shape)
        block.calls.append(call)
        if tensor.grad_fn is not None:
            block.outputs.setdefault(tensor.grad_fn, []).append(call)


def read_branches(call: BlockCall, start: Node) -> Reading:
    """Walk back from a block's output.

    Args:
        call: the block's call, with its graph.
        start: the node of the stream that went in.
    """
    output = call.output
    if output is None or output.grad_fn is None:
        return Reading(trouble="an output without a graph (no_grad, or a detach, in its forward)")
    return _Walk(call, start).follow(output.grad_fn)


class _Walk:
    """Walks back from a block's output; `tail` says whether operations after the sum may still be met."""

    def __init__(self, call: BlockCall, start: Node) -> None:
        self.call, self.start = call, start
        self._depends: dict[Node, bool] = {start: True}
        self._known: dict[tuple[Node, bool], Reading] = {}

    def depends(self, node: Node | None) -> bool:
        """Whether a node depends on the stream; a loop, since graphs may be deeper than Python's stack."""
        stack = [] if node is None or node in self._depends else [node]
        while stack:
            top = stack[-1]
            parents = [parent for parent, _ in top.next_functions if parent is not None]
            unknown = [parent for parent in parents if parent not in self._depends]
            if unknown:
                stack += unknown
            else:
                self._depends[top] = any(self._depends[parent] for parent in parents)
                stack.pop()
        return node is not None and self._depends[node]

    def follow(self, node: Node, tail: bool = True) -> Reading:
        """Read all paths from a node back to the stream."""
        if (node, tail) not in self._known:
            self._known[node, tail] = self._follow(node, tail)
        return self._known[node, tail]

    def _follow(self, node: Node, tail: bool) -> Reading:
        if node is self.start:
            return Reading(skip=True)
        # A module that returns its own input (nn.Identity, dropout in eval mode) says nothing of this node.
        calls = [
            call
            for call in self.call.outputs.get(node, ())
            if call.module is not self.call.module and call.before is not node
        ]
        for call in calls:
            if is_weight_layer(call.module):
                return Reading(ends=[call])
        found = self._through(node, tail)
        if found.trouble is None:
            return found
        for call in calls if tail else ():
            # The module stands after the sum, a norm or an activation, if it has no matrices and its input is the sum.
            if any(p.dim() >= 2 for p in call.module.parameters()) or not self.depends(call.before):
                continue
            if (inside := self.follow(call.before)).skip and inside.trouble is None:
                after = Reading(post=True)
                after.join(inside)
                return after
        if calls and not found.skip:
            return Reading(ends=[calls[0]])
        return found

    def _through(self, node: Node, tail: bool) -> Reading:
        """Go on through a linear operation, or through a non-linear one of a single input after the sum."""
        operation = re.sub(r"Backward\d*$", "", node.name())
        inputs = [parent for parent, _ in node.next_functions if self.depends(parent)]
        if operation in _SUMS or (operation in _PRODUCTS and self._is_linear_product(operation, node)):
            return self._through_sum(operation, node, inputs, tail)
        if tail and len(inputs) == 1 and (inside := self.follow(inputs[0])).skip and inside.trouble is None:
            after = Reading(post=True)
            after.join(inside)
            return after
        return Reading(trouble=operation)

    def _through_sum(self, operation: str, node: Node, inputs: list[Node], tail: bool) -> Reading:
        found = Reading()
        if operation == "Add" and (alpha := float(getattr(node, "_saved_alpha", 1))) != 1:
            found.step.add(alpha)
        parts = [(parent, self.follow(parent, tail)) for parent in inputs]
        has_skip = any(part.skip and not part.post and part.trouble is None for _, part in parts)
        for parent, part in parts:
            # Beside the skip connection itself, what leads back through a norm is a branch that begins with one.
            found.join(self.follow(parent, tail=False) if has_skip and part.post else part)
        return found

    def _is_linear_product(self, operation: str, node: Node) -> bool:
        factors = [parent for parent, _ in node.next_functions]
        if operation == "Addcmul":  # x + a * b: the sum's first part may depend besides
            factors = factors[1:]
        dependent = [self.depends(parent) for parent in factors]
        if operation == "Div" and len(dependent) > 1:
            return not dependent[1]
        return sum(dependent) <= 1


def wrapped_core(module: nn.Module) -> nn.Module:
    """Return the module itself, or what torch.compile and others wrapped in it."""
    return anatomy.unwrap("", module)[1]
