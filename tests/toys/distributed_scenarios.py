"""What each of two processes does in test_distributed.py. A scenario returns plain numbers."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import abyssal
from toys.distributed import DEPTH, Net, data, gradients, net, relative_error


class Result(NamedTuple):
    """Relative errors of the gradient, one per step, and the certificate of the last step."""

    errors: list[float]
    certificate: dict[str, Any]


def backward(losses: tuple[Tensor, Tensor], order: str) -> None:
    """Run the backward pass of the end's loss and of the middle's in one of several orders."""
    end, middle = losses
    if order == "end":
        (end + 0 * middle).backward()  # every parameter takes part, as DDP asks
    elif order == "sum":
        (end + middle).backward()
    elif order == "end, then middle":
        end.backward(retain_graph=True)
        middle.backward()
    elif order == "middle, then end":
        middle.backward(retain_graph=True)
        end.backward()
    else:
        raise ValueError(order)


def _train(model: nn.Module, rank: int, order: str, steps: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Take a few optimiser steps; return every step's gradients."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for step in range(steps):
        optimiser.zero_grad()
        backward(model(data(rank, step, dtype)), order)
        found.append(gradients(model))
        optimiser.step()
    return found


def _compare(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], model: nn.Module) -> Result:
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    return Result(errors, abyssal.certificate(model).to_dict())


# ---------------------------------------------------------------------- DistributedDataParallel


def ddp(rank: int, policy: abyssal.Policy, order: str = "end", when: str = "before", **options: Any) -> Result:
    """DDP with and without us, two steps."""
    unused = options.get("find_unused_parameters", False)
    plain = DistributedDataParallel(net(unused=unused), **options)
    theirs = _train(plain, rank, order, 2, torch.float64)
    model = net(unused=unused)
    if when == "before":
        abyssal.reconstruct(model, policy)
    wrapped = DistributedDataParallel(model, **options)
    if when == "after":
        abyssal.reconstruct(wrapped, policy)
    return _compare(_train(wrapped, rank, order, 2, torch.float64), theirs, wrapped)


def ddp_skips_a_block(rank: int, policy: abyssal.Policy) -> Result:
    """One block and one head take no part: find_unused_parameters has to see that through our graph."""

    def train(model: nn.Module) -> dict[str, Tensor]:
        end, middle = model(data(rank), skip=2 + rank)  # another block on each rank
        (end + middle).backward()
        return gradients(model)

    theirs = train(DistributedDataParallel(net(unused=True), find_unused_parameters=True))
    model = abyssal.reconstruct(net(unused=True), policy)
    return _compare([train(DistributedDataParallel(model, find_unused_parameters=True))], [theirs], model)


def ddp_two_backwards(rank: int, policy: abyssal.Policy, order: str) -> Result:
    """Two backward passes through one graph, which DDP allows only while it does not synchronise."""

    def train(model: DistributedDataParallel) -> list[dict[str, Tensor]]:
        with model.no_sync():
            backward(model(data(rank)), order)
        local = gradients(model)
        sum(model(data(rank, 1))).backward()  # and synchronises again afterwards
        return [local, gradients(model)]

    theirs = train(DistributedDataParallel(net()))
    model = abyssal.reconstruct(net(), policy)
    return _compare(train(DistributedDataParallel(model)), theirs, model)


def ddp_middle_by_grad(rank: int, policy: abyssal.Policy) -> Result:
    """`autograd.grad` of the middle's loss first, outside of DDP, then the end's backward through DDP."""

    def train(model: DistributedDataParallel) -> list[dict[str, Tensor]]:
        end, middle = model(data(rank))
        weight = model.module.blocks[0].linear.weight
        (first,) = torch.autograd.grad(middle, weight, retain_graph=True)
        (end + 0 * middle).backward()
        return [{"first": first}, gradients(model)]

    theirs = train(DistributedDataParallel(net()))
    model = abyssal.reconstruct(net(), policy)
    return _compare(train(DistributedDataParallel(model)), theirs, model)


def ddp_accumulates(rank: int, policy: abyssal.Policy, in_flight: bool) -> Result:
    """Gradient accumulation under no_sync, each graph's backward before the next forward pass or after it."""

    def train(model: DistributedDataParallel) -> dict[str, Tensor]:
        with model.no_sync():
            first = sum(model(data(rank, 0)))
            if not in_flight:
                first.backward()
            second = sum(model(data(rank, 1)))
            if in_flight:
                first.backward()
            second.backward()
        sum(model(data(rank, 2))).backward()
        return gradients(model)

    theirs = train(DistributedDataParallel(net()))
    model = abyssal.reconstruct(net(), policy)
    return _compare([train(DistributedDataParallel(model))], [theirs], model)


