"""Phase diagrams against exact means, published and measured figures, and a slow twin through autograd."""

from __future__ import annotations

import csv
import math

import mpmath as mp
import numpy as np
import pytest
import torch

from abyssal.nn import ResidualStack
from abyssal.scaling.phases import networks
from abyssal.scaling.phases.critical import critical_beta, regime
from abyssal.scaling.phases.crossing import (
    crossing,
    mean_and_error,
    model_means,
    resampled_interval,
    resampled_means,
    resamplings,
    student,
)
from abyssal.scaling.phases.diagram import phase_diagram
from abyssal.scaling.phases.networks import NETWORKS, Model, draw_model, pass_through
from abyssal.sweep import Store, SweepError
from abyssal.weights.families import FractionalNoise, GaussianProcess, family

TINY = {"depth": 20, "width": 8, "betas": [0.25, 0.5, 1.0], "models": 3, "inputs": 2, "engine": "sequential"}


def slow_twin(network: str, model: Model, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """log10 of both metrics by plain loops in float64 and autograd, one input at a time, with a loss. [inputs] each."""
    weights, depth = model.weights.double(), model.weights.shape[0]
    hidden, gradient = [], []
    for start in model.starts.double().T:
        first = state = start.clone().requires_grad_()
        for matrices in weights:
            branch = matrices[0] @ (matrices[1] @ state if network == "res3" else state).relu()
            state = state + depth**-beta * branch
        loss = (model.readout.double() @ state - 0.3) ** 2
        g_0, g_last = torch.autograd.grad(loss, [first, state])
        hidden.append(float(((state - first).norm() / first.norm()).log10().detach()))
        gradient.append(float(((g_0 - g_last).norm() / g_last.norm()).log10()))
    return np.array(hidden), np.array(gradient)


def log_twin(model: Model, beta: float) -> np.ndarray:
    """log10 |h_L| / |h_0| of res3 in float64, every state divided by its length, the logarithms summed. [inputs]."""
    state, depth = model.starts.double(), model.weights.shape[0]
    total = torch.zeros(state.shape[1], dtype=torch.float64)
    start = state.norm(dim=0).log10()
    for outer, inner in model.weights.double():
        state = state + depth**-beta * outer @ (inner @ state).relu()
        total += state.norm(dim=0).log10()
        state = state / state.norm(dim=0)
    return (total - start).numpy()


@pytest.mark.parametrize("network", ["res1", "res3"])
@pytest.mark.parametrize("law", [family("iid"), family("rbf"), FractionalNoise(0.2), FractionalNoise(0.9)], ids=str)
def test_both_metrics_agree_with_a_slow_twin_on_the_same_weights(network, law):
    model = draw_model(NETWORKS[network], law, depth=60, width=12, inputs=3, seed=1)
    betas = [0.25, 0.5, 0.75, 1.0, 1.5]
    passes = pass_through(NETWORKS[network], model, betas)
    assert passes.gradient is not None
    for i, beta in enumerate(betas):
        hidden, gradient = slow_twin(network, model, beta)
        assert np.abs(passes.hidden.change[i].numpy() - hidden).max() < 1e-5
        assert np.abs(passes.gradient.change[i].numpy() - gradient).max() < 1e-5


@pytest.mark.parametrize("network", ["res1", "res3"])
def test_columns_in_chunks_give_the_same_as_all_at_once(network, monkeypatch):
    model = draw_model(NETWORKS[network], FractionalNoise(0.7), depth=50, width=10, inputs=3, seed=2)
    betas = [0.3, 0.6, 0.9, 1.2]
    whole = pass_through(NETWORKS[network], model, betas)
    monkeypatch.setattr(networks, "_MASK_BYTES", 50 * 10 * 3 * 2)  # of two betas
    parts = pass_through(NETWORKS[network], model, betas)
    assert torch.allclose(whole.hidden.change, parts.hidden.change, rtol=0, atol=1e-5)
    assert torch.allclose(whole.gradient.change, parts.gradient.change, rtol=0, atol=1e-5)


def test_exploding_columns_are_rescaled_exactly():
    model = draw_model(NETWORKS["res3"], FractionalNoise(0.9), depth=2000, width=20, inputs=3, seed=3)
    double = Model(model.weights.double(), model.starts.double(), model.readout.double())
    twin = log_twin(model, beta=0.0)
    assert twin.min() > 200  # far beyond float32
    exact = pass_through(NETWORKS["res3"], double, [0.0])
    # 2,000 layers, each rounded by some units of 2^-53 relative to a state that only grows.
    assert np.abs(exact.hidden.ratio[0].numpy() - twin).max() < 2000 * 2**-50
    passes = pass_through(NETWORKS["res3"], model, [0.0])
    # The same in float32; what rounding turns in a state, later layers turn further, but they agree in direction.
    assert np.abs(passes.hidden.ratio[0].numpy() - twin).max() < 2000 * 2**-21
    assert torch.isfinite(passes.gradient.change).all() and float(passes.gradient.change.min()) > 100


def test_a_tiny_change_is_exact_where_the_state_itself_has_no_room_for_it():
    model = draw_model(NETWORKS["res3"], FractionalNoise(0.6), depth=100, width=12, inputs=2, seed=4)
    # As beta grows, the change becomes L^-beta times the sum of the branches at h_0.
    start = model.starts.double()
    total = sum(outer @ (inner @ start).relu() for outer, inner in model.weights.double())
    first_order = (total.norm(dim=0) / start.norm(dim=0)).log10() - 25 * math.log10(100)
    passes = pass_through(NETWORKS["res3"], model, [25.0])
    assert torch.allclose(passes.hidden.change[0], first_order, rtol=0, atol=1e-6)
    assert float(passes.hidden.change.max()) < -45


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "models"), [(10, 200), (100, 100), (1000, 40)])
def test_iid_weights_give_the_exact_mean_of_the_squared_ratio(depth, models):
    # The larger the mean, the longer the tail of what it is a mean of: small betas need more models than this.
    betas = [0.5, 0.75, 1.0]
    diagram = phase_diagram("res3", "iid", depth, 40, betas, models=models, inputs=4, engine="sequential")
    expected = (1 + depth ** (-2 * np.array(betas)) / 2) ** depth
    for name, exact in (("hidden_ratio", expected), ("hidden", expected - 1)):
        mean, error = mean_and_error((10 ** (2 * diagram.samples[name])).mean(-1)[:, 0])
        assert (np.abs(mean - exact) < 3 * error).all()
        assert (error < 0.1 * exact).all()  # or the line above would say little


