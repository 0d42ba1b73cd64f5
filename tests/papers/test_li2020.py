"""The experiments on tangent kernels: each runs at its tiny size, and judges made-up rows as it should."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from abyssal.papers.experiment import SIZES, Work
from abyssal.papers.experiments.belfer2021 import spectrum as belfer2021_spectrum
from abyssal.papers.experiments.li2020 import convergence as li2020_convergence
from abyssal.papers.experiments.li2020 import drift as li2020_drift
from abyssal.papers.experiments.li2020 import truncation as li2020_truncation
from abyssal.papers.experiments.li2020 import width as li2020_width
from abyssal.papers.experiments.littwin2020 import fluctuations as littwin2020_fluctuations
from abyssal.tangent.empirical.ntk import ntk

MODULES = [
    "li2020.drift", "li2020.truncation", "li2020.width", "li2020.convergence", "littwin2020.fluctuations",
    "belfer2021.spectrum",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_it_runs_at_its_tiny_size_and_judges_and_draws_what_it_found(name, tmp_path):
    experiment = importlib.import_module(f"abyssal.papers.experiments.{name}").EXPERIMENT
    settings = experiment.sizes["tiny"]
    rows = experiment.run(settings, Work())
    assert rows
    findings = experiment.check(rows, settings)
    assert len(findings) >= 3 and all(finding.claim and finding.measured for finding in findings)
    figure = experiment.plot(rows, settings)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    for size in SIZES:
        hash(experiment.name)
        assert experiment.minutes[size] > 0


def verdicts(findings):
    return [finding.holds for finding in findings]


class TestDrift:
    SETTINGS = li2020_drift.Settings((32, 64, 128), 8)

    def rows(self, drift=(-1.0, -0.8), k3=-1.0, k4=-1.2, ratio=0.2, noise=0.05):
        random = np.random.default_rng(0)
        rows = []
        for network, slope, size in (("resnet", drift[0], ratio), ("plain", drift[1], 1.0)):
            for width in self.SETTINGS.widths:
                for seed in range(8):

                    def value(power, at=1.0, width=width):
                        return at * (width / 32) ** power * math.exp(noise * random.standard_normal())

                    row = {"network": network, "width": width, "seed": seed, "K3": value(k3), "K4": value(k4)}
                    row |= {f"drift_max_{tau:g}": value(slope, size) for tau in self.SETTINGS.by_largest}
                    rows.append(row | {f"drift_min_{tau:g}": value(slope, size) for tau in self.SETTINGS.by_least})
        return rows

    def test_what_the_theory_says_is_found_to_hold(self):
        assert verdicts(li2020_drift.check(self.rows(), self.SETTINGS)) == [True] * 5

    @pytest.mark.parametrize(
        ("change", "which"),
        [
            ({"drift": (0.2, -0.8)}, 0), ({"k3": -0.2}, 1), ({"k4": -0.7}, 2), ({"ratio": 3.0}, 3), ({"ratio": 3.0}, 4),
        ],
    )  # fmt: skip
    def test_what_is_not_so_is_found_not_to_hold(self, change, which):
        assert verdicts(li2020_drift.check(self.rows(**change), self.SETTINGS))[which] is False

    def test_noise_decides_nothing(self):
        found = verdicts(li2020_drift.check(self.rows(noise=5.0), self.SETTINGS))
        assert found.count(None) >= 4


class TestTruncation:
    SETTINGS = li2020_truncation.Settings((32, 256), 4)

    def rows(self, order4=1.0):
        """The reference's own figures with a little spread, order 4 off by a factor."""
        return [
            {"network": network, "width": width, "seed": seed, "order": order, "time": time,
             "kernel_error": error * (1 + 0.1 * (seed - 1.5)) * (order4 if order == 4 else 1.0)}
            for network in ("resnet", "plain")
            for (order, time, width), error in li2020_truncation.REFERENCE.items()
            for seed in range(4)
        ]  # fmt: skip

    def test_the_earlier_runs_figures_agree_with_themselves_and_with_nothing_twice_as_large(self):
        findings = li2020_truncation.check(self.rows(), self.SETTINGS)
        last = findings[-1]
        assert last.holds is True and last.measured == "12 of 12"
        assert findings[0].holds is True  # errors fall with width at every order and time
        off = li2020_truncation.check(self.rows(order4=2.0), self.SETTINGS)[-1]
        assert off.holds is False and off.measured == "8 of 12"

    def test_an_order_that_is_farther_is_told(self):
        found = {f.claim: f.holds for f in li2020_truncation.check(self.rows(order4=1e4), self.SETTINGS)}
        assert found["ResNet, m = 256, t = 1: order 4 is closer than order 3"] is False
        assert found["ResNet, m = 256, t = 1: order 3 is closer than order 2"] is True

    def test_other_settings_are_not_held_against_the_earlier_run(self):
        findings = li2020_truncation.check(self.rows(), replace(self.SETTINGS, n=12))
        assert not any("earlier run" in finding.claim for finding in findings)


