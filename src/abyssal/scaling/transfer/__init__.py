"""Whether coordinates and learning rates keep as depth grows."""
