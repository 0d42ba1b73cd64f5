"""Training with a kernel that does not move: the exact solution of gradient flow, and kernel regression at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abyssal.tangent.training.spectra import kernel_blocks, real

__all__ = ["Linearised", "linearised"]

Array = Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Linearised:
    """What gradient flow with a constant kernel does.

    Attributes:
        times: as given. [times]
        outputs: on the training samples. [times, n] or [times, n, k]
        loss: `1/(2n) sum (f - y)^2`. [times]
        test_outputs: on other samples, where their kernel was given. [times, m] or [times, m, k]
        rates: of the residual's modes, `eigenvalue / n`, descending: the loss ends up falling as `exp(-2 rate t)` at
            the last rate that is not 0. [modes]
    """

    times: Tensor
    outputs: Tensor
    loss: Tensor
    test_outputs: Tensor | None
    rates: Tensor


def linearised(
    K: Array,
    f0: Array,
    y: Array,
    times: Sequence[float] | Array,
    *,
    K_test: Array | None = None,
    f0_test: Array | None = None,
) -> Linearised:
    """Predict training by the kernel at its start: `f(t) = y + exp(-K t / n) (f0 - y)`.

    The exact solution of `df/dt = -K (f - y) / n`, gradient flow on `1/(2n) sum (f - y)^2`, with K as at t = 0: the
    hierarchy truncated at order 2, a network of infinite width, and a first-order expansion in the parameters at any
    width (Jacot, Gabriel, Hongler, arXiv 1806.07572; Lee et al., arXiv 1902.06720, equations 8 to 11). At t = inf it is
    kernel regression. Computed through the eigenvalues of K in float64, as n^3 flops for all times together.

    Args:
        K: tangent kernel of the training samples: [n, n], the same for every output; [n, n, k], each output's own; or
            [n, n, k, k]. A trace over k outputs is k times their mean: give `K / k`.
        f0: outputs at the start. [n] or [n, k]
        y: targets, of the same shape; classes as one-hot.
        times: at least 0; math.inf for the end of training. [times]
        K_test: kernel of other samples with the training samples, `ntk(model, x_test, x)`: [m, n], [m, n, k] or
            [m, n, k, k].
        f0_test: their outputs at the start. [m] or [m, k]

    Returns:
        Outputs and loss at each time, in float64 on the CPU.

    Raises:
        TypeError, ValueError: naming what does not fit; for a kernel with eigenvalues below 0 beyond rounding.
    """
    blocks, rounding = kernel_blocks(K)
    start, targets = _outputs(f0, "f0"), _outputs(y, "y")
    at = _times(times)
    shape = list(K.shape)
    if start.shape != targets.shape or len(start) != shape[0]:
        raise ValueError(
            f"f0 and y have to be [n] or [n, k], both alike, with n = {shape[0]} as in K; got {list(start.shape)}"
            f" and {list(targets.shape)}."
        )
    columns = start.shape[1] if start.ndim == 2 else 1
    if len(shape) > 2 and shape[2] != columns:
        raise ValueError(f"K is of {shape[2]} outputs, f0 and y of {columns}.")
    values, vectors = torch.linalg.eigh(blocks)
    floor = blocks.shape[-1] * rounding * float(values.abs().max())
    if float(values.min()) < -floor:
        raise ValueError(
            f"K has an eigenvalue of {float(values.min()):.3g}, beside a largest of {float(values.max()):.3g}: it is "
            "no kernel, and training by it would diverge. abyssal.tangent.spectrum(K) says more."
        )
    n = shape[0]
    rates = torch.where(values > floor, values, 0) / n
    residual = _arranged(start - targets, len(shape))
    modes = vectors.mT @ residual
    decay = torch.exp(-rates * at[:, None, None]).nan_to_num(1.0)  # inf times 0: what has no rate stays for ever
    left = _restored(vectors @ (decay[..., None] * modes), targets.shape)
    outputs = targets + left
    loss = left.square().reshape(len(at), -1).sum(1) / (2 * n)
    test_outputs = None
    if K_test is not None or f0_test is not None:
        moved = _travelled(rates, at)[..., None] * modes / n
        test_outputs = _test(K_test, f0_test, vectors @ moved, shape, columns)
    return Linearised(at, outputs, loss, test_outputs, rates.reshape(-1).sort(descending=True).values)


def _travelled(rates: Tensor, times: Tensor) -> Tensor:
    """Integral of `exp(-rate s)` from 0 to t, [times, blocks, n]; 0 for modes that the training samples do not have."""
    at = times[:, None, None]
    whole = -torch.expm1(-rates * at) / rates
    return torch.where(rates > 0, whole, torch.where(torch.isinf(at), torch.zeros_like(at), at))


def _test(K_test: Any, f0_test: Any, dual: Tensor, shape: list[int], columns: int) -> Tensor:
    """Return outputs on other samples: `f0 - K_test dual`, dual being [times, blocks, n, columns]."""
    if K_test is None or f0_test is None:
        raise ValueError("K_test and f0_test go together: kernel and first outputs of the same other samples.")
    other, start = real(K_test, "K_test").to("cpu", torch.float64), _outputs(f0_test, "f0_test")
    expected = [start.shape[0], *shape[1:]]
    if list(other.shape) != expected or (start.shape[1] if start.ndim == 2 else 1) != columns:
        raise ValueError(
            f"K_test has to be {expected} and f0_test [m] or [m, {columns}], as K and f0 are; got {list(other.shape)} "
            f"and {list(start.shape)}."
        )
    if other.ndim == 4:
        other = other.permute(0, 2, 1, 3).reshape(1, len(start) * columns, -1)
    elif other.ndim == 3:
        other = other.permute(2, 0, 1)
    return start - _restored(other @ dual, start.shape)


def _arranged(values: Tensor, kernel_dims: int) -> Tensor:
    """Lay [n] or [n, k] out as blocks of the kernel act on it, [blocks, n, columns]."""
    matrix = values.reshape(len(values), -1)
    if kernel_dims == 4:
        return matrix.reshape(1, -1, 1)
    return matrix.T[:, :, None] if kernel_dims == 3 else matrix[None]


def _restored(values: Tensor, shape: torch.Size) -> Tensor:
    """Undo that, for [times, blocks, n, columns]."""
    if values.shape[1] > 1:
        values = values.transpose(1, 2)
    return values.reshape(len(values), *shape)


def _times(times: Any) -> Tensor:
    at = torch.as_tensor(times, dtype=torch.float64).detach().cpu()
    if at.ndim != 1 or not len(at) or not (at >= 0).all():
        raise ValueError(f"times has to be a sequence of numbers of at least 0, math.inf included; got {times!r}.")
    return at


def _outputs(value: Any, name: str) -> Tensor:
    tensor = real(value, name).to("cpu", torch.float64)
    if tensor.ndim not in (1, 2) or not tensor.numel():
        raise ValueError(f"{name} has to be [n] or [n, k], got {list(tensor.shape)}.")
    return tensor
