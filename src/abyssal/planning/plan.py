"""A plan: what it says, its file, its table, and the models that it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from abyssal.engine.policy import Policy
from abyssal.planning import plan_json
from abyssal.planning.plan_data import PlanData, PlanError

_WRAPPERS = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")  # DDP, torch.compile


class Plan(PlanData):
    """Policies for the blocks of one model, and what they were measured to cost; `print` shows it."""

    def check_fits(self, model: nn.Module) -> None:
        """Refuse a model that this plan was not made for.

        Args:
            model: the model to reconstruct.

        Raises:
            PlanError: naming the first block that is missing, of another class, or has other parameters.
        """
        self.policies_for(model)

    def policies_for(self, model: nn.Module) -> dict[str, Policy]:
        """Return the policies by the names that blocks have in `model`, which may be wrapped (DDP, torch.compile).

        Raises:
            PlanError: as `check_fits`.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        first = self.blocks[0].name if self.blocks else ""
        prefix = next((p for p in _WRAPPERS if p + first in modules), "")
        for block in self.blocks:
            module = modules.get(prefix + block.name)
            what = f"this plan does not fit this {type(model).__name__}: block {block.name!r}"
            advice = "Make a plan for this model: abyssal.plan(model, batch)."
            if module is None:
                raise PlanError(f"{what} is not in it. {advice}")
            if type(module).__name__ != block.kind:
                raise PlanError(f"{what} is a {type(module).__name__} here, and was a {block.kind}. {advice}")
            parameters = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
            if parameters != block.parameters:
                raise PlanError(f"{what} has {_difference(parameters, block.parameters)}. {advice}")
        return {prefix + block.name: block.policy for block in self.blocks}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists, for JSON."""
        return plan_json.to_dict(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        plan_json.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            PlanError: if the file holds no plan, a newer version, or an unknown policy.
            OSError: if it cannot be read.
        """
        return cls(**plan_json.load(Path(path)))

    def __str__(self) -> str:
        """Return the table."""
        from abyssal.planning.plan_table import plan_table  # here, since rich takes long to import

        return plan_table(self)


_Parameters = tuple[tuple[str, tuple[int, ...]], ...]


def _difference(found: _Parameters, planned: _Parameters) -> str:
    here, there = dict(found), dict(planned)
    for name in {**there, **here}:
        if name not in here:
            return f"no parameter {name!r}, which the plan's model had"
        if name not in there:
            return f"a parameter {name!r}, which the plan's model had not"
        if here[name] != there[name]:
            return f"a parameter {name!r} of shape {list(here[name])}, where the plan's model had {list(there[name])}"
    return "its parameters in another order"
