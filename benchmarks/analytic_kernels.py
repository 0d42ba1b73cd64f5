"""Infinite-width kernels: accuracy against many-digit arithmetic, time at depth 1,024, spectra on the sphere.

    python benchmarks/analytic_kernels.py --quick
    python benchmarks/analytic_kernels.py --write docs/tangent.md

About twenty minutes of one core for everything, nearly all of it mpmath's; seconds with --quick.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import mpmath as mp
import torch
import typer
from rich.console import Console
from torch import Tensor

import analytic_reference as reference
import report
from abyssal.tangent.analytic.kernels import fully_connected, residual, resntk
from abyssal.tangent.analytic.sphere import half_angle, sphere_spectrum

MARKER = "analytic-kernels"
console = Console(stderr=True)
Row = dict[str, Any]

SETTINGS: list[tuple[str, dict[str, float]]] = [
    ("pre", {"alpha": 0.5, "w_std": 1.4, "b_std": 0.1}),
    ("two", {"alpha": 0.3, "w_std": 1.5, "b_std": 0.3}),
    ("lly", {"alpha": 1.0}),
    ("fc", {"w_std": 1.4, "b_std": 0.1}),
    ("fc", {"w_std": 3.0}),
]
# At depth 64 with which signals stay small enough for a dense sum in mpmath to end.
DEEP: list[tuple[str, dict[str, float]]] = [
    ("pre", {"alpha": 0.125, "w_std": 1.4, "b_std": 0.1}),
    ("two", {"alpha": 0.1, "w_std": 1.5, "b_std": 0.3}),
    ("lly", {"alpha": 1.0}),
]
CLOSED = ("relu", "erf")


def partners(near: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """An input and one partner at every kind of place."""
    generator = torch.Generator().manual_seed(3)
    x, other, nudge = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    found = {"off-diagonal": other, "diagonal": x, "parallel": 2.7 * x, "antipodal": -x}
    if near:
        found["near by 1e-7"] = x + 1e-7 * nudge
        found["antipodal but for 1e-7"] = -x + 1e-7 * nudge
    return x, found


def relative(found: Tensor, exact: Any) -> float:
    return float(abs(mp.mpf(float(found)) - exact) / abs(exact)) if exact else abs(float(found))


def accuracy_rows(quick: bool) -> list[Row]:
    """Largest relative error of the two kernels by activation, branch, depth and place."""
    rows = []
    for activation in ("relu", "erf"):
        for branch, options in SETTINGS:
            rows += [accuracy_row(activation, branch, options, depth) for depth in (1, 8, 64)]
    # A double integral in mpmath takes a second for each pair and layer, and more for wider signals.
    if quick:
        return [*rows, accuracy_row("tanh", *SETTINGS[0], 1, ("off-diagonal", "diagonal"))]
    for branch, options in SETTINGS[:3]:
        rows += [accuracy_row("tanh", branch, options, depth) for depth in (1, 4)]
    rows += [accuracy_row("gelu", *SETTINGS[0], depth) for depth in (1, 2)]
    return [*rows, *(accuracy_row(activation, *mild, 64) for activation in ("tanh", "gelu") for mild in DEEP)]


def accuracy_row(
    activation: str, branch: str, options: dict[str, float], depth: int, only: tuple[str, ...] = ()
) -> Row:
    closed = activation in CLOSED
    x, places = partners(closed)
    places = {place: partner for place, partner in places.items() if not only or place in only}
    y = torch.stack(list(places.values()))
    call: Callable[..., tuple[Tensor, Tensor]] = fully_connected if branch == "fc" else residual
    found = call(x[None], y, depth, activation, **options, **({} if branch == "fc" else {"branch": branch}))
    errors = {}
    with mp.workdps(reference.DIGITS if closed else 30):
        for k, (place, partner) in enumerate(places.items()):
            exact = reference.kernels(x, partner, depth, getattr(reference, activation), branch, **options)
            errors[place] = max(relative(f[0, k], e) for f, e in zip(found, exact, strict=True))
    return {"activation": activation, "branch": branch, **options, "depth": depth, "errors": errors}


def time_rows(quick: bool) -> list[Row]:
    """CPU seconds of both kernels of many inputs of width 64 at great depth, activations interleaved."""
    count, depth, repeats = (16, 64, 1) if quick else (128, 1024, 3)
    x = torch.randn(count, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(x, dim=-1)  # what "lly" is made for
    cases = [(a, b) for a in ("relu", "erf", "tanh", "gelu") for b in ("pre", "lly")]
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for _ in range(repeats):
        for activation, branch in cases:
            options = {"alpha": depth**-0.5, "w_std": 1.4, "b_std": 0.1} if branch == "pre" else {"alpha": 1.0}
            began = time.process_time()
            residual(x if branch == "pre" else unit, None, depth, activation, branch=branch, **options)
            seconds[activation, branch].append(time.process_time() - began)
    rows = []
    for (activation, branch), times in seconds.items():
        ratio = statistics.median(t / r for t, r in zip(times, seconds["relu", branch], strict=True))
        spread = [min(times), max(times)]
        row = {"activation": activation, "branch": branch, "inputs": count, "depth": depth, "over relu": ratio}
        rows.append({**row, "seconds": statistics.median(times), "spread": spread})
    return rows


def sphere_rows(quick: bool) -> list[Row]:
    """ResNTK: decay on spheres, half angle and the share of low degrees, by depth and balance."""
    rows = []
    depths = (2, 16) if quick else (2, 8, 32, 128)
    balances: dict[str, Callable[[int], float]] = {
        "1": lambda depth: 1.0,
        "L^-1/2": lambda depth: depth**-0.5,
        "L^-1": lambda depth: 1 / depth,
    }
    for name, alpha in balances.items():
        for depth in depths:
            balance = alpha(depth)
            kernel = partial(resntk, depth=depth, alpha=balance)
            row: Row = {"alpha": name, "depth": depth, "half angle": half_angle(kernel)}
            for d, highest in ((3, 100 if quick else 400), (5, 60)):
                spectrum = sphere_spectrum(kernel, d, highest)
                fits = [spectrum.decay(parity=parity) for parity in (0, 1)]
                row[f"d = {d}"] = [[fit.power, fit.error] for fit in fits]
                row["degrees 0 to 3"] = float(spectrum.shares[:4].sum()) if d == 3 else row["degrees 0 to 3"]
            rows.append(row)
    return rows


def render(facts: dict[str, str], found: dict[str, list[Row]]) -> str:
    parts = ["## Infinite-width kernels", report.header(facts), "### Accuracy", *_accuracy(found["accuracy"])]
    parts += [
        f"### Time at depth {found['times'][0]['depth']:,}",
        *_times(found["times"]),
        "### Spectra of the ResNTK",
        *_spheres(found["sphere"]),
    ]
    return "\n\n".join(parts)


def _accuracy(rows: list[Row]) -> list[str]:
    places = list(rows[0]["errors"])
    head = ["activation, branch, depth", *places]
    body = []
    for r in rows:
        settings = ", ".join(f"{k} {r[k]:g}" for k in ("alpha", "w_std", "b_std") if k in r)
        cells = [f"{r['errors'][p]:.0e}" if p in r["errors"] else "-" for p in places]
        body.append([f"{r['activation']}, {r['branch']} ({settings}), {r['depth']}", *cells])
    about = (
        "Larger of the relative errors of NNGP and NTK against mpmath: 80 digits and closed forms for ReLU and erf, 30 "
        "digits and dense trapezoidal sums (good to 1e-15 or so) for tanh and GELU. *fc* is the fully connected "
        "network; with w_std 3 and erf it is chaotic: small distances double in every layer. 0e+00 is all digits."
    )
    return [about, report.table(head, body)]


def _times(rows: list[Row]) -> list[str]:
    body = []
    for r in rows:
        low, high = r["spread"]
        times = f"{r['seconds']:.2f} ({low:.2f} to {high:.2f})"
        body.append([f"{r['activation']}, {r['branch']}", times, f"{r['over relu']:.1f}"])
    count, depth = rows[0]["inputs"], rows[0]["depth"]
    about = (
        f"Both kernels, {count} inputs of width 64 ({count * (count + 1) // 2:,} pairs), float64, one thread, CPU "
        "seconds: median and range of interleaved runs, and the median ratio to ReLU in the same round. alpha is "
        f"1/{depth**0.5:g} for *pre*, 1 for *lly*."
    )
    return [about, report.table(["activation, branch", "CPU s", "over ReLU"], body)]


def _spheres(rows: list[Row]) -> list[str]:
    head = [
        "alpha, depth",
        "half angle (degrees)",
        "share of degrees 0 to 3, R³",
        "even, R³",
        "odd, R³",
        "even, R⁵",
        "odd, R⁵",
    ]
    body = []
    for r in rows:
        cells = [f"{power:.3f} ± {error:.1g}" for d in (3, 5) for power, error in r[f"d = {d}"]]
        half = f"{r['half angle'] * 57.29578:.1f}"
        body.append([f"{r['alpha']}, {r['depth']}", half, f"{r['degrees 0 to 3']:.3f}", *cells])
    about = (
        "Half angle: where the kernel has fallen half-way from cosine 1 to cosine 0; a spike's goes to 0. Power of "
        "the degree at which eigenvalues of even and odd degrees fall on the spheres in R³ and R⁵, by least squares "
        "over the upper half of the degrees (on a logarithmic scale) to 400 and 60, with its standard error (of the "
        "fit: what is left of lower-order terms is not in it). The theorem of Belfer et al. says 3 and 5, for every "
        "depth and alpha; a spike reaches them only at degrees above its inverse width."
    )
    return [about, report.table(head, body)]


def main(
    quick: Annotated[bool, typer.Option(help="Fewer and smaller cases: seconds.")] = False,
    results: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/analytic_kernels.json"),
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure, print the tables, and write them where asked."""
    torch.set_num_threads(1)
    facts = {**report.machine(), "mpmath": mp.__version__}
    found: dict[str, list[Row]] = {}
    for name, task in {"accuracy": accuracy_rows, "times": time_rows, "sphere": sphere_rows}.items():
        began = time.process_time()
        found[name] = task(quick)
        console.print(f"{name}: {time.process_time() - began:.0f} s of CPU")
        report.save({"machine": facts, **found}, results)
    text = render(facts, found)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    typer.run(main)
