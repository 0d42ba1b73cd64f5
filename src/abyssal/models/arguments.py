"""A block's arguments and outputs: which tensor is the residual stream, and how the others are kept."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from abyssal.models.patch import Patch


class Slot(NamedTuple):
    """Where in a call the residual stream stands: a position or a keyword."""

    key: int | str

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the stream of this call."""
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]


def find_stream(args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any]) -> Slot | None:
    """Find the residual stream: the first (dense) tensor argument, keywords in the order of `forward`'s signature."""
    for i, value in enumerate(args):
        if _may_be_stream(value):
            return Slot(i)
    tensors = [name for name, value in kwargs.items() if _may_be_stream(value)]
    if len(tensors) > 1:
        order = _parameter_names(getattr(forward, "__func__", forward))
        tensors.sort(key=lambda name: order.index(name) if name in order else len(order))
    return Slot(tensors[0]) if tensors else None


def _may_be_stream(value: object) -> bool:
    return isinstance(value, Tensor) and (value.layout is torch.strided or value.layout is torch.jagged)


# Weak: an instance's own forward (accelerate's, a compiled one) holds its module and all of its parameters.
_known_names: weakref.WeakKeyDictionary[Callable[..., Any], list[str]] = weakref.WeakKeyDictionary()


def _parameter_names(forward: Callable[..., Any]) -> list[str]:
    names = _known_names.get(forward)
    if names is None:
        try:
            names = list(inspect.signature(forward).parameters)
        except (TypeError, ValueError):
            names = []
        _known_names[forward] = names
    return names


class Given(NamedTuple):
    """What one call of a block was given.

    Attributes:
        args, kwargs: as they were passed, less an empty cache of keys and values.
        slot, stream: where the residual stream stands, and what it is, [*stream]; None if no argument is a tensor.
        why_once: why the block must not be run again with them, or nothing.
        dropped: whether an empty cache was.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: Slot | None
    stream: Tensor | None
    why_once: str = ""
    dropped: bool = False


_FIRST = Slot(0)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any], block: Patch) -> Given:
    """Read what a block is called with, so that it can be run again.

    Args:
        args: positional ones.
        kwargs: keywords.
        block: what stands in for the forward, whose signature tells the order of the keywords.
    """
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].layout is torch.strided:  # as a rule
        return Given(args, kwargs, _FIRST, args[0])
    slot = find_stream(args, kwargs, block.__wrapped__)
    if slot is None:
        return Given(args, kwargs, None, None, "no argument is a tensor")
    stream = slot.get(args, kwargs)
    args, kwargs, why, dropped = without_caches(args, kwargs, block.module)
    if not why and (hidden := hidden_graph(args, kwargs)):
        why = f"an argument of type {hidden} holds tensors that need gradients"
    return Given(args, kwargs, slot, stream, why, dropped)


def without_caches(
    args: tuple[Any, ...], kwargs: dict[str, Any], block: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any], str, bool]:
    """Return the arguments without empty caches, which running the block again would fill twice.

    Returns:
        The positional and the keyword ones; why the block must not be run again with them, or nothing; whether a cache
        was taken out.
    """
    caches = find_caches(args, kwargs, block)
    if why := next(filter(None, caches.values()), ""):
        return args, kwargs, why, False
    for key in caches:
        if isinstance(key, int):
            args = (*args[:key], None, *args[key + 1 :])
        else:
            kwargs = {**kwargs, key: None}
    if caches and kwargs.get("use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs, "", bool(caches)


class _Other(NamedTuple):
    """A tensor argument besides the stream, detached: in a cell, a graph would keep itself alive."""

    tensor: Tensor
    requires_grad: bool
    version: int


class _Hole:
    """Stands where the stream goes."""


_HOLE = _Hole()


class OtherArguments:
    """All arguments of one call but the stream, detached from the graph, to call the block with again."""

    __slots__ = ("_leaves", "_spec")

    def __init__(self, given: Given) -> None:
        """Keep what was given, with a hole for the stream.

        Nothing is copied: a mask is the same tensor in every block. A later in-place change is noticed.
        """
        # One tensor may stand in several places, and blocks ask (attention: `key is value`): it stays one.
        kept: dict[int, object] = {id(given.stream): _HOLE}
        leaves, self._spec = pytree.tree_flatten((given.args, given.kwargs))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) not in kept:
                version = -1 if leaf.is_inference() else leaf._version
                kept[id(leaf)] = _Other(leaf.detach(), leaf.requires_grad, version)
        self._leaves = [kept[id(leaf)] if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def with_stream(self, stream: Tensor, block: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return `(args, kwargs)` with `stream` in its place; tensors need gradients where they did.

        Raises:
            RuntimeError: if a tensor argument was changed in place since the forward pass.
        """
        opened: dict[int, Tensor] = {id(_HOLE): stream}
        for leaf in self._leaves:
            if isinstance(leaf, _Other) and id(leaf) not in opened:
                opened[id(leaf)] = _reopened(leaf, block)
        args, kwargs = pytree.tree_unflatten([opened.get(id(leaf), leaf) for leaf in self._leaves], self._spec)
        return args, kwargs


