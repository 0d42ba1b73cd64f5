"""Eigenvalues at the ends of a symmetric operator's spectrum, by Lanczos iterations and a look for missed copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from abyssal.util.progress import Progress

__all__ = ["Eigenpairs", "NotConvergedError", "ends"]

_FEW = 32  # rows up to which an operator is formed, column by column: Lanczos iterations take 20 products at least
_SEARCH = 1e-2  # accuracy in the search for a copy of an eigenvalue that was missed
Array = np.ndarray


class NotConvergedError(RuntimeError):
    """Lanczos iterations ended before all eigenvalues asked for were found."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenvalues of a kernel.

    Attributes:
        values: descending, float64. [k]
        vectors: orthonormal, a column for each eigenvalue. [n, k]
        residuals: `|K u - value u|`; a true eigenvalue is within this of the value, to the rounding of a product. [k]
        products: how many kernel-vector products it took.
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    residuals: Tensor
    products: int


def ends(
    product: Callable[[Array], Array],
    n: int,
    k: int,
    which: Literal["largest", "smallest"],
    *,
    tol: float,
    dense: Callable[[], Array] | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Return the k largest or smallest eigenvalues of a symmetric operator, in descending order.

    Args:
        product: of the operator [n, n] with a vector, in float64.
        n: its rows.
        k: how many, from 1 to n.
        which: end of the spectrum.
        tol: relative accuracy, below 1.
        dense: forms the operator, where that is better than iterations.
        progress: called with "eigenvalues", products so far, and 0 as their total is not known.

    Raises:
        ValueError: for another k.
        NotConvergedError: if iterations end before that.
    """
    if type(k) is not int or not 1 <= k <= n:
        raise ValueError(f"k, the number of eigenvalues, has to be a whole number from 1 to {n}, got {k!r}.")
    count = 0

    def apply(v: Array) -> Array:
        nonlocal count
        count += 1
        if progress is not None:
            progress("eigenvalues", count, 0)
        return product(np.ascontiguousarray(v, dtype=np.float64).reshape(-1))

    if dense is not None or n <= max(_FEW, 2 * k):
        columns = np.stack([apply(column) for column in np.eye(n)], axis=1) if dense is None else dense()
        values, vectors = np.linalg.eigh((columns + columns.T) / 2)
        chosen = slice(n - k, n) if which == "largest" else slice(0, k)
        values, vectors = values[chosen], vectors[:, chosen]
        residuals = np.linalg.norm(columns @ vectors - vectors * values, axis=0)
    else:
        sign = 1.0 if which == "largest" else -1.0
        values, vectors = _largest(lambda v: sign * apply(v), n, k, tol)
        values = sign * values
        residuals = np.array([np.linalg.norm(apply(u) - a * u) for a, u in zip(values, vectors.T, strict=True)])
    order = np.argsort(values)[::-1].copy()
    return Eigenpairs(
        torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order]), torch.from_numpy(residuals[order]), count
    )


def _largest(apply: Callable[[Array], Array], n: int, k: int, tol: float) -> tuple[Array, Array]:
    """Return the k algebraically largest eigenvalues, and what was missed at first among them."""
    values, vectors = _lanczos(apply, n, k, tol, seed=0)
    for attempt in range(1, k + 1):
        # One start vector sees one vector of a multiple eigenvalue's space, the others by rounding alone. Any Ritz
        # value of the deflated operator is at most its largest eigenvalue, so a rough one decides.
        rest = lambda v, u=vectors, a=values: _deflated(apply, u, a, v)  # noqa: E731
        (left,), _ = _lanczos(rest, n, 1, _SEARCH, seed=attempt)
        if left <= values.min() + max(tol, 1e-12) * np.abs(values).max():
            break
        more, vector = _lanczos(rest, n, 1, tol, seed=attempt)
        values, vectors = np.append(values, more), np.concatenate([vectors, vector], axis=1)
        kept = np.argsort(values)[-k:]
        values, vectors = values[kept], vectors[:, kept]
    vectors, _ = np.linalg.qr(vectors)
    return values, vectors


def _deflated(apply: Callable[[Array], Array], vectors: Array, values: Array, v: Array) -> Array:
    """Apply the operator on the complement of what was found, which is sent below everything else."""
    v = v.reshape(-1)
    inside = vectors.T @ v
    outside = v - vectors @ inside
    found = apply(outside)
    return found - vectors @ (vectors.T @ found) - 2 * np.abs(values).max() * (vectors @ inside)


def _lanczos(apply: Callable[[Array], Array], n: int, k: int, tol: float, seed: int) -> tuple[Array, Array]:
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    start = np.random.default_rng(seed).standard_normal(n)
    try:
        values, vectors = eigsh(
            LinearOperator((n, n), matvec=apply, dtype=np.float64), k, which="LA", v0=start, tol=tol
        )
    except ArpackNoConvergence as error:
        raise NotConvergedError(
            f"Lanczos iterations found {len(error.eigenvalues)} of {k} eigenvalues before they gave up: the rest is "
            "too crowded. Ask for fewer, give a larger tol, compute in float64 (dtype=torch.float64), or form the "
            "kernel (dense_up_to, or abyssal.tangent.ntk)."
        ) from error
    return values, vectors
