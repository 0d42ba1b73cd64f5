"""Empirical neural tangent kernels: `K(x, x')_ab = <grad f_a(x), grad f_b(x')>`, layer by layer.

For a dense layer the kernel is `(D D^T) o (X X^T)` with X the layer's inputs and D the gradients by its outputs, so
that no gradient by a weight is formed: one forward pass, one backward pass for each output, and n^2 width operations
where contracting Jacobians takes n^2 width^2. (Jacot, Gabriel, Hongler 2018, arXiv 1806.07572, define the kernel; the
product structure is Goodfellow's for per-sample gradient norms, arXiv 1510.01799, and Novak et al. 2022's for kernels,
arXiv 2206.08720.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from abyssal.tangent.empirical.capture import Moved
from abyssal.tangent.empirical.cost import Forecast
from abyssal.tangent.empirical.tiles import Row, Tiling, rows
from abyssal.tangent.empirical.work import Place, Work, length, prepared
from abyssal.tangent.subject import Output
from abyssal.util.checks import whole
from abyssal.util.progress import Progress

__all__ = ["Forecast", "Progress", "forecast_ntk", "ntk"]

_ATTEMPTS = 4  # each after more layers were found whose rows depend on the data

Outputs = Literal["trace", "full", "diagonal"] | int


def ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    outputs: Outputs = "trace",
    *,
    parameters: Sequence[str] | str | None = None,
    output: Output | None = None,
    dtype: torch.dtype | None = None,
    budget: int | float | str | None = None,
    progress: Progress | None = None,
    jobs: int = 1,
) -> Tensor:
    """Compute the empirical neural tangent kernel of a model at its present parameters.

    Args:
        model: any module whose samples are independent of each other in its present mode. It is left as it was found:
            mode, gradients, hooks, buffers and random state. Autocast and inference mode around the call do not count:
            the kernel is that of the model in its own dtype.
        x1: samples along the first dimension: a tensor [n1, ...], a tuple of tensors (positional arguments) or a
            dictionary of tensors (keyword arguments, as transformers take them).
        x2: other samples; None is the same ones, and gives an exactly symmetric kernel.
        outputs: `"trace"`, the sum over outputs; `"full"`, all pairs of outputs; `"diagonal"`, each output with
            itself; or the index of one output.
        parameters: names or globs of the parameters that count; None is all. Those with requires_grad=False do not
            count in any case.
        output: from what the model returns to its outputs, [n, k], [n] or [n, ...] (flattened to k); None is what it
            returns, or that's `logits`.
        dtype: in which products are summed, and of the result; None is that of the outputs, at least float32.
        budget: bytes of working memory beside the model and the kernel, as a number or a text such as "2GiB", for all
            processes together. Blocks of samples and outputs are chosen to fit what the forecast says; the allocator
            may hold some tens of MB more. None is 1 GiB, or what a single sample takes if that is more.
        progress: called with what is being done, blocks done and blocks in all.
        jobs: processes, each with a copy of the model; 1 is this one.

    Returns:
        The kernel, detached: [n1, n2] for a trace or an index, [n1, n2, k] diagonal, [n1, n2, k, k] full.

    Raises:
        TypeError: for a model, samples or outputs of a kind that does not fit.
        ValueError: if nothing is trained, there are no samples, samples interact, values are not finite, layers are in
            reentrant checkpoints, or the budget is too small (the error says what would do).
    """
    whole("jobs", jobs)
    with prepared(model, x1, x2, outputs, parameters, output, dtype) as work:
        kernel = None
        for attempt in range(_ATTEMPTS):
            try:
                kernel = _computed(work, budget, jobs, progress)
                break
            except Moved as moved:  # what is done so far is wrong
                work.give_up(moved.names if attempt + 2 < _ATTEMPTS else work.plan.parameters)
    assert kernel is not None  # with all parameters given up nothing can have moved
    if not kernel.isfinite().all():
        raise ValueError(
            "The kernel is not finite: outputs or gradients overflow for some samples. Use float64 (model.double()), "
            "or look at the samples."
        )
    return kernel


def forecast_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    outputs: Outputs = "trace",
    *,
    parameters: Sequence[str] | str | None = None,
    output: Output | None = None,
    dtype: torch.dtype | None = None,
    budget: int | float | str | None = None,
    jobs: int = 1,
) -> Forecast:
    """Say what :func:`ntk` would take, from running two samples.

    Arguments and errors are those of `ntk`.

    Returns:
        Memory, operations and blocks; print it.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with prepared(model, x1, x2, outputs, parameters, output, dtype) as work:
        tiling = work.tiling(budget, jobs)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work.subject(work.first[:1])
        strips = list(rows(work.first.n, work.n2, work.which, work.mode, tiling))
        passes = sum((1 + length(row.outputs)) * length(row.samples) for row in strips)
        passes += sum((1 + length(o)) * length(c) for row in strips for c, o in row.columns)
        k = length(work.which)
        return Forecast(
            samples=(work.first.n, work.n2 or work.first.n),
            outputs=k,
            shape=tuple(work.shape),
            parameters=sum(p.numel() for p in work.subject.parameters.values()),
            result_bytes=math.prod(work.shape) * work.dtype.itemsize,
            working_bytes=work.peak(tiling),
            least_bytes=work.peak(Tiling(1, 1, 1)) * jobs,
            budget=work.allowed(budget),
            tiling=tiling,
            operations=(
                work.footprint.operations(work.first.n, work.n2, k, work.mode),
                float(passes * counter.get_total_flops()),
            ),
            fallback=tuple(sorted(work.plan.fallback)),
        )


def _computed(work: Work, budget: int | float | str | None, jobs: int, progress: Progress | None) -> Tensor:
    """Compute all tiles as planned."""
    tiling = work.tiling(budget, jobs)
    strips = list(rows(work.first.n, work.n2, work.which, work.mode, tiling))
    kernel = torch.zeros(work.shape, dtype=work.dtype, device=work.device)
    done, total = 0, sum(row.own + len(row.columns) for row in strips)
    for tiles in _strips(work, strips, jobs):
        for place, tile in tiles:
            _put(kernel, place, tile, work)
            done += 1
            if progress is not None:
                progress("tangent kernel", done, total)
    return kernel


def _strips(work: Work, strips: Sequence[Row], jobs: int) -> Iterator[Iterator[tuple[Place, Tensor]]]:
    """Compute strips here, or in several processes in whatever order they finish."""
    if jobs == 1:
        yield from (work.strip(row) for row in strips)
        return
    from joblib import Parallel, delayed

    threads = max(1, torch.get_num_threads() // jobs)
    results = Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered")(
        delayed(_in_process)(work, row, threads) for row in strips
    )
    for tiles in results:
        yield iter(tiles)


def _in_process(work: Work, row: Row, threads: int) -> list[tuple[Place, Tensor]]:
    torch.set_num_threads(threads)
    return list(work.strip(row))


def _put(kernel: Tensor, place: Place, tile: Tensor, work: Work) -> None:
    """Add a tile where it belongs, and mirrored where the kernel is symmetric; a trace comes in parts."""
    i, j, a, b = place
    at = {"trace": (), "diagonal": (a,), "full": (a, b)}[work.mode]
    local = tuple(slice(piece.start - work.which.start, piece.stop - work.which.start) for piece in at)
    kernel[(i, j, *local)] += tile
    if work.second is None and (i, a) != (j, b):
        mirrored = tile.transpose(0, 1)
        kernel[(j, i, *local[::-1])] += mirrored.mT if work.mode == "full" else mirrored
