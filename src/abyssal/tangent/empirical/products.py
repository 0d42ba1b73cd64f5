"""Inner products of per-sample gradients of one parameter, without forming them where that is dearer.

For gradients that are sums over positions, `<G, G'> = sum_ts (left_t . left'_s)(right_t . right'_s)`: Gram matrices of
the factors, multiplied entry by entry. Where positions are many and the matrix is small, forming the gradients is
cheaper; :func:`multiply` takes what takes fewer operations.

Uses of a shared weight are added before anything is multiplied: the product of two sums runs over all pairs of uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from abyssal.tangent.batch import cut
from abyssal.tangent.empirical.parts import Dense, Direct, OneHot, Outer, Part, explicit, unfolded

__all__ = ["WORKSPACE", "Last", "Mode", "cost", "multiply"]

Mode = Literal["full", "trace", "diagonal"]

WORKSPACE = 32 * 2**20  # bytes of the largest tensor within one product, where it can be split


class Last:
    """The last Gram matrix of a layer's gradients by its output.

    A dense layer's bias has the gradients by the output for its own: their Gram matrix is a factor of the weight's
    kernel, and all of the bias's, which comes next.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a @ b.T`, which is not to be written to. [n1, p], [n2, p]."""
        if self._known is not None and _same(a, self._known[0]) and _same(b, self._known[1]):
            return self._known[2]
        found = _product(a, b)
        self._known = (a, b, found)
        return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, both in memory, are the same values of the same memory."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a._version == b._version
    )


def multiply(
    first: Sequence[Part], second: Sequence[Part], mode: Mode, dtype: torch.dtype, last: Last | None = None
) -> Tensor:
    """Return the inner products of one parameter's gradients, summed over its uses, between two blocks of samples.

    Args:
        first: the parameter's uses in the first block.
        second: in the second block; the same object for a block with itself.
        mode: `"full"` [n1, n2, A1, A2], `"trace"` [n1, n2] or `"diagonal"` [n1, n2, A].
        dtype: in which products are summed.
        last: what the parameter before left that this one may take; the result is then not to be written to.
    """
    last = last or Last()
    a = [unfolded(p) for p in first]
    b = a if second is first else [unfolded(p) for p in second]
    if _gram_cost(a, b, mode) <= _gradient_cost(a, b, mode):
        u, v = ([p for p in parts if isinstance(p, Outer)] for parts in (a, b))  # all of them are
        return _by_grams(u, v, mode, dtype, last)
    return _by_gradients(a, b, mode, dtype, last)


def cost(first: Sequence[Part], second: Sequence[Part], mode: Mode) -> float:
    """Return the multiplications and additions that :func:`multiply` takes, roughly."""
    return 2 * min(_gram_cost(first, second, mode), _gradient_cost(first, second, mode))


def _gradient_cost(first: Sequence[Part], second: Sequence[Part], mode: Mode) -> float:
    formed = [p for p in (first if first is second else (*first, *second)) if isinstance(p, Outer)]
    forming = sum(p.samples * p.outputs * p.positions * p.numel for p in formed)
    a, b = first[0], second[0]
    pairs = a.samples * b.samples * a.outputs * (b.outputs if mode == "full" else 1)
    return forming + a.numel * pairs * (0.6 if first is second else 1.0)


def _gram_cost(first: Sequence[Part], second: Sequence[Part], mode: Mode) -> float:
    total = 0.0
    for a in first:
        for b in second:
            if isinstance(a, Direct) or isinstance(b, Direct):
                return float("inf")
            sizes = {"left": 1 if isinstance(a.left, OneHot) else a.left.size, "right": a.right.size}
            positions = a.groups * a.positions * b.positions
            times = a.outputs * (b.outputs if mode == "full" else 1)
            if a.dependent != b.dependent:
                each = times * (sizes["left"] + sizes["right"] + 1)
            else:
                other = "right" if a.dependent == "left" else "left"
                each = times * (sizes[a.dependent] + (mode != "trace")) + sizes[other] + 1
            total += a.samples * b.samples * positions * each
    return total


