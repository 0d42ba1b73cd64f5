"""Plans as JSON: versioned, readable, and validated when they are read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abyssal.engine.policy import Policy, policy_from_dict, policy_to_dict
from abyssal.planning.plan_data import BlockPlan, Cost, PlanData, PlanError
from abyssal.util.files import write_whole

FORMAT, VERSION = "abyssal plan", 1


def to_dict(plan: PlanData) -> dict[str, Any]:
    """Return a plan as plain numbers, strings, lists and dictionaries."""
    shapes: list[list[Any]] = []  # blocks that are alike share theirs
    blocks = [_block_to_dict(block, shapes) for block in plan.blocks]
    plain = _plain({**_fields(plan), "blocks": None})
    del plain["blocks"]
    return {"format": FORMAT, "version": VERSION, **plain, "blocks": blocks, "parameters": shapes}


def save(plan: PlanData, path: Path) -> None:
    """Write a plan as JSON, a line per block, whole or not at all."""
    data = to_dict(plan)
    blocks, shapes = data.pop("blocks"), data.pop("parameters")
    head = json.dumps(data, indent=2, allow_nan=False).removesuffix("\n}")
    parts = [
        f'  "{key}": [\n' + ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows) + "\n  ]"
        for key, rows in (("blocks", blocks), ("parameters", shapes))
    ]
    write_whole(path, head + ",\n" + ",\n".join(parts) + "\n}\n")


def load(path: Path) -> dict[str, Any]:
    """Read the fields of a plan.

    Raises:
        PlanError: if the file holds none that this version can read.
    """
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: this is no plan, for it is not JSON ({error}). Plan.save writes plans.") from None
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def from_dict(data: Any) -> dict[str, Any]:
    """Return the fields of the plan that `to_dict` was given.

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
    shapes = _get(data, "parameters", list)
    blocks = tuple(_block(entry, n, shapes) for n, entry in enumerate(_get(data, "blocks", list)))
    if len({block.name for block in blocks}) < len(blocks):
        raise PlanError('"blocks": a block is named twice.')
    errors = _get(data, "gradient_errors", dict)
    return {
        "blocks": blocks,
        "tolerance": _number(data, "tolerance", optional=True),
        "memory": _number(data, "memory", int, optional=True),
        "gradient_errors": {batch: _number(errors, batch) for batch in errors},
        "bf16_error": _number(data, "bf16_error", optional=True),
        **{key: _cost(_get(data, key, dict)) for key in ("cost", "checkpointing", "plain")},
        **{key: str(data.get(key, "")) for key in ("bf16_reason", "peak_set_by", "batch")},
        "environment": {str(key): str(value) for key, value in dict(data.get("environment") or {}).items()},
        "notes": tuple(str(note) for note in data.get("notes") or ()),
    }


def _fields(thing: Any) -> dict[str, Any]:
    return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: lists for tuples, no infinities."""
    if isinstance(value, Cost):
        value = _fields(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return "inf" if isinstance(value, float) and not math.isfinite(value) else value


def _block_to_dict(block: BlockPlan, shapes: list[list[Any]]) -> dict[str, Any]:
    entry = _fields(block)
    parameters = _plain(entry["parameters"])
    if parameters not in shapes:
        shapes.append(parameters)
    entry["parameters"] = shapes.index(parameters)
    if not block.note:
        del entry["note"]
    try:
        policy = policy_to_dict(entry.pop("policy"))
    except ValueError as error:
        raise PlanError(str(error)) from None
    found: dict[str, Any] = _plain({"name": entry.pop("name"), "kind": entry.pop("kind"), **policy})
    return {**found, **_plain(entry)}


def _block(entry: Any, place: int, shapes: list[Any]) -> BlockPlan:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise PlanError(f'"blocks", entry {place}: expected an object with a name.')
    where = f"block {entry['name']!r}"
    try:
        parameters = tuple((str(name), tuple(map(int, shape))) for name, shape in shapes[entry["parameters"]])
    except (KeyError, IndexError, TypeError, ValueError):
        raise PlanError(f'{where}: "parameters" is not the number of an entry of the list of that name.') from None
    figures = ("state_error", "gradient_share", "sensitivity", "seconds")
    return BlockPlan(
        name=entry["name"],
        kind=str(entry.get("kind", "")),
        policy=_policy(entry, where),
        stored_bytes=_number(entry, "stored_bytes", int),
        **{key: _number(entry, key) for key in figures},
        parameters=parameters,
        note=str(entry.get("note", "")),
    )


def _policy(entry: dict[str, Any], where: str) -> Policy:
    try:
        return policy_from_dict(entry)
    except (ValueError, TypeError) as error:
        raise PlanError(f"{where}: {error}") from None


def _cost(entry: dict[str, Any]) -> Cost:
    kinds = {"stream_bytes": int, "peak_bytes": int, "seconds": float}
    return Cost(**{key: _number(entry, key, kind, optional=True) for key, kind in kinds.items()})


def _get(data: dict[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise PlanError(f'"{key}": expected {expected}, got {type(value).__name__}.')
    return value


def _number(data: dict[str, Any], key: str, kind: type = float, optional: bool = False) -> Any:
    value = data.get(key)
    if value is None and optional:
        return None
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f'"{key}": expected a number, got {value!r}.')
    return kind(value)
