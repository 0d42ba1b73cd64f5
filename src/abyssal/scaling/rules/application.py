"""Applying a rule of depth to a model: multipliers, fresh weights, learned scalars, parameter groups.

In place, and without attributes on tensors: the multipliers are hooks (see `hooks`), the optimiser's factors are
groups by role, looked up by parameter names when they are asked for. So both hold after `fully_shard` has
replaced the parameters, below DDP and torch.compile, through `state_dict`, pickle and deepcopy, and with
learning-rate schedulers, which multiply each group's own learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from abyssal.models import anatomy
from abyssal.models.branches import wrapped_core
from abyssal.models.find import Blocks
from abyssal.models.patch import Change
from abyssal.models.reading import Branch, ModelReading, Role, read_model
from abyssal.scaling.rules.base import ROLES, Factors, Optimizer, Rule, Sizes, ratio
from abyssal.scaling.rules.fresh import init_factors, multiply_
from abyssal.scaling.rules.hooks import (
    BIAS,
    GATE,
    MADE_BY,
    BranchScale,
    HeadScale,
    InputBias,
    ScaledForward,
    scaling_hooks,
)
from abyssal.scaling.rules.known import rule as rule_by_name
from abyssal.util.checks import number, one_of
from abyssal.util.text import printed

__all__ = ["Scaled", "applied", "apply", "remove"]

_MARK = "abyssal_scaling"  # where a scaled model holds its record
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def apply(
    model: nn.Module,
    rule: str | Rule = "completep",
    base_depth: float | None = None,
    base_width: float | None = None,
    lr: float | None = None,
    *,
    depth: int | None = None,
    width: float | None = None,
    batch: Any = None,
    blocks: Blocks | None = None,
    whole_blocks: bool = False,
    init: bool = True,
    constant_std: bool | None = None,
) -> Scaled:
    """Apply a rule of depth to a model, in place.

    Args:
        model: any whose blocks `abyssal.find_blocks` can find, or are named; before DDP and `fully_shard`.
        rule: a name of `abyssal.scaling.rules.RULES`, or a rule.
        base_depth: number of blocks of the network whose hyperparameters are to be kept; for rules that are
            relative to one (CompleteP, depth-muP).
        base_width: width of that network; None if the width is the same.
        lr: the base network's learning rate, for `parameter_groups`.
        depth: number of blocks; None counts the calls of blocks in one forward pass.
        width: None takes the channels of the last block's stream.
        batch: what the model is run with to be read: a dict, a tuple or a tensor; None makes one.
        blocks: as in `abyssal.reconstruct`; None finds them.
        whole_blocks: take each block as one branch, `x + m (block(x) - x)`, where its branches cannot be found.
        init: whether to change the weights as the rule asks; False for pretrained ones.
        constant_std: whether the fresh matrices' standard deviation does not fall with fan-in by itself; None
            looks (see `fresh.init_factors`). Only matters with a base width.

    Returns:
        What was done, with `parameter_groups`; print it for a table.

    Raises:
        ValueError: for an unknown rule, a missing or bad base depth, a rule that does not fit the blocks, or a
            model that is scaled already. Nothing has been changed then.
        NoBlocksError: no blocks were found.
        UnreadableModelError: the branches of a block cannot be found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply takes a torch.nn.Module, got a {type(model).__name__}.")
    chosen = rule_by_name(rule)
    _check_unscaled(model)
    if chosen.relative and base_depth is None:
        raise ValueError(f"The rule {chosen.name!r} is relative to a base network: give its depth, base_depth=12.")
    for name, size, base in (("depth", depth, base_depth), ("width", width, base_width)):
        ratio(1 if size is None else size, 1 if base is None else base, name)
    reading = read_model(model, batch, blocks=blocks, whole_blocks=whole_blocks)
    _check_fits(chosen, reading)
    sizes = _sizes(reading, depth, base_depth, width, base_width)
    gate = chosen.gate(sizes)  # a rule may refuse the sizes
    notes = list(reading.notes)
    changes: dict[str, float] = {}
    if (init or gate is not None) and any(p.is_meta for p in model.parameters()):
        raise ValueError("The weights are on the meta device, with nothing to change: initialise them first.")
    if init:
        changes, said = init_factors(model, chosen, sizes, reading, constant_std)
        notes += said
    scaled = Scaled(model, chosen, sizes, base_depth, base_width, lr, reading, changes, init, notes)
    scaled._install()
    return scaled


def applied(model: nn.Module) -> Scaled | None:
    """Return what `apply` returned for a model, also for a copy or an unpickled one; None if it was not scaled."""
    return next((found for m in model.modules() if (found := m.__dict__.get(_MARK)) is not None), None)


def remove(model: nn.Module) -> nn.Module:
    """Take the multipliers, and the parameters that a rule added, off a model again; fresh weights stay changed.

    Raises:
        ValueError: the model is not scaled.
    """
    scaled = applied(model)
    if scaled is None:
        raise ValueError(f"This {anatomy.title(model)} has no rule to remove: abyssal.scaling.apply was not called.")
    for module in scaled.model.modules():
        for hook in scaling_hooks(module):
            hook.handle.remove()
        if isinstance(forward := module.__dict__.get("forward"), ScaledForward):
            forward.remove()
        for name in (GATE, BIAS):
            if name in module._parameters:
                del module._parameters[name]
    del scaled.model.__dict__[_MARK]
    return model


