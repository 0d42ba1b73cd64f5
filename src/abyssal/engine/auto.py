"""What `Code("auto")` decides by itself: how many bits a block's input needs, and which blocks are not to be coded.

**Bits.** In a block's first call, again in the passes 1, 2, 4, 8, ... (networks change fastest when training begins)
and from then on in every `_EVERY`th, its increment is coded with 4, 6 and 8 bits in turn until the state's error is at
most `AUTO_ACCURACY`. That reads one number from the device per trial; in between, nothing is read. A block that 8 bits
are not enough for is kept.

**Routing and kinks.** A block that takes a discrete decision (the top experts of a mixture) may take another one at a
restored input that is ever so slightly off, and its gradient would jump. A ReLU jumps, too, unit by unit, and below a
BatchNorm in training, where large parts of the gradient cancel, that can be most of what is left: 44 % wrong in a
torchvision ResNet-101 with states 2 % off (bfloat16 did no better). Such blocks are told by the operations that they
run in their first call, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.codec.feedback import FINE_BITS, relative_error
from abyssal.codec.quantiser import Codec
from abyssal.codec.sample import has_data
from abyssal.engine.policy import AUTO_BITS, Code, Keep, Policy
from abyssal.models.patch import outside_graphs

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
    besides = element_size + (FINE_BITS + 0.25) / 8 + (2 if element_size < 4 else 0)
    return math.ceil((besides - code) / (element_size - code))


def _era(forward_pass: int) -> int:
    """Number the spans of passes in which bits stay as they were chosen."""
    return forward_pass.bit_length() if forward_pass < _EVERY else _EVERY + forward_pass // _EVERY


class AutoBits:
    """The bits of the blocks of one model."""

    def __init__(self) -> None:
        """Begin with none chosen."""
        self._chosen: dict[str, tuple[int, int]] = {}  # block: forward pass in which it was, and bits

    def forget(self, block: str) -> None:
        """Choose anew in the next call: it drifted."""
        self._chosen.pop(block, None)

    def choose(self, policy: Code, block: str, forward_pass: int, d: Tensor, x: Tensor) -> Policy:
        """Return the policy with its bits, or `Keep()` where none are enough.

        Args:
            policy: with its bits still to be chosen.
            block: its name.
            forward_pass: number of this one.
            d: the increment to be coded. [*stream]
            x: the state that it leads to. [*stream]
        """
        when, bits = self._chosen.get(block, (-1, 0))
        if forward_pass != when and when >= 0 and _era(forward_pass) == _era(when):
            return policy.with_bits(bits)
        if not has_data(d) or d.numel() == 0:
            return policy.with_bits(AUTO_BITS[0])
        for found in AUTO_BITS:
            if when == forward_pass and found < bits:  # called again in this pass: the most that a call needs
                continue
            _, decoded = Codec(found, policy.group).encode(d)
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
_KINKS = {"relu", "relu_", "threshold", "threshold_", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_"}


class _Watch(TorchDispatchMode):
    """Notes operations that choose, and those whose derivative jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = self.kink = ""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return outside_graphs(self._note, func, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would load its compiler for this, two seconds; `outside_graphs` does it once somebody else has."""
        return False

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        overload = str(func).removeprefix("aten.")
        name = overload.partition(".")[0]
        if overload in _ROUTING or name in _ROUTING:
            self.routing = name
        elif name in _KINKS:
            self.kink = name.rstrip("_")
        return func(*args, **kwargs)


class BlockWatch:
    """Why one block is not to be coded by default: watched in its first call in training, and in evaluation.

    Attributes:
        verdicts: by mode: the reason, or nothing, and whether it is its routing.
    """

    def __init__(self) -> None:
        """Begin not knowing."""
        self.verdicts: dict[bool, tuple[str, bool]] = {}

    @contextmanager
    def watching(self, block: nn.Module, compiled: bool) -> Iterator[None]:
        """Watch the block's call; compiled code, which cannot be watched, is told by its modules' names."""
        watch = _Watch()
        if compiled or torch.compiler.is_compiling():
            kinds = [type(module).__name__ for module in block.modules()]
            watch.routing = next((k for k in kinds if any(n in k.lower() for n in _ROUTING_NAMES)), "")
            watch.kink = next((k for k in kinds if "relu" in k.lower()), "")
            yield
        else:
            with watch:
                yield
        self.verdicts[block.training] = _reason(watch, block), bool(watch.routing)


def _reason(watch: _Watch, block: nn.Module) -> str:
    if watch.routing:
        return f"routes discretely ({watch.routing})"
    if watch.kink and any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in block.modules()):
        return f"normalises over the batch and has kinks ({watch.kink}), so that its gradient jumps with its input"
    return ""
