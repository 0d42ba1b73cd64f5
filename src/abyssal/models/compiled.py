"""Blocks that were compiled in place: `block.compile()` keeps its effect while the block is reconstructed.

`Module.compile` compiles the module's *call*, hooks included, and our `forward`, inside of it, has to run
outside of any compiled graph. So the compiled call is set aside while we are there, and what it contained,
the block's own forward, is compiled with the very settings that the user gave. (`torch.compile(block)`, which
makes a module around the block, needs none of this: that module's own forward is the compiled one.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

_ATTRIBUTE = "_compiled_call_impl"  # where torch.nn.Module.compile puts the compiled call

Compiled = Callable[..., Any]


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module.__dict__.get(_ATTRIBUTE) is not None


def is_compiled_around(module: nn.Module) -> bool:
    """Whether `module` is what `torch.compile(module)` makes around another."""
    from torch._dynamo import OptimizedModule

    return isinstance(module, OptimizedModule)


def take_compiled_call(module: nn.Module) -> Compiled:
    """Take the compiled call away from `module`, which then runs its hooks and `forward` as they are."""
    call: Compiled = module.__dict__.pop(_ATTRIBUTE)
    return call


def put_compiled_call(module: nn.Module, call: Compiled) -> None:
    """Give back what `take_compiled_call` took, unless the module was compiled anew since."""
    if not is_compiled_in_place(module):
        module.__dict__[_ATTRIBUTE] = call


def compile_alike(call: Compiled, forward: Callable[..., Any]) -> Compiled | None:
    """Compile `forward` with the backend, mode and options that `call` was compiled with.

    torch has no name for them. They are the context object in the closure of the compiled function; where a
    later version of torch keeps them elsewhere, the answer is None.
    """
    from torch._dynamo.eval_frame import OptimizeContext

    for cell in getattr(call, "__closure__", None) or ():
        if isinstance(cell.cell_contents, OptimizeContext):
            return cast("Compiled", cell.cell_contents(forward))
    return None