# ---------------------------------------------------------------------- gradients formed


def _by_gradients(first: Sequence[Part], second: Sequence[Part], mode: Mode, dtype: torch.dtype, last: Last) -> Tensor:
    pieces = _pieces(first, second, dtype)
    product_of = last.product if len(pieces) == 1 else _product

    def product(piece: slice | None) -> Tensor:
        a = explicit(first, dtype, piece)
        return _contract(a, a if second is first else explicit(second, dtype, piece), mode, product_of)

    return functools.reduce(Tensor.add_, map(product, pieces))


def _pieces(first: Sequence[Part], second: Sequence[Part], dtype: torch.dtype) -> list[slice | None]:
    """Parts of the matrix's rows (of its groups, where it has several) small enough for the workspace."""
    outer = [p for p in (*first, *second) if isinstance(p, Outer)]
    if len(outer) < len(first) + len(second) or len({p.groups for p in outer}) > 1:
        return [None]
    extent = outer[0].groups if outer[0].groups > 1 else outer[0].left.size
    rows = max(p.samples * p.outputs for p in outer)
    count = min(extent, -(-outer[0].numel * rows * dtype.itemsize // WORKSPACE))
    return list(cut(0, extent, -(-extent // count)))


def _contract(a: Tensor, b: Tensor, mode: Mode, product_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Inner products of gradients. [n1, A1, p], [n2, A2, p]."""
    if mode == "trace":
        x = a.flatten(1)
        return product_of(x, x if a is b else b.flatten(1))
    if mode == "diagonal":
        rows = [(a[:, k], b[:, k]) for k in range(a.shape[1])]
        return torch.stack([_product(x, x if a is b else y) for x, y in rows], dim=-1)
    x = a.flatten(0, 1)
    found = _product(x, x if a is b else b.flatten(0, 1))
    return found.view(len(a), a.shape[1], len(b), b.shape[1]).transpose(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T`; of a matrix with itself only blocks on and above the diagonal are computed."""
    if a is not b or len(a) < 256:
        return a @ b.T
    out = a.new_empty(len(a), len(a))
    step = max(64, -(-len(a) // 8))
    for at in range(0, len(a), step):
        rows = slice(at, at + step)
        out[rows, at:] = a[rows] @ a[at:].T
        out[at:, rows] = out[rows, at:].T
    return out


# ---------------------------------------------------------------------- Gram matrices of the factors


def _by_grams(first: Sequence[Outer], second: Sequence[Outer], mode: Mode, dtype: torch.dtype, last: Last) -> Tensor:
    return functools.reduce(Tensor.add_, (_pair(a, b, mode, dtype, last) for a in first for b in second))


def _pair(a: Outer, b: Outer, mode: Mode, dtype: torch.dtype, last: Last) -> Tensor:
    """One use in the first block with one in the second, a few samples of the first at a time."""
    product = functools.partial(_aligned, last=last) if a.dependent == b.dependent else _crossed
    times = a.outputs * b.outputs if mode == "full" and a.dependent == b.dependent else 1
    row = b.samples * a.groups * a.positions * b.positions * (times + 1) * dtype.itemsize
    step = max(1, WORKSPACE // max(1, row))  # a layer can be called with no rows at all
    if step >= a.samples:
        return product(a, b, mode, dtype)
    pieces = [a.mapped(lambda values, _, at=at: values[at : at + step]) for at in range(0, a.samples, step)]  # type: ignore[misc]
    return torch.cat([product(piece, b, mode, dtype) for piece in pieces])


def _aligned(a: Outer, b: Outer, mode: Mode, dtype: torch.dtype, last: Last) -> Tensor:
    """Both uses depend on the output through the same factor."""
    sides = ((a.left, b.left), (a.right, b.right))
    (u, v), (x, y) = sides if a.dependent == "left" else sides[::-1]
    assert isinstance(u, Dense) and isinstance(v, Dense)
    constant = _gram(x, y, dtype)
    if mode == "trace":
        return _summed(constant.mul_(_gram(u, v, dtype, last.product)))
    if mode == "diagonal":
        columns = [_summed(_gram(_output(u, k), _output(v, k), dtype).mul_(constant)) for k in range(a.outputs)]
        return torch.stack(columns, dim=-1)
    p, q = u.values.to(dtype), v.values.to(dtype)
    total = p.new_zeros(a.samples, b.samples, a.outputs, b.outputs)
    for g in range(a.groups):
        products = p[:, :, g].reshape(-1, u.size) @ q[:, :, g].reshape(-1, v.size).T
        products = products.view(a.samples, a.outputs, a.positions, b.samples, b.outputs, b.positions)
        products.mul_(constant[..., g][:, None, :, :, None, :])
        total += products.sum(dim=(2, 5)).transpose(1, 2)
    return total


def _crossed(a: Outer, b: Outer, mode: Mode, dtype: torch.dtype) -> Tensor:
    """One use depends on the output through its left factor, the other through its right: a tied embedding."""

    def at(k: int, m: int) -> Tensor:
        left = _gram(_output(a.left, k), _output(b.left, m), dtype)
        return _summed(left * _gram(_output(a.right, k), _output(b.right, m), dtype))

    if mode == "full":
        return torch.stack([torch.stack([at(k, m) for m in range(b.outputs)], -1) for k in range(a.outputs)], -2)
    if mode == "diagonal":
        return torch.stack([at(k, k) for k in range(a.outputs)], dim=-1)
    total = at(0, 0)
    for k in range(1, a.outputs):
        total += at(k, k)
    return total


def _gram(
    u: object, v: object, dtype: torch.dtype, product_of: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Inner products of two factors at all pairs of positions, summed over outputs. [n1, T1, n2, T2, groups]."""
    if isinstance(u, OneHot) and isinstance(v, OneHot):
        match = (u.values[:, :, None, None] == v.values) & (u.values >= 0)[:, :, None, None]
        return match.to(dtype)[..., None]
    if isinstance(u, OneHot):
        assert isinstance(v, Dense)
        return _picked(u, v, dtype)
    assert isinstance(u, Dense)
    if isinstance(v, OneHot):
        return _picked(v, u, dtype).permute(2, 3, 0, 1, 4)
    assert isinstance(v, Dense)
    x, y = (f.values.to(dtype).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2) for f in (u, v))  # [g, n T, A size]
    if len(x) == 1:
        rows, columns = x[0], y[0]  # a matrix with itself takes half the work
        found = (product_of or _product)(rows, rows if _same(rows, columns) else columns)
    else:
        found = x @ y.mT
    return found.view(len(x), len(u.values), u.positions, len(v.values), v.positions).permute(1, 2, 3, 4, 0)


def _picked(u: OneHot, v: Dense, dtype: torch.dtype) -> Tensor:
    """A unit vector times a dense one picks an entry. [n1, T1, n2, T2, 1]."""
    dense = v.values.to(dtype)[:, 0, 0]  # [n2, T2, size]
    found = dense[:, :, u.values.clamp(min=0)].permute(2, 3, 0, 1)
    return (found * (u.values >= 0)[:, :, None, None])[..., None]


def _summed(products: Tensor) -> Tensor:
    """Sum over positions and groups. [n1, T1, n2, T2, groups]."""
    if products.shape[1] == products.shape[3] == products.shape[4] == 1:
        return products[:, 0, :, 0, 0]
    return products.sum(dim=(1, 3, 4))


def _output(factor: object, k: int) -> object:
    """The factor of one output."""
    if isinstance(factor, Dense) and factor.values.shape[1] > 1:
        return Dense(factor.values[:, k : k + 1])
    return factor
