"""Copies of models and batches that have shapes, types and lifetimes, and no memory (torch's fake tensors).

All of them stand on the CPU, whatever device the originals are on: torch's CPU build cannot differentiate fake
tensors of a device that it lacks, and sizes do not depend on the device. Where kernels differ, so may what they
keep: attention with dropout keeps its probabilities on the CPU and not on CUDA.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["fake_batch", "fake_copy", "masks_as_for_real", "new_mode", "without_needless_masks"]


def new_mode() -> FakeTensorMode:
    """Return a mode for fake tensors; real tensors that a loss or a module closes over are taken as fake ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a model, its parameters and buffers being fake tensors. `model` is not changed, nor its data read.

    Args:
        model: real, on the meta device, or fake.
        mode: the mode that the copy's tensors belong to.
        dtype: of the copy's floating-point parameters and buffers, as `model.to(dtype)`; None keeps them.

    Returns:
        The copy: same classes, ties and patches.

    Raises:
        TypeError: if the model cannot be copied (something in it refuses `copy.deepcopy`).
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = _fake(tensor, mode, dtype)
    try:
        with _CopyingAsFake(mode):
            twin: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"forecast: this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Pass a "
            "function that builds it (on the meta device, so that nothing is allocated), or its configuration."
        ) from error
    return twin


def fake_batch(batch: Any, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Any:
    """Return a batch with every tensor in it replaced by a fake one; floating-point ones of `dtype` if given."""
    return pytree.tree_map_only(Tensor, lambda tensor: _fake(tensor, mode, dtype), batch)


def _fake(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype | None) -> Tensor:
    changed = dtype is not None and tensor.is_floating_point()
    with mode, torch.no_grad():
        twin = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=dtype if changed else tensor.dtype, device="cpu"
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad)


class _CopyingAsFake(TorchFunctionMode):
    """Copy tensors that are neither parameters nor buffers (plain attributes) as fake ones, too."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _fake(tensor, self._mode, None)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def without_needless_masks(batch: Any) -> Any:
    """Leave out an attention mask that masks nothing: transformers drops it too, where it can look at its values."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or isinstance(mask, FakeTensor) or mask.is_meta:
        return batch
    if not bool(mask.all()):
        return batch
    return {key: value for key, value in batch.items() if key != "attention_mask"}


# What transformers decides by looking at values, and takes for the worst where it cannot.
_PACKING = "find_packed_sequence_indices"
_MASKING = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")


@contextmanager
def masks_as_for_real(batch: Any) -> Iterator[None]:
    """Have transformers make the attention masks of a fake batch that it would make of a real one.

    Where no mask is given it looks at the position ids for sequences packed into one row; and at masks, its own of
    ones among them, for whether they mask anything. Fake ones cannot be looked at, and it then makes a mask of
    tokens x tokens. So: a batch without position ids is not packed, and one without a mask needs none.
    """
    given = set(batch) if isinstance(batch, dict) else set()
    stand_ins: dict[str, Any] = {} if "position_ids" in given else {_PACKING: _none}
    module = sys.modules.get("transformers.masking_utils")
    if not any(name.endswith("attention_mask") for name in given):
        stand_ins |= {name: _without_padding(getattr(module, name, None)) for name in _MASKING}
    present = {name: getattr(module, name) for name in stand_ins if hasattr(module, name)}
    for name in present:
        setattr(module, name, stand_ins[name])
    try:
        yield
    finally:
        for name, function in present.items():
            setattr(module, name, function)


def _none(*_args: Any, **_kwargs: Any) -> None:
    return None


def _without_padding(decide: Any) -> Any:
    """Return `decide(padding_mask, ...)` that takes the mask for none."""

    def decide_without(padding_mask: object = None, *args: Any, **kwargs: Any) -> Any:
        return decide(None, *args, **kwargs)

    return decide_without
