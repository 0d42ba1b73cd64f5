"""The hierarchy of kernels above the tangent kernel."""
