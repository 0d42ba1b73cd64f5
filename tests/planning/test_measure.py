"""What `measure` finds is what happens, and it leaves no trace."""

from __future__ import annotations

import copy
import random
import warnings
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal import Keep, Reverse, Store, memory
from abyssal.engine.policy import Code, Policy
from abyssal.planning.cost import CostModel
from abyssal.planning.measure import DEFAULT_CANDIDATES, MeasureError, measure
from abyssal.planning.measurements import Measurements
from abyssal.planning.precision import gradient_error
from toys.blocks import Branch, Net, build, data
from toys.trained import GPT, ConvNet, images, lines, trained_gpt

FEW = (Store(), Keep(), Code(2), Code(4), Code(4, refine=1), Reverse(0), Reverse(1))


def squared(output: Tensor) -> Tensor:
    return output.square().mean()


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return trained_gpt(60)


@pytest.fixture(scope="module")
def of_gpt(gpt: GPT) -> Measurements:
    return measure(gpt, lines(1000))


# ------------------------------------------------------------------------------------------------ no trace


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model that a measurement could touch, down to identities and version counters."""
    found: dict[str, Any] = {"random": torch.get_rng_state(), "python": random.getstate()}
    found["numpy"] = np.random.get_state()[1].copy()
    for name, module in model.named_modules():
        found[f"{name}.mode"], found[f"{name}.keys"] = module.training, sorted(module.__dict__)
        found[f"{name}.forward"] = id(module.__dict__.get("forward"))
        found[f"{name}.hooks"] = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[f"{name}.checkpointing"] = getattr(module, "gradient_checkpointing", None)
        for key, buffer in module._buffers.items():
            found[f"{name}.{key}"] = id(buffer), buffer._version, buffer.clone()
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad._version, p.grad.clone())
        found[name] = id(p), p._version, p.requires_grad, p.detach().clone(), grad
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []


def unpatched(model: nn.Module) -> nn.Module:
    return model


def patched(model: nn.Module) -> nn.Module:
    return abyssal.reconstruct(model, Code(4))


def accelerated(model: nn.Module) -> nn.Module:
    """As accelerate's hooks do: an instance's own forward around the patched one."""
    abyssal.reconstruct(model, Code(4))
    block = next(iter(abyssal.find_blocks(model).values()))
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    forward.__wrapped__ = inner  # type: ignore[attr-defined]
    block.forward = forward
    return model


@pytest.mark.parametrize("prepare", [unpatched, patched, accelerated])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_exactly_as_it_was(prepare: Callable[[nn.Module], nn.Module], training: bool) -> None:
    model = prepare(ConvNet(blocks=2)).train(training)
    model(*images(0)).backward()  # gradients to be left alone
    before = everything(model)
    measure(model, images(1), policies=FEW)
    assert_same(before, everything(model))
    model(*images(0)).backward()


def test_a_patched_model_works_on_as_before() -> None:
    model = abyssal.reconstruct(build(), Reverse(4))
    measure(model, data(), squared, policies=FEW)
    squared(model(data())).backward()
    policies = [block.policy for block in abyssal.certificate(model).blocks]
    assert policies == ["Reverse(4)"] * 5 + ["Reverse(4), end"]


class Failing(Branch):
    """Fails in its n-th evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if self.evaluations == self.fail_at:
            raise ArithmeticError("on purpose")
        return super().forward(x)

    fail_at = -1


@pytest.mark.parametrize("fail_at", [0, 1, 2, 5, 9])
def test_a_model_is_left_as_it_was_when_it_fails(fail_at: int) -> None:
    model = build(Failing, depth=3)
    model.blocks[1].fail_at = fail_at
    before = everything(model)
    evaluations = [block.evaluations for block in model.blocks]
    with pytest.raises(ArithmeticError, match="on purpose"):
        measure(model, data(), squared, policies=FEW)
    assert_same(before, everything(model))
    assert [block.evaluations for block in model.blocks] == evaluations


