"""A grid trains each cell as it would be trained alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from abyssal.nn.grid.grid import GridWeights, ResidualGrid
from abyssal.nn.grid.updates import Adam, Sgd, Update

CELLS, DEPTH, WIDTH, FEATURES, CLASSES = 7, 11, 6, 5, 3
SCALES = torch.tensor([DEPTH**-beta for beta in (0.25, 0.5, 0.75, 1.0, 0.5, 0.6, 0.7)], dtype=torch.float64)

Start = dict[str, Tensor]


def start(network: str, cells: int = CELLS, depth: int = DEPTH, width: int = WIDTH, seed: int = 0) -> Start:
    """Initial weights in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator) / math.sqrt(shape[-1])

    found = {
        "stem": draw(cells, width, FEATURES),
        "outer": draw(cells, depth, width, width),
        "head": draw(cells, CLASSES, width),
    }
    return found | ({"inner": draw(cells, depth, width, width)} if network == "res3" else {})


def batches(count: int, size: int = 8, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Minibatches, the last one smaller."""
    generator = torch.Generator().manual_seed(1)
    sizes = [size] * (count - 1) + [size - 3]
    x = [torch.randn(n, FEATURES, dtype=torch.float64, generator=generator).to(dtype) for n in sizes]
    return [(part, torch.randint(CLASSES, (len(part),), generator=generator)) for part in x]


class Alone(nn.Module):
    """One cell, written as anybody would."""

    def __init__(self, weights: Start, cell: int, scale: float) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(t[cell].clone()) for name, t in weights.items()})
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weights["stem"].T
        outer = self.weights["outer"].unbind(0)
        inner = self.weights["inner"].unbind(0) if "inner" in self.weights else [None] * len(outer)
        for w, v in zip(inner, outer, strict=True):
            u = h if w is None else h @ w.T
            h = h + self.scale * torch.relu(u) @ v.T
        return h @ self.weights["head"].T


def train_alone(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]], loss: Callable
) -> Tensor:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


OPTIMIZERS: dict[str, tuple[Update, Callable, float]] = {
    "sgd": (Sgd(), lambda p, lr: torch.optim.SGD(p, lr=lr), 0.2),
    "momentum": (Sgd(momentum=0.8), lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.8), 0.1),
    "adam": (Adam(), lambda p, lr: torch.optim.Adam(p, lr=lr), 0.01),
    "adam, other": (
        Adam(betas=(0.5, 0.9), eps=1e-3),
        lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.5, 0.9), eps=1e-3),
        0.01,
    ),
}


@pytest.mark.parametrize("network", ["res1", "res3"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("segment", [None, 4, DEPTH])
def test_every_cell_is_trained_as_it_would_be_alone(network: str, name: str, segment: int | None) -> None:
    update, optimizer, rate = OPTIMIZERS[name]
    weights = start(network)
    rates = rate * torch.linspace(0.2, 1, CELLS, dtype=torch.float64)
    grid = ResidualGrid(**weights, scale=SCALES, learning_rate=rates, update=update, cells_at_once=3, segment=segment)
    data = batches(8)
    losses = torch.stack([grid.step(x, y) for x, y in data])
    for cell in range(CELLS):
        model = Alone(weights, cell, SCALES[cell].item())
        expected = train_alone(
            model, optimizer(model.parameters(), rates[cell].item()), data, nn.functional.cross_entropy
        )
        torch.testing.assert_close(losses[:, cell], expected, rtol=1e-10, atol=1e-10)
        found = grid.weights(cell)
        for key, value in model.weights.items():
            torch.testing.assert_close(getattr(found, key), value.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["res1", "res3"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_in_float32_and_depth_200_losses_agree_to_1e_4_over_20_steps(network: str, name: str) -> None:
    update, optimizer, rate = OPTIMIZERS[name]
    depth, width, cells = 200, 30, 4
    weights = {key: t.float() for key, t in start(network, cells, depth, width).items()}
    scales = [depth**-beta for beta in (0.5, 0.6, 0.8, 1.0)]
    rates = [0.1 * rate, 0.2 * rate, 0.05 * rate, 0.1 * rate]
    grid = ResidualGrid(**weights, scale=scales, learning_rate=rates, update=update)
    data = batches(20, 16, torch.float32)
    losses = torch.stack([grid.step(x, y) for x, y in data])
    for cell in range(cells):
        model = Alone(weights, cell, scales[cell])
        expected = train_alone(model, optimizer(model.parameters(), rates[cell]), data, nn.functional.cross_entropy)
        torch.testing.assert_close(losses[:, cell], expected, rtol=1e-4, atol=1e-4)


def test_squared_errors_are_means_over_samples_and_outputs() -> None:
    weights = start("res3")
    grid = ResidualGrid(**weights, scale=SCALES, learning_rate=0.1, update=Sgd(), loss="mse")
    data = [(x, torch.randn(len(x), CLASSES, dtype=x.dtype)) for x, _ in batches(5)]
    losses = torch.stack([grid.step(x, y) for x, y in data])
    for cell in (0, 6):
        model = Alone(weights, cell, SCALES[cell].item())
        expected = train_alone(model, torch.optim.SGD(model.parameters(), 0.1), data, nn.functional.mse_loss)
        torch.testing.assert_close(losses[:, cell], expected, rtol=1e-10, atol=1e-10)


def test_a_schedule_sets_learning_rates_between_steps() -> None:
    weights = start("res1")
    grid = ResidualGrid(**weights, scale=SCALES, learning_rate=0.1)
    data = batches(6)
    model = Alone(weights, 2, SCALES[2].item())
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for n, (x, y) in enumerate(data):
        if n == 3:
            grid.learning_rate = grid.learning_rate / 10
            optimizer.param_groups[0]["lr"] /= 10
        expected = train_alone(model, optimizer, [(x, y)], nn.functional.cross_entropy)[0]
        torch.testing.assert_close(grid.step(x, y)[2], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("at_once", [1, 3, CELLS])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_diverged_cells_fail_early_and_leave_the_others_as_they_were(at_once: int, name: str) -> None:
    """Cell 1 starts with NaN, cell 3 overflows at once, cell 5 after a few steps of a rate that is far too large."""
    weights = start("res3")
    weights["outer"][1, 4, 2, 3] = math.nan
    weights["outer"][3] *= 1e200
    update, _, rate = OPTIMIZERS[name]
    rates = torch.full((CELLS,), rate, dtype=torch.float64)
    rates[5] = 1e6
    data = batches(8)

    def run(cells: list[int], **options: int) -> tuple[ResidualGrid, Tensor]:
        part = {key: t[cells] for key, t in weights.items()}
        grid = ResidualGrid(**part, scale=SCALES[cells], learning_rate=rates[cells], update=update, **options)
        return grid, torch.stack([grid.step(x, y) for x, y in data])

    grid, losses = run(list(range(CELLS)), cells_at_once=at_once)
    assert sorted(grid.failures) == [1, 3, 5]
    assert grid.failures[1].step == grid.failures[3].step == 1
    assert 1 < grid.failures[5].step <= len(data)
    assert grid.active == [0, 2, 4, 6]
    others, expected = run([0, 2, 4, 6])
    assert not others.failures
    torch.testing.assert_close(losses[:, [0, 2, 4, 6]], expected, rtol=1e-12, atol=1e-12)
    assert bool(losses[1:, [1, 3]].isnan().all())  # not computed any more
    shares = grid.accuracy(*data[0])
    assert shares.isnan().tolist() == [cell in grid.failures for cell in range(CELLS)]


def test_a_failed_cell_keeps_the_weights_it_failed_at() -> None:
    weights = start("res1")
    weights["head"][2] *= 1e9
    grid = ResidualGrid(**weights, scale=SCALES, learning_rate=0.1)
    for x, y in batches(3):
        grid.step(x, y)
    assert list(grid.failures) == [2]
    assert 1e6 < grid.failures[2].loss < math.inf  # finite, and too large
    torch.testing.assert_close(grid.weights(2).outer, weights["outer"][2], rtol=1e-14, atol=0)


def test_without_a_limit_a_loss_that_is_infinite_still_fails() -> None:
    weights = start("res1")
    weights["head"][2] *= 1e307
    weights["head"][4] *= 1e9
    grid = ResidualGrid(**weights, scale=SCALES, learning_rate=0.0, loss="mse", largest_loss=math.inf)
    x, _ = batches(2)[0]
    losses = grid.step(x, torch.zeros(len(x), CLASSES, dtype=x.dtype))
    assert losses[2].item() == math.inf and losses[4].item() > 1e15
    assert list(grid.failures) == [2]


def test_a_grid_whose_cells_all_failed_goes_on_saying_so() -> None:
    weights = start("res1")
    weights["stem"][:] = math.nan
    grid = ResidualGrid(**weights, scale=SCALES, learning_rate=0.1)
    (x, y), _ = batches(2)
    grid.step(x, y)
    assert grid.active == []
    assert bool(grid.step(x, y).isnan().all())
    assert bool(grid.accuracy(x, y).isnan().all())


@pytest.mark.parametrize("network", ["res1", "res3"])
def test_a_cell_as_a_module_computes_the_same(network: str) -> None:
    weights = start(network)
    grid = ResidualGrid(**weights, scale=SCALES, learning_rate=0.1)
    x, y = batches(2)[0]
    grid.step(x, y)
    outputs = grid.outputs(x, batch=3)
    for cell in (0, 6):
        torch.testing.assert_close(grid.module(cell)(x).detach(), outputs[cell], rtol=1e-10, atol=1e-12)


def test_given_weights_are_not_touched() -> None:
    weights = start("res3", cells=1)
    before = {key: t.clone() for key, t in weights.items()}
    expanded = {key: t.expand(3, *t.shape[1:]) for key, t in weights.items()}
    grid = ResidualGrid(**expanded, scale=0.5, learning_rate=[0.0, 0.1, 0.2])
    for x, y in batches(2):
        grid.step(x, y)
    assert all(torch.equal(weights[key], before[key]) for key in weights)
    still: GridWeights = grid.weights(0)
    torch.testing.assert_close(still.outer, before["outer"][0], rtol=1e-14, atol=0)
    assert not torch.equal(grid.weights(1).stem, grid.weights(2).stem)


@pytest.mark.parametrize("network", ["res1", "res3"])
def test_the_stream_takes_a_fraction_of_the_memory(network: str) -> None:
    """States are held for two square roots of the depth, and of a few cells, where others hold all of all cells."""
    depth, weights, data = 100, start(network, depth=100), batches(2, 64)[0]
    held = {}
    for at_once, segment in ((CELLS, depth), (CELLS, 10), (2, 10)):
        grid = ResidualGrid(**weights, scale=0.1, learning_rate=0.01, cells_at_once=at_once, segment=segment)
        grid.step(*data)
        # Blocks of 2 cells share their memory. Besides the stream: two gradients of a layer's weights.
        cells = at_once
        held[at_once, segment] = (grid.stream_bytes - 2 * cells * WIDTH**2 * 8) / (cells * WIDTH * 64 * 8)
    inside = 1 if network == "res1" else 2
    others = 3  # state, gradient, scratch
    assert held[CELLS, depth] == inside * depth + 1 + others
    assert held[CELLS, 10] == held[2, 10] == inside * 10 + 10 + others


def test_few_states_are_all_held_and_many_are_not() -> None:
    weights = {key: t.expand(2, *t.shape[1:]) for key, t in start("res1", 1, 400, 32).items()}
    few = ResidualGrid(**weights, scale=0.1, learning_rate=0.01, batch=256)
    many = ResidualGrid(**weights, scale=0.1, learning_rate=0.01, batch=2048)  # 400 x 32 x 2048 x 8 bytes: 210 MB
    for grid, batch, held in ((few, 256, 400), (many, 2048, 20)):
        grid.step(*batches(2, batch)[0])
        assert grid.stream_bytes >= held * 32 * batch * 8
        assert grid.stream_bytes < 2.5 * (held + 4) * 32 * batch * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outer": torch.zeros(CELLS, DEPTH, WIDTH, WIDTH + 1).double()}, r"outer has to be \[cells, depth, width"),
        ({"inner": torch.zeros(CELLS, 2, WIDTH, WIDTH).double()}, "inner has to have the shape of outer"),
        ({"stem": torch.zeros(CELLS, WIDTH + 1, FEATURES).double()}, "stem has to be"),
        ({"head": torch.zeros(2, CLASSES, WIDTH).double()}, "head has to be"),
        ({"scale": [1.0, 2.0]}, "scale has to be one number or 7"),
        ({"scale": 0.0}, "scale has to be finite and at least"),
        ({"learning_rate": -1.0}, "learning_rate has to be finite and not negative"),
        ({"loss": "hinge"}, "loss has to be one of"),
        ({"segment": 0}, "segment has to be a whole number"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(change: dict, message: str) -> None:
    options = {**start("res1"), "scale": SCALES, "learning_rate": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        ResidualGrid(**options)


def test_minibatches_that_do_not_fit_are_refused() -> None:
    grid = ResidualGrid(**start("res1"), scale=SCALES, learning_rate=0.1)
    x, y = batches(2)[0]
    with pytest.raises(ValueError, match="flatten images first"):
        grid.step(x.view(-1, 1, FEATURES), y)
    with pytest.raises(ValueError, match=r"have to be torch\.float64"):
        grid.step(x.float(), y)
    with pytest.raises(ValueError, match="Labels have to be from 0 to 2"):
        grid.step(x, y + CLASSES)
    with pytest.raises(ValueError, match=r"Labels have to be \[8\]"):
        grid.step(x, y[:3])
    assert grid.steps == 0
