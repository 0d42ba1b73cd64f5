"""Per-sample gradients of any parameter of any model, by `torch.func`, and by loops where that cannot.

Slower than what `capture.py` does, and it forms the gradients: it is for those parameters that no
recognised layer accounts for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from abyssal.tangent.batch import Batch
from abyssal.tangent.modes import many_at_once, spread
from abyssal.tangent.subject import Subject

__all__ = ["Fallback"]


class Fallback:
    """Per-sample gradients of chosen parameters.

    Args:
        subject: any model.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.vectorised = True

    def __call__(self, parameters: Mapping[str, nn.Parameter], batch: Batch, outputs: slice) -> dict[str, Tensor]:
        """Return gradients of the chosen outputs, by parameter: of a complex one, by its real and imaginary parts.

        Each [n, A, numel].
        """
        if self.vectorised:
            try:
                found = self._by_vmap(parameters, batch, outputs)
            except Exception:  # whatever a model does that vmap does not know; the loop says if it is a real fault
                self.vectorised = False
            else:
                if self._is_right(found, parameters, batch, outputs):
                    return found
                self.vectorised = False
        return self._by_loops(parameters, batch, outputs)

    def _is_right(
        self, found: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], batch: Batch, outputs: slice
    ) -> bool:
        """Whether autograd, on the model's own parameters, gives the same for one combination of all that was found.

        Parameters that are handed over are cut off from some uses without a word: a slice of a ParameterList wraps its
        entries anew.
        """
        values = self.subject.run(batch)[:, outputs]
        weights = spread(values).to(values)
        true: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if values.requires_grad:
            true = torch.autograd.grad((values * weights).sum(), list(parameters.values()), allow_unused=True)
        for g, ours in zip(true, found.values(), strict=True):
            mine = torch.einsum("na,nap->p", weights.to(ours), ours)
            gap = mine if g is None else mine - _real(g).flatten().to(mine)
            # Terms of a sum that vanishes may not.
            size = float(torch.linalg.vector_norm(ours)) * float(weights.abs().max())
            if not float(gap.norm()) <= torch.finfo(weights.dtype).eps ** 0.5 * size:
                return False
        return True

    def _by_vmap(self, parameters: Mapping[str, nn.Parameter], batch: Batch, outputs: slice) -> dict[str, Tensor]:
        def one(values: dict[str, Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
            whole = {
                name: torch.view_as_complex(t) if parameters[name].is_complex() else t for name, t in values.items()
            }
            return self.subject.run(batch.with_tensors([t[None] for t in tensors]), whole)[0, outputs]

        values = {name: _real(p.detach()) for name, p in parameters.items()}
        with many_at_once():
            found = vmap(jacrev(one), in_dims=(None, 0))(values, tuple(batch.tensors))
        return {name: j.detach().flatten(2) if j.dim() > 2 else j.detach()[..., None] for name, j in found.items()}

    def _by_loops(self, parameters: Mapping[str, nn.Parameter], batch: Batch, outputs: slice) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for i in range(batch.n):
            found = self.subject.run(batch[i : i + 1])[0, outputs]
            for k in range(len(found)):
                grads: tuple[Tensor | None, ...] = (None,) * len(parameters)
                if found.requires_grad:
                    keep = k + 1 < len(found)
                    grads = torch.autograd.grad(
                        found[k], list(parameters.values()), retain_graph=keep, allow_unused=True
                    )
                for (name, p), g in zip(parameters.items(), grads, strict=True):
                    rows[name].append(_real(torch.zeros_like(p) if g is None else g).flatten())
        return {name: torch.stack(row).view(batch.n, -1, row[0].numel()) for name, row in rows.items()}


def _real(value: Tensor) -> Tensor:
    """Return a complex tensor as its real and imaginary parts, [..., 2]; others as they are."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
