"""A training step of a model on fake tensors, under one policy after another, with every storage accounted for."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from abyssal.codec.placement import Parked, parking_as
from abyssal.engine.api import certificate, reconstruct, release
from abyssal.engine.policy import Policy
from abyssal.forecasting.forecast_data import LOSS, MANY, MethodForecast
from abyssal.models.arguments import find_stream
from abyssal.models.batches import Example
from abyssal.models.call import arguments, scalar_loss
from abyssal.models.find import Blocks, resolve_blocks
from abyssal.profiling.fake import fake_batch, fake_copy, masks_as_for_real, new_mode, without_needless_masks
from abyssal.profiling.storages import HOST, STREAM, Allocation, Labelled, LiveBytes, Places

__all__ = ["DryRun", "ForecastError"]

_ATTENTION = (
    "attention keeps its probabilities, tokens x tokens per head, since the CPU has no flash kernel with dropout or "
    "for this mask; on a GPU it may not"
)


class ForecastError(RuntimeError):
    """A training step that does not run on fake tensors; the message says where it stopped."""


class _NoLossError(TypeError):
    """The output has no scalar loss."""


class DryRun:
    """A fake copy of a model and its batch, and training steps of it under one policy after another."""

    def __init__(self, model: nn.Module, example: Example, dtype: torch.dtype | None, blocks: Blocks | None) -> None:
        names = {id(module): name for name, module in resolve_blocks(model, blocks).items()}
        by_name = dict(model.named_modules())
        self.blocks = list(names.values())
        self._mode = new_mode()
        self.model = fake_copy(model, self._mode, dtype)
        release(self.model)
        if not self.model.training:
            self.model.train()
        self._block_names = frozenset(self.blocks)
        self._modules = dict(self.model.named_modules())
        assert self._modules.keys() == by_name.keys()
        self._places = Places()
        for name, module in self._modules.items():
            Labelled(module, name, self._places).install()
        self._batch = fake_batch(without_needless_masks(example.batch), self._mode, dtype)
        self._loss = example.loss
        self._head = _head_of(self.model, self._modules)
        self.notes: list[str] = []
        with self._mode:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)

    def measure(self, name: str, policy: Policy | Mapping[str, Policy] | None) -> MethodForecast:
        """Run a training step under a policy (None: plain autograd), and count.

        Raises:
            ForecastError: if it does not run on fake tensors.
            TypeError: if it gives no scalar loss.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model that the user has patched, say; nothing to act upon here
            if policy is not None:
                reconstruct(self.model, policy, blocks=self.blocks)
                self._label_what_is_kept()
            try:
                counted = self._count(policy is not None)
                blocks = self._stored() if policy is not None else dict(self._inputs)
            finally:
                self._unlabel_what_is_kept()
                release(self.model)
        alive = counted.at_peak()
        self._note_attention(alive, counted.peak)
        return MethodForecast(
            name=name,
            policy="" if policy is None else str(policy) if isinstance(policy, Policy) else "by block",
            stream_bytes=sum(blocks.values()),
            host_bytes=counted.host_peak,
            peak_bytes=counted.peak,
            peak_without_loss_bytes=counted.peak_without(lambda allocation: self._place(allocation) == LOSS),
            phase=alive[-1].phase,
            place=self._place(alive[-1]),
            shares=self._shares(alive),
            blocks=blocks,
        )

    def _note_attention(self, alive: Iterable[Allocation], peak: int) -> None:
        """Where attention keeps its probabilities, on the CPU's kernels' account, say so."""
        kept = sum(a.nbytes for a in alive if a.operator.startswith("aten._safe_softmax"))  # of torch's fallback only
        if kept > 0.02 * peak and _ATTENTION not in self.notes:
            self.notes.append(_ATTENTION)

    # ------------------------------------------------------------------ one step

    def _count(self, patched: bool) -> LiveBytes:
        self._inputs: dict[str, int] = {}
        with self._mode, masks_as_for_real(self._batch), _host_apart(self._places), _quiet():
            try:
                if patched:
                    self._forward()  # in its first pass, the engine learns and checks more than later
                counted = LiveBytes(self._outside(), self._places)
                with self._inputs_noted(), counted:
                    self._forward().backward()
            except _NoLossError:
                raise
            except Exception as error:
                raise ForecastError(self._failure(error)) from error
        return counted

    def _failure(self, error: Exception) -> str:
        where, _ = self._places.last
        cause = str(error).strip().splitlines()
        return (
            f"forecast: a training step of this {type(self.model).__name__} does not run on fake tensors: "
            f"{type(error).__name__}{f': {cause[0]}' if cause else ''} (in {where or 'the model itself'}). A forward "
            "pass that looks at values (.item(), a mask, a routing) or a kernel that torch knows no shapes for is "
            "the usual cause. Another dtype= or attention implementation may do; else measure a real step "
            "(abyssal.memory.track)."
        )

    def _forward(self) -> Tensor:
        self._places.clear()
        args, kwargs = arguments(self._batch)
        output = self.model(*args, **kwargs)
        with self._places.within(""):
            try:
                return scalar_loss(output, self._loss)
            except TypeError as error:
                raise _NoLossError(f"forecast: {error}") from None

    def _outside(self) -> Iterator[Tensor]:
        for parameter in self.model.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from self.model.buffers()
        yield from (leaf for leaf in pytree.tree_leaves(self._batch) if isinstance(leaf, Tensor))

    @contextmanager
    def _inputs_noted(self) -> Iterator[None]:
        """Note the size of each block's input: the stream that plain autograd stores among the rest."""

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                slot = find_stream(args, kwargs, module.forward)
                if slot is not None:
                    self._inputs[name] = self._inputs.get(name, 0) + slot.get(args, kwargs).nbytes

            return hook

        hooks = [self._modules[name].register_forward_pre_hook(note(name), with_kwargs=True) for name in self.blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _stored(self) -> dict[str, int]:
        return {block.name: block.stored_bytes for block in certificate(self.model).blocks}

    # ------------------------------------------------------------------ what is where

    def _label_what_is_kept(self) -> None:
        for name in self.blocks:
            Labelled(self._modules[name], STREAM, self._places).install()

    def _unlabel_what_is_kept(self) -> None:
        for name in self.blocks:
            forward = self._modules[name].__dict__["forward"]
            if isinstance(forward, Labelled) and forward.name == STREAM:
                forward.remove()

    def _place(self, allocation: Allocation) -> str:
        """The block, the head, or the outermost module that an allocation belongs to."""
        place = allocation.place
        if place in ("", self._head):
            return LOSS
        parts = place.split(".")
        for end in range(1, len(parts) + 1):
            if (name := ".".join(parts[:end])) in self._block_names:
                return name
        return place

    def _shares(self, alive: Iterable[Allocation]) -> dict[str, int]:
        by_place: dict[str, int] = defaultdict(int)
        for allocation in alive:
            by_place[self._place(allocation)] += allocation.nbytes
        in_blocks = {name: nbytes for name, nbytes in by_place.items() if name in self._block_names}
        if len(in_blocks) > 2:
            for name in in_blocks:
                del by_place[name]
            by_place[f"{len(in_blocks)} {MANY}"] = sum(in_blocks.values())
        return dict(sorted(by_place.items(), key=lambda item: -item[1]))


def _head_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the output embedding, which makes the logits."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, module in modules.items() if module is head), None) if head is not None else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging a failure that our own error tells."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@contextmanager
def _host_apart(places: Places) -> Iterator[None]:
    """Have what is parked on the host copied there and back, though the fake tensors' device is the host already."""

    class ParkedApart(Parked):
        """As on an accelerator: a copy on the host; on its way back, a copy on the device."""

        __slots__ = ("_back",)

        def __init__(self, tensor: Tensor, device: torch.device) -> None:
            super().__init__(tensor, device)
            self._back: Tensor | None = None
            with places.within(HOST):
                self._parked = tensor.clone()

        def prefetch(self) -> None:
            """The copy back takes its memory when it starts."""
            if self._back is None:
                with places.within(STREAM):
                    self._back = self._parked.clone()

        def fetch(self) -> Tensor:
            """Give back the copy, and start the next."""
            self.prefetch()
            found, self._back = self._back, None
            assert found is not None
            if self._before is not None and (before := self._before()) is not None:
                before.prefetch()
            return found

    with parking_as(ParkedApart):
        yield
