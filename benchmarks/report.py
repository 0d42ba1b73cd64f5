"""What every benchmark says of itself: machine, versions, date; and how its table gets into the docs."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, str]:
    """Hardware, versions, date and load, as they are now."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": f"{os.cpu_count()} logical",
        "load at start": ", ".join(f"{load:.1f}" for load in os.getloadavg()) + " (1, 5, 15 min)",
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "abyssal": _commit(),
    }


def installed(package: str) -> str | None:
    """Version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def header(facts: dict[str, str]) -> str:
    """One paragraph of Markdown from `machine()`."""
    return "*" + "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".*"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def save(found: dict[str, Any], path: Path) -> None:
    """Put figures into a JSON file; a run that is cut off leaves the file as it was."""
    text = json.dumps(found, indent=1) + "\n"
    if path.exists() and not path.is_file():  # such as /dev/null, which must not be replaced
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def publish(text: str, name: str, page: Path | None) -> None:
    """Print tables; where a page is given, make them its section of that name too (see `write_section`)."""
    print(text)
    if page is not None:
        write_section(page, name, text)
        print(f"wrote the section '{name}' of {page}", file=sys.stderr)


def write_section(path: Path, name: str, body: str) -> None:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->`; if missing, add it."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    section = f"{begin}\n{body.strip()}\n{end}"
    text = path.read_text() if path.exists() else "# Benchmarks\n"
    if (begin in text) != (end in text) or text.count(begin) > 1:
        raise SystemExit(f"{path}: the markers {begin} and {end} do not pair up; mend the file by hand.")
    if begin in text:
        before, _, rest = text.partition(begin)
        text = before + section + rest.partition(end)[2]
    else:
        text = text.rstrip() + f"\n\n{section}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Version and commit of the package that is measured, with a plus sign where it differs from the commit."""
    found = find_spec("abyssal")
    here = Path(found.origin).parent if found is not None and found.origin else Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()
        commit = run("rev-parse", "--short", "HEAD")
        dirty = "+" if run("status", "--porcelain", "--", ".") else ""
    except (OSError, subprocess.CalledProcessError):
        commit, dirty = "no commit", ""
    return f"{installed('abyssal') or 'source'} ({commit}{dirty})"
