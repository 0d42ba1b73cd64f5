"""Telling a configuration in transformers' manner how many layers its model has now."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from abyssal.nn.refine.graft import RefineError

__all__ = ["check_config", "configs", "differences", "grow_config"]

_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers", "num_hidden_groups"),
)


def configs(model: nn.Module) -> Iterator[Any]:
    """Yield the configuration objects that the modules of a model hold, each once."""
    seen: set[int] = set()
    for module in model.modules():
        config = module.__dict__.get("config")
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield config


def check_config(model: nn.Module) -> None:
    """Raise where a layer computes something else for being at another position.

    Raises:
        RefineError: naming the setting.
    """
    for config in configs(model):
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise RefineError(
                "config.scale_attn_by_inverse_layer_idx is set: the model divides attention by a layer's position, so "
                "its layers would compute something else at their new ones. Fold that factor into the query weights "
                "and switch the setting off, then deepen."
            )


def grow_config(model: nn.Module, chains: Mapping[str, tuple[int, int]], factor: int) -> list[str]:
    """Set the number of layers in a model's configurations, in place.

    Args:
        model: as it is now.
        chains: number of members before and now, by the name of the container.
        factor: how many layers there now are for one.

    Returns:
        What was set, in words.
    """
    said: list[str] = []
    for config in configs(model):
        for key, value in list(config.to_dict().items()):
            new: Any = None
            if key in _COUNTS and isinstance(value, int) and not isinstance(value, bool):
                new = next((now for name, (was, now) in chains.items() if was == value and _about(key, name)), None)
            elif key == "depths" and isinstance(value, list) and value == [was for was, _ in chains.values()]:
                new = [now for _, now in chains.values()]
            elif isinstance(value, list) and "layer" in key and (len(value), len(value) * factor) in chains.values():
                new = [entry for entry in value for _ in range(factor)]
            if new is not None:
                setattr(config, key, new)
                shown = new if key == "depths" or not isinstance(new, list) else f"{len(new)} entries"
                said.append(f"config.{key} = {shown}")
    return list(dict.fromkeys(said))


def _about(key: str, container: str) -> bool:
    """Whether a count of encoder or decoder layers is about this container."""
    return all(side not in key or side in container for side in ("encoder", "decoder"))


def differences(model: nn.Module) -> str | None:
    """Return how a model built from its own configuration differs in its `state_dict`; None if it does not.

    Built on the meta device, without memory. A model without such a configuration does not differ.
    """
    config = model.__dict__.get("config")
    if not hasattr(config, "to_dict") or not hasattr(model, "save_pretrained"):
        return None
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(config))  # constructors write into it
    except Exception as error:  # somebody else's constructor
        return f"{type(model).__name__}(config) raises {type(error).__name__}: {error}"
    ours, theirs = ({key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (model, twin))
    odd = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    return f"{len(odd)} tensors differ, {odd[0]!r} first" if odd else None
