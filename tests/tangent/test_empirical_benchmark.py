"""benchmarks/tangent_kernel.py runs, and its two kernels are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_of_tangent_kernels_writes_its_section(tmp_path: Path):
    pytest.importorskip("transformers")
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "tangent_kernel.py"), "--quick", "--json", str(results)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, "--write", str(page)], env=environment, check=True, stdout=subprocess.DEVNULL)

    assert page.read_text().count("<!-- tangent-kernel:begin -->") == 1
    rows = json.loads(results.read_text())["rows"]
    assert set(rows) == {"mlp", "deep", "outputs", "conv", "conv trace", "gpt"}
    for key, row in rows.items():
        assert row["ours"] and (row["ours bytes"] is not None) == (key == "mlp")
        if row["theirs"]:
            assert row["difference"] < 1e-4, key  # both in float32
