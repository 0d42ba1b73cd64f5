"""An inspection in words: the verdict, and tables for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from abyssal.engine.policy import Code, Keep, Policy, Reverse, Store
from abyssal.inspection.findings import Choice, Findings
from abyssal.inspection.rows import (
    Row,
    in_words,
    name_of,
    number,
    out_of_reach,
    policies_of,
    prefix_of,
    ratio,
    rows_of,
    said,
    span,
)
from abyssal.util.text import bytes_in_words, columns_of_terminal, printed

__all__ = [
    "as_text", "costs_of", "figures_of", "for_comparison", "own_dtype", "parts", "percent", "times", "tolerance_of",
    "verdict",
]  # fmt: skip

_MOST_ROWS, _MOST_JOINED = 30, 20
_STILL = 1e-4  # increments below this are an initialisation's


def as_text(inspection: Findings, width: int | None = None) -> str:
    """Return the whole inspection as plain text of `width` columns (100, or what COLUMNS says)."""
    width = columns_of_terminal(width)
    return printed(*parts(inspection, width), width=width)


def parts(inspection: Findings, width: int) -> Iterator[Text | Table]:
    """Give what is printed of the inspection: blocks, totals, verdict, notes."""
    yield Text(inspection.model, style="bold")
    yield Text(f"batch: {inspection.measurements.batch}", style="dim")
    prefix = prefix_of(inspection)
    if prefix:
        yield Text(f"names of blocks begin with {prefix}", style="dim")
    yield _blocks(inspection, width)
    yield _totals(inspection)
    yield from (Text(sentence, style="bold") for sentence in verdict(inspection))
    yield from (Text(note, style="dim") for note in notes(inspection))


def verdict(inspection: Findings) -> tuple[str, ...]:
    """Return what was found: what is unusual about the blocks, and what can be saved."""
    return (_hazard(inspection), _saving(inspection))


def _hazard(inspection: Findings) -> str:
    blocks = inspection.blocks
    stuck = [block for block in blocks if out_of_reach(block)]
    worst = max(blocks, key=lambda block: _size(block.increment_ratio))
    largest = _size(worst.increment_ratio)
    if largest < _STILL:
        bound = number(1.05 * largest) if largest else "1e-9"
        return (
            f"Every increment is below {bound} of its input: these blocks do next to "
            "nothing yet, as after an initialisation at or near zero, and say nothing of what they will do."
        )
    if not stuck:
        moving = [block.contraction for block in blocks]
        return f"{_every(len(blocks))} can be reversed: a refinement reduces the error to {span(moving)} of it."
    if len(stuck) == len(blocks):
        return f"{_none(len(blocks))} can be reversed: the inputs can be kept or coded, not solved for."
    names = said([block.name for block in stuck])
    if worst in stuck and worst.increment_ratio > 1 and len(stuck) == 1:
        return (
            f"{worst.name} adds an increment {number(worst.increment_ratio)} times as large as its input, and "
            "cannot be reversed; every other block can."
        )
    return (
        f"{len(stuck)} of {len(blocks)} blocks cannot be reversed ({names}); the largest "
        f"increment is {number(worst.increment_ratio)} times its input, at {worst.name}."
    )


def _every(count: int) -> str:
    return "The only block" if count == 1 else f"Each of the {count} blocks"


def _none(count: int) -> str:
    return "The only block never" if count == 1 else f"None of the {count} blocks"


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _saving(inspection: Findings) -> str:
    choice = inspection.reference
    if choice.stream_bytes >= inspection.kept_bytes:
        return f"Within a gradient error of {tolerance_of(choice)} nothing smaller than keeping was found."
    own, half = (ratio(kept, choice.stream_bytes) for kept in (inspection.kept_bytes, inspection.bf16_bytes))
    against = f"{times(own)} smaller than kept in {own_dtype(inspection)}"
    if own_dtype(inspection) != "bfloat16":
        against += f", {times(half)} than in bf16" if half >= 1 else f", but {times(1 / half)} as large as in bf16"
    return (
        f"Within a gradient error of {tolerance_of(choice)}, {_told(inspection, choice)}: a stream {against}"
        f"{_time(choice)}."
    )


def own_dtype(inspection: Findings) -> str:
    """Return the data type of the stream, in a word or two."""
    dtypes = {block.dtype.removeprefix("torch.") for block in inspection.blocks}
    return dtypes.pop() if len(dtypes) == 1 else "its own types"


def _told(inspection: Findings, choice: Choice) -> str:
    """Say which policies a choice has: the common ones together, then the few that differ by name."""
    policies = policies_of(inspection, choice, Row(0, len(inspection.blocks) - 1))
    families: dict[str, list[int]] = {}
    for i, policy in enumerate(policies):
        families.setdefault(_family(policy), []).append(i)
    parts: list[str] = []
    for family, members in sorted(families.items(), key=lambda item: -len(item[1])):
        place = _place(inspection, members)
        if place:
            who = place
        elif parts:
            who = said([inspection.blocks[i].name for i in members])
        else:
            everyone = len(members) == len(policies)
            who = "all blocks" if everyone and len(policies) > 1 else f"{len(members)} of {len(policies)} blocks"
        verb = "is" if len(members) == 1 or place else "are"
        parts.append(f"{who} {verb} {family}{_detail(family, [policies[i] for i in members])}")
    return "; ".join(parts)


def _place(inspection: Findings, members: Sequence[int]) -> str:
    """Say where these blocks are, if they are the first or the last ones of all chains."""
    chains = [block.chain for block in inspection.blocks]
    firsts = [i for i, chain in enumerate(chains) if i == 0 or chain != chains[i - 1]]
    lasts = [i for i, chain in enumerate(chains) if i + 1 == len(chains) or chain != chains[i + 1]]
    if len(chains) == len(firsts):
        return ""
    whose = "" if len(firsts) == 1 else " of each chain"
    return (
        f"the first block{whose}" if list(members) == firsts else f"the last{whose}" if list(members) == lasts else ""
    )


def _family(policy: Policy | None) -> str:
    if policy is None:
        return "exact at no cost"
    for kind, name in ((Code, "coded"), (Keep, "kept"), (Reverse, "reversed"), (Store, "stored whole")):
        if isinstance(policy, kind):
            return name
    return f"under {policy}"


def _detail(family: str, policies: Sequence[Policy | None]) -> str:
    bits = sorted({int(p.bits) for p in policies if isinstance(p, Code) and not p.is_auto})
    if family != "coded" or not bits:
        return ""
    span_of_bits = str(bits[0]) if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"
    return f" with {span_of_bits} bit{'' if bits == [1] else 's'}"


def _time(choice: Choice) -> str:
    if not math.isfinite(choice.step_ratio):
        return ""
    return f", at {choice.step_ratio:.2f} times the step time of checkpointing"


def _blocks(inspection: Findings, width: int) -> Table:
    prefix = prefix_of(inspection)
    regularity = width >= 90 and any(block.regularity is not None for block in inspection.blocks)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("block", overflow="fold")
    table.add_column("increment\n/ input", justify="right", no_wrap=True)
    table.add_column("contrac-\ntion", justify="right", no_wrap=True)
    if regularity:
        table.add_column("regu-\nlarity", justify="right", no_wrap=True)
    for order, choice in enumerate(inspection.choices):
        table.add_column((" best for\n " if order == 0 else "\n ") + tolerance_of(choice), overflow="fold")
    chain = inspection.blocks[0].chain
    most = _MOST_ROWS if len(inspection.blocks) <= _MOST_ROWS else _MOST_JOINED
    for row in rows_of(inspection, most):
        blocks = inspection.blocks[row.first : row.last + 1]
        if blocks[0].chain != chain:
            table.add_section()
            chain = blocks[0].chain
        stuck = any(out_of_reach(block) for block in blocks)
        name, increment, contraction, smooth, *best = figures_of(inspection, row, prefix)
        cells = [Text(name), Text(increment), Text(contraction, style="yellow" if stuck else "")]
        cells += [Text(smooth)] if regularity else []
        table.add_row(*cells, *(Text(" " + policies) for policies in best))
    return table


def _totals(inspection: Findings) -> Table:
    bf16 = inspection.measurements.bf16_error
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    measured = any(choice.is_measured for choice in inspection.choices)
    headings = ["gradient\nerror", "stream", "smaller\nthan kept", "than kept\nin bf16"]
    headings += ["measured\nerror" if measured else "predicted\nerror"]
    headings += ["in bf16's\nerrors"] if bf16 else []
    headings += ["time,\n× checkpt."]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [("≤ " + tolerance_of(choice), choice) for choice in inspection.choices]
    rows += [(f"{policy} all", choice) for policy, choice in for_comparison(inspection)]
    for i, (label, choice) in enumerate(rows):
        if i == len(inspection.choices):
            table.add_section()
        size, own, half, relative, time = costs_of(inspection, choice)
        mark = " !" if choice.gradient_error > choice.tolerance else "~" if measured and not choice.is_measured else ""
        table.add_row(
            label,
            size,
            own,
            half,
            mark.strip() + number(choice.gradient_error),
            *([relative] if bf16 else []),
            time,
        )
    return table


def figures_of(inspection: Findings, row: Row, prefix: str) -> list[str]:
    """Return a row's name, increment, contraction and regularity, and its best policy for each tolerance."""
    blocks = inspection.blocks[row.first : row.last + 1]
    return [
        name_of(inspection, row, prefix),
        span([block.increment_ratio for block in blocks]),
        span([block.contraction for block in blocks]),
        span([block.regularity for block in blocks]),
        *(in_words(policies_of(inspection, choice, row)) for choice in inspection.choices),
    ]


