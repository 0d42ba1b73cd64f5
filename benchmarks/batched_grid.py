"""A hundred small deep networks trained as one batched network, against training them one by one.

    python benchmarks/batched_grid.py --quick
    python benchmarks/batched_grid.py --write docs/reproduce.md

About six minutes for everything; half a minute with --quick. Both ways take the same minibatches from the same
weights, in one process, in turns: in every round the grid takes some steps of all its cells, then a plain loop takes
as many of a few of them (a module of `nn.Linear`s, `loss.backward()`, `torch.optim`). The figure is the median of the
rounds' ratios of time for one cell and step. That the losses are the same is checked over all cells.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import report
from abyssal import memory
from abyssal.nn.grid.grid import ResidualGrid
from abyssal.nn.grid.updates import Adam, Sgd, Update

MARKER = "batched-grid"
RESULTS = Path(__file__).parent / "results" / "batched_grid.json"
FEATURES, CLASSES, WIDTH = 64, 10, 30
# Otherwise the plain loop pays for page faults whenever malloc hands memory back: see benchmarks/README.md.
_KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}
console = Console(stderr=True)
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is trained, and how the rival's optimiser is called."""

    network: str
    rule: str
    batch: int
    threads: int = 1
    fused: bool = False

    @property
    def update(self) -> Update:
        return Sgd() if self.rule == "SGD" else Adam()

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if self.rule == "SGD" else torch.optim.Adam
        return kind(model.parameters(), lr=rate, fused=self.fused or None)


