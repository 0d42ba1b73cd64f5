"""Compute many cells on one process, on all cores, or on a cluster, and keep each result as it comes.

A cell's result depends on its parameters alone: whoever draws random numbers seeds them by :func:`seed_of`, never by
the order of cells, and every cell computes on one thread, so that all engines give the same bits on the same kind of
machine. The parent process alone writes to the store.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import os
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from abyssal.sweep.outcome import Cell, Failure, Outcome, SweepError
from abyssal.sweep.store import Store, canonical, key_of, plain
from abyssal.util.checks import whole
from abyssal.util.progress import Progress, silent

__all__ = [
    "ENGINES",
    "check_engine",
    "check_retries",
    "run",
    "seconds_here",
    "seed_of",
]

ENGINES = ("local", "ray", "dask", "sequential")
_PACKAGES = {"ray": ("ray",), "dask": ("dask", "distributed")}
_IDLE = 60  # seconds after which workers without work go
_LOOK = 1.0  # seconds between looks of a worker for its parent


def seed_of(parameters: Cell, *, role: str = "") -> int:
    """Return a seed that depends on parameters (the base seed among them) and on nothing else.

    Args:
        parameters: what the random numbers may depend on; leave out what cells should share them over.
        role: tells apart several streams of one cell.

    Returns:
        A whole number below 2^63, for torch or numpy generators.
    """
    digest = hashlib.sha256(f"{role}\n{canonical(parameters)}".encode()).digest()
    words = np.random.SeedSequence(int.from_bytes(digest, "big")).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def check_engine(engine: str, jobs: int | None = None) -> None:
    """Raise unless an engine is known and installed and the number of jobs makes sense.

    Raises:
        ValueError: for another engine, or a number of jobs that is not positive.
        ImportError: naming what to install.
    """
    if engine not in ENGINES:
        raise ValueError(f"There is no engine {engine!r}. Known: {', '.join(ENGINES)}.")
    if jobs is not None:
        whole("jobs", jobs, expected="None or a whole number of processes")
    missing = [package for package in _PACKAGES.get(engine, ()) if importlib.util.find_spec(package) is None]
    if missing:
        hint = 'pip install "abyssal[ray]"' if engine == "ray" else f"pip install {' '.join(missing)}"
        raise ImportError(f"The engine {engine!r} needs {' and '.join(missing)}: {hint}.")


def check_retries(retries: int) -> None:
    """Raise ValueError unless it is a whole number that is not negative."""
    whole("retries", retries, 0)


def run(
    cells: Sequence[Cell],
    function: Callable[[Cell], Mapping[str, Any]],
    *,
    study: str,
    version: int = 1,
    store: Store | None = None,
    engine: str = "local",
    jobs: int | None = None,
    retries: int = 0,
    progress: Progress | None = None,
    finished: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Compute what the store does not hold yet, and return the results of all cells.

    Each result is stored as it comes. Killed or interrupted, the same call goes on where it was; a cell that another
    process has finished meanwhile is taken from the store. A failing cell is noted, and the others go on.

    Args:
        cells: the parameters of each cell: what JSON can hold. Equal cells are computed once.
        function: maps a cell, a copy that it may change, to its results by name: what JSON can hold, numbers of numpy
            and torch, which become Python's, and arrays and tensors, which become numpy arrays. It has to be picklable
            by cloudpickle, and seeded by :func:`seed_of`.
        study: what the cells belong to; part of their key.
        version: of `function`, to be raised when its results change; part of their key.
        store: where results are kept; None keeps them in memory alone.
        engine: `"local"` (processes of this machine), `"sequential"` (this process), `"ray"` or `"dask"` (a cluster:
            the one that the environment or an open client names, else a local one).
        jobs: processes; None is one per core.
        retries: how many times more a cell that failed is tried, after all others; every traceback is kept. With a
            seed taken from its cell a function fails as it did, unless the fault was the machine's.
        progress: called in this process with the study's name, cells done and cells in all.
        finished: called in this process with each outcome as it is there, those out of the store first.

    Returns:
        One outcome for each cell, in their order.

    Raises:
        SweepError: if cells failed, once all others are finished. Whatever a cell raises is its failure, `sys.exit()`
            too, but a KeyboardInterrupt.
        ValueError, TypeError: for cells that cannot be named, an unknown engine, a wrong number of jobs or retries.
        ImportError: if the engine's package is missing.
        RuntimeError: if a worker process died.
    """
    check_engine(engine, jobs)
    check_retries(retries)
    keys = [key_of(study, version, cell) for cell in cells]
    work = _Work(study, version, store, keys, progress=progress or silent, finished=finished or (lambda outcome: None))
    by_key = dict(zip(work.keys, cells, strict=True))
    for key, cell in by_key.items():
        work.look_up(key, cell)
    work.report()
    for attempts_left in range(retries, -1, -1):
        waiting = [(key, cell) for key, cell in by_key.items() if key not in work.outcomes]
        if not waiting:
            break
        with contextlib.closing(_computed(waiting, function, work, engine, jobs)) as results:
            for key, values, seconds, trace in results:
                work.finish(key, by_key[key], values, seconds, trace, again=attempts_left > 0)
    outcomes = [work.outcomes[key] for key in work.keys]
    failures = [Failure(**vars(outcome)) for outcome in work.outcomes.values() if outcome.traceback]
    if failures:
        raise SweepError(failures, outcomes)
    return outcomes


