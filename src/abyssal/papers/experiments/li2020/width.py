"""The width that keeps the kernel's least eigenvalue above half its start during training, against the samples n.

Both networks train by gradient flow until the loss is 1 % of what it was (or time 200 n / lambda_max), and keep their
least eigenvalue if it never falls below half its value at the start. Whether they do is fitted by a logistic model,
`logit P = a + b (log m - p log n)`: at any fixed P the width needed goes as `n^p`. The proofs ask for a width of order
n^3 (residual) and n^4 (fully connected); they are sufficient conditions, and networks may need far less.

Source: Li, Luo, Yip, arXiv 2007.03714. Settings are ours: samples uniform on the unit sphere of fixed dimension,
standard normal targets, tanh, L = 8, c_res = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from abyssal.papers.experiment import Experiment, Finding, Row, Work, listed
from abyssal.papers.shared.lly import COLOUR, PAPER, SHORT, grid_of_networks, least
from abyssal.papers.shared.powers import by_size, name_panel
from abyssal.report.axes import new_figure
from abyssal.util.stats import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Settings", "check", "needed", "plot", "run"]

SHARE = 0.9  # of networks that are to keep their least eigenvalue where one width is named
_DRAWS = 400  # of the bootstrap
_PROOF = {"resnet": 3.0, "plain": 4.0}


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        samples: n, ascending.
        widths: m of each network.
        seeds: of weights and samples, at each n and m.
        depth: L, the first layer counted.
        features: length of a sample.
        longest: when training is given up, in units of `n / lambda_max`.
        looks: at the kernel, for each tenfold of time, divided by 10.
        activation: "tanh", "erf" or "sin".
        c_res: strength of the residual branches.
    """

    samples: tuple[int, ...]
    widths: dict[str, tuple[int, ...]] = field(hash=False)
    seeds: int
    depth: int = 8
    features: int = 10
    longest: float = 200.0
    looks: int = 3
    activation: str = "tanh"
    c_res: float = 1.0


def run(settings: Settings, work: Work) -> list[Row]:
    """Train both networks at every width and number of samples."""
    common = {name: value for name, value in asdict(settings).items() if name not in ("widths", "seeds", "samples")} | {
        "data": "sphere"
    }
    rows: list[Row] = []
    for network, widths in settings.widths.items():
        found = grid_of_networks(
            work, least, common, f"width, {SHORT[network]}",
            widths=widths, seeds=settings.seeds, networks=[network], n=settings.samples,
        )  # fmt: skip
        for cell, seed, i, values in found:
            row: Row = {"network": network, "n": cell["n"], "width": cell["width"], "seed": seed}
            row |= {name: float(values[name][i]) for name in ("ratio", "lambda_max", "lambda_min", "loss", "time")}
            rows.append({**row, "kept": bool(values["ratio"][i] >= 0.5)})
    return rows


@dataclass(frozen=True)
class Needed(Interval):
    """The power p of the fitted width, `m = scale n^p` at which `SHARE` of the networks keep their least eigenvalue.

    Its interval is of a bootstrap over seeds.

    Attributes:
        scale: of the width.
        steep: b: by how much the log odds grow with log m.
    """

    scale: float
    steep: float

    def __str__(self) -> str:
        return f"m = {self.scale:.2g} n^{self.value:.2f} (95 %: {self.low:.2f} to {self.high:.2f})"

    def at(self, n: np.ndarray) -> np.ndarray:
        """Return the width for numbers of samples."""
        found: np.ndarray = self.scale * n**self.value
        return found


def needed(rows: list[Row], network: str) -> Needed:
    """Fit the width that a network needs; nan where it always, or never, keeps its least eigenvalue."""
    tables = _tables(rows, network)
    kept = np.concatenate([table.sum(0) for table in tables.values()])
    x = np.concatenate([np.stack([np.ones(len(m)), np.log(m), np.full(len(m), math.log(n))], 1)
                        for (n, m) in tables])  # fmt: skip
    total = np.concatenate([np.full(table.shape[1], len(table)) for table in tables.values()])
    if not 0 < kept.sum() < total.sum():
        return Needed(*[math.nan] * 5)
    random = np.random.default_rng(0)
    powers = []
    for _ in range(_DRAWS):  # widths share a seed's samples: seeds are drawn again, whole
        again = [table[random.integers(0, len(table), len(table))].sum(0) for table in tables.values()]
        _, b, c = _logistic(x, np.concatenate(again), total)
        powers.append(-c / b if b > 0 else math.inf)
    a, b, c = _logistic(x, kept, total)
    low, high = np.quantile(powers, [0.025, 0.975], method="nearest")
    if b <= 0:  # wider ones keep it less often: no width is enough
        return Needed(math.nan, math.nan, math.nan, math.nan, b)
    return Needed(-c / b, float(low), float(high), math.exp((math.log(SHARE / (1 - SHARE)) - a) / b), b)


def _tables(rows: list[Row], network: str) -> dict[tuple[float, tuple[int, ...]], np.ndarray]:
    """Return who kept it, [seeds, widths], by n and the widths."""
    found = {}
    for n in sorted({row["n"] for row in rows if row["network"] == network}):
        widths, kept = by_size(rows, "width", "kept", network=network, n=n)
        found[n, tuple(widths)] = kept.T
    return found


