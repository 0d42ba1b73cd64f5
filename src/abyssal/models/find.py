"""Finding the residual blocks of a model nobody here wrote.

What is looked for is a *chain*: modules of one type, with equal parameter shapes, side by side in an
`nn.ModuleList`, `nn.Sequential` or `nn.ModuleDict`, each of which keeps its input's shape. The outermost such
run wins, so that a list of attention heads or of experts inside a block is not taken for the blocks.

Only the module tree is read; nothing is run. What a `forward` does can therefore not be known for certain,
and two things are left to whoever runs the blocks: noticing that one changes its input's shape after all, and
noticing that something happens between two of them. What the tree does tell is used: a projection on a
shortcut, differing channels, a stride, and the names that models in transformers' manner give in
`_no_split_modules`. These say which classes are a model's layers, and that the model itself is none.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

from torch import nn

from abyssal.models import anatomy

__all__ = ["Blocks", "NoBlocksError", "find_blocks", "resolve_blocks"]

Blocks: TypeAlias = str | nn.Module | Iterable[str | nn.Module]
"""How a caller names blocks: a dotted name, a glob, a module, or several of these."""


class NoBlocksError(ValueError):
    """No residual blocks were found in a model; the message says what was looked for and what to do."""


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Find the residual blocks of a model, all chains of it (encoder and decoder, every stage).

    Args:
        model: any module: an `nn.Sequential` of blocks, a model of torchvision, timm or transformers, also
            below PEFT, DDP or `torch.compile`. It is only looked at, neither run nor changed.

    Returns:
        Dotted name to module, in model order. A tied block is returned once, under its first name; a
        compiled block is returned as the compiled module that its parent holds.

    Raises:
        NoBlocksError: no blocks were found. The message says what was looked for, which containers were seen,
            and how to name blocks oneself.
    """
    found: dict[int, _Found] = {}
    for block in _Search(frozenset()).below("", model):
        found.setdefault(id(block.module), block)
    if not found:
        raise NoBlocksError(_no_blocks_message(model))
    return {block.name: block.module for block in found.values()}


def resolve_blocks(model: nn.Module, blocks: Blocks | None = None) -> dict[str, nn.Module]:
    """Turn what a caller says about blocks into the blocks of a model.

    Args:
        model: the model that holds the blocks.
        blocks: None, for what `find_blocks` finds; a dotted name as `model.named_modules()` gives it ("" is
            the model itself); a glob, whose `*` stays between two dots (`"encoder.layers.*"` is the layers
            and nothing inside them); a module of the model, or the model itself; or several of these. An
            `nn.ModuleList` or `nn.ModuleDict` stands for its members, since it cannot be called.

    Returns:
        Dotted name to module, in model order, each module once.

    Raises:
        NoBlocksError: `blocks` is None and the model has none that can be found.
        ValueError: a name or glob matches nothing, a module is not in the model, or no block was named.
        TypeError: something is neither a name, a glob nor a module.
    """
    if blocks is None:
        return find_blocks(model)
    known = {id(module) for module in model.modules()}
    chosen: set[int] = set()
    for given in _as_sequence(blocks):
        if isinstance(given, str):
            matches = _matching(model, given)
        elif not isinstance(given, nn.Module):
            raise TypeError(f"blocks= takes names, globs and modules; got {given!r}, a {type(given).__name__}.")
        elif id(given) in known:
            matches = [given]
        else:
            raise ValueError(_foreign_module_message(model, given))
        chosen.update(id(block) for match in matches for block in _callable_members(match))
    if not chosen:
        raise ValueError(
            f"blocks={blocks!r} names no block of this {anatomy.title(model)}. Name at least one, or leave "
            "blocks= out to have them found."
        )
    return {name: module for name, module in model.named_modules() if id(module) in chosen}


class _Found(NamedTuple):
    name: str
    module: nn.Module
    settled: bool = False  # chosen by the layer names that a model inside the searched one declares


