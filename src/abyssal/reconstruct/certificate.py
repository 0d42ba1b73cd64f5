"""The certificate: per block, how its input was restored and how far that was from the true one, in every step.

The figure is the relative error of the *state* in the Euclidean norm, estimated from a seeded sample of the
true input (`sample.py`). It is not the error of the gradient, which is the state's error times a sensitivity
that only a calibration can measure.

**The default tolerance, 1e-2.** A bfloat16 stream rounds every element by up to 2^-9 = 2e-3 of its size in
every block, and the rounding of L blocks adds up to about sqrt(L) times that: 1e-2 at 25 blocks. So 1e-2 is
where restoring a state costs as much accuracy as holding the stream in bfloat16 would; docs/certificate.md has
the measured gradient errors that go with it.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor

from abyssal.reconstruct.backward import Figures
from abyssal.reconstruct.policy import Keep, Policy, Store
from abyssal.reconstruct.ranks import highest_on_any_rank
from abyssal.reconstruct.sample import BYTES_PER_PASS, SMALLEST, Sample, is_dense, sample_count

if TYPE_CHECKING:
    from abyssal.reconstruct.engine import PatchedForward

OnDrift = Literal["warn", "raise", "keep"]
DEFAULT_TOLERANCE = 1e-2
# Checking a kept block's output costs it the early stop of its recomputation (about a tenth of a step), so
# after every block's first call one block in this many is checked per pass, in rotation.
_OUTPUT_CHECK_EVERY = 16


def rounding(dtype: torch.dtype) -> float:
    """Return how far two evaluations of one block at the same input may differ: sqrt(eps), relative.

    They agree to the last bit where the arithmetic is deterministic, and to a few roundings where a device adds
    up in another order. A block that differs by more is random, however small its branch is beside the stream.
    """
    return math.sqrt(torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


class DriftError(RuntimeError):
    """A block's input was restored further from the true one than the tolerance allows."""


class NonFiniteError(DriftError):
    """A restored state has infinite or undefined values, where the forward pass had none."""


class DriftWarning(UserWarning):
    """A block's input was restored further from the true one than the tolerance allows."""


class CallRecord:
    """What is known of one call of one block, in plain numbers; outlives the call's cell."""

    __slots__ = (
        "_seed",
        "block",
        "error",
        "held_bytes",
        "is_end",
        "note",
        "policy",
        "sample_bytes",
        "session",
        "surroundings_bytes",
    )

    def __init__(self, session: Session, block: PatchedForward, policy: Policy, seed: tuple[int, int]) -> None:
        """Begin the record of a call of `block` under `policy`."""
        self.session, self.block, self.policy = session, block, policy
        self.error: float | None = None
        self.note = ""
        self.held_bytes = self.surroundings_bytes = self.sample_bytes = 0
        self.is_end = False  # holds its exact input
        self._seed = seed

    @property
    def stored_bytes(self) -> int:
        """All that this call keeps for the backward pass in place of the stream."""
        return self.held_bytes + self.surroundings_bytes + self.sample_bytes

    def hold(self, held: Tensor) -> None:
        """The exact input is kept, so far."""
        self.is_end, self.held_bytes, self.error = True, held.nbytes, 0.0

    def release(self, held: Tensor) -> Sample | None:
        """The exact input is about to be let go: sample it, if the budget of the pass allows."""
        self.is_end, self.held_bytes, self.error = False, 0, None
        return self._sampled(held)

    def sample_output(self, output: Tensor) -> Sample | None:
        """Sample the true output of a kept block."""
        return self._sampled(output)

    def _sampled(self, true: Tensor) -> Sample | None:
        count = self.session.grant(true) if is_dense(true) else 0
        if count == 0:
            return None
        sample = Sample(true, count, *self._seed)
        self.sample_bytes += sample.nbytes
        return sample

    def visited(self) -> None:
        """A backward pass came by."""
        self.session.visited(self)


