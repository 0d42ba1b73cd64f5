"""Spectra of dot-product kernels on the sphere, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import eval_gegenbauer, eval_legendre, gamma, iv, poch

from abyssal.tangent.analytic.kernels import fully_connected, resntk
from abyssal.tangent.analytic.sphere import SphereSpectrum, half_angle, multiplicity, sphere_spectrum

DIMENSIONS = (2, 3, 4, 7)
SAFETY = 3  # an estimated error may fall this short of the true one


def assert_exact(spectrum: SphereSpectrum, exact: np.ndarray, accuracy: float = 1e-13) -> None:
    wrong = np.abs(spectrum.eigenvalues - exact)
    scale = np.abs(spectrum.eigenvalues).max()
    assert (wrong <= SAFETY * spectrum.errors).all(), wrong / spectrum.errors
    assert (spectrum.errors <= accuracy * scale).all(), spectrum.errors.max() / scale


@pytest.mark.parametrize("d", DIMENSIONS)
def test_exponentials_have_bessel_functions(d):
    n = np.arange(31)
    exact = gamma(d / 2) * (2 / 3) ** (d / 2 - 1) * iv(n + d / 2 - 1, 3)
    assert_exact(sphere_spectrum(lambda t: torch.exp(3 * t), d, 30), exact)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_poissons_kernel_has_powers(d):
    r = 0.8
    exact = r ** np.arange(61)
    assert_exact(sphere_spectrum(lambda t: (1 - r * r) / (1 - 2 * r * t + r * r) ** (d / 2), d, 60), exact)


@pytest.mark.parametrize("power", [0.5, 0.3, 1.5, 0.05])
@pytest.mark.parametrize("d", DIMENSIONS)
def test_powers_of_the_distance_have_ratios_of_gamma_functions(d, power):
    """By Rodrigues' formula; singular at t = 1 as kernels of ReLU networks are, or worse. And at t = -1 by symmetry."""
    n, h = np.arange(101), (d - 1) / 2
    ratio = np.exp([math.lgamma(power + h) + math.lgamma(h) - math.lgamma(power + k + 2 * h) for k in n])
    exact = gamma(d / 2) / (math.sqrt(math.pi) * gamma(h)) * 2 ** (power + d - 2) * poch(-power, n) * ratio
    # On the circle the angles whose cosine rounds to 1, up to 1e-8, hold 1e-8 of the mass and miss (1e-16)^power.
    accuracy = 1e-13 if d > 2 or power >= 0.5 else 1e-7
    assert_exact(sphere_spectrum(lambda t: (1 - t) ** power, d, 100), exact, accuracy)
    assert_exact(sphere_spectrum(lambda t: (1 + t) ** power, d, 100), exact * (-1.0) ** n, accuracy)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_polynomials_have_as_many_eigenvalues_as_their_degree(d):
    found = sphere_spectrum(lambda t: t**2, d, 8)
    exact = np.zeros(9)
    exact[0], exact[2] = 1 / d, (d - 1) / d / multiplicity(d, 2)
    assert_exact(found, exact)
    if d > 2:
        order = (d - 2) / 2
        top = float(eval_gegenbauer(5, order, 1.0))
        found = sphere_spectrum(lambda t: torch.from_numpy(eval_gegenbauer(5, order, t.numpy()) / top), d, [3, 5, 7])
        assert_exact(found, np.array([0, 1 / multiplicity(d, 5), 0]))


def test_arc_cosine_kernels_have_the_squared_coefficients_of_step_and_ramp():
    """On the sphere of R^3: mu_n = 1/2 int_0^1 s(t) P_n(t) dt, from the recurrences of Legendre polynomials."""
    n = np.arange(41)
    at_zero = lambda k: np.where(k < 0, 0.0, eval_legendre(np.maximum(k, 0), 0.0))  # noqa: E731
    step = np.where(n == 0, 1.0, (at_zero(n - 1) - at_zero(n + 1)) / (2 * n + 1))
    padded = np.append(step, (at_zero(np.array(40)) - at_zero(np.array(42))) / 83)
    ramp = ((n + 1) * padded[1:] + n * np.append(0, step[:-1])) / (2 * n + 1)
    angle = lambda t: math.pi - t.acos()  # noqa: E731
    assert_exact(sphere_spectrum(lambda t: angle(t) / (2 * math.pi), 3, 40), (step / 2) ** 2)
    order_1 = lambda t: ((1 - t * t).sqrt() + angle(t) * t) / (2 * math.pi)  # noqa: E731
    assert_exact(sphere_spectrum(order_1, 3, 40), 3 * (ramp / 2) ** 2)


@pytest.mark.parametrize("d", [3, 4, 5])
def test_the_laplace_kernel_decays_with_the_dimension_as_power(d):
    """Known: k^-d. The fit's error is that of the corrections of order n^-2, at most a few of them at degree 17."""
    found = sphere_spectrum(lambda t: torch.exp(-(2 - 2 * t).clamp(min=0).sqrt()), d, 300 if d < 5 else 100)
    decay = found.decay()
    assert decay.power == pytest.approx(d, abs=5 * d / decay.degrees[0] ** 2)
    assert decay.error < 0.01 and decay.r2 > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("d", [3, 4])
@pytest.mark.parametrize("alpha", [0.125, 1.0])
def test_resntk_decays_with_the_dimension_as_power_whatever_the_balance(d, alpha):
    spectrum = sphere_spectrum(lambda t: resntk(t, 6, alpha), d, 300)
    assert (spectrum.eigenvalues > 0).all()
    for parity in (0, 1):
        decay = spectrum.decay(first=60, parity=parity)
        assert decay.power == pytest.approx(d, abs=0.02)
        assert decay.error < 0.01


