"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": (1024 if kind == "ib" else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for kind in ("b", "ib")
}


def parse_bytes(size: str | int | float) -> int:
    """Take a size in bytes, such as 2e9, "2GiB", "500 MB" or "2e9", to whole bytes.

    Args:
        size: a number, or a number with a unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB
            (powers of 1024), in any case.

    Raises:
        ValueError: if it is not understood, negative, or not finite.
        TypeError: if it is neither a number nor a string.
    """
    if isinstance(size, bool) or not isinstance(size, str | int | float):
        raise TypeError(f"size in bytes: expected a number or a string such as '2GiB', got {size!r}")
    number, unit = size if not isinstance(size, str) else size.strip(), ""
    if isinstance(number, str):
        match = re.fullmatch(r"([+-]?[0-9_,.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)", number)
        if match is None or match[2].lower() not in _UNITS:
            given = f" ({match[2]!r} is no unit known here)" if match else ""
            raise ValueError(
                f"size in bytes: {size!r} is not understood{given}; give a number with a unit such as '2GiB', '500MB' "
                "or '1.5 GiB' (kB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB of 1024), or plain bytes"
            )
        unit = match[2].lower()
        try:
            number = float(match[1].replace("_", ""))
        except ValueError:
            raise ValueError(f"size in bytes: {match[1]!r} in {size!r} is no number; write 1.5GiB, 2e9") from None
    if not 0 <= number < float("inf"):
        raise ValueError(f"size in bytes: expected a size of at least 0, got {size!r}")
    return round(number * _UNITS[unit])