class TestWidth:
    WIDTHS = (4, 8, 16, 32, 64, 128, 256)
    SETTINGS = li2020_width.Settings((4, 8, 16, 32), {"resnet": WIDTHS, "plain": WIDTHS}, 60)

    def rows(self, resnet, plain, steep=4.0):
        """Networks that keep it with log odds `steep (log m - p log n)`."""
        random = np.random.default_rng(0)
        return [
            {"network": network, "n": n, "width": m, "seed": seed, "loss": 0.009,
             "kept": bool(random.random() < 1 / (1 + math.exp(-steep * (math.log(m) - p * math.log(n)))))}
            for network, p in (("resnet", resnet), ("plain", plain))
            for n in self.SETTINGS.samples
            for m in self.WIDTHS
            for seed in range(60)
        ]  # fmt: skip

    def test_the_power_that_was_put_in_comes_out_within_its_interval(self):
        fit = li2020_width.needed(self.rows(1.0, 1.4), "resnet")
        assert fit.low < 1.0 < fit.high and fit.high - fit.low < 0.5
        # log odds of 90 % are log 9: m = n exp(log 9 / steep)
        assert fit.at(np.array([16.0]))[0] == pytest.approx(16 * math.exp(math.log(9) / 4), rel=0.15)

    @pytest.mark.slow
    def test_powers_are_told_apart(self):
        assert verdicts(li2020_width.check(self.rows(0.5, 1.4), self.SETTINGS)) == [True, True, True, True]
        assert verdicts(li2020_width.check(self.rows(1.4, 0.5), self.SETTINGS))[2:] == [False, False]
        # Beyond the proofs: more than n^3 for the residual network.
        steep = [row | {"n": row["n"] ** (1 / 5)} for row in self.rows(1.0, 1.0)]
        assert verdicts(li2020_width.check(steep, self.SETTINGS))[0] is False

    def test_networks_that_always_keep_it_decide_nothing(self):
        rows = [row | {"kept": True} for row in self.rows(1.0, 1.0)]
        assert verdicts(li2020_width.check(rows, self.SETTINGS)) == [None] * 4


class TestConvergence:
    SETTINGS = li2020_convergence.Settings((16, 64), 4, (0.5, 1.0))

    def rows(self, rate=3.0, frozen=3.0, least=0.8):
        return [
            {"network": network, "width": width, "seed": seed, "time": time, "least": least,
             "log_loss": -rate * time * (1 + 0.01 * seed), "log_loss_frozen": -frozen * time}
            for network in ("resnet", "plain")
            for width in self.SETTINGS.widths
            for seed in range(4)
            for time in self.SETTINGS.by_least
        ]  # fmt: skip

    def test_a_promise_kept_broken_or_not_made(self):
        assert verdicts(li2020_convergence.check(self.rows(), self.SETTINGS)) == [True] * 4
        assert verdicts(li2020_convergence.check(self.rows(rate=0.9), self.SETTINGS)) == [False] * 4
        unmade = verdicts(li2020_convergence.check(self.rows(rate=0.9, least=0.4), self.SETTINGS))
        assert unmade[:2] == [None, None]

    def test_the_bound_is_met_where_its_premise_is(self):
        settings = li2020_convergence.EXPERIMENT.sizes["tiny"]
        rows = li2020_convergence.run(settings, Work())
        assert all(row["log_loss"] <= -row["time"] for row in rows if row["least"] >= 0.5)
        # The frozen kernel's loss is a mean of exp(-2 lambda_i t / n): between the slowest and the fastest mode.
        for row in rows:
            ratio = row["lambda_max"] / row["lambda_min"]
            assert -2 * row["time"] * ratio <= row["log_loss_frozen"] <= -2 * row["time"] + 1e-12


