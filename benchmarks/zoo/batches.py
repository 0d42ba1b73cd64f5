"""Batches for any transformers model, guessed from the arguments of its forward pass and from its configuration.

Several are offered, the likeliest first; the caller takes the first with which the model runs. A batch holds two
samples. All are drawn from fixed seeds.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.shrink import SPECIAL

Batch = dict[str, Any]
SAMPLES, TOKENS, TARGETS = 2, 20, 8
FIRST_WORD = 3  # ids before it are often padding and the like


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def boxes(samples: int = SAMPLES, labels: int = 2) -> list[dict[str, Tensor]]:
    """Two objects an image, as DETR and its kin want them."""
    corners = torch.tensor([[0.4, 0.4, 0.3, 0.3], [0.6, 0.5, 0.2, 0.4]])
    return [{"class_labels": integers(0, labels, 2, seed=3 + i), "boxes": corners.clone()} for i in range(samples)]


def masks(side: int, labels: int = 2, samples: int = SAMPLES) -> Batch:
    """Two masked objects an image."""
    return {
        "mask_labels": [(normal(2, side, side, seed=i) > 0).float() for i in range(samples)],
        "class_labels": [integers(0, labels, 2, seed=i) for i in range(samples)],
    }


def setting(config: Any, *names: str, depth: int = 0) -> Any:
    """Return the first of these fields that the configuration or a part of it has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not hasattr(value, "to_dict"):
            return value
    if depth < 3:
        for name, part in vars(config).items():
            if hasattr(part, "to_dict") and not name.startswith("_"):
                value = setting(part, *names, depth=depth + 1)
                if value is not None:
                    return value
    return None


def _one(value: Any, otherwise: int) -> int:
    """Return the integer, the first of several, or what is taken where there is none."""
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and value else otherwise


def image_token(config: Any) -> int | None:
    return setting(config, "image_token_id", "image_token_index")


def with_image_tokens(batch: Batch, token: int, count: int) -> Batch:
    """Return the batch with another number of places for image features in its text. `count`: a sample's."""
    ids = torch.cat(
        [
            integers(FIRST_WORD, 100, SAMPLES, 2, seed=1),
            torch.full((SAMPLES, count), token),
            integers(FIRST_WORD, 100, SAMPLES, 10, seed=2),
        ],
        dim=1,
    )
    changed = batch | {"input_ids": ids}
    if "attention_mask" in batch:
        changed["attention_mask"] = torch.ones_like(ids)
    if "labels" in batch:
        changed["labels"] = ids.clone()
    return changed | {n: (ids == token).long() for n in ("mm_token_type_ids", "token_type_ids") if n in batch}


