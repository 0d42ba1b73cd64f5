"""Random state, buffers, modes and autocast: every evaluation sees what the forward pass saw, and leaves no trace."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal.models.patch import patches
from toys.blocks import TO_ROUNDING, Branch, build, data, flat_gradients, one_step, relative, same_gradients, twins

POLICIES = [abyssal.Keep(), TO_ROUNDING]
both = pytest.mark.parametrize("policy", POLICIES, ids=str)


class Dropping(Branch):
    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(torch.tanh(self.first(x)), 0.3, self.training)
        return x + self.scale * nn.functional.dropout(self.second(hidden), 0.3, self.training)


class Normed(nn.Module):
    def __init__(self, width: int = 12, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width, momentum=momentum), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.05 * torch.tanh(self.linear(self.norm(x)))


class Spectral(Branch):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.first)


class Counting(Branch):
    """Changes a buffer by reassignment, another in place; uses both."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("replaced", torch.ones(()))
        self.register_buffer("added_to", torch.ones(()))
        self.register_buffer("untouched", torch.ones(3))
        self.register_buffer("missing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = self.replaced + 1
        self.added_to += 1
        return x + (self.scale / self.replaced / self.added_to) * torch.tanh(self.first(x))


@both
def test_dropout_masks_are_the_same_in_every_evaluation(policy: abyssal.Policy) -> None:
    same_gradients(build(block=Dropping), policy, lambda m: one_step(m, data()))


@both
def test_the_random_state_after_a_step_is_as_without_us(policy: abyssal.Policy) -> None:
    plain, ours = twins(build(block=Dropping), policy)
    states = []
    for model in (plain, ours):
        torch.manual_seed(3)
        one_step(model, data())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_random_states_are_kept_for_blocks_that_draw_and_no_others() -> None:
    state = torch.get_rng_state().nbytes
    for block, expected in ((Branch, 0), (Dropping, state)):
        model = build(block=block)
        abyssal.reconstruct(model, abyssal.Keep(), blocks=list(model.blocks))
        for _ in range(20):  # past the first passes, in which every output is sampled
            one_step(model, data())
        for entry in abyssal.certificate(model).blocks:
            assert entry.stored_bytes - data().nbytes - expected in (0, 64 * 8)


@both
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_statistics_move_once_per_step(policy: abyssal.Policy, momentum: float | None) -> None:
    plain, ours = twins(build(block=lambda: Normed(momentum=momentum)), policy)
    for step in range(3):
        true, found = one_step(plain, data(seed=step)), one_step(ours, data(seed=step))
        assert relative(found, true) < 1e-10
        for (name, a), (_, b) in zip(plain.named_buffers(), ours.named_buffers(), strict=True):
            assert torch.equal(a, b), name
    assert int(ours.blocks[0].norm.num_batches_tracked) == 3


@both
def test_batchnorm_in_eval_mode(policy: abyssal.Policy) -> None:
    model = build(block=Normed)
    one_step(model, data())
    same_gradients(model.eval(), policy, lambda m: one_step(m, data()))


@both
def test_spectral_norm(policy: abyssal.Policy) -> None:
    plain, ours = twins(build(block=Spectral), policy)
    for step in range(3):
        assert relative(one_step(ours, data(seed=step)), one_step(plain, data(seed=step))) < 1e-10
        for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
            assert torch.equal(a, b)


@both
def test_buffers_reassigned_or_changed_in_place(policy: abyssal.Policy) -> None:
    plain, ours = twins(build(block=Counting), policy)
    for step in range(3):
        assert relative(one_step(ours, data(seed=step)), one_step(plain, data(seed=step))) < 1e-11
    assert float(ours.blocks[2].replaced) == float(plain.blocks[2].replaced) == 4
    assert float(ours.blocks[2].added_to) == 4


@both
def test_buffers_after_double_backward_and_retained_graphs(policy: abyssal.Policy) -> None:
    def both_orders(model: nn.Module) -> Tensor:
        parameters = list(model.parameters())
        loss = model(data()).square().mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in (*second, *torch.autograd.grad(loss, parameters))])

    plain, ours = twins(build(block=Normed), policy)
    assert relative(both_orders(ours), both_orders(plain)) < 1e-9
    for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_large_buffer_that_starts_to_change_late_is_refused_not_silently_doubled() -> None:
    class Late(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("large", torch.zeros(100_000))
            self.late = False

        def forward(self, x: Tensor) -> Tensor:
            if self.late:
                self.large += 1
            return super().forward(x) + self.large[0]

    plain, ours = twins(build(block=Late, depth=2), abyssal.Keep())
    for model in (plain, ours):
        one_step(model, data())
        for block in model.blocks:
            block.late = True
    with pytest.raises(RuntimeError, match=r"large.*run the step again"):
        one_step(ours, data())
    with pytest.raises(RuntimeError, match=r"large.*run the step again"):
        one_step(ours, data())  # the second block learns, too
    for model in (plain, ours):
        for block in model.blocks:
            block.large.zero_()
    assert torch.equal(one_step(ours, data()), one_step(plain, data()))
    assert float(ours.blocks[0].large[0]) == 1


@both
def test_modes_changed_between_forward_and_backward(policy: abyssal.Policy) -> None:
    def switched(model: nn.Module) -> Tensor:
        model.zero_grad()
        model.train()
        loss = model(data()).square().mean()
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        return flat_gradients(model)

    for block in (Dropping, Normed):
        same_gradients(build(block=block), policy, switched, bound=1e-10)


@both
def test_train_and_eval_modes_are_untouched(policy: abyssal.Policy) -> None:
    model = build(block=Dropping)
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    abyssal.reconstruct(model, policy, blocks=list(model.blocks))
    one_step(model, data())
    assert [module.training for module in model.modules()] == before


class Contracting(nn.Module):
    """A branch with a normalisation, as transformers have; contracts in bfloat16, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.linear(self.norm(x)))


def autocast_step(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    return flat_gradients(model)


def test_autocast_is_the_same_in_recomputation() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*[Contracting() for _ in range(5)])
    ours = abyssal.reconstruct(copy.deepcopy(plain), abyssal.Keep())
    x = torch.randn(8, 32)
    assert torch.equal(autocast_step(ours, x), autocast_step(plain, x))


def test_restoring_under_autocast_does_not_lose_weight_gradients() -> None:
    """A weight cast to bfloat16 without a graph must not stay in autocast's cache for the gradient's evaluation."""
    torch.manual_seed(0)
    plain = nn.Sequential(*[Contracting() for _ in range(5)])
    ours = abyssal.reconstruct(copy.deepcopy(plain), abyssal.Reverse(refine=3))
    x = torch.randn(8, 32)
    true, found = autocast_step(plain, x), autocast_step(ours, x)
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert q.grad is not None and relative(q.grad, p.grad) < 2**-7, name  # two roundings to bfloat16
    assert relative(found, true) < 2**-8


def test_out_of_order_restoration_uses_each_blocks_own_autocast_state() -> None:
    seen: dict[int, set[bool]] = {}

    class Watching(Contracting):
        def forward(self, x: Tensor) -> Tensor:
            seen.setdefault(id(self), set()).add(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    torch.manual_seed(0)
    net = nn.Sequential(*[Watching() for _ in range(4)])
    abyssal.reconstruct(net, abyssal.Reverse(refine=2))
    h, states = torch.randn(8, 32), []
    for i, block in enumerate(net):
        with torch.autocast("cpu", torch.bfloat16, enabled=i >= 2):
            h = block(h)
        states.append(h)
    states[0].square().mean().backward(retain_graph=True)  # restores blocks 3 and 2 from within block 1's turn
    states[-1].square().mean().backward()
    assert abyssal.certificate(net).chains == 1
    assert [seen[id(block)] for block in net] == [{False}, {False}, {True}, {True}]


def test_an_exception_in_a_block_leaves_everything_as_it_was() -> None:
    class Fails(Normed):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self.fail:
                raise ValueError("told to")
            return out

    plain, ours = twins(build(block=Fails), TO_ROUNDING)
    Fails.fail = True
    try:
        with pytest.raises(ValueError, match="told to"):
            one_step(ours, data())
    finally:
        Fails.fail = False
    ours.load_state_dict(plain.state_dict())
    assert relative(one_step(ours, data()), one_step(plain, data())) < 1e-10
    for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy", [abyssal.Keep(), TO_ROUNDING, abyssal.Code(8)], ids=str)
@pytest.mark.parametrize("needed", [True, False])
def test_weights_frozen_or_thawed_between_forward_and_backward(policy: abyssal.Policy, needed: bool) -> None:
    """Width and batch are the same: what is saved of frozen weights would pass for what is saved of others."""

    def step(model: nn.Module) -> Tensor:
        for passes in range(2):  # in the second, the blocks' outputs are not compared
            x = data(12).requires_grad_()
            model.blocks.requires_grad_(not needed)
            loss = model(x).square().sum()
            if passes:
                model.blocks.requires_grad_(needed)
            loss.backward()
            assert all(p.requires_grad is (needed if passes else not needed) for p in model.blocks.parameters())
        return torch.cat([x.grad.flatten(), flat_gradients(model)])

    same_gradients(build(), policy, step, bound=1e-3 if policy == abyssal.Code(8) else 1e-11)


@both
def test_weights_replaced_between_forward_and_backward(policy: abyssal.Policy) -> None:
    def step(model: nn.Module) -> Tensor:
        x = data().requires_grad_()
        loss = model(x).square().sum()
        new = model.blocks[2].first.weight = nn.Parameter(2 * model.blocks[2].first.weight.detach())
        loss.backward()
        assert model.blocks[2].first.weight is new
        return x.grad

    same_gradients(build(), policy, step)


@both
def test_weights_that_functional_call_put_in_their_place(policy: abyssal.Policy) -> None:
    """Fast weights, made of the model's own by a graph."""

    def step(model: nn.Module) -> Tensor:
        model.zero_grad()
        fast = {name: 2 * p for name, p in model.named_parameters()}
        torch.func.functional_call(model, fast, (data(),)).square().sum().backward()
        return flat_gradients(model)

    same_gradients(build(), policy, step)


@pytest.mark.parametrize("how", ["released", "paused", "without the inner ones"])
def test_inner_blocks_run_again_as_they_ran(how: str) -> None:
    class Outer(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Branch()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.inner(x))

    def step(model: nn.Module) -> Tensor:
        for passes in range(2):
            x = data(12).requires_grad_()
            loss = model(x).square().sum()
            if passes and how == "released":
                abyssal.release(model)
            if passes and how == "without the inner ones" and patches(model):
                abyssal.reconstruct(model, abyssal.Keep(), blocks=list(model.blocks))
            with abyssal.paused(model) if passes and how == "paused" else nullcontext():
                loss.backward()
        return x.grad

    plain, ours = build(block=Outer), build(block=Outer)
    abyssal.reconstruct(ours, abyssal.Keep(), blocks=["blocks.*", "blocks.*.inner"])
    assert torch.equal(step(ours), step(plain))
