"""Reading a model for the rules of depth: its residual branches, and the role of every parameter.

The model is run twice on a small batch, in eval mode. The first run finds where each block adds to the
residual stream (see `branches`) and in what order modules are called: what comes before the first block is
input, the last matrix after the last block is the head. The second run multiplies the found branches by 0 and
checks that each block then is the identity, or depends on none of its matrices where a norm stands after the
sum. A model that fails is refused with the name of the block; nothing is guessed from names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from abyssal.models import anatomy
from abyssal.models.branches import BlockCall, BlockRecorder, ModuleCall, is_weight_layer, wrapped_core
from abyssal.models.call import call
from abyssal.models.find import Blocks, resolve_blocks
from abyssal.models.state import quiet
from abyssal.models.survey import Survey, UnreadableModelError, run_on_any

__all__ = ["Branch", "ModelReading", "Role", "UnreadableModelError", "read_model", "scaled_output"]

Role: TypeAlias = Literal[
    "embedding", "between", "hidden", "projection", "narrow", "norm", "bias", "vector", "head", "gate"
]


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        block: dotted name of its block.
        end: dotted name of the module whose output is multiplied; of the block itself where it is read whole.
        layers: names of its matrices in the order of their use, the last one last.
        projection: name of the last one, or None (a branch without a matrix of its own).
        width: channels of its output.
        channel: dimension of the channels in that output, from the end (-1) or the front.
        inputs: names of the weight layers and activation modules in it.
        whole: whether the block is `x + f(x)` as a whole, and `f` is multiplied as its difference from `x`.
    """

    block: str
    end: str
    layers: tuple[str, ...]
    projection: str | None
    width: int
    channel: int
    inputs: tuple[str, ...] = ()
    whole: bool = False


@dataclass
class ModelReading:
    """What was read of a model.

    Attributes:
        blocks: names of its residual blocks.
        depth: how often blocks are called in one forward pass (shared blocks count each time).
        width: channels of the stream in the last block.
        branches: every residual branch once, in order.
        calls: number of branches passed in one forward pass.
        roles: role of every parameter, by its name in `model.named_parameters()`.
        head: name of the module that gives the logits, or None.
        post_norm: whether something that is not linear stands after the blocks' sums.
        notes: what a user should know.
    """

    blocks: tuple[str, ...]
    depth: int
    width: int
    branches: tuple[Branch, ...]
    calls: int
    roles: dict[str, Role]
    head: str | None
    post_norm: bool
    notes: list[str] = field(default_factory=list)


def read_model(
    model: nn.Module, batch: Any = None, *, blocks: Blocks | None = None, whole_blocks: bool = False
) -> ModelReading:
    """Read the residual branches of a model and the roles of its parameters, without changing it.

    Args:
        model: whose blocks `abyssal.find_blocks` can find, or are named.
        batch: what it can be called with: a dict of keyword arguments, a tuple of positional ones, or a tensor.
            None makes a small one for models of transformers and timm, and for those that begin with a
            linear, convolutional or embedding layer.
        blocks: as in `abyssal.reconstruct`; None finds them.
        whole_blocks: take each block to be one branch, `f(x) = block(x) - x`, without looking inside.

    Raises:
        NoBlocksError: no blocks were found.
        UnreadableModelError: the model cannot be run on the batch, or a block cannot be read.
    """
    named = {name: wrapped_core(module) for name, module in resolve_blocks(model, blocks).items()}
    survey = run_on_any(model, named, batch)
    if survey.reshaping and len(set(survey.reshaping)) < len(named):  # such as CaiT's blocks of the class token
        reshaping = dict.fromkeys(survey.reshaping)
        named = {name: block for name, block in named.items() if name not in reshaping}
        survey = run_on_any(model, named, survey.batch)
        survey.reshaping = list(reshaping)
    missing = [name for name in named if name not in {call.name for call in survey.blocks}]
    if not survey.blocks:
        raise UnreadableModelError(
            f"None of the blocks {', '.join(map(repr, itertools.islice(named, 3)))} took a floating-point tensor and "
            "kept its shape when the model ran. Name those whose input is the residual stream, blocks=[...]."
        )
    found = [_branches_of(call, reading, whole_blocks) for call, reading in survey.read]
    branches = tuple(dict.fromkeys(itertools.chain.from_iterable(found)))
    if not whole_blocks:
        _check_by_zero(model, named, branches, survey)
    roles, head = _roles(model, named, branches, survey)
    notes = [f"block {name!r} was not called on this batch, and is left as it is" for name in missing]
    notes += [f"block {name!r} changes the shape of its stream, and is left as it is" for name in survey.reshaping]
    steps = sorted({step for _, reading in survey.read for step in reading.step})
    if steps:
        shown = ", ".join(f"{step:.4g}" for step in steps[:3])
        notes.append(f"the blocks multiply their branches by {shown} themselves, besides the rule's multiplier")
    return ModelReading(
        blocks=tuple(name for name in named if name not in missing),
        depth=len(survey.blocks),
        width=branches[-1].width,
        branches=branches,
        calls=sum(map(len, found)),
        roles=roles,
        head=head,
        post_norm=any(reading.post for _, reading in survey.read) and not whole_blocks,
        notes=notes,
    )