class TestFluctuations:
    SETTINGS = littwin2020_fluctuations.Settings((8, 16, 32, 64), (16, 32), 100)

    def rows(self, summable=0.0, other=1.0, width=-1.0):
        rows = []
        for kind, (_, sums) in littwin2020_fluctuations.KINDS.items():
            for m in self.SETTINGS.widths:
                for depth in self.SETTINGS.depths:
                    variance = 0.1 * (m / 16) ** width * (depth / 8) ** summable if sums else other * depth / m
                    rows.append({"kind": kind, "width": m, "depth": depth, "log_variance": variance,
                                 "error": 0.03 * abs(variance)})  # fmt: skip
        return rows

    def test_what_was_put_in_is_found(self):
        check = littwin2020_fluctuations.check
        assert verdicts(check(self.rows(), self.SETTINGS)) == [True] * 7
        assert verdicts(check(self.rows(summable=0.5), self.SETTINGS))[:2] == [False, False]
        assert verdicts(check(self.rows(width=-0.4), self.SETTINGS))[4:6] == [False, False]

    def test_another_seed_is_another_draw(self):
        settings = littwin2020_fluctuations.Settings((2,), (16,), 10)
        one, other = (littwin2020_fluctuations.run(replace(settings, seed=seed), Work()) for seed in (0, 1000))
        assert all(a["log_mean"] != b["log_mean"] for a, b in zip(one, other, strict=True))

    @pytest.mark.parametrize("kind", list(littwin2020_fluctuations.KINDS))
    def test_the_kernel_written_out_is_that_of_the_network(self, kind):
        depth, width, features = 3, 12, 4
        power = littwin2020_fluctuations.KINDS[kind][0]
        found = littwin2020_fluctuations.log_kernels(kind, depth, width, features, 1, torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(3)

        class Network(torch.nn.Module):
            def __init__(self):
                super().__init__()

                def normal(*shape):
                    drawn = torch.randn(1, *shape, generator=generator, dtype=torch.float64)[0]
                    return torch.nn.Parameter(drawn)

                self.first = normal(width, features)
                self.pairs = torch.nn.ParameterList(normal(width, width) for _ in range(2 * depth))
                self.last = normal(width)

            def forward(self, x):
                h = x @ self.first.T
                for i in range(0, 2 * depth, 2):  # a slice of a ParameterList would hold copies under torch.func
                    W, V = self.pairs[i], self.pairs[i + 1]
                    b = (math.sqrt(2) * torch.relu(h @ W.T / width**0.5)) @ V.T / width**0.5
                    h = math.sqrt(2) * torch.relu(b) if power is None else h + depth**-power * b
                return (h @ self.last / width**0.5)[:, None]

        x = torch.zeros(1, features, dtype=torch.float64)
        x[0, 0] = 1
        assert float(found[0].exp()) == pytest.approx(float(ntk(Network(), x)[0, 0]), rel=1e-12)


class TestSpectrum:
    SETTINGS = belfer2021_spectrum.Settings((3,), (2,), 64, (2, 128))

    def rows(self, power=3.0, last=0.05, far=0.0):
        """Eigenvalues of a power, and beyond degree 32 of another."""
        rows = [
            {"kernel": kernel, "depth": 1 if kernel == "Laplace" else 2, "dimension": 3, "degree": k,
             "eigenvalue": 33.0 ** (far * (k > 32)) * (k + 0.5) ** -(power + far * (k > 32)), "error": 0.0,
             "half_angle": None}
            for kernel in (*belfer2021_spectrum.BALANCES, "fully connected", "Laplace")
            for k in range(65)
        ]  # fmt: skip
        for kernel in belfer2021_spectrum.BALANCES:
            rows.append({"kernel": kernel, "depth": 2, "half_angle": 0.8})
            rows.append({"kernel": kernel, "depth": 128, "half_angle": last if kernel == "1" else 0.79})
        return rows

    def test_what_was_put_in_is_found(self):
        check = belfer2021_spectrum.check
        assert verdicts(check(self.rows(), self.SETTINGS)) == [True] * 5
        assert verdicts(check(self.rows(power=3.4), self.SETTINGS))[:2] == [
            False,
            False,
        ]  # far, and no nearer further out
        assert verdicts(check(self.rows(far=0.4), self.SETTINGS))[:2] == [False, False]
        assert verdicts(check(self.rows(last=0.7), self.SETTINGS))[2] is False
