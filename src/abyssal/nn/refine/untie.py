"""Blocks that share weights get their own: containers, overlapping stacks, layer groups."""

from __future__ import annotations

from collections import Counter, defaultdict

from torch import nn

from abyssal.models import anatomy
from abyssal.nn.refine.graft import copied, put, renumber, surroundings

__all__ = ["untie_container", "untie_groups"]

Chain = tuple[str, int, int]  # name, length, different blocks before


def untie_container(model: nn.Module, name: str, container: nn.Module, kept: set[int]) -> list[Chain]:
    """Untie the members of one container; `kept` collects parameters that stay shared, by id."""
    families: dict[tuple[object, ...], list[int]] = defaultdict(list)
    members = [(key, module) for key, module in container._modules.items() if module is not None]
    for slot, (_, module) in enumerate(members):
        families[anatomy.kind(module), anatomy.signature(module)].append(slot)
    chains = []
    for slots in families.values():
        around = surroundings(model, [members[slot][1] for slot in slots])
        uses: Counter[int] = Counter()
        for slot in slots:
            uses.update({id(p) for p in members[slot][1].parameters()})
        common = {tensor for tensor, count in uses.items() if count > 1}
        kept |= common & around.keys()
        common -= around.keys()
        seen: set[int] = set()
        origin: dict[int, int] = {}
        distinct = 0
        for slot in slots:
            key, module = members[slot]
            mine = {id(p) for p in module.parameters()} & common
            if mine & seen:
                members[slot] = key, copied(module, around)
                origin[id(members[slot][1])] = next(i for i in slots if container._modules[members[i][0]] is module)
            else:
                distinct += 1
            seen |= mine
        if common:
            chains.append((name, len(slots), distinct))
            put(container, members)
            renumber(container, origin)
    return chains


def untie_groups(model: nn.Module) -> list[Chain]:
    """Untie layer groups in ALBERT's manner: group `int(i / (layers / groups))` is layer i."""
    chains = []
    for name, module in list(model.named_modules()):
        config = module.__dict__.get("config")
        groups, layers = (getattr(config, key, None) for key in ("num_hidden_groups", "num_hidden_layers"))
        if not isinstance(groups, int) or not isinstance(layers, int) or groups >= layers:
            continue
        for key, child in module._modules.items():
            if not isinstance(child, nn.ModuleList) or len(child) != groups or not key.endswith("groups"):
                continue
            around = surroundings(model, list(child))
            sources = [child[int(i / (layers / groups))] for i in range(layers)]
            first = {id(source): i for i, source in reversed(list(enumerate(sources)))}
            free = [s if first[id(s)] == i else copied(s, around) for i, s in enumerate(sources)]
            put(child, [(str(i), member) for i, member in enumerate(free)])
            config.num_hidden_groups = layers
            chains.append((f"{name}.{key}" if name else key, layers, groups))
    return chains
