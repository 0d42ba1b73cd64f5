"""Measure, choose, verify: which policy every block of a model gets.

`plan` measures the model once on a real batch (`measure.py`), chooses policies that meet a tolerance for the gradient's
error, a budget for the peak of memory, or both (`choose.py`), and verifies the choice as a whole, by the gradient of
the reconstructed model against the exact one, on this batch and on another. Single blocks' errors add up only
approximately and peaks are predicted to a few per cent, so what does not hold is tightened and tried again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.certify.certificate import Certificate
from abyssal.engine.policy import Keep, Policy
from abyssal.models.call import Loss
from abyssal.models.find import Blocks
from abyssal.planning.choose import WORTH_OF_A_STEP, Assignment, Chooser, Constraints, Policies
from abyssal.planning.cost import CostModel, Estimate
from abyssal.planning.measure import DEFAULT_CANDIDATES, measure_step
from abyssal.planning.measurements import BlockMeasurement, Measurements
from abyssal.planning.plan import Plan
from abyssal.planning.plan_data import BlockPlan, Cost, PlanError
from abyssal.planning.precision import gradient_error
from abyssal.planning.solve import InfeasibleError
from abyssal.planning.step import TrainingStep, detached, training_step, variants
from abyssal.profiling.phases import Usage
from abyssal.util.progress import Progress, silent
from abyssal.util.text import bytes_in_words, parse_bytes

SAFETY = 0.7  # of the tolerance: what a batch of verification may take
# Where gradients jump with the state (ReLUs below a BatchNorm in training), a fresh batch had six times the median's
# error (a pre-activation ResNet, docs/benchmarks.md): a batch of verification may take only this part of that.
_JUMPS = 0.3
_ROOM = 0.99  # of the budget: the same for memory
_LARGE_GAP = 0.01  # of the optimiser: to be told
_ROUNDS = 6
_LOOSE = 0.75  # below this part of what is allowed, it is worth asking for less


def plan(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    tolerance: float | None = None,
    memory: int | float | str | None = None,
    check: Any = None,
    blocks: Blocks | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Choose how each block's input is restored, by measurement, and verify the choice end to end.

    The model is left exactly as it was: parameters, gradients, buffers, random state, modes and patches. It is
    measured unpatched, in the mode that it is in, which should be the one it trains in. Takes a few dozen training
    steps' time, in the memory of activation checkpointing.

    Args:
        model: any module with residual blocks.
        batch: a real batch of the size to train with, as the model is called: a mapping of keyword arguments, a tuple
            or list of positional ones, or one tensor.
        loss: makes a scalar of the model's output. Default: the output's `loss`, or a scalar output itself.
        tolerance: largest relative error of the parameter gradient. Alone, the plan stores the fewest bytes. Default
            1e-2, if no budget is given. On the batches of verification 0.7 of it is allowed, so that batches to
            come may differ.
        memory: largest peak, in bytes or as "2GiB": live tensor bytes during forward and backward pass, above the
            level before the step, with gradient buffers allocated already. Alone, the plan is the most accurate one
            that fits, and the fastest if an exact one does. With a tolerance, it is the fastest that meets both.
        check: another batch to verify on. Default: each half of `batch`, or, of one row, its tokens in another order
            or its image mirrored.
        blocks: which modules are the blocks; default: what `abyssal.find_blocks(model)` finds.
        progress: called with what is being done, how many of it are done, and how many there are.

    Returns:
        The plan, for `abyssal.reconstruct(model, plan)`.

    Raises:
        PlanError: if the wish cannot be met; says what is possible.
        NoBlocksError: if no blocks are found and none are given.
        TypeError: for a batch that is none of these, or an output without a scalar loss.
        ValueError: for a tolerance or a budget that is not positive.
    """
    if tolerance is not None and not 0.0 < tolerance < math.inf:
        raise ValueError(f"tolerance: expected a positive relative error such as 1e-2, got {tolerance!r}")
    budget = None if memory is None else parse_bytes(memory)
    if budget == 0:
        raise ValueError(f"memory: expected a positive number of bytes, or a size such as '2GiB', got {memory!r}")
    if tolerance is None and budget is None:
        tolerance = 1e-2
    with training_step(model, batch, loss, blocks) as step:
        return Planner(step, check, progress or silent).plan(tolerance, budget)


