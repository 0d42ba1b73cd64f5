"""The tangent kernel as an operator: products with vectors, and the ends of its spectrum, without forming it.

For kernels that are too large to hold ([n k, n k] entries). Where the kernel fits, `abyssal.tangent.ntk` computes it
faster than a few dozen products: a product costs a backward and a forward-mode pass over all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.tangent.empirical.ntk import ntk
from abyssal.tangent.modes import normal
from abyssal.tangent.operator.jacobian import Jacobian
from abyssal.tangent.operator.lanczos import Eigenpairs, ends
from abyssal.tangent.subject import Output
from abyssal.util.checks import between
from abyssal.util.progress import Progress
from abyssal.util.text import parse_bytes

__all__ = ["KernelOperator", "kernel_operator"]

_SHARED_BYTES = 32 << 20  # of vectors of the parameters' size, one for each output that shares a forward pass


def kernel_operator(
    model: nn.Module,
    x: Any,
    *,
    outputs: str | int = "trace",
    output: Output | None = None,
    parameters: str | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    budget: str | int | float | None = None,
) -> KernelOperator:
    """Return the empirical tangent kernel of a model as an operator that is never formed.

    The operator follows the model: each product is with the kernel at the parameters as they are when it is asked for.
    For the kernel as it is now while training goes on, give `copy.deepcopy(model)`.

    Args:
        model: any module whose outputs for a sample depend on that sample alone; left as it is. One in training mode
            with dropout or BatchNorm is refused: call `model.eval()` first.
        x: a tensor [n, ...], a tuple of positional arguments, or a dictionary of keyword arguments; the first
            dimension of every tensor counts the samples.
        outputs: "trace", [n, n]: the sum over outputs of each one's kernel; "full", [n k, n k], row i k + a being
            sample i's output a; or an index, [n, n]: one output's kernel.
        output: takes what the model returns to a tensor [n] or [n, ...]; default: a tensor as it is, else `.logits`.
        parameters: names or patterns of those that count; default: all that need a gradient.
        dtype: type to compute in, on copies of parameters (made for each product) and inputs; default: the model's
            own. Products are as accurate as this type: give torch.float64 for small eigenvalues.
        budget: memory that products may take beyond the model and x, in bytes or as "2GiB"; samples are taken in
            blocks that fit. Default: blocks whose activations are of about 256 MiB.

    Returns:
        The operator; `.matvec(v)`, `.top(k)`, `.smallest(k)`.

    Raises:
        TypeError, ValueError: naming what is wrong, and the least budget that works.
    """
    if not (outputs in ("trace", "full") or (type(outputs) is int)):
        reason = "; take one index after the other for 'diagonal'" if outputs == "diagonal" else ""
        raise ValueError(f"outputs has to be 'trace', 'full' or an index, got {outputs!r}{reason}.")
    limit = None if budget is None else parse_bytes(budget)
    jacobian = Jacobian(model, x, output=output, parameters=parameters, dtype=dtype, budget=limit)
    if isinstance(outputs, int) and not 0 <= outputs < jacobian.outputs:
        raise ValueError(f"outputs={outputs}: the model has {jacobian.outputs} outputs, from 0.")
    return KernelOperator(jacobian, outputs)


class KernelOperator:
    """`K = J J^T` as an operator. Made by `kernel_operator`.

    Attributes:
        jacobian: the products that it consists of; `jacobian.block` is the number of samples at a time.
        outputs: "trace", "full" or an index.
        shape: of K.
        products: how many products with a vector there were so far.
    """

    def __init__(self, jacobian: Jacobian, outputs: str | int) -> None:
        self.jacobian, self.outputs = jacobian, outputs
        rows = jacobian.samples * (jacobian.outputs if outputs == "full" else 1)
        self.shape = (rows, rows)
        self.products = 0
        # With a budget, its two vectors of the parameters' size are all there may be.
        self._shared = 1 if jacobian.has_budget else max(1, _SHARED_BYTES // (jacobian.size * jacobian.dtype.itemsize))

    def __repr__(self) -> str:
        j = self.jacobian
        return (
            f"KernelOperator({self.shape[0]} x {self.shape[1]}, outputs={self.outputs!r}, {j.size:,} parameters, "
            f"blocks of {j.block} samples, {j.mode})"
        )

    def matvec(self, v: Tensor) -> Tensor:
        """Return `K v`, in the type that the kernel is computed in.

        Args:
            v: [n], or [n k] for outputs "full".

        Raises:
            ValueError: for another shape; if the model has got other parameters or a mode without a kernel since.
        """
        if list(v.shape) != [self.shape[1]]:
            raise ValueError(f"v has to have the shape [{self.shape[1]}], got {list(v.shape)}.")
        self.products += 1
        self.jacobian.update()
        with torch.inference_mode(False), torch.no_grad():
            return self._product(normal(v.detach()).to(self.jacobian.device, self.jacobian.dtype))

    def _product(self, v: Tensor) -> Tensor:
        j = self.jacobian
        if self.outputs == "full":
            return j.times(j.transposed(v.reshape(1, j.samples, j.outputs))[0]).reshape(-1)
        total = torch.zeros_like(v)
        chosen = list(range(j.outputs)) if self.outputs == "trace" else [int(self.outputs)]
        for at in range(0, len(chosen), self._shared):
            group = chosen[at : at + self._shared]
            cotangents = v.new_zeros(len(group), j.samples, j.outputs)
            cotangents[range(len(group)), :, group] = v
            for a, gradient in zip(group, j.transposed(cotangents), strict=True):
                total += j.times(gradient)[:, a].to(v.device)
        return total

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return `K v` or, for [n, several], `K V`."""
        if other.ndim == 2:
            return torch.stack([self.matvec(column) for column in other.T], dim=1)
        return self.matvec(other)

    def scipy(self) -> Any:
        """Return it as a `scipy.sparse.linalg.LinearOperator` of float64."""
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(self.shape, matvec=self.apply, dtype=np.float64)

    def apply(self, v: np.ndarray) -> np.ndarray:
        """Return `K v` in float64, as numpy has it.

        Raises:
            FloatingPointError: if it is not finite.
        """
        found = self.matvec(torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64).reshape(-1)))
        if not torch.isfinite(found).all():
            raise FloatingPointError(
                "A kernel-vector product has entries that are not finite; try dtype=torch.float64."
            )
        return found.double().cpu().numpy()

    def top(self, k: int, *, tol: float = 0.0, progress: Progress | None = None) -> Eigenpairs:
        """Return the k largest eigenvalues, by implicitly restarted Lanczos iterations (ARPACK, through scipy).

        One start vector sees a multiple eigenvalue once, but for rounding; so what is found is deflated and searched
        for a copy that was missed: in wide networks the eigenvalues of "full" come in nearly equal groups.

        Args:
            k: how many, from 1 to n.
            tol: relative accuracy of the eigenvalues; 0 is that of the type that the kernel is computed in.
            progress: called with "eigenvalues", products so far, and 0 as their total is not known.

        Raises:
            ValueError: for another k.
            NotConvergedError: if iterations end before that.
        """
        return ends(self.apply, self.shape[0], k, "largest", tol=self._accuracy(tol), progress=progress)

    def smallest(
        self,
        k: int,
        *,
        tol: float = 0.0,
        dense_up_to: int = 2048,
        progress: Progress | None = None,
    ) -> Eigenpairs:
        """Return the k smallest eigenvalues, still in descending order.

        Lanczos iterations find this end of a kernel's spectrum slowly, as it is crowded; so the kernel is formed up to
        a size, by `abyssal.tangent.ntk` where it is in the model's own type. The absolute error is of the size of n
        times the rounding of the type times the largest eigenvalue: what is smaller is noise, and may be negative.

        Args:
            k: how many, from 1 to n.
            tol: relative accuracy of Lanczos iterations.
            dense_up_to: rows up to which the kernel is formed and all its eigenvalues computed.
            progress: as for `top`.

        Raises:
            ValueError: for another k.
            NotConvergedError: if iterations end before that; form the kernel then.
        """
        n, accuracy = self.shape[0], self._accuracy(tol)
        dense = self._formed if n <= dense_up_to else None
        return ends(self.apply, n, k, "smallest", tol=accuracy, progress=progress, dense=dense)

    def _accuracy(self, tol: float) -> float:
        return max(between("tol", tol, 0, 1), torch.finfo(self.jacobian.dtype).eps)

    def _formed(self) -> np.ndarray:
        """Return the kernel by `ntk`, which has no way to compute in another type than the model's."""
        if self.jacobian.is_cast:
            return self.dense().double().cpu().numpy()
        subject, batch = self.jacobian.subject, self.jacobian.batch
        names, which = list(subject.parameters), self.outputs
        K = ntk(subject.model, batch, outputs=which, parameters=names, output=subject.output)  # type: ignore[arg-type]
        if self.outputs == "full":
            K = K.permute(0, 2, 1, 3).reshape(self.shape)
        return K.double().cpu().numpy()

    def dense(self) -> Tensor:
        """Return the kernel itself, [n, n], column by column: as many products as it has rows.

        `abyssal.tangent.ntk` does the same faster; this is independent of it.
        """
        K = self @ torch.eye(self.shape[0], dtype=self.jacobian.dtype)
        return (K + K.T) / 2