def test_fully_connected_relu_kernels_decay_alike():
    def kernel(t: torch.Tensor) -> torch.Tensor:
        x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        y = torch.stack([t, (1 - t * t).clamp(min=0).sqrt()], dim=-1)
        return fully_connected(x, y, depth=2, w_std=math.sqrt(2))[1].squeeze(0)

    spectrum = sphere_spectrum(kernel, 3, 200)
    for parity in (0, 1):
        assert spectrum.decay(first=40, parity=parity).power == pytest.approx(3, abs=0.05)


@pytest.mark.slow
def test_depth_makes_a_spike_where_the_branch_keeps_its_share_and_not_where_it_shrinks():
    depths = (16, 64, 256)
    spiky = [half_angle(lambda t, n=n: resntk(t, n, 1.0)) for n in depths]
    stable = [half_angle(lambda t, n=n: resntk(t, n, n**-0.5)) for n in depths]
    # The spike's width goes to a power of the depth, 1/L; the stable kernel has a limit.
    assert 3 < spiky[0] / spiky[1] < spiky[1] / spiky[2] < 4
    assert max(stable) / min(stable) < 1.02
    share = lambda a, n: sphere_spectrum(lambda t: resntk(t, n, a), 3, 10).shares.sum()  # noqa: E731
    assert share(1.0, 64) < 0.8 * share(1.0, 4)
    assert share(1 / 8, 64) == pytest.approx(share(1 / 2, 4), abs=0.02)


def test_eigenvalues_with_multiplicity_sum_to_the_value_at_1():
    spectrum = sphere_spectrum(lambda t: torch.exp(t), 5, 30)
    assert spectrum.shares.sum() == pytest.approx(1, rel=1e-12)
    assert spectrum.trace == pytest.approx(math.e)
    rough = sphere_spectrum(lambda t: resntk(t, 2, 1.0), 3, 100)
    assert 0.99 < rough.shares.sum() < 1


def test_multiplicities_are_those_of_spherical_harmonics():
    for n in range(6):
        assert multiplicity(3, n) == 2 * n + 1
        assert multiplicity(4, n) == (n + 1) ** 2
        assert multiplicity(2, n) == (1 if n == 0 else 2)


def test_a_pure_power_is_found_with_no_error_and_noise_is_left_out():
    degrees = tuple(range(61))
    shifted = np.array(degrees) + 0.5
    pure = SphereSpectrum(3, degrees, shifted**-2.5, (1,) * 61, np.full(61, 1e-20), 1.0)
    decay = pure.decay()
    assert decay.power == pytest.approx(2.5, abs=1e-12) and decay.error < 1e-12 and decay.degrees == (7, 60, 54)
    noisy = SphereSpectrum(3, degrees, shifted**-2.5, (1,) * 61, np.where(shifted > 40, 1.0, 1e-20), 1.0)
    assert noisy.decay().degrees[1] == 39
    with pytest.raises(ValueError, match="three degrees whose eigenvalues are positive and above 30 times"):
        sphere_spectrum(lambda t: torch.exp(t), 7, 60).decay(first=40)


def test_the_standard_error_of_a_power_is_the_spread_of_fits_to_noisy_eigenvalues():
    rng, degrees = np.random.default_rng(0), tuple(range(1, 61))
    exact = (np.array(degrees) + 0.5) ** -3.0
    fits = []
    for _ in range(300):
        noise = np.exp(0.1 * rng.standard_normal(60))
        fits.append(SphereSpectrum(3, degrees, exact * noise, (1,) * 60, np.zeros(60), 1.0).decay())
    spread = np.std([fit.power for fit in fits])
    # The spread of 300 numbers is known to 1 part in sqrt(600).
    assert np.mean([fit.error for fit in fits]) == pytest.approx(spread, rel=4 / math.sqrt(600))


def test_it_prints_itself():
    spectrum = sphere_spectrum(lambda t: torch.exp(t), 3, 30)
    assert str(spectrum).startswith("spectrum on the sphere of R^3, k(1) = 2.71828\n  degree 0: 1.175201e+00")
    assert str(spectrum).endswith("and 19 more")
    assert "degree 2:" in str(sphere_spectrum(lambda t: torch.exp(t), 3, [2]))
    assert str(sphere_spectrum(lambda t: resntk(t, 2, 1.0), 3, 60).decay()).startswith("k^-3.0")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: sphere_spectrum(k, 1, 5), ValueError, "has to be a whole number of at least 2, got 1"),
        (lambda k: sphere_spectrum(k, 3.0, 5), TypeError, "dimension has to be a whole number of at least 2, got 3.0"),
        (lambda k: sphere_spectrum(k, 3, [1, -2]), ValueError, "Degrees have to be some numbers from 0 on"),
        (lambda k: sphere_spectrum(k, 3, -1), ValueError, "Degrees have to be some numbers from 0 on"),
        (lambda k: sphere_spectrum(k, 3, [0.5]), TypeError, "Degrees have to be whole numbers"),
        (lambda k: sphere_spectrum(lambda t: t.numpy(), 3, 5), TypeError, "has to return a tensor, got ndarray"),
        (lambda k: sphere_spectrum(lambda t: t.sum(), 3, 5), ValueError, "has to be elementwise"),
        (lambda k: sphere_spectrum(lambda t: 1 / (1 - t), 3, 5), ValueError, "not finite at cosine 1.0"),
        (lambda k: half_angle(lambda t: -t), ValueError, "does not fall from cosine 1"),
        (lambda k: multiplicity(3, -1), ValueError, "from 0 on"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.exp)
