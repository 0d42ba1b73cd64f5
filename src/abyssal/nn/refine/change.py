"""How much one model's function differs from another's on a batch, and whether gradients reach every block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.models.call import scalar_loss
from abyssal.nn.refine.graft import RefineError, quiet, run

__all__ = ["Change", "gradients_of", "measure", "output_tensor"]


def output_tensor(output: Any) -> Tensor:
    """Return the tensor that a model's output is about: its logits, else the first floating-point one.

    Raises:
        RefineError: if there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    found = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if not found:
        raise RefineError(f"The model returned a {type(output).__name__} without a floating-point tensor to compare.")
    return next((value for value in found if value.dim()), found[0])


def relative_change(before: Any, after: Any) -> float:
    """Return |after - before| / |before| of two outputs of models."""
    first, second = (output_tensor(output).detach().double() for output in (before, after))
    scale = float(first.norm())
    difference = float((second - first).norm())
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def has_loss(output: Any, loss: Callable[[Any], Any] | None) -> bool:
    """Whether there is a loss to speak of: a function was given, or the model returns one."""
    if loss is not None or (isinstance(output, Tensor) and output.dim() == 0):
        return True
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return isinstance(value, Tensor)


class Change:
    """A model's outputs, loss and gradients on one batch, in eval mode."""

    def __init__(self, model: nn.Module, batch: Any, loss: Callable[[Any], Any] | None) -> None:
        """Run the model, forward and, where it has a loss, backward."""
        self.loss: float | None = None
        self.gradients: dict[int, float] = {}  # squared norm by id of the parameter
        self.silent = 0
        with quiet(model), torch.enable_grad():
            output = run(model, batch)
            self.output = output_tensor(output).detach()
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
