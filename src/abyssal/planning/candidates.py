"""What each candidate policy does to one captured call: state error, and the error of its vector-Jacobian product.

The gradient of the call is taken at the state that a policy would restore, in the very surroundings of the forward
pass, and compared with that at the true input. Coded states are made by running the closed loop over the last few
increments: the error of a loop is one quantisation error, so that it forgets its start within a block or two.

Not every candidate costs a vector-Jacobian product. The product's error is proportional to the state's as long as
both are small, so codes of the bits between those in `MEASURED_BITS` are scaled from their neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.codec.feedback import Decoded as Decoding
from abyssal.codec.feedback import Runner, encode, increment, wide_type
from abyssal.codec.quantiser import Codec
from abyssal.engine.policy import Code, Policy, fixed_point_step
from abyssal.planning.probe import Cotangents, Gradients, ProbedCall

MEASURED_BITS = {0: (1, 2, 4, 8), 1: (2, 4)}  # by refinements
_WARM_UP = 3  # increments that the loop is run over


class Restored(NamedTuple):
    """A state that a policy restored, and the better one for the block below: [*stream] each."""

    state: Tensor
    handed: Tensor


@dataclass
class Effect:
    """What one policy does to one call, in absolute figures, to be added up over a block's calls.

    Attributes:
        state, handed: norm of the error of the restored state, and of that handed down.
        worst: largest relative error of one position.
        passed_on: relative error of the gradient that leaves the call toward the blocks below.
        weights: norm of the error of the gradient of the block's parameters.
        measured: False where the last two were scaled.
    """

    state: float
    handed: float
    worst: float
    passed_on: float = 0.0
    weights: float = 0.0
    measured: bool = True


@dataclass
class CallEffects:
    """One call, measured.

    Attributes:
        norm, increment: norms of its input, and of output less input.
        refined: norm of the error after one fixed-point step from the output.
        difference: relative difference of the recomputed output from the true one; None if it was not compared.
        own: norm of the exact gradient of the block's parameters.
        effects: by policy.
        noises: of errors in random directions, of several sizes.
    """

    norm: float
    increment: float = math.nan
    refined: float = math.nan
    difference: float | None = None
    own: float = 0.0
    effects: dict[Policy, Effect] = field(default_factory=dict)
    noises: list[Effect] = field(default_factory=list)


def evaluate(call: ProbedCall, cotangents: Cotangents, policies: Sequence[Policy]) -> CallEffects:
    """Measure what `policies` do to `call`.

    Args:
        call: a call.
        cotangents: gradients of the loss with respect to the tensors of its output.
        policies: those that restore anything: neither `Store` nor `Keep`. None if `call.misfit`.
    """
    exact = call.differentiate(call.x, cotangents)
    own = math.hypot(*(distance(g) for g in exact.weights if g is not None))
    found = CallEffects(distance(call.x), difference=call.reproduces(exact.output), own=own)
    if call.misfit:
        return found
    y = exact.output
    found.increment = distance(y, call.x)
    found.refined = distance(fixed_point_step(y, y, call(y)), call.x)
    for policy in policies:
        if policy.inverts and call.one_way:
            continue
        restored = _restore(call, policy, y)
        effect = Effect(
            distance(restored.state, call.x), distance(restored.handed, call.x), worst_position(restored.state, call.x)
        )
        found.effects[policy] = effect
        if not math.isfinite(effect.state):
            effect.passed_on = effect.weights = math.inf
        elif effect.state > 0.0:
            effect.measured = _is_measured(policy)
            if effect.measured:
                _compare(effect, call.differentiate(restored.state, cotangents), exact)
    _scale_the_others(found.effects)
    found.noises = _noises(call, cotangents, exact, found.effects)
    return found


def _noises(call: ProbedCall, cotangents: Cotangents, exact: Gradients, effects: dict[Policy, Effect]) -> list[Effect]:
    """Return the effects of errors in random directions: of the codes that were measured, else of some made here.

    Those made here are the error of a code of 8 bits of the state itself, and that error's own.
    """
    codes = [e for p, e in effects.items() if isinstance(p, Code) and not p.refine and e.measured and e.state > 0.0]
    if codes:
        return codes
    found = []
    wide = call.x.to(wide_type(call.x.dtype))
    _, first = Codec(8).encode(wide)
    _, second = Codec(8).encode(wide - first)
    for decoded in (first, first + second):
        state = decoded.to(call.x.dtype)
        effect = Effect(distance(state, call.x), 0.0, 0.0)
        if 0.0 < effect.state < math.inf:
            _compare(effect, call.differentiate(state, cotangents), exact)
            found.append(effect)
    return found


def _restore(call: ProbedCall, policy: Policy, y: Tensor) -> Restored:
    decoded = None if policy.codec is None else _decoded(call, policy.codec)
    with torch.no_grad():
        s = policy.restore(y, decoded, call)
        handed = policy.hand_down(s, y, call(s) if policy.needs_output else None, decoded)
    return Restored(s, handed)


def _decoded(call: ProbedCall, codec: Codec) -> Decoding:
    """Run the closed loop over the increments up to the call's input."""
    path = [call]
    while path[-1].previous is not None and len(path) <= _WARM_UP:
        path.append(path[-1].previous)
    runner, code = Runner(None, codec.group), None
    for before, now in pairwise(reversed(path)):
        code, runner = encode(codec, increment(now.x, before.x, runner), None)
    return Decoding(runner.state(call.x), code)


