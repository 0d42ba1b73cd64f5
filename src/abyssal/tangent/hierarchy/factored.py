"""Gradients of single samples, kept as factors where the model allows.

The gradient of an output with respect to a dense layer's weight is `sum_s delta_s x_s^T` over the layer's uses s: an
outer product of what came in and of the derivative with respect to what went out. Inner products of such gradients need
the factors only, `(delta . delta')(x . x')`, and so does a step along one: `x W'^T = sum_s (x . x_s) delta_s`. The
gradients of all other parameters are kept as they are ("dense" here).

The model is watched and moved by forward hooks on its `nn.Linear` modules, present only while it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from abyssal.tangent.hierarchy.pure import PureModel, differentiable_kernels
from abyssal.tangent.subject import refuse_mixing_modes

__all__ = ["Directions", "FactoredModel", "Features", "gram", "outer_products"]


class Features(NamedTuple):
    """Outputs and gradients of some samples; with one more dimension in front, a batch of tangents of them.

    Attributes:
        outputs: [n, k]
        inputs: of each factored layer, what came in at each of its uses. [n, uses, in]
        cotangents: of each factored layer, the derivative of the outputs with respect to what went out.
            [n, k, uses, out]
        dense: the gradient with respect to every other parameter, by name. [n, k, ...]
        shift: the gradient with respect to the step along each direction; empty without directions. [n, k, N]
    """

    outputs: Tensor
    inputs: list[Tensor]
    cotangents: list[Tensor]
    dense: dict[str, Tensor]
    shift: Tensor


class Directions(NamedTuple):
    """Directions in parameter space, by which factored layers can be moved: the gradients of N = n k outputs.

    Attributes:
        inputs: as in :class:`Features`. [n, uses, in] each
        cotangents: the same. [n, k, uses, out] each
    """

    inputs: list[Tensor]
    cotangents: list[Tensor]


@dataclass(frozen=True)
class Site:
    """A dense layer whose gradients are kept as factors.

    Attributes:
        name: of the module.
        weight: whether its weight is trained.
        bias: whether its bias is.
        shapes: of what goes out at each of its calls, for one sample.
    """

    name: str
    weight: bool
    bias: bool
    shapes: list[torch.Size] = field(default_factory=list)

    @property
    def parameters(self) -> list[str]:
        """Names of its trained parameters."""
        kinds = [kind for kind, trained in (("weight", self.weight), ("bias", self.bias)) if trained]
        return [f"{self.name}.{kind}" if self.name else kind for kind in kinds]


@dataclass
class _Run:
    """One evaluation of one sample: what the hooks read and write."""

    taps: list[list[Tensor]]
    shift: Tensor | None
    directions: Directions | None
    inputs: list[list[Tensor]]


class FactoredModel:
    """A model whose gradients are kept as factors for the dense layers where that is cheaper.

    Args:
        pure: the model and its samples.
        factored: False keeps every gradient as it is (all by `torch.func`).

    Attributes:
        sites: the layers kept as factors.
        dense_size: number of the other trained parameters.
    """

    def __init__(self, pure: PureModel, factored: bool = True) -> None:
        self.pure = pure
        self._run: _Run | None = None
        self._is_running = False
        self.sites: list[Site] = []
        if factored:
            sites = _candidates(pure)
            run = _Run([], None, None, [[] for _ in sites])  # in which the hooks note shapes
            with self._hooked(sites), torch.no_grad(), differentiable_kernels(), self._noted(run):
                pure.one(pure.parameters, [leaf[0] for leaf in pure.leaves])
            self.sites = [site for site in sites if _pays(pure, site)]
            wrong = self._wrong_sites()
            self.sites = [site for site in self.sites if site.name not in wrong]
        self.dense_size = sum(pure.parameters[name].numel() for name in self.dense_names)

    @property
    def dense_names(self) -> list[str]:
        """Names of the parameters whose gradients are kept as they are."""
        factored = {name for site in self.sites for name in site.parameters}
        return [name for name in self.pure.parameters if name not in factored]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make the model ready to be differentiated; leave it as it was."""
        refuse_mixing_modes(self.pure.model)  # it is the caller's, who may have put it into another since
        if self._is_running:  # within itself: the hooks are there already
            yield
            return
        self._is_running = True
        try:
            with self._hooked(self.sites), differentiable_kernels(self.pure.composed):
                yield
        finally:
            self._is_running = False

    def features(
        self,
        parameters: dict[str, Tensor],
        leaves: list[Tensor],
        *,
        shift: Tensor | None = None,
        directions: Directions | None = None,
        taps: bool = True,
    ) -> Features:
        """Return outputs and gradients of samples, differentiably; call within `running()`.

        Args:
            parameters: all trained ones by name. The dense ones may carry tangents.
            leaves: the samples' tensors. [n, ...]
            shift: how far the factored layers are moved along each direction. [N]
            directions: which those are.
            taps: whether the factored layers' cotangents are wanted.
        """
        still = {name: p for name, p in parameters.items() if name not in self.dense_names}
        moving = {name: parameters[name] for name in self.dense_names}
        like = next(iter(parameters.values()))
        zeros = [[like.new_zeros(shape) for shape in site.shapes] for site in self.sites] if taps else []
        start = like.new_zeros(0) if shift is None else shift

        def sample(*leaf: Tensor) -> Features:
            """Return one sample's outputs and gradients."""

            def value(dense: dict[str, Tensor], taps: list[list[Tensor]], shift: Tensor) -> tuple[Tensor, Any]:
                run = _Run(taps, shift if directions else None, directions, [[] for _ in self.sites])
                with self._noted(run):
                    found = self.pure.one(still | dense, list(leaf))
                return found, [torch.cat(x) for x in run.inputs]

            outputs, pull, inputs = vjp(value, moving, zeros, start, has_aux=True)  # type: ignore[misc]
            if self.pure.k == 1:  # spares a level of vmap
                dense, tapped, moved = pull(torch.ones_like(outputs))
                dense, moved = {name: g[None] for name, g in dense.items()}, moved[None]
                tapped = [[t[None] for t in calls] for calls in tapped]
            else:
                dense, tapped, moved = vmap(pull)(torch.eye(self.pure.k, dtype=outputs.dtype, device=outputs.device))
            cotangents = [torch.cat([t.flatten(1, -2) for t in calls], 1) for calls in tapped]
            return Features(outputs, inputs if taps else [], cotangents, dense, moved)

        return vmap(sample)(*leaves)

    @contextmanager
    def _hooked(self, sites: list[Site]) -> Iterator[None]:
        modules = dict(self.pure.model.named_modules())
        handles = []
        try:
            for index, site in enumerate(sites):
                hook = _Hook(self, index, site)
                handles.append(modules[site.name].register_forward_hook(hook, prepend=True, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _noted(self, run: _Run) -> Iterator[None]:
        """Let the hooks read and write a run."""
        self._run = run
        try:
            yield
        finally:
            self._run = None

    def _wrong_sites(self) -> set[str]:
        """Names of layers whose factors do not give their gradient: their parameters have another use, too."""
        if not self.sites:
            return set()
        first = self.pure.samples(slice(0, 1))
        with self.running():
            ours = self.features(self.pure.parameters, first)
        theirs = FactoredModel(self.pure, factored=False)
        with theirs.running():
            truth = theirs.features(self.pure.parameters, first).dense
        wrong = set()
        for site, x, delta in zip(self.sites, ours.inputs, ours.cotangents, strict=True):
            for name in site.parameters:
                found = delta.sum(-2) if name.endswith("bias") else torch.einsum("nkso,nsi->nkoi", delta, x)
                allowed = torch.finfo(found.dtype).eps ** 0.5 * truth[name].abs().max()
                if (found - truth[name]).abs().max() > allowed:
                    wrong.add(site.name)
        return wrong


class _Hook:
    """Watches one layer, and adds to what it returns."""

    def __init__(self, owner: FactoredModel, index: int, site: Site) -> None:
        self.owner, self.index, self.site = owner, index, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        run = self.owner._run
        if run is None:
            return output
        x = args[0] if args else kwargs["input"]
        flat = x.reshape(-1, x.shape[-1])
        call = len(run.inputs[self.index])
        run.inputs[self.index].append(flat)
        if run.shift is None and not run.taps:
            self.site.shapes.append(output.shape)  # the first, plain run
            return output
        if run.taps:
            output = output + run.taps[self.index][call]
        if run.shift is not None and run.directions is not None:
            moved = self._moved(flat, run.shift, run.directions)
            output = output + moved.reshape(output.shape)
        return output

    def _moved(self, x: Tensor, shift: Tensor, directions: Directions) -> Tensor:
        """Return `x` through the layer's weight and bias, moved by `sum_b shift_b direction_b`. [s, out]."""
        inputs, cotangents = directions.inputs[self.index], directions.cotangents[self.index]
        n, k, uses, out = cotangents.shape
        weight = (x @ inputs.reshape(n * uses, -1).T).reshape(-1, n, 1, uses) * float(self.site.weight)
        amounts = (weight + float(self.site.bias)) * shift.reshape(n, k, 1)
        return amounts.reshape(-1, n * k * uses) @ cotangents.reshape(n * k * uses, out)


def gram(a: Features, b: Features, sites: list[Site]) -> Tensor:
    """Return the inner products of two sets of gradients. [n_a, k, n_b, k].

    Args:
        a: of n_a samples.
        b: of n_b samples.
        sites: the layers whose factors they hold.
    """
    k = a.outputs.shape[1]
    found = a.outputs.new_zeros(len(a.outputs), k, len(b.outputs), k)
    for site, x, delta, x_b, delta_b in zip(sites, a.inputs, a.cotangents, b.inputs, b.cotangents, strict=True):
        found = found + outer_products(site, x[None], delta[None], x_b[None], delta_b[None], site.bias)[0, :, :, 0]
    for name, g in a.dense.items():
        found = found + torch.einsum("akp,blp->akbl", g.flatten(2), b.dense[name].flatten(2))
    return found


def outer_products(site: Site, x: Tensor, delta: Tensor, x_b: Tensor, delta_b: Tensor, bias: bool) -> Tensor:
    """Return the inner products of gradients that are outer products. [c, n_a, k, d, n_b, k].

    Args:
        site: the layer.
        x: what came in, in c ways. [c, n_a, uses, in]
        delta: the derivative with respect to what went out. [c, n_a, k, uses, out]
        x_b: as `x`, of the others. [d, n_b, uses, in]
        delta_b: as `delta`, of the others. [d, n_b, k, uses, out]
        bias: whether the bias's gradients, which are the deltas themselves, are counted.
    """
    products = torch.einsum("casi,dbti->casdbt", x, x_b) * float(site.weight) + float(bias)
    if x.shape[2] == 1:
        outer = torch.einsum("cako,dblo->cakdbl", delta[..., 0, :], delta_b[..., 0, :])
        return outer * products[:, :, None, 0, :, :, None, 0]
    return torch.einsum("casdbt,cakso,dblto->cakdbl", products, delta, delta_b)


def _candidates(pure: PureModel) -> list[Site]:
    """Return the plain `nn.Linear` modules with a trained parameter of their own."""
    owners = Counter(id(p) for _, p in pure.model.named_parameters(remove_duplicate=False))
    sites = []
    for name, module in pure.model.named_modules():
        if type(module).forward is not nn.Linear.forward or "weight" not in module._parameters:
            continue
        own = [p for p in module._parameters.values() if p is not None]
        trained = {kind: p is not None and p.requires_grad for kind, p in module._parameters.items()}
        if any(trained.values()) and all(owners[id(p)] == 1 for p in own):
            sites.append(Site(name, trained["weight"], trained.get("bias", False)))
    return sites


def _pays(pure: PureModel, site: Site) -> bool:
    """Say whether factors are smaller than the gradient: for s uses, 2 s^2 (in + out) against in x out numbers."""
    if not site.shapes:
        return False
    out, width = pure.model.get_submodule(site.name).weight.shape  # type: ignore[misc]
    uses = sum(shape.numel() // out for shape in site.shapes)
    return 2 * uses**2 * (width + out) <= width * out
