"""Results of a sweep by cell, in one SQLite file that survives being killed.

A cell's key is the hash of what it is: study, version of the code that computes it, and parameters, written as
canonical JSON. Each result is one transaction, flushed to the disk before :meth:`Store.put` returns, so whatever
happens later it is there, whole. Several processes of one machine may read and write the same file at once.
The write-ahead log it uses needs a file system with shared memory: local disks have it, network shares often not.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

__all__ = ["Record", "Store", "StoreError", "canonical", "key_of", "plain"]

_FORMAT = 1
_MOST_BITS = 10_000  # of a result: Python writes no more than 4300 digits
_PATIENCE = 120.0  # seconds that a write waits for another process's, which takes milliseconds
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    key TEXT PRIMARY KEY, study TEXT NOT NULL, version INTEGER NOT NULL, parameters TEXT NOT NULL,
    "values" TEXT NOT NULL, seconds REAL NOT NULL, computed INTEGER NOT NULL, finished TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS arrays (
    key TEXT NOT NULL REFERENCES cells(key), name TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (key, name));
CREATE TABLE IF NOT EXISTS failures (
    key TEXT PRIMARY KEY, study TEXT NOT NULL, version INTEGER NOT NULL, parameters TEXT NOT NULL,
    traceback TEXT NOT NULL, finished TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attempts (
    key TEXT NOT NULL, study TEXT NOT NULL, parameters TEXT NOT NULL, traceback TEXT NOT NULL, finished TEXT NOT NULL);
"""


class StoreError(Exception):
    """A file that cannot serve as a store."""


@dataclass(frozen=True)
class Record:
    """What the store holds of one finished cell.

    Attributes:
        parameters: the cell's parameters.
        values: its results: what JSON can hold, and numpy arrays.
        seconds: CPU time that computing it took.
        computed: how many times a result for this cell was handed in; the first one is kept.
        finished: when, ISO 8601 in UTC.
    """

    parameters: dict[str, Any]
    values: dict[str, Any]
    seconds: float
    computed: int
    finished: str


