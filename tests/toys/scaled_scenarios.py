"""What each of two gloo processes does in test_apply.py: train a scaled network under a wrapper and without."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from abyssal.nn import DigitsResNet
from abyssal.scaling.rules.application import apply

RATE = 0.05


def network(rule: str) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = DigitsResNet(4, 8, scale=1.0).double()
    return model, apply(model, rule, base_depth=2, base_width=4)


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(6) % 10


def train(model: nn.Module, optimiser: torch.optim.Optimizer, ranks: list[int], steps: int = 3) -> None:
    """Train on the mean over the ranks' batches."""
    for _ in range(steps):
        optimiser.zero_grad()
        parts = [batch(rank) for rank in ranks]
        images, classes = (torch.cat(values) for values in zip(*parts, strict=True))
        nn.functional.cross_entropy(model(images), classes).backward()
        optimiser.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def trains_as_alone(rank: int, rule: str, wrapper: str) -> float:
    """The largest difference of a weight between training under the wrapper and alone, after a few steps."""
    alone, scaled = network(rule)
    train(alone, torch.optim.AdamW(scaled.parameter_groups(RATE, weight_decay=0.1)), [0, 1])  # type: ignore[attr-defined]
    model, scaled = network(rule)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for step in model.get_submodule("stack.steps").children():
            fully_shard(step, mesh=mesh)
        fully_shard(model, mesh=mesh)
    train(model, torch.optim.AdamW(scaled.parameter_groups(RATE, weight_decay=0.1)), [rank])  # type: ignore[attr-defined]
    found, expected = weights(model), weights(alone)
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def refuses(rank: int) -> list[str]:
    """What is said when a rule is applied below DDP, and to a sharded model."""
    sharded = DigitsResNet(4, 8)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    messages = []
    for model in (DistributedDataParallel(DigitsResNet(4, 8)), sharded):
        try:
            apply(model, "completep", base_depth=2)
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("applied")
    return messages
