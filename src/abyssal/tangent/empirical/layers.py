"""Layers whose parameters' per-sample gradients follow from their input and the gradient by their output.

A layer counts as recognised only if it runs its class's own forward, and its weight is a parameter (not something
computed from parameters, as by weight normalisation). That its gradients are what is said here is not taken on trust:
see :mod:`abyssal.tangent.empirical.capture`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from abyssal.models.state import as_found
from abyssal.tangent.empirical.parts import Dense, Direct, OneHot, Outer, Part, Unfolded

__all__ = ["Rule", "guess", "rule_for"]

# From a layer, its input [n, ...] and the gradients by its output [n, A, ...] to parts by the parameter's local name.
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Part]]


def rule_for(module: nn.Module) -> Rule | None:
    """Return how a layer's parameters get their gradients, None for a module that is not recognised."""
    own = dict(module.named_parameters(recurse=False))
    if not own or "forward" in module.__dict__ or any(p.is_complex() for p in own.values()):
        return None
    for kind, rule in _RULES.items():
        if type(module).forward is kind.forward:
            return rule if _usable(module) else None
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return _transposed_linear
    if not list(module.children()) and set(own) <= {"weight", "bias", "gamma", "beta", "scale", "alpha"}:
        return guess
    return None


def _usable(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return not module.training and module.running_mean is not None
    return True


def _bias(deltas: Tensor) -> Direct:
    """deltas: [n, A, ..., features]."""
    values = deltas.flatten(2, -2).sum(dim=2) if deltas.dim() > 3 else deltas
    return Direct(values)


def _dense(values: Tensor) -> Dense:
    """[n, A, ..., size] with any number of positions."""
    n, outputs, size = values.shape[0], values.shape[1], values.shape[-1]
    return Dense(values.reshape(n, outputs, 1, -1, size))


def _linear(module: nn.Module, x: Tensor, deltas: Tensor) -> dict[str, Part]:
    parts: dict[str, Part] = {"weight": Outer(_dense(deltas), _dense(x[:, None]), "left")}
    return parts | ({"bias": _bias(deltas)} if module.bias is not None else {})


def _transposed_linear(module: nn.Module, x: Tensor, deltas: Tensor) -> dict[str, Part]:
    """For transformers' Conv1D, whose weight is [in, out]."""
    return {"weight": Outer(_dense(x[:, None]), _dense(deltas), "right"), "bias": _bias(deltas)}


def _embedding(module: nn.Module, x: Tensor, deltas: Tensor) -> dict[str, Part]:
    assert isinstance(module, nn.Embedding)
    ids = x.reshape(len(x), -1)
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)  # torch leaves that row out of the gradient
    return {"weight": Outer(OneHot(ids, module.num_embeddings), _dense(deltas), "right")}


