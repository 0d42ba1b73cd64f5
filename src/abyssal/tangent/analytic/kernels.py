"""Kernels of infinitely wide networks: the Gaussian process they are at initialisation, and their tangent kernel.

All are in the tangent parameterisation: weights and biases are standard normal and trained, and
`D(u) = w_std / sqrt(fan_in) W u + b_std b`. As widths grow, the outputs of different units become independent Gaussian
processes with kernel K (NNGP: Neal 1994; Lee et al. 2018), and the sum over parameters of products of derivatives
becomes the deterministic kernel T (NTK: Jacot, Gabriel, Hongler 2018). Through a dense layer, an activation and a
sum of independent branches,

    D:  K -> w_std^2 K + b_std^2,    T -> w_std^2 T + (w_std^2 K + b_std^2)
    s:  K -> E[s(u) s(v)],           T -> T E[s'(u) s'(v)],    (u, v) ~ N(0, K)
    +:  K -> K + K_branch,           T -> T + T_branch.

Every kernel here is a composition of these three, in float64. Signals that are not centred (the skips of branch
"lly" start behind an activation) carry their means as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abyssal.tangent.analytic.dual import Activation, Erf, Relu
from abyssal.tangent.analytic.pairs import Pairs
from abyssal.tangent.analytic.quadrature import Function, Quadrature, activation_of
from abyssal.tangent.batch import cut
from abyssal.util.checks import one_of, whole

__all__ = ["Erf", "Quadrature", "Relu", "fully_connected", "residual", "resntk"]

Branch = Literal["pre", "two", "lly"]
Form = Literal["dense", "huang-yau"]
Hyperparameter = float | Tensor
_PAIRS_AT_ONCE = 16_384  # keeps a layer's numbers in the cache


@dataclass(frozen=True)
class _Signal:
    """What is known of a layer's signals: second moments [N], means [N] (None is 0), pairs, tangent kernel [P]."""

    q: Tensor
    mean: Tensor | None
    pairs: Pairs
    tangent: Tensor


Network = Callable[[_Signal], _Signal]


def residual(
    x1: Tensor,
    x2: Tensor | None = None,
    depth: int = 64,
    activation: str | Function | Activation = "relu",
    alpha: Hyperparameter = 1.0,
    w_std: Hyperparameter | None = None,
    b_std: Hyperparameter | None = None,
    branch: Branch = "pre",
) -> tuple[Tensor, Tensor]:
    """Return the NNGP and tangent kernels of an infinitely wide residual network.

    - "pre": `h_0 = D(x)`; `h_l = h_(l-1) + alpha D_l(s(h_(l-1)))`, l = 1..depth; `f = D_out(s(h_depth))`.
    - "two": `h_0 = D(x)`; `h_l = h_(l-1) + alpha D_l2(s(D_l1(h_(l-1))))`; `f = D_out(h_depth)`.
    - "lly" (after Li, Luo, Yip, arXiv 2007.03714, form reconstructed): `x^1 = sqrt(c_s/m) s(W^1 x)`,
      `x^l = x^(l-1) + (alpha/depth) sqrt(c_s/m) s(W^l x^(l-1))`, l = 2..depth, `f = a . x^depth`, all entries standard
      normal, `c_s = 1 / E s(z)^2`. `alpha` is their c_res; layer 1 counts; the first product is not divided by d, so
      inputs are meant to have norm 1.

    Near-parallel and near-antipodal inputs keep their digits (see `pairs.py`). Derivatives with respect
    to inputs and hyperparameters are those of the formulas; where the ReLU tangent kernel has its kink (two different
    rows that are parallel or antipodal), that of the angle is taken as 0. With derivatives on, layers are recomputed
    in the backward pass, so that memory grows by five numbers per pair and layer.

    Args:
        x1: inputs, floating point. [n1, d]
        x2: more inputs; None is `x1` again, with an exactly symmetric result. [n2, d]
        depth: number of residual blocks, or of layers for "lly"; at least 1.
        activation: "relu" (max(u, 0)), "erf" (erf(u)), "tanh", "gelu" (with the error function), or a smooth
            elementwise function, which is integrated by `Quadrature` to 1e-12 per layer.
        alpha: multiplier of the branches; a tensor [depth] gives one for each block ("pre" and "two").
        w_std: of every dense layer; None is 1. Not for "lly".
        b_std: of every dense layer; None is 0. Not for "lly".
        branch: which of the three networks.

    Returns:
        NNGP and tangent kernel, [n1, n2] each, float64, on the inputs' device.

    Raises:
        TypeError: for inputs that are not floating-point tensors, or a depth that is not whole.
        ValueError: for other bad input, and where a kernel overflows.
    """
    depth = whole("depth", depth)
    one_of("branch", branch, get_args(Branch))
    s = activation_of(activation)
    scale = _hyperparameter("alpha", alpha, x1, None if branch == "lly" else depth)
    if branch == "lly":
        _refuse("lly", w_std, b_std)
        return _kernels(x1, x2, s, _standard(s, depth, scale / depth), 1.0)
    w2, b2 = _dense_variances(w_std, b_std, x1)

    def dense(h: _Signal) -> _Signal:
        return _dense(h, s, w2, b2)

    def behind(h: _Signal) -> _Signal:
        return dense(_active(h, s))

    def network(signal: _Signal) -> _Signal:
        signal = dense(signal)
        for factor in scale.square().expand(depth):

            def block(h: _Signal, factor: Tensor = factor) -> _Signal:
                return _sum(h, _times(behind(h if branch == "pre" else dense(h)), factor), s)

            signal = _layer(block, signal)
        return behind(signal) if branch == "pre" else dense(signal)

    return _kernels(x1, x2, s, network, None)


