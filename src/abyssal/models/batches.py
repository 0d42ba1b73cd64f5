"""Synthetic batches that fit a model, and their losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Example", "LoadingError", "example_batch"]

DEFAULT_TOKENS = 512
DEFAULT_IMAGE = 224


class LoadingError(ValueError):
    """A model spec that cannot be loaded; the message says what was given, what was expected and what to do."""


@dataclass(frozen=True)
class Example:
    """A synthetic batch that fits a model.

    Attributes:
        batch: a dict (keyword arguments of the model), a tuple (positional ones) or a tensor.
        loss: takes the model's output to a scalar; None where the output itself has `.loss`.
        description: in words, e.g. "1 x 512 tokens".
    """

    batch: Any
    loss: Callable[[Any], Tensor] | None
    description: str


class _ClassTargets:
    """Cross entropy to fixed classes."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def __call__(self, output: Any) -> Tensor:
        output = getattr(output, "logits", output)
        if isinstance(output, tuple | list):
            output = output[0]
        return nn.functional.cross_entropy(output, self.targets.to(output.device))


def example_batch(
    model: nn.Module,
    batch_size: int = 1,
    tokens: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Example:
    """Make a synthetic batch that fits a model, and its loss.

    Args:
        model: of transformers (language models and image classifiers), timm or torchvision, or any that takes
            images [batch, 3, height, width] and has a last `nn.Linear`.
        batch_size: sequences or images.
        tokens: per sequence; default 512, or the most that the model has positions for.
        image_size: height and width; default: the configuration's.
        seed: of the values. The global random state is left alone.

    Returns:
        Random tokens within the vocabulary with themselves as labels; or random images with random classes, in
        the type of the model's parameters.

    Raises:
        LoadingError: for a model that none of this fits, or more tokens than it has positions for.
    """
    generator = torch.Generator().manual_seed(seed)
    if batch_size < 1:
        raise LoadingError(f"batch size: expected at least 1, got {batch_size}")
    config = getattr(model, "config", None)
    main_input = getattr(model, "main_input_name", None)
    if config is not None and main_input == "input_ids":
        return _language_batch(model, config, batch_size, tokens, generator)
    if tokens is not None:
        raise LoadingError(f"tokens: a {type(model).__name__} takes images, not tokens; give batch and image size")
    if config is not None and main_input == "pixel_values":
        size = image_size or _square(getattr(config, "image_size", None)) or DEFAULT_IMAGE
        images = _images(model, batch_size, int(getattr(config, "num_channels", 3)), size, generator)
        labels = torch.randint(0, int(config.num_labels), (batch_size,), generator=generator, device="cpu")
        return Example({"pixel_values": images, "labels": labels}, None, f"{batch_size} x {size}x{size} pixels")
    return _image_batch(model, batch_size, image_size, generator)


def _language_batch(
    model: nn.Module, config: Any, batch_size: int, tokens: int | None, generator: torch.Generator
) -> Example:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = _positions(model, text)
    if tokens is None:
        tokens = min(DEFAULT_TOKENS, most or getattr(text, "max_position_embeddings", None) or DEFAULT_TOKENS)
    if tokens < 2:
        raise LoadingError(f"tokens: expected at least 2, one to predict from another, got {tokens}")
    if most is not None and tokens > most:
        raise LoadingError(
            f"tokens: this {type(model).__name__} has {most} learned positions, so {tokens} tokens do not fit; give "
            f"at most {most}"
        )
    vocabulary = int(text.vocab_size)
    ids = torch.randint(0, vocabulary, (batch_size, tokens), generator=generator, device="cpu")
    batch: dict[str, Any] = {"input_ids": ids}
    name = type(model).__name__
    if name.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        batch["labels"] = torch.randint(0, int(config.num_labels), (batch_size,), generator=generator, device="cpu")
    elif name.endswith("ForTokenClassification"):
        batch["labels"] = torch.randint(0, int(config.num_labels), ids.shape, generator=generator, device="cpu")
    else:
        batch["labels"] = ids
    if hasattr(config, "use_cache"):
        batch["use_cache"] = False
    return Example(batch, None, f"{batch_size} x {tokens:,} tokens")


def _positions(model: nn.Module, config: Any) -> int | None:
    """How many learned positions a model has; None where positions are computed (rotary)."""
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    for name, module in model.named_modules():
        is_of_positions = re.search(r"pos|wpe", name.rpartition(".")[2])
        if isinstance(module, nn.Embedding) and is_of_positions and most <= module.num_embeddings <= most + 2:
            return int(most)
    return None


def _image_batch(model: nn.Module, batch_size: int, image_size: int | None, generator: torch.Generator) -> Example:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    classes = getattr(model, "num_classes", None) or (linear[-1].out_features if linear else None)
    if not classes or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise LoadingError(
            f"no batch is known that fits a {type(model).__name__}: it is neither a model of transformers with tokens "
            "or images as input, nor an image classifier. Give a batch and a loss: in Python as arguments, on the "
            "command line by a factory that returns (model, batch, loss)."
        )
    channels, size = 3, image_size
    input_size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")  # timm
    if input_size is not None:
        channels = int(input_size[0])
        size = size or _square(getattr(getattr(model, "patch_embed", None), "img_size", None)) or int(input_size[-1])
    size = size or _square(getattr(model, "image_size", None)) or _torchvision_size(model)
    images = _images(model, batch_size, channels, size, generator)
    targets = torch.randint(0, int(classes), (batch_size,), generator=generator, device="cpu")
    return Example(images, _ClassTargets(targets), f"{batch_size} x {size}x{size} pixels")


def _torchvision_size(model: nn.Module) -> int:
    return 299 if type(model).__name__ == "Inception3" else DEFAULT_IMAGE


def _square(size: Any) -> int | None:
    if isinstance(size, Mapping):
        size = size.get("height")
    if isinstance(size, tuple | list):
        size = size[-1]
    return size if isinstance(size, int) else None


def _images(model: nn.Module, batch: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    images = torch.randn(batch, channels, size, size, generator=generator, device="cpu")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return images.to(dtype)
