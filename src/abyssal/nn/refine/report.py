"""What `untie` and `deepen` did to a model: their reports."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from torch import nn

__all__ = ["MARK", "Deepened", "Section", "Untied", "refinement"]

MARK = "abyssal_refined"  # where a refined model holds its report


@dataclass(frozen=True)
class Untied:
    """What `untie` did.

    Attributes:
        chains: of each chain its name, its length, and how many different blocks it had.
        parameters: their number before and now, shared ones counted once.
        kept: names of parameters that stay shared, since something outside the chain has them, too.
        change: relative change of the output on the batch; None without a batch.
        notes: what a user should know.
    """

    chains: tuple[tuple[str, int, int], ...]
    parameters: tuple[int, int]
    kept: tuple[str, ...] = ()
    change: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"Untied {name or 'the model'}: {length} blocks of their own where there were {distinct}."
            for name, length, distinct in self.chains
        ]
        lines.append(f"Parameters: {self.parameters[0]:,} before, {self.parameters[1]:,} now.")
        if self.kept:
            lines.append(f"Still shared with what is outside the chain: {', '.join(self.kept)}.")
        if self.change is not None:
            lines.append(f"The output changed by {self.change:.1e} of itself on the batch.")
        return "\n".join((*lines, *map(_sentence, self.notes)))


@dataclass(frozen=True)
class Section:
    """What has become of one block.

    Attributes:
        block: its name before.
        copies: the names now.
        shares: what the branches of each copy are multiplied by; they add up to 1.
        change: how much the copies' increment of the stream differs from the block's, relative to it, on the batch;
            None where it was not measured.
    """

    block: str
    copies: tuple[str, ...]
    shares: tuple[float, ...]
    change: float | None = None


@dataclass(frozen=True)
class Deepened:
    """What `deepen` did, and how much the function changed by it.

    Attributes:
        factor: blocks now for each one before.
        how: "interpolate" or "copy".
        sections: one for each block before.
        parameters: their number before and now.
        roughness: median of `|W[n+1] - W[n]|` over the geometric mean of the two norms, over neighbouring blocks'
            matrices: sqrt(2) for unrelated ones; None where there are none.
        change: relative change of the output on the batch; None without a batch.
        loss: before and now, on the batch; None where there is none.
        gradients: norm of the loss's gradient in each block now, in order; empty where there is no loss.
        silent: how many parameters get no gradient at all, before and now.
        notes: what a user should know.
    """

    factor: int
    how: str
    sections: tuple[Section, ...]
    parameters: tuple[int, int]
    roughness: float | None = None
    change: float | None = None
    loss: tuple[float, float] | None = None
    gradients: tuple[float, ...] = ()
    silent: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def depth(self) -> tuple[int, int]:
        """Number of blocks before and now."""
        return len(self.sections), sum(len(section.copies) for section in self.sections)

    def __str__(self) -> str:
        before, now = self.depth
        verb = "interpolated in depth" if self.how == "interpolate" else "copied"
        lines = [
            f"Deepened {before} blocks to {now}, {verb}; {self.parameters[0]:,} parameters to {self.parameters[1]:,}."
        ]
        uneven = [section for section in self.sections if len(set(section.shares)) > 1]
        lines.append(f"Branches times 1/{self.factor}{f' but in {len(uneven)} blocks' if uneven else ''}.")
        for section in uneven[:5]:
            shares = " + ".join(f"{share:.3g}" for share in section.shares)
            lines.append(f"  {section.block}: {shares} (its increment changes by {section.change:.0%})")
        if len(uneven) > 5:
            lines.append(f"  and {len(uneven) - 5} more (see .sections)")
        if self.change is not None:
            lines.append(f"On the batch the output changed by {self.change:.2%} of itself.")
        if self.loss is not None:
            lines.append(f"Loss before {self.loss[0]:.4f}, now {self.loss[1]:.4f}.")
        if self.gradients:
            least, middle, most = min(self.gradients), statistics.median(self.gradients), max(self.gradients)
            lines.append(f"Gradient of a block: {least:.2e} to {most:.2e}, median {middle:.2e}.")
        if self.silent is not None:
            lines.append(f"Parameters without any gradient: {self.silent[0]} before, {self.silent[1]} now.")
        return "\n".join((*lines, *map(_sentence, self.notes)))


def refinement(model: nn.Module) -> Untied | Deepened | None:
    """Return the report on a model that :func:`untie` or :func:`deepen` returned, the latest; else None."""
    report = model.__dict__.get(MARK)
    return report if isinstance(report, Untied | Deepened) else None


def _sentence(note: str) -> str:
    return note[0].upper() + note[1:] + ("" if note.endswith(".") else ".")