def _reopened(leaf: _Other, block: str) -> Tensor:
    if leaf.version >= 0 and leaf.tensor._version != leaf.version:
        raise RuntimeError(
            f"an argument of block {block!r} (a tensor of shape {tuple(leaf.tensor.shape)}, besides the residual "
            "stream) was changed in place between the forward and the backward pass, which has to run the block "
            "again with it. Change a copy instead, or give this block the policy abyssal.Store()."
        )
    return leaf.tensor.detach().requires_grad_(leaf.requires_grad)


def hidden_graph(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Name the type of an argument that hides graph-connected tensors where they cannot be detached, if any."""
    if not kwargs and all(isinstance(value, Tensor) for value in args):
        return None
    for leaf in pytree.tree_leaves((args, kwargs)):
        if not isinstance(leaf, (Tensor, *_PLAIN)) and _reaches(leaf, _is_in_graph):
            return type(leaf).__name__
    return None


_PLAIN: Any = (int, float, complex, str, bytes, bool, type, torch.dtype, torch.device, nn.Module, type(None))


def _is_in_graph(tensor: Tensor) -> bool:
    return tensor.requires_grad and not tensor.is_leaf


def _reaches(value: Any, is_sought: Callable[[Tensor], bool], depth: int = 4, seen: set[int] | None = None) -> bool:
    """Whether such a tensor is within `depth` steps: items, attributes, slots, closures, partials."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return is_sought(value)
    if isinstance(value, _PLAIN) or id(value) in seen or depth < 0 or len(seen) > 10_000:
        return False
    seen.add(id(value))
    return any(_reaches(part, is_sought, depth - 1, seen) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    for cell in (value.__closure__ or ()) if isinstance(value, types.FunctionType) else ():
        with contextlib.suppress(ValueError):  # not filled yet
            yield cell.cell_contents
    if isinstance(value, types.MethodType):
        yield value.__self__
    yield from (_attribute(value, "__dict__") or {}).values()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__"):
                yield _attribute(value, name)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute of an object of whatever kind, None where it has none: asking must not end a step."""
    try:
        return getattr(value, name, None)
    except Exception:
        return None


def find_caches(args: tuple[Any, ...], kwargs: dict[str, Any], block: nn.Module) -> dict[int | str, str]:
    """Find the objects among the arguments that the block writes to: caches of keys and values, or of other states.

    They are known by what they can do: take updates or, as transformers' `Cache` does, tell their length. Only one of
    the latter kind may be empty, for which a block takes None. It is where it holds nothing of the block's own layers:
    the layers below may not be reconstructed, and have filled theirs.

    Returns:
        By position or keyword: why the block must not be run again with it; nothing of an empty cache.
    """
    passed: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    found = {key: value for key, value in passed if _can(value, *_UPDATES, _LENGTH)}
    if not found:
        return {}
    numbers = (getattr(module, "layer_idx", None) for module in block.modules())
    layers: set[int | None] = {number for number in numbers if isinstance(number, int)}
    return {key: _why_not_again(value, layers or {None}) for key, value in found.items()}


_LENGTH = "get_seq_length"
_UPDATES = ("update", "update_conv_state", "update_recurrent_state", "update_ssm_state")


def _can(value: Any, *names: str) -> bool:
    if isinstance(value, (Tensor, Mapping, Set, *_PLAIN)):
        return False
    return any(callable(_attribute(value, name)) for name in names)


def _why_not_again(cache: Any, layers: set[int | None]) -> str:
    if not _can(cache, _LENGTH):
        return f"an object of type {type(cache).__name__} was passed, which takes updates, and would take them twice"
    if not all(_is_empty(cache, layer) for layer in layers):
        return "a key-value cache that is not empty was passed, and would grow when the block is re-run"
    return ""


def _is_empty(cache: Any, layer: int | None) -> bool:
    """Whether a cache is known to hold nothing of this layer, or of any."""
    long = _told(cache, _LENGTH, *(() if layer is None else (layer,)))
    if long:
        return False
    known = long is not None
    for part in _parts(cache):
        if _can(part, _LENGTH):  # the encoder's and the decoder's, in one
            if not _is_empty(part, layer):
                return False
        elif isinstance(part, Mapping | list | tuple):  # by layer
            held = part if isinstance(part, Mapping) else dict(enumerate(part))
            entries = [value for key, value in held.items() if layer is None or key == layer]
            if any(map(_is_filled, entries)):
                return False
            known = known or bool(entries)
        elif _is_filled(part):
            return False
    return known


def _is_filled(entry: Any) -> bool:
    """Whether a layer of a cache says that it has something to remember, or may have, since it holds tensors."""
    told = [said for name in (_LENGTH, "has_previous_state") if (said := _told(entry, name)) is not None]
    return any(told) if told else _reaches(entry, lambda tensor: tensor.numel() > 0)


def _told(value: Any, name: str, *layer: int) -> bool | None:
    """Ask an object, which need not answer: a layer that holds no keys has no length."""
    try:
        said = getattr(value, name)
        said = said(*layer) if callable(said) else said
        return any(said.values()) if isinstance(said, Mapping) else bool(said)
    except Exception:
        return None
