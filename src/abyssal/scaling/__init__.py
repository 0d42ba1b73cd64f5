"""How a residual network should change with its depth: weights, residual scale, learning rate; and what depth does to it.

`apply` is a function here; its module is reached by `from abyssal.scaling.apply import ...`.
"""

from abyssal.scaling import init
from abyssal.scaling.apply import Scaled, applied, apply, remove
from abyssal.scaling.critical import critical_beta
from abyssal.scaling.diagram import PhaseDiagram
from abyssal.scaling.families import Family, FractionalMotion, FractionalNoise, GaussianProcess, Iid, family
from abyssal.scaling.hurst import hurst_exponent
from abyssal.scaling.regime import phase_diagram
from abyssal.scaling.roles import UnreadableModelError, read_model
from abyssal.scaling.rules import RULES, rule

__all__ = [
    "RULES",
    "Family",
    "FractionalMotion",
    "FractionalNoise",
    "GaussianProcess",
    "Iid",
    "PhaseDiagram",
    "Scaled",
    "UnreadableModelError",
    "applied",
    "apply",
    "critical_beta",
    "family",
    "hurst_exponent",
    "init",
    "phase_diagram",
    "read_model",
    "remove",
    "rule",
]
