"""Scaling with depth."""
