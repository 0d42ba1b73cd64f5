"""How a tensor lies in memory: its strides."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out(x: Tensor, strides: tuple[int, ...], *, copy: bool = False) -> Tensor:
    """Return `x` with the given strides: `x` itself where it has them.

    A kernel chooses its way by them, and so which tensors autograd saves: a block that is run again has to get its
    input with the very strides of the true one. Of what an expanded tensor repeats (stride 0) the first is taken.

    Args:
        x: [*shape]
        strides: in elements, one per dimension.
        copy: whether the result is to have its own memory in any case.
    """
    if x.layout is not torch.strided:  # jagged tensors keep theirs when they are cloned
        return x.clone() if copy else x
    if x.stride() == strides and not copy:
        return x
    once = x[tuple(slice(1 if step == 0 else None) for step in strides)]
    once = once.new_empty_strided(once.shape, strides).copy_(once)
    return once if once.shape == x.shape else once.expand(x.shape)
