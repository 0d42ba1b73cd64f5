"""What the user calls: `reconstruct`, `release`, `certificate`, `paused`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Protocol, get_args, runtime_checkable

from torch import nn

from abyssal.certify.certificate import Certificate, Facts, certify
from abyssal.certify.drift import DEFAULT_TOLERANCE, OnDrift
from abyssal.certify.recorder import CallRecord
from abyssal.engine.block import Block
from abyssal.engine.policy import Code, Keep, Policy
from abyssal.engine.session import Session
from abyssal.models import patch
from abyssal.models.find import resolve_blocks

Blocks = str | nn.Module | Sequence[str | nn.Module]


@runtime_checkable
class Planned(Protocol):
    """What `reconstruct` needs of an `abyssal.Plan`, which is made by running models under `reconstruct`."""

    def policies_for(self, model: nn.Module) -> Mapping[str, Policy]:
        """Return the policy of each block by its name.

        Raises:
            ValueError: if the plan does not fit the model.
        """
        ...

    @property
    def sensitivities(self) -> Mapping[str, float]:
        """Relative error of the gradient per relative error of each block's state."""
        ...

    @property
    def state_errors(self) -> Mapping[str, float]:
        """The relative error of each block's state that the plan was made with."""
        ...


def reconstruct(
    model: nn.Module,
    policy: Policy | Mapping[str, Policy] | Planned | None = None,
    *,
    blocks: Blocks | None = None,
    on_drift: OnDrift = "warn",
    tolerance: float | None = None,
) -> nn.Module:
    """Train `model` without storing its residual stream: restore each block's input in the backward pass.

    In place: the model keeps its class, parameters, `state_dict` keys, module names and hooks. Its forward pass
    computes what it did. Calling it again replaces the policies; `release` undoes it.

    Args:
        model: any module with residual blocks; pretrained ones, too.
        policy: how blocks' inputs are restored: one for all, a plan (`abyssal.plan`, `abyssal.Plan.load`), or
            a mapping from block names or globs to policies. A full name decides before any glob, and the
            first glob before later ones; blocks that nothing matches get `Keep()`. Default: `Code("auto")`, 4
            to 8 bits of the stream per element, which asks nothing of the blocks; see there.
        blocks: which modules are the blocks: names, globs ("encoder.layers.*"), modules, or several of them.
            Default: what `abyssal.find_blocks(model)` finds.
        on_drift: what to do when a restored state is further from the true one than `tolerance`: "warn" once
            per block; "raise" `DriftError` from within `backward()`; "keep" that block's input from the next
            step on.
        tolerance: relative error of a restored state, default 1e-2; see `abyssal.certify.drift` for why.

    Returns:
        `model` itself.

    Raises:
        NoBlocksError: if no blocks are found and none are given.
        ValueError: for unknown block names, on_drift or a tolerance that is not positive; for a plan that was
            made for another model.
        TypeError: for a policy that is none, or a model within `torch.nn.DataParallel`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"reconstruct: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise TypeError(
            "reconstruct: torch.nn.DataParallel copies modules in a way that leaves a patched forward behind on the "
            "first device. Use torch.nn.parallel.DistributedDataParallel, or reconstruct without DataParallel."
        )
    if on_drift not in get_args(OnDrift):
        raise ValueError(f"on_drift: expected one of {', '.join(map(repr, get_args(OnDrift)))}, got {on_drift!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive relative error such as 1e-2, got {tolerance!r}")
    expected: Mapping[str, float] = {}
    sensitivities: Mapping[str, float] = {}
    if isinstance(policy, Planned):
        expected, sensitivities = policy.state_errors, policy.sensitivities
        policy = policy.policies_for(model)
        blocks = list(policy) if blocks is None else blocks
    named = resolve_blocks(model, blocks)
    policies = _policies(policy, list(named))
    release(model)
    _take_over_checkpointing(model, named)
    session = Session(on_drift, DEFAULT_TOLERANCE if tolerance is None else float(tolerance), expected, sensitivities)
    session.join(named)
    for name, module in named.items():
        Block(module, name, policies[name], session).install()
    return model


def release(model: nn.Module) -> nn.Module:
    """Give `model` back as it was before `reconstruct`; graphs that are alive stay valid.

    Returns:
        `model` itself. A model that is not reconstructed is left alone.
    """
    patch.release(model)
    return model


def certificate(model: nn.Module) -> Certificate:
    """Say for each block how its input was restored in the last forward pass, at what error, in how many bytes.

    Args:
        model: a reconstructed model. Errors are there after `backward()`.

    Returns:
        The certificate; `print` it for a table.

    Raises:
        ValueError: if no block of `model` is reconstructed.
    """
    blocks = [found for found in patch.patches(model) if isinstance(found, Block)]
    if not blocks:
        raise ValueError(
            f"certificate: this {type(model).__name__} is not reconstructed. Call abyssal.reconstruct(model) and run "
            "a training step first."
        )
    records: dict[int, list[CallRecord]] = {}
    sessions = {id(block.session): block.session for block in blocks}
    for session in sessions.values():
        for record in session.records:
            records.setdefault(id(record.block), []).append(record)
    history = next(iter(sessions.values())).history if len(sessions) == 1 else ()
    tolerance = min(session.tolerance for session in sessions.values())
    return certify([_facts(block, records.get(id(block), [])) for block in blocks], tolerance, history)


@contextmanager
def paused(model: nn.Module) -> Iterator[nn.Module]:
    """Run `model` plainly for a while: nothing is recomputed, nothing recorded. For export and tracing."""
    with patch.paused(model):
        yield model


def _facts(block: Block, records: list[CallRecord]) -> Facts:
    session, notes = block.session, [block.note]
    if block.name in session.overrides:
        notes.append(f"{block.policy} {session.overrides[block.name][1]}")
    sensitivity = session.sensitivities.get(block.name)
    return Facts(block.name, str(session.policy_of(block)), notes, records, sensitivity)


def _policies(policy: Policy | Mapping[str, Policy] | None, names: list[str]) -> dict[str, Policy]:
    if policy is None:
        policy = Code("auto")
    if isinstance(policy, Policy):
        return dict.fromkeys(names, policy)
    if not isinstance(policy, Mapping):
        raise TypeError(
            f"policy: expected a policy such as abyssal.Reverse(refine=1), or a mapping from block names to policies, "
            f"got {policy!r}"
        )
    chosen: dict[str, Policy] = {}
    by_name: set[str] = set()
    for pattern, one in sorted(policy.items(), key=lambda item: item[0] not in names):  # stable: names before globs
        if not isinstance(one, Policy):
            raise TypeError(f"policy[{pattern!r}]: expected a policy such as abyssal.Reverse(refine=1), got {one!r}")
        matching = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"policy[{pattern!r}]: no block has that name; the blocks are {', '.join(names)}")
        deciding = [name for name in matching if name not in chosen]
        if not deciding and not by_name.issuperset(matching):
            raise ValueError(
                f"policy[{pattern!r}]: an earlier glob has decided on every block that it matches. The first glob that "
                "matches a block decides, and a full name before any glob: put the more special entry first."
            )
        if pattern in names:
            by_name.add(pattern)
        chosen.update(dict.fromkeys(deciding, one))
    return {name: chosen.get(name, Keep()) for name in names}


def _take_over_checkpointing(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Switch the blocks' own gradient checkpointing (Hugging Face's) off: twice would only cost time."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    ours = {id(module) for module in blocks.values()}
    if not any(id(module) in ours for module in on):
        return
    # The model's own switch turns everything off: not where layers that we leave alone are checkpointed, too.
    inside = {id(inner) for block in blocks.values() for inner in block.modules()}
    if all(id(m) in inside or any(id(inner) in ours for inner in m.modules()) for m in on):
        for switch in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):  # new name, old
            if callable(disable := getattr(model, switch, None)):
                disable()
                break
    for module in blocks.values():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    warnings.warn(
        "gradient checkpointing was enabled on blocks of this model; abyssal takes its place, so it was switched "
        "off there. Enable it again after abyssal.release(model) if you want it back.",
        stacklevel=3,
    )