def _logistic(x: np.ndarray, kept: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Fit log odds linear in x to counts by Newton's method, under a prior weak enough not to be seen (sd 30)."""
    beta = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        gradient = x.T @ (kept - total * p) - beta / 900
        step = np.linalg.solve((x * (total * p * (1 - p))[:, None]).T @ x + np.eye(len(beta)) / 900, gradient)
        beta = beta + step * min(1.0, 5 / max(1e-300, np.abs(step).max()))
        if np.abs(step).max() < 1e-8:
            break
    return beta


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge the powers of n by their bootstrapped intervals."""
    found = {network: needed(rows, network) for network in settings.widths}
    for network, bound in _PROOF.items():
        fit = found[network]
        yield Finding(
            f"{SHORT[network]}: the width that keeps lambda_min above half its start grows as n^{bound:g} or less",
            f"{fit} keeps {SHARE:.0%}; {_reached(rows, network)}",
            None if math.isnan(fit.value) else True if fit.high <= bound else fit.below(bound),
        )
    resnet, plain = found["resnet"], found["plain"]
    n = np.array([settings.samples[-1]], dtype=float)
    yield Finding(
        "the fully connected network needs a higher power of n than the ResNet",
        " against ".join(f"n^{fit.show('.2f')}" for fit in (plain, resnet)),
        True if plain.low > resnet.high else False if plain.high < resnet.low else None,
    )
    yield Finding(
        "the fully connected network needs more width than the ResNet",
        f"{plain.at(n)[0]:.0f} against {resnet.at(n)[0]:.0f} at n = {settings.samples[-1]}",
        _wider(rows, settings),
    )


def _wider(rows: list[Row], settings: Settings) -> bool | None:
    """Compare how many keep it, by a two-sided test of proportions over the widths that both networks have."""
    both = sorted(set(settings.widths["resnet"]) & set(settings.widths["plain"]))
    shares, count = [], 0
    for network in ("resnet", "plain"):
        kept = [bool(row["kept"]) for row in rows if row["network"] == network and row["width"] in both]
        shares.append(float(np.mean(kept)) if kept else math.nan)
        count = len(kept)
    if not count:
        return None
    error = math.sqrt(sum(share * (1 - share) for share in shares) / count)
    apart = shares[0] - shares[1]
    return None if abs(apart) <= 1.96 * error else apart > 0


def _reached(rows: list[Row], network: str) -> str:
    late = [row for row in rows if row["network"] == network and row["loss"] > 0.01]
    total = sum(row["network"] == network for row in rows)
    return f"{len(late) / max(1, total):.0%} ran out of time before 1 % of the loss"


def plot(rows: list[Row], settings: Settings) -> Figure:
    """The share that keeps its least eigenvalue against width, and the width needed against n."""
    figure, (resnet, plain, width) = new_figure(3)
    ns = np.array(settings.samples, dtype=float)
    fits = {network: needed(rows, network) for network in settings.widths}
    for axes, network in ((resnet, "resnet"), (plain, "plain")):
        for j, n in enumerate(settings.samples):
            shares = [
                np.mean([bool(r["kept"]) for r in rows if (r["network"], r["n"], r["width"]) == (network, n, m)])
                for m in settings.widths[network]
            ]
            shade = 0.35 + 0.65 * j / max(1, len(ns) - 1)
            axes.plot(
                settings.widths[network], shares, "o-", color=COLOUR[network], alpha=shade, label=f"n = {n}", ms=4
            )
        axes.axhline(SHARE, color="#777777", linewidth=0.8, linestyle=":")
        title = f"{SHORT[network]}: share that keeps half of lambda_min"
        name_panel(axes, title, "width m", settings.widths[network], ylim=(-0.03, 1.03))
        fit = fits[network]
        width.plot(ns, fit.at(ns), "o-", color=COLOUR[network], label=f"{SHORT[network]}: $n^{{{fit.value:.2f}}}$")
    middle = float(np.exp(np.mean([np.log(fit.at(ns)[0]) for fit in fits.values()])))
    if math.isfinite(middle):
        width.plot(ns, middle * (ns / ns[0]) ** 3, ":", color="#777777", label="$n^3$, the theorem's")
    name_panel(width, f"width at which {SHARE:.0%} keep it", "samples n", settings.samples, yscale="log")
    return figure


EXPERIMENT = Experiment(
    name="li2020/width",
    paper=PAPER,
    claim="For smooth activations a residual network of width of order n^3 keeps its kernel's least eigenvalue, and so "
    "trains to zero loss, where the proof for fully connected networks needs n^4.",
    sizes={
        "tiny": Settings((3, 6), {"resnet": (3, 6, 12), "plain": (3, 6, 12)}, 4, 4, 6, 50.0, 1),
        "small": Settings((4, 8, 16, 32), {"resnet": (4, 8, 16, 32, 64), "plain": (4, 8, 16, 32, 64, 128)}, 16),
        "paper": Settings(
            (4, 8, 16, 32, 64),
            {"resnet": (4, 8, 16, 32, 64, 128), "plain": (4, 8, 16, 32, 64, 128, 256, 512)},
            100,
        ),
    },
    minutes={"tiny": 0.03, "small": 1.9, "paper": 300},
    run=run,
    check=check,
    plot=plot,
    hardware="16 cores, an hour",
)