@dataclass(eq=False)
class Scaled(Change):
    """A model under a rule of depth.

    Attributes:
        model: the model.
        rule: the rule.
        sizes: the sizes it was applied with.
        base_depth: as given.
        base_width: as given.
        lr: as given.
        reading: the model's branches and its parameters' roles; those that the rule added are "gate".
        init_factors: the factor of every fresh weight that was changed, by name.
        init: whether fresh weights were to be changed.
        notes: what a user should know.
    """

    made_by, undone_by = MADE_BY

    model: nn.Module
    rule: Rule
    sizes: Sizes
    base_depth: float | None
    base_width: float | None
    lr: float | None
    reading: ModelReading
    init_factors: dict[str, float]
    init: bool
    notes: list[str]

    @property
    def roles(self) -> Mapping[str, Role]:
        """The role of every parameter by name."""
        return self.reading.roles

    @property
    def multipliers(self) -> dict[str, float]:
        """The constant factor of every residual branch, by the name of the module whose output it multiplies."""
        return {branch.end: self.rule.multiplier(self.sizes) for branch in self.reading.branches}

    def factors(self, optimizer: Optimizer = "adamw") -> dict[Role, Factors]:
        """Return the factors of the optimiser's settings for the roles that this model has."""
        present = set(self.roles.values())
        return {role: self.rule.factors(role, self.sizes, optimizer) for role in ROLES if role in present}

    def parameter_groups(
        self,
        lr: float | None = None,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        optimizer: Literal["adamw", "sgd"] = "adamw",
    ) -> list[dict[str, Any]]:
        """Return parameter groups by role, for `torch.optim.AdamW` or `torch.optim.SGD`.

        Call it after `fully_shard`, which replaces the parameters. Schedulers that multiply (LambdaLR, cosine,
        step) keep the ratios. OneCycleLR sets the learning rates, so give it one per group:
        `max_lr=[group["lr"] for group in optimizer.param_groups]`.

        Args:
            lr: the base network's learning rate; None is the one given to `apply`.
            weight_decay: of the base network.
            eps: Adam's, of the base network.
            optimizer: "adamw" or "sgd".

        Returns:
            One dict per role that the model has, with `params`, `name` (the role), `lr`, `weight_decay` and, for
            AdamW, `eps`. Every parameter that needs a gradient is in one of them.

        Raises:
            ValueError: without a learning rate, for another optimiser, or if the model has got parameters since.
        """
        rate = self.lr if lr is None else lr
        if rate is None:
            raise ValueError("No learning rate: give the base network's, parameter_groups(lr=1e-3).")
        for name, value in (("lr", rate), ("weight_decay", weight_decay), ("eps", eps)):
            number(name, value, 0)
        one_of("optimizer", optimizer, ("adamw", "sgd"))
        members: dict[Role, list[nn.Parameter]] = {role: [] for role in ROLES}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                members[self._role(name)].append(p)
        groups = []
        for role, params in members.items():
            if not params:
                continue
            by = self.rule.factors(role, self.sizes, optimizer)
            group = {"params": params, "name": role, "lr": rate * by.lr, "weight_decay": weight_decay * by.weight_decay}
            groups.append(group | ({"eps": eps * by.eps} if optimizer == "adamw" else {}))
        return groups

    def _role(self, name: str) -> Role:
        role = self.roles.get(name) or self._unwrapped.get(_unwrapped(name))
        if role is None:
            raise ValueError(
                f"The parameter {name!r} was added to the model after abyssal.scaling.apply, so it has no role. "
                "Apply the rule to the finished model."
            )
        return role

    @property
    def _unwrapped(self) -> dict[str, Role]:
        return {_unwrapped(name): role for name, role in self.roles.items()}

    # ------------------------------------------------------------------ installing

    def _install(self) -> None:
        multiply_(self.model, self.init_factors)
        gate, constant = self.rule.gate(self.sizes), self.rule.multiplier(self.sizes)
        done: set[int] = set()
        for branch in self.reading.branches:
            end = _core(self.model, branch.end)
            if id(end) in done:
                continue
            done.add(id(end))
            owner = None
            if gate is not None:
                owner = _core(self.model, branch.block) if gate.shared else end
                width = branch.width if gate.per_channel else 1
                _register(owner, GATE, torch.full((width,), gate.start), end, _core(self.model, branch.block))
                if gate.biases:
                    self._add_biases(branch)
            if owner is not None or constant != 1:
                kind = ScaledForward if branch.whole else BranchScale
                kind(end, constant, owner, branch.channel)
        logits = self.rule.logits(self.sizes)
        if logits != 1 and self.reading.head is not None:
            HeadScale(_core(self.model, self.reading.head), logits)
        elif logits != 1:
            self.notes.append("no module that gives logits was found after the blocks: nothing is multiplied there")
        for name, _ in self.model.named_parameters():
            self.reading.roles.setdefault(name, "gate")
        self.model.__dict__[_MARK] = self

    def _add_biases(self, branch: Branch) -> None:
        for name in branch.inputs:
            module = _core(self.model, name)
            if BIAS not in module._parameters:
                _register(module, BIAS, torch.zeros(1), module, _core(self.model, branch.block))
                InputBias(module)

    # ------------------------------------------------------------------ showing

    def __rich__(self) -> Group:
        """Return a table of what was changed."""
        table = Table(title=f"{self.rule.name} ({self.rule.source})", title_justify="left")
        for column in ("role", "tensors", "parameters", "AdamW lr", "eps", "weight decay", "SGD lr", "fresh weights"):
            table.add_column(column, justify="left" if column == "role" else "right")
        by_role: dict[Role, list[tuple[str, int]]] = {}
        for name, p in self.model.named_parameters():
            by_role.setdefault(self._role(name), []).append((name, p.numel()))
        for role, adam in self.factors().items():
            held, sgd = by_role[role], self.rule.factors(role, self.sizes, "sgd")
            fresh = sorted({self.init_factors.get(name, 1.0) for name, _ in held})
            shown = "x " + " to ".join(f"{value:.4g}" for value in dict.fromkeys((fresh[0], fresh[-1])))
            table.add_row(
                role,
                f"{len(held):,}",
                f"{sum(size for _, size in held):,}",
                *(f"x {value:.4g}" for value in (adam.lr, adam.eps, adam.weight_decay, sgd.lr)),
                shown if self.init and role != "gate" else "-",
            )
        return Group(table, Text("\n".join(self._summary())))

    def _summary(self) -> Iterator[str]:
        sizes, gate = self.sizes, self.rule.gate(self.sizes)
        yield (
            f"Depth {sizes.depth} blocks, {sizes.branches} branches"
            + (f", base depth {self.base_depth:g}: m_L = {sizes.depth_ratio:.4g}" if self.base_depth else "")
            + (f"; base width {self.base_width:g}: m_N = {sizes.width_ratio:.4g}" if self.base_width else "")
            + "."
        )
        ends = list(self.multipliers)
        yield (
            f"Every branch times {self.rule.multiplier(sizes):.4g}, at the output of {len(ends)} modules: {ends[0]}"
            + (f" to {ends[-1]}." if len(ends) > 1 else ".")
        )
        if gate is not None:
            what = "a vector over channels" if gate.per_channel else "a number"
            which = "block" if gate.shared else "branch"
            yield f"And times {what} that is learned, one per {which}, from {gate.start:g} (parameters {GATE!r})."
        if self.reading.head is not None and self.rule.logits(sizes) != 1:
            yield f"The input of {self.reading.head!r} times {self.rule.logits(sizes):.4g}."
        for note in self.notes:
            yield note[0].upper() + note[1:] + "."

    def __str__(self) -> str:
        """Return the table as text."""
        return printed(self, width=120)

    def __repr__(self) -> str:
        """Name rule and sizes."""
        return f"<Scaled {anatomy.title(self.model)}: {self.rule!r}, {self.sizes!r}>"


