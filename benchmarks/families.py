"""Weight families: time to draw them, and how well the Hurst index of given weights is estimated.

    python benchmarks/families.py                # about a minute; prints three Markdown tables, --write FILE

Times are CPU seconds of this process on one thread, median of 7 and range. Estimators are compared on the same
seeded paths of known index, by root mean square error: the package's debiased Whittle estimator; the slope of the
log variogram of the path (of the running sum, for noise) at lags 1 to 16 (`variogram`); the slope of the log
periodogram, averaged over entries, at the lowest sqrt(N) frequencies (`log-periodogram`, Geweke and Porter-Hudak
1983).
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import report
from abyssal.weights.families import Family, FractionalMotion, FractionalNoise, GaussianProcess, Iid
from abyssal.weights.hurst import hurst_exponent

HURSTS = (0.1, 0.3, 0.5, 0.7, 0.9)


def cpu_seconds(law: Family, depth: int, count: int) -> list[float]:
    """Time drawing after one draw that fills the caches."""
    law.sample(depth, count)
    times = []
    for _ in range(7):
        started = time.process_time()
        law.sample(depth, count)
        times.append(time.process_time() - started)
    return sorted(times)


def by_variogram(noise: Tensor) -> float:
    """Half the slope of log mean square increment of the path against log lag."""
    path = noise.cumsum(0)
    lags = [1, 2, 4, 8, 16]
    values = [float((path[lag:] - path[:-lag]).square().mean().log()) for lag in lags]
    return statistics.linear_regression([math.log(lag) for lag in lags], values).slope / 2


def by_log_periodogram(noise: Tensor) -> float:
    """The spectrum of noise goes as frequency^(1 - 2H) at low frequencies."""
    spectrum = torch.fft.rfft(noise, dim=0).abs().square().mean(1)
    lowest = math.isqrt(len(noise))
    x = [math.log(2 * math.sin(math.pi * j / len(noise))) for j in range(1, lowest + 1)]
    return (1 - statistics.linear_regression(x, spectrum[1 : lowest + 1].log().tolist()).slope) / 2


def errors(depth: int, count: int, trials: int) -> list[str]:
    """Return rows of the table of root mean square errors, and of how often the interval holds the index."""
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[str]] = {"Whittle": [], "variogram": [], "log-periodogram": [], "95% interval covers": []}
    for hurst in HURSTS:
        gaps: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(trials):
            noise = FractionalNoise(hurst).sample(depth, count, generator, dtype=torch.float64)
            found = hurst_exponent(noise, kind="noise")
            gaps["Whittle"].append(found.value - hurst)
            gaps["variogram"].append(by_variogram(noise) - hurst)
            gaps["log-periodogram"].append(by_log_periodogram(noise) - hurst)
            gaps["95% interval covers"].append(float(found.low <= hurst <= found.high))
        for name, values in gaps.items():
            if name == "95% interval covers":
                rows[name].append(f"{statistics.mean(values):.0%}")
            else:
                rows[name].append(f"{math.sqrt(statistics.fmean(v * v for v in values)):.4f}")
    return [f"| {depth} x {count} | {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def main(write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None) -> None:
    """Print the tables, and write them where asked."""
    torch.set_num_threads(1)
    lines = [report.header(report.machine()), ""]
    say = lines.append
    say("| family | depth x entries | CPU s, median | range |\n|---|---|---|---|")
    laws = (Iid("normal"), Iid("uniform"), FractionalNoise(0.8), FractionalMotion(0.8), GaussianProcess())
    for law in laws:
        times = cpu_seconds(law, 1000, 1600)
        say(f"| {law} | 1000 x 1600 | {times[3]:.3f} | {times[0]:.3f} to {times[-1]:.3f} |")
    for law in (FractionalNoise(0.8), GaussianProcess("matern52", 1.0)):
        times = cpu_seconds(law, 4000, 400)
        say(f"| {law} | 4000 x 400 | {times[3]:.3f} | {times[0]:.3f} to {times[-1]:.3f} |")

    say("\n| law | lag 1, measured | true | variance, measured |\n|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    for hurst in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99):
        noise = FractionalNoise(hurst).sample(1000, 1600, generator, dtype=torch.float64)
        products, squares = (noise[1:] * noise[:-1]).mean(0), noise.square().mean(0)
        lag, variance = (
            f"{float(each.mean()):.4f} +- {float(each.std()) / math.sqrt(1600):.4f}" for each in (products, squares)
        )
        say(f"| H = {hurst} | {lag} | {2 ** (2 * hurst - 1) - 1:.4f} | {variance} |")

    say("\n| depth x entries | root mean square error of | " + " | ".join(f"H = {h}" for h in HURSTS) + " |")
    say("|---|---|" + "---|" * len(HURSTS))
    for depth, count, trials in ((24, 64, 100), (200, 1, 100), (200, 64, 100), (1000, 16, 50)):
        say("\n".join(errors(depth, count, trials)))
    report.publish("\n".join(lines), "families", write)


if __name__ == "__main__":
    typer.run(main)
