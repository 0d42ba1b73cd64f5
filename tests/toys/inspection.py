"""Measurements as `measure` would return them, of networks that take too long to measure in a test.

The figures follow SCIENCE.md: a trained pre-norm GPT whose first layer writes 28 times its input over it, whose
next layers settle, and a ConvNeXt of four stages; errors of a code are its quantiser's on the increment.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from abyssal.engine.policy import Code, Keep, Policy, Reverse, Store
from abyssal.planning.measurements import BlockMeasurement, Candidate, Measurements
from abyssal.profiling.phases import Phase, Usage

# Distortion of a Gaussian quantiser with b bits, relative to what is quantised.
DISTORTION = {1: 0.60, 2: 0.34, 3: 0.19, 4: 0.098, 6: 0.027, 8: 0.0068}
POLICIES: tuple[Policy, ...] = (
    Store(),
    Keep(),
    *(Code(bits, refine=refine) for refine in (0, 1) for bits in sorted(DISTORTION, reverse=True)),
    *(Reverse(refine) for refine in range(4)),
)


def candidates(
    ratio: float, contraction: float, sensitivity: float, stream: int, activation: int, seconds: float, item: int
) -> tuple[Candidate, ...]:
    found = []
    for policy in POLICIES:
        error, stored, time = 0.0, stream, seconds * 4 / 3
        if isinstance(policy, Store):
            stored, time = activation, seconds
        elif isinstance(policy, Code):
            assert isinstance(policy.bits, int)
            error = DISTORTION[policy.bits] * ratio / (1 + ratio) * min(1.0, contraction) ** policy.refine
            stored, time = int(stream / item * (policy.bits + 0.25) / 8), time * (1.04 + 0.3 * policy.refine)
        elif isinstance(policy, Reverse):
            error = ratio / (1 + ratio) * contraction**policy.refine
            stored, time = stream // 512, time * (1.02 + 0.28 * policy.refine)
        share = min(error * sensitivity, 50.0)
        found.append(Candidate(policy, error, 4 * error, share, stored, time, error * contraction))
    return tuple(found)


def block(
    i: int, name: str, kind: str, chain: int, shape: tuple[int, ...], ratio: float, contraction: float, count: int,
    regularity: float | None, dtype: str = "float32",
) -> BlockMeasurement:  # fmt: skip
    item = 2 if dtype == "bfloat16" else 4
    stream = math.prod(shape) * item
    seconds = 2e-3 * math.prod(shape) / 1e6
    sensitivity = 1.2 / math.sqrt(count)
    made = candidates(ratio, contraction, sensitivity, stream, 16 * stream, 3 * seconds, item)
    if name.endswith(".0"):  # the first coded state of a chain is exact, and costs its sample
        made = tuple(
            replace(c, state_error=0.0, gradient_share=0.0, handed_error=0.0, stored_bytes=256)
            if isinstance(c.policy, Code)
            else c
            for c in made
        )
    return BlockMeasurement(
        name, kind, chain, shape, dtype, stream, ratio, contraction, regularity, 16 * stream, 18 * stream, seconds,
        2 * seconds, made, norm=math.sqrt(stream), numel=stream // item,
        responses=((1e-3, 1e-3 * sensitivity), (1e-1, 1e-1 * sensitivity)),
    )  # fmt: skip


def measured(blocks: list[BlockMeasurement], bf16_error: float | None = 6.4e-3) -> Measurements:
    chains: dict[int, list[str]] = {}
    for b in blocks:
        chains.setdefault(b.chain, []).append(b.name)
    phases, held = [Phase("between", "", 0, 0)], 0
    for b in blocks:
        held += b.stream_bytes
        phases.append(Phase("forward", b.name, held + b.activation_bytes, held))
    for b in reversed(blocks):
        phases.append(Phase("backward", b.name, held + b.recompute_bytes, held - b.stream_bytes))
        held -= b.stream_bytes
    plain = sum(b.forward_seconds + b.backward_seconds for b in blocks) * 1.2
    return Measurements(
        blocks=tuple(blocks),
        gradient_norm=0.83,
        bf16_error=bf16_error,
        bf16_reason="" if bf16_error is not None else "bfloat16 autocast gave no finite gradient",
        plain_peak_bytes=sum(b.activation_bytes for b in blocks),
        keep_peak_bytes=sum(b.stream_bytes for b in blocks) + blocks[0].activation_bytes,
        plain_seconds=plain,
        keep_seconds=plain * 4 / 3,
        batch="input_ids [4, 512]",
        environment={"torch": "2.13.0", "device": "cpu", "threads": "1"},
        chains=tuple(tuple(names) for names in chains.values()),
        profile=Usage(max(phase.peak for phase in phases), tuple(phases)),
    )


def gpt(layers: int = 24, tokens: int = 2048, width: int = 1024, dtype: str = "float32", seed: int = 0) -> Measurements:
    draw = random.Random(seed)
    blocks = []
    for i in range(layers):
        ratio = (28.0 if i == 0 else 0.62 if i == 1 else 0.24 / (1 + 0.12 * i) + 0.04) * math.exp(draw.gauss(0, 0.15))
        if i == layers - 1:
            ratio *= 2.5
        contraction = (12.0 if i == 0 else 0.6 if i == 1 else 0.2 + 0.8 * ratio) * math.exp(draw.gauss(0, 0.3))
        regularity = None if i == layers - 1 else (1.38 if i == 0 else 1.1) * math.exp(draw.gauss(0, 0.05))
        name = f"model.layers.{i}"
        blocks.append(block(i, name, "DecoderLayer", 0, (tokens, width), ratio, contraction, layers, regularity, dtype))
    return measured(blocks)


def convnext(seed: int = 0) -> Measurements:
    draw = random.Random(seed)
    blocks = []
    for stage, (count, width, side) in enumerate(((3, 96, 56), (3, 192, 28), (9, 384, 14), (3, 768, 7))):
        for i in range(count):
            ratio = (0.55 if i == 0 else 0.3) * (1.4 if stage == 3 else 1) * math.exp(draw.gauss(0, 0.25))
            regularity = None if i == count - 1 else 1.3 * math.exp(draw.gauss(0, 0.05))
            shape = (16, width, side, side)
            name = f"stages.{stage}.blocks.{i}"
            blocks.append(block(i, name, "ConvNeXtBlock", stage, shape, ratio, 0.5 * ratio, 18, regularity))
    return measured(blocks)


def two_blocks() -> Measurements:
    return measured(
        [block(i, f"blocks.{i}", "Block", 0, (32, 64), 0.2 + 0.1 * i, 0.1, 2, None if i else 0.9) for i in range(2)],
        bf16_error=None,
    )
