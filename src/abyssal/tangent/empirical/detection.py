"""Finding out, on one or two samples, which parameters' gradients hooks give.

What `capture.py` takes for granted is checked, parameter by parameter, and a parameter that fails
goes to `fallback.py`:

- that nothing else uses the parameter: autograd's graph has exactly as many edges to it as recognised layers called
  with it (looked at again in every pass);
- that the layer does what its rule says, that its samples are where the rule looks for them, and that outputs of
  several samples are not mixed: for one combination of the outputs of either sample in a batch of two, the gradients
  vanish where the other's are looked for, and those of the parameters are autograd's own.

Where samples are can depend on the data; that is for `capture.py` to see to, block by block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from abyssal.models.graph import names_of, walk
from abyssal.tangent.empirical.cost import blueprint
from abyssal.tangent.empirical.hooks import Call, Use, arranged, backward, gradients, named, recorded, ruled
from abyssal.tangent.empirical.layers import guess
from abyssal.tangent.empirical.parts import Dense, Direct, OneHot, Outer, Part, explicit, unfolded
from abyssal.tangent.modes import saved_bytes

__all__ = ["Plan", "agree", "study"]

_TOLERANCE = 256  # of rounding errors, in units of the sum of norms that a gradient is added up from
_SMALL = 4096  # entries of a parameter that is small


@dataclass
class Plan:
    """What was found out about a model.

    Attributes:
        parameters: that count, by name; each once, however many names it has.
        layouts: for each call of a layer, where its samples are: "first" dimension; "expanded", one row that all
            share; "flattened" with positions into one dimension; "second" dimension. Missing where not known.
        fallback: names of parameters whose gradients hooks do not give.
        parts: blueprints of what one sample gives, by parameter.
        batched: whether vmap knows the model's backward pass; found out at the first try.
        graph: bytes that one sample's forward pass keeps for the backward pass.
    """

    parameters: dict[str, nn.Parameter]
    layouts: dict[tuple[str, int], str] = field(default_factory=dict)
    fallback: set[str] = field(default_factory=set)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    graph: int = 0
    batched: bool = True


def study(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], call: Call, n: int, alone: Tensor
) -> tuple[Plan, Tensor]:
    """Find out on one or two samples which parameters' gradients hooks give.

    Args:
        model: in the mode in which it is to be looked at.
        parameters: that count, by name.
        call: runs the model on these samples.
        n: samples, 1 or 2.
        alone: what the model gives for the last of them by itself. [k]

    Returns:
        The plan; the outputs found. [n, k]
    """
    for expand in (True, False):
        plan = Plan(dict(parameters))
        try:
            with (
                recorded(model, n, lambda key, expand=expand: expand) as (uses, anchor, receiver),  # type: ignore[misc]
                saved_bytes(parameters.values()) as saved,
            ):
                found = call()
        except Exception:
            if not expand:
                raise
            continue
        if found.shape[1:] == alone.shape and agree(found[-1], alone):
            break
    plan.graph = sum(saved.values()) // n
    counts, _ = walk(found, parameters, 1)
    weights = torch.linspace(-1, 1, found.shape[1], dtype=torch.float64).cos_().to(found)
    checked = _to_check(parameters, uses)
    wanted = [*(use.edge for use in uses), *(parameters[name] for name in checked)]
    if found.shape[1] > 1:
        try:
            backward(found[:, :2], anchor, receiver, batched=True, keep=True)
        except Exception:  # whatever an operation says to vmap that it does not know; compiled ones do not know vmap
            plan.batched = False
    try:
        grads = gradients(found, weights, wanted, batched=True)
    except Exception:
        grads = gradients(found, weights, wanted, batched=False)
    true = dict(zip(checked, grads[len(uses) :], strict=True))
    _judge(plan, uses, grads[: len(uses)], true, counts)
    return plan, found.detach()


def agree(a: Tensor, b: Tensor, rounding: float = 0.0) -> bool:
    """Return whether outputs are equal, but for rounding that a deep network may have magnified.

    Args:
        a: outputs.
        b: those that they are to be.
        rounding: relative, of something that is coarser than their type: some models compute in float32 somewhere.
    """
    return bool((a - b).abs().max() <= max(torch.finfo(a.dtype).eps, rounding) ** 0.5 * b.abs().max())


def _to_check(parameters: Mapping[str, nn.Parameter], uses: Sequence[Use]) -> list[str]:
    """All small parameters, and of large ones the first of each kind of layer and input; all whose rule is a guess.

    To form the gradients of all would take as long as all else.
    """
    names, kinds = names_of(parameters), set()
    chosen = {name: None for name, p in parameters.items() if p.numel() <= _SMALL}
    for use in uses:
        kind = (type(use.module), use.x.dim(), len(use.x) if use.x.dim() else 0)
        for p in use.module.parameters(recurse=False):
            if id(p) in names and (kind not in kinds or use.rule is guess):
                chosen[names[id(p)]] = None
        kinds.add(kind)
    return list(chosen)


def _judge(
    plan: Plan,
    uses: Sequence[Use],
    deltas: Sequence[Tensor | None],
    true: Mapping[str, Tensor | None],
    counts: Counter[str],
) -> None:
    """Fill in a plan from the gradients of one combination of each sample's outputs. [n, ...] each."""
    parts: dict[str, list[Part]] = {name: [] for name in plan.parameters}
    scales: dict[str, Tensor | float] = dict.fromkeys(plan.parameters, 0.0)
    names = names_of(plan.parameters)
    for use, delta in zip(uses, deltas, strict=True):
        if delta is None:
            continue
        for layout in _layouts(use):
            own, x = _own(delta, layout), arranged(use.x, layout, len(delta))
            found = None if own is None or x is None else ruled(use, x, own[:, None])
            if own is not None and found is not None:
                plan.layouts[use.key] = layout
                for name, part in named(use.module, found, names):
                    parts[name].append(part)
                    if name in true:
                        scales[name] = scales[name] + _size(part, own)
                break
    for name, p in plan.parameters.items():
        if counts[name] == 0 and not parts[name]:
            continue  # not used by these samples
        fits = counts[name] == len(parts[name]) and all(part.numel == p.numel() for part in parts[name])
        if not fits or (name in true and not _right(parts[name], true[name], p, scales[name])):
            plan.fallback.add(name)
        else:
            plan.parts[name] = [blueprint(part) for part in parts[name]]


