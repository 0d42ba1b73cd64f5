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
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor

from abyssal.codec.quantiser import Codec
from abyssal.util.checks import whole


class Evaluation(Protocol):
    """One block as it stood in the forward pass: arguments, random state, buffers, modes, autocast."""

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the whole block, `g(x) = x + f(x)`, without a graph."""
        ...

    def reverse_step(self, y: Tensor) -> Tensor | None:
        """Estimate the input by the block's own `reverse_step(y, ...)`, or None if it has no such method."""
        ...


class Decoded(Protocol):
    """What the code of a block's input says of it; given to the policies that have a `codec`."""

    @property
    def state(self) -> Tensor:
        """The decoded input, in float32 or wider. [*stream]."""
        ...

    def clamp(self, s: Tensor) -> Tensor:
        """Return `s`, an estimate of the input, where the code allows it, else the nearest it does. [*stream]."""
        ...


class Policy(ABC):
    """How one block's input is restored. Variants are final; a new one is one small class.

    Attributes:
        recomputes: False runs the block as plain autograd does, and nothing else here applies.
        keeps_input: whether the exact input stays for the backward pass.
        inverts: whether the input is solved for from the output alone, for which the block has to be invertible.
        needs_output: whether `hand_down` uses the recomputed output, so that a second run may not stop early.
        from_below: whether the input is computed from states further below, not restored from the output.
        is_auto: whether something of it is still to be chosen, by the engine, for each block.
        codec: of the block's input, by which the engine codes it on entry; None where it is not coded.
        device: where what is kept waits for the backward pass; None for where it is.
    """

    recomputes: bool = True
    keeps_input: bool = False
    inverts: bool = False
    needs_output: bool = False
    from_below: bool = False
    is_auto: bool = False
    codec: Codec | None = None
    device: str | None = None

    def release(self, x: Tensor, y: Tensor) -> object:
        """Say what is kept in place of the input `x` once the next block was called with the output `y`.

        Args:
            x: the block's exact input, private to the engine. [*stream]
            y: the block's exact output, private to the engine. [*stream]

        Returns:
            Whatever `restore` needs besides `y`; None keeps nothing. Its tensors are counted as stored.
        """
        return None

    @abstractmethod
    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Return the state at which the block's gradient is evaluated.

        Args:
            y: the block's output, exact or as the block above handed it down. [*stream]
            kept: what `release` returned; a `Decoded` where the policy has a codec.
            block: evaluates the block without a graph, in the forward pass's surroundings.
        """

    def hand_down(self, s: Tensor, y: Tensor, g: Tensor | None, kept: object = None) -> Tensor:
        """Return the estimate of this block's input that the block below takes as its output.

        Args:
            s: the state that `restore` returned. [*stream]
            y: the output that it was restored from. [*stream]
            g: the block's output at `s`; None where `needs_output` is False. [*stream]
            kept: what `restore` was given.
        """
        return s


@final
@dataclass(frozen=True)
class Store(Policy):
    """Plain autograd: every activation of the block is stored, nothing is recomputed. The fast end."""

    recomputes = False

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

    Args:
        device: "cpu" keeps the input in host memory (offload): on CUDA in pinned memory, copied beside the
            computation. Of no use where the stream is in host memory anyway.

    Raises:
        ValueError: for another device.
    """

    keeps_input = True

    device: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        _check_device("Keep", self.device)

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Never called: a kept input needs no restoring."""
        raise AssertionError("Keep() holds the exact input")

    def __str__(self) -> str:
        return "Keep()" if self.device is None else f"Keep(device={self.device!r})"


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

    inverts = True
    needs_output = True  # the free refinement is made from it

    refine: int = 1

    def __post_init__(self) -> None:
        whole("Reverse(refine=...)", self.refine, 0)

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Return `s[refine]`; see the class."""
        return _refine(y, self.refine, block)

    def hand_down(self, s: Tensor, y: Tensor, g: Tensor | None, kept: object = None) -> Tensor:
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

    inverts = True

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Return one step of reverse time from `y`."""
        return _refine(y, 1, block)

    def __str__(self) -> str:
        return "PaperAdjoint()"


AUTO_BITS = (4, 6, 8)
"""What `Code("auto")` chooses from."""


@final
@dataclass(frozen=True)
class Recompute(Policy):
    """Keep the exact inputs of some blocks, and run blocks again from below to get the others: exact gradients.

    A chain of blocks holds at most `slots` states at any moment of a step, besides its first input and that of the
    block at work. Which ones, the optimal schedule for equal blocks decides: in the forward pass for as many blocks
    as the chain had in the last one (in the first, for as many as the model has; longer ones are right, and slower),
    and in the backward pass, whatever its order, as slots become free.

    Args:
        slots: states, 1 or more; None for the fewest with which no block is run more than once more for the blocks
            above it (about the root of twice the chain's length).

    Raises:
        ValueError: for other slots.

    Source: Griewank and Walther 2000, ACM TOMS 26:19, with depth in the place of time.

    Example:
        >>> model = abyssal.reconstruct(model, abyssal.Recompute(slots=6))  # doctest: +SKIP
    """

    from_below = True

    slots: int | None = None

    def __post_init__(self) -> None:
        if self.slots is not None:
            whole("Recompute(slots=...)", self.slots, 1)

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Never called: the input comes from below."""
        raise AssertionError("Recompute() runs the blocks below again")

    def __str__(self) -> str:
        return "Recompute()" if self.slots is None else f"Recompute({self.slots})"


@final
@dataclass(frozen=True)
class Code(Policy):
    """Keep the stream as a low-bit code of its increments, in a closed loop: for blocks of any kind.

    What is coded is how far the stream moved from what the decoder knows so far, so that the error of each
    block's input is one quantisation error of one increment. It does not grow with depth and asks nothing of
    the block: no contraction, no invertibility. A chain's first state costs nothing and is exact; `N` blocks
    cost `N - 1` codes of `bits + 16 / group` bits per element.

    Args:
        bits: per element of the stream: 1, 2, 3, 4, 6 or 8; or "auto", which chooses 4, 6 or 8 for each
            block, the fewest that restore its input to `AUTO_ACCURACY` (see abyssal.certify.drift), in
            the block's first call and now and then afterwards. Kept instead are blocks that 8 bits are not
            enough for, that route discretely (mixture of experts), or that have a BatchNorm in training and
            ReLUs, and chains too short to save anything.
        group: consecutive elements that share one scale of 16 bits.
        refine: fixed-point steps from the decoded state, each clamped to what the code allows. One costs a
            forward pass of the block, and pays where the block contracts.
        device: "cpu" keeps the code in host memory; see `Keep`.

    Raises:
        ValueError: for other bits, group sizes, counts or devices.

    Source: closed-loop differential coding (DPCM, Cutler 1952), with depth as time; the combination with
    refinement, clamped to the code's cell, is ours.
    """

    bits: int | Literal["auto"] = 4
    group: int = 64
    refine: int = 0
    device: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        # Of the fewest bits while they are to be chosen.
        object.__setattr__(self, "codec", Codec(AUTO_BITS[0] if self.bits == "auto" else self.bits, self.group))
        object.__setattr__(self, "is_auto", self.bits == "auto")
        whole("Code(refine=...)", self.refine, 0)
        _check_device("Code", self.device)
        # The free refinement is made from it, where refining is worth anything.
        object.__setattr__(self, "needs_output", self.refine > 0)

    def with_bits(self, bits: int) -> Code:
        """Return the same policy with its bits chosen."""
        return replace(self, bits=bits)

    def restore(self, y: Tensor, kept: object, block: Evaluation) -> Tensor:
        """Return the decoded state after `refine` clamped fixed-point steps."""
        decoded: Decoded = kept  # type: ignore[assignment]
        s = decoded.state.to(y.dtype)
        for _ in range(self.refine):
            s = decoded.clamp(fixed_point_step(s, y, block(s)))
        return s

    def hand_down(self, s: Tensor, y: Tensor, g: Tensor | None, kept: object = None) -> Tensor:
        """Return the free refinement within the code's cell, or the state itself where nothing is refined."""
        if not self.needs_output:
            return s
        assert g is not None
        decoded: Decoded = kept  # type: ignore[assignment]
        return decoded.clamp(fixed_point_step(s, y, g))

    def __str__(self) -> str:
        parts = [repr(self.bits)]
        parts += [] if self.group == 64 else [f"group={self.group}"]
        parts += [f"refine={self.refine}"] if self.refine else []
        parts += [] if self.device is None else [f"device={self.device!r}"]
        return f"Code({', '.join(parts)})"


def _check_device(what: str, value: object) -> None:
    if value not in (None, "cpu"):
        raise ValueError(
            f"{what}(device=...): expected 'cpu', to keep it in host memory, or None, to keep it where it is; got "
            f"{value!r}"
        )


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Return a policy as the name of its class and its settings, as plans hold it.

    Raises:
        ValueError: if it is not one that `policy_from_dict` would find.
    """
    kind, name = type(policy), type(policy).__name__
    if _kinds().get(name) is not kind:
        raise ValueError(
            f"{policy} cannot be saved: a plan holds policies that are dataclasses, and of several classes named "
            f"{name} the one that was made last."
        )
    settings = {field.name: getattr(policy, field.name) for field in fields(_kinds()[name])}
    return {"policy": name, **{name: value for name, value in settings.items() if value is not None}}


def policy_from_dict(entry: Mapping[str, Any]) -> Policy:
    """Return the policy that `policy_to_dict` was given; entries that are no settings of it are left alone.

    Raises:
        ValueError: if there is no such class in this process, or it refuses its settings.
    """
    kinds, name = _kinds(), entry.get("policy", "")
    if name not in kinds:
        raise ValueError(
            f"unknown policy {name!r}; this process knows {', '.join(kinds)}. If it is one of your own, "
            "import its module first; else upgrade abyssal, or make the plan again with abyssal.plan."
        )
    known = {field.name for field in fields(kinds[name])}
    policy: Policy = kinds[name](**{name: value for name, value in entry.items() if name in known})
    return policy


def _kinds() -> dict[str, Any]:
    """Return the policies of this process that can be told by name and settings: ours, and users' own dataclasses."""
    found: dict[str, Any] = {}
    pending: list[Any] = [Policy]
    for kind in pending:
        pending += kind.__subclasses__()
        name = kind.__name__
        if is_dataclass(kind):
            found[name] = kind
    return found
