"""The configurations that reconstruct_trained.py compares, among them two that store the state rounded.

The stashes are what a memory-saving autograd does to saved tensors (ActNN stores them in groups of low-bit integers):
they quantise the *state*, which is large, where `abyssal.Code` quantises its increments, which are small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

import abyssal
from abyssal import Keep, Policy, Reverse

Policies = Policy | Mapping[str, Policy] | None
GROUP = 64


@final
@dataclass(frozen=True)
class Stash(Policy):
    """Keep the input rounded: to bfloat16, or to integers of 8 bits in groups of 64 with a float32 offset and step."""

    kind: str  # "bf16" or "int8"

    def release(self, x: Tensor, y: Tensor) -> object:
        """Return what is kept of `x`; a tuple of tensors."""
        if self.kind == "bf16":
            return (x.to(torch.bfloat16),)
        groups = _grouped(x.float())
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        return ((groups - low) / step).round_().to(torch.uint8), low, step

    def restore(self, y: Tensor, kept: object, block: object) -> Tensor:
        """Return the rounded input."""
        assert isinstance(kept, tuple)
        if self.kind == "bf16":
            return kept[0].to(y.dtype)
        codes, low, step = kept
        return (low + step * codes).flatten()[: y.numel()].view(y.shape).to(y.dtype)

    def __str__(self) -> str:
        return f"{self.kind} stash"


def _grouped(x: Tensor) -> Tensor:
    flat = x.flatten()
    return F.pad(flat, (0, -len(flat) % GROUP), value=0.0).view(-1, GROUP)


@dataclass(frozen=True)
class Config:
    """A way to restore the blocks' inputs.

    Args:
        name: in tables.
        family: its line in the plot.
        label: its point's text in the plot.
        policy: makes the policy of the blocks that are not kept; None for the default of `abyssal.reconstruct`.
        kept: how many blocks at the start of each chain are kept.
        tolerance: of `abyssal.plan`, which then chooses.
    """

    name: str
    family: str
    label: str
    policy: Callable[[], Policy] | None = None
    kept: int = 0
    tolerance: float | None = None

    def policies(self, names: list[str], starts: list[int]) -> Policies:
        """What `abyssal.reconstruct` gets, for blocks `names` whose chains begin at `starts`."""
        if self.policy is None or not self.kept:
            return self.policy() if self.policy else None
        kept = {n: Keep() for start in starts for n in names[start : start + self.kept]}
        return {**kept, "*": self.policy()}


def configs() -> list[Config]:
    """All configurations that the installed abyssal can run."""
    found = [
        Config("Keep()", "Keep", "Keep", Keep),
        Config("bf16 stash", "stash", "bf16", lambda: Stash("bf16")),
        Config("int8 stash", "stash", "int8", lambda: Stash("int8")),
    ]
    if hasattr(abyssal, "Code"):
        for refine in (0, 1):
            for kept in (0, 1):
                for bits in (1, 2, 3, 4, 6, 8):
                    name = f"Code({bits}{', refine=1' if refine else ''}){_kept(kept)}"
                    family = f"Code(b{', refine=1' if refine else ''}){_kept(kept)}"
                    make = lambda bits=bits, refine=refine: abyssal.Code(bits, refine=refine)  # noqa: E731
                    found.append(Config(name, family, str(bits), make, kept))
    for refine in range(4):
        for kept in range(4):
            make = lambda refine=refine: Reverse(refine)  # noqa: E731
            found.append(Config(f"Reverse({refine}){_kept(kept)}", f"Reverse({refine})", str(kept), make, kept))
    found.append(Config("default", "default", "default"))
    if hasattr(abyssal, "plan"):
        for tolerance in (3e-2, 1e-2, 3e-3):
            found.append(Config(f"plan({tolerance:g})", "plan", f"{tolerance:g}", tolerance=tolerance))
    return found


def as_policy(text: str) -> Policy:
    """A policy from its own words, such as "Code(2, refine=1)"."""
    public = {name: getattr(abyssal, name) for name in abyssal.__all__}
    return eval(text, {"__builtins__": {}}, public)  # from a plan that a script here made


def _kept(count: int) -> str:
    return "" if not count else ", first kept" if count == 1 else f", first {count} kept"
