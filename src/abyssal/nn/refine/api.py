"""Refining a trained network: give shared weights a life of their own, and put more blocks where there are some.

`untie` and `deepen` return a new model and leave the one given as it is; `refinement(new)` says what was done.

    free = abyssal.nn.untie(tied)                        # same function, its own weights in every block
    deep = abyssal.nn.deepen(model, factor=2, batch=batch)
    print(abyssal.nn.refinement(deep))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from abyssal.models import anatomy
from abyssal.models.call import call
from abyssal.models.reading import read_model
from abyssal.models.state import forget_, graphs_in, quiet
from abyssal.nn.refine.change import Change, compared, gradients_of, measure, relative_change
from abyssal.nn.refine.config import check_config, differences, grow_config
from abyssal.nn.refine.graft import Ends, RefineError, check_plain, put, renumber
from abyssal.nn.refine.overlap import deepen_overlapping, functions_as_cuts, untie_overlapping
from abyssal.nn.refine.report import MARK, Deepened, Section, Untied, refinement
from abyssal.nn.refine.sections import Cut, Members, adjust, cut_up, ends_of, fill, roughness
from abyssal.nn.refine.untie import untie_container, untie_groups
from abyssal.nn.schemes import EulerStep
from abyssal.nn.stack import ResidualStack
from abyssal.util.checks import number, one_of, whole

__all__ = ["Deepened", "RefineError", "Section", "Untied", "deepen", "refinement", "untie"]

_SMOOTH = 0.3  # roughness up to which "auto" interpolates; unrelated blocks have sqrt(2)


# ---------------------------------------------------------------------- untie


def untie(model: nn.Module, *, batch: Any = None) -> nn.Module:
    """Give every block of a chain its own weights, where blocks share them.

    Untied are: a module that stands several times in an `nn.ModuleList`, `nn.Sequential` or `nn.ModuleDict`, or in a
    :class:`ResidualStack` (Heun's steps still share a residual function with their neighbours, as the scheme wants it);
    different modules of one container that have parameters in common; and the groups of layers that a model in
    ALBERT's manner runs `config.num_hidden_layers` times. A parameter that something outside the chain has as well (a
    head tied to an embedding) stays shared. The first block keeps its very parameters' values, the others get copies,
    running statistics too: the function is the same, in its bits where the kernels are.

    A loop over one block that is written in a `forward` cannot be untied from outside: write the chain as
    `nn.ModuleList([block] * n)`, untie, and keep the loop over the list.

    Args:
        model: any module. It is left as it is.
        batch: what it can be called with (a dict of keyword arguments, a tuple of positional ones, or a tensor), to
            measure that the output is the same.

    Returns:
        A new model, whose `state_dict` is laid out as that of the same model built with weights of its own. Its report
        is `refinement(model)`. Gradients and optimiser states are not carried over.

    Raises:
        RefineError: if no block shares anything, or the model is wrapped, reconstructed or scaled.

    Source: M. E. Sander, P. Ablin, G. Peyré 2022, arXiv 2205.14612, train with tied weights and then untie.
    """
    check_plain(model, "untie")
    before = None
    if batch is not None:
        with quiet(model), torch.no_grad():
            before = compared(call(model, batch))
    free = _copy(model)
    kept: set[int] = set()
    chains = untie_groups(free)
    done: set[int] = set()
    for name, stack in _stacks(free).items():
        if stack.scheme.functions_per_step > 1:
            chains += untie_overlapping(free, name, stack)
            done.add(id(stack.steps))
    for name, container in list(free.named_modules()):
        if isinstance(container, anatomy.CONTAINERS) and id(container) not in done:
            chains += untie_container(free, name, container, kept)
    if not chains:
        raise RefineError(
            f"No block of this {anatomy.title(model)} shares its weights with another one of its chain. Looked for a "
            "module that stands several times in a ModuleList, Sequential, ModuleDict or ResidualStack, for parameters "
            "that its members have in common, and for a configuration with fewer layer groups than layers. Where one "
            "block is called in a loop, write the chain as nn.ModuleList([block] * n) first."
        )
    odd = differences(free)
    notes = [f"the configuration does not describe this model, so from_pretrained cannot load it: {odd}"] if odd else []
    change = None
    if before is not None:
        with quiet(free), torch.no_grad():
            change = relative_change(before, compared(call(free, batch)))
    names = tuple(name for name, p in free.named_parameters() if id(p) in kept)
    counts = _parameters(model), _parameters(free)
    free.__dict__[MARK] = Untied(tuple(chains), counts, names, change, tuple(notes))
    return free


# ---------------------------------------------------------------------- deepen


def deepen(
    model: nn.Module,
    factor: int = 2,
    how: Literal["auto", "interpolate", "copy"] = "auto",
    *,
    batch: Any = None,
    loss: Callable[[Any], Any] | None = None,
    blocks: Any = None,
    tolerance: float | None = 0.1,
) -> nn.Module:
    """Put `factor` blocks where there is one, so that the function changes little.

    A chain `x[n+1] = x[n] + f_n(x[n])` is read as steps along a depth, and every step is cut into `factor` shorter
    ones: the branches of the new blocks are multiplied by 1/factor, in the last linear layer (or norm, or per-channel
    scale) of each branch, whose weights and biases take the factor in: tried out on each, and right for norms that
    multiply by `1 + weight`, as Gemma's do. So the model keeps its class and its `forward`,
    and the keys of its `state_dict` their form. In a :class:`ResidualStack` the step size takes the factor.

    Args:
        model: one whose blocks `abyssal.find_blocks` finds, or a model with :class:`ResidualStack` in it (then these
            are deepened). It is left as it is.
        factor: new blocks for each block, at least 2.
        how: `"copy"` gives each the block's own weights. `"interpolate"` gives the k of block n weights between those
            of neighbouring blocks, at depths n + (j + 1/2)/k - 1/2, linearly; right where weights vary little from
            block to block (a network that follows an ODE), and wrong where they do not: in networks trained without a
            scale on their branches neighbouring blocks are unrelated. `"auto"` measures that and interpolates up to a
            roughness of 0.3 (see :class:`Deepened`).
        batch: what the model can be called with: a dict of keyword arguments, a tuple of positional ones, or a tensor.
            With it, the change of the function is measured; without it, models of transformers and timm, and
            those that begin with a linear, convolutional or embedding layer, are read on a batch made up for it.
        loss: takes the model's output to a scalar; None takes the output's `loss` if it has one.
        blocks: which blocks, as in `abyssal.reconstruct`; None finds them.
        tolerance: with a batch and `"copy"`: where the copies' joint increment of the stream differs by more than this
            from the block's (a first layer that multiplies its input 28-fold cannot be halved), the first or the last
            copy gets a larger share, up to 0.9, and the others the rest. None cuts all blocks evenly.

    Returns:
        A new model; its report is `refinement(model)`. `config.num_hidden_layers` and what else counts layers in a
        configuration of transformers, and the layers' `layer_idx`, are those of the deeper model. Gradients and
        optimiser states are not carried over: make the optimiser anew.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: for a factor below 2, or another `how`.
        NoBlocksError: if no blocks are found.
        UnreadableModelError: if a block's branches cannot be read.
        RefineError: if the model is wrapped, reconstructed or scaled, its blocks are in no container, their branches
            do not end in weights that multiply them, or its forward does not run over all blocks that are in the
            container.
    """
    whole("factor", factor, 2, "a whole number of new blocks for each block,")
    one_of("how", how, ("auto", "interpolate", "copy"))
    if tolerance is not None:
        number("tolerance", tolerance, 0)
    check_plain(model, "deepen")
    check_config(model)
    deep = _copy(model)
    stacks = _stacks(deep) if blocks is None else {}
    reading = None
    if stacks:
        chains = _stack_chains(deep, stacks, factor)
    else:
        reading = read_model(deep, batch, blocks=blocks)
        ends = ends_of(deep, reading.branches, lambda: read_model(deep, batch, blocks=blocks))
        chains = _read_chains(deep, reading, ends, factor)
    cuts = list({id(m): m for members in chains.values() for m in members if isinstance(m, Cut)}.values())
    overlapping = {name: s for name, s in stacks.items() if s.scheme.functions_per_step > 1}
    rough = roughness([*chains.values(), *(functions_as_cuts(s) for s in overlapping.values())])
    if how == "auto":
        how = "interpolate" if rough is not None and rough <= _SMOOTH else "copy"
    before = _branching_off(deep, cuts, chains, how, batch, loss, tolerance)
    sections, held = _insert(deep, chains)
    for name, stack in overlapping.items():
        more, functions = deepen_overlapping(deep, name, stack, factor, how)
        sections, held = sections + more, held + functions
    grown = {name: (len(members), len(deep.get_submodule(name))) for name, members in chains.items()}  # type: ignore[arg-type]
    notes = [*grow_config(deep, grown, factor), *_notes(deep, reading)]
    if reading is not None:
        _check_all_run(deep, batch, sections, reading.depth * factor)
    facts: dict[str, Any] = {}
    if before is not None:
        after = Change(deep, batch, loss)
        facts = {**measure(before, after), "gradients": gradients_of(after, held)}
    counts = _parameters(model), _parameters(deep)
    deep.__dict__[MARK] = Deepened(factor, how, tuple(sections), counts, rough, notes=tuple(notes), **facts)
    return deep


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy that holds nothing that was computed from the weights it had."""
    try:
        found = copy.deepcopy(model)
    except RuntimeError as error:
        if "graph leaves" not in str(error):
            raise
        where = next(graphs_in(model), "some attribute")
        raise RefineError(
            f"The model cannot be copied with a tensor in {where} that was computed from its weights. If it keeps that "
            "from a run in eval mode, model.train() drops it; where it is the weight of the old "
            "torch.nn.utils.weight_norm, take torch.nn.utils.parametrizations.weight_norm."
        ) from error
    forget_(found)
    return found


