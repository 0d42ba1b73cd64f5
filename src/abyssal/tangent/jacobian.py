"""Products with the Jacobian of a model's outputs in its parameters, block of samples by block, never forming it.

`J^T v` is one backward pass, `J t` one forward-mode pass (dual numbers), or, where some operation of the model has no
forward mode, two backward passes: `J t` is the derivative in u of `<J^T u, t>`. Forward mode does not stop at
`torch.no_grad()` as backward passes do, so that the two modes can disagree about a model; the backward pass is what
training uses, and decides. Which way is taken is found out on the first samples, before any product.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from abyssal.tangent.batch import Batch
from abyssal.tangent.plainly import forked_randomness, plainly
from abyssal.tangent.reach import check_reach
from abyssal.tangent.subject import Output, Subject, same_buffers

__all__ = ["Jacobian"]

_DEFAULT_BYTES = 256 << 20  # of activations that one block may keep, where no budget is given
_WORKING = 1.5  # a pass's memory by what it saves for backward passes: its own temporaries, and some margin


class Jacobian:
    """`J = d f / d parameters`, [n, k, parameters], of a model on n samples with k outputs, as two products.

    The model is left as it was found: its parameters are never written to, buffers are copies while it runs, and
    random states are put back.

    Args:
        model: any module, in the mode it is to be looked at in; it has to treat samples one by one.
        x: a tensor [n, ...], a tuple of positional arguments or a dictionary of keyword arguments.
        output: takes what the model returns to the outputs, [n] or [n, ...]. Default: a tensor as it is, else
            `.logits`.
        parameters: names or patterns (`"blocks.*.weight"`) of those that count. Those that need no gradient never do.
        dtype: type in which everything is computed, on copies; default: as the model is.
        budget: bytes that a product may take beyond the model and x; default: activations of up to 256 MiB.

    Raises:
        TypeError, ValueError: naming what is wrong, before any product.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        *,
        output: Output | None = None,
        parameters: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        budget: int | None = None,
    ) -> None:
        self.subject = Subject(getattr(model, "_orig_mod", model), parameters, output)  # what torch.compile wraps
        self.model, self._chosen = self.subject.model, self.subject.parameters
        self.device = next(iter(self._chosen.values())).device
        self._dtype, self.has_budget = dtype, budget is not None
        self.batch = _moved(Batch.of(x, "x"), self.device, dtype)
        self._state = {name: self._cast(p.detach()) for name, p in self.model.named_parameters()}
        self._forward_mode = True
        with self._borrowed():
            self.outputs, self.dtype = self._look()
            self._check_reach()
            self._settle_mode()
            saved = self._saved_bytes()
        self.block = self._block(saved, budget)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.batch.n

    @property
    def size(self) -> int:
        """How many parameters count."""
        return sum(p.numel() for p in self._chosen.values())

    @property
    def is_cast(self) -> bool:
        """Whether everything is computed on copies in another type."""
        return self._dtype is not None

    @property
    def mode(self) -> str:
        """How `J t` is computed: "forward" or "double backward"."""
        return "forward" if self._forward_mode else "double backward"

    def transposed(self, cotangents: Tensor) -> list[list[Tensor]]:
        """Return `J^T v` of every cotangent, as tensors of the parameters' shapes.

        Args:
            cotangents: [several, n, k].
        """
        total: list[list[Tensor]] = []
        with self._borrowed():
            for start, part in self._blocks():
                of_part = cotangents[:, start : start + part.n]
                with torch.enable_grad():
                    leaves = self._leaves()
                    f = self._run(leaves, part)
                    for i, v in enumerate(of_part.to(f.device, f.dtype)):
                        grads = _grad(f, list(leaves.values()), v, retain=i + 1 < len(of_part))
                        if i == len(total):
                            total.append(grads)
                        else:
                            torch._foreach_add_(total[i], grads)
                        del grads
                del f, leaves
        return total

    def times(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return `J t`, [n, k].

        Args:
            tangents: one of every parameter's shape, as `transposed` returns them.
        """
        with self._borrowed():
            return torch.cat([self._times(part, tangents) for _, part in self._blocks()])

    def _blocks(self) -> Iterator[tuple[int, Batch]]:
        for start in range(0, self.samples, self.block):
            yield start, self.batch[start : start + self.block]

    def _times(self, part: Batch, tangents: Sequence[Tensor]) -> Tensor:
        if self._forward_mode:
            with torch.no_grad(), forward_ad.dual_level():
                names = zip(self._chosen, tangents, strict=True)
                duals = {name: forward_ad.make_dual(self._state[name], tangent) for name, tangent in names}
                primal, tangent = forward_ad.unpack_dual(self._run(duals, part))
                return torch.zeros_like(primal) if tangent is None else tangent
        with torch.enable_grad():
            leaves = self._leaves()
            f = self._run(leaves, part)
            u = torch.zeros_like(f, requires_grad=True)
            grads = torch.autograd.grad(f, list(leaves.values()), u, create_graph=True, allow_unused=True)
            terms = [(g * t).sum() for g, t in zip(grads, tangents, strict=True) if g is not None and g.requires_grad]
            if not terms:
                return torch.zeros_like(f).detach()
            (found,) = torch.autograd.grad(torch.stack(terms).sum(), u, allow_unused=True)
            return torch.zeros_like(f).detach() if found is None else found.detach()

    def _run(self, parameters: Mapping[str, Tensor], part: Batch) -> Tensor:
        """Call the model with parameters in place of its own, and return its outputs. [n, k]."""
        buffers = {name: self._cast(b).clone() for name, b in self.model.named_buffers()}
        state = {**self._state, **buffers, **parameters}
        args, kwargs = part.call()
        return self.subject.flat(torch.func.functional_call(self.model, state, args, kwargs), part.n)

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._dtype) if self._dtype is not None and value.is_floating_point() else value

    def _leaves(self) -> dict[str, Tensor]:
        """Aliases of the parameters that gradients are taken at: the user's own hooks do not see them."""
        return {name: self._state[name].detach().requires_grad_() for name in self._chosen}

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[None]:
        """Run the model within this: plainly, without autocast, twice differentiable, random states put back."""
        numpy_state, python_state = np.random.get_state(), random.getstate()
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # fused transformer layers know no forward mode
            with (
                forked_randomness(self.device),
                plainly(self.model),
                torch.inference_mode(False),
                torch.autocast(self.device.type, enabled=False),
                sdpa_kernel(SDPBackend.MATH),
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            np.random.set_state(numpy_state)
            random.setstate(python_state)

    def _look(self) -> tuple[int, torch.dtype]:
        """Return the number of outputs and their type, of a model that treats samples one by one and always alike."""
        with torch.no_grad():
            pair = self.batch[:2]
            try:
                f = self._run({}, pair)
            except (RuntimeError, IndexError) as error:
                given = ", ".join(str(value.dtype) for value in pair.tensors)
                own = self._dtype or next(iter(self._chosen.values())).dtype
                raise ValueError(
                    f"model(x) failed on the first {pair.n} samples, {given} given to parameters of {own}: "
                    f"{str(error).strip().splitlines()[0]}. Images are floating-point numbers: x.float() / 255."
                ) from error
            again, alone = self._run({}, pair), self._run({}, self.batch[:1])
        with torch.enable_grad():
            if not self._run(self._leaves(), self.batch[:1]).requires_grad:
                raise ValueError(
                    "The outputs depend on none of the parameters that count: the kernel is 0. Is the output detached, "
                    "or computed under torch.no_grad()? Do the patterns of `parameters` name what is used?"
                )
        if not torch.isfinite(f).all():
            raise ValueError("model(x) has entries that are not finite on the first samples.")
        near = torch.finfo(f.dtype).eps ** 0.5 * float(f.abs().max())
        if float((again - f).abs().max()) > near:
            raise ValueError(
                "The model is random: called twice with the same inputs, it returned different outputs, so it has no "
                "one tangent kernel. Turn its dropout off, with model.eval() where it heeds that."
            )
        if float((alone[0] - f[0]).abs().max()) > near:
            raise ValueError(
                "The model mixes samples: the first sample's outputs depend on what else is in the batch. A tangent "
                "kernel needs one function for all samples: model.eval() where it is BatchNorm in training mode."
            )
        return f.shape[1], f.dtype

    def _check_reach(self) -> None:
        """Make sure that gradients at the parameters handed over are those at the model's own."""
        own = next(iter(self._chosen.values())).dtype
        one = self.batch[:1]
        args, kwargs = (_moved(one, self.device, own) if self._dtype is not None else one).call()

        def plain() -> Tensor:
            with same_buffers(self.model):
                return self.subject.flat(self.model(*args, **kwargs), 1)

        check_reach(self.model, self._leaves(), lambda leaves: self._run(leaves, one), plain)

    def _settle_mode(self) -> None:
        """Find a way to `J t` that agrees with `J^T`: `<J t, J t> = <J^T J t, t>` on the first samples."""
        generator = torch.Generator().manual_seed(0)
        chosen = [self._state[name] for name in self._chosen]
        tangents = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in chosen]
        part = self.batch[:2]
        reasons = []
        for self._forward_mode in (True, False):
            try:
                jt = self._times(part, tangents)
            except (NotImplementedError, RuntimeError) as error:
                reasons.append(f"{self.mode}: {str(error).strip().splitlines()[0]}")
                continue
            with torch.enable_grad():
                leaves = self._leaves()
                back = _grad(self._run(leaves, part), list(leaves.values()), jt, retain=False)
            there = float(jt.double().square().sum())
            here = sum(float((g.double() * t.double()).sum()) for g, t in zip(back, tangents, strict=True))
            if abs(there - here) <= torch.finfo(self.dtype).eps ** 0.5 * max(abs(there), abs(here)):
                return
            reasons.append(f"{self.mode}: |J t|^2 = {there:.6g}, but <J^T J t, t> = {here:.6g}")
        raise ValueError(
            "Products with this model's Jacobian cannot be computed: neither forward mode nor a double backward pass "
            f"agrees with its backward pass ({'; '.join(reasons)})."
        )

    def _saved_bytes(self) -> list[int]:
        """Return what the passes over 1 and over 2 samples keep for backward passes, beside the parameters."""
        ours = {p.untyped_storage().data_ptr() for p in self._state.values()}
        found = []
        for count in (1, 2):
            storages: dict[int, int] = {}

            def seen(value: Tensor, storages: dict[int, int] = storages) -> Tensor:
                storage = value.untyped_storage()
                if storage.data_ptr() not in ours:
                    storages[storage.data_ptr()] = storage.nbytes()
                return value

            part = self.batch[:count]
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(seen, lambda value: value):
                if self._forward_mode:
                    kept = self._run(self._leaves(), part)
                else:
                    kept = self._times(part, [torch.zeros_like(self._state[name]) for name in self._chosen])
            found.append(sum(storages.values()))
            del kept
        return found

    def _block(self, saved: list[int], budget: int | None) -> int:
        """Return how many samples one block has."""
        each = max(1, int(_WORKING * (saved[1] - saved[0]))) if self.samples > 1 else 0
        fixed = int(_WORKING * saved[0]) - each
        if budget is None:
            return min(self.samples, max(1, _DEFAULT_BYTES // max(1, each)))
        vectors = 2 * self.size * self.dtype.itemsize  # of the parameters' size: a sum, and what is added to it
        cast = sum(p.numel() for p in self._state.values()) * self.dtype.itemsize if self._dtype is not None else 0
        fixed = max(0, fixed) + vectors + cast
        if budget < fixed + each:
            raise ValueError(
                f"budget of {budget:,} bytes: a kernel-vector product takes {fixed + each:,} for one sample at a time, "
                f"of which {vectors:,} are two vectors of the size of the parameters and {cast:,} copies of them in "
                f"another type. Give at least that{', or fewer `parameters`' if vectors > each else ''}."
            )
        return min(self.samples, max(1, (budget - fixed) // max(1, each)))


def _moved(batch: Batch, device: torch.device, dtype: torch.dtype | None) -> Batch:
    """Put samples on a device, floating-point ones in a type."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return Batch(batch.names, tuple(map(move, batch.values)), batch.n)


def _grad(f: Tensor, leaves: list[Tensor], v: Tensor, *, retain: bool) -> list[Tensor]:
    grads = torch.autograd.grad(f, leaves, v, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]
