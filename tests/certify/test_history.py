"""What the certificate says over the steps, as scalars, and of the whole gradient."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

import abyssal
from abyssal.certify import history
from abyssal.certify.history import History
from toys.blocks import relative
from toys.streams import batch, coded, stack, step

pytestmark = pytest.mark.filterwarnings("ignore::abyssal.DriftWarning")


def test_every_step_is_remembered_oldest_first() -> None:
    model = coded(stack([0.3] * 4), abyssal.Code(4))
    for seed in range(5):
        step(model, batch(seed=seed))
        certificate = abyssal.certificate(model)
        last = certificate.history[-1]
        assert len(certificate.history) == seed + 1
        assert last.number == seed
        assert last.error == pytest.approx(certificate.error, rel=1e-6)  # kept in float32
        assert last.stored_bytes == certificate.stored_bytes
        assert last.errors == pytest.approx({b.name: b.error for b in certificate.blocks}, rel=1e-6)
    assert [s.number for s in certificate.history] == [0, 1, 2, 3, 4]


def test_only_the_last_steps_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LONGEST", 3)
    model = coded(stack([0.3] * 2), abyssal.Code(4))
    for _ in range(5):
        step(model, batch())
    assert [s.number for s in abyssal.certificate(model).history] == [2, 3, 4]


def test_a_second_backward_pass_replaces_the_entry() -> None:
    model = coded(stack([0.3] * 4), abyssal.Code(4))
    loss = model(batch()).sum()
    loss.backward(retain_graph=True)
    first = abyssal.certificate(model).history
    loss.backward()
    assert abyssal.certificate(model).history == first
    assert len(first) == 1


def test_forward_passes_without_backward_leave_no_entry() -> None:
    model = coded(stack([0.3] * 3), abyssal.Code(4))
    model(batch())
    with torch.no_grad():
        model(batch())
    assert abyssal.certificate(model).history == ()
    assert abyssal.certificate(model).scalars() == {
        "abyssal/stored_bytes": abyssal.certificate(model).stored_bytes,
        "abyssal/drifted": 0.0,
        "abyssal/error/2": 0.0,  # the end
    }


def test_two_graphs_alive_have_an_entry_each() -> None:
    model = coded(stack([0.3] * 3), abyssal.Code(4))
    losses = [model(batch(seed=seed)).sum() for seed in range(2)]
    losses[1].backward()
    losses[0].backward()
    assert [s.number for s in abyssal.certificate(model).history] == [1, 0]


def test_drifted_blocks_are_named_in_the_step_in_which_they_drifted() -> None:
    model = stack([1e-3] * 5)
    abyssal.reconstruct(model, abyssal.Code(2), blocks=list(model))
    step(model, batch())
    model[2].scale = 3.0
    step(model, batch())
    model[2].scale = 1e-3
    step(model, batch())
    assert [s.drifted for s in abyssal.certificate(model).history] == [(), ("3",), ()]


def test_an_undefined_error_is_remembered_as_infinite() -> None:
    """A NaN would hide among those that were not measured, and is not less than any bound."""
    model = coded(stack([0.3] * 3), abyssal.Code(4))
    step(model, batch())
    records = model[0].forward.session.records
    records[1].input_error = math.nan
    past = History(["0", "1", "2"])
    past.enter(0, records)
    (entry,) = past
    assert entry.errors["1"] == entry.error == math.inf
    assert 0 < entry.errors["0"] < 1


def test_copies_begin_their_own_history() -> None:
    model = coded(stack([0.3] * 3), abyssal.Code(4))
    step(model, batch())
    copied = copy.deepcopy(model)
    assert abyssal.certificate(copied).history == ()
    step(copied, batch())
    assert len(abyssal.certificate(copied).history) == len(abyssal.certificate(model).history) == 1
    loaded = pickle.loads(pickle.dumps(model))
    assert abyssal.certificate(loaded).history == ()


def test_scalars_are_finite_numbers_by_name_and_go_into_json() -> None:
    model = coded(stack([0.3] * 3), abyssal.Code(4))
    step(model, batch())
    certificate = abyssal.certificate(model)
    scalars = certificate.scalars(prefix="run/")
    assert set(scalars) == {"run/error", "run/stored_bytes", "run/drifted", "run/error/0", "run/error/1", "run/error/2"}
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    assert scalars["run/error"] == certificate.error
    assert json.loads(json.dumps(scalars)) == scalars
    assert "gradient_error" in json.loads(json.dumps(certificate.to_dict()))


def test_tensorboard_takes_the_scalars(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = coded(stack([0.3] * 3), abyssal.Code(4))
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for number in range(2):
            step(model, batch(seed=number))
            for name, value in abyssal.certificate(model).scalars().items():
                writer.add_scalar(name, value, number)
    assert any(path.stat().st_size > 0 for path in tmp_path.iterdir())


# ---------------------------------------------------------------------- the gradient's error, with a plan


@dataclass
class FakePlan:
    """What `abyssal.reconstruct` needs of a plan."""

    policies: dict[str, abyssal.Policy]
    sensitivities: dict[str, float] = field(default_factory=dict)
    state_errors: dict[str, float] = field(default_factory=dict)

    def policies_for(self, model: nn.Module) -> dict[str, abyssal.Policy]:
        return self.policies


def test_the_gradients_error_is_the_root_of_the_sum_of_squares_of_the_states() -> None:
    names = ["0", "1", "2", "3"]
    weights = dict(zip(names, [1.0, 2.0, 3.0, 4.0], strict=True))
    model = stack([0.3] * 4)
    abyssal.reconstruct(model, FakePlan(dict.fromkeys(names, abyssal.Code(4)), weights, dict.fromkeys(names, 1.0)))
    assert abyssal.certificate(model).gradient_error is None
    step(model, batch())
    certificate = abyssal.certificate(model)
    expected = math.sqrt(sum((weights[b.name] * (b.error or 0.0)) ** 2 for b in certificate.blocks))
    assert certificate.gradient_error == pytest.approx(expected)
    assert certificate.scalars()["abyssal/gradient_error"] == certificate.gradient_error


def test_without_a_plan_no_gradient_error_is_claimed() -> None:
    model = coded(stack([0.3] * 4), abyssal.Code(4))
    step(model, batch())
    assert abyssal.certificate(model).gradient_error is None


def test_twice_the_error_that_a_plan_was_made_with_is_allowed() -> None:
    def drifted(expected: float) -> list[str]:
        model = stack([1.0] * 6)
        names = [str(i) for i in range(6)]
        plan = FakePlan(dict.fromkeys(names, abyssal.Code(1)), state_errors=dict.fromkeys(names, expected))
        abyssal.reconstruct(model, plan)
        step(model, batch())
        return abyssal.certificate(model).drifted

    model = coded(stack([1.0] * 6), abyssal.Code(1))
    step(model, batch())
    worst = abyssal.certificate(model).error
    assert worst is not None
    assert worst > 0.1
    assert drifted(0.49 * worst)
    assert drifted(0.51 * worst) == []


# ---------------------------------------------------------------------- on_drift="keep"


@pytest.mark.slow
@pytest.mark.parametrize("policy", [abyssal.Reverse(2), abyssal.Code(2)], ids=str)
def test_one_bad_block_ends_kept(policy: abyssal.Policy) -> None:
    """Reversed, what lies below a block that does not contract drifts with it, and all of it is kept at once."""
    scales = [0.02] * 10
    scales[6] = 4.0
    model = stack(scales)
    plain = step(copy.deepcopy(model), batch())
    abyssal.reconstruct(model, policy, blocks=list(model), on_drift="keep")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(10):
            try:
                found = step(model, batch())
            except abyssal.NonFiniteError:
                continue
    certificate = abyssal.certificate(model)
    assert certificate.drifted == []
    kept = [b.name for b in certificate.blocks if b.policy == "Keep()"]
    # Reversed, the block's own input is what cannot be solved for. Coded, the huge increment is in the next one's
    # code, and what that left of it in the one after, which was not known to start anew.
    assert kept == ([str(n) for n in range(7)] if policy.inverts else ["7", "8"])
    assert relative(found, plain) <= 0.1


def test_the_note_says_since_when_and_why() -> None:
    model = stack([0.02, 4.0, 0.02, 0.02])
    abyssal.reconstruct(model, abyssal.Reverse(2), blocks=list(model), on_drift="keep")
    for _ in range(2):
        step(model, batch())
    assert "drifted; Keep() since" in abyssal.certificate(model).blocks[1].note