def _stacks(model: nn.Module) -> dict[str, ResidualStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ResidualStack)}


def _stack_chains(deep: nn.Module, stacks: Mapping[str, ResidualStack], factor: int) -> dict[str, Members]:
    chains: dict[str, Members] = {}
    for name, stack in stacks.items():
        if stack.scheme.functions_per_step == 1:
            where = f"{name}.steps" if name else "steps"
            chains[where] = cut_up(deep, where, stack.steps, None, factor)
    return chains


def _read_chains(deep: nn.Module, reading: Any, ends: Mapping[str, Ends], factor: int) -> dict[str, Members]:
    """Return the members of every container that holds blocks, cut up."""
    where: dict[str, nn.Module] = {}
    for name in reading.blocks:
        parent = name.rpartition(".")[0]
        holder = deep.get_submodule(parent)
        if not name or not isinstance(holder, anatomy.CONTAINERS):
            raise RefineError(
                f"Block {name!r} is not a member of an nn.ModuleList, nn.Sequential or nn.ModuleDict but of a "
                f"{anatomy.title(holder)}, whose forward would not call a block that is put beside it."
            )
        where[parent] = holder
    chains = {name: cut_up(deep, name, holder, ends, factor) for name, holder in where.items()}
    uses = sum(isinstance(m, Cut) for members in chains.values() for m in members)
    if uses != reading.depth:
        raise RefineError(
            f"The forward of this {anatomy.title(deep)} calls blocks {reading.depth} times and holds {uses}: it does "
            "not simply run through them, so more of them would not make it deeper as meant. Where it calls one block "
            "several times, abyssal.nn.untie(model) first."
        )
    return chains


