"""How far a model's gradient is off in bfloat16: the yardstick that errors of restoration are held against."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from abyssal.engine.policy import Keep
from abyssal.models.state import borrowed
from abyssal.planning.candidates import distance
from abyssal.planning.step import TrainingStep


def bf16_error(step: TrainingStep, gradient: Sequence[Tensor | None]) -> tuple[float | None, str]:
    """Return the relative error of the gradient in bfloat16, or why it could not be had.

    Args:
        step: of the model: in float32, in bfloat16, or under autocast.
        gradient: its gradient as it is.
    """
    kept, kind = dict.fromkeys(step.blocks, Keep()), step.device.type
    types = {p.dtype for p in step.parameters}
    try:
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                exact = step.gradient(kept)
            return gradient_error(gradient, exact), ""
        if types == {torch.float32}:
            with torch.autocast(kind, torch.bfloat16):
                return gradient_error(step.gradient(kept), gradient), ""
        if types <= {torch.bfloat16, torch.float16, torch.float32}:
            return _against_float32(step, gradient)
        return None, f"the parameters are {', '.join(sorted(map(str, types)))}"
    except (RuntimeError, TypeError, ValueError) as error:
        return None, f"the gradient for comparison could not be taken: {str(error).splitlines()[0]}"


def _against_float32(step: TrainingStep, gradient: Sequence[Tensor | None]) -> tuple[float | None, str]:
    count = sum(p.numel() for p in step.parameters)
    if 12 * count + 2 * sum(p.nbytes for p in step.parameters) > available_bytes(step.device):
        return None, "a float32 copy of the model does not fit into memory"
    with step.under(None):
        twin = copy.deepcopy(step.model).float()
    with borrowed(twin) as loan:
        modules = dict(twin.named_modules())
        blocks = {name: modules[name] for name in step.blocks}
        other = TrainingStep(twin, loan, (), step._loss, blocks)
        other.args, other.kwargs = pytree.tree_map_only(Tensor, _float32, (step.args, step.kwargs))
        exact = other.gradient(dict.fromkeys(blocks, Keep()))
        return gradient_error(gradient, exact), ""


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def gradient_error(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """Return `|found - exact| / |exact|` over all parameters; a missing gradient counts as zero."""
    wrong = size = 0.0
    for a, b in zip(found, exact, strict=True):
        if b is None:
            wrong += 0.0 if a is None else distance(a) ** 2
        else:
            wrong += distance(b if a is None else b.to(torch.promote_types(a.dtype, b.dtype)), a) ** 2
            size += distance(b) ** 2
    return math.sqrt(wrong / size) if size > 0.0 else math.inf


def available_bytes(device: torch.device) -> float:
    """Return the memory that is free on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