@dataclass(frozen=True)
class Verified:
    """A choice, and what a training step under it was measured to do."""

    choice: Assignment
    errors: dict[str, float]
    usage: Usage
    certificate: Certificate
    margin: float = 1.0  # by which a fresh batch may be worse than these

    @property
    def error(self) -> float:
        """The largest error of the gradient."""
        return max(self.errors.values())

    @property
    def counted(self) -> float:
        """The same with its margin."""
        return self.margin * self.error


class Planner:
    """Plans for one borrowed model.

    Args:
        step: its training step on the batch to plan for.
        check: another batch; None for those made of the first.
        progress: told of what is being done.
    """

    def __init__(self, step: TrainingStep, check: Any, progress: Progress) -> None:
        self.step, self.progress = step, progress
        self.measured: Measurements = measure_step(step, DEFAULT_CANDIDATES, progress)
        self.costs = CostModel(self.measured)
        self.chooser = Chooser(self.costs)
        self.notes: list[str] = []
        self._keep: Policies = self.costs.with_all(Keep())
        self._exact = step.gradient(self._keep)
        self._checks = list(self._others(check))
        self._rounds = 0

    def plan(self, tolerance: float | None, memory: int | None) -> Plan:
        """Return a verified plan.

        Raises:
            PlanError: if there is none.
        """
        stream, step = self.measured.stream_bytes, self.measured.keep_seconds
        allowed = Constraints(
            None if tolerance is None else SAFETY * tolerance,
            None if memory is None else _ROOM * memory,
            bytes_per_second=WORTH_OF_A_STEP * stream / step,
        )
        found = self._search(allowed)
        if found is None:
            raise PlanError(self._impossible(tolerance, memory, allowed))
        return self._plan(found, tolerance, memory)

    # ------------------------------------------------------------------ the rounds

    def _search(self, allowed: Constraints) -> Verified | None:
        """Return the best choice that was verified to meet `allowed`, or None."""
        aim, best = allowed, None
        last: Assignment | None = None
        for _ in range(_ROUNDS):
            try:
                choice = self.chooser.choose(aim)
            except InfeasibleError:
                choice = self.chooser.least_memory()
                if allowed.tolerance is not None or last is not None:
                    break
            if last is not None and choice.policies == last.policies:
                break
            last, found = choice, self.verify(choice)
            if not _meets(found, allowed):
                if best is not None:
                    break
                aim = _tightened(aim, allowed, found)
                continue
            if best is None or _is_better(found, best, allowed):
                best = found
            looser = _loosened(aim, allowed, found)
            if looser is None:
                break
            aim = looser
        if best is None and last is not None and allowed.tolerance is not None:
            best = self._with_more_kept(last, allowed)
        return best

    def _with_more_kept(self, choice: Assignment, allowed: Constraints) -> Verified | None:
        """Keep the blocks that add most to the error, half of the rest at a time, until it is met: at last all."""
        policies = dict(choice.policies)
        while True:
            estimate = self.costs.of(policies)
            restored = [name for name, policy in policies.items() if policy.recomputes and not policy.keeps_input]
            if not restored:
                policies = dict(self._keep)
            for name in sorted(restored, key=lambda n: -estimate.blocks[n].share)[: max(1, len(restored) // 2)]:
                policies[name] = self._keep[name]
            found = self.verify(self.chooser.tidied(allowed, Assignment(policies, self.costs.of(policies))))
            if _meets(found, allowed):
                return found
            if not restored or (allowed.memory is not None and found.usage.peak > allowed.memory):
                return None

    def verify(self, choice: Assignment) -> Verified:
        """Take the gradient under a choice, on all batches, and the peak of memory."""
        self._rounds += 1
        self.progress("verification", self._rounds - 1, max(_ROUNDS, self._rounds))
        usage, gradient = self.step.tracked(choice.policies)
        certificate = self.step.certificate
        assert certificate is not None
        errors = {"batch": _error(gradient, self._exact)}
        del gradient
        for words, other in self._checks:
            errors[words] = _error(other.gradient(choice.policies), other.gradient(self._keep))
        inexact = [name for name, p in choice.policies.items() if p.recomputes and not p.keeps_input]
        jumps = any(self.costs.blocks[name].jumps for name in inexact)
        return Verified(choice, errors, usage, certificate, 1 / _JUMPS if jumps else 1.0)

    # ------------------------------------------------------------------ the other batches

    def _others(self, check: Any) -> Iterator[tuple[str, TrainingStep]]:
        """Yield batches to verify on besides the first, with what they are, in words."""
        if check is not None:
            other = self.step.on(*detached(check))
            other.loss()  # what is wrong with a batch that was given is for its giver to know
            yield "check batch", other
            return
        for words, (args, kwargs) in variants(self.step.args, self.step.kwargs):
            other = self.step.on(args, kwargs)
            try:
                with other.under(None):
                    finite = bool(torch.isfinite(other.loss().detach()))
            except (RuntimeError, ValueError, IndexError) as error:
                self.notes.append(f"not verified on {words}: {str(error).splitlines()[0]}. Pass check=, another batch.")
                continue
            if finite:
                yield words, other

    # ------------------------------------------------------------------ the result

    def _plan(self, found: Verified, tolerance: float | None, memory: int | None) -> Plan:
        measured, estimate = self.measured, found.choice.estimate
        blocks = self._blocks(found, estimate)
        stream = sum(block.stored_bytes for block in blocks)
        activations = sum(b.activation_bytes for b in measured.blocks)
        kept = self.costs.of(self._keep).stored_bytes
        self.progress("time of a step", 0, 1)
        notes = [*self.notes]
        if measured.plain_peak_bytes is None:
            notes.append("plain training does not fit into memory here: its figures are left out")
        if self.chooser.gap > _LARGE_GAP:
            notes.append(f"the optimiser ran out of time: a choice may be up to {self.chooser.gap:.1%} better")
        if tolerance is None and found.error > 1e-2:
            notes.append(
                f"the most accurate plan within this budget has a gradient error of {found.error:.0e}: "
                "allow more memory, or check that training stands it"
            )
        return Plan(
            blocks=blocks,
            tolerance=tolerance,
            memory=memory,
            gradient_errors=found.errors,
            bf16_error=measured.bf16_error,
            bf16_reason=measured.bf16_reason,
            cost=Cost(stream, found.usage.peak, self.step.seconds(found.choice.policies)),
            checkpointing=Cost(kept, measured.keep_peak_bytes, measured.keep_seconds),
            plain=Cost(
                activations,
                measured.plain_peak_bytes,
                None if math.isnan(measured.plain_seconds) else measured.plain_seconds,
            ),
            peak_set_by=found.usage.set_by,
            batch=measured.batch,
            environment=measured.environment,
            notes=tuple(notes),
        )

    def _blocks(self, found: Verified, estimate: Estimate) -> tuple[BlockPlan, ...]:
        certified = {block.name: block for block in found.certificate.blocks}
        state = {name: _figure(certified[name].error, own.state_error) for name, own in estimate.blocks.items()}
        weight = {
            block.name: self._sensitivity(block, found.choice.policies[block.name], state[block.name])
            for block in self.measured.blocks
        }
        expected = math.hypot(*(weight[name] * state[name] for name in state))
        # Errors add up only roughly in squares: have the certificate's sum agree with what was measured.
        factor = min(5.0, max(0.2, found.error / expected)) if expected > 0.0 and found.error > 0.0 else 1.0
        rows = []
        for block in self.measured.blocks:
            policy, own = found.choice.policies[block.name], estimate.blocks[block.name]
            module = self.step.blocks[block.name]
            rows.append(
                BlockPlan(
                    name=block.name,
                    kind=block.kind,
                    policy=policy,
                    stored_bytes=certified[block.name].stored_bytes if policy.recomputes else block.activation_bytes,
                    state_error=state[block.name],
                    gradient_share=factor * weight[block.name] * state[block.name],
                    sensitivity=factor * weight[block.name],
                    seconds=own.seconds,
                    parameters=tuple((name, tuple(p.shape)) for name, p in module.named_parameters()),
                    note="; ".join(block.notes),
                )
            )
        return tuple(rows)

    def _sensitivity(self, block: BlockMeasurement, policy: Policy, state: float) -> float:
        """Return the gradient's error per error of a block's state, at the size that this has, or else at 1e-3."""
        at = state if 0.0 < state < math.inf else 1e-3
        return self.costs.share(block, policy, at) / at

    def _impossible(self, tolerance: float | None, memory: int | None, allowed: Constraints) -> str:
        """Say what is possible instead of a wish that is not."""
        assert memory is not None
        asked = f"a peak of at most {bytes_in_words(memory)}"
        least = self.verify(self.chooser.least_memory())
        set_by = f"set by {least.usage.set_by}"
        if tolerance is None or least.usage.peak > _ROOM * memory:
            return (
                f"memory={memory}: {asked} is not possible on this batch. The smallest peak found is "
                f"{bytes_in_words(math.ceil(least.usage.peak / _ROOM))}, {set_by} (gradient error {least.error:.0e}); "
                f"checkpointing has {_words(self.measured.keep_peak_bytes)}, plain training "
                f"{_words(self.measured.plain_peak_bytes)}. Use a smaller batch, or fewer tokens."
            )
        accurate = self._search(replace(allowed, tolerance=None)) or least
        return (
            f"tolerance={tolerance:g} and memory={memory}: {asked} leaves a gradient error of "
            f"{accurate.counted / SAFETY:.1e} (by {_kinds(accurate)}); the smallest peak found at any error is "
            f"{bytes_in_words(math.ceil(least.usage.peak / _ROOM))}, {set_by}. Allow more of either: checkpointing, "
            f"which is exact, has {_words(self.measured.keep_peak_bytes)}."
        )


def _meets(found: Verified, allowed: Constraints) -> bool:
    return (allowed.tolerance is None or found.counted <= allowed.tolerance) and (
        allowed.memory is None or found.usage.peak <= allowed.memory
    )


def _is_better(found: Verified, best: Verified, allowed: Constraints) -> bool:
    if allowed.memory is not None and allowed.tolerance is None:
        return (found.error, found.choice.estimate.seconds) < (best.error, best.choice.estimate.seconds)
    return allowed.rank(found.choice.estimate) < allowed.rank(best.choice.estimate)


def _tightened(aim: Constraints, allowed: Constraints, found: Verified) -> Constraints:
    """Return what to aim at after a choice that was verified not to meet what is allowed."""
    tolerance, memory = aim.tolerance, aim.memory
    if tolerance is not None and allowed.tolerance is not None and not found.counted <= allowed.tolerance:
        ratio = allowed.tolerance / found.counted if found.counted < math.inf else 0.0
        # From what the choice was expected to have, since it may have aimed at more than it used.
        tolerance = min(tolerance, found.choice.estimate.error) * max(1e-3, 0.8 * ratio)
    if memory is not None and allowed.memory is not None and found.usage.peak > allowed.memory:
        memory = min(memory, found.choice.estimate.peak_bytes) - 1.05 * (found.usage.peak - allowed.memory)
    return replace(aim, tolerance=tolerance, memory=memory)


def _loosened(aim: Constraints, allowed: Constraints, found: Verified) -> Constraints | None:
    """Return what to aim at after a choice that met all with room to spare; None if there is little to gain."""
    tolerance, memory = aim.tolerance, aim.memory
    if tolerance is not None and allowed.tolerance is not None and found.counted < _LOOSE * allowed.tolerance:
        tolerance *= min(4.0, 0.9 * allowed.tolerance / found.counted) if found.counted > 0.0 else 2.0
    if memory is not None and allowed.memory is not None and found.usage.peak < 0.97 * allowed.memory:
        memory += 0.9 * (allowed.memory - found.usage.peak)
    return (
        None if (tolerance, memory) == (aim.tolerance, aim.memory) else replace(aim, tolerance=tolerance, memory=memory)
    )


def _error(found: list[Tensor | None], exact: list[Tensor | None]) -> float:
    error = gradient_error(found, exact)
    return error if math.isfinite(error) else math.inf


def _figure(measured: float | None, expected: float) -> float:
    return expected if measured is None or not math.isfinite(measured) else measured


def _words(count: int | None) -> str:
    return "more than fits here" if count is None else bytes_in_words(count)


def _kinds(found: Verified) -> str:
    return ", ".join(dict.fromkeys(str(policy) for policy in found.choice.policies.values()))
