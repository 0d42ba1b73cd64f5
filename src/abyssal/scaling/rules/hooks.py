"""What stands in a scaled model: hooks that multiply the ends of its residual branches.

Forward hooks, rather than other weights or parametrisations, since they leave the weights and the keys of
`state_dict` as they are, run inside of a block's forward (so that activation checkpointing and
`abyssal.reconstruct` recompute them with it), are traced by torch.compile, and see parameters as FSDP2 has
gathered them. A hook is an object of a module-level class that holds its modules: deepcopy and pickle rebind it
to the copies through their memo. It holds its own handle too, which keeps hook numbers apart after unpickling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from abyssal.models.branches import stream_of
from abyssal.models.patch import Patch
from abyssal.models.reading import scaled_output

__all__ = [
    "BIAS",
    "GATE",
    "MADE_BY",
    "BranchScale",
    "HeadScale",
    "InputBias",
    "ScaledForward",
    "scaling_hooks",
]

MADE_BY = "abyssal.scaling.apply", "abyssal.scaling.remove(model)"
"""What changes a model so, and what undoes it."""
GATE, BIAS = "abyssal_gate", "abyssal_bias"
"""Names of the parameters that a rule adds to a module."""


class _Factor:
    """A constant factor, and a learned one where there is a module that owns it."""

    def __init__(self, constant: float, owner: nn.Module | None, channel: int) -> None:
        self.constant, self.owner, self.channel = constant, owner, channel

    def __call__(self, like: Tensor) -> float | Tensor:
        if self.owner is None:
            return self.constant
        gate = getattr(self.owner, GATE).to(like.dtype)  # looked up anew: FSDP2 puts another tensor there
        if self.channel >= 0 and gate.numel() > 1:
            gate = gate.view(-1, *[1] * (like.dim() - 1 - self.channel))
        return gate * self.constant if self.constant != 1 else gate


def _first(output: Any) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    assert isinstance(first, Tensor)
    return first


class BranchScale:
    """A forward hook: the output of the end of a branch, multiplied."""

    def __init__(self, module: nn.Module, constant: float, owner: nn.Module | None = None, channel: int = -1) -> None:
        """Hook `module`."""
        self.factor = _Factor(constant, owner, channel)
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output multiplied."""
        return scaled_output(output, self.factor(_first(output)))


def _check_positional(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not args:
        raise TypeError(f"a scaled {type(module).__name__} has to be called with its input as the first argument")


class HeadScale:
    """A forward pre-hook: the input of the head, multiplied."""

    def __init__(self, module: nn.Module, constant: float) -> None:
        """Hook `module`."""
        self.constant = constant
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the first one multiplied."""
        _check_positional(module, args)
        return (args[0] * self.constant, *args[1:])


class InputBias:
    """A forward pre-hook: one learned number added to a module's input."""

    def __init__(self, module: nn.Module) -> None:
        """Hook `module`, which owns the number."""
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the number added to the first."""
        _check_positional(module, args)
        bias: Tensor = getattr(module, BIAS)
        return (args[0] + bias.to(args[0].dtype), *args[1:])


class ScaledForward(Patch):
    """A block's forward taken as one branch: `x + m (g(x) - x)`."""

    made_by, undone_by = MADE_BY
    is_released = False

    def __init__(self, module: nn.Module, constant: float, owner: nn.Module | None = None, channel: int = -1) -> None:
        """Take the place of the module's forward, on the instance."""
        super().__init__(module)
        self.factor = _Factor(constant, owner, channel)
        self.install()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block and multiply what it adds."""
        found = stream_of(args, kwargs)
        if self.before is not None:
            output = self.before(*args, **kwargs)
        else:
            output = type(self.module).forward(self.module, *args, **kwargs)
        if found is None:
            return output
        x = found[1]
        y = _first(output)
        scaled = torch.add(x, (y - x) * self.factor(y))
        return scaled if isinstance(output, Tensor) else type(output)((scaled, *output[1:]))


def scaling_hooks(module: nn.Module) -> list[BranchScale | HeadScale | InputBias]:
    """Return the hooks of this room on one module."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, BranchScale | HeadScale | InputBias)]
