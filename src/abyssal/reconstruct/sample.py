"""Seeded samples of a tensor's elements: what the certificate compares a restored state with.

Systematic sampling: every `stride`-th element from a seeded start, so that no index is stored or sent to a
device and the global random generator is not touched. Each element is drawn with the same probability
`1/stride`, hence sums over the sample are unbiased up to that factor; the stride has no divisor in common
with the number of elements, so that a sample does not stay within some of the channels.
"""

from __future__ import annotations

import functools
import math
import zlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LARGEST = 4096  # elements per block
SMALLEST = 64  # a smaller sample says little; streams under 32,768 elements are sampled more densely
FRACTION = 512
BYTES_PER_PASS = 128 * 1024  # over all blocks, so that memory does not grow with depth


def sample_count(numel: int) -> int:
    """Return how many of `numel` elements one block may keep: a 512th, between 64 and 4,096."""
    return min(numel, LARGEST, max(SMALLEST, numel // FRACTION))


@functools.lru_cache(maxsize=1024)
def _stride(numel: int, count: int) -> int:
    """Return the least step that draws at most `count` of `numel` elements and is coprime with `numel`."""
    stride = max(1, -(-numel // max(1, count)))
    while stride < numel and math.gcd(stride, numel) > 1:
        stride += 1
    return max(1, min(stride, numel))


class Sample:
    """The true values of some elements of one tensor.

    Args:
        true: the tensor to sample; dense (no gaps in memory). [*stream]
        count: at most this many elements.
        seed: any integers; the same ones give the same elements.
    """

    __slots__ = ("_start", "_stride", "values")

    def __init__(self, true: Tensor, count: int, *seed: int) -> None:
        """Copy the sampled elements of `true`."""
        self._stride = _stride(true.numel(), count)
        self._start = zlib.crc32(str(seed).encode()) % self._stride
        self.values = self._of(true).clone()

    def _of(self, tensor: Tensor) -> Tensor:
        count = len(range(self._start, tensor.numel(), self._stride))
        return tensor.detach().as_strided((count,), (self._stride,), tensor.storage_offset() + self._start)

    @property
    def nbytes(self) -> int:
        """Bytes the sample holds."""
        return self.values.nbytes

    def take(self, other: Tensor) -> Tensor:
        """Copy the same elements of another tensor of the sampled one's shape and strides: [*stream] to [count]."""
        return self._of(other).clone()


def norms(true: list[Tensor], other: list[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Return for each pair of samples the norm of their difference and that of the true one.

    Pairs of one length, type and device are computed together: a dozen small operations per block would be a
    noticeable part of a step. Nothing is read, so that an accelerator is not waited for.

    Args:
        true: samples of the true tensors, each [count].
        other: the same elements of what they are compared with.

    Returns:
        Indices of pairs, and a tensor [indices, 2] of their error and true norms; every pair is in one.
    """
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for i, values in enumerate(true):
        groups.setdefault((values.numel(), values.dtype, values.device), []).append(i)
    found = []
    for (_, dtype, _), indices in groups.items():
        kind = torch.promote_types(dtype, torch.float32)
        a = torch.stack([true[i] for i in indices]).to(kind)
        b = torch.stack([other[i] for i in indices]).to(kind)
        alike = (a == b) | ((a != a) & (b != b))  # infinities of the forward pass's own, and what comes of them
        difference = torch.where(alike, 0, b - a)
        pairs = torch.stack([torch.linalg.vector_norm(difference, dim=1), torch.linalg.vector_norm(a, dim=1)], dim=1)
        found.append((indices, pairs))
    return found


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill the tensor's memory without gaps or overlaps, and it is a plain tensor."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def has_data(tensor: Tensor) -> bool:
    """Whether the tensor has values at all: it is neither on the meta device nor fake."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
