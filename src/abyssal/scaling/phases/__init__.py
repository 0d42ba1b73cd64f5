"""Phase diagrams: identity, ODE, SDE or explosion."""