def _convolution(module: nn.Module, x: Tensor, deltas: Tensor) -> dict[str, Part]:
    assert isinstance(module, nn.modules.conv._ConvNd)
    groups, n, outputs = module.groups, len(x), deltas.shape[1]
    by_group = deltas.reshape(n, outputs, groups, deltas.shape[2] // groups, -1)
    left = Dense(by_group.transpose(-1, -2))
    right = Unfolded(x, partial(_patches, module), left.positions, module.weight[0].numel())
    parts: dict[str, Part] = {"weight": Outer(left, right, "left")}
    return parts | ({"bias": Direct(deltas.flatten(3).sum(dim=-1))} if module.bias is not None else {})


def _patches(module: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """What the kernel sees at each of its positions. [n, 1, groups, positions, channels per group * kernel]."""
    dims = len(module.kernel_size)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = torch.nn.functional.pad(x, padding, mode=mode)
    n, channels = x.shape[:2]
    at = x.stride()
    counts, strides, steps = [], [], []
    for d in range(dims):
        reach = module.dilation[d] * (module.kernel_size[d] - 1)
        counts.append((x.shape[2 + d] - reach - 1) // module.stride[d] + 1)
        strides.append(at[2 + d] * module.stride[d])
        steps.append(at[2 + d] * module.dilation[d])
    each = channels // module.groups
    shape = (n, module.groups, each, *module.kernel_size, *counts)  # positions last: long runs are copied
    view = x.as_strided(shape, (at[0], at[1] * each, at[1], *steps, *strides), x.storage_offset())
    return view.reshape(n, 1, module.groups, each * math.prod(module.kernel_size), math.prod(counts)).mT


def _layer_norm(module: nn.Module, x: Tensor, deltas: Tensor) -> dict[str, Part]:
    assert isinstance(module, nn.LayerNorm)
    normal = torch.nn.functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
    return _scale_and_shift(module, normal, deltas, tuple(module.normalized_shape))


def _group_norm(module: nn.Module, x: Tensor, deltas: Tensor) -> dict[str, Part]:
    assert isinstance(module, nn.GroupNorm)
    normal = torch.nn.functional.group_norm(x, module.num_groups, None, None, module.eps)
    return _scale_and_shift(module, normal, deltas, (module.num_channels,) + (1,) * (x.dim() - 2))


def _batch_norm(module: nn.Module, x: Tensor, deltas: Tensor) -> dict[str, Part]:
    """With running statistics, which are constants."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    normal = torch.nn.functional.batch_norm(
        x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps
    )
    return _scale_and_shift(module, normal, deltas, (module.num_features,) + (1,) * (x.dim() - 2))


def _scale_and_shift(module: nn.Module, normal: Tensor, deltas: Tensor, shape: tuple[int, ...]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    if module.weight is not None:
        parts["weight"] = _reduced(deltas * normal[:, None], shape)
    if module.bias is not None:
        parts["bias"] = _reduced(deltas, shape)
    return parts


def _reduced(values: Tensor, shape: tuple[int, ...]) -> Direct:
    """Sum [n, A, ...] down to [n, A, *shape], as broadcasting a parameter of that shape asks for."""
    n, outputs = values.shape[:2]
    wanted = (1,) * (values.dim() - 2 - len(shape)) + shape
    over = [2 + d for d, size in enumerate(wanted) if size == 1]
    summed = values.sum(dim=over, keepdim=True) if over else values
    return Direct(summed.reshape(n, outputs, -1))


def guess(module: nn.Module, x: Tensor, deltas: Tensor) -> dict[str, Part]:
    """A small layer that may be linear in its parameters, `weight * h(input) + bias`, as most norms and scales are."""
    own = dict(module.named_parameters(recurse=False))
    parts: dict[str, Part] = {}
    with torch.no_grad():

        def at(**values: Tensor) -> Tensor:
            with as_found(module, {**zeros, **values}):
                found: Tensor = module(x.clone())  # a clone: some write into their input
            if found.is_complex() or len(found) != len(x):
                raise ValueError("not a layer of real numbers that treats samples one by one")
            return found

        zeros = {name: torch.zeros_like(p) for name, p in own.items()}
        rest = at()
        expected = rest
        for name, p in own.items():
            slope = at(**{name: torch.ones_like(p)}) - rest
            # Of other lengths, too: of a single number, ones alone say nothing about being linear.
            ramp = torch.linspace(1.3, 2.1, p.numel()).to(p).view(p.shape)
            shape = _alignment(slope, at(**{name: ramp}) - rest, ramp, rest)
            expected = expected + slope * p.view(shape)
            parts[name] = _reduced(deltas * slope[:, None], shape)
        if not _equal(at(**own), expected, rest):
            raise ValueError("not linear in its parameters together, or not at the values that they have")
    return parts


def _alignment(slope: Tensor, scaled: Tensor, p: Tensor, rest: Tensor) -> tuple[int, ...]:
    """Which dimensions a parameter runs along: the last ones, or the channels behind the samples.

    Raises:
        ValueError: for neither, or a layer that is not linear in it.
    """
    trailing = tuple(p.shape)
    channels = (p.numel(),) + (1,) * (slope.dim() - 2)
    for shape in (trailing, channels):
        with contextlib.suppress(RuntimeError):
            found = slope * p.view(shape)
            if found.shape == scaled.shape and _equal(found, scaled, rest):
                return shape
    raise ValueError("not linear in its parameter")


def _equal(a: Tensor, b: Tensor, rest: Tensor) -> bool:
    """Whether two outputs are equal but for rounding, sample by sample: [n, ...] each.

    Some layers compute in float32 whatever they are given.
    """
    rounding = min(0.02, 16 * max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps))
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b, rest = (t.detach().to(wide).reshape(len(t), -1) for t in (a, b, rest))
    size = torch.stack([t.abs().amax(dim=1) for t in (a, b, rest)]).amax(dim=0)
    return a.shape == b.shape and bool(((a - b).abs().amax(dim=1) <= rounding * size).all())


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}
