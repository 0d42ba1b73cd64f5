"""What a model is called with, and the scalar to differentiate, whatever it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Loss", "arguments", "scalar_loss"]

Loss = Callable[[Any], Any]
"""`loss(output) -> scalar`."""


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as positional and keyword arguments, its tensors detached.

    Raises:
        TypeError: if it is neither a mapping, a tuple, a list nor a tensor.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    elif isinstance(batch, tuple | list):
        args = tuple(batch)
    else:
        raise TypeError(
            "batch: expected a dictionary of keyword arguments, a tuple of positional ones or one tensor, which the "
            f"model is called with; got {type(batch).__name__}."
        )
    detached: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    return detached


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
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
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