class Plain(nn.Module):
    """One cell as anybody would write it."""

    def __init__(self, weights: dict[str, Tensor], cell: int, scale: float) -> None:
        super().__init__()
        self.stem = linear(weights["stem"][cell])
        self.outer = nn.ModuleList(linear(w) for w in weights["outer"][cell])
        self.inner = nn.ModuleList(linear(w) for w in weights["inner"][cell]) if "inner" in weights else None
        self.head = linear(weights["head"][cell])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for n, outer in enumerate(self.outer):
            u = h if self.inner is None else self.inner[n](h)
            h = torch.add(h, outer(torch.relu(u)), alpha=self.scale)
        return self.head(h)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def setting(case: Case, cells: int, depth: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Initial weights, scales from depth^-1/2 to depth^-1, and learning rates over a factor of 10."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape) / math.sqrt(shape[-1])

    layers = (cells, depth, WIDTH, WIDTH)
    weights = {"stem": draw(cells, WIDTH, FEATURES), "outer": draw(*layers), "head": draw(cells, CLASSES, WIDTH)}
    if case.network == "res-3":
        weights["inner"] = draw(*layers)
    index = torch.arange(cells)
    scales = depth ** -torch.linspace(0.5, 1, 10)[index % 10]
    top = 0.1 if case.rule == "SGD" else 0.003
    return weights, scales, top * 10 ** -torch.linspace(0, 1, 10)[index // 10 % 10]


def minibatches(batch: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Clusters, one for each class, which can be learnt."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    labels = [torch.randint(CLASSES, (batch,), generator=generator) for _ in range(count)]
    return [(0.3 * (centres[y] + torch.randn(batch, FEATURES, generator=generator)), y) for y in labels]


class OneByOne:
    """The rival: each cell has its module and its optimiser."""

    def __init__(self, case: Case, weights: dict[str, Tensor], scales: Tensor, rates: Tensor, cells: list[int]) -> None:
        self.models = [Plain(weights, cell, scales[cell].item()) for cell in cells]
        pairs = zip(self.models, cells, strict=True)
        self.optimizers = [case.optimizer(model, rates[cell].item()) for model, cell in pairs]

    def train(self, data: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Losses, [steps, cells]."""
        found = torch.empty(len(data), len(self.models))
        for cell, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            for step, (x, y) in enumerate(data):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                found[step, cell] = loss.detach()
        return found


def timed(work: Any) -> tuple[float, float]:
    """CPU and wall seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def speed(case: Case, cells: int, depth: int, rounds: int, steps: int, sample: int) -> Row:
    """Times of a cell's step both ways, and the ratio of each round."""
    torch.set_num_threads(case.threads)
    weights, scales, rates = setting(case, cells, depth)
    grid = ResidualGrid(**weights, scale=scales, learning_rate=rates, update=case.update, batch=case.batch)
    chosen = [round((n + 0.5) * cells / sample) for n in range(sample)]
    rival = OneByOne(case, weights, scales, rates, chosen)
    data = minibatches(case.batch, steps)

    def both() -> list[tuple[float, ...]]:
        times = timed(lambda: [grid.step(x, y) for x, y in data]), timed(lambda: rival.train(data))
        return [tuple(t / steps / n for t in pair) for pair, n in zip(times, (cells, sample), strict=True)]

    both()
    found = [both() for _ in range(rounds)]
    row: Row = {**vars(case), "cells": cells, "depth": depth, "failed": len(grid.failures)}
    for n, clock in enumerate(("cpu", "wall")):
        ratios = [other[n] / mine[n] for mine, other in found]
        row[clock] = {
            "grid": statistics.median(mine[n] for mine, _ in found),
            "one by one": statistics.median(other[n] for _, other in found),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    products = 3 if case.network == "res-1" else 6  # one forward, two backward for each matrix; not those done anew
    row["gflops"] = products * 2 * WIDTH**2 * depth * case.batch / row["cpu"]["grid"] / 1e9
    return row


def agreement(case: Case, cells: int, depth: int, steps: int) -> Row:
    """The largest difference of losses over all cells and the first steps."""
    torch.set_num_threads(1)
    weights, scales, rates = setting(case, cells, depth)
    grid = ResidualGrid(**weights, scale=scales, learning_rate=rates, update=case.update, batch=case.batch)
    data = minibatches(case.batch, steps)
    mine = torch.stack([grid.step(x, y) for x, y in data])
    other = OneByOne(case, weights, scales, rates, list(range(cells))).train(data)
    off = (mine - other).abs()
    return {
        **vars(case), "cells": cells, "depth": depth, "steps": steps, "failed": len(grid.failures),
        "largest difference": float(off.max()),
        "largest, relative": float((off / other.abs()).max()),
        "loss, first": float(other[0].mean()),
        "loss, last": float(other[-1].mean()),
    }  # fmt: skip


def held(case: Case, cells: int, depth: int) -> Row:
    """Exact peak of live tensor bytes in a training step above what lived before the first one."""
    weights, scales, rates = setting(case, cells, depth)
    x, y = minibatches(case.batch, 1)[0]
    row: Row = {**vars(case), "cells": cells, "depth": depth}
    row["weights"] = sum(t.nbytes for t in weights.values())
    for name, options in {"grid": {}, "all states": {"segment": depth, "cells_at_once": cells}}.items():
        grid = ResidualGrid(
            **weights, scale=scales, learning_rate=rates, update=case.update, batch=case.batch, **options
        )
        with memory.track() as usage:
            grid.step(x, y)
        row[name] = usage.peak
    batched = {name: t.clone().requires_grad_() for name, t in weights.items()}
    with memory.track() as usage:
        losses_by_autograd(batched, scales, x, y).backward()
    row["autograd"] = usage.peak
    return row


def losses_by_autograd(weights: dict[str, Tensor], scales: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The sum of all cells' losses, batched and left to autograd."""
    h = weights["stem"] @ x.T
    outer = weights["outer"].unbind(1)
    inner = weights["inner"].unbind(1) if "inner" in weights else [None] * len(outer)
    for w, v in zip(inner, outer, strict=True):
        h = h + scales.view(-1, 1, 1) * (v @ torch.relu(h if w is None else w @ h))
    logits = weights["head"] @ h
    return nn.functional.cross_entropy(logits, y.expand(len(logits), -1)) * len(logits)


def render(facts: dict[str, str], found: dict[str, list[Row]]) -> str:
    """The tables as Markdown."""
    parts = ["## Many networks at once", report.header(facts)]
    first = found["speed"][0]
    parts.append(
        f"{first['cells']} cells, depth {first['depth']}, width {WIDTH}. *One by one*: a plain PyTorch loop over the "
        "cells, same weights, same minibatches, same number of threads, in turns with the grid; milliseconds for a "
        "step of one cell. *Faster*: median of the rounds' ratios, with the range. GFLOP/s: the grid's, by CPU "
        "time; products that are done a second time do not count."
    )
    head = ["network, rule, minibatch, threads", "grid, CPU ms", "one by one, CPU ms", "faster, CPU", "faster, wall",
            "GFLOP/s"]  # fmt: skip
    rows = []
    for r in found["speed"]:
        fused = ", fused" if r["fused"] else ""
        name = f"{r['network']}, {r['rule']}{fused}, {r['batch']}, {r['threads']}"
        cpu, wall = r["cpu"], r["wall"]
        ratios = [f"{t['ratio']:.1f} ({t['range'][0]:.1f} to {t['range'][1]:.1f})" for t in (cpu, wall)]
        times = [f"{1e3 * cpu['grid']:.3f}", f"{1e3 * cpu['one by one']:.2f}"]
        rows.append([name, *times, *ratios, f"{r['gflops']:.0f}"])
    parts.append(report.table(head, rows))
    head = ["network, rule, minibatch", "steps", "mean loss, first to last", "largest difference", "relative"]
    rows = [
        [
            f"{r['network']}, {r['rule']}, {r['batch']}",
            str(r["steps"]),
            f"{r['loss, first']:.3f} to {r['loss, last']:.3f}",
            f"{r['largest difference']:.1e}",
            f"{r['largest, relative']:.1e}",
        ]
        for r in found["agreement"]
    ]
    parts += ["Losses of the grid against those of the loop, all cells, float32:", report.table(head, rows)]
    head = ["network, rule, minibatch, depth", "weights, MB", "grid", "grid, all states", "batched, by autograd"]
    rows = [
        [
            f"{r['network']}, {r['rule']}, {r['batch']}, {r['depth']}",
            *(f"{r[key] / 1e6:.0f}" for key in ("weights", "grid", "all states", "autograd")),
        ]
        for r in found["memory"]
    ]
    parts.append(
        "Exact peak of live tensor bytes in a step, in MB, above weights and moments. *All states*: "
        "`segment=depth, cells_at_once=cells`. *By autograd*: forward and backward pass of the same batched products "
        "left to autograd, gradients of all weights included."
    )
    return "\n\n".join([*parts, report.table(head, rows)])


def cases(quick: bool) -> tuple[list[Case], list[Case]]:
    """Those that are timed, and those whose losses and memory are compared."""
    if quick:
        few = [Case("res-1", "Adam", 16), Case("res-3", "SGD", 32)]
        return few, few[:1]
    timed_ones = [Case(n, r, b) for n in ("res-1", "res-3") for r in ("SGD", "Adam") for b in (16, 32, 64, 128)]
    timed_ones += [Case("res-1", "Adam", b, fused=True) for b in (16, 128)]
    timed_ones += [Case("res-1", "Adam", b, threads=2) for b in (16, 128)]
    return timed_ones, [Case(n, r, 32) for n in ("res-1", "res-3") for r in ("SGD", "Adam")]


def main(
    quick: Annotated[bool, typer.Option(help="Two cases, few rounds: half a minute.")] = False,
    cells: Annotated[int, typer.Option(min=5)] = 100,
    depth: Annotated[int, typer.Option(min=2)] = 200,
    results: Annotated[Path, typer.Option("--json")] = RESULTS,
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure, print the tables, and write them where asked."""
    facts = report.machine()
    fast, compared = cases(quick)
    found: dict[str, list[Row]] = {"speed": [], "agreement": [], "memory": []}
    for case in fast:
        found["speed"].append(row := speed(case, cells, depth, *((3, 2, 2) if quick else (7, 4, 4))))
        console.print(f"{case}: {row['cpu']['ratio']:.1f} times faster")
    for case in compared:
        found["agreement"].append(row := agreement(case, cells, depth, 5 if quick else 20))
        console.print(f"{case}: losses differ by at most {row['largest difference']:.1e}")
    for case in compared:
        found["memory"] += [held(case, cells, n) for n in ((depth,) if quick else (depth, 5 * depth))]
    report.save({"machine": facts, **found}, results)
    text = render(facts, found)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in _KEEP_HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _KEEP_HEAP)
    typer.run(main)
