"""What stands in for one module's `forward`, and what is changed in a model: told by what is there, not by who did it.

A patch replaces `forward` on the instance, so that module hooks stay outside of it (FSDP2's among them). It is an
object of a module-level class that holds the module: deepcopy and pickle rebind it to the copy through their memo.
Rooms that patch derive from :class:`Patch`; `patches`, `release` and `paused` reach all of them, known or not.
"""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn

__all__ = ["Change", "Patch", "StandIn", "changes", "patches", "paused", "release", "stand_ins_of", "stand_ins_put"]

_COMPILED_CALL = "_compiled_call_impl"  # where torch.nn.Module.compile puts the compiled call


class Change:
    """What a module holds while this package has changed what it does: by whom, and how it is taken back."""

    made_by: ClassVar[str] = "abyssal.reconstruct"
    undone_by: ClassVar[str] = "abyssal.release(model)"


class Patch(Change):
    """A stand-in for a module's `forward`; calls the module's own one, `inner`."""

    is_released: ClassVar[bool] = True
    """Whether `release` takes it away; others undo what they did themselves."""
    runs_outside_graphs: ClassVar[bool] = False
    """Whether it cannot be part of a compiled graph: what `module.compile()` made is set aside meanwhile."""

    def __init__(self, module: nn.Module, name: str = "") -> None:
        """Prepare to stand in for `module.forward`, of the module's dotted `name`; `install` puts it there."""
        self.module, self.name = module, name
        self.before: Callable[..., Any] | None = module.__dict__.get("forward")  # accelerate sets one, for example
        self._is_static = isinstance(inspect.getattr_static(type(module), "forward", None), staticmethod)
        self.note = ""
        self.retired = False
        self._begin()

    def _begin(self) -> None:
        self.pauses = 0
        self._compiled: Callable[..., Any] | None = None  # the module's own forward, compiled as the module was
        self._compiled_call: Callable[..., Any] | None = None  # what `module.compile()` had made, set aside

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle all but what belongs to this process; `nn.Module`, too, leaves compiled code."""
        ours = ("pauses", "_compiled", "_compiled_call")
        return {key: value for key, value in self.__dict__.items() if key not in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin anew."""
        self.__dict__.update(state)
        self._begin()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        raise NotImplementedError

    def install(self) -> None:
        """Put this in the place of the module's `forward`."""
        self.module.__dict__["forward"] = self
        if self.runs_outside_graphs and self._is_compiled_in_place:
            self._take_compilation()

    def remove(self) -> None:
        """Put back what was there before; where somebody has since wrapped this, stay inside and pass through."""
        if self.module.__dict__.get("forward") is not self:
            self.retired = True
        elif self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before
        if self._compiled_call is not None and not self._is_compiled_in_place:  # nor compiled anew since
            self.module.__dict__[_COMPILED_CALL] = self._compiled_call

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own forward: the instance's where it had one, else its class's (FSDP2 swaps the class).

        Under this name `inspect.signature` finds it: the patched forward takes what the module's own takes.
        """
        if self.before is not None:
            return self.before
        own = type(self.module).forward
        return own if self._is_static else types.MethodType(own, self.module)

    @property
    def inner(self) -> Callable[..., Any]:
        """The module's own forward, compiled if the module was."""
        return self._compiled or self.__wrapped__

    @property
    def is_off(self) -> bool:
        """Whether the module runs as it would without us."""
        return self.retired or self.pauses > 0

    # `Module.compile` compiles the module's *call*, hooks included, and our `forward`, inside of it, has to run outside
    # of any compiled graph. So the compiled call is set aside, and what it contained, the module's own forward, is
    # compiled with the very settings that the user gave. (`torch.compile(module)`, which makes a module around it,
    # needs none of this: that module's own forward is the compiled one.)

    @property
    def _is_compiled_in_place(self) -> bool:
        return self.module.__dict__.get(_COMPILED_CALL) is not None

    @property
    def _is_compiled(self) -> bool:
        return self._compiled is not None or is_compiled_around(self.module)

    def _take_compilation(self) -> None:
        self._compiled_call = self.module.__dict__.pop(_COMPILED_CALL)
        self._compiled = compile_alike(self._compiled_call, self.__wrapped__)
        if self._compiled is None:
            self.note = "block.compile() has no effect while the block is reconstructed"
            warnings.warn(
                f"block {self.name!r}: {self.note} with torch {torch.__version__}. Compile a module around it "
                "instead: model.blocks[i] = torch.compile(model.blocks[i]), before abyssal.reconstruct(model).",
                stacklevel=3,
            )


