"""The benchmarks of tangent kernels run with --quick, and what they compare is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def quick(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Run a benchmark with --quick on one thread; return its page and its figures."""
    page, results = folder / "page.md", folder / "results.json"
    page.write_text("before\n")
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    written = ["--json", str(results), "--write", str(page)]
    subprocess.run([*command, *written], env=environment, check=True, stdout=subprocess.DEVNULL)
    text = page.read_text()
    marker = name.replace("_", "-")
    assert text.startswith("before\n") and text.endswith(f"<!-- {marker}:end -->\n")
    return text, json.loads(results.read_text())


@pytest.mark.slow
def test_the_benchmark_of_the_hierarchy_finds_its_three_ways_to_the_fourth_kernel_equal(tmp_path: Path) -> None:
    text, found = quick("hierarchy", tmp_path)
    assert len(found["k4"]) == 3 and all(row["off"] < 1e-12 for row in found["k4"])  # float64
    assert {row["order"] for row in found["truncation"]} == {2, 3, 4}
    for width in (8, 16):  # a higher order is nearer at t = 1, for every network
        errors = [r["errors"] for r in found["truncation"] if (r["width"], r["time"]) == (width, 1.0)]
        assert all(list(each) == sorted(each, reverse=True) for each in zip(*errors, strict=True))
    assert "| K4, n = 10, m = 16 | 2GiB |" in text


@pytest.mark.slow
def test_the_benchmark_of_kernel_operators_finds_the_eigenvalues_of_the_formed_kernel(tmp_path: Path) -> None:
    text, found = quick("kernel_operator", tmp_path)
    (row,) = found["rows"]
    assert row["rows"] == 64 and row["agreement"] < 1e-5  # float32
    assert found["drift"]["step"] > 0 and "probe set of 32" in text


@pytest.mark.slow
def test_the_benchmark_of_analytic_kernels_finds_them_accurate(tmp_path: Path) -> None:
    text, found = quick("analytic_kernels", tmp_path)
    assert {row["activation"] for row in found["accuracy"]} == {"relu", "erf", "tanh"}
    assert all(max(row["errors"].values()) < 1e-10 for row in found["accuracy"])  # relative; the library's target
    assert "### Time at depth 64" in text


@pytest.mark.slow
def test_the_benchmark_of_tangent_kernels_finds_those_of_whole_jacobians(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = quick("tangent_kernel", tmp_path)[1]["rows"]
    assert set(rows) == {"mlp", "deep", "outputs", "conv", "conv trace", "gpt"}
    for key, row in rows.items():
        assert row["ours"] and (row["ours bytes"] is not None) == (key == "mlp")
        if row["theirs"]:
            assert row["difference"] < 1e-4, key  # both in float32
