"""Surgery on chains of blocks: members of a container copied, multiplied, put back, and what counts them told.

What a member shares with the model around it (a parameter, a module, a configuration object) its copies share too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from abyssal.models import anatomy
from abyssal.models.patch import changes

__all__ = [
    "Call",
    "Ends",
    "RefineError",
    "check_plain",
    "copied",
    "first_calls",
    "fold_",
    "foldable",
    "interpolate_",
    "offsets_of",
    "put",
    "renumber",
    "surroundings",
    "tensors",
]

_INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
_AFFINE = frozenset(("weight", "bias"))

Ends: TypeAlias = "Mapping[str, Mapping[str, float]]"
"""By the name of the end of a branch: its parameters that multiply its output, each with its offset."""
Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"


class RefineError(ValueError):
    """A model that cannot be untied or deepened; the message says what stands in the way and what to do."""


def check_plain(model: nn.Module, what: str) -> None:
    """Raise unless a model is as its author built it: not wrapped, sharded, reconstructed or scaled.

    Raises:
        TypeError: if it is no module.
        RefineError: saying what has to be undone first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} takes a torch.nn.Module, got a {type(model).__name__}.")
    for name, module in model.named_modules():
        where = f"Module {name!r}" if name else "The model"
        if (change := next(changes(module), None)) is not None:
            raise RefineError(
                f"{where} is under {change.made_by}, which knows its present depth and blocks. Call "
                f"{change.undone_by} before {what}, and {change.made_by} on the result."
            )
        if anatomy.unwrap("", module)[1] is not module or vars(module).get("_compiled_call_impl") is not None:
            raise RefineError(
                f"{where} is wrapped by torch.compile, activation checkpointing or FSDP. {what} the plain model, and "
                "wrap the result."
            )
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "device_mesh")), None)
    if sharded is not None or type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        raise RefineError(f"The model is wrapped in DDP or sharded. {what} the plain model, and wrap the result.")


# ---------------------------------------------------------------------- containers


def put(container: nn.Module, members: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """Fill a container anew and return the keys: numbers where it had numbers, else old keys with a suffix.

    Args:
        container: a list, sequence or dict of modules.
        members: the key that each one, or what it is a copy of, had before; and the module.
    """
    before = list(container._modules)
    numbered = before == [str(n) for n in range(len(before))]
    keys: list[str] = []
    for n, (key, _) in enumerate(members):
        fresh, suffix = str(n) if numbered else key, 1
        while fresh in keys:
            fresh, suffix = f"{key}_{suffix}", suffix + 1
        keys.append(fresh)
    container._modules.clear()
    container._modules.update(zip(keys, (module for _, module in members), strict=True))
    return keys


def renumber(container: nn.Module, was: Mapping[int, int]) -> None:
    """Set the position that modules say they have (`layer_idx` and the like).

    Args:
        container: as it is now.
        was: the position that each member, by id, or what it is a copy of, had before.
    """
    uses = Counter(map(id, container._modules.values()))
    for now, member in enumerate(container._modules.values()):
        before = was.get(id(member))
        if member is None or before is None or uses[id(member)] > 1:  # what stands in several places has none
            continue
        for module in member.modules():
            for name in _INDICES:
                said = module.__dict__.get(name)
                # Some count from 1. A number that was not the position is not a position.
                if isinstance(said, int) and not isinstance(said, bool) and said - before in (0, 1):
                    setattr(module, name, now + said - before)


# ---------------------------------------------------------------------- copies


def surroundings(model: nn.Module, members: Iterable[nn.Module]) -> dict[int, Any]:
    """Return what is reached in a model without going through `members`, by id: a memo for `copy.deepcopy`."""
    inside = {id(member) for member in members}
    known: dict[int, Any] = {}
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in known or id(module) in inside:
            continue
        known[id(module)] = module
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                known[id(tensor)] = tensor
        for value in module.__dict__.values():  # configurations, which the layers of transformers hold, too
            if hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | Mapping | type):
                known[id(value)] = value
        stack += [child for child in module._modules.values() if child is not None]
    return known


def copied(member: nn.Module, around: Mapping[int, Any]) -> nn.Module:
    """Return a copy of a module that shares with its surroundings what the module shares."""
    return copy.deepcopy(member, dict(around))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, shared ones under each of their names."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


@torch.no_grad()
def interpolate_(target: nn.Module, start: nn.Module, end: nn.Module, part: float) -> None:
    """Put `(1 - part) start + part end` into the parameters and buffers that the target shares with neither."""
    first, second = tensors(start), tensors(end)
    for name, tensor in tensors(target).items():
        if tensor is not first[name] and tensor is not second[name] and tensor.is_floating_point():
            tensor.copy_(torch.lerp(first[name], second[name], part))


# ---------------------------------------------------------------------- folding


