"""Tangent kernels of networks, of any width and of infinite width; how training moves them; the hierarchy above."""
