"""Studies on Li, Luo and Yip's network: cells of one network, one width and a few seeds, and what is made of them.

A cell names everything it depends on; its samples depend on data, their number and the seed alone, so that both
networks at every width see the same ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abyssal.papers.experiment import Row, Work
from abyssal.papers.networks.lly_batch import NETWORKS, Networks, build, higher_kernels
from abyssal.papers.shared.lly_flow import gradient_flow, truncated_flow
from abyssal.sweep import seed_of
from abyssal.util.checks import one_of
from abyssal.util.stats import Interval, Slope, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLOUR",
    "DATA",
    "PAPER",
    "SHORT",
    "Problem",
    "as_width",
    "check_samples",
    "convergence",
    "draw",
    "drift",
    "factor",
    "followed",
    "grid_of_networks",
    "least",
    "one_scale",
    "samples",
    "seed_chunks",
    "truncation",
]

PAPER = "Li, Luo, Yip 2020, arXiv 2007.03714"
COLOUR = {"resnet": "#1b6ca8", "plain": "#c8553d"}
SHORT = {"resnet": "ResNet", "plain": "fully connected"}
Found = tuple[dict[str, Any], int, int, dict[str, Any]]
DATA = ("sphere", "digits")
_FIT_STEP = 0.1  # n / lambda_max; leaves 1e-8 of the outputs' motion, below order 4's error at every width here
_AT_ONCE = 48 << 20  # bytes of the weights of one cell


@dataclass(frozen=True)
class Problem:
    """What is trained, and on which samples: the settings of the experiments that follow a training begin with it.

    Attributes:
        widths: m, ascending.
        seeds: of weights and samples.
        depth: L, the first layer counted.
        n: samples.
        features: length of a sample on the sphere.
        data: "sphere" or "digits".
        activation: a smooth one: "tanh", "erf" or "sin".
        c_res: strength of the residual branches.
    """

    widths: tuple[int, ...]
    seeds: int
    _: KW_ONLY
    depth: int = 8
    n: int = 10
    features: int = 10
    data: str = "sphere"
    activation: str = "tanh"
    c_res: float = 1.0


def grid_of_networks(
    work: Work,
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    common: Mapping[str, Any],
    phase: str,
    *,
    widths: Sequence[int],
    seeds: int,
    networks: Sequence[str] = tuple(NETWORKS),
    **more: Sequence[Any],
) -> Iterator[Found]:
    """Compute a cell for each network, width, handful of seeds, and value of what else varies (`more`).

    Yields:
        The cell, the seed, its place in the cell's results, and these.
    """
    cells: list[dict[str, Any]] = [
        {**common, "network": network, "width": width, "seeds": chunk}
        for network in networks
        for width in widths
        for chunk in seed_chunks(seeds, width, common["depth"])
    ]
    for name, values in more.items():
        cells = [{**cell, name: value} for cell in cells for value in values]
    for cell, found in zip(cells, work.cells(function, cells, phase=phase), strict=True):
        for place, seed in enumerate(cell["seeds"]):
            yield cell, seed, place, found


def followed(
    settings: Problem, work: Work, function: Callable[[Mapping[str, Any]], Mapping[str, Any]], phase: str, **more: Any
) -> Iterator[tuple[Row, int, dict[str, Any]]]:
    """Compute a cell for each network, width and handful of seeds; all share the other settings, and `more`.

    Yields:
        What a row begins with (network, width, seed), the seed's place in the cell's results, and these.
    """
    common = {name: value for name, value in asdict(settings).items() if name not in ("widths", "seeds")} | more
    for cell, seed, place, found in grid_of_networks(
        work, function, common, phase, widths=settings.widths, seeds=settings.seeds
    ):
        yield {"network": cell["network"], "width": cell["width"], "seed": seed}, place, found


def factor(above: Mapping[int, float], below: Mapping[int, float]) -> Interval:
    """Return the geometric mean over seeds of the one by the other, and its 95 % interval (Student's, of logs)."""
    logs = mean(np.log([above[seed] / below[seed] for seed in above if seed in below]))
    return Interval(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high))


def as_width(slope: Slope) -> str:
    """Write a power as one of the width m."""
    return str(slope).replace("L^", "m^")


def one_scale(every: Sequence[Axes], values: Sequence[float], most: float = math.inf) -> None:
    """Give all panels the logarithmic scale that shows these values, up to a largest one."""
    shown = [value for value in values if 0 < value < math.inf]
    for axes in every:
        axes.set_yscale("log")
        if shown:
            axes.set_ylim(min(shown) / 1.5, min(most, max(shown)) * 1.5)


def draw(axes: Axes, sizes: Sequence[float], values: np.ndarray, label: str, colour: str, style: str = "o-") -> None:
    """Draw the medians over seeds, and the middle half of seeds behind them ([sizes, seeds])."""
    low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75], axis=1)
    axes.plot(sizes, middle, style, color=colour, label=label, markersize=4)
    axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)


