"""Spectra of dot-product kernels on the sphere, by the Funk-Hecke formula.

For inputs uniform on the unit sphere of R^d, a kernel k(x . x') has the spherical harmonics as eigenfunctions, and all
N(d, n) of degree n share the eigenvalue

    lambda_n = c_d int_0^pi k(cos a) P_n(cos a) sin(a)^(d-2) da,    c_d = 1 / int_0^pi sin(a)^(d-2) da,

P_n being the Gegenbauer polynomial of order (d-2)/2 with P_n(1) = 1 (Chebyshev's for d = 2, Legendre's for d = 3), so
that `sum_n N(d, n) lambda_n = k(1)`. Source: C. Mueller, Spherical Harmonics (1966); F. Bach, JMLR 18 (2017),
appendix D.

Kernels of ReLU networks are smooth inside (-1, 1) and have singularities like (1 - t)^(1/2) at the ends. In the angle
these are powers of a, and panels that shrink geometrically towards both ends integrate any power.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.util.checks import whole
from abyssal.util.stats import line

__all__ = ["Decay", "SphereSpectrum", "half_angle", "multiplicity", "sphere_spectrum"]

Array = NDArray[np.float64]
Kernel = Callable[[Tensor], Tensor]
_NODES = 20  # of Gauss's rule on each panel
_BLIND = 2e-8  # angles whose cosine is 1 or the number before it
_SHRINK, _LEVELS = 0.25, 26  # panels at the ends: the last is 4^-26 = 2e-16 of pi/4


@dataclass(frozen=True)
class Decay:
    """A power of the degree that eigenvalues follow: `lambda_n ~ (n + (d-2)/2)^-power`.

    Attributes:
        power: by least squares in logarithms.
        error: its standard error.
        degrees: the first and last degree of the fit, and how many took part.
        r2: share of the variance of log eigenvalues that the line explains.
    """

    power: float
    error: float
    degrees: tuple[int, int, int]
    r2: float

    def __str__(self) -> str:
        """Show the power, its error and the range."""
        low, high, count = self.degrees
        return f"k^-{self.power:.3f} ± {self.error:.3f} (degrees {low} to {high}, {count} of them; r² {self.r2:.5f})"


@dataclass(frozen=True)
class SphereSpectrum:
    """Eigenvalues of a dot-product kernel on the sphere, uniform measure of mass 1.

    Attributes:
        dimension: d of the surrounding space; the sphere has dimension d - 1.
        degrees: of the harmonics. [n]
        eigenvalues: one for each degree. [n]
        multiplicities: how many harmonics share each. [n]
        errors: estimate of each eigenvalue's error, from quadrature on halved panels and rounding. [n]
        trace: k(1), the sum of all eigenvalues counted with multiplicity over all degrees.
    """

    dimension: int
    degrees: tuple[int, ...]
    eigenvalues: Array
    multiplicities: tuple[int, ...]
    errors: Array
    trace: float

    @property
    def shares(self) -> Array:
        """Each degree's share of the trace, of all its harmonics together [n]."""
        return self.eigenvalues * np.array(self.multiplicities, dtype=np.float64) / self.trace

    def decay(self, first: int | None = None, last: int | None = None, parity: int | None = None) -> Decay:
        """Fit the power at which eigenvalues fall with the degree.

        In n + (d-2)/2 rather than n, since the asymptotic series of the eigenvalues (ratios of Gamma functions)
        goes in even powers of that: the same power, reached sooner.

        Args:
            first: lowest degree; None is the upper half of the degrees known (in their logarithms).
            last: highest degree; None is the highest.
            parity: 0 or 1 takes even or odd degrees alone: a kernel's two ends decay on their own (plain ReLU
                networks without bias have no odd part beyond degree 1).

        Returns:
            The power with its standard error. Eigenvalues that are not 30 times their error are left out.

        Raises:
            ValueError: where fewer than three usable degrees are left.
        """
        n = np.array(self.degrees)
        last = int(n.max()) if last is None else last
        first = int(math.sqrt(max(1, n.min()) * last)) if first is None else first
        usable = (n >= max(1, first)) & (n <= last) & (self.eigenvalues > 30 * self.errors)
        if parity is not None:
            usable &= n % 2 == parity
        if usable.sum() < 3:
            raise ValueError(
                f"A decay needs three degrees whose eigenvalues are positive and above 30 times their error, got "
                f"{int(usable.sum())} between {first} and {last}: ask for more or lower degrees."
            )
        x = np.log(n[usable] + (self.dimension - 2) / 2)
        y = np.log(self.eigenvalues[usable])
        slope, error, r2 = line(x, y)
        return Decay(-slope, error, (int(n[usable].min()), int(n[usable].max()), int(usable.sum())), r2)

    def __str__(self) -> str:
        """Show the first eigenvalues, one line each."""
        rows = zip(self.degrees, self.eigenvalues, self.multiplicities, self.errors, strict=True)
        lines = [f"  degree {n}: {value:.6e} ± {error:.0e}, {count} times" for n, value, count, error in rows]
        if len(lines) > 13:
            lines[12:] = [f"  and {len(lines) - 12} more"]
        return "\n".join([f"spectrum on the sphere of R^{self.dimension}, k(1) = {self.trace:.6g}", *lines])