def fully_connected(
    x1: Tensor,
    x2: Tensor | None = None,
    depth: int = 3,
    activation: str | Function | Activation = "relu",
    w_std: Hyperparameter | None = None,
    b_std: Hyperparameter | None = None,
    form: Form = "dense",
) -> tuple[Tensor, Tensor]:
    """Return the NNGP and tangent kernels of an infinitely wide fully connected network, to compare with.

    - "dense": `h_1 = D(x)`, `h_(l+1) = D(s(h_l))`, `f = D_out(s(h_depth))`.
    - "huang-yau" (after arXiv 1909.08156, form reconstructed): `x^l = sqrt(c_s/m) s(W^l x^(l-1))`, l = 1..depth,
      `f = a . x^depth`, all entries standard normal, `c_s = 1 / E s(z)^2`; the first product is not divided by d.

    Args:
        x1: inputs. [n1, d]
        x2: more inputs; None is `x1` again. [n2, d]
        depth: number of hidden layers, at least 1.
        activation: as for :func:`residual`, as is what is raised.
        w_std: of every dense layer; None is 1. Only for "dense".
        b_std: of every dense layer; None is 0. Only for "dense".
        form: which of the two.

    Returns:
        NNGP and tangent kernel, [n1, n2] each, float64.
    """
    depth = whole("depth", depth)
    one_of("form", form, get_args(Form))
    s = activation_of(activation)
    if form == "huang-yau":
        _refuse("huang-yau", w_std, b_std)
        return _kernels(x1, x2, s, _standard(s, depth, None), 1.0)
    w2, b2 = _dense_variances(w_std, b_std, x1)

    def network(signal: _Signal) -> _Signal:
        signal = _dense(signal, s, w2, b2)
        for _ in range(depth):
            signal = _layer(lambda h: _dense(_active(h, s), s, w2, b2), signal)
        return signal

    return _kernels(x1, x2, s, network, None)