def costs_of(inspection: Findings, choice: Choice) -> tuple[str, str, str, str, str]:
    """Return a choice's stream, how much smaller that is than kept, and in bf16, its error in bf16's, and its time."""
    size, bf16 = choice.stream_bytes, inspection.measurements.bf16_error
    return (
        bytes_in_words(size),
        times(ratio(inspection.kept_bytes, size)),
        times(ratio(inspection.bf16_bytes, size)),
        times(choice.gradient_error / bf16) if bf16 else "",
        f"{choice.step_ratio:.2f}" if math.isfinite(choice.step_ratio) else "-",
    )


def for_comparison(inspection: Findings) -> list[tuple[Policy, Choice]]:
    """Return a few choices of one code for all blocks, as predicted."""
    return [(code, inspection.uniform[code]) for code in (Code(8), Code(4), Code(2)) if code in inspection.uniform]


def notes(inspection: Findings) -> list[str]:
    """Return what stands below the tables: the scale of the figures, and what is out of the ordinary."""
    m = inspection.measurements
    scale = (
        f"The model's own gradient error in bfloat16 on this batch: {number(m.bf16_error)}."
        if m.bf16_error is not None
        else f"The model's own gradient error in bfloat16 could not be had: {m.bf16_reason}."
    )
    lines = [*inspection.notes, scale]
    if inspection.weights is not None:
        lines.append(f"Weights against depth: {inspection.weights.summary}")
    shared: dict[str, list[str]] = {}
    for block in inspection.blocks:
        for note in block.notes:
            shared.setdefault(note, []).append(block.name)
    lines += [f"{said(names)}: {note}" for note, names in shared.items()]
    measured = [choice for choice in inspection.choices if choice.is_measured]
    if any(choice.gradient_error > choice.tolerance for choice in measured):
        lines.append("!: more than the tolerance was measured, and aiming lower did not mend it.")
    what = "The errors at the tolerances were measured" if measured else "All is predicted from single blocks"
    what += " (those marked ~ are predicted)" if measured and for_comparison(inspection) else ""
    lines.append(f"{what} on this batch; abyssal.plan(model, batch, tolerance=...) checks others, too.")
    return lines


def tolerance_of(choice: Choice) -> str:
    """Return the tolerance as people write it: `1e-2`, `3e-2`, `2.5e-3`."""
    text = f"{choice.tolerance:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return text


def times(value: float, digits: int | None = None) -> str:
    """Return a ratio with its sign: `6.1×`, `28×`, `0.31×`."""
    if not math.isfinite(value):
        return "∞"
    if digits is not None:
        return f"{value:.{digits}f}×"
    if value < 0.095:
        return f"{number(value)}×" if value < 0.0095 else f"{value:.2f}×"
    return f"{value:.0f}×" if value >= 9.95 else f"{value:.1f}×" if value >= 0.95 else f"{value:.2f}×"


def percent(fraction: float) -> str:
    """Return a fraction in percent: `16 %`, `4.2 %`, `0.39 %`."""
    value = 100 * fraction
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %" if value >= 0.95 else f"{value:.2f} %"
