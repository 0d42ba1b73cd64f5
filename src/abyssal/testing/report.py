"""What the conformance kit found, in words and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from abyssal.util.text import printed

Level = Literal["ok", "note", "warning", "error"]
_LEVELS: tuple[Level, ...] = ("error", "warning", "note", "ok")
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}
_MOST_ROWS = 8  # of one check and level, in the text; `Report.findings` has all


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok"; "note", a fact worth knowing; "warning", works, but not as well as it might; "error",
            gradients or state would be wrong.
        check: what was looked at: "stream", "determinism", "arguments", "buffers", "random numbers",
            "contraction", "gradients", "chains", "mode" or "precision".
        block: the block's name in the model; empty where it concerns the whole model.
        what: what was found, in words, with its figure.
        advice: what to do about it; empty where there is nothing to do.
        figure: the figure by itself (a relative error, a ratio), where there is one.
    """

    level: Level
    check: str
    block: str
    what: str
    advice: str = ""
    figure: float | None = None


@dataclass(frozen=True)
class Report:
    """All findings on one block or model; `print` shows them as a table, worst first.

    Attributes:
        subject: the class of what was checked.
        dtype: the precision that it was checked in.
        tolerance: the relative gradient error allowed where inputs are not kept exactly.
        findings: everything that was looked at, in the order of the checks.
    """

    subject: str
    dtype: str
    tolerance: float
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        """The findings of level "error"."""
        return [finding for finding in self.findings if finding.level == "error"]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists, for JSON."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "dtype": self.dtype,
            "tolerance": self.tolerance,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def raise_if_failed(self) -> None:
        """Do nothing if there is no error.

        Raises:
            AssertionError: with the whole report as its text.
        """
        if not self.ok:
            raise AssertionError("\n" + str(self))

    def __str__(self) -> str:
        """Return the table, 100 columns wide unless COLUMNS says otherwise."""
        table = Table(header_style="bold", pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("check", no_wrap=True)
        table.add_column("block", overflow="fold", max_width=24)
        table.add_column("what was found", overflow="fold", ratio=1)
        for level in _LEVELS:
            for finding in _gathered([f for f in self.findings if f.level == level]):
                what = Text(finding.what)
                if finding.advice:
                    what.append(f"\n→ {finding.advice}", style="italic")
                level_text = Text(finding.level, style=_STYLES[finding.level])
                table.add_row(level_text, finding.check, Text(finding.block or "-"), what)
        return printed(table, Text(self._summary()))

    def _summary(self) -> str:
        counts = {level: sum(f.level == level for f in self.findings) for level in _LEVELS}
        verdict = "passes" if self.ok else f"FAILS with {counts['error']} error(s)"
        return f"{self.subject} {verdict}; {counts['warning']} warning(s). Compared in {self.dtype}."


def _gathered(findings: list[Finding]) -> list[Finding]:
    """Make one row of blocks of which the same is said, and of all blocks where a check is ok."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for f in findings:
        same = (f.check,) if f.level == "ok" and f.block else (f.check, f.what, f.advice)
        groups.setdefault(same, []).append(f)
    rows, shown = [], dict.fromkeys((f.check for f in findings), 0)
    for group in groups.values():
        check = group[0].check
        shown[check] += 1
        if shown[check] <= _MOST_ROWS:
            rows.append(_merged(group))
    for check, count in shown.items():
        if count > _MOST_ROWS:
            more = f"... and {count - _MOST_ROWS} more like these"
            rows.append(Finding(findings[0].level, check, "", more))
    return rows


def _merged(group: list[Finding]) -> Finding:
    worst = max(group, key=lambda f: -1.0 if f.figure is None else f.figure)
    names = list(dict.fromkeys(f.block for f in group))
    if len(names) == 1:
        return worst
    block = ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)})"
    same = all(f.what == worst.what for f in group)
    what = worst.what if same else f"{worst.what} (worst of {len(names)}: {worst.block})"
    return Finding(worst.level, worst.check, block, what, worst.advice, worst.figure)
