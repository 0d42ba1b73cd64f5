"""The certificate as a table for the terminal."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from abyssal.reconstruct.certificate import BlockCertificate, Certificate

_MOST_ROWS = 40


def bytes_in_words(count: int) -> str:
    """Return e.g. `1.5 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def certificate_table(certificate: Certificate, width: int | None = None) -> str:
    """Return the certificate as text; long models show their ends and what drifted."""
    table = Table(title=None, header_style="bold", pad_edge=False)
    table.add_column("block", overflow="fold")
    table.add_column("input", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("stored", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    shown = _rows(certificate)
    previous = -1
    for i in shown:
        if i != previous + 1:
            table.add_row(Text(f"... {i - previous - 1} more", style="dim"), "", "", "", "")
        table.add_row(*_row(certificate.blocks[i], certificate.tolerance))
        previous = i
    width = width or int(os.environ.get("COLUMNS", 0)) or 100
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, no_color=True, highlight=False)
    console.print(table)
    console.print(_summary(certificate))
    return buffer.getvalue().rstrip("\n")


def _rows(certificate: Certificate) -> list[int]:
    count = len(certificate.blocks)
    if count <= _MOST_ROWS:
        return list(range(count))
    drifted = set(certificate.drifted)
    head = _MOST_ROWS // 4
    chosen = {*range(head), *range(count - head, count)}
    chosen |= {i for i, b in enumerate(certificate.blocks) if b.name in drifted and len(chosen) < _MOST_ROWS}
    return sorted(chosen)


def _row(block: BlockCertificate, tolerance: float) -> tuple[Text, ...]:
    if block.error is None:
        error = Text("-")
    elif block.error == 0.0:
        error = Text("exact")
    else:
        error = Text(f"{block.error:.1e}" + ("" if block.error <= tolerance else " !"))
    calls = f" x{block.calls}" if block.calls > 1 else ""
    return (
        Text(block.name + calls),
        Text(block.policy),
        error,
        Text(bytes_in_words(block.stored_bytes)),
        Text(block.note),
    )


def _summary(certificate: Certificate) -> str:
    worst = certificate.error
    figure = "not measured yet" if worst is None else "exact" if worst == 0.0 else f"{worst:.1e}"
    lines = [
        f"{len(certificate.blocks)} blocks, {certificate.chains} chain(s); "
        f"stored for the stream: {bytes_in_words(certificate.stored_bytes)}; "
        f"worst state error: {figure} (relative, tolerance {certificate.tolerance:g})"
    ]
    if certificate.drifted:
        lines.append(f"{len(certificate.drifted)} block(s) drifted (!): their gradients are not to be trusted.")
    if certificate.note:
        lines.append(certificate.note)
    return "\n".join(lines)
