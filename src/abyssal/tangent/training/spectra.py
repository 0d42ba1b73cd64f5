"""The spectrum of a kernel matrix: eigenvalues, conditioning, effective ranks, and how the eigenvalues decay."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abyssal.report.axes import COLOURS, FAINT, Plotted, new_figure
from abyssal.util.checks import share
from abyssal.util.files import for_json
from abyssal.util.stats import line, student

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Decay", "Spectrum", "kernel_blocks", "power_law", "real", "spectrum"]

_ASYMMETRY = 1e3  # in units of the rounding of one entry; an entry is a sum of many products
_LEAST_POINTS = 3  # of a fit: two leave no residual to judge it by


@dataclass(frozen=True)
class Decay:
    """A power law fitted to eigenvalues: `lambda_i = scale * i ** -exponent`, i counted from 1.

    It is the least-squares line of log eigenvalue in log index, every index with the same weight. Any falling curve
    has such a line: see `r2`, `r2_exponential` and `halves` before calling it a power law. Eigenvalues are in order,
    so residuals are not independent of one another; the standard error and the interval, which suppose that they
    are, are too small.

    Attributes:
        exponent: of the power law; positive where eigenvalues fall.
        scale: the fitted eigenvalue at i = 1.
        standard_error: of the exponent.
        low: lower end of the exponent's 95 % interval (Student's t with `last - first - 1` degrees of freedom).
        high: its upper end.
        r2: share of the variance of the log eigenvalues that the line explains.
        r2_exponential: the same for `lambda_i = a * exp(-b * i)`, over the same indices.
        halves: exponents of the same fit over the range's first and second half in log index; nan where a half has
            fewer than 3 points. Far apart, they say that this is no power law.
        first: first index of the fit, from 1.
        last: last index of the fit, included.
    """

    exponent: float
    scale: float
    standard_error: float
    low: float
    high: float
    r2: float
    r2_exponential: float
    halves: tuple[float, float]
    first: int
    last: int

    def __str__(self) -> str:
        """Say the exponent, its standard error, and over what it was fitted."""
        halves = ", ".join(f"{-half:.2f}" for half in self.halves)
        return (
            f"i^{-self.exponent:.2f} +- {self.standard_error:.2f} fitted over i = {self.first}..{self.last}, "
            f"r^2 {self.r2:.3f} (exponential: {self.r2_exponential:.3f}; halves of the range: {halves})"
        )


@dataclass(frozen=True, eq=False)
class Spectrum(Plotted):
    """The spectrum of one kernel matrix.

    Attributes:
        eigenvalues: descending, float64, on the CPU. [n]
        rounding: relative rounding of the matrix's entries.
        decay: the fitted power law; None where fewer than three eigenvalues are above the floor.
    """

    eigenvalues: Tensor = field(repr=False)
    rounding: float
    decay: Decay | None

    @cached_property
    def floor(self) -> float:
        """What is smaller cannot be told from 0: `n * rounding * max |eigenvalue|`."""
        return len(self.eigenvalues) * self.rounding * float(self.eigenvalues.abs().max())

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def least(self) -> float:
        """The smallest eigenvalue as computed: its absolute error is of the size of the floor, and it may be < 0."""
        return float(self.eigenvalues[-1])

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues."""
        return float(self.eigenvalues.sum())

    @property
    def rank(self) -> int:
        """How many eigenvalues are above the floor."""
        return int((self.eigenvalues > self.floor).sum())

    @property
    def condition(self) -> float:
        """Largest by smallest eigenvalue; inf where the smallest is not above the floor."""
        return self.largest / self.least if self.least > self.floor else math.inf

    @property
    def negative(self) -> float:
        """What eigenvalues below `-floor` have of the sum of all absolute eigenvalues: 0 for a kernel, at most 1."""
        below = self.eigenvalues[self.eigenvalues < -self.floor]
        return float(below.abs().sum() / self.eigenvalues.abs().sum()) if len(below) else 0.0

    @property
    def is_indefinite(self) -> bool:
        """Whether some eigenvalue is negative beyond rounding: then the matrix is no kernel.

        The kernel's time derivatives and differences of kernels are indefinite by right; a tangent kernel is not.
        """
        return self.negative > 0

    @cached_property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the eigenvalues divided by their sum, negative ones left out; 0 for K = 0.

        n if all are equal, 1 if one is all. Roy and Vetterli, The effective rank, EUSIPCO 2007, definition 1.
        """
        positive = self.eigenvalues[self.eigenvalues > 0]
        if not len(positive):
            return 0.0
        shares = positive / positive.sum()
        return math.exp(-float(torch.xlogy(shares, shares).sum()))

    @property
    def stable_rank(self) -> float:
        """Trace divided by the largest eigenvalue; 0 for K = 0.

        It is the stable rank `|J|_F^2 / |J|_2^2` of the Jacobian in K = J J^T (Rudelson and Vershynin, J. ACM 2007).
        """
        return self.trace / self.largest if self.largest > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; None stands for what is not a finite number."""
        names = ("largest", "least", "trace", "condition", "rank", "effective_rank", "stable_rank", "negative", "floor")
        plain: dict[str, Any] = {name: getattr(self, name) for name in names}
        plain["decay"] = None if self.decay is None else asdict(self.decay)
        plain["eigenvalues"] = self.eigenvalues.tolist()
        return {name: for_json(value) for name, value in plain.items()}

    def figure(self) -> Figure:
        """Return eigenvalues against their index, both logarithmic, and the fit."""
        figure, (axes,) = new_figure(1)
        index = np.arange(1, len(self.eigenvalues) + 1)
        values = self.eigenvalues.numpy()
        above = values > self.floor
        axes.loglog(index[above], values[above], ".", color=COLOURS[0], markersize=5, label="above rounding")
        lost = ~above & (values != 0)
        if lost.any():
            axes.loglog(index[lost], np.abs(values[lost]), "x", color=FAINT, markersize=4, label="rounding, |.|")
        if self.decay is not None:
            ends = np.array([self.decay.first, self.decay.last], dtype=float)
            label = f"$i^{{{-self.decay.exponent:.2f}}}$, $r^2$ = {self.decay.r2:.3f}"
            axes.loglog(ends, self.decay.scale * ends**-self.decay.exponent, "-", color=COLOURS[1], label=label)
        axes.set(title=f"effective rank {self.effective_rank:.1f} of {len(values)}", xlabel="i", ylabel="eigenvalue")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        return figure

    def __str__(self) -> str:
        """Say the range, the condition, the ranks and the fit in two or three lines."""
        count = len(self.eigenvalues)
        condition = f"{self.condition:.2g}"
        if math.isinf(self.condition):
            condition = f"infinite to rounding (rank {self.rank})"
        lines = [
            f"{count} eigenvalues, {self.largest:.3g} to {self.least:.3g}; condition {condition}; effective rank "
            f"{self.effective_rank:.1f} (entropy), {self.stable_rank:.1f} (trace / largest)",
            "decay: too few eigenvalues above rounding to fit" if self.decay is None else f"decay: {self.decay}",
        ]
        if self.is_indefinite:
            lines.append(f"INDEFINITE: {self.negative:.1%} of the sum of |eigenvalues| is negative: this is no kernel")
        return "\n".join(lines)


