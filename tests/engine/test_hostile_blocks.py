"""Blocks and calls that break assumptions: exact, kept with a note, caught, or refused; never silently wrong."""

from __future__ import annotations

import gc
import random
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal.profiling.track import track
from toys.blocks import (
    EXACT,
    TO_ROUNDING,
    Branch,
    Net,
    build,
    data,
    flat_gradients,
    one_step,
    relative,
    same_gradients,
    twins,
)

both = pytest.mark.parametrize("policy", [abyssal.Keep(), TO_ROUNDING], ids=str)


class SwitchesGradientsOn(Branch):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return super().forward(x)


@pytest.mark.parametrize("policy", [abyssal.Keep(), abyssal.Reverse(0), TO_ROUNDING, abyssal.PaperAdjoint()], ids=str)
def test_a_block_that_switches_gradients_on_is_evaluated_where_it_should_be(policy: abyssal.Policy) -> None:
    bound = {TO_ROUNDING: EXACT, abyssal.Keep(): 0.0}.get(policy, 1e-1)
    plain, ours = twins(build(block=SwitchesGradientsOn), policy, tolerance=1.0)
    reference = build()
    abyssal.reconstruct(reference, policy, blocks=list(reference.blocks), tolerance=1.0)
    found = one_step(ours, data())
    assert relative(found, one_step(plain, data())) <= bound
    assert torch.equal(found, one_step(reference, data()))  # the same as of the block that does not


@both
def test_tensors_that_a_block_leaves_on_itself_stay_those_of_the_forward_pass(policy: abyssal.Policy) -> None:
    class LeavesAux(Branch):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.aux = out.square().mean()
            return out

    def step(model: Net) -> Tensor:
        model.zero_grad()
        model(data()).sum().backward(retain_graph=True)
        sum(block.aux for block in model.blocks).backward()
        return flat_gradients(model)

    same_gradients(build(block=LeavesAux), policy, step)


