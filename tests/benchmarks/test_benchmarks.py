"""The benchmark scripts run, and write only their own section of a page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *args: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.slow
def test_memory_benchmark_writes_its_section_and_shows_that_depth_is_free(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("before\n<!-- memory:begin -->\nold\n<!-- memory:end -->\nafter\n")
    args = ["--workload", "W1", "--depths", "8,32", "--methods", "plain,Reverse(1)", "--measure", "peak"]
    run("memory.py", *args, "--json", str(results), "--write", str(page))

    text = page.read_text()
    assert text.startswith("before\n<!-- memory:begin -->") and text.endswith("<!-- memory:end -->\nafter\n")
    assert "| W1 | N = 8 | N = 32 |" in text and "old" not in text
    peak = {key: cell["peak"] for key, cell in json.loads(results.read_text())["cells"].items()}
    assert peak["W1 32 plain"] > 3 * peak["W1 8 plain"]
    assert peak["W1 32 Reverse(1)"] < 1.1 * peak["W1 8 Reverse(1)"]


@pytest.mark.slow
def test_memory_benchmark_refuses_an_unknown_method():
    with pytest.raises(subprocess.CalledProcessError):
        run("memory.py", "--methods", "magic")


def test_a_section_is_added_once_and_then_replaced(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    page = tmp_path / "docs" / "page.md"
    report.write_section(page, "one", "first")
    report.write_section(page, "two", "other")
    report.write_section(page, "one", "second")
    text = page.read_text()
    assert text.count("<!-- one:begin -->") == 1
    assert "second" in text and "other" in text and "first" not in text
    page.write_text(text.replace("<!-- one:end -->", ""))
    with pytest.raises(SystemExit, match="do not pair up"):
        report.write_section(page, "one", "third")


def test_figures_are_saved_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    path = tmp_path / "results" / "figures.json"
    report.save({"a": 1}, path)
    with pytest.raises(TypeError):
        report.save({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]
    report.save({"a": 2}, Path(os.devnull))
    assert not Path(os.devnull).is_file()


def test_the_benchmark_of_a_gpu_runs_without_one():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--dtype", "float32"]
    small = ["--depth", "4", "--width", "64", "--tokens", "32", "--rounds", "1"]
    done = subprocess.run([*command, *small], check=True, capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.splitlines()[-6:]][:2] == ["plain", "checkpoint"]
