"""A patched block: what stands in for its `forward`, and what that does when it is called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from abyssal.certify.recorder import CallRecord
from abyssal.codec.sample import has_data
from abyssal.engine.auto import BlockWatch
from abyssal.engine.below import ChainFromBelow, Foresight
from abyssal.engine.chain import Chain, Exact, Link
from abyssal.engine.linking import Linker
from abyssal.engine.policy import Keep, Policy, Recompute, Store
from abyssal.engine.session import Session
from abyssal.models.arguments import Given, find_stream, read_call
from abyssal.models.call import first_tensor
from abyssal.models.patch import Patch, untraced
from abyssal.models.replay.call import Call
from abyssal.models.replay.frame import run_with_frame
from abyssal.models.surroundings import BufferWatch

LINKER: Linker[Link] = Linker()
"""Of all models and threads."""


class Block(Patch):
    """A block's `forward` while it is reconstructed. Calls the block's own one, `inner`, under a policy."""

    runs_outside_graphs = True

    def __init__(self, module: nn.Module, name: str, policy: Policy, session: Session) -> None:
        """Prepare to stand in for `module.forward`; `install` puts it there."""
        self.policy, self.session = policy, session
        super().__init__(module, name)

    def _begin(self) -> None:
        super()._begin()
        self.watch = BufferWatch()
        self.watched = BlockWatch()
        self.foresight: Foresight | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle all but what belongs to this process."""
        return {
            key: value for key, value in super().__getstate__().items() if key not in ("watch", "watched", "foresight")
        }

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
        if self._is_compiled_in_place:  # since it was patched
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
        if self.retired or self.pauses or _runs_plainly():
            return self.inner(*args, **kwargs)
        override = self.session.overrides.get(self.name)
        policy = self.policy if override is None else override[0]
        if not policy.recomputes:
            slot = find_stream(args, kwargs, self.__wrapped__)
            return self._stored(args, kwargs, slot.get(args, kwargs) if slot else None, "")
        given = read_call(args, kwargs, self)
        if given.dropped:
            self.note = "an empty key-value cache is dropped while gradients are on (pass use_cache=False)"
        if given.stream is None or given.why_once:
            return self._stored(given.args, given.kwargs, given.stream, given.why_once)
        return self._recomputed(policy, given, given.stream)

    _call_from_compiled = untraced(
        _call_from_compiled,
        "abyssal reconstructs this block's input outside of the compiled graph. Compile the blocks instead, "
        "before abyssal.reconstruct, or trace the model within abyssal.paused(model)",
    )

    def _stored(self, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor | None, why: str) -> Any:
        record = self.session.begin_call(self, Store(), stream, linked=False).record
        if why:
            record.note = f"ran as Store(): {why}"
        output = self.inner(*args, **kwargs)
        record.place[0].end(record.place[1])
        return output

    def _recomputed(self, policy: Policy, given: Given, stream: Tensor) -> Any:
        before = LINKER.match(stream)
        if before and (before.chain.from_below is not policy.from_below or before.place.exact is None):
            before = None  # a chain of its own
        observer = self.session.begin_call(self, policy, stream, linked=before is not None)
        inner = self.inner
        call = Call(self, given, stream, inner)
        chain = self._begin_chain(policy) if before is None else before.chain
        link = chain.append(call, stream, policy, observer, self.session.choose)
        place, record = link.place, observer.record
        uses_output = observer.checks_output or (place.policy.needs_output and before is not None)
        with nullcontext() if place.policy.keeps_input else self._watching():
            output = run_with_frame(
                partial(inner, *given.args, **given.kwargs),
                link.rerun,
                self.name,
                stream,
                early_stop=not uses_output,
            )
        result = output if type(output) is Tensor else first_tensor(output)
        if self.name in self.session.ends:
            chain.pack(place)
        observer.returned(result, place.runner.nbytes if place.runner else 0, call.settle(stream))
        record.place[0].end(record.place[1])
        if place.policy.keeps_input:
            chain.keep(place)
        else:
            self._leave_open(link, record, result)
        if before is None and not _needs_gradients(result, output):
            record.policy = Keep()
            record.spare()
        return output

    def _begin_chain(self, policy: Policy) -> Chain:
        if not isinstance(policy, Recompute):
            return Chain()
        if self.foresight is None:
            self.foresight = Foresight(self.session.size)
        return ChainFromBelow(policy, self.foresight)

    def _watching(self) -> AbstractContextManager[object]:
        """Watch for what speaks against restoring the block's input, in its first call in each mode."""
        if self.module.training in self.watched.verdicts:
            return nullcontext()
        return self.watched.watching(self.module, self._is_compiled)

    def _leave_open(self, link: Link, record: CallRecord, result: Tensor | None) -> None:
        """The block above may be called with `result`, which is what this one's input can be restored from."""
        place = link.place
        why, routes = self.watched.verdicts[self.module.training]
        assert isinstance(place.exact, Exact)
        if misfit := why_not_restorable(place.policy, place.exact.state, result):
            record.note = f"kept: {misfit}"
        elif why and self.policy.is_auto:
            self.session.keep_anyway(self, why)
            record.policy = Keep()
            link.chain.keep(place, Keep())
        else:
            if routes and not place.policy.from_below:
                record.note = f"{why}: a restored input may be routed otherwise"
            assert result is not None
            LINKER.open(link, result)


def _needs_gradients(stream: Tensor | None, output: Any) -> bool:
    """Whether a block's output is in a graph at all; that of a frozen block may not be."""
    if stream is not None and stream.requires_grad:
        return True
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(output))


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


def why_not_restorable(policy: Policy, held: Tensor | None, output: Tensor | None) -> str:
    """Say why a block's output cannot be taken back to its input, or nothing."""
    if output is None:
        return "the block returns no tensor"
    assert held is not None
    if type(held) is not Tensor and has_data(held):
        return f"the stream is a {type(held).__name__}, whose restored states could not be measured"
    if policy.from_below:
        return ""
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
