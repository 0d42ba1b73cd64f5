"""What a measurement says: whether kept inputs gave the exact step, and how the default stands beside bfloat16."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

Row = dict[str, Any]
ROUNDING = 1e-5  # relative; below it a gradient differs by the order of float32 sums only
REPEATS = 3.0  # how much further than a model's own runs from each other a step may be
NEAR = 1.5


def is_measured(row: Row) -> bool:
    return "keep" in row and "default" in row


def outcome(row: Row) -> str:
    """Why a model was not measured, or "measured"."""
    if is_measured(row):
        return "measured"
    for key in ("not_built", "no_blocks", "find_blocks", "harness"):
        if key in row:
            return {"not_built": "not built", "no_blocks": "no blocks", "find_blocks": "find_blocks raises"}.get(
                key, key
            )
    return "cut off"


def keep(row: Row) -> str:
    """Return "exact", "rounding", "wrong" or "raises"."""
    found = row["keep"]
    if "raised" in found:
        return "raises"
    if _differs(found, row):
        return "wrong"
    if found["error"] <= REPEATS * row["repeat"] and (found["loss"] == 0 or row["repeat"]):
        return "exact"
    return "rounding" if found["error"] <= ROUNDING else "wrong"


def default(row: Row) -> str:
    """Return "within" or "near" (1.5 times) bfloat16's error, "told" (beyond, warned), "beyond", "wrong", "raises"."""
    found = row["default"]
    if "raised" in found:
        return "raises"
    if _differs(found, row):
        return "wrong"
    error, bf16 = found["error"], row.get("bf16") or 0.0
    if error <= max(bf16, REPEATS * row["repeat"], ROUNDING):
        return "within"
    if error <= NEAR * bf16:
        return "near"
    return "told" if found["drifted"] or any("Drift" in text for text in found["warnings"]) else "beyond"


def _differs(found: Row, row: Row) -> bool:
    """Whether gradients are missing, or the loss or a buffer is another, where a plain step repeats itself."""
    return bool(found["missing"]) or (row["repeat"] == 0 and (found["loss"] > ROUNDING or bool(found["buffers"])))


def is_released(row: Row) -> bool:
    left = row.get("released")
    return left is None or (left["error"] <= REPEATS * row["repeat"] and not left["left"])


def treatment(row: Row) -> dict[str, int]:
    """How many blocks of the default were coded (also a chain's start and end), kept, stored, otherwise, not called."""
    counts: Counter[str] = Counter()
    for policy, count in row["default"].get("policies", {}).items():
        word = re.match(r"Code|Keep|Store|not called", policy)
        counts[{"Code": "coded", "Keep": "kept", "Store": "stored"}.get(word[0], word[0]) if word else "other"] += count
    return dict(counts)


def without_numbers(text: str) -> str:
    return re.sub(r"\d[\d,.]*(e[+-]?\d+)?", "N", text)
