"""Accuracy over scale and regularity: what runs, and what the verdicts make of tables."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from abyssal.papers.experiment import Row, Work
from abyssal.papers.experiments.marion2022.accuracy import EXPERIMENT, Settings, borders
from abyssal.papers.shared.grids import draw, images, travel
from abyssal.weights.families import FractionalNoise

BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
HURSTS = (0.1, 0.5, 0.9)
MADE_UP = Settings("digits", None, 1000, 30, BETAS, HURSTS, rates=(0.001, 0.01))


def table(trains_from: tuple[float, ...], explodes_below: tuple[float, ...]) -> list[Row]:
    """A table whose borders are known, for each Hurst index: where training begins to work, where states calm down."""
    return [
        {
            "hurst": hurst,
            "beta": beta,
            "rate": rate,
            "seed": 0,
            "accuracy": (0.9 if rate == 0.01 else 0.5) if beta > trains else None,
            "loss": 0.1,
            "failed_at_step": None if beta > trains else 1,
            "moved": -1.0 if beta > calm else 3.0,
        }
        for hurst, trains, calm in zip(HURSTS, trains_from, explodes_below, strict=True)
        for beta in BETAS
        for rate in MADE_UP.rates
    ]


def holds(rows: list[Row]) -> list[bool | None]:
    return [finding.holds for finding in EXPERIMENT.check(rows, MADE_UP)]


def test_a_border_that_rises_with_regularity_and_is_that_of_the_initialisation_holds() -> None:
    rows = table((0.2, 0.4, 0.6), (0.2, 0.4, 0.6))
    assert holds(rows) == [True, True, True]
    trained, calm = borders(rows, MADE_UP)
    # Chance is 0.1 where nothing trains, so half of the gain is half way; calm is half way between 3 and -1.
    assert trained.tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert calm.tolist() == pytest.approx([0.2, 0.4, 0.6])


def test_a_border_that_falls_does_not_hold() -> None:
    assert holds(table((0.6, 0.4, 0.2), (0.6, 0.4, 0.2)))[1] is False


def test_a_border_that_hardly_moves_is_not_decided() -> None:
    assert holds(table((0.2, 0.2, 0.4), (0.2, 0.2, 0.4)))[1] is None


def test_borders_far_from_each_other_do_not_hold() -> None:
    assert holds(table((0.6, 0.6, 0.8), (0.2, 0.2, 0.2)))[2] is False


def test_explosions_that_train_better_do_not_hold() -> None:
    rows = table((0.2, 0.4, 0.6), (0.2, 0.4, 0.6))
    for row in rows:
        row["moved"] = -2 * float(row["moved"] or 0)
    assert holds(rows)[0] is False


def test_states_travel_as_a_plain_loop_in_float64_says_and_beyond_its_range() -> None:
    weights = draw(FractionalNoise(0.9), 200, 12, 64, 10, seed=0)
    stem, outer = weights["stem"][0].double(), weights["outer"][0].double()
    x = images("digits", 32).x.double()
    for beta in (0.1, 0.4, 1.0):
        h = start = stem @ x.T
        for layer in outer:
            h = h + 200.0**-beta * layer @ h.relu()
        expected = ((h - start).norm(dim=0) / start.norm(dim=0)).log10().mean().item()
        found = travel(stem.float(), outer.float(), torch.tensor([200.0**-beta]), x.float()).item()
        assert found == pytest.approx(expected, abs=1e-3)
    assert travel(stem.float(), outer.float() * 30, torch.tensor([1.0]), x.float()).item() > 100  # beyond float32


@pytest.mark.slow
def test_the_tiny_size_runs_and_fills_its_table() -> None:
    settings = EXPERIMENT.sizes["tiny"]
    rows = EXPERIMENT.run(settings, Work(EXPERIMENT.name))
    assert len(rows) == len(settings.hursts) * len(settings.betas) * len(settings.rates)
    assert all(row["accuracy"] is None or 0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert math.isfinite(max(float(row["moved"] or 0) for row in rows))
    assert len(EXPERIMENT.check(rows, settings)) == 3
    assert len(EXPERIMENT.plot(rows, settings).axes) == 4
    again = EXPERIMENT.run(dataclasses.replace(settings, cells_at_once=2, segment=7), Work(EXPERIMENT.name))
    calm = [(row, other) for row, other in zip(rows, again, strict=True) if float(row["moved"] or 0) < 1]
    assert len(calm) >= 4
    for row, other in calm:  # blocks and segments are a matter of speed alone, but where training is chaotic
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
