"""Per-sample gradients of a whole model from one forward pass, through hooks on the layers that are recognised.

A forward hook notes a layer's input and hands on a copy of its output; the gradient by that output, one backward
pass for each of the model's outputs, is all samples' at once, since no sample's output depends on another's input.
Gradients by weights are never formed in these passes.

What this takes for granted is checked, parameter by parameter, and a parameter that fails goes to
:mod:`abyssal.tangent.fallback`:

- that nothing else uses the parameter: autograd's graph has exactly as many edges to it as recognised layers called
  with it (in every pass);
- that the layer does what its rule says, that its samples are where the rule looks for them, and that outputs of
  several samples are not mixed: for one random combination of the outputs of one sample in a batch of two, the
  gradients of the other sample vanish and those of the parameters are autograd's own (once, :func:`study`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from abyssal.tangent.forecast import blueprint
from abyssal.tangent.layers import Rule, guess, rule_for
from abyssal.tangent.parts import Dense, Direct, OneHot, Outer, Part, explicit, unfolded

__all__ = ["Call", "Plan", "agree", "capture", "study"]

# Runs the model on a batch of samples and gives its outputs. [n, k]
Call = Callable[[], Tensor]

_TOLERANCE = 256  # of rounding errors, in units of the sum of norms that a gradient is added up from
_SMALL = 4096  # entries of a parameter that is small


@dataclass
class _Use:
    """One call of one recognised layer."""

    key: tuple[str, int]
    module: nn.Module
    rule: Rule
    x: Tensor
    edge: GradientEdge
    expanded: bool


@dataclass
class Plan:
    """What was found out about a model.

    Attributes:
        parameters: that count, by name; each once, however many names it has.
        layouts: for each call of a layer, where its samples are: "first" dimension; "expanded", one row that all
            share; "flattened" with positions into one dimension; "second" dimension. Missing where not known.
        fallback: names of parameters whose gradients hooks do not give.
        parts: blueprints of what one sample gives, by parameter.
        graph: bytes that one sample's forward pass keeps for the backward pass.
    """

    parameters: dict[str, nn.Parameter]
    layouts: dict[tuple[str, int], str] = field(default_factory=dict)
    fallback: set[str] = field(default_factory=set)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    graph: int = 0


@contextlib.contextmanager
def _recorded(model: nn.Module, n: int, expand: Callable[[tuple[str, int]], bool]) -> Iterator[list[_Use]]:
    """Note every call of a recognised layer, and let each have an output of its own for every sample."""
    uses: list[_Use] = []
    calls: Counter[str] = Counter()
    handles = []

    def watch(name: str, rule: Rule) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            key = (name, calls[name])
            calls[name] += 1
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if not isinstance(output, Tensor) or len(given) != 1 or output.dim() == 0 or not torch.is_grad_enabled():
                return None
            out = output if output.requires_grad else output.detach().requires_grad_()
            expanded = len(out) == 1 < n and expand(key)
            out = out.expand(n, *out.shape[1:]) if expanded else out
            uses.append(_Use(key, module, rule, given[0].detach(), get_gradient_edge(out), expanded))
            # A copy, so that whatever the model writes into it in place, the gradient is the layer's own output's.
            return out.clone()

        return hook

    for name, module in model.named_modules():
        rule = rule_for(module)
        if rule is not None:
            handles.append(module.register_forward_hook(watch(name, rule), prepend=True, with_kwargs=True))
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


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
            with _recorded(model, n, lambda key, expand=expand: expand) as uses, _counted(plan, n):  # type: ignore[misc]
                found = call()
        except Exception:
            if not expand:
                raise
            continue
        if found.shape[1:] == alone.shape and agree(found[-1], alone):
            break
    weights = torch.linspace(-1, 1, found.shape[1], dtype=torch.float64).cos_().to(found)
    checked = _to_check(parameters, uses)
    edges = [use.edge for use in uses]
    grads = _grad((found[n - 1] * weights).sum(), [*edges, *(parameters[name] for name in checked)])
    true = dict(zip(checked, grads[len(edges) :], strict=True))
    _judge(plan, uses, grads[: len(edges)], true, _edges_to(found, parameters), n)
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


def _to_check(parameters: Mapping[str, nn.Parameter], uses: Sequence[_Use]) -> list[str]:
    """All small parameters, and of large ones the first of each kind of layer; all of those whose rule is a guess.

    To form the gradients of all would take as long as all else.
    """
    names, kinds = _names(parameters), set()
    chosen = {name: None for name, p in parameters.items() if p.numel() <= _SMALL}
    for use in uses:
        kind = type(use.module)
        for p in use.module.parameters(recurse=False):
            if id(p) in names and (kind not in kinds or use.rule is guess):
                chosen[names[id(p)]] = None
        kinds.add(kind)
    return list(chosen)


def _grad(scalar: Tensor, inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
    if not inputs or not scalar.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(scalar, inputs, allow_unused=True)


def _edges_to(outputs: Tensor, parameters: Mapping[str, nn.Parameter]) -> Counter[str]:
    """How many edges of autograd's graph end at each parameter."""
    names = _names(parameters)
    counts: Counter[str] = Counter()
    seen, waiting = set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        for follower, _ in node.next_functions if node is not None else ():
            if follower is None:
                continue
            if (leaf := getattr(follower, "variable", None)) is not None and id(leaf) in names:
                counts[names[id(leaf)]] += 1
            elif follower not in seen:
                seen.add(follower)
                waiting.append(follower)
    return counts


