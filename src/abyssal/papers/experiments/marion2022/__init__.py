"""Marion, Fermanian, Biau, Vert 2022: scale and regularity of weights in deep residual networks."""
