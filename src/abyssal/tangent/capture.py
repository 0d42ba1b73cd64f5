"""Per-sample gradients of a whole model from one forward pass and one backward pass for each of its outputs.

A forward hook notes a layer's input and hands on a copy of its output; the gradient by that output is all samples' at
once, since no sample's output depends on another's input. Gradients by weights are never formed. The backward passes
of several outputs run as one, under vmap, so that what is made of a layer's gradients can be made, and they can be
dropped, while the pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from abyssal.tangent.hooks import Call, arranged, backward, edges_to, named, names_of, recorded, ruled
from abyssal.tangent.parts import Part
from abyssal.tangent.study import Plan

__all__ = ["capture"]

# Called with a parameter's name and all its parts.
Deliver = Callable[[str, list[Part]], None]


def capture(
    model: nn.Module, plan: Plan, call: Call, n: int, outputs: slice, deliver: Deliver
) -> tuple[set[str], Tensor]:
    """Run a block of samples and hand over every parameter's gradients by some of the outputs.

    Args:
        model: as it was studied.
        plan: from :func:`abyssal.tangent.study.study`.
        call: runs the model on the block.
        n: samples in it.
        outputs: which of the model's outputs.
        deliver: is given each parameter's parts as soon as all its uses have been passed.

    Returns:
        Names of the parameters that are used but not delivered; all outputs, [n, k].
    """
    with recorded(model, n, lambda key: plan.layouts.get(key) == "expanded") as (uses, anchor, receiver):
        found = call()
        names = names_of({name: p for name, p in plan.parameters.items() if name not in plan.fallback})
        counts = edges_to(found, plan.parameters)
        pending: dict[str, list[Part]] = {}
        missing = {name for name, count in counts.items() if count}

        def receive(index: int, grads: Tensor) -> None:
            use = uses[index]
            layout = plan.layouts.get(use.key)
            if layout is None or not any(id(p) in names for p in use.module.parameters(recurse=False)):
                return
            x, deltas = arranged(use.x, layout, n), arranged(grads, layout, n, at=1)
            if x is None or deltas is None:
                return
            for name, part in named(use.module, ruled(use, x, deltas.transpose(0, 1)) or {}, names):
                pending.setdefault(name, []).append(part)
                if len(pending[name]) == counts[name]:
                    missing.discard(name)
                    deliver(name, pending.pop(name))

        receiver.receive = receive
        backward(found[:, outputs], anchor, receiver, plan.batched)
    return missing, found.detach()
