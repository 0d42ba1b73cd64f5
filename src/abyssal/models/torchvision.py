"""One place that mends torchvision beside a CPU build of torch.

PyPI's torchvision wheel carries its compiled operators for one build of torch only. Beside another (the CPU
wheel, say) they stay unloaded, and `import torchvision` fails at the first function that registers something
for one of them: `RuntimeError: operator torchvision::nms does not exist`. The models need none of these
operators. To declare the two that are asked for at import is enough, and timm's and transformers' vision
models come back with them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_OPERATORS = ("nms", "qnms")
# torch forgets a library's operators when the object that declared them is collected.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    The operators themselves (non-maximum suppression) stay without an implementation; calling one raises.
    Call this before timm or transformers' vision models are first imported: they import torchvision.

    Returns:
        The `torchvision` module.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails to import for a reason other than the one mended here.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ImportError(
            f"torchvision is not installed. Install the version that belongs to torch {torch.__version__}: "
            "pip install torchvision, with the constraints.txt of abyssal's repository for a tested pair."
        )
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    _forget_half_imported()
    _declare_operators()
    return importlib.import_module("torchvision")


def _forget_half_imported() -> None:
    """Remove what the failed import left: its submodules would be taken for whole ones by the next."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
