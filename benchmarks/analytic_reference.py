"""Infinite-width kernels in mpmath's arithmetic: the plain recursions of SCIENCE.md, for tests and benchmarks.

Written to be obvious, not fast: one pair of inputs at a time, moments from closed forms or dense integration, and for
the Li-Luo-Yip network the sum over layers of forward and backward products rather than a recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mpmath as mp

Moments = tuple[mp.mpf, mp.mpf]
DIGITS = 80  # angles near 0 and pi lose half of them


def relu(q1: mp.mpf, q2: mp.mpf, c: mp.mpf) -> Moments:
    """`E[s(u) s(v)]` and `E[s'(u) s'(v)]`."""
    size = mp.sqrt(q1 * q2)
    if size == 0 or 1 + c / size < mp.mpf(10) ** (10 - mp.mp.dps):  # antipodal
        return mp.mpf(0), mp.mpf(0)
    angle = mp.acos(min(c / size, mp.mpf(1)))
    return size / (2 * mp.pi) * (mp.sin(angle) + (mp.pi - angle) * mp.cos(angle)), (mp.pi - angle) / (2 * mp.pi)


def erf(q1: mp.mpf, q2: mp.mpf, c: mp.mpf) -> Moments:
    sizes = (1 + 2 * q1) * (1 + 2 * q2)
    return 2 / mp.pi * mp.asin(2 * c / mp.sqrt(sizes)), 4 / mp.pi / mp.sqrt(sizes - 4 * c * c)


def tanh(q1: mp.mpf, q2: mp.mpf, c: mp.mpf) -> Moments:
    def function(u: mp.mpf) -> Moments:
        value = mp.tanh(u)
        return value, 1 - value * value

    # Poles at pi/2 leave exp(-pi^2 / step) of the signal.
    return _integral(function, q1, q2, c, lambda s: mp.mpf("0.25") / s if s else mp.inf)


def gelu(q1: mp.mpf, q2: mp.mpf, c: mp.mpf) -> Moments:
    def function(u: mp.mpf) -> Moments:
        share = mp.ncdf(u)
        return u * share, share + u * mp.npdf(u)

    # With the Gaussians of both signals' slopes the density is narrower by sqrt(1 + 2 s^2).
    return _integral(function, q1, q2, c, lambda s: mp.mpf("0.7") / mp.sqrt(1 + 2 * s * s))


def _integral(
    function: Callable[[mp.mpf], Moments], q1: mp.mpf, q2: mp.mpf, c: mp.mpf, finest: Callable[[mp.mpf], mp.mpf]
) -> Moments:
    """The trapezoidal rule in one or two dimensions, which converges geometrically for these: to 1e-16.

    In the sum and the difference of the two normalised signals, so that few points do for one of them where the
    signals are nearly parallel or antipodal; 31 digits of arithmetic keep 15 of the smaller one.
    """
    s1, s2 = mp.sqrt(q1), mp.sqrt(q2)
    r = c / (s1 * s2) if c else mp.mpf(0)
    largest = max(s1, s2)
    axes = []
    for size in (mp.sqrt(abs(1 + r) / 2), mp.sqrt(abs(1 - r) / 2)):
        step = min(mp.mpf("0.7"), finest(largest * size))
        last = int(mp.mpf("8.6") / step) if size > mp.mpf(10) ** -14 else 0
        points = [k * step for k in range(-last, last + 1)]
        axes.append([(size * z, mp.exp(-z * z / 2)) for z in points])
    total = product = slope = mp.mpf(0)
    for g, weight in axes[0]:
        for h, other in axes[1]:
            (a, da), (b, db) = function(s1 * (g + h)), function(s2 * (g - h))
            w = weight * other
            total, product, slope = total + w, product + w * a * b, slope + w * da * db
    return product / total, slope / total


def _mean(activation: Callable[..., Moments], q: mp.mpf) -> mp.mpf:
    if activation is relu:
        return mp.sqrt(q / (2 * mp.pi))
    if activation is gelu:  # E[u Phi(u)] = q E[phi(u)]
        return q / mp.sqrt(2 * mp.pi * (1 + q))
    return mp.mpf(0)


def kernels(
    x: Sequence[float],
    y: Sequence[float],
    depth: int,
    activation: Callable[[mp.mpf, mp.mpf, mp.mpf], Moments],
    branch: str,
    alpha: float = 1.0,
    w_std: float = 1.0,
    b_std: float = 0.0,
) -> Moments:
    """NNGP and tangent kernel of one pair of inputs; branch "pre", "two", "lly", "fc" or "huang-yau"."""
    inputs = [[mp.mpf(float(v)) for v in z] for z in (x, y)]
    moments = [mp.fdot(inputs[a], inputs[b]) for a, b in ((0, 0), (1, 1), (0, 1))]  # q1, q2, c
    a = mp.mpf(float(alpha))
    if branch in ("lly", "huang-yau"):
        return _normalised(moments, depth, activation, a / depth if branch == "lly" else None)
    w2, b2 = mp.mpf(float(w_std)) ** 2, mp.mpf(float(b_std)) ** 2

    def dense(kernel: list, tangent: mp.mpf) -> tuple[list, mp.mpf]:
        out = [w2 * k + b2 for k in kernel]
        return out, w2 * tangent + out[2]

    def active(kernel: list, tangent: mp.mpf) -> tuple[list, mp.mpf]:
        both = activation(*kernel)
        return [*_own(activation, kernel), both[0]], tangent * both[1]

    state = dense([k / len(inputs[0]) for k in moments], mp.mpf(0))
    for _ in range(depth):
        if branch == "fc":
            state = dense(*active(*state))
            continue
        change = dense(*active(*(state if branch == "pre" else dense(*state))))
        state = [k + a**2 * b for k, b in zip(state[0], change[0], strict=True)], state[1] + a**2 * change[1]
    if branch != "fc":
        state = dense(*active(*state)) if branch == "pre" else dense(*state)
    return state[0][2], state[1]


def _own(activation: Callable[..., Moments], kernel: list) -> list:
    return [activation(q, q, q)[0] for q in kernel[:2]]


def _normalised(
    moments: list, depth: int, activation: Callable[[mp.mpf, mp.mpf, mp.mpf], Moments], step: mp.mpf | None
) -> Moments:
    """`sum_l <delta^l, delta'^l> <x^(l-1), x'^(l-1)>` and `<x^L, x'^L>`; step None: without skips."""
    c_s = 1 / activation(mp.mpf(1), mp.mpf(1), mp.mpf(1))[0]
    states, slopes, means = [moments], [], [mp.mpf(0), mp.mpf(0)]
    for layer in range(depth):
        skip = layer > 0 and step is not None
        factor = step if skip else mp.mpf(1)
        kernel = states[-1]
        both = activation(*kernel)
        change = [factor**2 * c_s * k for k in [*_own(activation, kernel), both[0]]]
        slopes.append(factor**2 * c_s * both[1])
        mu = [factor * mp.sqrt(c_s) * _mean(activation, kernel[k]) for k in (0, 1)]
        if skip:
            cross = [2 * means[0] * mu[0], 2 * means[1] * mu[1], means[0] * mu[1] + means[1] * mu[0]]
            change = [k + b + c for k, b, c in zip(kernel, change, cross, strict=True)]
            mu = [m + n for m, n in zip(means, mu, strict=True)]
        means = mu
        states.append(change)
    tangent, backward = states[-1][2], mp.mpf(1)  # backward: <df/dx^l, df'/dx^l> / m
    for layer in range(depth - 1, -1, -1):
        tangent += backward * slopes[layer] * states[layer][2]
        backward = backward * slopes[layer] + (backward if step is not None else 0)
    return states[-1][2], tangent
