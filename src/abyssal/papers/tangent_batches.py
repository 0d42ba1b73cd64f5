"""Batches that `abyssal tangent` measures kernels on: digits in the form that a model takes, or a model's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from abyssal.models.batches import Example
from abyssal.models.call import call, scalar_loss
from abyssal.models.state import quiet
from abyssal.util.randomness import seeded

__all__ = [
    "DigitsLoss",
    "digits_example",
    "fingerprint",
    "fit_digits",
    "inputs_of",
    "loss_of",
    "outputs_of",
    "tensor_of",
]


def inputs_of(example: Example | None) -> Any:
    """Return what a model takes of a batch, without labels: a tensor, a tuple or a dict of tensors.

    Raises:
        ValueError: if there is no batch, or nothing in it is a tensor.
    """
    batch = None if example is None else example.batch
    if isinstance(batch, Mapping):
        found = {key: part for key, part in batch.items() if isinstance(part, Tensor) and key != "labels"}
        if found:
            return found
    if isinstance(batch, Tensor) or (isinstance(batch, tuple) and batch and all(isinstance(p, Tensor) for p in batch)):
        return batch
    raise ValueError(
        "--data own: the model's file gives no batch of tensors; let its function return (module, batch), or give "
        "--data digits"
    )


def outputs_of(model: nn.Module, x: Any) -> Tensor:
    """Return what a model makes of inputs, in evaluation, as a tensor."""
    with quiet(model), torch.no_grad():
        return tensor_of(call(model, x))


def fingerprint(model: nn.Module, x: Any, *others: Any) -> str:
    """Return what tells a model as it is now, on these inputs, from any other: 16 digits in base 16.

    It depends on parameters, buffers, modules, the configuration, the inputs, and the outputs for them, so that weights
    that were replaced on the disk are seen as well, or code that the model's file imports.

    Args:
        model: any.
        x: what it takes: a tensor, a tuple or a dict of tensors.
        *others: more that counts.
    """
    with seeded(0):
        outputs = outputs_of(model, x)
    config: Any = getattr(model, "config", None)
    told = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else repr(config)
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{model!r}\n{told}\n")  # addresses differ from run to run
    digest = hashlib.sha256(text.encode())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {value.requires_grad}".encode())
        _add(digest, value)
    for leaf in tree_leaves((outputs, x, others)):
        _add(digest, leaf)
    return digest.hexdigest()[:16]


def _add(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        # Of another object, its type: what it prints may be its address.
        digest.update((repr(value) if isinstance(value, str | int | float | None) else str(type(value))).encode())
        return
    digest.update(f"{value.dtype} {list(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_of(output: Any) -> Tensor:
    """Return what a model returned, or its `.logits`.

    Raises:
        ValueError: if neither is a tensor.
    """
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ValueError(f"the model returns a {type(found).__name__}; its outputs have to be a tensor, or in .logits")
    return found


def loss_of(model: nn.Module, example: Example) -> Tensor:
    """Return a model's loss on its batch."""
    return scalar_loss(call(model, example.batch), example.loss)


def fit_digits(model: nn.Module, x: Tensor, like: Any = None) -> tuple[Tensor, Tensor]:
    """Return digits in the form that a model takes, and its outputs for them.

    Args:
        model: takes [n, 1, 8, 8], [n, 64], or images of the size of `like`.
        x: digits. [n, 64]
        like: a batch of images that it takes, [batch, channels, height, width]; digits are resized to them.

    Raises:
        ValueError: if it takes neither; with what it said.
    """
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    square = x.to(dtype).view(-1, 1, 8, 8)
    forms = [square, x.to(dtype)]
    if isinstance(like, Tensor) and like.ndim == 4:
        resized = nn.functional.interpolate(square, size=like.shape[-2:], mode="bilinear")
        forms = [resized.expand(-1, like.shape[1], -1, -1).contiguous()]
    said = []
    for form in forms:
        try:
            found = outputs_of(model, form)
        except Exception as error:
            said.append(f"{list(form.shape)}: {' '.join(str(error).split())[:120]}")
            continue
        if found.ndim >= 1 and len(found) == len(form):
            return form, found
        said.append(f"{list(form.shape)}: returned {list(found.shape)}")
    raise ValueError(f"--data digits: the model does not take digits as {'; nor as '.join(said)}. Give --data own.")


class DigitsLoss:
    """Cross entropy with ten outputs or more, squared loss of odd against even with fewer."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __call__(self, output: Any) -> Tensor:
        """Return the loss of a batch's outputs."""
        found = tensor_of(output)
        if found.ndim == 2 and found.shape[1] >= 10:
            return nn.functional.cross_entropy(found, self.labels)
        targets = (self.labels % 2 * 2 - 1).to(found.dtype)
        return (found - targets.view(-1, *[1] * (found.ndim - 1))).square().mean() / 2


def digits_example(model: nn.Module, count: int, like: Any = None) -> Example:
    """Return digits and a loss for them, in the form that a model takes."""
    from abyssal.demo.digits import load_digits

    digits = load_digits()
    x, _ = fit_digits(model, digits.train_images[:count].flatten(1), like)
    return Example(x, DigitsLoss(digits.train_labels[:count]), f"{count} digits")