class _ForwardPass:
    """The calls since the first block of the model was last entered from outside."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.records: list[CallRecord] = []
        self.called: set[int] = set()
        # Sequence numbers of the graph nodes that the blocks made: where each call began, and where it ended.
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.visited = False
        self.sample_bytes = 0


class Session:
    """What the patched blocks of one model share: tolerance, what to do on drift, and the running records."""

    def __init__(self, on_drift: OnDrift, tolerance: float) -> None:
        """Begin with nothing recorded."""
        self.on_drift, self.tolerance = on_drift, tolerance
        self.paused = 0
        self.overrides: dict[str, Policy] = {}
        self._names: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self._pass = _ForwardPass(0)
        self._expected = max(1, len(self._names))
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the settings; records belong to graphs, which can be neither."""
        return {key: self.__dict__[key] for key in ("on_drift", "tolerance", "overrides", "_names")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew with the settings."""
        self.__dict__.update(state)
        self.paused = 0
        self._reset()

    def join(self, names: Iterable[str]) -> None:
        """Take note of which blocks there are."""
        self._names = list(names)
        self._expected = max(1, len(self._names))

    def policy_of(self, block: PatchedForward) -> Policy:
        """The policy in force for `block`: its own, unless drift has overridden it."""
        return self.overrides.get(block.name, block.policy)

    # ------------------------------------------------------------------ forward

    def begin_call(self, block: PatchedForward, policy: Policy, stream: Tensor | None, linked: bool) -> CallRecord:
        """Record a call; a forward pass begins when a block is entered from outside once more."""
        now = self._pass
        if not linked and (now.visited or id(block) in now.called) and not _belongs(stream, now):
            self._expected = max(1, len(now.records))
            now = self._pass = _ForwardPass(now.number + 1)
        record = CallRecord(self, block, policy, (now.number, len(now.records)))
        now.records.append(record)
        now.called.add(id(block))
        now.begins.append(torch.autograd._get_sequence_nr())
        now.ends.append(now.begins[-1])  # until it returns
        return record

    def end_call(self, record: CallRecord) -> None:
        """Note which graph nodes the block made, by which later inputs are told to belong to this pass."""
        number, call = record._seed
        if number == self._pass.number:
            self._pass.ends[call] = torch.autograd._get_sequence_nr()

    def grant(self, tensor: Tensor) -> int:
        """Return how many elements of `tensor` may be sampled now, within the budget of one forward pass."""
        if tensor.numel() == 0:
            return 0
        now, size = self._pass, tensor.element_size()
        fair = BYTES_PER_PASS // (self._expected * size)
        count = sample_count(tensor.numel())
        if fair < SMALLEST and fair < count:  # more blocks than can be sampled at once: rotate
            every = -(-self._expected * SMALLEST * size // BYTES_PER_PASS)
            if (len(now.records) + now.number) % every:
                return 0
            fair = SMALLEST
        count = min(count, fair, (BYTES_PER_PASS - now.sample_bytes) // size)
        now.sample_bytes += count * size
        return count

    def checks_output(self, block: PatchedForward, policy: Policy) -> bool:
        """Whether it is a kept block's turn to have its recomputed output compared."""
        if not policy.keeps_input:
            return False
        now = self._pass
        if block.name in self.overrides:  # it drifted before, and may do so for being random
            return True
        return now.number == 0 or (len(now.records) + now.number) % _OUTPUT_CHECK_EVERY == 0

    def tell_once(self, what: str, text: str) -> None:
        """Warn the user, once per model."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(text, stacklevel=2)

    # ------------------------------------------------------------------ backward

    def visited(self, record: CallRecord) -> None:
        """A backward pass reached a call: the next entry from outside begins a new forward pass."""
        if record._seed[0] == self._pass.number:
            self._pass.visited = True

    def judge(self, found: list[Figures], anchors_finite: bool) -> None:
        """Enter what one backward pass measured and act on drift.

        Args:
            found: what was measured, of this session's calls only.
            anchors_finite: whether all exact states that chains were restored from are finite; if not, the
                network itself overflowed, and restoring is not to blame.

        Raises:
            NonFiniteError: if a restored state is not finite though the forward pass was.
            DriftError: if an error exceeds the tolerance and `on_drift` is "raise".
        """
        drifted: list[tuple[CallRecord, str]] = []
        refused: CallRecord | None = None
        for figures in found:
            record, error = figures.record, figures.error
            record.error = _worse(record.error, error)
            if not anchors_finite or not figures.true_is_finite:
                continue
            allowed = self.tolerance if figures.what == "input" else min(self.tolerance, rounding(figures.dtype))
            if not figures.finite:
                refused = refused or record
            elif error is not None and not error <= allowed:
                drifted.append((record, figures.what))
        if self.on_drift == "keep":
            self._fall_back([*drifted, *([(refused, "input")] if refused else [])], found)
        if refused is not None:
            self._refuse(refused)
        if drifted:
            self._act(drifted)

    def _fall_back(self, drifted: list[tuple[CallRecord, str]], found: list[Figures]) -> None:
        """Keep what drifted, from the next step on, on all ranks; what kept its input and drifted is stored."""
        levels = dict.fromkeys(self._names, 0)
        for record, what in drifted:
            levels[record.block.name] = max(levels[record.block.name], 2 if what == "output" else 1)
        agreed = highest_on_any_rank(list(levels.values()), (figures.record.block.module for figures in found))
        for name, level in zip(levels, agreed, strict=True):
            if level:
                self.overrides[name] = Store() if level == 2 else Keep()

    def _refuse(self, record: CallRecord) -> NoReturn:
        advice = "Give it the policy abyssal.Keep()."
        if self.on_drift == "keep":
            advice = "Skip this step: the block is kept from now on (on_drift='keep')."
        raise NonFiniteError(
            f"block {record.block.name!r}: its input, restored by {record.policy}, is not finite, but the forward "
            f"pass was. The gradients of this step are not usable; its residual branch does not contract. {advice}"
        )

    def _act(self, drifted: list[tuple[CallRecord, str]]) -> None:
        worst: dict[str, CallRecord] = {}
        for record, what in drifted:
            name = record.block.name
            if name not in worst or (record.error or 0.0) > (worst[name].error or 0.0):
                worst[name] = record
            record.note = _EXPLANATION[what]
        text = _describe(worst.values(), self.tolerance)
        if self.on_drift == "raise":
            raise DriftError(text + " Stopped, because on_drift='raise'.")
        if self.on_drift == "keep":
            text += " From the next step on they are kept (on_drift='keep'); this step's gradients carry the error."
        if worst.keys() - self._told:
            self._told |= worst.keys()
            warnings.warn(text, DriftWarning, stacklevel=2)

    @property
    def records(self) -> list[CallRecord]:
        """The calls of the last forward pass."""
        return list(self._pass.records)


def _cause(record: CallRecord) -> str:
    return f", {record.note}" if record.note == _EXPLANATION["output"] else ""


_EXPLANATION = {
    "input": "drifted",
    "output": "recomputed output differs from the true one: the block is random or depends on a counter",
}


def _describe(worst: Iterable[CallRecord], tolerance: float) -> str:
    ranked = sorted(worst, key=lambda record: -(record.error or 0.0))
    shown = ", ".join(f"{r.block.name!r} ({r.policy}: {r.error:.1e}{_cause(r)})" for r in ranked[:4])
    more = f" and {len(ranked) - 4} more" if len(ranked) > 4 else ""
    return (
        f"{len(ranked)} block(s) drifted beyond the tolerance of {tolerance:g} (relative): {shown}{more}. "
        "Do not trust this step's gradients. Give these blocks the policy abyssal.Keep() (abyssal.Store() if random), "
        "or call abyssal.reconstruct(..., on_drift='keep'); print(abyssal.certificate(model)) shows every block."
    )


def _worse(a: float | None, b: float | None) -> float | None:
    known = [x for x in (a, b) if x is not None]
    if any(math.isnan(x) for x in known):
        return math.nan
    return max(known, default=None)


def _belongs(stream: Tensor | None, calls: _ForwardPass, most: int = 512) -> bool:
    """Whether `stream` is of this forward pass, told by graph nodes' sequence numbers.

    It is, if it was computed before the first of its blocks, or from one of their outputs.
    """
    if stream is None or stream.grad_fn is None or not calls.begins:
        return False
    if stream.grad_fn._sequence_nr() < calls.begins[0]:
        return True
    pending = [stream.grad_fn]
    seen: set[object] = set()
    while pending and len(seen) < most:
        node = pending.pop()
        number = node._sequence_nr()
        if number < calls.begins[0] or node in seen:
            continue
        call = bisect_right(calls.begins, number) - 1
        if number < calls.ends[call]:
            return True
        seen.add(node)
        pending.extend(next_node for next_node, _ in node.next_functions if next_node is not None)
    return False


# ---------------------------------------------------------------------- what the user sees


@dataclass(frozen=True)
class BlockCertificate:
    """One block in the last forward pass and the backward pass that followed.

    Attributes:
        name: the block's name in the model.
        policy: how its input is restored, e.g. "Reverse(1)"; "Reverse(1), end" where a chain's one exact
            state is this block's input.
        error: relative error of the restored input in the Euclidean norm, estimated from the sample; the
            worst of the calls; 0.0 where the exact input is kept (and, for a kept block, its recomputed output
            agreed); None where nothing was measured (no backward pass yet, or not sampled in this pass).
        stored_bytes: all that was kept for the stream: exact inputs, samples, random states, changed buffers.
            What plain autograd keeps for a `Store()` block is not counted.
        calls: how often the block was called.
        note: what is out of the ordinary, in words.
    """

    name: str
    policy: str
    error: float | None
    stored_bytes: int
    calls: int
    note: str


@dataclass(frozen=True)
class Certificate:
    """How the last forward pass was kept and restored; `print` shows it as a table.

    Attributes:
        blocks: one entry per reconstructed block, in the model's order.
        tolerance: the relative state error above which a block counts as drifted.
        chains: runs of blocks linked output to input in the last forward pass; each keeps one exact state.
        note: what concerns the whole model, in words.
    """

    blocks: list[BlockCertificate]
    tolerance: float
    chains: int
    note: str = ""

    @property
    def stored_bytes(self) -> int:
        """All that the last forward pass kept for the stream, in bytes."""
        return sum(block.stored_bytes for block in self.blocks)

    @property
    def error(self) -> float | None:
        """The largest relative error of a restored state; None if nothing was measured."""
        worst: float | None = None
        for block in self.blocks:
            worst = _worse(worst, block.error)
        return worst

    @property
    def drifted(self) -> list[str]:
        """Names of the blocks whose error exceeds the tolerance."""
        return [b.name for b in self.blocks if b.error is not None and not b.error <= self.tolerance]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists, for JSON."""
        return {
            "tolerance": self.tolerance,
            "chains": self.chains,
            "stored_bytes": self.stored_bytes,
            "error": self.error,
            "drifted": self.drifted,
            "note": self.note,
            "blocks": [asdict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        """Return the table."""
        from abyssal.reconstruct.show import certificate_table

        return certificate_table(self)


def certify(patches: list[PatchedForward]) -> Certificate:
    """Build the certificate of the blocks patched as `patches`."""
    sessions = {id(patch.session): patch.session for patch in patches}
    records = [record for session in sessions.values() for record in session.records]
    blocks = [_certify_block(patch, [r for r in records if r.block is patch]) for patch in patches]
    recomputed = [r for r in records if r.policy.recomputes]
    ends = sum(r.is_end for r in recomputed if not r.policy.keeps_input)
    chained = [r for r in recomputed if not r.policy.keeps_input]
    note = ""
    if len(chained) > 1 and ends == len(chained):
        note = (
            "No block was called with the previous block's very output, so every input is kept exactly. Something "
            "comes between (an addition, an activation, a cast): make it part of the block, or pass blocks=."
        )
    tolerance = min(session.tolerance for session in sessions.values())
    return Certificate(blocks, tolerance, ends, note)


def _certify_block(patch: PatchedForward, records: list[CallRecord]) -> BlockCertificate:
    policy = str(patch.session.policy_of(patch))
    error: float | None = None
    for record in records:
        error = _worse(error, record.error)
    notes = [patch.note, *(record.note for record in records)]
    if patch.name in patch.session.overrides:
        notes.append(f"{patch.policy} drifted, kept since")
    if not records:
        notes.append("not called with gradients yet")
    if records and not records[-1].policy.keeps_input and records[-1].is_end:
        policy += ", end"
    return BlockCertificate(
        name=patch.name,
        policy=policy,
        error=error,
        stored_bytes=sum(record.stored_bytes for record in records),
        calls=len(records),
        note="; ".join(dict.fromkeys(filter(None, notes))),
    )