def spectrum(K: Tensor | np.ndarray, *, fit: tuple[int, int] | None = None, rounding: float | None = None) -> Spectrum:
    """Return the eigenvalues of a kernel matrix and what they say.

    All eigenvalues by a dense symmetric solver in float64 on the CPU: n^3 flops and 16 n^2 bytes. For what does not
    fit, `abyssal.tangent.operator.kernel.kernel_operator(...).top(k)`.

    Args:
        K: symmetric; not changed. [n, n]; or all outputs, [n, n, k, k], taken as one matrix [n k, n k] whose row
            i k + a is sample i's output a; or [n, n, k], each output by itself, taken as one block-diagonal matrix.
        fit: first and last index of the power law's fit, counted from 1, last included. Default: of r eigenvalues above
            the floor those from sqrt(r) / 2 to r / 2 (all for r < 16). The first few belong to the data's mean and
            main directions, and the last half is bent by there being n samples only.
        rounding: relative rounding of K's entries; default: of its type. Give that of float32 for a kernel that was
            computed in float32 and converted afterwards.

    Raises:
        TypeError: if K is no real matrix.
        ValueError: if K is not square or not symmetric, or has entries that are not finite; for a range of the fit
            that the eigenvalues above rounding do not have.
    """
    blocks, own = kernel_blocks(K)
    if rounding is None:
        rounding = own
    share("rounding", rounding)
    values = torch.linalg.eigvalsh(blocks).reshape(-1).sort(descending=True).values
    return from_eigenvalues(values, rounding, fit)


