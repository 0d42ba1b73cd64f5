"""The weights that one call saw: checked and put back for each later run of it.

Optimisers change weights in place, which no later run can undo: it is refused. Replaced (`functional_call`, a new
Parameter) or frozen since, they are put back meanwhile: what autograd saves depends on which of them need gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Weight(NamedTuple):
    """One parameter of one module during a call.

    Attributes:
        owner, name: where it was registered.
        found: the tensor: a Parameter, or what `functional_call` put in its place.
        version: of it.
        needed: whether it needed gradients.
    """

    owner: nn.Module
    name: str
    found: Tensor
    version: int
    needed: bool

    @property
    def has_changed(self) -> bool:
        """Whether it is to be put back."""
        if self.owner._parameters.get(self.name) is self.found:  # as a rule
            return self.found.requires_grad is not self.needed
        return self.found.requires_grad is not self.needed or self.is_replaced

    @property
    def is_replaced(self) -> bool:
        """Whether another plain tensor stands in its place. What shards weights (DTensor) exchanges them itself."""
        now = self.owner._parameters.get(self.name)
        return now is not self.found and type(now) in _PLAIN and self.found.untyped_storage().nbytes() > 0


_PLAIN = (nn.Parameter, Tensor)


def weights_of(modules: Iterable[nn.Module]) -> list[Weight]:
    """Note the weights of some modules as they are now."""
    found = ((m, name, p) for m in modules for name, p in m._parameters.items() if p is not None)
    return [Weight(m, name, p, p._version, p.requires_grad) for m, name, p in found if not p.is_inference()]


def check_weights(weights: Iterable[Weight], block: str) -> None:
    """Refuse to run a block again with other weights.

    Raises:
        RuntimeError: if one was changed in place since it was noted.
    """
    for weight in weights:
        if weight.found._version != weight.version:
            raise RuntimeError(
                f"a parameter of block {block!r} (shape {tuple(weight.found.shape)}) was changed in place between the "
                "forward and the backward pass, which has to run the block again; its gradients would be wrong. "
                "Take the optimiser step after the last backward pass through this graph, or give the block the "
                "policy abyssal.Store()."
            )


@contextmanager
def weights_put(weights: list[Weight]) -> Iterator[None]:
    """Put weights back for a while."""
    present = [(w.owner._parameters.get(w.name), w.found.requires_grad) for w in weights]
    for w in weights:
        if w.is_replaced:
            w.owner._parameters[w.name] = w.found  # type: ignore[assignment]
        if w.found.is_leaf:
            w.found.requires_grad_(w.needed)
    try:
        yield
    finally:
        for w, (tensor, needed) in zip(weights, present, strict=True):
            if tensor is not None:
                w.owner._parameters[w.name] = tensor
            if w.found.is_leaf:
                w.found.requires_grad_(needed)
