"""Tangent kernels as operators: products with vectors, and their spectra."""
