"""How a residual network should change with its depth (weights, residual scale, learning rate), and what depth does."""

from abyssal.models.reading import UnreadableModelError, read_model
from abyssal.scaling.phases.critical import critical_beta
from abyssal.scaling.phases.diagram import PhaseDiagram, phase_diagram
from abyssal.scaling.rules.application import Scaled, applied, apply, remove
from abyssal.scaling.rules.known import RULES, rule
from abyssal.scaling.transfer.check import DepthCheck, depth_check
from abyssal.scaling.transfer.learning_rate import Transfer, learning_rate_transfer, plot_transfers
from abyssal.weights import init
from abyssal.weights.families import Family, FractionalMotion, FractionalNoise, GaussianProcess, Iid, family
from abyssal.weights.hurst import hurst_exponent

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
