"""Making sure that parameters handed to a model from outside are those it computes with.

`torch.func.functional_call` puts tensors in the place of a module's parameters. Some uses are cut off from them without
a word: a slice of an `nn.ParameterList` wraps its entries anew, so that values arrive and derivatives do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from abyssal.tangent.plainly import without_hooks

__all__ = ["check_reach"]


def check_reach(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    run: Callable[[dict[str, Tensor]], Tensor],
    plain: Callable[[], Tensor],
) -> None:
    """Compare gradients by parameters that are handed over with those by the model's own.

    Args:
        model: the module.
        parameters: values of those that count, by name; possibly in another type than the model's own.
        run: outputs of a sample or two, computed with given parameters.
        plain: the same, computed with the model's own parameters, in their type.

    Raises:
        ValueError: naming the parameters whose gradients differ.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    with torch.enable_grad(), without_hooks(model):
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        f, g = run(leaves), plain()
        if not g.requires_grad:
            return  # another check says that nothing depends on any parameter
        weights = torch.linspace(-1, 1, f.numel(), dtype=torch.float64, device=f.device).cos_().view(f.shape)
        ours: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if f.requires_grad:
            ours = torch.autograd.grad((f * weights.to(f)).sum(), list(leaves.values()), allow_unused=True)
        theirs: tuple[Tensor | None, ...] = torch.autograd.grad(
            (g * weights.view(g.shape).to(g)).sum(), [own[name] for name in leaves], allow_unused=True
        )
    total = sum(float(t.double().square().sum()) for t in theirs if t is not None) ** 0.5
    off = []
    for name, mine, true in zip(leaves, ours, theirs, strict=True):
        if true is None:
            continue  # then no value of it arrives anywhere
        gap = true.double() if mine is None else mine.double() - true.double()
        # Another type rounds otherwise; a use that is cut off takes a whole term out of the gradient.
        if float(gap.norm()) > max(1e-3, 64 * torch.finfo(true.dtype).eps) * max(
            float(true.double().norm()), 1e-3 * total
        ):
            off.append(name)
    if off:
        names = ", ".join(off[:4]) + (", ..." if len(off) > 4 else "")
        raise ValueError(
            f"torch.func does not reach every use of {names} in this {type(model).__name__}: gradients by parameters "
            "that are handed over differ from those by its own. A slice of an nn.ParameterList does that (index its "
            "entries one by one), and so do parameters kept in plain Python lists. abyssal.tangent.ntk copes with it."
        )
