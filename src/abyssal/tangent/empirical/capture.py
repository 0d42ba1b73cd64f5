"""Per-sample gradients of a whole model from one forward pass and one backward pass for each of its outputs.

A forward hook notes a layer's input and hands on a copy of its output; the gradient by that output is all samples' at
once, since no sample's output depends on another's input. Gradients by weights are never formed. The backward passes
of several outputs run as one, under vmap, so that what is made of a layer's gradients can be made, and they can be
dropped, while the pass goes on.

Which rows are which sample's is what two samples showed. Where the graph does not prove it for these
(:mod:`abyssal.models.graph`), one more backward pass, of outputs weighted by sample, tells if each row's gradient is
weighted as its sample is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from abyssal.models.graph import names_of, walk
from abyssal.tangent.empirical.detection import Plan
from abyssal.tangent.empirical.hooks import Call, arranged, backward, named, recorded, ruled
from abyssal.tangent.empirical.parts import Part

__all__ = ["Moved", "capture"]

# Called with a parameter's name and all its parts.
Deliver = Callable[[str, list[Part]], None]

_ROUNDING = 1024  # rounding errors of a backward pass through a deep model; 53 are the most seen in float32
_ROUNDING_SHORT = 32  # where a thousand would be everything: 14 are the most seen in bfloat16


class Moved(Exception):
    """Rows of some layers are not where two samples had shown them, and what was delivered is wrong.

    Args:
        names: of the layers' parameters.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.names = names


def capture(
    model: nn.Module, plan: Plan, call: Call, n: int, outputs: slice, deliver: Deliver
) -> tuple[set[str], Tensor]:
    """Run a block of samples and hand over every parameter's gradients by some of the outputs.

    Args:
        model: as it was studied.
        plan: from :func:`abyssal.tangent.empirical.detection.study`.
        call: runs the model on the block.
        n: samples in it.
        outputs: which of the model's outputs.
        deliver: is given each parameter's parts as soon as all its uses have been passed.

    Returns:
        Names of the parameters that are used but not delivered; all outputs, [n, k].

    Raises:
        Moved: if the plan does not hold for this block.
    """
    with recorded(model, n, lambda key: plan.layouts.get(key) == "expanded") as (uses, anchor, receiver):
        found = call()
        names = names_of({name: p for name, p in plan.parameters.items() if name not in plan.fallback})
        counts, ordered = walk(found, plan.parameters, n)
        pending: dict[str, list[Part]] = {}
        missing = {name for name, count in counts.items() if count}
        counted = [any(id(p) in names for p in use.module.parameters(recurse=False)) for use in uses]
        certain = n == 1 or (ordered and all(plan.layouts.get(use.key) != "second" for use in uses))
        rows = None if certain else _Rows(found[:, outputs])

        def by_sample(index: int, grads: Tensor) -> Tensor | None:
            """Return gradients [A, n, ...] by a use's output; None where its rows cannot lie as the plan says."""
            layout = plan.layouts.get(uses[index].key)
            return None if layout is None else arranged(grads, layout, n, at=1)

        def receive(index: int, grads: Tensor) -> None:
            """Make parts of gradients [A, ...] by a use's output, and deliver a parameter's when it has all of them."""
            use, deltas = uses[index], by_sample(index, grads)
            if deltas is None or not counted[index]:
                return
            x = arranged(use.x, plan.layouts[use.key], n)
            if x is None:
                return
            if rows is not None:
                rows.note(index, deltas)
            for name, part in named(use.module, ruled(use, x, deltas.transpose(0, 1)) or {}, names):
                pending.setdefault(name, []).append(part)
                if len(pending[name]) == counts[name]:
                    missing.discard(name)
                    deliver(name, pending.pop(name))

        receiver.receive = receive
        backward(found[:, outputs], anchor, receiver, plan.batched, keep=rows is not None)
        if rows is not None and rows.noted:
            receiver.receive = lambda index, grads: rows.compare(index, by_sample(index, grads))
            backward(rows.weighted, anchor, receiver, plan.batched)
            moved = [uses[index].module for index in rows.moved()]
            if moved:
                raise Moved(
                    frozenset(names[id(p)] for m in moved for p in m.parameters(recurse=False) if id(p) in names)
                )
    return missing, found.detach()


class _Rows:
    """Tells whether rows belong to the samples that they are taken for.

    The gradient of `sum_i c_i sum_a r_a f_ia` by a row of sample i has to be c_i times that of `sum_i sum_a r_a f_ia`;
    compared are their products with a random vector. No two samples' c are equal, and neighbours' have unlike signs.

    Args:
        outputs: of all samples. [n, A]
    """

    def __init__(self, outputs: Tensor) -> None:
        n, count = outputs.shape
        golden = (5**0.5 - 1) / 2
        places = torch.arange(n, dtype=torch.float64)
        self.samples = ((1 + places.mul(golden).frac_()) * (1 - 2 * (places % 2))).to(outputs)
        self.outputs = self._drawn(count, outputs)
        self.weighted = (outputs * self.outputs * self.samples[:, None]).sum(dim=1, keepdim=True)
        self.noted: dict[int, Tensor] = {}
        self._wrong: set[int] = set()

    @staticmethod
    def _drawn(size: int, like: Tensor) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).to(like)

    def _sketched(self, deltas: Tensor) -> Tensor:
        """One number for each row. [n, ...] from [n, ..., size], or [n]."""
        return deltas @ self._drawn(deltas.shape[-1], deltas) if deltas.dim() > 1 else deltas

    def note(self, index: int, deltas: Tensor) -> None:
        """Keep what is compared, of gradients [A, n, ...] by a layer's output."""
        self.noted[index] = self._sketched(torch.tensordot(self.outputs.to(deltas), deltas, 1))

    def compare(self, index: int, deltas: Tensor | None) -> None:
        """Compare with the gradients of the weighted outputs. [1, n, ...]."""
        if index not in self.noted or deltas is None:
            return
        expected = self.noted.pop(index)
        expected = expected * self.samples.to(expected).view(-1, *(1,) * (expected.dim() - 1))
        eps = torch.finfo(expected.dtype).eps
        if expected.numel():
            gap = (self._sketched(deltas[0]) - expected).abs().max()
            if gap > min(_ROUNDING * eps, max(_ROUNDING_SHORT * eps, eps**0.5)) * expected.abs().max():
                self._wrong.add(index)

    def moved(self) -> set[int]:
        """Return which layers' rows are not where they were taken to be."""
        return self._wrong | {index for index, expected in self.noted.items() if expected.any()}
