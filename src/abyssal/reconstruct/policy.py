"""How one block's input is restored in the backward pass: one abstract policy, final variants.

A residual block is any module `g` that keeps the shape of its first tensor argument, the residual
stream; its residual branch is `f(x) = g(x) - x`. In the backward pass the block is run again, for
which its input `x` has to be at hand. A policy says what is kept of `x` in the forward pass, and how
`x` comes back from the block's output `y = x + f(x)`.

Orders of convergence, for branches of size `h` with Lipschitz constant `L` (shared/SCIENCE.md part 1):
the fixed-point iteration `s[0] = y, s[j+1] = y - f(s[j])` has error `(hL)^k h |f|` after k steps. The
gradient is evaluated at `s[k]`; the evaluation of `f` that this needs anyway gives `s[k+1]` at no cost,
and this *free refinement* is what the block below starts from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor


class Evaluation(Protocol):
    """One block as it stood in the forward pass: arguments, random state, buffers, modes, autocast."""

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the whole block, `g(x) = x + f(x)`, without a graph."""
        ...

    def reverse_step(self, y: Tensor) -> Tensor | None:
        """Estimate the input by the block's own `reverse_step(y, ...)`, or None if it has no such method."""
        ...


class Policy(ABC):
    """How one block's input is restored. Variants are final; a new one is one small class.

    Class attributes:
        recomputes: False runs the block as plain autograd does, and nothing else here applies.
        keeps_input: the exact input stays for the backward pass.
        needs_output: the block's recomputed output is used (by `hand_down`), so that the
            recomputation may not stop early.
    """

    recomputes: ClassVar[bool] = True
    keeps_input: ClassVar[bool] = False
    needs_output: ClassVar[bool] = False

    def release(self, x: Tensor, y: Tensor) -> object:
        """Say what is kept in place of the input `x` once the next block was called with the output `y`.

        Args:
            x: the block's exact input, private to the engine. [*stream]
            y: the block's exact output, private to the engine. [*stream]

        Returns:
            Whatever `restore` needs besides `y`; None keeps nothing.
        """
        return None

    @abstractmethod
    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Return the state at which the block's gradient is evaluated.

        Args:
            y: the block's output, exact or as the block above handed it down. [*stream]
            kept: what `release` returned.
            block: evaluates the block without a graph, in the forward pass's surroundings.
        """

    def hand_down(self, s: Tensor, y: Tensor, g: Tensor | None) -> Tensor:
        """Return the estimate of this block's input that the block below takes as its output.

        Args:
            s: the state that `restore` returned. [*stream]
            y: the output that it was restored from. [*stream]
            g: the block's output at `s`; None where `needs_output` is False. [*stream]
        """
        return s


@final
@dataclass(frozen=True)
class Store(Policy):
    """Plain autograd: every activation of the block is stored, nothing is recomputed. The fast end."""

    recomputes: ClassVar[bool] = False

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Never called: a stored block is not recomputed."""
        raise AssertionError("Store() blocks are not recomputed")

    def __str__(self) -> str:
        return "Store()"


@final
@dataclass(frozen=True)
class Keep(Policy):
    """Keep the block's exact input and recompute the rest, as activation checkpointing does.

    The gradients are those of plain autograd. Costs one stream tensor per block, and one more forward
    pass of the block.
    """

    keeps_input: ClassVar[bool] = True

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Never called: a kept input needs no restoring."""
        raise AssertionError("Keep() holds the exact input")

    def __str__(self) -> str:
        return "Keep()"


def fixed_point_step(s: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Return `y - f(s)`, where `f(s) = g - s`; half-precision streams are combined in float32.

    Written as `s + (y - g)`: near the solution `y - g` is small, so that its rounding is, too.
    """
    if y.dtype in (torch.float16, torch.bfloat16):
        return (y.float() - g.float()).add_(s.float()).to(y.dtype)
    return (y - g).add_(s)


def _refine(y: Tensor, times: int, block: Evaluation) -> Tensor:
    """Solve `g(s) = y` by `times` evaluations, the first of them the block's own reverse step if it has one."""
    s = y
    for step in range(times):
        estimate = block.reverse_step(y) if step == 0 else None
        s = fixed_point_step(s, y, block(s)) if estimate is None else estimate
    return s


@final
@dataclass(frozen=True)
class Reverse(Policy):
    """Keep nothing; solve `x + f(x) = y` for the input by `refine` fixed-point steps from `x = y`.

    For blocks that contract: on `x + f(x)/N` the gradient error falls as `N^-(refine + 1)`, with no
    smoothness in depth required. Costs `refine` more forward passes of the block than checkpointing.
    *Not* for blocks whose branch is large beside its input, such as the first blocks of an unscaled
    pre-norm transformer: the certificate measures it and says so.

    A block with a method `reverse_step(y, *args, **kwargs) -> x` (its other arguments as `forward`'s)
    provides a better start: it takes the place of the first refinement. Heun steps do
    (`abyssal.nn.Heun`), and an exactly invertible block may.

    Args:
        refine: fixed-point steps before the gradient is evaluated, 0 or more. 0 costs what
            checkpointing costs; the free refinement (see the module's head) is used at any value.

    Raises:
        ValueError: if `refine` is not a non-negative integer.

    Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, whose adjoint is `PaperAdjoint`; the fixed point
    and the free refinement are ours.
    """

    refine: int = 1
    needs_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_count("Reverse(refine=...)", self.refine)

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Return `s[refine]`; see the class."""
        return _refine(y, self.refine, block)

    def hand_down(self, s: Tensor, y: Tensor, g: Tensor | None) -> Tensor:
        """Return the free refinement `y - f(s)`."""
        assert g is not None
        return fixed_point_step(s, y, g)

    def __str__(self) -> str:
        return f"Reverse({self.refine})"


@final
@dataclass(frozen=True)
class PaperAdjoint(Policy):
    """The discrete adjoint of Sander, Ablin, Peyré 2022: one step of reverse time per block, for comparison.

    Weaker than `Reverse(1)` at the same cost, since the evaluation that the gradient makes at the
    restored state is thrown away: its gradient error falls as `N^-1` on `x + f/N` with weights smooth in
    depth (as `N^-1.5` with independent random ones, whose errors partly cancel) where `Reverse(1)`'s falls
    as `N^-2`.

    Source: arXiv 2205.14612, the recovery `x[n] = x[n+1] - h f_n(x[n+1])` (Euler), and Heun's step
    with `-h` where the block has a `reverse_step`.
    """

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Return one step of reverse time from `y`."""
        return _refine(y, 1, block)

    def __str__(self) -> str:
        return "PaperAdjoint()"


def _check_count(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what}: expected a whole number of at least 0, got {value!r}")
