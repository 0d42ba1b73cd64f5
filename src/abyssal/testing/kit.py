"""What users call: `check_block`, `check_model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from abyssal.certify.drift import DEFAULT_TOLERANCE
from abyssal.engine.block import Block
from abyssal.models.call import unpacked
from abyssal.models.find import Blocks, resolve_blocks
from abyssal.models.patch import patches
from abyssal.testing.agreement import Agreement, Policies
from abyssal.testing.determinism import (
    argument_findings,
    contraction_finding,
    determinism_findings,
    stream_findings,
)
from abyssal.testing.gradients import train_step
from abyssal.testing.observe import Observation, observe
from abyssal.testing.report import Finding, Report
from abyssal.testing.subject import Chain, Loss, Subject, gradients_put_aside
from abyssal.util.randomness import seed_all, untouched


def check_block(
    block: nn.Module,
    example_input: Any,
    *,
    policy: Policies = None,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Check that one residual block can be reconstructed, and how well.

    A private copy of the block is called three times in a row: the last input is kept, the two before it are
    restored. Gradients of its parameters and of all floating-point inputs are compared with plain autograd's.

    Args:
        block: a module that keeps the shape of its first tensor argument, in the mode it will be used in.
        example_input: what it is called with: a tensor [*stream], a tuple of positional arguments, or a
            mapping of keyword arguments.
        policy: a policy, or several, to compare with plain autograd besides `Keep()`. Default: `Reverse(0)`,
            `Reverse(1)` and `Reverse(2)`, of which the block has to pass one.
        kwargs: keyword arguments besides `example_input`.
        loss: `loss(output) -> scalar`; default: a fixed random projection of the output.
        tolerance: the relative error allowed to a gradient where inputs are not kept exactly; default 1e-2.
        seed: of torch's, numpy's and python's random state during the check. They are put back afterwards.

    Returns:
        The report; `print` it, or call its `raise_if_failed()`.

    Raises:
        TypeError: if `block` is no module or cannot be copied.
        Exception: whatever the block itself raises on this input.
    """
    _expect_module("check_block", block)
    args, keywords = unpacked(example_input)
    keywords |= kwargs or {}
    with gradients_put_aside(block):
        chain = Chain(block)
        subject = Subject(chain, args, keywords, loss=loss, block_names=[chain.name], seed=seed, grad_inputs=True)
        return _check(subject, type(block).__name__, policy, tolerance, single=True)


def check_model(
    model: nn.Module,
    batch: Any,
    *,
    policy: Policies = None,
    loss: Loss | None = None,
    blocks: Blocks | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Check that a model's gradients under reconstruction are plain autograd's, and say what is wrong if not.

    Works on private copies (two at a time), in float64 where the model runs there. The user's model, its
    gradients and all random state are left as they were.

    Args:
        model: any module with residual blocks, in the mode it will be used in; may be reconstructed.
        batch: what it is called with: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments.
        policy: a policy, a mapping from block names to policies as `abyssal.reconstruct` takes it, or a
            sequence of policies, to compare with plain autograd besides `Keep()`. Default: `Reverse(0)`,
            `Reverse(1)` and `Reverse(2)`, of which the model has to pass one.
        loss: `loss(output) -> scalar`; default: `output.loss`, else a fixed random projection of the output.
        blocks: as for `abyssal.reconstruct`; default: those that are reconstructed already, else those found.
        tolerance: the relative error allowed to a gradient where inputs are not kept exactly; default 1e-2.
        seed: of torch's, numpy's and python's random state during the check. They are put back afterwards.

    Returns:
        The report; `print` it, or call its `raise_if_failed()`.

    Raises:
        NoBlocksError: if no blocks are found and none are given.
        TypeError: if `model` is no module or cannot be copied.
        ValueError: if the loss cannot be found, or does not depend on anything that needs a gradient.
        Exception: whatever the model itself raises on this batch.
    """
    _expect_module("check_model", model)
    args, kwargs = unpacked(batch)
    patched = [patch.module for patch in patches(model) if isinstance(patch, Block)]
    names = list(resolve_blocks(model, patched if blocks is None and patched else blocks))
    with gradients_put_aside(model):
        subject = Subject(model, args, kwargs, loss=loss, block_names=names, seed=seed, grad_inputs=False)
        return _check(subject, type(model).__name__, policy, tolerance, single=False)


def _expect_module(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(module).__name__}")


# ---------------------------------------------------------------------- the checks


def _check(subject: Subject, name: str, policy: Policies, tolerance: float | None, *, single: bool) -> Report:
    tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
    with untouched(subject.device_tensors()), torch.enable_grad():
        seed_all(subject.seed)
        if _returns_tensors(observations := observe(subject)):
            subject.to_double(lambda: train_step(subject))
            if subject.dtype == torch.float64:
                observations = observe(subject)
        findings = [_precision_finding(subject), *_mode_findings(subject)]
        for block, seen in observations.items():
            findings += _block_findings(block, seen, subject, tolerance, single)
        if _returns_tensors(observations):
            findings += Agreement(subject, observations, tolerance, single).findings(policy)
    dtype = str(subject.dtype).removeprefix("torch.")
    return Report(name, dtype, tolerance, list(dict.fromkeys(findings)))


def _returns_tensors(observations: dict[str, Observation]) -> bool:
    return all(seen.returns_tensor for seen in observations.values())


def _block_findings(name: str, seen: Observation, subject: Subject, tolerance: float, single: bool) -> list[Finding]:
    contraction = contraction_finding(name, seen, tolerance)
    return [
        *stream_findings(name, seen, single=single),
        *determinism_findings(name, seen, subject.dtype),
        *argument_findings(name, seen),
        *([contraction] if contraction else []),
    ]


def _precision_finding(subject: Subject) -> Finding:
    kind = str(subject.dtype).removeprefix("torch.")
    if not subject.why_not_double:
        return Finding("ok", "precision", "", f"compared in {kind}")
    return Finding("note", "precision", "", f"compared in {kind}: {subject.why_not_double}")


def _mode_findings(subject: Subject) -> list[Finding]:
    if True in subject.modes:
        return []
    what = "the blocks are in eval mode: dropout and updates of running statistics were not exercised"
    return [Finding("note", "mode", "", what, "call model.train() first, if it is to be trained that way")]
