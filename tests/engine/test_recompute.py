"""States from below: exact, by the optimal schedule, in no more slots than were given."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import abyssal
from abyssal import memory
from abyssal.engine import schedule

WIDTH, BATCH = 64, 256
STATE = 4 * WIDTH * BATCH


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.dropout, self.runs = nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.dropout(torch.tanh(self.inner(x)))


def chain(depth: int, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(dropout) for _ in range(depth)])


def gradients(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    model(x).square().sum().backward(**options)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@lru_cache(None)
def fewest(n: int, slots: int) -> int:
    """Runs without a graph, by trying every first state to hold (SCIENCE.md, part 1)."""
    if n == 1 or not slots:
        return n * (n - 1) // 2
    return min(k + fewest(n - k, slots - 1) + fewest(k, slots) for k in range(1, n))


@lru_cache(None)
def scheduled(n: int, slots: int) -> int:
    if n == 1 or not slots:
        return n * (n - 1) // 2
    k = schedule.first_held(n, slots)
    return k + scheduled(n - k, slots - 1) + scheduled(k, slots)


def test_the_schedule_is_the_best_there_is() -> None:
    for n in range(1, 60):
        for slots in range(12):
            assert schedule.runs(n, slots) == scheduled(n, slots) == fewest(n, slots), (n, slots)
            assert len(schedule.held(n, slots)) <= slots


@pytest.mark.parametrize(
    ("depth", "slots"),
    [(1, 3), (2, 1), (5, 1), (12, 4), (32, 7), (80, 12), pytest.param(1000, 16, marks=pytest.mark.slow), (12, None)],
)
def test_blocks_run_as_often_as_the_best_schedule_says(depth: int, slots: int | None) -> None:
    model, x = chain(depth), torch.randn(2, WIDTH, requires_grad=True)
    expected = gradients(model, x)
    abyssal.reconstruct(model, abyssal.Recompute(slots), blocks=list(model))
    most = slots or schedule.fewest_slots(depth)
    for _ in range(3):
        for block in model:
            block.runs = 0
        assert all(map(torch.equal, gradients(model, x), expected))
        assert sum(block.runs for block in model) == depth + fewest(depth, most) - (depth - 1) + depth


@pytest.mark.parametrize(("depth", "slots"), [(12, 3), (32, 7), (80, 12)])
def test_no_more_states_are_alive_than_there_are_slots(depth: int, slots: int) -> None:
    model = abyssal.reconstruct(chain(depth), abyssal.Recompute(slots))
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    gradients(model, x)
    with memory.track() as step:
        loss = model(x).square().sum()
        stored = abyssal.certificate(model).stored_bytes
        loss.backward()
    assert stored <= (slots + 2) * STATE + 128 * 1024
    # Besides: the chain's first input and the last one, and the block at work: its input, three saved, two gradients.
    assert step.peak <= (slots + 2 + 7) * STATE + 2 * 128 * 1024 + sum(p.nbytes for p in model.parameters())


ORDERS = {
    "end": lambda outs: sum(o.sum() for o in outs).backward(),
    "middle first": lambda outs: [outs[4].sum().backward(retain_graph=True), outs[-1].sum().backward()],
    "end first": lambda outs: [outs[-1].sum().backward(retain_graph=True), outs[4].sum().backward()],
    "twice": lambda outs: [outs[-1].sum().backward(retain_graph=True), outs[-1].square().sum().backward()],
    "lowest first": lambda outs: [o.sum().backward(retain_graph=True) for o in outs],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slots", [1, 3])
def test_any_order_of_backward(order: str, slots: int) -> None:
    def run(model: nn.Sequential) -> list[Tensor]:
        torch.manual_seed(2)
        x, outs = torch.randn(3, WIDTH), []
        for block in model:
            x = block(x)
            outs.append(x)
        ORDERS[order](outs)
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = run(chain(10, dropout=0.2))
    model = abyssal.reconstruct(chain(10, dropout=0.2), abyssal.Recompute(slots))
    for _ in range(2):
        assert all(map(torch.equal, run(model), expected))
        model.zero_grad()


def test_double_backward() -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, WIDTH).repeat(2, 1).requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = penalty(chain(8))
    assert all(map(torch.equal, penalty(abyssal.reconstruct(chain(8), abyssal.Recompute(2))), expected))


def test_passes_alive_at_once_hold_states_of_their_own() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        a, b = (model(torch.randn(3, WIDTH)) for _ in range(2))
        a.sum().backward()
        b.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model = abyssal.reconstruct(chain(9, 0.1), abyssal.Recompute(2))
    assert all(map(torch.equal, run(model), run(chain(9, 0.1))))


@pytest.mark.parametrize(
    "others",
    [
        {"0": abyssal.Keep(), "*": abyssal.Recompute(2)},
        {"3": abyssal.Store(), "*": abyssal.Recompute(2)},
        {"[0-4]": abyssal.Recompute(1), "*": abyssal.Keep()},
    ],
    ids=["keep below", "store within", "keep above"],
)
def test_beside_other_exact_policies(others: dict[str, abyssal.Policy]) -> None:
    x = torch.randn(4, WIDTH)
    expected = gradients(chain(9, 0.1), x)
    model = abyssal.reconstruct(chain(9, 0.1), others)
    for _ in range(2):
        assert all(map(torch.equal, gradients(model, x), expected))


@pytest.mark.parametrize("other", [abyssal.Code(8), abyssal.Reverse(4)], ids=str)
def test_beside_policies_that_restore_from_above(other: abyssal.Policy) -> None:
    x = torch.randn(4, WIDTH)
    model = abyssal.reconstruct(chain(9), {"[0-3]": other, "[4-6]": abyssal.Recompute(1), "*": other}, tolerance=1.0)
    alone = abyssal.reconstruct(chain(9), {"[4-6]": abyssal.Keep(), "*": other}, tolerance=1.0)
    for found, expected in zip(gradients(model, x), gradients(alone, x), strict=True):
        assert torch.linalg.vector_norm(found - expected) <= 0.1 * torch.linalg.vector_norm(expected)


class Stage(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, out, 3, stride=out // width, padding=1), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def test_shapes_may_change_and_buffers_are_updated_once() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Stage(4, 4), Stage(4, 8), Stage(8, 8), Stage(8, 16), Stage(16, 16))

    x, plain = torch.randn(2, 4, 16, 16), build()
    model = build()
    abyssal.reconstruct(model, abyssal.Recompute(1), blocks=list(model))
    for _ in range(3):
        assert all(map(torch.equal, gradients(model, x), gradients(plain, x)))
    assert all(map(torch.equal, model.buffers(), plain.buffers()))


def test_a_chain_longer_than_the_model_has_blocks() -> None:
    class Looped(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.blocks, self.times = chain(2), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.blocks(x)
            return x

    x, model = torch.randn(2, WIDTH) / 10, Looped(9)
    expected = gradients(model, x)
    abyssal.reconstruct(model, abyssal.Recompute(3), blocks=list(model.blocks))
    for times in (9, 9, 2, 9):
        model.times = times
        found = gradients(model, x)
        assert times != 9 or all(map(torch.equal, found, expected))


def test_frozen_blocks_and_gradients_as_those_of_checkpointing() -> None:
    x, plain = torch.randn(5, WIDTH), chain(10, 0.3)
    model = abyssal.reconstruct(chain(10, 0.3), abyssal.Recompute(2))
    for frozen in (*plain[:3], *model[:3], plain[6], model[6]):
        frozen.requires_grad_(False)

    def kept(x: Tensor) -> Tensor:
        for block in plain:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    torch.manual_seed(1)
    kept(x).square().sum().backward()
    expected = [p.grad for p in plain.parameters() if p.grad is not None]
    assert all(map(torch.equal, gradients(model, x), expected))


@pytest.mark.parametrize("where", range(5))
def test_a_block_that_differs_from_run_to_run_is_caught(where: int) -> None:
    class Counting(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 0.1 * self.runs)

    model = chain(6)
    model[where] = Counting()
    abyssal.reconstruct(model, abyssal.Recompute(1), blocks=list(model))
    with pytest.warns(abyssal.DriftWarning):
        gradients(model, torch.randn(8, WIDTH))
    assert abyssal.certificate(model).drifted


def test_an_error_leaves_a_step_that_can_be_taken_again() -> None:
    class Breaking(Block):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            if self.broken:
                raise ZeroDivisionError
            return super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(*[Breaking() for _ in range(8)]), torch.randn(2, WIDTH)
    expected = gradients(model, x)
    abyssal.reconstruct(model, abyssal.Recompute(2))
    loss = model(x).square().sum()
    model[1].broken = True
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    model[1].broken = False
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("slots", [0, -1, 1.5, "4"])
def test_slots_are_whole_numbers(slots: Any) -> None:
    with pytest.raises(ValueError, match=r"Recompute\(slots=\.\.\.\)"):
        abyssal.Recompute(slots)