# SCIENCE.md part 2, fractional noise: mean log10 of |h_L - h_0| / |h_0| at depth 1,000, width 40, of 5 models.
TABLE = {0.1: (2.72, -0.152, -0.945, -1.697), 0.5: (3.20, -0.106, -0.904, -1.655), 0.9: (26.96, 3.50, 0.257, -0.622)}


@pytest.mark.slow
@pytest.mark.parametrize("hurst", TABLE)
def test_fractional_weights_give_the_figures_measured_before(hurst):
    models, of_table = 12, 5
    diagram = phase_diagram(
        "res3", "fbm", 1000, 40, [0.25, 0.5, 0.75, 1.0], [hurst], models=models, inputs=4, engine="sequential"
    )
    means = model_means(diagram.samples["hidden"])[:, 0]
    spread = means.std(axis=0, ddof=1)
    error = spread * math.sqrt(1 / models + 1 / of_table)  # both figures are of a few models
    assert (np.abs(diagram.hidden[:, 0] - TABLE[hurst]) < 3 * error + 0.005).all()  # the table is rounded
    assert (error < (0.02 + 0.1 * np.abs(diagram.hidden[:, 0])) * 4).all()


@pytest.mark.slow
def test_smooth_weights_have_a_limit_that_is_approached_as_one_over_depth():
    """SCIENCE.md part 2, RBF row: |h_L - H_1| / |h_0| at beta = 1 and L = 20, 40, 80, 160."""
    fine, width, models = 1280, 40, 8
    network = NETWORKS["res3"]
    errors: dict[int, list[float]] = {20: [], 40: [], 80: [], 160: []}
    for seed in range(models):
        model = draw_model(network, GaussianProcess("rbf", increments=False), fine, width, 2, seed)
        ends = {}
        for depth in (*errors, fine):
            weights = model.weights[:: fine // depth].contiguous()
            state, total = model.starts.clone(), torch.zeros_like(model.starts)
            step = network.forward(weights, None, 2)
            for layer in range(depth):
                step(layer, state, total)
                state = model.starts + total / depth
            ends[depth] = state
        for depth, found in errors.items():
            gap = (ends[depth] - ends[fine]).norm(dim=0) / model.starts.norm(dim=0)
            # An error of c / L seen from one of c / fine looks smaller by that.
            found.append(float(gap.mean()) / (1 - depth / fine))
    means = np.array([np.mean(found) for found in errors.values()])
    slope = np.polyfit(np.log(list(errors)), np.log(means), 1)[0]
    assert abs(slope + 1) < 0.05
    for mean, found, measured in zip(means, errors.values(), (0.0252, 0.0122, 0.0060, 0.0030), strict=True):
        # The row is of few models, and says not how many: one, at the worst.
        assert abs(mean - measured) < 3 * np.std(found, ddof=1) * math.sqrt(1 + 1 / models)


def test_a_factory_gives_what_the_named_network_gives_on_the_same_weights():
    model = draw_model(NETWORKS["res3"], FractionalNoise(0.6), depth=20, width=8, inputs=2, seed=6)
    starts = []

    class Branch(torch.nn.Module):
        def __init__(self, matrices):
            super().__init__()
            self.outer, self.inner = torch.nn.Parameter(matrices[0]), torch.nn.Parameter(matrices[1])

        def forward(self, x):
            return (x @ self.inner.T).relu() @ self.outer.T

    class Watched(ResidualStack):
        def forward(self, x):
            starts.append(x.detach().float())
            return super().forward(x)

    def build(depth, beta, generator):
        return Watched([Branch(matrices) for matrices in model.weights], scale=depth**-beta)

    arguments = TINY | {"models": 1}
    diagram = phase_diagram(build, **arguments)
    expected = pass_through(
        NETWORKS["res3"], Model(model.weights, starts[0].T.contiguous(), model.readout), TINY["betas"]
    )
    assert diagram.hidden.shape == diagram.gradient.shape == (3,)
    assert np.abs(diagram.samples["hidden"][0, 0] - expected.hidden.change.numpy()).max() < 1e-5
    assert np.isfinite(diagram.gradient).all()


def test_a_factory_that_changes_the_shape_is_told_so():
    with pytest.raises(SweepError, match="has to keep the shape"):
        phase_diagram(lambda depth, beta, generator: torch.nn.Linear(8, 7), **TINY)


@pytest.mark.slow
def test_engines_and_jobs_give_the_same_bits():
    one = phase_diagram(hursts=[0.3, 0.8], **TINY)
    other = phase_diagram(hursts=[0.3, 0.8], **TINY | {"engine": "local", "jobs": 2})
    for name, samples in one.samples.items():
        assert samples.tobytes() == other.samples[name].tobytes()
    assert one.hidden.shape == (3, 2)


def test_a_model_keeps_its_weights_when_other_betas_are_asked_for():
    one = phase_diagram(hursts=[0.3], **TINY)
    other = phase_diagram(hursts=[0.2, 0.3], **TINY | {"betas": [0.5, 0.9]})
    assert np.abs(one.samples["hidden"][:, 0, 1] - other.samples["hidden"][:, 1, 0]).max() < 1e-5
    assert (
        np.abs(
            one.samples["hidden"][:, 0, 1] - phase_diagram(hursts=[0.3], seed=1, **TINY).samples["hidden"][:, 0, 1]
        ).min()
        > 1e-3
    )


def test_a_diagram_resumes_from_its_store(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        half = phase_diagram(hursts=[0.3], store=store, **TINY)
        whole = phase_diagram(hursts=[0.3, 0.8], store=store, **TINY)
        again = phase_diagram(hursts=[0.3, 0.8], store=store, **TINY)
    assert (half.computed, whole.computed, again.computed) == (3, 3, 0)
    tables = [diagram.to_csv(tmp_path / "t.csv").read_bytes() for diagram in (whole, again)]
    assert tables[0] == tables[1]
    assert tables[0] == phase_diagram(hursts=[0.3, 0.8], **TINY).to_csv(tmp_path / "t.csv").read_bytes()


def test_states_that_cannot_move_are_counted_and_left_out_of_the_means():
    # Width 1: half of the starts are negative, where relu is closed for ever.
    diagram = phase_diagram("res1", "iid", **TINY | {"width": 1, "models": 20})
    assert (diagram.still > 0.2).all() and (diagram.still < 0.8).all()
    assert np.isfinite(diagram.hidden).all()


def test_the_table_has_one_line_per_point_and_says_what_the_arrays_say(tmp_path):
    diagram = phase_diagram(hursts=[0.3, 0.8], **TINY)
    with diagram.to_csv(tmp_path / "phase.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 2
    point = next(line for line in lines if line["hurst"] == "0.8" and line["beta"] == "0.5")
    assert float(point["hidden"]) == diagram.hidden[1, 1]
    assert float(point["gradient_error"]) == diagram.gradient_error[1, 1]
    assert point["regime"] == diagram.regimes()[1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"hursts": [0.3, 0.8]}, {"init": "iid"}, {"hursts": [0.3]}])
def test_a_diagram_is_drawn_whole_or_not_at_all(tmp_path, arguments):
    diagram = phase_diagram(**arguments, **TINY)
    assert diagram.plot(tmp_path / "phase.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError):
        diagram.plot(tmp_path / "no such folder" / "phase.png")
    with pytest.raises(OSError):
        diagram.to_csv(tmp_path / "no such folder" / "phase.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["phase.png"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"network": "res2"}, "no network 'res2'"),
        ({"init": "fmb"}, "no weight family 'fmb'"),
        ({"hursts": [0.5, 0.0]}, "hurst has to be"),
        ({"hursts": [1.0]}, "hurst has to be"),
        ({"hursts": [math.nan]}, "finite number"),
        ({"hursts": [0.5, 0.5]}, "different numbers"),
        ({"init": "iid", "hursts": [0.5]}, "no Hurst index"),
        ({"depth": 0}, "depth has to be"),
        ({"depth": 10.0}, "depth has to be"),
        ({"width": 0}, "width has to be"),
        ({"betas": [0.5, math.nan]}, "finite number"),
        ({"betas": []}, "at least 1"),
        ({"betas": [1.0, 0.5]}, "increasing"),
        ({"betas": [-12.0]}, "scales branches by 10"),
        ({"models": 0}, "models has to be"),
        ({"inputs": 0}, "inputs has to be"),
        ({"seed": -1}, "seed has to be"),
        ({"engine": "slurm"}, "no engine"),
        ({"store": "phase.sqlite"}, "store has to be"),
        ({"network": lambda depth, beta, generator: None, "init": "iid"}, "leave out init"),
        ({"network": 3}, "network has to be"),
    ],
)
def test_bad_input_is_refused_before_any_work(bad, said, monkeypatch):
    monkeypatch.setattr("abyssal.scaling.phases.cells.run", lambda *args, **kwargs: pytest.fail("work has begun"))
    with pytest.raises((ValueError, TypeError), match=said):
        phase_diagram(**TINY | bad)


def test_a_crossing_of_a_scaling_law_is_where_it_should_be():
    betas = np.linspace(0.2, 1.2, 41)
    for true in (0.5, 0.63, 0.9):
        values = [np.log10(np.expm1(depth ** (true - betas))) for depth in (500, 1000, 2000)]
        slopes = values[2] - values[0]
        assert abs(crossing(betas, slopes) - true) < 0.0125  # half a step of the grid
    assert np.isnan(crossing(betas, np.ones(41))) and np.isnan(crossing(betas, -np.ones(41)))


def test_student_has_the_quantiles_that_tables_and_closed_forms_give():
    # Two-sided at 95 %: NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2.
    for freedom, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)):
        assert student(freedom) == pytest.approx(quantile, abs=0.0006)  # printed to three digits
    for level in (0.5, 0.8, 0.95, 0.999):
        assert student(1, level) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-12)
        assert student(2, level) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-12)
    for freedom in (1, 2, 3, 5, 10, 30):  # the law's own integral, by many digits
        with mp.workdps(30):
            t = mp.mpf(student(freedom))
            beyond = mp.betainc(mp.mpf(freedom) / 2, mp.mpf(1) / 2, 0, freedom / (freedom + t**2), regularized=True)
        assert float(beyond) == pytest.approx(0.05, rel=1e-10)


