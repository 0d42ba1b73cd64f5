"""One training step on an accelerator: time and peak memory of plain backprop, checkpointing and ours.

    python benchmarks/gpu.py                        # a pre-norm transformer on CUDA
    python benchmarks/gpu.py --device cpu --depth 4 --width 64 --tokens 32 --rounds 2    # does it run at all

Methods take turns, round by round; medians. Until it has run on a GPU, no claim of the README rests on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import typer
from torch import nn

from abyssal import memory
from abyssal.util.environment import environment
from workloads import METHODS, Layers, TransformerLayer, Workload

NAMES = ("plain", "checkpoint", "Keep", "default", "Code(4)", "Reverse(0)")


def main(
    device: Annotated[str, typer.Option(help="where to run")] = "cuda",
    depth: Annotated[int, typer.Option(help="layers")] = 32,
    width: int = 1024,
    heads: int = 8,
    tokens: int = 2048,
    batch: int = 4,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="steps per method")] = 7,
) -> None:
    """Measure, and print a table."""
    where, kind = torch.device(device), getattr(torch, dtype)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here; --device cpu shows that the script runs")
    workload = Workload("GPU", "", (), (), _network(width, heads), lambda _: (batch, tokens, width), 2)
    model = workload.model(depth, kind).to(where)
    x, cotangent = (t.detach().to(where) for t in workload.tensors(depth, kind))
    calls = {name: METHODS[name].on(model, workload) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    peaks: dict[str, int] = {}
    for turn in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            leaf = x.clone().requires_grad_()
            with memory.track(where) as tracked:
                began = _now(where)
                call(leaf).backward(cotangent)
                took = _now(where) - began
            if turn:
                seconds[name].append(took)
                peaks[name] = tracked.peak
    place = torch.cuda.get_device_name(where) if where.type == "cuda" else environment().processor
    print(f"{depth} layers of {width}, {batch} x {tokens} tokens, {dtype}; {place}, torch {torch.__version__}\n")
    base = statistics.median(seconds["checkpoint"])
    print(f"{'method':12s} {'s':>9s} {'of checkpointing':>17s} {'peak, MiB':>10s}")
    for name in NAMES:
        middle = statistics.median(seconds[name])
        print(f"{name:12s} {middle:9.4f} {middle / base:17.3f} {peaks[name] / 2**20:10.1f}")


def _network(width: int, heads: int) -> Callable[[int], nn.Module]:
    def build(depth: int) -> nn.Module:
        return Layers([TransformerLayer(width, heads, 1 / depth) for _ in range(depth)])

    return build


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
