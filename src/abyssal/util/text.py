"""Sizes, times and tables, as people write and read them."""

from __future__ import annotations

import io
import os
import re

__all__ = ["bytes_in_words", "columns_of_terminal", "parse_bytes", "printed", "seconds_in_words"]

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


def bytes_in_words(count: float) -> str:
    """Return e.g. `1.5 MiB`, `34.4 GiB`, `1,024 GiB`: up to four digits, in powers of 1024."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 999.95 else f"{value:.1f} {unit}"


def seconds_in_words(seconds: float) -> str:
    """Return e.g. `15.2 ms`, `1.52 s`, `15.2 s`, `2.5 min`, `2.5 h`."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def columns_of_terminal(width: int | None = None) -> int:
    """Return the width given, or else what COLUMNS says, or else 100."""
    return width or int(os.environ.get("COLUMNS", 0)) or 100


def printed(*parts: object, width: int | None = None) -> str:
    """Return what rich prints of tables and texts, as plain text of `width` columns or `columns_of_terminal()`."""
    from rich.console import Console  # a tenth of a second, and not everyone prints

    buffer = io.StringIO()
    console = Console(file=buffer, width=columns_of_terminal(width), no_color=True, highlight=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")
