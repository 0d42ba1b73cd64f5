"""Per-sample gradients of any parameter of any model, by `torch.func`, and by loops where that cannot.

Slower than what :mod:`abyssal.tangent.capture` does, and it forms the gradients: it is for those parameters that no
recognised layer accounts for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from abyssal.tangent.batch import Batch

__all__ = ["Fallback"]


class Fallback:
    """Per-sample gradients of chosen parameters.

    Args:
        model: any.
        flat: from what the model returns to outputs [n, k].
    """

    def __init__(self, model: nn.Module, flat: Callable[[Any, int], Tensor]) -> None:
        self.model = model
        self.flat = flat
        self.vectorised = True
        self._trusted = False

    def __call__(self, parameters: Mapping[str, nn.Parameter], batch: Batch, outputs: slice) -> dict[str, Tensor]:
        """Return gradients of the chosen outputs, by parameter. Each [n, A, numel]."""
        if self.vectorised:
            try:
                found = self._by_vmap(parameters, batch, outputs)
            except Exception:  # whatever a model does that vmap does not know; the loop says if it is a real fault
                self.vectorised = False
            else:
                if self._trusted or self._is_right(found, parameters, batch, outputs):
                    self._trusted = True
                    return found
                self.vectorised = False
        return self._by_loops(parameters, batch, outputs)

    def _is_right(
        self, found: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], batch: Batch, outputs: slice
    ) -> bool:
        """Whether autograd, on the model's own parameters, gives the first sample's gradients too.

        `functional_call` cuts some uses off without a word: a slice of a ParameterList wraps its entries anew.
        """
        args, kwargs = batch[:1].call()
        values = self.flat(self.model(*args, **kwargs), 1)[0, outputs]
        weights = torch.linspace(-1, 1, len(values), dtype=torch.float64).cos_().to(values)
        true = torch.autograd.grad((values * weights).sum(), list(parameters.values()), allow_unused=True)
        for g, ours in zip(true, found.values(), strict=True):
            mine = weights @ ours[0].to(weights)
            gap = mine if g is None else mine - g.flatten().to(weights)
            size = max(float(mine.norm()), 0.0 if g is None else float(g.norm()))
            if float(gap.norm()) > torch.finfo(weights.dtype).eps ** 0.5 * size:
                return False
        return True

    def _by_vmap(self, parameters: Mapping[str, nn.Parameter], batch: Batch, outputs: slice) -> dict[str, Tensor]:
        def one(values: dict[str, Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
            args, kwargs = batch.with_tensors([t[None] for t in tensors])
            found = functional_call(self.model, values, args, kwargs)
            return self.flat(found, 1)[0, outputs]

        values = {name: p.detach() for name, p in parameters.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found = vmap(jacrev(one), in_dims=(None, 0))(values, tuple(batch.tensors))
        return {name: j.detach().flatten(2) if j.dim() > 2 else j.detach()[..., None] for name, j in found.items()}

    def _by_loops(self, parameters: Mapping[str, nn.Parameter], batch: Batch, outputs: slice) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for i in range(batch.n):
            args, kwargs = batch[i : i + 1].call()
            found = self.flat(self.model(*args, **kwargs), 1)[0, outputs]
            for k in range(len(found)):
                grads = torch.autograd.grad(
                    found[k], list(parameters.values()), retain_graph=k + 1 < len(found), allow_unused=True
                )
                for (name, p), g in zip(parameters.items(), grads, strict=True):
                    rows[name].append((torch.zeros_like(p) if g is None else g).flatten())
        return {name: torch.stack(row).view(batch.n, -1, row[0].numel()) for name, row in rows.items()}