@dataclass(eq=False)
class _Member:
    """One distinct module of a container, with what decides whether it is a block."""

    name: str
    module: nn.Module
    core: nn.Module  # the module itself, or what torch.compile wrapped in it
    copies: int = 1  # how often it occurs, if it is tied
    signature: tuple[object, ...] = ()
    inside: list[_Found] | None = field(default=None)  # the blocks found in it, once searched


@dataclass
class _Search:
    """One walk down a module tree.

    Attributes:
        layers: class names that the model around calls its layers.
        seen: ids of the modules walked through, since shared ones are met again.
    """

    layers: frozenset[str]
    seen: set[int] = field(default_factory=set)

    def below(self, name: str, module: nn.Module) -> list[_Found]:
        """Return the blocks inside a module, in order."""
        name, core = anatomy.unwrap(name, module)
        if id(core) in self.seen:
            return []
        self.seen.add(id(core))
        if not anatomy.declares_layers(core):
            return self._among_children(name, core)
        inner = _Search(anatomy.declared_layers(core), self.seen)
        found = inner._among_children(name, core)
        # Models inside have chosen for themselves. Of the rest, what is no declared layer (a convolutional
        # stem, a list of heads) counts only where there is nothing else.
        chosen = [block for block in found if block.settled or inner._is_declared(block.module)]
        return [block._replace(settled=True) for block in chosen or found]

    def _among_children(self, name: str, core: nn.Module) -> list[_Found]:
        if isinstance(core, anatomy.CONTAINERS):
            return self._among_members(_members(name, core))
        found = []
        for child_name, child in core.named_children():
            if child_name != "parametrizations":  # of a weight, not of the stream
                found += self.below(_join(name, child_name), child)
        return found

    def _among_members(self, members: list[_Member]) -> list[_Found]:
        """Choose among the members of one container, and search inside what is not chosen."""
        families: dict[type, list[_Member]] = defaultdict(list)
        for member in members:
            if anatomy.is_bare_container(member.core) or anatomy.declares_layers(member.core):
                self._inside(member)
            if not member.inside and anatomy.may_be_block(member.core):
                member.signature = anatomy.signature(member.core)
                families[anatomy.kind(member.core)].append(member)
        chosen = {id(member) for family in families.values() for member in self._chosen(family)}
        found = []
        for member in members:
            if id(member) in chosen:
                found.append(_Found(member.name, member.module))
            elif not anatomy.has_shortcut(member.core):
                found += self._inside(member)
        return found

    def _inside(self, member: _Member) -> list[_Found]:
        if member.inside is None:
            member.inside = self.below(member.name, member.module)
        return member.inside

    def _chosen(self, family: list[_Member]) -> list[_Member]:
        """Return the blocks among a container's members of one type."""
        keeping = [member for member in family if anatomy.keeps_shape(member.core)]
        counts: Counter[tuple[object, ...]] = Counter()
        for member in keeping:
            counts[member.signature] += member.copies
        repeated = [member for member in keeping if counts[member.signature] > 1]
        if anatomy.is_bare_container(family[0].core):  # to be an nn.Sequential is no kinship
            return repeated
        if not repeated:
            return self._chosen_single(family, keeping)
        if self._are_stages(repeated):
            return []
        for member in family:
            member.inside = []  # of the blocks' own kind, so no stage of blocks even where not chosen
        # Siblings with a parameter more or less (T5's first block, adapters on some layers) are blocks too.
        return [
            member
            for member in keeping
            if counts[member.signature] > 1
            or self._is_declared(member.module)
            or not anatomy.changes_width(member.core)
        ]

    def _chosen_single(self, family: list[_Member], keeping: list[_Member]) -> list[_Member]:
        """Return the blocks where no two are alike: one beside a downsampling block, or a pruned model's."""
        widths = {width for member in keeping for width in anatomy.end_widths(member.core)}
        one_stream = len(keeping) > 1 and len(widths) == 1 and None not in widths
        kin = one_stream or any(anatomy.has_projection(member.core) for member in family)
        chosen = []
        for member in keeping:
            likely = kin or self._is_declared(member.module)
            if anatomy.adds_input(member.core) or (likely and not self._inside(member)):
                chosen.append(member)
        return chosen

    def _are_stages(self, family: list[_Member]) -> bool:
        """Whether equal members hold the declared layers of the model, and are none themselves."""
        if not self.layers or any(anatomy.has_shortcut(m.core) or self._is_declared(m.module) for m in family):
            return False
        inside = [block for member in family for block in self._inside(member)]
        return any(self._is_declared(block.module) for block in inside)

    def _is_declared(self, module: nn.Module) -> bool:
        _, core = anatomy.unwrap("", module)
        return any(base.__name__ in self.layers for base in type(core).__mro__)


