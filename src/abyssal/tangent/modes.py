"""The modes that kernels are computed in: the types that tensors have, and what can be differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["exactly", "normal"]


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute in the types that tensors have, and what can be differentiated, whatever mode the caller is in."""
    known = torch.amp.is_autocast_available(device.type)
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext(),
    ):
        yield


def normal(value: Any) -> Any:
    """Return a tensor that can take part in gradients, for one that was made in `torch.inference_mode()`."""
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value