def test_an_optimiser_that_steps_in_the_backward_pass_does_not_step() -> None:
    model = build(depth=3)
    steps: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps.append(1))
    measure(model, data(), squared, policies=FEW)
    assert steps == []
    squared(model(data())).backward()
    assert len(steps) == len(list(model.parameters()))


def test_a_graph_that_is_alive_stays_valid() -> None:
    model = ConvNet(blocks=2).eval()  # its graph saves the running statistics
    loss = model(*images(0))
    measure(model, images(1), policies=FEW)
    loss.backward()


def test_gradients_through_the_batch_are_not_taken() -> None:
    x = data().requires_grad_()
    measure(build(depth=3), x, squared, policies=FEW)
    assert x.grad is None


# ------------------------------------------------------------------------------------------------ figures


def test_increments_and_contractions_are_those_of_the_definition() -> None:
    model, x = build(depth=4), data()
    found = measure(model, x, squared, policies=FEW)
    state = model.stem(x).detach()
    for n, block in enumerate(model.blocks):
        y = block(state).detach()
        refined = y - (block(y).detach() - y)
        measured = found.blocks[n]
        assert measured.increment_ratio == pytest.approx(float((y - state).norm() / state.norm()), rel=1e-9)
        assert measured.contraction == pytest.approx(float((refined - state).norm() / (y - state).norm()), rel=1e-6)
        assert measured.norm == pytest.approx(float(state.norm()), rel=1e-9)
        if n:
            here, before = block(state).detach() - state, model.blocks[n - 1](state).detach() - state
            ratio = float((here - before).norm() / before.norm())
            assert found.blocks[n - 1].regularity == pytest.approx(ratio, rel=1e-9)
        state = y
    assert found.blocks[-1].regularity is None
    assert found.gradient_norm == pytest.approx(float(flat(model, squared(model(x))).norm()), rel=1e-9)


