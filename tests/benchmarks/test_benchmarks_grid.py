"""The benchmark of the batched grid runs, and the losses it compares are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_of_the_grid_writes_its_section_and_its_losses_agree(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("before\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "batched_grid.py"), "--quick", "--cells", "6", "--depth", "20"]
    command += ["--json", str(results), "--write", str(page)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    assert page.read_text().startswith("before\n") and "<!-- batched-grid:end -->" in page.read_text()
    found = json.loads(results.read_text())
    assert all(row["largest difference"] < 1e-4 and row["failed"] == 0 for row in found["agreement"])
    assert all(row["grid"] < row["autograd"] for row in found["memory"])
    assert all(row["cpu"]["ratio"] > 0 for row in found["speed"])