def _layouts(use: Use) -> tuple[str, ...]:
    """Where a layer's samples may be. A convolution's rule takes them in the first dimension only."""
    if use.expanded:
        return ("expanded",)
    return ("first",) if isinstance(use.module, nn.modules.conv._ConvNd) else ("first", "flattened", "second")


def _own(deltas: Tensor, layout: str) -> Tensor | None:
    """Each sample's gradients by its own rows, if they lie as `layout` says and there are no others; else None."""
    found = arranged(deltas, layout, len(deltas), at=1)
    if found is None or any(found[i, :i].any() or found[i, i + 1 :].any() for i in range(len(found))):
        return None
    return torch.stack([found[i, i] for i in range(len(found))])


def _right(parts: Sequence[Part], true: Tensor | None, p: nn.Parameter, scale: Tensor | float) -> bool:
    """Whether the gradients of all samples are autograd's."""
    if true is None:
        return False
    expected = true.flatten(1) if true.dim() > 1 else true[:, None]
    errors = torch.linalg.vector_norm(explicit(parts, p.dtype)[:, 0] - expected, dim=1)
    sizes = torch.linalg.vector_norm(expected, dim=1)
    sizes = torch.maximum(sizes, scale) if isinstance(scale, Tensor) else sizes
    return bool((errors <= _TOLERANCE * torch.finfo(p.dtype).eps * sizes).all())


def _size(part: Part, deltas: Tensor) -> Tensor:
    """Bound the terms whose sum is the gradient, in order of magnitude: rounding errors are relative to it. [n]."""
    n = len(deltas)
    if isinstance(part, Direct):
        positions = max(1, deltas[0].numel() // max(1, part.numel))
        return torch.linalg.vector_norm(deltas.reshape(n, -1), dim=1) * positions**0.5
    made = unfolded(part)
    assert isinstance(made, Outer) and isinstance(made.right, Dense)
    terms = made.right.values[:, 0].norm(dim=-1)
    if not isinstance(made.left, OneHot):
        terms = made.left.values[:, 0].norm(dim=-1) * terms
    return terms.reshape(n, -1).sum(dim=1)
