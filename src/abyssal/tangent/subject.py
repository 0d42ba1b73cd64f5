"""A model as a function from samples to outputs: what is asked of it, checked before any work."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.models.patch import paused
from abyssal.models.state import as_found, without_hooks
from abyssal.tangent.batch import Batch
from abyssal.tangent.empirical.detection import agree
from abyssal.util.checks import instance

__all__ = [
    "Output",
    "Subject",
    "first_failure",
    "first_line",
    "refuse_inference",
    "refuse_interaction",
    "refuse_mixing",
    "refuse_mixing_modes",
    "refuse_random",
    "restored",
]

# From what the model returns to a tensor [n, k], [n] or [n, ...].
Output = Callable[[Any], Tensor]


class Subject:
    """A model, which of its parameters count, and where its outputs are.

    Args:
        model: any.
        parameters: names or globs of those that count; None is all that require gradients.
        output: takes the outputs from what the model returns; None is that itself, or its `logits`.

    Raises:
        TypeError: if it is no module.
        ValueError: if no parameter counts, or samples are not independent of each other in the model's mode.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[str] | str | None, output: Output | None) -> None:
        self.model = instance("model", model, nn.Module, "a torch.nn.Module")
        self.output = output
        self.parameters = _selected(model, parameters)
        refuse_mixing_modes(model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter that counts; of its real part."""
        return next(iter(self.parameters.values())).dtype.to_real()

    @property
    def device(self) -> torch.device:
        """Of the first parameter that counts."""
        return next(iter(self.parameters.values())).device

    def __call__(self, batch: Batch) -> Tensor:
        """Return the outputs, [n, k]; an error that is about types says what to do."""
        try:
            return self.run(batch)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            hint = _type_hint(error, batch, self.dtype)
            if hint is None:
                raise
            raise TypeError(f"The model failed on these samples ({error}). {hint}") from error

    def run(self, batch: Batch, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the outputs, with values in the place of parameters and buffers. [n, k]."""
        return self.shaped(batch, values).reshape(batch.n, -1)

    def shaped(self, batch: Batch, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the outputs in the shape in which the model gives them. [n, ...]."""
        args, kwargs = batch.call()
        with as_found(self.model, values):  # every evaluation is of the same function (spectral normalisation counts)
            found = self.model(*args, **kwargs)
        if self.output is not None:
            found = self.output(found)
        elif not isinstance(found, Tensor) and isinstance(getattr(found, "logits", None), Tensor):
            found = found.logits
        if not isinstance(found, Tensor):
            raise TypeError(
                f"The model returns a {type(found).__name__}, not a tensor [n, k]: say where its outputs are, such as "
                "output=lambda found: found.last_hidden_state[:, 0]."
            )
        if found.dim() == 0 or len(found) != batch.n:
            raise ValueError(
                f"The outputs have shape {list(found.shape)} for {batch.n} samples: expected [n, k]. A loss that is "
                "summed over the batch has no kernel between samples; give the outputs that it comes from (output=...)."
            )
        if not found.is_floating_point():
            raise TypeError(f"The outputs have to be floating, got {found.dtype}.")
        if found.numel() == 0:
            raise ValueError(f"The outputs have shape {list(found.shape)}: there is nothing to differentiate.")
        return found


# What torch says where an operator does not want whole numbers, or none that large; and where it wants another type.
_OF_INTEGERS = re.compile(
    r"(Long|Int|Byte|Char|Short)(Tensor|\b)|unsigned char|long int|\(int\)|mixed dtype|index out of range|bounds"
)
_OF_TYPES = re.compile(r"dtype|scalar type|type \(|(Float|Double|Half|BFloat16)(Tensor|\b)")


def first_failure(error: Exception, batch: Batch, wanted: torch.dtype) -> str:
    """Say that a model with parameters of a type failed on its first samples, and what may be wrong with theirs."""
    given = ", ".join(f"{list(value.shape)} of {value.dtype}" for value in batch.tensors)
    text = f"model(x) failed on the first {batch.n} samples, {given} given to parameters of {wanted}: {error}"
    hint = _type_hint(error, batch, wanted)
    return text if hint is None else f"{text.rstrip('.')}. {hint}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, without a full stop; its class's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _type_hint(error: Exception, batch: Batch, wanted: torch.dtype) -> str | None:
    """Return what may be wrong with the samples' types, where a model's error is about types."""
    integers, types = _OF_INTEGERS.search(str(error)), _OF_TYPES.search(str(error))
    for name, value in zip(batch.names, batch.values, strict=True):
        where = f"argument {name!r}" if isinstance(name, str) else f"positional argument {name}"
        if integers and isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
            return (
                f"The {where} is {value.dtype}. Images have to be floating: x.to({wanted}) / 255. Indices of an "
                "embedding have to be torch.int64 and below its size."
            )
        if types and isinstance(value, Tensor) and value.is_floating_point() and value.dtype != wanted:
            return f"The {where} is {value.dtype}, the parameters are {wanted}: bring one to the other's dtype."
    return None


def _selected(model: nn.Module, patterns: Sequence[str] | str | None) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters())
    if not every:
        raise ValueError(f"{type(model).__name__} has no parameters, and so no tangent kernel.")
    names = dict(model.named_parameters(remove_duplicate=False))
    wanted = names
    if patterns is not None:
        globs = [patterns] if isinstance(patterns, str) else list(patterns)
        for glob in globs:
            if not fnmatch.filter(names, glob):
                raise ValueError(f"parameters={glob!r} fits none of {', '.join(list(names)[:20])}.")
        wanted = {name: p for name, p in names.items() if any(fnmatch.fnmatchcase(name, glob) for glob in globs)}
    chosen = {id(p) for p in wanted.values() if p.requires_grad}
    if not chosen:
        raise ValueError(
            f"None of the {len(wanted)} parameters requires a gradient: frozen ones do not count. Set "
            "requires_grad_(True) on those that are trained."
        )
    refuse_inference(model)
    return {name: p for name, p in every.items() if id(p) in chosen}


def refuse_inference(model: nn.Module) -> None:
    """Raise ValueError if a parameter or buffer was made in `torch.inference_mode()`."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_inference():
            raise ValueError(
                f"{name} of {type(model).__name__} was made in torch.inference_mode() and takes no part in gradients. "
                "Build or load the model outside of it, or take copy.deepcopy(model), outside of it."
            )


def refuse_mixing_modes(model: nn.Module) -> None:
    """Raise ValueError if a module is random, or mixes samples, in the mode that it is in."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise ValueError(
                    f"{where} is in training mode and normalises over the batch: outputs of one sample depend on the "
                    "others, and there is no kernel between samples. Call model.eval() first."
                )
            if module.running_mean is None:
                raise ValueError(
                    f"{where} has no running statistics and normalises over the batch in eval mode too: there is no "
                    "kernel between samples. Make it with track_running_stats=True, or use GroupNorm or LayerNorm."
                )
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{where} drops at random with p = {module.p}, being in training mode: the kernel would be that of a "
                "random subnetwork. Call model.eval() first, or set p = 0."
            )


def refuse_random(outputs: Tensor, again: Tensor, rounding: float) -> None:
    """Raise ValueError if a model gave other outputs when called again, beyond a relative rounding of entries."""
    if not agree(again, outputs, rounding):
        raise ValueError(
            "The model is random: called twice with the same inputs, it returned different outputs, so it has no "
            "one tangent kernel. Turn its dropout off, with model.eval() where it heeds that."
        )


def refuse_mixing(together: Tensor, alone: Tensor, rounding: float) -> None:
    """Raise ValueError if samples have other outputs by themselves, beyond a relative rounding of entries."""
    if not agree(alone, together, rounding):
        raise ValueError(
            "The model mixes samples: the first sample's outputs depend on what else is in the batch. A tangent "
            "kernel needs one function for all samples: model.eval() where it is BatchNorm in training mode."
        )


def refuse_interaction(together: Tensor, alone: Tensor) -> None:
    """Make sure that a sample's outputs depend on that sample alone.

    Args:
        together: outputs of a batch. [n, k]
        alone: of its last sample, evaluated again by itself. [1, k]

    Raises:
        ValueError: if they depend on the neighbours or on chance, or are not finite.
    """
    if not together.isfinite().all() or not alone.isfinite().all():
        raise ValueError("The model's outputs are not finite on its first samples: there is no kernel to compute.")
    if alone.shape[1] != together.shape[1]:
        raise ValueError(
            f"A sample has {alone.shape[1]} outputs alone and {together.shape[1]} beside another: expected [n, k]."
        )
    if not agree(together[-1], alone[0]):
        off, size = (together[-1] - alone[0]).abs().max().item(), alone.abs().max().item()
        raise ValueError(
            f"The outputs of a sample change by {off:.2g} (of {size:.2g}) when it is evaluated again without its "
            "neighbour: samples interact (normalisation over the batch), or the model is random (dropout, stochastic "
            "depth in training mode). Call model.eval() first, or remove what does it."
        )


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Run a model plainly, also one that `abyssal.reconstruct` patched; leave what its modules hold, and randomness."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), as_found(model), paused(model), without_hooks(model):
        yield