def flat(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("policy", [Reverse(0), Reverse(2)])
def test_state_errors_of_reversal_are_those_of_the_fixed_point(policy: Reverse) -> None:
    model, x = build(depth=4), data()
    found = measure(model, x, squared, policies=(Keep(), policy))
    state = model.stem(x).detach()
    for n, block in enumerate(model.blocks):
        y = block(state).detach()
        s = y
        for _ in range(policy.refine):
            s = y - (block(s).detach() - s)
        candidate = found.blocks[n].candidate(policy)
        assert candidate is not None
        assert candidate.state_error == pytest.approx(float((s - state).norm() / state.norm()), rel=1e-6)
        worst = ((s - state).norm(dim=-1) / state.norm(dim=-1)).max()
        assert candidate.worst_token_error == pytest.approx(float(worst), rel=1e-6)
        handed = y - (block(s).detach() - s)
        assert candidate.handed_error == pytest.approx(float((handed - state).norm() / state.norm()), rel=1e-6)
        state = y


def error_with(model: nn.Module, batch: dict[str, Tensor], policies: dict[str, Policy]) -> float:
    exact = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
    abyssal.reconstruct(model, policies, tolerance=float("inf"))
    try:
        return gradient_error(torch.autograd.grad(model(**batch).loss, list(model.parameters())), exact)
    finally:
        abyssal.release(model)


@pytest.mark.slow
def test_the_share_of_a_block_is_the_error_when_it_alone_is_restored(gpt: GPT, of_gpt: Measurements) -> None:
    """But for what the blocks below make of the error of the cotangent: within a factor of 3, either way."""
    for policy in (Reverse(1), Reverse(2)):
        for block in of_gpt.blocks[1:-1]:
            share = block.candidate(policy).gradient_share
            found = error_with(gpt, lines(1000), {block.name: policy})
            assert share / 3 < found < share * 3, (block.name, policy)


@pytest.mark.parametrize("policy", [Code(2), Code(3), Code(4), Code(8), Code(2, refine=1), Reverse(1), Reverse(2)])
@pytest.mark.parametrize("kept", [1, 2])
def test_the_cost_model_predicts_a_whole_choice(gpt: GPT, of_gpt: Measurements, policy: Policy, kept: int) -> None:
    """The error within a factor of 4; bytes to a 50th; the peak to a 20th."""
    costs = CostModel(of_gpt)
    names = [block.name for block in of_gpt.blocks]
    policies: dict[str, Policy] = {name: Keep() if n < kept else policy for n, name in enumerate(names)}
    estimate = costs.of(policies)
    found = error_with(gpt, lines(1000), policies)
    assert estimate.error / 4 < found < estimate.error * 4
    abyssal.reconstruct(gpt, policies, tolerance=float("inf"))
    try:
        peak = step_peak(gpt, lines(1000))
        stored = abyssal.certificate(gpt).stored_bytes
    finally:
        abyssal.release(gpt)
    assert estimate.stored_bytes == pytest.approx(stored, rel=0.02)
    assert estimate.peak_bytes == pytest.approx(peak, rel=0.05)


def step_peak(model: nn.Module, batch: dict[str, Tensor]) -> int:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with memory.track() as usage:
        model(**batch).loss.backward()
    model.zero_grad()
    return usage.peak


def test_the_cost_model_predicts_plain_training_too(gpt: GPT, of_gpt: Measurements) -> None:
    costs = CostModel(of_gpt)
    for count in (0, 3, 6):
        policies: dict[str, Policy] = {
            block.name: Keep() if n < count else Store() for n, block in enumerate(of_gpt.blocks)
        }
        estimate = costs.of(policies)
        abyssal.reconstruct(gpt, policies)
        try:
            assert estimate.peak_bytes == pytest.approx(step_peak(gpt, lines(1000)), rel=0.05)
        finally:
            abyssal.release(gpt)
        assert estimate.error == 0.0
    assert of_gpt.plain_peak_bytes == pytest.approx(step_peak(gpt, lines(1000)), rel=0.01)


@pytest.mark.slow
def test_codes_between_the_measured_bits_are_scaled_well(gpt: GPT) -> None:
    """3 and 6 bits from 2, 4 and 8: within a third of what their own products give."""
    from abyssal.planning import candidates

    scaled = measure(gpt, lines(1000), policies=(Keep(), *(Code(b) for b in (1, 2, 3, 4, 6, 8))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "MEASURED_BITS", {0: (1, 2, 3, 4, 6, 8)})
        measured = measure(gpt, lines(1000), policies=(Keep(), *(Code(b) for b in (1, 2, 3, 4, 6, 8))))
    for a, b in zip(scaled.blocks[1:], measured.blocks[1:], strict=True):
        for bits in (3, 6):
            one, other = a.candidate(Code(bits)), b.candidate(Code(bits))
            assert not one.measured and other.measured
            assert one.state_error == other.state_error
            assert one.gradient_share == pytest.approx(other.gradient_share, rel=1 / 3)


def test_what_plain_autograd_stores_is_counted(gpt: GPT, of_gpt: Measurements) -> None:
    """Of a layer: the growth of live bytes over its forward pass, less its output and plus its input."""
    x = torch.randn(8, 32, 64, requires_grad=True)
    with memory.track() as usage:
        y = gpt.layers[2](x)
    assert of_gpt.blocks[2].activation_bytes == usage.end - y.nbytes + x.nbytes


def test_the_default_candidates_are_all_there(of_gpt: Measurements) -> None:
    for block in of_gpt.blocks:
        assert [c.policy for c in block.candidates] == list(DEFAULT_CANDIDATES)
        assert block.candidate(Keep()).stored_bytes == block.stream_bytes
        assert block.candidate(Store()).seconds < block.candidate(Keep()).seconds


def test_the_error_of_bfloat16_is_that_of_autocast(gpt: GPT, of_gpt: Measurements) -> None:
    exact = torch.autograd.grad(gpt(**lines(1000)).loss, list(gpt.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(**lines(1000)).loss
    found = torch.autograd.grad(loss, list(gpt.parameters()))
    assert of_gpt.bf16_error == pytest.approx(gradient_error(found, exact), rel=1e-3)


@pytest.mark.slow
def test_a_bfloat16_model_is_held_against_its_float32_copy(gpt: GPT) -> None:
    low = copy.deepcopy(gpt).bfloat16()
    found = measure(low, lines(1000), policies=FEW)
    high = copy.deepcopy(low).float()
    exact = torch.autograd.grad(high(**lines(1000)).loss, list(high.parameters()))
    own = torch.autograd.grad(low(**lines(1000)).loss, list(low.parameters()))
    assert found.bf16_error == pytest.approx(gradient_error(own, exact), rel=1e-3)
    assert measure(build(depth=2), data(), squared, policies=FEW).bf16_reason  # float64: left alone by autocast


# ------------------------------------------------------------------------------------------------ awkward models


def measured(model: nn.Module, batch: Any, loss: Any = squared, **options: Any) -> Measurements:
    return measure(model, batch, loss, policies=FEW, **options)


def test_two_stages_are_two_chains() -> None:
    found = measure(ConvNet(blocks=2), images(1), policies=FEW)
    assert found.chains == (("stage1.0", "stage1.1"), ("stage2.0", "stage2.1"))
    assert [block.chain for block in found.blocks] == [0, 0, 1, 1]
    assert all(block.jumps and "differ widely from batch to batch" in block.notes[0] for block in found.blocks)
    assert found.blocks[0].candidate(Code(4)).state_error == 0.0  # the first of its chain
    assert found.blocks[1].candidate(Code(4)).state_error > 0.0


def test_dropout_draws_the_same_masks() -> None:
    """Otherwise every error would be of the size of the gradient."""
    model = GPT(layers=3, dropout=0.2)
    found = measure(model, lines(0), policies=FEW)
    assert all(block.candidate(Reverse(1)).gradient_share < 0.05 for block in found.blocks[1:])
    assert all(block.surroundings_bytes > 0 for block in found.blocks)


class Random(Branch):
    """Draws from a generator of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + random.random()


def test_a_block_that_returns_something_else_each_time_can_only_be_stored() -> None:
    model = build(depth=4)
    model.blocks[2] = Random().double()
    found = measured(model, data(), blocks=list(model.blocks))
    block = found.blocks[2]
    assert [c.policy for c in block.candidates] == [Store()]
    assert "random" in block.notes[0]
    assert len(found.blocks[1].candidates) == len(FEW)


class PostNorm(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def test_a_block_that_ends_in_a_norm_is_not_offered_reversal() -> None:
    found = measured(build(PostNorm, depth=3), data())
    for block in found.blocks:
        assert {type(c.policy) for c in block.candidates} == {Store, Keep, Code}
        assert "LayerNorm" in block.notes[0]


class Routed(Branch):
    def forward(self, x: Tensor) -> Tensor:
        best = x.topk(1, dim=-1).indices
        return super().forward(x) + 0.01 * best


def test_a_block_that_routes_is_kept_or_stored() -> None:
    found = measured(build(Routed, depth=3), data())
    assert [c.policy for c in found.blocks[1].candidates] == [Store(), Keep()]
    assert "routes discretely (topk)" in found.blocks[1].notes[0]


def test_tied_blocks_count_all_their_calls() -> None:
    model = build(depth=1)

    def thrice(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        for _ in range(3):
            x = net.blocks[0](x)
        return x

    model.join = thrice
    found = measured(model, data(), blocks=list(model.blocks))
    (block,) = found.blocks
    assert block.calls == 3 and block.stream_bytes == 3 * data().nbytes
    assert found.chains == (("blocks.0",) * 3,)
    exact = flat(model, squared(model(data())))
    abyssal.reconstruct(model, Reverse(1), blocks=list(model.blocks), tolerance=float("inf"))
    error = float((flat(model, squared(model(data()))) - exact).norm() / exact.norm())
    abyssal.release(model)
    expected = CostModel(found).of({"blocks.0": Reverse(1)}).error
    assert expected / 4 < error < expected * 4


class TwoOutputs(Branch):
    """Takes its stream by keyword, and a mask; returns a tuple."""

    def forward(self, mask: Tensor | None = None, *, hidden: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(hidden)
        return y * (1 if mask is None else mask), y.mean()


def test_streams_by_keyword_and_outputs_in_tuples_are_found() -> None:
    def join(net: Net, x: Tensor) -> Tensor:
        x, total = net.stem(x), 0.0
        for block in net.blocks:
            x, mean = block(hidden=x)
            total = total + mean
        return x + total

    model = build(TwoOutputs, depth=3, join=join)
    found = measured(model, data())
    assert found.chains == (("blocks.0", "blocks.1", "blocks.2"),)
    assert found.blocks[1].candidate(Reverse(1)).state_error < 0.01


def test_frozen_parameters_and_a_stem_without_gradients() -> None:
    model = build(depth=4)
    for part in (model.stem, model.blocks[0], model.blocks[2]):
        part.requires_grad_(False)
    found = measured(model, data())
    assert found.gradient_norm > 0.0
    assert found.blocks[0].candidate(Reverse(1)).gradient_share == 0.0  # nothing below it, nothing of its own
    assert found.blocks[3].candidate(Reverse(1)).gradient_share > 0.0


def test_a_block_that_is_not_called_and_one_that_the_loss_ignores() -> None:
    def join(net: Net, x: Tensor) -> Tensor:
        x = net.blocks[1](net.blocks[0](net.stem(x)))
        net.blocks[2](x)
        return x

    model = build(depth=4, join=join)
    found = measured(model, data())
    notes = {block.name: block.notes for block in found.blocks}
    assert notes["blocks.3"] == ("not called",)
    assert notes["blocks.2"] == ("not on the way to the loss",)
    assert notes["blocks.1"] == ()


# ------------------------------------------------------------------------------------------------ errors


def test_an_output_without_a_loss_is_refused_with_what_to_do() -> None:
    model = build(depth=2)
    with pytest.raises(TypeError, match=r"returned a tensor of shape \[5, 3\].*Pass loss="):
        measure(model, data())
    with pytest.raises(TypeError, match=r"loss\(output\) is a tensor of shape \[5, 3\]; expected a scalar"):
        measure(model, data(), lambda output: output)
    with pytest.raises(TypeError, match="does not depend on any parameter"):
        measure(model, data(), lambda output: output.detach().sum())
    with pytest.raises(TypeError, match=r"expected a dictionary of keyword arguments, a tuple .* got int"):
        measure(model, 3, squared)


def test_losses_are_taken_from_objects_dictionaries_and_scalars() -> None:
    model = build(depth=2)
    norm = measured(model, data()).gradient_norm

    class Around(nn.Module):
        def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.model, self.wrap = model, wrap

        def forward(self, x: Tensor) -> Any:
            return self.wrap(squared(self.model(x)))

    for wrap in (lambda v: v, lambda v: {"loss": v}, lambda v: SimpleNamespace(loss=v)):
        assert measured(Around(wrap), (data(),), None).gradient_norm == pytest.approx(norm, rel=1e-12)


def test_any_mapping_is_a_batch_of_keyword_arguments() -> None:
    """As transformers' BatchEncoding is, which is no dict."""
    found = measure(GPT(layers=2), UserDict(lines(0)), policies=FEW)
    assert found.batch == "input_ids [8, 32], labels [8, 32]"


def test_a_gradient_of_zero_is_refused() -> None:
    with pytest.raises(MeasureError, match="gradient of this batch is zero"):
        measured(build(depth=2), data(), lambda output: 0.0 * output.sum())
    with pytest.raises(MeasureError, match="gradient of this batch is not finite"):
        measured(build(depth=2), data() * float("inf"))


def test_nothing_is_said_while_measuring() -> None:
    model = build(depth=3)
    model.blocks[1] = Random().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(model, data(), blocks=list(model.blocks))


def test_progress_is_told_of_every_block() -> None:
    told: list[tuple[str, int, int]] = []
    measured(build(depth=3), data(), progress=lambda *what: told.append(what))
    assert [what[1:] for what in told if what[0] == "blocks"] == [(1, 3), (2, 3), (3, 3)]


def test_gradients_may_be_off_around_it() -> None:
    with torch.no_grad():
        found = measured(build(depth=2), data())
    assert found.gradient_norm > 0.0
