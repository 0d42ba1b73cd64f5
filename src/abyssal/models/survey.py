"""Running a model once, to see its blocks called: on a batch that was given, or on one that it takes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.models import anatomy
from abyssal.models.batches import LoadingError, example_batch
from abyssal.models.branches import BlockCall, BlockRecorder, Reading, is_weight_layer, read_branches
from abyssal.models.call import call
from abyssal.models.state import quiet

__all__ = ["Survey", "UnreadableModelError", "run_on_any", "survey_model"]

_INPUT_TOKENS = 8


class UnreadableModelError(ValueError):
    """A model whose residual branches cannot be found; the message names the block and says what to do."""


@dataclass
class Survey:
    """One run.

    Attributes:
        batch: that the model ran on.
        blocks: the calls of blocks.
        read: the same, each with what was read of it.
        outside: the calls of modules with parameters outside of the blocks: name, module, order.
        reshaping: names of modules given as blocks that change the shape of their stream.
    """

    batch: Any
    blocks: list[BlockCall] = field(default_factory=list)
    read: list[tuple[BlockCall, Reading]] = field(default_factory=list)
    outside: list[tuple[str, nn.Module, int]] = field(default_factory=list)
    reshaping: list[str] = field(default_factory=list)


class _Reader(BlockRecorder):
    def __init__(self, name: str, block: nn.Module, counter: Iterator[int], survey: Survey) -> None:
        super().__init__(name, block, counter)
        self.survey = survey

    def done(self, call: BlockCall, start: Any, value: Tensor) -> None:
        if call.output is not None and call.output.shape != value.shape:
            self.survey.reshaping.append(self.name)
            return
        self.survey.blocks.append(call)
        self.survey.read.append((call, read_branches(call, start)))
        call.stream = call.output = None  # the graph of one block at a time
        call.outputs.clear()


def run_on_any(model: nn.Module, named: dict[str, nn.Module], batch: Any) -> Survey:
    """Run the model on the batch given, or on the first of some likely ones that it takes."""
    if batch is not None:
        return survey_model(model, named, batch)
    failures = []
    for candidate in _candidates(model):
        try:
            return survey_model(model, named, candidate)
        except UnreadableModelError:
            raise
        except Exception as error:  # a user's forward may raise anything on an input that is not its own
            failures.append(f"{_shape_of(candidate)}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    tried = "; ".join(failures) or "no input that would fit is known"
    raise UnreadableModelError(
        f"This {anatomy.title(model)} has to be run once to find its residual branches, and no input was found that "
        f"it takes ({tried}). Give one: batch=(x,) or batch=dict(input_ids=...)."
    )


def survey_model(model: nn.Module, named: dict[str, nn.Module], batch: Any) -> Survey:
    """Run the model on a batch with recorders on its blocks and on all modules outside them."""
    survey, counter = Survey(batch), itertools.count()
    inside = {id(module) for block in named.values() for module in block.modules()}
    handles: list[Any] = []
    for name, module in model.named_modules():
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(_Order(name, counter, survey)))
    handles += [_Reader(name, block, counter, survey) for name, block in named.items()]
    try:
        with quiet(model):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return survey


class _Order:
    def __init__(self, name: str, counter: Iterator[int], survey: Survey) -> None:
        self.name, self.counter, self.survey = name, counter, survey

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.survey.outside.append((self.name, module, next(self.counter)))


def _candidates(model: nn.Module) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    known = hasattr(model, "config") or hasattr(model, "pretrained_cfg")
    if known:
        yield from _example(model)
    first = next((m for m in model.modules() if is_weight_layer(m) or isinstance(m, nn.Embedding)), None)
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Embedding):
        yield torch.randint(0, first.num_embeddings, (2, _INPUT_TOKENS), generator=generator)
    elif isinstance(first, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        spatial = len(first.kernel_size)
        shapes = [(2, first.in_channels, *[size] * spatial) for size in (8, 32, 64)]
    elif isinstance(width := getattr(first, "in_features", None), int):
        shapes = [(2, width), (2, _INPUT_TOKENS, width)]
    elif first is not None:  # a layer of the user's own: [in, out] or [out, in]
        matrix = next(p for p in first.parameters(recurse=False) if p.dim() >= 2)
        shapes = [(2, width) for width in dict.fromkeys(matrix.shape[::-1])]
    for shape in shapes:
        yield torch.randn(shape, generator=generator).to(dtype)
    if not known:
        yield from _example(model)


def _example(model: nn.Module) -> Iterator[Any]:
    for tokens in (_INPUT_TOKENS, None):
        with contextlib.suppress(LoadingError):
            yield example_batch(model, batch_size=2, tokens=tokens).batch


def _shape_of(batch: Any) -> str:
    if isinstance(batch, dict):
        return ", ".join(f"{key} {_shape_of(value)}" for key, value in batch.items())
    return str(list(batch.shape)) if isinstance(batch, Tensor) else str(batch)
