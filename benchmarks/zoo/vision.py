"""Every module of timm and every family of torchvision, small, with a batch that it runs on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from zoo.batches import Batch, integers, normal
from zoo.huggingface import NotBuilt
from zoo.measure import Subject, lift, runs, step

IMAGES, CLASSES = 4, 10
NARROW: dict[str, Any] = {"embed_dim": 48, "depth": 4, "num_heads": 3}

# The smallest model of each of timm's modules.
_TIMM = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_9_240 csatv2 cs3darknet_s cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
densenet121 dla34 dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1
efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
gemma4_vit_167m ghostnet_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128 lowformer_b0 test_mambaout
test_maxvit poolformer_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny
naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0
qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d test_resnet resnetv2_18
rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m
twins_svt_small vgg11_bn visformer_tiny test_vit vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 samvit_base_patch16
vitamin_small_224 volo_d1_224 ese_vovnet19b_dw legacy_xception xception41 xcit_nano_12_p16_224
"""
# Others that people train, or whose blocks are of another kind.
_TIMM += "resnet50 seresnet50 mixer_s16_224 deit3_small_patch16_224 mobilevitv2_050 test_coatnet swin_s3_tiny_224"
TIMM = tuple(_TIMM.split())
_TIMM_OPTIONS: dict[str, dict[str, Any]] = {
    "nasnetalarge": {"stem_size": 24, "num_features": 1008},
    "pnasnet5large": {},
}
# What a timm model may take, in the order in which it is tried.
_SIZES: tuple[dict[str, Any], ...] = (
    {"img_size": 64, **NARROW},
    {"img_size": 64, "embed_dim": 48, "depth": 4},
    {"img_size": 64},
    {},
)
_SIDES = (64, 96, 128, 224, 256)


def timm_model(name: str, recipe: dict[str, Any] | None = None) -> Subject:
    """Make a timm model and a batch. `recipe`: what was found in an earlier run, tried first.

    Raises:
        NotBuilt: nothing ran.
    """
    told = _TIMM_OPTIONS.get(name)
    failures = []
    for options in ([recipe["options"]] if recipe else []) + ([told] if told is not None else [*_SIZES]):
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, num_classes=CLASSES, **options)
        except Exception as error:
            failures.append(f"{options}: {type(error).__name__}: {str(error)[:100]}")
            continue
        lift(model)
        # A network that takes any size is given one that leaves its normalisations something to average over.
        for side in (recipe["side"],) if recipe else (options["img_size"],) if "img_size" in options else _SIDES[1:]:
            batch = {next(iter(inspect.signature(model.forward).parameters)): normal(IMAGES, 3, side, side)}
            try:
                plain = runs(lambda model=model, batch=batch: step(model, batch))
            except Exception as error:
                failures.append(f"{options}, {side}: {type(error).__name__}: {str(error)[:100]}")
                continue
            return Subject(model, batch, "timm", {"options": options, "side": side}, plain)
    raise NotBuilt("; ".join(failures[:2] + failures[-2:]))


# ---------------------------------------------------------------------- torchvision


def _image(side: int = 96) -> Batch:
    return {"x": normal(IMAGES, 3, side, side)}


def _clip(frames: int, side: int) -> Batch:
    return {"x": normal(2, 3, frames, side, side)}


def _targets(side: int = 96) -> Batch:
    """Two objects an image, with masks and key points."""
    corner = integers(4, side // 2, 2, 2).float()
    boxes = torch.cat([corner, corner + side / 3], dim=1)
    points = torch.cat([boxes.view(2, 2, 2), torch.ones(2, 2, 1)], dim=-1)
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "masks": (normal(2, side, side) > 0).to(torch.uint8),
        "keypoints": points,
    }
    return {"images": list(normal(2, 3, side, side)), "targets": [target, target]}


def _of(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def _vit() -> nn.Module:
    kind = torchvision.models.vision_transformer.VisionTransformer
    sizes = {"num_layers": 4, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}
    return kind(image_size=64, patch_size=16, num_classes=CLASSES, **sizes)


def _swin(version: int) -> nn.Module:
    swin = torchvision.models.swin_transformer
    kinds: dict[str, Any] = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    sizes = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2, 4], "num_heads": [2, 4, 8], "window_size": [4, 4]}
    return swin.SwinTransformer(**sizes, num_classes=CLASSES, **(kinds if version == 2 else {}))


def _maxvit() -> nn.Module:
    return torchvision.models.maxvit.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[2, 2],
        head_dim=8,
        stochastic_depth_prob=0.2,
        num_classes=CLASSES,
    )


def _mvit(version: int) -> nn.Module:
    mvit = torchvision.models.video.mvit
    pooled = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3]}
    same = {"stride_q": [1, 1, 1], "stride_kv": [1, 2, 2]}
    blocks = [
        mvit.MSBlockConfig(num_heads=1, input_channels=16, output_channels=16, **pooled, **same),
        mvit.MSBlockConfig(1, 16, 32, **pooled, **same),
        mvit.MSBlockConfig(2, 32, 32, **pooled, stride_q=[1, 2, 2], stride_kv=[1, 1, 1]),
        *(mvit.MSBlockConfig(2, 32, 32, **pooled, stride_q=[1, 1, 1], stride_kv=[1, 1, 1]) for _ in range(3)),
    ]
    second = version == 2
    return mvit.MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=second,
        residual_with_cls_embed=not second,
        rel_pos_embed=second,
        proj_after_attn=second,
        stochastic_depth_prob=0.1,
        num_classes=CLASSES,
    )