def canonical(parameters: Mapping[str, Any]) -> str:
    """Return parameters as the one JSON text that stands for them: keys sorted, numbers in full.

    Args:
        parameters: nested mappings, sequences, texts, finite numbers, truth values, None; numpy's too.

    Raises:
        TypeError: for anything else.
        ValueError: for a number that is not finite.
    """
    return json.dumps(
        _throughout(parameters, "parameters", _named), sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def key_of(study: str, version: int, parameters: Mapping[str, Any]) -> str:
    """Return the key of a cell: a hash of study, version and parameters, the same everywhere and always."""
    text = canonical({"study": study, "version": version, "parameters": parameters})
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """A SQLite file of results.

    Args:
        path: the file; made where it is missing, in a folder that exists.
        fresh: what is in the file already counts as not computed here, and is replaced as results come. It stays in
            the file until then.

    Raises:
        StoreError: if it cannot be opened, is not a store, or comes from a newer version of it.
    """

    def __init__(self, path: str | Path, *, fresh: bool = False) -> None:
        self.path = Path(path)
        self._old: set[str] = set()  # keys of results that do not count
        self._lock = threading.Lock()  # joblib asks from a thread of its own which cell comes next
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: cannot be opened as a store ({error}).") from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._connection.close()
            raise StoreError(f"{self.path}: is no store of results ({error}). Give another file.") from error
        except StoreError:
            self._connection.close()
            raise
        if fresh:
            self._old = {key for (key,) in self._connection.execute("SELECT key FROM cells")}

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            for statement in _TABLES.split(";"):
                self._connection.execute(statement)
            self._connection.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (str(_FORMAT),))
        (found,) = self._connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
        if int(found) != _FORMAT:
            raise StoreError(f"{self.path}: is a store of format {found}, this version reads {_FORMAT}.")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")  # taken at once: a lock upgraded midway can fail
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def put(
        self, study: str, version: int, parameters: Mapping[str, Any], values: Mapping[str, Any], seconds: float = 0.0
    ) -> None:
        """Keep the result of a cell; one that is there already stays, and is counted.

        Args:
            study: what is studied; stores may hold several.
            version: of the code that computes cells, to be raised when its results change.
            parameters: the cell's parameters.
            values: its results by name: what JSON can hold (numbers may be infinite or nan), and numpy arrays.
            seconds: CPU time it took.
        """
        key, given = key_of(study, version, parameters), canonical(parameters)
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        rest = json.dumps({name: value for name, value in values.items() if name not in arrays})
        blobs = {name: _packed(array) for name, array in arrays.items()}
        with self._transaction():
            if key in self._old:
                self._delete(key)
            fresh = self._connection.execute(
                "INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, 1, ?) "
                "ON CONFLICT(key) DO UPDATE SET computed = computed + 1 RETURNING computed",
                (key, study, version, given, rest, seconds, _now()),
            ).fetchall() == [(1,)]
            if fresh:
                self._connection.executemany(
                    "INSERT INTO arrays VALUES (?, ?, ?)", [(key, name, blob) for name, blob in blobs.items()]
                )
            self._connection.execute("DELETE FROM failures WHERE key = ?", (key,))
        self._old.discard(key)

    def fail(self, study: str, version: int, parameters: Mapping[str, Any], traceback: str) -> None:
        """Note that a cell failed, and how. It counts as not computed; what was noted before is kept as well."""
        key, given, now = key_of(study, version, parameters), canonical(parameters), _now()
        row = (key, study, version, given, traceback, now)
        with self._transaction():
            self._connection.execute("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?, ?, ?)", row)
            self._connection.execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?)", (key, study, given, traceback, now))

    def forget(self, study: str, version: int, parameters: Mapping[str, Any]) -> None:
        """Take out the result of a cell, so that it counts as not computed."""
        with self._transaction():
            self._delete(key_of(study, version, parameters))

    def _delete(self, key: str) -> None:
        for table in ("arrays", "cells", "failures"):
            self._connection.execute(f"DELETE FROM {table} WHERE key = ?", (key,))

    def _ask(self, query: str, *given: Any) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, given).fetchall()

    def get(self, study: str, version: int, parameters: Mapping[str, Any]) -> Record | None:
        """Return the result of a cell, None where it is not finished."""
        key = key_of(study, version, parameters)
        if key in self._old:
            return None
        with self._lock:
            row = self._connection.execute(
                'SELECT parameters, "values", seconds, computed, finished FROM cells WHERE key = ?', (key,)
            ).fetchone()
            arrays = self._connection.execute("SELECT name, data FROM arrays WHERE key = ?", (key,)).fetchall()
        if row is None:
            return None
        given, rest, seconds, computed, finished = row
        values = json.loads(rest) | {name: np.load(io.BytesIO(data), allow_pickle=False) for name, data in arrays}
        return Record(json.loads(given), values, seconds, computed, finished)

    def has(self, study: str, version: int, parameters: Mapping[str, Any]) -> bool:
        """Return whether a cell is finished."""
        key = key_of(study, version, parameters)
        return key not in self._old and bool(self._ask("SELECT 1 FROM cells WHERE key = ?", key))

    def versions(self, study: str) -> list[int]:
        """Return the versions of a study that have finished cells, the one that finished a cell last first."""
        query = "SELECT version FROM cells WHERE study = ? GROUP BY version ORDER BY MAX(rowid) DESC"
        return [version for (version,) in self._ask(query, study)]

    def records(self, study: str, version: int | None = None) -> Iterator[Record]:
        """Give the finished cells of a study, of one version or of all, in the order they were finished in."""
        for found, given in self._ask("SELECT version, parameters FROM cells WHERE study = ? ORDER BY rowid", study):
            if version is None or found == version:
                record = self.get(study, found, json.loads(given))
                if record is not None:  # else it was forgotten meanwhile
                    yield record

    def failures(self, study: str) -> list[tuple[dict[str, Any], str]]:
        """Return the cells of a study whose last attempt failed: parameters and traceback."""
        rows = self._ask("SELECT parameters, traceback FROM failures WHERE study = ? ORDER BY key", study)
        return [(json.loads(given), traceback) for given, traceback in rows]

    def attempts(self, study: str) -> list[tuple[dict[str, Any], str]]:
        """Return every failure there ever was in a study, in order, mended ones too: parameters and traceback."""
        rows = self._ask("SELECT parameters, traceback FROM attempts WHERE study = ? ORDER BY rowid", study)
        return [(json.loads(given), traceback) for given, traceback in rows]

    def close(self) -> None:
        """Close the file; the log beside it goes into it."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _packed(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _throughout(value: Any, where: str, leaf: Callable[[Any, str], Any]) -> Any:
    """Return a value with all its parts as `leaf(part, where)` gives them, lists for tuples and dicts for mappings."""
    if isinstance(value, list | tuple):
        return [_throughout(part, f"{where}[{i}]", leaf) for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"{where}: names have to be texts, got {list(value)!r}.")
        return {name: _throughout(part, f"{where}[{name!r}]", leaf) for name, part in value.items()}
    return leaf(value, where)


def _named(value: Any, where: str) -> Any:
    """Return a part of what names a cell in JSON's own types, or say where it has none."""
    if isinstance(value, np.ndarray):
        return _throughout(value.tolist(), where, _named)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} is no finite number, and cannot be part of what names a cell.")
        return value + 0.0  # -0.0 is 0.0
    raise TypeError(f"{where}: a {type(value).__name__} cannot be part of what names a cell; got {value!r}.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain(values: Any) -> dict[str, Any]:
    """Return a cell's results with Python's own numbers and numpy arrays, in the form that the store gives back.

    A fresh result and one out of the store have to be equal, whatever the function returned, or a sweep that was
    killed would end with other types than one that was not.

    Args:
        values: results by name: texts, numbers (numpy's and torch's too), truth values, None, lists and mappings of
            them, and at the top numpy arrays and torch tensors of any number of dimensions; tensors without
            dimensions become numbers.

    Raises:
        TypeError: naming what cannot be kept.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"A cell has to return its results by name, as a dict; got {_called(values)}. "
            'Return for example {"loss": loss}.'
        )
    found = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise TypeError(f"Results have to be named by texts; got the name {name!r}.")
        value = _without_torch(value, name)
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            raise TypeError(f"{name}: an array of Python objects cannot be kept; give numbers or texts.")
        # A copy: the function may use the same memory for its next cell.
        found[name] = value.copy() if isinstance(value, np.ndarray) else _throughout(value, name, _kept)
    return found


def _without_torch(value: Any, where: str) -> Any:
    """Return a tensor as numpy's array, or as a number where it has no dimensions; anything else as it is."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    if value.ndim == 0:
        return value.item()
    if value.dtype == torch.bfloat16:
        raise TypeError(f"{where}: numpy has no bfloat16; return the tensor as float32, which holds it exactly.")
    return value.detach().cpu().numpy()


def _kept(value: Any, where: str) -> Any:
    """Return a part of a result as Python's own, or say where it is none that can be kept."""
    value = _without_torch(value, where)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise TypeError(f"{where}: a whole number of {value.bit_length():,} bits cannot be kept. Return its logarithm.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{where}: {_called(value)} cannot be kept. Return numbers, texts, lists and dicts of them, and arrays or "
        "tensors as values of their own."
    )


def _called(value: Any) -> str:
    return f"a {type(value).__name__}"
