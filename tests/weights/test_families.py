"""Weight families across depth: their laws, exactly where linear algebra can say, by sampling where it cannot."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from abyssal import memory
from abyssal.weights import families
from abyssal.weights.circulant import circulant_eigenvalues
from abyssal.weights.families import Family, FractionalMotion, FractionalNoise, GaussianProcess, Iid, family

HURSTS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)
KERNELS = ("rbf", "matern12", "matern32", "matern52")
GAUSSIAN = (
    *(FractionalNoise(hurst) for hurst in HURSTS),
    *(FractionalMotion(hurst) for hurst in HURSTS),
    *(GaussianProcess(kernel, 0.1, increments) for kernel in KERNELS for increments in (True, False)),
    Iid("normal"),
)
ALL = (*GAUSSIAN, Iid("uniform"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def autocovariance_of_noise(hurst: float, lag: int) -> float:
    """The definition, one lag at a time."""
    power = 2 * hurst
    return (abs(lag + 1) ** power - 2 * abs(lag) ** power + abs(lag - 1) ** power) / 2


def linear_map(law: Family, depth: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The map from Gaussian inputs to two paths, column by column, by feeding unit vectors for random numbers.

    Returns:
        [2 * depth, inputs]
    """
    drawn: list[int] = []

    def counting(*size: int, **_: object) -> Tensor:
        drawn[:] = [math.prod(size)]
        return torch.zeros(*size, dtype=torch.float64)

    monkeypatch.setattr(torch, "randn", counting)
    law.sample(depth, 2, dtype=torch.float64)
    columns = []
    for k in range(drawn[0]):

        def unit(*size: int, at: int = k, **_: object) -> Tensor:
            numbers = torch.zeros(math.prod(size), dtype=torch.float64)
            numbers[at] = 1
            return numbers.view(*size)

        monkeypatch.setattr(torch, "randn", unit)
        columns.append(law.sample(depth, 2, dtype=torch.float64).T.reshape(-1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("hurst", HURSTS)
def test_fractional_noise_has_exactly_its_covariance_and_its_two_paths_are_independent(hurst, monkeypatch):
    depth = 64
    weights = linear_map(FractionalNoise(hurst), depth, monkeypatch)
    rows = [[autocovariance_of_noise(hurst, n - m) for n in range(depth)] for m in range(depth)]
    one = torch.tensor(rows, dtype=torch.float64)
    expected = torch.block_diag(one, one)
    assert (weights @ weights.T - expected).abs().max() < 1e-12


@pytest.mark.parametrize("hurst", HURSTS)
def test_fractional_motion_has_exactly_the_covariance_of_its_definition(hurst, monkeypatch):
    depth = 64
    weights = linear_map(FractionalMotion(hurst), depth, monkeypatch)[:depth]
    times = [(n + 1) / depth for n in range(depth)]
    expected = [[(s ** (2 * hurst) + t ** (2 * hurst) - abs(s - t) ** (2 * hurst)) / 2 for s in times] for t in times]
    assert (weights @ weights.T - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("increments", [True, False], ids=["increments", "values"])
@pytest.mark.parametrize("length_scale", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gaussian_processes_have_exactly_the_covariance_of_their_kernel(kernel, length_scale, increments, monkeypatch):
    depth = 16
    weights = linear_map(GaussianProcess(kernel, length_scale, increments), depth, monkeypatch)[:depth]
    lags = [[abs(n - m) / depth / length_scale for n in range(depth + 1)] for m in range(depth + 1)]
    k = torch.tensor([[kernel_by_hand(kernel, lag) for lag in row] for row in lags], dtype=torch.float64)
    if increments:
        difference = torch.eye(depth + 1, dtype=torch.float64).diff(dim=0)
        k = difference @ k @ difference.T
    expected = k[:depth, :depth] / k[0, 0]
    # Each of the four kernel values in an increment's covariance is off by a few eps; this divides by its variance,
    # at least 1/64 here (1 - exp(-1/128) twice).
    assert (weights @ weights.T - expected).abs().max() < 4 * 4 * 2.3e-16 * 64


def kernel_by_hand(kernel: str, r: float) -> float:
    if kernel == "rbf":
        return math.exp(-(r**2) / 2)
    if kernel == "matern12":
        return math.exp(-r)
    if kernel == "matern32":
        return (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r)
    return (1 + math.sqrt(5) * r + 5 * r**2 / 3) * math.exp(-math.sqrt(5) * r)


@pytest.mark.parametrize("law", ALL, ids=str)
def test_covariance_tells_what_is_drawn(law):
    depth, count = 12, 20_000
    paths = law.sample(depth, count, seeded(), dtype=torch.float64)
    expected = law.covariance(depth)
    # Of a Gaussian pair the mean product has variance (c_nn c_mm + c_nm^2) / count; uniform numbers have less.
    variance = (expected.diagonal()[:, None] * expected.diagonal() + expected**2) / count
    # 4.5 standard errors: 78 entries, 24 laws, so that one in 100 such tables would have an entry beyond it.
    assert ((paths @ paths.T / count - expected).abs() <= 4.5 * variance.sqrt()).all()


@pytest.mark.parametrize("hurst", HURSTS)
def test_fractional_noise_has_the_autocovariance_it_should_at_depth_1000(hurst):
    depth, count = 1000, 400
    paths = FractionalNoise(hurst).sample(depth, count, seeded(1), dtype=torch.float64)
    for lag in range(21):
        products = (paths[lag:] * paths[: depth - lag]).mean(0)  # independent columns: their spread is the error
        error = float(products.std()) / math.sqrt(count)
        # 147 lags and indices: 4.5 standard errors leave 1 in 1,000 that one is beyond by chance.
        assert abs(float(products.mean()) - autocovariance_of_noise(hurst, lag)) < 4.5 * error, lag


@pytest.mark.parametrize("law", GAUSSIAN, ids=str)
def test_circulant_paths_and_cholesky_paths_have_the_same_law(law):
    """The slow, obvious twin: a Cholesky factor of the covariance, jittered for the smooth kernels."""
    depth, count = 32, 4000
    covariance = law.covariance(depth)
    jitter = 1e-10 * torch.eye(depth, dtype=torch.float64)
    slow = torch.linalg.cholesky(covariance + jitter) @ torch.randn(
        depth, count, dtype=torch.float64, generator=seeded(2)
    )
    fast = law.sample(depth, count, seeded(3), dtype=torch.float64)
    # The sum over depth, the last value and a wiggle: three linear functions whose variances say different things.
    for weights in (torch.ones(depth), torch.eye(depth)[-1], (-1.0) ** torch.arange(depth)):
        one, other = weights.double() @ slow, weights.double() @ fast
        # A jitter of 1e-10 is the rougher of two functions that are 0 in law; log variances have error sqrt(2/n).
        gap = math.log((float(one.var()) + 1e-6) / (float(other.var()) + 1e-6))
        assert abs(gap) < 4 * math.sqrt(4 / count)


def test_long_lags_do_not_lose_digits():
    hurst, depth = 0.97, 4001
    values = FractionalNoise(hurst).autocovariance(depth)
    # The leading term of the expansion in 1/k, and the next one's bound.
    lag = depth - 1
    leading = hurst * (2 * hurst - 1) * lag ** (2 * hurst - 2)
    assert abs(float(values[lag]) / leading - 1) < 1 / lag**2
    assert abs(float(values[16]) - autocovariance_of_noise(hurst, 16)) < 1e-13


@pytest.mark.parametrize("depth", [1, 2, 3, 17, 1000, 4096])
@pytest.mark.parametrize("hurst", [0.001, *HURSTS, 0.9999])
def test_every_hurst_index_and_depth_has_a_nonnegative_embedding(hurst, depth):
    eigenvalues = FractionalNoise(hurst)._spectrum(depth)
    assert float(eigenvalues.min()) >= 0
    first = torch.fft.ifft(eigenvalues).real[:depth]
    assert (first - FractionalNoise(hurst).autocovariance(depth)).abs().max() < 1e-13


def test_an_embedding_with_a_truly_negative_eigenvalue_is_refused():
    # cos has the eigenvalues of two frequencies only if its period fits; this one does not.
    _, worst = circulant_eigenvalues(torch.cos(torch.arange(9) * 1.1).double())
    assert worst is not None
    assert worst < -0.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_smooth_kernels_reach_depth_4000_and_a_length_scale_of_the_whole_depth(kernel):
    dense_factor = 4000 * 4000 * 8
    for increments in (True, False):
        law = GaussianProcess(kernel, 1.0, increments)
        with memory.track() as used:
            paths = law.sample(4000, 8, seeded(), dtype=torch.float64)
        assert torch.isfinite(paths).all()
        assert used.peak <= paths.nbytes + families.WORKSPACE < dense_factor / 4


def test_the_papers_smooth_family_is_nearly_independent_at_depth_10():
    """SCIENCE.md's caution: at 10 blocks its lag-1 correlation is 0.10."""
    assert abs(float(GaussianProcess().covariance(10)[0, 1]) - 0.10) < 0.005


@pytest.mark.slow
def test_drawing_a_thousand_weights_of_40_by_40_costs_little_more_than_their_noise_and_its_transform():
    def noise_and_transform() -> Tensor:
        noise = torch.randn(800, 2000, 2, dtype=torch.float64)  # 1,600 paths in pairs, an embedding of twice the depth
        return torch.fft.fft(torch.view_as_complex(noise), dim=1)

    def seconds(draw: Callable[[], Tensor]) -> float:
        started = time.process_time()
        draw()
        return time.process_time() - started

    law = FractionalNoise(0.8)
    law.sample(1000, 1600), noise_and_transform()  # eigenvalues, and torch's own first calls
    ratios = [seconds(lambda: law.sample(1000, 1600)) / seconds(noise_and_transform) for _ in range(9)]
    # Weighting and copying add a fifth to a quarter; four times that is room for a busy machine.
    assert statistics.median(ratios) < 2


@pytest.mark.parametrize("law", ALL, ids=str)
def test_one_seed_gives_the_same_paths_in_every_dtype_and_leaves_torchs_own_state_alone(law):
    before = torch.get_rng_state()
    exact = law.sample(20, 7, seeded(), dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(law.sample(20, 7, seeded(), dtype=dtype), exact.to(dtype))
    assert not torch.equal(law.sample(20, 7, seeded(1), dtype=torch.float64), exact)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    first = law.sample(20, 7)
    torch.manual_seed(5)
    assert torch.equal(law.sample(20, 7), first)


def test_columns_drawn_in_different_blocks_are_independent(monkeypatch):
    monkeypatch.setattr(families, "WORKSPACE", 1)  # one pair at a time
    paths = FractionalNoise(0.5).sample(200, 41, seeded(), dtype=torch.float64)
    products = (paths.T @ paths / 200)[~torch.eye(41, dtype=torch.bool)]
    assert products.abs().max() < 5 / math.sqrt(200)  # 820 pairs


def test_drawing_holds_no_more_than_its_workspace():
    law, depth = FractionalNoise(0.7), 500
    largest = max(block.shape[1] for _, block in law.blocks(depth, 10_000, seeded()))
    pair = 2 * 16 * 2 * depth  # noise and its transform, complex128 over twice the depth
    assert largest / 2 * pair <= families.WORKSPACE


@pytest.mark.cuda
def test_a_generator_of_the_device_or_of_the_cpu_draws_for_the_device():
    law = FractionalNoise(0.7)
    own = law.sample(50, 400, torch.Generator("cuda").manual_seed(0), dtype=torch.float64)
    assert own.device.type == "cuda"
    from_cpu = law.sample(50, 400, seeded(), device="cuda", dtype=torch.float64)
    torch.testing.assert_close(from_cpu.cpu(), law.sample(50, 400, seeded(), dtype=torch.float64))
    assert abs(float(own.var()) - 1) < 0.1


def test_names_give_the_families_they_say():
    assert family("iid") == family("uniform") == Iid("uniform")
    assert family("normal") == Iid("normal")
    assert family("rbf") == GaussianProcess("rbf", 0.1, True)
    assert family("matern32") == GaussianProcess("matern32")
    assert family("fbm", 0.7) == FractionalNoise(0.7)
    assert family("fbm_path", 0.7) == FractionalMotion(0.7)


@pytest.mark.parametrize("hurst", [0, 1, -0.5, 1.5, math.nan, math.inf, "0.5", None, True])
@pytest.mark.parametrize("law", [FractionalNoise, FractionalMotion])
def test_a_hurst_index_outside_of_0_to_1_is_refused(law, hurst):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        law(hurst)


@pytest.mark.parametrize("law", [FractionalNoise(0.7), GaussianProcess(), Iid()], ids=str)
@pytest.mark.parametrize("depth", [0, -1, 2.5, True])
def test_a_depth_that_is_none_is_refused(law, depth):
    with pytest.raises(ValueError, match="depth has to be a whole number"):
        law.sample(depth, 3)
    with pytest.raises(ValueError, match="depth has to be a whole number"):
        law.covariance(depth)


def test_other_bad_input_is_refused_with_what_was_expected():
    with pytest.raises(ValueError, match="no weight family 'white'"):
        family("white")
    with pytest.raises(ValueError, match="needs a Hurst index"):
        family("fbm")
    with pytest.raises(ValueError, match="has no Hurst index"):
        family("rbf", 0.7)
    with pytest.raises(ValueError, match="kernel has to be one of"):
        GaussianProcess("cosine")
    for length_scale in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="length_scale has to be a positive number"):
            GaussianProcess(length_scale=length_scale)
    with pytest.raises(ValueError, match="too long to draw"):
        GaussianProcess("rbf", 100.0).sample(10, 2)
    with pytest.raises(ValueError, match="distribution has to be"):
        Iid("cauchy")
    with pytest.raises(ValueError, match="count has to be"):
        Iid().sample(3, -1)
    with pytest.raises(ValueError, match="dtype has to be"):
        Iid().sample(3, 1, dtype=torch.int64)


def test_no_paths_are_an_empty_tensor():
    assert FractionalNoise(0.3).sample(5, 0).shape == (5, 0)
