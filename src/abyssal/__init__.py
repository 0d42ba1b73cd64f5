"""abyssal: very deep residual networks in PyTorch, without paying for their depth in memory."""

from abyssal import limits, memory, nn, scaling, tangent, testing
from abyssal.chain import NoBlocksError, find_blocks
from abyssal.reconstruct.certificate import BlockCertificate, Certificate
from abyssal.reconstruct.engine import certificate, paused, reconstruct, release
from abyssal.reconstruct.forecast import Forecast, ForecastError, forecast
from abyssal.reconstruct.plan import Plan, PlanError, plan
from abyssal.reconstruct.policy import Code, Keep, PaperAdjoint, Policy, Reverse, Store
from abyssal.reconstruct.session import DriftError, DriftWarning, NonFiniteError
from abyssal.study.inspect import Inspection, inspect

__version__ = "0.1.0"

__all__ = [
    "BlockCertificate",
    "Certificate",
    "Code",
    "DriftError",
    "DriftWarning",
    "Forecast",
    "ForecastError",
    "Inspection",
    "Keep",
    "NoBlocksError",
    "NonFiniteError",
    "PaperAdjoint",
    "Plan",
    "PlanError",
    "Policy",
    "Reverse",
    "Store",
    "certificate",
    "find_blocks",
    "forecast",
    "inspect",
    "limits",
    "memory",
    "nn",
    "paused",
    "plan",
    "reconstruct",
    "release",
    "scaling",
    "tangent",
    "testing",
]
