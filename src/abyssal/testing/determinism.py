"""Findings on single blocks, from what was observed of one call: is it a block that can be run again?"""

from __future__ import annotations

import itertools
import math

import torch

from abyssal.testing.observe import Observation
from abyssal.testing.report import Finding

_STORE = "or give this block the policy abyssal.Store()"
# Per refinement. A slower block costs more evaluations than it saves memory worth having.
_SLOW = 0.7


def stream_findings(name: str, seen: Observation, *, single: bool) -> list[Finding]:
    """Whether the block has the shape of a residual block.

    Args:
        name: the block's.
        seen: what was observed of it.
        single: the block alone is checked, so that a misfit fails; in a model it only is kept.
    """
    if seen.cached:
        what = "was called with a key-value cache that is not empty: it runs as plain autograd"
        return [Finding("note", "stream", name, what, "pass use_cache=False in training")]
    if not seen.called:
        what = "was not called by the forward pass with a tensor argument: nothing else was checked of it"
        advice = "leave it out of blocks=, or use a batch that reaches it"
        return [Finding("warning", "stream", name, what, advice)]
    if not seen.returns_tensor:
        advice = "return the new state as a tensor, or as the first entry of a tuple"
        return [Finding("error", "stream", name, seen.shape, advice)]
    if seen.shape:
        what = f"{seen.shape}, so that its input cannot be restored from its output: it is kept"
        advice = "leave it out of the chain (abyssal reverses blocks that keep shape and dtype)"
        return [Finding("error" if single else "warning", "stream", name, what, advice)]
    if seen.returns:
        what = f"returns a {seen.returns}; its first tensor is taken as the residual stream"
        return [Finding("note", "stream", name, what)]
    return [Finding("ok", "stream", name, "returns a tensor of its input's shape and dtype")]


def determinism_findings(name: str, seen: Observation, dtype: torch.dtype) -> list[Finding]:
    """Whether two calls from the same torch random state and buffers give the same output."""
    if not seen.called:
        return []
    attributes = ", ".join(map(repr, seen.attributes))
    if seen.difference is None:
        return _steady_findings(name, seen, attributes)
    d = seen.difference
    figure = f"{d.entries} of {d.of} entries, by up to {d.largest:.1e} ({d.relative:.1e} relative)"
    if d.relative <= math.sqrt(torch.finfo(dtype).eps) and not seen.causes:
        what = f"called again from the same state, returns the same to rounding: {figure} differ"
        return [Finding("note", "determinism", name, what, figure=d.relative)]
    if seen.causes:
        cause = "; ".join(seen.causes)
        advice = f"draw with torch's global generator (torch.rand), {_STORE}"
    elif attributes:
        cause = f"its attribute(s) {attributes} changed during the call: it depends on a counter or a state"
        advice = f"pass the state as an argument, make it a buffer (buffers are put back), {_STORE}"
    else:
        cause = "no cause was seen: randomness or a state held outside of the module, or a kernel"
        advice = f"try torch.use_deterministic_algorithms(True), {_STORE}"
    what = f"called again from the same torch random state and buffers, differs in {figure}. {cause}"
    return [Finding("error", "determinism", name, what, advice, d.relative)]


def _steady_findings(name: str, seen: Observation, attributes: str) -> list[Finding]:
    what = "called again from the same state, returns the same, bit for bit"
    found = [Finding("ok", "determinism", name, what)]
    if seen.causes:
        what = f"{'; '.join(seen.causes)}. Its output happened not to differ, but recomputation draws anew"
        advice = f"draw with torch instead (torch.rand), {_STORE}"
        found = [Finding("warning", "determinism", name, what, advice)]
    if attributes:
        what = f"every call changes the attribute(s) {attributes}: recomputation does, too, once more per step"
        found.append(Finding("note", "determinism", name, what, "make it a buffer if it should count steps"))
    return found


def argument_findings(name: str, seen: Observation) -> list[Finding]:
    """Whether the block leaves its arguments alone, which are needed again."""
    found = []
    if seen.mutates_stream:
        what = "changes its input in place; a private copy is kept, so that its gradients stay exact"
        found.append(Finding("note", "arguments", name, what))
    if seen.mutates:
        what = f"changes {', '.join(seen.mutates)} in place, which is needed again in the backward pass"
        found.append(Finding("error", "arguments", name, what, f"change a copy (x.clone()), {_STORE}"))
    return found


def contraction_finding(name: str, seen: Observation, tolerance: float) -> Finding | None:
    """How much of the error one refinement takes away, and which `Reverse` restores the block's input."""
    errors = seen.state_errors
    if not errors or not all(map(math.isfinite, errors)):
        if not errors:
            return None
        what = "restoring its input from its output overflows: it does not contract"
        return Finding("warning", "contraction", name, what, "keep it: abyssal.Keep()", math.inf)
    ratio = _ratio(errors)
    enough = next((k for k, error in enumerate(errors) if error <= tolerance), None)
    contracts = f"contracts by {ratio:.1g} per refinement"
    if enough is not None and ratio < 1.0:
        what = f"{contracts}: Reverse({enough}) restores its input to {errors[enough]:.0e}"
        return Finding("ok", "contraction", name, what, figure=ratio)
    if ratio < _SLOW:
        k = len(errors) - 1 + math.ceil(math.log(tolerance / errors[-1]) / math.log(ratio))
        what = f"{contracts}: it would take Reverse({k}) to restore its input to {tolerance:g}"
        return Finding("warning", "contraction", name, what, "keep it, or scale its branch down", ratio)
    verb = "contracts too slowly" if ratio < 1.0 else "does not contract"
    what = f"{verb}: a refinement multiplies its restored input's error by {ratio:.2g} (now {errors[-1]:.0e})"
    return Finding("warning", "contraction", name, what, "keep it: abyssal.Keep()", ratio)


def _ratio(errors: list[float]) -> float:
    """The last ratio of successive errors that rounding does not spoil."""
    ratios = [b / a for a, b in itertools.pairwise(errors) if a > 1e-12]
    return ratios[-1] if ratios else 0.0
