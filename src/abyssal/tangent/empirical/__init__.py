"""Tangent kernels of networks of finite width, layer by layer."""
