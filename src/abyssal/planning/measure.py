"""What every policy would do to every block of a model, measured on one batch.

`measure` gives the figures that `plan` chooses by and `inspect` shows. The model runs a few dozen times as long as
one training step takes, in the memory of activation checkpointing.

**What a block adds to the gradient's error.** The product with a block's Jacobian at a restored state `s` instead
of the true `x` is wrong twice: in the gradient of the block's own weights, by `w`, and in the gradient that is
passed on to everything below, by a fraction `e`. With `G` the whole gradient and `B` that part of it which is still
to come, the block's share is `sqrt(w^2 + e^2 |B|^2) / |G|`. Shares of several blocks are errors in different
directions and add up in squares; that is an approximation, which is why a plan is verified as a whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.codec.quantiser import Codec
from abyssal.codec.sample import sample_count
from abyssal.engine.policy import Code, Keep, Policy, Reverse, Store
from abyssal.engine.session import Session, rounding
from abyssal.models.call import Loss
from abyssal.models.find import Blocks
from abyssal.planning.candidates import CallEffects, distance, evaluate
from abyssal.planning.measurements import BlockMeasurement, Candidate, Measurements
from abyssal.planning.precision import available_bytes, bf16_error
from abyssal.planning.probe import Captured, Cotangents, Probe, ProbedCall
from abyssal.planning.step import TrainingStep, training_step
from abyssal.profiling.phases import Usage, now
from abyssal.util.environment import environment
from abyssal.util.progress import Progress, silent

DEFAULT_CANDIDATES: tuple[Policy, ...] = (
    Store(),
    Keep(),
    *(Code(bits, refine=refine) for refine in (0, 1) for bits in (1, 2, 3, 4, 6, 8)),
    *(Reverse(k) for k in range(4)),
)


class MeasureError(ValueError):
    """A model could not be measured; the message says why and what to do."""


def measure(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    policies: Sequence[Policy] = DEFAULT_CANDIDATES,
    *,
    blocks: Blocks | None = None,
    progress: Progress | None = None,
) -> Measurements:
    """Measure what every policy would do to every block of `model` on `batch`.

    The model is left exactly as it was: parameters, gradients, buffers, random state, modes and patches. It is
    measured unpatched, in the mode that it is in.

    Args:
        model: any module with residual blocks.
        batch: what it is called with: a mapping of keyword arguments, a tuple or list of positional ones, or one
            tensor.
        loss: makes a scalar of the model's output. Default: the output's `loss`, or a scalar output itself.
        policies: the candidates.
        blocks: which modules are the blocks; default: what `abyssal.find_blocks(model)` finds.
        progress: called with what is being done, how many of it are done, and how many there are.

    Returns:
        The measurements.

    Raises:
        NoBlocksError: if no blocks are found and none are given.
        TypeError: for another batch, or an output without a scalar loss.
        MeasureError: if the loss or the gradient is not finite.
    """
    with training_step(model, batch, loss, blocks) as step:
        return measure_step(step, policies, progress or silent)


def measure_step(step: TrainingStep, policies: Sequence[Policy], progress: Progress) -> Measurements:
    """Measure a training step of a model that is borrowed already; see `measure`."""
    kept = dict.fromkeys(step.blocks, Keep())
    progress("memory of checkpointing", 0, 1)
    usage, gradient = step.tracked(kept)
    norm = math.hypot(*(distance(g) for g in gradient if g is not None))
    if not math.isfinite(norm) or norm == 0.0:
        what = "zero" if norm == 0.0 else "not finite"
        raise MeasureError(
            f"the gradient of this batch is {what}: nothing relative to it can be measured. Pass a batch and weights "
            "with which the model trains."
        )
    found, chains = _Sweep(step, policies, norm, progress).run(usage)
    progress("error of bfloat16", 0, 1)
    low_precision, reason = bf16_error(step, gradient)
    progress("time of a step", 0, 1)
    plain_usage, plain_seconds = _plain(step, found, usage)
    return Measurements(
        blocks=found,
        gradient_norm=norm,
        bf16_error=low_precision,
        bf16_reason=reason,
        plain_peak_bytes=None if plain_usage is None else plain_usage.peak,
        keep_peak_bytes=usage.peak,
        plain_seconds=plain_seconds,
        keep_seconds=step.seconds(kept),
        batch=_batch_in_words(step),
        environment=_environment(step.device),
        chains=chains,
        profile=usage,
    )


@dataclass
class _Measured:
    """One call's figures."""

    call: ProbedCall
    effects: CallEffects
    below: float  # norm of the gradient that was still to come
    activation_bytes: int
    regularity: float | None = None  # of the block before it


