"""Models of transformers whose layers keep other states than keys and values, and detectors with learned queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import abyssal
from toys.distributed import relative_error
from toys.huggingface import Maker, import_transformers, make, step

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def qwen3_next() -> tuple[nn.Module, dict[str, Tensor]]:
    """Gated delta nets, every fourth layer attention."""
    transformers = import_transformers()
    config = transformers.Qwen3NextConfig(
        **SIZES,
        **HEADS,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=0,
    )
    return transformers.Qwen3NextForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def lfm2() -> tuple[nn.Module, dict[str, Tensor]]:
    """Short convolutions, then attention."""
    transformers = import_transformers()
    kinds = ["conv", "conv", "full_attention", "conv"]
    config = transformers.Lfm2Config(**SIZES, **HEADS, layer_types=kinds, block_auto_adjust_ff_dim=False)
    return transformers.Lfm2ForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def mamba() -> tuple[nn.Module, dict[str, Tensor]]:
    """State spaces only; the cache is called `cache_params`."""
    transformers = import_transformers()
    config = transformers.MambaConfig(**SIZES, state_size=4)
    return transformers.MambaForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def falcon_h1() -> tuple[nn.Module, dict[str, Tensor]]:
    """State spaces and attention in each layer."""
    transformers = import_transformers()
    config = transformers.FalconH1Config(**SIZES, **HEADS, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
    return transformers.FalconH1ForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def gemma3n() -> tuple[nn.Module, dict[str, Tensor]]:
    """The last layers attend to the keys of earlier ones."""
    transformers = import_transformers()
    config = transformers.Gemma3nTextConfig(
        **SIZES,
        **HEADS,
        head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
        activation_sparsity_pattern=None,
        laurel_rank=4,
    )
    return transformers.Gemma3nForCausalLM(config), {"input_ids": IDS, "labels": IDS}


class Detector(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor) -> Tensor:
        found = self.inner(pixel_values)
        return torch.cat([found.logits, found.pred_boxes], dim=-1)


def deformable_detr() -> tuple[nn.Module, dict[str, Tensor]]:
    """The decoder's first stream are learned queries, expanded over the batch."""
    transformers = import_transformers()
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_feature_levels=2,
        num_queries=5,
        num_labels=3,
    )
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Detector(transformers.DeformableDetrForObjectDetection(config)), {"pixel_values": image}


RECURRENT: list[Maker] = [qwen3_next, lfm2, mamba, falcon_h1]
CONTINUED: list[Maker] = [lfm2, mamba, falcon_h1]  # the delta net writes to a state that its own gradient needs
BOUNDS = {abyssal.Keep(): 1e-13, abyssal.Code(8): 1e-2}  # rounding in float64; a code of 8 bits


def name_of(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.slow
@pytest.mark.parametrize("policy", BOUNDS, ids=str)
@pytest.mark.parametrize("maker", [*RECURRENT, gemma3n, deformable_detr], ids=name_of)
def test_gradients(maker: Maker, policy: abyssal.Policy) -> None:
    plain, batch = make(maker)
    model = abyssal.reconstruct(make(maker)[0], policy)
    assert relative_error(step(model.train(), batch), step(plain.train(), batch)) <= BOUNDS[policy]


@pytest.mark.parametrize("maker", RECURRENT, ids=name_of)
def test_an_empty_cache_is_dropped_with_a_note(maker: Maker) -> None:
    """They make one by default in eval mode, most in training too."""
    plain, batch = make(maker)
    model = abyssal.reconstruct(make(maker)[0], abyssal.Keep())
    theirs = step(plain.eval(), batch, use_cache=True)
    assert relative_error(step(model.eval(), batch, use_cache=True), theirs) <= BOUNDS[abyssal.Keep()]
    for block in abyssal.certificate(model).blocks:
        assert block.policy == "Keep()"
        assert "empty key-value cache is dropped" in block.note


@pytest.mark.parametrize("policy", BOUNDS, ids=str)
@pytest.mark.parametrize("maker", CONTINUED, ids=name_of)
def test_states_of_earlier_tokens_make_the_blocks_plain(maker: Maker, policy: abyssal.Policy) -> None:
    name = "cache_params" if maker is mamba else "past_key_values"
    found = []
    for reconstructed in (False, True):
        model, batch = make(maker)
        if reconstructed:
            abyssal.reconstruct(model, policy)
        with torch.no_grad():
            past = model.eval()(input_ids=batch["input_ids"], use_cache=True)[name]
        found.append(step(model, batch, **{name: past}, use_cache=True))
    assert relative_error(found[1], found[0]) == 0.0
    for block in abyssal.certificate(model).blocks:
        assert "ran as Store(): a key-value cache that is not empty" in block.note
