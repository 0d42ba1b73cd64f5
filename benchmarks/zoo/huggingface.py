"""Every model type of transformers, small, with a batch that it runs on."""

from __future__ import annotations

import copy
import inspect
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
import transformers.modeling_utils
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from zoo.batches import SAMPLES, Batch, Guesses, image_token, with_image_tokens
from zoo.handmade import SPECIAL, Special
from zoo.measure import Step, Subject, lift, runs, step
from zoo.shrink import LEVELS, shrink

TRIES = 48  # batches per class and level
PATIENCE = 12.0  # CPU seconds of searching, after which nothing more is tried
LARGEST = 40_000_000  # parameters

# Which task's class is taken, and what that makes of the type; the first that a type has.
TASKS = {
    "MASKED_LM": "encoder",
    "SEQ_TO_SEQ_CAUSAL_LM": "encoder-decoder",
    "CAUSAL_LM": "decoder",
    "SPEECH_SEQ_2_SEQ": "audio",
    "IMAGE_TEXT_TO_TEXT": "multimodal",
    "CTC": "audio",
    "IMAGE_CLASSIFICATION": "vision",
    "AUDIO_CLASSIFICATION": "audio",
    "OBJECT_DETECTION": "detection",
    "UNIVERSAL_SEGMENTATION": "segmentation",
    "SEMANTIC_SEGMENTATION": "segmentation",
    "VIDEO_CLASSIFICATION": "video",
    "TIME_SERIES_PREDICTION": "time series",
    "BASE": "other",
    "MULTIMODAL_LM": "multimodal",
    "DEPTH_ESTIMATION": "vision",
    "PRETRAINING": "other",
    "BACKBONE": "vision",
}
_RECURRENT = re.compile("Mamba|Delta|Rwkv|xLSTM|mLSTM|Recurrent|ShortConv|LightningAttention|LinearAttention")
# Those that most people train come first, so that a run that is cut off has seen them.
_POPULAR = """
llama qwen2 qwen3 gemma gemma2 gemma3 gemma3_text gemma3n mistral mixtral phi phi3 gpt2 gptj gpt_neox gpt_neo falcon
mamba mamba2 deepseek_v2 deepseek_v3 whisper wav2vec2 hubert wavlm t5 mt5 bart mbart pegasus marian bert roberta
distilbert albert electra deberta deberta-v2 xlm-roberta modernbert camembert mpnet vit dinov2 dinov2_with_registers
dinov3_vit siglip siglip2 clip swin swinv2 segformer detr deformable_detr rt_detr convnext convnextv2 resnet deit beit
qwen2_vl qwen2_5_vl qwen3_vl llava llava_next paligemma idefics3 smolvlm opt bloom xlnet longformer led big_bird
reformer rwkv olmo olmo2 granite cohere cohere2 stablelm starcoder2 gemma4 gemma4_text llama4 llama4_text qwen2_moe
qwen3_moe qwen3_next qwen3_5 gpt_oss glm glm4 smollm3 jamba bamba zamba zamba2 falcon_h1 falcon_mamba recurrent_gemma
nemotron nemotron_h vit_mae sam sam2 mask2former maskformer yolos dpt depth_anything timesformer videomae blip blip-2
instructblip audio-spectrogram-transformer speecht5 seamless_m4t vits bark musicgen moonshine longt5 umt5 pix2struct
donut-swin trocr layoutlm layoutlmv3 esm mobilenet_v2 efficientnet regnet mobilevit perceiver funnel fnet canine
squeezebert roformer mobilebert xlm flaubert ctrl
"""


def names() -> list[str]:
    """All model types, the popular ones first, and what is made by hand beside them."""
    return list(
        dict.fromkeys([t for t in _POPULAR.split() if t in CONFIG_MAPPING_NAMES] + [*CONFIG_MAPPING_NAMES, *SPECIAL])
    )


class NotBuilt(RuntimeError):
    """No class, configuration and batch were found that run; the text says what failed first and last."""


def find(name: str, recipe: dict[str, Any] | None = None) -> Subject:
    """Make a small model of a type and a batch.

    Args:
        name: the model type.
        recipe: what was found in an earlier run, tried first.

    Raises:
        NotBuilt: nothing ran.
    """
    special = SPECIAL.get(name, Special())
    if special.make is not None:
        return _handmade(name, special)
    if recipe is not None:
        try:
            model, guesses = _built(name, recipe["class"], recipe["level"], special)
            batch = next(b for i, b in enumerate(guesses) if i == recipe["batch"])
            if tokens := recipe.get("image_tokens"):
                batch = _with_tokens(model, batch, tokens)
            return Subject(model, batch, _kind(name, model), recipe, runs(lambda: step(model, batch)))
        except Exception:
            pass  # made for another version: searched for anew
    return _searched(name, special)


