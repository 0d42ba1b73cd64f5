"""Spectra of matrices whose eigenvalues are known by construction."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.tangent.training.spectra import spectrum

EPS = torch.finfo(torch.float64).eps


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors, in float64. [n, n]"""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    K = q @ torch.diag(values.double()) @ q.T
    return (K + K.T) / 2


def powers(n: int, exponent: float) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -exponent


def test_eigenvalues_are_those_the_matrix_was_made_of_in_descending_order() -> None:
    values = torch.tensor([7.0, 3.0, 1.0, 0.5, 1e-3], dtype=torch.float64)
    found = spectrum(with_eigenvalues(values[torch.tensor([3, 0, 4, 1, 2])]))
    # Weyl: rounding of products and of a backward-stable solver, both a small multiple of n eps |K|.
    assert torch.allclose(found.eigenvalues, values, rtol=0, atol=20 * 5 * EPS * 7)
    assert found.eigenvalues.dtype == torch.float64
    assert found.condition == pytest.approx(7e3, rel=1e-9)
    assert found.trace == pytest.approx(11.501)
    assert found.rank == 5


@given(st.integers(1, 12), st.integers(1, 12))
@settings(deadline=None, max_examples=25)
def test_equal_eigenvalues_have_as_many_effective_dimensions_as_there_are(equal: int, zero: int) -> None:
    found = spectrum(torch.diag(torch.tensor([2.0] * equal + [0.0] * zero, dtype=torch.float64)))
    assert found.effective_rank == pytest.approx(equal)
    assert found.stable_rank == pytest.approx(equal)
    assert found.rank == equal
    assert found.condition == math.inf


def test_the_effective_rank_is_the_exponential_of_the_entropy() -> None:
    found = spectrum(torch.diag(torch.tensor([0.5, 0.25, 0.25])))
    assert found.effective_rank == pytest.approx(2**1.5)  # entropy 1.5 bits
    assert found.stable_rank == pytest.approx(2)