def is_compiled_around(module: nn.Module) -> bool:
    """Whether `module` is what `torch.compile(module)` makes around another."""
    compiler = sys.modules.get("torch._dynamo")  # which takes a second to load, and has made none before that
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def untraced(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """Do what `torch.compiler.disable` does, which loads the compiler, a second, only once somebody compiles."""
    lazily = getattr(torch, "_disable_dynamo", None)  # torch's own, which has no public name and no reason
    if lazily is None:
        return cast("Callable[..., Any]", torch.compiler.disable(function, reason=reason))
    disabled = lazily(function)
    disabled._torchdynamo_disable, disabled._torchdynamo_disable_msg = True, reason
    return cast("Callable[..., Any]", disabled)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_call_untraced: Callable[..., Any] = getattr(torch, "_disable_dynamo", lambda function: function)(_call)


def outside_graphs(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function so that nobody who compiles what is around it traces into it; loads no compiler."""
    return _call_untraced(function, *args) if "torch._dynamo" in sys.modules else function(*args)


def compile_alike(call: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """Compile `forward` with the backend, mode and options that `call` was compiled with.

    torch has no name for them. They are the context object in the closure of the compiled function; where a
    later version of torch keeps them elsewhere, the answer is None.
    """
    from torch._dynamo.eval_frame import OptimizeContext

    for cell in getattr(call, "__closure__", None) or ():
        if isinstance(cell.cell_contents, OptimizeContext):
            return cast("Callable[..., Any]", cell.cell_contents(forward))
    return None


def patches(model: nn.Module) -> list[Patch]:
    """Return what stands in for a forward in a model and is in force, outermost first within a module."""
    return [patch for m in model.modules() for patch in stand_ins(m) if not patch.retired and patch.module is m]


def stand_ins(module: nn.Module) -> Iterator[Patch]:
    """Yield the patches of one module, retired ones too: accelerate's hooks wrap a `forward` that they find."""
    found = module.__dict__.get("forward")
    while found is not None:
        if isinstance(found, Patch):
            yield found
            found = found.before
        else:
            found = getattr(found, "__dict__", {}).get("__wrapped__")


class StandIn(NamedTuple):
    """What stands in for one module's forward, and whether it is off."""

    module: nn.Module
    forward: Any
    off: tuple[int, bool]


def stand_ins_of(modules: Iterable[nn.Module]) -> list[StandIn]:
    """Note what stands in for the forwards of some modules now."""
    found = ((m, m.__dict__["forward"]) for m in modules if "forward" in m.__dict__)
    return [StandIn(m, f, (f.pauses, f.retired) if isinstance(f, Patch) else (0, False)) for m, f in found]


@contextmanager
def stand_ins_put(then: list[StandIn], now: list[StandIn]) -> Iterator[None]:
    """Put back for a while what stood in for forwards `then`, in place of what does `now`."""
    _exchange(now, then)
    try:
        yield
    finally:
        _exchange(then, now)


def _exchange(old: list[StandIn], new: list[StandIn]) -> None:
    for one in old:
        del one.module.__dict__["forward"]
    for one in new:
        one.module.__dict__["forward"] = one.forward
        if isinstance(one.forward, Patch):
            one.forward.pauses, one.forward.retired = one.off


def changes(module: nn.Module) -> Iterator[Change]:
    """Yield what this package has changed in one module: patches, and records that it left on it."""
    yield from stand_ins(module)
    yield from (
        value for value in module.__dict__.values() if isinstance(value, Change) and not isinstance(value, Patch)
    )


def release(model: nn.Module) -> None:
    """Take all patches away that are not somebody's own to undo."""
    for patch in patches(model):
        if patch.is_released:
            patch.remove()


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Run a model as it would run without what `release` takes away."""
    found = [patch for patch in patches(model) if patch.is_released]
    for patch in found:
        patch.pauses += 1
    try:
        yield
    finally:
        for patch in found:
            patch.pauses -= 1