@dataclass
class _Work:
    """What is known of a running sweep."""

    study: str
    version: int
    store: Store | None
    keys: list[str]  # of the cells as given, equal ones more than once
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    progress: Progress = silent
    finished: Callable[[Outcome], None] = field(default=lambda outcome: None)
    tracebacks: dict[str, list[str]] = field(default_factory=dict)

    def look_up(self, key: str, cell: Cell) -> bool:
        """Take a cell's result from the store if it is there."""
        record = None if self.store is None else self.store.get(self.study, self.version, cell)
        if record is not None:
            self.outcomes[key] = Outcome(cell, record.values, record.seconds, stored=True)
            self.finished(self.outcomes[key])
        return record is not None

    def finish(
        self, key: str, cell: Cell, values: Mapping[str, Any], seconds: float, trace: str, again: bool = False
    ) -> None:
        """Keep a result or a failure, and say so; a failure that is tried `again` is not the cell's outcome."""
        if self.store is not None and trace:
            self.store.fail(self.study, self.version, cell, trace)
        elif self.store is not None:
            self.store.put(self.study, self.version, cell, values, seconds)
        failed = self.tracebacks.setdefault(key, [])
        if trace:
            failed.append(trace)
        if trace and again:
            return
        self.outcomes[key] = Outcome(cell, values, seconds, traceback=trace, tracebacks=tuple(failed))
        self.finished(self.outcomes[key])
        self.report()

    def report(self) -> None:
        """Say how many of the different cells are done."""
        self.progress(self.study, len(self.outcomes), len(set(self.keys)))


_Result = tuple[str, Mapping[str, Any], float, str]


def _computed(
    waiting: Sequence[tuple[str, Cell]],
    function: Callable[[Cell], Mapping[str, Any]],
    work: _Work,
    engine: str,
    jobs: int | None,
) -> Generator[_Result, None, None]:
    """Give `(key, values, seconds, traceback)` of each cell as it is done, in any order."""
    # Asked for lazily, a few cells ahead of the workers: by then another process may have finished some.
    fresh = ((key, cell) for key, cell in waiting if not work.look_up(key, cell))
    if engine == "local" and (jobs == 1 or len(waiting) == 1):
        engine = "sequential"
    if engine == "sequential":
        for key, cell in fresh:
            yield _compute(function, key, cell)
        return
    from joblib import Parallel, delayed

    with _backend(engine, jobs):
        # One cell at a time, not joblib's growing batches: a batch would be lost as a whole.
        parallel = Parallel(return_as="generator_unordered", batch_size=1, max_nbytes=None)
        task = delayed(_compute_or_leave if engine == "local" else _compute)
        results = parallel(task(function, key, cell) for key, cell in fresh)
        try:
            yield from results
        except Exception as error:  # the cells' own exceptions come back as text
            if type(error).__name__ != "TerminatedWorkerError":
                raise
            kept = "the cells finished so far are in the store" if work.store else "no store was given"
            raise RuntimeError(
                f"A worker process of the sweep died, most likely out of memory; {kept}. Run again with fewer jobs."
            ) from error
        finally:
            results.close()


