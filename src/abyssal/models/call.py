"""Calling a model with a batch, and what it returns: the tensor it is about, the scalar to differentiate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Loss", "arguments", "call", "first_tensor", "has_loss", "outputs_of", "scalar_loss", "unpacked"]

Loss = Callable[[Any], Any]
"""`loss(output) -> scalar`."""


def unpacked(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as positional and keyword arguments; what is no mapping, tuple or list is the only argument."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as `unpacked` does, of those kinds alone whose tensors can be found.

    Raises:
        TypeError: if it is neither a mapping, a tuple, a list nor a tensor.
    """
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise TypeError(
            "batch: expected a dictionary of keyword arguments, a tuple of positional ones or one tensor, which the "
            f"model is called with; got {type(batch).__name__}."
        )
    return unpacked(batch)


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch, whose tensors are moved to where the model is."""
    args, kwargs = unpacked(batch)  # first, since to pytree a subclass of dict or list is a leaf
    like = next(itertools.chain(model.parameters(), model.buffers()), None)
    if like is not None:
        args, kwargs = pytree.tree_map_only(Tensor, lambda value: value.to(like.device), (args, kwargs))
    return model(*args, **kwargs)


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor of a module's output: a tensor, tuple, list, dict or ModelOutput; None without one."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return next((found for item in output if (found := first_tensor(item)) is not None), None)
    return None


def outputs_of(output: Any) -> Tensor | None:
    """Return the tensor that a model's output is about: its logits, else the first floating-point one, if any."""
    if isinstance(output, Tensor):
        return output
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    found = list(_floating(output))
    return next((value for value in found if value.dim()), found[0] if found else None)


def _floating(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of mappings, tuples and lists within one another."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _floating(part)


def has_loss(output: Any, loss: Loss | None) -> bool:
    """Whether there is a loss to speak of: a function was given, or the model returns one."""
    if loss is not None or (isinstance(output, Tensor) and output.dim() == 0):
        return True
    return isinstance(_own_loss(output), Tensor)


def _own_loss(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def scalar_loss(output: Any, loss: Loss | None) -> Tensor:
    """Return the scalar to differentiate.

    Raises:
        TypeError: if there is none; the message says what the model, or `loss`, returned.
    """
    if loss is not None:
        value = loss(output)
        source = "loss(output)"
    elif isinstance(output, Tensor) and output.ndim == 0:
        value, source = output, "the model"
    else:
        value = _own_loss(output)
        source = "the output's loss"
        if value is None:
            raise TypeError(
                f"the model returned {_in_words(output)}, which has no `loss`. Pass loss=, a function that makes a "
                "scalar of the model's output, or, for a Hugging Face model, put labels into the batch."
            )
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"{source} is {_in_words(value)}; expected a scalar tensor, such as the mean over the batch.")
    if not value.requires_grad:
        raise TypeError(f"{source} does not depend on any parameter that needs a gradient.")
    return value.reshape(())


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
