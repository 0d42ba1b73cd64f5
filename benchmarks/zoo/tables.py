"""Totals of a run, its failures by name, and how another run differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import report
from zoo import verdicts
from zoo.verdicts import Row

MOVED = 1.25  # a gradient error that another run multiplies or divides by more than this has moved
_KEEP = ("exact", "rounding", "wrong", "raises")
_DEFAULT = ("within", "near", "told", "beyond", "wrong", "raises")


def totals(rows: dict[str, Row]) -> str:
    """By kind and in all: what was measured, and the verdicts."""
    by_kind: dict[str, list[Row]] = {}
    for name, row in rows.items():
        kind = row.get("kind", "unknown")
        by_kind.setdefault(kind if not name.startswith("torchvision/") else f"torchvision, {kind}", []).append(row)
    head = ["kind", "types", "no blocks", "measured"]
    head += [f"Keep() {word}" for word in _KEEP] + [f"default {word}" for word in _DEFAULT]
    head += ["blocks", "coded", "kept", "stored"]
    lines = [[kind, *_counted(of_kind)] for kind, of_kind in sorted(by_kind.items(), key=lambda item: -len(item[1]))]
    return report.table(head, [*lines, ["all", *_counted(rows.values())]])


def _counted(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    outcomes = Counter(map(verdicts.outcome, rows))
    measured = [row for row in rows if verdicts.is_measured(row)]
    kept, default = Counter(map(verdicts.keep, measured)), Counter(map(verdicts.default, measured))
    treated: Counter[str] = Counter()
    for row in measured:
        treated.update(verdicts.treatment(row))
    figures = [len(rows), outcomes["no blocks"], len(measured)]
    figures += [kept[word] for word in _KEEP] + [default[word] for word in _DEFAULT]
    figures += [sum(treated.values()), treated["coded"], treated["kept"], treated["stored"]]
    return [f"{figure:,}" if figure else "" for figure in figures]


def failures(rows: dict[str, Row]) -> str:
    """What went wrong, by what is said of it, with the names."""
    sections: dict[str, list[str]] = {}
    for name, row in rows.items():
        for title in _failures(row):
            sections.setdefault(title, []).append(name)
    lines = [f"- {title} ({len(names)}): {_listed(names)}" for title, names in sorted(sections.items())]
    return "\n".join(lines)


def _failures(row: Row) -> Iterable[str]:
    outcome = verdicts.outcome(row)
    if outcome == "find_blocks raises":
        yield f"{outcome}: {_plain(row['find_blocks'])}"
    elif outcome not in ("measured", "no blocks"):
        yield f"{outcome}{': ' + row['ended'] if 'ended' in row else ''}"
    if outcome != "measured":
        return
    for policy, verdict in (("keep", verdicts.keep(row)), ("default", verdicts.default(row))):
        if verdict == "raises":
            yield f"{policy} raises: {_plain(row[policy]['raised'])}"
        elif verdict in ("wrong", "beyond"):
            yield f"{policy} {verdict}"
    if not verdicts.is_released(row):
        yield "release leaves something behind"


def _plain(text: str) -> str:
    return verdicts.without_numbers(text)[:160].replace("|", "/").replace("\n", " ")


def _listed(names: list[str], most: int = 60) -> str:
    short = [name.removeprefix("transformers/") for name in names]
    return ", ".join(short[:most]) + (f" and {len(short) - most} more" if len(short) > most else "")


# ---------------------------------------------------------------------- two runs


def comparison(old: dict[str, Row], new: dict[str, Row]) -> str:
    """Print what differs: verdicts, then error figures, blocks, treatment, bytes, notes and warnings."""
    both = [name for name in old if name in new]
    differences = {
        "only in the earlier run": [name for name in old if name not in new],
        "only in this run": [name for name in new if name not in old],
    }
    for title, of in _ASPECTS.items():
        differences[title] = [
            f"{name}: {before} -> {after}"
            for name in both
            if (before := of(old[name])) != (after := of(new[name])) and not _same(before, after)
        ]
    parts = [f"{len(both)} in both runs."]
    for title, found in differences.items():
        if found:
            parts.append(f"### {title} ({len(found)})\n" + "\n".join(f"- {line}" for line in found))
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "Nothing differs."])


def _same(before: object, after: object) -> bool:
    """Whether two figures are the same up to noise."""
    if not isinstance(before, float) or not isinstance(after, float):
        return False
    low, high = sorted((before, after))
    return high < verdicts.ROUNDING or (low > 0 and high <= MOVED * low)


def _of_run(policy: str, key: str) -> Callable[[Row], object]:
    return lambda row: row.get(policy, {}).get(key)


def _said(row: Row) -> object:
    """Notes and warnings, numbers aside."""
    found = row.get("default", {})
    texts = {*found.get("notes", ()), found.get("note", ""), *found.get("warnings", ())} - {""}
    return sorted({verdicts.without_numbers(text) for text in texts})


_ASPECTS: dict[str, Callable[[Row], object]] = {
    "outcome": verdicts.outcome,
    "`Keep()`": lambda row: verdicts.keep(row) if verdicts.is_measured(row) else None,
    "default": lambda row: verdicts.default(row) if verdicts.is_measured(row) else None,
    "release": verdicts.is_released,
    "blocks": lambda row: row.get("blocks"),
    "gradient error of the default": _of_run("default", "error"),
    "gradient error of the default's first step": _of_run("default", "first_error"),
    "gradient error of bfloat16, whose change says that the model or the machine is another": lambda row: row.get(
        "bf16"
    ),
    "coded, kept, stored": lambda row: verdicts.treatment(row) if verdicts.is_measured(row) else None,
    "what is raised": lambda row: [_plain(row.get(policy, {}).get("raised", "")) for policy in ("keep", "default")],
    "bytes that the default keeps": lambda row: float(row.get("default", {}).get("stored_bytes", 0)),
    "notes and warnings": _said,
}
