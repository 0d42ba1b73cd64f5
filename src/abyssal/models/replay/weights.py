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
        return self.found.requires_grad is not self.needed or self.is_replaced

    @property
    def is_replaced(self) -> bool:
        """Whether one plain tensor stands in place of another. What shards weights (DTensor) exchanges them itself."""
        now = self.owner._parameters.get(self.name)
        if now is self.found:  # as a rule
            return False
        plain = type(now) in _PLAIN and type(self.found) in _PLAIN
        return plain and self.found.untyped_storage().nbytes() > 0


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
    """Put weights back for a while. What was not replaced is left to whoever exchanges it during the run."""
    replaced = [(w.owner._parameters, w.name, w.owner._parameters[w.name], w.found) for w in weights if w.is_replaced]
    others = [(w.found, w.needed) for w in weights if w.found.is_leaf and w.found.requires_grad is not w.needed]
    for held, name, _, found in replaced:
        held[name] = found  # type: ignore[assignment]
    for tensor, needed in others:
        tensor.requires_grad_(needed)
    try:
        yield
    finally:
        for held, name, present, _ in replaced:
            held[name] = present
        for tensor, needed in others:
            tensor.requires_grad_(not needed)
