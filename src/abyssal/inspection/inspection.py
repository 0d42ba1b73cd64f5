"""Looking at a model before training it: what each residual block does, and what can be saved on it.

`inspect` measures once and answers for several tolerances; `inspect_text` shows the answer in a terminal,
`inspect_page` in a browser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from abyssal.engine.policy import Keep, Policy, Store
from abyssal.models.find import resolve_blocks
from abyssal.models.state import borrowed
from abyssal.planning.choose import Choice as _Chosen
from abyssal.planning.choose import Chooser, Wish
from abyssal.planning.cost import Account, Accounts
from abyssal.planning.measure import (
    DEFAULT_CANDIDATES,
    BlockMeasurement,
    Measurements,
    gradient_error,
    measure_step,
)
from abyssal.planning.solve import InfeasibleError
from abyssal.planning.step import TrainingStep
from abyssal.util.progress import Progress, silent
from abyssal.weights.regularity import Regularity, regularity

if TYPE_CHECKING:
    from abyssal.util.environment import Environment

__all__ = ["TOLERANCES", "Choice", "Inspection", "inspect", "inspection_of"]

TOLERANCES = (1e-1, 3e-2, 1e-2, 1e-3)
# What a step's time is worth, as in `plan`: a tenth of a step has to save 1 % of what checkpointing keeps.
_WORTH_OF_A_STEP = 0.1
_ATTEMPTS, _NEAR = 4, 0.6  # to come within a tolerance, and no further below it than this
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Choice:
    """The policies with the fewest bytes within a tolerance; a tenth of a step's time counts as 1 % of kept bytes.

    Attributes:
        tolerance: largest relative error of the gradient that was allowed.
        policies: one per block.
        block_bytes: kept for the stream, by block; the exact inputs and residuals at the ends of chains included.
        predicted_error: of the gradient, from the measurements of single blocks.
        step_ratio: predicted time of a training step, as a multiple of activation checkpointing's; nan where
            that is not known.
        measured_error: relative error of the gradient of the whole model under these policies, on the batch; None
            where it was not measured.
    """

    tolerance: float
    policies: tuple[Policy, ...]
    block_bytes: tuple[int, ...]
    predicted_error: float
    step_ratio: float
    measured_error: float | None = None

    @property
    def gradient_error(self) -> float:
        """Relative error of the gradient: as measured, or else as predicted."""
        return self.predicted_error if self.measured_error is None else self.measured_error

    @property
    def is_measured(self) -> bool:
        """Whether the error was measured on the whole model."""
        return self.measured_error is not None

    @property
    def stream_bytes(self) -> int:
        """Kept for the stream by all blocks together."""
        return sum(self.block_bytes)


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        model: the model in words.
        measurements: every block under every policy.
        choices: the best policies for each tolerance, from the loosest to the strictest.
        front: `(bytes, error)` of choices that no other one reckoned beats in both, from the fewest bytes.
        uniform: one policy for all blocks (kept where a block does not allow it): policy to choice.
        kept_bytes: what activation checkpointing keeps of the stream, in its own data type.
        environment: machine, versions, date.
        weights: how the weights change with depth; None where they could not be read as paths.
        notes: what a reader should know of how this came about, e.g. that the weights are random.
        command: the command line that gives it.
    """

    model: str
    measurements: Measurements
    choices: tuple[Choice, ...]
    front: tuple[tuple[int, float], ...]
    uniform: dict[Policy, Choice]
    kept_bytes: int
    environment: Environment
    weights: Regularity | None = None
    notes: tuple[str, ...] = ()
    command: str = ""

    @property
    def blocks(self) -> tuple[BlockMeasurement, ...]:
        """The blocks in the order of the forward pass."""
        return self.measurements.blocks

    @property
    def bf16_bytes(self) -> int:
        """What activation checkpointing would keep if the stream were kept in bfloat16."""
        return self.kept_bytes - sum(block.stream_bytes - _bf16_bytes(block) for block in self.blocks)

    @property
    def reference(self) -> Choice:
        """The choice that verdicts speak of: for 1e-2, or else the tolerance nearest to it."""
        return min(self.choices, key=lambda choice: abs(math.log10(choice.tolerance / 1e-2)))

    @property
    def verdict(self) -> tuple[str, ...]:
        """What was found, in one or two plain sentences."""
        from abyssal.inspection.text import verdict

        return verdict(self)

    def with_notes(self, *notes: str, model: str = "", batch: str = "", command: str = "") -> Inspection:
        """Return the same, with more notes, and the model, the batch and the command as the caller names them."""
        return replace(
            self,
            measurements=replace(self.measurements, batch=batch or self.measurements.batch),
            notes=(*self.notes, *(note for note in notes if note)),
            model=model or self.model,
            command=command or self.command,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; what is not finite becomes None."""
        from abyssal.inspection.json import as_dict

        return as_dict(self)

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained page with plots, whole or not at all, and return its path.

        Raises:
            OSError: the page cannot be written there.
        """
        from abyssal.inspection.page import build_page
        from abyssal.report.page import write

        return write(build_page(self), Path(path))

    def __str__(self) -> str:
        from abyssal.inspection.text import as_text

        return as_text(self)


def inspect(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Any] | None = None,
    tolerances: Sequence[float] = TOLERANCES,
    blocks: Any = None,
    progress: Progress | None = None,
) -> Inspection:
    """Measure every residual block of a model on one batch, and say what may be saved on each.

    The model is left as it was: parameters, gradients, buffers, random state and modes.

    Args:
        model: any residual network, in training mode or not; patched by `reconstruct` or not.
        batch: what it is called with: a dict (keyword arguments), a tuple (positional) or a tensor.
        loss: from the model's output to a scalar; by default `output.loss`.
        tolerances: allowed relative errors of the whole parameter gradient, each above 0.
        blocks: as in `reconstruct`; by default what `find_blocks` finds.
        progress: called with a phase, units done and units in all.

    Returns:
        Per block its increment ratio, contraction, regularity in depth, and the policy with the fewest bytes
        for each tolerance; in total stream bytes, the gradient's error, predicted and measured on this batch, and
        step time. `print` it, or use `.to_html(path)` and `.to_dict()`.

    Raises:
        ValueError: `tolerances` is empty or holds something not above 0; the model has no residual blocks or
            cannot be measured on this batch.
    """
    checked = _checked(tolerances)
    told = progress or silent
    core = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    named = resolve_blocks(core, blocks)
    with borrowed(core) as loan:
        step = TrainingStep(core, loan, batch, loss, named)
        found = measure_step(step, DEFAULT_CANDIDATES, told)
        exact: list[Any] = []

        def error_of(policies: Mapping[str, Policy]) -> float:
            if not exact:
                kept = {b.name: Keep() if b.candidate(Keep()) else Store() for b in found.blocks}
                exact.extend(step.gradient(kept))
            return gradient_error(step.gradient(policies), exact)

        parameters = sum(parameter.numel() for parameter in model.parameters())
        words = f"{type(model).__name__}, {parameters:,} parameters"
        inspection = inspection_of(found, checked, words, progress=told, error_of=error_of)
    told("weights against depth", 0, 1)
    weights = _weights(core if blocks is None else list(named.values()))
    told("weights against depth", 1, 1)
    return replace(inspection, weights=weights)


