"""Some cells of a grid as one batched network: states, gradients and updates, layer by layer.

Layout. Everything is [cells, features, batch] or [cells, out, in], and residual weights are [depth, cells, out, in]: a
layer is then one batched product of contiguous matrices whose inner dimension is the batch, on which small products
run fastest (75 against 45 GFLOP/s of one core at width 30).

Scale. ReLU is positively homogeneous, so `h + s V relu(W h)` is `h + (f V) relu((f W) h)` with `f = sqrt(s)`, and
`h + s V relu(h)` is `h + (f V) relu(h)` with `f = s`. `f V` is what is kept: scales cost nothing in the loop, and
rounding is all that differs.

Memory. Only the states at the start of every segment of layers are kept; a segment's are computed anew from its
start, with the very operations of the first time, when the backward pass comes to it. That is exact, and costs one
forward pass more. Inverting layers instead (:class:`abyssal.Reverse`) would cost as much and be inexact; a layer's
gradient is multiplied out and applied to its weight at once, so that no gradient is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.nn.grid.updates import Schedule, Update

__all__ = ["Block", "Loss", "Workspace", "cross_entropy", "squared_error"]

# outputs [cells, outputs, batch], targets -> losses [cells], and their gradients by the outputs
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_mask_ = torch.ops.aten.threshold_backward.grad_input


def cross_entropy(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of each cell, and its gradient by the outputs.

    Args:
        outputs: [cells, classes, batch]
        labels: [batch], integers
    """
    log_odds = torch.log_softmax(outputs, 1)
    index = labels.expand(len(outputs), 1, -1)
    losses = -log_odds.gather(1, index).mean((1, 2))
    gradient = log_odds.exp_().scatter_add_(1, index, outputs.new_full((1, 1, 1), -1.0).expand(index.shape))
    return losses, gradient.div_(len(labels))


