"""Phase diagrams: what becomes of a residual network at large depth, by scale and by regularity of its weights.

Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929; the diagram is that of its experiments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.scaling.phases.cells import Build, Subject, check_betas, check_run, measure
from abyssal.scaling.phases.crossing import (
    Critical,
    crossing,
    depth_slopes,
    mean_and_error,
    model_means,
    resampled_interval,
    resampled_means,
    resamplings,
)
from abyssal.sweep.store import Store
from abyssal.util.checks import one_of
from abyssal.util.files import whole, write_csv
from abyssal.util.progress import Progress
from abyssal.weights.families import Family

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure, FigureBase

__all__ = ["BETAS", "HURSTS", "REGIMES", "TOLERANCE", "PhaseDiagram", "name_regime", "phase_diagram"]

REGIMES = ("identity", "ode", "sde", "explosion", "collapse")
TOLERANCE = 0.1  # slopes in depth nearer to 0 count as 0: on the frozen side, beta within 0.1 of its critical value
BETAS = tuple(float(beta) for beta in np.linspace(0.2, 1.3, 70).round(6))
HURSTS = tuple(float(hurst) for hurst in np.linspace(0.05, 0.97, 51).round(6))
CLIP = 3.0  # orders of magnitude that the picture tells apart, each way
Array = np.ndarray


@dataclass(frozen=True, eq=False)
class PhaseDiagram:
    """How far states and gradients travel, over betas and Hurst indices.

    Attributes:
        network: its name.
        init: the weights' family; empty where a factory draws its own.
        depth: residual layers.
        width: of the states.
        betas: exponents of the scale, increasing.
        hursts: Hurst indices; None where the family has none.
        seed: it was drawn with.
        samples: log10 of the metrics "hidden" (|h_L - h_0| / |h_0|), "hidden_ratio" (|h_L| / |h_0|), "active" (the
            same of the positive parts), "gradient" (|g_L - g_0| / |g_L|) and "gradient_ratio" (|g_0| / |g_L|); -inf
            where nothing moved. [models, families, betas, inputs]
        seconds: CPU time that computing it took in all.
        computed: cells that were computed now; the others came from the store.
    """

    network: str
    init: str
    depth: int
    width: int
    betas: tuple[float, ...]
    hursts: tuple[float, ...] | None
    seed: int
    samples: Mapping[str, Array] = field(repr=False)
    seconds: float = 0.0
    computed: int = 0

    @property
    def models(self) -> int:
        """Independent networks of each family."""
        return int(self.samples["hidden"].shape[0])

    @property
    def inputs(self) -> int:
        """Inputs of each network."""
        return int(self.samples["hidden"].shape[-1])

    @property
    def hidden(self) -> Array:
        """Mean over models and inputs of log10 |h_L - h_0| / |h_0|. [betas, hursts], or [betas] without them."""
        return self._shaped(self._means["hidden"][0])

    @property
    def hidden_error(self) -> Array:
        """Standard error of `hidden`, models being the independent units; nan for one model. As `hidden`."""
        return self._shaped(self._means["hidden"][1])

    @property
    def gradient(self) -> Array:
        """Mean over models and inputs of log10 |g_L - g_0| / |g_L|. [betas, hursts], or [betas] without them."""
        return self._shaped(self._means["gradient"][0])

    @property
    def gradient_error(self) -> Array:
        """Standard error of `gradient`. As `gradient`."""
        return self._shaped(self._means["gradient"][1])

    @property
    def hidden_ratio(self) -> Array:
        """Mean of log10 |h_L| / |h_0|. As `hidden`."""
        return self._shaped(self._means["hidden_ratio"][0])

    @property
    def gradient_ratio(self) -> Array:
        """Mean of log10 |g_0| / |g_L|. As `hidden`."""
        return self._shaped(self._means["gradient_ratio"][0])

    @property
    def still(self) -> Array:
        """Fraction of states that did not move (no relu of `res1` is open), left out of the means. As `hidden`."""
        return self._shaped((self.samples["hidden"] == -np.inf).mean(axis=(0, 3)))

    def critical_beta(self, metric: str = "hidden", level: float = 0.0) -> Critical:
        """Return, for each family, the beta at which a metric is 1: the state has moved by its own length.

        One depth cannot tell how a metric depends on depth. At the critical beta it tends to a number of order one,
        c, and not to 1, so this estimate is off by about log10(c) / log10(depth), which its interval does not contain:
        at depth 1,000 by 0.04 with rough weights, and by 0.1 at Hurst index 0.9.
        :func:`abyssal.scaling.critical_beta` compares depths instead.

        Args:
            metric: `"hidden"` or `"gradient"`.
            level: log10 of the metric that is looked for.

        Returns:
            The crossing with its 95 % interval over models.
        """
        means = model_means(self._samples(metric))
        value = crossing(self.betas, mean_and_error(means)[0], level)
        replicas = crossing(self.betas, resampled_means(means, resamplings(self.models, self.seed)), level)
        low, high = resampled_interval(value, replicas, self.models)
        hursts: tuple[float | None, ...] = (None,) if self.hursts is None else self.hursts
        return Critical(hursts, value, low, high, f"{metric} metric = 10^{level:g} at depth {self.depth}")

    def regimes(self, other: PhaseDiagram | None = None, tolerance: float = TOLERANCE) -> Array:
        """Name the regime of each point: identity, ode, sde, explosion or collapse.

        The slope of the metric in depth decides, in log-log: below -tolerance states freeze (identity), above
        tolerance they explode, and between a limit is left that is neither: one with quadratic variation where
        beta <= 1/2 + tolerance (sde), else one without (ode); but collapse where the positive part of the state,
        which alone drives `res1`, vanishes.

        Args:
            other: the same at another depth, to have slopes from. Without it they come from this depth alone, as
                log10(metric) / log10(depth), which is right where the metric's prefactor is 1.
            tolerance: slopes nearer to 0 than this count as 0.

        Returns:
            Names out of `REGIMES`. As `hidden`.

        Raises:
            ValueError: if the other diagram is not of the same network, family, width, betas and Hurst indices, or
                is of the same depth.
        """
        slopes, active = (self._slope(name, other) for name in ("hidden", "active"))
        betas = np.broadcast_to(np.asarray(self.betas), slopes.shape)
        return self._shaped(np.vectorize(name_regime)(slopes, active, betas, tolerance))

    def to_csv(self, path: str | Path) -> Path:
        """Write one line per point, whole or not at all: the means, their standard errors, the regime.

        Raises:
            OSError: if the folder is missing or cannot be written to.
        """
        names = ("hidden", "hidden_error", "gradient", "gradient_error", "hidden_ratio", "gradient_ratio", "still")
        columns = {name: getattr(self, name).reshape(len(self.betas), -1) for name in names}
        regimes = self.regimes().reshape(len(self.betas), -1)
        about = {name: getattr(self, name) for name in ("network", "init", "depth", "width", "models", "inputs")}
        rows = [
            {
                **about,
                "hurst": hurst,
                "beta": beta,
                **{name: float(column[i, j]) for name, column in columns.items()},
                "regime": str(regimes[i, j]),
            }
            for j, hurst in enumerate(self.hursts or (None,))
            for i, beta in enumerate(self.betas)
        ]
        return write_csv(rows, Path(path))

    def plot(self, path: str | Path) -> Path:
        """Draw both metrics, as heat maps over beta and Hurst index, or as curves over beta without the latter.

        The format follows the file's name (`.png`, `.svg`, `.pdf`).

        Raises:
            OSError: if the folder is missing or cannot be written to.
            ValueError: for a format that matplotlib does not know.
        """
        path = Path(path)
        figure = self.figure()
        with whole(path) as beside:
            figure.savefig(beside, format=path.suffix.lstrip(".") or "png", dpi=150)
        return path

    def figure(self) -> Figure:
        """Return what `plot` writes as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.4), layout="constrained")
        metrics = [("hidden", "$|h_L - h_0|\\,/\\,|h_0|$"), ("gradient", "$|g_L - g_0|\\,/\\,|g_L|$")]
        for place, (metric, title) in zip(figure.subplots(1, 2), metrics, strict=True):
            if self.hursts is None or len(self.hursts) < 2:
                self._curve(place, metric)
            else:
                self.draw_heat(figure, place, metric)
            place.set_title(f"$\\log_{{10}}$ of {title}", fontsize=10)
        family = f", {self.init} weights" if self.init else ""
        about = f"{self.network}{family}, depth {self.depth:,}, width {self.width}: mean of {self.models} models"
        figure.suptitle(f"{about} x {self.inputs} inputs", fontsize=11)
        return figure

    def _curve(self, axes: Axes, metric: str) -> None:
        mean, error = (column[0] for column in self._means[metric])
        axes.errorbar(self.betas, mean, yerr=np.nan_to_num(error), fmt="o-", markersize=3, linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_ylim(max(float(np.nanmin(mean)) - 0.2, -6), min(float(np.nanmax(mean)) + 0.2, 6))
        axes.set_xlabel("beta (branches scaled by depth^-beta)")

    def draw_heat(self, figure: FigureBase, axes: Axes, metric: str) -> None:
        """Draw what `draw_map` does, with the axes' names, a legend and a colour bar."""
        mesh = self.draw_map(axes, metric)
        axes.set(xlabel="Hurst index H", ylabel="beta")
        axes.legend(loc="upper left", fontsize=8, framealpha=0.85)
        figure.colorbar(mesh, ax=axes, extend="both", shrink=0.9)

    def draw_map(self, axes: Axes, metric: str) -> QuadMesh:
        """Draw a metric over beta and Hurst index: colours, where it is 1 with its interval, and theory's border."""
        assert self.hursts is not None
        mean = self._means[metric][0].T
        mesh = axes.pcolormesh(
            self.hursts, self.betas, mean, cmap="RdBu_r", vmin=-CLIP, vmax=CLIP, shading="nearest", rasterized=True
        )
        critical = self.critical_beta(metric)
        axes.plot(self.hursts, critical.value, color="black", linewidth=1.4, label="metric = 1")
        axes.fill_between(self.hursts, critical.low, critical.high, color="black", alpha=0.25, linewidth=0)
        if self.init == "fbm":
            axes.plot(self.hursts, np.maximum(0.5, self.hursts), "k--", linewidth=1, label="max(1/2, H)")
        axes.set_ylim(self.betas[0], self.betas[-1])
        return mesh

    def _samples(self, metric: str) -> Array:
        return self.samples[one_of("metric", metric, ("hidden", "gradient"))]

    @cached_property
    def _means(self) -> dict[str, tuple[Array, Array]]:
        """Mean and standard error over models, by metric. [families, betas] each."""
        return {name: mean_and_error(model_means(samples)) for name, samples in self.samples.items()}

    def _slope(self, name: str, other: PhaseDiagram | None) -> Array:
        """Return the slope of a metric in depth. [families, betas]."""
        if other is None:
            return self._means[name][0] / max(math.log10(self.depth), math.log10(2))
        for what in ("network", "init", "width", "betas", "hursts"):
            if getattr(self, what) != getattr(other, what):
                raise ValueError(f"the other diagram has another {what}: {getattr(other, what)!r}")
        if self.depth == other.depth:
            raise ValueError(f"the other diagram has the same depth, {self.depth}: slopes need another one")
        return depth_slopes([self.depth, other.depth], [self._means[name][0], other._means[name][0]])

    def _shaped(self, values: Array) -> Array:
        """Turn [families, betas] into what users see."""
        return values.T if self.hursts is not None else values[0]


def name_regime(slope: float, active_slope: float, beta: float, tolerance: float = TOLERANCE) -> str:
    """Name the regime of a point from its slopes in depth; see :meth:`PhaseDiagram.regimes`.

    Args:
        slope: of log10 |h_L - h_0| / |h_0| in log10 of depth.
        active_slope: of the positive part's logarithm.
        beta: exponent of the scale.
        tolerance: slopes nearer to 0 count as 0.

    Returns:
        A name out of `REGIMES`; empty where the slope is nan, as nothing moved.
    """
    if math.isnan(slope):
        return ""
    if slope > tolerance:
        return "explosion"
    if slope < -tolerance:
        return "identity"
    if active_slope < -tolerance:
        return "collapse"
    return "sde" if beta <= 0.5 + tolerance else "ode"


def phase_diagram(
    network: str | Build = "res3",
    init: str | Family | None = None,
    depth: int = 1000,
    width: int = 40,
    betas: Sequence[float] | None = None,
    hursts: Sequence[float] | None = None,
    *,
    models: int = 5,
    inputs: int = 10,
    seed: int = 0,
    store: Store | None = None,
    engine: str = "local",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> PhaseDiagram:
    """Measure how far states and gradients travel through random residual networks, over a grid.

    `h_0 = A x` with x uniform on [0, 1]^64, then `depth` residual layers with branches scaled by `depth^-beta`:
    `V relu(h)` (res1) or `V relu(W h)` (res3), entries of variance 1/width; a linear scalar read-out and a quadratic
    loss, with `g_n` its gradient by `h_n`. Measured are `|h_L - h_0| / |h_0|` and `|g_L - g_0| / |g_L|`, as
    logarithms to base 10, however large or small; in float32 with exact rescaling. Where the dynamics is chaotic
    (rough weights at beta below about 0.15), a single model's figure depends on rounding, as it does in any
    arithmetic; its distribution does not.

    Args:
        network: `"res1"`, `"res3"`, or a factory `build(depth, beta, generator)` of modules that map
            [inputs, width] to the same shape, such as an :class:`abyssal.nn.ResidualStack` (in float64 through
            autograd: slower, and infinite beyond 1e308).
        init: the weights' family across depth, by name (see :func:`abyssal.weights.families.family`) or itself; None is
            `"fbm"`, fractional noise. A factory has its own: leave it out.
        depth: residual layers L.
        width: of the states.
        betas: increasing exponents; None is the paper's range, 70 from 0.2 to 1.3.
        hursts: Hurst indices, for families that have one; None is 51 from 0.05 to 0.97.
        models: independent networks for each family; they are what uncertainties come from.
        inputs: for each network.
        seed: of everything. Equal arguments give equal results, on any engine.
        store: keeps each finished model, and is where the call goes on if it was killed.
        engine: `"local"`, `"sequential"`, `"ray"` or `"dask"`; see :func:`abyssal.sweep.run`.
        jobs: processes; None is one per core.
        progress: called with what is being done, models done and models in all.

    Returns:
        The diagram.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        SweepError: if models failed; those that did not are in the store.
    """
    subject = Subject.of(network, init, hursts, HURSTS)
    grid = check_betas(BETAS if betas is None else betas)
    check_run([depth], grid, width, models, inputs, seed, engine, jobs, store)
    how: dict[str, Any] = {"store": store, "engine": engine, "jobs": jobs, "progress": progress}
    found = measure(subject, depth, width, grid, models, inputs, seed, **how)
    about = (subject.network, subject.init, depth, width, grid, subject.hursts, seed)
    return PhaseDiagram(*about, found.values, found.seconds, found.computed)
