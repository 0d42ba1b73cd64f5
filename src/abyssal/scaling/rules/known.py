"""Rules for depth: what a residual network should change as it grows deeper, and wider.

A rule says, as functions of the sizes of a network, the multiplier of its residual branches, the change of its
fresh weights, the factors of the optimiser's settings for every role that a parameter can play, and which learned
scalars it adds. `abyssal.scaling.apply` reads a model and does it.

Notation: L is the depth in residual blocks, R the number of residual branches (a transformer block has two),
`m_L = L / base depth`, `m_N = width / base width`.

Where a source says nothing (weight decay in Fixup, SGD in CompleteP) the factor here is 1, or is derived, and
the rule's docstring says which.
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

from abyssal.models.reading import Role
from abyssal.scaling.rules.base import (
    BRANCH_ROLES,
    MATRIX_ROLES,
    VECTOR_ROLES,
    Factors,
    Gate,
    Init,
    Optimizer,
    Rule,
    Sizes,
)
from abyssal.util.checks import between

__all__ = [
    *("GPT2", "RULES", "CompleteP", "DeepNorm", "DepthMuP", "Fixup", "LayerScale", "NoRule", "OneOverSqrtDepth"),
    *("ReZero", "SkipInit", "rule"),
]


@final
@dataclass(frozen=True)
class NoRule(Rule):
    """Nothing is changed: the baseline of a comparison, with parameters grouped by role all the same."""

    name: ClassVar[str] = "none"
    source: ClassVar[str] = "-"


@final
@dataclass(frozen=True)
class OneOverSqrtDepth(Rule):
    """Every branch times R^-1/2, the only non-trivial power for independent weights.

    Nothing else changes. With larger powers the network is the identity at initialisation and with smaller
    ones it explodes, as depth grows. R counts branches, each of which is one addition to the stream.

    Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929 (i.i.d. weights, beta = 1/2).
    """

    name: ClassVar[str] = "1/sqrt(L)"
    source: ClassVar[str] = "arXiv 2206.06929"

    def multiplier(self, sizes: Sizes) -> float:
        """Return R^-1/2."""
        return sizes.branches**-0.5


class _MaximalUpdate(Rule):
    """What depth-muP and CompleteP share: branch multiplier m_L^-alpha, and muP in width."""

    relative: ClassVar[bool] = True

    @abstractmethod
    def _exponent(self) -> float:
        """Return alpha."""

    def init(self, role: Role, sizes: Sizes, layers: int = 2) -> Init:
        """Return std / sqrt(m_N) for matrices; and no 1 / sqrt(R) on the projections."""
        if role not in MATRIX_ROLES:
            return Init()
        return Init(width=sizes.width_ratio**-0.5, gpt2=False if role == "projection" else None)

    def logits(self, sizes: Sizes) -> float:
        """Return 1 / m_N."""
        return 1 / sizes.width_ratio

    def factors(self, role: Role, sizes: Sizes, optimizer: Optimizer = "adamw") -> Factors:
        """Return the factors; see the class."""
        m_l, m_n, alpha = sizes.depth_ratio, sizes.width_ratio, self._exponent()
        inside = role in (*BRANCH_ROLES, "gate")
        decay = 0.0 if role in VECTOR_ROLES else m_n if role in MATRIX_ROLES and optimizer == "adamw" else 1.0
        if optimizer == "sgd":
            depth = m_l ** (2 * alpha - 1) if inside else 1.0
            return Factors(lr=depth * (1.0 if role in MATRIX_ROLES else m_n), weight_decay=decay)
        depth = m_l ** (alpha - 1) if inside else 1.0
        eps = (m_l**-alpha if inside else 1.0) / m_n
        return Factors(lr=depth / m_n if role in MATRIX_ROLES else depth, weight_decay=decay, eps=eps)


@final
@dataclass(frozen=True)
class DepthMuP(_MaximalUpdate):
    """Depth-muP: every branch times `a m_L^-1/2`; Adam's learning rate in blocks times m_L^-1/2, SGD's times 1.

    Its authors derive it for branches of one layer, and find it limited for deeper ones, a transformer's
    among them. In width it is muP. Adam's eps in blocks times m_L^-1/2 / m_N follows the gradients' size; it
    is equation 40 of CompleteP at alpha = 1/2, not depth-muP's own.

    Args:
        a: the constant multiplier `a`.

    Source: Yang, Yu, Zhu, Hayou 2023, arXiv 2310.02244, table 1; eps: Dey et al. 2025, arXiv 2505.01618.
    """

    a: float = 1.0
    name: ClassVar[str] = "depth-mup"
    source: ClassVar[str] = "arXiv 2310.02244"

    def multiplier(self, sizes: Sizes) -> float:
        """Return a m_L^-1/2."""
        return self.a * sizes.depth_ratio**-0.5

    def _exponent(self) -> float:
        return 0.5


@final
@dataclass(frozen=True)
class CompleteP(_MaximalUpdate):
    """CompleteP: every branch times m_L^-alpha with alpha = 1, so that all layers keep learning features.

    AdamW: the matrices' learning rate times 1/m_N, their weight decay times m_N; in blocks, the learning rate
    of everything times m_L^(alpha - 1), which is 1, and eps times m_L^-alpha / m_N; outside of them eps
    times 1/m_N. Norms and biases are not decayed. Matrices begin with std / sqrt(m_N), without GPT-2's
    1/sqrt(R); logits times 1/m_N. Attention's own scale is left as the model has it (muP asks for 1/d rather
    than 1/sqrt(d), which at a constant head size d is a constant).

    The paper has no SGD. Its factors here are derived: a branch's weights have gradients proportional to
    m_L^-alpha, and change the output through another m_L^-alpha, in L layers; hence the learning rate
    times m_L^(2 alpha - 1), and in width that of muP (vectors and ends times m_N).

    Args:
        alpha: from 1/2 to 1.

    Source: Dey et al. 2025, arXiv 2505.01618, table 1 and equation 40, and the authors' reference
    implementation (EleutherAI/nanoGPT-mup, branch completep); SGD in width: Tensor Programs V, arXiv 2203.03466,
    table 8.
    """

    alpha: float = 1.0
    name: ClassVar[str] = "completep"
    source: ClassVar[str] = "arXiv 2505.01618"

    def __post_init__(self) -> None:
        """Check alpha."""
        between("alpha", self.alpha, 0.5, 1)  # depth-muP to CompleteP

    def multiplier(self, sizes: Sizes) -> float:
        """Return m_L^-alpha."""
        return sizes.depth_ratio**-self.alpha

    def _exponent(self) -> float:
        return self.alpha


@final
@dataclass(frozen=True)
class GPT2(Rule):
    """The last matrix of every branch begins with its standard deviation divided by sqrt(R), R = 2L in GPT-2.

    A change of the fresh weights only: no multiplier, and the optimiser's settings stay.

    Source: "Language Models are Unsupervised Multitask Learners", Radford et al. 2019, section 2.3.
    """

    name: ClassVar[str] = "gpt2"
    source: ClassVar[str] = "Radford et al. 2019, section 2.3"

    def init(self, role: Role, sizes: Sizes, layers: int = 2) -> Init:
        """Return the factor 1 / sqrt(R) of projections."""
        return Init(gpt2=True) if role == "projection" else Init()


@final
@dataclass(frozen=True)
class DeepNorm(Rule):
    """DeepNorm, for post-norm blocks: `LN(a x + f(x))` with `a = (2L)^1/4`, weights times `(8L)^-1/4`.

    Done as `LN(x + f(x) / a)`, which is the same function but for the normalisation's eps (it counts as
    `a^2 eps`). The factor of fresh weights is for the feed-forward part, values and attention's output, not
    for queries and keys; the source takes it from Xavier's initialisation with that gain. The constants are
    those of an encoder or a decoder alone.

    Source: Wang et al. 2022, arXiv 2203.00555, its table of a and the gain by architecture.
    """

    name: ClassVar[str] = "deepnorm"
    source: ClassVar[str] = "arXiv 2203.00555"
    post_norm: ClassVar[bool] = True

    _UNTOUCHED: ClassVar = ("q_proj", "k_proj", "query", "key", "to_q", "to_k", "q", "k", "wq", "wk", "q_lin", "k_lin")
    _FUSED: ClassVar = ("qkv", "qkv_proj", "c_attn", "in_proj_weight", "wqkv", "query_key_value")

    def multiplier(self, sizes: Sizes) -> float:
        """Return 1 / a = (2L)^-1/4."""
        return (2 * sizes.depth) ** -0.25

    def init(self, role: Role, sizes: Sizes, layers: int = 2) -> Init:
        """Return the factor (8L)^-1/4 of matrices in branches."""
        return Init(scale=(8 * sizes.depth) ** -0.25) if role in ("hidden", "projection") else Init()

    def reaches(self, parameter: str) -> bool:
        """Whether a matrix is neither query nor key.

        Raises:
            ValueError: for queries, keys and values in one matrix, whose layout is not known.
        """
        parts = parameter.lower().split(".")
        if any(part in self._FUSED for part in parts):
            raise ValueError(
                f"DeepNorm scales the fresh values but not queries and keys, and {parameter!r} holds all three in "
                "one matrix, in an order that cannot be read. Scale its values yourself, by (8L)^-1/4, and pass "
                "init=False together with your own scaling of the other matrices."
            )
        return not any(part in self._UNTOUCHED for part in parts)


@final
@dataclass(frozen=True)
class ReZero(Rule):
    """Every branch times a learned number from 0, one per layer: `x + alpha_l f(x)`.

    One number for both branches of a transformer's layer. Its authors also take the layer norms out, which is
    a change of the model, and not done here.

    Source: Bachlechner et al. 2020, arXiv 2003.04887, equation 1.
    """

    name: ClassVar[str] = "rezero"
    source: ClassVar[str] = "arXiv 2003.04887"

    def gate(self, sizes: Sizes) -> Gate:
        """Return one number per block, from 0."""
        return Gate(0.0, shared=True)


@final
@dataclass(frozen=True)
class SkipInit(Rule):
    """Every branch times a learned number of its own, from 0 or at most R^-1/2.

    Args:
        start: its first value; None is 0.

    Source: De, Smith 2020, arXiv 2002.10444 (SkipInit).
    """

    start: float | None = None
    name: ClassVar[str] = "skipinit"
    source: ClassVar[str] = "arXiv 2002.10444"

    def gate(self, sizes: Sizes) -> Gate:
        """Return one number per branch.

        Raises:
            ValueError: if `start` is larger than R^-1/2 in size.
        """
        start = 0.0 if self.start is None else self.start
        if not abs(start) <= sizes.branches**-0.5:
            raise ValueError(
                f"SkipInit's numbers begin at 0 or at most at R^-1/2 = {sizes.branches**-0.5:.3g} for "
                f"{sizes.branches} branches; got start={self.start!r}."
            )
        return Gate(start)


@final
@dataclass(frozen=True)
class Fixup(Rule):
    """Branches begin at 0: their last matrix and the head 0, the m - 1 others times R^(-1 / (2m - 2)).

    Besides, a learned number from 1 times every branch, and one scalar bias from 0 before every weight layer
    and every activation that is a module (an activation that is called as a function has none). The learning
    rate of these scalars, and of all biases, is a tenth. Made for networks without normalisation, which it
    does not remove. The matrices' initialisation is taken to be a standard one (He's).

    Source: Zhang, Dauphin, Ma 2019, arXiv 1901.09321 (the three steps of Fixup); the learning rates from
    its experiments and the authors' implementation.
    """

    name: ClassVar[str] = "fixup"
    source: ClassVar[str] = "arXiv 1901.09321"

    def gate(self, sizes: Sizes) -> Gate:
        """Return one number per branch, from 1, and biases."""
        return Gate(1.0, biases=True)

    def init(self, role: Role, sizes: Sizes, layers: int = 2) -> Init:
        """Return 0 for projections and the head, R^(-1 / (2m - 2)) for the other m - 1 layers of a branch."""
        if role in ("projection", "head"):
            return Init(scale=0.0)
        if role in ("hidden", "narrow") and layers > 1:
            return Init(scale=sizes.branches ** (-1 / (2 * layers - 2)))
        return Init()

    def factors(self, role: Role, sizes: Sizes, optimizer: Optimizer = "adamw") -> Factors:
        """Return a tenth of the learning rate for scalars and biases."""
        if role == "gate":
            return Factors(lr=0.1, weight_decay=0.0)
        return Factors(lr=0.1) if role == "bias" else Factors()


@final
@dataclass(frozen=True)
class LayerScale(Rule):
    """Every branch times a learned vector over its channels: from 0.1 to depth 18, 1e-5 to 24, 1e-6 beyond.

    Args:
        start: its first value; None goes by depth, in blocks.

    Source: Touvron et al. 2021, arXiv 2103.17239, section 2 (LayerScale).
    """

    start: float | None = None
    name: ClassVar[str] = "layerscale"
    source: ClassVar[str] = "arXiv 2103.17239"

    def gate(self, sizes: Sizes) -> Gate:
        """Return one vector per branch."""
        if self.start is not None:
            return Gate(self.start, per_channel=True)
        return Gate(0.1 if sizes.depth <= 18 else 1e-5 if sizes.depth <= 24 else 1e-6, per_channel=True)


_KINDS: tuple[type[Rule], ...] = (
    *(NoRule, OneOverSqrtDepth, DepthMuP, CompleteP, GPT2, DeepNorm),
    *(ReZero, SkipInit, Fixup, LayerScale),
)
RULES: Mapping[str, type[Rule]] = MappingProxyType({kind.name: kind for kind in _KINDS})
"""Every rule by its name."""

_ALIASES = {"1/sqrt(l)": "1/sqrt(L)", "sqrt": "1/sqrt(L)", "mup": "depth-mup", "depthmup": "depth-mup"}


def rule(name: str | Rule | None) -> Rule:
    """Return a rule by name, with its default settings.

    Args:
        name: one of `RULES`, in any case ("completep", "depth-mup", "1/sqrt(L)", ...); a rule, which is
            returned as it is (`CompleteP(alpha=0.5)`); None is "none".

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if isinstance(name, Rule):
        return name
    if name is None:
        return NoRule()
    if not isinstance(name, str):
        raise TypeError(f"rule= takes a name or a rule such as CompleteP(); got {name!r}, a {type(name).__name__}.")
    key = name.strip().lower().replace("_", "-")
    key = _ALIASES.get(key.replace("-", ""), _ALIASES.get(key, key))
    if key not in RULES and key.replace("-", "") in RULES:
        key = key.replace("-", "")
    if key not in RULES:
        near = difflib.get_close_matches(key, RULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No rule is called {name!r}.{hint} The rules are {', '.join(map(repr, RULES))}.")
    return RULES[key]()