@given(st.floats(0.2, 4.0), st.integers(20, 120))
@settings(deadline=None, max_examples=25)
def test_the_exponent_of_an_exact_power_law_is_found_with_no_error_left(exponent: float, n: int) -> None:
    decay = spectrum(torch.diag(powers(n, exponent))).decay
    assert decay is not None
    assert decay.exponent == pytest.approx(exponent, abs=1e-9)
    assert decay.scale == pytest.approx(1, abs=1e-7)
    assert decay.standard_error < 1e-9
    assert decay.r2 == pytest.approx(1, abs=1e-12)
    assert decay.halves == pytest.approx((exponent, exponent), abs=1e-8)
    assert (decay.first, decay.last) == (round(math.sqrt(n) / 2), n // 2)


def test_slope_error_and_interval_are_those_of_least_squares() -> None:
    """Against numpy's polyfit with its covariance, and scipy's linregress."""
    stats = pytest.importorskip("scipy.stats")
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = (powers(60, 1.3) * torch.exp(0.1 * noise)).sort(descending=True).values
    decay = spectrum(torch.diag(values), fit=(5, 40)).decay
    assert decay is not None
    x, y = np.log(np.arange(5, 41)), np.log(values.numpy()[4:40])
    line = stats.linregress(x, y)
    assert decay.exponent == pytest.approx(-line.slope, rel=1e-10)
    assert decay.standard_error == pytest.approx(line.stderr, rel=1e-10)
    assert decay.r2 == pytest.approx(line.rvalue**2, rel=1e-10)
    assert decay.high - decay.low == pytest.approx(2 * 2.0322 * line.stderr, rel=1e-4)  # t of 34 degrees of freedom


def test_an_exponential_decay_is_told_from_a_power_law() -> None:
    decay = spectrum(torch.diag(torch.exp(-0.3 * torch.arange(40, dtype=torch.float64)))).decay
    assert decay is not None
    assert decay.r2_exponential == pytest.approx(1, abs=1e-12)
    assert decay.r2 < 0.95
    assert decay.halves[1] > 2 * decay.halves[0]


def test_all_outputs_are_one_matrix_with_samples_outermost() -> None:
    J = torch.randn(4, 3, 50, dtype=torch.float64)  # samples, outputs, parameters
    K = torch.einsum("iap,jbp->ijab", J, J)
    expected = torch.linalg.eigvalsh(J.reshape(12, 50) @ J.reshape(12, 50).T).flip(0)
    assert torch.allclose(spectrum(K).eigenvalues, expected, rtol=1e-12)


def test_outputs_by_themselves_are_a_block_diagonal_matrix() -> None:
    J = torch.randn(4, 3, 50, dtype=torch.float64)
    K = torch.einsum("iap,jap->ija", J, J)
    dense = torch.block_diag(*(J[:, a] @ J[:, a].T for a in range(3)))
    assert torch.allclose(spectrum(K).eigenvalues, torch.linalg.eigvalsh(dense).flip(0), rtol=1e-12)


def test_a_kernel_of_low_rank_is_infinitely_conditioned_not_conditioned_by_rounding() -> None:
    J = torch.randn(20, 5, dtype=torch.float64)
    found = spectrum(J @ J.T)
    assert found.rank == 5
    assert found.condition == math.inf
    assert "infinite to rounding (rank 5)" in str(found)
    assert not found.is_indefinite


def test_the_floor_is_that_of_the_type_the_kernel_was_computed_in() -> None:
    J = torch.randn(30, 10)
    K = J @ J.T  # float32: its zeros are of some 1e-6
    assert spectrum(K).rank == 10
    assert spectrum(K.double()).rank > 10 or spectrum(K.double()).is_indefinite
    assert spectrum(K.double(), rounding=torch.finfo(torch.float32).eps).rank == 10


def test_an_indefinite_matrix_is_flagged_with_the_share_that_is_negative() -> None:
    found = spectrum(with_eigenvalues(torch.tensor([3.0, 1.0, -1.0])))
    assert found.is_indefinite
    assert found.negative == pytest.approx(0.2)
    assert found.condition == math.inf
    assert "INDEFINITE: 20.0%" in str(found)


def test_a_matrix_of_zeros_has_no_rank_and_no_decay() -> None:
    found = spectrum(torch.zeros(4, 4))
    assert (found.rank, found.effective_rank, found.stable_rank, found.decay) == (0, 0, 0, None)
    assert found.negative == 0
    assert "too few" in str(found)


@pytest.mark.parametrize(
    ("K", "error", "words"),
    [
        (torch.randn(3, 5), ValueError, r"\[3, 5\].*ntk\(model, x\)"),
        (torch.randn(4), ValueError, r"got \[4\]"),
        (torch.randn(4, 4, 2, 3), ValueError, r"\[4, 4, 2, 3\]"),
        (torch.empty(0, 0), ValueError, r"\[0, 0\]"),
        (torch.arange(9.0).reshape(3, 3), ValueError, r"not symmetric: .* = \d"),
        (torch.eye(3, dtype=torch.complex64), TypeError, "real numbers"),
        (torch.eye(3, dtype=torch.bool), TypeError, "real numbers"),
        ([[1.0]], TypeError, "got a list"),
        (torch.diag(torch.tensor([1.0, float("nan"), float("inf")])), ValueError, r"2 of 9, the first at \[1, 1\]"),
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(K: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        spectrum(K)  # type: ignore[arg-type]


@pytest.mark.parametrize("fit", [(0, 5), (1, 2), (5, 1), (1.0, 5), 7, (1, 5, 9)])
def test_a_range_that_is_none_is_refused(fit: object) -> None:
    with pytest.raises(ValueError, match="two indices counted from 1"):
        spectrum(torch.eye(9), fit=fit)  # type: ignore[arg-type]


def test_a_fit_through_rounding_errors_is_refused() -> None:
    J = torch.randn(20, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="beyond the 5 eigenvalues that are above rounding"):
        spectrum(J @ J.T, fit=(1, 12))


def test_rounding_alone_is_not_asymmetry() -> None:
    """Sums of 2,000 products in another order in float32; exact symmetry is not asked for."""
    J = torch.randn(10, 2000)
    K = torch.stack([(J * row).sum(1) for row in J])
    K[0, 1] *= 1 + 3e-6
    spectrum(K)


def test_the_matrix_given_is_not_changed() -> None:
    K = with_eigenvalues(powers(6, 1.0))
    before = K.clone()
    spectrum(K)
    assert torch.equal(K, before)


def test_numpy_and_torch_give_the_same() -> None:
    K = with_eigenvalues(powers(6, 1.0))
    assert torch.equal(spectrum(K).eigenvalues, spectrum(K.numpy()).eigenvalues)


def test_words_plain_data_and_plot_say_it_too(tmp_path) -> None:
    found = spectrum(with_eigenvalues(torch.cat([powers(30, 1.5), torch.zeros(2)])))
    assert "32 eigenvalues, 1 to" in str(found)
    assert "i^-1.50 +- 0.00 fitted over i = 3..15" in str(found)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["condition"] is None
    assert plain["decay"]["exponent"] == pytest.approx(1.5)
    assert found.plot(tmp_path / "s.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="folder"):
        found.plot(tmp_path / "missing" / "s.png")
