"""What is checked: a private plain copy of the user's model, in float64 where it runs, and its batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from abyssal.engine.api import release
from abyssal.models.arguments import find_stream
from abyssal.models.call import first_tensor

Loss = Callable[[Any], Tensor]


class Chain(nn.Module):
    """One block, called three times in a row: its last input is kept, the two before it are restored."""

    LINKS = 3

    def __init__(self, block: nn.Module) -> None:
        """Take the block in under the name of its class."""
        super().__init__()
        self.name = type(block).__name__
        self.add_module(self.name, block)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the last call returns; stop early where the output cannot be the next call's input."""
        block = self._modules[self.name]
        assert block is not None
        output = block(*args, **kwargs)
        for _ in range(self.LINKS - 1):
            slot, stream = find_stream(args, kwargs, block.forward), first_tensor(output)
            if slot is None or stream is None or not _fits(stream, slot.get(args, kwargs)):
                break
            if isinstance(slot.key, int):
                args = (*args[: slot.key], stream, *args[slot.key + 1 :])
            else:
                kwargs = {**kwargs, slot.key: stream}
            output = block(*args, **kwargs)
        return output


def _fits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


class Subject:
    """A pristine copy to take working copies of; nothing that is done to those reaches the user's model.

    Args:
        model: the user's model; copied, and the copy released if it is reconstructed.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.
        loss: `loss(output) -> scalar`; None for `output.loss`, else a fixed random projection of the output.
        block_names: names of the blocks in the model.
        seed: for random states and the projection.
        grad_inputs: compare gradients of every floating-point input, not only of those that ask for it.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        loss: Loss | None,
        block_names: list[str],
        seed: int,
        grad_inputs: bool,
    ) -> None:
        """Copy the model and the batch."""
        self._pristine = release(_copy_of(model))
        self._inputs = pytree.tree_map(_detached, (args, kwargs))
        self._loss, self._grad_inputs = loss, grad_inputs
        self.block_names, self.seed = block_names, seed
        self.dtype = _dtype_of(self._pristine, self._inputs)
        self.why_not_double = ""

    def to_double(self, try_step: Callable[[], object]) -> None:
        """Go to float64, if `try_step` (one plain training step) runs there; else say why not."""
        if self.dtype == torch.float64:
            return
        device_types = {t.device.type for t in [*self._pristine.parameters(), *self._tensors()]}
        if any(torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in device_types):
            self.why_not_double = "autocast is on"
            return
        before = self._pristine, self._inputs, self.dtype
        try:
            self._pristine = copy.deepcopy(self._pristine).double()
            self._inputs = pytree.tree_map(_doubled, self._inputs)
            self.dtype = torch.float64
            try_step()
        except Exception as error:  # whatever the user's code raises, it does not run in float64
            self._pristine, self._inputs, self.dtype = before
            self.why_not_double = f"in float64 it raises {in_short(error)}"

    def working_copy(self) -> nn.Module:
        """Return a fresh copy in the user's state and mode, without gradients."""
        return copy.deepcopy(self._pristine)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """Return `(args, kwargs, leaves)`: fresh tensors, and by name the leaves that gradients reach."""
        leaves: dict[str, Tensor] = {}

        def fresh(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return _own(leaf)
            if not (leaf.requires_grad or (self._grad_inputs and leaf.is_floating_point())):
                return leaf.detach().clone()
            leaves[_input_name(path)] = leaf = leaf.detach().clone().requires_grad_(True)
            return leaf.clone()  # not the leaf itself, which would refuse in-place operations

        args, kwargs = pytree.tree_map_with_path(fresh, self._inputs)
        return args, kwargs, leaves

    def loss(self, output: Any) -> Tensor:
        """Return the scalar to differentiate.

        Raises:
            ValueError: if there is no loss in the output and nothing in it to project.
        """
        if self._loss is not None:
            return self._loss(output)
        own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not tensors and (stream := first_tensor(output)) is not None:
            tensors = [stream]
        if not tensors:
            raise ValueError(
                f"the output, a {type(output).__name__}, holds no tensor that needs a gradient; pass loss=, "
                "a function of the output that returns a scalar tensor."
            )
        return self._projection(tensors)

    def _projection(self, tensors: list[Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        total = tensors[0].new_zeros(())
        for t in tensors:
            direction = torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t.device, t.dtype)
            total = total + (t * direction).sum().to(total.device) / max(1, t.numel()) ** 0.5
        return total

    @property
    def modes(self) -> set[bool]:
        """The train/eval modes of the blocks."""
        return {self._pristine.get_submodule(name).training for name in self.block_names}

    def device_tensors(self) -> list[Tensor]:
        """Return one tensor per device that is involved."""
        found = {t.device: t for t in [*self._pristine.parameters(), *self._tensors()]}
        return list(found.values())

    def _tensors(self) -> Iterator[Tensor]:
        return (leaf for leaf in pytree.tree_leaves(self._inputs) if isinstance(leaf, Tensor))


@contextmanager
def gradients_put_aside(model: nn.Module) -> Iterator[None]:
    """Take the user's gradients off the parameters meanwhile.

    A copy made by deepcopy may still reach the original, through a closure set as a `forward`, for example.
    """
    aside = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in aside:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in aside:
            parameter.grad = gradient


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 (complex128), or in float32 on devices that have no more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32 if tensor.is_mps else torch.float64))


def in_short(error: BaseException, most: int = 240) -> str:
    """Return an exception's type and the beginning of its text, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:most]}{'...' if len(text) > most else ''}"


def _copy_of(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise TypeError(
            f"abyssal.testing works on a copy, and copy.deepcopy of this {type(model).__name__} raises "
            f"{in_short(error)}. Tensors that are the result of a computation cannot be copied, nor can open "
            "files or locks: build the model anew and check it before it has run, or leave these out."
        ) from error


def _own(leaf: Any) -> Any:
    try:
        return copy.deepcopy(leaf)  # a cache, a generator: each run begins with it as the user gave it
    except Exception:
        return leaf


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _doubled(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().double().requires_grad_(leaf.requires_grad)
    return leaf


def _dtype_of(model: nn.Module, inputs: Any) -> torch.dtype:
    tensors = [*model.parameters(), *(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))]
    floating = [t.dtype for t in tensors if t.is_floating_point()]
    return max(floating, key=lambda d: torch.finfo(d).eps, default=torch.get_default_dtype())


def _input_name(path: Any) -> str:
    _, key, *below = path
    name = f"argument {key.idx}" if hasattr(key, "idx") else f"argument {key.key!r}"
    return name + pytree.keystr(below)