@contextlib.contextmanager
def _backend(engine: str, jobs: int | None) -> Iterator[None]:
    from joblib import parallel_config

    if engine == "local":
        with parallel_config(backend="loky", n_jobs=jobs or -1, inner_max_num_threads=1, idle_worker_timeout=_IDLE):
            yield
    elif engine == "ray":
        _register_ray()
        with parallel_config(backend="abyssal-ray", n_jobs=jobs or -1):
            yield
    else:
        from dask.distributed import Client, get_client  # type: ignore[import-not-found, unused-ignore]

        with contextlib.ExitStack() as stack:
            try:
                client = get_client()
            except ValueError:  # none is open: a cluster of processes on this machine
                client = stack.enter_context(
                    Client(n_workers=jobs, threads_per_worker=1, processes=True, dashboard_address=None)
                )
            stack.enter_context(parallel_config(backend="dask", client=client))
            yield


def _register_ray() -> None:
    """Register Ray's joblib backend, with results one by one.

    Its base class says that it cannot give them so, for the sake of multiprocessing's own pool, whose place Ray's
    takes; without this a sweep would get nothing before the last cell is done.
    """
    from joblib import register_parallel_backend
    from ray.util.joblib.ray_backend import RayBackend

    class StreamingRayBackend(RayBackend):
        supports_return_generator = True

    register_parallel_backend("abyssal-ray", StreamingRayBackend)


def _compute(function: Callable[[Cell], Mapping[str, Any]], key: str, cell: Cell) -> _Result:
    """Compute one cell on one thread; an exception becomes text, as not every exception can be sent."""
    from abyssal.util.threads import one_thread  # torch takes long to import

    start, values, trace = time.process_time(), {}, ""
    try:
        with one_thread():
            # In this process the cell is the caller's, and names the result: a function may change what it gets.
            values = plain(function(_own(cell)))
    except KeyboardInterrupt:
        raise
    except BaseException:  # SystemExit among them: it would end the sweep, and say that all went well
        trace = traceback.format_exc()
    seconds = time.process_time() - start
    _spent.append(seconds)
    return key, values, seconds, trace


def _own(cell: Cell) -> Cell:
    """Return a copy of a cell to its depth."""
    try:
        return copy.deepcopy(cell)
    except TypeError:  # of mappings that cannot be copied, such as proxies
        return {key: _own(part) if isinstance(part, Mapping) else copy.deepcopy(part) for key, part in cell.items()}


_spent: list[float] = []


def seconds_here() -> float:
    """Return the CPU time of all cells so far that this very process computed, and no worker for it."""
    return sum(_spent)


def _compute_or_leave(function: Callable[[Cell], Mapping[str, Any]], key: str, cell: Cell) -> _Result:
    """Compute one cell in a process that ends when its parent does, even by kill -9.

    Workers of a parent that was killed would wait for the next cell for ever: each holds the memory of an imported
    torch, and the lock that lets idle ones go may have died with the parent.
    """
    _end_with_parent()
    return _compute(function, key, cell)


@functools.cache
def _end_with_parent() -> None:
    """Start, once in a process, to look whether its parent is still there."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)  # nobody is left to take a result

    threading.Thread(target=watch, daemon=True, name="abyssal-parent-watch").start()
