"""On a CUDA device: gradients, random state, autocast, memory. `make gpu` runs these; none has run there yet."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import abyssal
from toys.distributed import relative_error

pytestmark = pytest.mark.cuda

WIDTH, DEPTH = 256, 12


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inside = nn.functional.dropout(nn.functional.gelu(self.inner(self.norm(x))), 0.1, self.training)
        return x + 0.1 * self.outer(inside)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Branch() for _ in range(DEPTH)]).cuda()


def gradients(model: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(x).float().square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("policy", "allowed"),
    [(abyssal.Keep(), 1e-6), (abyssal.Keep(device="cpu"), 1e-6), (abyssal.Code(8), 1e-2), (abyssal.Reverse(3), 1e-2)],
    ids=str,
)
def test_gradients_and_what_is_drawn_are_plain_ones(policy: abyssal.Policy, allowed: float, autocast: bool) -> None:
    plain, x = network(), torch.randn(64, WIDTH, device="cuda")
    ours = copy.deepcopy(plain)
    abyssal.reconstruct(ours, policy, blocks=list(ours))
    expected = gradients(plain, x, autocast)
    drawn = torch.rand(1, device="cuda")
    found = gradients(ours, x, autocast)
    assert relative_error(found, expected) <= allowed * (10 if autocast else 1)
    assert torch.equal(torch.rand(1, device="cuda"), drawn)


def test_the_peak_is_below_checkpointings() -> None:
    def peak(step: Callable[[], Tensor]) -> int:
        step().backward()
        torch.cuda.reset_peak_memory_stats()
        step().backward()
        return torch.cuda.max_memory_allocated()

    model, x = network(), torch.randn(8192, WIDTH, device="cuda")

    def checkpointed() -> Tensor:
        h = x
        for block in model:
            h = checkpoint(block, h, use_reentrant=False)
        return h.square().mean()

    theirs = peak(checkpointed)
    abyssal.reconstruct(model, abyssal.Code(4), blocks=list(model))
    assert peak(lambda: model(x).square().mean()) < theirs
