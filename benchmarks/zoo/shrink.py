"""Small configurations of any transformers model type: few layers, narrow, few words, small images.

No table of 800 configurations is kept: a field's name says what it counts. A few names have their own bound, others
follow from the words in them; what must agree with something else (sizes of patches, windows, kernels) is left alone.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 200
SPECIAL = 45  # of these the last stand for special tokens; text is drawn from those before
LAYERS, WIDTH, INNER, HEADS = 4, 64, 64, 4
# How much is made smaller: most of it; the same with as many heads for keys as for queries; only what sets the depth
# and the vocabulary.
LEVELS = ("small", "ungrouped", "shallow")

_AT_MOST = {
    VOCABULARY: """vocab_size text_vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input""",
    512: """max_position_embeddings n_positions n_ctx max_seq_len""",
    128: """mamba_d_ssm""",
    64: """max_source_positions max_target_positions codebook_size train_num_points encoder_hash_byte_group_vocab
        codebook_vocab_size audio_vocab_size image_vocab_size dim_model_base position_embedding_size
        hidden_size_global""",
    50: """entity_vocab_size""",
    32: """q_lora_rank moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size projection_dim
        embedding_size""",
    16: """head_dim d_kv d_head kv_channels attention_head_dim v_head_dim qk_nope_head_dim global_head_dim swa_head_dim
        linear_key_head_dim linear_value_head_dim linear_head_dim kv_lora_rank index_head_dim mamba_d_state
        mamba_d_head ssm_state_size state_size mamba_head_dim codebook_dim num_conv_pos_embeddings classifier_proj_size
        xvector_output_dim num_codevectors_per_group codevector_dim proj_codevector_dim hidden_size_per_layer_input
        num_image_tokens image_seq_length image_seq_len query_pre_attn_scalar qkv_dim segment_means_seq_len
        resampler_head_dim resampler_dim_head input_feat_size dim_head""",
    10: """num_queries two_stage_num_proposals""",
    8: """qk_rope_head_dim index_topk mamba_n_heads mamba_chunk_size mamba_num_heads time_step_rank mamba_dt_rank
        num_query_tokens query_tokens laurel_rank rotary_dim sliding_window attention_chunk_size chunk_size
        time_mix_extra_dim block_size num_latents resampler_n_latents resampler_num_latents subsampling_conv_channels
        max_patch_length""",
    7: """conv_depthwise_kernel_size""",
    5: """num_labels""",
    4: """linear_num_value_heads linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts
        num_codebooks num_quantizers num_negatives mm_tokens_per_image num_parallel_samples num_landmarks
        conf_num_hidden_layers conf_num_attention_heads num_groups""",
    2: """linear_num_key_heads index_n_heads num_key_value_heads num_global_key_value_heads swa_num_key_value_heads
        n_head_kv multi_query_group_num num_experts_per_tok moe_topk moe_k zero_expert_num top_k_experts
        num_conv_pos_embedding_groups num_kv_shared_layers max_window_layers""",
    1: """n_group topk_group first_k_dense_replace num_dense_layers moe_layer_start_index max_num_tiles""",
    0: """num_denoising num_nextn_predict_layers""",
}
BOUNDS = {name: bound for bound, names in _AT_MOST.items() for name in names.split()}
_KEY_HEADS = ("num_key_value_heads", "num_global_key_value_heads", "n_head_kv", "swa_num_key_value_heads")

_TOKEN = re.compile(
    r"(_token_id|_token_index|_token_idx|(^|_)(bos|eos|pad|sep|cls|mask|boi|eoi|boa|eoa|image|audio|video|blank|im_start"
    r"|im_end|im_newline|tag_pad|subs_pad)(_token)?_(id|index|idx))$"
)
_DEPTH = re.compile(r"(^|_)(n_layers?|depth|num_blocks|n_blocks)$|layers$")
_LEFT_ALONE = re.compile(
    r"image_size|patch_size|patch_length|kernel|window|stride|sampling|rate$|temperature|_id$|_ids$|_index$|position"
    r"|max_|min_|token|chunk|mel_bins|crop|resolution|num_frames|length|bins|buckets|max_len|in_channels$"
    r"|^num_channels$|n_ctx|group|theta|_prob|spec_size|ignore|feature_size$|hop|_steps|grid|_range|n_window|seq|merge"
    r"|downsample_factor|pooling|pool_|expansion|mult$|factor"
)
_INNER = re.compile(r"intermediate|ffn|d_ff|mlp|feedforward|feed_forward|n_inner|linear_units|dff|d_inner")
_WIDE = re.compile(r"hidden|dim|size|width|channels|embd|d_model|units|filters|embed|d_")
_DEPTHS = {
    "depths",
    "layers",
    "num_block",
    "stage_depths",
    "layer_config",
    "num_blocks",
    "blocks_per_stage",
    "stage_layers",
}
_WIDTHS = re.compile(r"hidden_sizes|embed_dims?|channels|dims|widths?|block_out")
_token_ids: dict[str, int] = {}


def shrink(config: PreTrainedConfig, level: str, overrides: dict[str, Any] | None = None, inner: bool = False) -> Any:
    """Return a small configuration of the same class.

    Args:
        config: the class's default.
        level: how much, one of `LEVELS`.
        overrides: fields that are set whatever is found here.
        inner: whether it is part of another one, whose values then count as chosen and not as defaults.
    """
    kind = type(config)
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    parts = {n: v for n, v in vars(config).items() if isinstance(v, PreTrainedConfig) and not n.startswith("_")}
    changed: dict[str, Any] = {name: shrink(part, level, inner=True) for name, part in parts.items()}
    for name in [name for name in fields if name in vars(config) and name not in parts]:
        value = _field(name, vars(config)[name], fields[name], level, inner)
        if value is not None:
            changed[name] = value
    _images(config, fields, changed)
    if "image_grid_pinpoints" in fields and "vision_config" in changed:  # an image is seen whole, and as one tile
        side = changed["vision_config"].image_size
        changed["image_grid_pinpoints"] = [[side, side]]
    if level != "shallow":
        _rope(config, fields, changed)
        _windows(config, fields, changed)
    changed = {name: value for name, value in changed.items() if name in fields or name in parts} | (overrides or {})
    try:
        return kind(**changed)
    except Exception:
        # Lists with an entry per layer are cut to the layers that are left.
        depth, all_layers = changed.get("num_hidden_layers", LAYERS), getattr(config, "num_hidden_layers", -1)
        cut = {n: v[:depth] for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == all_layers}
        if not {name for name in cut if name in fields and name not in changed}:
            raise
        return kind(**{name: value for name, value in cut.items() if name in fields}, **changed)


def _field(name: str, value: Any, default: Any, level: str, inner: bool) -> Any:
    """Return the small value of a field, or None where it is left to the class."""
    if isinstance(default, (list, tuple)):
        small = _list(name, default, level)
        return small if small != default else None
    if not isinstance(value, int) or isinstance(value, bool):
        if inner and isinstance(value, (str, bool, float)) and value != default:
            return "resnet18" if value == "resnet50" else value
        if isinstance(value, (list, tuple)) and value and (inner or name in ("depths", "hidden_sizes", "layers")):
            small = _list(name, value, level)
            return small if small != value else None
        return None
    small = _integer(name, value, level)
    if default is None and name not in ("out_hidden_size", "num_key_value_heads", "num_labels"):
        # Derived from others: let it be derived again.
        return small if name.endswith("_id") and small != value else None
    return small if small != default else None


def _integer(name: str, value: int, level: str) -> int:
    if _TOKEN.search(name) and value >= VOCABULARY - SPECIAL:
        return _token_ids.setdefault(name, VOCABULARY - 1 - len(_token_ids) % (SPECIAL - 5))
    if name in _KEY_HEADS and value > 1:
        return 4 if level == "ungrouped" else 2
    if name in BOUNDS:
        return value if level == "shallow" and not re.search("vocab|layers", name) else min(value, BOUNDS[name])
    if _DEPTH.search(name):
        return min(value, LAYERS)
    if level == "shallow" or _LEFT_ALONE.search(name):
        return value
    if re.search(r"heads?$|experts$", name):
        return min(value, HEADS)
    if _INNER.search(name):
        return min(value, INNER)
    return min(value, WIDTH) if _WIDE.search(name) else value


def _list(name: str, value: Any, level: str) -> Any:
    """Return fewer layers a stage, or narrower stages in about the same ratios."""
    integers = bool(value) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if name == "conv_dim" and level != "shallow":
        return type(value)([16] * len(value))
    if name in _DEPTHS and integers:
        return type(value)([min(v, 3) for v in value])
    if integers and max(value) >= 64 and _WIDTHS.search(name) and level != "shallow":
        least = min(v for v in value if v > 0)
        base = 24 if least % 3 == 0 and least % 32 else 16  # widths that three heads divide stay so
        return type(value)([max(base, round(base * v / least) // base * base) if v > 0 else v for v in value])
    return value


def _images(config: Any, fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """Patches of eight pixels at most, images of four by four patches."""
    patch = getattr(config, "patch_size", None)
    if "patch_size" in fields and isinstance(patch, int) and patch > 8:
        changed["patch_size"] = patch = 8
    side = 4 * patch if isinstance(patch, int) and patch >= 8 else 64
    for name in ("image_size", "img_size", "pretrain_image_size", "input_size"):
        value = getattr(config, name, None)
        if name not in fields or value is None:
            continue
        if isinstance(value, int) and value > side:
            changed[name] = side
        elif isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, int) for v in value):
            changed[name] = type(value)([side, side])


def _rope(config: Any, fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """Rotary settings that hold one entry per half head follow the smaller head."""
    old = getattr(config, "rope_parameters", None)
    width = changed.get("head_dim") or getattr(config, "head_dim", None)
    if "head_dim" not in changed:
        hidden = changed.get("hidden_size", getattr(config, "hidden_size", WIDTH))
        heads = changed.get("num_attention_heads", getattr(config, "num_attention_heads", HEADS))
        width = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else 16
    if isinstance(old, dict):
        new = copy.deepcopy(old)
        _fit_rope(new, width, getattr(config, "partial_rotary_factor", 1.0))
        if new != old:
            changed["rope_parameters"] = new
    if not (_uses_sections(type(config)) and "rope_parameters" in fields and hasattr(config, "num_attention_heads")):
        return
    rope = changed.get("rope_parameters") or copy.deepcopy(old) or {"rope_type": "default", "rope_theta": 10000.0}
    if isinstance(rope, dict) and "mrope_section" not in rope and not any(isinstance(v, dict) for v in rope.values()):
        half = int((changed.get("head_dim") or 16) * (rope.get("partial_rotary_factor") or 1)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        changed["rope_parameters"] = rope


def _fit_rope(rope: dict[str, Any], width: int, partial: float | None) -> None:
    for name, value in list(rope.items()):
        if isinstance(value, dict):
            _fit_rope(value, width, partial)
        elif name == "mrope_section":
            half = int(width * (rope.get("partial_rotary_factor", partial) or 1.0)) // 2
            share = half // len(value)
            rope[name] = [half - share * (len(value) - 1)] + [share] * (len(value) - 1)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            rope[name] = value[: width // 2]
        elif name == "original_max_position_embeddings":
            rope[name] = min(value, BOUNDS["max_position_embeddings"])


def _uses_sections(kind: type) -> bool:
    """Whether the model's rotary embedding is split over time, height and width, told or not."""
    folder = Path(inspect.getfile(kind)).parent
    return any("mrope_section" in path.read_text() for path in folder.glob("modeling_*.py"))


def _windows(config: Any, fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """Swin and its kin: windows, stages and widths have to fit the smaller image together."""
    stages = all(isinstance(getattr(config, name, None), (list, tuple)) for name in ("depths", "num_heads"))
    if not stages or not isinstance(getattr(config, "embed_dim", None), int) or "window_size" not in fields:
        return
    changed |= {"embed_dim": 16, "depths": [2, 2, 4], "num_heads": [2, 4, 8]}
    changed |= {"window_size": 4, "patch_size": 2, "image_size": 64}
    for name in ("num_layers", "out_features", "out_indices", "stage_names", "_out_features", "_out_indices"):
        changed.pop(name, None)
