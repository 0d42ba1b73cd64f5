"""Run experiments of the papers into a folder, from which their page is made.

    out/repro.sqlite                      every cell and every table of rows, as they are done
    out/<experiment>/<size>/results.json  settings, findings, status, machine and versions of the last run
    out/<experiment>/<size>/rows.csv      the long table; rows.parquet too where pyarrow is installed
    out/<experiment>/<size>/figure.png
    out/index.html                        from what the others say, whenever they were written

An experiment's rows are kept under its settings and the text of its module (and of what several share): with neither
changed they are not made again, and with a changed text only those cells are computed that the store lacks. Findings
and figure are made anew each time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from abyssal.papers.experiment import SIZES, Experiment, Finding, Row, Work, verdict
from abyssal.report.picture import save_png
from abyssal.sweep import Store, SweepError
from abyssal.sweep.engine import check_engine, check_retries, seconds_here
from abyssal.sweep.store import plain
from abyssal.util.environment import environment
from abyssal.util.files import write_table, write_whole
from abyssal.util.progress import Progress

__all__ = ["Result", "Settings", "read_result", "read_results", "reproduce"]

STORE = "repro.sqlite"
_RESULTS, _STARTED, _FIGURE, _TRACEBACK = "results.json", "started.json", "figure.png", "traceback.txt"
_FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """How experiments are run.

    Attributes:
        size: "tiny", "small" or "paper".
        out: the folder of everything.
        engine: see :func:`abyssal.sweep.run`.
        jobs: processes; None is one per core.
        fresh: compute everything anew, whatever the store holds.
        retries: how often a failing cell is tried again.

    Raises:
        ValueError: for another size, an unknown engine, a wrong number of jobs or retries.
        ImportError: if the engine's package is missing.
    """

    size: str = "small"
    out: Path = Path("repro")
    engine: str = "local"
    jobs: int | None = None
    fresh: bool = False
    retries: int = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"There is no size {self.size!r}. Known: {', '.join(SIZES)}.")
        check_engine(self.engine, self.jobs)
        check_retries(self.retries)


@dataclass(frozen=True)
class Result:
    """What is known of one experiment's last run at one size.

    Attributes:
        name: of the experiment.
        paper: of the experiment.
        claim: of the experiment.
        size: of the run.
        status: "done", "failed" (it raised), "stopped" (killed or interrupted), "running".
        findings: what came out; empty unless it is done.
        settings: by name.
        traceback: of a failure.
        rows: of the long table.
        seconds: CPU time of the cells and of the rest, also of what came out of the store.
        started: when, ISO 8601 in UTC.
        machine: hardware, versions and date, as texts by name.
        folder: where its files are.
    """

    name: str
    paper: str
    claim: str
    size: str
    status: str
    findings: tuple[Finding, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    traceback: str = ""
    rows: int = 0
    seconds: float = 0.0
    started: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def verdict(self) -> str:
        """What the findings amount to, or the status where there are none."""
        return verdict(self.findings) if self.status == "done" else self.status

    @property
    def figure(self) -> Path:
        """The figure's file."""
        return self.folder / _FIGURE


