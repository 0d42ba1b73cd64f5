"""What a forecast says: of each way to keep the residual stream, and in all."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from abyssal.profiling.storages import STREAM

LOSS = "logits and loss"
MANY = "blocks' activations"


@dataclass(frozen=True)
class MethodForecast:
    """One training step with one way to keep the residual stream.

    Attributes:
        name: e.g. "checkpointing".
        policy: e.g. "Keep()"; "" for plain autograd.
        stream_bytes: what the blocks keep in place of the stream between forward and backward pass, on the device
            and the host, codes, kept ends and samples included (`abyssal.certificate(model).stored_bytes`); for
            plain autograd, the inputs of all blocks, which are among what it stores.
        host_bytes: how much of it waits in host memory.
        peak_bytes: highest level of live bytes on the device during the step, above parameters, gradients, buffers
            and the batch.
        peak_without_loss_bytes: the same without the logits and the loss, as if they were computed in pieces.
        phase: of the pass in which the peak is reached: "forward", "backward" or "recompute".
        place: the block or module in which it is reached; "logits and loss" for what follows the last block.
        shares: what is alive at the peak: bytes by place, largest first; "stream" is what is kept of it.
        blocks: stream bytes by block.
    """

    name: str
    policy: str
    stream_bytes: int
    host_bytes: int
    peak_bytes: int
    peak_without_loss_bytes: int
    phase: str
    place: str
    shares: dict[str, int]
    blocks: dict[str, int] = field(repr=False)

    @property
    def peak_set_by(self) -> str:
        """What sets the peak, in words."""
        largest = next(iter(self.shares), "")
        if largest.endswith(MANY) or (largest == STREAM and self.shares[STREAM] > 0.5 * self.peak_bytes):
            return "the stream" if largest == STREAM else largest
        if self.place not in self.blocks:
            return self.place
        verb = {"forward": "forward of", "backward": "backward of", "recompute": "recomputing"}
        return f"{verb[self.phase]} {self.place}"


@dataclass(frozen=True)
class ForecastData:
    """What training a model would take.

    Attributes:
        model: its name.
        batch: the batch, in words.
        dtype: of the parameters, e.g. "bfloat16".
        blocks: how many residual blocks there are.
        parameter_bytes, gradient_bytes, buffer_bytes: of the parameters, of the gradients of those that are trained,
            and of the buffers.
        optimizer_bytes: Adam's two moments in float32.
        methods: one entry per way to keep the stream.
        seconds: how long the forecast took.
        notes: what is worth knowing, in words.
    """

    model: str
    batch: str
    dtype: str
    blocks: int
    parameter_bytes: int
    gradient_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    methods: tuple[MethodForecast, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> MethodForecast:
        """Return the method of that name."""
        for method in self.methods:
            if method.name == name:
                return method
        raise KeyError(f"no method {name!r} in this forecast; there are {', '.join(m.name for m in self.methods)}")

    @property
    def fixed_bytes(self) -> int:
        """What every method needs besides its peak: parameters, gradients, buffers and optimiser state."""
        return self.parameter_bytes + self.gradient_bytes + self.buffer_bytes + self.optimizer_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists, for JSON."""
        whole = asdict(self)
        whole["notes"] = list(self.notes)
        whole["fixed_bytes"] = self.fixed_bytes
        whole["methods"] = [
            {**asdict(method), "peak_set_by": method.peak_set_by, "total_bytes": method.peak_bytes + self.fixed_bytes}
            for method in self.methods
        ]
        return whole
