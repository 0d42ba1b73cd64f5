"""Sweeps over many cells: computed once, on any number of processes, and never lost.

A cell is a mapping of parameters and a function of it. :func:`run` computes those that a :class:`Store` does not
hold yet, on this machine or on a cluster, and puts each into it as it is done. :func:`read_grid` reads cells from a
file, :func:`file_function` a function from another.
"""

from abyssal.sweep.engine import ENGINES, run, seed_of
from abyssal.sweep.grid import Grid, GridError, grid_of, read_grid
from abyssal.sweep.outcome import Cell, Failure, Outcome, SweepError
from abyssal.sweep.store import Record, Store, canonical, key_of
from abyssal.sweep.user import FileFunction, FunctionError, file_function
from abyssal.util.progress import Progress

__all__ = [
    "ENGINES",
    "Cell",
    "Failure",
    "FileFunction",
    "FunctionError",
    "Grid",
    "GridError",
    "Outcome",
    "Progress",
    "Record",
    "Store",
    "SweepError",
    "canonical",
    "file_function",
    "grid_of",
    "key_of",
    "read_grid",
    "run",
    "seed_of",
]
