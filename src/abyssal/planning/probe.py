"""The calls of a model's blocks on one batch, captured so that each can be differentiated again at other inputs.

A probe stands in for a block's `forward`. In the forward pass it notes what the call was given; in the backward
pass, once the gradient with respect to the block's output is known, it hands the call and that cotangent to
whoever measures. The model's own gradient is checkpointed in between, so that memory stays that of checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from abyssal.codec.sample import Sample, is_dense, norms, sample_count
from abyssal.engine.block import Block, why_not_restorable
from abyssal.engine.linking import Linker
from abyssal.engine.policy import Keep, Policy, Reverse
from abyssal.models.arguments import Given
from abyssal.models.call import first_tensor
from abyssal.models.replay.call import Call
from abyssal.models.replay.frame import run_with_frame
from abyssal.profiling.phases import needing, now

Cotangents = Sequence[Tensor | None]


class Gradients(NamedTuple):
    """One vector-Jacobian product of one call.

    Attributes:
        state: with respect to the stream and the other arguments; None where nothing came.
        weights: with respect to the block's parameters.
        output: the block's output. [*stream]
    """

    state: list[Tensor | None]
    weights: list[Tensor | None]
    output: Tensor


class Captured:
    """All calls of one forward pass, in order, and how they are linked."""

    def __init__(self, measure: Callable[[ProbedCall, Cotangents], None]) -> None:
        """Begin with no call; `measure` is called for each in the backward pass, last first."""
        self.measure = measure
        self.calls: list[ProbedCall] = []
        self.ends: Linker[ProbedCall] = Linker()
        self.failure: Exception | None = None

    def begin(self, call: ProbedCall, stream: Tensor) -> None:
        """Take note of a call, and of the one that it continues."""
        before: Any = self.ends.match(stream)
        if before is not None:
            call.previous, before.next = before, call
        self.calls.append(call)

    def chains(self) -> list[list[ProbedCall]]:
        """Return the chains, each from its first call to its last."""
        chains = []
        for call in self.calls:
            if call.previous is None:
                chains.append([call])
                while (following := chains[-1][-1].next) is not None:
                    chains[-1].append(following)
        return chains


class ProbedCall(Call):
    """One call of one block.

    Attributes:
        probe: what stands in for the block.
        x: its exact input, private. [*stream]
        previous, next: the calls that it is linked with, output to input.
        misfit: why its input cannot be restored from the output, or nothing.
        one_way: why the block cannot be inverted, or nothing.
        surroundings_bytes: what running it again needs besides the stream.
        forward_seconds, backward_seconds: of every evaluation with a graph so far.
    """

    def __init__(self, probe: Probe, given: Given, x: Tensor) -> None:
        """Take note of a call of `probe.module`."""
        super().__init__(probe, given, x, probe.inner)
        self.probe, self.x = probe, x.detach().clone()
        self.previous: ProbedCall | None = None
        self.next: ProbedCall | None = None
        self.misfit = self.one_way = ""
        self.surroundings_bytes = 0
        self.forward_seconds: list[float] = []
        self.backward_seconds: list[float] = []
        self._output: Sample | None = None

    def returned(self, output: Any) -> None:
        """After the first run."""
        result = first_tensor(output)
        self.misfit = why_not_restorable(Keep(), self.x, result)
        self.one_way = self.misfit or why_not_restorable(Reverse(), self.x, result)
        if result is not None and is_dense(result):
            self._output = Sample(result, sample_count(result.numel()), len(self.name))

    def differentiate(self, s: Tensor, cotangents: Cotangents) -> Gradients:
        """Return the vector-Jacobian product of the call with its input replaced by `s`.

        Args:
            s: in place of the input. [*stream]
            cotangents: the loss's gradient with respect to each tensor of the output that needs one.
        """
        stream, (args, kwargs) = self.opened(s)
        others = {id(t): t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_leaf}
        inputs = [t for t in {id(stream): stream, **others}.values() if t.requires_grad]
        weights = [p for p in self.probe.module.parameters() if p.requires_grad]
        begin = now(s.device)
        output = self.run_opened(args, kwargs)
        middle = now(s.device)
        pairs = [(t, a) for t, a in zip(needing(output), cotangents, strict=True) if a is not None]
        found = torch.autograd.grad(
            [t for t, _ in pairs], [*inputs, *weights], [a for _, a in pairs], allow_unused=True
        )
        self.forward_seconds.append(middle - begin)
        self.backward_seconds.append(now(s.device) - middle)
        result = first_tensor(output)
        assert result is not None
        return Gradients(list(found[: len(inputs)]), list(found[len(inputs) :]), result.detach())

    def activation_bytes(self) -> int:
        """Return what plain autograd keeps for this call: the storages it saves, less parameters and arguments."""
        stream, (args, kwargs) = self.opened(self.x)
        theirs = [*self.probe.module.parameters(), *self.probe.module.buffers()]
        theirs += [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t is not stream]
        outside = {t.untyped_storage()._cdata for t in theirs if t is not stream}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in outside:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.run_opened(args, kwargs)
        del output
        return sum(saved.values())

    def reproduces(self, output: Tensor) -> float | None:
        """Return the relative difference of a recomputed output from the true one, of a sample; None unsampled."""
        if self._output is None:
            return None
        ((_, pair),) = norms([self._output], [self._output.take(output)])
        wrong, size = pair[0].tolist()
        return 0.0 if wrong == 0.0 else wrong / size if size else float("inf")


class Probe(Block):
    """A block's `forward` while its model is measured."""

    captured: Captured
    routing = ""  # in words, where the block routes discretely
    kinks = ""  # in words, where its gradient jumps with its input

    def _stored(self, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor | None, why: str) -> Any:
        self.note = f"can only be stored: {why}"
        return self.inner(*args, **kwargs)

    def _recomputed(self, policy: Policy, given: Given, stream: Tensor) -> Any:
        call = ProbedCall(self, given, stream)
        self.captured.begin(call, stream)
        with self._watching():
            first = partial(self.inner, *given.args, **given.kwargs)
            output = run_with_frame(first, partial(call.rerun, call.x), self.name, stream)
        why, routes = self.watched.verdicts[self.module.training]
        self.routing, self.kinks = (why, "") if routes else ("", why)
        call.surroundings_bytes = call.settle(stream)
        call.returned(output)
        outputs = needing(output)
        if outputs:
            torch.autograd.graph.register_multi_grad_hook(outputs, _measuring(self.captured, call))
        if not call.misfit:
            result = first_tensor(output)
            assert result is not None
            self.captured.ends.open(call, result)
        return output


def _measuring(captured: Captured, call: ProbedCall) -> Callable[[Cotangents], None]:
    def measure(cotangents: Cotangents) -> None:
        if captured.failure is None:
            try:
                captured.measure(call, cotangents)
            except Exception as error:
                captured.failure = error
                raise

    return measure
