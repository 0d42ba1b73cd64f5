"""What a whole choice of policies would cost, from the measurements of single blocks.

Policies of one chain depend on each other. What each place keeps, `engine/rules.py` says, which the engine runs; what
that does to the errors is told here:

- The first coded block of a segment is exact.
- A kept block above a coded one ends the segment by a fine code, whose error shifts the whole segment.
- A state that is solved for from an inexact one inherits its error.

Peaks come from the memory profile of one step of checkpointing: each phase, with what the blocks that are alive in it
would store instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from abyssal.codec.feedback import FINE_BITS
from abyssal.codec.quantiser import Codec
from abyssal.codec.sample import sample_count
from abyssal.engine.policy import Code, Keep, Policy, Store
from abyssal.engine.rules import Holding, Layout
from abyssal.planning.measurements import BlockMeasurement, Candidate, Measurements
from abyssal.planning.solve import Problem

# A kept block above a coded one ends the segment with a code of twice this many bits (coding.py). The error of 8 bits
# is 6e-3 of what they code (uniform cells up to the largest of 64 Gaussian elements), and that of 8 more a 256th of it.
_CLOSING = Code(FINE_BITS)
_CLOSING_ERROR = 6e-3 / 256
# Below what was measured: the root, as where units switch. Rounding floors are flatter, and not to be gone below.
_LEAST_POWER = 0.5
# Root mean square of a rounding to bfloat16, relative: a uniform error of up to 2^-9 to 2^-8 of the value.
_ROUNDING = 1.6e-3
# A chain's first coded state is exact but for rounding and the closing code; not what one would call exact.
_NEARLY_EXACT = 1e-14


@dataclass
class BlockEstimate:
    """What a block would cost under its policy, beside the others'.

    Attributes:
        stored_bytes: what it keeps.
        state_error: relative error of its restored input.
        share: its contribution to the gradient's relative error; contributions add up in squares.
        seconds: its forward and backward pass.
    """

    stored_bytes: int = 0
    state_error: float = 0.0
    share: float = 0.0
    seconds: float = 0.0


@dataclass
class Estimate:
    """What a choice of policies would cost."""

    blocks: dict[str, BlockEstimate] = field(default_factory=dict)
    peak_bytes: float = 0.0
    seconds: float = 0.0

    @property
    def stored_bytes(self) -> int:
        """Bytes that all blocks keep."""
        return sum(block.stored_bytes for block in self.blocks.values())

    @property
    def error(self) -> float:
        """Expected relative error of the gradient."""
        return math.hypot(*(block.share for block in self.blocks.values()))


@dataclass
class _Above:
    """What the block above hands down: absolute errors."""

    state: float  # of the estimate of its input
    shift: float  # of the decoder's state, beside the quantisation error


@dataclass
class _Link:
    """One call in its chain."""

    block: BlockMeasurement
    place: Holding
    closing: float = 0.0  # absolute error of the code that ends the segment below here


class _Phase(NamedTuple):
    """One phase of a step of checkpointing: its peak, how far that is above its start, and what the blocks hold."""

    kind: str
    block: str
    peak: float
    rise: float
    held: float


class CostModel:
    """Tells what choices of policies would cost.

    Args:
        measured: of the model.
    """

    def __init__(self, measured: Measurements) -> None:
        self.measured = measured
        self.blocks = {block.name: block for block in measured.blocks}
        self._candidates = {(b.name, c.policy): c for b in measured.blocks for c in b.candidates}
        self._kept = {b.name: self._stored_by_keeping(b) for b in measured.blocks}
        self._elsewhere = elsewhere_seconds(measured)

    def candidate(self, name: str, policy: Policy) -> Candidate:
        """Return what was measured of a block under a policy."""
        found = self._candidates.get((name, policy))
        if found is None:
            raise KeyError(f"block {name!r}: {policy} was not measured")
        return found

    def offers(self, name: str, policy: Policy) -> bool:
        """Whether a block can have a policy."""
        return (name, policy) in self._candidates

    def filled(self, wanted: Iterable[Policy]) -> dict[str, Policy]:
        """Return a policy for each block: the one that is wanted, or `Keep()`, or else `Store()`, as it allows."""
        choices = ((name, (policy, Keep(), Store())) for name, policy in zip(self.blocks, wanted, strict=True))
        return {name: next(p for p in those if self.offers(name, p)) for name, those in choices}

    def with_all(self, policy: Policy) -> dict[str, Policy]:
        """Return one policy for all blocks that allow it; see `filled`."""
        return self.filled([policy] * len(self.blocks))

    def of(self, policies: Mapping[str, Policy]) -> Estimate:
        """Return what `policies`, one for each block that was measured, would cost."""
        found = Estimate({name: BlockEstimate() for name in self.blocks})
        passed: set[str] = set()
        for chain in self.measured.chains:
            self._add_chain(chain, policies, found, passed)
        for name, block in self.blocks.items():
            candidate = self.candidate(name, policies[name])
            found.blocks[name].seconds = candidate.seconds
            if not block.calls:
                found.blocks[name].stored_bytes = candidate.stored_bytes
        found.seconds = sum(b.seconds for b in found.blocks.values()) + self._elsewhere
        found.peak_bytes = self._peak(policies, found, passed)
        return found

    def _add_chain(
        self, chain: tuple[str, ...], policies: Mapping[str, Policy], found: Estimate, passed: set[str]
    ) -> None:
        """Add the calls of one chain: bytes on the way up, as the forward pass does, errors on the way down.

        Args:
            chain: names of the blocks called.
            policies: of all blocks.
            found: what to add to.
            passed: takes the names of the blocks that the decoder passes by without a code of theirs.
        """
        layout = Layout([policies[name] for name in chain])
        links = [_Link(self.blocks[name], place) for name, place in zip(chain, layout, strict=True)]
        moved = 0.0  # increments that are not coded yet
        for link in links:
            block, place, own = link.block, link.place, found.blocks[link.block.name]
            if not place.policy.recomputes:
                own.stored_bytes += block.activation_bytes // block.calls
                continue
            numel, nbytes = block.numel // block.calls, block.stream_bytes // block.calls
            own.stored_bytes += block.surroundings_bytes // block.calls + place.nbytes(numel, nbytes)
            if place.policy.keeps_input:
                link.closing = _CLOSING_ERROR * moved if place.entry.stages else 0.0
                continue
            if place.policy.codec is not None:
                moved = 0.0
            elif place.entry.carries:
                passed.add(block.name)
            moved += block.increment_ratio * block.norm / math.sqrt(block.calls)
            if not place.is_exact:
                own.stored_bytes += min(numel, sample_count(numel)) * (nbytes // max(1, numel))
        above = _Above(0.0, 0.0)
        for link in reversed(links):
            above = self._restore(link, above, found.blocks[link.block.name])

    def _restore(self, link: _Link, above: _Above, own: BlockEstimate) -> _Above:
        """Add one call's error, and return what it hands down."""
        block, policy, place = link.block, link.place.policy, link.place
        if not policy.recomputes or policy.keeps_input:
            return _Above(0.0, link.closing)
        norm = block.norm / math.sqrt(block.calls)
        candidate = self.candidate(block.name, policy)
        shift = above.shift  # of the decoder's state below: the residual was rounded where the state was coded
        if policy.codec is not None and not place.is_first:
            decoded = self._unrefined(block, policy) or candidate
            shift = math.hypot(0.0 if place.is_end else shift, _ROUNDING * decoded.state_error * norm)
        if place.is_end:
            return _Above(0.0, shift)
        if place.is_first:
            wrong = handed = above.shift
        elif policy.codec is not None and not policy.needs_output:
            wrong = handed = math.hypot(candidate.state_error * norm, above.shift)
        else:
            # Added up, not in squares: the errors of one solution for the next are in much the same direction.
            wrong = candidate.state_error * norm + above.state
            handed = candidate.handed_error * norm + above.state
            if policy.codec is not None:  # clamped to the code's cell
                coded = self._unrefined(block, policy)
                most = 2 * coded.state_error * norm if coded is not None else math.inf
                wrong, handed = min(wrong, most), min(handed, most)
        relative = wrong / norm if norm > 0.0 else 0.0
        own.state_error = max(own.state_error, relative)
        own.share = math.hypot(own.share, self.share(block, policy, relative) / math.sqrt(block.calls))
        return _Above(handed, shift)

    def _unrefined(self, block: BlockMeasurement, policy: Policy) -> Candidate | None:
        """Return the code of `policy` as it is before any refinement."""
        plain = replace(policy, refine=0) if isinstance(policy, Code) else policy
        return self._candidates.get((block.name, plain))

    def share(self, block: BlockMeasurement, policy: Policy, state: float) -> float:
        """Return the gradient's relative error for a relative error of a block's state, as `policy` makes it."""
        if not 0.0 < state < math.inf:
            return state
        own = self._candidates.get((block.name, policy))
        points = [point for point in block.responses if min(point) > 0.0 and max(point) < math.inf]
        if own is not None and 0.0 < own.state_error < 1.0:
            known = (own.state_error, own.gradient_share)
        elif points:
            known = min(points, key=lambda point: abs(math.log(point[0] / state)))
        else:
            return 0.0
        return known[1] * (state / known[0]) ** _power(points, state)

    def _stored_by_keeping(self, block: BlockMeasurement) -> int:
        found = self._candidates.get((block.name, Keep()))
        return block.stream_bytes + block.surroundings_bytes if found is None else found.stored_bytes

    def _peak(self, policies: Mapping[str, Policy], found: Estimate, passed: Set[str]) -> float:
        more = {
            name: (found.blocks[name].stored_bytes - self._kept[name]) / max(1, block.calls)
            for name, block in self.blocks.items()
        }
        highest = alive = 0.0
        for phase in self._phases():
            alive += more[phase.block] if phase.kind == "forward" else 0.0
            level = phase.peak + alive
            if phase.kind != "between":
                block = self.blocks[phase.block]
                level += transient(block, policies[phase.block], phase.kind, phase.rise)
                if phase.block in passed and phase.kind == "backward":  # the decoder's state, there and below
                    level += 8 * block.numel / block.calls
            highest = max(highest, level)
            alive -= more[phase.block] if phase.kind == "backward" else 0.0
        return highest

    def _phases(self) -> Iterator[_Phase]:
        """Yield the phases of a step of checkpointing."""
        assert self.measured.profile is not None
        held = level = 0.0
        for kind, name, peak, end in self.measured.profile.phases:
            kept = self._kept[name] / max(1, self.blocks[name].calls) if kind != "between" else 0.0
            held += kept if kind == "forward" else 0.0
            yield _Phase(kind, name, peak, peak - level, held)
            held -= kept if kind == "backward" else 0.0
            level = end

    # --------------------------------------------------------------------------------------- the optimiser's view

    def problem(self) -> tuple[Problem, list[list[Policy]]]:
        """Return the choice as the optimiser sees it, block by block, and each block's options.

        The dependencies within a chain are left out, but for two: the last block of a chain is not offered what it
        would not get, its input being kept anyway; and the first pays for the code that will end its segment.
        """
        firsts = {chain[0]: chain for chain in self.measured.chains}
        lasts = {chain[-1] for chain in self.measured.chains}
        blocks = self.measured.blocks
        options = [[c.policy for c in b.candidates if b.name not in lasts or _is_exact(c.policy)] for b in blocks]
        shape = len(options), max(map(len, options), default=1)
        error, stored, own = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
        seconds = np.full(shape, np.inf)
        base, head = self._levels()
        for n, (block, policies) in enumerate(zip(blocks, options, strict=True)):
            for i, policy in enumerate(policies):
                candidate = self.candidate(block.name, policy)
                error[n, i], stored[n, i] = candidate.gradient_share**2, candidate.stored_bytes
                seconds[n, i] = candidate.seconds
                levels = (level + transient(block, policy, kind, r) for kind, (level, r) in base[block.name].items())
                own[n, i] = max(-stored[n, i], *levels)  # below what is stored under it, it sets no peak
                if policy.codec is not None and block.name in firsts:
                    error[n, i] += max(self._closing_share(firsts[block.name]) ** 2, _NEARLY_EXACT)
                    stored[n, i] += 2 * Codec(FINE_BITS).nbytes(block.numel)
        return Problem(error, stored, seconds, own, head), options

    def _closing_share(self, chain: tuple[str, ...]) -> float:
        """Return the share of a chain's first block, if everything above it is coded and ends in a closing code."""
        first, *others = (self.blocks[name] for name in chain)
        moved = first.increment_ratio * first.norm + sum(b.increment_ratio * b.norm for b in others)
        return self.share(first, _CLOSING, _CLOSING_ERROR * moved / first.norm) if first.norm else 0.0

    def _levels(self) -> tuple[dict[str, dict[str, tuple[float, float]]], float]:
        """Return, for each block's phases and for the head, the level less what checkpointing stores up to there."""
        nowhere = (-math.inf, 0.0)
        base = {name: {"backward": nowhere} for name in self.blocks}
        head, total = 0.0, sum(self._kept.values())
        for phase in self._phases():
            level = phase.peak - phase.held
            if phase.kind != "between":
                own = base[phase.block]
                own[phase.kind] = max(own.get(phase.kind, nowhere), (level, phase.rise))
            elif phase.held >= total * (1 - 1e-9):
                head = max(head, level)
        return base, head