def foldable(end: nn.Module) -> list[str] | None:
    """Return the parameters, by name, that may multiply a module's output together; None if none are known to.

    Names are no proof: see :func:`offsets_of`. Known are torch.nn's linear and convolutional layers, transformers'
    Conv1D, norms with gains, per-channel scales, nn.MultiheadAttention, transformers' packed experts, and PEFT's LoRA
    layers.
    """
    own = [name for name, p in end._parameters.items() if p is not None]
    if any(not end._parameters[name].is_floating_point() for name in own):  # type: ignore[union-attr]
        return None
    if isinstance(end, nn.MultiheadAttention):
        return [f"out_proj.{name}" for name in foldable(end.out_proj) or ()]
    if isinstance(base := end._modules.get("base_layer"), nn.Module) and "lora_B" in end._modules:
        adapters = [f"lora_B.{name}" for name, _ in end.get_submodule("lora_B").named_parameters()]
        inner = foldable(base)
        return None if inner is None else [*(f"base_layer.{name}" for name in inner), *adapters]
    title = anatomy.title(end).lower()
    if "experts" in title and "down_proj" in own:  # a mixture's, as transformers packs them
        return [name for name in own if name.startswith("down_proj")]
    if end._modules or not own:
        return None
    linear = isinstance(end, nn.Linear | nn.modules.conv._ConvNd) or title == "conv1d"
    if set(own) <= _AFFINE and "weight" in own and (linear or "norm" in title):
        return own
    return own if "scale" in title and len(own) == 1 else None


def first_calls(model: nn.Module, names: Iterable[str], run: Callable[[], Any]) -> dict[str, Call]:
    """Run something, and return what modules were first called with, by name: copies of their arguments."""
    found: dict[str, Call] = {}

    def keep(name: str, args: Any, kwargs: Any) -> None:
        if name not in found:
            found[name] = _cloned((args, kwargs))

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, __, name=name: keep(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def offsets_of(end: nn.Module, names: Sequence[str], call: Call) -> dict[str, float] | None:
    """Measure how parameters multiply a module's output: `share` times, if each p becomes `share (p + c) - c`.

    Args:
        end: in eval mode; it is left as it is.
        names: of the parameters that are to be changed.
        call: arguments and keyword arguments that the module can be called with.

    Returns:
        The c of each: 0 but for the gains of norms that multiply by `1 + weight`, as Gemma's do. None if neither
        multiplies the output.
    """
    kept = {name: end.get_parameter(name).clone() for name in names}

    def output(offsets: Mapping[str, float], share: float) -> Tensor:
        for name, offset in offsets.items():
            end.get_parameter(name).copy_(_folded(kept[name], share, offset))
        args, kwargs = _cloned(call)
        # Its forward, and not itself: hooks are of no concern here.
        found = end.forward(*args, **kwargs)
        return (found if isinstance(found, Tensor) else found[0]).double()

    gains = [name for name in names if name.rpartition(".")[2] == "weight"]
    nothing = dict.fromkeys(names, 0.0)
    try:
        if not output(nothing, 1.0).any():  # an input of 0 would show nothing
            call = tree_map_only(Tensor, _other, call)
        for offsets in (nothing, nothing | dict.fromkeys(gains, 1.0)):
            whole, half, none = (output(offsets, share) for share in (1.0, 0.5, 0.0))
            eps, size = torch.finfo(kept[names[0]].dtype).eps, float(whole.norm())
            # Without a share nothing may be left, which is so without rounding; half of it is rounded by an offset.
            if float(none.norm()) <= 4 * eps * size and float((half - whole / 2).norm()) <= eps**0.5 * size:
                return offsets
        return None
    finally:
        for name, value in kept.items():
            end.get_parameter(name).copy_(value)


def _cloned(call: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.detach().clone(), call)


def _other(x: Tensor) -> Tensor:
    """Return other values where they are floating; by no generator, which may be the user's."""
    return torch.arange(x.numel(), device=x.device).cos().reshape(x.shape).to(x.dtype) if x.is_floating_point() else x


def _folded(p: Tensor, share: float, offset: float) -> Tensor:
    return (p + offset) * share - offset if offset else p * share


@torch.no_grad()
def fold_(target: nn.Module, source: nn.Module, ends: Ends, share: float) -> None:
    """Give the ends of a block's branches `share` times another block's weights.

    Args:
        target: the block to change.
        source: where the weights are taken from; may be the target itself.
        ends: the parameters to be multiplied, and the number that has to be added to each before, by the name of the
            end.
        share: the factor.
    """
    for end, offsets in ends.items():
        for name, offset in offsets.items():
            inner = f"{end}.{name}" if end else name
            target.get_parameter(inner).copy_(_folded(source.get_parameter(inner), share, offset))
