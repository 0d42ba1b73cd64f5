"""Questions that several papers raise together."""