def test_a_random_block_at_the_end_of_a_chain_is_caught() -> None:
    class PythonNoise(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return x + random.random() * torch.tanh(self.first(x))

    model = build(depth=4)
    model.blocks[3] = PythonNoise().double()
    abyssal.reconstruct(model, abyssal.Reverse(3), blocks=list(model.blocks))
    with pytest.warns(abyssal.DriftWarning, match=r"blocks\.3.*random"):
        one_step(model, data())
    assert "blocks.3" in abyssal.certificate(model).drifted


def test_streams_of_a_tensor_subclass_are_kept_since_they_cannot_be_measured() -> None:
    class Marked(Tensor):
        pass

    def join(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x).as_subclass(Marked)
        for block in net.blocks:
            h = block(h)
        return h.as_subclass(Tensor)

    certificate = same_gradients(build(join=join), abyssal.Reverse(0), lambda m: one_step(m, data()))
    assert "Marked" in certificate.blocks[0].note


def test_infinities_of_the_forward_pass_are_told_and_not_certified() -> None:
    def join(net: Net, x: Tensor) -> Tensor:
        h = torch.cat([net.stem(x)[:, :11], torch.full((x.shape[0], 1), -torch.inf, dtype=x.dtype)], dim=1)
        for block in net.blocks:
            h = block(h)
        return h[:, :11] @ net.head.weight[:, :11].T

    class Masked(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.second(torch.tanh(self.first(x.clamp(min=-10.0))))

    model = build(block=Masked, join=join)
    model.head = nn.Linear(12, 12).double()
    model.forward = lambda x: join(model, x)  # type: ignore[method-assign]
    abyssal.reconstruct(model, abyssal.Reverse(2), blocks=list(model.blocks))
    with pytest.warns(UserWarning, match="infinite or undefined"):
        model(data()).square().mean().backward()
    certificate = abyssal.certificate(model)
    assert certificate.error is None and "not certified" in certificate.blocks[0].note


def test_drift_is_seen_in_every_pass_of_a_stem_that_is_computed_once() -> None:
    model = build(depth=4)
    abyssal.reconstruct(model, abyssal.Reverse(2), blocks=list(model.blocks))
    stem = model.stem(data())

    def run() -> None:
        h = stem
        for block in model.blocks:
            h = block(h)
        h.sum().backward(retain_graph=True)

    for _ in range(50):
        run()
    certificate = abyssal.certificate(model)
    assert certificate.chains == 1 and [b.calls for b in certificate.blocks] == [1] * 4
    for block in model.blocks:
        block.scale = 20.0
    with pytest.warns(abyssal.DriftWarning):
        run()


@both
def test_local_losses_with_a_step_in_between(policy: abyssal.Policy) -> None:
    """Greedy training: each block's weights move before the block below runs its backward pass."""

    def step(model: Net) -> Tensor:
        h, losses = model.stem(data()).detach(), []
        for block in model.blocks:
            h = block(h.detach())
            losses.append(h.square().mean())
        for block, loss in zip(reversed(model.blocks), reversed(losses), strict=True):
            block.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in block.parameters():
                    p -= 0.1 * p.grad
        return flat_gradients(model)

    same_gradients(build(), policy, step)


@both
def test_weights_changed_before_the_backward_pass_are_refused(policy: abyssal.Policy) -> None:
    model = build()
    abyssal.reconstruct(model, policy, blocks=list(model.blocks))
    loss = model(data()).sum()
    with torch.no_grad():
        model.blocks[3].first.weight += 0.1
    with pytest.raises(RuntimeError, match=r"parameter of block 'blocks\.3'.*changed in place"):
        loss.backward()


@both
def test_steps_taken_within_the_backward_pass(policy: abyssal.Policy) -> None:
    def step(model: Net) -> Tensor:
        def descend(p: Tensor) -> None:
            with torch.no_grad():
                p -= 0.1 * p.grad

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(descend)
        model(data()).square().mean().backward()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    same_gradients(build(), policy, step)


@both
def test_conjugate_views_are_no_links(policy: abyssal.Policy) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 12, dtype=torch.complex128) * 0.05)

        def forward(self, x: Tensor) -> Tensor:
            return x + x @ self.weight

    def step(model: nn.ModuleList) -> Tensor:
        model.zero_grad()
        h = torch.complex(data(), data(seed=2))
        for block in model:
            h = block(h).conj()
        h.abs().square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.manual_seed(0)
    model = nn.ModuleList([Complex() for _ in range(4)])
    true = step(model)
    abyssal.reconstruct(model, policy)
    assert relative(torch.view_as_real(step(model)), torch.view_as_real(true)) < EXACT


@both
def test_one_tensor_in_several_places_stays_one(policy: abyssal.Policy) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return query + 0.05 * self.attention(query, key, value, need_weights=False)[0]

    def own(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x).unsqueeze(0)
        for block in net.blocks:
            h = block(h, h, h)
        return h[0]

    def memory(net: Net, x: Tensor) -> Tensor:
        h, other = net.stem(x).unsqueeze(0), net.stem(x.flip(0)).unsqueeze(0)
        for block in net.blocks:
            h = block(h, other, other)
        return h[0]

    for join in (own, memory):
        same_gradients(build(block=Attends, join=join), policy, lambda m: one_step(m, data()))


@both
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(policy: abyssal.Policy, batch: int) -> None:
    def step(model: Net) -> Tensor:
        model.zero_grad()
        (model(data(batch=batch)).sum() + sum(p.square().sum() for p in model.parameters())).backward()
        return flat_gradients(model)

    same_gradients(build(), policy, step)


@both
def test_sparse_buffers_and_arguments(policy: abyssal.Policy) -> None:
    class Graph(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(5, dtype=torch.float64).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.adjacency @ x)

    class Given(Branch):
        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(adjacency @ x)

    def join(net: Net, x: Tensor) -> Tensor:
        adjacency, h = torch.eye(5, dtype=x.dtype).to_sparse(), net.stem(x)
        for block in net.blocks:
            h = block(adjacency, h)
        return h

    same_gradients(build(block=Graph), policy, lambda m: one_step(m, data()))
    same_gradients(build(block=Given, join=join), policy, lambda m: one_step(m, data()))


