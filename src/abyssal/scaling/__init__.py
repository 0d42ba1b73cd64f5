"""How a residual network should change with its depth (weights, residual scale, learning rate), and what depth does.

`apply` is a function here; its module is reached by `from abyssal.scaling.apply import ...`.
"""

from abyssal.nn import use_branch_reader
from abyssal.scaling import init
from abyssal.scaling.apply import Scaled, applied, apply, remove
from abyssal.scaling.coordinate_check import DepthCheck, depth_check
from abyssal.scaling.critical import critical_beta
from abyssal.scaling.diagram import PhaseDiagram
from abyssal.scaling.families import Family, FractionalMotion, FractionalNoise, GaussianProcess, Iid, family
from abyssal.scaling.hurst import hurst_exponent
from abyssal.scaling.regime import phase_diagram
from abyssal.scaling.roles import UnreadableModelError, read_model
from abyssal.scaling.rules import RULES, rule
from abyssal.scaling.transfer import Transfer, learning_rate_transfer, plot_transfers

__all__ = [
    "RULES",
    "DepthCheck",
    "Family",
    "FractionalMotion",
    "FractionalNoise",
    "GaussianProcess",
    "Iid",
    "PhaseDiagram",
    "Scaled",
    "Transfer",
    "UnreadableModelError",
    "applied",
    "apply",
    "critical_beta",
    "depth_check",
    "family",
    "hurst_exponent",
    "init",
    "learning_rate_transfer",
    "phase_diagram",
    "plot_transfers",
    "read_model",
    "remove",
    "rule",
]

use_branch_reader(read_model)  # for abyssal.nn.deepen, which stands below this room
