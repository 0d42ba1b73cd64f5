"""Many small networks of the neural tangent hierarchy at once: kernels, K3, K4, seeds side by side.

`abyssal.tangent` does this for any module, one at a time. The two networks of the theory, `LiLuoYipResNet` and
`FullyConnectedNTK`, are simple enough to write their derivatives out, and a study of them wants every width with many
seeds. Layer l maps `h[l-1]` to `h[l] = skip h[l-1] + k s(u[l])`, `u[l] = W[l] h[l-1]`, and `f = a . h[L]`; `q[l]` is
the gradient of f by `u[l]`, so that `grad_{W[l]} f = q[l] h[l-1]^T` has rank one, and a step along it costs vectors,
not matrices. That is what makes K3 and K4 cheap here: O(n^2 m^2) and O(n^3 m^2) per layer, all directions in one
product.

Sources: SCIENCE 3; Huang and Yau, arXiv 1909.08156, for the hierarchy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from abyssal.nn import FullyConnectedNTK, LiLuoYipResNet
from abyssal.nn.lly import DenseBranch
from abyssal.nn.stack import ResidualStack
from abyssal.util.checks import one_of

__all__ = ["NETWORKS", "Networks", "build", "higher_kernels"]

NETWORKS = {"resnet": "residual (Li, Luo, Yip)", "plain": "fully connected (Huang, Yau)"}
_BYTES = 96 << 20  # of the largest array of second derivatives at a time


def _tanh(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = torch.tanh(u)
    first = 1 - t * t
    return t, first, -2 * t * first, first * (6 * t * t - 2)


def _sin(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, c = torch.sin(u), torch.cos(u)
    return s, c, -s, -c


def _erf(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = 2 / math.sqrt(math.pi) * torch.exp(-u * u)
    return torch.erf(u), first, -2 * u * first, (4 * u * u - 2) * first


def _relu(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = (u > 0).to(u.dtype)
    return u * first, first, torch.zeros_like(u), torch.zeros_like(u)


# s and its first three derivatives; relu's kink has no second one, so only kernels and flows of it mean anything.
_DERIVATIVES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "tanh": _tanh, "sin": _sin, "erf": _erf, "relu": _relu,
}  # fmt: skip


@dataclass
class Networks:
    """Networks of one shape with different weights.

    Attributes:
        weights: of each layer. [seeds, width, in_features], then [seeds, width, width]
        output: a. [seeds, width]
        skips: what each layer keeps of its input: 0 for the first one. [layers]
        gains: k, the factor of each layer's activation. [layers]
        activation: s, by name.
        beside: for each layer, P [seeds, r, width] and H [seeds, r, in] of a sum of outer products `P^T H` that its
            weight stands for besides itself; empty for none. Kernels and flows leave them alone.
    """

    weights: list[Tensor]
    output: Tensor
    skips: tuple[float, ...]
    gains: tuple[float, ...]
    activation: str = "tanh"
    beside: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, modules: Sequence[nn.Module], activation: str, dtype: torch.dtype = torch.float64) -> Networks:
        """Take the weights of modules of one shape, `LiLuoYipResNet` or `FullyConnectedNTK`, in a type."""
        parts = [_parts(module) for module in modules]
        weights = [torch.stack([p[0][i] for p in parts]).to(dtype) for i in range(len(parts[0][0]))]
        return cls(weights, torch.stack([p[1] for p in parts]).to(dtype), parts[0][2], parts[0][3], activation)

    def __len__(self) -> int:
        return len(self.output)

    def __getitem__(self, which: slice) -> Networks:
        return replace(self, weights=[weight[which] for weight in self.weights], output=self.output[which])

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return `h[0..L]` and `u[1..L]`, each [seeds, n, width]; `h[0]` are the samples themselves.

        Args:
            x: samples [n, in_features], or each seed's own, [seeds, n, in_features].
        """
        s = _DERIVATIVES[self.activation]
        h, states, before = x.to(self.output.dtype).expand(len(self), *x.shape[-2:]), [], []
        for i, (weight, skip, gain) in enumerate(zip(self.weights, self.skips, self.gains, strict=True)):
            states.append(h)
            u = h @ weight.mT
            if self.beside:
                push, other = self.beside[i]
                u.baddbmm_(h @ other.mT, push)
            before.append(u)
            new = gain * s(u)[0]
            h = new + skip * h if skip else new
        return [*states, h], before

    def backward(self, before: Sequence[Tensor]) -> list[Tensor]:
        """Return `q[1..L]`, f's gradients by u: each [seeds, n, width]."""
        s, p = _DERIVATIVES[self.activation], self.output[:, None, :]
        found: list[Tensor] = []
        for i in reversed(range(len(self.weights))):
            q = self.gains[i] * s(before[i])[1] * p
            found.append(q)
            if i:
                new = q @ self.weights[i]
                if self.beside:
                    push, other = self.beside[i]
                    new.baddbmm_(q @ push.mT, other)
                p = new + self.skips[i] * p if self.skips[i] else new
        return found[::-1]

    def outputs(self, x: Tensor) -> Tensor:
        """Return f for samples [n, in_features]: [seeds, n]."""
        return torch.einsum("snm,sm->sn", self.forward(x)[0][-1], self.output)

    def kernel(self, x: Tensor) -> Tensor:
        """Return the tangent kernels of samples [n, in_features]: [seeds, n, n]."""
        states, before = self.forward(x)
        return _kernel(states, self.backward(before))