def _sizes(
    reading: ModelReading,
    depth: int | None,
    base_depth: float | None,
    width: float | None,
    base_width: float | None,
) -> Sizes:
    deep = reading.depth if depth is None else depth
    return Sizes(
        depth=deep,
        branches=max(1, round(reading.calls * deep / reading.depth)),
        depth_ratio=ratio(deep, base_depth, "depth"),
        width_ratio=ratio(reading.width if width is None else width, base_width, "width"),
    )


def _check_unscaled(model: nn.Module) -> None:
    wrapped = any(type(m).__name__ == "DistributedDataParallel" for m in model.modules())
    if wrapped or any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "The model is wrapped in DistributedDataParallel or sharded by fully_shard. Apply the rule before that; "
            "ask for parameter_groups after it."
        )
    before = applied(model)
    if before is not None or any(scaling_hooks(module) for module in model.modules()):
        name = before.rule.name if before is not None else "a rule"
        raise ValueError(
            f"This {anatomy.title(model)} has {name!r} applied already. Take it off with abyssal.scaling.remove(model) "
            "first, and make the weights anew where the rule changed them."
        )


def _check_fits(rule: Rule, reading: ModelReading) -> None:
    if rule.post_norm and not reading.post_norm:
        raise ValueError(
            f"The rule {rule.name!r} is for post-norm blocks, LN(x + f(x)), and block {reading.blocks[0]!r} adds its "
            "branches to the stream without a norm after the sum. For pre-norm blocks take 'completep'."
        )


def _core(model: nn.Module, name: str) -> nn.Module:
    return wrapped_core(model.get_submodule(name))


def _register(owner: nn.Module, name: str, value: torch.Tensor, *like: nn.Module) -> None:
    """Give a module a parameter, where its weights or else its block's are, in their type."""
    if name in owner._parameters:  # of another branch of the same block
        return
    p = next((p for module in like for p in module.parameters() if p.is_floating_point()), value)
    owner.register_parameter(name, nn.Parameter(value.to(device=p.device, dtype=p.dtype)))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