def from_eigenvalues(eigenvalues: Tensor, rounding: float, fit: tuple[int, int] | None = None) -> Spectrum:
    """Return the spectrum that has these eigenvalues, descending and in float64 ([n])."""
    usable = Spectrum(eigenvalues, rounding, None).rank
    if fit is None:
        first, last = (max(1, round(math.sqrt(usable) / 2)), usable // 2) if usable >= 16 else (1, usable)
        decay = power_law(eigenvalues.numpy(), first, last) if last - first + 1 >= _LEAST_POINTS else None
    else:
        first, last = _checked(fit, usable)
        decay = power_law(eigenvalues.numpy(), first, last)
    return Spectrum(eigenvalues, rounding, decay)


def power_law(values: np.ndarray, first: int, last: int) -> Decay:
    """Fit a power of the index to `values[first - 1 : last]`, all positive ([n])."""
    index = np.arange(first, last + 1)
    x, y = np.log(index), np.log(values[first - 1 : last])
    slope, error, r2 = line(x, y)
    half = student(len(x) - 2) * error
    middle = (x[0] + x[-1]) / 2
    low, high = (
        -line(x[part], y[part])[0] if part.sum() >= _LEAST_POINTS else math.nan for part in (x <= middle, x > middle)
    )
    scale = math.exp(float(y.mean() - slope * x.mean()))
    exponential = line(index.astype(float), y)[2]
    return Decay(-slope, scale, error, -slope - half, -slope + half, r2, exponential, (low, high), first, last)


def _checked(fit: tuple[int, int], usable: int) -> tuple[int, int]:
    whole = isinstance(fit, tuple | list) and len(fit) == 2 and all(type(i) is int for i in fit)
    if not whole or fit[0] < 1 or fit[1] - fit[0] + 1 < _LEAST_POINTS:
        raise ValueError(
            f"fit has to be two indices counted from 1, first and last, at least {_LEAST_POINTS - 1} apart, such as "
            f"(4, 64); got {fit!r}."
        )
    if fit[1] > usable:
        raise ValueError(
            f"fit={tuple(fit)} reaches beyond the {usable} eigenvalues that are above rounding: a line through "
            f"rounding errors says nothing. Give a last index of at most {usable}."
        )
    return fit[0], fit[1]


def real(value: Any, name: str) -> Tensor:
    """Return a tensor or an array of finite real numbers as a tensor, or raise TypeError or ValueError."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        given = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"{name} has to be a torch.Tensor or a numpy.ndarray of real numbers, got {given}.")
    bad = ~torch.isfinite(value)
    if bad.any():
        raise ValueError(
            f"{name} has entries that are not finite, {int(bad.sum())} of {bad.numel()}, the first at "
            f"{bad.nonzero()[0].tolist()}: outputs or gradients overflow; compute in float64, or look at the inputs."
        )
    return value.detach()


def kernel_blocks(K: Tensor | np.ndarray) -> tuple[Tensor, float]:
    """Return a kernel as symmetric blocks in float64 on the CPU, [blocks, n, n], and the rounding of its entries.

    Raises:
        TypeError, ValueError: as `spectrum`.
    """
    K = real(K, "K")
    shape = list(K.shape)
    if not (len(shape) in (2, 3, 4) and shape[0] == shape[1] > 0 and (len(shape) < 4 or shape[2] == shape[3])):
        raise ValueError(
            f"K has to be [n, n], [n, n, k] or [n, n, k, k], got {shape}. A kernel between two sets of inputs "
            "has no eigenvalues: take ntk(model, x) of one set."
        )
    rounding = torch.finfo(K.dtype).eps if K.is_floating_point() else torch.finfo(torch.float64).eps
    matrix = K.to("cpu", torch.float64)
    if matrix.ndim == 4:
        matrix = matrix.permute(0, 2, 1, 3).reshape(shape[0] * shape[2], -1)
    blocks = matrix.permute(2, 0, 1) if matrix.ndim == 3 else matrix[None]
    size, asymmetry = float(blocks.norm()), float((blocks - blocks.mT).norm())
    if asymmetry > min(0.05, _ASYMMETRY * rounding) * size:
        raise ValueError(
            f"K is not symmetric: |K - K^T| / |K| = {asymmetry / size:.1e}, beyond the rounding of {K.dtype}. Give the "
            "kernel of one set of inputs with itself; (K + K.mT) / 2 where the difference is known to be an error."
        )
    return blocks, rounding