def _judge(
    plan: Plan,
    uses: Sequence[_Use],
    deltas: Sequence[Tensor | None],
    true: Mapping[str, Tensor | None],
    counts: Counter[str],
    n: int,
) -> None:
    """Fill in a plan from the gradients of one combination of the last sample's outputs."""
    parts: dict[str, list[Part]] = {name: [] for name in plan.parameters}
    scales: dict[str, float] = dict.fromkeys(plan.parameters, 0.0)
    names = _names(plan.parameters)
    for use, delta in zip(uses, deltas, strict=True):
        if delta is None:
            continue
        for layout in ("expanded",) if use.expanded else ("first", "flattened", "second"):
            found = _try(use, delta, layout, n)
            if found is not None:
                plan.layouts[use.key] = layout
                for name, part in _named(use.module, found, names):
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


def _names(parameters: Mapping[str, nn.Parameter]) -> dict[int, str]:
    return {id(p): name for name, p in parameters.items()}


def _named(module: nn.Module, parts: Mapping[str, Part], names: Mapping[int, str]) -> Iterator[tuple[str, Part]]:
    """A layer's parts by the names of those of its parameters that count."""
    for short, part in parts.items():
        name = names.get(id(getattr(module, short)))
        if name is not None:
            yield name, part


def _size(part: Part, delta: Tensor) -> float:
    """Bound the terms whose sum is the gradient, in order of magnitude: rounding errors are relative to it."""
    if isinstance(part, Direct):
        positions = max(1, delta.numel() // max(1, part.numel))
        return float(torch.linalg.vector_norm(delta)) * positions**0.5
    made = unfolded(part)
    assert isinstance(made, Outer) and isinstance(made.right, Dense)
    right = made.right.values[0, 0].norm(dim=-1)
    return float(right.sum() if isinstance(made.left, OneHot) else (made.left.values[0, 0].norm(dim=-1) * right).sum())


def _try(use: _Use, delta: Tensor, layout: str, n: int) -> dict[str, Part] | None:
    """The last sample's parts if samples lie as `layout` says and only the last one has a gradient; else None."""
    x, d = _arranged(use.x, layout, n), _arranged(delta, layout, n)
    if x is None or d is None or d[: n - 1].any():
        return None
    return _parts(use, x[n - 1 :], d[n - 1 :, None])


def _parts(use: _Use, x: Tensor, deltas: Tensor) -> dict[str, Part] | None:
    """Apply a layer's rule; None for what the rule does not know."""
    try:
        return use.rule(use.module, x, deltas)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _arranged(values: Tensor, layout: str, n: int, at: int = 0) -> Tensor | None:
    """Bring samples to dimension `at`, where the layer's own begin; None where they cannot lie as the layout says."""
    size = values.shape[at]
    if layout == "expanded" and size == 1:
        return values.expand(*values.shape[:at], n, *values.shape[at + 1 :])
    if layout in ("first", "expanded"):
        return values if size == n else None
    if layout == "flattened":
        if size % n or values.dim() - at > 3:
            return None
        return values.reshape(*values.shape[:at], n, -1, *values.shape[at + 1 :])
    return values.transpose(at, at + 1) if values.dim() > at + 1 and values.shape[at + 1] == n else None


def capture(
    model: nn.Module, plan: Plan, call: Call, n: int, outputs: slice
) -> tuple[dict[str, list[Part]], set[str], Tensor]:
    """Run a block of samples and take every parameter's gradients by some of the outputs.

    Args:
        model: as it was studied.
        plan: from :func:`study`.
        call: runs the model on the block.
        n: samples in it.
        outputs: which of the model's outputs.

    Returns:
        Parts by parameter; names of the parameters that need the fallback; all outputs, [n, k].
    """
    with _recorded(model, n, lambda key: plan.layouts.get(key) == "expanded") as uses:
        found = call()
    counts = _edges_to(found, plan.parameters)
    known = [use for use in uses if use.key in plan.layouts]
    names = _names(plan.parameters)
    parts: dict[str, list[Part]] = {}
    seen: Counter[str] = Counter()
    for use, grads in zip(known, _gradients(found[:, outputs], [use.edge for use in known]), strict=True):
        layout = plan.layouts[use.key]
        x = _arranged(use.x, layout, n)
        deltas = None if grads is None else _arranged(grads, layout, n, at=1)
        ruled = None if x is None or deltas is None else _parts(use, x, deltas.transpose(0, 1))
        for name, part in _named(use.module, ruled or {}, names):
            seen[name] += 1
            parts.setdefault(name, []).append(part)
    unknown = {
        name for name in plan.parameters if counts[name] and (counts[name] != seen[name] or name in plan.fallback)
    }
    return {name: part for name, part in parts.items() if name not in unknown}, unknown, found.detach()


def _gradients(outputs: Tensor, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
    """Gradients of each output's sum over samples by each edge. Each [A, ...]."""
    count = outputs.shape[1]
    if not edges or not outputs.requires_grad:
        return [None] * len(edges)
    if count == 1:
        return [None if g is None else g[None] for g in _grad(outputs.sum(), edges)]
    chosen = torch.eye(count, dtype=outputs.dtype, device=outputs.device)[:, None].expand(-1, len(outputs), -1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.autograd.grad(
                outputs, edges, chosen, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
    except Exception:  # some operation's backward is unknown to vmap
        return _by_loops(outputs, edges, chosen)


def _by_loops(outputs: Tensor, edges: Sequence[GradientEdge], chosen: Tensor) -> Sequence[Tensor | None]:
    stacked: list[Tensor | None] = [None] * len(edges)
    for a, weights in enumerate(chosen):
        grads = torch.autograd.grad(outputs, edges, weights, retain_graph=a + 1 < len(chosen), allow_unused=True)
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            whole = stacked[i]
            if whole is None:
                whole = stacked[i] = grad.new_zeros(len(chosen), *grad.shape)
            whole[a] = grad
    return stacked
