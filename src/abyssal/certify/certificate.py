"""The certificate: per block, how its input was restored and how far that was from the true one, in every step.

The figure is the relative error of the *state* in the Euclidean norm, estimated from a seeded sample of the
true input (`codec/sample.py`). It is not the error of the gradient, which is the state's error times a sensitivity
that only a calibration can measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from abyssal.certify.drift import CODED_ALLOWANCE
from abyssal.certify.history import Step
from abyssal.certify.recorder import CallRecord, worse
from abyssal.util.text import bytes_in_words, printed

if TYPE_CHECKING:
    from rich.text import Text


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
        return certificate_table(self)


class Facts(NamedTuple):
    """What a certificate is made of, of one block.

    Attributes:
        name: of the block.
        policy: in force for its next call, in words.
        notes: what is out of the ordinary.
        records: of its calls in the last forward pass.
        sensitivity: relative error of the whole gradient per relative error of its state, where a plan measured it.
    """

    name: str
    policy: str
    notes: list[str]
    records: list[CallRecord]
    sensitivity: float | None


def certify(blocks: Sequence[Facts], tolerance: float, history: Iterable[Step]) -> Certificate:
    """Build the certificate of a model's blocks."""
    records = [record for block in blocks for record in block.records]
    reversing = [r for r in records if r.policy.recomputes and not r.policy.keeps_input]
    ends = sum(record.is_exact for record in reversing)
    note = ""
    refused = any(r.note.startswith("kept: ") for r in reversing)
    if len(reversing) > 1 and ends == len(reversing) and not refused:
        note = (
            "No block was called with the previous block's very output, so every input is kept exactly. Something "
            "comes between (an addition, an activation, a cast): make it part of the block, or pass blocks=."
        )
    certified = [_certify_block(block) for block in blocks]
    return Certificate(certified, tolerance, ends, note, _gradient_error(blocks), tuple(history))


def _gradient_error(blocks: Sequence[Facts]) -> float | None:
    """Estimate the relative error of the gradient from the states' errors and a plan's sensitivities."""
    parts = [
        block.sensitivity * record.error
        for block in blocks
        for record in block.records
        if block.sensitivity is not None and record.error is not None
    ]
    return math.hypot(*parts) if parts else None


def _certify_block(block: Facts) -> BlockCertificate:
    records = block.records
    error: float | None = None
    for record in records:
        error = worse(error, record.error)
    notes = [*block.notes, *(record.note for record in records)]
    if not records:
        notes.append("not called with gradients yet")
    last = records[-1] if records else None
    policy = str(last.policy) if last else block.policy
    if last is not None and last.is_exact and not last.policy.keeps_input:
        policy += ", end"
    elif last is not None and last.policy.codec is not None and last.code_bytes == 0:
        policy += ", start"
    return BlockCertificate(
        name=block.name,
        policy=policy,
        error=error,
        drifted=any(record.drifted for record in records),
        stored_bytes=sum(record.stored_bytes for record in records),
        host_bytes=sum(record.host_bytes for record in records),
        calls=len(records),
        note="; ".join(dict.fromkeys(filter(None, notes))),
    )


# ---------------------------------------------------------------------- the table

_MOST_ROWS = 24


def certificate_table(certificate: Certificate, width: int | None = None) -> str:
    """Return the certificate as text; long models show their ends and what drifted."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shared = _shared_notes(certificate)
    notes = any(_own_note(block, shared) for block in certificate.blocks)
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("block", overflow="fold")
    table.add_column("input", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("stored", justify="right", no_wrap=True)
    if notes:
        table.add_column("note", overflow="fold")
    previous = -1
    for i in [*_rows(certificate), len(certificate.blocks)]:
        if i != previous + 1:
            table.add_row(Text(f"... {i - previous - 1} more", style="dim"))
        if i < len(certificate.blocks):
            table.add_row(*_row(certificate.blocks[i], shared)[: 5 if notes else 4])
        previous = i
    return printed(table, _summary(certificate, shared), width=width)


def _shared_notes(certificate: Certificate) -> list[str]:
    """What is noted at every block, to be said once below the table; of a single block nothing is shared."""
    if len(certificate.blocks) < 2:
        return []
    first, *others = (block.note.split("; ") for block in certificate.blocks)
    return [note for note in first if note and all(note in other for other in others)]


def _own_note(block: BlockCertificate, shared: list[str]) -> str:
    return "; ".join(note for note in block.note.split("; ") if note not in shared)


def _rows(certificate: Certificate) -> list[int]:
    """Which blocks are shown: all of a short model; of a long one both ends and the worst that drifted."""
    count = len(certificate.blocks)
    if count <= _MOST_ROWS:
        return list(range(count))
    end = _MOST_ROWS // 4
    chosen = {*range(end), *range(count - end, count)}
    worst = sorted(
        (i for i, block in enumerate(certificate.blocks) if block.drifted and i not in chosen),
        key=lambda i: -(certificate.blocks[i].error or 0.0),
    )
    return sorted(chosen | set(worst[: _MOST_ROWS - len(chosen)]))


def _row(block: BlockCertificate, shared: list[str]) -> tuple[Text, ...]:
    from rich.text import Text

    if block.error is None:
        error = Text("-")
    elif block.error == 0.0:
        error = Text("exact")
    else:
        error = Text(f"{block.error:.1e}" + (" !" if block.drifted else "  "))
    calls = f" x{block.calls}" if block.calls > 1 else ""
    return (
        Text(block.name + calls),
        Text(block.policy),
        error,
        Text(bytes_in_words(block.stored_bytes)),
        Text(_own_note(block, shared)),
    )


def _tolerance(certificate: Certificate) -> str:
    coded = any(block.policy.startswith("Code(") for block in certificate.blocks)
    allowance = f"; {certificate.tolerance * CODED_ALLOWANCE:g} where it is coded" if coded else ""
    return f"{certificate.tolerance:g}{allowance}"


def _summary(certificate: Certificate, shared: list[str]) -> str:
    worst = certificate.error
    figure = "not measured yet" if worst is None else "exact" if worst == 0.0 else f"{worst:.1e}"
    lines = [
        f"{len(certificate.blocks)} blocks, {certificate.chains} chain(s); "
        f"stored for the stream: {bytes_in_words(certificate.stored_bytes)}; "
        f"worst state error: {figure} (relative, tolerance {_tolerance(certificate)})"
    ]
    if certificate.gradient_error is not None:
        lines.append(f"Gradient error, by the plan's sensitivities: {certificate.gradient_error:.1e}.")
    if 0 < certificate.unmeasured < len(certificate.blocks):
        lines.append(f"{certificate.unmeasured} block(s) not measured in this pass.")
    if certificate.drifted:
        lines.append(f"{len(certificate.drifted)} block(s) drifted (!): the gradients are not to be trusted.")
    if shared:
        lines.append(f"Every block: {'; '.join(shared)}.")
    if certificate.note:
        lines.append(certificate.note)
    return "\n".join(lines)
