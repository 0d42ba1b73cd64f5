"""The low-bit code of the increments: groups of neighbours in memory, one bfloat16 scale each, packed numbers.

The levels of a group are even, a *step* apart, and the scale carries the sign of the group's *extreme*, its element
of largest magnitude:

    with zero    the step times -h, ..., -1, 0, ..., h - 1     h = 2^(bits - 1); step = -extreme / h
    without      the step times -h + 1/2, ..., h - 1/2

With zero, the extreme is the lowest level, whichever sign it has: it is coded almost exactly, elements that are
small against a step decode to zero and wait for the next block, and no level is wasted. The error is at most half a
step; only for elements near the extreme's magnitude with the other sign it is up to one step (and the rounding of
the scale). That is what an outlier asks for, and from 3 bits on it costs nothing elsewhere. With 1 and 2 bits
levels without zero are better where there is no outlier, so there each group has the ones or the others: with zero
where its extreme is over four times its mean magnitude, as the scale's lowest bit says.

The scale is bfloat16 for its range: float16 ends at 65,504, and massive activations do not. docs/codes.md has the
comparison with other quantisers (clipped, Lloyd-Max, rotated, stochastic) on trained networks and with outliers.

Everything is done in pieces that stay in a processor's cache, and packed in parts of 16 million elements: temporaries
take at most 40 MB, however large the tensor is.

Every product below is rounded once (steps and levels are exact), so that a compiler's fused multiply-add cannot
make the decoder differ from the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abyssal.codec.packing import pack, unpack

BITS = (1, 2, 3, 4, 6, 8)
SMALLEST_GROUP, LARGEST_GROUP, GROUP_MULTIPLE = 16, 1024, 8

_SMALLEST_SCALE = 2.0**-118  # so that neither a step of 2^-7 scales nor its reciprocal leaves float32's normal range
_MUCH = 2.0**100  # takes every float32 but 0 over the smallest scale
_LARGEST_SCALE = float(torch.finfo(torch.bfloat16).max)
_SCALE_ROUNDING = 2.0**-8  # bfloat16's, relative; twice that is one unit in its last place
_PART, _PIECE = 1 << 24, 1 << 20  # elements that are packed, and quantised, together
_OUTLIER = 4.0  # times the mean magnitude; of 64 Gaussian elements the largest is 3.1 times the mean, as a rule


@dataclass(frozen=True)
class Encoded:
    """A tensor as `Codec.encode` packed it.

    Attributes:
        codes: packed codes, uint8. [groups * group * bits / 8]
        scales: one per group, bfloat16. [groups]
        shape: of the tensor that was encoded.
        strides: of what it decodes to: the tensor's own where it was dense.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Encoded:
        """Return the same code on another device."""
        codes = self.codes.to(device, non_blocking=non_blocking)
        return self.replace(codes, self.scales.to(device, non_blocking=non_blocking))

    def replace(self, codes: Tensor, scales: Tensor) -> Encoded:
        """Return the same code with its two tensors held elsewhere."""
        return Encoded(codes, scales, self.shape, self.strides)