def _is_measured(policy: Policy) -> bool:
    return not isinstance(policy, Code) or policy.bits in MEASURED_BITS.get(min(policy.refine, 1), ())


def _compare(effect: Effect, found: Gradients, exact: Gradients) -> None:
    size = math.hypot(*(distance(a) for a in exact.state if a is not None))
    wrong = math.hypot(*_distances(found.state, exact.state))
    effect.passed_on = wrong / size if size > 0.0 else 0.0
    effect.weights = math.hypot(*_distances(found.weights, exact.weights))


def _distances(found: Iterable[Tensor | None], exact: Iterable[Tensor | None]) -> list[float]:
    return [distance(a, b) for a, b in zip(found, exact, strict=True) if a is not None and b is not None]


def _scale_the_others(effects: dict[Policy, Effect]) -> None:
    """Fill in the gradient errors of the codes whose products were not taken."""
    for policy, effect in effects.items():
        if effect.measured:
            continue
        family = [
            other
            for p, other in effects.items()
            if other.measured and isinstance(p, Code) and isinstance(policy, Code)
            if replace(p, bits=policy.bits) == policy and 0.0 < other.state < math.inf
        ]
        effect.passed_on = _interpolated(effect.state, [(e.state, e.passed_on) for e in family])
        effect.weights = _interpolated(effect.state, [(e.state, e.weights) for e in family])


def _interpolated(at: float, points: list[tuple[float, float]]) -> float:
    """Return the value at `at`: a power law between two known points, proportional beyond the outermost."""
    if not points:
        return math.inf
    points = sorted(points)
    below = [p for p in points if p[0] <= at]
    above = [p for p in points if p[0] >= at]
    if below and above and below[-1][0] < above[0][0] and min(below[-1][1], above[0][1]) > 0.0:
        (x0, y0), (x1, y1) = below[-1], above[0]
        weight = math.log(at / x0) / math.log(x1 / x0)
        return y0 ** (1 - weight) * y1**weight
    x, value = below[-1] if below else above[0]
    return value * at / x


def distance(a: Tensor, b: Tensor | None = None) -> float:
    """Return the Euclidean norm of `a`, or of `a - b`; infinite where anything is not a number."""
    kind = torch.promote_types(a.dtype, torch.float32)
    difference = a if b is None else torch.sub(a.to(kind), b)
    value = float(torch.linalg.vector_norm(difference, dtype=kind))
    return value if math.isfinite(value) else math.inf


def worst_position(s: Tensor, x: Tensor) -> float:
    """Return the largest relative error of one position: of one vector along the last dimension, of one pixel.

    Args:
        s: restored state. [batch, channels, height, width], [..., width] or [batch]
        x: true state. As `s`.
    """
    if x.numel() == 0:
        return 0.0
    axis = 1 if x.ndim == 4 and x.shape[1] > 1 else -1 if x.ndim > 1 else 0
    kind = torch.promote_types(x.dtype, torch.float32)
    wrong = torch.linalg.vector_norm(torch.sub(s.to(kind), x), dim=axis, dtype=kind)
    size = torch.linalg.vector_norm(x, dim=axis, dtype=kind)
    ratio = torch.where(wrong > 0, wrong / size, 0.0).max()
    value = float(ratio)
    return value if math.isfinite(value) else math.inf
