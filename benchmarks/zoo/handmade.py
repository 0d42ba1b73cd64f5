"""Model types whose small configuration or batch cannot be guessed, and a few variants of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zoo.batches import SAMPLES, TARGETS, Batch, boxes, integers, masks, normal
from zoo.shrink import LAYERS, VOCABULARY, WIDTH

IMAGE, SIDE = 190, 32  # the image token's id, pixels
Made = tuple[nn.Module, list[Batch]]


@dataclass(frozen=True)
class Special:
    """What is told of a type; all that is not is guessed.

    Attributes:
        overrides: fields of its configuration.
        classes: that are tried.
        batches: by the configuration.
        make: the model and batches, with nothing guessed.
        kind: what it is for, where it is no type of its own.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    batches: Callable[[Any], Iterable[Batch]] | None = None
    make: Callable[[], Made] | None = None
    kind: str = ""


# ---------------------------------------------------------------------- configurations and batches

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    "image_size": SIDE,
    "patch_size": 8,
}
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL_RESNET: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "layer_type": "basic"}
ATTENTION_OF_DETR: dict[str, Any] = {
    "decoder_layers": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


def _made(class_name: str, config_name: str, *batches: Batch, **options: Any) -> Made:
    config = getattr(transformers, config_name)(**options)
    return getattr(transformers, class_name)(config), list(batches)


def _attended(ids: Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _language(length: int = 20) -> Batch:
    ids = integers(3, 150, SAMPLES, length)
    return _attended(ids) | {"labels": ids}


def _with_image(places: int, length: int) -> Batch:
    """Text after as many image tokens as `places`, and an image."""
    ids = torch.cat([torch.full((SAMPLES, places), IMAGE), integers(3, 150, SAMPLES, length)], dim=1)
    return _attended(ids) | {"pixel_values": normal(SAMPLES, 3, SIDE, SIDE), "labels": ids}


def _images(side: int = 64) -> Batch:
    return {"pixel_values": normal(SAMPLES, 3, side, side)}


def _objects() -> list[Batch]:
    return [_images() | {"labels": boxes()}, _images()]


def _segments() -> list[Batch]:
    return [_images() | masks(64), _images()]


def _phrases(config: Any) -> list[Batch]:
    """Two phrases an image."""
    side = config.vision_config.image_size
    return [_attended(integers(3, 150, 2 * SAMPLES, 8)) | _images(side)]


def _swin(kind: str) -> Any:
    return getattr(transformers, kind)(
        image_size=64,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2, 2, 2],
        num_heads=[2, 4, 8, 8],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


# ---------------------------------------------------------------------- models


def _mask2former() -> Made:
    return _made(
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        *_segments(),
        backbone_config=_swin("SwinConfig"),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        dim_feedforward=64,
        encoder_layers=4,
        decoder_layers=5,
        num_attention_heads=4,
        num_queries=10,
        train_num_points=64,
        num_labels=3,
    )


def _maskformer() -> Made:
    backbone = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1])
    detr = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        num_queries=10,
        **ATTENTION_OF_DETR,
    )
    return _made(
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        *_segments(),
        backbone_config=_swin("MaskFormerSwinConfig"),
        decoder_config=detr,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )


def _rt_detr(version: str) -> Made:
    stages = ["stage2", "stage3", "stage4"]
    backbone = transformers.RTDetrResNetConfig(**SMALL_RESNET, depths=[2, 2, 2, 2], out_features=stages)
    return _made(
        f"RTDetr{version}ForObjectDetection",
        f"RTDetr{version}Config",
        *_objects(),
        backbone_config=backbone,
        encoder_hidden_dim=32,
        d_model=32,
        encoder_in_channels=[32, 64, 64],
        decoder_in_channels=[32, 32, 32],
        num_queries=10,
        num_denoising=0,
        num_labels=3,
        **ATTENTION_OF_DETR,
    )


def _blip2(name: str, *batches: Batch) -> Made:
    opt = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        ffn_dim=2 * WIDTH,
        num_attention_heads=4,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=128,
    )
    return _made(
        f"{name}ForConditionalGeneration",
        f"{name}Config",
        *batches,
        vision_config=VISION,
        qformer_config=TEXT | {"encoder_hidden_size": WIDTH, "cross_attention_frequency": 2},
        text_config=opt.to_dict(),
        num_query_tokens=8,
        image_token_index=IMAGE,
    )


def _instructblip() -> Made:
    question = integers(3, 150, SAMPLES, 6)
    asked = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    return _blip2("InstructBlip", _with_image(8, 12) | asked)


