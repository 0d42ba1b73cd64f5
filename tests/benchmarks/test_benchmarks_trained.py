"""The benchmarks on trained networks run, resume, and compute what they say they do."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """The folder of the scripts on the path, and a cache of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(script: str, *args: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_a_trained_network_has_learnt_and_is_trained_only_once(benchmarks, monkeypatch):
    import trained

    first = trained.load("resnet", quick=True)
    assert first.record["last"] < 0.9 * first.record["first"]
    monkeypatch.setattr(trained, "train", lambda *_: pytest.fail("trained again"))
    again = trained.load("resnet", quick=True)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_a_file_that_was_only_partly_written_is_not_read(benchmarks, monkeypatch):
    import trained

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trained.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            trained.load("resnet", quick=True)
    assert list(trained.cache_folder().iterdir()) == []
    assert trained.load("resnet", quick=True).record["first"] > 0


def test_another_setting_has_another_place_in_the_cache(benchmarks):
    from dataclasses import replace

    import trained

    recipe = trained.recipe("gpt")
    keys = {recipe.key(0), recipe.key(1), replace(recipe, steps=501).key(0), replace(recipe, rate=1e-4).key(0)}
    assert len(keys) == 4


def test_held_out_batches_are_the_same_each_time_and_none_of_the_training_set(benchmarks):
    import trained

    held_out, labels = trained.digits(held_out=True)
    training, _ = trained.digits(held_out=False)
    assert len(labels) + len(training) == 1797
    assert not (held_out[:, None].flatten(2) == training[None].flatten(2)).all(-1).any()
    first, again = (trained.digit_batch(trained.HELD_OUT, True, 8) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("kind, bound", [("bf16", 2.0**-8), ("int8", 0.5 / 255 + 1e-6)])
def test_stashes_round_to_at_most_half_a_step(benchmarks, kind, bound):
    from trained_policies import Stash

    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    stash = Stash(kind)
    restored = stash.restore(x, stash.release(x, x), None)
    # bf16's step is relative to the element; int8's is a 255th of its group's range, which is below x's range.
    unit = x.abs() if kind == "bf16" else x.max() - x.min()
    assert ((restored - x).abs() <= bound * unit).all()
    assert not torch.equal(restored, x)


def test_the_interval_of_paired_seeds_is_students(benchmarks):
    import train_to_loss

    values = [0.1, 0.3, 0.2]
    mean, low, high = train_to_loss.mean_and_interval(values)
    half = 4.302653 * statistics.stdev(values) / 3**0.5  # t at 97.5 %, two degrees of freedom, from a table
    assert mean == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.2 - half, abs=1e-6), pytest.approx(0.2 + half, abs=1e-6))


def test_the_bootstrap_of_equal_differences_has_no_width_and_else_covers_the_mean(benchmarks):
    import train_to_loss

    assert train_to_loss.block_bootstrap(np.full((3, 100), 0.25)) == (0.25, 0.25)
    noise = np.random.default_rng(1).normal(1.0, 0.1, (3, 100))
    low, high = train_to_loss.block_bootstrap(noise)
    assert low < noise.mean() < high


@pytest.mark.slow
def test_reconstruct_trained_finds_exact_and_inexact_policies_and_draws_them(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    args = ["--quick", "--network", "resnet", "--measure", "error,bytes", "--only", "Keep();stash;Reverse(1)"]
    run("reconstruct_trained.py", *args, "--json", str(results), "--write", str(page))
    cells = json.loads(results.read_text())["networks"]["resnet"]["cells"]
    assert max(cells["Keep()"]["error"]) == 0
    assert 0 < max(cells["bf16 stash"]["error"]) < max(cells["int8 stash"]["error"])
    stored = {name: cell["bytes"]["float32"] for name, cell in cells.items()}
    assert stored["Keep()"]["stored"] >= stored["Keep()"]["checkpointing"] > stored["bf16 stash"]["stored"]
    assert "| bf16 stash |" in page.read_text()
    assert (tmp_path / "images" / "trained-resnet.png").stat().st_size > 10_000


@pytest.mark.slow
def test_training_to_loss_resumes_and_exact_gradients_give_no_difference(tmp_path):
    results = tmp_path / "runs.jsonl"
    args = ["--quick", "--only", "scratch,Keep()", "--seeds", "1", "--json", str(results)]
    first = run("train_to_loss.py", *args)
    lines = results.read_text()
    results.write_text(lines + lines[:40])  # cut off in the middle of a run
    assert run("train_to_loss.py", *args) == first
    assert results.read_text().startswith(lines)


@pytest.mark.slow
def test_pareto_measures_mixtures_beside_their_rivals(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    args = ["--quick", "--workload", "W1", "--ours", "mixtures", "--json", str(results), "--write", str(page)]
    run("pareto.py", *args)
    cells = json.loads(results.read_text())["cases"]["W1 8"]["cells"]
    assert cells["Reverse(0) + 0 Store()"]["peak"] < cells["checkpoint"]["peak"] < cells["plain"]["peak"]
    assert cells["Reverse(0) + 7 Store()"]["error"] == 0
    assert (tmp_path / "images" / "pareto.png").exists() and "| rival, at its own memory |" in page.read_text()
