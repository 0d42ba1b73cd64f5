"""The depth coordinate check: a few steps at several depths say whether a network's scaling is stable in depth.

What muP's coordinate check does for width: train for a few steps at each size, and see that nothing grows or
vanishes with it. Here a network of depth L is looked at where the limit of large depth decides: the residual
stream at initialisation, the output, and how far a step moves both. A rule of depth is right if all of these are
of order 1 in L; the power of L each of them follows is fitted.

**The threshold.** If a step of a given learning rate moves the output as `L^p`, the rate has to go as `L^-p` to keep
that motion. Over depths a factor R apart it moves by less than a factor of 2 if `|p| < log 2 / log R`. The powers that
theory knows are multiples of 1/2, so `|p| < 1/4` besides: nearer to 0 than to 1/2. A quantity is stable where the
whole 95 % interval of its power lies within the smaller of the two, unstable where its power lies outside and the
interval does not hold 0, and undecided else. Of the stream's size at initialisation only growth counts: where
branches vanish with depth, as under CompleteP, it falls to the size of what came in, and no further.

Sources: the check in width is of Yang et al. 2022, arXiv 2203.03466 (appendix D.1); the same in depth, Dey et al.
2025, arXiv 2505.01618 (section 4). Quantities, fit and threshold are ours.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.models.branches import wrapped_core
from abyssal.models.find import Blocks, resolve_blocks
from abyssal.scaling.rules.base import Rule
from abyssal.scaling.transfer.check_result import DepthCheck
from abyssal.scaling.transfer.recorder import Trace, rms, trace
from abyssal.scaling.transfer.short_runs import (
    Build,
    Loss,
    Recipe,
    check_depths,
    check_seeds,
    example_at,
    loss_of,
    recipe,
)
from abyssal.scaling.transfer.sizes import Run
from abyssal.util.checks import positive, whole
from abyssal.util.progress import Progress, silent
from abyssal.util.randomness import seeded

__all__ = ["DepthCheck", "depth_check"]


def depth_check(
    build_model: Build,
    depths: Sequence[int] = (8, 16, 32, 64),
    rule: str | Rule | None = None,
    batch: Any = None,
    *,
    loss: Loss | None = None,
    steps: int = 4,
    lr: float = 1e-3,
    seeds: int | Sequence[int] = 3,
    base_depth: int | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    blocks: Blocks | None = None,
    whole_blocks: bool = False,
    progress: Progress | None = None,
) -> DepthCheck:
    """Train a network at several depths for a few steps, and say whether its scaling is stable in depth.

    Args:
        build_model: makes a fresh network of a depth from torch's random state.
        depths: at least three; a factor of 2 apart, and a factor of 8 in all, tell powers of the depth apart.
        rule: of depth, by name or as an object, applied to every network; None leaves them as they are.
        batch: what the network is called with: a mapping of keyword arguments, a tuple of positional ones, or one
            tensor; or a function of the step (from 0) that returns one of these, or an `abyssal.models.Example`
            with a loss of its own. The output and the stream are looked at on the first one.
        loss: makes a scalar of the model's output; None takes the output's `loss`, or the output if it is a scalar.
        steps: of the optimiser, without warm-up. A few: the check is of how far steps move the network.
        lr: base learning rate. One at which a step moves the output by a part of its size.
        seeds: of the weights: a number of them, or the seeds.
        base_depth: for rules that are relative to one; None is the least of `depths`.
        optimizer: "adamw" or "sgd".
        weight_decay: of the base network.
        blocks: as in `abyssal.scaling.apply`.
        whole_blocks: as there.
        progress: called with a phase, trainings done and trainings in all.

    Returns:
        The records, the powers of depth with their intervals, and a verdict.

    Raises:
        TypeError, ValueError: for bad arguments, before any work.
        NoBlocksError, UnreadableModelError: for a model whose blocks or branches cannot be found.
    """
    deep = check_depths(depths, 3)
    chosen = check_seeds(seeds)
    whole("steps", steps)
    positive("lr", lr)
    how = recipe(build_model, deep, rule, base_depth, optimizer, weight_decay, batch, loss, blocks, whole_blocks)
    if batch is None:
        raise ValueError("batch is missing: give what the network is called with, such as batch=dict(input_ids=...).")
    example_at(batch, 0)
    report = progress or silent
    total = len(deep) * len(chosen)
    report("depth check", 0, total)
    runs = []
    for depth in deep:  # shallow ones first: what is wrong shows soon
        for seed in chosen:
            runs.append(_train(how, depth, seed, steps, lr))
            report("depth check", len(runs), total)
    return DepthCheck(how.rule.name, deep, chosen, steps, lr, optimizer, tuple(runs))


def _train(how: Recipe, depth: int, seed: int, steps: int, lr: float) -> Run:
    with seeded(seed):
        model = how.model(depth)
        groups = how.groups(model, lr)
        blocks = {name: wrapped_core(block) for name, block in resolve_blocks(model, how.blocks).items()}
        look = lambda: trace(model, blocks, example_at(how.batch, 0).batch)  # noqa: E731
        first = look()
        if not first.after:
            names = ", ".join(map(repr, list(blocks)[:3]))
            raise ValueError(
                f"None of the blocks {names} was called with a floating-point tensor whose shape it keeps, so there "
                "is no residual stream to look at. Name the blocks: blocks=[...]."
            )
        inside = {id(p) for block in blocks.values() for p in block.parameters()}
        outside = [(p, p.detach().clone()) for p in model.parameters() if id(p) not in inside]
        optimizer = how.optimizer_for(groups)
        losses, moved, by_blocks, last = [], [], [], first
        for step in range(steps):
            loss = loss_of(model, example_at(how.batch, step), how.loss)
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = look()
            moved.append(rms(last.output - first.output))
            with _holding(outside):
                by_blocks.append(rms(look().output - first.output))
            if not (math.isfinite(losses[-1]) and last.is_finite):
                break
    return _run(depth, seed, first, last, losses, moved, by_blocks, steps)


def _run(
    depth: int,
    seed: int,
    first: Trace,
    last: Trace,
    losses: list[float],
    moved: list[float],
    by_blocks: list[float],
    steps: int,
) -> Run:
    diverged = not (all(map(math.isfinite, losses)) and first.is_finite and last.is_finite)
    fill = lambda values: tuple(values) + (math.inf,) * (steps - len(values))  # noqa: E731
    return Run(
        depth=depth,
        seed=seed,
        losses=fill(losses),
        stream=tuple(_ratio(after, first.before[0]) for after in first.after),
        increment=tuple(_ratio(i, h) for i, h in zip(first.increments, first.before, strict=True)),
        increment_after=tuple(_ratio(i, h) for i, h in zip(last.increments, last.before, strict=True)),
        stream_change=tuple(_ratio(a - b, b) for a, b in zip(last.after, first.after, strict=True)),
        branch_change=tuple(_ratio(a - b, b) for a, b in zip(last.increments, first.increments, strict=True)),
        output=rms(first.output),
        output_moved=fill(moved),
        blocks_moved=fill(by_blocks),
        diverged=diverged,
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Return the size of one tensor by another's: nan where that is 0."""
    size, unit = rms(part), rms(whole)
    return size / unit if unit > 0 else math.nan


@contextlib.contextmanager
def _holding(values: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Put values into parameters for a `with` block."""
    own = [(p, p.detach().clone()) for p, _ in values]
    _put(values)
    try:
        yield
    finally:
        _put(own)


@torch.no_grad()
def _put(values: list[tuple[nn.Parameter, Tensor]]) -> None:
    for p, value in values:
        p.copy_(value)
