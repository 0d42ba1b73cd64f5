"""benchmarks/limits.py runs, and its figures are those that its tables promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_limits_benchmark_writes_its_section(tmp_path):
    pytest.importorskip("torchdiffeq")
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "limits.py"), "--quick", "--json", str(results)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, "--write", str(page)], env=environment, check=True, stdout=subprocess.DEVNULL)

    assert page.read_text().count("<!-- limits:begin -->") == 1
    found = json.loads(results.read_text())
    for row in found["law"]:
        assert abs(row["mean"] - row["limit"][0]) < 4 * row["mean_error"]
        assert abs(row["variance"] - row["limit"][1]) < 4 * row["variance_error"]
    assert all(row["interval"][0] < row["promised"] for row in found["bounds"])
    assert all(row["largest ratio"] <= 1 + 1e-6 for row in found["gaps"])
