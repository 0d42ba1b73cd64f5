"""Which states to hold where all others are computed again from below: the optimal schedule for equal blocks.

A *segment* of `n` blocks, whose input is held, is gone through backwards with `slots` further states: run up to the
`k`-th block, hold its input, go through the blocks above with one slot fewer, then through the `k` below with all. With
`r` rounds, the most often that any block is run for it, at most `reach(slots, r)` blocks can be gone through.

Source: Griewank and Walther 2000 (ACM TOMS 26:19), Algorithm 799; the binomial bound is Griewank 1992.
"""

from __future__ import annotations

from math import comb

MOST_ROUNDS = 2  # by default: the forward pass runs each block once, and so no block more than once more for others


def reach(slots: int, rounds: int) -> int:
    """Return the length of the longest segment that `slots` states and `rounds` runs of each block are enough for."""
    return comb(slots + 1 + rounds, rounds) if rounds >= 0 else 0


def rounds(length: int, slots: int) -> int:
    """Return how often a block has to be run, at most, for blocks above it."""
    found = 0
    while reach(slots, found) < length:
        found += 1
    return found


def runs(length: int, slots: int) -> int:
    """Return how many runs without a graph a segment takes in all, the first sweep included."""
    most = rounds(length, slots)
    return most * length - comb(slots + 1 + most, most - 1) if most else 0


def first_held(length: int, slots: int) -> int:
    """Return the block of a segment, counted from 0, whose input is to be held first.

    Args:
        length: of the segment, at least 2.
        slots: that are free.
    """
    if not slots:
        return length - 1
    most = rounds(length, slots)
    return min(reach(slots, most - 1), length - reach(slots - 1, most - 1))


def held(length: int, slots: int) -> set[int]:
    """Return the blocks whose inputs are held at the end of the first sweep, the first and the last one's aside."""
    found: set[int] = set()
    at = 0
    while slots and at < length - 1:
        at += first_held(length - at, slots)
        slots -= 1
        found.add(at)
    return found - {length - 1}


def fewest_slots(length: int) -> int:
    """Return the fewest slots with which no block is run more than `MOST_ROUNDS` times."""
    slots = 1
    while reach(slots, MOST_ROUNDS) < length:
        slots += 1
    return slots
