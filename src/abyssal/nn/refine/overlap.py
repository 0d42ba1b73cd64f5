"""Stacks whose steps overlap (Heun's: neighbouring steps have a residual function in common), untied and deepened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from abyssal.nn.refine.graft import copied, interpolate_, surroundings
from abyssal.nn.refine.report import Section
from abyssal.nn.refine.sections import Cut, Members
from abyssal.nn.stack import ResidualStack

__all__ = ["deepen_overlapping", "functions_as_cuts", "untie_overlapping"]


def untie_overlapping(model: nn.Module, name: str, stack: ResidualStack) -> list[tuple[str, int, int]]:
    """Untie a stack whose neighbouring steps have residual functions in common."""
    functions = stack.blocks
    around = surroundings(model, functions)
    seen: set[int] = set()
    distinct, free = 0, []
    for function in functions:
        mine = {id(p) for p in function.parameters()} - around.keys()
        distinct += not mine & seen
        free.append(copied(function, around) if mine & seen else function)
        seen |= mine
    if distinct == len(free):
        return []
    _rebuild(stack, free, _sizes(stack))
    return [(f"{name}.steps" if name else "steps", len(free), distinct)]


def _sizes(stack: ResidualStack) -> list[float]:
    return [float(step.scale) for step in stack.steps]  # type: ignore[arg-type]


def _rebuild(stack: ResidualStack, functions: Sequence[nn.Module], sizes: Sequence[float]) -> None:
    steps = stack.scheme.steps(functions, sizes)
    stack.steps = nn.ModuleList(steps)
    for module in (stack.steps, *steps):  # a new module begins in training mode; the functions within keep theirs
        module.training = stack.training


def functions_as_cuts(stack: ResidualStack) -> Members:
    """Return the functions of a stack, each a cut of its own."""
    return [Cut(str(n), str(n), f, n, 1, None) for n, f in enumerate(stack.blocks)]


def deepen_overlapping(
    model: nn.Module, name: str, stack: ResidualStack, factor: int, how: str
) -> tuple[list[Section], list[nn.Module]]:
    """Deepen a stack of N functions and N - 1 steps to (N - 1) factor + 1 functions, at equal distances in depth."""
    functions, sizes = stack.blocks, _sizes(stack)
    tied = Counter(map(id, functions))
    fresh: list[nn.Module] = []
    for m in range((len(functions) - 1) * factor + 1):
        n, part = divmod(m, factor)
        share = part / factor
        nearest = n if share < 0.5 else n + 1
        source = functions[nearest]
        if tied[id(source)] > 1:
            fresh.append(source)
            continue
        # Only at a depth where there was a function may that very one stand.
        twin = copied(source, surroundings(model, [source])) if part else source
        if how == "interpolate" and part:
            interpolate_(twin, functions[n], functions[n + 1], share)
        fresh.append(twin)
    _rebuild(stack, fresh, [h / factor for h in sizes for _ in range(factor)])
    where = f"{name}.steps" if name else "steps"
    sections = [
        Section(f"{where}.{n}", tuple(f"{where}.{n * factor + j}" for j in range(factor)), (1 / factor,) * factor)
        for n in range(len(sizes))
    ]
    return sections, list(stack.steps)