def _musicgen() -> Made:
    books = 4
    batch = {"input_ids": integers(0, 60, SAMPLES * books, 16)}
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "ffn_dim": 2 * WIDTH}
    conditioned = batch | {"encoder_hidden_states": normal(SAMPLES, 6, WIDTH)}
    options = sizes | {"num_attention_heads": 4, "num_codebooks": books}
    return _made("MusicgenForCausalLM", "MusicgenDecoderConfig", conditioned, batch, **options)


def _esm() -> Made:
    ids = integers(4, 30, SAMPLES, 20)
    tokens = {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1, "position_embedding_type": "rotary"}
    return _made("EsmForMaskedLM", "EsmConfig", _attended(ids) | {"labels": ids}, **TEXT | tokens)


def _dbrx() -> Made:
    return _made(
        "DbrxForCausalLM",
        "DbrxConfig",
        _language(),
        d_model=WIDTH,
        n_heads=4,
        n_layers=LAYERS,
        vocab_size=VOCABULARY,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"hidden_size": WIDTH, "ffn_hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
    )


def _llama4() -> Made:
    text = transformers.Llama4TextConfig(
        **TEXT | {"intermediate_size": WIDTH},
        intermediate_size_mlp=2 * WIDTH,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        **ENDS,
    )
    projected = {"vision_output_dim": WIDTH, "projector_input_dim": WIDTH, "projector_output_dim": WIDTH}
    return _made(
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        _with_image(4, 16),
        _language(),
        text_config=text.to_dict(),
        vision_config=VISION | projected | {"intermediate_size": 4 * WIDTH, "pixel_shuffle_ratio": 0.5},
        image_token_index=IMAGE,
    )


def _layoutlmv3() -> Made:
    corner = integers(0, 400, SAMPLES, 20, 2)
    batch = _attended(integers(3, 150, SAMPLES, 20)) | _images(SIDE)
    batch |= {"bbox": torch.cat([corner, corner + 5], dim=-1), "labels": integers(0, 3, SAMPLES, 20)}
    sizes = {"hidden_size": 36, "coordinate_size": 6, "shape_size": 6, "input_size": SIDE, "patch_size": 8}
    options = TEXT | sizes | {"intermediate_size": 64, "max_position_embeddings": 64, "num_labels": 3}
    return _made("LayoutLMv3ForTokenClassification", "LayoutLMv3Config", batch, **options)


def _pix2struct() -> Made:
    patches = normal(SAMPLES, 16, 50)
    patches[:, :, :2] = integers(1, 5, SAMPLES, 16, 2).float()
    batch = {"flattened_patches": patches, "attention_mask": torch.ones(SAMPLES, 16)}
    batch["labels"] = integers(3, 150, SAMPLES, TARGETS)
    starts = {"decoder_start_token_id": 0, "pad_token_id": 0}
    part = {"hidden_size": WIDTH, "d_kv": 16, "d_ff": 2 * WIDTH}
    patchwork = {"patch_embed_hidden_size": 48, "num_attention_heads": 4, "seq_len": 16, "patch_size": 4}
    return _made(
        "Pix2StructForConditionalGeneration",
        "Pix2StructConfig",
        batch,
        text_config=part
        | {"vocab_size": VOCABULARY, "num_layers": LAYERS, "num_heads": 4, "is_decoder": True}
        | starts,
        vision_config=part | {"num_hidden_layers": LAYERS} | patchwork,
        is_encoder_decoder=True,
        **starts,
    )


