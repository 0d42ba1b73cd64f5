"""Agreement between the ranks of a sharded model on what drifted.

Each rank measures its own data. But a block that is restored out of the backward pass's order is gathered for
it, a collective operation, so that under FSDP2 all ranks have to restore the same blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def highest_on_any_rank(levels: list[int], blocks: Iterable[nn.Module]) -> list[int]:
    """Return, for each entry, the highest level that any rank of the model's shards has; all ranks call it.

    Args:
        levels: one small number per entry; as many on every rank.
        blocks: modules among which a sharded one (FSDP2) tells the ranks; without any, `levels` is returned.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if tensors is None or fsdp is None or not dist.is_available() or not dist.is_initialized():
        return levels
    for block in blocks:
        if not any(isinstance(module, fsdp.FSDPModule) for module in block.modules()):
            continue
        for parameter in block.parameters():
            if isinstance(parameter, tensors.DTensor):
                mesh = parameter.device_mesh
                agreed = torch.tensor(levels, device=mesh.device_type)
                for group in mesh.get_all_groups():
                    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
                return [int(level) for level in agreed.tolist()]
    return levels
