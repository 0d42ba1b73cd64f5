"""Marion et al. (2023): the hand-written gradient is right, and the verdicts can go either way."""

from __future__ import annotations

import pytest
import torch

from abyssal.papers.experiment import Work
from abyssal.papers.experiments.marion2023 import implicit as marion2023_implicit
from abyssal.papers.experiments.marion2023.implicit import _backward

EXPERIMENT = marion2023_implicit.EXPERIMENT


@pytest.mark.parametrize("activation", [torch.tanh, torch.nn.functional.gelu, torch.relu])
def test_the_gradient_by_hand_is_autograds_times_depth(activation):
    torch.manual_seed(0)
    depth, width = 5, 4
    weights = [torch.randn(depth, width, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    states = [torch.randn(7, width, dtype=torch.float64)]
    for w, v in zip(*weights, strict=True):
        states.append(states[-1] + activation(states[-1] @ w.T) @ v.T / depth)
    cotangent = torch.randn_like(states[-1])
    exact = torch.autograd.grad((states[-1] * cotangent).sum(), weights)
    found = _backward([s.detach() for s in states], cotangent, [w.detach() for w in weights], activation)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, depth * theirs, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("sklearn")
    return EXPERIMENT.run(EXPERIMENT.sizes["tiny"], Work())


def holds(rows):
    return [finding.holds for finding in EXPERIMENT.check(rows, EXPERIMENT.sizes["tiny"])]


@pytest.mark.slow
def test_smooth_activations_keep_weights_lipschitz_in_depth_and_relu_does_not(rows):
    trained, tanh, *_, relu = holds(rows)
    assert (trained, tanh, relu) == (True, True, True)
    assert EXPERIMENT.plot(rows, EXPERIMENT.sizes["tiny"]).axes


def test_it_does_not_hold_where_jumps_grow_or_outputs_stay_apart(rows):
    made_up = [
        dict(
            row,
            jump=float(row["depth"]) if row["activation"] != "relu" else 1.0,
            from_double_depth=row["from_double_depth"] and 0.5,
            loss_end=row["loss_start"],
        )
        for row in rows
    ]
    assert holds(made_up) == [False] * 6
