"""Random state of torch, numpy and python: taken, put back, and told apart."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


@dataclass(frozen=True)
class TorchRandomState:
    """torch's own generators: the CPU's and those of the devices that some tensors live on."""

    cpu: Tensor
    device_type: str
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> TorchRandomState:
        """Take the present state, on the CPU and on the devices of `tensors`."""
        elsewhere = [t for t in tensors if t.device.type not in ("cpu", "meta")]
        devices, states = get_device_states(*elsewhere) if elsewhere else ([], [])
        return cls(torch.get_rng_state(), elsewhere[0].device.type if elsewhere else "cpu", devices, states)

    def again(self) -> TorchRandomState:
        """Take the present state of the same generators."""
        if not self.devices:
            return TorchRandomState(torch.get_rng_state(), self.device_type, [], [])
        return TorchRandomState.now([torch.empty(0, device=f"{self.device_type}:{i}") for i in self.devices])

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return sum(state.nbytes for state in (self.cpu, *self.states))

    def put(self) -> None:
        """Make it the present state."""
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.device_type)

    def is_present(self) -> bool:
        """Whether nothing was drawn since."""
        return self.same_as(self.again())

    def same_as(self, other: TorchRandomState) -> bool:
        """Whether nothing was drawn between the two."""
        mine, theirs = [self.cpu, *self.states], [other.cpu, *other.states]
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def generator_state(generator: object) -> str | None:
    """Return a fingerprint of a generator object's state; None if it is no random generator."""
    if isinstance(generator, torch.Generator):
        return str(hash(bytes(generator.get_state().numpy())))
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _numpy_state(generator.get_state(legacy=True))
    if isinstance(generator, random.Random):
        return str(hash(generator.getstate()))
    return None


def outside_state() -> dict[str, str]:
    """Return fingerprints of the global generators that torch does not know of, by what draws from them."""
    return {
        "numpy.random": _numpy_state(np.random.get_state(legacy=True)),
        "python's random module": str(hash(random.getstate())),
    }


def _numpy_state(state: Any) -> str:
    return f"{hash(state[1].tobytes())}, {state[2:]}"


def seed_all(seed: int) -> None:
    """Seed torch (all devices), numpy and python, so that two runs draw alike."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@dataclass(frozen=True)
class RandomState:
    """The state of all that draws: torch (the CPU, and the devices of some tensors), NumPy and Python."""

    torchs: TorchRandomState
    numpys: Any
    pythons: Any

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> RandomState:
        """Take the present state."""
        return cls(TorchRandomState.now(tensors), np.random.get_state(legacy=True), random.getstate())

    def put(self) -> None:
        """Make it the present state."""
        self.torchs.put()
        np.random.set_state(self.numpys)
        random.setstate(self.pythons)


@contextmanager
def untouched(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back all random state on leaving: the CPU's, that of the tensors' devices, numpy's and python's."""
    state = RandomState.now(tensors)
    try:
        yield
    finally:
        state.put()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from a seed for a while; the global state is left as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def forked_randomness(device: torch.device) -> AbstractContextManager[None]:
    """Put torch's random states on the CPU and on a device back afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
