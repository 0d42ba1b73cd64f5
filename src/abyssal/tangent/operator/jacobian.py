"""Products with the Jacobian of a model's outputs in its parameters, block of samples by block, never forming it.

`J^T v` is one backward pass, `J t` one forward-mode pass (dual numbers), or, where some operation of the model has no
forward mode, two backward passes: `J t` is the derivative in u of `<J^T u, t>`. Forward mode does not stop at
`torch.no_grad()` as backward passes do, so that the two modes can disagree about a model; the backward pass is what
training uses, and decides. Which way is taken is found out before any product, and made sure of on all samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from abyssal.models.patch import paused
from abyssal.tangent.batch import Batch
from abyssal.tangent.hierarchy.pure import Watch, differentiable_kernels
from abyssal.tangent.modes import exactly, normal, saved_bytes
from abyssal.tangent.reach import check_reach
from abyssal.tangent.subject import (
    Output,
    Subject,
    first_failure,
    first_line,
    refuse_mixing,
    refuse_mixing_modes,
    refuse_random,
)
from abyssal.util.randomness import untouched

__all__ = ["Jacobian"]

_DEFAULT_BYTES = 256 << 20  # of activations that one block may keep, where no budget is given
_TOGETHER = 256  # samples at most whose gradients are compared as one: a part that is cut off has to stand out
_WORKING = 1.5  # a pass's memory by what it saves for backward passes: its own temporaries, and some margin


class Jacobian:
    """`J = d f / d parameters`, [n, k, parameters], of a model on n samples with k outputs, as two products.

    The model is left as it was found: its parameters are never written to, buffers are copies while it runs, and
    random states are put back. Products are of the model as it is when they are asked for: `update()` reads its
    parameters again.

    Arguments and errors are those of :func:`~abyssal.tangent.operator.kernel.kernel_operator`; `budget` is in bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        *,
        output: Output | None,
        parameters: str | Sequence[str] | None,
        dtype: torch.dtype | None,
        budget: int | None,
    ) -> None:
        self.subject = Subject(getattr(model, "_orig_mod", model), parameters, output)  # what torch.compile wraps
        self.model, self._chosen, self.device = self.subject.model, self.subject.parameters, self.subject.device
        self._dtype, self.has_budget, self.is_cast = dtype, budget is not None, dtype is not None
        self._forward_mode = True
        with torch.inference_mode(False):
            self.batch = Batch.of(x, "x").to(self.device, dtype)
            self._state = {name: self._cast(p.detach()) for name, p in self.model.named_parameters()}
        with self._borrowed():
            self.outputs, self.dtype = self._look()
            self._check_reach(self.batch[:1])
            self._settle_mode(self.batch[:2])
            self.block = self._block(self._saved_bytes(), budget)
            self._check_all(budget)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.batch.n

    @property
    def size(self) -> int:
        """How many parameters count."""
        return sum(p.numel() for p in self._chosen.values())

    @property
    def mode(self) -> str:
        """How `J t` is computed: "forward" or "double backward"."""
        return "forward" if self._forward_mode else "double backward"

    def update(self) -> None:
        """Take the parameters' values as they are now.

        Raises:
            ValueError: if the model has other parameters now, or is in a mode in which it has no kernel.
        """
        refuse_mixing_modes(self.model)
        now = dict(self.model.named_parameters())
        with torch.inference_mode(False), torch.no_grad():
            for name, before in self._state.items():
                p = now.get(name)
                cast = None if p is None else self._type(p)
                if p is None or cast != before.dtype or p.shape != before.shape or p.device != before.device:
                    found = "gone" if p is None else f"{p.dtype} {list(p.shape)} on {p.device}"
                    raise ValueError(
                        f"Parameter {name} of the model is {found} by now, and was {before.dtype} "
                        f"{list(before.shape)} on {before.device} when this operator was made: make it anew."
                    )
                if cast == p.dtype:
                    self._state[name] = p.detach()
                else:
                    before.copy_(p)

    def transposed(self, cotangents: Tensor) -> list[list[Tensor]]:
        """Return `J^T v` of every cotangent, as tensors of the parameters' shapes.

        Args:
            cotangents: [several, n, k].
        """
        total: list[list[Tensor]] = []
        with self._borrowed():
            cotangents = normal(cotangents)
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
            tangents = [normal(t) for t in tangents]
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
            terms = [inner(g, t) for g, t in zip(grads, tangents, strict=True) if g is not None and g.requires_grad]
            if not terms:
                return torch.zeros_like(f).detach()
            (found,) = torch.autograd.grad(torch.stack(terms).sum(), u, allow_unused=True)
            return torch.zeros_like(f).detach() if found is None else found.detach()

    def _run(self, parameters: Mapping[str, Tensor], part: Batch) -> Tensor:
        """Call the model with parameters in place of its own, and return its outputs. [n, k]."""
        buffers = {name: self._cast(b).clone() for name, b in self.model.named_buffers()}
        return self.subject.run(part, {**self._state, **buffers, **parameters})

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._type(value))

    def _type(self, value: Tensor) -> torch.dtype:
        """In which a tensor of the model is computed with."""
        if self._dtype is None or not (value.is_floating_point() or value.is_complex()):
            return value.dtype
        return self._dtype.to_complex() if value.is_complex() else self._dtype

    def _leaves(self) -> dict[str, Tensor]:
        """Aliases of the parameters that gradients are taken at: the user's own hooks do not see them."""
        return {name: self._state[name].detach().requires_grad_() for name in self._chosen}

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[None]:
        """Run the model within this: plainly, without autocast, twice differentiable, random states put back."""
        with untouched(self._chosen.values()), paused(self.model), exactly(self.device), differentiable_kernels():
            yield

    def _look(self) -> tuple[int, torch.dtype]:
        """Return the number of outputs and their type, of a model that treats samples one by one and always alike."""
        with torch.no_grad():
            pair = self.batch[:2]
            try:
                with Watch() as watch:
                    f = self._run({}, pair)
            except (RuntimeError, IndexError) as error:
                raise ValueError(first_failure(error, pair, self._dtype or self.subject.dtype)) from error
            again, alone = self._run({}, pair), self._run({}, self.batch[:1])
        with torch.enable_grad():
            if not self._run(self._leaves(), self.batch[:1]).requires_grad:
                raise ValueError(
                    "The outputs depend on none of the parameters that count: the kernel is 0. Is the output detached, "
                    "or computed under torch.no_grad()? Do the patterns of `parameters` name what is used?"
                )
        if not torch.isfinite(f).all():
            raise ValueError("model(x) has entries that are not finite on the first samples.")
        # Some models compute in float32 somewhere, whatever they are given.
        self._rounding = max(torch.finfo(f.dtype).eps, watch.rounding)
        refuse_random(f, again, self._rounding)
        refuse_mixing(f, torch.cat([alone, f[1:]]), self._rounding)
        return f.shape[1], f.dtype

    def _check_all(self, budget: int | None) -> None:
        """Make sure of all samples: what the first ones showed need not hold for others."""
        mode = self.mode
        count = min(self.block, _TOGETHER)
        for start in range(0, self.samples, count):
            part = self.batch[start : start + count]
            self._check_reach(part)
            self._settle_mode(part)
        if self.mode != mode:
            self.block = self._block(self._saved_bytes(), budget)
            self._check_all(budget)

    def _check_reach(self, part: Batch) -> None:
        """Make sure that gradients at the parameters handed over are those at the model's own."""
        plain = part if self._dtype is None else part.to(self.device, self.subject.dtype)
        check_reach(self.subject, plain, self._leaves(), lambda leaves: self._run(leaves, part))

    def _settle_mode(self, part: Batch) -> None:
        """Find a way to `J t` that agrees with `J^T`: `<J t, J t> = <J^T J t, t>` on some samples."""
        generator = torch.Generator().manual_seed(0)
        chosen = [self._state[name] for name in self._chosen]
        kinds = [torch.complex64 if p.is_complex() else torch.float32 for p in chosen]
        drawn = [torch.randn(p.shape, generator=generator, dtype=kind) for p, kind in zip(chosen, kinds, strict=True)]
        tangents = [t.to(p.device, p.dtype) for t, p in zip(drawn, chosen, strict=True)]
        reasons = []
        for forward_mode in (True, False) if self._forward_mode else (False,):
            self._forward_mode = forward_mode
            try:
                jt = self._times(part, tangents)
            except (NotImplementedError, RuntimeError) as error:
                reasons.append(f"{self.mode}: {first_line(error)}")
                continue
            with torch.enable_grad():
                leaves = self._leaves()
                back = _grad(self._run(leaves, part), list(leaves.values()), jt, retain=False)
            there = float(jt.double().square().sum())
            here = sum(float(inner(_wide(g), _wide(t))) for g, t in zip(back, tangents, strict=True))
            if not abs(there - here) > self._rounding**0.5 * max(abs(there), abs(here)):
                return  # also where they overflow, which results show
            reasons.append(f"{self.mode}: |J t|^2 = {there:.6g}, but <J^T J t, t> = {here:.6g}")
        raise ValueError(
            "Products with this model's Jacobian cannot be computed: neither forward mode nor a double backward pass "
            f"agrees with its backward pass ({'; '.join(reasons)})."
        )

    def _saved_bytes(self) -> list[int]:
        """Return what the passes over 1 and over 2 samples keep for backward passes, beside the parameters."""
        found = []
        for count in (1, 2):
            part = self.batch[:count]
            with torch.enable_grad(), saved_bytes(self._state.values()) as saved:
                if self._forward_mode:
                    kept = self._run(self._leaves(), part)
                else:
                    kept = self._times(part, [torch.zeros_like(self._state[name]) for name in self._chosen])
            found.append(sum(saved.values()))
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


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products, of real and imaginary parts each."""
    return (a.conj() * b).real.sum() if a.is_complex() else (a * b).sum()


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _grad(f: Tensor, leaves: list[Tensor], v: Tensor, *, retain: bool) -> list[Tensor]:
    grads = torch.autograd.grad(f, leaves, v, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)]