def squared_error(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of each cell, and its gradient by the outputs.

    Args:
        outputs: [cells, outputs, batch]
        targets: [batch, outputs]
    """
    off = outputs - targets.T
    return off.square().mean((1, 2)), off.mul_(2 / targets.numel())


class Workspace:
    """Memory that the blocks of a grid take turns in.

    Args:
        depth: number of layers.
        segment: layers whose states are held at a time.
        like: of the dtype and the device.
    """

    def __init__(self, depth: int, segment: int, like: Tensor) -> None:
        self.depth, self.segment = depth, segment
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor with anything in it; what was taken under that name before is overwritten."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
                flat = self._flat[name] = self._like.new_empty(size)
        return flat[:size].view(shape)

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(flat.nbytes for flat in self._flat.values())


@dataclass
class Block:
    """Cells that are computed together.

    Attributes:
        cells: their indices in the grid.
        factor: residual weights are multiplied by it. [cells]
        stem: [cells, width, features]
        head: [cells, outputs, width]
        layers: the residual weights: outer, or inner and outer. [depth, cells, width, width] each
        moments: those of stem, head and layers, in that order.
    """

    cells: list[int]
    factor: Tensor
    stem: Tensor
    head: Tensor
    layers: list[Tensor]
    moments: list[list[Tensor]]

    def pick(self, slots: list[int]) -> Block:
        """Return a block of some of the cells."""
        index = torch.tensor(slots, dtype=torch.int64, device=self.stem.device)
        return self._made([self.cells[slot] for slot in slots], lambda axis, t: t.index_select(axis, index))

    def join(self, other: Block) -> Block:
        """Return a block of the cells of both."""
        return self._made(self.cells + other.cells, lambda axis, *both: torch.cat(both, axis), other)

    def _made(self, cells: list[int], make: Callable[..., Tensor], *others: Block) -> Block:
        """Return a block whose tensors are made of the axis of the cells and the tensors of this block and others."""
        blocks = (self, *others)
        ends = zip(*((block.factor, block.stem, block.head) for block in blocks), strict=True)
        factor, stem, head = (make(0, *tensors) for tensors in ends)
        layers = [make(1, *tensors) for tensors in zip(*(block.layers for block in blocks), strict=True)]
        moments = [
            [make(0 if n < 2 else 1, *tensors) for tensors in zip(*held, strict=True)]
            for n, held in enumerate(zip(*(block.moments for block in blocks), strict=True))
        ]
        return Block(cells, factor, stem, head, layers, moments)

    def outputs(self, x: Tensor, space: Workspace) -> Tensor:
        """Return the outputs, [cells, outputs, batch].

        Args:
            x: [batch, features]
            space: to work in.
        """
        state = self._enter(x, space)
        with torch.inference_mode():
            scratch = space.take("scratch", *state.shape)
            for weights in zip(*(layer.unbind(0) for layer in self.layers), strict=True):
                _advance(state, weights, scratch)
        return torch.bmm(self.head, state)

    def forward(self, x: Tensor, targets: Tensor, loss: Loss, space: Workspace) -> tuple[Tensor, Tensor]:
        """Return losses and their gradients by the outputs, and leave what `backward` needs in the workspace."""
        with torch.inference_mode():
            state = self._enter(x, space)
            scratch = space.take("scratch", *state.shape)
            starts = range(0, space.depth, space.segment)
            kept = space.take("starts", len(starts), *state.shape).unbind(0)
            layers = [layer.unbind(0) for layer in self.layers]
            for start, keep in zip(starts, kept, strict=True):
                keep.copy_(state)
                if start == starts[-1]:  # the backward pass begins here: hold its states at once
                    self._hold(start, state, space)
                    break
                for n in range(start, start + space.segment):
                    _advance(state, [layer[n] for layer in layers], scratch)
            return loss(torch.bmm(self.head, state), targets)

    def backward(self, x: Tensor, gradient: Tensor, plan: Schedule, update: Update, space: Workspace) -> None:
        """Update all weights by the gradient of the outputs, after `forward` on the same batch.

        Args:
            x: [batch, features]
            gradient: of the losses by the outputs. [cells, outputs, batch]
            plan: of this step.
            update: the rule.
            space: that of `forward`.
        """
        with torch.inference_mode():
            state = space.take("state", len(self.cells), self.stem.shape[1], len(x))
            gradient.mul_(plan.top)
            down = torch.bmm(self.head.transpose(1, 2), gradient, out=space.take("down", *state.shape)).mul_(plan.lift)
            by_head = torch.bmm(gradient, state.transpose(1, 2))
            starts = range(0, space.depth, space.segment)
            kept = space.take("starts", len(starts), *state.shape).unbind(0)
            for start, keep in zip(reversed(starts), reversed(kept), strict=True):
                if start != starts[-1]:
                    state.copy_(keep)
                    self._hold(start, state, space)
                self._descend(start, down, plan, update, space)
            by_stem = torch.mm(down.div_(plan.lift).view(-1, len(x)), x).view(self.stem.shape)
            for weight, moments, by in zip((self.stem, self.head), self.moments, (by_stem, by_head), strict=False):
                update.apply(weight, moments, by, plan.ends, plan.floor, torch.empty_like(weight))

    def _enter(self, x: Tensor, space: Workspace) -> Tensor:
        cells, width, features = self.stem.shape
        state = space.take("state", cells, width, len(x))
        torch.mm(self.stem.view(-1, features), x.T, out=state.view(-1, len(x)))
        return state

    def _hold(self, start: int, state: Tensor, space: Workspace) -> None:
        """Go through one segment and hold what its products were made of."""
        stop = min(start + space.segment, space.depth)
        after = space.take("rectified", space.segment, *state.shape).unbind(0)
        layers = [layer[start:stop].unbind(0) for layer in self.layers]
        if len(layers) == 1:
            for outer, rectified in zip(layers[0], after, strict=False):
                _advance(state, [outer], rectified)
            return
        before = space.take("before", space.segment, *state.shape).unbind(0)
        for inner, outer, old, rectified in zip(*layers, before, after, strict=False):
            old.copy_(state)
            _advance(state, [inner, outer], rectified)

    def _descend(self, start: int, down: Tensor, plan: Schedule, update: Update, space: Workspace) -> None:
        """Take the gradient down through one segment, updating each layer's weights after they were used."""
        stop = min(start + space.segment, space.depth)
        weights = [layer[start:stop].unbind(0) for layer in self.layers]
        turned = [layer[start:stop].transpose(2, 3).unbind(0) for layer in self.layers]
        moments = [[t[start:stop].unbind(0) for t in ts] for ts in self.moments[2:]]
        held = space.take("rectified", space.segment, *down.shape)
        after, after_rows = held.unbind(0), held.transpose(2, 3).unbind(0)
        before_rows: tuple[Tensor, ...] = ()
        if len(weights) == 2:
            before_rows = space.take("before", space.segment, *down.shape).transpose(2, 3).unbind(0)
        hidden = space.take("scratch", *down.shape)
        by = space.take("gradient", *weights[0][0].shape)
        work = space.take("work", *by.shape)
        for n in reversed(range(stop - start)):
            torch.bmm(turned[-1][n], down, out=hidden)
            mine = [m[n] for m in moments[-1]]
            update.apply_product(weights[-1][n], mine, down, after_rows[n], plan, by, work)
            _mask_(hidden, after[n], 0, grad_input=hidden)
            if before_rows:
                down.baddbmm_(turned[0][n], hidden)
                mine = [m[n] for m in moments[0]]
                update.apply_product(weights[0][n], mine, hidden, before_rows[n], plan, by, work)
            else:
                down.add_(hidden)


def _advance(state: Tensor, weights: list[Tensor] | tuple[Tensor, ...], rectified: Tensor) -> None:
    """Go through one layer, in place; `rectified` is given what its outer weight multiplies."""
    if len(weights) == 1:
        torch.clamp_min(state, 0, out=rectified)
    else:
        torch.bmm(weights[0], state, out=rectified).relu_()
    state.baddbmm_(weights[-1], rectified)
