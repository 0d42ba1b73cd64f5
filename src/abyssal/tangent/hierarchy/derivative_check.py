"""Whether torch's nested derivatives of a model are right: against finite differences, before they are used.

torch's formulas for derivatives of high order are little tested, and some are wrong without a word (see `composed.py`).
"""

from __future__ import annotations

import torch

from abyssal.tangent.hierarchy.factored import FactoredModel, gram
from abyssal.tangent.hierarchy.rates import derivatives
from abyssal.tangent.subject import first_line

__all__ = ["check_derivatives"]

# Samples that are looked at.
_FEW = 2
# The step along a direction as long as the parameters. The finite difference's own relative error is the step's square,
# 1e-10, times what two further derivatives multiply by, plus that of rounding, 1e-16 / 1e-5.
_STEP = 1e-5
_TOLERANCE = 1e-4
_ROUNDING = 1e3


def check_derivatives(model: FactoredModel, order: int) -> None:
    """Compare each derivative of the kernel along a random direction with the difference quotient of the one before.

    Args:
        model: the model, in float64.
        order: of the highest derivative that will be used.

    Raises:
        ValueError: if they disagree; or if torch has no such derivative.
    """
    pure = model.pure
    few = pure.samples(slice(0, _FEW))
    direction = _direction(model)

    def kernel(t: torch.Tensor) -> torch.Tensor:
        parameters = {name: p + t * direction[name] for name, p in pure.parameters.items()}
        found = model.features(parameters, few)
        return gram(found, found, model.sites)

    like = next(iter(pure.parameters.values()))
    try:
        with model.running():
            here = derivatives(kernel, order, like)
            above, below = (derivatives(lambda t, s=s: kernel(t + s), order - 1, like) for s in (_STEP, -_STEP))  # type: ignore[misc]
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"torch cannot differentiate this {type(pure.model).__name__} {order} times by forward mode beyond its "
            f"gradient: {first_line(error)}. Compose that operator of simpler ones."
        ) from error
    for level in range(order):
        quotient = (above[level] - below[level]) / (2 * _STEP)
        found = here[level + 1]
        rounding = _ROUNDING * torch.finfo(found.dtype).eps / _STEP * here[level].abs().max()
        off = (quotient - found).abs().max()
        if not off <= _TOLERANCE * found.abs().max() + rounding:
            raise ValueError(
                f"torch's derivatives of this {type(pure.model).__name__} are wrong: derivative {level + 1} of its "
                f"kernel along a direction is off by {off / found.abs().max():.1g}, relative, by finite differences. "
                "An operator in it has a wrong formula for its derivatives of that order, as torch.linalg.det has in "
                "torch 2.13: compose it of simpler ones, and report it to torch."
            )


def _direction(model: FactoredModel) -> dict[str, torch.Tensor]:
    """Return a random direction with the parameters' root mean square."""
    generator = torch.Generator().manual_seed(0)
    parameters = model.pure.parameters
    drawn = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in parameters.items()}
    mean_square = sum(p.square().sum().item() for p in parameters.values()) / model.pure.size
    size = mean_square**0.5 or 1.0
    return {name: size * drawn[name].to(p) for name, p in parameters.items()}
