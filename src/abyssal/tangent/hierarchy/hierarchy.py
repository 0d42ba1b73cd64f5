"""The neural tangent hierarchy of a network: how its tangent kernel moves under gradient flow.

For the loss `(1 / 2n) sum_a |f(x_a) - y_a|^2` and its gradient flow,

    K2(a, b) = <grad f_a, grad f_b>,    K^(r+1)(a_1, ..., a_r, b) = <grad K^(r)(a_1, ..., a_r), grad f_b>,
    df_a/dt = -(1/n) sum_b K2(a, b) (f_b - y_b),    dK^(r)/dt = -(1/n) sum_b K^(r+1)(..., b) (f_b - y_b).

K3 is symmetric in its first two arguments only, and so is K4.

Sources: J. Huang, H.-T. Yau, "Dynamics of deep neural networks and neural tangent hierarchy", arXiv 1909.08156;
Y. Li, T. Luo, N. K. Yip, arXiv 2007.03714, for residual networks.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.tangent.hierarchy.derivative_check import check_derivatives
from abyssal.tangent.hierarchy.factored import FactoredModel, Features
from abyssal.tangent.hierarchy.path import Distance, TangentPath, check_times
from abyssal.tangent.hierarchy.pure import PureModel
from abyssal.tangent.hierarchy.rates import Curve, Loss, kernel_derivatives, kernel_of
from abyssal.tangent.hierarchy.tensors import KernelTensors
from abyssal.tangent.hierarchy.truncated import TruncatedHierarchy, integrate
from abyssal.tangent.modes import exactly, normal
from abyssal.util.checks import between, instance
from abyssal.util.progress import Progress, silent
from abyssal.util.text import parse_bytes

__all__ = ["Distance", "Hierarchy", "TangentPath"]

Method = TypeVar("Method", bound=Callable[..., Any])


def _exact(method: Method) -> Method:
    """Compute whatever mode the caller is in: under autocast, or inference mode."""

    @functools.wraps(method)
    def exact(self: Hierarchy, *args: Any, **kwargs: Any) -> Any:
        with exactly(self._pure.device):
            return method(self, *args, **kwargs)

    return cast(Method, exact)


class Hierarchy:
    """The tangent kernels of a model on n samples, their motion under gradient flow, and its truncations.

    Outputs are numbered together: for a model that returns [n] or [n, 1] there are N = n of them; for one that returns
    [n, k] (or [n, ...], flattened to k) there are N = n k, output j of sample a at a k + j.

    The parameters are copied: training the model further changes nothing here. Its modules are used, and left as they
    are.

    Args:
        model: any `nn.Module` that `torch.func` can differentiate sample by sample; parameters with
            `requires_grad=False` stand still and do not count. Without random layers or batch statistics: in `eval()`.
        x: the samples: a tensor [n, ...], a tuple of such (positional arguments), or a dict (keyword arguments).
        y: the targets, in the shape of the model's outputs; [n] and [n, 1] are taken for one another.
        output: takes what the model returns for a batch to a tensor [batch] or [batch, k]. Not needed where the model
            returns a tensor, or has it in `.logits`.
        dtype: in which all is computed; parameters, buffers and samples are converted. float64 by default: K4 comes
            from third derivatives, and is to show truncation errors of 1e-5. None keeps the model's, with a warning.
        budget: bytes that may be alive beside the model, such as 2e9 or "2GiB"; cuts the work into chunks.
        progress: called with what is being done, how many of it are done, and how many there are.
        factored: whether gradients of dense layers are kept as factors, which is many times faster. False leaves all
            to `torch.func`.

    Raises:
        TypeError: if the model is no module, or samples or targets no tensors.
        ValueError: without trained parameters; for dropout or batch statistics in train mode; for outputs that are
            random, not finite, or depend on other samples; for targets of another shape; for a model that cannot be
            evaluated by `torch.func`.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
        y: Tensor,
        *,
        output: Callable[[Any], Tensor] | None = None,
        dtype: torch.dtype | None = torch.float64,
        budget: str | int | float = "2GiB",
        progress: Progress | None = None,
        factored: bool = True,
    ) -> None:
        if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
            raise ValueError(f"dtype has to be a real floating-point type of torch or None, got {dtype!r}.")
        self._budget = parse_bytes(budget)
        self._progress = progress or silent
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        with exactly(torch.device("cpu") if first is None else first.device):
            self._pure = PureModel(model, x, output, dtype)
            self._y = _targets(y, self._pure)
            self._model = FactoredModel(self._pure, factored)
            self._loss = Loss(self._model, self._y, self._block(levels=1, squares=0))
        if self._pure.dtype != torch.float64:
            warnings.warn(
                f"The hierarchy is computed in {self._pure.dtype}: every derivative loses digits, and the flow's error "
                "is that of the type. float64 (the default) is recommended.",
                stacklevel=2,
            )
        self._kernels: dict[int, Tensor] = {}
        self._start: Features | None = None
        self._checked = 0

    @property
    def samples(self) -> int:
        """Number of samples, n."""
        return self._pure.n

    @property
    def outputs(self) -> int:
        """Number of outputs of all samples, N = n k."""
        return self._pure.n * self._pure.k

    @_exact
    def kernel(self, order: int = 2) -> Tensor:
        """Return one kernel of the hierarchy as a tensor; computed once and kept.

        Args:
            order: 2, 3 or 4.

        Returns:
            The kernel, detached. [N] * order

        Raises:
            ValueError: for another order, or where the budget is too small for the tensor; says the least that works.
        """
        _check_order(order)
        if order not in self._kernels:
            if order == 2:
                self._kernels[2] = self._kernel_at(self._pure.parameters)
            else:
                self._check_derivatives(order - 2)
                tensors = KernelTensors(self._model, self._features(), self._budget, self._progress)
                least = tensors.least_budget(order)
                if least > self._budget:
                    raise ValueError(
                        f"K{order} of N = {self.outputs} outputs needs about {least:.2g} bytes, of which "
                        f"{tensors.bytes_of_result(order):.2g} for the tensor and its parts; the budget is "
                        f"{self._budget:.2g}. Raise budget=, take fewer samples, or use rates(), which forms neither "
                        "K3 nor K4."
                    )
                self._kernels[order] = tensors.third() if order == 3 else tensors.fourth()
        return self._kernels[order]

    @_exact
    def rates(self, order: int = 3) -> tuple[Tensor, ...]:
        """Return the kernel's time derivatives at the start of the flow, exactly, without forming K3 or K4.

        By forward-mode derivatives along the flow's Taylor series: `2^order` kernel evaluations or so.

        Args:
            order: of the highest derivative: 1, 2 or 3.

        Returns:
            `(dK/dt, d2K/dt2, d3K/dt3)`, or the first of them. [N, N] each

        Raises:
            ValueError: for another order, or where the budget is too small for the matrices.
        """
        _check_order(order, 1)
        self._check_derivatives(order)
        block = self._block(levels=order, squares=order + 1)
        with self._model.running():
            curve = Curve(self._loss, order)
        return kernel_derivatives(self._model, curve, order, block, self._progress)

    @_exact
    def predict(self, times: Sequence[float] | Tensor, order: int = 4, *, rtol: float = 1e-10) -> TangentPath:
        """Return outputs, loss and kernel by the hierarchy truncated at one order.

        K^(order) stays as it is at the start; integrated by scipy's DOP853.

        Args:
            times: at least 0, increasing. [T]
            order: 2, 3 or 4: of the kernel that is held constant.
            rtol: tolerance of each step; the absolute one is a hundredth of it, relative to the state.

        Returns:
            The path. If the truncated system blows up, what lies beyond is NaN, with a warning.

        Raises:
            ValueError: for other orders, times or tolerances; as `kernel(order)`.
        """
        _check_order(order)
        between("rtol", rtol, 1e-13, 1e-2)
        wanted = check_times(times)
        residual = self._loss.outputs(self._pure.parameters) - self._y
        kernels = tuple(_array(self.kernel(p)) for p in range(2, order + 1))
        system = TruncatedHierarchy(self.samples, _array(residual).ravel(), kernels)
        start = system.start()
        found, reached = [], 0.0
        for reached, state in integrate(system.velocity, start, wanted, rtol, rtol * _size(start) / 100):  # noqa: B007
            if state is not None:
                r, kernel = system.residual_and_kernel(state)
                found.append((self._tensor(r).view_as(self._y) + self._y, self._tensor(kernel)))
        if len(found) < len(wanted):
            warnings.warn(f"The hierarchy truncated at order {order} blows up at t = {reached:.3g}.", stacklevel=3)
        return self._path(wanted, found, order, rtol, reached)

    @_exact
    def flow(self, times: Sequence[float] | Tensor, *, rtol: float = 1e-10, check: bool = True) -> TangentPath:
        """Return outputs, loss and kernel of the true gradient flow.

        Integrates all parameters by scipy's DOP853.

        Args:
            times: at least 0, increasing. [T]
            rtol: tolerance of each step, for every parameter relative to itself and to their root mean square.
            check: whether to integrate again with a hundred times the tolerance, and state the difference as `error`:
                about half as much work again.

        Returns:
            The path. If the flow blows up, what lies beyond is NaN, with a warning.

        Raises:
            ValueError: for other times or tolerances.
        """
        between("rtol", rtol, 1e-13, 1e-2)
        wanted = check_times(times)
        path = self._flow(wanted, rtol, "true flow")
        if check:
            distance = self._flow(wanted, 100 * rtol, "true flow, more loosely").distance(path)
            error = torch.cat([distance.kernel, distance.outputs]).nan_to_num(0.0).max().item()
            path = dataclasses.replace(path, error=error)
        if path.reached < wanted[-1]:
            warnings.warn(f"The gradient flow could not be integrated beyond t = {path.reached:.3g}.", stacklevel=3)
        return path

    def _flow(self, times: list[float], rtol: float, phase: str) -> TangentPath:
        percent = 0

        def progress(time: float) -> None:  # the integrator also tries times ahead, and steps back
            nonlocal percent
            percent = max(percent, min(99, int(100 * time / (times[-1] or 1.0))))
            self._progress(phase, percent, 100)

        found, reached = [], 0.0
        with self._model.running():
            for reached, parameters in self._loss.flow(times, rtol, progress):  # noqa: B007
                if parameters is not None:
                    found.append((self._loss.outputs(parameters), self._kernel_at(parameters)))
        self._progress(phase, 100, 100)
        return self._path(times, found, None, rtol, reached)

    def _path(
        self,
        times: list[float],
        found: list[tuple[Tensor, Tensor]],
        order: int | None,
        tolerance: float,
        reached: float,
    ) -> TangentPath:
        missing = len(times) - len(found)
        nowhere = (torch.full_like(self._y, torch.nan), self._y.new_full((self.outputs,) * 2, torch.nan))
        outputs, kernels = (torch.stack(parts) for parts in zip(*found, *[nowhere] * missing, strict=True))
        loss = (outputs - self._y).square().flatten(1).sum(1) / (2 * self.samples)
        first = (self._loss.outputs(self._pure.parameters) - self._y).norm().item()
        shaped = outputs.view(len(times), *self._pure.output_shape)
        at = torch.tensor(times, dtype=torch.float64)
        return TangentPath(at, shaped, loss, kernels, first, order, tolerance, None, reached)

    def _kernel_at(self, parameters: dict[str, Tensor]) -> Tensor:
        return kernel_of(self._model, parameters, self._block(levels=0, squares=2), self._progress)

    def _features(self) -> Features:
        if self._start is None:
            with self._model.running(), torch.no_grad():
                self._start = self._model.features(self._pure.parameters, self._pure.leaves)
        return self._start

    def _block(self, levels: int, squares: int) -> int:
        """Return how many samples fit the budget at so many nested derivatives, beside so many [N, N] matrices."""
        item = self._y.element_size()
        matrices = squares * self.outputs**2 * item
        gradients = self._pure.k * self._model.dense_size * item
        each = 2**levels * (3 * self._pure.activation_bytes + 2 * gradients)
        free = self._budget - matrices
        if free < 2 * each:
            raise ValueError(
                f"{self.outputs} outputs need about {matrices + 2 * each:.2g} bytes: {matrices:.2g} for matrices "
                f"[N, N], the rest for the gradients of two samples; the budget is {self._budget:.2g}. Raise budget=, "
                "or take fewer samples."
            )
        return min(self.samples, free // (2 * each))

    def _check_derivatives(self, order: int) -> None:
        """Warn where derivatives jump; elsewhere see that they are right."""
        if order <= self._checked:
            return
        if not self._pure.kinks and self._pure.dtype == torch.float64:
            check_derivatives(self._model, order)
        elif self._pure.kinks and not self._checked:
            warnings.warn(
                f"The model uses {', '.join(self._pure.kinks)}, whose derivatives jump. K3, K4 and the rates hold "
                "between the jumps: they leave out what happens when a sample crosses one, which need not be small. "
                "Smooth activations (tanh, erf, GELU) have an exact hierarchy.",
                stacklevel=4,
            )
        self._checked = order

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self._y)


def _targets(y: Tensor, pure: PureModel) -> Tensor:
    """Return the targets as [n, k], or raise."""
    instance("y", y, Tensor, "a tensor")
    wanted = list(pure.output_shape)
    single = pure.k == 1 and list(y.shape) in ([pure.n], [pure.n, 1])
    if list(y.shape) != wanted and not single:
        hint = ""
        if not y.is_floating_point() and list(y.shape) == [pure.n]:
            hint = f" Class numbers become targets by torch.nn.functional.one_hot(y, {pure.k})."
        raise ValueError(f"y has shape {list(y.shape)}, the model's outputs have {wanted}: they have to agree.{hint}")
    if y.is_complex() or not y.isfinite().all():
        raise ValueError("y has to hold finite real numbers.")
    return normal(y.detach()).to(pure.device, pure.dtype).reshape(pure.n, pure.k)


def _check_order(order: int, least: int = 2) -> None:
    if isinstance(order, bool) or order not in range(least, least + 3):
        raise ValueError(f"order has to be {least}, {least + 1} or {least + 2}, got {order!r}.")


def _array(t: Tensor) -> np.ndarray:
    return t.detach().double().cpu().numpy()


def _size(array: np.ndarray) -> float:
    return float(np.abs(array).max()) or 1.0
