"""What the residual stream of a model looks like on one batch: before training, and after some steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.models.branches import stream_of
from abyssal.models.call import call, first_tensor, outputs_of
from abyssal.models.state import as_found
from abyssal.util.randomness import seeded

__all__ = ["Trace", "prediction", "rms", "trace"]

_SAMPLE = 1 << 16  # entries of one tensor that are kept; a relative size from so many is off by 0.4 %


@dataclass
class Trace:
    """One forward pass.

    Attributes:
        before: a sample of every block's input, in order of calls; the same entries in every pass.
        after: of its output.
        output: of the model's output.
    """

    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def increments(self) -> list[Tensor]:
        """What each block adds to its input."""
        return [after - before for before, after in zip(self.before, self.after, strict=True)]

    @property
    def is_finite(self) -> bool:
        """Whether all of it is numbers."""
        return all(bool(torch.isfinite(part).all()) for part in (*self.before, *self.after, self.output))


def rms(x: Tensor) -> float:
    """Return the root of the mean square, in float64."""
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
def trace(model: nn.Module, blocks: Mapping[str, nn.Module], batch: Any) -> Trace:
    """Run a model once, as it stands, and record the stream; random state and all that it holds are put back.

    Args:
        model: in the mode that it is to be run in.
        blocks: whose input and output are recorded; calls that change the shape are left out.
        batch: what it is called with.
    """
    found = Trace()

    def left(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stream, result = stream_of(args, kwargs), first_tensor(output)
        if stream is not None and result is not None and stream[1].shape == result.shape:
            # Taken after the call: a block that adds in place has lost its input by then, hence `entered`.
            found.before.append(waiting.pop())
            found.after.append(_sample(result))

    def entered(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (stream := stream_of(args, kwargs)) is not None:
            waiting[:] = [_sample(stream[1])]

    waiting: list[Tensor] = []
    handles = [
        handle
        for block in blocks.values()
        for handle in (
            block.register_forward_pre_hook(entered, with_kwargs=True),
            block.register_forward_hook(left, with_kwargs=True),
        )
    ]
    try:
        with as_found(model), seeded(0):  # all passes see the same dropout masks
            found.output = _sample(prediction(call(model, batch)))
    finally:
        for handle in handles:
            handle.remove()
    return found


def prediction(output: Any) -> Tensor:
    """Return the tensor that a model's output is about.

    Raises:
        TypeError: for an output without a floating-point tensor.
    """
    found = outputs_of(output)
    if found is None or not found.is_floating_point():
        raise TypeError(f"The model returned a {type(output).__name__} without a floating-point tensor.")
    return found


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    if flat.numel() > _SAMPLE:
        chosen = torch.randint(flat.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
        flat = flat[chosen.to(flat.device)]
    return flat.float().cpu().clone()
