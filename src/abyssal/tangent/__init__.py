"""Tangent kernels of networks, of any width and of infinite width; how training moves them; the hierarchy above."""

from abyssal.tangent import analytic
from abyssal.tangent.analytic.sphere import SphereSpectrum, sphere_spectrum
from abyssal.tangent.empirical.ntk import Forecast, forecast_ntk, ntk
from abyssal.tangent.hierarchy.hierarchy import Hierarchy, TangentPath
from abyssal.tangent.operator.kernel import KernelOperator, kernel_operator
from abyssal.tangent.operator.lanczos import NotConvergedError
from abyssal.tangent.training.linearised import Linearised, linearised
from abyssal.tangent.training.record import Drift, Reading
from abyssal.tangent.training.recorder import DriftRecorder, drift
from abyssal.tangent.training.spectra import Decay, Spectrum, spectrum

__all__ = [
    "Decay",
    "Drift",
    "DriftRecorder",
    "Forecast",
    "Hierarchy",
    "KernelOperator",
    "Linearised",
    "NotConvergedError",
    "Reading",
    "Spectrum",
    "SphereSpectrum",
    "TangentPath",
    "analytic",
    "drift",
    "forecast_ntk",
    "kernel_operator",
    "linearised",
    "ntk",
    "spectrum",
    "sphere_spectrum",
]
