"""Many small residual networks of one shape, trained as one batched network.

A study of small networks (exponents x Hurst indices x learning rates x seeds) trains hundreds of them, each so small
that a layer costs less than calling it. Here every layer is one batched product over cells, and each cell is trained
as it would be alone: its own learning rate, its own loss, the minibatches shared by all. Cells that diverge are
taken out as soon as they do.

Source: the networks are res-1 and res-3 of Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from abyssal.nn.grid.block import Block, Loss, Workspace, cross_entropy, squared_error
from abyssal.nn.grid.updates import Adam, Update
from abyssal.nn.stack import ResidualStack
from abyssal.util.checks import instance, one_of, whole

__all__ = ["Failure", "GridWeights", "ResidualGrid"]

LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": squared_error}

_AT_ONCE = 2**16  # elements of a state: more leaves a core's cache, fewer make calls cost more than what they do
_HOLD_ALL = 64 * 2**20  # bytes of states that are held rather than computed twice
_LEAST_SCALE = 1e-12  # its square, times a learning rate, has to be a number of float32


@dataclass(frozen=True)
class Failure:
    """Why a cell is trained no further.

    Attributes:
        step: at which its loss was so, counted from 1. Its weights are those it had then.
        loss: not finite, or larger than the grid's limit.
    """

    step: int
    loss: float


@dataclass(frozen=True)
class GridWeights:
    """The weights of one cell.

    Attributes:
        stem: [width, features]
        outer: V, outside the ReLU. [depth, width, width]
        head: [outputs, width]
        inner: W, inside the ReLU; None for res-1. [depth, width, width]
    """

    stem: Tensor
    outer: Tensor
    head: Tensor
    inner: Tensor | None = None


class ResidualGrid:
    """A grid of residual networks without biases, and their training.

    Cell c computes `h_0 = stem x`, then depth times `h <- h + s V relu(h)` (res-1) or `h <- h + s V relu(W h)` (res-3,
    when `inner` is given), with its own `s = scale[c]` and weights, and outputs `head h`. Every weight is trained.
    Up to rounding, losses and weights are those of the cell trained alone with `torch.optim`.

    Memory: the weights (and two more of their size for Adam, none for SGD), and of the residual stream
    `depth / segment + segment` states (res-3: `2 segment`) of `cells_at_once` cells, where autograd holds
    `2 depth` (res-3: `3 depth`) of all cells.

    Args:
        stem: first matrices. [cells, width, features]
        outer: V of each layer. [cells, depth, width, width]; an expanded tensor will do where cells start equal.
        head: last matrices. [cells, outputs, width]
        inner: W of each layer, for res-3. [cells, depth, width, width]
        scale: of the residual branches, such as depth^-beta; one number or one for each cell. [cells]
        learning_rate: one number or one for each cell. [cells]
        update: the rule; None is `Adam()`. See :mod:`abyssal.nn.grid.updates`.
        loss: `"cross_entropy"` (targets: labels [batch]) or `"mse"` (targets: [batch, outputs]), means over the
            minibatch (and the outputs).
        largest_loss: a cell whose loss exceeds it, or is not finite, is taken out before the update. The default lies
            far above what training comes back from; `math.inf` leaves only those that are not finite.
        batch: the size of minibatches that is to be expected; only speed depends on it.
        cells_at_once: computed together; None chooses by `batch` and width, to stay within a core's cache.
        segment: layers whose states are held at a time in the backward pass, the others being computed anew, exactly.
            The square root of the depth holds least, `depth` holds all and computes nothing twice, which is up to a
            fifth faster; None is `depth` where that takes no more than 64 MiB, and else the square root.

    Raises:
        ValueError: for shapes that do not fit together, scales that are not positive, negative learning rates, or a
            loss that is unknown.
        TypeError: for weights that are no floating-point tensors of one dtype and device.
    """

    def __init__(
        self,
        stem: Tensor,
        outer: Tensor,
        head: Tensor,
        inner: Tensor | None = None,
        *,
        scale: float | Tensor | Sequence[float],
        learning_rate: float | Tensor | Sequence[float],
        update: Update | None = None,
        loss: str = "cross_entropy",
        largest_loss: float = 1e6,
        batch: int = 64,
        cells_at_once: int | None = None,
        segment: int | None = None,
    ) -> None:
        self.cells, self.depth, self.width = _check_weights(stem, outer, head, inner)
        one_of("loss", loss, LOSSES)
        if not largest_loss > 0:
            raise ValueError(f"largest_loss has to be positive, got {largest_loss}.")
        for name, number in (("batch", batch), ("cells_at_once", cells_at_once), ("segment", segment)):
            if number is not None:
                whole(name, number)
        self.update = instance("update", Adam() if update is None else update, Update, "a rule such as Adam() or Sgd()")
        self.largest_loss = largest_loss
        self.scale = self._each_cell(scale, outer, "scale")
        if not bool((self.scale >= _LEAST_SCALE).all()) or not bool(self.scale.isfinite().all()):
            raise ValueError(f"scale has to be finite and at least {_LEAST_SCALE:g}, got {self.scale.tolist()}.")
        self.learning_rate = learning_rate
        self.steps = 0
        self.failures: dict[int, Failure] = {}
        self._loss, self._name = LOSSES[loss], loss
        self._frozen: dict[int, Block] = {}
        self._at_once = min(self.cells, cells_at_once or max(1, _AT_ONCE // (self.width * batch)))
        states = self.depth * self._at_once * self.width * batch * outer.element_size() * (1 if inner is None else 2)
        held = segment or (self.depth if states <= _HOLD_ALL else math.isqrt(self.depth))
        self._space = Workspace(self.depth, min(self.depth, held), outer.new_empty(0))
        self._blocks = [self._block(stem, outer, head, inner, cells) for cells in self._split()]

    @property
    def learning_rate(self) -> Tensor:
        """Learning rates [cells]; set them (one number, or one for each cell) to follow a schedule."""
        return self._rates

    @learning_rate.setter
    def learning_rate(self, rates: float | Tensor | Sequence[float]) -> None:
        like = self.scale
        found = self._each_cell(rates, like, "learning_rate")
        if not bool((found >= 0).all()) or not bool(found.isfinite().all()):
            raise ValueError(f"learning_rate has to be finite and not negative, got {found.tolist()}.")
        self._rates = found

    @property
    def active(self) -> list[int]:
        """The cells that are still trained."""
        return sorted(cell for block in self._blocks for cell in block.cells)

    @property
    def stream_bytes(self) -> int:
        """What is held to compute with, besides weights and moments: states, and a layer's gradients."""
        return self._space.bytes

    @torch.no_grad()
    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """Take one training step of every cell.

        Args:
            x: the minibatch, for all cells. [batch, features]
            targets: labels [batch] or, for `"mse"`, numbers [batch, outputs].

        Returns:
            Losses before the update; NaN for cells that had failed before. [cells]

        Raises:
            ValueError: if the minibatch has another shape or dtype than the weights need.
        """
        self._check_batch(x, targets)
        self.steps += 1
        losses = x.new_full((self.cells,), math.nan)
        for n in range(len(self._blocks)):
            gradient = self._forward(n, x, targets, losses)
            if gradient is not None:
                block = self._blocks[n]
                plan = self.update.schedule(self._rates[block.cells], block.factor, self.steps)
                block.backward(x, gradient, plan, self.update, self._space)
        self._merge()
        return losses

    @torch.no_grad()
    def outputs(self, x: Tensor, batch: int = 256) -> Tensor:
        """Return what every cell makes of some samples, failed cells with the weights they failed at.

        Args:
            x: [n, features]
            batch: samples at a time.

        Returns:
            Outputs. [cells, n, outputs]
        """
        self._check_samples(x)
        return self._outputs(x, [*self._blocks, *self._frozen.values()], batch)

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the share of samples that each cell classifies rightly.

        Args:
            x: [n, features]
            labels: [n]

        Returns:
            Shares, in float64; NaN for cells that failed, or whose outputs are not finite. [cells]
        """
        self._check_samples(x)
        outputs = self._outputs(x, self._blocks)
        shares = (outputs.argmax(2) == labels).to(torch.float64).mean(1)
        shares[~outputs.isfinite().all(2).all(1)] = math.nan
        return shares

    @torch.no_grad()
    def weights(self, cell: int) -> GridWeights:
        """Return a copy of the weights of one cell, as they are now or were when it failed."""
        block, slot = self._find(cell)
        factor = block.factor[slot]
        layers = [layer[:, slot] / factor for layer in block.layers]
        inner = layers[0] if len(layers) == 2 else None
        return GridWeights(block.stem[slot].clone(), layers[-1], block.head[slot].clone(), inner)

    def module(self, cell: int) -> nn.Sequential:
        """Return one cell as an ordinary module: stem, :class:`ResidualStack`, head; with weights of its own."""
        found = self.weights(cell)
        branches = []
        for n in range(self.depth):
            before = [] if found.inner is None else [_linear(found.inner[n])]
            branches.append(nn.Sequential(*before, nn.ReLU(), _linear(found.outer[n])))
        stack = ResidualStack(branches, scale=float(self.scale[cell]))
        return nn.Sequential(_linear(found.stem), stack, _linear(found.head))

    def _outputs(self, x: Tensor, blocks: list[Block], batch: int = 256) -> Tensor:
        """Return what some cells make of samples, NaN for the others. [cells, n, outputs]."""
        outputs = (self._blocks or list(self._frozen.values()))[0].head.shape[1]
        found = x.new_full((self.cells, len(x), outputs), math.nan)
        for block in blocks:
            for start in range(0, len(x), batch):
                part = slice(start, start + batch)
                found[block.cells, part] = block.outputs(x[part], self._space).transpose(1, 2)
        return found

    def _forward(self, n: int, x: Tensor, targets: Tensor, losses: Tensor) -> Tensor | None:
        """Take a minibatch up a block, and again without cells that fail; return the gradient by the outputs."""
        while self._blocks[n].cells:
            block = self._blocks[n]
            found, gradient = block.forward(x, targets, self._loss, self._space)
            losses[block.cells] = found
            good = found.isfinite() & (found <= self.largest_loss)
            if bool(good.all()):
                return gradient
            for slot in (~good).nonzero().view(-1).tolist():
                cell = block.cells[slot]
                self.failures[cell] = Failure(self.steps, float(found[slot]))
                self._frozen[cell] = block.pick([slot])
                self._frozen[cell].moments = []
            self._blocks[n] = block.pick(good.nonzero().view(-1).tolist())
        return None

    def _merge(self) -> None:
        """Join blocks that have become small, so that calls stay few."""
        blocks = sorted((block for block in self._blocks if block.cells), key=lambda block: len(block.cells))
        while len(blocks) > 1 and len(blocks[0].cells) + len(blocks[1].cells) <= self._at_once:
            joined = blocks[0].join(blocks[1])
            blocks = sorted([joined, *blocks[2:]], key=lambda block: len(block.cells))
        if len(blocks) != len(self._blocks):
            self._blocks = blocks

    def _find(self, cell: int) -> tuple[Block, int]:
        for block in [*self._blocks, *self._frozen.values()]:
            if cell in block.cells:
                return block, block.cells.index(cell)
        raise ValueError(f"cell has to be a number from 0 to {self.cells - 1}, got {cell!r}.")

    def _split(self) -> list[list[int]]:
        """Cells in blocks of nearly equal size."""
        count = math.ceil(self.cells / self._at_once)
        bounds = [round(n * self.cells / count) for n in range(count + 1)]
        return [list(range(a, b)) for a, b in pairwise(bounds)]

    def _block(self, stem: Tensor, outer: Tensor, head: Tensor, inner: Tensor | None, cells: list[int]) -> Block:
        part = slice(cells[0], cells[-1] + 1)
        given = [outer] if inner is None else [inner, outer]
        factor = self.scale[part] if inner is None else self.scale[part].sqrt()
        layers = [(tensor[part].detach().transpose(0, 1) * factor.view(1, -1, 1, 1)).contiguous() for tensor in given]
        ends = [tensor[part].detach().clone(memory_format=torch.contiguous_format) for tensor in (stem, head)]
        moments = [[torch.zeros_like(t) for _ in range(self.update.moments)] for t in (*ends, *layers)]
        return Block(cells, factor, ends[0], ends[1], layers, moments)

    def _each_cell(self, value: float | Tensor | Sequence[float], like: Tensor, name: str) -> Tensor:
        found = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        if found.dim() > 1 or (found.dim() == 1 and len(found) != self.cells):
            raise ValueError(
                f"{name} has to be one number or {self.cells}, one for each cell; got {list(found.shape)}."
            )
        return found.expand(self.cells).clone()

    def _check_samples(self, x: Tensor) -> None:
        block = (self._blocks or list(self._frozen.values()))[0]
        features = block.stem.shape[2]
        if x.dim() != 2 or x.shape[1] != features or not len(x):
            raise ValueError(f"Samples have to be [batch, {features}], got {list(x.shape)}; flatten images first.")
        if x.dtype != block.stem.dtype or x.device != block.stem.device:
            raise ValueError(
                f"Samples have to be {block.stem.dtype} on {block.stem.device} like the weights, got {x.dtype} on "
                f"{x.device}."
            )

    def _check_batch(self, x: Tensor, targets: Tensor) -> None:
        self._check_samples(x)
        outputs = (self._blocks or list(self._frozen.values()))[0].head.shape[1]
        if self._name == "mse":
            if targets.shape != (len(x), outputs) or targets.dtype != x.dtype:
                raise ValueError(
                    f"Targets have to be [{len(x)}, {outputs}] and {x.dtype}, got {list(targets.shape)} and "
                    f"{targets.dtype}."
                )
        elif targets.shape != (len(x),) or targets.dtype != torch.int64:
            raise ValueError(
                f"Labels have to be [{len(x)}] and torch.int64, got {list(targets.shape)} and {targets.dtype}."
            )
        elif not 0 <= int(targets.min()) <= int(targets.max()) < outputs:
            raise ValueError(
                f"Labels have to be from 0 to {outputs - 1}, got {int(targets.min())} to {int(targets.max())}."
            )


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous())
    return layer


def _check_weights(stem: Tensor, outer: Tensor, head: Tensor, inner: Tensor | None) -> tuple[int, int, int]:
    """Return the numbers of cells and layers and the width."""
    given = {"stem": stem, "outer": outer, "head": head} | ({} if inner is None else {"inner": inner})
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} has to be a floating-point tensor, got {type(tensor).__name__}.")
        if tensor.dtype != outer.dtype or tensor.device != outer.device:
            raise TypeError(
                f"All weights have to be of one dtype and device; outer is {outer.dtype} on {outer.device}, {name} is "
                f"{tensor.dtype} on {tensor.device}."
            )
    if outer.dim() != 4 or outer.shape[2] != outer.shape[3] or not outer.numel():
        raise ValueError(f"outer has to be [cells, depth, width, width], got {list(outer.shape)}.")
    cells, depth, width, _ = outer.shape
    if inner is not None and inner.shape != outer.shape:
        raise ValueError(f"inner has to have the shape of outer, {list(outer.shape)}; got {list(inner.shape)}.")
    for name, tensor, axis, meaning in (("stem", stem, 1, "width, features"), ("head", head, 2, "outputs, width")):
        if tensor.dim() != 3 or len(tensor) != cells or tensor.shape[axis] != width or not tensor.numel():
            raise ValueError(
                f"{name} has to be [cells, {meaning}] with {cells} cells and width {width}, got {list(tensor.shape)}."
            )
    return cells, depth, width