# ---------------------------------------------------------------------- branches


def _branches_of(call: BlockCall, reading: Any, whole: bool) -> list[Branch]:
    layers = [inner for inner in call.calls if is_weight_layer(inner.module)]
    if whole:
        names = _matrices(call.name, layers)
        last = layers[-1] if layers else None
        width = _channels(last)[0] if last else 1
        inputs = _inputs(call.name, call.calls)
        return [Branch(call.name, call.name, names, names[-1] if names else None, width, -1, inputs, whole=True)]
    if reading.trouble is not None or not reading.skip or not reading.ends:
        raise UnreadableModelError(_unreadable_message(call, reading))
    found, used = [], -1
    for end in sorted(reading.ends, key=lambda end: end.order):
        mine = [inner for inner in call.calls if used < inner.order <= end.order]
        used = end.order
        names, last = _layers_of(call, end, [inner for inner in mine if is_weight_layer(inner.module)])
        width, channel = _channels(end, last)
        inputs = _inputs(call.name, mine)
        projection = names[-1] if names else None
        found.append(Branch(call.name, _join(call.name, end.name), names, projection, width, channel, inputs))
    return found


def _layers_of(call: BlockCall, end: ModuleCall, mine: list[ModuleCall]) -> tuple[tuple[str, ...], ModuleCall | None]:
    """Return the names of a branch's matrices, the last one last, and the call of that one if it was called."""
    names = _matrices(call.name, mine)
    prefix = _join(call.name, end.name)
    below = tuple(_join(prefix, name) for name, p in end.module.named_parameters() if p.dim() >= 2)
    # A gate or a router may be called last, but writes no channels of the stream: it is not the last layer.
    last = next((layer for layer in reversed(mine) if layer.shape[-1] > 1 and _writes(layer, end)), None)
    if last is None or _matrices(call.name, [end]):
        # The end multiplies by matrices of its own: the last layer itself, experts, nn.MultiheadAttention.
        return (*(name for name in names if name not in below), *below), last if last is end else None
    projection = _matrices(call.name, [last])
    return (*(name for name in names if name not in projection), *projection), last


def _writes(layer: ModuleCall, end: ModuleCall) -> bool:
    """Whether a layer's channels are as many as a dimension of the end's output."""
    return _channels(layer)[0] in end.shape[1:]


def _matrices(block: str, layers: Sequence[ModuleCall]) -> tuple[str, ...]:
    names = [
        _join(_join(block, layer.name), name)
        for layer in layers
        for name, p in layer.module.named_parameters(recurse=False)
        if p.dim() >= 2
    ]
    return tuple(dict.fromkeys(names))


def _inputs(block: str, calls: Sequence[ModuleCall]) -> tuple[str, ...]:
    names = [
        _join(block, call.name)
        for call in calls
        if is_weight_layer(call.module)
        or (not call.module._modules and type(call.module).__module__.endswith((".activation", "activations")))
    ]
    return tuple(dict.fromkeys(names))


