"""CPU time of a training step by several methods that take turns in one process: ratios, which load leaves alone.

    python benchmarks/interleaved.py W1 128 checkpoint Keep checkpoint-full "Reverse(0)" default
    python benchmarks/interleaved.py W3 32 checkpoint default --heap

Workloads and methods are those of memory.py; "torch:Keep" runs ours on torch's checkpointing (ABYSSAL_FRAME=torch).
Each ratio is of two steps that ran one after the other; printed are the median and the quartiles. `--heap` keeps freed
memory in the process, without which page faults are a part of every step.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Annotated

import torch
import typer

from abyssal.demo.methods import keep_heap
from abyssal.util.environment import environment
from workloads import METHODS, WORKLOADS


def main(
    workload: str,
    depth: int,
    methods: Annotated[list[str], typer.Argument(help="the first is what the others are divided by")],
    rounds: Annotated[int, typer.Option(help="steps per method")] = 21,
    heap: Annotated[bool, typer.Option(help="keep freed memory")] = False,
) -> None:
    """Measure, and print a table."""
    if heap:
        keep_heap()
    torch.set_num_threads(1)
    family = WORKLOADS[workload]
    model, (x, cotangent) = family.model(depth), family.tensors(depth)
    calls = {name: METHODS[name.removeprefix("torch:")].on(model, family) for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 2):  # two warm up, and learn what ours learns of a network
        for name, call in calls.items():
            os.environ["ABYSSAL_FRAME"] = "torch" if name.startswith("torch:") else ""
            began = time.process_time()
            call(x).backward(cotangent)
            if turn > 1:
                seconds[name].append(time.process_time() - began)
    place = environment()
    print(f"{workload}, depth {depth}, one thread, {'heap kept' if heap else 'as started'}; {place.processor}, torch "
          f"{torch.__version__}, load {os.getloadavg()[0]:.1f}\n")  # fmt: skip
    print(f"{'method':18s} {'ms':>9s} {'of the first':>13s}  quartiles")
    for name in methods:
        ratios = [a / b for a, b in zip(seconds[name], seconds[methods[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:18s} {statistics.median(seconds[name]) * 1e3:9.2f} {middle:13.3f}  {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    typer.run(main)
