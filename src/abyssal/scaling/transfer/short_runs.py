"""Short trainings of a network at several depths: what they share, and what is checked before any of them.

A network is built afresh for every depth and seed, from torch's random state, which is put back afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from abyssal.models.batches import Example
from abyssal.models.branches import wrapped_core
from abyssal.models.call import Loss, call, scalar_loss
from abyssal.models.find import Blocks, resolve_blocks
from abyssal.scaling.rules.application import apply
from abyssal.scaling.rules.base import Optimizer, Rule
from abyssal.scaling.rules.known import NoRule
from abyssal.scaling.rules.known import rule as rule_by_name
from abyssal.util.checks import number, one_of, positive, whole

__all__ = [
    "Build",
    "Loss",
    "Recipe",
    "accepts",
    "check_depths",
    "check_rates",
    "check_seeds",
    "example_at",
    "loss_of",
    "recipe",
]

T = TypeVar("T")
Build = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Recipe:
    """How the network of one depth is made and trained.

    Attributes:
        build: makes a fresh network of a depth.
        rule: applied to it; `NoRule` leaves it as it is, without reading it.
        base_depth: argument of `build` for which the rule changes nothing relative to a base.
        optimizer: "adamw" or "sgd".
        weight_decay: of the base network.
        batch: one batch, or a function of the step, or None.
        loss: makes a scalar of the output; None takes its `loss`.
        blocks: as in `abyssal.scaling.apply`.
        whole_blocks: as there.
    """

    build: Build
    rule: Rule
    base_depth: int
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.0
    batch: Any = None
    loss: Loss | None = None
    blocks: Blocks | None = None
    whole_blocks: bool = False

    def model(self, depth: int) -> nn.Module:
        """Build the network of a depth, from the random state as it is.

        Raises:
            TypeError: if that gives no module.
        """
        model = self.build(depth)
        if not isinstance(model, nn.Module):
            raise TypeError(f"build_model({depth}) returned a {type(model).__name__}; expected a torch.nn.Module.")
        return model.train()

    def groups(self, model: nn.Module, rate: float) -> list[dict[str, Any]]:
        """Apply the rule to a fresh model, and return the optimiser's groups at a base learning rate."""
        if isinstance(self.rule, NoRule):
            parameters = [p for p in model.parameters() if p.requires_grad]
            return [{"params": parameters, "lr": rate, "weight_decay": self.weight_decay}]
        base = self._base_blocks() if self.rule.relative else None
        batch = None if self.batch is None else example_at(self.batch, 0).batch
        scaled = apply(
            model, self.rule, base_depth=base, batch=batch, blocks=self.blocks, whole_blocks=self.whole_blocks
        )
        return scaled.parameter_groups(rate, self.weight_decay, optimizer=self.optimizer)

    def _base_blocks(self) -> int:
        """Return how many blocks the base network has: `build` may count its depth in something else."""
        with torch.random.fork_rng(devices=[]):
            blocks = resolve_blocks(self.build(self.base_depth), self.blocks)
        return len({id(wrapped_core(block)) for block in blocks.values()})

    def optimizer_for(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimiser over groups."""
        return torch.optim.AdamW(groups) if self.optimizer == "adamw" else torch.optim.SGD(groups)


def recipe(
    build: Build,
    depths: Sequence[int],
    rule: str | Rule | None,
    base_depth: int | None,
    optimizer: str,
    weight_decay: float,
    batch: Any,
    loss: Loss | None,
    blocks: Blocks | None,
    whole_blocks: bool,
) -> Recipe:
    """Check what a user gave, and put it together.

    Raises:
        TypeError, ValueError: naming what is wrong.
    """
    if not callable(build) or isinstance(build, nn.Module):
        given = "a model" if isinstance(build, nn.Module) else repr(build)
        raise TypeError(
            f"build_model has to be a function of the depth that returns a fresh model, got {given}. For example: "
            "build_model=lambda depth: GPT(layers=depth)."
        )
    kind = cast("Optimizer", one_of("optimizer", optimizer, ("adamw", "sgd")))
    number("weight_decay", weight_decay, 0)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss has to be a function of the model's output, got {loss!r}.")
    base = whole("base_depth", min(depths) if base_depth is None else base_depth)
    return Recipe(build, rule_by_name(rule), base, kind, weight_decay, batch, loss, blocks, whole_blocks)


def check_depths(depths: Sequence[int], least: int) -> tuple[int, ...]:
    """Return depths in ascending order.

    Raises:
        ValueError: unless there are `least` different ones, all whole numbers of at least 1.
    """
    return _different("depths", depths, whole, least, "[8, 16, 32, 64]")


def check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Return the seeds: 0 to n - 1 where a number is given.

    Raises:
        ValueError: for none, a repeated one, or what is no seed.
    """
    given = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    if not isinstance(given, Sequence) or not given or len(set(given)) != len(given):
        raise ValueError(f"seeds has to be a number of at least 1, or different seeds; got {seeds!r}.")
    return tuple(whole("seeds", seed, 0) for seed in given)


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Return learning rates in ascending order.

    Raises:
        ValueError: unless there are three different ones, all finite and above 0.
    """
    return _different("rates", rates, positive, 3, "[2**-k for k in range(4, 12)]")


def _different(name: str, values: Any, check: Callable[[str, Any], T], least: int, example: str) -> tuple[T, ...]:
    given = list(values) if isinstance(values, list | tuple | range) else [values]
    checked = {check(name, value) for value in given}
    if len(checked) < max(least, len(given)):
        raise ValueError(f"{name} has to name at least {least} different ones, such as {example}; got {given}.")
    return tuple(sorted(checked))  # type: ignore[type-var]


def example_at(batch: Any, step: int) -> Example:
    """Return the batch of a step, with its loss where it brings one.

    Raises:
        TypeError: if it is neither a mapping, a tuple, a list nor a tensor.
    """
    given = batch(step) if callable(batch) and not isinstance(batch, Tensor | Example) else batch
    example = given if isinstance(given, Example) else Example(given, None, "")
    if not isinstance(example.batch, Tensor | Mapping | tuple | list):
        raise TypeError(
            "batch: expected a dictionary of keyword arguments, a tuple of positional ones, one tensor, or a function "
            f"of the step that returns one of these; got {type(example.batch).__name__}."
        )
    return example


def loss_of(model: nn.Module, example: Example, loss: Loss | None) -> Tensor:
    """Run a model and return the scalar to differentiate.

    Args:
        model: to run.
        example: batch, and its own loss, which comes first.
        loss: for examples without one; None takes the output's `loss`, or the output if it is a scalar.

    Raises:
        TypeError: if there is no scalar.
    """
    return scalar_loss(call(model, example.batch), example.loss or loss)


def accepts(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with `count` positional arguments; True where that cannot be told."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
