"""What `Code("auto")` decides by itself: how many bits a block's input needs, and which blocks are not to be coded.

**Bits.** In a block's first call, and again in every `_EVERY`th forward pass, its increment is coded with 4, 6 and 8
bits in turn until the state's error is at most `AUTO_ACCURACY`. That reads one number from the device per trial; in
between, nothing is read. A block that 8 bits are not enough for is kept.

**Routing.** A block that takes a discrete decision (the top experts of a mixture) may take another one at a restored
input that is ever so slightly off, and its gradient would jump. Such blocks are told by the operations that they run
in their first call, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.reconstruct.coding import relative_error
from abyssal.reconstruct.policy import AUTO_BITS, Code, Keep, Policy
from abyssal.reconstruct.sample import has_data

AUTO_ACCURACY = 2e-2
"""Relative error of a coded state that `Code("auto")` allows, root mean square over positions (`sample.spread`). On
networks trained for it (docs/benchmarks.md), gradients are then about as far off as the network's own bfloat16
autocast puts them, or less."""

_EVERY = 64


def shortest(element_size: int) -> int:
    """Return how many blocks a chain has at least for codes to save anything, in the forward and the backward pass.

    Beside its codes, of 6 bits, a chain keeps its end, the decoder's distance from that, and in a narrow type the
    decoder's state while it goes down.

    Args:
        element_size: of the stream, in bytes.
    """
    code = (6 + 0.25) / 8
    besides = element_size + 2 + (2 if element_size < 4 else 0)
    return math.ceil((besides - code) / (element_size - code))


class AutoBits:
    """The bits of the blocks of one model."""

    def __init__(self) -> None:
        """Begin with none chosen."""
        self._chosen: dict[str, tuple[int, int]] = {}  # block: forward pass in which it was, and bits

    def forget(self, block: str) -> None:
        """Choose anew in the next call: it drifted."""
        self._chosen.pop(block, None)

    def settle(self, policy: Code, block: str, forward_pass: int, d: Tensor, x: Tensor) -> Policy:
        """Return the policy with its bits, or `Keep()` where none are enough.

        Args:
            policy: with its bits still to be chosen.
            block: its name.
            forward_pass: number of this one.
            d: the increment to be coded. [*stream]
            x: the state that it leads to. [*stream]
        """
        when, bits = self._chosen.get(block, (-_EVERY, 0))
        if forward_pass != when and forward_pass // _EVERY == when // _EVERY:
            return policy.with_bits(bits)
        if not has_data(d) or d.numel() == 0:
            return policy.with_bits(AUTO_BITS[0])
        for found in AUTO_BITS:
            if when == forward_pass and found < bits:  # called again in this pass: the most that a call needs
                continue
            _, decoded = policy.with_bits(found).codec.encode(d)
            if float(relative_error(decoded.sub_(d), x)) <= AUTO_ACCURACY:
                self._chosen[block] = (forward_pass, found)
                return policy.with_bits(found)
        # An infinite stream (a step that loss scaling will skip) says nothing about the block.
        return Keep(policy.device) if bool(torch.isfinite(d).all()) else policy.with_bits(AUTO_BITS[-1])


_ROUTING = {
    "topk", "argmax", "argmin", "max.dim", "min.dim", "kthvalue", "mode", "sort", "argsort", "multinomial",
    "searchsorted", "bucketize", "one_hot",
}  # fmt: skip
_ROUTING_NAMES = ("moe", "mixtureofexperts", "router", "experts")


class _Watch(TorchDispatchMode):
    """Notes operations that choose."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).removeprefix("aten.")
        if name in _ROUTING or name.partition(".")[0] in _ROUTING:
            self.found = name.partition(".")[0]
        return func(*args, **(kwargs or {}))


class RoutingWatch:
    """Whether one block takes discrete decisions: watched in its first call."""

    def __init__(self) -> None:
        """Begin not knowing."""
        self.operation: str | None = None  # "" where none was seen
        self._watch: _Watch | None = None

    def watching(self, block: nn.Module, compiled: bool) -> AbstractContextManager[object]:
        """Watch the block's first call; compiled code, which cannot be watched, is told by its modules' names."""
        if self.operation is not None:
            return nullcontext()
        if compiled or torch.compiler.is_compiling():
            kinds = [type(module).__name__ for module in block.modules()]
            self.operation = next((kind for kind in kinds if any(n in kind.lower() for n in _ROUTING_NAMES)), "")
            return nullcontext()
        self._watch = _Watch()
        return self._watch

    def told(self) -> str:
        """After the call: the name of an operation that chooses, or nothing."""
        if self._watch is not None:
            self.operation, self._watch = self._watch.found, None
        return self.operation or ""
