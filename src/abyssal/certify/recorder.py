"""What is recorded of the calls of blocks: bytes and errors, in plain numbers.

The engine keeps these records and writes into them; here nothing is known of how it stores and restores.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from abyssal.codec.sample import Sample, SampleBudget


class Kept(Protocol):
    """What a record asks of a policy."""

    @property
    def keeps_input(self) -> bool:
        """Whether the exact input is kept."""

    @property
    def recomputes(self) -> bool:
        """Whether the block is run again."""

    @property
    def from_below(self) -> bool:
        """Whether the input is computed from states further below."""

    @property
    def codec(self) -> Any:
        """What codes the input; None where nothing does."""

    @property
    def device(self) -> str | None:
        """Where what is kept waits, if not where it was."""


class Called(Protocol):
    """What a record asks of a block."""

    name: str
    module: nn.Module
    policy: Any  # its own, whatever has overridden it


class Pass(Protocol):
    """What a record asks of its forward pass."""

    number: int
    visited: bool
    records: list[CallRecord]
    samples: SampleBudget

    def end(self, call: int) -> None:
        """The call with this place in `records` has returned."""


class Judge(Protocol):
    """Who decides what follows from an error."""

    def judge(self, found: list[Figures]) -> None:
        """Act on what one backward pass found of one model."""


class CallRecord:
    """What is known of one call of one block, in plain numbers; outlives the call's cell.

    Attributes:
        block, policy: what was called, and how its input was to be restored.
        is_exact: its exact input is kept: by policy, or as the end of a chain.
        input_error: relative error of the restored input, or of the output recomputed from it where that is
            larger; None if not measured.
        output_error: relative difference of the recomputed output; None if not compared.
        held_bytes, code_bytes, runner_bytes, sample_bytes, surroundings_bytes: what is kept for the backward
            pass: the exact input; its code or what a policy of the user's keeps; what the decoder of a coded chain
            starts from; the certificate's samples; random states and buffers.
        drifted: whether an error was beyond what is allowed.
        note: what is out of the ordinary, in words.
    """

    __slots__ = (
        "block",
        "code_bytes",
        "drifted",
        "element_size",
        "held_bytes",
        "input_error",
        "is_exact",
        "is_linked",
        "judge",
        "note",
        "output_error",
        "place",
        "policy",
        "runner_bytes",
        "sample_bytes",
        "surroundings_bytes",
    )

    def __init__(self, judge: Judge, block: Called, policy: Kept, place: tuple[Pass, int]) -> None:
        """Begin the record of a call of `block` under `policy`, with its forward pass and place in that."""
        self.judge, self.block, self.policy, self.place = judge, block, policy, place
        self.input_error: float | None = None
        self.output_error: float | None = None
        self.note = ""
        self.held_bytes = self.code_bytes = self.runner_bytes = self.surroundings_bytes = self.sample_bytes = 0
        self.is_exact = False
        self.is_linked = False  # to the call before
        self.element_size = 4  # of the stream
        self.drifted = False

    @property
    def stored_bytes(self) -> int:
        """All that this call keeps for the backward pass in place of the stream."""
        stream = self.held_bytes + self.code_bytes + self.runner_bytes
        return stream + self.surroundings_bytes + self.sample_bytes

    @property
    def host_bytes(self) -> int:
        """What of that waits in host memory."""
        if self.policy.device is None:
            return 0
        return self.code_bytes + (self.held_bytes if self.policy.keeps_input else 0)

    @property
    def error(self) -> float | None:
        """The worst of what was measured; 0.0 for an exact input whose output was not found to differ."""
        if self.is_exact and self.input_error is None:
            return self.output_error or 0.0
        return worse(self.input_error, self.output_error)

    def hold(self, held: Tensor) -> None:
        """The exact input is kept, so far."""
        self.is_exact, self.held_bytes, self.element_size = True, held.nbytes, held.element_size()

    def release(self, output: Sample | None) -> None:
        """The exact input is about to be let go.

        Args:
            output: the sample of the output, not needed any more: the next block's input is it.
        """
        self.is_exact, self.held_bytes, self.runner_bytes = False, 0, 0
        if output is not None:
            self.sample_bytes -= output.nbytes
            self.place[0].samples.give_back(output.nbytes)

    def sample(self, true: Tensor, weighted: bool = False) -> Sample | None:
        """Sample the true input or output.

        Args:
            true: what to sample. [*stream]
            weighted: whether errors are relative to each position's own spread.
        """
        forward_pass, call = self.place
        sample, nbytes = forward_pass.samples.draw(true, call, len(forward_pass.records), weighted=weighted)
        self.sample_bytes += nbytes
        return sample

    def spare(self) -> None:
        """No gradient will ask for this call: it is in no graph, and nothing is kept."""
        self.place[0].samples.give_back(self.sample_bytes)
        self.note = "needs no gradients: nothing is kept"
        self.held_bytes = self.code_bytes = self.runner_bytes = self.surroundings_bytes = self.sample_bytes = 0


Extremes = tuple[Tensor, Tensor]
"""The smallest and the largest value of a state, 0-d."""


class Measures(Protocol):
    """What a recorder asks of the measurements of a backward pass."""

    def measure(
        self, record: CallRecord, what: str, sample: Sample | None, state: Tensor, anchor: Extremes | None = None
    ) -> None:
        """Compare a state with the sample of the true one."""


class Recorder:
    """Observes one call for its record; goes with the call, where the record outlives it.

    Attributes:
        record: of the call.
        checks_output: whether the output of the second run is to be compared. The end of a chain, whose input is
            exact, has nothing else to tell a block that is random; and where a block blows an error up, its gradient
            is further off than its input.
    """

    __slots__ = ("_input", "_output", "checks_output", "record")

    def __init__(
        self, judge: Judge, block: Called, policy: Kept, forward_pass: Pass, linked: bool, checks_output: bool
    ) -> None:
        """Begin the record of the next call of a forward pass, without samples."""
        self.record = CallRecord(judge, block, policy, (forward_pass, len(forward_pass.records)))
        self.record.is_linked, self.checks_output = linked, checks_output
        self._input: Sample | None = None  # of the true input
        self._output: Sample | None = None

    def entered(self, exact: Tensor, policy: Kept, code_bytes: int) -> None:
        """The exact input is kept, so far, and a code of it."""
        self.record.policy, self.record.code_bytes = policy, code_bytes
        self.record.hold(exact)

    def returned(self, output: Tensor | None, runner_bytes: int, surroundings_bytes: int) -> None:
        """Sample the first run's output, if it is to be compared."""
        self.record.runner_bytes, self.record.surroundings_bytes = runner_bytes, surroundings_bytes
        if self.checks_output and output is not None:
            self._output = self.record.sample(output)

    def linked(self, exact: Tensor) -> None:
        """Sample the true input, if the budget allows."""
        self._input = self.record.sample(exact, weighted=True)

    def released(self, exact: Tensor, kept_bytes: int) -> None:
        """Sample the true input, if that is not done."""
        self.record.code_bytes += kept_bytes
        self.record.release(self._output)
        self._output = None
        if self._input is None:
            self.linked(exact)

    def visited(self) -> None:
        """A backward pass came by an exact input: the next entry from outside begins a new forward pass."""
        self.record.place[0].visited = True

    def restored(self, state: Tensor, source: Extremes | None, errors: Measures) -> None:
        """A backward pass came by: compare the restored input."""
        self.record.place[0].visited = True
        errors.measure(self.record, "input", self._input, state, source)

    def recomputed(self, output: Tensor, above: object, source: Extremes | None, errors: Measures) -> None:
        """Compare the output of a later run."""
        if self._output is not None:
            errors.measure(self.record, "output", self._output, output)
        elif self.checks_output and isinstance(above, Recorder):
            errors.measure(self.record, "image", above._input, output, source)


class Figures(NamedTuple):
    """A measurement that was read."""

    record: CallRecord
    what: str  # "input", "output" or "image"
    error: float | None  # relative error; None if this call was not sampled
    dtype: torch.dtype  # of what was compared
    finite: bool  # whether the whole restored state is
    anchor_is_finite: bool  # whether what it was restored from is: else the network itself overflowed


def worse(a: float | None, b: float | None) -> float | None:
    """Return the larger error; NaN is the largest, None is none."""
    known = [x for x in (a, b) if x is not None]
    if any(math.isnan(x) for x in known):
        return math.nan
    return max(known, default=None)
