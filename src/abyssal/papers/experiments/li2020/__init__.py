"""Li, Luo, Yip 2020: the neural tangent hierarchy of residual networks."""
