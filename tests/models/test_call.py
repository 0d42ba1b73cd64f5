"""A model is called with a batch of any kind, on the device where the model is."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abyssal.models.call import arguments, call
from abyssal.nn import deepen, residual_mlp
from abyssal.scaling import read_model
from abyssal.testing import check_model


class _Dictionary(dict[str, Any]):
    pass


class _List(list[Any]):
    pass


@dataclass
class _Graph:
    x: Tensor


class _OnGraphs(nn.Module):
    """Takes one object that is no tensor, as models of graphs do."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = residual_mlp(3, 4)

    def forward(self, graph: _Graph) -> Tensor:
        out: Tensor = self.stack(graph.x)
        return out


class _Where(nn.Module):
    """Returns the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, x: Any) -> torch.device:
        tensor: Tensor = x[0] if isinstance(x, tuple) else x
        return tensor.device


X = torch.ones(2)


@pytest.mark.parametrize(
    "batch",
    [X, (X,), [X], {"x": X}, _Dictionary(x=X), UserDict(x=X), _List([X]), {"x": (X, 1)}],
    ids=["tensor", "tuple", "list", "dict", "own dict", "UserDict", "own list", "nested"],
)
def test_tensors_of_any_batch_are_moved_to_the_model(batch: Any) -> None:
    assert call(_Where(), batch) == torch.device("meta")


@pytest.mark.parametrize(
    "use",
    [call, check_model, read_model, lambda model, batch: deepen(model, 2, batch=batch)],
    ids=["call", "check_model", "read_model", "deepen"],
)
def test_a_batch_of_its_own_type_is_the_only_argument(use: Callable[[nn.Module, Any], Any]) -> None:
    use(_OnGraphs(), _Graph(torch.randn(2, 4)))


def test_arguments_refuses_what_hides_its_tensors() -> None:
    with pytest.raises(TypeError, match="got _Graph"):
        arguments(_Graph(X))