def _branching_off(
    deep: nn.Module,
    cuts: Sequence[Cut],
    chains: Mapping[str, Members],
    how: str,
    batch: Any,
    loss: Callable[[Any], Any] | None,
    tolerance: float | None,
) -> Change | None:
    """Give the copies their weights and shares; return what the model does on the batch while it is undivided."""
    if how == "interpolate":
        for members in chains.values():
            fill(members)
    else:
        for cut in cuts:
            cut.share(cut.shares)
    if batch is None:
        return None
    with adjust(cuts, tolerance if how == "copy" else None):
        return Change(deep, batch, loss)


def _insert(deep: nn.Module, chains: Mapping[str, Members]) -> tuple[list[Section], list[nn.Module]]:
    """Put the copies into their containers; return a section for each cut, and the new blocks."""
    sections: list[Section] = []
    held: list[nn.Module] = []
    for name, members in chains.items():
        listed: list[tuple[str, nn.Module]] = []
        origin: dict[int, int] = {}
        spans: list[tuple[Cut, slice]] = []
        for position, member in enumerate(members):
            if isinstance(member, Cut):
                spans.append((member, slice(len(listed), len(listed) + len(member.copies))))
                listed += [(member.key, twin) for twin in member.copies]
                origin |= {id(twin): member.position for twin in member.copies}
            else:
                listed.append(member)
                origin[id(member[1])] = position
        for cut in {id(cut): cut for cut, _ in spans}.values():
            cut.finish()
        container = deep.get_submodule(name)
        keys = put(container, listed)
        renumber(container, origin)
        for position, module in enumerate(container._modules.values()):
            if isinstance(module, EulerStep):
                module.index = position
        for cut, span in spans:
            copies = tuple(f"{name}.{key}" if name else key for key in keys[span])
            sections.append(Section(cut.name, copies, cut.shares, cut.change))
            held += cut.copies
    return sections, held


def _check_all_run(deep: nn.Module, batch: Any, sections: Sequence[Section], expected: int) -> None:
    """Raise unless the forward calls every new block."""
    names = list(dict.fromkeys(name for section in sections for name in section.copies))
    modules = {id(module): name for name, module in deep.named_modules() if name in set(names)}
    found = read_model(deep, batch, blocks=list(modules.values()))
    # A model that calls half of them twice makes as many calls as one that calls each.
    silent = len(modules) - len(found.blocks)
    if silent or found.depth != expected:
        called, expected = (len(found.blocks), len(modules)) if silent else (found.depth, expected)
        counted = sorted(
            f"{type(m).__name__}.{key}"
            for m in deep.modules()
            for key, value in vars(m).items()
            if isinstance(value, int) and not isinstance(value, bool) and value == len(sections)
        )
        hint = f" Perhaps one of these counts them: {', '.join(counted[:4])}." if counted else ""
        raise RefineError(
            f"The forward of this {anatomy.title(deep)} calls {called} of the {expected} blocks that are now in "
            f"its containers: it counts them in some other way.{hint} Let it loop over the container."
        )


def _notes(deep: nn.Module, reading: Any) -> list[str]:
    notes = []
    if reading is not None and reading.post_norm:
        notes.append(
            "a norm or an activation stands after the blocks' sums, and is now applied as often as there are blocks; "
            "a norm with gains other than 1 changes the function by it"
        )
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in deep.modules()):
        notes.append(
            "running statistics are the old blocks'; a few forward passes in training mode bring them up to date"
        )
    if (odd := differences(deep)) is not None:
        notes.append(f"the configuration does not describe this model, so from_pretrained cannot load it: {odd}")
    return notes


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
