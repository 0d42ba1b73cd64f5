"""One training step, plain or reconstructed, and how far the gradients of two such steps are apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.certify.certificate import Certificate
from abyssal.certify.drift import DriftWarning
from abyssal.engine.api import certificate, reconstruct
from abyssal.engine.policy import Policy
from abyssal.testing.subject import Subject, wide
from abyssal.util.randomness import TorchRandomState, seed_all

OUTSIDE = "outside of the blocks"


@dataclass(frozen=True)
class Step:
    """What one training step left behind.

    Attributes:
        loss: its value.
        gradients: by parameter name or "argument ...".
        buffers: by name, after the step.
        random_state: torch's, after the step.
        certificate: of a reconstructed step.
    """

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random_state: TorchRandomState
    certificate: Certificate | None = None


@dataclass(frozen=True)
class GroupError:
    """Error of the gradients that belong together: one block's, one input's, or the rest of the model's."""

    name: str
    error: float  # relative to the norm of the group's gradient
    worst: str  # the parameter that contributes most


@dataclass(frozen=True)
class Comparison:
    """Two steps' gradients compared: relative errors in the Euclidean norm, of all together and by group."""

    error: float
    groups: list[GroupError]

    def beyond(self, tolerance: float) -> list[GroupError]:
        """Return the groups whose error exceeds the tolerance (or is not a number), worst first."""
        wrong = [g for g in self.groups if not g.error <= tolerance]
        return sorted(wrong, key=lambda g: -g.error if math.isfinite(g.error) else -math.inf)


def train_step(subject: Subject, policy: Policy | Mapping[str, Policy] | None = None) -> Step:
    """Run one step of a fresh copy from the subject's seed, reconstructed under `policy` if there is one.

    Raises:
        ValueError: if the loss does not depend on anything that needs a gradient.
    """
    model = subject.working_copy()
    seed_all(subject.seed)
    args, kwargs, leaves = subject.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # the kit judges by itself
        warnings.filterwarnings("ignore", message="gradient checkpointing was enabled")
        if policy is not None:
            reconstruct(model, policy, blocks=subject.block_names, tolerance=math.inf)
        loss = subject.loss(model(*args, **kwargs))
        if not loss.requires_grad:
            raise ValueError("the loss depends on nothing that needs a gradient: there is nothing to compare.")
        loss.backward()
    named = [*model.named_parameters(), *leaves.items()]
    return Step(
        loss=float(loss.detach()),
        gradients={name: t.grad.detach() for name, t in named if t.grad is not None},
        buffers={name: buffer.detach() for name, buffer in model.named_buffers()},
        random_state=TorchRandomState.now(subject.device_tensors()),
        certificate=None if policy is None else certificate(model),
    )


def compare(true: Step, other: Step, block_names: list[str]) -> Comparison:
    """Compare gradients, by block.

    A group's error is relative to its own norm, or to sqrt(eps) of the whole gradient's where that is larger:
    a gradient that is zero but for rounding has no meaningful relative error.
    """
    squares: dict[str, list[float]] = {}
    worst: dict[str, tuple[float, str]] = {}
    for name in sorted({*true.gradients, *other.gradients}):
        a, b = true.gradients.get(name), other.gradients.get(name)
        error, norm = _distance(a, b)
        group = _group_of(name, block_names)
        total = squares.setdefault(group, [0.0, 0.0])
        total[0] += error**2
        total[1] += norm**2
        if group not in worst or not error <= worst[group][0]:
            worst[group] = error, name
    whole = math.sqrt(sum(norm for _, norm in squares.values()))
    floor = rounding_tolerance(*true.gradients.values()) * whole
    groups = [
        GroupError(group, _ratio(math.sqrt(error), max(math.sqrt(norm), floor)), worst[group][1])
        for group, (error, norm) in squares.items()
    ]
    return Comparison(_ratio(math.sqrt(sum(error for error, _ in squares.values())), whole), groups)


def rounding_tolerance(*tensors: Tensor) -> float:
    """Return sqrt(eps) of the coarsest precision among the tensors: 1.5e-8 for float64, 3.5e-4 for float32.

    Half the digits: sums in another order stay well below it, and a wrong mask or state well above.
    """
    return max((math.sqrt(torch.finfo(t.dtype).eps) for t in tensors), default=0.0)


def differing_buffers(true: Step, other: Step) -> dict[str, float]:
    """Return the buffers that are not exactly equal after the two steps, with their largest difference."""
    found = {}
    for name, a in true.buffers.items():
        b = other.buffers.get(name)
        if b is None or a.shape != b.shape:
            found[name] = math.inf
        elif not torch.equal(a, b) and not torch.equal(a.nan_to_num(), b.nan_to_num()):
            found[name] = float((wide(a) - wide(b)).abs().max())
    return found


def _distance(true: Tensor | None, other: Tensor | None) -> tuple[float, float]:
    if true is None or other is None:
        norm = 0.0 if true is None else _norm(true)
        return math.inf, norm
    return _norm(wide(other) - wide(true)), _norm(true)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(wide(tensor)))


def _ratio(error: float, norm: float) -> float:
    if error == 0.0:
        return 0.0
    return error / norm if norm > 0.0 else math.inf


def _group_of(name: str, block_names: list[str]) -> str:
    if name.startswith("argument "):
        return name
    return next((block for block in block_names if name.startswith(block + ".") or block == ""), OUTSIDE)
