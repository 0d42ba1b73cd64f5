"""The true gradient flow of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.tangent.hierarchy.rates import Loss
from abyssal.tangent.hierarchy.truncated import integrate

__all__ = ["flow_states"]

Array = NDArray[np.float64]


def flow_states(
    loss: Loss, times: list[float], rtol: float, progress: Callable[[float], None]
) -> Iterator[tuple[float, dict[str, Tensor] | None]]:
    """Integrate `theta' = -grad loss` from the model's parameters.

    By scipy's DOP853 on all parameters as one vector; the absolute tolerance is `rtol` times their root mean square.

    Args:
        loss: whose flow it is.
        times: increasing, from 0 on.
        rtol: tolerance of each step.
        progress: called with the time reached.

    Yields:
        Every wanted time with the parameters; where the flow blows up before one, the last time reached with None.
    """
    parameters = loss.pure.parameters
    like = next(iter(parameters.values()))
    start = torch.cat([p.reshape(-1) for p in parameters.values()]).double().cpu().numpy()

    def split(state: Array) -> dict[str, Tensor]:
        vector = torch.from_numpy(np.ascontiguousarray(state)).to(like.device)
        parts = vector.split([p.numel() for p in parameters.values()])
        return {name: part.view(p.shape).to(p.dtype) for (name, p), part in zip(parameters.items(), parts, strict=True)}

    def velocity(time: float, state: Array) -> Array:
        progress(time)
        slope = loss.velocity(split(state))
        return torch.cat([slope[name].reshape(-1) for name in parameters]).double().cpu().numpy()

    size = float(np.sqrt(np.mean(start**2))) or 1.0
    for time, state in integrate(velocity, start, times, rtol, rtol * size):
        yield time, None if state is None else split(state)
