"""The residual networks of the phase diagrams, for many scales and inputs at once.

`h_0 = A x`, `h_{n+1} = h_n + L^-beta B_n(h_n)`, a scalar read-out and the loss `(out - target)^2`. Scales and
inputs are columns of one matrix per layer, so that a layer is two matrix products forward and two backward, in float32.

Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929, whose experiments have these networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.scaling.phases.travel import Step, Travel, travel
from abyssal.weights.families import Family

__all__ = [
    "FEATURES",
    "NETWORKS",
    "Model",
    "Network",
    "Passes",
    "Res1",
    "Res3",
    "draw_ends",
    "draw_model",
    "network_named",
    "pass_through",
]

FEATURES = 64  # of an input, uniform on [0, 1]
_MASK_BYTES = 2**28  # for the signs of one chunk of columns at all depths


@dataclass(frozen=True)
class Model:
    """One random network and its inputs.

    Attributes:
        weights: what the residual branches have, by depth. [layers, matrices, width, width], float32
        starts: the first states, a column per input. [width, inputs], float32
        readout: the gradient of the output by the last state. [width], float32
    """

    weights: Tensor
    starts: Tensor
    readout: Tensor


@dataclass(frozen=True)
class Passes:
    """How far states travelled forward, and gradients backward.

    Attributes:
        hidden: |h_L - h_0| / |h_0| and |h_L| / |h_0|, as logarithms.
        gradient: |g_L - g_0| / |g_L| and |g_0| / |g_L|, as logarithms; None where not asked for.
    """

    hidden: Travel
    gradient: Travel | None


class Network:
    """A law of residual branches, `V relu(h)` or `V relu(W h)`: positively homogeneous, `B(c h) = c B(h)` for c > 0."""

    name: str
    matrices: int  # per layer: V, or V and W

    def growth(self, weights: Tensor) -> float:
        """Return a bound on |B_l(h)| / |h| over all layers: the largest product of a layer's Frobenius norms.

        Args:
            weights: of all layers. [layers, matrices, width, width]
        """
        return float(weights.flatten(2).norm(dim=2).prod(dim=1).max())

    def forward(self, weights: Tensor, masks: Tensor | None, columns: int) -> Step:
        """Return the step that adds a layer's branch, and leaves in `masks` where its relu was open.

        Args:
            weights: of all layers. [layers, matrices, width, width]
            masks: filled where given. [layers, width, columns], bool
            columns: of the states.
        """
        outer, *inner = (weights[:, n].unbind() for n in range(self.matrices))
        open_part = weights.new_empty(weights.shape[-1], columns)

        def step(layer: int, state: Tensor, total: Tensor) -> None:
            if inner:
                torch.mm(inner[0][layer], state, out=open_part).relu_()
            else:
                torch.clamp(state, min=0, out=open_part)
            if masks is not None:
                masks[layer].copy_(open_part)  # to bool, by being nonzero: four times faster than comparing
            total.addmm_(outer[layer], open_part)

        return step

    def backward(self, weights: Tensor, masks: Tensor) -> Step:
        """Return the step that adds a layer's transposed Jacobian times the columns; its layer 0 is the last one."""
        outer, *inner = (weights[:, n].mT.unbind()[::-1] for n in range(self.matrices))
        bytes_ = masks.view(torch.int8).unbind()[::-1]  # copied to float far faster than bool is
        product, mask = weights.new_empty(masks.shape[1:]), weights.new_empty(masks.shape[1:])

        def step(layer: int, state: Tensor, total: Tensor) -> None:
            torch.mm(outer[layer], state, out=product)
            mask.copy_(bytes_[layer])
            if inner:
                total.addmm_(inner[0][layer], product.mul_(mask))
            else:
                total.addcmul_(product, mask)

        return step


class Res1(Network):
    """`B(h) = V relu(h)`."""

    name, matrices = "res1", 1


class Res3(Network):
    """`B(h) = V relu(W h)`."""

    name, matrices = "res3", 2


NETWORKS: dict[str, Network] = {network.name: network for network in (Res1(), Res3())}


def network_named(name: str) -> Network:
    """Return a network by its name.

    Raises:
        ValueError: for another name.
    """
    if name not in NETWORKS:
        raise ValueError(f"There is no network {name!r}. Known: {', '.join(NETWORKS)}, or a factory of your own.")
    return NETWORKS[name]


def draw_model(
    network: Network, family: Family, depth: int, width: int, inputs: int, seed: int, ends_seed: int | None = None
) -> Model:
    """Draw a network and its inputs.

    Args:
        network: says how many matrices a layer has.
        family: the law of a weight as a path through depth; entries are independent, of variance 1/width.
        depth: number of layers.
        width: of the states.
        inputs: how many, each uniform on [0, 1]^64.
        seed: of the residual weights.
        ends_seed: of inputs, embedding and read-out; None is `seed`, too.
    """
    generator = torch.Generator()
    starts, readout = draw_ends(width, inputs, generator.manual_seed(seed if ends_seed is None else ends_seed))
    if ends_seed is not None:
        generator.manual_seed(seed)
    paths = family.sample(depth, network.matrices * width**2, generator).div_(math.sqrt(width))
    return Model(paths.view(depth, network.matrices, width, width), starts, readout)


def draw_ends(width: int, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw first states `A x` [width, inputs] and the read-out [width], of uniform weights of variance 1/fan_in."""
    embedding = torch.empty(width, FEATURES).uniform_(-1, 1, generator=generator).mul_(math.sqrt(3 / FEATURES))
    readout = torch.empty(width).uniform_(-1, 1, generator=generator).mul_(math.sqrt(3 / width))
    return embedding @ torch.rand(FEATURES, inputs, generator=generator), readout


def pass_through(network: Network, model: Model, betas: Sequence[float], gradients: bool = True) -> Passes:
    """Send the inputs through the network once for each beta, and the loss's gradient back.

    The loss's gradient by the last state is the read-out times a number, and that number cancels in both metrics of
    the gradient: neither output nor target matters.

    Args:
        network: the law of the branches.
        model: one draw of it.
        betas: exponents of the scale `L^-beta`.
        gradients: whether to go back, too.

    Returns:
        The metrics. [betas, inputs]
    """
    depth, _, width, _ = model.weights.shape
    inputs = model.starts.shape[1]
    log_scales = -torch.tensor(betas, dtype=torch.float64) * math.log(depth)
    growth = network.growth(model.weights)
    ends = model.readout[:, None].expand(-1, inputs).contiguous()
    chunk = max(1, _MASK_BYTES // (depth * width * inputs)) if gradients else len(betas)
    hidden, gradient = [], []
    for part in log_scales.split(chunk):
        columns = len(part) * inputs
        masks = torch.empty(depth, width, columns, dtype=torch.bool) if gradients else None
        step = network.forward(model.weights, masks, columns)
        hidden.append(travel(model.starts, part, depth, step, growth))
        if masks is not None:
            gradient.append(travel(ends, part, depth, network.backward(model.weights, masks), growth))
    return Passes(_joined(hidden), _joined(gradient) if gradients else None)


def _joined(parts: list[Travel]) -> Travel:
    return Travel(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("change", "ratio", "active")),
    )