def _members(name: str, container: nn.Module) -> list[_Member]:
    members: dict[int, _Member] = {}
    for child_name, child in container._modules.items():
        if child is None:
            continue
        if id(child) in members:
            members[id(child)].copies += 1
        else:
            members[id(child)] = _Member(_join(name, child_name), child, anatomy.unwrap("", child)[1])
    return list(members.values())


def _as_sequence(blocks: Blocks) -> Iterable[object]:
    if isinstance(blocks, str | nn.Module):
        return (blocks,)
    if isinstance(blocks, Mapping) or not isinstance(blocks, Iterable):
        raise TypeError(
            f"blocks= takes a name, a glob, a module or a sequence of these; got {blocks!r}, a {type(blocks).__name__}."
        )
    return tuple(blocks)


def _callable_members(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or the members of a list that cannot be called."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict) and anatomy.is_bare_container(module):
        for child in module.children():
            yield from _callable_members(child)
    else:
        yield module


def _matching(model: nn.Module, pattern: str) -> list[nn.Module]:
    """Return the modules under a name or glob; a tied module answers to each of its names."""
    named = dict(model.named_modules(remove_duplicate=False))
    if pattern in named:
        return [named[pattern]]
    parts = pattern.split(".")
    matches = [module for name, module in named.items() if _parts_match(name.split("."), parts)]
    if not matches:
        raise ValueError(_unknown_name_message(model, pattern, list(named)))
    return matches


def _parts_match(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


def _unknown_name_message(model: nn.Module, given: str, names: list[str]) -> str:
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    near = near or [name for name, _ in model.named_children()][:3]
    what = "glob" if any(sign in given for sign in "*?[") else "name"
    return (
        f"blocks= holds the {what} {given!r}, which matches no module of this {anatomy.title(model)}."
        + (f" Near it: {', '.join(map(repr, near))}." if near else "")
        + " Names are those of model.named_modules(); `*` in a glob does not reach across a dot."
    )


def _foreign_module_message(model: nn.Module, given: nn.Module) -> str:
    alike = [name for name, module in model.named_modules() if type(module) is type(given)][:3]
    return (
        f"blocks= holds a {anatomy.title(given)} that is not part of this {anatomy.title(model)}."
        + (f" Modules of its type here: {', '.join(map(repr, alike))}." if alike else "")
        + " Pass a module of this very model, not one of a copy or one since replaced, or its dotted name."
    )


def _no_blocks_message(model: nn.Module) -> str:
    containers = []
    for name, module in model.named_modules():
        if isinstance(module, anatomy.CONTAINERS) and len(module):
            held = Counter(map(anatomy.title, module.children()))
            listing = ", ".join(f"{count} {title}" for title, count in held.most_common(3))
            containers.append(f"{name or 'the model itself'!r} ({anatomy.title(module)}: {listing})")
    seen = "; ".join(containers[:4]) or "none"
    more = f"; and {len(containers) - 4} more" if len(containers) > 4 else ""
    return (
        f"No residual blocks found in this {anatomy.title(model)}. Looked for two or more modules of one "
        "type with equal parameter shapes, side by side in an nn.ModuleList, nn.Sequential or nn.ModuleDict, "
        "that keep their input's shape; torch.nn layers such as Linear do not count, nor do blocks with a "
        f"projection on their shortcut. Containers seen: {seen}{more}. Name the blocks yourself, by dotted "
        'name, glob or module: blocks="layers.*", or blocks=[model.first, model.second], or blocks=[model] '
        "where the whole model is one block."
    )


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
