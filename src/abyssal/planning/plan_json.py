"""Plans as JSON: versioned, readable, validated when they are read, and held against the model they are used on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from abyssal.engine.policy import Code, Keep, PaperAdjoint, Policy, Reverse, Store
from abyssal.planning.plan import BlockPlan, Cost, Plan, PlanError

FORMAT, VERSION = "abyssal plan", 1
_POLICIES: dict[str, Any] = {kind.__name__: kind for kind in (Store, Keep, Code, Reverse, PaperAdjoint)}
_WRAPPERS = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")  # DDP, torch.compile


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain numbers, strings, lists and dictionaries."""
    shapes: list[list[Any]] = []  # blocks that are alike share theirs
    blocks = []
    for block in plan.blocks:
        parameters = [[name, list(shape)] for name, shape in block.parameters]
        if parameters not in shapes:
            shapes.append(parameters)
        entry: dict[str, Any] = {"name": block.name, "kind": block.kind, **_policy_to_dict(block.policy)}
        entry |= {"stored_bytes": block.stored_bytes}
        for key in ("state_error", "gradient_share", "sensitivity", "seconds"):
            entry[key] = _number(getattr(block, key))
        entry["parameters"] = shapes.index(parameters)
        if block.note:
            entry["note"] = block.note
        blocks.append(entry)
    return {
        "format": FORMAT,
        "version": VERSION,
        "tolerance": plan.tolerance,
        "memory": plan.memory,
        "gradient_errors": {batch: _number(error) for batch, error in plan.gradient_errors.items()},
        "bf16_error": _number(plan.bf16_error),
        "bf16_reason": plan.bf16_reason,
        "cost": _cost_to_dict(plan.cost),
        "checkpointing": _cost_to_dict(plan.checkpointing),
        "plain": _cost_to_dict(plan.plain),
        "peak_set_by": plan.peak_set_by,
        "batch": plan.batch,
        "environment": dict(plan.environment),
        "notes": list(plan.notes),
        "blocks": blocks,
        "parameters": shapes,
    }


def save(plan: Plan, path: Path) -> None:
    """Write a plan as JSON, a line per block."""
    data = to_dict(plan)
    blocks, shapes = data.pop("blocks"), data.pop("parameters")
    head = json.dumps(data, indent=2, allow_nan=False).removesuffix("\n}")
    parts = [
        f'  "{key}": [\n' + ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows) + "\n  ]"
        for key, rows in (("blocks", blocks), ("parameters", shapes))
    ]
    path.write_text(head + ",\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def load(path: Path) -> Plan:
    """Read a plan.

    Raises:
        PlanError: if the file holds none that this version can read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: this is no plan, for it is not JSON ({error}). Plan.save writes plans.") from None
    try:
        return from_dict(data)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def from_dict(data: Any) -> Plan:
    """Return the plan that `to_dict` gave.

    Raises:
        PlanError: if it is none that this version can read.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f'this is no plan: it has no "format": "{FORMAT}". Plan.save writes plans.')
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PlanError(f'"version": expected a whole number, got {version!r}.')
    if version > VERSION:
        raise PlanError(
            f"this plan has version {version} and was written by a newer abyssal; this one reads up to version "
            f"{VERSION}. Upgrade abyssal, or make the plan again with abyssal.plan."
        )
    shapes = _list(data, "parameters")
    blocks = tuple(_block(entry, n, shapes) for n, entry in enumerate(_list(data, "blocks")))
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        raise PlanError('"blocks": a block is named twice.')
    errors = data.get("gradient_errors")
    if not isinstance(errors, dict):
        raise PlanError('"gradient_errors": expected an object of numbers by batch.')
    memory = _number_at(data, "memory", optional=True)
    return Plan(
        blocks=blocks,
        tolerance=_number_at(data, "tolerance", optional=True),
        memory=None if memory is None else int(memory),
        gradient_errors={str(batch): _from_number(error) for batch, error in errors.items()},
        bf16_error=_number_at(data, "bf16_error", optional=True),
        bf16_reason=str(data.get("bf16_reason", "")),
        cost=_cost(data, "cost"),
        checkpointing=_cost(data, "checkpointing"),
        plain=_cost(data, "plain"),
        peak_set_by=str(data.get("peak_set_by", "")),
        batch=str(data.get("batch", "")),
        environment={str(key): str(value) for key, value in dict(data.get("environment") or {}).items()},
        notes=tuple(str(note) for note in data.get("notes") or ()),
    )


