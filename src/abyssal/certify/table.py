"""The certificate as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from abyssal.engine.session import CODED_ALLOWANCE
from abyssal.util.text import bytes_in_words, printed

if TYPE_CHECKING:
    from abyssal.certify.certificate import BlockCertificate, Certificate

_MOST_ROWS = 24


def certificate_table(certificate: Certificate, width: int | None = None) -> str:
    """Return the certificate as text; long models show their ends and what drifted."""
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
