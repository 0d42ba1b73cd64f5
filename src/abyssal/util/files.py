"""Files written whole or not at all; long tables as CSV always, as Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "PARQUET_HINT",
    "Value",
    "columns_of",
    "for_json",
    "read_csv",
    "whole",
    "write_csv",
    "write_parquet",
    "write_table",
    "write_whole",
]

Value = float | int | str | bool | None
PARQUET_HINT = 'no Parquet file, as pyarrow is not installed: pip install "abyssal[data]"'


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to, and move it there at the end: nobody ever sees half of it.

    Raises:
        OSError: the folder is missing or cannot be written to; what was at `path` is still there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; raises as :func:`whole`."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def for_json(value: Any) -> Any:
    """Return plain data with None in place of every number that JSON has no name for."""
    if isinstance(value, Mapping):
        return {key: for_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def columns_of(rows: Sequence[Mapping[str, Value]]) -> list[str]:
    """Return the names of all columns, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_table(rows: Sequence[Mapping[str, Value]], stem: Path) -> list[Path]:
    """Write `stem.csv`, and `stem.parquet` if it can be; return the files written."""
    files = [write_csv(rows, stem.with_suffix(".csv"))]
    parquet = write_parquet(rows, stem.with_suffix(".parquet"))
    return files if parquet is None else [*files, parquet]


def write_csv(rows: Sequence[Mapping[str, Value]], path: Path) -> Path:
    """Write a table, whole or not at all: numbers in full, `true` and `false`, nothing for None."""
    columns = columns_of(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_text(row.get(name)) for name in columns] for row in rows)
    write_whole(path, text.getvalue())
    return path


def _text(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, int | float) else value


def read_csv(path: Path) -> list[dict[str, Value]]:
    """Read a table that :func:`write_csv` wrote; a text that looks like a number, a truth value or nothing is one."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Value:
    if text in ("", "true", "false"):
        return None if text == "" else text == "true"
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    try:
        return text if "_" in text else float(text)
    except ValueError:
        return text


def write_parquet(rows: Sequence[Mapping[str, Value]], path: Path) -> Path | None:
    """Write a table as Parquet, whole or not at all; None, and no file of an earlier run, without pyarrow.

    A column holds one type: truth values, whole numbers, numbers, and texts where its cells are of several kinds.
    """
    if importlib.util.find_spec("pyarrow") is None:
        path.unlink(missing_ok=True)
        return None
    import pyarrow
    from pyarrow import parquet

    table = {name: _column([row.get(name) for row in rows]) for name in columns_of(rows)}
    with whole(path) as beside:
        parquet.write_table(pyarrow.table(table), beside)
    return path


def _column(cells: list[Any]) -> list[Any]:
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {int, float}:
        return [None if cell is None else float(cell) for cell in cells]
    if len(kinds) > 1 or (kinds == {int} and any(cell is not None and abs(cell) >= 2**63 for cell in cells)):
        return [None if cell is None else _text(cell) for cell in cells]
    return cells
