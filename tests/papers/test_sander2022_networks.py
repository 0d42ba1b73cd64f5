"""sander2022/training, failure and refine: the tiny size runs, and verdicts follow from rows, either way."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

import abyssal
from abyssal.papers.experiment import Experiment, Row, Work
from abyssal.papers.experiments.sander2022 import failure as sander2022_failure
from abyssal.papers.experiments.sander2022 import refine as sander2022_refine
from abyssal.papers.experiments.sander2022 import training as sander2022_training
from abyssal.papers.networks.bottleneck import Bottleneck, BottleneckResNet
from abyssal.papers.shared.training import difference, gradient_error, images_of, network
from abyssal.util.stats import Interval, mean

TRAINING, FAILURE, REFINE = (
    module.EXPERIMENT for module in (sander2022_training, sander2022_failure, sander2022_refine)
)


def answers(experiment: Experiment, rows: list[Row], size: str = "small") -> list[bool | None]:
    return [finding.holds for finding in experiment.check(rows, experiment.sizes[size])]


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module", params=[pytest.param("tiny", marks=pytest.mark.slow)])
def tiny() -> dict[str, list[Row]]:
    return {e.name: e.run(e.sizes["tiny"], Work()) for e in (TRAINING, FAILURE, REFINE)}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [TRAINING, FAILURE, REFINE], ids=lambda e: e.name)
def test_the_tiny_size_runs_is_judged_and_drawn(experiment, tiny, tmp_path):
    rows, settings = tiny[experiment.name], experiment.sizes["tiny"]
    assert all(isinstance(value, float | int | str | bool | None) for row in rows for value in row.values())
    findings = experiment.check(rows, settings)
    assert all(finding.claim and finding.measured for finding in findings)
    figure = experiment.plot(rows, settings)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_seeds_count_from_the_first_one():
    settings = replace(TRAINING.sizes["tiny"], depths=(2,), seeds=2, steps=1, first_seed=1000)
    assert {row["seed"] for row in TRAINING.run(settings, Work())} == {1000, 1001}


def test_all_methods_start_alike_and_backpropagation_is_exact(tiny):
    rows = tiny["sander2022/training"]
    assert {row["gradient_error"] for row in rows if row["method"] == "backprop"} == {0.0}
    assert all(row["gradient_error"] > 0 for row in rows if row["method"] == "paper" and row["depth"] > 1)
    assert {row["stored_bytes"] is None for row in rows if row["method"] == "backprop"} == {True}


def test_untying_is_exact_and_nothing_of_the_stream_is_stored_for_a_further_layer(tiny):
    rows = tiny["sander2022/refine"]
    assert all(row["change"] == 0 for row in rows if row["stage"] == "untied")
    depths = {row["stage"]: row["depth"] for row in rows}
    assert [depths[stage] for stage in ("tied", "untied", "deepened x2", "deepened x4")] == [4, 4, 8, 16]
    settings = REFINE.sizes["tiny"]
    state = settings.batch * settings.width * 4
    for row in rows:
        if row["stored_bytes"] is not None:  # the last state, and 64 numbers of each as a sample, with their places
            assert row["stored_bytes"] < 1.5 * state + row["depth"] * 400 < row["kept_bytes"]


def test_the_adjoint_is_applied_to_the_unmodified_layout_and_its_gradient_is_useless():
    torch.manual_seed(0)
    cell = asdict(FAILURE.sizes["tiny"]) | {"data": "digits"}
    model = BottleneckResNet((2, 2, 3, 2), 4, 1, 10)
    data = images_of(cell)
    assert gradient_error(model, "paper", data, 16) > 0.5
    assert gradient_error(model, "ours", data, 16) < 1e-5
    assert gradient_error(model, "code8", data, 16) < 0.5


def test_the_layout_is_resnet_101s():
    model = BottleneckResNet((3, 4, 23, 3), 64, 3, 10)
    assert [len(stage) for stage in model.stages] == [3, 4, 23, 3]
    # Of torchvision's resnet101: 44,549,160 parameters, less its head and its 7x7 stem.
    assert model.head.in_features == 2048
    assert sum(p.numel() for p in model.stages.parameters()) == 44_549_160 - 2_049_000 - 9_536
    assert len(abyssal.find_blocks(model)) == 33 - 4  # all but those that change the shape
    block = Bottleneck(8, 2).eval()
    x = torch.randn(2, 8, 3, 3)
    scale = (1 + 1e-5) ** -0.5  # fresh running statistics
    out = block.conv3(torch.relu(block.conv2(torch.relu(block.conv1(x) * scale)) * scale)) * scale
    torch.testing.assert_close(block(x), torch.relu(out + x))


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("scheme", ["Euler", "Heun"])
def test_networks_have_as_many_steps_as_asked_for(kind, scheme):
    cell: dict[str, Any] = {"kind": kind, "scheme": scheme, "depth": 3, "width": 8, "seed": 0}
    model = network(cell, (1, 8, 8), tied=True)
    stacks = [m for m in model.modules() if isinstance(m, abyssal.nn.ResidualStack)]
    assert {len(stack) for stack in stacks} == {3}
    assert {len({id(f) for f in stack.blocks}) for stack in stacks} == {1}
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# ---------------------------------------------------------------------- intervals


def test_the_interval_is_students():
    found = mean([1.0, 2.0, 3.0])
    half = 4.302652729911275 / 3**0.5  # t at 97.5 % with 2 degrees of freedom; standard deviation 1
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    assert found.above(-1) and found.above(5) is False and found.above(2.5) is None
    assert np.isnan(mean([1.0]).low) and mean([1.0]).above(0) is None


def test_differences_are_paired_by_seed():
    rows: list[Row] = [{"method": m, "seed": s, "a": s + (m == "x")} for m in "xy" for s in (2, 0, 1)]
    assert difference(rows, "a", {"method": "x"}, {"method": "y"}) == Interval(1.0, 1.0, 1.0)


# ---------------------------------------------------------------------- verdicts


def trained(accuracy: Any) -> list[Row]:
    noise = (0.0, 0.002, -0.002)
    return [
        {"scheme": s, "depth": n, "method": m, "seed": k, "accuracy": accuracy(s, n, m) + (m != "backprop") * noise[k]}
        for s in ("Euler", "Heun")
        for n in (1, 2, 4, 8)
        for m in ("backprop", "paper", "ours")
        for k in range(3)
    ]


def test_training_holds_where_the_adjoint_catches_up_with_depth_and_heun_sooner():
    rows = trained(lambda s, n, m: 0.9 - 0.5 * (m == "paper" and n <= (4 if s == "Euler" else 2)))
    assert answers(TRAINING, rows) == [True] * 6
    assert "from N = 8 on" in TRAINING.check(rows, None)[0].measured


def test_training_does_not_hold_where_the_adjoint_never_catches_up_or_ours_fails():
    rows = trained(lambda s, n, m: 0.9 - 0.5 * (m == "paper") - 0.1 * (m == "ours" and n == 8))
    assert answers(TRAINING, rows) == [False, True, False, True, None, False]


def test_training_does_not_hold_where_the_adjoint_is_as_good_when_shallow_or_euler_is_sooner():
    rows = trained(lambda s, n, m: 0.9 - 0.5 * (m == "paper" and s == "Heun" and n <= 4))
    assert answers(TRAINING, rows) == [True, False, True, True, False, True]


def test_training_is_undecided_where_seeds_disagree():
    rows = trained(lambda s, n, m: 0.9)
    for row in rows:
        if row["method"] != "backprop" and row["seed"] == 0:
            row["accuracy"] = 0.8
    assert set(answers(TRAINING, rows)) == {None}


def curves(ends: dict[str, float]) -> list[Row]:
    return [
        {
            "method": m,
            "seed": k,
            "step": step,
            "loss": 2.3 + (end + 0.01 * k - 2.3) * step / 10,
            "gradient_error": 0.1,
            "stored_bytes": 1000,
        }
        for m, end in ends.items()
        for k in range(3)
        for step in range(1, 11)
    ]


def test_failure_holds_where_the_adjoint_stays_at_guessing_and_ours_does_not():
    rows = curves({"backprop": 0.5, "paper": 2.2, "ours": 0.5, "code8": 0.55})
    assert answers(FAILURE, rows) == [True, True, True]


def test_failure_does_not_hold_where_the_adjoint_trains_or_ours_does_not():
    assert answers(FAILURE, curves({"backprop": 0.5, "paper": 0.6, "ours": 1.5, "code8": 1.5})) == [False] * 3


def test_a_loss_that_is_no_number_is_no_progress():
    rows = curves({"backprop": 0.5, "paper": float("nan"), "ours": 0.5, "code8": float("nan")})
    assert answers(FAILURE, rows) == [True, True, False]


def refined(**changes: Any) -> list[Row]:
    facts = {"gain": 0.01, "against": 0.0, "lost": 0.0, "tuned": 0.0, "change": 0.0, "sample": 0.05} | changes
    rows: list[Row] = []
    for seed in range(3):
        noise = 0.001 * seed
        for n, stage in enumerate(sander2022_refine.STAGES):
            deep = {"deepened x2": 2, "deepened x4": 4}.get(stage, 1)
            after = 0.9 + facts["gain"] + (facts["tuned"] if deep > 1 else 0) + noise
            before = 0.9 + (facts["gain"] + facts["lost"] if deep > 1 else 0)
            if stage == "untied, backpropagation":
                after -= facts["against"]
            rows.append(
                {
                    "stage": stage,
                    "seed": seed,
                    "depth": 4 * deep,
                    "before": before if n else 0.1,
                    "after": after,
                    "change": facts["change"] if n > 2 else None,
                    "kept_bytes": 1000 * deep,
                    "stored_bytes": 500 + facts["sample"] * 1000 * deep,
                }
            )
    return rows


def test_refine_holds_where_nothing_is_lost():
    assert answers(REFINE, refined()) == [True] * 6


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"change": 1e-3}, [0]),
        ({"gain": -0.1}, [1]),
        ({"against": -0.1}, [2]),
        ({"lost": -0.1}, [3, 4]),
        ({"tuned": -0.1}, [3, 4]),
        ({"sample": 0.5}, [5]),
    ],
)
def test_refine_does_not_hold_where_something_is(changes, wrong):
    assert [n for n, holds in enumerate(answers(REFINE, refined(**changes))) if holds is False] == wrong


def test_fewer_layers_are_claimed_only_where_the_other_scheme_is_decidedly_behind():
    even, behind, unclear = Interval(0.0, -0.01, 0.01), Interval(-0.3, -0.4, -0.2), Interval(-0.03, -0.08, 0.02)

    def answer(euler: dict[int, Interval], heun: dict[int, Interval]) -> bool | None:
        reached = {"Euler": sander2022_training.from_depth(euler), "Heun": sander2022_training.from_depth(heun)}
        return sander2022_training._fewer(reached, {"Euler": euler, "Heun": heun}).holds

    assert answer({8: behind, 16: even}, {8: even, 16: even}) is True
    assert answer({8: even, 16: even}, {8: behind, 16: even}) is False
    assert answer({8: behind, 16: unclear}, {8: behind, 16: even}) is None
    assert answer({8: even, 16: even}, {8: even, 16: even}) is None