@both
def test_a_module_registered_twice_with_a_buffer_that_changes(policy: abyssal.Policy) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.BatchNorm1d(12)
            self.two = self.one
            self.register_buffer("large", torch.zeros(100_000))

        def forward(self, x: Tensor) -> Tensor:
            self.large += 1
            return x + 0.05 * torch.tanh(self.two(self.one(x)))

    plain, ours = twins(build(block=Twice, depth=3), policy)
    for _ in range(3):
        assert relative(one_step(ours, data()), one_step(plain, data())) < 1e-10
    for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_block_that_needs_gradients_in_its_forward_is_named() -> None:
    class Hooks(Branch):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            hidden.register_hook(lambda g: g)
            return x + self.scale * self.second(torch.tanh(hidden))

    same_gradients(build(block=Hooks), abyssal.Keep(), lambda m: one_step(m, data()))
    model = build(block=Hooks)
    abyssal.reconstruct(model, abyssal.Reverse(1), blocks=list(model.blocks))
    with pytest.raises(RuntimeError) as caught:
        one_step(model, data())
    assert any("'blocks.4'" in note and "Keep()" in note for note in caught.value.__notes__)


def test_a_stream_that_starts_at_zero_is_no_drift() -> None:
    def join(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x) * 0
        for block in net.blocks:
            h = block(h)
        return h

    with warnings.catch_warnings():
        warnings.simplefilter("error", abyssal.DriftWarning)
        certificate = same_gradients(build(join=join), TO_ROUNDING, lambda m: one_step(m, data()))
    assert certificate.error < 1e-12


def test_meta_tensors_pass_through() -> None:
    model = build().to("meta")
    for policy in (abyssal.Keep(), abyssal.Reverse(1)):
        abyssal.reconstruct(model, policy, blocks=list(model.blocks))
        model(data().to("meta")).sum().backward()
        assert model.stem.weight.grad.shape == (12, 12)


def test_fake_tensors_pass_through() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = Net()
        abyssal.reconstruct(model, abyssal.Reverse(1), blocks=list(model.blocks))
        model(torch.randn(5, 12)).sum().backward()
        assert model.stem.weight.grad.shape == (12, 12)


@both
def test_a_static_forward(policy: abyssal.Policy) -> None:
    class Static(nn.Module):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x + 0.1 * torch.sin(x)

    same_gradients(build(block=Static), policy, lambda m: one_step(m, data()))


def test_a_reverse_step_that_means_something_else_is_refused() -> None:
    class Other(Branch):
        def reverse_step(self, y: Tensor) -> Tensor:
            return y.sum()

    model = build(block=Other)
    abyssal.reconstruct(model, abyssal.Reverse(1), blocks=list(model.blocks))
    with pytest.raises(RuntimeError, match=r"blocks\.4.*reverse_step"):
        one_step(model, data())


def test_data_parallel_is_refused() -> None:
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        abyssal.reconstruct(nn.DataParallel(build()), abyssal.Keep())


@dataclass(slots=True)
class Slotted:
    tensor: Tensor


@pytest.mark.parametrize(
    "wrap", [Slotted, lambda t: [lambda: t], lambda t: {"deep": Slotted(t)}], ids=["slots", "closure", "deep"]
)
def test_hidden_graph_connected_tensors_do_not_keep_the_graph_alive(wrap) -> None:
    class Given(Branch):
        def forward(self, x: Tensor, extra: object) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    model = build(block=Given)
    abyssal.reconstruct(model, abyssal.Reverse(1), blocks=list(model.blocks))

    def forward() -> None:
        h = model.stem(data())
        extra = wrap(h * 2)
        for block in model.blocks:
            h = block(h, extra)

    forward()
    gc.collect()
    gc.disable()
    try:
        with track() as memory:
            for _ in range(20):
                forward()
        assert memory.end == 0
    finally:
        gc.enable()
