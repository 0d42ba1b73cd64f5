"""What a residual network becomes as depth grows: an SDE, an ODE, and how far it still is from them."""

from abyssal.limits.bounds import check_bounds, gradient_bound, hidden_bound, norm_interval
from abyssal.limits.gap import OdeGap, ode_gap
from abyssal.limits.neural_ode import NeuralOde
from abyssal.limits.ode_limit import OdeLimit, ode
from abyssal.limits.sde_limit import SdeLimit, sde

__all__ = [
    "NeuralOde",
    "OdeGap",
    "OdeLimit",
    "SdeLimit",
    "check_bounds",
    "gradient_bound",
    "hidden_bound",
    "norm_interval",
    "ode",
    "ode_gap",
    "sde",
]
