"""What a depth check found, for people: a verdict in words, a table, a plot, plain data."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from abyssal.scaling.transfer.plots import draw_check
from abyssal.scaling.transfer.sizes import JUDGED, QUANTITIES, Finding, Sizes
from abyssal.util.files import for_json
from abyssal.util.text import printed

__all__ = ["DepthCheck"]

_SHORT = {
    "stream": "stream, at init",
    "output": "output, at init",
    "first_step": "output, 1st step (*)",
    "output_change": "output, {steps} steps",
    "stream_change": "stream, {steps} steps",
    "increment": "increment, at init",
    "branch_change": "increment, {steps} steps",
}


@dataclass(frozen=True)
class DepthCheck(Sizes):
    """A depth coordinate check: what :class:`Sizes` has, in words and pictures."""

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
        return draw_check(Path(path), self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; None stands for what is not a finite number."""
        named = ("rule", "depths", "seeds", "steps", "lr", "optimizer", "passed", "threshold")
        plain = {
            **{name: getattr(self, name) for name in named},
            "verdict": self.verdict(),
            "slopes": {
                name: {"value": s.value, "low": s.low, "high": s.high, "points": s.points}
                for name, s in self.slopes.items()
            },
            "findings": [asdict(finding) for finding in self.findings],
            "sizes": {name: self.sizes(name).tolist() for name in QUANTITIES},
            "runs": [asdict(run) for run in self.runs],
        }
        return {name: for_json(value) for name, value in plain.items()}

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
        return printed(self, width=140)