def reproduce(
    chosen: Sequence[Experiment],
    settings: Settings,
    *,
    progress: Progress | None = None,
    finished: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run experiments one after another; one that raises is noted as failed, and the others go on.

    Args:
        chosen: which.
        settings: how; its folder is made where it is missing.
        progress: called with a phase, what is done of it, and all of it.
        finished: called with each result once its files are written.

    Returns:
        The results, in order.

    Raises:
        StoreError: if the folder's store cannot be used.
        OSError: if the folder cannot be written to.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    results = []
    with Store(settings.out / STORE, fresh=settings.fresh) as store:
        for experiment in chosen:
            results.append(_reproduce_one(experiment, settings, store, progress))
            finished(results[-1])
    return results


def _reproduce_one(experiment: Experiment, settings: Settings, store: Store, progress: Progress | None) -> Result:
    folder = settings.out / experiment.name / settings.size
    folder.mkdir(parents=True, exist_ok=True)
    chosen = experiment.sizes[settings.size]
    running = Result(
        experiment.name,
        experiment.paper,
        experiment.claim,
        settings.size,
        "running",
        settings=_as_dict(chosen),
        started=datetime.now(UTC).isoformat(timespec="microseconds"),  # what orders runs
        machine=environment().facts(),
        folder=folder,
    )
    started = folder / _STARTED
    write_whole(started, _as_json(running, process=os.getpid()))
    try:
        rows, seconds = _rows(experiment, settings, store, progress)
        findings = tuple(experiment.check(rows, chosen))
        if not findings:
            raise ValueError(f"{experiment.name}: check returned no findings.")
        write_table(rows, folder / "rows")
        save_png(experiment.plot(rows, chosen), folder / _FIGURE)
    except Exception as error:
        result = replace(running, status="failed", traceback=_whole_traceback(error))
        for stale in (_FIGURE, "rows.csv", "rows.parquet"):
            (folder / stale).unlink(missing_ok=True)
        write_whole(folder / _TRACEBACK, result.traceback)
    else:
        result = replace(running, status="done", findings=findings, rows=len(rows), seconds=seconds)
        (folder / _TRACEBACK).unlink(missing_ok=True)
    write_whole(folder / _RESULTS, _as_json(result, format=_FORMAT))
    started.unlink(missing_ok=True)
    return result


def _rows(
    experiment: Experiment, settings: Settings, store: Store, progress: Progress | None
) -> tuple[list[Row], float]:
    """Return the rows and the CPU time that they cost, from the store if they are there."""
    import torch

    from abyssal.util.environment import installed_version

    chosen = experiment.sizes[settings.size]
    study = f"{experiment.name} rows"
    key = {"settings": repr(chosen), "source": _source_hash(experiment), "abyssal": installed_version("abyssal")}
    record = store.get(study, 1, key)
    if record is not None:
        return record.values["rows"], record.seconds
    work = Work(
        experiment.name,
        store,
        engine=settings.engine,
        jobs=settings.jobs,
        progress=progress,
        retries=settings.retries,
    )
    start = time.process_time() - seconds_here()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what an experiment draws without a seed of its own must not depend on those before it
        rows = [plain(row) for row in experiment.run(chosen, work)]
    if not rows:
        raise ValueError(f"{experiment.name}: run returned no rows.")
    for name, value in ((name, value) for row in rows for name, value in row.items()):
        if value is not None and not isinstance(value, float | int | str | bool):
            raise TypeError(
                f"{experiment.name}: a row's {name} is a {type(value).__name__}; a table holds plain values."
            )
    seconds = work.seconds + max(0.0, time.process_time() - seconds_here() - start)
    store.put(study, 1, key, {"rows": rows}, seconds)
    return rows, seconds


def _source_hash(experiment: Experiment) -> str:
    """Return a hash of the file that the experiment's `run` is written in, and of what several experiments share."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    try:
        file = inspect.getsourcefile(experiment.run)
        if file is not None:
            for path in [Path(file), *sorted(here.glob("shared/*.py")), *sorted(here.glob("networks/*.py"))]:
                digest.update(path.read_bytes())
    except (OSError, TypeError):  # written at a prompt
        pass
    return digest.hexdigest()[:16]


def _whole_traceback(error: Exception) -> str:
    """Return the traceback, and those of the cells that it speaks of."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, SweepError):
        for failure in error.failures:
            for i, attempt in enumerate(failure.tracebacks, start=1):
                text += f"\nCell {dict(failure.parameters)}, attempt {i}:\n{attempt}"
    return text


def _as_dict(settings: Any) -> dict[str, Any]:
    return asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else {"settings": settings}


def _as_json(result: Result, **more: int) -> str:
    """Return a result, but for the folder, which is where the file is."""
    plain = {name: value for name, value in asdict(result).items() if name != "folder"}
    return json.dumps({**more, **plain, "verdict": result.verdict}, indent=2, default=str)


def read_result(folder: Path) -> Result | None:
    """Return what a folder of one experiment and size says of its last run; None if it says nothing.

    Args:
        folder: `out/<experiment>/<size>`.
    """
    started, results = _read_json(folder / _STARTED), _read_json(folder / _RESULTS)
    if started is not None:
        process = started.pop("process", None)
        status = "running" if _is_alive(process) else "stopped"
        return _from_json({**started, "status": status}, folder)
    return None if results is None else _from_json(results, folder)


def _from_json(data: dict[str, Any], folder: Path) -> Result | None:
    names = set(Result.__dataclass_fields__) - {"folder", "findings"}
    try:
        findings = tuple(Finding(**finding) for finding in data.get("findings", ()))
        return Result(**{k: v for k, v in data.items() if k in names}, findings=findings, folder=folder)
    except TypeError:  # a file of another version
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _is_alive(process: object) -> bool:
    if not isinstance(process, int) or process == os.getpid():
        return isinstance(process, int)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def read_results(out: Path) -> dict[str, list[Result]]:
    """Return all results under a folder by experiment, the latest run first."""
    found: dict[str, list[Result]] = {}
    for folder in sorted(path for path in out.glob("*/*/*") if path.is_dir() and path.name in SIZES):
        result = read_result(folder)
        if result is not None and result.name == folder.parent.relative_to(out).as_posix():
            found.setdefault(result.name, []).append(result)
    return {
        name: sorted(results, key=lambda result: result.started, reverse=True)
        for name, results in sorted(found.items())
    }
