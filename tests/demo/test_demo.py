"""The demo at its quick settings: what it claims is what it measured, and what it writes can be read."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from abyssal import __version__
from abyssal.cli.app import app
from abyssal.demo import run as demo_module
from abyssal.demo.methods import METHODS, slope
from abyssal.demo.page import build_page, conclusion, save, terminal_table
from abyssal.demo.run import DemoResult, DemoSettings, run_demo

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn")

runner = CliRunner()


@pytest.fixture(scope="module")
def events() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module", params=[pytest.param("quick", marks=pytest.mark.slow)])
def result(events: list[tuple[str, int, int]]) -> DemoResult:
    # The heap is this whole test process's, and other tests read its size.
    return run_demo(DemoSettings.quick().changed(keep_heap=False), lambda *event: events.append(event[:3]))


@pytest.mark.slow
def test_the_network_learns(result: DemoResult) -> None:
    assert all(method.accuracy > 0.9 for method in result.methods)
    assert result.movement > 0.1  # by its residual blocks, not by stem and head alone


def test_checkpointing_trains_exactly_as_plain_backprop(result: DemoResult) -> None:
    assert result["checkpoint"].losses == result["plain"].losses
    assert result["checkpoint"].gradient_error == 0


def test_reconstruction_trains_as_plain_backprop_up_to_its_gradient_error(result: DemoResult) -> None:
    plain, ours = result["plain"].losses, result["reconstruct"].losses
    # To first order, a relative error e of each step's update changes what the step does to the loss by e of
    # it; Adam divides one disturbed average by the root of another, which makes 2e. Summed over the steps:
    total_variation = sum(abs(b - a) for a, b in pairwise(plain))
    tolerance = 2 * result["reconstruct"].gradient_error * total_variation
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) <= tolerance


def test_gradient_error_and_certificate_are_small_and_not_zero(result: DemoResult) -> None:
    assert 0 < result["reconstruct"].gradient_error < 1e-2
    assert result.state_error is not None
    assert 0 < result.state_error < 1e-2
    assert 0 < result.float32_error < 1e-5


def test_reconstruction_needs_least_memory_and_does_not_grow_with_depth(result: DemoResult) -> None:
    peaks = result.memory.peak_bytes
    for plain, kept, ours in zip(*(peaks[method.key] for method in METHODS), strict=True):
        assert ours < kept < plain
    one_stream = result.settings.batch * result.settings.width * 4
    blocks = result.memory.depths[-1] - result.memory.depths[0]
    # Checkpointing keeps a stream tensor for every block more. Reconstruction keeps a sample, 64 elements of these
    # 4,096 with weights of 2 bytes: 1/43; and compares 32 blocks' samples at a time, some five copies of each.
    assert peaks["checkpoint"][-1] - peaks["checkpoint"][0] >= blocks * one_stream
    assert peaks["reconstruct"][-1] - peaks["reconstruct"][0] <= blocks * one_stream / 12


def test_gradient_error_falls_with_depth_as_theory_says(result: DemoResult) -> None:
    slopes = result.errors.slopes
    assert slopes["Reverse(0)"] <= -0.9
    assert slopes["Reverse(1)"] <= -1.9
    assert slopes["Reverse(1)"] < slopes["PaperAdjoint()"] < slopes["Reverse(0)"]
    assert result.errors.errors["Reverse(1)"][-1] < result.errors.errors["PaperAdjoint()"][-1]


def test_slope_of_an_exact_power() -> None:
    depths = (8, 16, 32, 64)
    assert slope(depths, [3.0 * n**-1.5 for n in depths]) == pytest.approx(-1.5, abs=1e-12)


def test_progress_reaches_the_end_of_every_phase(result: DemoResult, events: list[tuple[str, int, int]]) -> None:
    last = {phase: (done, total) for phase, done, total in events}
    assert len(last) == 4
    assert all(done == total for done, total in last.values())
    assert result.seconds > 0


@pytest.mark.slow
def test_the_global_state_is_left_alone() -> None:
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    run_demo(
        DemoSettings(
            depth=2,
            width=8,
            batch=64,
            epochs=1,
            memory_depths=(2, 3),
            error_depths=(2, 3),
            keep_heap=False,
        )
    )
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [{"depth": 1}, {"batch": -1}, {"memory_depths": (8,)}, {"error_depths": (8, 4)}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DemoSettings(**wrong)  # type: ignore[arg-type]


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="1500 images"):
        run_demo(DemoSettings(batch=1500))


# ---------------------------------------------------------------------- what people and programs get


def test_results_are_plain_json_with_machine_versions_and_date(result: DemoResult, tmp_path: Path) -> None:
    page = save(result, tmp_path / "new" / "folder")
    found = json.loads((page.parent / "results.json").read_text())
    assert found["schema"] == 1
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert found["environment"]["date"].startswith("20")
    assert [method["key"] for method in found["methods"]] == ["plain", "checkpoint", "reconstruct"]
    for method in found["methods"]:
        assert len(method["losses"]) == len(result["plain"].losses)
        low, high = method["step_ratio_quartiles"]
        assert low <= method["step_ratio"] <= high
        assert method["peak_bytes"] > 0
    assert found["memory"]["depths"] == list(result.memory.depths)
    assert found["errors"]["slopes"] == result.errors.slopes


def test_the_page_shows_what_was_measured(result: DemoResult) -> None:
    page = build_page(result)
    table = next(section.table for section in page.sections if section.table is not None)
    assert [row[0] for row in table.rows] == [method.label for method in METHODS]
    figures = [section.figure for section in page.sections if section.figure is not None]
    assert len(figures) == 3
    errors = next(figure.svg for figure in figures if "slope" in figure.svg)
    assert f"slope {result.errors.slopes['Reverse(1)']:.2f}".replace("-", "−") in errors


def test_the_terminal_table_fits_eighty_columns(result: DemoResult) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(result))
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any("reconstruction" in line and "MB" in line for line in lines)
    assert "less activation memory than plain backprop" in conclusion(result)


# ---------------------------------------------------------------------- the command line


def test_version_and_help() -> None:
    assert runner.invoke(app, ["--version"]).output.strip() == f"abyssal {__version__}"
    general = runner.invoke(app, ["--help"], env={"COLUMNS": "100"})
    assert general.exit_code == 0
    assert "demo" in general.output
    assert "--quick" in runner.invoke(app, ["demo", "--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output


@pytest.mark.slow
def test_demo_without_a_terminal_writes_lines_a_table_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "keep_heap", lambda: False)
    out = tmp_path / "page"
    arguments = ["demo", "--quick", "--depth", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["abyssal", *arguments])
    done = runner.invoke(app, arguments, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "Training three ways: 66/66" in done.output
    assert "8 residual blocks" in done.output
    assert "The certificate warned" in done.output  # eight blocks are too few
    assert str(out / "index.html") in done.output
    assert "abyssal demo --quick --depth 8" in (out / "index.html").read_text()


@pytest.mark.parametrize("arguments", [["--depth", "1"], ["--depth", "many"], ["--seed", "-1"], ["--sideways"]])
def test_bad_options_end_with_code_2_and_name_the_option(arguments: list[str]) -> None:
    done = runner.invoke(app, ["demo", *arguments], env={"COLUMNS": "100"})
    assert done.exit_code == 2
    assert arguments[0] in done.output
    assert "Traceback" not in done.output


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    done = runner.invoke(app, ["demo", "--out", str(occupied)])
    assert done.exit_code == 2
    assert "cannot write there" in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_missing_scikit_learn_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    done = runner.invoke(app, ["demo", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert 'pip install "abyssal[demo]"' in done.output
    assert len(done.output.strip().splitlines()) == 1
