"""The closed loop of coded streams: what the encoder carries along a chain, and how the decoder walks back.

Along a chain of blocks, called with the states x[0], x[1], ..., the encoder knows what the decoder will know, the
*runner* R: on entry to a coded block it codes `d = x - R`, and R moves to `R + decoded(d)`. The loop is closed, so
that the error of every state is one quantisation error, of its own increment, at any depth. The decoder starts from
the runner at the chain's end and takes off one decoded increment per coded block, last to first.

The runner is carried as its distance from the exact state, the *residual* `r = x - R`, since that is small: the
exact state is at hand anyway. Its rounding to bfloat16 is 2^-9 of one quantisation error.

    entered block     what is coded                            residual from then on
    coded, first      nothing: R starts at the exact state     0
    coded             d = (x - x_before) + r, by its bits      d - decoded(d), bfloat16
    kept              d, by 8 bits twice: R ends here          none
    any other         nothing: R stays where it is             d, float32

At the end of a chain the exact state is kept and the residual beside it, by 8 bits (twice where it is float32).

Source: differential pulse-code modulation (Cutler 1952), with depth in the place of time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.codec.placement import Parked, park
from abyssal.codec.quantiser import Codec, Encoded
from abyssal.codec.sample import by_position, spread

# The decoder starts anew from a kept state, and what this code is wrong by shifts the whole segment below it, whose
# first state may be far smaller than the increment that is coded here (28 times in a trained GPT). So the error of a
# first code is coded once more: 2^-16 of the increment is left.
FINE_BITS = 8
"""Bits by which ends of chains and of segments are coded, where needed twice."""


class Runner:
    """What the decoder will know of the stream, as the exact state less a residual.

    Attributes:
        residual: [*stream]; None is zero.
        group: of the code that started it.
        nbytes: that it holds.
    """

    __slots__ = ("group", "nbytes", "residual")

    def __init__(self, residual: Tensor | Coded | None, group: int) -> None:
        """Begin with this residual."""
        self.residual, self.group = residual, group
        self.nbytes = 0 if residual is None else residual.nbytes

    def packed(self) -> Runner:
        """Return the same in fewer bytes, and a little less exactly."""
        if not isinstance(self.residual, Tensor):
            return self
        twice = self.residual.dtype != torch.bfloat16  # a whole increment, not what its code left
        wide = self.residual.to(wide_type(self.residual.dtype))
        return Runner(encode_finely(wide, self.group, None, twice), self.group)

    def state(self, exact: Tensor) -> Tensor:
        """Return what the decoder knows, in float32 or wider. [*stream]."""
        wide = exact.to(wide_type(exact.dtype))
        if self.residual is None:
            return wide
        return self.residual.before(wide) if isinstance(self.residual, Coded) else wide - self.residual


class Coded:
    """The code of one increment, on the device where it is kept.

    Args:
        codec: what made it.
        stages: the code, and where it was coded more finely the code of its error.
        device: where to keep it; None for where it is.
    """

    __slots__ = ("_parked", "_stages", "codec", "nbytes")

    def __init__(self, codec: Codec, stages: list[Encoded], device: str | None) -> None:
        """Park the code, if it is to be parked."""
        self.codec, self.nbytes = codec, sum(e.codes.nbytes + e.scales.nbytes for e in stages)
        self._stages, self._parked = stages, list[tuple[Parked, Parked]]()
        if device is not None:
            self._parked = [(park(e.codes, device), park(e.scales, device)) for e in stages]
            self._stages = [e.replace(codes=_NOTHING, scales=_NOTHING) for e in stages]

    def _fetch(self) -> list[Encoded]:
        if not self._parked:
            return self._stages
        # Last to first, as each fetch starts the one of what was parked before it.
        pairs = [(scales.fetch(), codes.fetch()) for codes, scales in reversed(self._parked)]
        return [e.replace(codes, scales) for e, (scales, codes) in zip(self._stages, reversed(pairs), strict=True)]

    def before(self, state: Tensor) -> Tensor:
        """Return the decoder's state below this increment from that above it. [*stream]."""
        for encoded in self._fetch():
            decoded = self.codec.decode(encoded, state.dtype)
            state = torch.sub(state, decoded, out=decoded)
        return state

    def clamp(self, s: Tensor, state: Tensor) -> Tensor:
        """Return `s` where it is within this code's cell around the decoded `state`, else the cell's border.

        Args:
            s: an estimate of the state that was coded. [*stream]
            state: what the code says of it. [*stream]
        """
        low, high = self.codec.cell(self._fetch()[-1])
        return torch.minimum(torch.maximum(s.to(state.dtype), low + state), high + state).to(s.dtype)