@dataclass
class _Sweep:
    """One forward and one backward pass with probes in place of the blocks."""

    step: TrainingStep
    policies: Sequence[Policy]
    norm: float
    progress: Progress
    arrived: float = 0.0  # squared norm of the parameter gradients that are complete
    found: dict[int, _Measured] = field(default_factory=dict)  # by call
    _times: dict[object, tuple[float, float]] = field(default_factory=dict)
    _codings: dict[tuple[Codec, int, torch.device], tuple[float, float]] = field(default_factory=dict)

    def run(self, usage: Usage) -> tuple[tuple[BlockMeasurement, ...], tuple[tuple[str, ...], ...]]:
        """Run it, and return the blocks' figures and the chains."""
        restoring = [p for p in self.policies if p.recomputes and not p.keeps_input]
        captured = Captured(lambda call, cotangents: self._measure(call, cotangents, captured, restoring))
        with self.step.under(None):
            probes = self._install(captured)
            handles = [p.register_hook(self._arrive) for p in self.step.parameters]
            try:
                torch.autograd.grad(self.step.loss(), self.step.parameters, allow_unused=True)
            finally:
                for handle in handles:
                    handle.remove()
        chains = captured.chains()
        order = {id(call): i for i, chain in enumerate(chains) for call in chain}
        places = {probe.name: [call for call in captured.calls if call.probe is probe] for probe in probes}
        probes.sort(key=lambda probe: captured.calls.index(places[probe.name][0]) if places[probe.name] else 10**9)
        self._times = _times(captured.calls)
        blocks = tuple(
            self._block(
                probe, places[probe.name], order[id(places[probe.name][0])] if places[probe.name] else -1, usage
            )
            for probe in probes
        )
        return blocks, tuple(tuple(call.probe.name for call in chain) for chain in chains)

    def _install(self, captured: Captured) -> list[Probe]:
        session = Session("warn", math.inf)
        session.join(self.step.blocks)
        probes = [Probe(module, name, Keep(), session) for name, module in self.step.blocks.items()]
        for probe in probes:
            probe.captured = captured
            probe.install()
        return probes

    def _arrive(self, gradient: Tensor) -> None:
        self.arrived += distance(gradient) ** 2

    def _measure(self, call: ProbedCall, cotangents: Cotangents, captured: Captured, policies: list[Policy]) -> None:
        effects = evaluate(call, cotangents, policies)
        below = math.sqrt(max(0.0, self.norm**2 - self.arrived - effects.own**2))
        measured = _Measured(call, effects, below, call.activation_bytes())
        if call.previous is not None and _alike(call.probe, call.previous.probe) and not call.misfit:
            with torch.no_grad():
                here, before = call(call.x), call.previous(call.x)
            size = distance(before, call.x)
            measured.regularity = distance(here, before) / size if size else None
        self.found[id(call)] = measured
        self.progress("blocks", len(self.found), len(captured.calls))

    def _block(self, probe: Probe, calls: list[ProbedCall], chain: int, usage: Usage) -> BlockMeasurement:
        """Put the figures of one block's calls together."""
        found = [m for call in calls if (m := self.found.get(id(call))) is not None]
        x = calls[0].x if calls else None
        forward, backward = (len(calls) * seconds for seconds in self._times.get(_kin(calls), (0.0, 0.0)))
        following = [self.found.get(id(call.next)) for call in calls if call.next is not None]
        regularity = next((m.regularity for m in following if m is not None), None)
        only, notes = _restrictions(probe, calls, found)
        candidates = [
            self._candidate(policy, calls, found, forward, backward)
            for policy in self.policies
            if only is None or isinstance(policy, only)
        ]
        increment, norm = _root([m.effects.increment for m in found]), _root([m.effects.norm for m in found])
        refined = _root([m.effects.refined for m in found])
        return BlockMeasurement(
            name=probe.name,
            kind=type(probe.module).__name__,
            chain=chain,
            shape=() if x is None else tuple(x.shape),
            dtype="" if x is None else str(x.dtype).removeprefix("torch."),
            stream_bytes=sum(call.x.nbytes for call in calls),
            increment_ratio=increment / norm if norm else 0.0,
            contraction=refined / increment if increment else 0.0,
            regularity=regularity,
            activation_bytes=sum(m.activation_bytes for m in found),
            recompute_bytes=_transient(usage, probe.name),
            forward_seconds=forward,
            backward_seconds=backward,
            candidates=tuple(candidates),
            notes=notes,
            calls=len(calls),
            norm=norm,
            numel=sum(call.x.numel() for call in calls),
            surroundings_bytes=sum(call.surroundings_bytes for call in calls),
            responses=self._responses(found),
            jumps=bool(probe.kinks),
        )

    def _responses(self, found: list[_Measured]) -> tuple[tuple[float, float], ...]:
        norm, points = _root([m.effects.norm for m in found]), []
        for noises in zip(*(m.effects.noises for m in found), strict=False):
            state = _root([e.state for e in noises])
            wrong = [e.weights for e in noises]
            wrong += [e.passed_on * m.below for m, e in zip(found, noises, strict=True)]
            if norm:
                points.append((state / norm, _root(wrong) / self.norm))
        return tuple(sorted(points))

    def _candidate(
        self, policy: Policy, calls: list[ProbedCall], found: list[_Measured], forward: float, backward: float
    ) -> Candidate:
        kept = sum(call.surroundings_bytes for call in calls)
        if not policy.recomputes:
            return Candidate(policy, 0.0, 0.0, 0.0, sum(m.activation_bytes for m in found), forward + backward)
        if policy.keeps_input:
            kept += sum(call.x.nbytes for call in calls)
            return Candidate(policy, 0.0, 0.0, 0.0, kept, 2 * forward + backward)
        effects = [(m, m.effects.effects[policy]) for m in found if policy in m.effects.effects]
        norm = _root([m.effects.norm for m in found]) or math.inf
        wrong = [e.weights for _, e in effects] + [e.passed_on * m.below for m, e in effects]
        refinements = getattr(policy, "refine", 1)
        return Candidate(
            policy=policy,
            state_error=_root([e.state for _, e in effects]) / norm,
            worst_token_error=max((e.worst for _, e in effects), default=0.0),
            gradient_share=_root(wrong) / self.norm,
            stored_bytes=kept + sum(_kept_bytes(policy, call) for call in calls),
            seconds=(2 + refinements) * forward + backward + sum(self._code_seconds(policy, call) for call in calls),
            handed_error=_root([e.handed for _, e in effects]) / norm,
            measured=all(e.measured for _, e in effects),
        )

    def _code_seconds(self, policy: Policy, call: ProbedCall) -> float:
        """Return the time of coding and decoding a stream of this size, which is measured once."""
        if policy.codec is None or call.previous is None:
            return 0.0
        key = policy.codec, call.x.numel(), call.x.device
        if key not in self._codings:
            self._codings[key] = _coding_seconds(policy.codec, call.x)
        encoding, decoding = self._codings[key]
        return encoding + decoding * (1 + 2 * getattr(policy, "refine", 0))


