"""The Hurst index of given weights: right on paths of known index, with intervals that hold what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from abyssal.nn import residual_mlp
from abyssal.weights import hurst as module
from abyssal.weights.families import Family, FractionalMotion, FractionalNoise, GaussianProcess, Iid
from abyssal.weights.hurst import hurst_exponent
from abyssal.weights.init import fill_
from abyssal.weights.smoothness import smoothness

LAWS = {"noise": FractionalNoise, "path": FractionalMotion}
each_kind = pytest.mark.parametrize("kind", LAWS)
DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def covered(
    law: Family, index: float, trials: int, shape: tuple[int, ...], mix=None, confidence: float = 0.95, kind=None
) -> int:
    """How many of some intervals hold the index they should."""
    generator, hits = seeded(11), 0
    depth, *rest = shape
    for _ in range(trials):
        paths = law.sample(depth, math.prod(rest), generator, dtype=DOUBLE).view(shape)
        if mix is not None:
            paths = mix(paths, generator)
        found = hurst_exponent(paths, kind=kind, confidence=confidence)
        hits += found.low <= index <= found.high
    return hits


def least_error(index: float, length: int) -> float:
    """The Cramer-Rao bound for one path of fractional noise whose scale and level are unknown."""

    def within(h: float) -> Tensor:
        contrasts = torch.eye(length, dtype=DOUBLE).diff(dim=0)
        return contrasts @ FractionalNoise(h).covariance(length) @ contrasts.T

    slope = torch.linalg.solve(within(index), (within(index + 1e-5) - within(index - 1e-5)) / 2e-5)
    information = (slope @ slope).trace() / 2 - slope.trace() ** 2 / (2 * (length - 1))
    return 1 / math.sqrt(float(information))


@each_kind
@pytest.mark.parametrize("index", [0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("depth", [24, 300])
def test_the_index_and_what_it_is_of_are_found(kind, index, depth):
    found = hurst_exponent(LAWS[kind](index).sample(depth, 400, seeded(3), dtype=DOUBLE))
    assert found.kind == kind
    # 24 cases: 4 of its own standard errors, which the coverage tests below check.
    assert abs(found.value - index) < 4 * found.error
    # No unbiased estimator's error is below the bound; measured, this one's is a third above it at worst (H = 0.1,
    # depth 24) and within 15 % at depth 300. It is itself estimated from 400 entries, to 4 %: 3 of these below.
    bound = least_error(index, depth if kind == "noise" else depth - 1) / math.sqrt(400)
    assert 0.88 * bound < found.error < 1.5 * bound
    assert found.scales_agree


@pytest.mark.parametrize("index", [0.02, 0.99])
def test_indices_near_the_ends_are_found(index):
    found = hurst_exponent(FractionalNoise(index).sample(400, 400, seeded(), dtype=DOUBLE), kind="noise")
    assert abs(found.value - index) < 4 * found.error


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_cover_as_often_as_they_say(kind, confidence):
    trials = 60
    hits = sum(covered(LAWS[kind](h), h, trials, (40, 50), confidence=confidence) for h in (0.15, 0.5, 0.85))
    expected, deviation = 3 * trials * confidence, math.sqrt(3 * trials * confidence * (1 - confidence))
    assert abs(hits - expected) < 3 * deviation


@pytest.mark.slow
def test_intervals_of_entries_that_differ_in_scale_cover():
    """As in a trained network: entries of different size, so no Gaussian sample as a whole."""

    def scaled(paths: Tensor, generator: torch.Generator) -> Tensor:
        return paths * (0.5 * torch.randn(paths.shape[1], generator=generator, dtype=DOUBLE)).exp()

    trials = 100
    hits = covered(FractionalNoise(0.7), 0.7, trials, (40, 300), scaled)
    assert hits >= 0.95 * trials - 3 * math.sqrt(trials * 0.95 * 0.05)


@pytest.mark.slow
def test_intervals_cover_where_the_entries_of_a_row_depend_on_each_other():
    law = FractionalNoise(0.7)

    def rows_alike(paths: Tensor, generator: torch.Generator) -> Tensor:
        common = law.sample(paths.shape[0], paths.shape[1], generator, dtype=DOUBLE)
        return (paths + 2 * common[:, :, None]) / math.sqrt(5)

    trials = 100
    hits = covered(law, 0.7, trials, (40, 20, 20), rows_alike)
    deviation = math.sqrt(trials * 0.95 * 0.05)
    assert hits >= 0.95 * trials - 3 * deviation
    # Taking the 400 entries for independent, as a list of columns does, would not.
    flat = covered(law, 0.7, trials, (40, 20, 20), lambda p, g: rows_alike(p, g).flatten(1))
    assert flat < 0.95 * trials - 3 * deviation


@pytest.mark.slow
@each_kind
def test_one_entry_alone_has_an_interval_of_the_gaussian_law_and_says_so(kind):
    trials = 100
    hits = covered(LAWS[kind](0.6), 0.6, trials, (60, 1), kind=kind)
    assert hits >= 0.95 * trials - 3 * math.sqrt(trials * 0.95 * 0.05)
    assert "Only 1 entries" in hurst_exponent(LAWS[kind](0.6).sample(200, 1, seeded())).notes[0]


def test_noise_and_path_that_cannot_be_told_apart_are_said_to_be():
    """Nearly persistent noise and a very rough path both have a spectrum of about 1/f."""
    short = hurst_exponent(FractionalNoise(0.97).sample(30, 1, seeded()))
    assert any("fits about as well" in note for note in short.notes)
    clear = hurst_exponent(FractionalNoise(0.97).sample(300, 100, seeded()))
    assert clear.kind == "noise"
    assert clear.notes == ()


def test_a_profile_that_all_entries_share_does_not_fool_it_and_is_reported():
    noise = FractionalNoise(0.3).sample(300, 200, seeded(), dtype=DOUBLE)
    plain = hurst_exponent(noise)
    ramp = hurst_exponent(noise + torch.linspace(-2, 2, 300, dtype=DOUBLE)[:, None])
    assert ramp.value == pytest.approx(plain.value, abs=1e-9)
    assert ramp.kind == "noise"
    # A ramp of variance 16/12 beside noise of variance 1, and chance's 1/200.
    assert ramp.profile == pytest.approx(16 / 12 / (16 / 12 + 1), abs=0.02)
    assert "profile that all entries share" in ramp.notes[0]
    assert plain.profile < 0.01
    assert plain.notes == ()


def test_scale_and_a_constant_offset_of_each_entry_change_nothing():
    paths = FractionalMotion(0.4).sample(100, 50, seeded(), dtype=DOUBLE)
    plain = hurst_exponent(paths)
    for moved in (paths * 1e-3, paths + 5 * torch.randn(50, generator=seeded(1), dtype=DOUBLE)):
        assert hurst_exponent(moved).value == pytest.approx(plain.value, abs=1e-5)
        assert hurst_exponent(moved).error == pytest.approx(plain.error, rel=1e-3)


def test_smooth_weights_are_at_the_upper_end_and_rough_on_top_of_smooth_is_no_one_law():
    smooth = GaussianProcess(increments=False).sample(300, 100, seeded(), dtype=DOUBLE)
    found = hurst_exponent(smooth)
    assert found.kind == "path"
    assert found.at_edge
    assert "smoother than any" in str(found)
    mixed = hurst_exponent(smooth + 0.5 * Iid("normal").sample(300, 100, seeded(1), dtype=DOUBLE))
    assert not mixed.scales_agree
    assert "Not one law at all scales" in str(mixed)


def test_the_expected_periodogram_is_that_of_its_definition():
    """The twin: a^H C a for the covariance matrix and every Fourier vector."""
    depth = 15
    covariance = FractionalNoise(0.8).covariance(depth)
    n = torch.arange(depth, dtype=DOUBLE)
    slow = []
    for j in range(1, depth // 2 + 1):
        wave = torch.exp(-2j * math.pi * j * n / depth) / math.sqrt(depth)
        slow.append(float((wave.conj() @ covariance.to(wave.dtype) @ wave).real))
    fast = module._expected_periodogram(0.8, depth)
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=DOUBLE), rtol=1e-12, atol=1e-13)


def test_the_likelihoods_covariance_of_increments_is_that_of_differences():
    long = FractionalNoise(0.8).covariance(21)
    torch.testing.assert_close(module._autocovariance(0.8, 20, True), long.diff(dim=0).diff(dim=1)[0])
    inverse, log_determinant = module._inverse(0.8, 20, True)
    matrix = long.diff(dim=0).diff(dim=1)
    torch.testing.assert_close(inverse @ matrix, torch.eye(20, dtype=DOUBLE), rtol=0, atol=1e-10)
    assert log_determinant == pytest.approx(float(torch.logdet(matrix)), rel=1e-10)


def test_smoothness_tells_smooth_from_rough_as_depth_grows():
    def steepest(law: Family, depth: int) -> float:
        return smoothness(law.sample(depth, 2000, seeded(), dtype=DOUBLE)).steepest

    # Bounded for the smooth process, whose increments over depth 1/N have rms 10/N; N sqrt(2) for noise, where the
    # largest of N increments is a few per cent above the rms.
    assert steepest(GaussianProcess(increments=False), 400) == pytest.approx(10, rel=0.15)
    assert steepest(GaussianProcess(increments=False), 100) == pytest.approx(10, rel=0.15)
    assert steepest(Iid(), 400) == pytest.approx(400 * math.sqrt(2), rel=0.15)


@pytest.mark.parametrize("index", [0.2, 0.5, 0.8])
def test_smoothness_gives_the_figures_of_known_laws(index):
    depth, count = 512, 600
    path = smoothness(FractionalMotion(index).sample(depth, count, seeded(), dtype=DOUBLE))
    assert path.holder == pytest.approx(index, abs=0.02)
    assert path.rms == pytest.approx(1 / math.sqrt(2 * index + 1), rel=0.1)  # the mean of t^2H over [0, 1]
    for lag, value in zip(path.lags, path.variogram, strict=True):
        assert value * path.rms**2 == pytest.approx((lag / depth) ** (2 * index), rel=0.15)
    noise = smoothness(FractionalNoise(index).sample(depth, count, seeded(), dtype=DOUBLE))
    assert noise.lag1 == pytest.approx(2 ** (2 * index - 1) - 1, abs=0.02)
    assert noise.variation == pytest.approx(depth * math.sqrt(2 / math.pi * 2 * (1 - noise.lag1)), rel=0.03)
    assert noise.scale_range < 1.3


def test_a_list_of_tensors_or_of_modules_is_read_as_their_stack():
    weights = FractionalNoise(0.7).sample(20, 12, seeded()).view(20, 3, 4)
    assert hurst_exponent(list(weights)) == hurst_exponent(weights)
    layers = [nn.Linear(4, 3) for _ in range(20)]
    for layer, row in zip(layers, weights, strict=True):
        layer.weight.data.copy_(row)
    assert hurst_exponent(layers) == hurst_exponent(weights)  # biases are no weights
    stack = residual_mlp(60, 20)
    fill_(stack.blocks, FractionalNoise(0.7), seeded())
    pooled = hurst_exponent(stack.blocks)
    assert pooled.columns == 800
    assert abs(pooled.value - 0.7) < 4 * pooled.error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_floating_dtype_and_layout_is_read_and_left_as_it_was(dtype):
    weights = FractionalNoise(0.7).sample(40, 100, seeded(), dtype=dtype)
    before = weights.clone()
    found = hurst_exponent(weights.view(40, 10, 10).transpose(1, 2).requires_grad_())
    assert found.value == pytest.approx(hurst_exponent(weights.double()).value, abs=1e-6)
    assert torch.equal(weights, before)


def test_reading_in_small_pieces_is_the_same(monkeypatch):
    weights = FractionalMotion(0.7).sample(40, 100, seeded(), dtype=DOUBLE)
    whole = hurst_exponent(weights)
    monkeypatch.setattr("abyssal.weights.columns._CHUNK", 40 * 8 * 7)
    pieces = hurst_exponent(weights)
    assert pieces.value == pytest.approx(whole.value, abs=1e-5)
    assert pieces.error == pytest.approx(whole.error, rel=1e-6)


def test_bad_input_is_refused_with_what_was_expected():
    good = Iid().sample(10, 20, seeded())
    for confidence in (0, 1, math.nan, "95%"):
        with pytest.raises(ValueError, match="confidence has to be a number strictly between 0 and 1"):
            hurst_exponent(good, confidence=confidence)
    with pytest.raises(ValueError, match="kind has to be one of noise, path, None"):
        hurst_exponent(good, kind="white")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 depths: a path needs at least 4"):
        hurst_exponent(good[:3])
    with pytest.raises(ValueError, match="at depth 5 hold values that are not finite"):
        hurst_exponent(good.index_put((torch.tensor(5), torch.tensor(0)), torch.tensor(math.nan)))
    with pytest.raises(ValueError, match="do not change with depth"):
        hurst_exponent(torch.ones(10, 5) * torch.arange(5))
    with pytest.raises(ValueError, match="have no entry"):
        hurst_exponent(torch.empty(10, 0))
    with pytest.raises(ValueError, match="single number"):
        hurst_exponent(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"at depth 1 have shape \[3\], those at depth 0 \[2\]"):
        hurst_exponent([torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2)])
    with pytest.raises(ValueError, match="Module 1 has other parameters"):
        hurst_exponent([nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="no weight of two dimensions"):
        hurst_exponent([nn.LayerNorm(2) for _ in range(5)])
    with pytest.raises(ValueError, match="meta device"):
        hurst_exponent(torch.empty(10, 5, device="meta"))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        hurst_exponent(torch.zeros(10, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="got float"):
        hurst_exponent([1.0, 2.0, 3.0, 4.0])  # type: ignore[list-item]
