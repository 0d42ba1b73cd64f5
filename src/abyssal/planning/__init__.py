"""Measure, price, choose, verify: which policy every block of a model gets."""
