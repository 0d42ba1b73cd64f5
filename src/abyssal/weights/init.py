"""Initialisers that draw the weights of all depths at once, each entry a path through depth.

They are written as those of `torch.nn.init`: in place, without gradients, returning what they were given. The
first dimension of a weight is depth, `[depth, out, in, ...]`; every entry of `[out, in, ...]` is an independent path
of a :class:`~abyssal.weights.families.Family`, divided by `sqrt(fan_in)`, where fan_in is `in` times the positions
of a convolution's kernel.

Source: Marion, Fermanian, Biau, Vert (2022), Scaling ResNets in the large-depth regime, arXiv 2206.06929, section 4,
for weights that are discretised processes on [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from abyssal.util.checks import instance
from abyssal.weights.families import Family, FractionalMotion, FractionalNoise, GaussianProcess, Iid, check_dtype

__all__ = ["fill_", "fractional_motion_", "fractional_noise_", "gaussian_process_", "iid_"]


def iid_(weights: Tensor, distribution: str = "normal", generator: torch.Generator | None = None) -> Tensor:
    """Fill the weights of all depths with independent numbers of variance 1/fan_in, in place.

    Args:
        weights: [depth, out, in, ...], of any floating-point dtype and device. Meta tensors are left alone, as by
            `torch.nn.init`.
        distribution: `"normal"`, or `"uniform"` on `sqrt(3 / fan_in)` to either side.
        generator: for the random numbers; on any device.

    Returns:
        The weights.

    Raises:
        ValueError: for fewer than 3 dimensions, an overlapping or non-floating tensor, or an unknown distribution.
        TypeError: if `weights` is no tensor.
    """
    return _fill_paths_(weights, Iid(distribution), generator)


def gaussian_process_(
    weights: Tensor,
    kernel: str = "rbf",
    length_scale: float = 0.1,
    increments: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill the weights of all depths with paths of a Gaussian process, of variance 1/fan_in, in place.

    Args:
        weights: as in :func:`iid_`. [depth, out, in, ...]
        kernel: `"rbf"`, `"matern12"`, `"matern32"` or `"matern52"`.
        length_scale: in units of the whole depth.
        increments: whether weights are the process's increments from block to block, normalised (the smooth
            family of Marion et al.), or its values.
        generator: as in :func:`iid_`.

    Returns:
        The weights.

    Raises:
        ValueError: as :func:`iid_`; for an unknown kernel or a length scale that cannot be drawn.
        TypeError: if `weights` is no tensor.
    """
    return _fill_paths_(weights, GaussianProcess(kernel, length_scale, increments), generator)


def fractional_noise_(weights: Tensor, hurst: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill the weights of all depths with fractional Gaussian noise of variance 1/fan_in, in place.

    Args:
        weights: as in :func:`iid_`. [depth, out, in, ...]
        hurst: the Hurst index, strictly between 0 and 1; 1/2 is i.i.d., more is smoother in depth.
        generator: as in :func:`iid_`.

    Returns:
        The weights.

    Raises:
        ValueError: as :func:`iid_`; for another Hurst index.
        TypeError: if `weights` is no tensor.
    """
    return _fill_paths_(weights, FractionalNoise(hurst), generator)


def fractional_motion_(weights: Tensor, hurst: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill the weights of all depths with paths of fractional Brownian motion, in place.

    The variance is `(t^2H)/fan_in` at `t = (n+1)/depth`, so 1/fan_in in the last block, and little in the first.

    Args:
        weights: as in :func:`iid_`. [depth, out, in, ...]
        hurst: the Hurst index, strictly between 0 and 1.
        generator: as in :func:`iid_`.

    Returns:
        The weights.

    Raises:
        ValueError: as :func:`iid_`; for another Hurst index.
        TypeError: if `weights` is no tensor.
    """
    return _fill_paths_(weights, FractionalMotion(hurst), generator)


@torch.no_grad()
def fill_(blocks: Sequence[nn.Module], family: Family, generator: torch.Generator | None = None) -> Sequence[nn.Module]:
    """Fill the weights of same-shaped blocks with paths of a family through their depth, in place.

    Parameters of two dimensions or more ([out, in, ...]) become paths with the family's variance divided by fan_in;
    biases become 0; other vectors (the gains of normalisations) are left alone. Parameters are drawn in the order of
    `named_parameters()`, each for all blocks.

    Args:
        blocks: modules with the same parameter names and shapes, first to last: an `nn.ModuleList`, the `blocks`
            of a :class:`~abyssal.nn.ResidualStack`.
        family: the law of an entry as a path through depth.
        generator: for the random numbers; on any device.

    Returns:
        The blocks.

    Raises:
        ValueError: if the blocks differ in the names or shapes of their parameters, or share a parameter (a tied
            weight is the same at both depths, so no path). Nothing is changed then.
        TypeError: if `family` is no family.
    """
    instance("family", family, Family, "a Family (abyssal.weights.families.family makes one)")
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in blocks]
    _check_one_path(blocks, shapes)
    for name, shape in shapes[0].items() if shapes else ():
        parameters = [block.get_parameter(name) for block in blocks]
        if len(shape) >= 2:
            _fill_parameters(parameters, family, generator)
        elif name.rpartition(".")[2] == "bias":
            for p in parameters:
                p.zero_()
    return blocks


