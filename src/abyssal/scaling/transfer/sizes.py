"""What a depth check measured: records, powers of the depth, and what each quantity does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from types import MappingProxyType

import numpy as np

from abyssal.util.checks import one_of
from abyssal.util.stats import Slope, power_of_depth

__all__ = ["JUDGED", "QUANTITIES", "Finding", "Run", "Sizes"]

QUANTITIES: Mapping[str, str] = MappingProxyType(
    {
        "stream": "the stream's size at initialisation",
        "output": "the output's size at initialisation",
        "first_step": "the output's change by the first step of the blocks",
        "output_change": "the output's change after all steps",
        "stream_change": "the stream's change after all steps",
        "increment": "a block's increment at initialisation",
        "branch_change": "the change of a block's increment",
    }
)
"""What is followed through depth, by name. Sizes are root mean squares over entries; changes are since initialisation.

`stream` is the stream after the last block by that before the first; `output` is as it is; `first_step`, by the
output's size at initialisation, is what the first step does if only the blocks' parameters take it; `output_change` is
by that size too; `stream_change` is after the last block, by its size at initialisation; `increment` is by the block's
input, root mean square over blocks; `branch_change` is by the increment at initialisation, median over blocks.
"""

JUDGED = ("stream", "output", "first_step", "output_change", "stream_change")
"""Those of which the check makes up its verdict. The others are said, not judged.