def names_in(plan: Plan, model: nn.Module) -> list[str]:
    """Return the names that the plan's blocks have in `model`.

    Raises:
        PlanError: naming the first block that does not fit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first = plan.blocks[0].name if plan.blocks else ""
    prefix = next((p for p in _WRAPPERS if p + first in modules), "")
    for block in plan.blocks:
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
    return [prefix + block.name for block in plan.blocks]


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


def _policy_to_dict(policy: Policy) -> dict[str, Any]:
    if type(policy).__name__ not in _POLICIES:
        raise PlanError(f"{policy} cannot be saved: a plan holds {', '.join(_POLICIES)}.")
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}  # type: ignore[arg-type]
    return {"policy": type(policy).__name__, **{name: value for name, value in fields.items() if value is not None}}


def _policy(entry: dict[str, Any], where: str) -> Policy:
    kind = _POLICIES.get(entry.get("policy", ""))
    if kind is None:
        raise PlanError(
            f"{where}: unknown policy {entry.get('policy')!r}; this version knows {', '.join(_POLICIES)}. Upgrade "
            "abyssal, or make the plan again with abyssal.plan."
        )
    known = {f.name for f in dataclasses.fields(kind)}
    try:
        policy: Policy = kind(**{name: value for name, value in entry.items() if name in known})
    except (ValueError, TypeError) as error:
        raise PlanError(f"{where}: {error}") from None
    return policy


def _block(entry: Any, place: int, shapes: list[Any]) -> BlockPlan:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise PlanError(f'"blocks", entry {place}: expected an object with a name.')
    where = f"block {entry['name']!r}"
    try:
        parameters = tuple((str(name), tuple(map(int, shape))) for name, shape in shapes[entry["parameters"]])
    except (KeyError, IndexError, TypeError, ValueError):
        raise PlanError(f'{where}: "parameters" is not the number of an entry of the list of that name.') from None
    return BlockPlan(
        name=entry["name"],
        kind=str(entry.get("kind", "")),
        policy=_policy(entry, where),
        stored_bytes=int(_number_at(entry, "stored_bytes") or 0),
        state_error=_number_at(entry, "state_error") or 0.0,
        gradient_share=_number_at(entry, "gradient_share") or 0.0,
        sensitivity=_number_at(entry, "sensitivity") or 0.0,
        seconds=_number_at(entry, "seconds") or 0.0,
        parameters=parameters,
        note=str(entry.get("note", "")),
    )


def _cost_to_dict(cost: Cost) -> dict[str, Any]:
    return {f.name: _number(getattr(cost, f.name)) for f in dataclasses.fields(cost)}


def _cost(data: dict[str, Any], key: str) -> Cost:
    entry = data.get(key)
    if not isinstance(entry, dict):
        raise PlanError(f'"{key}": expected an object with stream_bytes, peak_bytes and seconds.')
    stream, peak = (_number_at(entry, name, optional=True) for name in ("stream_bytes", "peak_bytes"))
    seconds = _number_at(entry, "seconds", optional=True)
    return Cost(None if stream is None else int(stream), None if peak is None else int(peak), seconds)


def _list(data: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(data.get(key), list):
        raise PlanError(f'"{key}": expected a list, got {type(data.get(key)).__name__}.')
    found: list[Any] = data[key]
    return found


def _number(value: float | None) -> float | str | None:
    """JSON has no infinities."""
    return "inf" if value is not None and not math.isfinite(value) else value


def _from_number(value: Any) -> float:
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"expected a number, got {value!r}.")
    return value


def _number_at(data: dict[str, Any], key: str, optional: bool = False) -> float | None:
    if optional and data.get(key) is None:
        return None
    try:
        return _from_number(data.get(key))
    except PlanError as error:
        raise PlanError(f'"{key}": {error}') from None