@torch.no_grad()
def _fill_paths_(weights: Tensor, family: Family, generator: torch.Generator | None) -> Tensor:
    instance("weights", weights, Tensor, "a tensor [depth, out, in, ...]")
    if weights.dim() < 3:
        raise ValueError(
            f"weights has to be [depth, out, in, ...], got shape {list(weights.shape)}. The first dimension is depth: "
            "one path runs through the same entry of all blocks. For separate modules use abyssal.weights.init.fill_."
        )
    check_dtype(weights.dtype)
    _check_no_overlap(weights, "weights")
    depth, fan_in = len(weights), math.prod(weights.shape[2:])
    if weights.numel() == 0 or weights.is_meta:
        return weights
    # A view where the strides allow one; otherwise the paths are written to a copy.
    columns = weights.view(depth, -1) if weights.is_contiguous() else weights.reshape(depth, -1)
    for start, block in family.blocks(depth, columns.shape[1], generator, device=weights.device):
        columns[:, start : start + block.shape[1]] = block / math.sqrt(fan_in)
    if columns.data_ptr() != weights.data_ptr():
        weights.copy_(columns.view(weights.shape))
    return weights


def _fill_parameters(parameters: list[nn.Parameter], family: Family, generator: torch.Generator | None) -> None:
    """Write paths through equally shaped tensors [out, in, ...]."""
    shape, device = parameters[0].shape, parameters[0].device
    if shape.numel() == 0 or any(p.is_meta for p in parameters):
        return
    rows = [p.view(-1) if p.is_contiguous() else torch.empty(shape.numel(), dtype=p.dtype) for p in parameters]
    for start, block in family.blocks(len(parameters), shape.numel(), generator, device=device):
        for row, values in zip(rows, block / math.sqrt(math.prod(shape[1:])), strict=True):
            row[start : start + len(values)] = values
    for p, row in zip(parameters, rows, strict=True):
        if not p.is_contiguous():
            p.copy_(row.view(shape))


def _check_one_path(blocks: Sequence[nn.Module], shapes: list[dict[str, torch.Size]]) -> None:
    owner: dict[int, str] = {}
    for n, (block, other) in enumerate(zip(blocks, shapes, strict=True)):
        if other != shapes[0]:
            raise ValueError(f"Block {n} has parameters {other}, block 0 has {shapes[0]}: not one path.")
        for name, p in block.named_parameters():
            check_dtype(p.dtype)
            _check_no_overlap(p, f"parameter {name!r} of block {n}")
            if id(p) in owner:
                raise ValueError(
                    f"Parameter {name!r} of block {n} is also {owner[id(p)]}: a tied weight is the same at both "
                    "depths, so it cannot follow a path. Untie it first, or leave one of the blocks out."
                )
            owner[id(p)] = f"{name!r} of block {n}"


def _check_no_overlap(tensor: Tensor, what: str) -> None:
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(
            f"{what} has entries that share memory (strides {list(tensor.stride())}), as expand() makes them; "
            "they cannot differ. Pass tensor.clone()."
        )