def _weights(model: Any) -> Regularity | None:
    """Read the weights as paths through depth, where there are at least four equal blocks."""
    try:
        return regularity(model)
    except (ValueError, TypeError):
        return None


def inspection_of(
    found: Measurements,
    tolerances: Sequence[float] = TOLERANCES,
    model: str = "",
    *,
    progress: Progress | None = None,
    error_of: Callable[[Mapping[str, Policy]], float] | None = None,
) -> Inspection:
    """Return the inspection that measurements give, without measuring the blocks again.

    Args:
        found: what `measure` returned; at least one block.
        tolerances: as in `inspect`.
        model: the model in words.
        progress: as in `inspect`.
        error_of: measures the relative error of the gradient under policies by block; None leaves the errors of
            the choices predictions.

    Raises:
        ValueError: as in `inspect`.
    """
    from abyssal.util.environment import environment

    checked, told = _checked(tolerances), progress or silent
    accounts = _Recorded(found)
    chooser = Chooser(accounts)
    kept = accounts.of(accounts.with_all(Keep()))
    worth = _WORTH_OF_A_STEP * kept.stored_bytes / kept.seconds if kept.seconds > 0 else 0.0
    choices = []
    for done, tolerance in enumerate(checked):
        told("choosing policies", done, len(checked))
        best, error = _best(chooser, tolerance, worth, error_of)
        choices.append(_choice(found, tolerance, best.policies, best.account, kept, error))
    told("choosing policies", len(checked), len(checked))
    return Inspection(
        model=model,
        measurements=found,
        choices=tuple(choices),
        front=_undominated(accounts.seen),
        uniform=_uniform(found, accounts, kept),
        kept_bytes=kept.stored_bytes,
        environment=environment(),
    )


