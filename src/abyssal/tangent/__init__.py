"""Tangent kernels of networks, of any width and of infinite width; how training moves them; the hierarchy above.

`drift` and `spectrum` are functions here; their modules are reached by `from abyssal.tangent.drift import ...`.
"""

from abyssal.tangent import analytic
from abyssal.tangent.drift import DriftRecorder, drift
from abyssal.tangent.drift_result import Drift, Reading
from abyssal.tangent.empirical import Forecast, forecast_ntk, ntk
from abyssal.tangent.hierarchy import Hierarchy, TangentPath
from abyssal.tangent.lanczos import NotConvergedError
from abyssal.tangent.linearised import Linearised, linearised
from abyssal.tangent.operators import KernelOperator, kernel_operator
from abyssal.tangent.spectrum import Decay, Spectrum, spectrum
from abyssal.tangent.sphere import SphereSpectrum, sphere_spectrum

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