def resntk(cosine: Tensor, depth: int, alpha: Hyperparameter) -> Tensor:
    """Return the tangent kernel of ReLU residual networks on the sphere, normalised to 1 at cosine 1.

    The network: `x_0 = A x / sqrt(m)`, `x_l = x_(l-1) + alpha / sqrt(m) V_l relu(sqrt(2/m) W_l x_(l-1))`,
    `f = v . x_L`, standard normal entries, of which V and W are trained (after Huang, Wang, Tao, Zhao 2020, and Belfer,
    Geifman, Galun, Basri, arXiv 2104.03093; form reconstructed). With the arc-cosine kernels k_0, k_1 normalised to 1,
    every layer adds `alpha^2 (1 + alpha^2)^(L-1)` twice at cosine 1, so the kernel is divided by
    `2 L alpha^2 (1 + alpha^2)^(L-1)`.
    As alpha goes to 0 it goes to `(k_1(t) + t k_0(t)) / 2` for any depth.

    Args:
        cosine: of the angle between inputs, -1 to 1. [...]
        depth: number of residual blocks L, at least 1.
        alpha: the balance of branch and skip, positive. Of order 1 the kernel gets spiky with depth; of order
            1/sqrt(L) or less it keeps its shape.

    Returns:
        The kernel, float64. [...]

    Raises:
        TypeError: for cosines that are not a floating-point tensor.
        ValueError: for cosines beyond -1 and 1, a depth below 1, or an alpha that is not positive.
    """
    depth = whole("depth", depth)
    scale = _hyperparameter("alpha", alpha, cosine)
    if not bool(scale > 0):
        raise ValueError(f"resntk needs a positive alpha (at 0 the network is the identity), got {scale.tolist()}.")
    t = _checked_tensor("cosine", cosine).double()
    if bool((t.abs() > 1).any()):
        raise ValueError(f"Cosines have to be from -1 to 1, got {float(t.abs().max())} in size.")
    relu, share = Relu(), scale.square() / (1 + scale.square())
    flat, q = t.reshape(-1), torch.ones(1, dtype=torch.float64, device=t.device)
    index = torch.zeros_like(flat, dtype=torch.long)
    signal = _Signal(q, None, Pairs(index, index, flat, 1 - flat, 1 + flat), torch.zeros_like(flat))

    def block(h: _Signal) -> _Signal:
        branch = _dense(_active(_dense(h, relu, 2.0), relu), relu, 1.0)
        # Divided by 1 + alpha^2, the norm's growth, in every layer: (1 + alpha^2)^L may overflow.
        return _sum(_times(h, 1 - share), _times(branch, share), relu)

    for _ in range(depth):
        signal = _layer(block, signal)
    return (signal.tangent / (2 * depth * share)).reshape(t.shape)


def _standard(s: Activation, depth: int, step: Tensor | None) -> Network:
    """`f = a . x^depth`, of layers `sqrt(c_s/m) s(W x)`; with a step, all but the first are branches beside a skip."""
    c = 1 / s.second_moment()

    def layer(h: _Signal) -> _Signal:
        return _times(_active(_dense(h, s, 1.0), s), c)

    def block(h: _Signal) -> _Signal:
        return layer(h) if step is None else _sum(h, _times(layer(h), step.square(), step), s)

    def network(signal: _Signal) -> _Signal:
        signal = _layer(layer, signal)
        for _ in range(depth - 1):
            signal = _layer(block, signal)
        return _dense(signal, s, 1.0)

    return network


def _dense(h: _Signal, s: Activation, w2: Tensor | float, b2: Tensor | None = None) -> _Signal:
    """Through a dense layer: centred again, and with its own parameters' share of the tangent kernel."""
    q, pairs = w2 * h.q, h.pairs.scaled(w2)
    if b2 is not None:
        q, pairs = s.geometry.sum(q, pairs, b2.expand_as(q), s.geometry.constant(pairs, b2))
    return _Signal(q, None, pairs, w2 * h.tangent + pairs.product)


def _active(h: _Signal, s: Activation) -> _Signal:
    """Through the activation, which wants centred signals: every one stands behind a dense layer."""
    image = s(h.q, h.pairs)
    return _Signal(image.q, image.mean, image.pairs, h.tangent * image.slope)


def _times(h: _Signal, square: Tensor | float, factor: Tensor | float | None = None) -> _Signal:
    """Multiplied by `factor`, whose square is given; without it by the positive root."""
    if factor is None:
        factor = square**0.5
    mean = None if h.mean is None else factor * h.mean
    return _Signal(square * h.q, mean, h.pairs.scaled(square), square * h.tangent)


def _sum(h: _Signal, branch: _Signal, s: Activation) -> _Signal:
    """Of two signals that are independent given their means."""
    tangent = h.tangent + branch.tangent
    if branch.mean is None:
        q, pairs = s.geometry.sum(h.q, h.pairs, branch.q, branch.pairs)
        return _Signal(q, h.mean, pairs, tangent)
    if h.mean is None:
        raise AssertionError("a branch with a mean on a stream without one")
    pairs = h.pairs.plus(branch.pairs.product, branch.pairs.near, branch.pairs.far, branch.pairs.tilt)
    pairs = s.geometry.crossed(pairs, h.mean, branch.mean)
    return _Signal(h.q + branch.q + 2 * h.mean * branch.mean, h.mean + branch.mean, pairs, tangent)