def _detector(name: str) -> nn.Module:
    """A detector on a narrow pyramid above ResNet-18; of the two-stage ones few proposals are looked at."""
    detection = torchvision.models.detection
    resnet = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    width = 32
    pyramid = detection.backbone_utils.BackboneWithFPN(resnet, layers, [64, 128, 256, 512], width)
    options: dict[str, Any] = {"num_classes": 3, "min_size": 96, "max_size": 96}
    few = {"rpn_pre_nms_top_n_train": 32, "rpn_post_nms_top_n_train": 16, "box_batch_size_per_image": 16}
    if name == "RetinaNet":
        anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
        return detection.RetinaNet(pyramid, anchor_generator=anchors, **options)
    if name == "FCOS":
        return detection.FCOS(pyramid, **options)
    if name == "MaskRCNN":
        options["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(width, (width, width), 1)
        options["num_classes"] = None
        options["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(1024, 3)
        options["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(width, width, 3)
    if name == "KeypointRCNN":
        options["num_keypoints"] = None
        options["keypoint_head"] = detection.keypoint_rcnn.KeypointRCNNHeads(width, (width, width))
        options["keypoint_predictor"] = detection.keypoint_rcnn.KeypointRCNNPredictor(width, 2)
    return getattr(detection, name)(pyramid, **options, **few)


_SEGMENTER: dict[str, Any] = {"weights_backbone": None, "num_classes": CLASSES}
_SSD: dict[str, Any] = {"weights_backbone": None, "num_classes": 3}
_MOVES = {"image1": normal(1, 3, 128, 128), "image2": normal(1, 3, 128, 128, seed=2), "num_flow_updates": 3}
_CLASSIFIERS = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2 mobilenet_v3_small
regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnet101 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 vgg11_bn
"""
# Each with how it is made, its batch, and what it is for.
TORCHVISION: dict[str, tuple[Callable[[], nn.Module], Batch, str]] = {
    **{name: (_of(name, num_classes=CLASSES), _image(), "vision") for name in _CLASSIFIERS.split()},
    "googlenet": (_of("googlenet", num_classes=CLASSES, init_weights=False, aux_logits=False), _image(), "vision"),
    "inception_v3": (_of("inception_v3", num_classes=CLASSES, init_weights=False), _image(299), "vision"),
    "vit-small": (_vit, _image(64), "vision"),
    "swin-small": (lambda: _swin(1), _image(64), "vision"),
    "swin_v2-small": (lambda: _swin(2), _image(64), "vision"),
    "maxvit-small": (_maxvit, _image(64), "vision"),
    **{
        name: (_of(name, **_SEGMENTER, aux_loss=True), {"x": normal(2, 3, 64, 64)}, "segmentation")
        for name in ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50")
    },
    "lraspp": (_of("lraspp_mobilenet_v3_large", **_SEGMENTER), {"input": normal(2, 3, 64, 64)}, "segmentation"),
    "fasterrcnn": (lambda: _detector("FasterRCNN"), _targets(), "detection"),
    "maskrcnn": (lambda: _detector("MaskRCNN"), _targets(), "detection"),
    "keypointrcnn": (lambda: _detector("KeypointRCNN"), _targets(), "detection"),
    "retinanet": (lambda: _detector("RetinaNet"), _targets(), "detection"),
    "fcos": (lambda: _detector("FCOS"), _targets(), "detection"),
    "ssdlite": (_of("ssdlite320_mobilenet_v3_large", **_SSD), _targets(), "detection"),
    **{name: (_of(name, num_classes=CLASSES), _clip(4, 32), "video") for name in ("mc3_18", "r2plus1d_18", "r3d_18")},
    "mvit-small": (lambda: _mvit(1), _clip(4, 32), "video"),
    "mvit_v2-small": (lambda: _mvit(2), _clip(4, 32), "video"),
    "swin3d_t": (_of("swin3d_t", num_classes=CLASSES), _clip(4, 64), "video"),
    "raft_small": (_of("raft_small"), _MOVES, "optical flow"),
}


def torchvision_model(name: str, recipe: dict[str, Any] | None = None) -> Subject:
    """Make a torchvision model and a batch. `recipe`: unused, there is one way only.

    Raises:
        NotBuilt: it does not run.
    """
    make, batch, kind = TORCHVISION[name]
    torch.manual_seed(0)
    torchvision.ops.boxes.nms = _nms
    torch.compiler.set_stance("force_eager")  # else regions of interest are pooled by a function that is compiled first
    try:
        model = make()
        lift(model)
        return Subject(model, batch, kind, {}, runs(lambda: step(model, batch)))
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {str(error)[:300]}") from error


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression, for wheels whose compiled operators do not fit the installed torch."""
    remaining, kept = scores.argsort(descending=True, stable=True), []
    while len(remaining):
        kept.append(int(remaining[0]))
        overlaps = torchvision.ops.box_iou(boxes[remaining[:1]], boxes[remaining[1:]])[0]
        remaining = remaining[1:][overlaps <= threshold]
    return torch.tensor(kept, dtype=torch.long)
