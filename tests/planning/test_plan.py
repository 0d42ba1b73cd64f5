"""Plans: what they promise holds on batches they have not seen, and what cannot be had is refused with reasons."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_measure import assert_same, everything
from torch import Tensor, nn

import abyssal
from abyssal import Keep, Reverse, Store, memory
from abyssal.engine.policy import Code, PaperAdjoint
from abyssal.planning.plan import Plan
from abyssal.planning.plan_data import BlockPlan, Cost, PlanError
from abyssal.planning.precision import gradient_error
from abyssal.planning.search import plan
from toys.blocks import Branch, build, data
from toys.trained import GPT, ConvNet, images, lines, trained_convnet, trained_gpt

TOLERANCE = 1e-2
NEVER_ABOVE = 1.5e-2  # on fresh batches; issue 3's bound


def squared(output: Tensor) -> Tensor:
    return output.square().mean()


@pytest.fixture(scope="session")
def gpt() -> GPT:
    return trained_gpt()


@pytest.fixture(scope="session")
def tolerant(gpt: GPT) -> Plan:
    return plan(gpt, lines(1000), tolerance=TOLERANCE)


def grads(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


def error_under(found: Plan, model: nn.Module, loss: Any) -> float:
    """The whole gradient's relative error under a plan; `loss()` runs the model."""
    exact = grads(model, loss())
    abyssal.reconstruct(model, found.policies_for(model), tolerance=math.inf)
    try:
        return gradient_error(grads(model, loss()), exact)
    finally:
        abyssal.release(model)


def step_peak(model: nn.Module, loss: Any) -> int:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with memory.track() as usage:
        loss().backward()
    return usage.peak


# ------------------------------------------------------------------------------------------------ tolerances


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(10))
def test_the_error_on_fresh_batches_of_text_stays_near_the_tolerance(gpt: GPT, tolerant: Plan, batch: int) -> None:
    assert error_under(tolerant, gpt, lambda: gpt(**lines(2000 + batch)).loss) <= NEVER_ABOVE


def test_a_tolerant_plan_stores_a_fraction_and_says_its_error(gpt: GPT, tolerant: Plan) -> None:
    assert tolerant.gradient_error <= 0.7 * TOLERANCE
    assert tolerant.stream_bytes < 0.5 * tolerant.checkpointing.stream_bytes
    assert tolerant.peak_bytes < tolerant.checkpointing.peak_bytes < tolerant.plain.peak_bytes
    batch = error_under(tolerant, gpt, lambda: gpt(**lines(1000)).loss)
    assert tolerant.gradient_errors["batch"] == pytest.approx(batch, rel=1e-4)
    assert set(tolerant.gradient_errors) == {"batch", "first half", "second half"}
    assert tolerant.error_in_bf16_units == tolerant.gradient_error / tolerant.bf16_error
    assert math.hypot(*(b.gradient_share for b in tolerant.blocks)) == pytest.approx(tolerant.gradient_error, rel=0.01)


def test_the_first_half_is_checked_as_a_batch_of_its_own(gpt: GPT, tolerant: Plan) -> None:
    half = {key: value[:4] for key, value in lines(1000).items()}
    found = error_under(tolerant, gpt, lambda: gpt(**half).loss)
    assert tolerant.gradient_errors["first half"] == pytest.approx(found, rel=1e-4)


@pytest.mark.slow
def test_the_tolerance_holds_for_multilayer_perceptrons_of_any_depth() -> None:
    for depth in (3, 24):
        model = build(lambda: Branch(32, scale=0.3), depth=depth, width=32).float()
        found = plan(model, data(16, 32).float(), loss=squared, tolerance=TOLERANCE)
        for seed in range(10, 20):
            x = data(16, 32, seed).float()
            assert error_under(found, model, lambda x=x, model=model: squared(model(x))) <= NEVER_ABOVE


@pytest.mark.slow
def test_the_tolerance_holds_with_batch_normalisation_in_two_stages() -> None:
    model = trained_convnet()
    found = plan(model, images(1000, 16), tolerance=TOLERANCE)
    for seed in range(10):
        fresh = images(2000 + seed, 16)
        assert error_under(found, model, lambda fresh=fresh: model(*fresh)) <= NEVER_ABOVE
    assert found.stream_bytes < 0.7 * found.checkpointing.stream_bytes
    assert 0.0 < max(found.gradient_errors.values()) <= 0.21 * TOLERANCE  # batches differ: see search.py's _JUMPS