def _handmade(name: str, special: Special) -> Subject:
    assert special.make is not None
    torch.manual_seed(0)
    model, batches = special.make()
    lift(model.float())
    failures = []
    for i, batch in enumerate(batches):
        try:
            plain = runs(lambda batch=batch: step(model, batch))
        except Exception as error:
            failures.append(_brief(error))
            continue
        recipe = {"class": type(model).__name__, "level": "by hand", "batch": i}
        return Subject(model, batch, special.kind or _kind(name, model), recipe, plain)
    raise NotBuilt("; ".join(failures))


def _searched(name: str, special: Special) -> Subject:
    began, failures = time.process_time(), []
    for class_name in special.classes or _classes(name):
        for level in LEVELS:
            try:
                model, guesses = _built(name, class_name, level, special)
            except Exception as error:
                failures.append(f"{class_name}, {level}: {_brief(error)}")
                continue
            tried = []
            for i, offered in enumerate(guesses):
                if i == TRIES or time.process_time() - began > PATIENCE:
                    break
                recipe = {"class": class_name, "level": level, "batch": i}
                try:
                    batch, plain = _tried(model, offered, recipe)
                except Exception as error:
                    tried.append(_brief(error))
                    continue
                return Subject(model, batch, _kind(name, model), recipe, plain)
            failures += [f"{class_name}, {level}: {text}" for text in dict.fromkeys(tried[:1] + tried[-1:])]
            if time.process_time() - began > PATIENCE:
                raise NotBuilt("; ".join(failures[:2] + failures[-2:]))
    raise NotBuilt("; ".join(failures[:2] + failures[-2:]) or "no class for training")


def _tried(model: nn.Module, batch: Batch, recipe: dict[str, Any]) -> tuple[Batch, Step]:
    """Take a step; where there are more or fewer image features than image tokens, once more with as many tokens."""
    try:
        return batch, runs(lambda: step(model, batch))
    except Exception as error:
        wanted = re.search(r"tokens:? ?(\d+),? .*?features:? ?(?:torch.Size\(\[)?(\d+)", str(error))
        if wanted is None or "input_ids" not in batch or image_token(model.config) is None or int(wanted[2]) > 4000:
            raise
        recipe["image_tokens"] = int(wanted[2]) // SAMPLES
    mended = _with_tokens(model, batch, recipe["image_tokens"])
    return mended, runs(lambda: step(model, mended))


def _with_tokens(model: nn.Module, batch: Batch, count: int) -> Batch:
    token = image_token(model.config)
    assert token is not None
    return with_image_tokens(batch, token, count)


def _built(name: str, class_name: str, level: str, special: Special) -> tuple[nn.Module, Iterable[Batch]]:
    torch.manual_seed(0)
    kind = getattr(transformers, class_name)
    config = shrink(CONFIG_MAPPING[name](), level, special.overrides)
    size: int | None = None
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    except Exception:
        size = None  # some cannot be made without memory; they are small
    if size is not None and size > LARGEST:
        raise RuntimeError(f"{size / 1e6:.0f} million parameters are left")
    torch.manual_seed(0)
    model = kind(config).float()
    lift(model)
    if special.batches is not None:
        return model, special.batches(config)
    return model, Guesses(config, class_name, set(inspect.signature(model.forward).parameters))


def _mapping(task: str) -> dict[str, Any]:
    name = "MODEL_MAPPING_NAMES" if task == "BASE" else f"MODEL_FOR_{task}_MAPPING_NAMES"
    return getattr(modeling_auto, name, {})


def _all_tasks() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every task with its kind and its classes by model type, those of `TASKS` first."""
    for task, kind in TASKS.items():
        yield task, kind, _mapping(task)
    for name in dir(modeling_auto):
        task = name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES")
        if name.startswith("MODEL") and name.endswith("_MAPPING_NAMES") and task not in (*TASKS, "MODEL"):
            yield task, "other", getattr(modeling_auto, name)


def _classes(name: str) -> list[str]:
    """The three likeliest classes of a type, and the one without a head."""
    found = [mapping[name] for _, _, mapping in _all_tasks() if name in mapping]
    found = [value if isinstance(value, str) else value[0] for value in found]
    base = _mapping("BASE").get(name)
    return list(dict.fromkeys([*dict.fromkeys(found)][:3] + ([base] if isinstance(base, str) else [])))


def _kind(name: str, model: nn.Module) -> str:
    """What a type is for: what its class does, or the first of its tasks where it has no head."""
    class_name = type(model).__name__
    kinds = [(kind, mapping[name]) for _, kind, mapping in _all_tasks() if name in mapping]
    of_class = [kind for kind, value in kinds if class_name == value or class_name in value]
    known = [kind for kind in of_class + [kind for kind, _ in kinds] if kind != "other"]
    kind = known[0] if known else "other"
    if kind == "decoder":
        inside = " ".join(type(module).__name__ for module in model.modules())
        recurrent, experts = _RECURRENT.search(inside), re.search("Experts?|MoE|Moe|TopK", inside)
        kind += ", recurrent" if recurrent else ", experts" if experts else ""
    return kind


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:160]}"