# ---------------------------------------------------------------------- cells


def check_samples(data: str, n: int) -> None:
    """Raise unless there are so many samples of that kind.

    Raises:
        ValueError: for other data, fewer than 2 samples, or more than there are.
    """
    one_of("data", data, DATA)
    most = len(_digits()[0]) if data == "digits" else None
    if n < 2 or (most is not None and n > most):
        raise ValueError(f"n has to be at least 2{f' and at most {most} with digits' if most else ''}, got {n}.")


def samples(data: str, n: int, features: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw samples of norm 1 and a target for each.

    Args:
        data: "sphere": uniform on the unit sphere, targets standard normal. "digits": scikit-learn's images of 8 x 8
            pixels less their mean image, divided by their norm; the target is +1 for an odd digit, -1 for an even one.
        n: samples of each seed.
        features: their length on the sphere.
        seeds: a draw for each.

    Returns:
        Samples [seeds, n, features] and targets [seeds, n], float64.
    """
    xs, ys = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed_of({"data": data, "n": n, "seed": seed}, role="samples"))
        if data == "digits":
            images, targets = _digits()
            chosen = torch.randperm(len(images), generator=generator)[:n]
            xs.append(images[chosen])
            ys.append(targets[chosen])
        else:
            x = torch.randn(n, features, generator=generator, dtype=torch.float64)
            xs.append(x / x.norm(dim=1, keepdim=True))
            ys.append(torch.randn(n, generator=generator, dtype=torch.float64))
    return torch.stack(xs), torch.stack(ys)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from abyssal.demo.digits import load_digits

    digits = load_digits(test_share=0.0)
    images = digits.train_images.flatten(1).double()
    images = images - images.mean(0)
    return images / images.norm(dim=1, keepdim=True), (digits.train_labels % 2 * 2 - 1).double()


def seed_chunks(seeds: int, width: int, depth: int) -> list[list[int]]:
    """Divide seeds among cells, so that a cell's networks take some 50 MB at most."""
    at_once = max(1, min(8, _AT_ONCE // (8 * depth * width * width)))
    return [list(range(i, min(seeds, i + at_once))) for i in range(0, seeds, at_once)]


def _start(cell: Mapping[str, Any]) -> tuple[Networks, Tensor, Tensor, Tensor]:
    """Build a cell's networks; return them with samples, targets and the eigenvalues of K2, ascending."""
    x, y = samples(cell["data"], cell["n"], cell["features"], cell["seeds"])
    networks = build(
        cell["network"], cell["width"], cell["depth"], x.shape[-1], cell["seeds"], cell["activation"], cell["c_res"]
    )
    return networks, x, y, torch.linalg.eigvalsh(networks.kernel(x))


def drift(cell: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Look at kernels while networks train, at times in units of `n / lambda_max` and of `n / lambda_min`.

    Args:
        cell: network, width, depth, n, data, features, activation, c_res, seeds; `by_largest` and `by_least`: times;
            `order`: 4 for sup|K3| and sup|K4| at the start, 2 for neither.

    Returns:
        eigenvalues [seeds, n], descending; drift, `|K_t - K_0| / |K_0|`, and loss / loss_0, [seeds, looks], the looks
        by_largest before those by_least; least, `lambda_min(K_t) / lambda_min(K_0)`, likewise; K2, K3, K4: largest
        absolute entries. [seeds]
    """
    networks, x, y, values = _start(cell)
    count = len(cell["by_largest"])
    taus = torch.tensor([*cell["by_largest"], *cell["by_least"]], dtype=torch.float64)
    scale = torch.cat([values[:, -1:].expand(-1, count), values[:, :1].expand(-1, len(taus) - count)], 1)
    times, order = (taus * cell["n"] / scale).sort(dim=1)
    flow = gradient_flow(networks, x, y, torch.cat([torch.zeros_like(times[:, :1]), times], 1).mT)
    losses = flow.losses(y)
    least = torch.linalg.eigvalsh(flow.kernels)[..., 0]
    back = order.argsort(dim=1)
    found = {
        "eigenvalues": values.flip(1),
        "drift": flow.drift()[1:].mT.gather(1, back),
        "loss": (losses / losses[0])[1:].mT.gather(1, back),
        "least": (least / least[0])[1:].mT.gather(1, back),
    }
    kernels = higher_kernels(networks, x) if cell["order"] >= 4 else (networks.kernel(x),)
    for name, kernel in zip(("K2", "K3", "K4"), kernels, strict=False):
        assert kernel is not None
        found[name] = kernel.flatten(1).abs().amax(1)
    return {name: value.numpy() for name, value in found.items()}


def truncation(cell: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Compare the hierarchy cut off at orders 2, 3 and 4 with the true flow.

    Args:
        cell: as of `drift`; `times` to look at; `unit`: "largest", they are in units of each network's own
            `n / lambda_max`; "time", they are the residual network's own, and the plain one is looked at at equal
            `t lambda_max`, lambda_max being that of the residual network of the same seed.

    Returns:
        kernel: relative errors of K2 in Frobenius norm, [seeds, orders, times]; outputs: largest errors of an output
        by the largest target, likewise; drift, `|K_t - K_0| / |K_0|`, [seeds, times].
    """
    networks, x, y, values = _start(cell)
    times = torch.tensor([0.0, *cell["times"]], dtype=torch.float64)[:, None].expand(-1, len(networks))
    if cell["unit"] == "largest":
        times = times * cell["n"] / values[:, -1]
    elif cell["network"] != "resnet":
        *_, of_resnet = _start({**cell, "network": "resnet"})
        times = times * of_resnet[:, -1] / values[:, -1]
    flow = gradient_flow(networks, x, y, times, _FIT_STEP)
    kernels = higher_kernels(networks, x)
    size = torch.linalg.matrix_norm(flow.kernels)
    of_kernel, of_outputs = [], []
    for order in (2, 3, 4):
        given = [kernel for kernel in kernels[: order - 1] if kernel is not None]
        outputs, predicted = truncated_flow(flow.outputs[0], given, y, times, _FIT_STEP)
        of_kernel.append((torch.linalg.matrix_norm(predicted - flow.kernels) / size)[1:].mT)
        off = (outputs - flow.outputs).abs().amax(-1) / y.abs().amax(-1)
        of_outputs.append(off[1:].mT)
    found = {"kernel": torch.stack(of_kernel, 1), "outputs": torch.stack(of_outputs, 1), "drift": flow.drift()[1:].mT}
    return {name: value.numpy() for name, value in found.items()}


def least(cell: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Train until the loss is 1 % of what it was, and see how far the least eigenvalue fell on the way.

    Args:
        cell: as of `drift`; `longest`: when to give up, in units of `n / lambda_max`.

    Returns:
        ratio: the least of `lambda_min(K_t) / lambda_min(K_0)` [seeds]; lambda_max, lambda_min at the start; loss at
        the end by that at the start; time at the end in units of `n / lambda_max`.
    """
    networks, x, y, values = _start(cell)
    taus = torch.cat([torch.zeros(1), torch.logspace(-1, math.log10(cell["longest"]), 10 * cell["looks"] + 1)])
    first = (networks.outputs(x) - y).square().mean(-1)

    def reached(outputs: Tensor) -> Tensor:
        return (outputs - y).square().mean(-1) <= 0.01 * first

    flow = gradient_flow(
        networks,
        x,
        y,
        taus.double()[:, None] * cell["n"] / values[:, -1],
        1.0,
        lambda outputs: bool(reached(outputs).all()),
    )
    done = torch.stack([reached(outputs) for outputs in flow.outputs])
    over = done.cumsum(0) > 1  # looks after the first one that is there do not count
    smallest = torch.linalg.eigvalsh(flow.kernels)[..., 0]
    ratio = torch.where(over, torch.inf, smallest / smallest[0]).amin(0)
    last = (~over).sum(0) - 1
    losses = flow.losses(y)
    return {
        "ratio": ratio.numpy(),
        "lambda_max": values[:, -1].numpy(),
        "lambda_min": values[:, 0].numpy(),
        "loss": (losses.gather(0, last[None])[0] / losses[0]).numpy(),
        "time": taus.double()[last].numpy(),
    }


def convergence(cell: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Follow the loss to times counted in `n / lambda_min`.

    Args:
        cell: as of `drift`; `by_least`: times.

    Returns:
        log_loss: log of loss / loss_0 [seeds, looks]; frozen: the same for the flow of a kernel that stands still;
        least: `lambda_min(K_t) / lambda_min(K_0)`; lambda_min, lambda_max [seeds].
    """
    networks, x, y, values = _start(cell)
    taus = torch.tensor([0.0, *cell["by_least"]], dtype=torch.float64)
    times = taus[:, None] * cell["n"] / values[:, 0]
    flow = gradient_flow(networks, x, y, times)
    losses = flow.losses(y)
    lowest = torch.linalg.eigvalsh(flow.kernels)[..., 0]
    vectors = torch.linalg.eigh(flow.kernels[0]).eigenvectors
    modes = torch.einsum("sni,sn->si", vectors, flow.outputs[0] - y).square()
    decay = torch.exp(-2 * times[..., None] * values / cell["n"])  # [looks, seeds, n]
    frozen = (decay * modes).sum(-1) / modes.sum(-1)
    return {
        "log_loss": (losses / losses[0]).log()[1:].mT.numpy(),
        "frozen": frozen.log()[1:].mT.numpy(),
        "least": (lowest / lowest[0])[1:].mT.numpy(),
        "lambda_min": values[:, 0].numpy(),
        "lambda_max": values[:, -1].numpy(),
    }
