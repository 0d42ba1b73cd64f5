"""Tangent kernels of infinitely wide residual networks, by recursion over depth in float64."""

from abyssal.tangent.analytic.kernels import Erf, Quadrature, Relu, fully_connected, residual, resntk

__all__ = ["Erf", "Quadrature", "Relu", "fully_connected", "residual", "resntk"]
