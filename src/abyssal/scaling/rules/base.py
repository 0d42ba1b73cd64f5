"""What a rule for depth is: pure arithmetic on the sizes of a network.

Notation: L is the depth in residual blocks, R the number of residual branches (a transformer block has two),
`m_L = L / base depth`, `m_N = width / base width`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias

from abyssal.models.reading import Role

__all__ = [
    "BRANCH_ROLES",
    "MATRIX_ROLES",
    "ROLES",
    "VECTOR_ROLES",
    "Factors",
    "Gate",
    "Init",
    "Optimizer",
    "Rule",
    "Sizes",
    "ratio",
]

Optimizer: TypeAlias = Literal["adamw", "sgd"]

ROLES: Mapping[Role, str] = MappingProxyType(
    {
        "embedding": "input weights: embeddings, positions, patches, stems",
        "between": "matrices outside the residual branches, neither first nor last",
        "hidden": "matrices inside a residual branch, but for its last",
        "projection": "the last matrix of a residual branch",
        "narrow": "kernels and tables in blocks that no width enters (depthwise convolutions, position biases)",
        "norm": "gains and biases of normalisations in blocks",
        "bias": "other vectors in blocks: biases, scales a model brings itself",
        "vector": "vectors outside the blocks: the final norm, biases of embedding and head",
        "head": "the last matrix of the model, which gives the logits",
        "gate": "scalars, vectors and biases that the rule itself adds",
    }
)
"""What a parameter can be to a rule, and in words."""

BRANCH_ROLES = ("hidden", "projection", "narrow", "norm", "bias")
MATRIX_ROLES = ("hidden", "projection", "between")
VECTOR_ROLES = ("norm", "bias", "vector", "gate")


@dataclass(frozen=True)
class Sizes:
    """The sizes a rule works with.

    Attributes:
        depth: L, number of residual blocks.
        branches: R, number of residual branches in all blocks.
        depth_ratio: m_L, depth over base depth; 1 where no base depth was given.
        width_ratio: m_N, width over base width; 1 where no base width was given.
    """

    depth: int
    branches: int
    depth_ratio: float = 1.0
    width_ratio: float = 1.0


@dataclass(frozen=True)
class Factors:
    """Factors of an optimiser's settings for one role.

    Attributes:
        lr: of the learning rate.
        weight_decay: of the weight decay (decoupled, as in AdamW, where it is multiplied by the learning rate).
        eps: of Adam's eps.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True)
class Init:
    """What becomes of the fresh weights of one role.

    Attributes:
        scale: factor of the standard deviation.
        width: a further factor, for weights whose standard deviation does not fall with fan-in by itself.
            torch's own initialisation of linear and convolutional layers does, 1 / sqrt(3 fan_in).
        gpt2: whether GPT-2's factor 1 / sqrt(R) is to be there (True), is not (False), or stays as it is (None).
    """

    scale: float = 1.0
    width: float = 1.0
    gpt2: bool | None = None


@dataclass(frozen=True)
class Gate:
    """What a rule learns besides the weights: the factor of a branch.

    Attributes:
        start: its first value.
        per_channel: a vector over the channels rather than one number.
        shared: one for all branches of a block rather than one for each branch.
        biases: also one scalar bias, from 0, before every weight layer and activation module of the branch.
    """

    start: float
    per_channel: bool = False
    shared: bool = False
    biases: bool = False


class Rule:
    """How a residual network changes with its depth. Variants are final; a new one is one small class.

    Class attributes:
        name: under which :func:`rule` knows it.
        source: paper and place.
        relative: whether it is relative to a base depth, which then has to be given.
        post_norm: whether it is for blocks that normalise the sum of stream and branch, and for no others.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    relative: ClassVar[bool] = False
    post_norm: ClassVar[bool] = False

    def multiplier(self, sizes: Sizes) -> float:
        """Return the constant factor of every residual branch."""
        return 1.0

    def gate(self, sizes: Sizes) -> Gate | None:
        """Return the learned factor of every residual branch, or None."""
        return None

    def init(self, role: Role, sizes: Sizes, layers: int = 2) -> Init:
        """Return what becomes of the fresh weights.

        Args:
            role: what they are.
            sizes: of the network.
            layers: number of weight layers in their branch (only Fixup asks).
        """
        return Init()

    def reaches(self, parameter: str) -> bool:
        """Whether `init` applies to a matrix of a branch by its name (DeepNorm leaves queries and keys alone)."""
        return True

    def logits(self, sizes: Sizes) -> float:
        """Return the constant factor of the head's input."""
        return 1.0

    def factors(self, role: Role, sizes: Sizes, optimizer: Optimizer = "adamw") -> Factors:
        """Return the factors of the optimiser's settings for a role; eps means nothing to SGD."""
        return Factors(weight_decay=0.0) if role == "gate" else Factors()


def ratio(size: float, base: float | None, what: str) -> float:
    """Return size over base, 1 without a base.

    Raises:
        ValueError: unless both are finite and at least 1.
    """
    if base is None:
        return 1.0
    for name, value in ((what, size), (f"base_{what}", base)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 1:
            raise ValueError(f"{name} has to be a number of at least 1, got {value!r}.")
    return size / base