class _Recorded(Accounts):
    """Accounts that remember what came out, since all that a search tried says something of the trade-off."""

    def __init__(self, measured: Measurements) -> None:
        super().__init__(measured)
        self.seen: set[tuple[int, float]] = set()

    def of(self, policies: Mapping[str, Policy]) -> Account:
        """Return what `policies` would cost, and remember its bytes and error."""
        account = super().of(policies)
        self.seen.add((account.stored_bytes, account.error))
        return account

    def with_all(self, policy: Policy) -> dict[str, Policy]:
        """Return a policy for all blocks; those that cannot have it are kept, or else stored."""
        return {name: next(p for p in (policy, Keep(), Store()) if self.offers(name, p)) for name in self.blocks}


def _best(
    chooser: Chooser,
    tolerance: float,
    bytes_per_second: float,
    error_of: Callable[[Mapping[str, Policy]], float] | None,
) -> tuple[_Chosen, float | None]:
    """Return the best choice and its measured error, which is to be within the tolerance, and not far below it."""
    aim, low, high = tolerance, 0.0, math.inf  # aims that kept within the tolerance, and that did not
    best: tuple[_Chosen, float | None] | None = None
    for _ in range(_ATTEMPTS):
        try:
            chosen = chooser.choose(Wish(aim, None, bytes_per_second))
        except InfeasibleError as error:
            raise ValueError(f"no choice of policies is predicted within a gradient error of {aim:.1e}") from error
        if error_of is None:
            return chosen, None
        measured = error_of(chosen.policies)
        if measured <= tolerance:
            low, best = aim, (chosen, measured)
            if measured >= _NEAR * tolerance or high == math.inf:
                break
            aim = math.sqrt(low * high)
        else:
            high = aim
            if best is None or (best[1] or 0.0) > tolerance:
                best = chosen, measured
            aim = math.sqrt(low * high) if low else aim * max(0.05, 0.8 * tolerance / measured)
    assert best is not None
    return best


def _choice(
    found: Measurements,
    tolerance: float,
    policies: Mapping[str, Policy],
    account: Account,
    kept: Account,
    measured: float | None = None,
) -> Choice:
    return Choice(
        tolerance=tolerance,
        policies=tuple(policies[block.name] for block in found.blocks),
        block_bytes=tuple(account.blocks[block.name].stored_bytes for block in found.blocks),
        predicted_error=account.error,
        step_ratio=account.seconds / kept.seconds if kept.seconds > 0 else math.nan,
        measured_error=measured,
    )


def _uniform(found: Measurements, accounts: _Recorded, kept: Account) -> dict[Policy, Choice]:
    uniform = {}
    for policy in dict.fromkeys(c.policy for block in found.blocks for c in block.candidates):
        policies = accounts.with_all(policy)
        account = accounts.of(policies)
        uniform[policy] = _choice(found, account.error, policies, account, kept)
    return uniform


def _undominated(points: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Return the points with less error than every point of no more bytes."""
    front: list[tuple[int, float]] = []
    for size, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((size, error))
    return tuple(front)


def _checked(tolerances: Sequence[float]) -> tuple[float, ...]:
    wanted = tuple(float(tolerance) for tolerance in tolerances)
    if not wanted or not all(0 < tolerance < math.inf for tolerance in wanted):
        raise ValueError(f"tolerances={tolerances!r}: expected one or more numbers above 0, such as 1e-2")
    return tuple(sorted(set(wanted), reverse=True))


def _bf16_bytes(block: BlockMeasurement) -> int:
    own = _ITEM_BYTES.get(block.dtype.removeprefix("torch."), torch.finfo(torch.float32).bits // 8)
    return block.stream_bytes * 2 // own