# ---------------------------------------------------------------------- FSDP2


def _shard(
    model: Net, policy: abyssal.Policy | None, when: str = "before", grain: str = "block", **options: Any
) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if policy is not None and when == "before":
        abyssal.reconstruct(model, policy)
    groups: dict[str, list[Any]] = {
        "root": [],
        "block": list(model.blocks),
        "pairs": [[*model.blocks[i : i + 2]] for i in range(0, DEPTH, 2)],
        "inside": [m for block in model.blocks for m in (block.linear, block)],
        "all": [*model.blocks, model.embed, model.head, model.middle_head],
    }
    for group in (*groups[grain], model):
        fully_shard(group, mesh=mesh, **options)
    if policy is not None and when == "after":
        abyssal.reconstruct(model, policy)
    return model


def fsdp(
    rank: int,
    policy: abyssal.Policy,
    order: str = "end",
    when: str = "before",
    grain: str = "block",
    **options: Any,
) -> Result:
    """FSDP2 on blocks and root, with and without us; the third step shows that its states survived."""
    theirs = _train(_shard(net(), None, when, grain, **options), rank, order, 3, torch.float64)
    model = _shard(net(), policy, when, grain, **options)
    return _compare(_train(model, rank, order, 3, torch.float64), theirs, model)


def fsdp_mixed(rank: int, policy: abyssal.Policy, output_dtype: torch.dtype | None) -> tuple[Result, float]:
    """FSDP2 with bfloat16 parameters; also how far bfloat16 itself is from float32, without us."""

    def train(policy: abyssal.Policy | None, **options: Any) -> tuple[list[dict[str, Tensor]], Net]:
        model = _shard(net(dtype=torch.float32), policy, grain="all", **options)
        return _train(model, rank, "sum", 2, torch.float32), model

    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
    exact, _ = train(None)
    theirs, _ = train(None, mp_policy=mixed)
    ours, model = train(policy, mp_policy=mixed)
    return _compare(ours, theirs, model), relative_error(theirs[0], exact[0])


def fsdp_sharded_after(rank: int, policy: abyssal.Policy) -> list[str]:
    """Names of parameters left gathered once the middle's backward has restored the end's blocks."""
    model = _shard(net(), policy)
    _, middle = model(data(rank))
    middle.backward(retain_graph=True)
    return [name for name, p in model.blocks.named_parameters() if not isinstance(p, DTensor)]


def fsdp_compiled(rank: int, policy: abyssal.Policy, when: str) -> Result:
    """FSDP2 on blocks that `block.compile()` compiled, with and without us."""

    def train(policy: abyssal.Policy | None) -> tuple[list[dict[str, Tensor]], Net]:
        model = net()
        for block in model.blocks:
            block.compile(backend="aot_eager")
        _shard(model, policy, when)
        return _train(model, rank, "sum", 2, torch.float64), model

    theirs, _ = train(None)
    ours, model = train(policy)
    return _compare(ours, theirs, model)


def fsdp_raises(rank: int) -> tuple[bool, float]:
    """Whether drift raised on this rank, and the gradient's error in the next step, with everything kept."""
    model = net()
    abyssal.reconstruct(model, abyssal.Reverse(refine=0), on_drift="raise", tolerance=1e-6)
    _shard(model, None)
    try:
        sum(model(data(rank))).backward()
        raised = False
    except abyssal.DriftError:
        raised = True
    abyssal.reconstruct(model, abyssal.Keep())
    plain = _shard(net(), None)
    found = []
    for each in (model, plain):
        each.zero_grad()
        sum(each(data(rank, 1))).backward()
        found.append(gradients(each))
    return raised, relative_error(*found)


def fsdp_drifts_on_one_rank(rank: int) -> list[str]:
    """Policies in force after three steps out of order, where only the first rank's tolerance is exceeded."""
    model = net()
    abyssal.reconstruct(model, abyssal.Reverse(refine=0), on_drift="keep", tolerance=1e-6 if rank == 0 else 1.0)
    _shard(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", abyssal.DriftWarning)
        _train(model, rank, "middle, then end", 3, torch.float64)
    return [block.policy for block in abyssal.certificate(model).blocks]
