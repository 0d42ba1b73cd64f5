"""Each example runs at its quick settings, and what it says holds."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture(scope="module")
def failing():
    """The module `where_reverse_fails` and what it finds at its quick settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        module = importlib.import_module("where_reverse_fails")
        return module, module.study(module.QUICK)


def test_every_example_is_told_of_and_tested():
    listed = (EXAMPLES / "README.md").read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = {"any_model", "papers_network", "where_reverse_fails", "marion2022", "li2020"}
    tested |= {"finetune_language_model", "convnext_digits"}  # in test_examples_training.py
    assert names == tested
    assert all(f"`{name}.py`" in listed for name in names)


def test_papers_network_falls_with_the_orders_of_its_schemes(load, capsys):
    errors = load("papers_network").main()
    final = {(str(scheme), str(policy)): row[-1] for (scheme, policy), row in errors.items()}
    # N = 32 to 128: a power of -p divides by 4^p; 0.8 p leaves room for depths this small.
    for (scheme, policy), row in errors.items():
        order = {"PaperAdjoint()": 1, "Reverse(0)": 1, "Reverse(1)": 2, "Reverse(2)": 3}[str(policy)]
        if str(scheme) == "Heun()" and str(policy) != "Reverse(0)":
            order += 2
        assert row[-2] / row[-1] > 4 ** (0.8 * order), (scheme, policy)
    assert final["Heun()", "Reverse(1)"] < final["Heun()", "PaperAdjoint()"] < final["Euler()", "PaperAdjoint()"]
    assert "Gradient error" in capsys.readouterr().out


@pytest.mark.slow
def test_any_model_learns_the_same_in_less_memory(load, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    plain, ours, plain_peak, our_peak, certificate = load("any_model").main()
    assert ours == pytest.approx(plain, rel=1e-3) and plain[-1] < 0.7 * plain[0]
    assert our_peak < 0.6 * plain_peak
    assert not certificate.drifted and len(certificate.blocks) == 18 and certificate.chains == 4
    assert "peak of one step's activations" in capsys.readouterr().out


@pytest.mark.slow
class TestWhereReverseFails:
    def test_reversing_all_layers_of_the_trained_network_is_useless_and_more_refinements_do_not_help(self, failing):
        _, found = failing
        for policy in ("PaperAdjoint()", "Reverse(0)", "Reverse(1)", "Reverse(2)", "Reverse(3)"):
            assert found.after.errors[f"{policy} on all layers"].gradient_error > 0.1, policy

    def test_keeping_the_first_layers_repairs_it(self, failing):
        _, found = failing
        errors = {name: measured.gradient_error for name, measured in found.after.errors.items()}
        assert errors["Reverse(1), first layer kept"] < errors["Reverse(1) on all layers"] / 5
        assert errors["Reverse(1), first two kept"] < errors["Reverse(1), first layer kept"]
        assert errors["Keep() on all layers"] < 1e-6  # float32, the same operations in the same order

    def test_an_untrained_network_is_no_evidence(self, failing):
        _, found = failing
        everywhere = "Reverse(3) on all layers"
        assert found.before.errors[everywhere].gradient_error < 0.1 < found.after.errors[everywhere].gradient_error
        assert found.after.layers[0].size > 10 > 1 > found.before.layers[0].size

    def test_the_certificate_names_the_first_layer(self, failing):
        _, found = failing
        certificate = found.after.errors["Reverse(1) on all layers"].certificate
        worst = max(certificate.blocks, key=lambda block: block.error)
        assert worst.name == "layers.0" and worst.error > 1 and worst.name in certificate.drifted

    def test_a_certificate_within_tolerance_goes_with_gradients_as_good_as_bf16s(self, failing):
        _, found = failing
        within = [g for s, g in found.after.pairs if s <= 1e-2]
        assert within and max(within) < 3 * found.after.worst_bf16

    def test_on_drift_keep_keeps_the_first_layers_after_one_step(self, failing):
        _, found = failing
        warned, kept = (found.runs[f'Reverse(1), on_drift="{what}"'] for what in ("warn", "keep"))
        assert kept.kept["layers.0"] == 1 and not warned.kept
        assert kept.gradient_error < warned.gradient_error / 20
        assert "layers.0" in kept.warning and "layers.0" in warned.warning
        full = found.after.errors["Keep() on all layers"].stored_bytes
        assert warned.stored_bytes < kept.stored_bytes < 0.8 * full

    def test_it_prints_what_it_found(self, failing, capsys):
        module, found = failing
        module.show(found)
        out = capsys.readouterr().out
        assert "layers.0" in out and "another minibatch" in out and 'on_drift="keep": kept layers 0' in out

    def test_ci_chooses_the_quick_settings(self, load, monkeypatch):
        monkeypatch.setenv("CI", "true")
        module: ModuleType = importlib.reload(load("where_reverse_fails"))
        chosen = []
        monkeypatch.setattr(module, "study", lambda settings: chosen.append(settings))
        monkeypatch.setattr(module, "show", lambda found: None)
        import typer

        app = typer.Typer()
        app.command()(module.main)
        CliRunner().invoke(app, [], catch_exceptions=False)
        CliRunner().invoke(app, ["--full", "--steps", "5"], catch_exceptions=False)
        assert chosen[0] == module.QUICK and chosen[1] == module.Settings(steps=5)


@pytest.mark.slow
def test_marion2022_draws_every_figure_and_each_shows_what_the_paper_says(load, tmp_path, capsys):
    claims = load("marion2022").main("small", tmp_path)
    assert {figure for figure, *_ in claims} == {"1", "2", "3", "4", "5", "6", "7"}
    assert all(holds for *_, holds in claims), claims
    assert {path.name for path in tmp_path.glob("*.png")} == {
        *(f"figure{figure}.png" for figure in (1, 2, 3, 4, 5)),
        "figure6-7.png",
    }
    assert "NO" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four minutes of one core; a busy machine has less
def test_li2020_runs_all_six_experiments_and_the_claims_that_hold_do(load, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CI", "true")
    findings = load("li2020").main("small", tmp_path)
    assert set(findings) == set("abcdef")
    assert {path.name[0] for path in tmp_path.glob("*.png")} == set("abcdef")
    # Of 17; the intervals of CI's few seeds leave some undecided.
    assert [finding.holds for letter in "ade" for finding in findings[letter]].count(True) >= 12
    assert not any(finding.holds is False for letter in "adef" for finding in findings[letter])
    assert "not decided" in capsys.readouterr().out
