"""Tiny models of Hugging Face, timm and torchvision, made from configurations: nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal.models.torchvision import import_torchvision

TOKENS, VOCABULARY, DEPTH = 7, 61, 3


def import_transformers() -> Any:
    """transformers, after torchvision, which it imports and which may not fit a CPU build of torch."""
    pytest.importorskip("transformers")
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    import transformers

    return transformers


def _ids(seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def _image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _padded() -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, -2:] = 0
    return mask


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = import_transformers()
    config = transformers.GPT2Config(
        n_layer=DEPTH,
        n_embd=32,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": _ids(), "labels": _ids()}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        num_hidden_layers=DEPTH,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    batch = {"input_ids": _ids(), "attention_mask": _padded(), "labels": _ids()}
    return transformers.LlamaForCausalLM(config), batch


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = import_transformers()
    config = transformers.BertConfig(
        num_hidden_layers=DEPTH,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    batch = {"input_ids": _ids(), "attention_mask": _padded(), "labels": _ids()}
    return transformers.BertForMaskedLM(config), batch


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = import_transformers()
    config = transformers.ViTConfig(
        num_hidden_layers=DEPTH,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.1,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config), {
        "pixel_values": _image(),
        "labels": torch.tensor([1, 3]),
    }


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = import_transformers()
    config = transformers.T5Config(
        num_layers=DEPTH,
        num_decoder_layers=DEPTH,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_heads=2,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    batch = {"input_ids": _ids(), "attention_mask": _padded(), "labels": _ids(1)}
    return transformers.T5ForConditionalGeneration(config), batch


def _from_timm(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    pytest.importorskip("timm")
    import_torchvision()
    import timm

    return timm.create_model(name, num_classes=5, **options), {"x": _image(64 if "resnetv2" in name else 32)}


def timm_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    return _from_timm(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=DEPTH,
        num_heads=2,
        proj_drop_rate=0.1,
        drop_path_rate=0.2,
    )


def timm_convnext() -> tuple[nn.Module, dict[str, Tensor]]:
    return _from_timm("convnext_atto", depths=(2, 2, 3, 2), dims=(8, 16, 24, 32), drop_path_rate=0.2)


def timm_resnetv2() -> tuple[nn.Module, dict[str, Tensor]]:
    return _from_timm("resnetv2_50", layers=(2, 2, 3, 2), channels=(16, 32, 48, 64))


def torchvision_resnet18() -> tuple[nn.Module, dict[str, Tensor]]:
    pytest.importorskip("torchvision")
    import_torchvision()
    import torchvision

    return torchvision.models.resnet18(num_classes=5), {"x": _image()}


Maker = Callable[[], tuple[nn.Module, dict[str, Tensor]]]
MAKERS: list[Maker] = [
    gpt2,
    llama,
    bert,
    vit,
    t5,
    timm_vit,
    timm_convnext,
    timm_resnetv2,
    torchvision_resnet18,
]


def make(maker: Maker, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with seeded weights and its batch, in `dtype`."""
    torch.manual_seed(0)
    model, batch = maker()
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return model.to(dtype), batch


def loss_of(output: Any) -> Tensor:
    return output.square().sum() if isinstance(output, Tensor) else output.loss


def step(model: nn.Module, batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Every parameter's gradient after one step, whose dropout is drawn from a fixed seed."""
    model.zero_grad()
    torch.manual_seed(1)
    loss_of(model(**batch, **options)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def calm(model: nn.Module) -> nn.Module:
    """Make the residual branches small, so that their inputs can be restored.

    A freshly made transformer's embedding is small (standard deviation 0.02), which its first norm blows up.
    """
    with torch.no_grad():
        for block in abyssal.find_blocks(model).values():
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.1)
    return model