class Guesses:
    """What a model may want.

    Args:
        config: its configuration.
        name: its class.
        arguments: of its forward pass.
    """

    def __init__(self, config: Any, name: str, arguments: set[str]):
        self.config, self.name, self.has = config, name, arguments.__contains__
        parts = ("vision_config", "vision_encoder_config", "image_config")
        found = [getattr(config, part, None) for part in parts]
        self.vision = next((part for part in found if hasattr(part, "to_dict")), config)
        self.side = _one(setting(self.vision, "image_size", "img_size", "input_size"), 64)
        channels = setting(self.vision, "num_channels", "in_channels", "in_chans")
        self.channels = channels if isinstance(channels, int) and 0 < channels <= 6 else 3
        self.patch = _one(setting(self.vision, "patch_size"), 8)
        self.frames = _one(setting(config, "num_frames", "frames_per_clip"), 4)
        words = _one(setting(config, "vocab_size"), 200)
        self.words = max(10, min(words - SPECIAL, 150)) if words > 60 else max(4, words - 2)
        self.ids = integers(FIRST_WORD, self.words, SAMPLES, TOKENS, seed=2)
        self.targets = integers(FIRST_WORD, self.words, SAMPLES, TARGETS, seed=6)
        self.width = _one(setting(config, "hidden_size", "d_model"), 64)
        self.labels = getattr(config, "num_labels", 2) or 2
        speaks = (
            "CausalLM|MaskedLM|ForConditionalGeneration|LMHead|ForPreTraining|Seq2Seq|Generation|ImageTextToText|WithLM"
        )
        self.speaks = re.search(speaks, name) is not None

    def __iter__(self) -> Iterator[Batch]:
        if any(map(self.has, ("image_grid_thw", "grid_thw", "image_grid_hw"))):
            yield from self.grids()
        if self.has("pixel_values"):
            yield from self.images_and_text() if self.has("input_ids") else self.images()
        if self.has("pixel_values_videos") and not self.has("pixel_values"):
            yield from self.labelled({"pixel_values_videos": self.pixels(self.frames)})
        for name in ("input_features", "input_values", "audio_values", "spectrogram", "audio", "input_waveform"):
            if self.has(name) and (name == "input_features" or not self.has("input_ids")):
                yield from self.sounds(name)
        if self.has("input_ids") and not self.has("pixel_values"):
            yield from self.texts()
        if self.has("past_values"):
            yield from self.series()
        yield from self.others()

    # ------------------------------------------------------------------ text

    def text(self, padded: bool, ids: Tensor | None = None) -> tuple[Batch, Tensor]:
        """Ids with what goes with them, and the mask of the words that count."""
        ids = self.ids if ids is None else ids
        mask = torch.ones_like(ids)
        if padded:
            mask[1, -4:] = 0
        batch: Batch = {"input_ids": ids}
        if self.has("attention_mask"):
            batch["attention_mask"] = mask
        if self.has("bbox"):
            corner = integers(0, 400, *ids.shape, 2, seed=4)
            batch["bbox"] = torch.cat([corner, corner + integers(1, 400, *ids.shape, 2, seed=5)], dim=-1)
        return batch, mask

    def spoken(self, batch: Batch, mask: Tensor | None = None) -> Iterator[Batch]:
        """With words to be predicted, where the model takes them."""
        if self.has("labels") and self.speaks:
            known = "input_ids" in batch and mask is not None
            yield batch | {"labels": batch["input_ids"].masked_fill(mask == 0, -100) if known else self.targets}
        if self.has("decoder_input_ids"):
            yield batch | {"decoder_input_ids": self.targets}
        yield batch

    def texts(self) -> Iterator[Batch]:
        yield from self.spoken(*self.text(padded=True))
        batch, mask = self.text(padded=False)
        yield from self.spoken(batch, mask)
        yield from self.spoken({name: value for name, value in batch.items() if name != "attention_mask"}, mask)
        streams = setting(self.config, "num_codebooks", "num_channels", "n_codebooks")
        if isinstance(streams, int):
            shapes = [(SAMPLES, TOKENS, streams), (SAMPLES, streams, TOKENS), (SAMPLES * streams, TOKENS)]
            yield from ({"input_ids": integers(FIRST_WORD, 30, *shape, seed=2)} for shape in shapes)

    # ------------------------------------------------------------------ images

    def pixels(self, *frames: int, side: int | None = None) -> Tensor:
        side = side or self.side
        return normal(SAMPLES, *frames, self.channels, side, side)

    def labelled(self, batch: Batch) -> Iterator[Batch]:
        """With classes, boxes or masks to be predicted, where the model's name says so."""
        labels: Any = None
        if self.has("labels") and not self.speaks:
            if re.search("Classification", self.name) and "Token" not in self.name:
                labels = integers(0, self.labels, SAMPLES, seed=3)
            elif re.search("ObjectDetection|ForDetection", self.name):
                labels = boxes(labels=self.labels)
            elif "SemanticSeg" in self.name:
                labels = integers(0, self.labels, SAMPLES, self.side, self.side, seed=3)
            elif "CTC" in self.name:
                labels = integers(FIRST_WORD, 10, SAMPLES, 4, seed=3)
        if labels is not None:
            yield batch | {"labels": labels}
        if self.has("mask_labels") and self.has("class_labels"):
            yield batch | masks(self.side, self.labels)
        yield batch

    def images(self) -> Iterator[Batch]:
        """Images alone, then clips, masked patches, and patches with their places."""
        for side in dict.fromkeys((self.side, 64, 32, 224)):
            batch: Batch = {"pixel_values": self.pixels(side=side)}
            yield from self.described(batch)
            if self.has("task_inputs"):
                batch["task_inputs"] = integers(1, 50, SAMPLES, 77, seed=9)
            yield from self.labelled(batch)
            if side == self.side:
                yield from self.labelled({"pixel_values": self.pixels(self.frames)})
                yield from self.hidden_patches()
                yield from self.placed_patches()

    def described(self, batch: Batch) -> Iterator[Batch]:
        """With words that a decoder predicts."""
        if self.has("decoder_input_ids"):
            if self.has("labels"):
                yield batch | {"labels": self.targets}
            yield batch | {"decoder_input_ids": self.targets}

    def hidden_patches(self) -> Iterator[Batch]:
        if not self.has("bool_masked_pos"):
            return
        patches = (self.side // self.patch) ** 2
        yield {"pixel_values": self.pixels(), "bool_masked_pos": normal(SAMPLES, patches) > 0}
        tubes = patches * self.frames // _one(setting(self.config, "tubelet_size"), 1)
        hidden = torch.arange(tubes).expand(SAMPLES, -1) < tubes // 2
        yield {"pixel_values": self.pixels(self.frames), "bool_masked_pos": hidden}

    def placed_patches(self) -> Iterator[Batch]:
        """Four by four patches, flattened."""
        if not any(map(self.has, ("pixel_position_ids", "pixel_attention_mask", "spatial_shapes"))):
            return
        batch: Batch = {"pixel_values": normal(SAMPLES, 16, self.channels * self.patch**2)}
        if self.has("spatial_shapes"):
            batch["spatial_shapes"] = torch.tensor([[4, 4]] * SAMPLES)
        if self.has("pixel_position_ids"):
            batch["pixel_position_ids"] = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(SAMPLES, -1, -1)
        if self.has("pixel_attention_mask"):
            yield from self.labelled(batch | {"pixel_attention_mask": torch.ones(SAMPLES, 16, dtype=torch.long)})
        yield from self.labelled(batch)

    def images_and_text(self) -> Iterator[Batch]:
        """As many image tokens as there may be image features; what is wrong is mended from the error's text."""
        token, patches = image_token(self.config), max(1, (self.side // self.patch) ** 2)
        patches = patches if patches <= 400 else 16
        counts = (patches, patches + 1, patches // 4, 4, 8, 1, patches * 2) if token is not None else (0,)
        sized = (True, False) if self.has("image_sizes") else (False,)
        for frames, sizes in itertools.product(((), (1,), (2,), (1, 1)), sized):
            for count in counts if not frames else counts[:2]:
                ids = self.ids
                if count:
                    ids = torch.cat([ids[:, :2], torch.full((SAMPLES, count), token), ids[:, 2:]], dim=1)
                batch, mask = self.text(padded=False, ids=ids)
                batch["pixel_values"] = self.pixels(*frames)
                self.beside_images(batch, ids == token)
                if sizes:
                    batch["image_sizes"] = torch.tensor([[self.side, self.side]] * SAMPLES)
                if self.has("return_loss"):
                    yield batch | {"return_loss": True}
                yield from self.spoken(batch, mask)
        for padded in (True, False):
            batch, mask = self.text(padded)
            yield from self.spoken(batch | ({"pixel_values": self.pixels()} if padded else {}), mask)

    def beside_images(self, batch: Batch, is_image: Tensor) -> None:
        if self.has("token_type_ids") and ("Gemma3" in self.name or "PaliGemma" in self.name):
            batch["token_type_ids"] = is_image.long()
        if self.has("mm_token_type_ids"):
            batch["mm_token_type_ids"] = is_image.long()

    def grids(self) -> Iterator[Batch]:
        """Patches in one long row with the grids that they come from, as Qwen-VL wants them."""
        merged = _one(setting(self.vision, "spatial_merge_size", "merge_size"), 2)
        side, words = 2 * merged, 4
        grid = torch.tensor([[1, side, side]] * SAMPLES)
        count, told = SAMPLES * side * side, getattr(self.vision, "temporal_patch_size", None) or 1
        for frames in dict.fromkeys((told, 1, 2)):
            row = normal(count, self.channels * frames * self.patch**2)
            if self.has("input_ids"):
                token = image_token(self.config)
                start = setting(self.config, "vision_start_token_id", "image_start_token_id")
                ids = self.ids.clone()
                if token is not None:
                    ids[:, 2 : 2 + words] = token
                    if start is not None:
                        ids[:, 1] = start
                batch, mask = self.text(padded=False, ids=ids)
                batch |= {"pixel_values": row, "image_grid_thw": grid}
                if self.has("mm_token_type_ids"):
                    batch["mm_token_type_ids"] = (ids == token).int()
                yield from self.spoken(batch, mask)
            else:
                name = "pixel_values" if self.has("pixel_values") else "hidden_states"
                of_grid = next(filter(self.has, ("grid_thw", "image_grid_thw", "image_grid_hw")))
                yield {name: row, of_grid: grid}
                shape = (self.channels, *((frames,) if frames > 1 else ()), self.patch, self.patch)
                yield {name: row.view(count, *shape), of_grid: grid}

    # ------------------------------------------------------------------ sound and the rest

    def sounds(self, name: str) -> Iterator[Batch]:
        bands = "num_mel_bins feature_size mel_bins num_mel_filters model_in_dim input_feat_per_channel"
        bands += " feature_projection_input_dim input_dim n_mels input_feat_size"
        mel = setting(self.config, *bands.split())
        mel = mel if isinstance(mel, int) else 80
        shapes: list[tuple[int, ...]] = []
        if length := setting(self.config, "max_source_positions"):
            shapes.append((SAMPLES, mel, 2 * length))
        if name != "input_features":
            shapes.append((SAMPLES, 8000))
        length = setting(self.config, "max_length")
        if isinstance(length, int) and length > 64 and name == "input_values":
            shapes.append((SAMPLES, length, mel))
        rest = [(64, mel), (mel, 64), (1, 8000), (8000,), (1, 256, mel), (1, mel, 64), (1024, mel)]
        for shape in shapes + [(SAMPLES, *shape) for shape in rest]:
            batch: Batch = {name: normal(*shape) * 0.5}
            if self.has("features_mask"):
                batch["features_mask"] = torch.ones(SAMPLES, shape[1])
            if self.has("input_ids"):
                yield from self.sounds_and_text(batch, shape, mel)
            else:
                yield from self.described(batch)
                if self.has("attention_mask") and len(shape) == 3 and name == "input_features":
                    mask = torch.ones(SAMPLES, shape[1], dtype=torch.long)
                    yield from self.labelled(batch | {"attention_mask": mask})
                yield from self.labelled(batch)

    def sounds_and_text(self, batch: Batch, shape: tuple[int, ...], mel: int) -> Iterator[Batch]:
        token = setting(self.config, "audio_token_id", "audio_token_index")
        for count in (0, 8, 16):
            ids = self.ids
            if count and token is not None:
                ids = torch.cat([ids[:, :2], torch.full((SAMPLES, count), token), ids[:, 2:]], dim=1)
            words, mask = self.text(padded=False, ids=ids)
            if self.has("input_features_mask"):
                length = shape[-1] if shape[1] == mel else shape[1]
                dtype = torch.bool if "Gemma" in self.name else torch.long
                words["input_features_mask"] = torch.ones(SAMPLES, length, dtype=dtype)
            if self.has("feature_attention_mask"):
                words["feature_attention_mask"] = torch.ones(SAMPLES, shape[-1], dtype=torch.long)
            yield from self.spoken(batch | words, mask)

    def series(self) -> Iterator[Batch]:
        config = self.config
        seen, ahead = _one(setting(config, "context_length"), 32), _one(setting(config, "prediction_length"), 8)
        channels = _one(setting(config, "num_input_channels", "input_size"), 1)
        if self.has("past_time_features"):
            total = seen + max(setting(config, "lags_sequence") or [0])
            features = setting(config, "num_time_features") or 0
            yield {
                "past_values": normal(SAMPLES, total),
                "past_time_features": normal(SAMPLES, total, features),
                "past_observed_mask": torch.ones(SAMPLES, total),
                "future_values": normal(SAMPLES, ahead),
                "future_time_features": normal(SAMPLES, ahead, features),
            }
        several = {"past_values": normal(SAMPLES, seen, channels)}
        if self.has("future_values"):
            yield several | {"future_values": normal(SAMPLES, ahead, channels)}
        one = {"past_values": normal(SAMPLES, seen)}
        yield several
        yield one
        yield {"past_values": [normal(seen) for _ in range(SAMPLES)], "freq": [0] * SAMPLES}
        frequency = torch.zeros(SAMPLES, 1, dtype=torch.long)
        yield one | {"past_values_padding": torch.zeros(SAMPLES, seen), "freq": frequency}

    def others(self) -> Iterator[Batch]:
        """Trajectories, hidden states, queries, patches of documents, codes."""
        has, config, width = self.has, self.config, self.width
        if has("states") and has("actions"):
            steps = 10
            states, actions = getattr(config, "state_dim", 17), getattr(config, "act_dim", 4)
            yield {
                "states": normal(SAMPLES, steps, states),
                "actions": normal(SAMPLES, steps, actions),
                "rewards": normal(SAMPLES, steps, 1),
                "returns_to_go": normal(SAMPLES, steps, 1),
                "timesteps": torch.arange(steps).repeat(SAMPLES, 1),
                "attention_mask": torch.ones(SAMPLES, steps),
            }
        if has("inputs_embeds") and not has("input_ids") and not has("pixel_values"):
            yield {"inputs_embeds": normal(SAMPLES, TOKENS, width)}
        if has("inputs"):
            yield {"inputs": integers(FIRST_WORD, 100, SAMPLES, TOKENS, seed=2)}
            yield {"inputs": normal(SAMPLES, setting(config, "num_latents") or 8, setting(config, "d_model") or 64)}
        if has("hidden_states"):
            yield {"hidden_states": normal(SAMPLES, TOKENS, width)}
            yield {"hidden_states": normal(SAMPLES, width, TOKENS)}
        if has("query_embeds"):
            queries = {"query_embeds": normal(SAMPLES, 8, width)}
            yield queries | {
                "encoder_hidden_states": normal(SAMPLES, 12, setting(config, "encoder_hidden_size") or width)
            }
            yield queries
        if has("flattened_patches"):
            yield from self.documents()
        for name in ("codes", "audio_codes"):
            if has(name):
                yield {name: integers(0, 30, SAMPLES, 4, TOKENS, seed=2)}

    def documents(self) -> Iterator[Batch]:
        patch = _one(setting(self.config, "patch_size"), 16)
        told = setting(self.config, "patch_embed_hidden_size") or 768
        for width in (2 + 3 * patch**2, told, 770):
            patches = normal(SAMPLES, 16, width)
            patches[:, :, :2] = integers(1, 5, SAMPLES, 16, 2).float()
            batch: Batch = {"flattened_patches": patches, "attention_mask": torch.ones(SAMPLES, 16)}
            if self.has("labels"):
                yield batch | {"labels": self.targets}
            if self.has("input_ids"):
                yield batch | {"input_ids": self.ids}
            yield batch
