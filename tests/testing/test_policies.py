"""The suite that policies have to pass: ours do, a user's own does, and faulty ones do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import Tensor

from abyssal import Code, Keep, PaperAdjoint, Policy, Recompute, Reverse, Store
from abyssal.testing import PolicySuite


class TestStore(PolicySuite):
    policy, tolerance = Store(), 0.0


class TestKeep(PolicySuite):
    policy, tolerance = Keep(), 0.0


class TestRecompute(PolicySuite):
    policy, tolerance = Recompute(1), 0.0


class TestReverse(PolicySuite):
    policy, tolerance = Reverse(8), 1e-8


class TestReverseOnce(PolicySuite):
    policy = Reverse(1)


class TestPaperAdjoint(PolicySuite):
    policy = PaperAdjoint()


class TestCode(PolicySuite):
    policy, tolerance = Code(8), 1e-3


class TestCodeOfFewBits(PolicySuite):
    policy, tolerance = Code(4, group=32, refine=1), 2e-2


@final
@dataclass(frozen=True)
class Halved(Policy):
    """Keep the input in half the bytes."""

    def release(self, x: Tensor, y: Tensor) -> Tensor:
        return x.float() if x.dtype == torch.float64 else x.bfloat16()

    def restore(self, y: Tensor, kept: object, block: object) -> Tensor:
        assert isinstance(kept, Tensor)
        return kept.to(y.dtype)


class TestHalved(PolicySuite):
    policy, tolerance = Halved(), 1e-6


@dataclass(frozen=True)
class Wrong(Policy):
    """Takes the output for the input."""

    def restore(self, y: Tensor, kept: object, block: object) -> Tensor:
        return y * 1.1


@dataclass(frozen=True)
class Leaking(Policy):
    """Keeps more than it says."""

    def release(self, x: Tensor, y: Tensor) -> object:
        return _Hidden(x.clone(), torch.zeros(10_000))

    def restore(self, y: Tensor, kept: object, block: object) -> Tensor:
        assert isinstance(kept, _Hidden)
        return kept.x


class _Hidden:
    def __init__(self, x: Tensor, more: Tensor) -> None:
        self.x, self.more = x, more


@pytest.mark.parametrize(("wrong", "said"), [(Wrong(), "gradient error"), (Leaking(), "bytes are alive")])
def test_a_faulty_policy_is_told(wrong: Policy, said: str) -> None:
    suite = PolicySuite()
    suite.policy = wrong
    with pytest.raises(AssertionError, match=said):
        suite.run()
