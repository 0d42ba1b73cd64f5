"""A plan as a table for the terminal; runs of blocks under one policy share a row."""

from __future__ import annotations

import math
import re
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from abyssal.planning.plan_data import BlockPlan, Cost, PlanData
from abyssal.util.text import bytes_in_words, printed, seconds_in_words

_Run = list[BlockPlan]
_MOST_ROWS = 40


def plan_table(plan: PlanData, width: int | None = None) -> str:
    """Return the plan as text."""
    return printed(_blocks(plan), _totals(plan), *_lines(plan), width=width)


def _blocks(plan: PlanData) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("block", overflow="fold")
    table.add_column("policy", no_wrap=True)  # with bits and refinements
    for title in ("stored", "error of\nstate", "of\ngradient", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    runs = _runs(plan)
    shown = runs if len(runs) <= _MOST_ROWS else [*runs[: _MOST_ROWS // 2], [], *runs[-_MOST_ROWS // 2 :]]
    for run in shown:
        if run:
            table.add_row(*_row(run))
        else:
            table.add_row(Text(f"... {len(runs) - _MOST_ROWS} more rows", style="dim"))
    return table


def _row(run: _Run) -> tuple[Text, ...]:
    first = run[0]
    state = max(block.state_error for block in run)
    share = math.hypot(*(block.gradient_share for block in run))
    return (
        Text(_title(run)),
        Text(str(first.policy)),
        Text(bytes_in_words(sum(block.stored_bytes for block in run))),
        Text(_error(state)),
        Text(_error(share)),
        Text(seconds_in_words(sum(block.seconds for block in run))),
    )


def _runs(plan: PlanData) -> list[_Run]:
    """Return neighbours that share policy, class and note, and whose names differ in one number that counts up."""
    return [run for _, alike in groupby(plan.blocks, _look) for run in _by_name(list(alike))]


def _look(block: BlockPlan) -> tuple[object, ...]:
    return block.policy, block.kind, block.note, block.state_error == 0.0


def _step(before: str, after: str) -> int | None:
    """Return which number in two names counts up by one, if nothing else differs."""
    one, other = re.split(r"(\d+)", before), re.split(r"(\d+)", after)
    differing = [i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) != len(other) or len(differing) != 1 or differing[0] % 2 == 0:
        return None
    place = differing[0]
    return place if int(other[place]) == int(one[place]) + 1 else None


def _title(run: _Run) -> str:
    if len(run) == 1:
        return run[0].name
    place = _step(run[0].name, run[1].name)
    assert place is not None
    first, last = re.split(r"(\d+)", run[0].name), re.split(r"(\d+)", run[-1].name)
    first[place] = f"{first[place]}-{last[place]}"
    return "".join(first)


def _totals(plan: PlanData) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("kept for backward", "peak of a step", "step"):
        table.add_column(title, justify="right", no_wrap=True)
    for title, cost in (("plain", plan.plain), ("checkpointing", plan.checkpointing), ("this plan", plan.cost)):
        table.add_row(title, *_cost(cost, plan.checkpointing), style="bold" if cost is plan.cost else None)
    return table


def _cost(cost: Cost, reference: Cost) -> tuple[str, str, str]:
    """Return a way to train in words, its bytes and time also as multiples of checkpointing's."""

    def relative(value: float | None, of: float | None) -> str:
        return "" if value is None or not of else f" ({value / of:.2f}x)"

    return (
        ("-" if cost.stream_bytes is None else bytes_in_words(cost.stream_bytes))
        + relative(cost.stream_bytes, reference.stream_bytes),
        ("does not fit" if cost.peak_bytes is None else bytes_in_words(cost.peak_bytes))
        + relative(cost.peak_bytes, reference.peak_bytes),
        ("-" if cost.seconds is None else seconds_in_words(cost.seconds)) + relative(cost.seconds, reference.seconds),
    )


def _lines(plan: PlanData) -> list[str]:
    wish = []
    if plan.tolerance is not None:
        wish.append(f"tolerance {plan.tolerance:g}")
    if plan.memory is not None:
        wish.append(f"peak at most {bytes_in_words(plan.memory)}")
    errors = ", ".join(f"{_error(error)} on the {batch}" for batch, error in plan.gradient_errors.items())
    units = plan.error_in_bf16_units
    if plan.bf16_error is None:
        bf16 = f"the model's own error in bfloat16 is not known: {plan.bf16_reason}"
    else:
        bf16 = f"{units:.2f} times the model's own error in bfloat16 ({_error(plan.bf16_error)})" if units else ""
    lines = [f"Asked for: {', '.join(wish)}.", f"Gradient error, measured: {errors}."]
    if bf16:
        lines.append(f"That is {bf16}." if units else f"{bf16[0].upper()}{bf16[1:]}.")
    lines.append(f"The peak is set by {plan.peak_set_by}; it is counted above parameters, gradients and the batch.")
    if plan.checkpointing.peak_bytes and plan.peak_bytes > 0.95 * plan.checkpointing.peak_bytes:
        stream, kept = plan.stream_bytes, plan.checkpointing.stream_bytes or 0
        if stream < 0.8 * kept:
            lines.append("It hardly moves: what is kept of the stream is small beside it.")
    lines += _notes(plan)
    lines += [f"{note[0].upper()}{note[1:]}." if not note.endswith(".") else note for note in plan.notes]
    lines.append(f"Measured on {plan.batch}; {', '.join(f'{k} {v}' for k, v in plan.environment.items())}.")
    return lines


def _notes(plan: PlanData) -> list[str]:
    """Return what is noted at blocks, each note once with the blocks that it is about."""
    notes = dict.fromkeys(note for block in plan.blocks for note in block.note.split("; ") if note)
    lines = []
    for note in notes:
        about = [block for block in plan.blocks if note in block.note.split("; ")]
        runs = ", ".join(_title(run) for run in _by_name(about))
        lines.append(f"{'Every block' if len(about) == len(plan.blocks) > 1 else runs}: {note}.")
    return lines


def _by_name(blocks: _Run) -> list[_Run]:
    runs: list[_Run] = []
    for block in blocks:
        run = runs[-1] if runs else []
        place = _step(run[-1].name, block.name) if run else None
        if place is not None and (len(run) == 1 or _step(run[0].name, run[1].name) == place):
            run.append(block)
        else:
            runs.append([block])
    return runs


def _error(value: float) -> str:
    return "exact" if value == 0.0 else f"{value:.1e}"
