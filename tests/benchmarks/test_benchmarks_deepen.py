"""The benchmark of deepened networks runs, and writes its own section of a page."""

from __future__ import annotations

import pytest
from test_benchmarks import run


@pytest.mark.slow
def test_the_benchmark_of_deepening_writes_its_section(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- deepen-x2:begin -->\nold\n<!-- deepen-x2:end -->\nafter\n")
    run("deepen.py", "--quick", "--only", "convnext", "--steps", "1", "--write", str(page))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| convnext | copied | 4 to 8 |" in text
