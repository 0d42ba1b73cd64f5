"""What a training step of a model would take, accounted for on fake tensors: no weights, no memory, no data.

A forward and a backward pass are run for each way to keep the residual stream, and every storage that they would
allocate is counted, from its allocation to its release. Bytes are exact where operators allocate nothing but their
results; scratch space inside of a kernel is not seen (docs/forecast.md has measured figures).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.engine.policy import Code, Keep, Policy, Reverse
from abyssal.forecasting.dry_run import DryRun, ForecastError
from abyssal.forecasting.forecast_data import ForecastData
from abyssal.models.batches import Example
from abyssal.models.find import Blocks
from abyssal.models.load import LoadedModel, build_from_config, load_model

__all__ = ["Forecast", "ForecastError", "forecast"]


class Forecast(ForecastData):
    """What training a model would take; `print` shows it as a table."""

    def __str__(self) -> str:
        """Return the table."""
        from abyssal.forecasting.table import forecast_text  # here, since rich takes long to import

        return forecast_text(self)


def forecast(
    model_or_config: Any,
    batch: Any = None,
    *,
    tokens: int | None = None,
    batch_size: int = 1,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    policies: Mapping[str, Policy | Mapping[str, Policy] | None] | None = None,
    blocks: Blocks | None = None,
) -> Forecast:
    """Say what a training step of a model would take, without its weights and without its memory.

    Args:
        model_or_config: an `nn.Module` (real, on the meta device, or fake; it is neither changed nor run); a
            configuration of transformers; a function that builds a module; or a spec as `abyssal.models.load_model`
            takes it ("hf:DIR", "timm:NAME", "torchvision:NAME", "path.py:factory").
        batch: a dict (keyword arguments), a tuple (positional ones) or a tensor; real or not. Default: a synthetic
            one, of `batch_size` sequences of `tokens` tokens or images of `image_size` pixels.
        tokens: per sequence, if `batch` is not given; default 512.
        batch_size: sequences or images, if `batch` is not given.
        image_size: height and width, if `batch` is not given; default: the model's own.
        dtype: of parameters and floating-point inputs; default: the model's own.
        loss: takes the model's output to a scalar; default: `output.loss`, or cross entropy for image classifiers.
        policies: the ways to forecast, by name: a policy for all blocks, or a mapping from block names to policies, or
            None for plain autograd. Default: plain,
            checkpointing, offload, `Code(4)`, `Code(2)` and `Reverse(0)`.
        blocks: the residual blocks, as `abyssal.reconstruct` takes them.

    Returns:
        The forecast; `print` it for a table. Its bytes are those of the CPU's kernels, which save what CUDA's do but
        for attention with dropout (see docs/forecast.md); gradients are taken to be there already, as with gradient
        accumulation.

    Raises:
        LoadingError: for a spec that cannot be loaded, or a model for which no batch is known.
        NoBlocksError: if the model has no residual blocks.
        TypeError: for something that is no model, one that cannot be copied, or one without a loss.
        ForecastError: if its training step does not run on fake tensors.
    """
    begin = time.perf_counter()
    loaded, cast = _loaded(model_or_config, dtype, image_size)
    if batch is None:
        example = loaded.example_batch(batch_size, tokens, image_size)
        example = Example(example.batch, loss or example.loss, example.description)
    else:
        batch = dict(batch) if isinstance(batch, Mapping) else batch  # transformers' BatchEncoding, too
        example = Example(batch, loss, _described(batch))
    step = DryRun(loaded.model, example, cast, blocks)
    chosen = default_policies() if policies is None else policies
    methods = tuple(step.measure(name, policy) for name, policy in chosen.items())
    parameters = list(step.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Forecast(
        model=loaded.name,
        batch=example.description,
        dtype=_dtype_of(parameters),
        blocks=len(step.blocks),
        parameter_bytes=_nbytes(parameters),
        gradient_bytes=_nbytes(trained),
        buffer_bytes=_nbytes(step.model.buffers()),
        optimizer_bytes=sum(2 * 4 * p.numel() for p in trained),
        methods=methods,
        seconds=time.perf_counter() - begin,
        notes=tuple(filter(None, (loaded.note, *step.notes))),
    )


def default_policies() -> dict[str, Policy | None]:
    """The ways to keep the stream that a forecast compares by default."""
    return {
        "plain": None,
        "checkpointing": Keep(),
        "offload": Keep(device="cpu"),
        "Code(4)": Code(4),
        "Code(2)": Code(2),
        "Reverse(0)": Reverse(0),
    }


def _loaded(given: Any, dtype: torch.dtype | None, image_size: int | None) -> tuple[LoadedModel, torch.dtype | None]:
    """Return the model, its weights not allocated if it is ours to build; and the type to cast it to, if any."""
    if isinstance(given, str):
        return load_model(given, empty=True, dtype=dtype, image_size=image_size), None
    if isinstance(given, LoadedModel):
        return given, dtype
    if isinstance(given, nn.Module):
        return LoadedModel(given, type(given).__name__), dtype
    if hasattr(given, "model_type") and hasattr(given, "to_dict"):  # transformers need not be imported to know
        model = build_from_config(given, empty=True, dtype=dtype)
        return LoadedModel(model, f"{type(model).__name__} from its configuration"), None
    if callable(given):
        with torch.device("meta"):
            model = given()
        if isinstance(model, nn.Module):
            return LoadedModel(model, type(model).__name__), dtype
        raise TypeError(f"forecast: the function {given!r} returned a {type(model).__name__}; expected an nn.Module")
    raise TypeError(
        "forecast: expected an nn.Module, a configuration of transformers, a function that builds a module, or a spec "
        f"such as 'hf:DIR' or 'timm:NAME'; got {given!r}, a {type(given).__name__}"
    )


def _dtype_of(parameters: list[nn.Parameter]) -> str:
    kinds = {str(p.dtype).removeprefix("torch.") for p in parameters}
    return " and ".join(sorted(kinds)) or "none"


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _described(batch: Any) -> str:
    if isinstance(batch, dict):
        return ", ".join(f"{key} {list(value.shape)}" for key, value in batch.items() if isinstance(value, Tensor))
    values = batch if isinstance(batch, tuple | list) else (batch,)
    return ", ".join(str(list(value.shape)) for value in values if isinstance(value, Tensor))
