"""The tables of an inspection's page."""

from __future__ import annotations

from collections.abc import Sequence

from abyssal.inspection.findings import Findings
from abyssal.inspection.rows import Row, number, prefix_of
from abyssal.inspection.text import costs_of, figures_of, for_comparison, tolerance_of
from abyssal.report.page import Column, Table
from abyssal.util.text import bytes_in_words
from abyssal.weights.regularity import Regularity

__all__ = ["block_table", "totals_table", "weights_table"]

_MOST_ROLES = 24


def block_table(inspection: Findings, rows: Sequence[Row], caption: str, below: Sequence[str] = ()) -> Table:
    """Return one row per row of blocks, with their figures and best policies; `below` stands under it."""
    prefix = prefix_of(inspection)
    columns = [
        Column(f"block {prefix}".strip(), numeric=False),
        Column("stream"),
        Column("increment / input"),
        Column("contraction"),
        Column("regularity"),
        *(Column(f"best for {tolerance_of(c)}", numeric=False) for c in inspection.choices),
    ]
    cells = []
    for row in rows:
        name, *figures = figures_of(inspection, row, prefix)
        stream = sum(block.stream_bytes for block in inspection.blocks[row.first : row.last + 1])
        cells.append((name, bytes_in_words(stream), *figures))
    return Table(caption, tuple(columns), tuple(cells), notes=tuple(below))


def totals_table(inspection: Findings) -> Table:
    """Return one row per tolerance, with its stream, error and time."""
    bf16 = inspection.measurements.bf16_error
    measured = any(c.is_measured for c in inspection.choices)
    columns = [
        Column("gradient error", numeric=False),
        Column("stream"),
        Column("smaller than kept"),
        Column("smaller than kept in bf16"),
        Column("predicted error"),
        *([Column("measured error")] if measured else []),
        *([Column("in bf16's own errors")] if bf16 else []),
        Column("step time, × checkpointing"),
    ]
    chosen = [(f"≤ {tolerance_of(c)}", c) for c in inspection.choices]
    chosen += [(f"`{policy}` for all", c) for policy, c in for_comparison(inspection)]
    rows = []
    for label, c in chosen:
        size, own, half, relative, time = costs_of(inspection, c)
        errors = [number(c.predicted_error), *([number(c.measured_error)] if measured else [])]
        rows.append((label, size, own, half, *errors, *([relative] if bf16 else []), time))
    caption = (
        f"Totals over {len(inspection.blocks)} blocks; keeping the stream takes "
        f"{bytes_in_words(inspection.kept_bytes)}, in bf16 {bytes_in_words(inspection.bf16_bytes)}"
    )
    emphasis = inspection.choices.index(inspection.reference)
    return Table(caption, tuple(columns), tuple(rows), emphasis=emphasis)


def weights_table(weights: Regularity) -> Table:
    """Return one row per parameter that the blocks of a chain share."""
    columns = (
        Column("weights", numeric=False),
        Column("blocks"),
        Column("look like", numeric=False),
        Column("Hurst index"),
        Column("lag-1 correlation"),
        Column("verdict", numeric=False),
    )
    cells = []
    for role in weights.roles[:_MOST_ROLES]:
        h = role.hurst
        interval = "" if h is None else f"{h.value:.2f} ({h.low:.2f} to {h.high:.2f})"
        name = f"{role.chain}.*.{role.name}" if role.chain else role.name
        kind = "" if h is None else h.kind
        cells.append((name, str(role.depth), kind, interval, f"{role.smoothness.lag1:.2f}", role.verdict))
    more = len(weights.roles) - len(cells)
    notes = (
        "Hurst index, with its 95 % interval: of noise, 1/2 is independent from block to block; of a path, how rough.",
    )
    return Table(
        "Weights against depth", columns, tuple(cells), notes=(*notes, *((f"And {more} more.",) if more else ()))
    )
