"""Figures 1 to 7: judged rightly on made-up rows, measured and drawn at the tiny size."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest

from abyssal.limits import sde
from abyssal.papers.experiment import Work
from abyssal.papers.experiments.marion2022.init import EXPERIMENT, FIGURES, PANELS
from abyssal.scaling import phase_diagram

SETTINGS = replace(EXPERIMENT.sizes["tiny"], models=20, histogram=400, map_models=4)


def made_up(power=lambda beta, critical: critical - beta, shift=0.0, border=lambda hurst: max(0.5, hurst), noise=0.02):
    """Rows of a world in which metrics are exact powers of depth, and the border is where it is told to be."""
    draw = np.random.default_rng(0)
    depth = SETTINGS.depths[-1]
    rows = [
        {
            "part": "depth", "weights": weights, "depth": n, "hurst": None, "beta": beta, "model": model,
            **{m: power(beta, betas[1]) * math.log10(n) + noise * draw.normal() for m in ("hidden", "gradient")},
        }
        for weights, betas in PANELS.items() for n in SETTINGS.depths for beta in betas for model in range(20)
    ]  # fmt: skip
    mean, variance = sde("res3", 100).law_at_depth(depth)
    rows += [
        {
            "part": "histogram", "weights": "iid", "depth": depth, "hurst": None, "beta": 0.5, "model": model,
            **{
                m: draw.normal(mean + shift, math.sqrt(variance)) / (2 * math.log(10)) for m in ("hidden", "gradient")
            },
        }
        for model in range(400)
    ]  # fmt: skip
    rows += [
        {
            "part": "map", "weights": "fbm", "depth": depth, "hurst": hurst, "beta": beta, "model": model,
            **{m: 2 * (border(hurst) - beta) + noise * draw.normal() for m in ("hidden", "gradient")},
        }
        for hurst in SETTINGS.hursts for beta in SETTINGS.betas for model in range(4)
    ]  # fmt: skip
    return rows


def answers(rows):
    return [finding.holds for finding in EXPERIMENT.check(rows, SETTINGS)]


def test_a_world_as_the_paper_says_shows_all_seven_figures():
    assert answers(made_up()) == [True] * 7


@pytest.mark.parametrize(
    ("world", "figures"),
    [
        ({"power": lambda beta, critical: 0.0}, {1, 3, 4, 5}),  # nothing depends on depth
        ({"power": lambda beta, critical: critical + 0.3 - beta}, {1, 3, 4, 5}),  # the critical beta is another
        ({"shift": 0.1}, {2}),  # ten standard errors off
        ({"border": lambda hurst: 0.5}, {6, 7}),  # regularity does not matter
        ({"border": lambda hurst: 0.2 + hurst}, {6, 7}),  # it does so for rough weights as well
    ],
)
def test_a_world_in_which_a_figure_is_wrong_fails_it_and_no_other(world, figures):
    found = answers(made_up(**world))
    assert {i for i, answer in enumerate(found, start=1) if answer is not True} == figures
    if "border" not in world:
        assert {i for i, answer in enumerate(found, start=1) if answer is False} == figures


def test_too_much_noise_leaves_it_open():
    assert set(answers(made_up(noise=2.0))) - {True} == {None}


@pytest.mark.slow
def test_the_tiny_size_measures_what_phase_diagrams_do_and_is_drawn():
    settings = replace(EXPERIMENT.sizes["tiny"], depths=(10, 20), models=3, histogram=10, map_models=2)
    work = Work()
    rows = EXPERIMENT.run(settings, work)
    assert work.seconds > 0
    assert len(rows) == 2 * 2 * 3 * 3 + 10 + 3 * 6 * 2
    direct = phase_diagram(
        "res3", "fbm", 20, betas=settings.betas, hursts=settings.hursts, models=2, engine="sequential"
    )
    of_map = [row for row in rows if row["part"] == "map"]
    for j, hurst in enumerate(settings.hursts):
        for i, beta in enumerate(settings.betas):
            cells = [row["hidden"] for row in of_map if (row["hurst"], row["beta"]) == (hurst, beta)]
            assert np.mean(cells) == pytest.approx(direct.hidden[i, j], abs=1e-12)
    assert len(EXPERIMENT.check(rows, settings)) == 7
    figure = EXPERIMENT.plot(rows, settings)
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    assert len(FIGURES) == 6