def _clap() -> Made:
    swin = {"window_size": 4, "depths": [2, 2], "num_attention_heads": [2, 2], "num_hidden_layers": 2}
    spectrogram = {"num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4]}
    sizes = {"patch_embeds_hidden_size": 16, "hidden_size": 32, "projection_dim": 32, "enable_fusion": False}
    batch = {"input_features": normal(SAMPLES, 1, 256, 16), "return_loss": True}
    return _made(
        "ClapModel",
        "ClapConfig",
        batch | _attended(integers(3, 150, SAMPLES, 10)),
        text_config=TEXT | {"max_position_embeddings": 64, "projection_dim": 32},
        audio_config=spectrogram | swin | sizes,
        projection_dim=32,
    )


def _autoformer() -> Made:
    ahead, seen = 8, 19
    batch = {
        "past_values": normal(SAMPLES, seen),
        "past_time_features": normal(SAMPLES, seen, 1),
        "past_observed_mask": torch.ones(SAMPLES, seen),
        "future_values": normal(SAMPLES, ahead),
        "future_time_features": normal(SAMPLES, ahead, 1),
    }
    return _made(
        "AutoformerForPrediction",
        "AutoformerConfig",
        batch,
        prediction_length=ahead,
        context_length=16,
        lags_sequence=[1, 2, 3],
        num_time_features=1,
        moving_average=5,
        label_length=4,
        d_model=32,
        encoder_layers=4,
        **ATTENTION_OF_DETR,
    )


def _sam() -> Made:
    windows = {"window_size": 4, "global_attn_indexes": [1, 3], "output_channels": 16, "mlp_dim": 2 * WIDTH}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return _made("SamVisionModel", "SamVisionConfig", _images(), **sizes, image_size=64, patch_size=8, **windows)


def _rwkv() -> Made:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "context_length": 64}
    options = sizes | {"attention_hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "use_cache": False}
    return _made("RwkvForCausalLM", "RwkvConfig", _language(), **options)


def _depth_anything() -> Made:
    backbone = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    return _made(
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        _images(SIDE),
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=WIDTH,
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type="metric",  # the relative one ends in a ReLU that is dead here
        max_depth=1,
    )


def _chameleon() -> Made:
    channels = {"embed_dim": 16, "num_embeddings": 32, "latent_channels": 16, "base_channels": 32}
    return _made(
        "ChameleonForConditionalGeneration",
        "ChameleonConfig",
        _language(),
        **TEXT,
        num_key_value_heads=4,
        vq_config=channels | {"channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []},
        vocabulary_map={"<image>": 8, "IMGIMGAA": 100, "IMGIMGBA": 101},
    )


def _mllama() -> Made:
    tiles = 4
    ids = integers(3, 150, SAMPLES, 16)
    ids[:, 1] = IMAGE
    batch = _attended(ids) | {
        "pixel_values": normal(SAMPLES, 1, tiles, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.ones(SAMPLES, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(SAMPLES, 1, tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(SAMPLES, 16, 1, tiles, dtype=torch.long),
        "labels": ids,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = TEXT | ENDS | {"num_key_value_heads": 2, "cross_attention_layers": [1, 3], "rope_parameters": rope}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_global_layers": 2,
        "attention_heads": 4,
        "intermediate_size": 64,
        "image_size": SIDE,
        "patch_size": 8,
        "vision_output_dim": 96,
        "intermediate_layers_indices": [1, 3],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [1, 3], [3, 1], [1, 4], [2, 2], [4, 1]],
        "max_num_tiles": tiles,
    }
    options = {"text_config": text, "vision_config": vision, "image_token_index": IMAGE}
    return _made("MllamaForConditionalGeneration", "MllamaConfig", batch, **options)


SHARED_KEYS: dict[str, Any] = TEXT | {
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
}


def _gemma3n() -> Made:
    sparse = [0.95] * 2 + [0.0] * 6
    options = SHARED_KEYS | {"laurel_rank": 8, "activation_sparsity_pattern": sparse}
    return _made("Gemma3nForCausalLM", "Gemma3nTextConfig", _language(), **options)


def _gemma4() -> Made:
    return _made("Gemma4ForCausalLM", "Gemma4TextConfig", _language(), **SHARED_KEYS, global_head_dim=16)


def _reformer() -> Made:
    ids = integers(3, 150, SAMPLES, 32)
    return _made(
        "ReformerModelWithLMHead",
        "ReformerConfig",
        {"input_ids": ids, "labels": ids},
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_attention_heads=4,
        attention_head_size=16,
        feed_forward_size=2 * WIDTH,
        attn_layers=["local", "lsh", "local", "lsh"],
        axial_pos_shape=[4, 8],
        axial_pos_embds_dim=[16, 48],
        is_decoder=True,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        num_buckets=4,
        max_position_embeddings=32,
    )


def _two_towers(name: str, **options: Any) -> Made:
    """Both towers of a contrastive model with its loss; the type alone finds one of them."""
    ids = integers(3, 150, SAMPLES, 12)
    ids[:, -1] = VOCABULARY - 1
    batch = _attended(ids) | _images(SIDE) | {"return_loss": True}
    if name == "Siglip":
        del batch["attention_mask"]
    text = TEXT | {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": VOCABULARY - 1}
    return _made(f"{name}Model", f"{name}Config", batch, text_config=text, vision_config=VISION, **options)


def _lora() -> Made:
    import peft

    config = transformers.LlamaConfig(**TEXT | {"num_hidden_layers": 6}, num_key_value_heads=2)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters), [_language()]


def _captions() -> Made:
    gpt2 = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        add_cross_attention=True,
        is_decoder=True,
    )
    vit = transformers.ViTConfig(**VISION)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
    config.decoder_start_token_id = config.pad_token_id = 0
    batch = _images(SIDE) | {"labels": integers(3, 150, SAMPLES, 10)}
    return transformers.VisionEncoderDecoderModel(config), [batch]


SPECIAL: dict[str, Special] = {
    "autoformer": Special(make=_autoformer),
    "bailing_hybrid": Special(overrides={"layer_group_size": 2}),
    "bamba": Special(overrides={"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16}),
    "blip-2": Special(make=lambda: _blip2("Blip2", _with_image(8, 12))),
    "chameleon": Special(make=_chameleon),
    "clap": Special(make=_clap),
    "dbrx": Special(make=_dbrx),
    "deepseek_v2": Special(
        overrides={
            "num_experts_per_tok": 2,
            "n_routed_experts": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "qk_rope_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        }
    ),
    "depth_anything": Special(make=_depth_anything),
    "dots1": Special(
        overrides={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    ),
    "efficientnet": Special(
        overrides={"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 64}
    ),
    "emu3": Special(classes=("Emu3Model",)),
    "esm": Special(make=_esm),
    "falcon_h1": Special(overrides={"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}),
    "gemma3n_text": Special(
        overrides={
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": 64,
        }
    ),
    "gpt_neo": Special(
        overrides={
            "attention_types": [[["global", "local"], 2]],
            "num_layers": LAYERS,
            "hidden_size": WIDTH,
            "num_heads": 4,
        }
    ),
    "granitemoehybrid": Special(overrides={"layer_types": ["mamba", "attention", "mamba", "attention"]}),
    "hunyuan_v1_dense": Special(overrides={"head_dim": 16}),
    "hunyuan_v1_moe": Special(overrides={"head_dim": 16}),
    "instructblip": Special(make=_instructblip),
    "jamba": Special(overrides={"attn_layer_offset": 1, "attn_layer_period": 2, "num_key_value_heads": 2}),
    "kimi_linear": Special(overrides={"layer_types": ["linear_attention", "full_attention"] * 2}),
    "layoutlmv3": Special(make=_layoutlmv3),
    "lfm2_moe": Special(overrides={"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "llama4": Special(make=_llama4),
    "longcat_flash": Special(overrides={"num_key_value_heads": 4, "qk_rope_head_dim": 8, "head_dim": 8}),
    "lw_detr": Special(batches=lambda config: _objects()),
    "mamba2": Special(
        overrides={
            "head_dim": 16,
            "num_heads": 8,
            "hidden_size": WIDTH,
            "n_groups": 2,
            "state_size": 16,
            "chunk_size": 8,
        }
    ),
    "mask2former": Special(make=_mask2former),
    "maskformer": Special(make=_maskformer),
    "ministral": Special(overrides={"head_dim": 16}),
    "mistral4": Special(overrides={"num_key_value_heads": 4, "qk_rope_head_dim": 8, "head_dim": 8}),
    "mllama": Special(make=_mllama),
    "musicgen": Special(make=_musicgen),
    "nemotron": Special(overrides={"num_key_value_heads": 4, "head_dim": 16}),
    "owlv2": Special(batches=_phrases),
    "owlvit": Special(batches=_phrases),
    "pix2struct": Special(make=_pix2struct),
    "reformer": Special(make=_reformer),
    "rt_detr": Special(make=lambda: _rt_detr("")),
    "rt_detr_v2": Special(make=lambda: _rt_detr("V2")),
    "rwkv": Special(make=_rwkv),
    "sam": Special(make=_sam),
    "vision-encoder-decoder": Special(make=_captions),
    "vits": Special(overrides={"upsample_initial_channel": 32}),
    "whisper": Special(classes=("WhisperForConditionalGeneration",)),
    "zamba": Special(overrides={"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2}),
    "zamba2": Special(
        overrides={"hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
    ),
    # No types of their own.
    "clip+towers": Special(make=lambda: _two_towers("CLIP", projection_dim=32), kind="multimodal"),
    "siglip+towers": Special(make=lambda: _two_towers("Siglip"), kind="multimodal"),
    "gemma3n_text+shared": Special(make=_gemma3n, kind="decoder"),
    "gemma4_text+shared": Special(make=_gemma4, kind="decoder"),
    "llama+lora": Special(make=_lora, kind="decoder"),
}
