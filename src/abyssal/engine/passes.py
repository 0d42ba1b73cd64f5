"""Forward passes: which calls of blocks belong to one, and how many elements it may sample.

Nobody tells us where a forward pass begins. It does when a block is entered from outside once more: with a stream
that no block handed on, after a backward pass came by or the block was called before. A stream that was computed
from an output of this pass (a ReLU between two calls) is of this pass, and so is one that was computed before its
first block (the input of a second encoder). Both are told by the sequence numbers of autograd's nodes.
"""

from __future__ import annotations

import threading
from bisect import bisect_right

import torch
from torch import Tensor

from abyssal.certify.recorder import CallRecord
from abyssal.codec.sample import SampleBudget

_MOST_NODES = 512  # of the graph behind a stream, searched for a node of this pass


class ForwardPass:
    """The calls since the model's blocks were last entered from outside.

    Args:
        number: how many passes came before.
        expected: how many calls there will be, by the pass before.
    """

    def __init__(self, number: int, expected: int) -> None:
        """Begin with no call."""
        self.number = number
        self.samples = SampleBudget(number, expected)
        self.records: list[CallRecord] = []
        self.visited = False  # by a backward pass
        self._called: set[int] = set()
        self._thread = threading.get_ident()  # sequence numbers are counted by thread
        # Per call, the sequence numbers of the graph nodes that it made: from where, and up to where.
        self._begins: list[int] = []
        self._ends: list[int] = []

    def is_over(self, block: object, stream: Tensor | None) -> bool:
        """Whether a call of `block` with a stream that no block handed on begins the next pass.

        Args:
            block: which block is called.
            stream: what it is called with, if that is known. [*stream]
        """
        if not self.visited and id(block) not in self._called:
            return False
        if stream is None or stream.grad_fn is None or threading.get_ident() != self._thread:
            return True
        if not self.visited and stream.grad_fn._sequence_nr() < self._begins[0]:
            return False
        return not self._descends(stream)

    def _descends(self, stream: Tensor) -> bool:
        """Whether a stream was computed from what a call of this pass made."""
        pending: list[torch.autograd.graph.Node | None] = [stream.grad_fn]
        seen: set[object] = set()
        while pending and len(seen) < _MOST_NODES:
            node = pending.pop()
            if node is None or node in seen:
                continue
            number = node._sequence_nr()
            if number < self._begins[0]:
                continue
            if number < self._ends[bisect_right(self._begins, number) - 1]:
                return True
            seen.add(node)
            pending.extend(next_node for next_node, _ in node.next_functions)
        return False

    def begin(self, record: CallRecord, block: object) -> None:
        """A call begins."""
        self.records.append(record)
        self._called.add(id(block))
        self._begins.append(torch.autograd._get_sequence_nr())
        self._ends.append(self._begins[-1])  # until it returns

    def end(self, call: int) -> None:
        """The call with this place in `records` has returned."""
        self._ends[call] = torch.autograd._get_sequence_nr()
