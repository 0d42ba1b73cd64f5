"""The blocks of a chain, each with the copies that take its place and what their branches are multiplied by."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from abyssal.models import anatomy
from abyssal.models.branches import stream_of
from abyssal.models.reading import Branch
from abyssal.models.state import attributes_kept, quiet
from abyssal.nn.refine.graft import (
    Ends,
    RefineError,
    copied,
    first_calls,
    fold_,
    foldable,
    interpolate_,
    offsets_of,
    surroundings,
)
from abyssal.nn.schemes import EulerStep

__all__ = ["Cut", "Members", "adjust", "cut_up", "ends_of", "fill", "roughness"]

_LEADS = (0.6, 0.7, 0.8, 0.9)  # no copy is left with nothing, for then its inner weights would get no gradient
_ROUNDING = 100.0  # roundings of the stream's norm: smaller increments are not compared

Members: TypeAlias = "list[Cut | tuple[str, nn.Module]]"
"""Of a container, in order: a cut for each use of a block, key and module for what is none."""


@dataclass(eq=False)
class Cut:
    """One block and its copies.

    Attributes:
        name: of the block.
        key: of the block in its container.
        module: the block.
        position: in its container.
        uses: how often it stands in the container.
        copies: what takes its place; the block itself, several times, where it is shared.
        shares: what the branches of each are multiplied by.
        ends: parameters that multiply its branches; None for the step of a stack, which has a step size.
        change: of its increment on the batch.
    """

    name: str
    key: str
    module: nn.Module
    position: int
    uses: int
    ends: Ends | None
    copies: list[nn.Module] = field(default_factory=list)
    shares: tuple[float, ...] = ()
    change: float | None = None

    def share(self, shares: Sequence[float], interpolated: bool = False) -> None:
        """Multiply the branches of the copies.

        Args:
            shares: what by.
            interpolated: the copies have weights of their own, which are multiplied, once; otherwise the block's are
                taken anew each time.
        """
        self.shares = tuple(shares)
        if self.uses > 1:
            return  # the block itself stands in the place of its copies: see `finish`
        for twin, share in zip(self.copies, shares, strict=True):
            if self.ends is None:
                assert isinstance(twin, EulerStep) and isinstance(self.module, EulerStep)
                twin.scale = self.module.scale * share
            else:
                fold_(twin, twin if interpolated else self.module, self.ends, share)

    def finish(self) -> None:
        """Multiply the branches of a block that is shared, in place and once."""
        if self.uses == 1:
            return
        if self.ends is None:
            assert isinstance(self.module, EulerStep)
            self.module.scale *= self.shares[0]
        else:
            fold_(self.module, self.module, self.ends, self.shares[0])


def ends_of(model: nn.Module, branches: Iterable[Branch], run: Callable[[], Any]) -> dict[str, Ends]:
    """Return what multiplies each block's branches: parameters by end, by block.

    Args:
        model: whose branches they are.
        branches: each of them once.
        run: runs the model, so that every branch shows what its end is called with.

    Raises:
        RefineError: if nothing is known to, or does when it is tried, or other modules have the same parameter.
    """
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update({id(p) for p in module._parameters.values() if p is not None})
    branches = list(branches)
    known = {branch.end: foldable(model.get_submodule(branch.end)) or [] for branch in branches}
    for branch in branches:
        names = known[branch.end]
        if not names:
            raise RefineError(f"{_ends_in(model, branch)}, and it is not known which of its weights {_LET}")
        for name in names:
            if owners[id(model.get_parameter(f"{branch.end}.{name}"))] > 1:
                raise RefineError(
                    f"The parameter {branch.end}.{name} at the end of a branch is shared with another module, so it "
                    "cannot be multiplied for this block alone. Make a model with weights of its own first: "
                    "abyssal.nn.untie(model)."
                )
    found: dict[str, dict[str, Mapping[str, float]]] = defaultdict(dict)
    calls = first_calls(model, known, run)
    with quiet(model):
        for branch in branches:
            names, call = known[branch.end], calls.get(branch.end)
            offsets = None if call is None else offsets_of(model.get_submodule(branch.end), names, call)
            if offsets is None:
                tried = " and ".join(repr(name) for name in names)
                raise RefineError(f"{_ends_in(model, branch)}, and tried out, its {tried} do not {_LET}")
            found[branch.block][branch.end.removeprefix(branch.block).removeprefix(".")] = offsets
    return dict(found)


_LET = (
    "multiply its output. Let the branch end in a linear layer, a convolution, a norm with gains or a per-channel "
    "scale."
)


def _ends_in(model: nn.Module, branch: Branch) -> str:
    title = anatomy.title(model.get_submodule(branch.end))
    return f"A branch of block {branch.block!r} ends in {branch.end!r}, a {title}"


def cut_up(
    model: nn.Module, container_name: str, container: nn.Module, ends: Mapping[str, Ends] | None, factor: int
) -> Members:
    """Return the members of a container in order: a cut for each use of a block, (key, module) for the rest.

    Args:
        model: that holds the container.
        container_name: its dotted name.
        container: a list, sequence or dict.
        ends: of each block of the model, by its name; None where all members are steps of a stack.
        factor: copies per block.
    """
    uses = Counter(map(id, container._modules.values()))
    cuts: dict[int, Cut] = {}
    members: Members = []
    for position, (key, module) in enumerate(container._modules.items()):
        assert module is not None
        name = f"{container_name}.{key}" if container_name else key
        if id(module) not in cuts:
            if ends is not None and name not in ends:
                members.append((key, module))
                continue
            cut = Cut(name, key, module, position, uses[id(module)], None if ends is None else ends[name])
            if cut.uses > 1:
                cut.copies = [module] * factor
            else:
                around = surroundings(model, [module])
                cut.copies = [copied(module, around) for _ in range(factor)]
            cut.shares = (1 / factor,) * factor
            cuts[id(module)] = cut
        members.append(cuts[id(module)])
    return members


def _alike(first: Cut | tuple[str, nn.Module], second: Cut | tuple[str, nn.Module]) -> bool:
    return (
        isinstance(first, Cut)
        and isinstance(second, Cut)
        and type(first.module) is type(second.module)
        and anatomy.signature(first.module) == anatomy.signature(second.module)
    )


def roughness(chains: Iterable[Sequence[Cut | tuple[str, nn.Module]]]) -> float | None:
    """Return the median of |W[n+1] - W[n]| / sqrt(|W[n+1]| |W[n]|) over the matrices of neighbouring blocks."""
    found = []
    for members in chains:
        for first, second in itertools.pairwise(members):
            if not _alike(first, second):
                continue
            assert isinstance(first, Cut) and isinstance(second, Cut)
            others = dict(second.module.named_parameters())
            for name, p in first.module.named_parameters():
                q = others[name]
                scale = float((p.detach().double().norm() * q.detach().double().norm()).sqrt())
                if p.dim() >= 2 and scale:
                    found.append(float((p.detach().double() - q.detach().double()).norm()) / scale)
    return statistics.median(found) if found else None


def fill(members: Sequence[Cut | tuple[str, nn.Module]]) -> None:
    """Interpolate the copies of every block in depth, and multiply their branches.

    With block n at depth n, its k copies stand at n + (j + 1/2)/k - 1/2: their mean is n, so that a block and its
    copies do the same to first order. At the ends of a chain weights are continued as constants.
    """
    for n, cut in enumerate(members):
        if not isinstance(cut, Cut) or cut.uses > 1:
            continue
        for j, twin in enumerate(cut.copies):
            offset = (j + 0.5) / len(cut.copies) - 0.5
            m = n + (1 if offset > 0 else -1)
            if offset and 0 <= m < len(members) and _alike(cut, members[m]):
                neighbour = members[m]
                assert isinstance(neighbour, Cut)
                interpolate_(twin, cut.module, neighbour.module, abs(offset))
        cut.share(cut.shares, interpolated=True)


@contextmanager
def adjust(cuts: Sequence[Cut], tolerance: float | None) -> Iterator[None]:
    """While the model runs: measure every block's copies on its own input, and choose their shares.

    Args:
        cuts: one for each block; their copies have been multiplied.
        tolerance: of the change of a block's increment, from which on its first or last copy takes more; None measures
            only.
    """
    handles: list[Any] = []
    # The copies are no part of the model yet, so that its eval mode does not reach them.
    copies = [twin for cut in cuts if cut.uses == 1 for twin in cut.copies]
    modes = [(module, module.training) for twin in copies for module in twin.modules()]
    for module, _ in modes:
        module.training = False
    for cut in cuts:
        if cut.uses == 1:
            trial = _Trial(cut, tolerance)
            handles.append(cut.module.register_forward_pre_hook(trial.enter, with_kwargs=True))
            handles.append(cut.module.register_forward_hook(trial.leave, with_kwargs=True))
    try:
        with ExitStack() as stack:
            for twin in copies:
                stack.enter_context(attributes_kept(twin))
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


class _Trial:
    """Hooks that run a block's copies on its input, at its first call."""

    def __init__(self, cut: Cut, tolerance: float | None) -> None:
        self.cut, self.tolerance = cut, tolerance
        self.stream: tuple[int | str, Tensor] | None = None  # position or name, and value

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the block: find the stream among its arguments, and keep a copy."""
        found = stream_of(args, kwargs) if self.cut.change is None else None
        if found is not None:  # a block may change its input in place
            self.stream = found[0], found[1].detach().clone()

    @torch.no_grad()
    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the block: run its copies on the same stream, and note how far from its output they end."""
        cut, found = self.cut, self.stream
        self.stream = None
        if found is None:
            return
        place, start = found
        args = tuple(None if hasattr(value, "get_seq_length") else value for value in args)  # a cache would grow
        kwargs = {name: None if hasattr(value, "get_seq_length") else value for name, value in kwargs.items()}

        def error() -> float:
            x = start.clone()
            for twin in cut.copies:
                if isinstance(place, int):
                    x = _first(twin(*args[:place], x, *args[place + 1 :], **kwargs))
                else:
                    x = _first(twin(*args, **{**kwargs, place: x}))
            increment = float((_first(output) - start).double().norm())
            # Fresh layer scales of 1e-6 leave increments that are mostly rounding, in the block and in its copies.
            if increment <= _ROUNDING * torch.finfo(start.dtype).eps * float(start.double().norm()):
                return 0.0
            return float((x - _first(output)).double().norm()) / increment

        cut.change = error()
        if self.tolerance is not None:
            self._settle(error)

    def _settle(self, error: Callable[[], float]) -> None:
        """Let the first or the last copy take more, no more than needed."""
        cut, k = self.cut, len(self.cut.copies)
        best, shares = cut.change, cut.shares
        assert best is not None and self.tolerance is not None
        for lead in _LEADS:
            if best <= self.tolerance or lead <= 1 / k:
                continue
            for taker in (0, k - 1):
                trial = tuple(lead if j == taker else (1 - lead) / (k - 1) for j in range(k))
                cut.share(trial)
                if (found := error()) < best:
                    best, shares = found, trial
        cut.share(shares)
        cut.change = best


def _first(output: Any) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    assert isinstance(first, Tensor)
    return first
