"""An inspection as a page: what each block does and costs, in plots, then in numbers, then how to use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from abyssal.engine.policy import Code
from abyssal.inspection.findings import Choice, Findings
from abyssal.inspection.page_map import for_both, map_section, stretches_of
from abyssal.inspection.page_tables import block_table, totals_table, weights_table
from abyssal.inspection.rows import Row, number, out_of_reach, ratio, rows_of, said, span
from abyssal.inspection.text import notes, own_dtype, percent, times, tolerance_of, verdict
from abyssal.report.depth_plots import Mark, front, through_depth
from abyssal.report.page import Figure, Headline, Page, Section
from abyssal.report.plots import Curve
from abyssal.util.text import bytes_in_words

__all__ = ["build_page"]

_FEW = 48  # blocks whose points are worth marking one by one
_SMALLEST = 1e-4  # errors that are worth a place in the plot
_ROWS = 40
_MOST_LISTED = 1000  # blocks in the folded table


def build_page(inspection: Findings) -> Page:
    """Return the page; every number on it comes from `inspection`."""
    m = inspection.measurements
    found = verdict(inspection)
    return Page(
        title=_title(inspection),
        lead=f"{inspection.model}. Measured on one batch: {m.batch}. " + " ".join(found),
        command=inspection.command or "abyssal.inspect(model, batch).to_html(path)",
        headlines=_headlines(inspection),
        sections=(
            *_warning(inspection),
            _size(inspection),
            _front(inspection),
            map_section(inspection),
            *_regularity(inspection),
            _table(inspection),
            _use(inspection),
        ),
        facts={**inspection.environment.facts(), "Measured with": _measured_with(inspection)},
    )


def _title(inspection: Findings) -> str:
    choice = inspection.reference
    blocks = len(inspection.blocks)
    if choice.stream_bytes >= inspection.kept_bytes:
        return f"{blocks} residual blocks, none of them smaller than kept at an error of {tolerance_of(choice)}"
    smaller, own = (ratio(kept, choice.stream_bytes) for kept in (inspection.bf16_bytes, inspection.kept_bytes))
    stream = (
        f"{times(smaller)} smaller stream" if smaller >= 1 else f"{times(own)} smaller {own_dtype(inspection)} stream"
    )
    return f"{blocks} residual blocks in a {stream}, at a gradient error of {tolerance_of(choice)}"


def _headlines(inspection: Findings) -> tuple[Headline, ...]:
    choice, bf16 = inspection.reference, inspection.measurements.bf16_error
    worst = max(inspection.blocks, key=lambda block: block.increment_ratio)
    heads = [
        Headline(
            bytes_in_words(choice.stream_bytes),
            f"kept for the stream within a gradient error of {tolerance_of(choice)}, instead of "
            f"{bytes_in_words(inspection.bf16_bytes)} in bf16",
        )
    ]
    if bf16:
        heads.append(
            Headline(times(choice.gradient_error / bf16), f"the model's own gradient error in bf16, {number(bf16)}")
        )
    else:
        heads.append(Headline(number(choice.gradient_error), "relative error of the gradient"))
    if math.isfinite(choice.step_ratio):
        heads.append(Headline(times(choice.step_ratio, 2), "checkpointing's step time, predicted"))
    heads.append(Headline(times(worst.increment_ratio), f"its input: the largest increment, at `{worst.name}`"))
    return tuple(heads)


def _warning(inspection: Findings) -> tuple[Section, ...]:
    return (Section("Read this first", inspection.notes),) if inspection.notes else ()


def _size(inspection: Findings) -> Section:
    blocks = inspection.blocks
    at = range(len(blocks))
    style = "markers" if len(blocks) <= _FEW else "dots"
    lines = [
        Curve("increment\n/ input", at, [_shown(b.increment_ratio) for b in blocks], 1, style),  # type: ignore[arg-type]
        Curve("contraction", at, [_shown(b.contraction) for b in blocks], 2, style),  # type: ignore[arg-type]
    ]
    worst = max(at, key=lambda i: _shown(blocks[i].increment_ratio))
    marks = []
    if blocks[worst].increment_ratio > 1:
        marks.append(
            Mark(
                worst, blocks[worst].increment_ratio, f"{blocks[worst].name}: {times(blocks[worst].increment_ratio)}", 1
            )
        )
    stuck = [b.name for b in blocks if out_of_reach(b)]
    if not stuck:
        title = f"Each of the {len(blocks)} blocks can be reversed" if len(blocks) > 1 else "The block can be reversed"
    elif len(stuck) == len(blocks):
        title = "No block can be reversed"
    else:
        title = f"{said(stuck)} cannot be reversed, the other {len(blocks) - len(stuck)} blocks can"
    alt = (
        f"Increment ratio and contraction over {len(blocks)} blocks. Increment ratio from "
        f"{span([b.increment_ratio for b in blocks])}, contraction {span([b.contraction for b in blocks])}."
    )
    text = (
        "Increment / input is how much a block adds to the stream, `|f(x)| / |x|`. A code has to hold the increment, "
        "so the larger it is, the more bits the same error takes. Contraction is what the first fixed-point step of "
        "`Reverse` or `refine=` leaves of the error: below 1 it helps, above 1 it leads away. Both have to be below "
        "1, or little above, for an input to be solved for.",
    )
    still = sum(b.increment_ratio == 0 for b in blocks)
    caption = "Vertical lines part the chains. " if len(stretches_of(inspection)) > 1 else ""
    caption += f"{still} block(s) add nothing yet and are not drawn." if still else ""
    figure = _through_depth(
        inspection,
        lines,
        caption or "Blocks in the order of the forward pass, counted from 0.",
        alt=alt,
        y_label="increment / input, and contraction",
        guide=(1.0, "1: no reversal above"),
        shade_above=True,
        marks=marks,
    )
    return Section(title, text, figure)


def _through_depth(inspection: Findings, lines: Sequence[Curve], caption: str, *, alt: str, **options: Any) -> Figure:
    """Return curves over the blocks; the options are those of `through_depth`."""
    stretches = stretches_of(inspection)
    broad, narrow = for_both(
        lambda size, which: through_depth(lines, alt=alt + which, stretches=stretches, size=size, **options)
    )
    return Figure(broad, caption, narrow=narrow)


def _front(inspection: Findings) -> Section:
    kept = inspection.bf16_bytes
    lowest = min([_SMALLEST, *(c.gradient_error / 3 for c in inspection.choices if c.gradient_error > 0)])
    points = [
        (size / kept, error)
        for size, error in inspection.front
        if 0 < size <= inspection.kept_bytes and lowest <= error <= 1
    ]
    if not points:
        title = "Nothing smaller than keeping was found at these errors"
        return Section(title, table=totals_table(inspection))
    uniform = _uniform_points(inspection, points)
    lines = [Curve("best per\nblock", [x for x, _ in points], [y for _, y in points], 1, "steps")]
    if uniform:
        lines.append(Curve("one for all", [x for x, _, _ in uniform], [y for _, y, _ in uniform], 2, "points"))
    marks = [
        Mark(c.stream_bytes / kept, c.gradient_error, tolerance_of(c), 1)
        for c in inspection.choices
        if c.stream_bytes and c.gradient_error > 0
    ]
    bf16 = inspection.measurements.bf16_error
    reference = inspection.reference
    part = percent(reference.stream_bytes / kept)
    title = f"A gradient error of {tolerance_of(reference)} takes {part} of the bf16 stream"
    figure = front(
        lines,
        alt=f"Gradient error against stream bytes. {title}.",
        x_label="stream, of what keeping it in bf16 takes",
        y_label="gradient error",
        guide=(bf16, "the model's own error in bf16") if bf16 else None,
        marks=_apart(marks),
    )
    measured = any(c.is_measured for c in inspection.choices)
    text = [
        "Along the blue line each block has its own policy: the fewest bytes found for that error, the exact inputs "
        "at the ends of chains included; errors as predicted from single blocks. Circles are the choices for the "
        f"tolerances asked for{', with their errors as measured' if measured else ''}."
    ]
    if uniform:
        best = min(uniform, key=lambda point: abs(math.log(point[1] / reference.gradient_error)))
        text.append(
            f"Squares give all blocks the same policy, `Code(8)` to `Code(1)` with and without refinement: the one "
            f"nearest to {tolerance_of(reference)} is `{best[2]}`, an error of {number(best[1])} in "
            f"{percent(best[0])} of the stream."
        )
    if bf16:
        text.append(
            "The dotted line is the error that training this model in bf16 makes anyway; below it, what a "
            "policy adds is smaller than that."
        )
    return Section(title, tuple(text), Figure(figure, "Both axes are logarithmic."), totals_table(inspection))


def _uniform_points(inspection: Findings, points: Sequence[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """Return `(fraction of bf16, error, policy)` of codes for all blocks, from the fewest bytes."""
    worst = max([1.0, *(error for _, error in points)])
    found = [
        (c.stream_bytes / inspection.bf16_bytes, c.gradient_error, str(policy))
        for policy, c in inspection.uniform.items()
        if isinstance(policy, Code) and 0 < c.gradient_error <= worst and c.stream_bytes
    ]
    return sorted(found)


def _apart(marks: Sequence[Mark]) -> list[Mark]:
    """Leave out names of marks that lie on one another, keeping the strictest of them."""
    kept: list[Mark] = []
    for mark in marks:
        same = [m for m in kept if abs(math.log(m.x / mark.x)) < 0.03 and abs(math.log(m.y / mark.y)) < 0.15]
        for other in same:
            kept.remove(other)
        text = ", ".join([*(m.text for m in same), mark.text])
        kept.append(Mark(mark.x, mark.y, text, mark.series))
    return kept


def _regularity(inspection: Findings) -> tuple[Section, ...]:
    blocks = inspection.blocks
    known = [b.regularity for b in blocks if b.regularity is not None and b.regularity > 0]
    if len(known) < 3:
        return ()
    middle = median(known)
    if middle > 1:
        title = f"Neighbouring blocks are about as different as independent ones: {number(middle)} in the median"
    elif middle > 0.5:
        title = f"Neighbouring blocks are somewhat alike: they differ by {number(middle)} in the median"
    else:
        title = f"Blocks change smoothly with depth: neighbours differ by {number(middle)} in the median"
    lines = [
        Curve(
            "difference",
            range(len(blocks)),
            [b.regularity or math.nan for b in blocks],
            4,
            "markers" if len(blocks) <= _FEW else "dots",
        )
    ]
    figure = _through_depth(
        inspection,
        lines,
        "None at the end of a chain.",
        alt=f"Regularity in depth over {len(blocks)} blocks, {span(known)}.",
        y_label="difference of neighbouring blocks",
        guide=(math.sqrt(2), "√2: independent random weights"),
    )
    text: tuple[str, ...] = (
        "`|f[n+1](x) − f[n](x)| / |f[n](x)|` at the same x: how far a block is from the one after it. About √2 for "
        "blocks that have nothing to do with each other; about 1/depth for weights that change smoothly with "
        "depth, whose network is a discretised differential equation.",
    )
    table = None
    if inspection.weights is not None:
        text += (f"The weights themselves: {inspection.weights.summary}",)
        table = weights_table(inspection.weights)
    return (Section(title, text, figure, table),)


def _table(inspection: Findings) -> Section:
    rows = rows_of(inspection, _ROWS)
    blocks = len(inspection.blocks)
    folded = None
    if len(rows) < blocks:
        listed = min(blocks, _MOST_LISTED)
        caption = f"All {blocks} blocks" if listed == blocks else f"The first {listed} of {blocks} blocks"
        folded = block_table(inspection, [Row(i, i) for i in range(listed)], caption)
    caption = (
        "Fewest bytes for each tolerance. `4 bit +1` is `Code(4, refine=1)`, `rev 2` is `Reverse(2)`, `keep` is "
        "`Keep()`; `free` is a code of which nothing has to be stored, a chain's first."
    )
    title = "Block by block" if len(rows) == blocks else f"{blocks} blocks in {len(rows)} rows"
    return Section(title, (), None, block_table(inspection, rows, caption, notes(inspection)), folded=folded)


def _use(inspection: Findings) -> Section:
    choice = inspection.reference
    return Section(
        "To use it",
        (
            "A plan verifies the choice end to end, on this batch and on another, before it gives it back. The "
            "tolerance is on the relative error of the whole gradient.",
        ),
        code=_code(inspection, choice),
    )


def _code(inspection: Findings, choice: Choice) -> str:
    lines = [
        "import abyssal",
        "",
        f"plan = abyssal.plan(model, batch, tolerance={tolerance_of(choice)})",
        "print(plan)",
        "abyssal.reconstruct(model, plan)   # in place; train as before",
    ]
    if inspection.command.startswith("abyssal inspect "):
        model = inspection.command.split()[2]
        lines += [
            "",
            "# or from a shell, for later:",
            f"# abyssal plan {model} --tolerance {tolerance_of(choice)} --save plan.json",
        ]
    return "\n".join(lines)


def _measured_with(inspection: Findings) -> str:
    return ", ".join(f"{name} {value}" for name, value in inspection.measurements.environment.items())


def _shown(value: float) -> float:
    return value if math.isfinite(value) else 0.0
