"""Phase diagrams: what becomes of a residual network at large depth, by scale and by regularity of its weights.

Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929; the diagram is that of its experiments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from abyssal.scaling.phases.cells import Build, Subject, check_betas, check_run, measure
from abyssal.scaling.phases.diagram import PhaseDiagram
from abyssal.sweep.engine import Progress
from abyssal.sweep.store import Store
from abyssal.weights.families import Family

__all__ = ["BETAS", "HURSTS", "phase_diagram"]

BETAS = tuple(float(beta) for beta in np.linspace(0.2, 1.3, 70).round(6))
HURSTS = tuple(float(hurst) for hurst in np.linspace(0.05, 0.97, 51).round(6))


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
        init: the weights' family across depth, by name (see :func:`abyssal.scaling.families.family`) or itself; None is
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
    found = measure(
        subject,
        depth,
        width,
        grid,
        models,
        inputs,
        seed,
        store=store,
        engine=engine,
        jobs=jobs,
        progress=progress,
    )
    return PhaseDiagram(
        network=subject.network,
        init=subject.init,
        depth=depth,
        width=width,
        betas=grid,
        hursts=subject.hursts,
        seed=seed,
        samples=found.values,
        seconds=found.seconds,
        computed=found.computed,
    )