def sphere_spectrum(kernel: Kernel, dimension: int, degrees: int | Sequence[int]) -> SphereSpectrum:
    """Return the eigenvalues of a dot-product kernel on the unit sphere of R^dimension.

    The absolute error is about 1e-15 of the largest value of the kernel, so that for large dimension only low
    degrees have digits; `errors` says how many.

    Args:
        kernel: function of cosines, elementwise on float64 [n], such as `lambda t: resntk(t, 8, 0.3)`. Smooth but
            for both ends, where it may behave as any positive power of 1 - t and 1 + t (on the circle, powers below
            1/2 lose digits, since a cosine near 1 does not know its angle; `errors` has it).
        dimension: d, at least 2: inputs are on the sphere in R^d.
        degrees: which; a number n means 0..n.

    Returns:
        Eigenvalues, multiplicities and error estimates.

    Raises:
        TypeError: for a dimension or degrees that are not whole numbers, or a kernel that does not return a tensor.
        ValueError: for a dimension below 2, negative degrees, or a kernel that is not elementwise or not finite.
    """
    wanted = _checked_degrees(dimension, degrees)
    coarse, _ = _integrate(kernel, dimension, wanted, 1)
    fine, rounding = _integrate(kernel, dimension, wanted, 2)
    return SphereSpectrum(
        dimension,
        wanted,
        fine,
        tuple(multiplicity(dimension, n) for n in wanted),
        np.maximum(np.abs(fine - coarse), rounding),
        float(_values(kernel, torch.ones(1, dtype=torch.float64))[0]),
    )


def multiplicity(dimension: int, degree: int) -> int:
    """Return N(d, n), the number of linearly independent spherical harmonics of degree n on the sphere of R^d."""
    _checked_degrees(dimension, [degree])
    low = math.comb(degree + dimension - 3, degree - 2) if degree >= 2 else 0
    return math.comb(degree + dimension - 1, degree) - low


def half_angle(kernel: Kernel) -> float:
    """Return the angle at which a dot-product kernel has fallen half-way from cosine 1 to cosine 0, in radians.

    A kernel that becomes a spike has a half angle that goes to 0.

    Args:
        kernel: function of cosines, elementwise on float64 [n], falling from cosine 1 to 0.

    Raises:
        ValueError: for a kernel that does not fall.
    """
    top, bottom = (float(v) for v in _values(kernel, torch.tensor([1.0, 0.0], dtype=torch.float64)))
    if not top > bottom:
        raise ValueError(f"The kernel does not fall from cosine 1 ({top:.6g}) to cosine 0 ({bottom:.6g}).")
    low, high = 0.0, math.pi / 2
    for _ in range(8):  # of 64 angles each: a call of the kernel may be long, but not for more cosines
        angles = torch.linspace(low, high, 65, dtype=torch.float64)
        below = (_values(kernel, angles.cos()) <= (top + bottom) / 2).nonzero()
        first = int(below[0]) if len(below) else 64
        low, high = float(angles[max(0, first - 1)]), float(angles[first])
    return (low + high) / 2


