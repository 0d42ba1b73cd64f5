"""Samples as a model takes them: one tensor, a tuple of positional ones, or a dictionary of keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from abyssal.tangent.modes import normal

__all__ = ["Batch"]


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
                model as it is.
            what: the argument's name, for errors.

        Raises:
            TypeError: for anything else.
            ValueError: where there are no samples, or not equally many.
        """
        names: tuple[str | int, ...]
        values: tuple[Any, ...]
        if isinstance(x, Tensor):
            names, values = (0,), (x,)
        elif isinstance(x, Mapping):
            names, values = tuple(x), tuple(x.values())
        elif isinstance(x, tuple | list):
            names, values = tuple(range(len(x))), tuple(x)
        else:
            raise TypeError(
                f"{what} has to be a tensor [n, ...], a tuple of tensors or a dictionary of keyword arguments, got "
                f"{type(x).__name__}."
            )
        sizes = {name: tuple(v.shape) for name, v in zip(names, values, strict=True) if isinstance(v, Tensor)}
        if not sizes:
            raise ValueError(f"{what} holds no tensor: expected samples along the first dimension of tensors.")
        if any(not shape for shape in sizes.values()) or len({shape[0] for shape in sizes.values()}) > 1:
            raise ValueError(
                f"The first dimension of every tensor in {what} counts the samples, but the shapes are {sizes}. Repeat "
                "what all samples share, or put it into the model."
            )
        n = next(iter(sizes.values()))[0]
        if n == 0:
            raise ValueError(f"{what} has no samples: shape {next(iter(sizes.values()))}.")
        return cls(names, tuple(normal(v).detach() if isinstance(v, Tensor) else v for v in values), n)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [v for v in self.values if isinstance(v, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with other tensors in their places."""
        given = iter(tensors)
        values = [next(given) if isinstance(v, Tensor) else v for v in self.values]
        if all(isinstance(name, int) for name in self.names):
            return tuple(values), {}
        return (), {str(name): v for name, v in zip(self.names, values, strict=True)}

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments."""
        return self.with_tensors(self.tensors)

    def __getitem__(self, rows: slice) -> Batch:
        """Return some of the samples."""
        values = tuple(v[rows] if isinstance(v, Tensor) else v for v in self.values)
        return Batch(self.names, values, len(range(*rows.indices(self.n))))
