"""The papers' experiments, a folder for each paper: modules with an `EXPERIMENT`, found by looking, not by a list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from fnmatch import fnmatchcase

from abyssal.papers.experiment import Experiment

__all__ = ["ExperimentError", "experiments", "select"]


class ExperimentError(Exception):
    """A module that holds no experiment, or a name that no experiment has."""


def experiments(broken: dict[str, str] | None = None) -> dict[str, Experiment]:
    """Return every experiment by its name, in the order of names.

    Args:
        broken: takes what is wrong with a module, by its name, in place of an error; the others are returned.

    Raises:
        ExperimentError: naming the module that cannot be imported, holds no `EXPERIMENT`, or takes another's name.
    """
    found: dict[str, Experiment] = {}
    modules = (entry.name for entry in pkgutil.walk_packages(__path__, f"{__name__}.") if not entry.ispkg)
    for name in sorted(module.removeprefix(f"{__name__}.") for module in modules):
        try:
            experiment = _load(name)
            if experiment.name in found:
                raise ExperimentError(f"{__name__}.{name} takes the name {experiment.name}, which another module has.")
        except ExperimentError as error:
            if broken is None:
                raise
            broken[name] = str(error)
        else:
            found[experiment.name] = experiment
    return dict(sorted(found.items()))


def _load(name: str) -> Experiment:
    module = f"{__name__}.{name}"
    try:
        experiment = getattr(importlib.import_module(module), "EXPERIMENT", None)
    except Exception as error:
        raise ExperimentError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise ExperimentError(f"{module} has no EXPERIMENT, an abyssal.papers.experiment.Experiment.")
    return experiment


def select(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names that patterns ask for, each once, in the order of `known`.

    Args:
        patterns: names, globs such as `sander2022/*`, or `all`.
        known: the names there are.

    Raises:
        ExperimentError: naming a pattern that fits none.
    """
    wanted: set[str] = set()
    for pattern in patterns:
        hits = {name for name in known if pattern == "all" or fnmatchcase(name, pattern)}
        if not hits:
            raise ExperimentError(f"No experiment is called {pattern!r}. There are: {', '.join(known) or 'none'}.")
        wanted |= hits
    return [name for name in known if name in wanted]
