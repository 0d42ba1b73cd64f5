"""One call of one block, which can be run again at any input, as it was run then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from abyssal.models.arguments import Given, OtherArguments
from abyssal.models.call import first_tensor
from abyssal.models.surroundings import BufferWatch, Surroundings, gathered
from abyssal.util.layout import laid_out


class Runnable(Protocol):
    """What a call asks of the patch that stands in for its block."""

    name: str
    module: nn.Module
    watch: BufferWatch
    before: Callable[..., Any] | None


class Call:
    """One call of one block: see the module's head. Made before the call; holds nothing of its graph.

    Attributes:
        name: of the block.
        requires_grad: whether the stream did.
        strides: of the stream.
    """

    __slots__ = (
        "_block",
        "_forward",
        "_mutates",
        "_others",
        "_surroundings",
        "_version",
        "name",
        "requires_grad",
        "strides",
    )

    def __init__(self, block: Runnable, given: Given, x: Tensor, forward: Callable[..., Any]) -> None:
        """Take note of a call of a block's own `forward` with `given`, whose stream is `x`."""
        self._block, self.name, self._forward = block, block.name, forward
        alone = len(given.args) == 1 and not given.kwargs  # as a rule; flattening costs as much as a small layer
        self._others = None if alone else OtherArguments(given)
        self._surroundings = Surroundings(block.module, x, block.watch)
        self.strides, self._version, self.requires_grad = x.stride(), x._version, x.requires_grad
        self._mutates = False

    def settle(self, x: Tensor) -> int:
        """After the first run: let go of all that it did not use.

        Args:
            x: the stream that it was called with. [*stream]

        Returns:
            The bytes that running it again needs besides the stream: random states, buffers.
        """
        self._mutates = x._version != self._version
        # Under somebody else's forward (accelerate's), parameters come and go.
        return self._surroundings.settle(self._block.watch, parameters=self._block.before is None)

    def rerun(self, x: Tensor) -> Any:
        """Run the block with a graph, from a leaf of the value `x`, and return its output. [*stream]."""
        _, (args, kwargs) = self.opened(x)
        return self._surroundings.run(self._forward, args, kwargs, self.name, caching=True)

    def opened(self, x: Tensor) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return a leaf of the value `x`, laid out as the stream was, and the arguments with it. [*stream]."""
        leaf = (x if x.stride() == self.strides else laid_out(x, self.strides)).detach()
        if self.requires_grad:
            leaf.requires_grad_(True)
        # A leaf that needs gradients refuses in-place operations; x stays whole.
        stream = laid_out(leaf, self.strides, copy=True) if self._mutates else leaf
        return leaf, self._arguments(stream)

    def _arguments(self, stream: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((stream,), {}) if self._others is None else self._others.with_stream(stream, self.name)

    def run_opened(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block with a graph on arguments that `opened` returned, autocast's cache left alone."""
        with torch.enable_grad():
            return self._surroundings.run(self._forward, args, kwargs, self.name, caching=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the block at `x` without a graph (policy.Evaluation)."""
        output = first_tensor(self._evaluate(self._forward, x))
        assert output is not None
        return output

    def advance(self, x: Tensor) -> Tensor:
        """Run the block as `rerun` does, keep nothing of the graph, and return the stream that comes out. [*stream].

        With a graph, since without one some modules take other kernels, whose results differ.
        """
        _, (args, kwargs) = self.opened(x)
        dropped = saved_tensors_hooks(_dropped, _dropped)
        with torch.enable_grad(), dropped, gathered(self._block.module):
            output = first_tensor(self._surroundings.run(self._forward, args, kwargs, self.name, caching=False))
        assert output is not None
        return output.detach()

    def reverse_step(self, y: Tensor) -> Tensor | None:
        """The block's own estimate of its input from its output, if it offers one (policy.Evaluation)."""
        if not callable(getattr(type(self._block.module), "reverse_step", None)):
            return None
        estimate = first_tensor(self._evaluate(self._block.module.reverse_step, y))
        if estimate is None or estimate.shape != y.shape or estimate.dtype != y.dtype:
            found = "nothing" if estimate is None else f"{list(estimate.shape)} of {estimate.dtype}"
            raise RuntimeError(
                f"block {self.name!r} has a method reverse_step, by which abyssal.Reverse estimates its input "
                f"from its output, and it returned {found} for an output of shape {list(y.shape)} and {y.dtype}. If "
                "it means something else, rename it or give the block another policy."
            )
        return estimate

    def _evaluate(self, function: Any, x: Tensor) -> Any:
        stream = laid_out(x, self.strides, copy=self._mutates).detach()
        args, kwargs = self._arguments(stream)
        # A block may switch gradients on for itself; what it saves then is not the frame's to catch.
        shield = saved_tensors_hooks(_as_it_is, _as_it_is)
        try:
            with torch.no_grad(), shield, gathered(self._block.module):
                return self._surroundings.run(function, args, kwargs, self.name, caching=False)
        except Exception as error:
            error.add_note(
                f"abyssal: while block {self.name!r} was run without a graph, to restore its input. If its forward "
                "needs gradients itself, give it the policy abyssal.Keep()."
            )
            raise


def _dropped(_: object) -> Any:
    return None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
