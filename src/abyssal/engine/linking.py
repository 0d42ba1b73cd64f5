"""The open ends of chains: which tensors are the outputs of blocks whose next block has not been called yet.

An open end is recognised by the storage, shape, strides, offset, dtype and version counter of the tensor that the
block returned. The linker holds a weak reference to the storage, which keeps its address from being used again but not
its memory from being freed.
"""

from __future__ import annotations

import threading
import weakref
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


class _OpenEnd(NamedTuple, Generic[T]):
    owner: weakref.ref[T]
    storage: StorageWeakRef
    state: tuple[object, ...]


_Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]


class Linker(threading.local, Generic[T]):
    """The open ends of this thread: outputs whose next block has not been called yet, each with its owner."""

    def __init__(self) -> None:
        """Begin with none."""
        self._open: dict[_Key, _OpenEnd[T]] = {}

    def __len__(self) -> int:
        """How many ends are open."""
        return len(self._open)

    def open(self, owner: T, output: Tensor) -> None:
        """Remember `output` as the open end of its owner's chain; weakly."""
        identity = _identify(output)
        if identity is None:
            return
        key, storage, state = identity
        ends = self._open

        def drop(reference: weakref.ref[T]) -> None:
            if key in ends and ends[key].owner is reference:
                del ends[key]

        ends[key] = _OpenEnd(weakref.ref(owner, drop), StorageWeakRef(storage), state)

    def match(self, stream: Tensor) -> T | None:
        """Return the owner whose output `stream` is, unchanged, and close that end; None if there is none."""
        identity = _identify(stream) if self._open else None
        if identity is None:
            return None
        key, _, state = identity
        end = self._open.get(key)
        if end is None or end.state != state:
            return None
        del self._open[key]
        return end.owner()


def _identify(tensor: Tensor) -> tuple[_Key, torch.UntypedStorage, tuple[object, ...]] | None:
    """Return what tells a tensor's memory, its storage, and what has to be unchanged in it.

    A detached alias is another tensor: its graph ends there, and the blocks above it may change their weights
    before the blocks below it are restored (greedy training).
    """
    if tensor.layout is not torch.strided or tensor.is_inference():
        return None
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # tensors without a storage of their own
        return None
    key = (storage._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))
    graph = (tensor.requires_grad, tensor.is_leaf)
    return key, storage, (tensor._version, tensor.dtype, tensor.is_conj(), tensor.is_neg(), *graph)