def _power(points: list[tuple[float, float]], state: float) -> float:
    """Return with which power of the state's error the gradient's grows near `state`; below 1 where units switch."""
    nearest = sorted(sorted(points, key=lambda point: abs(math.log(point[0] / state)))[:2])
    if len(nearest) < 2 or nearest[0][0] == nearest[1][0]:
        return 1.0
    (x0, y0), (x1, y1) = nearest
    return min(1.0, max(_LEAST_POWER, math.log(y1 / y0) / math.log(x1 / x0)))


def _is_exact(policy: Policy) -> bool:
    return not policy.recomputes or policy.keeps_input


def elsewhere_seconds(measured: Measurements) -> float:
    """Return the time of a step outside of the blocks."""
    in_blocks = sum(b.forward_seconds + b.backward_seconds for b in measured.blocks)
    recomputed = sum(b.forward_seconds for b in measured.blocks)
    whole = measured.keep_seconds - recomputed if math.isnan(measured.plain_seconds) else measured.plain_seconds
    return max(0.0, whole - in_blocks)


def transient(block: BlockMeasurement, policy: Policy, kind: str, rise: float) -> float:
    """Return by how much a block's own forward or backward phase needs more than under `Keep()`, beside storage.

    Args:
        block: whose phase it is.
        policy: of the block.
        kind: "forward" or "backward".
        rise: of memory in that phase under `Keep()`.
    """
    calls = max(1, block.calls)
    numel, stream = block.numel / calls, block.stream_bytes / calls
    if not policy.recomputes:
        if kind == "forward":
            return 2 * stream - rise  # what rises is what is stored, and the output
        return -min(block.activation_bytes / calls, rise)  # what is recomputed under Keep() is stored already
    if policy.keeps_input or kind == "forward":
        return 0.0
    decoder = 0.0 if policy.codec is None else 4 * numel + (stream if stream < 4 * numel else 0)
    if policy.needs_output:  # the output that is solved for, and the cell of a code
        return decoder + 2 * stream + (0 if policy.codec is None else 8 * numel)
    return decoder