def build(
    network: str,
    width: int,
    depth: int,
    in_features: int,
    seeds: Sequence[int],
    activation: str = "tanh",
    c_res: float = 1.0,
) -> Networks:
    """Draw networks, each as its module is drawn from a generator of that seed.

    Args:
        network: "resnet" or "plain".
        width: m.
        depth: L, the first layer counted.
        in_features: length of a sample.
        seeds: one for each network.
        activation: "tanh", "sin", "erf" or "relu".
        c_res: strength of the residual branches; ignored for "plain".

    Raises:
        ValueError: for another network or activation.
    """
    one_of("network", network, NETWORKS)
    one_of("activation", activation, _DERIVATIVES)
    modules: list[nn.Module] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        if network == "resnet":
            modules.append(LiLuoYipResNet(in_features, width, depth, c_res, activation, generator=generator))
        else:
            modules.append(FullyConnectedNTK(in_features, width, depth, activation, generator=generator))
    return Networks.of(modules, activation)


def _parts(module: nn.Module) -> tuple[list[Tensor], Tensor, tuple[float, ...], tuple[float, ...]]:
    """Return weights, a, skips and gains of one module."""
    assert isinstance(module, LiLuoYipResNet | FullyConnectedNTK)
    body = module.body
    branches = [branch for branch in body.modules() if isinstance(branch, DenseBranch)]
    scale = body.scale if isinstance(body, ResidualStack) else 1.0
    assert isinstance(scale, float)
    weights = [module.first.linear.weight.detach(), *(branch.linear.weight.detach() for branch in branches)]
    skip = 1.0 if isinstance(body, ResidualStack) else 0.0
    gains = (module.first.gain, *(scale * branch.gain for branch in branches))
    return weights, module.output.weight.detach()[0], (0.0, *[skip] * len(branches)), gains


def _kernel(states: Sequence[Tensor], q: Sequence[Tensor]) -> Tensor:
    kernel = states[-1] @ states[-1].mT
    for h, delta in zip(states, q, strict=False):
        kernel = kernel + (delta @ delta.mT) * (h @ h.mT)
    return kernel


# ---------------------------------------------------------------------- K3 and K4


