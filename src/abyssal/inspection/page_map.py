"""The map of an inspection: what every policy would do to every block, and which were chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from abyssal.engine.policy import Code, Policy, Reverse, Store
from abyssal.inspection.findings import Findings
from abyssal.inspection.rows import chain_names, in_words
from abyssal.inspection.text import percent, tolerance_of
from abyssal.report.depth_plots import Stretch
from abyssal.report.heat import Choices, heat_map
from abyssal.report.page import Figure, Section
from abyssal.report.plots import SERIES

__all__ = ["for_both", "map_section", "stretches_of"]

_BROAD, _NARROW = (1000, 350), (385, 320)  # CSS pixels


def map_section(inspection: Findings) -> Section:
    """Return the section with the map: a row per policy, a column per block, the choices outlined."""
    blocks = inspection.blocks
    policies = _policies(inspection)
    table = {policy: row for row, policy in enumerate(policies)}
    shares = [[_share(inspection, i, policy) for i in range(len(blocks))] for policy in policies]
    known = [s for line in shares for s in line if s is not None and 0 < s < math.inf]
    low = max(-8, math.floor(math.log10(max(min(known, default=1e-4), 1e-8)) + 0.5))
    high = min(0, math.ceil(math.log10(max(known, default=1.0))))
    chosen = inspection.choices[:: max(1, math.ceil(len(inspection.choices) / SERIES))][:SERIES]
    outlines = [
        Choices(f"best for {tolerance_of(c)}", [table[p] for p in c.policies], order + 1)
        for order, c in enumerate(chosen)
    ]
    title, leading = _leading(inspection)

    def draw(size: tuple[int, int], which: str) -> str:
        return heat_map(
            shares,
            alt=f"Share of the gradient error, {len(policies)} policies, {len(blocks)} blocks{which}. {title}.",
            rows=[in_words([policy]) for policy in policies],
            columns=[b.name for b in blocks],
            title="block's share of the gradient error",
            exponents=(min(low, high - 2), high),
            stretches=stretches_of(inspection),
            choices=outlines,
            width=size[0],
        )

    broad, narrow = for_both(draw)
    text = (
        "One column per block, one row per policy, the costliest in bytes at the top. A share is how far off the "
        f"whole gradient would be if this block alone had that policy; shares add up in squares. {leading}",
    )
    caption = (
        "Outlined: the policy chosen for each block at each tolerance. `4 bit +1` is `Code(4, refine=1)`, `rev 2` is "
        "`Reverse(2)`; no shade: not measured, or not allowed there."
    )
    return Section(title, text, Figure(broad, caption, narrow=narrow))


def _leading(inspection: Findings) -> tuple[str, str]:
    """Say which block makes most of the error under the code that all blocks allow and few can do without."""
    codes = [
        (p, c) for p, c in inspection.uniform.items() if isinstance(p, Code) and p.refine == 0 and c.gradient_error
    ]
    if not codes or len(inspection.blocks) < 2:
        return "What each block would cost under each policy", ""
    policy = min(codes, key=lambda item: abs(item[0].bits - 4) if isinstance(item[0].bits, int) else 9)[0]
    squares = [(_share(inspection, i, policy) or 0.0) ** 2 for i in range(len(inspection.blocks))]
    top = max(range(len(squares)), key=squares.__getitem__)
    part = squares[top] / sum(squares)
    name = inspection.blocks[top].name
    said_so = f"With `{policy}` for all, `{name}` makes {percent(part)} of the squared error."
    if part > 0.5:
        return (f"{name} alone makes {percent(part)} of the squared error under {policy}"), ""
    return "The error is spread over many blocks", said_so


def _share(inspection: Findings, i: int, policy: Policy) -> float | None:
    candidate = inspection.blocks[i].candidate(policy)
    return None if candidate is None else candidate.gradient_share


def _policies(inspection: Findings) -> list[Policy]:
    """Return the policies of all blocks, the costliest in bytes first."""
    cost: dict[Policy, list[float]] = {}
    for block in inspection.blocks:
        for c in block.candidates:
            cost.setdefault(c.policy, []).append(c.stored_bytes / max(1, block.stream_bytes))
    chosen = {policy for choice in inspection.choices for policy in choice.policies}
    shown = [policy for policy in cost if policy in chosen or not isinstance(policy, Store)]
    return sorted(shown, key=lambda p: (-median(cost[p]), _refinements(p)))


def _refinements(policy: Policy) -> int:
    return policy.refine if isinstance(policy, Code | Reverse) else 0


def stretches_of(inspection: Findings) -> tuple[Stretch, ...]:
    """Return the chains as stretches of the axis that counts blocks."""
    stretches: list[Stretch] = []
    names = iter(chain_names(inspection))
    for i, block in enumerate(inspection.blocks):
        if i and block.chain == inspection.blocks[i - 1].chain:
            stretches[-1] = Stretch(stretches[-1].name, stretches[-1].start, stretches[-1].count + 1)
        else:
            stretches.append(Stretch(next(names, ""), i, 1))
    return tuple(stretches)


def for_both(draw: Callable[[tuple[int, int], str], str]) -> tuple[str, str]:
    """Draw a plot for broad and for narrow pages; ids in an SVG come from its words, so they must differ."""
    return draw(_BROAD, ""), draw(_NARROW, " (narrow)")
