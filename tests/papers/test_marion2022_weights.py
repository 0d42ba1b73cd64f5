"""One weight against depth after training: what runs, and what the verdicts make of tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.papers.experiment import Row, Work
from abyssal.papers.experiments.marion2022.weights import CASES, EXPERIMENT

SETTINGS = EXPERIMENT.sizes["small"]


def table(**changes: float | str) -> list[Row]:
    """Weights that are after training as they were before, but for what is changed."""
    rows: list[Row] = []
    for name, hurst, beta in CASES:
        step, index = (0.01, 0.99) if name == "rbf" else (1.4, hurst or 0.5)
        for seed in range(2):
            row: Row = {"part": "network", "weights": name, "hurst": hurst, "beta": beta, "seed": seed}
            row |= {"accuracy": 0.9, "loss": 0.1, "size": 0.3}
            row |= {"step change": 0.01, "kind change": "path", "H change": 0.9}
            for when in ("before", "after"):
                row |= {f"step {when}": step, f"kind {when}": "noise", f"H {when}": index}
                row |= {f"H low {when}": index - 0.01, f"H high {when}": index + 0.01}
            rows.append(row | changes)
    return rows


def holds(rows: list[Row]) -> list[bool | None]:
    """Smooth; rough at beta 1 and 1/2; what was added to each of five."""
    return [finding.holds for finding in EXPERIMENT.check(rows, SETTINGS)]


def test_weights_that_stay_as_they_were_hold() -> None:
    assert holds(table()) == [True] * 8


def test_smooth_weights_that_become_rough_do_not_hold_and_rough_ones_that_become_smooth_neither() -> None:
    assert holds(table(**{"step after": 1.2}))[:3] == [False, True, True]
    assert holds(table(**{"step after": 0.05}))[:3] == [True, False, False]


def test_hurst_indices_before_and_after_are_told() -> None:
    told = EXPERIMENT.check(table(**{"H after": 0.65, "H low after": 0.64, "H high after": 0.66}), SETTINGS)[1].measured
    assert "H 0.50 as noise before, 0.65 (0.64 to 0.66) as noise after" in told


def test_noise_that_is_added_does_not_hold() -> None:
    assert holds(table(**{"kind change": "noise"}))[3:8] == [False] * 5


def test_networks_that_learnt_nothing_decide_nothing() -> None:
    assert holds(table(accuracy=0.1)) == [None] * 8


def test_rows_say_of_which_seeds_they_are_and_other_seeds_give_other_networks() -> None:
    settings = replace(EXPERIMENT.sizes["tiny"], depth=8, epochs=1)
    starts = {}
    for first in (0, 1000):
        rows = EXPERIMENT.run(replace(settings, first_seed=first), Work(EXPERIMENT.name))
        networks = [row for row in rows if row["part"] == "network" and row["weights"] == "iid"]
        assert {row["seed"] for row in networks} == {first, first + 1}
        starts[first] = {row["step before"] for row in networks}
    assert not starts[0] & starts[1000]


@pytest.mark.slow
def test_the_tiny_size_runs_and_its_rough_weights_stay_rough() -> None:
    settings = EXPERIMENT.sizes["tiny"]
    rows = EXPERIMENT.run(settings, Work(EXPERIMENT.name))
    networks = [row for row in rows if row["part"] == "network"]
    assert len(networks) == len(CASES) * settings.seeds
    assert len(rows) - len(networks) == len(CASES) * settings.depth
    rough = [row for row in networks if row["weights"] == "iid"]
    for row in rough:
        assert row["step before"] == pytest.approx(2**0.5, abs=0.05)  # neighbours are independent
    assert all(finding.holds for finding in EXPERIMENT.check(rows, settings)[1:3])
    assert len(EXPERIMENT.plot(rows, settings).axes) == 3 * len(CASES)
