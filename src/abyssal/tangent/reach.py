"""Making sure that parameters handed to a model from outside are those it computes with.

`torch.func.functional_call` puts tensors in the place of a module's parameters. Some uses are cut off from them without
a word: a slice of an `nn.ParameterList` wraps its entries anew, so that values arrive and derivatives do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from abyssal.models.graph import walk
from abyssal.models.state import without_hooks
from abyssal.tangent.batch import Batch
from abyssal.tangent.modes import spread
from abyssal.tangent.subject import Subject

__all__ = ["check_reach"]


def check_reach(
    subject: Subject, batch: Batch, parameters: Mapping[str, Tensor], run: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    """Compare gradients by parameters that are handed over with those by the model's own.

    Args:
        subject: the model.
        batch: some samples, in the model's own type.
        parameters: values of those that count, by name; possibly in another type than the model's own.
        run: outputs of the samples, computed with given parameters.

    Raises:
        ValueError: naming the parameters whose gradients differ; for reentrant checkpoints.
    """
    model, own = subject.model, subject.parameters
    with torch.enable_grad(), without_hooks(model):
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        f, g = run(leaves), subject.run(batch)
        if not g.requires_grad:
            return  # another check says that nothing depends on any parameter
        for outputs in (f, g):
            walk(outputs, {}, batch.n)  # raises for reentrant checkpoints, whose inside is in no graph
        weights = spread(f)
        ours: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if f.requires_grad:
            ours = torch.autograd.grad((f * weights.to(f)).sum(), list(leaves.values()), allow_unused=True)
        theirs: tuple[Tensor | None, ...] = torch.autograd.grad(
            (g * weights.to(g)).sum(), [own[name] for name in leaves], allow_unused=True
        )
    total = sum(float(torch.linalg.vector_norm(t)) ** 2 for t in theirs if t is not None) ** 0.5
    if not math.isfinite(total):
        return  # overflows are found by others, who look at results
    off = []
    for name, mine, true in zip(leaves, ours, theirs, strict=True):
        if true is None:
            continue  # then no value of it arrives anywhere
        # Another type rounds otherwise; a use that is cut off takes a whole term out of the gradient.
        allowed = max(1e-3, 64 * torch.finfo(true.dtype).eps)
        gap = true if mine is None else mine - true  # in the wider type of the two
        size = float(torch.linalg.vector_norm(true))
        if not float(torch.linalg.vector_norm(gap)) <= allowed * max(size, 1e-3 * total):
            off.append(name)
    if off:
        names = ", ".join(off[:4]) + (", ..." if len(off) > 4 else "")
        raise ValueError(
            f"torch.func does not reach every use of {names} in this {type(model).__name__}: gradients by parameters "
            "that are handed over differ from those by its own. A slice of an nn.ParameterList does that (index its "
            "entries one by one), and so do parameters kept in plain Python lists. abyssal.tangent.ntk copes with it."
        )