def _layer(step: Network, signal: _Signal) -> _Signal:
    """One layer; with derivatives on, its intermediate numbers are recomputed in the backward pass."""
    if torch.is_grad_enabled() and (signal.q.requires_grad or signal.pairs.product.requires_grad):
        return checkpoint(step, signal, use_reentrant=False)
    return step(signal)


def _kernels(
    x1: Tensor, x2: Tensor | None, s: Activation, network: Network, divisor: float | None
) -> tuple[Tensor, Tensor]:
    """Both kernels of a network, block of pairs by block of pairs; inner products are divided by d or `divisor`."""
    x1 = _checked_inputs("x1", x1)
    other = x1 if x2 is None else _checked_inputs("x2", x2)
    if other.shape[1] != x1.shape[1] or other.device != x1.device:
        raise ValueError(
            f"x1 and x2 have to have the same width and device, got {list(x1.shape)} on {x1.device} and "
            f"{list(other.shape)} on {other.device}."
        )
    root = math.sqrt(x1.shape[1] if divisor is None else divisor)
    found = [torch.zeros(len(x1), len(other), dtype=torch.float64, device=x1.device) for _ in range(2)]
    for rows in cut(0, len(x1), max(1, _PAIRS_AT_ONCE // len(other))):
        (i, j), values = _block(rows, other, x2 is None, s, network, root, x1)
        for kernel, flat in zip(found, values, strict=True):
            if not bool(flat.isfinite().all()):
                raise ValueError("The kernel overflows float64: make w_std, b_std, alpha, depth or the inputs smaller.")
            kernel[i, j] = flat
            if x2 is None:
                kernel[j, i] = flat
    return found[0], found[1]


def _block(
    rows: slice, other: Tensor, symmetric: bool, s: Activation, network: Network, root: float, x1: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Indices and both kernels of the pairs of some rows with all columns; of a symmetric kernel its upper half."""
    left = x1[rows]
    right = other[rows.start :] if symmetric else other
    i, j = torch.ones(len(left), len(right), dtype=torch.bool, device=left.device).nonzero(as_tuple=True)
    if symmetric:
        i, j = i[j >= i], j[j >= i]
    products = (left @ right.T)[i, j]
    x = right if symmetric else torch.cat([left, right])
    q, pairs = s.geometry.first(x, i, j if symmetric else j + len(left), products)
    scale = 1 / root**2
    signal = _Signal(q * scale, None, pairs.scaled(scale), torch.zeros_like(products))
    out = network(signal)
    return (i + rows.start, j + rows.start if symmetric else j), (out.pairs.product, out.tangent)


def _checked_tensor(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} has to be a floating-point tensor, got {given}; convert it with .double().")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite (NaN or infinite).")
    return x


def _checked_inputs(name: str, x: Tensor) -> Tensor:
    x = _checked_tensor(name, x)
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{name} has to be [samples, width], neither 0, got {list(x.shape)}; flatten images first.")
    return x.double()


def _hyperparameter(name: str, value: Hyperparameter, like: Tensor, depth: int | None = None) -> Tensor:
    """A finite float64 number on a tensor's device; or, where a depth is given, one for each block."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name} has to be a number or a tensor, got {type(value).__name__}.")
    number = value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if number.dim() and (depth is None or number.shape != (depth,)):
        expected = "a single number" if depth is None else f"a single number or one for each of {depth} blocks"
        raise ValueError(f"{name} has to be {expected}, got a tensor of shape {list(number.shape)}.")
    if not bool(number.isfinite().all()):
        raise ValueError(f"{name} has to be finite, got {number.tolist()}.")
    return number.to(like.device) if isinstance(like, Tensor) else number


def _dense_variances(w_std: Hyperparameter | None, b_std: Hyperparameter | None, like: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for name, value, default in (("w_std", w_std, 1.0), ("b_std", b_std, 0.0)):
        number = _hyperparameter(name, default if value is None else value, like)
        if bool(number < 0):
            raise ValueError(f"{name} is a standard deviation: it cannot be negative, got {number.tolist()}.")
        found.append(number.square())
    return found[0], found[1]


def _refuse(what: str, w_std: Hyperparameter | None, b_std: Hyperparameter | None) -> None:
    for name, value in (("w_std", w_std), ("b_std", b_std)):
        if value is not None:
            raise ValueError(
                f'"{what}" has no {name} (its weights are standard normal, without biases, and scaled by c_s): '
                f"leave it out, got {value!r}."
            )
