"""Low-bit codes of tensors, and where kept tensors wait."""