def _integrate(kernel: Kernel, dimension: int, degrees: tuple[int, ...], halvings: int) -> tuple[Array, Array]:
    """The eigenvalues, and what rounding may have done to them."""
    angles, weights = _nodes(max(degrees), halvings)
    density = weights * np.sin(angles) ** (dimension - 2)
    density /= density.sum()
    t = np.cos(angles)
    values = _values(kernel, torch.from_numpy(t)).numpy()
    weighted = values * density
    found: dict[int, float] = {}
    before, now = np.zeros_like(t), np.ones_like(t)
    for n in range(max(degrees) + 1):
        found[n] = math.fsum(now * weighted)
        # (n + d - 2) P_(n+1) = (2n + d - 2) t P_n - n P_(n-1); for d = 2 and n = 0 both sides vanish
        above = t if n == 0 else ((2 * n + dimension - 2) * t * now - n * before) / (n + dimension - 2)
        before, now = now, above
    # A few units of rounding in the cosines, the kernel and the weights, and the polynomials' own, which grows;
    # and what the kernel does where a cosine cannot be told from 1.
    rounding = 8 * np.finfo(np.float64).eps * np.abs(weighted).sum() * np.sqrt(1 + np.array(degrees))
    for side in (angles, math.pi - angles):
        blind = side < _BLIND
        rounding += density[blind].sum() * np.abs(np.ptp(values[side < 2 * _BLIND]))
    return np.array([found[n] for n in degrees]), rounding


@cache
def _nodes(degree: int, halvings: int) -> tuple[Array, Array]:
    """Nodes and weights in the angle: even panels inside, each a few oscillations, and shrinking ones at the ends."""
    inner = max(4, math.ceil(degree / 8)) * halvings
    middle = np.linspace(math.pi / 4, 3 * math.pi / 4, 2 * inner + 1)
    edge = [0.0] + [math.pi / 4 * _SHRINK**k for k in range(_LEVELS, -1, -1)]
    steps = [np.linspace(a, b, max(halvings, math.ceil(inner * (b - a))) + 1)[:-1] for a, b in pairwise(edge)]
    left = np.concatenate(steps)
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    ends = np.concatenate([left, middle])
    low, high = ends[:-1, None], ends[1:, None]
    near_zero = ((low + high) / 2 + (high - low) / 2 * points).ravel()
    size = ((high - low) / 2 * weights).ravel()
    lower = near_zero < math.pi / 2  # the upper half is the mirror image
    return (
        np.concatenate([near_zero[lower], math.pi - near_zero[lower][::-1]]),
        np.concatenate([size[lower], size[lower][::-1]]),
    )


def _values(kernel: Kernel, cosines: Tensor) -> Tensor:
    with torch.no_grad():
        values = kernel(cosines)
    if not isinstance(values, Tensor):
        raise TypeError(f"The kernel has to return a tensor, got {type(values).__name__}.")
    if values.shape != cosines.shape:
        raise ValueError(
            f"The kernel has to be elementwise: got {list(values.shape)} for {list(cosines.shape)} cosines."
        )
    if not bool(values.isfinite().all()):
        where = float(cosines[~values.isfinite()][0])
        raise ValueError(f"The kernel is not finite at cosine {where!r}.")
    return values.double()


def _checked_degrees(dimension: int, degrees: int | Sequence[int]) -> tuple[int, ...]:
    whole("dimension", dimension, 2)  # of the space around the sphere
    wanted = range(degrees + 1) if isinstance(degrees, int) else degrees
    if any(isinstance(n, bool) or not isinstance(n, int) for n in wanted):
        raise TypeError(f"Degrees have to be whole numbers, got {degrees!r}.")
    if not len(wanted) or min(wanted) < 0:
        raise ValueError(f"Degrees have to be some numbers from 0 on, got {degrees!r}.")
    return tuple(wanted)
