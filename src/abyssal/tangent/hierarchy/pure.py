"""A model as a pure function of its trained parameters, one sample at a time, checked before any work.

Tangent kernels differentiate `f(theta, x_a)` sample by sample, to a high order. That needs a model whose samples do not
influence one another, which gives the same outputs twice, and which `torch.func` can evaluate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.tangent.batch import Batch
from abyssal.tangent.hierarchy.composed import NEED_COMPOSING, ComposedOperators
from abyssal.tangent.reach import check_reach
from abyssal.tangent.subject import Output, Subject, first_failure, first_line, refuse_mixing, refuse_random
from abyssal.util.randomness import forked_randomness

__all__ = ["PureModel", "Watch", "differentiable_kernels"]

# Samples on which the checks before the work run.
_PROBE = 4
# Samples at most whose gradients are compared as one.
_TOGETHER = 16
# Operators whose first or second derivative jumps, as they reach the dispatcher.
_KINKED = {
    "relu": "ReLU",
    "threshold": "ReLU",
    "leaky_relu": "leaky ReLU",
    "_prelu_kernel": "PReLU",
    "hardtanh": "ReLU6 or hardtanh",
    "hardswish": "hardswish",
    "hardsigmoid": "hardsigmoid",
    "elu": "ELU",
    "abs": "abs",
    "clamp": "clamp",
    "clamp_min": "clamp",
    "max_pool2d_with_indices": "max pooling",
    "max_pool2d": "max pooling",
    "max": "max",
    "maximum": "maximum",
    "minimum": "minimum",
}


class PureModel:
    """`f(parameters, sample) -> [k]` of a module, and the samples it is evaluated on.

    The module is called with other parameters in place of its own, and keeps all that it holds.

    Args:
        model: as for :class:`~abyssal.tangent.hierarchy.hierarchy.Hierarchy`, as are the others, and what is raised.
        x: see there.
        output: see there.
        dtype: floating-point parameters, buffers and samples are converted to it; None leaves them.

    Attributes:
        parameters: those trained (`requires_grad`), by name, detached.
        leaves: the samples' tensors.
        n: number of samples.
        k: outputs of each sample.
        output_shape: the shape of the outputs of all samples: [n], [n, 1] or [n, ...].
        activation_bytes: of everything that one forward pass of one sample computes.
        kinks: names of operators in it whose derivatives jump.
        composed: whether it uses operators that have to be composed of others.
    """

    def __init__(self, model: nn.Module, x: Any, output: Output | None, dtype: torch.dtype | None) -> None:
        self.subject = Subject(model, None, output)
        self.model = self.subject.model
        _check_parameters(self.subject)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        copies = {name: _converted(t.detach(), dtype).clone() for name, t in tensors.items()}
        self.parameters = {name: copies.pop(name) for name in self.subject.parameters}
        self._fixed = copies
        self._buffers = {name for name, _ in model.named_buffers()}
        self._samples = Batch.of(x, "x").to(self.device, dtype)
        self.leaves, self.n = self._samples.tensors, self._samples.n
        if not all(leaf.isfinite().all() for leaf in self.leaves):
            raise ValueError("x holds values that are not finite.")
        self._probe()

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters: the widest of them."""
        kinds = {p.dtype for p in self.parameters.values()}
        return max(kinds, key=lambda kind: torch.finfo(kind).bits)

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return self.subject.device

    def samples(self, block: slice) -> list[Tensor]:
        """Return the tensors of some samples."""
        return [leaf[block] for leaf in self.leaves]

    def one(self, parameters: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
        """Return the outputs of one sample [...], without a batch dimension. [k]."""
        return self._shaped(parameters, [leaf[None] for leaf in leaves]).reshape(-1)

    def batch(self, parameters: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
        """Return the outputs of a batch. [batch, k]."""
        return self._shaped(parameters, leaves).reshape(len(leaves[0]), self.k)

    def _shaped(self, parameters: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
        """Return the outputs in the shape that the model gives them: [batch, ...]."""
        # Every evaluation is of the same function: a forward pass that changes a buffer changes a copy of the copy.
        fixed = {name: t.clone() if name in self._buffers else t for name, t in self._fixed.items()}
        return self.subject.shaped(self._samples.with_tensors(leaves), {**fixed, **parameters})

    def _check_reach(self, block: slice) -> None:
        """Make sure that gradients at the parameters handed over are those at the model's own."""
        own = self._samples[block].to(self.device, self.subject.dtype)
        check_reach(self.subject, own, self.parameters, lambda given: self.batch(given, self.samples(block)))

    def _probe(self) -> None:
        """Evaluate a few samples in every way that matters, and compare."""
        few = self._samples[:_PROBE]
        with torch.no_grad(), differentiable_kernels(), forked_randomness(self.device):
            try:
                with Watch() as watch:
                    shaped = self._shaped(self.parameters, few.tensors)
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"{first_failure(error, few, self.dtype)} If it makes tensors of its own type inside, dtype=None "
                    "keeps its type."
                ) from error
            together = shaped.reshape(few.n, -1)
            self.output_shape, self.k = (self.n, *shaped.shape[1:]), together.shape[1]
            if not together.isfinite().all():
                raise ValueError("The model's outputs are not finite at the start: look at x and at the parameters.")
            refuse_random(together, self.batch(self.parameters, few.tensors), watch.rounding)
        with differentiable_kernels(), forked_randomness(self.device):
            for start in range(0, self.n, _TOGETHER):
                self._check_reach(slice(start, start + _TOGETHER))
        with torch.no_grad(), differentiable_kernels(), forked_randomness(self.device):
            try:
                apart = torch.vmap(lambda *leaves: self.one(self.parameters, list(leaves)))(*few.tensors)
            except Exception as error:
                raise ValueError(
                    f"torch.func cannot evaluate this {type(self.model).__name__} one sample at a time: "
                    f"{first_line(error)}. Python conditions on tensor values, .item() and in-place changes of "
                    "buffers are the usual reasons; abyssal.paused(model) if abyssal.reconstruct was called on it."
                ) from error
        refuse_mixing(together, apart, watch.rounding)
        self.activation_bytes = max(1, watch.bytes // few.n)
        self.kinks = sorted(watch.kinks)
        self.composed = watch.composed


@contextmanager
def differentiable_kernels(composed: bool = False) -> Iterator[None]:
    """Use only implementations that can be differentiated often, and forward."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), ComposedOperators() if composed else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Watch(TorchDispatchMode):
    """Counts the bytes that operators return, notes those with kinks, and the coarsest rounding among them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.kinks: set[str] = set()
        self.composed = False
        self.rounding = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in found if isinstance(found, tuple | list) else (found,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:  # no views
                self.bytes += t.numel() * t.element_size()
            if isinstance(t, Tensor) and t.is_floating_point():
                self.rounding = max(self.rounding, torch.finfo(t.dtype).eps)
        name = func.overloadpacket.__name__.rstrip("_")
        if name in _KINKED and any(isinstance(t, Tensor) and t.is_floating_point() for t in args):
            self.kinks.add(_KINKED[name])
        self.composed = self.composed or name in NEED_COMPOSING
        return found


def _converted(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t.to(dtype) if dtype is not None and t.is_floating_point() else t


def _check_parameters(subject: Subject) -> None:
    name = type(subject.model).__name__
    for parameter, p in subject.parameters.items():
        if not p.is_floating_point():
            raise ValueError(f"Parameter {parameter} of {name} is {p.dtype}: only real floating-point ones can do.")
        if p.is_meta:
            raise ValueError(f"Parameter {parameter} of {name} is on the meta device: it has no values.")
    devices = sorted({str(p.device) for p in subject.parameters.values()})
    if len(devices) > 1:
        raise ValueError(f"{name}'s parameters are on several devices ({', '.join(devices)}): move it to one.")
