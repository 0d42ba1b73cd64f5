"""What the patched blocks of one model share: the records of their calls, and what to do when one drifts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from abyssal.certify.drift import (
    ADVICE,
    CODED_ALLOWANCE,
    EXPLANATION,
    DriftError,
    DriftWarning,
    NonFiniteError,
    OnDrift,
    describe,
    rounding,
)
from abyssal.certify.history import History
from abyssal.certify.recorder import Called, CallRecord, Figures, Recorder, worse
from abyssal.engine.auto import AutoBits, shortest
from abyssal.engine.observer import Observer
from abyssal.engine.passes import ForwardPass
from abyssal.engine.policy import Code, Keep, Policy, Store
from abyssal.models.sharded import highest_on_any_rank

# Comparing an exactly kept block's output costs it the early stop of its recomputation (about a tenth of a step),
# so after the first pass one call in this many is compared per pass, in rotation.
_OUTPUT_CHECK_EVERY = 16


class Session:
    """What the patched blocks of one model share: tolerance, what to do on drift, and the running records.

    Args:
        on_drift: what to do where a state is further off than allowed.
        tolerance: relative error of a restored state.
        expected: by block, the state error that a plan was made with, which is then allowed, twice.
        sensitivities: by block, the relative error of the whole gradient per relative error of the block's state,
            as a plan has measured it.
    """

    def __init__(
        self,
        on_drift: OnDrift,
        tolerance: float,
        expected: Mapping[str, float] | None = None,
        sensitivities: Mapping[str, float] | None = None,
    ) -> None:
        """Begin with nothing recorded."""
        self.on_drift, self.tolerance = on_drift, tolerance
        self._expected, self.sensitivities = dict(expected or {}), dict(sensitivities or {})
        self.overrides: dict[str, tuple[Policy, str]] = {}  # with the reason, in words
        self._names: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self._pass = ForwardPass(0, len(self._names))
        self._told: set[str] = set()
        self._suspects: set[str] = set()  # whose recomputed output differed once, or that drifted and are kept
        self._bits = AutoBits()
        self.ends = set(self._names[-1:])  # blocks that end their chains: in the last pass; before that, the last one
        self.history = History(self._names)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the settings; records belong to graphs, which can be neither."""
        settings = ("on_drift", "tolerance", "_expected", "sensitivities", "overrides", "_names")
        return {key: self.__dict__[key] for key in settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew with the settings."""
        self.__dict__.update(state)
        self._reset()

    @property
    def size(self) -> int:
        """How many blocks there are."""
        return len(self._names)

    def join(self, names: Iterable[str]) -> None:
        """Take note of which blocks there are."""
        self._names = list(names)
        self._reset()

    def policy_of(self, block: Called) -> Policy:
        """The policy in force for `block`: its own, unless something has overridden it."""
        return self.overrides.get(block.name, (block.policy,))[0]

    def choose(self, policy: Policy, observer: Observer, d: Tensor, x: Tensor) -> Policy:
        """Return `policy` with all that it left open decided.

        Args:
            policy: of a call, which leaves something open.
            observer: of the call.
            d: how far the stream is from what the decoder knows. [*stream]
            x: the stream. [*stream]
        """
        assert isinstance(policy, Code)
        assert isinstance(observer, Recorder)
        record = observer.record
        chosen = self._bits.choose(policy, record.block.name, record.place[0].number, d, x)
        if chosen.keeps_input:
            self.overrides[record.block.name] = chosen, f"needs more than 8 bits; {chosen} since"
        return chosen

    def keep_anyway(self, block: Called, why: str) -> None:
        """A block is not one to code by default: keep it from now on."""
        self.overrides[block.name] = Keep(), f"is not used: the block {why}; {Keep()}"

    # ------------------------------------------------------------------ forward

    def begin_call(self, block: Called, policy: Policy, stream: Tensor | None, linked: bool) -> Recorder:
        """Begin to record a call.

        Args:
            block: what is called.
            policy: how its input will be restored.
            stream: what it is called with. [*stream]
            linked: whether that is the very output of the block called before.
        """
        if not linked and self._pass.is_over(block, stream):
            self._keep_short_chains()
            self._note_ends()
            self._pass = ForwardPass(self._pass.number + 1, len(self._pass.records))
        recorder = Recorder(self, block, policy, self._pass, linked, self._checks_output(block.name))
        self._pass.begin(recorder.record, block)
        return recorder

    def _keep_short_chains(self) -> None:
        """Keep what "auto" has coded in the last pass without saving anything by it."""
        if not self._pass.visited:  # it may have been cut short
            return
        chain: list[CallRecord] = []
        for record in [*self._pass.records, None]:
            if record is not None and record.is_linked:
                chain.append(record)
                continue
            for member in chain if 1 < len(chain) < shortest(chain[0].element_size) else ():
                if isinstance(member.block.policy, Code) and member.block.policy.is_auto:
                    why = f"is not used: in a chain of {len(chain)} it saves nothing; {Keep()}"
                    self.overrides.setdefault(member.block.name, (Keep(member.block.policy.device), why))
            chain = [] if record is None else [record]

    def _note_ends(self) -> None:
        going_on = {record.block.name for record in self._pass.records if not record.is_exact}
        self.ends = {record.block.name for record in self._pass.records} - going_on

    def _checks_output(self, name: str) -> bool:
        """Whether a call's recomputed output is to be compared, if its exact input is kept."""
        now = self._pass
        if name in self._suspects:
            return True
        return now.number == 0 or (len(now.records) + now.number) % _OUTPUT_CHECK_EVERY == 0

    def tell_once(self, what: str, text: str) -> None:
        """Warn the user, once per model."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(text, stacklevel=2)

    # ------------------------------------------------------------------ backward

    def allowed(self, record: CallRecord, dtype: torch.dtype) -> float:
        """The relative state error beyond which a call counts as drifted."""
        if record.policy.from_below:  # exact, but for the order of sums on some devices
            return min(self.tolerance, rounding(dtype))
        allowed = self.tolerance * (CODED_ALLOWANCE if record.policy.codec is not None else 1)
        return max(allowed, 2 * self._expected.get(record.block.name, 0.0))

    def judge(self, found: list[Figures]) -> None:
        """Enter what one backward pass measured and act on drift.

        Args:
            found: what was measured, of this session's calls only.

        Raises:
            NonFiniteError: if a restored state is not finite though the state it was restored from is.
            DriftError: if an error exceeds the tolerance and `on_drift` is "raise".
        """
        drifted: list[tuple[CallRecord, str]] = []
        refused: CallRecord | None = None
        for figures in found:
            record, error = figures.record, figures.error
            if not figures.anchor_is_finite:
                self._cannot_tell(record)
            elif not figures.finite:
                refused = refused or record
            elif figures.what == "output" or (figures.what == "image" and record.policy.from_below):
                record.output_error = worse(record.output_error, error)
                if error is not None and not error <= min(self.tolerance, rounding(figures.dtype)):
                    self._suspects.add(record.block.name)
                    drifted.append((record, "output"))
            else:
                record.input_error = worse(record.input_error, error)
                if error is not None and not error <= self.allowed(record, figures.dtype):
                    drifted.append((record, "input"))
        if self.on_drift == "keep":
            self._fall_back([*drifted, *([(refused, "input")] if refused else [])], found)
        for record, what in drifted:
            record.drifted, record.note = True, EXPLANATION[what]
            self._bits.forget(record.block.name)
        for number, records in {id(p): (p.number, p.records) for f in found if (p := f.record.place[0])}.values():
            self.history.enter(number, records)
        if refused is not None:
            self._refuse(refused)
        if drifted:
            self._act(drifted)

    def _fall_back(self, drifted: list[tuple[CallRecord, str]], found: list[Figures]) -> None:
        """Keep what drifted, from the next step on, on all ranks; what kept its input and drifted is stored."""
        levels = dict.fromkeys(self._names, 0)
        for record, what in drifted:
            levels[record.block.name] = max(levels[record.block.name], 2 if what == "output" else 1)
        agreed = highest_on_any_rank(list(levels.values()), (figures.record.block.module for figures in found))
        for name, level in zip(levels, agreed, strict=True):
            if level:
                policy = Store() if level == 2 else Keep()
                self.overrides[name] = policy, f"drifted; {policy} since"
                self._suspects.add(name)

    def _cannot_tell(self, record: CallRecord) -> None:
        record.note = "the forward pass itself has infinite or undefined values: not certified"
        self.tell_once(
            "overflow",
            f"the stream has infinite or undefined values of the forward pass's own (block {record.block.name!r}); "
            "what is restored from it is not certified. If it is meant (a mask in the stream), use Keep().",
        )

    def _refuse(self, record: CallRecord) -> NoReturn:
        advice = "Give it the policy abyssal.Keep()."
        if self.on_drift == "keep":
            advice = "Skip this step: the block is kept from now on (on_drift='keep')."
        raise NonFiniteError(
            f"block {record.block.name!r}: its input, restored by {record.policy}, is not finite, but the forward "
            f"pass was. The gradients of this step are not usable; its residual branch does not contract. {advice}"
        )

    def _act(self, drifted: list[tuple[CallRecord, str]]) -> None:
        worst: dict[str, CallRecord] = {}
        for record, _ in drifted:
            name = record.block.name
            if name not in worst or (record.error or 0.0) > (worst[name].error or 0.0):
                worst[name] = record
        text = describe(worst.values(), self.tolerance)
        if self.on_drift == "raise":
            raise DriftError(f"{text} Stopped, because on_drift='raise'. {ADVICE}")
        if self.on_drift == "keep":
            text += " From the next step on they are kept (on_drift='keep'); this step's gradients carry the error."
        elif all(isinstance(p := r.block.policy, Code) and p.is_auto for r in worst.values()):
            text += " Their bits are chosen anew in the next step; this step's gradients carry the error."
        else:
            text += f" Do not trust this step's gradients. {ADVICE}"
        if worst.keys() - self._told:
            self._told |= worst.keys()
            warnings.warn(text, DriftWarning, stacklevel=2)

    @property
    def records(self) -> list[CallRecord]:
        """The calls of the last forward pass."""
        return list(self._pass.records)
