"""What lives for one backward pass: states that were restored ahead of their turn, and what was measured.

A verdict that raises does so from within `.backward()`, before any optimiser step.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from abyssal.certify.errors import Errors
from abyssal.certify.recorder import Figures


class Scope:
    """One run of the autograd engine, told by its task id; -1 where a tensor is unpacked outside of one.

    Attributes:
        task: the id.
        states: by place, a state that the gradient will be evaluated at, restored ahead of its turn.
        handed: by place, what the block below is restored from.
        below: by chain, states that were run again from below and are held for later turns, by number.
        errors: what was measured so far.
    """

    def __init__(self, task: int) -> None:
        """Begin with nothing."""
        self.task = task
        self.states: dict[object, Any] = {}
        self.handed: dict[object, Any] = {}
        self.below: dict[object, dict[int, Any]] = {}
        self.errors = Errors()

    @classmethod
    def current(cls) -> Scope:
        """Return the one that this thread is in."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return cls(-1)
        present = None if _local.scope is None else _local.scope()
        if present is None or present.task != task:
            present = cls(task)
            # The engine owns it, through the callback: if the backward pass fails, it goes with it.
            _local.scope = weakref.ref(present)
            torch.autograd.Variable._execution_engine.queue_callback(present.end)
        return present

    def end(self) -> None:
        """Clear what was remembered, read all measurements and let each model's session judge its own.

        Raises:
            DriftError: see `Session.judge`.
        """
        self.states.clear()
        self.handed.clear()
        self.below.clear()
        by_judge: dict[int, list[Figures]] = {}
        for figures in self.errors.read():
            by_judge.setdefault(id(figures.record.judge), []).append(figures)
        for found in by_judge.values():
            found[0].record.judge.judge(found)


class _Local(threading.local):
    scope: weakref.ref[Scope] | None = None


_local = _Local()
