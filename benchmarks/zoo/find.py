"""All models by source and name, and how each source makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo import huggingface, vision
from zoo.measure import Subject

FINDERS: dict[str, Callable[[str, dict[str, Any] | None], Subject]] = {
    "transformers": huggingface.find,
    "timm": vision.timm_model,
    "torchvision": vision.torchvision_model,
}
NAMES: dict[str, list[str]] = {
    "transformers": huggingface.names(),
    "timm": list(vision.TIMM),
    "torchvision": list(vision.TORCHVISION),
}


def find(name: str, recipe: dict[str, Any] | None = None) -> Subject:
    """Make the small model of a name such as "timm/test_vit", and a batch that it runs on.

    Args:
        name: source and name.
        recipe: what was found in an earlier run, tried first.

    Raises:
        NotBuilt: nothing ran.
    """
    source, _, kind = name.partition("/")
    return FINDERS[source](kind, recipe)


def names() -> list[str]:
    return [f"{source}/{name}" for source, found in NAMES.items() for name in found]
