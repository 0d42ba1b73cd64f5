"""Finding out, on one or two samples, which parameters' gradients hooks give.

What :mod:`abyssal.tangent.capture` takes for granted is checked, parameter by parameter, and a parameter that fails
goes to :mod:`abyssal.tangent.fallback`:

- that nothing else uses the parameter: autograd's graph has exactly as many edges to it as recognised layers called
  with it (looked at again in every pass);
- that the layer does what its rule says, that its samples are where the rule looks for them, and that outputs of
  several samples are not mixed: for one combination of the outputs of one sample in a batch of two, the gradients of
  the other sample vanish, and those of the parameters are autograd's own.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from abyssal.tangent.forecast import blueprint
from abyssal.tangent.hooks import Call, Use, arranged, backward, edges_to, gradients, named, names_of, recorded, ruled
from abyssal.tangent.layers import guess
from abyssal.tangent.parts import Dense, Direct, OneHot, Outer, Part, explicit, unfolded

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
            with recorded(model, n, lambda key, expand=expand: expand) as (uses, anchor, receiver), _counted(plan, n):  # type: ignore[misc]
                found = call()
        except Exception:
            if not expand:
                raise
            continue
        if found.shape[1:] == alone.shape and agree(found[-1], alone):
            break
    if found.shape[1] > 1:
        try:
            backward(found[:, :2], anchor, receiver, batched=True, keep=True)
        except Exception:  # whatever an operation says to vmap that it does not know
            plan.batched = False
    weights = torch.linspace(-1, 1, found.shape[1], dtype=torch.float64).cos_().to(found)
    checked = _to_check(parameters, uses)
    edges = [use.edge for use in uses]
    grads = gradients((found[n - 1] * weights).sum(), [*edges, *(parameters[name] for name in checked)])
    true = dict(zip(checked, grads[len(edges) :], strict=True))
    _judge(plan, uses, grads[: len(edges)], true, edges_to(found, parameters), n)
    return plan, found.detach()


def agree(a: Tensor, b: Tensor) -> bool:
    """Return whether outputs are equal, but for rounding that a deep network may have magnified."""
    return bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** 0.5 * b.abs().max())


@contextlib.contextmanager
def _counted(plan: Plan, n: int) -> Iterator[None]:
    """Count what a forward pass keeps for the backward pass, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in plan.parameters.values()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            plan.graph += storage.nbytes() // n
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield


def _to_check(parameters: Mapping[str, nn.Parameter], uses: Sequence[Use]) -> list[str]:
    """All small parameters, and of large ones the first of each kind of layer; all of those whose rule is a guess.

    To form the gradients of all would take as long as all else.
    """
    names, kinds = names_of(parameters), set()
    chosen = {name: None for name, p in parameters.items() if p.numel() <= _SMALL}
    for use in uses:
        kind = type(use.module)
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
    n: int,
) -> None:
    """Fill in a plan from the gradients of one combination of the last sample's outputs."""
    parts: dict[str, list[Part]] = {name: [] for name in plan.parameters}
    scales: dict[str, float] = dict.fromkeys(plan.parameters, 0.0)
    names = names_of(plan.parameters)
    for use, delta in zip(uses, deltas, strict=True):
        if delta is None:
            continue
        for layout in ("expanded",) if use.expanded else ("first", "flattened", "second"):
            found = _try(use, delta, layout, n)
            if found is not None:
                plan.layouts[use.key] = layout
                for name, part in named(use.module, found, names):
                    parts[name].append(part)
                    if name in true:
                        scales[name] += _size(part, delta)
                break
    for name, p in plan.parameters.items():
        if counts[name] == 0 and not parts[name]:
            continue  # not used by these samples
        if counts[name] != len(parts[name]) or (name in true and not _right(parts[name], true[name], p, scales[name])):
            plan.fallback.add(name)
        else:
            plan.parts[name] = [blueprint(part) for part in parts[name]]


def _right(parts: Sequence[Part], true: Tensor | None, p: nn.Parameter, scale: float) -> bool:
    if true is None or any(part.numel != p.numel() for part in parts):
        return False
    error = torch.linalg.vector_norm(explicit(parts, p.dtype).view(p.shape) - true).item()
    return error <= _TOLERANCE * torch.finfo(p.dtype).eps * max(torch.linalg.vector_norm(true).item(), scale)


def _size(part: Part, delta: Tensor) -> float:
    """Bound the terms whose sum is the gradient, in order of magnitude: rounding errors are relative to it."""
    if isinstance(part, Direct):
        positions = max(1, delta.numel() // max(1, part.numel))
        return float(torch.linalg.vector_norm(delta)) * positions**0.5
    made = unfolded(part)
    assert isinstance(made, Outer) and isinstance(made.right, Dense)
    right = made.right.values[0, 0].norm(dim=-1)
    return float(right.sum() if isinstance(made.left, OneHot) else (made.left.values[0, 0].norm(dim=-1) * right).sum())


def _try(use: Use, delta: Tensor, layout: str, n: int) -> dict[str, Part] | None:
    """The last sample's parts if samples lie as `layout` says and only the last one has a gradient; else None."""
    x, d = arranged(use.x, layout, n), arranged(delta, layout, n)
    if x is None or d is None or d[: n - 1].any():
        return None
    return ruled(use, x[n - 1 :], d[n - 1 :, None])