_NOTHING = torch.empty(0)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which running states are kept: float32, or float64 for streams in that."""
    return torch.promote_types(dtype, torch.float32)


def increment(x: Tensor, before: Tensor, runner: Runner) -> Tensor:
    """Return `x - R`, how far the stream has moved from what the decoder knows, in a new tensor. [*stream]."""
    if isinstance(runner.residual, Coded):
        return torch.sub(x, runner.state(before))
    d = torch.sub(x.to(wide_type(x.dtype)), before)
    return d if runner.residual is None else d.add_(runner.residual)


def encode(codec: Codec, d: Tensor, device: str | None) -> tuple[Coded, Runner]:
    """Code the increment `d`, which is lost, and return the code and the runner that it moves to."""
    encoded, residual = codec.take_off(d)
    return Coded(codec, [encoded], device), Runner(residual.to(torch.bfloat16), codec.group)


def encode_finely(d: Tensor, group: int, device: str | None, twice: bool = True) -> Coded:
    """Code what the decoder starts by: the increment up to a kept state, or its distance from the end of a chain.

    Args:
        d: what to code. [*stream]
        group: elements that share a scale.
        device: where to keep the code.
        twice: whether the code's error is coded as well.
    """
    codec = Codec(FINE_BITS, group)
    first, decoded = codec.encode(d)
    second = [codec.encode(torch.sub(d, decoded, out=decoded))[0]] if twice else []
    return Coded(codec, [first, *second], device)


def relative_error(residual: Tensor, x: Tensor) -> Tensor:
    """Return the root mean square over positions of the relative error of the state `x`, as a 0-d tensor.

    Position by position, since a few positions of enormous norm (language models have them) would hide the error
    of all the others.

    Args:
        residual: what the state is wrong by. [*stream]
        x: the state. [*stream]
    """
    wrong = torch.linalg.vector_norm(by_position(residual), dim=-1, dtype=wide_type(x.dtype))
    return (wrong / spread(by_position(x))).square_().mean().sqrt_()


class Handed(NamedTuple):
    """What a block hands to the one below it."""

    state: Tensor  # the best estimate of its own input, which is the output of the one below. [*stream]
    # What the decoder knows of the stream there, in float32 or wider, or in bfloat16 its distance from a `state` of a
    # narrower type; None where nothing is coded. [*stream]
    runner: Tensor | None
    is_distance: bool = False

    @classmethod
    def of(cls, state: Tensor, runner: Tensor | None) -> Handed:
        """Take what the decoder knows in as few bytes as it needs until the block below asks."""
        if runner is None or runner.dtype == state.dtype:
            return cls(state, runner)
        return cls(state, (runner - state).to(torch.bfloat16), True)

    def decoder(self, code: Coded | None) -> Tensor:
        """Return what the decoder knows below the increment `code`; None is none. [*stream]."""
        assert self.runner is not None
        known = self.runner + self.state.to(wide_type(self.state.dtype)) if self.is_distance else self.runner
        return known if code is None else code.before(known)


class Decoded(NamedTuple):
    """What the code of a cell's input says of it (policy.Decoded)."""

    state: Tensor
    code: Coded | None

    def clamp(self, s: Tensor) -> Tensor:
        """Return the nearest to `s` that the code allows; the first state of a segment is exact as it is."""
        return self.state.to(s.dtype) if self.code is None else self.code.clamp(s, self.state)
