"""Limits with depth."""
