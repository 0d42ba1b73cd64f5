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

from abyssal.util.layout import laid_out

LARGEST = 4096  # elements per block
SMALLEST = 64  # a smaller sample says little; streams under 32,768 elements are sampled more densely
FRACTION = 512
WEIGHT_BYTES = 2  # of each sampled element's position, in bfloat16
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


_FEWEST = 16  # elements of a position; fewer have no spread to speak of
_LEAST = 1e-3  # of the norm, that of the position and that of all positions: so that padding does not count


def by_position(x: Tensor) -> Tensor:
    """Return a state as a list of its positions, in the order of its dimensions. [positions, elements].

    A position is a vector along the last dimension of [batch, width] or [batch, tokens, width], else a sample.
    """
    wide = x.flatten(1) if x.ndim > 3 else x.reshape(-1, x.shape[-1] if x.ndim else 1)
    return wide if wide.shape[-1] >= _FEWEST else wide.reshape(1, -1)


def spread(positions: Tensor) -> Tensor:
    """Return the norm of each position's deviation from its mean, which is what a block's normalisation sees.

    A state's error is told relative to it. Relative to the norm of the whole state, a few positions of enormous norm
    (language models have them) or a large common offset would hide any error of all the rest. So few elements as
    have no spread to speak of are told relative to their norm.

    Args:
        positions: the state. [positions, elements]

    Returns:
        In float32 or wider. [positions]
    """
    positions = positions.detach()
    kind = torch.promote_types(positions.dtype, torch.float32)
    square = torch.linalg.vector_norm(positions, dim=-1, dtype=kind).square_()
    deviation = square
    if positions.shape[-1] >= _FEWEST:
        mean = positions.mean(dim=-1, dtype=kind)
        deviation = square - mean.square_().mul_(positions.shape[-1])
    return torch.maximum(deviation, square.maximum(square.mean()).mul_(_LEAST**2)).sqrt_()


class Sample:
    """The true values of some elements of one tensor.

    Args:
        true: the tensor to sample; dense (no gaps in memory). [*stream]
        count: at most this many elements.
        seed: any integers; the same ones give the same elements.
        weighted: whether errors are to be relative to each position's `spread`, else to the norm of the whole.
    """

    __slots__ = ("_layout", "_start", "_stride", "values", "weights")

    def __init__(self, true: Tensor, count: int, *seed: int, weighted: bool = False) -> None:
        """Copy the sampled elements of `true`."""
        self._stride = _stride(true.numel(), count)
        self._start = zlib.crc32(str(seed).encode()) % self._stride
        self._layout = true.stride()
        self.values = self._of(true).clone()
        self.weights = self._weights(true) if weighted and not true.is_complex() else None

    def _weights(self, true: Tensor) -> Tensor:
        """Return 1 over the root mean square spread of each sampled element's position, in bfloat16. [count]."""
        # Memory order is that of the dimensions, or at least the first dimension is outermost.
        ordered = true.is_contiguous() or (true.ndim > 3 and true.stride(0) * true.shape[0] == true.numel())
        positions = by_position(true) if ordered else true.reshape(1, -1)
        size = positions.shape[-1]
        at = torch.arange(self._start, true.numel(), self._stride, device=true.device) // size
        few = len(at) < len(positions)  # then the others need not be read
        return (math.sqrt(size) / (spread(positions[at]) if few else spread(positions)[at])).to(torch.bfloat16)

    def _of(self, tensor: Tensor) -> Tensor:
        count = len(range(self._start, tensor.numel(), self._stride))
        return tensor.detach().as_strided((count,), (self._stride,), tensor.storage_offset() + self._start)

    @property
    def nbytes(self) -> int:
        """Bytes the sample holds."""
        return self.values.nbytes + (0 if self.weights is None else self.weights.nbytes)

    def take(self, other: Tensor) -> Tensor:
        """Copy the same elements of another tensor of the sampled one's shape: [*stream] to [count]."""
        other = other if other.stride() == self._layout else laid_out(other, self._layout)
        return self._of(other).clone()


class SampleBudget:
    """What the samples of one forward pass may take together.

    Args:
        number: of the pass, which seeds them.
        expected: how many calls there will be.
    """

    def __init__(self, number: int, expected: int) -> None:
        """Begin with nothing taken."""
        self._number, self._expected = number, max(1, expected)
        self._taken = 0  # bytes

    def draw(self, true: Tensor, call: int, calls: int, *, weighted: bool = False) -> tuple[Sample | None, int]:
        """Sample a tensor as far as the budget allows.

        Args:
            true: what to sample. [*stream]
            call: whose it is: its number in the pass.
            calls: how many there were so far.
            weighted: see `Sample`.

        Returns:
            The sample, or None, and its bytes.
        """
        count = self._grant(true, calls) if true.numel() and is_dense(true) else 0
        if count == 0:
            return None, 0
        sample = Sample(true, count, self._number, call, weighted=weighted)
        return sample, sample.nbytes

    def _grant(self, tensor: Tensor, calls: int) -> int:
        size = tensor.element_size() + WEIGHT_BYTES
        fair = BYTES_PER_PASS // (self._expected * size)
        count = sample_count(tensor.numel())
        if fair < SMALLEST and fair < count:  # more blocks than can be sampled at once: rotate
            every = -(-self._expected * SMALLEST * size // BYTES_PER_PASS)
            if (calls + self._number) % every:
                return 0
            fair = SMALLEST
        count = min(count, fair, (BYTES_PER_PASS - self._taken) // size)
        self._taken += count * size
        return count

    def give_back(self, nbytes: int) -> None:
        """A sample was dropped before it was used."""
        self._taken -= nbytes


def norms(samples: list[Sample], other: list[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Return for each pair of samples the norm of their difference and what it is relative to.

    Pairs of one length, type and device are computed together: a dozen small operations per block would be a
    noticeable part of a step. Nothing is read, so that an accelerator is not waited for.

    Args:
        samples: of the true tensors, each of [count] elements.
        other: the same elements of what they are compared with.

    Returns:
        Indices of pairs, and a tensor [indices, 2] of their error and its reference; every pair is in one. The
        reference is 0 where all sampled elements are.
    """
    groups: dict[tuple[int, torch.dtype, torch.device, bool], list[int]] = {}
    for i, sample in enumerate(samples):
        values = sample.values
        groups.setdefault((values.numel(), values.dtype, values.device, sample.weights is None), []).append(i)
    found = []
    for (count, dtype, _, plain), indices in groups.items():
        kind = torch.promote_types(dtype, torch.float32)
        a = torch.stack([samples[i].values for i in indices]).to(kind)
        b = torch.stack([other[i] for i in indices]).to(kind)
        alike = (a == b) | ((a != a) & (b != b))  # infinities of the forward pass's own, and what comes of them
        difference = torch.where(alike, 0, b - a)
        size = torch.linalg.vector_norm(a, dim=1)
        if not plain:
            weights = torch.stack([w for i in indices if (w := samples[i].weights) is not None]).to(kind)
            nothing = size == 0
            difference = torch.where(alike | nothing.unsqueeze(1), difference, difference * weights)
            size = torch.where(nothing, size, math.sqrt(count))
        found.append((indices, torch.stack([torch.linalg.vector_norm(difference, dim=1), size], dim=1)))
    return found


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill the tensor's memory without gaps or overlaps, and it is a plain tensor."""
    if type(tensor) not in (Tensor, torch.nn.Parameter, FakeTensor):
        return False
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def has_data(tensor: Tensor) -> bool:
    """Whether the tensor has values at all: it is neither on the meta device nor fake."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