@pytest.mark.parametrize("models", [5, 12])
def test_intervals_hold_the_truth_as_often_as_they_say(models):
    generator, trials, held = np.random.default_rng(0), 600, 0
    for trial in range(trials):
        samples = generator.normal(size=(models, 1))
        replicas = resampled_means(samples, resamplings(models, trial))
        low, high = resampled_interval(samples.mean(0), replicas, models)
        held += bool(low[0] < 0 < high[0])
    assert abs(held / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)


REGIMES = [
    ("res3", "iid", 1.0, None, 40, "identity"),
    ("res3", "iid", 0.5, None, 40, "sde"),
    ("res3", "iid", 0.25, None, 40, "explosion"),
    ("res3", "rbf", 1.0, None, 40, "ode"),
    ("res1", "fbm", 0.25, 0.1, 4, "collapse"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "init", "beta", "hurst", "width", "name"), REGIMES)
def test_the_regimes_are_recognised_by_their_slopes(network, init, beta, hurst, width, name):
    # Narrow networks differ more from one another: more models, and over more of depth.
    models, depths = (12, (100, 300, 900)) if width == 40 else (60, (100, 700, 5000))
    found = regime(network, init, beta, hurst, width=width, depths=depths, models=models, inputs=3)
    assert found.name == name
    assert found.confidence > 0.95
    assert found.slope_low < found.slope < found.slope_high


def test_the_frozen_side_falls_with_the_difference_to_the_critical_exponent():
    found = regime("res3", "iid", 1.2, depths=(100, 300, 900), models=12, inputs=3)
    assert found.slope_low < 0.5 - 1.2 < found.slope_high


@pytest.mark.slow
def test_the_critical_beta_of_independent_weights_is_one_half():
    found = critical_beta(
        "res3",
        "iid",
        None,
        16,
        (100, 400, 1600),
        betas=np.linspace(0.3, 0.8, 21),
        models=40,
        inputs=2,
        engine="sequential",
    )
    assert found.low[0] < 0.5 < found.high[0]
    assert found.high[0] - found.low[0] < 0.1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"depths": [100]}, "at least 2"),
        ({"depths": [200, 100]}, "increasing"),
        ({"depths": [0, 100]}, "depths has to be"),
        ({"models": 1}, "models has to be"),
        ({"betas": [0.5]}, "at least 2"),
        ({"metric": "loss"}, "metric has to be"),
        ({"hurst": 1.0}, "hurst has to be"),
    ],
)
def test_bad_depths_and_metrics_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        critical_beta(**{"network": "res3", "hurst": 0.5, "width": 4} | bad)
