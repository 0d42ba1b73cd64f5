"""Findings on whole training steps: does the reconstructed one agree with the plain one?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from abyssal.certify.certificate import Certificate
from abyssal.engine.policy import Keep, Policy, Reverse
from abyssal.testing.gradients import (
    Comparison,
    Step,
    compare,
    differing_buffers,
    rounding_tolerance,
    train_step,
)
from abyssal.testing.observe import Observation
from abyssal.testing.report import Finding
from abyssal.testing.subject import Subject, in_short

Policies = Policy | Mapping[str, Policy] | Sequence[Policy] | None
_SEVERAL = (Reverse(0), Reverse(1), Reverse(2))
_NAMED = 4  # blocks named in one sentence
_REPORT = "this is a bug of abyssal's: please report it"
_DETERMINISM_FIRST = "see to the determinism findings first"


class Agreement:
    """Compares training steps of one subject, reconstructed against plain.

    Args:
        subject: the model's private copy and batch.
        observations: what was seen of each block, by name.
        tolerance: relative gradient error allowed to a policy that does not keep exact inputs.
        single: one block is checked; what concerns chains is left out.
    """

    def __init__(self, subject: Subject, observations: dict[str, Observation], tolerance: float, single: bool) -> None:
        """Run the plain step, twice: what differs between the two is noise."""
        self._subject, self._seen, self._tolerance, self._single = subject, observations, tolerance, single
        self._true = train_step(subject)
        again = compare(self._true, train_step(subject), subject.block_names)
        self._noise = max((g.error for g in again.groups), default=0.0)
        self._exact = max(rounding_tolerance(*self._true.gradients.values()), 10 * self._noise)

    def findings(self, policy: Policies) -> list[Finding]:
        """Compare under `Keep()`, then under what was asked for."""
        if not self._noise <= self._tolerance:
            what = f"two plain steps from one seed differ by {self._noise:.1e}: there is nothing to compare with"
            advice = "see which block is not deterministic"
            if not math.isfinite(self._true.loss) or math.isnan(self._noise):
                what = f"the plain training step itself is not finite (its loss is {self._true.loss:g})"
                advice = "check on a batch and weights that train"
            return [Finding("error", "gradients", "", what, advice, self._noise)]
        found = self._under(Keep(), exact=True)
        several: list[list[Finding]] = []
        for one in _policies(policy):
            if one == Keep():
                continue
            exact = isinstance(one, Policy) and (one.keeps_input or not one.recomputes)
            several.append(self._under(one, exact=exact))
        if policy is None and any(all(f.level != "error" for f in fs) for fs in several):
            several = [[_softened(f) for f in fs] for fs in several]  # one that passes is enough
        return [*found, *(f for fs in several for f in fs)]

    def _under(self, policy: Policy | Mapping[str, Policy], *, exact: bool) -> list[Finding]:
        label = str(policy) if isinstance(policy, Policy) else "the given policies"
        try:
            step = train_step(self._subject, policy)
        except Exception as error:
            text = in_short(error)
            named = [name for name in self._seen if f"'{name}'" in str(error)]
            what = f"a training step under {label} raises {text}"
            advice = "the text says what to do"
            return [Finding("error", "gradients", ", ".join(named), what, advice, math.inf)]
        found = self._gradient_findings(label, step, exact)
        if policy == Keep():
            found += self._state_findings(step, label, told=True)
            found += self._dropout_findings(step)
        else:
            found += self._state_findings(step, label, told=False)
            found += self._chain_findings(step.certificate)
        return found

    def _gradient_findings(self, label: str, step: Step, exact: bool) -> list[Finding]:
        comparison = compare(self._true, step, self._subject.block_names)
        if exact:
            return self._exactness_findings(label, comparison)
        error, tolerance = comparison.error, self._tolerance
        worst = comparison.beyond(-1.0)[:1]
        what = f"under {label}: relative error {error:.1e}, {_verdict(error, tolerance)}"
        if error <= tolerance:
            return [Finding("ok", "gradients", "", what, figure=error)]
        what += f"; worst in {_place(worst[0].name, worst[0].worst)} ({worst[0].error:.1e})" if worst else ""
        restored = _worst_restored(step.certificate, tolerance)
        if restored:
            what += f". Worst restored inputs: {', '.join(f'{name} ({e:.1e})' for name, e in restored)}"
        blocks = ", ".join(name for name, _ in restored) or (worst[0].name if worst else "")
        advice = "keep these blocks (abyssal.Keep()), refine more, or scale their branches down"
        advice = _DETERMINISM_FIRST if self._is_random else advice
        return [Finding("error", "gradients", blocks, what, advice, error)]

    def _exactness_findings(self, label: str, comparison: Comparison) -> list[Finding]:
        wrong = comparison.beyond(self._exact)
        if not wrong:
            worst = max((g.error for g in comparison.groups), default=0.0)
            how = "bit for bit" if worst == 0.0 else f"to {worst:.0e}"
            what = f"under {label}: equal to plain autograd's, {how}"
            return [Finding("ok", "gradients", "", what, figure=worst)]
        advice = _DETERMINISM_FIRST if self._is_random else f"if there is no other error, {_REPORT}"
        return [
            Finding(
                "error",
                "gradients",
                group.name,
                f"under {label}, which is exact: relative error {group.error:.1e}, worst in {group.worst}",
                advice,
                group.error,
            )
            for group in wrong
        ]

    @property
    def _is_random(self) -> bool:
        return any(seen.difference is not None for seen in self._seen.values())

    def _state_findings(self, step: Step, label: str, *, told: bool) -> list[Finding]:
        """Output, buffers and random state after a step; `told`: also say so where they are right."""
        found = []
        change = abs(step.loss - self._true.loss) / (abs(self._true.loss) or 1.0)
        if not change <= self._exact and not (math.isnan(step.loss) and math.isnan(self._true.loss)):
            what = f"under {label}, the loss itself differs by {change:.1e}"
            found.append(Finding("error", "gradients", "", what, _REPORT, change))
        differing = differing_buffers(self._true, step)
        for name, seen in self._seen.items():
            mine = [b for b in differing if b.startswith(f"{name}.") or not name]
            if mine:
                most = max(differing[b] for b in mine)
                what = f"after a step under {label}, {', '.join(mine[:_NAMED])} differ from plain training's"
                what += f" by {most:.1e}"
                advice = "do not train it with abyssal: its buffers would drift; please report it"
                found.append(Finding("error", "buffers", name, what, advice, most))
            elif seen.buffers and told:
                what = f"changes {', '.join(seen.buffers[:_NAMED])}: after a step exactly plain training's"
                found.append(Finding("ok", "buffers", name, what))
        if not step.random_state.same_as(self._true.random_state):
            what = f"a step under {label} leaves torch's random state elsewhere than a plain step"
            advice = f"if no block is found to draw from elsewhere, {_REPORT}"
            found.append(Finding("error", "random numbers", "", what, advice))
        return found

    def _dropout_findings(self, step: Step) -> list[Finding]:
        wrong = {g.name for g in compare(self._true, step, self._subject.block_names).beyond(self._exact)}
        found = []
        for name, seen in self._seen.items():
            if not seen.draws or seen.difference is not None:
                continue
            if name in wrong:
                what = "draws random numbers (dropout), and recomputation drew others: see its gradients"
                found.append(Finding("error", "random numbers", name, what, _REPORT))
            else:
                what = "draws random numbers (dropout); recomputed with the same ones"
                found.append(Finding("ok", "random numbers", name, what))
        return found

    def _chain_findings(self, certificate: Certificate | None) -> list[Finding]:
        if certificate is None or self._single or len(certificate.blocks) < 2:
            return []
        if certificate.note:
            return [Finding("warning", "chains", "", certificate.note)]
        ends = [block.name for block in certificate.blocks if block.policy.endswith(", end")]
        if not ends:
            return []
        what = f"{len(certificate.blocks)} blocks link to {certificate.chains} chain(s), which end in "
        what += ", ".join(ends[:_NAMED]) + (f" and {len(ends) - _NAMED} more" if len(ends) > _NAMED else "")
        return [Finding("note", "chains", "", what + ": their inputs are kept exactly")]


def _softened(f: Finding) -> Finding:
    soft = f.level == "error" and f.check == "gradients" and f.figure != math.inf
    return replace(f, level="warning") if soft else f


def _verdict(error: float, tolerance: float) -> str:
    if error <= tolerance:
        return f"within the tolerance of {tolerance:g}"
    return f"beyond the tolerance of {tolerance:g}" + ("" if error < 0.5 else ": useless")


def _place(group: str, parameter: str) -> str:
    return f"{group}, {parameter}" if group != parameter else group


def _worst_restored(certificate: Certificate | None, tolerance: float) -> list[tuple[str, float]]:
    blocks = certificate.blocks if certificate else []
    errors = [(b.name, b.error) for b in blocks if b.error is not None and not b.error <= tolerance]
    return sorted(errors, key=lambda pair: -pair[1])[:_NAMED]


def _policies(policy: Policies) -> list[Policy | Mapping[str, Policy]]:
    if policy is None:
        return list(_SEVERAL)
    return [policy] if isinstance(policy, Policy | Mapping) else list(policy)
