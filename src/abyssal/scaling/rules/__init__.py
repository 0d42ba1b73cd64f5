"""Residual multiplier, initialisation and learning rate as functions of depth."""
