"""What each place of a chain keeps, from the policies of its calls alone: the engine runs it, the planner prices it.

Which calls are coded depends on those below them: a code is of the way from what the decoder knows so far, the *runner*
of `codec/feedback.py`, which says what each entry means:

    entered with        while a runner is carried                        while none is
    a codec             its own code; the runner moves there             nothing; a runner starts here
    the input kept      a fine code, in two stages; the runner ends      nothing
    any other           nothing; the runner stays behind                 nothing

The last call of a chain keeps its exact input whatever its policy says, since nothing above could restore it, and
beside it what the decoder starts from: how far the runner is from that state, coded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from abyssal.codec.feedback import FINE_BITS
from abyssal.codec.quantiser import Codec
from abyssal.engine.policy import Policy

DEFAULT_GROUP = 64


class Entry(NamedTuple):
    """What entering a call does to the code of its chain.

    Attributes:
        codec: by which the way from the runner to the call's input is coded; None for not at all.
        stages: how often: once, or the error of the first code once more.
        carries: whether a runner is carried from here.
        lag: how many stages it takes to code what the runner lacks of the exact input: none where it starts, one where
            it has just been moved, two where it has stayed behind.
        group: of the last codec; its elements share a scale.
    """

    codec: Codec | None = None
    stages: int = 0
    carries: bool = False
    lag: int = 0
    group: int = DEFAULT_GROUP


NOTHING = Entry()


def entered(policy: Policy, before: Entry) -> Entry:
    """Return what entering a call under `policy` does, after the entry into the call below it."""
    group = before.group if policy.codec is None else policy.codec.group
    if not before.carries:
        return Entry(carries=policy.codec is not None, group=group)
    if policy.codec is not None:
        return Entry(policy.codec, 1, True, 1, group)
    if policy.keeps_input:
        return Entry(Codec(FINE_BITS, group), 2, group=group)
    return Entry(carries=True, lag=2, group=group)


class Holding(NamedTuple):
    """What one call of a chain holds on to.

    Attributes:
        policy: of the call.
        entry: of the code.
        is_end: whether nothing above can restore its input.
    """

    policy: Policy
    entry: Entry
    is_end: bool

    @property
    def is_exact(self) -> bool:
        """Whether its exact input is kept."""
        return self.is_end or self.policy.keeps_input

    @property
    def is_first(self) -> bool:
        """Whether it is the first coded one of a segment: its input is what the decoder ends with."""
        return self.policy.codec is not None and self.entry.codec is None

    def nbytes(self, numel: int, stream_bytes: int) -> int:
        """Return the bytes that stand in place of the input, for a stream of so many elements and bytes.

        What a policy of the user's own keeps is not known here, and samples and surroundings are not counted.
        """
        kept = stream_bytes if self.is_exact else 0
        if self.entry.codec is not None:
            kept += self.entry.stages * self.entry.codec.nbytes(numel)
        if self.is_end and self.entry.lag:
            kept += self.entry.lag * Codec(FINE_BITS, self.entry.group).nbytes(numel)
        return kept


class Layout(list[Holding]):
    """The places of one chain, first to last; one `Store()` ends its segment, and what is above starts anew."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        """Lay out a chain of calls, each with the output of the one before, under these policies."""
        super().__init__()
        entry = NOTHING
        for i, policy in enumerate(policies):
            entry = entered(policy, entry) if policy.recomputes else NOTHING
            is_end = i + 1 == len(policies) or policy.keeps_input or not policies[i + 1].recomputes
            self.append(Holding(policy, entry, is_end))
            if policy.keeps_input:
                entry = NOTHING
