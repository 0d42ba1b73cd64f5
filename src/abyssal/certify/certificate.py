"""The certificate: per block, how its input was restored and how far that was from the true one, in every step.

The figure is the relative error of the *state* in the Euclidean norm, estimated from a seeded sample of the
true input (`sample.py`). It is not the error of the gradient, which is the state's error times a sensitivity
that only a calibration can measure.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from abyssal.certify.history import Step
from abyssal.engine.session import CallRecord, worse

if TYPE_CHECKING:
    from abyssal.engine.block import Block


@dataclass(frozen=True)
class BlockCertificate:
    """One block in the last forward pass and the backward pass that followed.

    Attributes:
        name: the block's name in the model.
        policy: how its input is restored, e.g. "Reverse(1)"; "Reverse(1), end" where a chain's one exact
            state is this block's input; "Code(4), start" where a coded chain begins, exactly and at no cost.
        error: relative error of the restored input in the Euclidean norm, estimated from the sample; the
            worst of the calls. 0.0 where the exact input is kept, unless the recomputed output was compared
            and differed: then that difference. None where nothing was measured (no backward pass yet, or not
            sampled in this pass).
        drifted: whether it was beyond the tolerance (a recomputed output: beyond rounding).
        stored_bytes: all that was kept for the stream: exact inputs, samples, random states, changed buffers.
            What plain autograd keeps for a `Store()` block is not counted.
        host_bytes: what of that waits in host memory (`Keep(device="cpu")`).
        calls: how often the block was called.
        note: what is out of the ordinary, in words.
    """

    name: str
    policy: str
    error: float | None
    drifted: bool
    stored_bytes: int
    host_bytes: int
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
        gradient_error: estimate of the relative error of the whole gradient, where the policies are those of an
            `abyssal.plan`: the root of the sum of squares of each state's error times the sensitivity that the plan
            measured. None without a plan, since a state's error alone does not tell it.
        history: what each of the last 1,000 backward passes found, oldest first.
    """

    blocks: list[BlockCertificate]
    tolerance: float
    chains: int
    note: str = ""
    gradient_error: float | None = None
    history: tuple[Step, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """All that the last forward pass kept for the stream, in bytes."""
        return sum(block.stored_bytes for block in self.blocks)

    @property
    def error(self) -> float | None:
        """The largest relative error of a restored state; None if none of those that were restored was measured."""
        measured = [block.error for block in self.blocks if block.error is not None]
        if self.unmeasured and not any(measured):
            return None
        worst: float | None = None
        for error in measured:
            worst = worse(worst, error)
        return worst

    @property
    def unmeasured(self) -> int:
        """How many of the blocks that were called have no figure: no backward pass yet, or not their turn."""
        return sum(block.error is None and block.calls > 0 for block in self.blocks)

    @property
    def drifted(self) -> list[str]:
        """Names of the blocks that drifted beyond the tolerance."""
        return [block.name for block in self.blocks if block.drifted]

    def scalars(self, prefix: str = "abyssal/") -> dict[str, float]:
        """Return the figures of the last step by name, for TensorBoard and the like.

        `for name, value in certificate.scalars().items(): writer.add_scalar(name, value, step)`

        Args:
            prefix: of each name.

        Returns:
            `error`, `gradient_error`, `stored_bytes`, `drifted` (how many blocks) and `error/<block>`, those that are
            known.
        """
        known: dict[str, float | None] = {
            "error": self.error,
            "gradient_error": self.gradient_error,
            "stored_bytes": float(self.stored_bytes),
            "drifted": float(len(self.drifted)),
            **{f"error/{block.name}": block.error for block in self.blocks},
        }
        return {prefix + name: value for name, value in known.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the history as plain numbers, strings and lists, for JSON."""
        return {
            "tolerance": self.tolerance,
            "chains": self.chains,
            "stored_bytes": self.stored_bytes,
            "error": self.error,
            "gradient_error": self.gradient_error,
            "unmeasured": self.unmeasured,
            "drifted": self.drifted,
            "note": self.note,
            "blocks": [asdict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        """Return the table."""
        from abyssal.certify.table import certificate_table

        return certificate_table(self)


def certify(patches: list[Block]) -> Certificate:
    """Build the certificate of the blocks patched as `patches`."""
    sessions = {id(patch.session): patch.session for patch in patches}
    records = [record for session in sessions.values() for record in session.records]
    by_patch: dict[int, list[CallRecord]] = {}
    for record in records:
        by_patch.setdefault(id(record.block), []).append(record)
    blocks = [_certify_block(patch, by_patch.get(id(patch), [])) for patch in patches]
    reversing = [r for r in records if r.policy.recomputes and not r.policy.keeps_input]
    ends = sum(record.is_exact for record in reversing)
    note = ""
    refused = any(r.note.startswith("kept: ") for r in reversing)
    if len(reversing) > 1 and ends == len(reversing) and not refused:
        note = (
            "No block was called with the previous block's very output, so every input is kept exactly. Something "
            "comes between (an addition, an activation, a cast): make it part of the block, or pass blocks=."
        )
    tolerance = min(session.tolerance for session in sessions.values())
    history = tuple(step for session in sessions.values() for step in session.history) if len(sessions) == 1 else ()
    return Certificate(blocks, tolerance, ends, note, _gradient_error(records), history)


def _gradient_error(records: list[CallRecord]) -> float | None:
    """Estimate the relative error of the gradient from the states' errors and a plan's sensitivities."""
    total, known = 0.0, False
    for record in records:
        sensitivity = record.session.sensitivities.get(record.block.name)
        if sensitivity is not None and record.error is not None:
            total, known = total + (sensitivity * record.error) ** 2, True
    return math.sqrt(total) if known else None


def _certify_block(patch: Block, records: list[CallRecord]) -> BlockCertificate:
    error: float | None = None
    for record in records:
        error = worse(error, record.error)
    notes = [patch.note, *(record.note for record in records)]
    if patch.name in patch.session.overrides:
        notes.append(f"{patch.policy} {patch.session.overrides[patch.name][1]}")
    if not records:
        notes.append("not called with gradients yet")
    last = records[-1] if records else None
    policy = str(last.policy if last else patch.session.policy_of(patch))
    if last is not None and last.is_exact and not last.policy.keeps_input:
        policy += ", end"
    elif last is not None and last.policy.codec is not None and last.code_bytes == 0:
        policy += ", start"
    return BlockCertificate(
        name=patch.name,
        policy=policy,
        error=error,
        drifted=any(record.drifted for record in records),
        stored_bytes=sum(record.stored_bytes for record in records),
        host_bytes=sum(record.host_bytes for record in records),
        calls=len(records),
        note="; ".join(dict.fromkeys(filter(None, notes))),
    )