Of the stream, growth alone counts against a rule: under one that begins near the identity its size falls to that of
what came in, and no further.
"""


@dataclass(frozen=True)
class Run:
    """One network's few steps.

    Attributes:
        depth: of the network.
        seed: of its weights.
        losses: before each step; inf where it had diverged. [steps]
        stream: size of the stream after each block by that before the first one, at initialisation. [blocks]
        increment: size of what each block adds by that of its input, at initialisation. [blocks]
        increment_after: the same after the steps. [blocks]
        stream_change: change of the stream after each block by its size at initialisation, after the steps. [blocks]
        branch_change: change of each block's increment by its size at initialisation; nan where that is 0. [blocks]
        output: size of the output at initialisation.
        output_moved: change of the output since initialisation, after each step. [steps]
        blocks_moved: the same with all parameters outside of blocks as at initialisation. [steps]
        diverged: whether something was no finite number.
    """

    depth: int
    seed: int
    losses: tuple[float, ...]
    stream: tuple[float, ...]
    increment: tuple[float, ...]
    increment_after: tuple[float, ...]
    stream_change: tuple[float, ...]
    branch_change: tuple[float, ...]
    output: float
    output_moved: tuple[float, ...]
    blocks_moved: tuple[float, ...]
    diverged: bool = False

    def size(self, quantity: str, relative: bool) -> float:
        """Return one of `QUANTITIES`; changes of the output as they are unless `relative`."""
        unit = self.output if relative else 1.0
        if self.diverged and quantity not in ("stream", "output", "increment"):
            return math.inf
        return {
            "stream": self.stream[-1],
            "output": self.output,
            "first_step": self.blocks_moved[0] / unit,
            "output_change": self.output_moved[-1] / unit,
            "stream_change": self.stream_change[-1],
            "increment": math.sqrt(sum(x * x for x in self.increment) / len(self.increment)),
            "branch_change": _middle(self.branch_change),
        }[quantity]


@dataclass(frozen=True)
class Finding:
    """What one quantity does as depth grows.

    Attributes:
        quantity: of `QUANTITIES`.
        state: "stable", "unstable", "undecided" or "diverged"; where it is 0 at every depth, "allowed" or "still".
        text: the same in a sentence.
    """

    quantity: str
    state: str
    text: str


@dataclass(frozen=True)
class Sizes:
    """What a depth coordinate check measured, and what each quantity does as depth grows.

    Attributes:
        rule: that was applied; "none" for none.
        depths: ascending.
        seeds: of the weights.
        steps: that each network was trained for.
        lr: base learning rate.
        optimizer: "adamw" or "sgd".
        runs: one for each depth and seed, depths outermost.
    """

    rule: str
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    lr: float
    optimizer: str
    runs: tuple[Run, ...] = field(repr=False)

    @property
    def threshold(self) -> float:
        """Largest power of the depth that counts as stable: `min(1/4, log 2 / log(deepest / shallowest))`."""
        return min(0.25, math.log(2) / math.log(self.depths[-1] / self.depths[0]))

    @property
    def relative(self) -> bool:
        """Whether changes of the output are by its size at initialisation; not where that is 0 in some network."""
        return all(run.output > 0 for run in self.runs)

    def sizes(self, quantity: str) -> np.ndarray:
        """Return a quantity for every network, as [depths, seeds].

        Raises:
            ValueError: for a name that is not in `QUANTITIES`.
        """
        one_of("quantity", quantity, QUANTITIES)
        values = [run.size(quantity, self.relative) for run in self.runs]
        return np.array(values).reshape(len(self.depths), len(self.seeds))

    @cached_property
    def slopes(self) -> Mapping[str, Slope]:
        """The power of the depth that each quantity follows, by name."""
        return {name: power_of_depth(self.depths, self.sizes(name)) for name in QUANTITIES}

    @property
    def diverged(self) -> tuple[int, ...]:
        """Depths at which some network's training gave no finite number."""
        return tuple(sorted({run.depth for run in self.runs if run.diverged}))

    @property
    def passed(self) -> bool:
        """Whether every judged quantity is stable, or 0 where it may be."""
        return not self.diverged and all(finding.state in ("stable", "allowed") for finding in self.findings)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What each judged quantity does."""
        return tuple(self._finding(name) for name in JUDGED)

    def _finding(self, name: str) -> Finding:
        sizes, slope, words = self.sizes(name), self.slopes[name], self._words(name)
        if not np.isfinite(sizes).all():
            depths = ", ".join(str(d) for d, row in zip(self.depths, sizes, strict=True) if not np.isfinite(row).all())
            return Finding(name, "diverged", f"{words} is not finite at depth {depths}: the training diverged")
        if not (sizes > 0).any():
            if name in ("output", "first_step"):
                return Finding(name, "allowed", f"{words} is 0 at every depth")
            return Finding(name, "still", f"{words} is 0 at every depth: nothing was learned")
        power = f"{words} {self._does(slope)}"
        if math.isnan(slope.value) or math.isnan(slope.low):
            return Finding(name, "undecided", f"{power}: not decided, there are too few sizes above 0")
        limit = self.threshold
        if name == "stream" and slope.low < -limit and slope.high <= limit:
            return Finding(name, "stable", f"{power}, towards what came in: stable")
        if -limit <= slope.low and slope.high <= limit:
            return Finding(name, "stable", f"{power}: stable, within +-{limit:.2f}")
        if abs(slope.value) > limit and not slope.low <= 0 <= slope.high:
            return Finding(name, "unstable", f"{power}: not depth-stable")
        return Finding(name, "undecided", f"{power}: not decided, +-{limit:.2f} is stable; take more seeds or depths")

    def _words(self, name: str) -> str:
        return QUANTITIES[name].replace("all steps", f"{self.steps} steps" if self.steps > 1 else "the step")

    def _does(self, slope: Slope) -> str:
        verb = "grows" if slope.value > 0 else "falls"
        return f"{verb} with depth as L^{slope.value:.2f} ({slope.low:.2f} to {slope.high:.2f})"

    def profile(self, depth: int, values: Callable[[Run], tuple[float, ...]]) -> list[float]:
        """Return [blocks], the median over seeds of what each block of a depth has; nan where no run has a number."""
        runs = [values(run) for run in self.runs if run.depth == depth]
        return [_middle(column) for column in zip(*runs, strict=True)]

    def by_step(self, depth: int) -> list[float]:
        """Return [steps], the median over seeds of the output's change after each step."""
        unit = lambda run: run.output if self.relative else 1.0  # noqa: E731
        return self.profile(depth, lambda run: tuple(moved / unit(run) for moved in run.output_moved))


def _middle(values: tuple[float, ...]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan
