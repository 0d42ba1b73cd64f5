"""Samples as a model takes them: one tensor, a tuple of positional ones, or a dictionary of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from abyssal.tangent.modes import normal
from abyssal.util.checks import WrongKindError

__all__ = ["Batch", "cut"]


def cut(start: int, stop: int, step: int) -> list[slice]:
    """Return the blocks of `step` samples, or fewer at the end."""
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


@dataclass(frozen=True)
class Batch:
    """Samples along the first dimension of every tensor.

    Attributes:
        names: of keyword arguments, or positions of positional ones, in order.
        values: the arguments.
        n: samples.
    """

    names: tuple[str | int, ...]
    values: tuple[Any, ...]
    n: int

    @classmethod
    def of(cls, x: Any, what: str) -> Batch:
        """Take apart what a user gives.

        Args:
            x: a tensor [n, ...], a tuple or list of tensors, or a mapping of them; what is no tensor goes to the
                model as it is. A batch is returned as it is.
            what: the argument's name, for errors.

        Raises:
            WrongKindError: for anything else.
            ValueError: where there are no samples, or not equally many.
        """
        if isinstance(x, Batch):
            return x
        given: dict[str | int, Any] = {}
        if isinstance(x, Tensor):
            given = {0: x}
        elif isinstance(x, Mapping):
            given = dict(x)
        elif isinstance(x, tuple | list):
            given = dict(enumerate(x))
        sizes = {name: tuple(v.shape) for name, v in given.items() if isinstance(v, Tensor)}
        if not sizes:
            held = " that holds no tensor" if isinstance(x, Mapping | tuple | list) else ""
            raise WrongKindError(
                f"{what} has to be a tensor [n, ...], a tuple of tensors or a dictionary of keyword arguments, got "
                f"{type(x).__name__}{held}."
            )
        if any(not shape for shape in sizes.values()) or len({shape[0] for shape in sizes.values()}) > 1:
            raise ValueError(
                f"The first dimension of every tensor in {what} counts the samples, but the shapes are {sizes}. Repeat "
                "what all samples share, or put it into the model."
            )
        n = next(iter(sizes.values()))[0]
        if n == 0:
            raise ValueError(f"{what} has no samples: shape {next(iter(sizes.values()))}.")
        return cls(tuple(given), tuple(given.values()), n).mapped(lambda t: normal(t).detach())

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [v for v in self.values if isinstance(v, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """Return a batch with other tensors in their places."""
        given = iter(tensors)
        values = tuple(next(given) if isinstance(v, Tensor) else v for v in self.values)
        return Batch(self.names, values, len(tensors[0]))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch with what a function makes of every tensor."""
        return replace(self, values=tree_map_only(Tensor, function, self.values))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Return it on a device, and floating-point tensors in a type where one is given."""
        return self.mapped(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments."""
        if all(isinstance(name, int) for name in self.names):
            return self.values, {}
        return (), {str(name): v for name, v in zip(self.names, self.values, strict=True)}

    def __getitem__(self, rows: slice) -> Batch:
        """Return some of the samples."""
        values = tuple(v[rows] if isinstance(v, Tensor) else v for v in self.values)
        return Batch(self.names, values, len(range(*rows.indices(self.n))))
