"""Littwin, Galanti, Wolf 2020: how much the tangent kernels of random networks differ."""
