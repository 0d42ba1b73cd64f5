"""Kernels that are not formed: cost of a product and of the largest eigenvalues; cost of a drift's reading.

    python benchmarks/kernel_operator.py --quick
    python benchmarks/kernel_operator.py --write docs/benchmarks.md

About three minutes of one core for everything; seconds with --quick. Every row is a process of its own, so that
its memory can be read: the largest resident set, less that after imports and before the first product.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import report
from abyssal.tangent.empirical.ntk import ntk
from abyssal.tangent.operator.kernel import kernel_operator
from abyssal.tangent.training.recorder import DriftRecorder

MARKER = "kernel-operator"
console = Console(stderr=True)
Row = dict[str, Any]
DENSE_ENTRIES = 2048**2  # of kernels that are formed too, and all their eigenvalues computed, to compare with


class ResidualMLP(nn.Module):
    """`h + tanh(W h + b) / L`, L times, between a first and a last layer; float32."""

    def __init__(self, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, width), nn.Linear(width, outputs)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + torch.tanh(block(h)) / len(self.blocks)
        return self.last(h)


# name: width, depth, outputs, samples, which kernel, budget
CASES: dict[str, tuple[int, int, int, int, str, str | None]] = {
    "m = 512, L = 32, n = 128, trace": (512, 32, 1, 128, "trace", None),
    "m = 256, L = 8, n = 2048, trace": (256, 8, 1, 2048, "trace", None),
    "m = 256, L = 8, n = 2048, 10 outputs, full": (256, 8, 10, 2048, "full", None),
    "the same within 64 MiB": (256, 8, 10, 2048, "full", "64MiB"),
}
QUICK: dict[str, tuple[int, int, int, int, str, str | None]] = {
    "m = 64, L = 4, n = 64, trace": (64, 4, 1, 64, "trace", None)
}


def resident() -> float:
    """Largest resident set so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def seconds(task: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = task()
    return time.process_time() - began, found


def measure(name: str) -> Row:
    """Measure one case in this process."""
    width, depth, outputs, n, which, budget = (CASES | QUICK)[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = ResidualMLP(width, depth, outputs), torch.randn(n, 32)
    kernel_operator(nn.Linear(32, 1), x[:4]).matvec(torch.randn(4))  # what torch imports at its first backward pass
    before = resident()
    operator = kernel_operator(model, x, outputs=which, budget=budget)
    rows = operator.shape[0]
    operator.matvec(torch.randn(rows))
    product = median(seconds(lambda: operator.matvec(torch.randn(rows)))[0] for _ in range(5))
    top, found = seconds(lambda: operator.top(5))
    row: Row = {
        "name": name, "rows": rows, "entries bytes": rows * rows * 4, "block": operator.jacobian.block,
        "product": product, "top": top, "products": found.products, "memory": resident() - before,
        "residual": float((found.residuals / found.values).max()), "ntk": None, "eigenvalues": None,
    }  # fmt: skip
    if rows * rows <= DENSE_ENTRIES:
        row["ntk"], K = seconds(lambda: ntk(model, x))
        row["eigenvalues"], values = seconds(lambda: torch.linalg.eigvalsh(K.double()).flip(0))
        row["agreement"] = float(((found.values - values[:5]) / values[0]).abs().max())
    return row


def reading(quick: bool) -> Row:
    """Measure a reading of the drift beside a training step, interleaved."""
    width, depth, probe = (64, 4, 32) if quick else (512, 32, 128)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = ResidualMLP(width, depth, 10)
    x, y = torch.randn(2 * probe, 32), torch.randint(0, 10, (2 * probe,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = DriftRecorder(model, x[:probe], y[:probe])

    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    recorder.record(0)
    step()
    steps, readings = [], []
    for i in range(1, 8):
        steps.append(seconds(step)[0])
        readings.append(seconds(lambda i=i: recorder.record(i))[0])
    return {"width": width, "depth": depth, "probe": probe, "step": median(steps), "reading": median(readings)}


def in_a_process(*args: str) -> Row:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *args]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def render(facts: dict[str, str], rows: list[Row], drift: Row) -> str:
    """Return the section's Markdown."""
    cells = []
    for r in rows:
        dense = "-" if r["ntk"] is None else f"{r['ntk']:.2f} + {r['eigenvalues']:.2f} s"
        cells.append(
            [
                r["name"],
                f"{r['rows']:,}",
                f"{r['entries bytes'] / 1e6:,.1f} MB",
                f"{r['product']:.2f} s",
                f"{r['top']:.1f} s ({r['products']})",
                f"{r['memory']:.0f} MB",
                dense,
            ]
        )  # fmt: skip
    head = [
        "residual MLP, width m, depth L", "rows", "K would be", "one product", "`.top(5)` (products)", "memory",
        "`ntk` + all eigenvalues",
    ]  # fmt: skip
    worst = max(r["agreement"] for r in rows if "agreement" in r)
    about = (
        "CPU seconds of one thread, float32. Inputs are Gaussian, so eigenvalues crowd together: a hard case for "
        f"Lanczos iterations. Where the kernel was formed too, eigenvalues agree to {worst:.0e} of the largest."
    )
    cost = (
        f"A reading of the drift (m = {drift['width']}, L = {drift['depth']}, 10 outputs, trace over a probe set of "
        f"{drift['probe']}, its eigenvalues and alignments) takes {drift['reading']:.2f} s, a training step of "
        f"{2 * drift['probe']} samples {drift['step']:.2f} s: "
        f"{drift['reading'] / drift['step']:.1f} steps."
    )
    title = "## Kernels that are not formed, and the cost of a drift's reading"
    return "\n\n".join([title, report.header(facts), about, report.table(head, cells), cost])


def main(
    quick: Annotated[bool, typer.Option(help="One case, small networks: seconds.")] = False,
    case: Annotated[str | None, typer.Option(help="Measure one case in this process, and print it as JSON.")] = None,
    drift: Annotated[bool, typer.Option("--drift", help="The same for a drift's reading.")] = False,
    results: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/kernel_operator.json"),
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure, print the table, and write it where asked."""
    if case is not None or drift:
        print(json.dumps(measure(case) if case is not None else reading(quick)))
        return
    facts = report.machine()
    found, rows = in_a_process("--drift", *(["--quick"] if quick else [])), []
    for name in QUICK if quick else CASES:
        rows.append(in_a_process("--case", name))
        report.save({"machine": facts, "rows": rows, "drift": found}, results)
        console.print(f"{name}: {rows[-1]['top']:.1f} s of CPU for 5 eigenvalues")
    text = render(facts, rows, found)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    typer.run(main)
