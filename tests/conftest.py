"""What every test starts from: a fixed seed, one torch thread, a torchvision that imports."""

from __future__ import annotations

import importlib.util
import random

import numpy as np
import pytest
import torch

from abyssal.models.torchvision import import_torchvision

# Two xdist workers share two cores; and sums over one thread come out the same on every machine.
torch.set_num_threads(1)

if importlib.util.find_spec("torchvision") is not None:
    import_torchvision()  # before any test module imports timm or transformers


SLOW = ("benchmarks", "examples")  # whole scripts, run as a user runs them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` leaves out what is marked slow; what needs a GPU skips where there is none."""
    for item in items:
        if item.path.parent.name in SLOW:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """A test passes or fails whatever ran before it, and on every run alike."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
