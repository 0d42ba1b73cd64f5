"""How far one has to read: calls from file to file when a coded block in the middle of a chain is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import abyssal

OURS = str(Path(abyssal.__file__).parent)
MIDDLE, DEPTH = 4, 9

# What they were with torch's checkpointing and a cell for each call: calls between files, and Python calls in all.
BEFORE = {"forward": (54, 248), "backward": (28, 206)}
MOST = {"forward": 27, "backward": 18}  # between files


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Calls:
    """Python calls while it is on: all, and those from one file of the package to another."""

    def __init__(self) -> None:
        self.all, self.between = 0, list[str]()

    def _seen(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        self.all += 1
        here, caller = frame.f_code.co_filename, frame.f_back.f_code.co_filename if frame.f_back else ""
        if here.startswith(OURS) and caller.startswith(OURS) and here != caller:
            self.between.append(frame.f_code.co_qualname)

    def start(self, *_: object) -> None:
        sys.setprofile(self._seen)

    def stop(self, *_: object) -> None:
        sys.setprofile(None)


@pytest.fixture(scope="module")
def counted() -> dict[str, Calls]:
    torch.manual_seed(0)
    model = nn.Sequential(*[Branch() for _ in range(DEPTH)])
    abyssal.reconstruct(model, abyssal.Code(4), blocks=list(model))
    x = torch.randn(4, 8)
    for _ in range(3):  # the first passes learn what a block does
        model(x).sum().backward()
    found = {"forward": Calls(), "backward": Calls()}
    call: Callable[[Tensor], Tensor]
    for i, block in enumerate(model):
        call = block.forward
        if i == MIDDLE:
            found["forward"].start()
            x = call(x)
            found["forward"].stop()
            x.register_hook(found["backward"].start)
        else:
            x = call(x)
        if i == MIDDLE - 1:
            x.register_hook(found["backward"].stop)
    x.sum().backward()
    return found


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_call_goes_from_file_to_file_no_more_often_than_it_must(counted: dict[str, Calls], way: str) -> None:
    assert 0 < len(counted[way].between) <= MOST[way], counted[way].between


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_it_takes_less_python_than_with_torchs_checkpointing(counted: dict[str, Calls], way: str) -> None:
    assert counted[way].all <= 0.7 * BEFORE[way][1]