@pytest.mark.slow
def test_dropout_is_planned_for_in_training_mode() -> None:
    model = GPT(layers=3, dropout=0.1)
    found = plan(model, lines(0), tolerance=TOLERANCE)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return model(**lines(7)).loss

    assert error_under(found, model, loss) <= NEVER_ABOVE


@pytest.mark.slow
def test_a_smaller_tolerance_stores_more(gpt: GPT, tolerant: Plan) -> None:
    tight = plan(gpt, lines(1000), tolerance=1e-5)
    assert tight.gradient_error <= 0.7e-5
    assert tight.stream_bytes > tolerant.stream_bytes


def test_the_default_is_a_tolerance_of_one_per_cent() -> None:
    found = plan(build(depth=3).float(), data().float(), loss=squared)
    assert found.tolerance == 1e-2 and found.memory is None


def test_what_an_unusual_block_must_not_have_it_does_not_get() -> None:
    class Routed(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.01 * x.topk(1, dim=-1).indices

    model = build(depth=5)
    model.blocks[2] = Routed().double()
    found = plan(model, data(), loss=squared, blocks=list(model.blocks), tolerance=0.1)
    assert found.policies["blocks.2"] in (Keep(), Store())


# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("fraction", [0.1, 0.45, 0.8, 1.4, 4.0])
def test_a_budget_is_kept_and_the_promised_peak_is_the_measured_one(gpt: GPT, tolerant: Plan, fraction: float) -> None:
    """From close to no stream at all, over codes, to plain training; also in later steps of a training run."""
    least, keep = tolerant.peak_bytes, tolerant.checkpointing.peak_bytes
    budget = int(least + fraction * (keep - least)) if fraction < 1 else int(fraction * keep)
    found = plan(gpt, lines(1000), memory=budget)
    model = copy.deepcopy(gpt)
    abyssal.reconstruct(model, found.policies, tolerance=math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(3):
        peak = step_peak(model, lambda step=step: model(**lines(3000 + step)).loss)
        assert peak <= budget
        assert peak == pytest.approx(found.peak_bytes, rel=0.05)
        optimizer.step()
    if fraction >= 1:
        assert found.gradient_error == 0.0
        assert Store() in found.policies.values()
    else:
        assert found.gradient_error > 0.0
        assert found.peak_bytes < keep
    if fraction == 4.0:
        assert found.peak_bytes > 0.8 * min(budget, found.plain.peak_bytes)


@pytest.mark.slow
def test_an_ample_budget_is_plain_training(gpt: GPT) -> None:
    found = plan(gpt, lines(1000), memory="1GB")
    assert set(found.policies.values()) == {Store()}
    assert found.memory == 10**9
    assert found.peak_bytes == pytest.approx(found.plain.peak_bytes, rel=0.01)


@pytest.mark.slow
def test_of_exact_plans_what_is_stored_comes_last(gpt: GPT, tolerant: Plan) -> None:
    """It is let go first; and a stored block breaks a chain."""
    found = plan(gpt, lines(1000), memory=int(1.6 * tolerant.checkpointing.peak_bytes))
    kinds = [policy.recomputes for policy in found.policies.values()]
    assert kinds == sorted(kinds, reverse=True) and not all(kinds) and any(kinds)


@pytest.mark.slow
def test_with_both_wishes_the_fastest_that_meets_both(gpt: GPT, tolerant: Plan) -> None:
    budget = int(1.3 * tolerant.checkpointing.peak_bytes)
    found = plan(gpt, lines(1000), tolerance=TOLERANCE, memory=budget)
    assert found.gradient_error <= 0.7 * TOLERANCE
    assert found.peak_bytes <= budget
    assert Store() in found.policies.values()  # not run again, which is what saves time


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_is_refused_with_what_can(gpt: GPT) -> None:
    with pytest.raises(PlanError, match=r"at most 9.8 KiB is not possible.*smallest peak found is .* set by the back"):
        plan(gpt, lines(1000), memory=10_000)


@pytest.mark.slow
def test_two_wishes_that_exclude_each_other_are_refused_with_the_error_that_remains(gpt: GPT, tolerant: Plan) -> None:
    budget = tolerant.peak_bytes
    with pytest.raises(PlanError, match="leaves a gradient error of") as refused:
        plan(gpt, lines(1000), tolerance=1e-7, memory=budget)
    assert "checkpointing, which is exact, has" in str(refused.value)


@pytest.mark.parametrize(
    ("wish", "error", "text"),
    [
        ({"tolerance": 0.0}, ValueError, "positive relative error"),
        ({"tolerance": float("nan")}, ValueError, "positive relative error"),
        ({"memory": 0}, ValueError, "positive number of bytes"),
        ({"memory": "2 apples"}, ValueError, "not understood"),
        ({"memory": [1]}, TypeError, "expected a number or a string"),
    ],
)
def test_wishes_that_mean_nothing_are_refused(wish: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan(build(depth=2), data(), loss=squared, **wish)


# ------------------------------------------------------------------------------------------------ batches, traces


@pytest.mark.slow
def test_the_model_is_left_exactly_as_it_was() -> None:
    model = ConvNet(blocks=2)
    abyssal.reconstruct(model, Code(4))
    model(*images(0)).backward()
    before = everything(model)
    plan(model, images(1), tolerance=TOLERANCE)
    assert_same(before, everything(model))
    with pytest.raises(PlanError):
        plan(model, images(1), memory=1)
    assert_same(before, everything(model))


def test_another_batch_may_be_given_to_check_on() -> None:
    model = build(depth=3).float()
    found = plan(model, data().float(), loss=squared, check=data(7, seed=4).float())
    assert set(found.gradient_errors) == {"batch", "check batch"}


def test_a_single_row_is_checked_in_another_order() -> None:
    model = GPT(layers=2)
    found = plan(model, lines(0, rows=1))
    assert set(found.gradient_errors) == {"batch", "other order"}
    found = plan(ConvNet(blocks=1, channels=4).eval(), images(0, rows=1), blocks=["stage1.0", "stage2.0"])
    assert set(found.gradient_errors) == {"batch", "mirrored"}


def test_a_batch_that_cannot_be_halved_is_noted() -> None:
    class Fussy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build(depth=2).float()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) != 5:
                raise ValueError("five rows, please")
            return squared(self.net(x))

    found = plan(Fussy(), data().float())
    assert set(found.gradient_errors) == {"batch"}
    assert "not verified on first half: five rows, please" in found.notes[0]


# ------------------------------------------------------------------------------------------------ files


def test_plans_come_back_from_json_as_they_were(tolerant: Plan, tmp_path: Path) -> None:
    tolerant.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == tolerant
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(tolerant.to_dict()))
    every = (
        Store(),
        Keep(),
        Keep(device="cpu"),
        Code(3, group=128, refine=2, device="cpu"),
        Reverse(2),
        PaperAdjoint(),
    )
    blocks = tuple(replace(tolerant.blocks[0], name=f"b.{n}", policy=policy) for n, policy in enumerate(every))
    other = replace(
        tolerant, blocks=blocks, bf16_error=None, plain=Cost(5, None, None), gradient_errors={"a": math.inf}
    )
    other.save(tmp_path / "other.json")
    assert Plan.load(tmp_path / "other.json") == other


def test_a_plans_file_has_a_line_per_block(tolerant: Plan, tmp_path: Path) -> None:
    tolerant.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    for block in tolerant.blocks:
        (line,) = [line for line in text.splitlines() if f'"name": "{block.name}"' in line]
        assert f'"policy": "{type(block.policy).__name__}"' in line
    assert text.count('"norm1.weight"') == 1  # blocks that are alike share their shapes


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "shopping list"}, 'has no "format": "abyssal plan"'),
        ({"version": 2}, "version 2 and was written by a newer abyssal"),
        ({"version": "one"}, "expected a whole number"),
        ({"blocks": 3}, '"blocks": expected a list, got int'),
        ({"cost": None}, '"cost": expected an object'),
        ({"tolerance": "much"}, "\"tolerance\": expected a number, got 'much'"),
    ],
)
def test_a_file_that_holds_no_plan_is_refused(
    tolerant: Plan, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**tolerant.to_dict(), **change}))
    with pytest.raises(PlanError, match=text) as refused:
        Plan.load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"policy": "Forget"}, "unknown policy 'Forget'; this process knows Store, Keep, Reverse"),
        ({"policy": "Code", "bits": 5}, "bits=5"),
        ({"policy": "Reverse", "refine": -1}, "refine"),
        ({"parameters": 99}, "is not the number of an entry"),
    ],
)
def test_a_block_that_cannot_be_read_is_named(
    tolerant: Plan, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    whole = tolerant.to_dict()
    whole["blocks"][1].update(change)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(PlanError, match=text) as refused:
        Plan.load(path)
    assert "'layers.1'" in str(refused.value)


def test_what_is_not_json_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(PlanError, match="not JSON"):
        Plan.load(path)
    path.write_text("[]")
    with pytest.raises(PlanError, match="this is no plan"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "nowhere.json")


# ------------------------------------------------------------------------------------------------ models that fit


def test_a_plan_is_used_by_reconstruct(gpt: GPT, tolerant: Plan) -> None:
    model = copy.deepcopy(gpt)
    exact = grads(model, model(**lines(1000)).loss)
    abyssal.reconstruct(model, tolerant, on_drift="raise")
    model(**lines(1000)).loss.backward()
    error = gradient_error([p.grad for p in model.parameters()], exact)
    assert error == pytest.approx(tolerant.gradient_errors["batch"], rel=1e-4)
    # The certificate's figure, from sampled states: within a factor of 2 of the measured error.
    assert tolerant.gradient_error / 2 < abyssal.certificate(model).gradient_error < tolerant.gradient_error * 2


def test_a_plan_fits_wrapped_models(gpt: GPT, tolerant: Plan) -> None:
    assert list(tolerant.policies_for(torch.compile(gpt))) == [f"_orig_mod.layers.{n}" for n in range(6)]


def test_the_first_block_that_does_not_fit_is_named(tolerant: Plan) -> None:
    with pytest.raises(PlanError, match=r"block 'layers.4' is not in it"):
        tolerant.check_fits(GPT(layers=4))
    with pytest.raises(PlanError, match=r"'layers.0' has a parameter 'norm1.weight' of shape \[32\].*had \[64\]"):
        tolerant.check_fits(GPT(width=32))
    model = GPT()
    model.layers[2] = Branch()
    with pytest.raises(PlanError, match=r"block 'layers.2' is a Branch here, and was a Layer"):
        tolerant.check_fits(model)
    model = GPT()
    model.layers[1].extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(PlanError, match=r"block 'layers.1' has a parameter 'extra', which the plan's model had not"):
        tolerant.check_fits(model)
    tolerant.check_fits(GPT())
    with pytest.raises(ValueError, match="does not fit"):
        abyssal.reconstruct(GPT(layers=2), tolerant)


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_says_it_all(tolerant: Plan) -> None:
    text = str(tolerant)
    for word in (
        "policy",
        "stored",
        "error of",
        "gradient",
        "peak of a step",
        "plain",
        "checkpointing",
        "bfloat16",
        "set by",
    ):
        assert word in text
    assert all(len(line) <= 100 for line in text.splitlines())


def deep(count: int) -> Plan:
    """A plan of many blocks: kept, coded, reversed."""

    def block(n: int) -> BlockPlan:
        policy = Keep() if n < 3 else Code(4) if n < count // 2 else Reverse(1)
        share = 0.0 if n < 3 else 1e-3
        return BlockPlan(f"model.layers.{n}", "Layer", policy, 10_000, share, share, 1.0, 0.01)

    cost = Cost(10**8, 10**9, 1.0)
    blocks = tuple(block(n) for n in range(count))
    return Plan(
        blocks, 1e-2, None, {"batch": 1e-3}, 1e-2, "", cost, cost, Cost(1, None, None), "the logits", "x [1, 2]"
    )


@pytest.mark.parametrize("width", [80, 100])
def test_a_hundred_blocks_fit_on_a_screen(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(deep(100))
    assert len(text.splitlines()) < 25
    assert all(len(line) <= width for line in text.splitlines())
    for name in ("model.layers.0-2 ", "model.layers.3-49 ", "model.layers.50-99 "):
        assert name in text
    assert "459.0 KiB" in text  # 47 blocks of 10,000 bytes
    assert "does not fit" in text


def test_blocks_that_differ_do_not_share_a_row() -> None:
    whole = deep(12)
    blocks = [replace(b, policy=Code(2 if n % 2 else 3)) for n, b in enumerate(whole.blocks)]
    assert sum("model.layers." in line for line in str(replace(whole, blocks=tuple(blocks))).splitlines()) == 12
    names = ["encoder.0", "encoder.1", "decoder.0", "decoder.2", "decoder.3"]
    blocks = [replace(whole.blocks[5], name=name, note="odd" if name == "decoder.0" else "") for name in names]
    text = str(replace(whole, blocks=tuple(blocks)))
    assert "decoder.0: odd." in text
    assert all(name in text for name in ("encoder.0-1 ", "decoder.0 ", "decoder.2-3 "))
