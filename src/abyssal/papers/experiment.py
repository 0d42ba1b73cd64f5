"""An experiment of a paper as data: what it claims, how to measure it, and how to judge what was measured.

    EXPERIMENT = Experiment(
        name="sander2022/gradient-error", paper="Sander, Ablin, Peyré 2022, arXiv 2205.14612", claim="...",
        sizes={"tiny": Settings(...), "small": Settings(...), "paper": Settings(...)},
        minutes={"tiny": 0.1, "small": 3, "paper": 600},  # of CPU, measured
        run=run, check=check, plot=plot,
    )

`run(settings, work)` returns the rows of one long table, and asks `work.cells(function, cells)` for whatever takes
time: finished cells come out of the store. `check(rows, settings)` and `plot(rows, settings)` see the rows alone, so
that both can be redone without measuring anything again.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from abyssal.sweep import Store
from abyssal.sweep.engine import run
from abyssal.util.progress import Progress
from abyssal.util.stats import every

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SIZES", "Experiment", "Finding", "Row", "Work", "chosen", "grid", "listed", "verdict"]

SIZES = ("tiny", "small", "paper")
_SOURCES = "sources"  # what the store calls the texts of functions
S = TypeVar("S")
Row = dict[str, Any]  # one row of the long table: numbers, texts, truth values and None


@dataclass(frozen=True)
class Finding:
    """One thing that is claimed, and what came out.

    Attributes:
        claim: e.g. "gradient error falls as N^-1 (Reverse(0), Euler)".
        measured: e.g. "N^-1.02 (95 %: -1.05 to -0.99)".
        holds: None where this size does not decide it.
    """

    claim: str
    measured: str
    holds: bool | None

    def __post_init__(self) -> None:
        # numpy's truth values are not Python's, and `is False` has to see them.
        object.__setattr__(self, "holds", None if self.holds is None else bool(self.holds))


def verdict(findings: Sequence[Finding]) -> str:
    """Return what findings amount to: "holds", "does not hold" if any one does not, else "not decided"."""
    names = {True: "holds", False: "does not hold", None: "not decided"}
    return names[every(finding.holds for finding in findings) if findings else None]


def listed(check: Callable[[list[Row], S], Iterable[Finding]]) -> Callable[[list[Row], S], list[Finding]]:
    """Decorate a `check` that yields its findings one after another: it then returns them as a list."""

    @functools.wraps(check)
    def all_at_once(rows: list[Row], settings: S) -> list[Finding]:
        return list(check(rows, settings))

    return all_at_once


def grid(common: Mapping[str, Any], **axes: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the parameters of a cell for each combination of values, the last axis changing fastest."""
    return [{**common, **dict(zip(axes, values, strict=True))} for values in itertools.product(*axes.values())]


def chosen(settings: Any, names: str) -> dict[str, Any]:
    """Return some fields of settings by their names, which spaces divide."""
    return {name: getattr(settings, name) for name in names.split()}


