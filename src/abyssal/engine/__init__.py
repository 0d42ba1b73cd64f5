"""Training without the activation memory: every block's input is restored in the backward pass."""