def _restrictions(
    probe: Probe, calls: list[ProbedCall], found: list[_Measured]
) -> tuple[tuple[type[Policy], ...] | None, tuple[str, ...]]:
    """Return which policies the block may have (None: any), and what there is to note."""
    notes = [probe.note] if probe.note else []
    if not calls:
        return (Store,), (*notes, *([] if notes else ["not called"]))
    if len(found) < len(calls):
        notes.append("not on the way to the loss" if not found else "some of its calls are not on the way to the loss")
    differences = [m.effects.difference or 0.0 for m in found]
    if any(d > rounding(m.call.x.dtype) for m, d in zip(found, differences, strict=True)):
        return (Store,), (*notes, "random: run again, it returns something else")
    misfits = [call.misfit for call in calls if call.misfit]
    if misfits:
        return (Store, Keep), (*notes, misfits[0])
    if probe.routing:
        notes.append(f"{probe.routing}: a restored input may be routed otherwise")
        return (Store, Keep), tuple(notes)
    if probe.kinks:
        notes.append(f"{probe.kinks}: errors differ widely from batch to batch")
    if one_way := next((call.one_way for call in calls if call.one_way), ""):
        notes.append(one_way.replace("Reverse(1)", "Reverse()"))
        return (Store, Keep, Code), tuple(notes)
    if found and not _root([m.effects.refined for m in found]) < _root([m.effects.increment for m in found]):
        notes.append("does not contract: cannot be reversed")
    return None, tuple(notes)