@dataclass(frozen=True)
class Experiment:
    """One claim of a paper, measured.

    Attributes:
        name: `paper/what`, e.g. "sander2022/gradient-error"; lower case, digits and hyphens.
        paper: authors, year and where to find it.
        claim: one plain sentence: what the paper claims.
        sizes: frozen settings by size: "tiny" (seconds, for tests), "small" (minutes on two cores), "paper".
        minutes: CPU minutes by size, measured; an honest guess for "paper".
        run: measures: `run(settings, work)` returns rows.
        check: judges: `check(rows, settings)` returns findings.
        plot: draws: `plot(rows, settings)` returns a figure that can be read at 900 px width.
        hardware: what "paper" wants, in words.

    Raises:
        ValueError: for a name of another form, or sizes that are not those three.
    """

    name: str
    paper: str
    claim: str
    sizes: Mapping[str, Any]
    minutes: Mapping[str, float]
    run: Callable[[Any, Work], list[Row]]
    check: Callable[[list[Row], Any], list[Finding]]
    plot: Callable[[list[Row], Any], Figure]
    hardware: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+/[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise ValueError(f"An experiment is called paper/what-it-is, in lower case; got {self.name!r}.")
        for what, given in (("sizes", self.sizes), ("minutes", self.minutes)):
            if set(given) != set(SIZES):
                raise ValueError(f"{self.name}: {what} has to have {', '.join(SIZES)}; got {', '.join(given)}.")


class Work:
    """What an experiment computes with: given to its `run`.

    Without arguments it computes in this process and keeps nothing, which is what tests want.

    Args:
        name: of the experiment; part of the key of its cells.
        store: where finished cells are kept; None keeps nothing.
        engine: `"local"`, `"sequential"`, `"ray"` or `"dask"`; see :func:`abyssal.sweep.run`.
        jobs: processes; None is one per core.
        progress: called with a phase, what is done of it, and all of it.
        retries: how often a failing cell is tried again.

    Attributes:
        seconds: CPU time of the cells so far, stored ones too. Add to it that of sweeps which a function of the
            library runs for you; give those the `store`, `engine` and `jobs` of this object, and for their progress
            the method :meth:`progress`.
    """

    def __init__(
        self,
        name: str = "test",
        store: Store | None = None,
        *,
        engine: str = "sequential",
        jobs: int | None = None,
        progress: Progress | None = None,
        retries: int = 0,
    ) -> None:
        self.name, self.store, self.engine, self.jobs, self.retries = name, store, engine, jobs, retries
        self.seconds = 0.0
        self._progress = progress

    def cells(
        self,
        function: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        cells: Sequence[Mapping[str, Any]],
        *,
        version: int = 1,
        phase: str = "",
    ) -> list[dict[str, Any]]:
        """Return the results of many cells; those that the store holds are not computed again.

        Args:
            function: a module-level function of one cell, which returns plain values, numpy arrays and tensors by
                name; seeded from its cell alone, for example by :func:`abyssal.sweep.seed_of`. It computes on one
                thread.
            cells: the parameters of each: plain values, lists and mappings of them.
            version: of `function`, to be raised when its results change.
            phase: what is being computed, for the progress shown; the function's name where it is empty.

        Returns:
            One dict for each cell, in their order: plain values, and numpy arrays.

        Raises:
            SweepError: if cells failed, once all others are finished and kept.

        Warns:
            UserWarning: if the store's cells were computed by another text of `function` under the same version.
        """
        study = f"{self.name}/{function.__qualname__}"
        self._compare_source(function, study, version)
        shown = f"{self.name}: {phase or function.__name__}"
        outcomes = run(
            cells,
            function,
            study=study,
            version=version,
            store=self.store,
            engine=self.engine,
            jobs=self.jobs,
            retries=self.retries,
            progress=None if self._progress is None else lambda _, done, total: self._report(shown, done, total),
        )
        self.seconds += sum(outcome.seconds for outcome in outcomes)
        return [dict(outcome.values) for outcome in outcomes]

    def _compare_source(self, function: Callable[..., Any], study: str, version: int) -> None:
        """Tell whoever changed a function and forgot to raise its version."""
        if self.store is None:
            return
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):  # written at a prompt
            return
        key = {"study": study, "version": version}
        record = self.store.get(_SOURCES, 1, key)
        if record is None:
            self.store.put(_SOURCES, 1, key, {"source": source})
        elif record.values["source"] != source:
            warnings.warn(
                f"{self.name}: {function.__qualname__} is not what stored cells were computed with. If its results "
                f"have changed, raise its version above {version}, or compute everything anew (--fresh).",
                stacklevel=3,
            )

    def progress(self, phase: str, done: int, total: int) -> None:
        """Say how far a part of the work is that is not made of cells."""
        self._report(f"{self.name}: {phase}", done, total)

    def _report(self, phase: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(phase, done, total)
