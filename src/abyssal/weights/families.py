"""Laws of a weight as a path through depth: i.i.d., Gaussian processes, fractional Brownian motion.

Every law here is drawn exactly, never by truncation in time or by a jittered Cholesky factor. Stationary ones are
drawn by circulant embedding: the autocovariance at lags 0 to P, mirrored to a row of 2P, makes a circulant matrix
whose eigenvalues are the row's Fourier transform, and a path is the transform of white noise weighted by their
square roots. For fractional noise the eigenvalues are nonnegative with P = depth at every Hurst index (Craigmile
2003 below 1/2, Perrin et al. 2002 above), so that the first `depth` values have exactly the covariance asked for.
For the kernels here P doubles until they are.

References:
    R. B. Davies and D. S. Harte (1987), Tests for Hurst effect, Biometrika 74.
    C. R. Dietrich and G. N. Newsam (1997), Fast and exact simulation of stationary Gaussian processes through
    circulant embedding of the covariance matrix, SIAM J. Sci. Comput. 18.
    P. Marion, A. Fermanian, G. Biau and J.-P. Vert (2022), Scaling ResNets in the large-depth regime,
    arXiv 2206.06929, for the families and their use as weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from abyssal.util.checks import one_of, positive, share, whole
from abyssal.weights.circulant import circulant_eigenvalues

__all__ = ["Family", "FractionalMotion", "FractionalNoise", "GaussianProcess", "Iid", "family"]

WORKSPACE = 16 * 2**20  # bytes that drawing holds besides its result, unless one pair of paths takes more
MAX_PADDING = 64  # an embedding may be this many times as long as the depth

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KERNELS = ("rbf", "matern12", "matern32", "matern52")


class Family(ABC):
    """The law of one weight as a path through depth; weights are independent paths of it.

    Subclasses are frozen dataclasses: they compare and hash by their parameters.
    """

    def sample(
        self,
        depth: int,
        count: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw independent paths.

        Numbers are drawn in float64 on the generator's device and rounded to `dtype` at the end, so that one seed
        gives the same paths in every dtype. Besides the result at most 16 MiB are held (a few copies of
        one pair of paths, where these are longer).

        Args:
            depth: length of a path, at least 1.
            count: number of paths.
            generator: for the random numbers, on any device; None is torch's own on the device of the result.
            dtype: float16, bfloat16, float32 or float64.
            device: of the result; None is the generator's, and the CPU without one.

        Returns:
            A path in each column. [depth, count]

        Raises:
            ValueError: for a depth below 1, a negative count or another dtype.
        """
        whole("depth", depth)
        whole("count", count, 0)
        check_dtype(dtype)
        if device is None:
            device = torch.device("cpu") if generator is None else generator.device
        paths = torch.empty(depth, count, dtype=dtype, device=device)
        if paths.device.type == "meta":
            return paths
        for start, block in self.blocks(depth, count, generator, device=paths.device):
            paths[:, start : start + block.shape[1]] = block
        return paths

    def blocks(
        self, depth: int, count: int, generator: torch.Generator | None = None, *, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[int, Tensor]]:
        """Draw what :meth:`sample` draws, a few columns at a time, for whoever writes them elsewhere.

        Args:
            depth: length of a path.
            count: number of paths.
            generator: for the random numbers.
            device: where numbers are drawn if there is no generator.

        Yields:
            The first column's index, and columns in float64. [depth, columns of this block]
        """
        whole("depth", depth)
        if generator is not None:
            device = generator.device
        elif torch.device(device).type == "mps":  # no float64 there
            device = torch.device("cpu")
        columns = self._columns_at_once(depth)
        for start in range(0, count, columns):
            yield start, self._draw(depth, min(columns, count - start), generator, torch.device(device))

    @abstractmethod
    def covariance(self, depth: int) -> Tensor:
        """Return the exact covariance of a path between depths.

        Args:
            depth: length of the path.

        Returns:
            Covariance of the weights at depths n and m. [depth, depth], float64
        """

    @abstractmethod
    def _draw(self, depth: int, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw [depth, count] in float64."""

    def _columns_at_once(self, depth: int) -> int:
        return max(1, WORKSPACE // (2 * 8 * depth))


@dataclass(frozen=True)
class Iid(Family):
    """Independent weights at every depth.

    Args:
        distribution: `"uniform"`, on [-sqrt(3), sqrt(3)] (the paper's experiments), or `"normal"`.

    Raises:
        ValueError: for another distribution.
    """

    distribution: str = "uniform"

    def __post_init__(self) -> None:
        one_of("distribution", self.distribution, ("uniform", "normal"))

    def covariance(self, depth: int) -> Tensor:
        """Return the identity. [depth, depth], float64."""
        whole("depth", depth)
        return torch.eye(depth, dtype=torch.float64)

    def _draw(self, depth: int, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        values = torch.empty(depth, count, dtype=torch.float64, device=device)
        if self.distribution == "normal":
            return values.normal_(generator=generator)
        return values.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)


class _Stationary(Family):
    """A stationary Gaussian sequence, drawn by circulant embedding."""

    @abstractmethod
    def autocovariance(self, depth: int) -> Tensor:
        """Return the covariance at lags 0 to depth - 1. [depth], float64."""

    @abstractmethod
    def _spectrum(self, depth: int) -> Tensor:
        """Return the nonnegative eigenvalues of a circulant matrix that begins with the covariance. [2P]."""

    def covariance(self, depth: int) -> Tensor:
        """Return the exact covariance of a path between depths, a Toeplitz matrix. [depth, depth], float64."""
        autocovariance = self.autocovariance(depth)
        lags = torch.arange(depth)
        return autocovariance[(lags[:, None] - lags).abs()]

    def _draw(self, depth: int, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        weights = _root_spectrum(self, depth).to(device)
        pairs = (count + 1) // 2
        noise = torch.randn(pairs, len(weights), 2, dtype=torch.float64, device=device, generator=generator)
        # Real and imaginary part are independent: their covariance is the sum of lambda_k sin(...), and the
        # eigenvalues at k and -k are equal.
        waves = torch.fft.fft(torch.view_as_complex(noise.mul_(weights[:, None])), dim=1)
        parts = torch.view_as_real(waves[:, :depth])
        return parts.permute(1, 0, 2).reshape(depth, 2 * pairs)[:, :count]

    def _columns_at_once(self, depth: int) -> int:
        # Noise and its transform, both of two float64 per point and pair, and a path's own two columns twice.
        pair = 2 * 16 * len(_root_spectrum(self, depth)) + 2 * 16 * depth
        return 2 * max(1, WORKSPACE // pair)


@lru_cache(maxsize=8)
def _root_spectrum(law: _Stationary, depth: int) -> Tensor:
    spectrum = law._spectrum(depth)
    return (spectrum / len(spectrum)).sqrt()


@dataclass(frozen=True)
class FractionalNoise(_Stationary):
    """Fractional Gaussian noise: the increments of fractional Brownian motion, at unit variance.

    The autocovariance at lag k is `(|k+1|^2H - 2|k|^2H + |k-1|^2H) / 2`; H = 1/2 is white noise, above it weights
    at neighbouring depths resemble each other, below it they alternate.

    Args:
        hurst: the Hurst index H, strictly between 0 and 1.

    Raises:
        ValueError: for another Hurst index.
    """

    hurst: float

    def __post_init__(self) -> None:
        share("hurst", self.hurst)

    def autocovariance(self, depth: int) -> Tensor:
        """Return the covariance at lags 0 to depth - 1. [depth], float64."""
        whole("depth", depth)
        power = 2 * self.hurst
        lags = torch.arange(depth, dtype=torch.float64)
        values = ((lags + 1) ** power - 2 * lags**power + (lags - 1).abs() ** power) / 2
        if depth > _FAR:
            from scipy.special import binom  # here, since it takes long to import

            # There the three powers cancel: k^2H sum_j binom(2H, 2j) k^-2j, the first omitted 1e-17
            far = lags[_FAR:]
            series = torch.zeros_like(far)
            for coefficient in binom(power, range(14, 0, -2)).tolist():
                series = (series + coefficient) / far**2
            values[_FAR:] = far**power * series
        return values

    def _spectrum(self, depth: int) -> Tensor:
        spectrum, worst = circulant_eigenvalues(self.autocovariance(depth + 1))
        if worst is not None:
            raise ArithmeticError(f"{self} at depth {depth}: eigenvalue {worst:.3g}. This is a bug; please report it.")
        return spectrum


@dataclass(frozen=True)
class FractionalMotion(Family):
    """A path of fractional Brownian motion on (0, 1], with variance 1 at its end.

    The weight at depth n = 0, ..., N-1 is `B_H((n+1)/N)`: the running sum of :class:`FractionalNoise`, divided by
    N^H. Its variance is `((n+1)/N)^2H`.

    Args:
        hurst: the Hurst index H, strictly between 0 and 1; paths are Hoelder continuous of any order below it.

    Raises:
        ValueError: for another Hurst index.
    """

    hurst: float

    def __post_init__(self) -> None:
        share("hurst", self.hurst)

    def covariance(self, depth: int) -> Tensor:
        """Return `(s^2H + t^2H - |s-t|^2H) / 2` at s, t = 1/N, ..., 1. [depth, depth], float64."""
        whole("depth", depth)
        times = torch.arange(1, depth + 1, dtype=torch.float64) / depth
        powers = times ** (2 * self.hurst)
        return (powers[:, None] + powers - (times[:, None] - times).abs() ** (2 * self.hurst)) / 2

    def _draw(self, depth: int, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        noise = FractionalNoise(self.hurst)._draw(depth, count, generator, device)
        return noise.cumsum(dim=0).mul_(depth**-self.hurst)

    def _columns_at_once(self, depth: int) -> int:
        return FractionalNoise(self.hurst)._columns_at_once(depth)


@dataclass(frozen=True)
class GaussianProcess(_Stationary):
    """A stationary Gaussian process on [0, 1] at spacing 1/depth, or its increments at unit variance.

    Kernels, with r = |s - t| / length_scale: rbf `exp(-r^2/2)`, matern12 `exp(-r)`, matern32
    `(1 + sqrt(3) r) exp(-sqrt(3) r)`, matern52 `(1 + sqrt(5) r + 5/3 r^2) exp(-sqrt(5) r)`.
    The default is the smooth family of Marion et al.: increments of an rbf process of variance parameter 0.01
    (`exp(-(s-t)^2 / (2 * 0.01))`), normalised to unit variance. As depth grows these tend to the process's
    derivative, which is smooth in depth; at depth 10 their lag-1 correlation is still only 0.10.

    Draws cost one FFT for two paths: of twice the depth for length scales up to 0.1, of about 9 times the depth
    times the length scale for longer ones with rbf, and at most 64 times twice the depth. That reaches a length scale
    of 2 with every kernel at depth 4,000, and of 14 with rbf. Time is in proportion, depth times log depth.
    Where rounding leaves an eigenvalue slightly negative it becomes 0. Measured, that moves the covariance of values
    by less than 1e-13, and of Matern increments, whose variance is small, by 2e-7 at length scale 1 and depth 4,000.

    Args:
        kernel: `"rbf"`, `"matern12"`, `"matern32"` or `"matern52"`.
        length_scale: in units of the whole depth.
        increments: whether weights are the increments over one block, normalised, or the process itself.

    Raises:
        ValueError: for another kernel or a length scale that is not a positive number. When drawing: for a length
            scale so long that no embedding of the allowed length is nonnegative.
    """

    kernel: str = "rbf"
    length_scale: float = 0.1
    increments: bool = True

    def __post_init__(self) -> None:
        one_of("kernel", self.kernel, _KERNELS)
        positive("length_scale", self.length_scale)

    def autocovariance(self, depth: int) -> Tensor:
        """Return the covariance at lags 0 to depth - 1. [depth], float64."""
        whole("depth", depth)
        values = self._kernel_at(depth, depth)
        if not self.increments:
            return values[:depth]
        before = torch.cat([values[1:2], values[:-2]])
        return (2 * values[:-1] - before - values[1:]) / (2 * (1 - values[1]))

    def _kernel_at(self, lags: int, depth: int) -> Tensor:
        """Return the kernel at lags 0 to `lags`, in units of 1/depth. [lags + 1]."""
        r = torch.arange(lags + 1, dtype=torch.float64) / (depth * self.length_scale)
        if self.kernel == "rbf":
            return (-(r**2) / 2).exp()
        r = r * {"matern12": 1.0, "matern32": math.sqrt(3), "matern52": math.sqrt(5)}[self.kernel]
        polynomial = {"matern12": torch.ones_like(r), "matern32": 1 + r, "matern52": 1 + r + r**2 / 3}[self.kernel]
        return polynomial * (-r).exp()

    def _spectrum(self, depth: int) -> Tensor:
        spectrum = self._kernel_spectrum(depth)
        if not self.increments:
            return spectrum
        # Differencing multiplies eigenvalue k by |1 - exp(i theta_k)|^2; this form does not cancel.
        angles = torch.arange(len(spectrum), dtype=torch.float64) * (math.pi / len(spectrum))
        spectrum = 4 * angles.sin() ** 2 * spectrum
        return spectrum / spectrum.mean()

    def _kernel_spectrum(self, depth: int) -> Tensor:
        steps = depth * self.length_scale  # the length scale, in blocks
        if self.kernel == "rbf" and steps >= 1:
            # Summed over all its shifts by 2P, the kernel has this spectrum (Poisson): positive, and exact where the
            # eigenvalues by FFT of the row would be lost in rounding. The shifts are below 1e-16 from 8.6 on.
            half = max(depth, math.ceil((depth + 8.6 * steps) / 2))
            if half <= MAX_PADDING * depth:
                angles = torch.arange(half + 1, dtype=torch.float64) * (math.pi / half)
                aliases = 2 * math.pi * torch.arange(-2, 3, dtype=torch.float64)[:, None]
                density = (-((steps * (angles + aliases)) ** 2) / 2).exp().sum(0) * math.sqrt(2 * math.pi) * steps
                return torch.cat([density, density[1:-1].flip(0)])
        padding = 1
        while padding <= MAX_PADDING:
            spectrum, worst = circulant_eigenvalues(self._kernel_at(padding * depth, depth))
            if worst is None:
                return spectrum
            padding *= 2
        raise ValueError(
            f"{self} at depth {depth}: length_scale={self.length_scale:g} is too long to draw from (no circulant "
            f"embedding of up to {MAX_PADDING} times the depth is nonnegative). Paths are nearly straight lines at "
            "such length scales; 1 or less works."
        )


_FAR = 16


def family(name: str, hurst: float | None = None) -> Family:
    """Return a weight family by the name that commands and tables give it.

    Args:
        name: `"iid"` (uniform), `"uniform"`, `"normal"`; `"rbf"`, `"matern12"`, `"matern32"`, `"matern52"`
            (normalised increments of these processes at length scale 0.1); `"fbm"` (fractional Gaussian noise, the
            increments of fractional Brownian motion); `"fbm_path"` (its path).
        hurst: the Hurst index, for the two that have one.

    Returns:
        The family.

    Raises:
        ValueError: for another name, a Hurst index missing, out of (0, 1), or given to a family without one.
    """
    known = ("iid", "uniform", "normal", *_KERNELS, "fbm", "fbm_path")
    if name not in known:
        raise ValueError(f"There is no weight family {name!r}. Known: {', '.join(known)}.")
    if name in ("fbm", "fbm_path"):
        if hurst is None:
            raise ValueError(f"The family {name!r} needs a Hurst index, a number strictly between 0 and 1.")
        return FractionalNoise(hurst) if name == "fbm" else FractionalMotion(hurst)
    if hurst is not None:
        raise ValueError(f"The family {name!r} has no Hurst index, got hurst={hurst!r}. 'fbm' and 'fbm_path' have one.")
    return GaussianProcess(name) if name in _KERNELS else Iid("uniform" if name == "iid" else name)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless a dtype is one that weights are drawn in."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype has to be float16, bfloat16, float32 or float64, got {dtype}.")
