"""The tangent hierarchy: what truncating it at orders 2, 3 and 4 costs, and what its tensors take in time and memory.

    python benchmarks/hierarchy.py --quick
    python benchmarks/hierarchy.py --write docs/tangent.md

About five minutes of one core for everything; seconds with --quick. Times are CPU seconds of this process, the
contestants of a table run in turn.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import report
from abyssal.nn import LiLuoYipResNet
from abyssal.profiling.track import reset_rss_peak, rss_peak
from abyssal.tangent.hierarchy.hierarchy import Hierarchy

MARKER = "hierarchy"
DIMENSION, DEPTH = 10, 8
TIMES = (1.0, 6.0)
# Relative kernel error at width 32 and 256 that an independent code gave, by order and time; seeds unknown.
EARLIER = {
    (2, 1.0): (4.1e-2, 3.1e-3),
    (2, 6.0): (8.1e-2, 6.3e-3),
    (3, 1.0): (9.9e-3, 5.9e-4),
    (3, 6.0): (8.5e-2, 3.8e-3),
    (4, 1.0): (3.6e-4, 3.2e-6),
    (4, 6.0): (9.3e-3, 5.0e-5),
}
console = Console(stderr=True)
Row = dict[str, Any]


def problem(n: int, width: int, seed: int) -> tuple[LiLuoYipResNet, Tensor, Tensor]:
    """The network of Li, Luo and Yip, n samples on the unit sphere, standard normal targets."""
    generator = torch.Generator().manual_seed(seed)
    model = LiLuoYipResNet(DIMENSION, width, DEPTH, generator=generator).double()
    x = torch.randn(n, DIMENSION, generator=generator, dtype=torch.float64)
    return model, x / x.norm(dim=-1, keepdim=True), torch.randn(n, generator=generator, dtype=torch.float64)


def truncation_rows(widths: list[int], seeds: int) -> list[Row]:
    """Relative kernel error of each order at each time, for every seed."""
    rows = []
    for width in widths:
        errors: dict[tuple[int, float], list[float]] = {}
        flow_errors = []
        for seed in range(seeds):
            h = Hierarchy(*problem(10, width, seed))
            flow = h.flow(TIMES)
            flow_errors.append(flow.error)
            for order in (2, 3, 4):
                found = h.predict(TIMES, order).distance(flow).kernel.tolist()
                for t, error in zip(TIMES, found, strict=True):
                    errors.setdefault((order, t), []).append(error)
        for (order, t), found in errors.items():
            rows.append({"width": width, "order": order, "time": t, "errors": found, "flow error": max(flow_errors)})
        console.print(f"width {width}: {seeds} seeds")
    return rows


def unbatched_k4(model: LiLuoYipResNet, x: Tensor) -> Tensor:
    """K4 by one nested jvp for every pair of its last two arguments, as one writes it down."""
    at = {name: p.detach() for name, p in model.named_parameters()}

    def gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return vmap(grad(lambda p, a: functional_call(model, p, (a,))), (None, 0))(parameters, x)

    def kernel(parameters: dict[str, Tensor]) -> Tensor:
        return sum(g.flatten(1) @ g.flatten(1).T for g in gradients(parameters).values())

    def along(parameters: dict[str, Tensor], c: int) -> dict[str, Tensor]:
        return grad(lambda p: functional_call(model, p, (x[c],)))(parameters)

    found = x.new_empty([len(x)] * 4)
    for c in range(len(x)):
        for d in range(len(x)):
            third = lambda p, c=c: jvp(kernel, (p,), (along(p, c),))[1]  # noqa: E731
            found[:, :, c, d] = jvp(third, (at,), (along(at, d),))[1]
    return found


def k4_rows(n: int, width: int, repeats: int) -> list[Row]:
    """Seconds for K4 in three ways, and how far they are from one another."""
    model, x, y = problem(n, width, 0)
    ways: dict[str, Callable[[], Tensor]] = {
        "this library": lambda: Hierarchy(model, x, y).kernel(4),
        "the same without factors": lambda: Hierarchy(model, x, y, factored=False).kernel(4),
        "unbatched nested jvps": lambda: unbatched_k4(model, x),
    }
    small = problem(2, 8, 0)
    Hierarchy(*small).kernel(4), Hierarchy(*small, factored=False).kernel(4), unbatched_k4(*small[:2])  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Tensor] = {}
    for repeat in range(repeats):
        for name, way in ways.items():
            if name.startswith("unbatched") and repeat:
                continue  # once is long enough
            began = time.process_time()
            results[name] = way()
            seconds[name].append(time.process_time() - began)
    reference = results["unbatched nested jvps"]
    return [
        {
            "way": name,
            "n": n,
            "width": width,
            "seconds": seconds[name],
            "off": ((results[name] - reference).abs().max() / reference.abs().max()).item(),
        }
        for name in ways
    ]


def size_rows(quick: bool) -> list[Row]:
    """CPU seconds and peak memory of tensors and rates, each in a process of its own, beside their budget."""
    cells: list[tuple[str, int, int, str]] = [
        ("K4", 20, 64, "2GiB"),
        ("K4", 20, 64, "100MB"),
        ("K4", 20, 512, "2GiB"),
        ("K4", 40, 64, "2GiB"),
        ("K3", 100, 64, "2GiB"),
        ("rates", 512, 64, "2GiB"),
        ("rates", 512, 64, "200MB"),
        ("rates", 512, 512, "2GiB"),
    ]
    rows = []
    for cell in [("K4", 10, 16, "2GiB")] if quick else cells:
        # A fresh process each: the peak of one must not hide the next one's.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(_measure, *cell).result())
        console.print(rows[-1])
    return rows


def _measure(what: str, n: int, width: int, budget: str) -> Row:
    torch.set_num_threads(1)
    run = {
        "K3": lambda h: h.kernel(3),
        "K4": lambda h: h.kernel(4),
        "rates": lambda h: h.rates(3),
    }[what]
    run(Hierarchy(*problem(2, 8, 0)))
    arguments = problem(n, width, 0)
    reset_rss_peak()
    before, began = rss_peak() or 0, time.process_time()
    run(Hierarchy(*arguments, budget=budget))
    peak, seconds = (rss_peak() or 0) - before, time.process_time() - began
    return {"what": what, "n": n, "width": width, "budget": budget, "seconds": seconds, "peak": peak}


def render(facts: dict[str, str], found: dict[str, list[Row]]) -> str:
    """The tables as Markdown."""
    parts = ["## The hierarchy, measured", report.header(facts)]
    parts += ["### Truncated at order 2, 3, 4", *_truncations(found["truncation"])]
    parts += ["### The fourth kernel's time", *_k4(found["k4"]), "### Time and memory", *_sizes(found["sizes"])]
    return "\n\n".join(parts)


def slope(rows: list[Row]) -> tuple[float, float]:
    """The power of the width by least squares of the logarithms over all seeds, and its standard error."""
    x = np.concatenate([[math.log(r["width"])] * len(r["errors"]) for r in rows])
    y = np.log(np.concatenate([r["errors"] for r in rows]))
    centred = x - x.mean()
    value = (centred @ y) / (centred @ centred)
    left = y - y.mean() - value * centred
    return value, math.sqrt(left @ left / (len(x) - 2) / (centred @ centred))


def _truncations(rows: list[Row]) -> list[str]:
    widths = sorted({r["width"] for r in rows})
    lines = []
    for (order, t), earlier in EARLIER.items():
        mine = [r for r in rows if (r["order"], r["time"]) == (order, t)]
        mine.sort(key=lambda r: r["width"])
        cells = []
        for r in mine:
            middle = statistics.geometric_mean(r["errors"])
            cells.append(f"{middle:.1e} ({min(r['errors']):.1e} to {max(r['errors']):.1e})")
        power = "{:.2f} ± {:.2f}".format(*slope(mine)) if len(widths) > 1 else "-"
        pairs = [(r, e) for r in mine for w, e in zip((32, 256), earlier, strict=True) if r["width"] == w]
        inside = ", ".join("yes" if min(r["errors"]) <= e <= max(r["errors"]) else "no" for r, e in pairs)
        lines.append([f"{order}, t = {t:g}", *cells, power, f"{earlier[0]:.1e} → {earlier[1]:.1e}", inside])
    count = len(rows[0]["errors"])
    worst = max(r["flow error"] for r in rows)
    about = (
        "\\|K − K_flow\\|/\\|K_flow\\| (Frobenius) of the Li-Luo-Yip ResNet, d = 10, L = 8, c_res = 1, tanh, n = 10 "
        f"samples on the sphere, standard normal targets: geometric mean over {count} seeds (smallest to largest); the "
        "power of the width with its standard error; what an independent code gave for widths 32 → 256, and whether "
        f"that lies between our smallest and largest. The true flow's own stated error is at most {worst:.0e}."
    )
    return [about, report.table(["order, time", *(f"m = {w}" for w in widths), "power", "earlier", "inside"], lines)]


def _k4(rows: list[Row]) -> list[str]:
    slow = statistics.median(rows[-1]["seconds"])
    lines = []
    for r in rows:
        middle = statistics.median(r["seconds"])
        spread = f" ({min(r['seconds']):.2f} to {max(r['seconds']):.2f})" if len(r["seconds"]) > 1 else ""
        lines.append([r["way"], f"{middle:.2f}{spread}", f"{slow / middle:.0f}x", f"{r['off']:.0e}"])
    about = (
        f"K4 of n = {rows[0]['n']} samples, width {rows[0]['width']}, L = {DEPTH}, float64, one thread: CPU seconds, "
        "median (and range) of runs in turn, all checks of the model included; the largest difference, relative to "
        "the largest entry."
    )
    return [about, report.table(["K4", "seconds", "faster", "difference"], lines)]


def _sizes(rows: list[Row]) -> list[str]:
    lines = [
        [
            f"{r['what']}, n = {r['n']}, m = {r['width']}",
            r["budget"],
            f"{r['peak'] / 1e6:.0f} MB",
            f"{r['seconds']:.1f}",
        ]
        for r in rows
    ]
    about = (
        "CPU seconds and peak resident memory above that before, each in a fresh process. *rates* are the first three "
        "time derivatives of the kernel."
    )
    return [about, report.table(["what", "budget", "peak", "seconds"], lines)]


def main(
    quick: Annotated[bool, typer.Option(help="Two widths and seeds, small tensors: seconds.")] = False,
    seeds: Annotated[int, typer.Option(help="Networks for each width.", min=2)] = 16,
    results: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/hierarchy.json"),
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure, print the tables, and write them where asked."""
    torch.set_num_threads(1)
    facts = report.machine()
    found = {
        "k4": k4_rows(4, 8, 2) if quick else k4_rows(20, 64, 5),
        "truncation": truncation_rows([8, 16] if quick else [32, 64, 128, 256], 2 if quick else seeds),
        "sizes": size_rows(quick),
    }
    report.save({"machine": facts, **found}, results)
    text = render(facts, found)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    typer.run(main)
