"""How much one model's function differs from another's on a batch, and whether gradients reach every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.models.call import call, has_loss, outputs_of, scalar_loss
from abyssal.models.state import quiet
from abyssal.nn.refine.graft import RefineError

__all__ = ["Change", "gradients_of", "measure"]


def compared(output: Any) -> Tensor:
    """Return the tensor of a model's output that is compared.

    Raises:
        RefineError: if there is none.
    """
    found = outputs_of(output)
    if found is None:
        raise RefineError(f"The model returned a {type(output).__name__} without a floating-point tensor to compare.")
    return found.detach()


def relative_change(before: Tensor, after: Tensor) -> float:
    """Return |after - before| / |before| of two outputs of models."""
    first, second = (output.detach().double() for output in (before, after))
    scale = float(first.norm())
    difference = float((second - first).norm())
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


class Change:
    """A model's outputs, loss and gradients on one batch, in eval mode."""

    def __init__(self, model: nn.Module, batch: Any, loss: Callable[[Any], Any] | None) -> None:
        """Run the model, forward and, where it has a loss, backward."""
        self.loss: float | None = None
        self.gradients: dict[int, float] = {}  # squared norm by id of the parameter
        self.silent = 0
        with quiet(model), torch.enable_grad():
            output = call(model, batch)
            self.output = compared(output)
            if has_loss(output, loss):
                value = scalar_loss(output, loss)
                self.loss = float(value.detach())
                self._differentiate(model, value)

    def _differentiate(self, model: nn.Module, value: Tensor) -> None:
        wanted = [p for p in model.parameters() if p.requires_grad]
        for p, g in zip(wanted, torch.autograd.grad(value, wanted, allow_unused=True), strict=True):
            square = 0.0 if g is None else float(g.double().square().sum())
            self.gradients[id(p)] = square
            self.silent += p.numel() if square == 0 else 0


def gradients_of(change: Change, blocks: Sequence[nn.Module]) -> tuple[float, ...]:
    """Return the norm of the gradient in each block; empty where there was no loss."""
    if change.loss is None:
        return ()
    return tuple(sum(change.gradients.get(id(p), 0.0) for p in block.parameters()) ** 0.5 for block in blocks)


def measure(before: Change, after: Change) -> dict[str, Any]:
    """Return what a report says of two models' runs on the same batch."""
    both = before.loss is not None and after.loss is not None
    return {
        "change": relative_change(before.output, after.output),
        "loss": (before.loss, after.loss) if both else None,
        "silent": (before.silent, after.silent) if both else None,
    }