@dataclass(frozen=True)
class Codec:
    """A quantiser of `bits` bits with one scale per `group` consecutive elements in memory.

    Args:
        bits: per element; 1, 2, 3, 4, 6 or 8.
        group: elements that share a scale of 16 bits; a multiple of 8 from 16 to 1,024.

    Raises:
        ValueError: for other values of either.
    """

    bits: int
    group: int = 64

    def __post_init__(self) -> None:
        """Refuse what cannot be packed."""
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r}: a code has one of {BITS} bits per element.")
        fits = isinstance(self.group, int) and SMALLEST_GROUP <= self.group <= LARGEST_GROUP
        if not fits or self.group % GROUP_MULTIPLE:
            raise ValueError(
                f"group={self.group!r}: a group has a multiple of {GROUP_MULTIPLE} elements, from {SMALLEST_GROUP} to "
                f"{LARGEST_GROUP} of them; 64 is the default."
            )

    def nbytes(self, numel: int) -> int:
        """Return the exact bytes of the code of `numel` elements: packed codes and scales."""
        groups = -(-numel // self.group)
        return (self._code_bytes + 2) * groups

    def encode(self, d: Tensor) -> tuple[Encoded, Tensor]:
        """Encode a tensor and say what it will decode to.

        A group that holds an infinity or a NaN decodes to NaN throughout; a group of zeros to zeros.

        Args:
            d: float32 or float64, any layout; read in the order of its memory. [*shape]

        Returns:
            The code, and what `decode` makes of it, to the bit: shape, strides and dtype of `d`. [*shape]

        Raises:
            TypeError: where `d` has another dtype.
        """
        return self._encode(d, leave=False)

    def take_off(self, d: Tensor) -> tuple[Encoded, Tensor]:
        """Encode a tensor and take off it what it will decode to: `encode` in less memory.

        Args:
            d: as for `encode`; it is lost.

        Returns:
            The code, and `d` less what `decode` makes of it: shape, strides and dtype of `d`. [*shape]

        Raises:
            TypeError: where `d` has another dtype.
        """
        return self._encode(d, leave=True)

    def _encode(self, d: Tensor, leave: bool) -> tuple[Encoded, Tensor]:
        """Return the code, and what is left (`leave`, in the place of `d`) or what it decodes to."""
        if d.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"encode was given {d.dtype}; increments are formed in float32 or float64: convert first.")
        strides = _dense_strides(d)
        given = _grouped(d.detach(), strides, self.group)
        codes = given.new_empty(len(given), self._code_bytes, dtype=torch.uint8)
        scales = given.new_empty(len(given), 1, dtype=torch.bfloat16)
        result = given if leave else torch.empty_like(given)
        room: Tensor | None = None  # for the values of one piece
        for packed, *part in _split(_PART // self.group, codes, scales, given, result):
            levels = torch.empty_like(part[1], dtype=torch.int8)
            for number, scale, grouped, values in _split(_PIECE // self.group, levels, *part):
                if leave:
                    values = room = torch.empty_like(grouped) if room is None else room[: len(grouped)]
                found = _scales(grouped, tagged=self._has_tags)
                scale.copy_(found)
                step, offset = self._steps(found, d.dtype)
                number.copy_(self._write_levels(grouped, step, offset, values))
                _to_values(values, step, offset)
                if leave:
                    grouped.sub_(values)
            self._pack(levels, packed)
        encoded = Encoded(codes.flatten(), scales.flatten(), tuple(d.shape), strides)
        return encoded, _shaped(result, encoded)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what `encode` said this code decodes to.

        Args:
            encoded: what `encode` of an equal codec returned.
            dtype: the dtype of the tensor that was encoded.

        Returns:
            A new tensor in the layout of the one that was encoded. [*shape]
        """
        values = self._room(encoded, dtype)
        for levels, step, offset, own in self._unpacked(encoded, values):
            _to_values(own.copy_(levels), step, offset)
            del levels  # before more is unpacked
        return _shaped(values, encoded)

    def cell(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return the bounds between which the code places each element, relative to what it decodes to.

        Args:
            encoded: what `encode` of an equal codec returned.

        Returns:
            `(low, high)`, float32: `low <= d - decoded <= high` held for each element that was encoded, up to
            the rounding of its division by the step. New tensors. [*shape] each
        """
        low, high = self._room(encoded), self._room(encoded)
        half = self._half
        largest = half * (1 + (3 if self._has_tags else 1) * _SCALE_ROUNDING)  # nothing is larger than the extreme
        for numbers, step, offset, below, above in self._unpacked(encoded, low, high):
            levels, margin = numbers.float(), 0.5 * step.abs()
            # Half a step to either side, and more at the ends: up to the extreme.
            end = largest - half + 1 if offset is None else largest - half + 1 - offset
            more = (levels - (half - 2)).clamp_(min=0).mul_((end - 0.5) * step)  # the first factor: 1 at the highest
            if offset is not None:  # levels without zero end half a step inside of the extreme on either side
                lowest = levels.neg_().sub_(half - 1).clamp_(min=0)
                more.sub_(lowest.mul_((largest - half + offset - 0.5).clamp(min=0) * step))
            torch.sub(more.clamp(max=0), margin, out=below)
            torch.add(more.clamp_(min=0), margin, out=above)
        return _shaped(low, encoded), _shaped(high, encoded)

    @property
    def _code_bytes(self) -> int:
        """Of one group."""
        return self.group * self.bits // 8

    @property
    def _half(self) -> int:
        """Half of the number of levels."""
        return 1 << (self.bits - 1)

    @property
    def _has_tags(self) -> bool:
        """Whether the scale's lowest bit says which levels the group has."""
        return self.bits <= 2

    def _steps(self, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return each group's step with its sign, exact, and where there is a choice what is added to a level's number.

        Args:
            scales: bfloat16. [groups, 1]
            dtype: of the results. [groups, 1] each
        """
        step = scales.to(dtype).mul_(1 / self._half)
        if not self._has_tags:
            return step, None
        return step, 0.5 - 0.5 * (scales.view(torch.int16) & 1).to(dtype)

    def _write_levels(self, grouped: Tensor, step: Tensor, offset: Tensor | None, out: Tensor) -> Tensor:
        """Return the number of each element's level, from `-half` to `half - 1`, , in `out`; [groups, group]."""
        # A step of 0 is that of a group of zeros, whose reciprocal would make NaN of them.
        levels = torch.mul(grouped, step.reciprocal().nan_to_num_(torch.nan, 0.0, 0.0), out=out)
        if offset is not None:
            levels.sub_(offset)
        return levels.round_().clamp_(-self._half, self._half - 1)

    def _pack(self, levels: Tensor, out: Tensor) -> None:
        """Pack levels, int8, which are lost; their two's complement with the sign turned counts from 0."""
        codes = levels.view(torch.uint8).bitwise_xor_(self._half)
        if self.bits < 8:
            codes.bitwise_and_(2 * self._half - 1)  # a group with a NaN has any levels
        pack(codes.view(-1), self.bits, out=out.view(-1))

    def _room(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(encoded.scales.numel(), self.group, dtype=dtype, device=encoded.codes.device)

    def _unpacked(self, encoded: Encoded, *others: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield levels (int8), what `_steps` returns, and the same rows of others: all by groups, piece by piece."""
        groups = encoded.scales.numel()
        whole = encoded.codes.view(groups, self._code_bytes), encoded.scales.view(groups, 1), *others
        for packed, *part in _split(_PART // self.group, *whole):
            levels = unpack(packed.view(-1), self.bits).sub_(self._half).view(torch.int8).view(-1, self.group)
            for numbers, scale, *own in _split(_PIECE // self.group, levels, *part):
                yield numbers, *self._steps(scale, others[0].dtype), *own
            del numbers, levels


def _split(rows: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Take so many rows of every tensor at a time; all, where there are no data, which take time only."""
    is_whole = len(tensors[0]) <= rows or type(tensors[0]) is not Tensor or tensors[0].is_meta
    return [tensors] if is_whole else zip(*(t.split(rows) for t in tensors), strict=True)


def _to_values(levels: Tensor, step: Tensor, offset: Tensor | None) -> None:
    """Turn levels into what they stand for, in their place; [groups, group]."""
    (levels if offset is None else levels.add_(offset)).mul_(step)


def _scales(grouped: Tensor, tagged: bool) -> Tensor:
    """Return each group's extreme with the other sign, bfloat16; tagged by its lowest bit; [groups, 1]."""
    highest, other = grouped.amax(1, keepdim=True), grouped.amin(1, keepdim=True).neg_()
    magnitude = torch.maximum(highest, other)
    bounded = magnitude.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).add_(magnitude, alpha=0)  # infinities become NaN
    bounded = torch.minimum(bounded, magnitude * _MUCH)  # and 0 stays
    scales = bounded.copysign_(other - highest).to(torch.bfloat16)
    if torch.compiler.is_compiling():  # which would skip the rounding, as it is undone at once
        scales.view(torch.int16).bitwise_and_(-1)
    if tagged:
        mean = grouped.abs().sum(1, keepdim=True) / grouped.shape[1]  # infinite where the sum is: no outlier
        scales.view(torch.int16).bitwise_and_(-2).bitwise_or_((magnitude > _OUTLIER * mean).to(torch.int16))
    return scales


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the tensor's strides where it is dense, else those of a dense tensor with its dimensions in that order."""
    given = tuple(tensor.stride())
    if tensor.is_contiguous():
        return given
    strides, extent, dense = [0] * len(given), 1, True
    order = [0] * len(given)
    for a in range(len(given)):  # not `sorted`, which does not trace where sizes are symbols
        order[sum(given[b] < given[a] or (given[b] == given[a] and b > a) for b in range(len(given)))] = a
    for axis in order:
        size = tensor.shape[axis]
        strides[axis] = extent
        dense = dense and (size == 1 or given[axis] == extent)
        extent *= max(size, 1)
    return given if dense else tuple(strides)


def _grouped(tensor: Tensor, strides: tuple[int, ...], group: int) -> Tensor:
    """Return the elements in the order of their memory, by groups; [groups, group].

    Without a copy where they are dense and fill the last group, else padded with zeros.
    """
    numel = tensor.numel()
    if numel % group == 0 and tuple(tensor.stride()) == strides:
        return tensor.as_strided((numel // group, group), (group, 1))
    copy = tensor.new_empty(-(-numel // group), group)
    copy.view(-1)[numel:].zero_()
    copy.as_strided(tensor.shape, strides).copy_(tensor)
    return copy


def _shaped(grouped: Tensor, encoded: Encoded) -> Tensor:
    """Return the grouped elements in the layout of the tensor that was encoded, without their padding."""
    return grouped.as_strided(encoded.shape, encoded.strides)
