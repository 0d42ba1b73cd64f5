"""The experiments of Sander, Ablin, Peyré (2022) on theory: they run, and their verdicts can go either way."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.papers.experiment import Work
from abyssal.papers.experiments.sander2022 import gradient_error as sander2022_gradient_error
from abyssal.papers.experiments.sander2022 import linear as sander2022_linear
from abyssal.papers.experiments.sander2022 import ode_gap as sander2022_ode_gap
from abyssal.papers.experiments.sander2022.linear import descend


def holds(experiment, rows):
    return [finding.holds for finding in experiment.check(rows, experiment.sizes["tiny"])]


# ---------------------------------------------------------------------- linear


def test_linear_networks_gradient_is_the_losses_gradient():
    """One step, from a rough start, against finite differences of the loss that the cell itself reports."""
    cell = {"depth": 3, "width": 2, "seed": 1, "start": "rough", "rate": 1e-4, "steps": 1}
    found = descend(cell)
    # A step of size r along -N grad takes N r |grad|^2 off the loss, to first order.
    taken = found["loss"][0] - found["loss"][1]
    half = descend(cell | {"rate": 5e-5})
    again = half["loss"][0] - half["loss"][1]
    assert taken > 0
    # First order: half the step, half the change; the gradient would have to be wrong in its norm to fail the next.
    assert again / taken == pytest.approx(0.5, rel=1e-3)
    assert taken == pytest.approx(_squared_gradient(cell) * cell["depth"] * cell["rate"], rel=1e-2)


def _squared_gradient(cell):
    """|grad L|^2 at the start, by autograd."""
    import math

    import torch

    random = np.random.default_rng([cell["seed"], 0])
    width, depth = cell["width"], cell["depth"]
    target = torch.linalg.matrix_exp(torch.from_numpy(0.5 * random.standard_normal((width, width)) / math.sqrt(width)))
    own = np.random.default_rng([cell["seed"], depth])
    weights = torch.from_numpy(own.standard_normal((depth, width, width)) / math.sqrt(width)).requires_grad_()
    product = torch.eye(width, dtype=torch.float64)
    for matrix in weights:
        product = (torch.eye(width, dtype=torch.float64) + matrix / depth) @ product
    (gradient,) = torch.autograd.grad(0.5 * (product - target).square().sum(), weights)
    return gradient.square().sum().item()


def test_linear_holds_at_the_tiny_size():
    experiment = sander2022_linear.EXPERIMENT
    rows = experiment.run(experiment.sizes["tiny"], Work())
    assert holds(experiment, rows) == [True] * 4
    assert experiment.plot(rows, experiment.sizes["tiny"]).axes


def test_linear_does_not_hold_where_jumps_grow_with_depth():
    experiment = sander2022_linear.EXPERIMENT
    rows = experiment.run(experiment.sizes["tiny"], Work())
    for row in rows:
        row["jump_largest"] = float(row["depth"])
        row["from_double_depth"] = 1.0 if row["from_double_depth"] is not None else None
    assert holds(experiment, rows) == [True, False, False, True]


# ---------------------------------------------------------------------- ode-gap


@pytest.fixture(scope="module", params=[pytest.param("tiny", marks=pytest.mark.slow)])
def gaps():
    pytest.importorskip("torchdiffeq")
    experiment = sander2022_ode_gap.EXPERIMENT
    return experiment.run(experiment.sizes["tiny"], Work())


@pytest.mark.slow
def test_ode_gap_finds_no_bound_broken_and_tells_smooth_from_rough(gaps):
    experiment = sander2022_ode_gap.EXPERIMENT
    broken, smooth, _, _, rough = holds(experiment, gaps)
    assert (broken, smooth, rough) == (True, True, True)
    assert experiment.plot(gaps, experiment.sizes["tiny"]).axes


def test_ode_gap_does_not_hold_where_a_bound_is_broken_or_rough_weights_go_as_smooth_ones(gaps):
    made_up = [dict(row, margin=-1e-3, distance=1 / float(row["depth"])) for row in gaps]
    found = holds(sander2022_ode_gap.EXPERIMENT, made_up)
    assert found[0] is False
    assert found[-1] is False


# ---------------------------------------------------------------------- gradient-error


def errors(power_of):
    """Rows with exact powers of the depth."""
    return [
        {"scheme": s, "policy": p, "depth": n, "seed": seed, "error": n ** power_of(expected), "accuracy": 0.95}
        for s, p, expected, _ in sander2022_gradient_error.CURVES
        for n in sander2022_gradient_error.EXPERIMENT.sizes["tiny"].depths
        for seed in range(2)
    ]


def test_gradient_error_holds_where_errors_have_the_orders_and_not_where_they_are_flat():
    experiment = sander2022_gradient_error.EXPERIMENT
    assert holds(experiment, errors(lambda expected: expected)) == [True] * 8
    flat = holds(experiment, errors(lambda _: 0))
    assert flat == [True, *[False] * 7]


@pytest.mark.slow
def test_gradient_error_measures_every_policy_of_trained_networks():
    experiment = sander2022_gradient_error.EXPERIMENT
    pytest.importorskip("sklearn")
    settings = experiment.sizes["tiny"]
    rows = experiment.run(settings, Work())
    assert len(rows) == len(settings.depths) * settings.seeds * len(sander2022_gradient_error.CURVES)
    by_policy = {
        p: [r["error"] for r in rows if r["policy"] == p and r["depth"] == 32] for *_, p in [("", "Reverse(1)")]
    }
    paper = [
        r["error"] for r in rows if r["policy"] == "PaperAdjoint()" and r["depth"] == 32 and r["scheme"] == "Euler"
    ]
    ours = [r["error"] for r in rows if r["policy"] == "Reverse(1)" and r["depth"] == 32 and r["scheme"] == "Euler"]
    assert all(0 < o < p < 0.1 for o, p in zip(ours, paper, strict=True)), by_policy
    assert experiment.plot(rows, settings).axes
