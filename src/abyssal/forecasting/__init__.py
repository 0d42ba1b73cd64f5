"""Training steps that do not fit here, accounted for on fake tensors."""
