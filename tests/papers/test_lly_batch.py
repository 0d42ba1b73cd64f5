"""Many Li-Luo-Yip networks at once: the same numbers as the modules', brute force's and `Hierarchy`'s."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp

from abyssal.nn import FullyConnectedNTK, LiLuoYipResNet
from abyssal.papers.networks import lly_batch
from abyssal.papers.networks.lly_batch import build, higher_kernels
from abyssal.papers.shared import lly
from abyssal.papers.shared.lly_flow import gradient_flow, truncated_flow
from abyssal.tangent.empirical.ntk import ntk
from abyssal.tangent.hierarchy.hierarchy import Hierarchy

WIDTH, DEPTH, FEATURES, N = 7, 3, 4, 4
SEEDS = [5, 6, 7]
BOTH = pytest.mark.parametrize("network", ["resnet", "plain"])


def problem(n: int = N, features: int = FEATURES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True), torch.randn(n, generator=generator, dtype=torch.float64)


def module(network: str, seed: int, activation: str = "tanh", c_res: float = 1.0, width: int = WIDTH):
    generator = torch.Generator().manual_seed(seed)
    if network == "resnet":
        return LiLuoYipResNet(FEATURES, width, DEPTH, c_res, activation, generator=generator).double()
    return FullyConnectedNTK(FEATURES, width, DEPTH, activation, generator=generator).double()


def by_brute_force(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K2, K3, K4 from full Jacobians, each the derivative of the one before along every sample's gradient."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def jacobian(p):
        return jacrev(lambda q: functional_call(model, q, (x,)))(p)

    def second(p):
        return sum(torch.einsum("ai,bi->ab", g.flatten(1), g.flatten(1)) for g in jacobian(p).values())

    def above(kernel):
        def found(p):
            g = jacobian(p)
            along = [{name: part[c] for name, part in g.items()} for c in range(len(x))]
            return torch.stack([jvp(kernel, (p,), (tangent,))[1] for tangent in along], -1)

        return found

    return second(parameters), above(second)(parameters), above(above(second))(parameters)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> bool:
    return float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@BOTH
@pytest.mark.parametrize("activation", ["tanh", "sin", "erf", "relu"])
def test_outputs_and_kernels_are_those_of_the_modules(network, activation):
    x, _ = problem()
    networks = build(network, WIDTH, DEPTH, FEATURES, SEEDS, activation, 0.7)
    for i, seed in enumerate(SEEDS):
        model = module(network, seed, activation, 0.7)
        assert close(networks.outputs(x)[i], model(x).detach(), 1e-13)
        assert close(networks.kernel(x)[i], ntk(model, x), 1e-13)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("activation", ["tanh", "sin", "erf"])
def test_k3_and_k4_are_what_nested_derivatives_of_full_jacobians_give(network, activation):
    x, _ = problem()
    found = higher_kernels(build(network, WIDTH, DEPTH, FEATURES, SEEDS[1:2], activation, 2.0), x)
    for ours, wanted in zip(found, by_brute_force(module(network, SEEDS[1], activation, 2.0), x), strict=True):
        assert ours is not None and close(ours[0], wanted)


@BOTH
def test_k3_and_k4_are_those_of_the_hierarchy(network):
    x, y = problem()
    found = higher_kernels(build(network, WIDTH, DEPTH, FEATURES, SEEDS), x)
    for i, seed in enumerate(SEEDS):
        hierarchy = Hierarchy(module(network, seed), x, y)
        for order, kernels in zip((2, 3, 4), found, strict=True):
            assert kernels is not None and close(kernels[i], hierarchy.kernel(order), 1e-10)


def test_each_seed_may_have_samples_of_its_own_and_chunks_change_nothing(monkeypatch):
    xs = torch.stack([problem()[0].roll(i, 0) * (1 + i) for i in range(3)])
    networks = build("resnet", WIDTH, DEPTH, FEATURES, SEEDS)
    whole = higher_kernels(networks, xs)
    monkeypatch.setattr(lly_batch, "_BYTES", 1)
    one_by_one = higher_kernels(networks, xs)
    for ours, theirs in zip(whole, one_by_one, strict=True):
        assert ours is not None and theirs is not None and close(ours, theirs, 1e-13)
    alone = higher_kernels(networks[1:2], xs[1])
    assert alone[2] is not None and whole[2] is not None and close(whole[2][1], alone[2][0], 1e-13)
    assert higher_kernels(networks, xs, order=3)[2] is None


@BOTH
def test_the_flow_is_the_hierarchys_and_its_error_falls_as_the_fourth_power_of_the_step(network):
    x, y = problem()
    networks = build(network, WIDTH, DEPTH, FEATURES, SEEDS[:1])
    before = networks.weights[1].clone()
    unit = len(x) / torch.linalg.eigvalsh(networks.kernel(x))[0, -1]
    times = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64) * unit
    true = Hierarchy(module(network, SEEDS[0]), x, y).flow(times, rtol=1e-10, check=False)
    errors = []
    for step in (0.25, 0.125):
        flow = gradient_flow(networks, x, y, times, step)
        errors.append(float((flow.outputs[:, 0] - true.outputs).abs().max()))
        assert close(flow.losses(y)[:, 0], true.loss, 1e-3)
    assert 12 < errors[0] / errors[1] < 20  # 16 for small steps
    assert close(flow.kernels[:, 0], true.kernel, 1e-4) and flow.drift()[0] == 0
    assert torch.equal(networks.weights[1], before)


@pytest.mark.slow
def test_each_seed_has_its_own_clock():
    x, y = problem()
    networks = build("resnet", WIDTH, DEPTH, FEATURES, SEEDS)
    times = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.6, 0.9]], dtype=torch.float64)
    together = gradient_flow(networks, x, y, times, 0.01)
    for i in range(3):
        alone = gradient_flow(networks[i : i + 1], x, y, times[:, i], 0.01)
        # Steps differ, as the longest of the seeds' sets them; both are a few 1e-9 from the flow at this step.
        assert close(together.outputs[1, i], alone.outputs[1, 0], 1e-7)


def test_a_flow_stops_where_it_is_told_to():
    x, y = problem()
    networks = build("plain", WIDTH, DEPTH, FEATURES, SEEDS)
    flow = gradient_flow(networks, x, y, torch.tensor([0.0, 0.1, 0.2, 0.3]), stop=lambda outputs: True)
    assert len(flow.outputs) == len(flow.kernels) == len(flow.times) == 2


@BOTH
def test_truncated_flows_are_the_hierarchys(network):
    x, y = problem()
    networks = build(network, 24, DEPTH, FEATURES, SEEDS[:1])
    kernels = [kernel for kernel in higher_kernels(networks, x) if kernel is not None]
    times = torch.tensor([0.0, 0.05, 0.1], dtype=torch.float64)
    hierarchy = Hierarchy(module(network, SEEDS[0], width=24), x, y)
    for order in (2, 3, 4):
        outputs, predicted = truncated_flow(networks.outputs(x), kernels[: order - 1], y, times[:, None], 0.01)
        wanted = hierarchy.predict(times, order=order)
        assert close(outputs[:, 0], wanted.outputs, 1e-8) and close(predicted[:, 0], wanted.kernel, 1e-8)


def test_what_cannot_be_is_refused():
    x, y = problem()
    with pytest.raises(ValueError, match="one of resnet, plain"):
        build("vgg", WIDTH, DEPTH, FEATURES, SEEDS)
    with pytest.raises(ValueError, match="smooth activation"):
        higher_kernels(build("plain", WIDTH, DEPTH, FEATURES, SEEDS, "relu"), x)
    networks = build("plain", WIDTH, DEPTH, FEATURES, SEEDS)
    with pytest.raises(ValueError, match="ascend from 0"):
        gradient_flow(networks, x, y, torch.tensor([0.0, 0.2, 0.1]))
    with pytest.raises(ValueError, match="finite numbers"):
        gradient_flow(networks, x, y, torch.tensor([0.0, 1e4]), step=50.0)


CELL = {
    "network": "plain", "width": 12, "depth": 3, "n": 5, "data": "sphere", "features": 5, "activation": "tanh",
    "c_res": 1.0, "seeds": [0, 1],
}  # fmt: skip


class TestCells:
    def test_samples_depend_on_data_number_and_seed_alone(self):
        x, y = lly.samples("sphere", 5, 8, [0, 1])
        assert torch.allclose(x.norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))
        again, targets = lly.samples("sphere", 5, 8, [1])
        assert torch.equal(again[0], x[1]) and torch.equal(targets[0], y[1]) and not torch.equal(x[0], x[1])

    def test_digits_are_centred_of_norm_1_and_told_apart_by_oddness(self):
        pytest.importorskip("sklearn")
        x, y = lly.samples("digits", 200, 64, [0])
        assert x.shape == (1, 200, 64) and set(y.unique().tolist()) == {-1.0, 1.0}
        assert torch.allclose(x.norm(dim=-1), torch.ones(1, 200, dtype=torch.float64))
        assert x.mean(1).norm() < 0.2  # of 200 centred images; uncentred ones would have about 0.9
        assert len(torch.unique(x[0], dim=0)) > 190
        with pytest.raises(ValueError, match="at most 1797"):
            lly.check_samples("digits", 2000)
        with pytest.raises(ValueError, match="at least 2"):
            lly.check_samples("sphere", 1)

    def test_drift_is_told_at_the_times_asked_for_whichever_come_first(self):
        both = lly.drift({**CELL, "by_largest": [1.0, 30.0], "by_least": [0.02], "order": 2})
        alone = lly.drift({**CELL, "by_largest": [], "by_least": [0.02], "order": 2})
        late = lly.drift({**CELL, "by_largest": [1.0, 30.0], "by_least": [], "order": 2})
        # The same flow, in other steps: 1e-3 of the drift at half a unit a step.
        assert both["drift"][:, 2] == pytest.approx(alone["drift"][:, 0], rel=5e-3)
        assert both["drift"][:, :2] == pytest.approx(late["drift"], rel=5e-3)
        assert "K3" not in both and (both["eigenvalues"][:, 0] > both["eigenvalues"][:, -1]).all()

    def test_the_plain_network_is_compared_at_equal_time_by_lambda_max(self):
        cell = {**CELL, "times": [0.5], "unit": "time"}
        plain, resnet = lly.truncation(cell), lly.truncation({**cell, "network": "resnet"})
        x, _ = lly.samples("sphere", 5, 5, [0, 1])
        largest = {
            name: torch.linalg.eigvalsh(build(name, 12, 3, 5, [0, 1]).kernel(x))[:, -1].numpy()
            for name in ("plain", "resnet")
        }
        for seed in range(2):
            tau = 0.5 * largest["resnet"][seed] / 5
            by_unit = lly.truncation({**CELL, "seeds": [seed], "times": [tau], "unit": "largest"})
            assert plain["kernel"][seed] == pytest.approx(by_unit["kernel"][0], rel=1e-4)
            direct = lly.truncation({**cell, "network": "resnet", "seeds": [seed]})
            assert resnet["kernel"][seed] == pytest.approx(direct["kernel"][0], rel=1e-4)

    def test_the_least_ratio_stops_counting_when_the_loss_is_down(self):
        found = lly.least({**CELL, "longest": 100.0, "looks": 2})
        assert (found["loss"] <= 0.011).all() or (found["time"] == 100.0).any()
        assert ((found["ratio"] > 0) & (found["ratio"] <= 1)).all()  # the start counts, with ratio 1