def _channels(end: ModuleCall, last: ModuleCall | None = None) -> tuple[int, int]:
    """Return the number of channels of a call's output, and their dimension."""
    shape = end.shape
    if len(shape) < 3:
        return shape[-1], -1
    if isinstance(end.module, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return shape[1], 1
    if is_weight_layer(end.module) or last is None:
        return shape[-1], -1
    width = _channels(last)[0]
    return width, -1 if shape[-1] == width else next((i for i, size in enumerate(shape) if size == width), -1)


def _unreadable_message(call: BlockCall, reading: Any) -> str:
    if reading.trouble is not None:
        why = (
            f"what it adds to the stream ends in the operation {reading.trouble!r}, which is neither linear nor the "
            "output of a module of its own, so there is nothing to multiply"
        )
    elif not reading.skip:
        why = "its input does not reach its output unchanged, so it has no skip connection"
    else:
        why = "nothing was found that it adds to the stream"
    return (
        f"Block {call.name!r} ({anatomy.title(call.module)}) cannot be read: {why}. Make that operation a module "
        "(nn.Tanh() rather than torch.tanh), or take the block as one branch with whole_blocks=True, which "
        "computes x + m (block(x) - x)."
    )


class _Zero:
    """A hook that multiplies the end of a branch by 0."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return scaled_output(output, 0.0)


class _Checker(BlockRecorder):
    def __init__(self, name: str, block: nn.Module, counter: Iterator[int]) -> None:
        super().__init__(name, block, counter)
        self.fault: str | None = None

    def done(self, call: BlockCall, start: Any, value: Tensor) -> None:
        output = call.output
        assert output is not None  # the first run has seen it
        if not torch.isfinite(value).all():
            return
        after = (output.detach() - value).abs().max() if output.numel() else 0.0
        if float(after) == 0.0:
            return
        weights = [p for p in self.block.parameters() if p.dim() >= 2 and p.requires_grad]
        grads = torch.autograd.grad(output.square().sum(), weights, allow_unused=True) if weights else ()
        if any(g is not None and bool((g != 0).any()) for g in grads):
            self.fault = "still depends on its matrices when all branches that were found are multiplied by 0"


def _check_by_zero(model: nn.Module, named: dict[str, nn.Module], branches: Sequence[Branch], survey: Survey) -> None:
    """Multiply the branches by 0 and see that nothing of them is left."""
    if any(p.is_meta for p in model.parameters()):
        return
    post = {call.name for call, reading in survey.read if reading.post}
    handles: list[Any] = []
    for end in dict.fromkeys(branch.end for branch in branches):
        handles.append(wrapped_core(model.get_submodule(end)).register_forward_hook(_Zero()))
    checkers = [_Checker(name, block, itertools.count()) for name, block in named.items()]
    try:
        with quiet(model):
            call(model, survey.batch)
    finally:
        for handle in [*handles, *checkers]:
            handle.remove()
    for checker in checkers:
        if checker.fault is not None:
            kind = "post-norm" if checker.name in post else "residual"
            raise UnreadableModelError(
                f"Block {checker.name!r} ({anatomy.title(checker.block)}), read as a {kind} block, {checker.fault}. "
                "Take each block as one branch with whole_blocks=True, or leave this one out with blocks=[...]."
            )


# ---------------------------------------------------------------------- roles


def _roles(
    model: nn.Module, named: dict[str, nn.Module], branches: Sequence[Branch], survey: Survey
) -> tuple[dict[str, Role], str | None]:
    called = {call.order for call in survey.blocks}
    first, last = min(called), max(called)
    head = next((name for name, m, order in reversed(survey.outside) if order > last and is_weight_layer(m)), None)
    stem = next((name for name, m, order in survey.outside if order < first and is_weight_layer(m)), None)
    when = {id(module): order for _, module, order in reversed(survey.outside)}
    blocks = {id(module): name for name, block in named.items() for module in block.modules()}
    projections = {id(model.get_parameter(b.projection)) for b in branches if b.projection is not None}
    above = {id(m) for m in model.modules() if any(id(inner) in blocks for inner in m.modules())} - set(blocks)
    roles: dict[int, Role] = {}
    for module_name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if id(p) in roles:
                continue
            if id(module) in blocks:
                roles[id(p)] = _role_inside(module, p, projections)
            elif p.dim() < 2:
                roles[id(p)] = "vector"
            elif module_name == stem or isinstance(module, nn.Embedding | nn.EmbeddingBag) or id(module) in above:
                roles[id(p)] = "embedding"
            elif module_name == head:
                roles[id(p)] = "head"
            elif not is_weight_layer(module) and when.get(id(module), last) < first:
                roles[id(p)] = "embedding"  # class tokens and positions that an embedding module holds itself
            else:
                roles[id(p)] = "between"
    return {name: roles[id(p)] for name, p in model.named_parameters()}, head


def _role_inside(module: nn.Module, p: nn.Parameter, projections: set[int]) -> Role:
    if p.dim() >= 2:
        groups = getattr(module, "groups", 1)
        depthwise = isinstance(module, nn.modules.conv._ConvNd) and groups > 1 and groups == module.in_channels
        if depthwise or isinstance(module, nn.Embedding):
            return "narrow"
        return "projection" if id(p) in projections else "hidden"
    is_norm = isinstance(module, nn.modules.batchnorm._NormBase) or "norm" in anatomy.title(module).lower()
    return "norm" if is_norm else "bias"


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name and inner else name or inner


def scaled_output(output: Any, factor: float | Tensor) -> Any:
    """Return a module's output with its first tensor multiplied.

    Raises:
        TypeError: if it is neither a tensor nor a tuple or list that begins with one.
    """
    if isinstance(output, Tensor):
        return output * factor
    if isinstance(output, tuple) and type(output) is tuple:
        return (output[0] * factor, *output[1:])
    if isinstance(output, list):
        return [output[0] * factor, *output[1:]]
    raise TypeError(f"the end of a residual branch returned a {type(output).__name__}, not a tensor or a tuple")
