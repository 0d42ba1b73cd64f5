"""The two examples that train with and without abyssal, at their quick settings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"finetune_language_model": ("transformers", "peft"), "convnext_digits": ("timm", "sklearn")}
WAYS = ["plain PyTorch", "gradient checkpointing", "abyssal"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NEEDS)
def example(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
    """An example's module, its runs, and what its `show` is given."""
    for needed in NEEDS[request.param]:
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        module = importlib.import_module(request.param)
        found = module.study(module.QUICK)
    shown = found if isinstance(found, tuple) else (found,)
    return module, shown[-1], shown


def test_checkpointing_changes_no_loss_and_abyssal_hardly_any(example: Any) -> None:
    _, runs, _ = example
    plain, checkpointed, ours = (runs[way].losses for way in WAYS)
    assert checkpointed == plain
    # A gradient that is wrong by g moves the loss by g of what was gained, to first order; ten times for growth.
    gained = max(plain) - min(plain)
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) <= 10 * 1e-2 * gained


def test_the_peak_is_below_checkpointings(example: Any) -> None:
    module, runs, _ = example
    plain, checkpointed, ours = (runs[way].peak for way in WAYS)
    assert checkpointed < 0.6 * plain
    # At the peak one block runs again, with what its kernels need, either way. What is no longer stored for the stream
    # is missing there; half of it leaves room for the states that restoring holds meanwhile, and for the other stages.
    kept, stored = module.kept_inputs(module.QUICK), runs["abyssal"].certificate.stored_bytes
    assert stored < kept / 2 and ours < checkpointed - (kept - stored) / 2


def test_nothing_drifted(example: Any) -> None:
    _, runs, _ = example
    assert not runs["abyssal"].certificate.drifted
    assert runs["plain PyTorch"].certificate is None


def test_it_prints_within_a_hundred_columns(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, shown = example
    module.show(module.QUICK, *shown)
    out = capsys.readouterr().out
    assert all(way in out for way in WAYS)
    assert max(len(line) for line in out.splitlines()) <= 100


def test_ci_chooses_the_quick_settings(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, shown = example
    monkeypatch.setenv("CI", "true")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.reload(module)
    chosen: list[Any] = []
    monkeypatch.setattr(module, "study", lambda settings: chosen.append(settings) or shown[-1])
    monkeypatch.setattr(module, "show", lambda *_: None)
    app = typer.Typer()
    app.command()(module.main)
    CliRunner().invoke(app, [], catch_exceptions=False)
    CliRunner().invoke(app, ["--full"], catch_exceptions=False)
    assert chosen == [module.QUICK, module.Settings()]
