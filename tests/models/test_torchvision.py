"""torchvision imports beside CPU torch, and only the one known fault is mended."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from abyssal.models import torchvision as _torchvision

pytest.importorskip("torchvision")


@pytest.mark.slow
def test_torchvision_timm_and_transformers_import_in_a_fresh_process() -> None:
    code = (
        "from abyssal.models.torchvision import import_torchvision\n"
        "torchvision = import_torchvision()\n"
        "assert import_torchvision() is torchvision\n"
        "import torch, timm\n"
        "from transformers import ViTModel\n"
        "torchvision.models.resnet18().eval()(torch.zeros(1, 3, 32, 32))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_torchvision_is_an_import_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_torchvision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install torchvision.*constraints\.txt"):
        _torchvision.import_torchvision()


def test_another_fault_at_import_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("something else")

    monkeypatch.setattr(_torchvision.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        _torchvision.import_torchvision()
