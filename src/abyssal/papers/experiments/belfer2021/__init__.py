"""Belfer, Geifman, Galun, Basri 2021: spectra of residual tangent kernels."""
