"""Blocks that are alike told in one row: what a table of a hundred layers needs to be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from abyssal.engine.policy import Code, Keep, Policy, Reverse, Store
from abyssal.inspection.findings import Choice, Findings
from abyssal.planning.measurements import BlockMeasurement

__all__ = [
    "Row",
    "chain_names",
    "in_words",
    "name_of",
    "number",
    "out_of_reach",
    "policies_of",
    "prefix_of",
    "ratio",
    "rows_of",
    "said",
    "span",
]


_HALF = 0.5  # relative error of a restored input that says nothing of it any more
_FREE = 32  # a code that keeps less than this part of the stream (its certificate's sample) keeps no state


@dataclass(frozen=True)
class Row:
    """Consecutive blocks `first` to `last` (both included) of one chain."""

    first: int
    last: int

    @property
    def count(self) -> int:
        """How many blocks."""
        return self.last - self.first + 1


def rows_of(inspection: Findings, most: int) -> list[Row]:
    """Return one row per block, or where that would be more than `most`, rows of blocks that are alike.

    Neighbours that differ least are joined: first those with the same policies at every tolerance, by the
    range of their figures. Blocks of different chains, classes or shapes are never joined, so that there may
    be more than `most` rows.
    """
    rows = [Row(i, i) for i in range(len(inspection.blocks))]
    costs = [_cost(inspection, a, b) for a, b in pairwise(rows)]
    while len(rows) > most and min(costs) < math.inf:
        k = costs.index(min(costs))
        rows[k : k + 2] = [Row(rows[k].first, rows[k + 1].last)]
        del costs[k]
        if k > 0:
            costs[k - 1] = _cost(inspection, rows[k - 1], rows[k])
        if k < len(costs):
            costs[k] = _cost(inspection, rows[k], rows[k + 1])
    return rows


def _kin(inspection: Findings, i: int, j: int) -> bool:
    a, b = inspection.blocks[i], inspection.blocks[j]
    return (a.chain, a.kind, a.shape, bool(a.notes)) == (b.chain, b.kind, b.shape, bool(b.notes))


def out_of_reach(block: BlockMeasurement) -> bool:
    """Whether a block's input cannot be solved for: steps lead away from it, or leave it half wrong after all.

    The contraction alone does not say so: it is that of the first step, and a block whose increment is 30 times
    its input may halve the distance at first and never come near.
    """
    errors = [c.state_error for c in block.candidates if isinstance(c.policy, Reverse)]
    return not block.contraction < 1 or (bool(errors) and not min(errors) < _HALF)


def _cost(inspection: Findings, a: Row, b: Row) -> float:
    """How much is lost by joining two rows: policies that differ, then figures, then the size of the row."""
    if not _kin(inspection, a.last, b.first):
        return math.inf
    blocks = inspection.blocks[a.first : b.last + 1]
    differing = sum(
        len(set(policies_of(inspection, choice, Row(a.first, b.last)))) - 1 for choice in inspection.choices
    )
    ratios = [block.increment_ratio for block in blocks if block.increment_ratio > 0]
    spread = math.log10(max(ratios) / min(ratios)) if ratios else 0.0
    # No block that cannot be reversed hides among those that can, nor the other way round.
    steep = 0 if out_of_reach(blocks[0]) == out_of_reach(inspection.blocks[b.first]) else 10
    return 0.5 * differing + steep + spread + 0.1 * math.log2(a.count + b.count)


def chain_names(inspection: Findings) -> list[str]:
    """Return a name for each chain, in order: what its blocks' names have in common."""
    members: dict[int, list[str]] = {}
    for block in inspection.blocks:
        members.setdefault(block.chain, []).append(block.name)
    return [_common(names) or f"chain {chain}" for chain, names in members.items()]


def _common(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))


def said(names: Sequence[str], most: int = 3) -> str:
    """Return names as words: `a`, `a and b`, `a to e (5 blocks)` or `a, b and 7 others`."""
    if len(names) <= most:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"


def prefix_of(inspection: Findings) -> str:
    """Return what all blocks' names begin with, up to and with a dot, or nothing."""
    names = [block.name for block in inspection.blocks]
    shared = _common(names) if len(names) > 1 else ""
    return shared + "." if shared else ""


def name_of(inspection: Findings, row: Row, prefix: str = "") -> str:
    """Return a row's name without the prefix: `layers.3` or `layers.3 – 11`."""
    first, last = inspection.blocks[row.first].name, inspection.blocks[row.last].name
    shown = first.removeprefix(prefix)
    if row.count == 1:
        return shown
    shared = _common([first, last])
    short = last.removeprefix(shared + ".") if shared else last
    return f"{shown} – {short}"


def policies_of(inspection: Findings, choice: Choice, row: Row) -> list[Policy | None]:
    """Return a row's policies; None where a code comes for free, as at the start of a chain or after a kept block.

    The decoder's first state is the end of the walk back: exact, and nothing has to be stored for it.
    """
    chosen: list[Policy | None] = []
    for i in range(row.first, row.last + 1):
        policy = choice.policies[i]
        is_free = isinstance(policy, Code) and choice.block_bytes[i] * _FREE < inspection.blocks[i].stream_bytes
        chosen.append(None if is_free else policy)
    return chosen


def in_words(policies: Sequence[Policy | None]) -> str:
    """Return the policies of a row in a few characters: `keep`, `free`, `4 bit +1`, `rev 1`, `2–4 bit/rev/keep`."""
    found = list(dict.fromkeys(policies))
    if len(found) == 1:
        return _short(found[0])
    codes = [p for p in found if isinstance(p, Code) and not p.is_auto]
    bits = sorted({int(p.bits) for p in codes})
    parts = [f"{bits[0]}–{bits[-1]} bit" if len(bits) > 1 else f"{bits[0]} bit"] if codes else []
    parts += ["rev"] if any(isinstance(p, Reverse) for p in found) else []
    parts += [_short(p) for p in found if p not in codes and not isinstance(p, Reverse)]
    return "/".join(parts)


def _short(policy: Policy | None) -> str:
    if policy is None:
        return "free"
    if isinstance(policy, Code):
        where = "" if policy.device is None else f" {policy.device}"
        return f"{policy.bits} bit" + (f" +{policy.refine}" if policy.refine else "") + where
    if isinstance(policy, Keep):
        return "keep" + ("" if policy.device is None else f" {policy.device}")
    if isinstance(policy, Store):
        return "store"
    if isinstance(policy, Reverse):
        return f"rev {policy.refine}"
    return str(policy)


def ratio(whole: float, part: float) -> float:
    """Return `whole / part`, infinite where nothing is left."""
    return whole / part if part else math.inf


def number(value: float | None) -> str:
    """Return a figure in two digits: `28`, `0.05`, `2.1e-3`."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "∞" if value > 0 else "nan"
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:.0f}" if value < 1e4 else f"{value:.0e}".replace("e+0", "e")
    if value >= 0.01:
        return f"{value:.2g}" if value >= 10 else f"{value:.2f}"
    return f"{value:.1e}".replace("e-0", "e-")


def span(values: Sequence[float | None]) -> str:
    """Return the range of figures: `0.05–0.22`; a single figure where both ends read the same."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return "-"
    low, high = number(min(known)), number(max(known))
    return low if low == high else f"{low}–{high}"
