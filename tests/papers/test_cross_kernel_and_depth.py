"""Kernel drift over scale and regularity: what runs, and what the verdicts make of tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from abyssal.nn.grid.grid import ResidualGrid
from abyssal.nn.grid.updates import Sgd
from abyssal.papers.experiment import Row, Work
from abyssal.papers.experiments.cross.kernel_and_depth import EXPERIMENT, Settings, train_column

# Betas 0.1, ..., at which states travel 10^2, 10^0 and 10^-1.5.
MADE_UP = Settings(100, 30, (0.1, 0.5, 0.9), (0.2, 0.5, 0.7, 0.9), seeds=3)
WAYS = {0.1: 2.0, 0.5: 0.0, 0.9: -1.5}


def table(drifts: dict[float, float], regular: float = 1.0, noise: float = 0.02) -> list[Row]:
    """Drifts by beta; those of regular weights multiplied; seeds differ by a little."""
    return [
        {
            "hurst": hurst,
            "beta": beta,
            "seed": seed,
            "drift": drifts[beta] * (regular if hurst >= 0.7 else 1) * math.exp(noise * (seed - 1) * (1 + beta)),
            "alignment": 0.9,
            "loss_before": 1.0,
            "loss_after": 0.1,
            "kernel": 0.0,
            "moved": way,
        }
        for hurst in MADE_UP.hursts
        for beta, way in WAYS.items()
        for seed in range(3)
    ]


def holds(rows: list[Row]) -> list[bool | None]:
    return [finding.holds for finding in EXPERIMENT.check(rows, MADE_UP)]


def test_drift_that_grows_with_travel_and_roughness_holds() -> None:
    assert holds(table({0.1: 0.9, 0.5: 0.3, 0.9: 0.1}, regular=0.5)) == [True, True, True]


def test_drift_that_falls_does_not_hold() -> None:
    assert holds(table({0.1: 0.1, 0.5: 0.3, 0.9: 0.9}, regular=2.0)) == [False, False, False]


def test_differences_within_the_spread_of_seeds_are_not_decided() -> None:
    assert holds(table({0.1: 0.302, 0.5: 0.301, 0.9: 0.3}, noise=0.5))[:2] == [None, None]


def test_rows_of_seeds_that_count_from_elsewhere_are_judged_alike() -> None:
    rows = table({0.1: 0.9, 0.5: 0.3, 0.9: 0.1}, regular=0.5)
    moved = [{**row, "seed": int(row["seed"] or 0) + 1000} for row in rows]
    assert EXPERIMENT.check(moved, replace(MADE_UP, first_seed=1000)) == EXPERIMENT.check(rows, MADE_UP)


def test_where_all_kernels_overflow_nothing_is_decided() -> None:
    rows = table({0.1: 0.9, 0.5: 0.3, 0.9: 0.1})
    for row in rows:
        row["drift"] = None
    assert holds(rows) == [None, None, None]


def test_the_drift_is_that_of_jacobians_and_plain_gradient_descent() -> None:
    """One cell beside autograd: the kernel from full Jacobians, the steps from torch.optim."""
    from abyssal.papers.shared.grids import draw, images
    from abyssal.sweep import seed_of
    from abyssal.weights.families import FractionalNoise

    cell = {"depth": 20, "width": 8, "betas": (0.5,), "samples": 6, "steps": 4, "hurst": 0.7, "seed": 1}
    found = train_column(cell)
    data = images("digits", 6)
    x, y = data.x.double(), (data.y % 2 * 2 - 1).double()[:, None]
    weights = {key: t.double() for key, t in draw(FractionalNoise(0.7), 20, 8, 64, 1, seed_of({"seed": 1})).items()}
    model = ResidualGrid(**weights, scale=20**-0.5, learning_rate=0.0, update=Sgd(), loss="mse").module(0)

    def kernel() -> torch.Tensor:
        rows = [torch.autograd.grad(model(sample[None]).sum(), list(model.parameters())) for sample in x]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        return jacobian @ jacobian.T

    start = kernel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5 * 6 / (2 * torch.linalg.eigvalsh(start)[-1].item()))
    for _ in range(cell["steps"]):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    end, loss = kernel(), torch.nn.functional.mse_loss(model(x), y)
    assert found["drift"][0] == pytest.approx(((end - start).norm() / start.norm()).item(), rel=1e-8)
    assert found["alignment"][0] == pytest.approx(((end * start).sum() / end.norm() / start.norm()).item(), rel=1e-8)
    assert found["loss_after"][0] == pytest.approx(loss.item(), rel=1e-8)


@pytest.mark.slow
def test_the_tiny_size_runs_and_fills_its_table() -> None:
    settings = EXPERIMENT.sizes["tiny"]
    rows = EXPERIMENT.run(settings, Work(EXPERIMENT.name))
    assert len(rows) == len(settings.hursts) * len(settings.betas) * settings.seeds
    assert all(row["drift"] is not None and float(row["drift"]) > 0 for row in rows)
    assert len(EXPERIMENT.check(rows, settings)) == 3
    assert len(EXPERIMENT.plot(rows, settings).axes) == 3