def _kept_bytes(policy: Policy, call: ProbedCall) -> int:
    sampled = min(sample_count(call.x.numel()), call.x.numel()) * call.x.element_size()
    coded = policy.codec.nbytes(call.x.numel()) if policy.codec is not None and call.previous is not None else 0
    return sampled + coded


def _alike(one: Probe, other: Probe) -> bool:
    """Whether two blocks are different modules of one kind."""
    if one.module is other.module or type(one.module) is not type(other.module):
        return False
    a, b = one.module.parameters(), other.module.parameters()
    return [p.shape for p in a] == [p.shape for p in b]


def _kin(calls: Sequence[ProbedCall]) -> object:
    """Return what calls that take equally long have in common."""
    if not calls:
        return None
    module, x = calls[0].probe.module, calls[0].x
    return type(module), tuple(p.shape for p in module.parameters()), x.shape, x.dtype


def _times(calls: Sequence[ProbedCall]) -> dict[object, tuple[float, float]]:
    """Return the times of forward and backward pass of one call of each kind: medians over all that were taken."""
    forward: dict[object, list[float]] = defaultdict(list)
    backward: dict[object, list[float]] = defaultdict(list)
    for call in calls:
        forward[_kin([call])] += call.forward_seconds
        backward[_kin([call])] += call.backward_seconds
    return {kin: (median(forward[kin] or [0.0]), median(backward[kin] or [0.0])) for kin in forward}


def _transient(usage: Usage, name: str) -> int:
    """Return how far memory rises above the start of the block's backward phase."""
    levels = [0, *(phase.end for phase in usage.phases)]
    rises = [p.peak - level for p, level in zip(usage.phases, levels, strict=False) if p[:2] == ("backward", name)]
    return max(rises, default=0)


def _coding_seconds(codec: Codec, x: Tensor) -> tuple[float, float]:
    """Return the times of encoding and of decoding a tensor like `x`: the least of three."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    times = []
    for _ in range(3):
        begin = now(x.device)
        encoded, _ = codec.encode(wide)
        middle = now(x.device)
        codec.decode(encoded)
        times.append((middle - begin, now(x.device) - middle))
    return min(t for t, _ in times), min(t for _, t in times)


def _plain(step: TrainingStep, blocks: Sequence[BlockMeasurement], kept: Usage) -> tuple[Usage | None, float]:
    """Run the model plainly, if it fits; else return the time as the blocks' measurements have it."""
    expected = kept.peak + sum(b.activation_bytes - b.stream_bytes for b in blocks)
    if 1.2 * expected > available_bytes(step.device):
        return None, math.nan
    return step.tracked(None)[0], step.seconds(None)


def _batch_in_words(step: TrainingStep) -> str:
    named = [*((f"argument {i}", value) for i, value in enumerate(step.args)), *step.kwargs.items()]
    tensors = [f"{key} {list(value.shape)}" for key, value in named if isinstance(value, Tensor)]
    return ", ".join(tensors) or "no tensors"


def _environment(device: torch.device) -> dict[str, str]:
    machine = environment(("torch",))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor
    return {
        **machine.packages,
        "python": machine.python,
        "device": f"{device.type} ({name})",
        "threads": str(torch.get_num_threads()),
        "cores": str(machine.cores),
    }


def _root(values: Sequence[float]) -> float:
    return math.hypot(*values) if values else 0.0
