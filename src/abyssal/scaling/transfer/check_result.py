"""What a depth check found: records, powers of the depth, and a verdict in words."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from abyssal.util.stats import Slope, power_of_depth

__all__ = ["JUDGED", "QUANTITIES", "DepthCheck", "Finding", "Run"]

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

_SHORT = {
    "stream": "stream, at init",
    "output": "output, at init",
    "first_step": "output, 1st step (*)",
    "output_change": "output, {steps} steps",
    "stream_change": "stream, {steps} steps",
    "increment": "increment, at init",
    "branch_change": "increment, {steps} steps",
}

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
        if quantity == "stream":
            return self.stream[-1]
        if quantity == "output":
            return self.output
        if quantity == "first_step":
            return self.blocks_moved[0] / unit
        if quantity == "output_change":
            return self.output_moved[-1] / unit
        if quantity == "stream_change":
            return self.stream_change[-1]
        if quantity == "increment":
            return math.sqrt(sum(x * x for x in self.increment) / len(self.increment))
        known = [x for x in self.branch_change if not math.isnan(x)]
        return median(known) if known else math.nan


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
class DepthCheck:
    """A depth coordinate check.

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
        if quantity not in QUANTITIES:
            raise ValueError(f"There is no quantity {quantity!r}; there are {', '.join(QUANTITIES)}.")
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

    def verdict(self) -> str:
        """Say pass or fail, and why, in a few sentences."""
        first, last = self.depths[0], self.depths[-1]
        head = "Passed" if self.passed else "Not passed"
        said = [f"{head}: {self.rule}, depths {first} to {last}."]
        wrong = [finding for finding in self.findings if finding.state not in ("stable", "allowed")]
        for finding in wrong:
            said.append(finding.text[0].upper() + finding.text[1:] + ".")
        if not wrong:
            powers = ", ".join(f"{self._words(name)} L^{self.slopes[name].value:+.2f}" for name in JUDGED)
            said.append(f"Nothing grows or vanishes with depth beyond L^+-{self.threshold:.2f}: {powers}.")
        said += self._advice(wrong)
        return " ".join(said)

    def _advice(self, wrong: list[Finding]) -> list[str]:
        """What follows for the learning rate, and what is worth knowing besides."""
        first, last = self.depths[0], self.depths[-1]
        states = {finding.quantity: finding.state for finding in wrong}
        said = []
        step = self.slopes["first_step"].value
        if states.get("first_step") == "unstable":
            factor = (last / first) ** abs(step)
            said.append(
                f"To move the output as far by a step of the blocks at depth {last} as at {first}, the learning rate "
                f"would have to be {factor:.1f} times {'smaller' if step > 0 else 'larger'}."
            )
        lazy = self.slopes["branch_change"]
        if lazy.high < -self.threshold:
            said.append(
                f"Each block's change, by what it adds at initialisation, falls as L^{lazy.value:.2f} "
                f"({lazy.low:.2f} to {lazy.high:.2f}): deep networks' blocks hardly leave their initialisation."
            )
        moved = self.sizes("output_change")
        if self.relative and np.isfinite(moved).all() and float(np.median(moved[0])) > 1:
            said.append(
                f"The steps are large: at depth {first} they move the output by {float(np.median(moved[0])):.1f} times "
                "its size. Powers hold for small steps; take a smaller lr or fewer steps."
            )
        if not self.relative:
            said.append("The output is 0 at initialisation, so its changes are as they are, not by its size.")
        return said

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw sizes against depth, and the stream block by block; the file's suffix says the format.

        Raises:
            ValueError: for a folder that is missing, or a suffix that matplotlib does not write.
        """
        from abyssal.scaling.transfer.check_plots import draw_check

        return draw_check(Path(path), self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; None stands for what is not a finite number."""
        plain = {
            "rule": self.rule,
            "depths": self.depths,
            "seeds": self.seeds,
            "steps": self.steps,
            "lr": self.lr,
            "optimizer": self.optimizer,
            "passed": self.passed,
            "threshold": self.threshold,
            "verdict": self.verdict(),
            "slopes": {
                name: {"value": s.value, "low": s.low, "high": s.high, "points": s.points}
                for name, s in self.slopes.items()
            },
            "findings": [asdict(finding) for finding in self.findings],
            "sizes": {name: self.sizes(name).tolist() for name in QUANTITIES},
            "runs": [asdict(run) for run in self.runs],
        }
        return {name: _finite(value) for name, value in plain.items()}

    def __rich__(self) -> Group:
        """Return a table of powers, and the verdict."""
        ends = (self.depths[0], self.depths[-1])
        table = Table(title=f"Depth check: {self.rule}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in ("quantity", *(f"L = {depth}" for depth in ends), "power of L (95 %)", ""):
            table.add_column(column, justify="left" if column in ("quantity", "") else "right", no_wrap=True)
        states = {finding.quantity: finding.state for finding in self.findings}
        for name, slope in self.slopes.items():
            middle = np.median(self.sizes(name)[[0, -1]], axis=1)
            table.add_row(
                _SHORT[name].format(steps=self.steps),
                *(f"{value:.2g}" for value in middle),
                f"{slope.value:+.2f} ({slope.low:+.2f} to {slope.high:+.2f})",
                states.get(name, "-"),
            )
        note = "(*) of the blocks alone: all other parameters as at initialisation."
        return Group(table, Text(f"{self.verdict()}\n{note}"))

    def __str__(self) -> str:
        """Return the table as text."""
        out = io.StringIO()
        Console(file=out, width=140, color_system=None).print(self.__rich__())
        return out.getvalue().rstrip()


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
