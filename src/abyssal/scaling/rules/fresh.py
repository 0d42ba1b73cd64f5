"""Fresh weights under a rule of depth: what was put into them already, and what is left to change."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from abyssal.models.reading import ModelReading, Role
from abyssal.scaling.rules.base import Rule, Sizes

__all__ = ["init_factors"]

_USUAL_STD = 0.02  # of GPT-2, BERT, timm's and Megatron's transformers
_TOLERANCE = 0.02  # of a standard deviation, beyond its sampling error; the factors told apart differ by more


def init_factors(
    model: nn.Module, rule: Rule, sizes: Sizes, reading: ModelReading, constant_std: bool | None
) -> tuple[dict[str, float], list[str]]:
    """Return the factor of every weight that a rule changes at the start, and notes.

    Args:
        model: whose weights are fresh.
        rule: that says what is to be there.
        sizes: of the model.
        reading: of the model.
        constant_std: whether the matrices' standard deviation does not fall with their fan-in, so that a rule
            for width has to do that. None looks: it is so where it is the model's `config.initializer_range`
            or 0.02, divided by sqrt(R) or not.
    """
    parameters = dict(model.named_parameters())
    layers = {name: len(branch.layers) for branch in reading.branches for name in branch.layers}
    wanted = {name: rule.init(role, sizes, layers.get(name, 1)) for name, role in reading.roles.items()}
    about_gpt2 = [name for name, init in wanted.items() if init.gpt2 is not None]
    has_gpt2 = bool(about_gpt2) and _has_gpt2_factor(model, parameters, reading)
    notes = []
    factors: dict[str, float] = {}
    kept_std = False
    for name, init in wanted.items():
        p, role = parameters[name], reading.roles[name]
        if p.dim() < 2:
            continue
        in_branch = role in ("hidden", "projection")
        factor = init.scale if not in_branch or init.scale == 1 or rule.reaches(name) else 1.0
        if init.width != 1:
            constant = _is_constant(p, model, reading) if constant_std is None else constant_std
            factor *= init.width if constant else 1.0
            kept_std |= not constant
        if init.gpt2 is not None and init.gpt2 != has_gpt2:
            factor *= reading.calls**-0.5 if init.gpt2 else reading.calls**0.5
        if factor != 1:
            factors[name] = factor
        bias = f"{name.rpartition('.')[0]}.bias"
        if factor == 0 and bias in parameters:  # a layer that begins at 0 does so with its bias
            factors[bias] = 0.0
    if rule.init("head", sizes).scale == 0 and reading.head is not None and "head" not in reading.roles.values():
        notes.append(f"{reading.head!r} shares its matrix with the embedding, so it does not begin at 0")
    if about_gpt2 and has_gpt2:
        undone = any(wanted[name].gpt2 is False for name in about_gpt2)
        what = "taken out" if undone else "there already, and left"
        notes.append(f"GPT-2's factor 1/sqrt({reading.calls}) was found in the last matrices of the branches: {what}")
    if kept_std:
        notes.append(
            "the standard deviation of some matrices is not a usual constant, so it is taken to fall with fan-in by "
            "itself, and no factor of width was applied to it (constant_std=True applies it)"
        )
    return factors, notes


def _base_std(model: nn.Module) -> float:
    std = getattr(getattr(model, "config", None), "initializer_range", None)
    return float(std) if isinstance(std, int | float) and std > 0 else _USUAL_STD


def _is(p: Tensor, std: float) -> bool:
    """Whether a weight's standard deviation is `std`, within four standard errors and the tolerance."""
    allowed = max(_TOLERANCE, 4 / math.sqrt(2 * p.numel()))
    return abs(_std(p) / std - 1) <= allowed


def _std(p: Tensor) -> float:
    return float(p.detach().float().square().mean().sqrt())


def _is_constant(p: Tensor, model: nn.Module, reading: ModelReading) -> bool:
    base = _base_std(model)
    return _is(p, base) or _is(p, base / math.sqrt(reading.calls))


def _has_gpt2_factor(model: nn.Module, parameters: dict[str, nn.Parameter], reading: ModelReading) -> bool:
    """Whether the branches' last matrices already have 1 / sqrt(R) of the other matrices' standard deviation.

    Where those others have one common standard deviation; and attention or something like it shows that it
    does not fall with fan-in (a projection and another matrix with the same fan-in).
    """
    of_role: Callable[[Role], list[Tensor]] = lambda role: [  # noqa: E731
        parameters[name] for name, found in reading.roles.items() if found == role
    ]
    last, others = of_role("projection"), of_role("hidden")
    if reading.calls < 2 or not last or not others:
        return False
    base = sum(map(_std, others)) / len(others)
    if base == 0 or not all(_is(p, base) for p in others):
        return False
    comparable = {p.shape[0] for p in last} & {p.shape[0] for p in others} or {p.shape[1] for p in last} & {
        p.shape[1] for p in others
    }
    return bool(comparable) and all(_is(p, base / math.sqrt(reading.calls)) for p in last)


@torch.no_grad()
def multiply_(model: nn.Module, factors: dict[str, float]) -> None:
    """Multiply weights by their factors, in place."""
    parameters = dict(model.named_parameters())
    for name, factor in factors.items():
        parameters[name].zero_() if factor == 0 else parameters[name].mul_(factor)
