"""The modes that kernels are computed in: the types that tensors have, and what can be differentiated."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["exactly", "many_at_once", "normal", "saved_bytes", "spread"]


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute in the types that tensors have, and what can be differentiated, whatever mode the caller is in."""
    known = torch.amp.is_autocast_available(device.type)
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def many_at_once() -> Iterator[None]:
    """Call torch's vmap without its warnings that an operation runs in a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


@contextlib.contextmanager
def saved_bytes(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Give the bytes of all storages, by address, that are saved for backward passes within, known tensors' aside."""
    ours = {t.untyped_storage().data_ptr() for t in known}
    found: dict[int, int] = {}

    def seen(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda value: value):
        yield found


def spread(outputs: Tensor) -> Tensor:
    """Return numbers from -1 to 1 of outputs' shape, in float64: two gradients of outputs so weighted hardly agree."""
    return torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).cos_().mul_(7).sin_().view(outputs.shape)


def normal(value: Any) -> Any:
    """Return a tensor that can take part in gradients, for one that was made in `torch.inference_mode()`."""
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value
