"""What came out of the papers' experiments: a table of verdicts, from a folder that `abyssal reproduce` filled.

    abyssal reproduce all --size small --out repro/
    python benchmarks/verdicts.py repro/ --write docs/reproduce.md

Half an hour of two cores for the first command, none for the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import report
from abyssal.papers.experiment import Finding
from abyssal.papers.reproduce import Result, read_results

MARKER = "verdicts"
ANSWERS = {True: "holds", False: "does not hold", None: "not decided"}


def render(results: list[Result]) -> str:
    """The table, and below it every finding that does not hold or is not decided."""
    head = ["experiment", "verdict", "findings that hold", "CPU minutes"]
    body = [
        [
            f"`{result.name}`",
            result.verdict,
            f"{_held(result)} of {len(result.findings)}",
            f"{result.seconds / 60:.1f}",
        ]
        for result in results
    ]
    total = sum(result.seconds for result in results) / 60
    body.append(
        ["all", "", f"{sum(_held(r) for r in results)} of {sum(len(r.findings) for r in results)}", f"{total:.0f}"]
    )
    open_ones = [
        f"- `{result.name}`, {ANSWERS[finding.holds]}: {_said(finding)}"
        for result in results
        for finding in result.findings
        if not finding.holds
    ]
    facts = {**results[-1].machine, "Size": results[0].size}
    title = "What does not hold, or is not decided at this size:"
    parts = [report.table(head, body), title, "\n".join(open_ones) or "Nothing.", report.header(facts)]
    return "\n\n".join(parts)


def _held(result: Result) -> int:
    return sum(finding.holds is True for finding in result.findings)


def _said(finding: Finding) -> str:
    return f"{finding.claim}. Measured: {finding.measured}."


def main(
    out: Annotated[Path, typer.Argument(help="Folder that `abyssal reproduce` filled.")],
    size: Annotated[str, typer.Option(help="Whose results: tiny, small or paper.")] = "small",
    write: Annotated[Path | None, typer.Option(help="Markdown file with markers of verdicts.")] = None,
) -> None:
    """Print the table."""
    results = [r for runs in read_results(out).values() for r in runs if r.size == size and r.status == "done"]
    if not results:
        raise SystemExit(
            f"{out} has no finished results of size {size}: run `abyssal reproduce all --out {out}` first."
        )
    report.publish(render(results), MARKER, write)


if __name__ == "__main__":
    typer.run(main)