def higher_kernels(networks: Networks, x: Tensor, order: int = 4) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return K2, K3 and K4 of the hierarchy.

    `K[r+1](x_1..x_r, x_b) = <grad K[r](x_1..x_r), grad f(x_b)>`. The last index is the newest direction.

    Args:
        networks: of a smooth activation.
        x: samples, [n, in_features] or [seeds, n, in_features].
        order: 3 leaves K4 out.

    Returns:
        K2 [seeds, n, n], K3 [seeds, n, n, n], K4 [seeds, n, n, n, n] or None.
    """
    if networks.activation == "relu":
        raise ValueError("K3 and K4 need a smooth activation; relu has no second derivative at its kink.")
    n, width = x.shape[-2], networks.output.shape[1]
    at_once = max(1, _BYTES // (len(networks.weights) * n**3 * width * networks.output.element_size()))
    chunks = [slice(i, i + at_once) for i in range(0, len(networks), at_once)]
    parts = [_of_some(networks[chunk], x[chunk] if x.ndim == 3 else x, order) for chunk in chunks]
    second, third = (torch.cat(list(found)) for found in list(zip(*parts, strict=True))[:2])
    fourth = [part[2] for part in parts if part[2] is not None]
    return second, third, torch.cat(fourth) if fourth else None


def _of_some(networks: Networks, x: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor | None]:
    states, before = networks.forward(x)
    q = networks.backward(before)
    layers = [_Layer(weight, skip, gain, h, delta, *_DERIVATIVES[networks.activation](u))
              for weight, skip, gain, h, delta, u in zip(
                  networks.weights, networks.skips, networks.gains, states, q, before, strict=False)]  # fmt: skip
    last = _first_derivatives(layers, states[-1], networks.output)
    second = _kernel(states, q)
    third = _both(_dot(last, states[-1]))
    for layer in layers:
        third = third + layer.dQ * layer.H[..., None] + layer.Q[..., None] * layer.dH
    return second, third, _second_derivatives(layers, states[-1], last, networks.output) if order >= 4 else None


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Products of [s, a, c.., m] with [s, b, m] over m: [s, a, b, c..]."""
    flat = first.flatten(2, -2) if first.ndim > 3 else first[:, :, None]
    found = torch.einsum("saem,sbm->sabe", flat, second)
    return found.unflatten(3, first.shape[2:-1])


def _both(product: Tensor) -> Tensor:
    """Add what exchanging the first two samples gives."""
    return product + product.transpose(1, 2)


@dataclass
class _Layer:
    """One layer: value, and what the passes of higher derivatives leave behind for one another.

    `dh[a, c]` is the derivative of sample a's h along sample c's gradient of f; `du`, `dq`, `dp` likewise.
    """

    weight: Tensor
    skip: float
    gain: float
    h: Tensor
    q: Tensor
    s0: Tensor
    s1: Tensor
    s2: Tensor
    s3: Tensor

    def __post_init__(self) -> None:
        self.H, self.Q = self.h @ self.h.mT, self.q @ self.q.mT  # [s, n, n]
        self.dh = self.du = self.dq = self.dp = self.dH = self.dQ = self.ddH = self.ddu = self.p = torch.empty(0)

    def onward(self, new: Tensor, old: Tensor) -> Tensor:
        return new + self.skip * old if self.skip else new


def _first_derivatives(layers: Sequence[_Layer], h_last: Tensor, output: Tensor) -> Tensor:
    """Fill in each layer's first derivatives; return the last state's, [s, a, c, m]."""
    dh = torch.zeros(*layers[0].h.shape[:2], *layers[0].h.shape[1:], dtype=output.dtype)
    for layer in layers:
        layer.dh = dh
        layer.du = torch.einsum("sac,scm->sacm", layer.H, layer.q)
        if layer is not layers[0]:  # the input does not move
            layer.du = layer.du + dh @ layer.weight.mT[:, None]
        new = layer.gain * layer.s1[:, :, None] * layer.du
        dh = layer.onward(new, dh) if layer.skip else new
        layer.dH = _both(_dot(layer.dh, layer.h))
    p = output[:, None, :].expand(-1, h_last.shape[1], -1)
    dp = h_last[:, None].expand(-1, h_last.shape[1], -1, -1)  # a moves by h of sample c, whoever a is
    for layer in reversed(layers):
        layer.p, layer.dp = p, dp
        layer.dq = layer.gain * (layer.s2[:, :, None] * layer.du * p[:, :, None] + layer.s1[:, :, None] * dp)
        layer.dQ = _both(_dot(layer.dq, layer.q))
        if layer is not layers[0]:
            p = layer.onward(layer.q @ layer.weight, p)
            new = layer.dq @ layer.weight[:, None] + torch.einsum("sac,scm->sacm", layer.Q, layer.h)
            dp = layer.onward(new, dp)
    return dh


