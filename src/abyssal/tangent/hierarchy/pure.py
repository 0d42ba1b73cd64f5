"""A model as a pure function of its trained parameters, one sample at a time, checked before any work.

Tangent kernels differentiate `f(theta, x_a)` sample by sample, to a high order. That needs a model whose samples do not
influence one another, which gives the same outputs twice, and which `torch.func` can evaluate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from abyssal.models.state import as_found
from abyssal.tangent.hierarchy.composed import NEED_COMPOSING, ComposedOperators
from abyssal.tangent.modes import normal
from abyssal.tangent.reach import check_reach
from abyssal.tangent.subject import refuse_inference, refuse_mixing_modes
from abyssal.util.checks import instance

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
        model: the module.
        x: the samples: a tensor [n, ...], a tuple of such (positional arguments) or a dict (keyword arguments).
        output: takes what the model returns for a batch to [batch, k] or [batch]; None takes a tensor, or `.logits`.
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

    Raises:
        TypeError, ValueError: as :class:`~abyssal.tangent.hierarchy.Hierarchy` says.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
        output: Callable[[Any], Tensor] | None = None,
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        self.model = instance("model", model, nn.Module, "a torch.nn.Module")
        self._output = output
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        named = {name: _converted(t.detach(), dtype) for name, t in tensors.items()}
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = {name: named[name].clone() for name in trained}
        self.fixed = {name: t.clone() for name, t in named.items() if name not in self.parameters}
        self._buffers = {name for name, _ in model.named_buffers()}
        _check_parameters(model, self.parameters)
        refuse_inference(model)
        refuse_mixing_modes(model)
        self._keys, self.leaves = _leaves(x, dtype)
        self.n = len(self.leaves[0])
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
        return next(iter(self.parameters.values())).device

    def samples(self, block: slice) -> list[Tensor]:
        """Return the tensors of some samples."""
        return [leaf[block] for leaf in self.leaves]

    def one(self, parameters: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
        """Return the outputs of one sample [...], without a batch dimension. [k]."""
        return self.raw(parameters, [leaf[None] for leaf in leaves]).reshape(-1)

    def batch(self, parameters: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
        """Return the outputs of a batch. [batch, k]."""
        return self.raw(parameters, leaves).reshape(len(leaves[0]), self.k)

    def raw(self, parameters: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
        """Return the outputs in the shape that the model gives them: [batch, ...]."""
        args, kwargs = (tuple(leaves), {}) if self._keys is None else ((), dict(zip(self._keys, leaves, strict=True)))
        # Every evaluation is of the same function: a forward pass that changes a buffer changes a copy of the copy.
        fixed = {name: t.clone() if name in self._buffers else t for name, t in self.fixed.items()}
        with as_found(self.model, {**fixed, **parameters}):
            found = self.model(*args, **kwargs)
        if self._output is not None:
            return self._output(found)
        return getattr(found, "logits", found)

    def _check_reach(self, leaves: list[Tensor]) -> None:
        """Make sure that gradients at the parameters handed over are those at the model's own."""
        own = next(p for p in self.model.parameters() if p.requires_grad).dtype

        def plain() -> Tensor:
            given = [_converted(leaf, own) for leaf in leaves]
            args, kwargs = (tuple(given), {}) if self._keys is None else ((), dict(zip(self._keys, given, strict=True)))
            with as_found(self.model):
                found = self.model(*args, **kwargs)
            return self._output(found) if self._output is not None else getattr(found, "logits", found)

        with differentiable_kernels(), _kept_random_state(self.device):
            check_reach(self.model, self.parameters, lambda given: self.raw(given, leaves), plain)

    def _probe(self) -> None:
        """Evaluate a few samples in every way that matters, and compare."""
        few = self.samples(slice(0, _PROBE))
        count = len(few[0])
        watch = Watch()
        with torch.no_grad(), differentiable_kernels(), _kept_random_state(self.device):
            try:
                with watch:
                    together = self.raw(self.parameters, few)
                again = self.raw(self.parameters, few)
            except Exception as error:
                raise ValueError(_call_failed(error, few)) from error
            self.k = _outputs_of(together, count)
            self.output_shape = (self.n, *together.shape[1:])
            together, again = (t.reshape(count, self.k) for t in (together, again))
            if not together.isfinite().all():
                raise ValueError("The model's outputs are not finite at the start: look at x and at the parameters.")
            if not _close(together, again, watch.rounding):
                raise ValueError("The model gives two different outputs for one input: put it in eval() (dropout).")
        for start in range(0, self.n, _TOGETHER):
            self._check_reach(self.samples(slice(start, start + _TOGETHER)))
        with torch.no_grad(), differentiable_kernels(), _kept_random_state(self.device):
            try:
                apart = torch.vmap(lambda *leaves: self.one(self.parameters, list(leaves)))(*few)
            except Exception as error:
                raise ValueError(
                    f"torch.func cannot evaluate this {type(self.model).__name__} one sample at a time: "
                    f"{_first_line(error)}. Python conditions on tensor values, .item() and in-place changes of "
                    "buffers are the usual reasons; abyssal.paused(model) if abyssal.reconstruct was called on it."
                ) from error
        if not _close(together, apart, watch.rounding):
            raise ValueError(
                "The model's output for a sample depends on the others in the batch (batch statistics?), so that it "
                "has no tangent kernel: put it in eval()."
            )
        self.activation_bytes = max(1, watch.bytes // count)
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


@contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def _converted(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t.to(dtype) if dtype is not None and t.is_floating_point() else t


def _close(a: Tensor, b: Tensor, rounding: float) -> bool:
    # Different kernels round differently, by far less than the root of the machine's precision; and some models
    # compute in float32 somewhere, whatever they are given.
    allowed = max(torch.finfo(a.dtype).eps, rounding) ** 0.5 * max(a.abs().max().item(), torch.finfo(a.dtype).tiny)
    return bool((a - b).abs().max() <= allowed)


def _check_parameters(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    name = type(model).__name__
    if not parameters:
        frozen = len(list(model.parameters()))
        reason = f"all {frozen} of its parameters have requires_grad=False" if frozen else "it has no parameters"
        raise ValueError(f"{name} has no trained parameters ({reason}): there is no tangent kernel.")
    for parameter, p in parameters.items():
        if not p.is_floating_point():
            raise ValueError(f"Parameter {parameter} of {name} is {p.dtype}: only real floating-point ones can do.")
        if p.is_meta:
            raise ValueError(f"Parameter {parameter} of {name} is on the meta device: it has no values.")
    devices = sorted({str(p.device) for p in parameters.values()})
    if len(devices) > 1:
        raise ValueError(f"{name}'s parameters are on several devices ({', '.join(devices)}): move it to one.")


def _leaves(
    x: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[list[str] | None, list[Tensor]]:
    """Return the names of keyword arguments (None: positional ones), and the tensors."""
    keys = list(x) if isinstance(x, Mapping) else None
    tensors = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, tuple) else [x]
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        kinds = ", ".join(type(t).__name__ for t in tensors) or "nothing"
        raise TypeError(f"x has to be a tensor [n, ...], a tuple or a dict of tensors, got {kinds}.")
    if any(t.dim() == 0 for t in tensors) or len({len(t) for t in tensors}) > 1 or len(tensors[0]) == 0:
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise ValueError(f"x has to hold at least one sample, the same number in each tensor [n, ...], got {shapes}.")
    for t in tensors:
        if t.is_floating_point() and not t.isfinite().all():
            raise ValueError("x holds values that are not finite.")
    return keys, [_converted(normal(t.detach()), dtype) for t in tensors]


def _outputs_of(found: Any, batch: int) -> int:
    if not isinstance(found, Tensor):
        raise ValueError(
            f"The model returns {type(found).__name__}, not a tensor [n], [n, 1] or [n, k]: give output=, a function "
            "of what it returns."
        )
    if not found.is_floating_point():
        raise ValueError(f"The model's outputs are {found.dtype}: they have to be real floating-point numbers.")
    if found.dim() == 0 or len(found) != batch or found.numel() == 0:
        raise ValueError(
            f"The model's outputs for {batch} samples have shape {list(found.shape)}, not [{batch}] or [{batch}, k]: "
            "give outputs of each sample (no mean over the batch), if need be by output=."
        )
    return found.numel() // batch


def _call_failed(error: Exception, leaves: list[Tensor]) -> str:
    given = ", ".join(f"{t.dtype} {list(t.shape)}" for t in leaves)
    text = f"The model cannot be called on the first samples ({given}): {_first_line(error)}."
    if any(not t.is_floating_point() for t in leaves):
        text += " Integer images have to be converted first: x.float() / 255."
    return text + " If it makes tensors of its own type inside, dtype=None keeps its type."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
