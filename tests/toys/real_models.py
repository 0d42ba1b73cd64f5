"""Unmodified models of Hugging Face, timm and torchvision, small, trained here for a few dozen steps on real data."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.models.torchvision import import_torchvision
from toys.huggingface import import_transformers

LAYERS, WIDTH, TOKENS, VOCABULARY = 6, 64, 32, 256
SENTENCES, IMAGES = 8, 16
LANGUAGE: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": TOKENS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
Batch = dict[str, Tensor]


# ---------------------------------------------------------------------- data


@functools.cache
def text() -> Tensor:
    """Bytes of Python's own sources. [bytes]"""
    return torch.tensor(list(b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as 32 x 32 colour images. [images, 3, 32, 32] and [images]"""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1), torch.as_tensor(labels)


def _draw(batch: int, count: int, seed: int) -> Tensor:
    return torch.randint(count, (batch,), generator=torch.Generator().manual_seed(seed))


def _ids(seed: int) -> Tensor:
    return torch.stack([text()[at : at + TOKENS] for at in _draw(SENTENCES, len(text()) - TOKENS, seed)])


def language(seed: int) -> Batch:
    return {"input_ids": _ids(seed), "labels": _ids(seed)}


def masked(seed: int) -> Batch:
    """A sixth of the bytes are hidden and to be guessed; only these count."""
    ids = _ids(seed)
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 1 / 6
    return {"input_ids": ids.masked_fill(hidden, 1), "labels": ids.masked_fill(~hidden, -100)}


def translation(seed: int) -> Batch:
    """The text backwards, to be turned around."""
    return {"input_ids": _ids(seed).flip(1), "labels": _ids(seed)}


def images(seed: int) -> Batch:
    pixels, labels = digits()
    chosen = _draw(IMAGES, len(labels), seed)
    return {"x": pixels[chosen], "labels": labels[chosen]}


# ---------------------------------------------------------------------- models


def _hugging_face(model: str, config: str, **options: Any) -> nn.Module:
    transformers = import_transformers()
    return getattr(transformers, model)(getattr(transformers, config)(**{**LANGUAGE, **options}))


def _timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10, **options)


def _resnet101() -> nn.Module:
    pytest.importorskip("torchvision")
    return import_torchvision().models.resnet101(num_classes=10)


@dataclass(frozen=True)
class Real:
    """A model, the data it learns from, and how it learns.

    Attributes:
        make: the untrained model.
        batch: a batch by its seed.
        blocks: what `abyssal.reconstruct` is told of its blocks; None where it finds them.
        steps: of training before anything is measured.
        learning_rate: of AdamW.
        routed: whether it chooses among experts.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch] = language
    blocks: str | None = None
    steps: int = 40
    learning_rate: float = 3e-3
    routed: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict, hash=False, compare=False)


GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": LAYERS, "num_heads": 3}
REAL: dict[str, Real] = {
    "GPT-2": Real(lambda: _hugging_face("GPT2LMHeadModel", "GPT2Config", n_inner=2 * WIDTH), steps=60),
    "Llama": Real(lambda: _hugging_face("LlamaForCausalLM", "LlamaConfig", **GROUPED), steps=60),
    "Mixtral": Real(
        lambda: _hugging_face("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **GROUPED), routed=True
    ),
    "Qwen2-MoE": Real(
        lambda: _hugging_face(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=WIDTH,
            shared_expert_intermediate_size=WIDTH,
            **GROUPED,
        ),
        routed=True,
    ),
    "BERT": Real(lambda: _hugging_face("BertForMaskedLM", "BertConfig"), masked, steps=60, learning_rate=1e-3),
    "ALBERT": Real(
        lambda: _hugging_face("AlbertForMaskedLM", "AlbertConfig", embedding_size=32),
        masked,
        blocks="albert.encoder.albert_layer_groups.0",
        learning_rate=1e-3,
    ),
    "T5": Real(
        lambda: _hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            num_layers=4,
            num_decoder_layers=4,
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        translation,
    ),
    "ViT": Real(lambda: _timm("vit_tiny_patch16_224", **VIT), images, learning_rate=1e-3),
    "DeiT": Real(lambda: _timm("deit_tiny_distilled_patch16_224", **VIT), images, learning_rate=1e-3),
    "Swin": Real(
        lambda: _timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=24,
            depths=(2, 2, 4),
            num_heads=(2, 2, 4),
        ),
        images,
    ),
    "ConvNeXt": Real(
        lambda: _timm("convnext_tiny", depths=(2, 2, 6, 2), dims=(16, 32, 64, 96), patch_size=2, ls_init_value=1.0),
        images,
        steps=60,
    ),
    "pre-activation ResNet": Real(
        lambda: _timm("resnetv2_50", layers=(2, 3, 4, 2), channels=(32, 64, 96, 128), stem_type="same"),
        images,
        steps=120,
        learning_rate=1e-3,
    ),
    "ResNet-101": Real(_resnet101, images, steps=6, learning_rate=1e-4),
}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    if "x" in batch:
        output = model(batch["x"])
        output = sum(output) / 2 if isinstance(output, tuple) else output  # DeiT's two heads
        return F.cross_entropy(output, batch["labels"])
    loss = model(**batch).loss
    assert isinstance(loss, Tensor)
    return loss


def train(model: nn.Module, real: Real, steps: int, first: int = 0) -> list[float]:
    """Train on batches `first, first + 1, ...`; return the losses."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=real.learning_rate)
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)  # of dropout
        loss = loss_of(model, real.batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


_trained: dict[str, nn.Module] = {}


def trained(name: str) -> nn.Module:
    """A fresh copy of the model after its training, which is done once per process."""
    if name not in _trained:
        real = REAL[name]
        torch.manual_seed(0)
        _trained[name] = real.make().train()
        losses = train(_trained[name], real, real.steps)
        assert sum(losses[-3:]) < sum(losses[:3]), f"{name} has learnt nothing"
    return copy.deepcopy(_trained[name])


def gradients(model: nn.Module, batch: Batch, autocast: bool = False) -> dict[str, Tensor]:
    """Every parameter's gradient of one step whose dropout is drawn from a fixed seed."""
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model, batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
