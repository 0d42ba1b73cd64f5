"""The page of all experiments: each claim, our figure, whether it holds, the numbers, the command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from abyssal.papers.experiment import Experiment, Finding
from abyssal.papers.reproduce import Result, read_results
from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, write
from abyssal.report.picture import embedded
from abyssal.util.files import columns_of, read_csv
from abyssal.util.text import seconds_in_words

__all__ = ["MARKS", "build_page", "findings_table", "marked", "write_page"]

MARKS = {"holds": "✓", "does not hold": "✗", "not decided": "?", "failed": "!", "running": "…", "stopped": "…"}
_MOST_ROWS = 60
_MOST_LINES = 40


@dataclass(frozen=True)
class _Entry:
    """One experiment on the page: what it is, and its runs, the latest first."""

    name: str
    paper: str
    claim: str
    results: Sequence[Result]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name)


def marked(verdict: str) -> str:
    """Return a verdict with its mark, e.g. "✓ holds"."""
    return f"{MARKS[verdict]} {verdict}" if verdict in MARKS else verdict


def write_page(out: Path, known: Mapping[str, Experiment], command: str) -> Path:
    """Write `index.html` from what is on the disk, whole or not at all.

    Args:
        out: the folder of everything.
        known: all experiments there are; those that were not run are listed as such.
        command: what the user typed.
    """
    return write(build_page(out, known, command), out / "index.html")


def build_page(out: Path, known: Mapping[str, Experiment], command: str) -> Page:
    """Return the page; every number on it comes from files under `out`."""
    results = read_results(out)
    entries = []
    for name in sorted({*known, *results}):
        runs = results.get(name, [])
        source = known[name] if name in known else runs[0]
        entries.append(_Entry(name, source.paper, source.claim, runs))
    run = [entry for entry in entries if entry.results]
    return Page(
        title=_title(run),
        lead="Each experiment below states what a paper claims, measures it anew, and judges what came out by "
        "intervals. A claim that does not hold is shown as such.",
        command=command,
        headlines=_headlines(run, entries),
        sections=(_summary(entries), *(_section(entry, out) for entry in run)),
        facts=_facts(run),
    )


def _title(run: Sequence[_Entry]) -> str:
    if not run:
        return "Nothing has been run yet"
    verdicts = [entry.results[0].verdict for entry in run]
    held = verdicts.count("holds")
    if held == len(run):
        return f"All {held} claims hold" if held > 1 else "The claim holds"
    words = {
        "holds": ("holds", "hold"),
        "does not hold": ("does not", "do not"),
        "not decided": ("is not decided", "are not decided"),
        "failed": ("failed", "failed"),
    }
    counts = [(verdicts.count(verdict), *word) for verdict, word in words.items()]
    said = [f"{count} {one if count == 1 else many}" for count, one, many in counts if count or many == "hold"]
    if unfinished := sum(verdict in ("running", "stopped") for verdict in verdicts):
        said.append(f"{unfinished} unfinished")
    return f"Of {len(run)} claims {', '.join(said)}"


def _headlines(run: Sequence[_Entry], entries: Sequence[_Entry]) -> tuple[Headline, ...]:
    if not run:
        return ()
    latest = [entry.results[0] for entry in run]
    findings = [finding for result in latest for finding in result.findings]
    against = sum(finding.holds is False for finding in findings)
    open_ = sum(finding.holds is None for finding in findings)
    heads = [
        Headline(f"{sum(finding.holds is True for finding in findings)} of {len(findings)}", "findings hold"),
        Headline(f"{against}", f"do not hold; {open_} not decided at this size"),
    ]
    if failed := sum(result.status == "failed" for result in latest):
        heads.append(Headline(f"{failed}", "failed with an exception"))
    if len(run) < len(entries):
        heads.append(Headline(f"{len(run)} of {len(entries)}", "experiments run"))
    heads.append(Headline(seconds_in_words(sum(result.seconds for result in latest)), "of CPU time in all"))
    return tuple(heads)


def _summary(entries: Sequence[_Entry]) -> Section:
    rows = []
    for entry in entries:
        if not entry.results:
            rows.append((entry.name, "not run", entry.claim, ""))
            continue
        last = entry.results[0]
        held = f" ({sum(finding.holds is True for finding in last.findings)} of {len(last.findings)})"
        rows.append(
            (
                f"[{entry.name}](#{entry.anchor})",
                marked(last.verdict) + (held if last.status == "done" else ""),
                entry.claim,
                last.size
                + (f", {seconds_in_words(last.seconds)}, {last.started[:10]}" if last.status == "done" else ""),
            )
        )
    columns = (
        Column("experiment", numeric=False),
        Column("verdict", numeric=False),
        Column("what the paper claims", numeric=False, wraps=True),
        Column("size, CPU time, date", numeric=False),
    )
    caption = "The last run of each experiment; with the verdict, how many of its findings hold"
    return Section("All experiments", table=Table(caption, columns, tuple(rows)))


def _section(entry: _Entry, out: Path) -> Section:
    last = entry.results[0]
    text = [entry.claim, f"{entry.paper}. {_run_in_words(last)}"]
    text += [f"Also run at size {other.size}: {_run_in_words(other)}" for other in entry.results[1:]]
    again = f"abyssal reproduce {entry.name} --size {last.size} --out {out}"
    title = f"{entry.name}: {marked(last.verdict)}"
    if last.status != "done":
        lines = last.traceback.strip().splitlines()
        cut = ["[...]"] if len(lines) > _MOST_LINES else []
        shown = "\n".join([again, *([""] if lines else []), *cut, *lines[-_MOST_LINES:]])
        if cut:
            text.append(f"All of the traceback is in `{last.folder.relative_to(out) / 'traceback.txt'}`.")
        return Section(title, tuple(text), code=shown, anchor=entry.anchor)
    figure = None
    if last.figure.is_file():
        caption = f"Measured at size {last.size}. Drawn from `{last.folder.relative_to(out) / 'rows.csv'}`."
        figure = Figure(embedded(last.figure, f"{entry.name}: {entry.claim}"), caption, whole=True)
    found, rows = findings_table(last.findings), _rows(last, out)
    return Section(title, tuple(text), figure, found, code=again, folded=rows, anchor=entry.anchor)


def _run_in_words(result: Result) -> str:
    when = f"{result.started[:16].replace('T', ' ')} UTC"
    if result.status == "failed":
        return f"The run of {when} failed."
    if result.status != "done":
        word = "is still running" if result.status == "running" else "was stopped; the same command goes on with it"
        return f"The run of {when} {word}."
    settings = ", ".join(f"{name} = {_short(value)}" for name, value in result.settings.items())
    spent = f"{seconds_in_words(result.seconds)} of CPU time"
    return f"{marked(result.verdict)}. Size {result.size} ({settings}); {spent}, {when}."


def _short(value: object) -> str:
    """Return a setting in few words: a long list by its ends."""
    if isinstance(value, list):
        parts = [_short(part) for part in value]
        return ", ".join(parts) if len(parts) <= 6 else f"{', '.join(parts[:3])} ... {parts[-1]} ({len(parts)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return each claim, what came out, and the verdict."""
    answer = {True: "holds", False: "does not hold", None: "not decided"}
    columns = (
        Column("claim", numeric=False, wraps=True),
        Column("measured", numeric=False, wraps=True),
        Column("verdict", numeric=False),
    )
    rows = tuple((finding.claim, finding.measured, marked(answer[finding.holds])) for finding in findings)
    return Table("What came out", columns, rows)


def _rows(result: Result, out: Path) -> Table | None:
    path = result.folder / "rows.csv"
    if not path.is_file():
        return None
    rows = read_csv(path)
    names = columns_of(rows)
    numeric = [all(not isinstance(row[name], str) for row in rows) for name in names]
    shown = tuple(tuple(_cell(row[name]) for name in names) for row in rows[:_MOST_ROWS])
    more = "" if len(rows) <= _MOST_ROWS else f"; the first {_MOST_ROWS}"
    caption = f"The numbers: {len(rows):,} rows{more}"
    columns = tuple(Column(name, numeric=n) for name, n in zip(names, numeric, strict=True))
    return Table(caption, columns, shown, notes=(f"All of them, in full: `{path.relative_to(out)}`.",))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(run: Sequence[_Entry]) -> dict[str, str]:
    """Return machines, versions and days of all runs shown; what differs between runs stands side by side."""
    names = [name for entry in run for name in entry.results[0].machine]
    facts = {}
    for name in dict.fromkeys(names):
        values = dict.fromkeys(entry.results[0].machine.get(name, "") for entry in run)
        if name != "Date":
            facts[name] = "; ".join(value for value in values if value)
        else:
            days = sorted(value[:10] for value in values if value)
            facts[name] = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return facts
