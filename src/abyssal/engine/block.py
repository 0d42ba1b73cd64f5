"""A patched block: what stands in for its `forward`, and what that does when it is called.

The block's `forward` is replaced on the instance, so that module hooks stay outside of the recomputation
(FSDP2's among them), as transformers' own `GradientCheckpointingLayer` does. The replacement is an object of a
module-level class that holds the module: deepcopy and pickle rebind it to the copy through their memo.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from abyssal.certify.sample import has_data
from abyssal.engine.auto import BlockWatch
from abyssal.engine.cell import Cell, run
from abyssal.engine.linking import TAPE
from abyssal.engine.policy import Code, Policy, Store
from abyssal.engine.session import Session
from abyssal.models.arguments import Slot, find_cache, find_stream, hidden_graph, output_stream, without
from abyssal.models.compiled import (
    compile_alike,
    is_compiled_around,
    is_compiled_in_place,
    put_compiled_call,
    take_compiled_call,
)
from abyssal.models.surroundings import BufferWatch

_OF_THIS_PROCESS = ("watch", "watched", "_compiled", "_compiled_call")


class PatchedForward:
    """A block's `forward` while it is reconstructed. Calls the block's own one, `inner`, under a policy."""

    def __init__(self, module: nn.Module, name: str, policy: Policy, session: Session) -> None:
        """Prepare to stand in for `module.forward`; `install` puts it there."""
        self.module, self.name, self.policy, self.session = module, name, policy, session
        self.before: Callable[..., Any] | None = module.__dict__.get("forward")  # accelerate sets one, for example
        self._is_static = isinstance(inspect.getattr_static(type(module), "forward", None), staticmethod)
        self.note = ""
        self.retired = False
        self._learn_anew()

    def _learn_anew(self) -> None:
        self.watch = BufferWatch()
        self.watched = BlockWatch()
        self._compiled: Callable[..., Any] | None = None  # the block's own forward, compiled as the block was
        self._compiled_call: Callable[..., Any] | None = None  # what `block.compile()` had made, set aside
        _stay_out_of_graphs()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle all but what belongs to this process; `nn.Module`, too, leaves compiled code."""
        return {key: value for key, value in self.__dict__.items() if key not in _OF_THIS_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin to learn anew."""
        self.__dict__.update(state)
        self._learn_anew()

    def install(self) -> None:
        """Put this in the place of the module's `forward`."""
        self.module.__dict__["forward"] = self
        if is_compiled_in_place(self.module):
            self._take_compilation()

    def remove(self) -> None:
        """Put back what was there before; where somebody has since wrapped this, stay inside and pass through."""
        if self.module.__dict__.get("forward") is not self:
            self.retired = True
        elif self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before
        if self._compiled_call is not None:
            put_compiled_call(self.module, self._compiled_call)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The block's own forward: the instance's where it had one, else its class's (FSDP2 swaps the class).

        Under this name `inspect.signature` finds it: the patched forward takes what the block's own takes.
        """
        if self.before is not None:
            return self.before
        own = type(self.module).forward
        return own if self._is_static else types.MethodType(own, self.module)

    @property
    def inner(self) -> Callable[..., Any]:
        """The block's own forward, compiled if the block was."""
        return self._compiled or self.__wrapped__

    @property
    def is_off(self) -> bool:
        """Whether the block runs as it would without us."""
        return self.retired or self.session.paused > 0

    def _take_compilation(self) -> None:
        self._compiled_call = take_compiled_call(self.module)
        self._compiled = compile_alike(self._compiled_call, self.__wrapped__)
        if self._compiled is None:
            self.note = "block.compile() has no effect while the block is reconstructed"
            warnings.warn(
                f"block {self.name!r}: {self.note} with torch {torch.__version__}. Compile a module around it "
                "instead: model.blocks[i] = torch.compile(model.blocks[i]), before abyssal.reconstruct(model).",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        return f"<abyssal {self.policy} of {self.name or 'the model'} ({type(self.module).__name__})>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, and remember what its policy needs to run it again."""
        if torch.compiler.is_dynamo_compiling():  # a constant for torch.compile, which traces one branch only
            if self.is_off or not torch.is_grad_enabled() or torch.compiler.is_exporting():
                if self.before is not None:
                    return self.before(*args, **kwargs)
                if self._is_static:
                    return type(self.module).forward(*args, **kwargs)
                return type(self.module).forward(self.module, *args, **kwargs)
            return self._call_from_compiled(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _call_from_compiled(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiled_in_place(self.module):  # since it was patched
            self._take_compilation()
        if not self._is_compiled:
            self.note = "runs uncompiled, since torch.compile stops at reconstructed blocks"
            self.session.tell_once(
                self.note,
                "torch.compile was given a model whose blocks abyssal reconstructs. It stops before each of them, "
                "and they run uncompiled. Compile the blocks themselves, with block.compile() for each of "
                "abyssal.find_blocks(model).values(): they stay compiled inside of abyssal.",
            )
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.module.training and getattr(self.module, "gradient_checkpointing", False):
            self.note = "gradient checkpointing was enabled besides, and keeps this block's input"
            self.session.tell_once(
                self.note,
                "gradient checkpointing was enabled after abyssal.reconstruct. The gradients are right, but it "
                "keeps each block's input and runs each block once more. Leave it off (transformers' Trainer: "
                "gradient_checkpointing=False), or call abyssal.reconstruct again, which takes it over.",
            )
        if self.is_off or _runs_plainly():
            return self.inner(*args, **kwargs)
        policy, slot = self.session.policy_of(self), find_stream(args, kwargs, self.__wrapped__)
        if not policy.recomputes:
            return self._stored(args, kwargs, slot, "")
        if slot is None:
            return self._stored(args, kwargs, slot, "no argument is a tensor")
        args, kwargs, why_stored = _without_cache(args, kwargs, self)
        if not why_stored and (hidden := hidden_graph(args, kwargs)):
            why_stored = f"an argument of type {hidden} holds tensors that need gradients"
        if why_stored:
            return self._stored(args, kwargs, slot, why_stored)
        return self._recomputed(policy, args, kwargs, slot)

    def _stored(self, args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot | None, why: str) -> Any:
        stream = slot.get(args, kwargs) if slot else None
        record = self.session.begin_call(self, Store(), stream, linked=False)
        if why:
            record.note = f"ran as Store(): {why}"
        output = self.inner(*args, **kwargs)
        self.session.end_call(record)
        return output

    def _recomputed(self, policy: Policy, args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Any:
        stream = slot.get(args, kwargs)
        before = TAPE.match(stream)
        record = self.session.begin_call(self, policy, stream, linked=before is not None)
        cell = Cell(self, policy, record, args, kwargs, slot)
        cell.enter(before)
        policy = cell.policy
        checks_output = self.session.checks_output(self)
        uses_output = checks_output or (policy.needs_output and before is not None)
        version = stream._version
        with nullcontext() if policy.keeps_input else self.watched.watching(self.module, self._is_compiled):
            output = checkpoint(
                run,
                cell,
                *device_token(stream),
                use_reentrant=False,
                preserve_rng_state=False,  # the cell does it, for those blocks that draw
                early_stop=not uses_output,
            )
        result = output_stream(output)
        cell.settle(stream._version != version, result if checks_output else None)
        self.session.end_call(record)
        if not policy.keeps_input:
            self._leave_open(cell, result)
        cell.park()
        if before is None and not _needs_gradients(result, output):
            record.spare()
        return output

    def _leave_open(self, cell: Cell, result: Tensor | None) -> None:
        """The block above may be called with `result`, which is what this one's input can be restored from."""
        why, routes = self.watched.told(self.module)
        if misfit := misfit_of(cell.policy, cell.held, result):
            cell.record.note = f"kept: {misfit}"
        elif why and isinstance(self.policy, Code) and self.policy.is_auto:
            self.session.keep_anyway(self, why)
            cell.keep()
        else:
            if routes:
                cell.record.note = f"{why}: a restored input may be routed otherwise"
            assert result is not None
            TAPE.open(cell, result)

    @property
    def _is_compiled(self) -> bool:
        return self._compiled is not None or is_compiled_around(self.module)


def _needs_gradients(stream: Tensor | None, output: Any) -> bool:
    """Whether a block's output is in a graph at all; that of a frozen block may not be."""
    if stream is not None and stream.requires_grad:
        return True
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(output))


def _stay_out_of_graphs() -> None:
    """Tell torch.compile not to trace our calls. Once, and not at import: that would load the compiler, a second."""
    if not getattr(PatchedForward._call_from_compiled, "_torchdynamo_disable", False):
        disable = torch.compiler.disable(
            reason="abyssal reconstructs this block's input outside of the compiled graph. Compile the blocks instead, "
            "before abyssal.reconstruct, or trace the model within abyssal.paused(model)"
        )
        PatchedForward._call_from_compiled = disable(PatchedForward._call_from_compiled)  # type: ignore[method-assign]


def device_token(stream: Tensor) -> tuple[Tensor, ...]:
    """An argument from which the checkpoint infers the device whose autocast state it keeps (the CPU's always)."""
    return () if stream.device.type == "cpu" else (torch.empty(0, device=stream.device),)


def _runs_plainly() -> bool:
    """Whether nothing may be recomputed now: no gradients, functional transforms, tracing, saved-tensor hooks off."""
    return (
        not torch.is_grad_enabled()
        or _transforms_are_active()
        or not _hooks_are_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    )


# torch has no public names for these two; where they are missing, the transform itself raises at the checkpoint.
_transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_hooks_are_enabled: Callable[[], bool] = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)


# What a block's last operation must not be, if its input is to be solved for from its output.
_CANNOT_BE_INVERTED = {
    "NativeLayerNormBackward": "a LayerNorm",
    "FusedRmsNormBackward": "an RMSNorm",
    "NativeGroupNormBackward": "a GroupNorm",
    "NativeBatchNormBackward": "a BatchNorm",
    "CudnnBatchNormBackward": "a BatchNorm",
    "ReluBackward": "a ReLU",
}


def misfit_of(policy: Policy, held: Tensor | None, output: Tensor | None) -> str:
    """Say why a block's output cannot be taken back to its input, or nothing."""
    if output is None:
        return "the block returns no tensor"
    assert held is not None
    if type(held) is not Tensor and has_data(held):
        return f"the stream is a {type(held).__name__}, whose restored states could not be measured"
    if output.shape != held.shape:
        return f"the block changes the stream's shape, {list(held.shape)} to {list(output.shape)}"
    if output.dtype != held.dtype or output.device != held.device:
        return f"the block changes {held.dtype} on {held.device} to {output.dtype} on {output.device}"
    if not (held.is_floating_point() or held.is_complex()):
        return f"the stream is not floating-point but {held.dtype}"
    if held.is_complex() and policy.codec is not None:
        return f"a stream of {held.dtype} cannot be coded"
    last = output.grad_fn.name().rstrip("0123456789") if policy.inverts and output.grad_fn is not None else ""
    if last in _CANNOT_BE_INVERTED:
        return f"the output comes out of {_CANNOT_BE_INVERTED[last]}, which {policy} cannot invert (Code() need not)"
    return ""


def _without_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], block: PatchedForward
) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """Take an empty key-value cache out of the arguments; re-running the block would fill it twice."""
    found = find_cache(args, kwargs, block.module)
    if found is None:
        return args, kwargs, ""
    key, empty = found
    if not empty:
        return args, kwargs, "a key-value cache that is not empty was passed, and would grow when the block is re-run"
    args, kwargs = without(args, kwargs, key)
    if kwargs.get("use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    block.note = "an empty key-value cache is dropped while gradients are on (pass use_cache=False)"
    return args, kwargs, ""
