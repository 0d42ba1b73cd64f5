"""Sweeps over many cells: computed once, on any number of processes, and never lost.

A cell is a mapping of parameters and a function of it. :func:`run` computes those that a :class:`Store` does not
hold yet, on this machine or on a cluster, and puts each into it as it is done.
"""

from abyssal.sweep.engine import ENGINES, Cell, Failure, Outcome, Progress, SweepError, run, seed_of
from abyssal.sweep.store import Record, Store, canonical, key_of

__all__ = [
    "ENGINES",
    "Cell",
    "Failure",
    "Outcome",
    "Progress",
    "Record",
    "Store",
    "SweepError",
    "canonical",
    "key_of",
    "run",
    "seed_of",
]
