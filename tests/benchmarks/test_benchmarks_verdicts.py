"""The table of verdicts says what results say, and names what does not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def result(name: str, holds: list[bool | None]) -> dict[str, object]:
    findings = [{"claim": f"claim {n}", "measured": f"{n}.5", "holds": held} for n, held in enumerate(holds)]
    plain = {"format": 1, "name": name, "paper": "p", "claim": "c", "size": "small", "status": "done", "seconds": 90.0}
    return {**plain, "findings": findings, "machine": {"Machine": "some"}, "started": "2026-01-01T00:00:00+00:00"}


def test_the_table_names_what_does_not_hold(tmp_path):
    for name, holds in (("a/good", [True, True]), ("b/bad", [True, False, None])):
        folder = tmp_path / name / "small"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result(name, holds)))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- verdicts:begin -->\nstale\n<!-- verdicts:end -->\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "verdicts.py"), str(tmp_path), "--write", str(page)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    text = page.read_text()
    assert "| `a/good` | holds | 2 of 2 | 1.5 |" in text
    assert "| `b/bad` | does not hold | 1 of 3 | 1.5 |" in text
    assert "| all |  | 3 of 5 | 3 |" in text
    assert "- `b/bad`, does not hold: claim 1. Measured: 1.5." in text
    assert "- `b/bad`, not decided: claim 2. Measured: 2.5." in text
    assert "stale" not in text
