"""abyssal: very deep residual networks in PyTorch, without paying for their depth in memory.

Importing this package loads none of its rooms: each public name is looked up when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abyssal import limits, nn, scaling, tangent, testing
    from abyssal.certify.certificate import BlockCertificate, Certificate
    from abyssal.certify.drift import DriftError, DriftWarning, NonFiniteError
    from abyssal.engine.api import certificate, paused, reconstruct, release
    from abyssal.engine.policy import Code, Keep, PaperAdjoint, Policy, Recompute, Reverse, Store
    from abyssal.forecasting.forecast import Forecast, ForecastError, forecast
    from abyssal.inspection.inspection import Inspection, inspect
    from abyssal.models.find import NoBlocksError, find_blocks
    from abyssal.planning.plan import Plan
    from abyssal.planning.plan_data import PlanError
    from abyssal.planning.search import plan
    from abyssal.profiling import track as memory

    __version__: str

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
    "Recompute",
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

# Where each public name is defined; a room stands under its own name.
_HOMES = {
    **dict.fromkeys(("limits", "nn", "scaling", "tangent", "testing"), ""),
    "memory": "profiling.track",
    **dict.fromkeys(("BlockCertificate", "Certificate"), "certify.certificate"),
    **dict.fromkeys(("DriftError", "DriftWarning", "NonFiniteError"), "certify.drift"),
    **dict.fromkeys(("certificate", "paused", "reconstruct", "release"), "engine.api"),
    **dict.fromkeys(("Code", "Keep", "PaperAdjoint", "Policy", "Recompute", "Reverse", "Store"), "engine.policy"),
    **dict.fromkeys(("Forecast", "ForecastError", "forecast"), "forecasting.forecast"),
    **dict.fromkeys(("Inspection", "inspect"), "inspection.inspection"),
    **dict.fromkeys(("NoBlocksError", "find_blocks"), "models.find"),
    **{"Plan": "planning.plan", "PlanError": "planning.plan_data", "plan": "planning.search"},
}
_ROOMS = tuple(name for name, home in _HOMES.items() if not home)

if not TYPE_CHECKING:  # a checker that saw it would believe in any name

    def __getattr__(name: str) -> Any:
        """Import the home of a public name when it is first asked for."""
        if name == "__version__":
            from abyssal.util.environment import installed_version

            value: Any = installed_version("abyssal")
        elif name in _HOMES:
            home = _HOMES[name]
            module = import_module(f"abyssal.{home or name}")
            value = module if name in ("memory", *_ROOMS) else getattr(module, name)
        else:
            raise AttributeError(f"module 'abyssal' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
