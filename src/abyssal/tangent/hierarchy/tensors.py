"""The third and fourth kernels of the hierarchy as tensors.

With `J_a` the gradient of output a, `H_a` its Hessian and `D^3 f_a` its third derivative, by the product rule

    K3[a, b, c]    = S[a; b, c] + S[b; a, c],                               S[a; b, c] = J_b . H_a J_c
    K4[a, b, c, d] = T[a; b, c, d] + T[b; a, c, d] + <H_a J_c, H_b J_d> + <H_b J_c, H_a J_d>
                     + <H_a J_b, H_c J_d> + <H_b J_a, H_c J_d>,             T[a; b, c, d] = D^3 f_a [J_b, J_c, J_d].

So K4 needs N Hessian products of all outputs, their inner products, and T. T is symmetric in its last three: one third
derivative along (c, d) gives T[a; b, c, d] for all a and b, and among any three of the N outputs two are in the same
half, so that pairs (c, d) within halves are enough: N^2/4 of the N^2.

Source of the hierarchy: Huang and Yau, arXiv 1909.08156; the formulas are ours, by the product rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vmap

from abyssal.tangent.batch import cut
from abyssal.tangent.hierarchy.factored import Directions, FactoredModel, Features, outer_products
from abyssal.util.progress import Progress

__all__ = ["KernelTensors"]

Item = TypeVar("Item")
# More directions at once than this gained nothing in speed.
_LARGEST_CHUNK = 64


class KernelTensors:
    """K3 and K4 of a model's outputs on its samples.

    Args:
        model: the model.
        start: its features at the parameters.
        budget: bytes for what is alive beside the results.
        progress: called with the phase, what is done and how much there is.
    """

    def __init__(self, model: FactoredModel, start: Features, budget: int, progress: Progress) -> None:
        self.model, self.pure, self.start = model, model.pure, start
        self.budget, self.progress = budget, progress
        self.count = self.pure.n * self.pure.k
        self.directions = Directions(start.inputs, start.cotangents)
        self.gradients = {name: g.flatten(0, 1) for name, g in start.dense.items()}  # [N, ...]
        self.steps = torch.eye(self.count, dtype=start.outputs.dtype, device=start.outputs.device)

    def third(self) -> Tensor:
        """Return K3. [N, N, N]."""
        s = self.steps.new_empty(self.count, self.count, self.count)
        with self.model.running():
            for block in self._blocks("K3", range(self.count), levels=1):
                found = vmap(lambda g, step: self._contract(self._tangent(g, step, taps=False)))(*self._along(block))
                s[:, :, block] = found.permute(1, 2, 0)  # from [c, a, b]
        return s + s.transpose(0, 1)

    def fourth(self) -> Tensor:
        """Return K4. [N, N, N, N]."""
        with self.model.running():
            t = self._third_derivatives()
            found = t + t.transpose(0, 1)
            del t
            w = self._hessian_products()  # w[a, c, b, d] = <H_a J_c, H_b J_d>
        found += w.transpose(1, 2)
        found += w.permute(2, 0, 1, 3)
        found += w
        found += w.transpose(0, 1)
        return found

    def _third_derivatives(self) -> Tensor:
        """Return T[a; b, c, d]. [N, N, N, N]."""
        n = self.count
        t = self.steps.new_empty(n, n, n, n)
        half = n // 2
        pairs = [(c, d) for c in range(n) for d in range(c, n) if (c < half) == (d < half)]
        for block in self._blocks("K4", pairs, levels=2):
            c, d = ([pair[i] for pair in block] for i in range(2))
            found = vmap(self._second_tangent)(*self._along(c), *self._along(d)).permute(1, 2, 0)  # [a, b, pair]
            t[:, :, c, d] = t[:, :, d, c] = found
            swapped = found.transpose(1, 2)  # [a, pair, b]
            t[:, c, :, d] = t[:, d, :, c] = found.permute(2, 0, 1)
            t[:, c, d, :] = t[:, d, c, :] = swapped
        return t

    def _hessian_products(self) -> Tensor:
        """Return <H_a J_c, H_b J_d> at [a, c, b, d]. [N, N, N, N]."""
        n, k, count = self.pure.n, self.pure.k, self.count
        w = self.steps.new_empty(n, k, count, n, k, count)
        tiles = self._tiles()
        for i, left in enumerate(tiles):
            a = self._hessian_directions(left)
            for right in tiles[: i + 1]:
                b = a if right is left else self._hessian_directions(right)
                found = self._inner(a, b)  # [c, n, k, d, n, k]
                w[:, :, left, :, :, right] = found.permute(1, 2, 0, 4, 5, 3)
                if right is not left:
                    w[:, :, right, :, :, left] = found.permute(4, 5, 3, 1, 2, 0)
        return w.view(count, count, count, count)

    def _hessian_directions(self, tile: slice) -> Features:
        """Return `H_a J_c` for all a and the tile's c, as factors' tangents. [c, ...] each."""
        parts = []
        for block in self._blocks("Hessian products", range(self.count)[tile], levels=1):
            parts.append(vmap(lambda g, step: self._tangent(g, step, taps=True))(*self._along(block)))
        inputs, cotangents = (
            [torch.cat([getattr(p, name)[i] for p in parts]) for i in range(len(self.model.sites))]
            for name in ("inputs", "cotangents")
        )
        dense = {name: torch.cat([p.dense[name] for p in parts]) for name in self.gradients}
        return Features(torch.empty(0), inputs, cotangents, dense, torch.empty(0))

    def _inner(self, a: Features, b: Features) -> Tensor:
        """Return the inner products of `H_a J_c` with one another. [c, n, k, d, n, k]."""
        n, k = self.pure.n, self.pure.k
        found: Tensor | float = 0.0
        for i, site in enumerate(self.model.sites):
            x, delta = self.start.inputs[i][None], self.start.cotangents[i][None]
            # (delta x^T)' = delta' x^T + delta x'^T: two terms each, and four products.
            for delta_a, x_a in ((a.cotangents[i], x), (delta, a.inputs[i])):
                for delta_b, x_b in ((b.cotangents[i], x), (delta, b.inputs[i])):
                    bias = site.bias and delta_a is not delta and delta_b is not delta
                    found = found + outer_products(site, x_a, delta_a, x_b, delta_b, bias)
        for name in self.gradients:
            left, right = (t.dense[name].flatten(3).flatten(0, 2) for t in (a, b))
            found = found + (left @ right.T).view(-1, n, k, len(right) // (n * k), n, k)
        assert isinstance(found, Tensor)
        return found

    def _second_tangent(
        self, gradient: dict[str, Tensor], step: Tensor, gradient_2: dict[str, Tensor], step_2: Tensor
    ) -> Tensor:
        """Return T[a; b, c, d] for one pair (c, d). [N, N]."""

        def inner(dense: dict[str, Tensor], shift: Tensor) -> Features:
            return jvp(self._evaluate, (dense, shift), (gradient, step))[1]

        return self._contract(jvp(inner, self._origin(), (gradient_2, step_2))[1])

    def _tangent(self, gradient: dict[str, Tensor], step: Tensor, taps: bool) -> Features:
        return jvp(lambda dense, shift: self._evaluate(dense, shift, taps), self._origin(), (gradient, step))[1]

    def _evaluate(self, dense: dict[str, Tensor], shift: Tensor, taps: bool = False) -> Features:
        parameters = self.pure.parameters | dense
        return self.model.features(parameters, self.pure.leaves, shift=shift, directions=self.directions, taps=taps)

    def _origin(self) -> tuple[dict[str, Tensor], Tensor]:
        # jvp wants tangents under the primals' keys in the primals' order: both are made from `gradients`.
        return {name: self.pure.parameters[name] for name in self.gradients}, self.steps.new_zeros(self.count)

    def _contract(self, tangent: Features) -> Tensor:
        """Return the inner products of gradients' tangents with all gradients. [N, N]."""
        found = tangent.shift.flatten(0, 1)
        for name, g in self.gradients.items():
            found = found + tangent.dense[name].flatten(2).flatten(0, 1) @ g.flatten(1).T
        return found

    def _along(self, block: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        return {name: g[block] for name, g in self.gradients.items()}, self.steps[block]

    def _blocks(self, phase: str, items: Sequence[Item], levels: int) -> Iterator[list[Item]]:
        """Cut work into chunks that fit the budget, and report progress."""
        chunk = min(_LARGEST_CHUNK, max(1, self._free(phase) // self._bytes_of_direction(levels)))
        for done in range(0, len(items), chunk):
            self.progress(phase, done, len(items))
            yield list(items[done : done + chunk])
        self.progress(phase, len(items), len(items))

    def _tiles(self) -> list[slice]:
        """Cut the Hessian products' directions so that two tiles and their inner products fit the budget."""
        each, free = self._bytes_of_product(), self._free("K4")
        size = self.count
        while size > 1 and 2 * size * each + 3 * (size * self.count) ** 2 * self._item > free:
            size -= 1
        return cut(0, self.count, size)

    @property
    def _item(self) -> int:
        return self.steps.element_size()

    def _free(self, phase: str) -> int:
        return self.budget - self.bytes_of_result(3 if phase == "K3" else 4)

    def bytes_of_result(self, order: int) -> int:
        """Bytes of the tensor and of what it is added up from."""
        return {3: 2, 4: 3}[order] * self.count**order * self._item

    def least_budget(self, order: int) -> int:
        """Return the smallest budget that works, in bytes."""
        work = self._bytes_of_direction(order - 2)
        if order == 4:
            work = max(work, 2 * self._bytes_of_product() + 3 * self.count**2 * self._item)
        return self.bytes_of_result(order) + work

    def _bytes_of_direction(self, levels: int) -> int:
        """Estimate what is alive while one direction of so many nested derivatives is computed."""
        shifted = sum(x.shape[1] for x in self.start.inputs) * self.count * self._item
        activations = self.pure.activation_bytes + 4 * shifted
        return 2**levels * self.pure.n * (3 * activations + 2 * self.pure.k * self.model.dense_size * self._item)

    def _bytes_of_product(self) -> int:
        """Bytes of all `H_a J_c` for one c."""
        factors = zip(self.start.inputs, self.start.cotangents, strict=True)
        numbers = sum(x[0].numel() + delta[0].numel() for x, delta in factors)
        return self.pure.n * (numbers + self.pure.k * self.model.dense_size) * self._item