def _second_derivatives(layers: Sequence[_Layer], h_last: Tensor, dh_last: Tensor, output: Tensor) -> Tensor:
    """Return K4, [s, a, b, c, d]: mixed derivatives along the gradients of c and, that done, of d.

    Weights move by `q_c h_c^T` along c, by `q_d h_d^T` along d, and in the mixed derivative by what d does to the
    first: `dq[c, d] h_c^T + q_c dh[c, d]^T`.
    """
    s, n, width = h_last.shape
    ddh = torch.zeros(s, n, n, n, layers[0].h.shape[2], dtype=output.dtype)
    for layer in layers:
        h, q = layer.h, layer.q
        cross = _dot(layer.dh, h)  # [s, a, c, d]: dh[a, d] . h_c
        layer.ddH = _dot(ddh, h)  # [s, a, b, c, d]
        ddu = torch.einsum("sacd,scm->sacdm", cross + cross.permute(0, 2, 1, 3), q)
        ddu += torch.einsum("sadc,sdm->sacdm", cross, q) + torch.einsum("sac,scdm->sacdm", layer.H, layer.dq)
        if layer is not layers[0]:
            ddu += (ddh.flatten(1, 3) @ layer.weight.mT).view(s, n, n, n, width)
        layer.ddu = ddu
        new = layer.s1[:, :, None, None] * ddu
        new += layer.s2[:, :, None, None] * layer.du[:, :, :, None] * layer.du[:, :, None]
        ddh = layer.onward(layer.gain * new, ddh) if layer.skip else layer.gain * new
    fourth = _both(_dot(ddh, h_last) + torch.einsum("sacm,sbdm->sabcd", dh_last, dh_last))
    ddp = dh_last[:, None].expand(-1, n, -1, -1, -1)
    for layer in reversed(layers):
        ddq = _second_q(layer, ddp)
        ddQ = _both(_dot(ddq, layer.q) + torch.einsum("sacm,sbdm->sabcd", layer.dq, layer.dq))
        ddH = _both(layer.ddH + torch.einsum("sacm,sbdm->sabcd", layer.dh, layer.dh))
        fourth += ddQ * layer.H[..., None, None] + layer.Q[..., None, None] * ddH
        fourth += layer.dQ[..., None] * layer.dH[..., None, :] + layer.dQ[..., None, :] * layer.dH[..., None]
        layer.ddu = layer.ddH = torch.empty(0)
        if layer is not layers[0]:
            cross = _dot(layer.dq, layer.q)  # [s, a, c, d]: dq[a, d] . q_c
            new = (ddq.flatten(1, 3) @ layer.weight).view(s, n, n, n, width)
            new += torch.einsum("sacd,scm->sacdm", cross + cross.permute(0, 2, 1, 3), layer.h)
            new += torch.einsum("sadc,sdm->sacdm", cross, layer.h)
            new += torch.einsum("sac,scdm->sacdm", layer.Q, layer.dh)
            ddp = layer.onward(new, ddp)
    return fourth


def _second_q(layer: _Layer, ddp: Tensor) -> Tensor:
    """Mixed derivative of `q = k s'(u) p`: [s, a, c, d, m]."""
    du, dp, p = layer.du, layer.dp, layer.p[:, :, None, None]
    s1, s2, s3 = (part[:, :, None, None] for part in (layer.s1, layer.s2, layer.s3))
    found = s3 * p * du[:, :, :, None] * du[:, :, None]
    found += s2 * (p * layer.ddu + du[:, :, :, None] * dp[:, :, None] + du[:, :, None] * dp[:, :, :, None])
    found += s1 * ddp
    return layer.gain * found
